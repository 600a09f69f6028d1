// The parameter table (model.h) becomes parameters, blocks and segments: what this rank holds of
// each Hugging Face tensor, and where. Offers model_build, the look-ups, and a layer's pointers.
#include "model.h"
#include "../kernels/fail.h"
#include "../kernels/random.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// Parameters begin and shards are cut at multiples of this many elements (I4, layout-free numbers).
enum { ALIGN = 256 };

static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// ---- parameters -----------------------------------------------------------------------------
static int row_exists(const Config *c, char where, When when, int layer) {
    char here = layer < 0 ? 'E' : 'L';
    if (layer == c->L) here = 'H';
    if (where != here) return 0;
    switch (when) {
    case EVERY: return 1;
    case IF_MOE: return c->is_moe[layer];
    case IF_MLP: return !c->is_moe[layer];
    case IF_UNTIED: return !c->tied;
    }
    return 0;
}

// One table row as the parameter of a layer, cut for this rank.
static Param row_param(const Config *c, ShardSpec shard_spec, ParamId id, int layer, Kind kind,
                       int decay, Init init, int parts, int rows, int cols, const char *hf0,
                       const char *hf1) {
    Param p;
    memset(&p, 0, sizeof p);
    if (!shard_spec.split_heads && (kind == HEAD_ROWS || kind == HEAD_COLS)) kind = DENSE;
    p.id = id;
    p.layer = layer;
    p.kind = kind;
    p.decay = decay;
    p.init = init;
    p.parts = parts;
    p.rows = p.full_rows = rows;
    p.cols = p.full_cols = cols;
    p.n = 1;
    p.hf[0] = hf0;
    p.hf[1] = hf1;
    if (kind == EXPERT) {
        p.n = c->E / shard_spec.ep;
        p.first = shard_spec.ep_rank * p.n;
    }
    if (kind == HEAD_ROWS) {
        p.rows = rows / shard_spec.ep;
        p.row0 = shard_spec.ep_rank * p.rows;
    }
    if (kind == HEAD_COLS) {
        p.cols = cols / shard_spec.ep;
        p.col0 = shard_spec.ep_rank * p.cols;
    }
    p.size = (int64_t)p.n * parts * p.rows * p.cols;
    return p;
}

static int layer_params(Param *out, const Config *c, ShardSpec shard_spec, int layer) {
    int n = 0;
#define PARAM_ROW(id, where, when, kind, decay, init, parts, rows, cols, hf0, hf1)               \
    if (row_exists(c, where, when, layer))                                                       \
        out[n++] = row_param(c, shard_spec, P_##id, layer, kind, decay, init, parts, rows, cols, \
                             hf0, hf1);
    PARAM_TABLE(PARAM_ROW)
#undef PARAM_ROW
    return n;
}

void param_hf_name(const Param *p, int slice, char *name) {
    int n = 0;
    if (p->layer >= 0 && strncmp(p->hf[0], "model.", 6) && strncmp(p->hf[0], "lm_head", 7))
        n = sprintf(name, "model.layers.%d.", p->layer);
    const char *pattern = p->hf[slice % p->parts];
    const char *hole = strstr(pattern, "%d");
    if (hole)
        n += sprintf(name + n, "%.*s%d%s", (int)(hole - pattern), pattern,
                     p->first + slice / p->parts, hole + 2);
    else
        n += sprintf(name + n, "%s", pattern);
    strcpy(name + n, ".weight");
}

void model_visit(const Config *c, TensorVisit visit, void *context) {
    ShardSpec whole = { 1, 0, 1, 0, 1, 0, 0 };
    Param row[P_COUNT];
    char name[160];
    for (int layer = -1; layer <= c->L; layer++) {
        int n = layer_params(row, c, whole, layer);
        for (int i = 0; i < n; i++)
            for (int s = 0; s < row[i].n * row[i].parts; s++) {
                param_hf_name(&row[i], s, name);
                visit(context, name, row[i].init == INIT_ONES, row[i].full_rows, row[i].full_cols);
            }
    }
}

// ---- segments -------------------------------------------------------------------------------
typedef struct {
    Block *b;
    int capacity;
    int64_t end;
} SegmentList;

