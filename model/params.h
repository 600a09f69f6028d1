// The parameter table (I6). One row a parameter; its KIND alone decides how it is sharded, reduced
// and sliced.
//
// A parameter is stored as (n, parts, rows, cols): n = 1 or the experts; parts = Hugging Face
// tensors side by side (gate over up). Each (expert, part) is one HF tensor of (rows, cols).
// Parameters of one layer and kind lie behind one another in a flat BLOCK, each aligned to 256
// elements; a block is cut evenly into shards at multiples of 256 elements. In one process a shard
// is the block.
#ifndef MOE_PARAMS_H
#define MOE_PARAMS_H
#include "config.h"
#include "../kernels/kernels.h"
MOE_BEGIN_C

typedef enum {
    DENSE,     // sharded over fsdp x ep
    EXPERT,    // expert index over ep, then flat over fsdp
    HEAD_ROWS, // q, k, v: with --attention heads rows (output heads) over ep, then flat over fsdp;
               // else as DENSE
    HEAD_COLS  // o: columns (input heads) over ep, likewise
} Kind;
typedef enum { INIT_NORMAL, INIT_ONES } Init;
typedef enum { EVERY, IF_MOE, IF_MLP, IF_UNTIED } When; // in which layers a row exists

// where: E = before the layers, L = in every layer, H = after them.  %d in an HF name = global
// expert id. `shape` uses the dims of Config c.
//        id         where when       kind       decay init         parts rows         cols HF name
//        (in a layer: behind model.layers.<l>.)
#define PARAM_TABLE(X)                                                                             \
    X(EMBED, 'E', EVERY, DENSE, 1, INIT_NORMAL, 1, c->V, c->C, "model.embed_tokens.weight", 0)     \
    X(ATTN_NORM, 'L', EVERY, DENSE, 0, INIT_ONES, 1, 1, c->C, "input_layernorm.weight", 0)         \
    X(Q, 'L', EVERY, HEAD_ROWS, 1, INIT_NORMAL, 1, c->H * c->D, c->C, "self_attn.q_proj.weight",   \
      0)                                                                                           \
    X(KEY, 'L', EVERY, HEAD_ROWS, 1, INIT_NORMAL, 1, c->KV * c->D, c->C,                           \
      "self_attn.k_proj.weight", 0)                                                                \
    X(VALUE, 'L', EVERY, HEAD_ROWS, 1, INIT_NORMAL, 1, c->KV * c->D, c->C,                         \
      "self_attn.v_proj.weight", 0)                                                                \
    X(Q_NORM, 'L', EVERY, DENSE, 0, INIT_ONES, 1, 1, c->D, "self_attn.q_norm.weight", 0)           \
    X(K_NORM, 'L', EVERY, DENSE, 0, INIT_ONES, 1, 1, c->D, "self_attn.k_norm.weight", 0)           \
    X(O, 'L', EVERY, HEAD_COLS, 1, INIT_NORMAL, 1, c->C, c->H * c->D, "self_attn.o_proj.weight",   \
      0)                                                                                           \
    X(MLP_NORM, 'L', EVERY, DENSE, 0, INIT_ONES, 1, 1, c->C, "post_attention_layernorm.weight", 0) \
    X(ROUTER, 'L', IF_MOE, DENSE, 1, INIT_NORMAL, 1, c->E, c->C, "mlp.gate.weight", 0)             \
    X(EXPERT_UP, 'L', IF_MOE, EXPERT, 1, INIT_NORMAL, 2, c->F, c->C,                               \
      "mlp.experts.%d.gate_proj.weight", "mlp.experts.%d.up_proj.weight")                          \
    X(EXPERT_DOWN, 'L', IF_MOE, EXPERT, 1, INIT_NORMAL, 1, c->C, c->F,                             \
      "mlp.experts.%d.down_proj.weight", 0)                                                        \
    X(MLP_UP, 'L', IF_MLP, DENSE, 1, INIT_NORMAL, 2, c->I, c->C, "mlp.gate_proj.weight",           \
      "mlp.up_proj.weight")                                                                        \
    X(MLP_DOWN, 'L', IF_MLP, DENSE, 1, INIT_NORMAL, 1, c->C, c->I, "mlp.down_proj.weight", 0)      \
    X(FINAL_NORM, 'H', EVERY, DENSE, 0, INIT_ONES, 1, 1, c->C, "model.norm.weight", 0)             \
    X(HEAD, 'H', IF_UNTIED, DENSE, 1, INIT_NORMAL, 1, c->V, c->C, "lm_head.weight", 0)

