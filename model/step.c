// One update, top to bottom:
//
//   tokens      this rank's windows; N = targets that count, of all ranks (I1, one gradient rule)
//   in each round:
//     forward   layers 0 .. L-1: weights of l+1 on their way; every micro-batch through layer l
//     router    statistics summed over the ranks: the auxiliary losses are exact over the round
//     head      in chunks of tokens: logits, loss and dlogits in one pass
//     backward  layers L-1 .. 0: weights of l-1 on their way; every micro-batch back through layer
//               l, whose gradient is then on its way to its shards
//   update      norm, clip, optimizer: at the end, or a layer at a time (--update layer)
//   report      the one moment at which the host waits and reads (I11, the host does not wait)
#include "step.h"
#include "checkpoint.h"
#include "inspect.h"
#include "../kernels/fail.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

// ---- tokens ---------------------------------------------------------------------------------
static int ends_document(const Trainer *t, int id) {
    return t->o.documents && id == t->o.document_end;
}

// A target whose input ends a document would be the first token of another one.
int64_t step_targets(const Trainer *t, const int *ids, int *targets) {
    int64_t valid = 0;
    for (int i = 0; i < t->o.T; i++) {
        if (targets[i] == t->o.ignore_target) targets[i] = -1;
        if (ends_document(t, ids[i])) targets[i] = -1;
        valid += targets[i] >= 0;
    }
    return valid;
}

// Half the square of the length of each document in a window, as causal attention is counted.
static double window_pairs(const Trainer *t, const int *ids) {
    double pairs = 0;
    double length = 0;
    for (int i = 0; i < t->o.T; i++) {
        length++;
        if (i + 1 < t->o.T && !ends_document(t, ids[i])) continue;
        pairs += length * length / 2;
        length = 0;
    }
    return pairs;
}

// A rank's part of an update's windows is contiguous.
int trainer_read(Trainer *t, const Loader *data, int64_t update, Fault *fault) {
    int64_t T = t->o.T;
    int64_t valid = 0;
    double pairs = 0;
    t->tokens.update = 0;
    int64_t first = (update - 1) * t->o.batch + t->g->data_rank * t->tokens.sequences;
    for (int64_t s = 0; s < t->tokens.sequences; s++) {
        int *ids = t->tokens.host_ids + s * T;
        int *targets = t->tokens.host_targets + s * T;
        if (!loader_read(data, first + s, ids, targets, fault)) return 0;
        valid += step_targets(t, ids, targets);
        pairs += window_pairs(t, ids);
    }
    t->tokens.update = update;
    t->tokens.valid = (double)valid;
    t->tokens.pairs = pairs;
    return 1;
}

// Takes the tokens of an update, of which every rank has read its own.
static void take_tokens(Trainer *t, const Loader *data, int64_t update) {
    if (t->tokens.update != update) trainer_read(t, data, update, 0);
    t->tokens.update = 0;
    t->tokens.valid = comm_sum(t->g->all, t->tokens.valid);
    t->tokens.pairs = comm_sum(t->g->all, t->tokens.pairs);
}

// position[i] of ids (n) in windows of T: 0 at the start of a window and after each end of a
// document.
static void document_positions(const Trainer *t, int *position, const int *ids, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        int begins = i % t->o.T == 0 || ends_document(t, ids[i - 1]);
        position[i] = begins ? 0 : position[i - 1] + 1;
    }
}

// Where heads are split, attention sees the tokens of the whole ep group, in the order of its
// ranks.
static void upload_positions(Trainer *t, const int *ids, int n) {
    int64_t R = t->R;
    int64_t rows = t->work.attention_rows;
    int64_t ranks = rows / R;
    int64_t mine = n * R;
    int *all = t->tokens.host_position;
    int *own = all + ranks * mine;
    int *ordered = own + mine;
    document_positions(t, own, ids, mine);
    if (ranks == 1) {
        device_upload(t->tokens.position, own, mine * sizeof(int));
        return;
    }
    comm_all_gather_host(t->g->ep_group, all, own, mine * sizeof(int));
    for (int64_t m = 0; m < n; m++)
        for (int64_t rank = 0; rank < ranks; rank++)
            memcpy(ordered + m * rows + rank * R, all + rank * mine + m * R, R * sizeof(int));
    device_upload(t->tokens.position, ordered, n * rows * sizeof(int));
}