// Element range [begin, end) of tensor `slice` as stored here, at block offset `at`, clipped to the
// shard, becomes one segment. `first`: index of `begin` in the HF tensor.
static void add_segment(SegmentList *list, const Param *p, int param, int slice, uint64_t tensor,
                        int64_t at, int64_t count, int64_t first) {
    Block *b = list->b;
    int64_t lo = at > b->shard0 ? at : b->shard0;
    int64_t end = b->shard0 + b->shard;
    int64_t hi = at + count < end ? at + count : end;
    if (lo >= hi) return;
    if (b->n_segments == list->capacity) {
        list->capacity = list->capacity ? 2 * list->capacity : 64;
        b->segment = (Segment *)realloc(b->segment, list->capacity * sizeof(Segment));
        b->segment_param = (int *)realloc(b->segment_param, list->capacity * sizeof(int));
        b->segment_slice = (int *)realloc(b->segment_slice, list->capacity * sizeof(int));
        if (!b->segment || !b->segment_param || !b->segment_slice)
            die("out of host memory for the segment table|free memory");
    }
    Segment s;
    s.tensor = tensor;
    s.first = first + (lo - at);
    s.count = hi - lo;
    s.offset = lo - b->shard0;
    s.qblock = b->n_qblocks;
    s.decay = (float)p->decay;
    b->n_qblocks += (s.count + ALIGN - 1) / ALIGN;
    b->segment[b->n_segments] = s;
    b->segment_param[b->n_segments] = param;
    b->segment_slice[b->n_segments++] = slice;
}

static void block_segments(Model *m, Block *b) {
    SegmentList list = { b, 0, 0 };
    char name[160];
    for (int i = b->first_param; i < b->first_param + b->n_params; i++) {
        const Param *p = &m->param[i];
        int64_t tensor_size = (int64_t)p->rows * p->cols;
        for (int s = 0; s < p->n * p->parts; s++) {
            int64_t at = p->offset + s * tensor_size;
            if (at >= b->shard0 + b->shard || at + tensor_size <= b->shard0) continue;
            param_hf_name(p, s, name);
            uint64_t id = tensor_id(name);
            if (p->cols == p->full_cols)
                add_segment(&list, p, i, s, id, at, tensor_size, (int64_t)p->row0 * p->full_cols);
            else
                for (int r = 0; r < p->rows; r++) // columns of o_proj: a piece of every row
                    add_segment(&list, p, i, s, id, at + (int64_t)r * p->cols, p->cols,
                                (int64_t)(p->row0 + r) * p->full_cols + p->col0);
        }
    }
}

// Shards and parameters begin at multiples of ALIGN in a block. So a shard that begins inside a
// slice of S elements begins inside one of its quantisation blocks only where earlier slices left
// an odd place, S % ALIGN != 0; and heads cut by ep begin where their rows or columns say.
int model_cuts_blocks(const Model *m) {
    for (int b = 0; b < m->n_blocks; b++) {
        const Block *block = &m->block[b];
        for (int i = block->first_param; i < block->first_param + block->n_params; i++) {
            const Param *p = &m->param[i];
            int64_t slice = (int64_t)p->rows * p->cols;
            if (p->cols != p->full_cols && (p->cols % ALIGN || p->full_cols % ALIGN)) return 1;
            if (p->rows != p->full_rows && slice % ALIGN) return 1;
            if (slice % ALIGN == 0) continue;
            for (int64_t at = block->shard; at < block->size; at += block->shard)
                if (at > p->offset && at < p->offset + p->size && (at - p->offset) % slice % ALIGN)
                    return 1;
        }
    }
    return 0;
}

// ---- the model ------------------------------------------------------------------------------
// Appends the parameters of one layer that are local (or not) as a block; -1 where there are none.
static int add_block(Model *m, const Param *row, int n, int layer, int local) {
    Block b;
    memset(&b, 0, sizeof b);
    b.layer = layer;
    b.local = local;
    b.first_param = m->n_params;
    for (int i = 0; i < n; i++) {
        if ((row[i].kind != DENSE) != local) continue;
        Param p = row[i];
        p.block = m->n_blocks;
        p.offset = b.size;
        b.size = round_up(b.size + p.size, ALIGN);
        m->param[m->n_params++] = p;
        b.n_params++;
    }
    if (!b.n_params) return -1;
    int shards = local ? m->shard_spec.local_shards : m->shard_spec.dense_shards;
    b.shard = round_up((b.size + shards - 1) / shards, ALIGN);
    b.size = b.shard * shards;
    b.shard0 = b.shard * (local ? m->shard_spec.local_index : m->shard_spec.dense_index);
    m->block[m->n_blocks] = b;
    return m->n_blocks++;
}

