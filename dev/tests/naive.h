// The whole model as slow, obvious loops in double: one batch, forward and backward, written from
// the paper's formulas and independent of model/ and kernels/.
//
// It is the truth where transformers has no number: fp64 builds (every gradient to 1e-11, finite
// differences vouch for both), and bf16 builds, whose weights are rounded and whose routing may
// therefore differ from transformers': the routing is given, so both sides take the same experts.
// Every number that an op-by-op bf16 implementation would store passes through Q(). With
// naive_rounding = 0 Q is the identity: the truth. With 1 it rounds to bf16: the naive bf16
// version, whose error bounds ours (at most twice: FlashAttention's rule). Router logits, softmax
// statistics and losses stay wide in both, as in the program.
#ifndef MOE_NAIVE_H
#define MOE_NAIVE_H
#include "../../model/params.h"
#include "../../kernels/fail.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    char name[160];
    int64_t n;
    double *w, *g;
} Weight; // one HF tensor and its gradient
typedef struct {
    int n;
    Weight *weight;
} Weights;

static inline void weights_add(void *context, const char *name, int is_vector, int64_t rows,
                               int64_t cols) {
    Weights *all = (Weights *)context;
    (void)is_vector;
    all->weight = (Weight *)realloc(all->weight, (size_t)(all->n + 1) * sizeof(Weight));
    Weight *w = &all->weight[all->n++];
    strcpy(w->name, name);
    w->n = rows * cols;
    w->w = (double *)xcalloc((size_t)w->n, sizeof(double), "a test tensor");
    w->g = (double *)xcalloc((size_t)w->n, sizeof(double), "a test tensor");
}
// All tensors of the model in table order, zero.
static inline Weights weights_new(const Config *c) {
    Weights all = { 0, 0 };
    model_visit(c, weights_add, &all);
    return all;
}
static inline void weights_free(Weights *all) {
    for (int i = 0; i < all->n; i++) {
        free(all->weight[i].w);
        free(all->weight[i].g);
    }
    free(all->weight);
    all->n = 0;
}
static inline int weights_find(const Weights *all, const char *name) {
    for (int i = 0; i < all->n; i++)
        if (!strcmp(all->weight[i].name, name)) return i;
    die("no tensor %s|the test and the parameter table disagree", name);
}
static inline Weight *layer_weight(const Weights *all, int layer, const char *format, int expert) {
    char part[80], name[160];
    snprintf(part, sizeof part, format, expert);
    snprintf(name, sizeof name, "model.layers.%d.%s", layer, part);
    return &all->weight[weights_find(all, name)];
}

// ---- operations -----------------------------------------------------------------------------
static int naive_rounding;
static inline double Q(double v) {
    if (!naive_rounding) return v;
    union {
        float f;
        uint32_t u;
    } x;
    x.f = (float)v;
    x.u = (x.u + 0x7fff + (x.u >> 16 & 1)) & 0xffff0000u;
    return x.f;
}
static void *naive_piece[4096];
static int naive_pieces;
static double *new_doubles(size_t n) {
    if (naive_pieces == 4096) die("naive.h: too many arrays|raise the limit");
    return (double *)(naive_piece[naive_pieces++] = xcalloc(n, sizeof(double), "the naive model"));
}
static void naive_release(void) {
    while (naive_pieces) free(naive_piece[--naive_pieces]);
}