void step_upload(Trainer *t, const int *ids, const int *targets, int n) {
    size_t bytes = n * t->R * sizeof(int);
    device_upload(t->tokens.ids, ids, bytes);
    if (targets) device_upload(t->tokens.targets, targets, bytes);
    if (t->tokens.position) upload_positions(t, ids, n);
}

// ---- parts of a micro-batch, blocks of a layer ----------------------------------------------
int *micro_ids(const Trainer *t, int micro) { return t->tokens.ids + micro * t->R; }
floatX *micro_dx(const Trainer *t, int micro) { return t->act.dx + micro * t->R * t->m->c.C; }
InFlight *in_flight_of(const Trainer *t, int micro) {
    return &t->in_flight[micro % t->n_in_flight];
}
Saved *saved_of(const Trainer *t, int layer, int micro) {
    return &t->act.saved[(int64_t)layer * t->n_micro + micro];
}

// The slot of a micro-batch that enters a layer.
static InFlight *enter(Trainer *t, int micro) {
    InFlight *f = in_flight_of(t, micro);
    const int *position = t->tokens.position;
    f->position = position ? position + micro * t->work.attention_rows : 0;
    return f;
}

typedef struct { // blocks first .. first + count - 1: the dense one, then the local one
    int first, count;
} LayerBlocks;
static LayerBlocks blocks_of(const Model *m, int layer) {
    LayerBlocks b = { m->embed_block, 1 };
    if (layer == m->c.L) b.first = m->head_block;
    if (layer < 0 || layer == m->c.L) return b;
    b.first = m->dense_block[layer];
    b.count = m->local_block[layer] >= 0 ? 2 : 1;
    return b;
}

static void gather_layer(Trainer *t, int layer) {
    if (layer < 0 || layer > t->m->c.L) return;
    LayerBlocks b = blocks_of(t->m, layer);
    for (int i = 0; i < b.count; i++) fsdp_gather(t->fsdp, b.first + i);
}

static LayerWeights get_layer(Trainer *t, int layer) {
    LayerBlocks b = blocks_of(t->m, layer);
    const floatX *dense = fsdp_get(t->fsdp, b.first);
    return layer_weights(t->m, layer, dense, b.count > 1 ? fsdp_get(t->fsdp, b.first + 1) : 0);
}

static LayerGrads get_layer_grads(Trainer *t, int layer) {
    LayerBlocks b = blocks_of(t->m, layer);
    gradX *dense = fsdp_grad(t->fsdp, b.first);
    return layer_grads(t->m, layer, dense, b.count > 1 ? fsdp_grad(t->fsdp, b.first + 1) : 0);
}

static void release_layer(Trainer *t, int layer) {
    LayerBlocks b = blocks_of(t->m, layer);
    for (int i = 0; i < b.count; i++) fsdp_release(t->fsdp, b.first + i);
}

static void reduce_layer(Trainer *t, int layer) {
    LayerBlocks b = blocks_of(t->m, layer);
    for (int i = 0; i < b.count; i++) fsdp_reduce(t->fsdp, b.first + i, t->round > 0);
}

// Tells whether a kernel adds to a block's gradient: after the first micro-batch, and after the
// first round if the buffer is the final one (I5, who adds is in the contract).
static int accumulates(Trainer *t, int block, int micro) {
    return micro > 0 || (t->round > 0 && fsdp_accumulates_in_place(t->fsdp, block));
}