Model model_build(Config c, ShardSpec shard_spec) {
    if (c.n_moe && c.E % shard_spec.ep)
        die("%d experts cannot be divided over --ep %d|"
            "choose an ep that divides the number of experts",
            c.E, shard_spec.ep);
    if (shard_spec.split_heads && (c.KV % shard_spec.ep || c.H % shard_spec.ep))
        die("--attention heads: %d key/value heads cannot be divided over --ep %d|"
            "choose an ep that divides them, or --attention data",
            c.KV, shard_spec.ep);
    Model m;
    memset(&m, 0, sizeof m);
    m.c = c;
    m.shard_spec = shard_spec;
    m.param = (Param *)xcalloc(P_COUNT * (c.L + 2), sizeof(Param), "parameter table");
    m.block = (Block *)xcalloc(2 * c.L + 2, sizeof(Block), "block table");
    m.dense_block = (int *)xcalloc(c.L, sizeof(int), "block table");
    m.local_block = (int *)xcalloc(c.L, sizeof(int), "block table");
    m.moe_index = (int *)xcalloc(c.L, sizeof(int), "block table");
    int moe_layers = 0;
    for (int l = 0; l < c.L; l++) m.moe_index[l] = c.is_moe[l] ? moe_layers++ : -1;
    Param row[P_COUNT];
    for (int layer = -1; layer <= c.L; layer++) {
        int n = layer_params(row, &c, shard_spec, layer);
        int dense = add_block(&m, row, n, layer, 0);
        int local = add_block(&m, row, n, layer, 1);
        if (layer < 0)
            m.embed_block = dense;
        else if (layer == c.L)
            m.head_block = dense;
        else {
            m.dense_block[layer] = dense;
            m.local_block[layer] = local;
        }
    }
    for (int b = 0; b < m.n_blocks; b++) block_segments(&m, &m.block[b]);
    return m;
}

void model_free(Model *m) {
    for (int b = 0; b < m->n_blocks; b++) {
        free(m->block[b].segment);
        free(m->block[b].segment_param);
        free(m->block[b].segment_slice);
    }
    free(m->param);
    free(m->block);
    free(m->dense_block);
    free(m->local_block);
    free(m->moe_index);
    config_free(&m->c);
    memset(m, 0, sizeof *m);
}

static const Param *find_in_block(const Model *m, ParamId id, int block) {
    if (block < 0) return 0;
    const Param *first = &m->param[m->block[block].first_param];
    for (int i = 0; i < m->block[block].n_params; i++)
        if (first[i].id == id) return &first[i];
    return 0;
}

const Param *model_param(const Model *m, ParamId id, int layer) {
    if (layer < 0) return find_in_block(m, id, m->embed_block);
    if (layer == m->c.L) return find_in_block(m, id, m->head_block);
    const Param *dense = find_in_block(m, id, m->dense_block[layer]);
    return dense ? dense : find_in_block(m, id, m->local_block[layer]);
}

// ---- a layer's pointers ---------------------------------------------------------------------
static const floatX *weight_of(const Model *m, ParamId id, int layer, const floatX *dense,
                               const floatX *local) {
    const Param *p = model_param(m, id, layer);
    if (!p) return 0;
    return (m->block[p->block].local ? local : dense) + p->offset;
}

LayerWeights layer_weights(const Model *m, int layer, const floatX *dense, const floatX *local) {
    int moe = m->c.is_moe[layer];
    LayerWeights w;
    w.attn_norm = weight_of(m, P_ATTN_NORM, layer, dense, local);
    w.mlp_norm = weight_of(m, P_MLP_NORM, layer, dense, local);
    w.q = weight_of(m, P_Q, layer, dense, local);
    w.k = weight_of(m, P_KEY, layer, dense, local);
    w.v = weight_of(m, P_VALUE, layer, dense, local);
    w.q_norm = weight_of(m, P_Q_NORM, layer, dense, local);
    w.k_norm = weight_of(m, P_K_NORM, layer, dense, local);
    w.o = weight_of(m, P_O, layer, dense, local);
    w.router = weight_of(m, P_ROUTER, layer, dense, local);
    w.up = weight_of(m, moe ? P_EXPERT_UP : P_MLP_UP, layer, dense, local);
    w.down = weight_of(m, moe ? P_EXPERT_DOWN : P_MLP_DOWN, layer, dense, local);
    return w;
}

static gradX *grad_of(const Model *m, ParamId id, int layer, gradX *dense, gradX *local) {
    const Param *p = model_param(m, id, layer);
    if (!p) return 0;
    return (m->block[p->block].local ? local : dense) + p->offset;
}

LayerGrads layer_grads(const Model *m, int layer, gradX *dense, gradX *local) {
    int moe = m->c.is_moe[layer];
    LayerGrads d;
    d.attn_norm = grad_of(m, P_ATTN_NORM, layer, dense, local);
    d.mlp_norm = grad_of(m, P_MLP_NORM, layer, dense, local);
    d.q = grad_of(m, P_Q, layer, dense, local);
    d.k = grad_of(m, P_KEY, layer, dense, local);
    d.v = grad_of(m, P_VALUE, layer, dense, local);
    d.q_norm = grad_of(m, P_Q_NORM, layer, dense, local);
    d.k_norm = grad_of(m, P_K_NORM, layer, dense, local);
    d.o = grad_of(m, P_O, layer, dense, local);
    d.router = grad_of(m, P_ROUTER, layer, dense, local);
    d.up = grad_of(m, moe ? P_EXPERT_UP : P_MLP_UP, layer, dense, local);
    d.down = grad_of(m, moe ? P_EXPERT_DOWN : P_MLP_DOWN, layer, dense, local);
    return d;
}