static double *linear(const double *x, const double *W, int R, int O, int N) {
    double *y = new_doubles((size_t)R * O);
    for (int r = 0; r < R; r++)
        for (int o = 0; o < O; o++) {
            double s = 0;
            for (int i = 0; i < N; i++) s += x[(size_t)r * N + i] * W[(size_t)o * N + i];
            y[(size_t)r * O + o] = Q(s);
        }
    return y;
}
// dx (R,N) = Q(dx + Q(dy W)), dW += dy^T x
static void linear_back(double *dx, double *dW, const double *dy, const double *x, const double *W,
                        int R, int O, int N) {
    for (int r = 0; r < R; r++)
        for (int i = 0; i < N; i++) {
            double s = 0;
            for (int o = 0; o < O; o++) {
                s += dy[(size_t)r * O + o] * W[(size_t)o * N + i];
                dW[(size_t)o * N + i] += dy[(size_t)r * O + o] * x[(size_t)r * N + i];
            }
            dx[(size_t)r * N + i] = Q(dx[(size_t)r * N + i] + Q(s));
        }
}
// y = w * n, n = x / rms(x), over rows of N
static double *norm(const double *x, const double *w, double eps, int R, int N) {
    double *y = new_doubles((size_t)R * N);
    for (int r = 0; r < R; r++) {
        double s = 0;
        for (int i = 0; i < N; i++) s += x[(size_t)r * N + i] * x[(size_t)r * N + i];
        s = 1 / sqrt(s / N + eps);
        for (int i = 0; i < N; i++) y[(size_t)r * N + i] = Q(w[i] * Q(x[(size_t)r * N + i] * s));
    }
    return y;
}
// dx = Q(dx + rstd (t - n mean(t n))), t = dy w; dw += dy n
static void norm_back(double *dx, double *dw, const double *dy, const double *x, const double *w,
                      double eps, int R, int N) {
    for (int r = 0; r < R; r++) {
        const double *xr = x + (size_t)r * N, *dyr = dy + (size_t)r * N;
        double s = 0, mean = 0;
        for (int i = 0; i < N; i++) s += xr[i] * xr[i];
        s = 1 / sqrt(s / N + eps);
        for (int i = 0; i < N; i++) {
            mean += Q(dyr[i] * w[i]) * xr[i] * s / N;
            dw[i] += dyr[i] * Q(xr[i] * s);
        }
        for (int i = 0; i < N; i++)
            dx[(size_t)r * N + i] =
                Q(dx[(size_t)r * N + i] + Q(s * (Q(dyr[i] * w[i]) - xr[i] * s * mean)));
    }
}
// Turns pairs (j, j + D/2) of every head by sign * position * theta^(-2j/D).
static double *rope(const double *x, double theta, double sign, int R, int T, int H, int D) {
    double *y = new_doubles((size_t)R * H * D);
    for (int r = 0; r < R; r++)
        for (int h = 0; h < H; h++)
            for (int j = 0; j < D / 2; j++) {
                double angle = r % T * pow(theta, -2.0 * j / D), c = Q(cos(angle)),
                       s = sign * Q(sin(angle));
                const double *a = x + ((size_t)r * H + h) * D;
                double *b = y + ((size_t)r * H + h) * D;
                b[j] = Q(Q(a[j] * c) - Q(a[j + D / 2] * s));
                b[j + D / 2] = Q(Q(a[j + D / 2] * c) + Q(a[j] * s));
            }
    return y;
}
static void sum_into(double *a, const double *b, size_t n) {
    for (size_t i = 0; i < n; i++) a[i] = Q(a[i] + b[i]);
}

