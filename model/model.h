// The model on one page: its dimensions, its parameters, and what a layer leaves for backward.
//
// A parameter is stored as (n, parts, rows, cols): n = 1 or the experts here, parts = Hugging Face
// tensors side by side (gate over up); each (expert, part) is one Hugging Face tensor of
// (rows, cols). The parameters of one layer and kind follow one another in a flat BLOCK, each
// aligned to 256 elements; a block is cut evenly into shards at multiples of 256 elements, one for
// each rank that holds it. In one process a shard is the block.
#ifndef MOE_MODEL_H
#define MOE_MODEL_H
#include "../kernels/kernels.h"
MOE_BEGIN_C

// ---- dimensions: a Hugging Face config.json of model_type qwen3_moe -------------------------
typedef struct {
    int C;             // hidden_size
    int L;             // num_hidden_layers
    int H, KV, D;      // num_attention_heads, num_key_value_heads, head_dim (C / H if missing)
    int V;             // vocab_size
    int E, K, F;       // num_experts (or num_local_experts), num_experts_per_tok (the router's
                       // top_k), moe_intermediate_size (width of an expert)
    int I;             // intermediate_size: width of a dense MLP
    int max_positions; // max_position_embeddings
    int norm_topk;     // norm_topk_prob: a token's scores are divided by their sum
    int tied;          // tie_word_embeddings: the head's matrix is the embedding
    int pad, bos, eos; // token ids, -1 = none. Look-ups of pad give that row no gradient
    double rope_theta, rms_eps;
    double init_std, aux_coef; // initializer_range, router_aux_loss_coef
    unsigned char *is_moe;     // (L) 1 where the layer has experts: it is not in mlp_only_layers,
                               // and decoder_sparse_step divides l + 1
    int n_moe;                 // MoE layers
    char *json;                // the file's text, for export
} Config;
// Reads and checks a config.json. Missing keys take the defaults of transformers' class. Dies on an
// impossible shape (K > E, odd D, ...) and on a key that changes the mathematics and is not
// supported (sliding window, rope scaling, biases, dropout, another activation or model_type).
Config config_read(const char *path);
void config_check_folder(const char *model); // ends the run with a hint if --model is no folder
void config_free(Config *c);
// Returns the text of a config.json that transformers 4.51+ and 5.x, vLLM and llama.cpp read: the
// keys that were read, in the 4.x spelling, with the given dtype name. The caller frees it.
char *config_export(const Config *c, const char *dtype);
// Counts the parameters that one token meets in matrix products (attention, router, K of E experts,
// head); the same with norm weights (the "3B active"); and all of the model, a tied head once.
double config_matrix_parameters(const Config *c);
double config_active_parameters(const Config *c);
double config_total_parameters(const Config *c);
// Counts the FLOPs of one token of a sequence of T, forward and backward, without recomputation:
// 6 * config_matrix_parameters + 12 * L * H * D * T / 2 (the causal half of attention). Where a
// sequence is several documents, T is the mean length of the document that a token is in.
double config_flops_per_token(const Config *c, double T);

// ---- the parameter table (I6, one table) ----------------------------------------------------
typedef enum { // decides how a parameter is sharded, reduced and sliced; nothing else does
    DENSE,     // sharded over fsdp x ep
    EXPERT,    // expert index over ep, then flat over fsdp
    HEAD_ROWS, // q, k, v with --attention heads: rows (output heads) over ep, then flat over fsdp
    HEAD_COLS  // o with --attention heads: columns (input heads), likewise. Without it both: DENSE
} Kind;
typedef enum { INIT_NORMAL, INIT_ONES } Init;
typedef enum { EVERY, IF_MOE, IF_MLP, IF_UNTIED } When; // in which layers a row exists