#define PARAM_ID(id, ...) P_##id,
typedef enum { PARAM_TABLE(PARAM_ID) P_COUNT } ParamId;
#undef PARAM_ID

// How this rank's part of the model is cut out. One process: { 1, 0, 1, 0, 1, 0, 0 }.
typedef struct {
    int ep, ep_rank;               // experts [ep_rank * E/ep, (ep_rank+1) * E/ep) are here
    int dense_shards, dense_index; // DENSE blocks: ep x fsdp shards, this rank's index among them
    int local_shards,
        local_index; // blocks whose content differs by ep rank (EXPERT, split heads): fsdp shards
    int split_heads; // --attention heads
} ShardSpec;

// One parameter of one layer, as this rank's blocks hold it.
typedef struct {
    ParamId id;
    int layer; // -1 outside the layers
    Kind kind;
    int block;      // index into Model.block
    int64_t offset; // first element inside the (gathered) block, a multiple of 256
    int64_t size;   // elements in the block = n * parts * rows * cols of this rank
    int n, parts;   // experts HERE (or 1), HF tensors per expert
    int first;      // global id of the first expert here
    int rows,
        cols; // of one HF tensor here: HEAD_ROWS / HEAD_COLS cut them by ep when heads are split
    int full_rows, full_cols; // of the whole HF tensor
    int row0, col0;           // where this rank's part begins in it
    int decay;
    Init init;
    const char *hf[2]; // HF name patterns of the parts
} Param;

// A flat block: what is gathered, used, reduced and stepped together.
typedef struct {
    int layer; // -1 embedding, 0..L-1, L = final norm and head
    int local; // 1: content differs by ep rank (experts, split heads), sharded over fsdp; 0: dense,
               // sharded over fsdp x ep
    int first_param, n_params; // into Model.param
    int64_t size;              // elements, padded to shards * shard
    int64_t shard;             // elements of a shard, a multiple of 256
    int64_t shard0;            // first element of this rank's shard in the block
    int n_segments;
    Segment *segment;   // (n_segments) this rank's shard as pieces of HF tensors, in order
    int *segment_param; // (n_segments) Param of each
    int *segment_slice; // (n_segments) expert here * parts + part
    int64_t n_qblocks;  // 256-element blocks of 8-bit state in the shard
} Block;

typedef struct {
    Config c;
    ShardSpec shard_spec;
    int n_params, n_blocks;
    Param *param; // in order of computation
    Block *block;
    int *dense_block, *local_block; // (L) block of a layer's dense and local parameters, local -1
                                    // where there is none
    int embed_block, head_block;
} Model;

// Builds table, blocks and segments from a config (which the model then owns) and a cut. Dies where
// the cut does not divide (experts by ep, KV heads by ep).
Model model_build(Config c, ShardSpec shard_spec);
void model_free(Model *m);
// 1 where some rank of this layout has a piece that begins inside a 256-element block of its
// tensor: the 8-bit optimizer refuses such a layout (quant8.h).
int model_cuts_blocks(const Model *m);
// The row of a parameter of a layer (-1 outside), 0 where that layer has none.
const Param *model_param(const Model *m, ParamId id, int layer);
// Full Hugging Face name of slice s = expert here * parts + part of p, into name (at least 160
// chars).
void param_hf_name(const Param *p, int slice, char *name);
// Everything that a whole checkpoint holds: calls visit for each HF tensor of the full model (all
// experts), in table order: name, rows, cols (1-D tensors have rows 1 and is_vector 1). For writers
// of headers, dumps and tests.
typedef void (*TensorVisit)(void *context, const char *name, int is_vector, int64_t rows,
                            int64_t cols);
void model_visit(const Config *c, TensorVisit visit, void *context);
MOE_END_C
#endif