// ---- saved activations ----------------------------------------------------------------------
// Appends to the store, whose whole memory is free again at the next round; 0 if it is full.
static char *store_append(Trainer *t, size_t bytes) {
    Activations *a = &t->act;
    if (a->store_used + bytes > a->store_size) return 0;
    char *p = a->store + a->store_used;
    a->store_used += bytes;
    return p;
}

static void place_attention(Trainer *t, Saved *s, const InFlight *f, int training) {
    int save = training && t->o.recompute != RECOMPUTE_LAYER;
    size_t bytes = saved_attention_bytes(&t->work);
    saved_attention_place(s, &t->work, f, save ? store_append(t, bytes) : 0);
}

// The size is the largest of any rank of the ep group, so that all of them save or recompute alike:
// to recompute is to dispatch again (I2, collectives do not depend on data).
static void place_experts(Trainer *t, Saved *s, const InFlight *f, int layer, int training) {
    const DispatchLoad *load = t->m->c.is_moe[layer] ? dispatch_load(f->dispatcher) : 0;
    int64_t rows = t->work.dense.M;
    int64_t pool = 0;
    if (load) {
        rows = load->rows_max;
        pool = load->pool_max;
    }
    int save = training && (t->o.recompute == RECOMPUTE_NONE || t->o.recompute == RECOMPUTE_AUTO);
    size_t bytes = saved_expert_bytes(&t->work, layer, rows, pool);
    saved_expert_place(s, &t->work, layer, rows, pool, save ? store_append(t, bytes) : 0);
    if (!training) return;
    SavedCounts *n = &t->counts;
    if (load) {
        n->sent += load->sent_rows;
        n->received += load->received_rows;
        n->redispatched += s->has_experts ? 0 : load->sent_rows;
        n->rerouted += !s->has_experts;
    }
    n->reattended += !s->has_attention;
    n->all += s->has_attention && s->has_experts;
    n->attention += s->has_attention && !s->has_experts;
    n->none += !s->has_attention;
}

// ---- the pipeline ---------------------------------------------------------------------------
// Where tokens travel, up to three micro-batches are in a layer at once, each in another stage:
// while the tokens of one are on their way to the experts, those of the one before are computed,
// and the results of the one before that return.
//
//   pass          0     1     2     3     4           _start    ends when its dispatch has started
//   enters        m0    m1    m2                      _experts  between dispatch and combine
//   computes            m0    m1    m2                _finish   begins by waiting for its combine
//   leaves                    m0    m1    m2
//
// Without travel a micro-batch enters, computes and leaves in one pass. -1 = none.
typedef struct {
    int enters, computes, leaves;
} Stages;
static int stage_lag(const Trainer *t) { return t->n_in_flight > 1; }
static int passes(const Trainer *t, int n) { return n + 2 * stage_lag(t); }
static int micro_or_none(int micro, int n) { return micro >= 0 && micro < n ? micro : -1; }
static Stages stages_at(const Trainer *t, int pass, int n) {
    int lag = stage_lag(t);
    Stages s = { micro_or_none(pass, n), micro_or_none(pass - lag, n),
                 micro_or_none(pass - 2 * lag, n) };
    return s;
}

// ---- forward --------------------------------------------------------------------------------
static void layer_forward(Trainer *t, int l, int n, int training, int given) {
    const RouterStats none = { 0, 0, 0 };
    RouterStats stats = training ? router_totals_of(t, l) : none;
    const real *bias = router_bias_of(t, l);
    LayerWeights p = get_layer(t, l);
    Workspace *w = &t->work;
    for (int pass = 0; pass < passes(t, n); pass++) {
        Stages at = stages_at(t, pass, n);
        if (at.enters >= 0) {
            InFlight *f = enter(t, at.enters);
            Saved *s = saved_of(t, l, at.enters);
            place_attention(t, s, f, training);
            layer_forward_start(w, f, s, l, &p, stats, bias, given);
            place_experts(t, s, f, l, training);
        }
        if (at.computes >= 0)
            layer_forward_experts(w, in_flight_of(t, at.computes), saved_of(t, l, at.computes), l,
                                  &p);
        if (at.leaves >= 0) {
            floatX *out = saved_of(t, l + 1, at.leaves)->x;
            layer_forward_finish(w, in_flight_of(t, at.leaves), saved_of(t, l, at.leaves), l, out);
            if (t->trace && training) trace_forward(t, l, at.leaves);
        }
    }
    release_layer(t, l);
}

