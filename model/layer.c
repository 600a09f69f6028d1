// One layer, forward and backward: see layer.h for the picture and README.md for the derivations.
#include "layer.h"
#include <string.h>

// ---- weights and gradients: pointers into blocks --------------------------------------------
#define LAYER_POINTERS(result, dense, local)                                                       \
    do {                                                                                           \
        const ParamId id[11] = { P_ATTN_NORM,                                                      \
                                 P_MLP_NORM,                                                       \
                                 P_Q,                                                              \
                                 P_KEY,                                                            \
                                 P_VALUE,                                                          \
                                 P_Q_NORM,                                                         \
                                 P_K_NORM,                                                         \
                                 P_O,                                                              \
                                 P_ROUTER,                                                         \
                                 m->c.is_moe[layer] ? P_EXPERT_UP : P_MLP_UP,                      \
                                 m->c.is_moe[layer] ? P_EXPERT_DOWN : P_MLP_DOWN };                \
        for (int i = 0; i < 11; i++) {                                                             \
            const Param *p = model_param(m, id[i], layer);                                         \
            at[i] = !p ? 0 : m->block[p->block].local ? (local) + p->offset : (dense) + p->offset; \
        }                                                                                          \
    } while (0)

LayerWeights layer_weights(const Model *m, int layer, const floatX *dense, const floatX *local) {
    const floatX *at[11];
    LAYER_POINTERS(at, dense, local);
    LayerWeights w = {
        at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7], at[8], at[9], at[10]
    };
    return w;
}

LayerGrads layer_grads(const Model *m, int layer, gradX *dense, gradX *local) {
    gradX *at[11];
    LAYER_POINTERS(at, dense, local);
    LayerGrads d = { at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7], at[8], at[9], at[10] };
    return d;
}

// ---- memory ---------------------------------------------------------------------------------
// Width of the MLP of a layer and its rows: a dense layer is one expert with every token.
static int mlp_width(const Config *c, int layer) { return c->is_moe[layer] ? c->F : c->I; }

// Lays the attention group out behind `base`; with base 0 only counts.
static size_t attention_layout(Saved *k, const Workspace *w, char *base) {
    const Config *c = w->c;
    size_t at = 0, q = (size_t)w->attention_rows * w->local_heads * c->D,
           kv = (size_t)w->attention_rows * w->local_kv_heads * c->D;
#define PLACE(field, type, count)                         \
    do {                                                  \
        k->field = base ? (type *)(base + at) : 0;        \
        at += ((count) * sizeof(type) + 255) / 256 * 256; \
    } while (0)
    PLACE(q, floatX, q);
    PLACE(k, floatX, kv);
    PLACE(v, floatX, kv);
    PLACE(o, floatX, q);
    PLACE(lse, real, (size_t)w->attention_rows * w->local_heads);
    PLACE(mid, floatX, (size_t)w->R * c->C);
    return at;
}

static size_t expert_layout(Saved *k, const Workspace *w, int layer, int64_t rows, int64_t pool,
                            char *base) {
    const Config *c = w->c;
    size_t at = 0;
    PLACE(H, floatX, (size_t)rows * 2 * mlp_width(c, layer));
    if (w->moves && c->is_moe[layer]) {
        PLACE(pool, floatX, (size_t)pool * c->C);
        PLACE(pool_score, real, (size_t)pool * c->K);
    }
#undef PLACE
    return at;
}

size_t saved_attention_bytes(const Workspace *w) {
    Saved k;
    return attention_layout(&k, w, 0);
}
size_t saved_expert_bytes(const Workspace *w, int layer, int64_t rows, int64_t pool) {
    Saved k;
    return expert_layout(&k, w, layer, rows, pool, 0);
}

void saved_attention_place(Saved *k, const Workspace *w, const InFlight *s, char *memory) {
    k->has_attention = memory != 0;
    if (memory) {
        attention_layout(k, w, memory);
        return;
    }
    k->q = s->scratch.q;
    k->k = s->scratch.k;
    k->v = s->scratch.v;
    k->o = s->scratch.o;
    k->lse = s->scratch.lse;
    k->mid = s->scratch.mid;
}

void saved_expert_place(Saved *k, const Workspace *w, int layer, int64_t rows, int64_t pool,
                        char *memory) {
    k->has_experts = memory != 0;
    k->pool = 0;
    k->pool_score = 0;
    if (memory)
        expert_layout(k, w, layer, rows, pool, memory);
    else
        k->H = w->H;
}

