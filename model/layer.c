// One layer, forward and backward, of one micro-batch: layer.h has the formulas and the contracts,
// README.md derives the backward. Every product, norm and sum is a function of kernels/kernels.h;
// dispatch, combine (parallel/dispatch.h) and heads_ (parallel/heads.h) move tokens between ranks.
#include "layer.h"

// ---- forward --------------------------------------------------------------------------------
// q .. mid from x.
static void attention_part(Workspace *w, const InFlight *f, Saved *s, const LayerWeights *p) {
    const Config *c = w->c;
    int64_t R = w->R, C = c->C, A = w->attention_rows, T = w->T;
    int64_t Q = w->heads * c->D, KV = w->kv_heads * c->D;
    rmsnorm_forward(w->h, 0, s->x, p->attn_norm, (real)c->rms_eps, R, C);
    const floatX *h = heads_gather(w->split, w->h);
    linear_forward(s->q, h, p->q, A, Q, C);
    linear_forward(s->k, h, p->k, A, KV, C);
    linear_forward(s->v, h, p->v, A, KV, C);
    qk_norm_rope_forward(w->qn, w->kn, s->q, s->k, p->q_norm, p->k_norm, w->cos, w->sin,
                         f->position, (real)c->rms_eps, A, T, w->heads, w->kv_heads, c->D);
    attention_forward(s->o, s->lse, w->qn, w->kn, s->v, f->position, w->attention, A / T, T,
                      w->heads, w->kv_heads, c->D);
    linear_forward(heads_target(w->split, s->mid), s->o, p->o, A, C, Q);
    heads_reduce(w->split, s->mid);
    add(s->mid, s->mid, s->x, R * C);
}

void layer_forward_start(Workspace *w, InFlight *f, Saved *s, int layer, const LayerWeights *p,
                         RouterStats stats, const real *bias, int given) {
    const Config *c = w->c;
    attention_part(w, f, s, p);
    rmsnorm_forward(f->u, f->rstd, s->mid, p->mlp_norm, (real)c->rms_eps, w->R, c->C);
    if (!c->is_moe[layer]) return;
    router_forward(s->logits, s->topk, s->score, stats, f->u, p->router, bias, given, c->norm_topk,
                   w->R, c->C, c->E, c->K);
    f->route.table = s->route.table;
    dispatch_route(&f->route, f->dispatcher, s->topk);
    dispatch_start(f->dispatcher, FORWARD, f->u, s->score);
}

void layer_forward_experts(Workspace *w, InFlight *f, Saved *s, int layer, const LayerWeights *p) {
    const Config *c = w->c;
    if (!c->is_moe[layer]) {
        experts_up(s->H, w->A, f->u, p->up, &w->dense, c->C, c->I);
        experts_down(w->Y, w->A, p->down, &w->dense, c->C, c->I);
        rows_weighted_sum(f->y, w->Y, 0, &w->dense, c->C);
        return;
    }
    const real *score;
    const floatX *pool = dispatch_wait(f->dispatcher, FORWARD, &score);
    if (s->route.index.row_token) saved_route_copy(s, w, &f->route);
    if (s->pool) {
        int64_t P = f->route.index.P;
        device_copy(s->pool, pool, P * c->C * sizeof(floatX));
        device_copy(s->pool_score, score, P * c->K * sizeof(real));
    }
    experts_up(s->H, w->A, pool, p->up, &f->route.index, c->C, c->F);
    experts_down(w->Y, w->A, p->down, &f->route.index, c->C, c->F);
    floatX *target = combine_target(f->dispatcher, FORWARD, f->y, 0, 0);
    rows_weighted_sum(target, w->Y, score, &f->route.index, c->C);
    combine_start(f->dispatcher, FORWARD, f->y, 0);
}

void layer_forward_finish(Workspace *w, InFlight *f, Saved *s, int layer, floatX *out) {
    if (w->c->is_moe[layer]) combine_wait(f->dispatcher, FORWARD);
    add(out, s->mid, f->y, w->R * w->c->C);
}

// ---- backward: the stages of forward with every arrow turned round --------------------------
void layer_backward_start(Workspace *w, InFlight *f, Saved *s, int layer, const LayerWeights *p,
                          const floatX *dx) {
    const Config *c = w->c;
    if (!s->has_attention) attention_part(w, f, s, p);
    rmsnorm_forward(f->u, f->rstd, s->mid, p->mlp_norm, (real)c->rms_eps, w->R, c->C);
    if (!c->is_moe[layer]) return;
    dispatch_route_again(&f->route, f->dispatcher, s->topk, &s->route);
    if (!s->pool) dispatch_start(f->dispatcher, FORWARD, f->u, s->score);
    // out = mid + combine(...), so the gradient of the combined output is dx itself.
    dispatch_start(f->dispatcher, BACKWARD, dx, 0);
}