// p (causal, T) of one head and row t; then o += p v.  With d_o: dq, dk, dv += instead.
static void attention_row(double *o, const double *q, const double *k, const double *v,
                          const double *d_o, double *dq, double *dk, double *dv, int t, int stride,
                          int D) {
    double p[4096], dp[4096], most = -INFINITY, sum = 0, dot = 0, scale = 1 / sqrt(D);
    for (int u = 0; u <= t; u++) {
        p[u] = 0;
        for (int i = 0; i < D; i++) p[u] += q[i] * k[(size_t)u * stride + i];
        p[u] = Q(Q(p[u]) * scale);
        if (p[u] > most) most = p[u];
    }
    for (int u = 0; u <= t; u++) sum += p[u] = exp(p[u] - most);
    for (int u = 0; u <= t; u++) p[u] = Q(p[u] / sum);
    for (int i = 0; o && i < D; i++) {
        o[i] = 0;
        for (int u = 0; u <= t; u++) o[i] += p[u] * v[(size_t)u * stride + i];
        o[i] = Q(o[i]);
    }
    if (!d_o) return;
    for (int u = 0; u <= t; u++) {
        dp[u] = 0;
        for (int i = 0; i < D; i++) {
            dp[u] += d_o[i] * v[(size_t)u * stride + i];
            dv[(size_t)u * stride + i] += p[u] * d_o[i];
        }
        dp[u] = Q(dp[u]);
        dot += dp[u] * p[u];
    }
    for (int u = 0; u <= t; u++) {
        double ds = Q(Q(p[u] * (dp[u] - dot)) * scale);
        for (int i = 0; i < D; i++) {
            dq[i] += ds * k[(size_t)u * stride + i];
            dk[(size_t)u * stride + i] += ds * q[i];
        }
    }
}

// One expert (or dense MLP) and one token: y (C). With dy: du (C) is added to, weights' gradients
// are added to, and <dy, y before its score> is returned.
static double expert(double *y, const double *u, const Weight *gate, const Weight *up,
                     const Weight *down, double score, const double *dy, double *du, int C, int F) {
    double g[1024], v[1024], a[1024], da, dot = 0, dyc[1024];
    for (int f = 0; f < F; f++) {
        g[f] = v[f] = 0;
        for (int i = 0; i < C; i++) {
            g[f] += u[i] * gate->w[(size_t)f * C + i];
            v[f] += u[i] * up->w[(size_t)f * C + i];
        }
        g[f] = Q(g[f]);
        v[f] = Q(v[f]);
        a[f] = Q(Q(g[f] / (1 + exp(-g[f]))) * v[f]);
    }
    for (int c = 0; c < C; c++) {
        double s = 0;
        for (int f = 0; f < F; f++) s += a[f] * down->w[(size_t)c * F + f];
        s = Q(s);
        if (y) y[c] = Q(y[c] + Q(s * score));
        if (dy) {
            dot += dy[c] * s;
            dyc[c] = Q(dy[c] * score);
        }
    }
    if (!dy) return 0;
    double d[1024] = { 0 };
    for (int f = 0; f < F; f++) {
        da = 0;
        for (int c = 0; c < C; c++) {
            da += dyc[c] * down->w[(size_t)c * F + f];
            down->g[(size_t)c * F + f] += dyc[c] * a[f];
        }
        da = Q(da);
        double sig = 1 / (1 + exp(-g[f])), dg = Q(Q(da * v[f]) * sig * (1 + g[f] * (1 - sig))),
               dv = Q(da * Q(g[f] * sig));
        for (int c = 0; c < C; c++) {
            d[c] += dg * gate->w[(size_t)f * C + c] + dv * up->w[(size_t)f * C + c];
            gate->g[(size_t)f * C + c] += dg * u[c];
            up->g[(size_t)f * C + c] += dv * u[c];
        }
    }
    for (int c = 0; c < C; c++) du[c] = Q(du[c] + Q(d[c]));
    return dot;
}

// ---- the model ------------------------------------------------------------------------------
typedef struct {
    const Config *c;
    int B, T, aux_per_layer, ignore;
    double aux_coef, z_coef;
    const int *ids, *targets;     // (B*T); targets below 0 do not count
    const int *topk;              // (n_moe, B*T, K) ascending: the routing to use
    double *logits, loss, aux, z; // out: (B*T, V) from naive_release's memory, and the losses
} NaiveBatch;
typedef struct {
    double *x, *h, *q, *k, *v, *qh, *kh, *qn, *kn, *o, *mid, *u, *z, *p;
} NaiveLayer; // z, p (R,E): router logits and softmax