void workspace_create(Workspace *w, const Model *m, const Grid *g, int B, int T, Arena *arena) {
    const Config *c = &m->c;
    memset(w, 0, sizeof *w);
    w->c = c;
    w->B = B;
    w->T = T;
    w->R = B * T;
    w->local_heads = c->H / (m->shard_spec.split_heads ? g->ep : 1);
    w->local_kv_heads = c->KV / (m->shard_spec.split_heads ? g->ep : 1);
    w->attention_rows = heads_rows(g, w->R);
    w->moves = g->ep > 1 && g->dispatch != DISPATCH_ALLREDUCE;
    w->heads = heads_create(g, c, w->R, arena);
    size_t M = 0, hidden = 0; // largest expert rows, and rows x width, over the kinds of layers
    if (c->n_moe) {
        M = (size_t)row_index_bound(dispatch_pool_bound(g, w->R), c->K, c->E / g->ep);
        hidden = M * (size_t)c->F;
    }
    if (c->n_moe < c->L) {
        size_t rows = (size_t)row_index_bound(w->R, 1, 1);
        if (rows > M) M = rows;
        if (rows * (size_t)c->I > hidden) hidden = rows * (size_t)c->I;
        w->dense.M = (int)rows;
        w->dense.P = w->R;
        w->dense.E = w->dense.K = 1;
        w->dense.row_token = ARENA_TAKE(arena, int, rows, "row index");
        w->dense.token_row = ARENA_TAKE(arena, int, w->R, "row index");
        w->dense.expert_row = ARENA_TAKE(arena, int, 2, "row index");
        if (w->dense.row_token) row_index_dense(&w->dense, w->R);
    }
    size_t q = (size_t)w->attention_rows * w->local_heads * c->D,
           kv = (size_t)w->attention_rows * w->local_kv_heads * c->D, x = (size_t)w->R * c->C;
    w->cos = ARENA_TAKE(arena, real, (size_t)T * c->D / 2, "rope table");
    w->sin = ARENA_TAKE(arena, real, (size_t)T * c->D / 2, "rope table");
    if (w->cos) rope_table(w->cos, w->sin, c->rope_theta, T, c->D);
    w->h = ARENA_TAKE(arena, floatX, x, "working set: attention");
    w->qn = ARENA_TAKE(arena, floatX, q, "working set: attention");
    w->kn = ARENA_TAKE(arena, floatX, kv, "working set: attention");
    w->dq = ARENA_TAKE(arena, floatX, q, "working set: attention");
    w->dk = ARENA_TAKE(arena, floatX, kv, "working set: attention");
    w->dv = ARENA_TAKE(arena, floatX, kv, "working set: attention");
    w->d_o = ARENA_TAKE(arena, floatX, q, "working set: attention");
    w->dh = ARENA_TAKE(arena, floatX, x, "working set: attention");
    w->attention = arena_take(
        arena,
        attention_workspace(w->attention_rows / T, T, w->local_heads, w->local_kv_heads, c->D),
        "working set: attention");
    w->H = ARENA_TAKE(arena, floatX, 2 * hidden, "working set: experts");
    w->A = ARENA_TAKE(arena, floatX, hidden, "working set: experts");
    w->Y = ARENA_TAKE(arena, floatX, M * (size_t)c->C, "working set: experts");
    w->rstd = ARENA_TAKE(arena, real, w->R, "working set: attention");
    w->dz = ARENA_TAKE(arena, real, (size_t)w->R * (c->n_moe ? c->E : 0), "working set: experts");
}

void workspace_free(Workspace *w) {
    heads_free(w->heads);
    w->heads = 0;
}

void in_flight_create(InFlight *s, const Workspace *w, const Grid *g, Arena *arena) {
    const Config *c = w->c;
    memset(s, 0, sizeof *s);
    size_t x = (size_t)w->R * c->C;
    s->u = ARENA_TAKE(arena, floatX, x, "working set: micro-batches in flight");
    s->y = ARENA_TAKE(arena, floatX, x, "working set: micro-batches in flight");
    s->rstd = ARENA_TAKE(arena, real, w->R, "working set: micro-batches in flight");
    s->dscore =
        ARENA_TAKE(arena, real, (size_t)w->R * c->K, "working set: micro-batches in flight");
    char *scratch =
        (char *)arena_take(arena, saved_attention_bytes(w), "working set: micro-batches in flight");
    if (scratch) attention_layout(&s->scratch, w, scratch);
    if (c->n_moe) s->exchange = dispatcher_create(g, c, w->R, arena);
}

void in_flight_free(InFlight *s) {
    if (s->exchange) dispatcher_free(s->exchange);
    s->exchange = 0;
}

