// The model's shape, read from a Hugging Face config.json of model_type qwen3_moe.
#ifndef MOE_CONFIG_H
#define MOE_CONFIG_H
#include "../kernels/types.h"
MOE_BEGIN_C
typedef struct {
    int C;        // hidden_size
    int L;        // num_hidden_layers
    int H, KV, D; // num_attention_heads, num_key_value_heads, head_dim (hidden_size / heads where
                  // the key is missing, as HF)
    int V;        // vocab_size
    int E, K, F;  // num_experts | num_local_experts, num_experts_per_tok, moe_intermediate_size
    int I;        // intermediate_size: width of dense MLP layers
    int max_positions; // max_position_embeddings
    int norm_topk;     // norm_topk_prob: scores divided by their sum
    int tied;          // tie_word_embeddings: lm_head is the embedding
    int pad, bos,
        eos; // token ids, -1 = none. pad: that embedding row gets no gradient from look-ups
    double rope_theta, rms_eps, init_std, aux_coef; // initializer_range, router_aux_loss_coef
    unsigned char *is_moe; // (L) 1 where the layer has experts: not in mlp_only_layers and (l+1) %
                           // decoder_sparse_step == 0
    int n_moe;             // MoE layers
    char *json;            // the file's text, for export
} Config;
// Reads and checks a config. Missing keys take the defaults of HF's class; a key that changes the
// mathematics and is not supported (sliding window, rope scaling, attention_bias, attention_dropout
// > 0, hidden_act other than silu, another model_type) dies naming it, as do impossible shapes (K >
// E, H % KV, odd D, ...).
Config config_read(const char *path);
void config_free(Config *c);
// The text of a config.json that transformers 4.51+ and 5.x, vLLM and llama.cpp read: the input's
// keys, with the 4.x spellings and the given dtype name.
char *config_export(const Config *c, const char *dtype);
// Parameters that one token meets: in matrix products (attention, router, K of E experts, head);
// the same with norm weights, without the embedding ("3B active"). total: every parameter, a tied
// head once.
double config_matrix_parameters(const Config *c);
double config_active_parameters(const Config *c);
double config_total_parameters(const Config *c);
// FLOPs of one token of a sequence of T, forward and backward: 6 * config_matrix_parameters + 12 *
// L * H * D * T / 2 (causal half, no recompute).
double config_flops_per_token(const Config *c, int T);
MOE_END_C
#endif