// Forward and backward; gradients of loss + aux_coef * aux + z_coef * z are added into
// all->weight[].g, which must be zero.
static void naive_model(NaiveBatch *b, const Weights *all) {
    const Config *c = b->c;
    int R = b->B * b->T, C = c->C, D = c->D, E = c->E, K = c->K, nq = c->H * D, nk = c->KV * D,
        group = c->H / c->KV, moe = 0;
    double eps = c->rms_eps, valid = 0, positions = (double)R * c->n_moe,
           *share = new_doubles((size_t)(c->n_moe + 1) * (size_t)(E + 1));
    NaiveLayer *layer = (NaiveLayer *)(naive_piece[naive_pieces++] = xcalloc(
                                           (size_t)c->L, sizeof(NaiveLayer), "the naive model"));
    Weight *embed = &all->weight[weights_find(all, "model.embed_tokens.weight")],
           *head = c->tied ? embed : &all->weight[weights_find(all, "lm_head.weight")];
    Weight *last = &all->weight[weights_find(all, "model.norm.weight")];
    for (int r = 0; r < R; r++) valid += b->targets[r] >= 0;
    for (int i = 0; i < c->n_moe * R * K; i++)
        share[(b->aux_per_layer ? i / (R * K) : 0) * E + b->topk[i]] +=
            1 / (b->aux_per_layer ? (double)R : positions);
    b->loss = b->aux = b->z = 0;
    double *x = new_doubles((size_t)R * C), *prob = new_doubles((size_t)E + 1);
    for (int i = 0; i < R * C; i++) x[i] = embed->w[(size_t)b->ids[i / C] * C + i % C];
    for (int l = 0; l < c->L; l++) {
        NaiveLayer *k = &layer[l];
#define W(name) layer_weight(all, l, name, 0)
        k->x = x;
        k->h = norm(x, W("input_layernorm.weight")->w, eps, R, C);
        k->q = linear(k->h, W("self_attn.q_proj.weight")->w, R, nq, C);
        k->k = linear(k->h, W("self_attn.k_proj.weight")->w, R, nk, C);
        k->v = linear(k->h, W("self_attn.v_proj.weight")->w, R, nk, C);
        k->qh = norm(k->q, W("self_attn.q_norm.weight")->w, eps, R * c->H, D);
        k->kh = norm(k->k, W("self_attn.k_norm.weight")->w, eps, R * c->KV, D);
        k->qn = rope(k->qh, c->rope_theta, 1, R, b->T, c->H, D);
        k->kn = rope(k->kh, c->rope_theta, 1, R, b->T, c->KV, D);
        k->o = new_doubles((size_t)R * nq);
        for (int r = 0; r < R; r++)
            for (int h = 0; h < c->H; h++) {
                size_t at = (size_t)(r - r % b->T) * nk + (size_t)(h / group) * D;
                attention_row(k->o + (size_t)r * nq + h * D, k->qn + (size_t)r * nq + h * D,
                              k->kn + at, k->v + at, 0, 0, 0, 0, r % b->T, nk, D);
            }
        k->mid = linear(k->o, W("self_attn.o_proj.weight")->w, R, C, nq);
        sum_into(k->mid, x, (size_t)R * C);
        k->u = norm(k->mid, W("post_attention_layernorm.weight")->w, eps, R, C);
        double *y = new_doubles((size_t)R * C);
        if (c->is_moe[l]) {
            int wide = naive_rounding;
            naive_rounding = 0; // router logits stay wide
            k->z = linear(k->u, W("mlp.gate.weight")->w, R, E, C);
            naive_rounding = wide;
            k->p = new_doubles((size_t)R * E);
            for (int r = 0; r < R; r++) {
                const int *id = b->topk + ((size_t)moe * R + r) * K;
                double sum = 0, chosen = 0;
                for (int e = 0; e < E; e++) sum += exp(k->z[(size_t)r * E + e]);
                for (int e = 0; e < E; e++)
                    k->p[(size_t)r * E + e] = exp(k->z[(size_t)r * E + e]) / sum;
                for (int j = 0; j < K; j++) chosen += k->p[(size_t)r * E + id[j]];
                for (int e = 0; e < E; e++)
                    prob[e] = k->p[(size_t)r * E + e],
                    b->aux += E * share[(b->aux_per_layer ? moe : 0) * E + e] * prob[e] / positions;
                b->z += log(sum) * log(sum) / positions;
                for (int j = 0; j < K; j++)
                    expert(y + (size_t)r * C, k->u + (size_t)r * C,
                           layer_weight(all, l, "mlp.experts.%d.gate_proj.weight", id[j]),
                           layer_weight(all, l, "mlp.experts.%d.up_proj.weight", id[j]),
                           layer_weight(all, l, "mlp.experts.%d.down_proj.weight", id[j]),
                           prob[id[j]] / (c->norm_topk ? chosen : 1), 0, 0, C, c->F);
            }
            moe++;
        } else
            for (int r = 0; r < R; r++)
                expert(y + (size_t)r * C, k->u + (size_t)r * C, W("mlp.gate_proj.weight"),
                       W("mlp.up_proj.weight"), W("mlp.down_proj.weight"), 1, 0, 0, C, c->I);
        x = y;
        sum_into(x, k->mid, (size_t)R * C);
    }
    double *xf = norm(x, last->w, eps, R, C), *dlogits = new_doubles((size_t)R * c->V),
           *dxf = new_doubles((size_t)R * C), *dx = new_doubles((size_t)R * C);
    b->logits = linear(xf, head->w, R, c->V, C);
    for (int r = 0; r < R; r++) {
        const double *z = b->logits + (size_t)r * c->V;
        double sum = 0;
        if (b->targets[r] < 0) continue;
        for (int v = 0; v < c->V; v++) sum += exp(z[v]);
        b->loss += (log(sum) - z[b->targets[r]]) / valid;
        for (int v = 0; v < c->V; v++)
            dlogits[(size_t)r * c->V + v] = Q((exp(z[v]) / sum - (v == b->targets[r])) / valid);
    }
    linear_back(dxf, head->g, dlogits, xf, head->w, R, c->V, C);
    norm_back(dx, last->g, dxf, x, last->w, eps, R, C);
    for (int l = c->L - 1; l >= 0; l--) {
        NaiveLayer *k = &layer[l];
        double *du = new_doubles((size_t)R * C), *d_o = new_doubles((size_t)R * nq),
               *dq = new_doubles((size_t)R * nq), *dk = new_doubles((size_t)R * nk),
               *dv = new_doubles((size_t)R * nk), *dh = new_doubles((size_t)R * C),
               *dqp = new_doubles((size_t)R * nq), *dkp = new_doubles((size_t)R * nk);
        if (c->is_moe[l]) {
            Weight *router = W("mlp.gate.weight");
            moe--;
            for (int r = 0; r < R; r++) {
                const int *id = b->topk + ((size_t)moe * R + r) * K;
                const double *p = k->p + (size_t)r * E,
                             *f = share + (b->aux_per_layer ? moe : 0) * E;
                double chosen = 0, dp[1024] = { 0 }, dot = 0, mean = 0,
                       lse = log(exp(k->z[(size_t)r * E])) - log(p[0]);
                for (int j = 0; j < K; j++) chosen += p[id[j]];
                for (int j = 0; j < K; j++) {
                    double s = p[id[j]] / (c->norm_topk ? chosen : 1);
                    double ds =
                        expert(0, k->u + (size_t)r * C,
                               layer_weight(all, l, "mlp.experts.%d.gate_proj.weight", id[j]),
                               layer_weight(all, l, "mlp.experts.%d.up_proj.weight", id[j]),
                               layer_weight(all, l, "mlp.experts.%d.down_proj.weight", id[j]), s,
                               dx + (size_t)r * C, du + (size_t)r * C, C, c->F);
                    dp[id[j]] +=
                        ds / (c->norm_topk
                                  ? chosen
                                  : 1); // s_j = p_j / sum: ds_j/dp_i = [i = j] / sum - p_j / sum^2
                    if (c->norm_topk)
                        for (int i = 0; i < K; i++) dp[id[i]] -= ds * p[id[j]] / (chosen * chosen);
                }
                for (int e = 0; e < E; e++) {
                    dp[e] += b->aux_coef * E * f[e] / positions;
                    dot += dp[e] * p[e];
                }
                for (int i = 0; i < C; i++) {
                    mean = 0;
                    for (int e = 0; e < E; e++) {
                        double dz = p[e] * (dp[e] - dot) + b->z_coef * 2 * lse * p[e] / positions;
                        mean += dz * router->w[(size_t)e * C + i];
                        router->g[(size_t)e * C + i] += dz * k->u[(size_t)r * C + i];
                    }
                    du[(size_t)r * C + i] = Q(du[(size_t)r * C + i] + Q(mean));
                }
            }
        } else
            for (int r = 0; r < R; r++)
                expert(0, k->u + (size_t)r * C, W("mlp.gate_proj.weight"), W("mlp.up_proj.weight"),
                       W("mlp.down_proj.weight"), 1, dx + (size_t)r * C, du + (size_t)r * C, C,
                       c->I);
        norm_back(dx, W("post_attention_layernorm.weight")->g, du, k->mid,
                  W("post_attention_layernorm.weight")->w, eps, R, C);
        linear_back(d_o, W("self_attn.o_proj.weight")->g, dx, k->o, W("self_attn.o_proj.weight")->w,
                    R, C, nq);
        for (int r = 0; r < R; r++)
            for (int h = 0; h < c->H; h++) {
                size_t at = (size_t)(r - r % b->T) * nk + (size_t)(h / group) * D,
                       row = (size_t)r * nq + (size_t)h * D;
                attention_row(0, k->qn + row, k->kn + at, k->v + at, d_o + row, dq + row, dk + at,
                              dv + at, r % b->T, nk, D);
            }
        for (int i = 0; i < R * nq; i++) dq[i] = Q(dq[i]);
        for (int i = 0; i < R * nk; i++) {
            dk[i] = Q(dk[i]);
            dv[i] = Q(dv[i]);
        }
        norm_back(dqp, W("self_attn.q_norm.weight")->g,
                  rope(dq, c->rope_theta, -1, R, b->T, c->H, D), k->q,
                  W("self_attn.q_norm.weight")->w, eps, R * c->H, D);
        norm_back(dkp, W("self_attn.k_norm.weight")->g,
                  rope(dk, c->rope_theta, -1, R, b->T, c->KV, D), k->k,
                  W("self_attn.k_norm.weight")->w, eps, R * c->KV, D);
        linear_back(dh, W("self_attn.q_proj.weight")->g, dqp, k->h, W("self_attn.q_proj.weight")->w,
                    R, nq, C);
        linear_back(dh, W("self_attn.k_proj.weight")->g, dkp, k->h, W("self_attn.k_proj.weight")->w,
                    R, nk, C);
        linear_back(dh, W("self_attn.v_proj.weight")->g, dv, k->h, W("self_attn.v_proj.weight")->w,
                    R, nk, C);
        norm_back(dx, W("input_layernorm.weight")->g, dh, k->x, W("input_layernorm.weight")->w, eps,
                  R, C);
#undef W
    }
    for (int i = 0; i < R * C; i++)
        if (b->ids[i / C] != c->pad) embed->g[(size_t)b->ids[i / C] * C + i % C] += dx[i];
    for (int i = 0; i < all->n; i++)
        for (int64_t j = 0; j < all->weight[i].n; j++) all->weight[i].g[j] = Q(all->weight[i].g[j]);
}
#endif