// ---- forward --------------------------------------------------------------------------------
// q .. mid of `kept` from its x.
static void attention_part(Workspace *w, Saved *kept, const LayerWeights *p) {
    const Config *c = w->c;
    int Q = w->local_heads * c->D, KV = w->local_kv_heads * c->D;
    rmsnorm_forward(w->h, 0, kept->x, p->attn_norm, (real)c->rms_eps, w->R, c->C);
    const floatX *h = heads_gather(w->heads, w->h);
    linear_forward(kept->q, h, p->q, w->attention_rows, Q, c->C);
    linear_forward(kept->k, h, p->k, w->attention_rows, KV, c->C);
    linear_forward(kept->v, h, p->v, w->attention_rows, KV, c->C);
    qk_norm_rope_forward(w->qn, w->kn, kept->q, kept->k, p->q_norm, p->k_norm, w->cos, w->sin, 0,
                         (real)c->rms_eps, w->attention_rows, w->T, w->local_heads,
                         w->local_kv_heads, c->D);
    attention_forward(kept->o, kept->lse, w->qn, w->kn, kept->v, 0, w->attention,
                      w->attention_rows / w->T, w->T, w->local_heads, w->local_kv_heads, c->D);
    linear_forward(heads_target(w->heads, kept->mid), kept->o, p->o, w->attention_rows, c->C, Q);
    heads_reduce(w->heads, kept->mid);
    add(kept->mid, kept->mid, kept->x, (size_t)w->R * c->C);
}

void layer_forward_start(Workspace *w, InFlight *s, Saved *kept, int layer, const LayerWeights *p,
                         RouterStats stats, const real *bias) {
    const Config *c = w->c;
    attention_part(w, kept, p);
    rmsnorm_forward(s->u, s->rstd, kept->mid, p->mlp_norm, (real)c->rms_eps, w->R, c->C);
    if (!c->is_moe[layer]) return;
    router_forward(kept->logits, kept->topk, kept->score, stats, s->u, p->router, bias,
                   c->norm_topk, w->R, c->C, c->E, c->K);
    dispatch_route(&s->plan, s->exchange, kept->topk);
    dispatch_start(s->exchange, FORWARD, s->u, kept->score);
}

void layer_forward_experts(Workspace *w, InFlight *s, Saved *kept, int layer,
                           const LayerWeights *p) {
    const Config *c = w->c;
    if (!c->is_moe[layer]) {
        experts_up(kept->H, w->A, s->u, p->up, &w->dense, c->C, c->I);
        experts_down(w->Y, w->A, p->down, &w->dense, c->C, c->I);
        rows_weighted_sum(s->y, w->Y, 0, &w->dense, c->C);
        return;
    }
    const real *score;
    const floatX *pool = dispatch_wait(s->exchange, FORWARD, &score);
    if (kept->pool) {
        device_copy(kept->pool, pool, (size_t)s->plan.P * c->C * sizeof(floatX));
        device_copy(kept->pool_score, score, (size_t)s->plan.P * c->K * sizeof(real));
    }
    experts_up(kept->H, w->A, pool, p->up, &s->plan, c->C, c->F);
    experts_down(w->Y, w->A, p->down, &s->plan, c->C, c->F);
    rows_weighted_sum(combine_target(s->exchange, FORWARD, s->y, 0, 0), w->Y, score, &s->plan,
                      c->C);
    combine_start(s->exchange, FORWARD, s->y, 0);
}

void layer_forward_finish(Workspace *w, InFlight *s, Saved *kept, int layer, floatX *out) {
    if (w->c->is_moe[layer]) combine_wait(s->exchange, FORWARD);
    add(out, kept->mid, s->y, (size_t)w->R * w->c->C);
}

// ---- backward: the stages of forward with every arrow turned round --------------------------
void layer_backward_start(Workspace *w, InFlight *s, Saved *kept, int layer, const LayerWeights *p,
                          const floatX *dx) {
    const Config *c = w->c;
    if (!kept->has_attention) attention_part(w, kept, p);
    rmsnorm_forward(s->u, s->rstd, kept->mid, p->mlp_norm, (real)c->rms_eps, w->R, c->C);
    if (!c->is_moe[layer]) return;
    dispatch_route(&s->plan, s->exchange, kept->topk);
    if (!kept->pool) dispatch_start(s->exchange, FORWARD, s->u, kept->score);
    dispatch_start(s->exchange, BACKWARD, dx,
                   0); // out = mid + combine(...): dy of the experts is dx itself
}