void step_forward(Trainer *t, int n, int training, int given) {
    const Config *c = &t->m->c;
    t->act.store_used = 0;
    gather_layer(t, 0);
    const floatX *embedding = fsdp_get(t->fsdp, t->m->embed_block);
    for (int m = 0; m < n; m++)
        embed_forward(saved_of(t, 0, m)->x, micro_ids(t, m), embedding, t->R, c->C);
    fsdp_release(t->fsdp, t->m->embed_block);
    for (int l = 0; l < c->L; l++) {
        gather_layer(t, l + 1);
        comm_where(-1, l, "forward");
        layer_forward(t, l, n, training, given);
    }
}

// ---- head -----------------------------------------------------------------------------------
HeadPointers head_get(Trainer *t, int training) {
    const Model *m = t->m;
    int tied = m->c.tied;
    int matrix_block = tied ? m->embed_block : m->head_block;
    const Param *matrix = tied ? model_param(m, P_EMBED, -1) : model_param(m, P_HEAD, m->c.L);
    const Param *norm = model_param(m, P_FINAL_NORM, m->c.L);
    HeadPointers p = { 0, 0, 0, 0, matrix_block };
    p.norm = fsdp_get(t->fsdp, m->head_block) + norm->offset;
    p.matrix = fsdp_get(t->fsdp, matrix_block) + matrix->offset;
    if (!training) return p;
    p.dnorm = fsdp_grad(t->fsdp, m->head_block) + norm->offset;
    p.dmatrix = fsdp_grad(t->fsdp, matrix_block) + matrix->offset;
    return p;
}

void head_release(Trainer *t) {
    fsdp_release(t->fsdp, t->m->head_block);
    if (t->m->c.tied) fsdp_release(t->fsdp, t->m->embed_block);
}

// Rows [row, row + n) of a micro-batch. first: no chunk of this round was before it.
static void head_chunk(Trainer *t, const HeadPointers *p, int micro, int64_t row, int64_t n,
                       int first, int training, real seed) {
    const Config *c = &t->m->c;
    Head *h = &t->head;
    const floatX *x = saved_of(t, c->L, micro)->x + row * c->C;
    rmsnorm_forward(h->x, h->rstd, x, p->norm, (real)c->rms_eps, n, c->C);
    linear_forward(h->logits, h->x, p->matrix, n, c->V, c->C);
    if (t->dump && training)
        dump_logits(t->dump, t, ((int64_t)t->round * t->n_micro + micro) * t->R + row, (int)n);
    const int *targets = t->tokens.targets + micro * t->R + row;
    cross_entropy(h->logits, h->loss_sum, targets, seed, training, n, c->V);
    if (!training) return;
    linear_backward_weight(p->dmatrix, h->logits, h->x, accumulates(t, p->matrix_block, !first), n,
                           c->V, c->C);
    linear_backward_input(h->dx, h->logits, p->matrix, n, c->V, c->C);
    rmsnorm_backward(micro_dx(t, micro) + row * c->C, p->dnorm, 0, h->dx, x, p->norm, h->rstd,
                     accumulates(t, t->m->head_block, !first), n, c->C);
}