void layer_backward_experts(Workspace *w, InFlight *f, Saved *s, int layer, const LayerWeights *p,
                            const LayerGrads *d, const floatX *dx, int accumulate) {
    const Config *c = w->c;
    int moe = c->is_moe[layer];
    int64_t F = moe ? c->F : c->I;
    const RowIndex *index = moe ? &f->route.index : &w->dense;
    const floatX *pool = moe ? s->pool : f->u;
    const floatX *dpool = dx;
    const real *score = moe ? s->pool_score : 0;
    floatX *target = f->y;
    real *dscore = 0;
    if (moe) {
        if (!pool) pool = dispatch_wait(f->dispatcher, FORWARD, &score);
        dpool = dispatch_wait(f->dispatcher, BACKWARD, 0);
        target = combine_target(f->dispatcher, BACKWARD, f->y, f->dscore, &dscore);
    }
    if (!s->has_experts) experts_up(s->H, 0, pool, p->up, index, c->C, F);
    floatX *dH = s->H; // in place: H is not needed again
    experts_down_backward(dH, w->A, dscore, dpool, s->H, p->down, score, index, c->C, F);
    experts_up_backward(w->Y, dH, p->up, index, c->C, F);
    rows_weighted_sum(target, w->Y, 0, index, c->C);
    if (moe) combine_start(f->dispatcher, BACKWARD, f->y, f->dscore);
    experts_wgrad(d->up, d->down, pool, dpool, dH, w->A, index, accumulate, c->C, F);
}

void layer_backward_finish(Workspace *w, InFlight *f, Saved *s, int layer, const LayerWeights *p,
                           const LayerGrads *d, const RouterLoss *loss, floatX *dx, int accumulate,
                           int accumulate_qkvo) {
    const Config *c = w->c;
    int64_t R = w->R, C = c->C, A = w->attention_rows, T = w->T;
    int64_t Q = w->heads * c->D, KV = w->kv_heads * c->D;
    floatX *du = f->y;
    if (c->is_moe[layer]) {
        combine_wait(f->dispatcher, BACKWARD);
        router_backward_add(du, d->router, w->dz, f->dscore, s->logits, s->topk, s->score, f->u,
                            p->router, loss->share, loss->aux_scale, loss->z_scale, c->norm_topk,
                            accumulate, R, C, c->E, c->K);
    }
    // From here on dx is the gradient of mid.
    rmsnorm_backward(dx, d->mlp_norm, dx, du, s->mid, p->mlp_norm, f->rstd, accumulate, R, C);

    rmsnorm_forward(w->h, w->rstd, s->x, p->attn_norm, (real)c->rms_eps, R, C);
    const floatX *h = heads_gather(w->split, w->h);
    const floatX *d_mid = heads_reduce_adjoint(w->split, dx);
    linear_backward_input(w->d_o, d_mid, p->o, A, C, Q);
    linear_backward_weight(d->o, d_mid, s->o, accumulate_qkvo, A, C, Q);
    qk_norm_rope_forward(w->qn, w->kn, s->q, s->k, p->q_norm, p->k_norm, w->cos, w->sin,
                         f->position, (real)c->rms_eps, A, T, w->heads, w->kv_heads, c->D);
    attention_backward(w->dq, w->dk, w->dv, w->d_o, s->o, s->lse, w->qn, w->kn, s->v, f->position,
                       w->attention, A / T, T, w->heads, w->kv_heads, c->D);
    qk_norm_rope_backward(w->dq, w->dk, d->q_norm, d->k_norm, w->dq, w->dk, s->q, s->k, p->q_norm,
                          p->k_norm, w->cos, w->sin, f->position, (real)c->rms_eps, accumulate, A,
                          T, w->heads, w->kv_heads, c->D);
    linear_backward_weight(d->q, w->dq, h, accumulate_qkvo, A, Q, C);
    linear_backward_weight(d->k, w->dk, h, accumulate_qkvo, A, KV, C);
    linear_backward_weight(d->v, w->dv, h, accumulate_qkvo, A, KV, C);
    floatX *dh = heads_gather_target(w->split, w->dh);
    linear_backward_input(dh, w->dq, p->q, A, Q, C);
    linear_backward_input_add(dh, w->dk, p->k, A, KV, C);
    linear_backward_input_add(dh, w->dv, p->v, A, KV, C);
    heads_gather_adjoint(w->split, w->dh);
    // The residual and the branch meet at x.
    rmsnorm_backward(dx, d->attn_norm, dx, w->dh, s->x, p->attn_norm, w->rstd, accumulate, R, C);
}