void layer_backward_experts(Workspace *w, InFlight *s, Saved *kept, int layer,
                            const LayerWeights *p, const LayerGrads *d, const floatX *dx,
                            int accumulate) {
    const Config *c = w->c;
    int moe = c->is_moe[layer], F = mlp_width(c, layer);
    const RowIndex *plan = moe ? &s->plan : &w->dense;
    const floatX *pool = moe ? kept->pool : s->u, *dpool = dx;
    const real *score = moe ? kept->pool_score : 0;
    floatX *target = s->y;
    real *dscore = 0;
    if (moe) {
        if (!pool) pool = dispatch_wait(s->exchange, FORWARD, &score);
        dpool = dispatch_wait(s->exchange, BACKWARD, 0);
        target = combine_target(s->exchange, BACKWARD, s->y, s->dscore, &dscore);
    }
    if (!kept->has_experts) experts_up(kept->H, 0, pool, p->up, plan, c->C, F);
    floatX *dH = kept->H; // in place: H is not needed again
    experts_down_backward(dH, w->A, dscore, dpool, kept->H, p->down, score, plan, c->C, F);
    experts_up_backward(w->Y, dH, p->up, plan, c->C, F);
    rows_weighted_sum(target, w->Y, 0, plan, c->C);
    if (moe) combine_start(s->exchange, BACKWARD, s->y, s->dscore);
    experts_wgrad(d->up, d->down, pool, dpool, dH, w->A, plan, accumulate, c->C, F);
}

void layer_backward_finish(Workspace *w, InFlight *s, Saved *kept, int layer, const LayerWeights *p,
                           const LayerGrads *d, const RouterLoss *loss, floatX *dx, int accumulate,
                           int accumulate_qkvo) {
    const Config *c = w->c;
    int Q = w->local_heads * c->D, KV = w->local_kv_heads * c->D;
    floatX *du = s->y;
    if (c->is_moe[layer]) {
        combine_wait(s->exchange, BACKWARD);
        router_backward_add(du, d->router, w->dz, s->dscore, kept->logits, kept->topk, kept->score,
                            s->u, p->router, loss->share, loss->aux_scale, loss->z_scale,
                            c->norm_topk, accumulate, w->R, c->C, c->E, c->K);
    }
    rmsnorm_backward(dx, d->mlp_norm, dx, du, kept->mid, p->mlp_norm, s->rstd, accumulate, w->R,
                     c->C); // dx is now the gradient of mid

    rmsnorm_forward(w->h, w->rstd, kept->x, p->attn_norm, (real)c->rms_eps, w->R, c->C);
    const floatX *h = heads_gather(w->heads, w->h), *d_mid = heads_reduce_adjoint(w->heads, dx);
    linear_backward_input(w->d_o, d_mid, p->o, w->attention_rows, c->C, Q);
    linear_backward_weight(d->o, d_mid, kept->o, accumulate_qkvo, w->attention_rows, c->C, Q);
    qk_norm_rope_forward(w->qn, w->kn, kept->q, kept->k, p->q_norm, p->k_norm, w->cos, w->sin, 0,
                         (real)c->rms_eps, w->attention_rows, w->T, w->local_heads,
                         w->local_kv_heads, c->D);
    attention_backward(w->dq, w->dk, w->dv, w->d_o, kept->o, kept->lse, w->qn, w->kn, kept->v, 0,
                       w->attention, w->attention_rows / w->T, w->T, w->local_heads,
                       w->local_kv_heads, c->D);
    qk_norm_rope_backward(w->dq, w->dk, d->q_norm, d->k_norm, w->dq, w->dk, kept->q, kept->k,
                          p->q_norm, p->k_norm, w->cos, w->sin, 0, (real)c->rms_eps, accumulate,
                          w->attention_rows, w->T, w->local_heads, w->local_kv_heads, c->D);
    linear_backward_weight(d->q, w->dq, h, accumulate_qkvo, w->attention_rows, Q, c->C);
    linear_backward_weight(d->k, w->dk, h, accumulate_qkvo, w->attention_rows, KV, c->C);
    linear_backward_weight(d->v, w->dv, h, accumulate_qkvo, w->attention_rows, KV, c->C);
    floatX *dh = heads_gather_target(w->heads, w->dh);
    linear_backward_input(dh, w->dq, p->q, w->attention_rows, Q, c->C);
    linear_backward_input_add(dh, w->dk, p->k, w->attention_rows, KV, c->C);
    linear_backward_input_add(dh, w->dv, p->v, w->attention_rows, KV, c->C);
    heads_gather_adjoint(w->heads, w->dh);
    rmsnorm_backward(dx, d->attn_norm, dx, w->dh, kept->x, p->attn_norm, w->rstd, accumulate, w->R,
                     c->C); // residual and branch meet at x
}