void step_head(Trainer *t, int training) {
    comm_where(-1, t->m->c.L, "head");
    HeadPointers p = head_get(t, training);
    if (training) gather_layer(t, t->m->c.L - 1);
    double N = t->tokens.valid;
    real seed = (real)(N > 0 ? 1 / N : 0);
    for (int m = 0; m < t->n_micro; m++)
        for (int64_t row = 0; row < t->R; row += t->head.chunk) {
            int64_t n = t->R - row < t->head.chunk ? t->R - row : t->head.chunk;
            head_chunk(t, &p, m, row, n, m == 0 && row == 0, training, seed);
        }
    head_release(t);
}

// ---- update ---------------------------------------------------------------------------------
// --expert-grad-scale: an expert's gradient times mean count / own count.
static void scale_by_use(Trainer *t, const Block *b, gradX *grad) {
    int E = t->m->c.E;
    size_t bytes = b->n_segments * sizeof(float);
    float *factor = (float *)xmalloc(bytes + 1, "utilisation factors");
    const int64_t *count = t->router.host_count + (int64_t)t->m->moe_index[b->layer] * E;
    double mean = 0;
    for (int e = 0; e < E; e++) mean += (double)count[e] / E;
    for (int i = 0; i < b->n_segments; i++) {
        const Param *p = &t->m->param[b->segment_param[i]];
        int e = p->first + b->segment_slice[i] / p->parts;
        factor[i] = p->kind == EXPERT && count[e] > 0 ? (float)(mean / (double)count[e]) : 1.0f;
    }
    device_upload(t->norms.factor, factor, bytes);
    gradient_scale(grad, b->segment, b->n_segments, t->norms.factor);
    free(factor);
}

// Sums the squares of a block's final gradient.
static const gradX *finish_gradient(Trainer *t, int block) {
    const Block *b = &t->m->block[block];
    gradX *grad = fsdp_grad_shard(t->fsdp, block);
    if (t->o.expert_grad_scale && b->local && t->m->c.is_moe[b->layer]) scale_by_use(t, b, grad);
    if (t->dump) dump_gradient(t->dump, t, block, grad);
    gradient_squares(t->norms.segments, grad, b->segment, b->n_segments);
    sum_in_order(t->norms.blocks + block, t->norms.segments, b->n_segments);
    return grad;
}

static void sum_squares(Trainer *t, int first, int n) {
    comm_wait(
        all_reduce_start(t->g->dense_group, t->norms.blocks + first, n, DTYPE_F64, STREAM_GATHER));
}

static void step_block(Trainer *t, int block, const gradX *grad, int64_t update, double lr,
                       double factor, const real *device_factor) {
    optimizer_step(&t->optimizer, block, grad, lr, t->updates + 1, update, factor, device_factor);
    fsdp_grad_done(t->fsdp, block);
}

// The factor by which --update layer clips: the norm of this update is not known yet.
static double clip_by_previous(const Trainer *t) {
    double clip = t->o.clip;
    double norm = t->norms.previous + 1e-6;
    return clip > 0 && t->norms.previous >= 0 && norm > clip ? clip / norm : 1;
}

// --update layer: steps the blocks of a layer (-1 embedding, L head) inside backward. A gradient
// that is not finite leaves them untouched.
static void update_layer(Trainer *t, int layer, int64_t update, double lr) {
    LayerBlocks b = blocks_of(t->m, layer);
    const gradX *grad[2];
    for (int i = 0; i < b.count; i++) grad[i] = finish_gradient(t, b.first + i);
    comm_where(-1, layer, "finite check");
    sum_squares(t, b.first, b.count);
    clip_scale(t->norms.norm, t->norms.finite, t->norms.blocks + b.first, b.count, 0);
    for (int i = 0; i < b.count; i++)
        step_block(t, b.first + i, grad[i], update, lr, clip_by_previous(t), t->norms.finite);
}