// One row a parameter: id; where: E = before the layers, L = in every layer, H = after them; in
// which of them; kind; weight decay; init; parts; rows, cols; Hugging Face's name of each part
// without ".weight" (in a layer after "model.layers.<l>."), where %d is the expert's global id.
#define PARAM_TABLE(X)                                                                             \
    X(EMBED, 'E', EVERY, DENSE, 1, INIT_NORMAL, 1, c->V, c->C, "model.embed_tokens", 0)            \
    X(ATTN_NORM, 'L', EVERY, DENSE, 0, INIT_ONES, 1, 1, c->C, "input_layernorm", 0)                \
    X(Q, 'L', EVERY, HEAD_ROWS, 1, INIT_NORMAL, 1, c->H * c->D, c->C, "self_attn.q_proj", 0)       \
    X(KEY, 'L', EVERY, HEAD_ROWS, 1, INIT_NORMAL, 1, c->KV * c->D, c->C, "self_attn.k_proj", 0)    \
    X(VALUE, 'L', EVERY, HEAD_ROWS, 1, INIT_NORMAL, 1, c->KV * c->D, c->C, "self_attn.v_proj", 0)  \
    X(Q_NORM, 'L', EVERY, DENSE, 0, INIT_ONES, 1, 1, c->D, "self_attn.q_norm", 0)                  \
    X(K_NORM, 'L', EVERY, DENSE, 0, INIT_ONES, 1, 1, c->D, "self_attn.k_norm", 0)                  \
    X(O, 'L', EVERY, HEAD_COLS, 1, INIT_NORMAL, 1, c->C, c->H * c->D, "self_attn.o_proj", 0)       \
    X(MLP_NORM, 'L', EVERY, DENSE, 0, INIT_ONES, 1, 1, c->C, "post_attention_layernorm", 0)        \
    X(ROUTER, 'L', IF_MOE, DENSE, 1, INIT_NORMAL, 1, c->E, c->C, "mlp.gate", 0)                    \
    X(EXPERT_UP, 'L', IF_MOE, EXPERT, 1, INIT_NORMAL, 2, c->F, c->C, "mlp.experts.%d.gate_proj",   \
      "mlp.experts.%d.up_proj")                                                                    \
    X(EXPERT_DOWN, 'L', IF_MOE, EXPERT, 1, INIT_NORMAL, 1, c->C, c->F, "mlp.experts.%d.down_proj", \
      0)                                                                                           \
    X(MLP_UP, 'L', IF_MLP, DENSE, 1, INIT_NORMAL, 2, c->I, c->C, "mlp.gate_proj", "mlp.up_proj")   \
    X(MLP_DOWN, 'L', IF_MLP, DENSE, 1, INIT_NORMAL, 1, c->C, c->I, "mlp.down_proj", 0)             \
    X(FINAL_NORM, 'H', EVERY, DENSE, 0, INIT_ONES, 1, 1, c->C, "model.norm", 0)                    \
    X(HEAD, 'H', IF_UNTIED, DENSE, 1, INIT_NORMAL, 1, c->V, c->C, "lm_head", 0)

#define PARAM_ID(id, ...) P_##id,
typedef enum { PARAM_TABLE(PARAM_ID) P_COUNT } ParamId;
#undef PARAM_ID

// How this rank's part of the model is cut out. One process: { 1, 0, 1, 0, 1, 0, 0 }.
typedef struct {
    int ep, ep_rank;               // experts [ep_rank * E/ep, (ep_rank + 1) * E/ep) are here
    int dense_shards, dense_index; // of DENSE blocks: fsdp x ep, and which one is here
    int local_shards, local_index; // of blocks that differ by ep rank (experts, split heads): fsdp
    int split_heads;               // --attention heads
} ShardSpec;

// One parameter of one layer, as this rank's blocks hold it.
typedef struct {
    ParamId id;
    int layer; // -1 before the layers, L after them
    Kind kind;
    int block;                // index into Model.block
    int64_t offset, size;     // elements: its first in the gathered block, and n*parts*rows*cols
    int n, parts;             // experts here (or 1), Hugging Face tensors of each
    int first;                // global id of the first expert here
    int rows, cols;           // of one tensor here; split heads have a part of its rows or columns
    int full_rows, full_cols; // of the whole tensor
    int row0, col0;           // where this rank's part begins in it
    int decay;
    Init init;
    const char *hf[2]; // name patterns of the parts
} Param;