// --update end: the norm over every unique number, once; then all blocks.
static void update_all(Trainer *t, int64_t update, double lr) {
    int n = t->m->n_blocks;
    for (int b = 0; b < n; b++) finish_gradient(t, b);
    comm_where(-1, -1, "gradient norm");
    sum_squares(t, 0, n);
    clip_scale(t->norms.norm, t->norms.clip, t->norms.blocks, n, t->o.clip);
    for (int b = 0; b < n; b++)
        step_block(t, b, fsdp_grad_shard(t->fsdp, b), update, lr, 1, t->norms.clip);
}

// ---- backward -------------------------------------------------------------------------------
static void layer_backward(Trainer *t, int l) {
    const Model *m = t->m;
    Workspace *w = &t->work;
    LayerWeights p = get_layer(t, l);
    LayerGrads d = get_layer_grads(t, l);
    RouterLoss loss = router_loss_of(t, l);
    int dense = m->dense_block[l];
    int experts = m->c.is_moe[l] ? m->local_block[l] : dense;
    int qkvo = m->shard_spec.split_heads ? m->local_block[l] : dense;
    for (int pass = 0; pass < passes(t, t->n_micro); pass++) {
        Stages at = stages_at(t, pass, t->n_micro);
        if (at.enters >= 0) {
            InFlight *f = enter(t, at.enters);
            Saved *s = saved_of(t, l, at.enters);
            if (!s->has_attention) saved_attention_place(s, w, f, 0);
            layer_backward_start(w, f, s, l, &p, micro_dx(t, at.enters));
        }
        if (at.computes >= 0)
            layer_backward_experts(w, in_flight_of(t, at.computes), saved_of(t, l, at.computes), l,
                                   &p, &d, micro_dx(t, at.computes),
                                   accumulates(t, experts, at.computes));
        if (at.leaves >= 0) {
            layer_backward_finish(w, in_flight_of(t, at.leaves), saved_of(t, l, at.leaves), l, &p,
                                  &d, &loss, micro_dx(t, at.leaves),
                                  accumulates(t, dense, at.leaves),
                                  accumulates(t, qkvo, at.leaves));
            if (t->trace) trace_backward(t, l, at.leaves);
        }
    }
    release_layer(t, l);
}

static void embedding_backward(Trainer *t) {
    const Config *c = &t->m->c;
    int block = t->m->embed_block;
    gradX *de = fsdp_grad(t->fsdp, block);
    for (int m = 0; m < t->n_micro; m++) // a tied head has written its part before
        embed_backward(de, micro_dx(t, m), micro_ids(t, m), c->tied || accumulates(t, block, m),
                       c->pad, t->R, c->V, c->C);
}

// With --update layer a layer's reduction runs under the backward of the next one down, and the
// layer is stepped after that. In one process there is nothing to wait for: it is stepped at once,
// and one layer's gradient is alive.
static void step_backward(Trainer *t, int64_t update, double lr) {
    int L = t->m->c.L;
    int later = fsdp_reduces(t->fsdp);
    reduce_layer(t, L);
    if (t->o.update_layer && !later) update_layer(t, L, update, lr);
    for (int l = L - 1; l >= 0; l--) {
        gather_layer(t, l - 1);
        comm_where(-1, l, "backward");
        layer_backward(t, l);
        reduce_layer(t, l);
        if (t->o.update_layer) update_layer(t, l + later, update, lr);
    }
    embedding_backward(t);
    reduce_layer(t, -1);
    if (!t->o.update_layer) return;
    if (later) update_layer(t, 0, update, lr);
    update_layer(t, -1, update, lr);
}