// What is gathered, reduced and stepped together.
typedef struct {
    int layer;                 // -1 embedding, 0..L-1, L = final norm and head
    int local;                 // 1: content differs by ep rank, sharded over fsdp; 0: dense
    int first_param, n_params; // into Model.param
    int64_t size;              // elements, padded to shards * shard
    int64_t shard, shard0;     // elements of a shard; the first element of this rank's
    int n_segments;
    Segment *segment; // (n_segments) this rank's shard as pieces of Hugging Face tensors, in order
    int *segment_param; // (n_segments) index of the Param of each
    int *segment_slice; // (n_segments) expert here * parts + part
    int64_t n_qblocks;  // 256-element blocks of 8-bit optimizer state in the shard
} Block;

typedef struct {
    Config c;
    ShardSpec shard_spec;
    int n_params, n_blocks;
    Param *param; // in the order of computation
    Block *block;
    int *dense_block, *local_block; // (L) blocks of a layer; local -1 where it has none
    int *moe_index;                 // (L) the layer's number among the MoE layers, -1 if dense
    int embed_block, head_block;
} Model;

// Builds parameters, blocks and segments from a config, which the model then owns. Dies where the
// experts or the split heads cannot be divided over ep.
Model model_build(Config c, ShardSpec shard_spec);
void model_free(Model *m);
// Tells whether some rank of this layout has a piece that begins inside a 256-element block of its
// tensor: the 8-bit optimizer refuses such a layout (quant8.h).
int model_cuts_blocks(const Model *m);
// Finds a parameter of a layer (-1 before, L after the layers). Returns 0 if it has none.
const Param *model_param(const Model *m, ParamId id, int layer);
// Writes the full Hugging Face name of slice `expert here * parts + part` into name (160 chars).
void param_hf_name(const Param *p, int slice, char *name);
// Calls visit for every Hugging Face tensor of the whole model, in table order; a 1-D tensor has
// is_vector 1 and rows 1.
typedef void (*TensorVisit)(void *context, const char *name, int is_vector, int64_t rows,
                            int64_t cols);
void model_visit(const Config *c, TensorVisit visit, void *context);

// ---- a layer's weights, their gradients, and what is saved for backward ---------------------
// Pointers into the layer's gathered blocks and into their gradient buffers. `heads` and `kv_heads`
// are those of this rank, `experts` those here; a dense layer is one expert of width I.
typedef struct {
    const floatX *attn_norm, *mlp_norm; // (C)
    const floatX *q, *k, *v;            // (heads*D,C) (kv_heads*D,C) (kv_heads*D,C)
    const floatX *q_norm, *k_norm;      // (D)
    const floatX *o;                    // (C,heads*D)
    const floatX *router;               // (E,C), 0 in a dense layer
    const floatX *up, *down;            // (experts,2F,C) gate rows over up rows; (experts,C,F)
} LayerWeights;
typedef struct { // of the same shapes
    gradX *attn_norm, *mlp_norm, *q, *k, *v, *q_norm, *k_norm, *o, *router, *up, *down;
} LayerGrads;
// Points into the gathered dense and local block of a layer (local is 0 if there is none).
LayerWeights layer_weights(const Model *m, int layer, const floatX *dense, const floatX *local);
LayerGrads layer_grads(const Model *m, int layer, gradX *dense, gradX *local);

// Of one layer and micro-batch of R tokens. x and the routing are always saved (I7, the routing is
// decided once). The two groups below them are saved if they fit and --recompute allows it; if not,
// they lie in scratch memory and backward computes them again. A = attention rows: R, or ep * R
// where heads are split.
typedef struct {
    floatX *x;                      // (R,C) input of the layer
    int *topk;                      // (R,K) ascending expert ids
    real *score, *logits;           // (R,K) (R,E)
    int has_attention, has_experts; // which groups are saved
    floatX *q, *k, *v; // (A,heads*D) (A,kv_heads*D) (A,kv_heads*D) before norm and rope
    floatX *o;         // (A,heads*D) output of attention
    real *lse;         // (A,heads) log-sum-exp of the attention scores
    floatX *mid;       // (R,C) after attention's residual
    floatX *H;         // (M,2F) gate and up before SwiGLU, of the rows in use
    floatX *pool;      // (P,C) what the experts saw, if tokens travel; else 0
    real *pool_score;  // (P,K) and the scores that came with it
    Route route;       // the lists if ep > 1, else 0; its table, on the host, is always saved
} Saved;
MOE_END_C
#endif