// ---- report ---------------------------------------------------------------------------------
// The first block of backward is the one to name: what lies below it got its gradient from there.
void trainer_die_nonfinite(Trainer *t, int64_t update) {
    const Model *m = t->m;
    int b = m->n_blocks - 1;
    while (b >= 0 && isfinite(t->norms.host_blocks[b])) b--;
    if (b < 0)
        die("update %lld: the gradient norm is not finite, though every part of it is|"
            "lower --lr, or use --skip-nonfinite on",
            (long long)update);
    int layer = m->block[b].layer;
    char part[64] = "the embedding";
    if (layer == m->c.L)
        strcpy(part, "the head");
    else if (layer >= 0)
        snprintf(part, sizeof part, "layer %d (%s)", layer,
                 m->block[b].local ? "experts" : "attention, norms and router");
    die("update %lld: the gradient of %s is not finite; %s|"
        "lower --lr, check data and checkpoint, or use --skip-nonfinite on",
        (long long)update, part,
        t->o.update_layer ? "this layer and those below it are unchanged"
                          : "no weight was changed by this update");
}

// The norm decides what every rank does next: it must be the same number everywhere.
static void check_same_norm(const Trainer *t, real norm, int64_t update) {
    int64_t bits = 0;
    memcpy(&bits, &norm, sizeof norm);
    if (comm_max(t->g->all, bits) != bits || comm_max(t->g->all, -bits) != -bits)
        die("update %lld: ranks hold different gradient norms (this one %.9g)|"
            "a collective is broken: run with --check-comm on",
            (long long)update, (double)norm);
}

static StepResult report(Trainer *t, int64_t update, double lr, double aux) {
    double N = t->tokens.valid;
    Norms *norms = &t->norms;
    int n_blocks = t->m->n_blocks;
    StepResult r;
    memset(&r, 0, sizeof r);
    double loss_sum;
    real norm;
    comm_where(-1, -1, "loss");
    comm_wait(all_reduce_start(t->g->all, t->head.loss_sum, 1, DTYPE_F64, STREAM_EXCHANGE));
    if (t->o.update_layer) clip_scale(norms->norm, norms->finite, norms->blocks, n_blocks, 0);
    device_download(&loss_sum, t->head.loss_sum, sizeof loss_sum);
    device_download(&norm, norms->norm, sizeof norm);
    device_download(norms->host_blocks, norms->blocks, n_blocks * sizeof(double));
    r.loss = N > 0 ? loss_sum / N : NAN;
    r.aux = aux / t->o.rounds;
    r.grad_norm = (double)norm;
    r.lr = lr;
    r.tokens = t->o.batch * t->o.T;
    double copies = t->g->world / t->g->data_ranks; // of every token
    r.valid = (int64_t)(N / copies);
    r.visible = 2 * t->tokens.pairs / copies / (double)r.tokens;
    router_totals_report(t, &r);
    check_same_norm(t, norm, update);
    if (!isfinite(r.grad_norm)) {
        r.nonfinite = 1;
        return r;
    }
    t->updates++;
    norms->previous = r.grad_norm;
    if (t->router.bias) router_bias_update(t);
    return r;
}

StepResult trainer_step(Trainer *t, Loader *data, int64_t update, double lr) {
    comm_where(update, -1, "tokens");
    double aux = 0;
    take_tokens(t, data, update);
    device_zero(t->head.loss_sum, sizeof(double));
    memset(&t->counts, 0, sizeof t->counts);
    routing_start(t, update);
    for (t->round = 0; t->round < t->o.rounds; t->round++) {
        router_totals_clear(t, t->round == 0);
        int64_t first = t->round * t->n_micro * t->R;
        step_upload(t, t->tokens.host_ids + first, t->tokens.host_targets + first, t->n_micro);
        step_forward(t, t->n_micro, 1, routing_given(t));
        routing_made(t);
        router_totals_sum(t);
        step_head(t, 1);
        // --expert-grad-scale needs the counts before backward; else they are read after it.
        if (t->o.expert_grad_scale) aux += router_totals_collect(t);
        step_backward(t, update, lr);
        if (!t->o.expert_grad_scale) aux += router_totals_collect(t);
    }
    if (!t->o.update_layer) update_all(t, update, lr);
    StepResult r = report(t, update, lr, aux);
    routing_finish(t);
    if (t->dump) dump_finish(t->dump, t, r.loss, r.aux);
    comm_step_end();
    return r;
}
