// The whole model in plain loops: Qwen3-MoE, forward and backward, one process, one thread. Read
// this file first; README.md beside it works one layer of experts out with six tokens.
//
// It stands in the order of the mathematics: one operation after another, each with its backward,
// then the layer and the model. Nothing is fused or saved to be fast. It needs C11 and libm only.
// The tests use it as their oracle: in double (NUMBER), and once more with every stored number
// rounded to bf16 (Q in tensors.h), which is the error that a bf16 program is measured against.
//
// Rows are tokens; a weight is (out, in) and y = x W^T; dX is the gradient of the loss with respect
// to X, of X's shape. Functions named `_back` ADD to the gradients that they are given.
#ifndef MOE_NAIVE_H
#define MOE_NAIVE_H
#include "tensors.h"

// ---- linear maps, norms, rotation -----------------------------------------------------------
// y (R,O) = x (R,N) W^T, W (O,N).
static number *linear(const number *x, const number *W, int64_t R, int64_t O, int64_t N) {
    number *y = zeros(R * O);
    for (int64_t r = 0; r < R; r++)
        for (int64_t o = 0; o < O; o++) {
            number s = 0;
            for (int64_t i = 0; i < N; i++) s += x[r * N + i] * W[o * N + i];
            y[r * O + o] = Q(s);
        }
    return y;
}
// dx (R,N) += dy (R,O) W and dW (O,N) += dy^T x.
static void linear_back(number *dx, number *dW, const number *dy, const number *x, const number *W,
                        int64_t R, int64_t O, int64_t N) {
    number *d = zeros(R * N);
    for (int64_t r = 0; r < R; r++)
        for (int64_t o = 0; o < O; o++)
            for (int64_t i = 0; i < N; i++) {
                d[r * N + i] += dy[r * O + o] * W[o * N + i];
                dW[o * N + i] += dy[r * O + o] * x[r * N + i];
            }
    for (int64_t i = 0; i < R * N; i++) dx[i] = Q(dx[i] + Q(d[i]));
}

// 1 / sqrt(mean of x^2 + eps) over x (N).
static number inverse_rms(const number *x, double eps, int64_t N) {
    number s = 0;
    for (int64_t i = 0; i < N; i++) s += x[i] * x[i];
    return 1 / sqrt(s / N + eps);
}
// y (R,N) = w * n, n = x * inverse_rms(x); w (N).
static number *norm(const number *x, const number *w, double eps, int64_t R, int64_t N) {
    number *y = zeros(R * N);
    for (int64_t r = 0; r < R; r++) {
        number s = inverse_rms(x + r * N, eps, N);
        for (int64_t i = 0; i < N; i++) y[r * N + i] = Q(w[i] * Q(x[r * N + i] * s));
    }
    return y;
}
// With t = dy * w: dw += dy * n, dx += s (t - n mean(t n)); the second term is what x does to s.
static void norm_back(number *dx, number *dw, const number *dy, const number *x, const number *w,
                      double eps, int64_t R, int64_t N) {
    for (int64_t r = 0; r < R; r++, dx += N, dy += N, x += N) {
        number s = inverse_rms(x, eps, N);
        number mean = 0;
        for (int64_t i = 0; i < N; i++) {
            mean += Q(dy[i] * w[i]) * x[i] * s / N;
            dw[i] += dy[i] * Q(x[i] * s);
        }
        for (int64_t i = 0; i < N; i++)
            dx[i] = Q(dx[i] + Q(s * (Q(dy[i] * w[i]) - x[i] * s * mean)));
    }
}

// y (R,H,D): the pairs (j, j + D/2) of every head of x, turned by sign * position * theta^(-2j/D).
// The backward of a rotation is the rotation back: sign -1.
static number *rope(const number *x, double theta, int sign, int64_t R, int64_t T, int64_t H,
                    int64_t D) {
    number *y = zeros(R * H * D);
    for (int64_t r = 0; r < R; r++)
        for (int64_t j = 0; j < D / 2; j++) {
            double angle = r % T * pow(theta, -2.0 * j / D);
            number c = Q(cos(angle));
            number s = sign * Q(sin(angle));
            for (int64_t h = 0; h < H; h++) {
                const number *a = x + (r * H + h) * D;
                number *b = y + (r * H + h) * D;
                b[j] = Q(Q(a[j] * c) - Q(a[j + D / 2] * s));
                b[j + D / 2] = Q(Q(a[j + D / 2] * c) + Q(a[j] * s));
            }
        }
    return y;
}

// ---- attention ------------------------------------------------------------------------------
// Each query of q (R,H,D) takes a weighted sum of the values at its sequence's positions so far:
// o (R,H,D), with weights p (R,H,T) = softmax(q . k / sqrt(D)). Query head h reads key/value head
// h / (H/KV) of k and v (R,KV,D).
static number *attention(number *p, const number *q, const number *k, const number *v, int64_t R,
                         int64_t T, const NaiveConfig *c) {
    int64_t H = c->H, D = c->D;
    int64_t step = c->KV * D; // from one position's keys to the next's
    number *o = zeros(R * H * D);
    for (int64_t row = 0; row < R * H; row++, p += T) {
        int64_t t = row / H % T;
        int64_t first = (row / H - t) * step + row % H / (H / c->KV) * D;
        number most = -INFINITY;
        number sum = 0;
        number *out = o + row * D;
        for (int64_t u = 0; u <= t; u++) {
            number s = 0;
            for (int64_t i = 0; i < D; i++) s += q[row * D + i] * k[first + u * step + i];
            p[u] = Q(Q(s) * (number)(1 / sqrt(D)));
            if (p[u] > most) most = p[u];
        }
        for (int64_t u = 0; u <= t; u++) sum += p[u] = exp(p[u] - most);
        for (int64_t u = 0; u <= t; u++) {
            p[u] = Q(p[u] / sum);
            for (int64_t i = 0; i < D; i++) out[i] += p[u] * v[first + u * step + i];
        }
        for (int64_t i = 0; i < D; i++) out[i] = Q(out[i]);
    }
    return o;
}
// dv += p do; dp = do . v; through softmax ds = p (dp - sum of p dp); dq += ds k, dk += ds q.
static void attention_back(number *dq, number *dk, number *dv, const number *d_o, const number *p,
                           const number *q, const number *k, const number *v, int64_t R, int64_t T,
                           const NaiveConfig *c) {
    int64_t H = c->H, D = c->D;
    int64_t step = c->KV * D;
    number *dp = zeros(T);
    for (int64_t row = 0; row < R * H; row++, p += T) {
        int64_t t = row / H % T;
        int64_t first = (row / H - t) * step + row % H / (H / c->KV) * D;
        number mean = 0;
        for (int64_t u = 0; u <= t; u++) {
            number s = 0;
            for (int64_t i = 0; i < D; i++) {
                s += d_o[row * D + i] * v[first + u * step + i];
                dv[first + u * step + i] += p[u] * d_o[row * D + i];
            }
            dp[u] = Q(s);
            mean += dp[u] * p[u];
        }
        for (int64_t u = 0; u <= t; u++) {
            number ds = Q(Q(p[u] * (dp[u] - mean)) * (number)(1 / sqrt(D)));
            for (int64_t i = 0; i < D; i++) {
                dq[row * D + i] += ds * k[first + u * step + i];
                dk[first + u * step + i] += ds * q[row * D + i];
            }
        }
    }
}

// ---- the router -----------------------------------------------------------------------------
typedef struct {         // what it decides for R tokens
    number *z, *p;       // (R,E) logits and their softmax
    int *topk;           // (R,K) chosen experts, ascending
    number *score;       // (R,K) their weights in the sum
    number *load, *mean; // (E) share of the tokens that chose e, sums to K; mean of p
    number *lse;         // (R) log sum exp z
} NaiveRouting;

// z = u Wr^T, p = softmax(z). The K largest p are chosen (ties: the lower expert), or `given`
// (R,K) says which. u (R,C), Wr (E,C). These numbers are never rounded: they decide.
static NaiveRouting route(const number *u, const number *Wr, const int *given, int64_t R,
                          const NaiveConfig *c) {
    int64_t C = c->C, E = c->E, K = c->K;
    NaiveRouting y = { zeros(R * E), zeros(R * E), (int *)zeros(R * K), zeros(R * K), zeros(E),
                       zeros(E),     zeros(R) };
    for (int64_t r = 0; r < R; r++) {
        number *z = y.z + r * E;
        number *p = y.p + r * E;
        number sum = 0;
        number chosen = 0;
        int *topk = y.topk + r * K;
        int n = 0;
        for (int64_t e = 0; e < E; e++) {
            for (int64_t i = 0; i < C; i++) z[e] += u[r * C + i] * Wr[e * C + i];
            sum += exp(z[e]);
        }
        y.lse[r] = log(sum);
        for (int64_t e = 0; e < E; e++) {
            int before = 0; // experts that are chosen before e
            for (int64_t i = 0; i < E; i++) before += z[i] > z[e] || (z[i] == z[e] && i < e);
            if (!given && before < K) topk[n++] = (int)e;
            p[e] = exp(z[e]) / sum;
            y.mean[e] += p[e] / R;
        }
        if (given) memcpy(topk, given + r * K, (size_t)K * sizeof(int));
        for (int64_t j = 0; j < K; j++) chosen += p[topk[j]];
        for (int64_t j = 0; j < K; j++) {
            y.load[topk[j]] += (number)1 / R;
            y.score[r * K + j] = p[topk[j]] / (c->norm_topk ? chosen : 1);
        }
    }
    return y;
}
// From dscore (R,K) and the router's own losses to dz (R,E), which it returns; du += dz Wr,
// dWr += dz^T u. load (E): the auxiliary loss's; aux, z_loss: a token's share of each coefficient.
static number *route_back(number *du, number *dWr, const number *dscore, const NaiveRouting *y,
                          const number *load, double aux, double z_loss, const number *u,
                          const number *Wr, int64_t R, const NaiveConfig *c) {
    int64_t C = c->C, E = c->E, K = c->K;
    number *dz = zeros(R * E);
    number *dp = zeros(E);
    number *d = zeros(C);
    for (int64_t r = 0; r < R; r++) {
        const number *p = y->p + r * E;
        const number *ds = dscore + r * K;
        const number *score = y->score + r * K;
        const int *topk = y->topk + r * K;
        number chosen = p[topk[0]] / score[0]; // score = p / chosen
        number pull = 0;
        number mean = 0;
        for (int64_t j = 0; j < K; j++) pull += c->norm_topk ? ds[j] * score[j] : 0;
        for (int64_t e = 0; e < E; e++) dp[e] = aux * E * load[e];
        for (int64_t j = 0; j < K; j++) dp[topk[j]] += (ds[j] - pull) / chosen;
        for (int64_t e = 0; e < E; e++) mean += dp[e] * p[e];
        for (int64_t i = 0; i < C; i++) d[i] = 0;
        for (int64_t e = 0; e < E; e++) {
            number s = p[e] * (dp[e] - mean) + z_loss * 2 * y->lse[r] * p[e];
            dz[r * E + e] = s;
            for (int64_t i = 0; i < C; i++) {
                d[i] += s * Wr[e * C + i];
                dWr[e * C + i] += s * u[r * C + i];
            }
        }
        for (int64_t i = 0; i < C; i++) du[r * C + i] = Q(du[r * C + i] + Q(d[i]));
    }
    return dz;
}

// ---- experts: small MLPs of which a token meets K -------------------------------------------
// One token and one expert W = { gate (F,C), up (F,C), down (C,F) }: y (C) = a W2^T, where
// a (F) = silu(g) * v, g (F) = gate u, v (F) = up u. `x` is g, v, a, y, one after another.
static void expert(number *x, const number *u, const Weight *W, int64_t C, int64_t F) {
    number *g = x;
    number *v = x + F;
    number *a = x + 2 * F;
    number *y = x + 3 * F;
    for (int64_t f = 0; f < F; f++) {
        g[f] = v[f] = 0;
        for (int64_t i = 0; i < C; i++) {
            g[f] += u[i] * W[0].w[f * C + i];
            v[f] += u[i] * W[1].w[f * C + i];
        }
        g[f] = Q(g[f]);
        v[f] = Q(v[f]);
        a[f] = Q(Q(g[f] / (1 + exp(-g[f]))) * v[f]);
    }
    for (int64_t i = 0; i < C; i++) {
        y[i] = 0;
        for (int64_t f = 0; f < F; f++) y[i] += a[f] * W[2].w[i * F + f];
        y[i] = Q(y[i]);
    }
}
// y (R,C) = the sum over a token's experts of score * expert(u). topk, score (R,K). A dense MLP is
// one expert with K = 1 and score 1.
static number *experts(const number *u, const Weight *W, const int *topk, const number *score,
                       int64_t R, int64_t K, int64_t C, int64_t F) {
    number *y = zeros(R * C);
    number *x = zeros(3 * F + C);
    for (int64_t row = 0; row < R * K; row++) { // (token, choice)
        number *out = y + row / K * C;
        expert(x, u + row / K * C, W + 3 * topk[row], C, F);
        for (int64_t i = 0; i < C; i++) out[i] = Q(out[i] + Q(x[3 * F + i] * score[row]));
    }
    return y;
}
// From dy (R,C) to du (R,C), dscore (R,K) = dy . expert(u), and the gradients of the experts.
static void experts_back(number *du, number *dscore, const number *dy, const number *u,
                         const Weight *W, const int *topk, const number *score, int64_t R,
                         int64_t K, int64_t C, int64_t F) {
    number *x = zeros(3 * F + C);
    number *d = zeros(C);
    number *out = zeros(C);
    for (int64_t row = 0; row < R * K; row++) {
        const number *ur = u + row / K * C;
        const number *dyr = dy + row / K * C;
        const Weight *own = W + 3 * topk[row]; // gate, up, down
        expert(x, ur, own, C, F);
        for (int64_t i = 0; i < C; i++) {
            dscore[row] += dyr[i] * x[3 * F + i];
            out[i] = Q(dyr[i] * score[row]); // gradient of this expert's y
            d[i] = 0;
        }
        for (int64_t f = 0; f < F; f++) {
            number g = x[f];
            number v = x[F + f];
            number s = 1 / (1 + exp(-g));
            number da = 0;
            for (int64_t i = 0; i < C; i++) {
                da += out[i] * own[2].w[i * F + f];
                own[2].g[i * F + f] += out[i] * x[2 * F + f];
            }
            number dg = Q(Q(Q(da) * v) * s * (1 + g * (1 - s)));
            number dv = Q(Q(da) * Q(g * s));
            for (int64_t i = 0; i < C; i++) {
                d[i] += dg * own[0].w[f * C + i] + dv * own[1].w[f * C + i];
                own[0].g[f * C + i] += dg * ur[i];
                own[1].g[f * C + i] += dv * ur[i];
            }
        }
        for (int64_t i = 0; i < C; i++) du[row / K * C + i] = Q(du[row / K * C + i] + Q(d[i]));
    }
}

// ---- the model ------------------------------------------------------------------------------
typedef struct {
    int64_t B, T;             // sequences, tokens of each; R = B T rows
    const int *ids, *targets; // (R); a target below 0 does not count
    const int *topk;          // (MoE layers, R, K) ascending: the experts to use; 0: choose them
    double aux_coef, z_coef;  // weights of the router's two losses
    int aux_per_layer;        // aux is 1: the mean of the layers' values; 0: of pooled statistics
    number *logits;           // out (R,V), until naive_release
    double loss, aux, z;      // out: cross entropy; E sum_e load_e mean_e; mean of lse^2
} NaiveBatch;

typedef struct {           // what a layer's forward leaves for its backward
    const number *x;       // (R,C) its input
    number *h, *q, *k, *v; // (R,C) norm(x); (R,H,D) (R,KV,D) (R,KV,D)
    number *qn, *kn, *p;   // q and k with norm and rotation; (R,H,T) attention's weights
    number *o, *mid, *u;   // (R,H,D); (R,C) the layer between its halves; its norm
    NaiveRouting routing;
} NaiveLayer;

// mid = x + attention(norm(x)); returns mid + experts(norm(mid)). w: the layer's first tensor.
static number *naive_layer(NaiveLayer *s, const number *x, const Weight *w, const int *given,
                           int moe, int64_t R, int64_t T, const NaiveConfig *c) {
    int64_t C = c->C, H = c->H, KV = c->KV, D = c->D;
    s->x = x;
    s->h = norm(x, w[ATTN_NORM].w, c->eps, R, C);
    s->q = linear(s->h, w[Q_PROJ].w, R, H * D, C);
    s->k = linear(s->h, w[K_PROJ].w, R, KV * D, C);
    s->v = linear(s->h, w[V_PROJ].w, R, KV * D, C);
    s->qn = rope(norm(s->q, w[Q_NORM].w, c->eps, R * H, D), c->theta, 1, R, T, H, D);
    s->kn = rope(norm(s->k, w[K_NORM].w, c->eps, R * KV, D), c->theta, 1, R, T, KV, D);
    s->p = zeros(R * H * T);
    s->o = attention(s->p, s->qn, s->kn, s->v, R, T, c);
    s->mid = linear(s->o, w[O_PROJ].w, R, C, H * D);
    add_into(s->mid, x, R * C);
    s->u = norm(s->mid, w[MLP_NORM].w, c->eps, R, C);
    number *y;
    if (moe) {
        s->routing = route(s->u, w[ROUTER].w, given, R, c);
        y = experts(s->u, w + EXPERTS, s->routing.topk, s->routing.score, R, c->K, C, c->F);
    } else {
        s->routing.topk = (int *)zeros(R);
        s->routing.score = zeros(R);
        for (int64_t r = 0; r < R; r++) s->routing.score[r] = 1;
        y = experts(s->u, w + ROUTER, s->routing.topk, s->routing.score, R, 1, C, c->I);
    }
    add_into(y, s->mid, R * C);
    return y;
}
// dx (R,C) comes in as the gradient of the layer's output and leaves as that of its input: the
// residual paths are what is there already, every norm_back adds its branch.
static void naive_layer_back(number *dx, const NaiveLayer *s, Weight *w, int moe,
                             const number *load, double aux, double z_loss, int64_t R, int64_t T,
                             const NaiveConfig *c) {
    int64_t C = c->C, H = c->H, KV = c->KV, D = c->D;
    const NaiveRouting *y = &s->routing;
    number *du = zeros(R * C);
    number *dh = zeros(R * C);
    number *d_o = zeros(R * H * D);
    number *dqn = zeros(R * H * D);
    number *dkn = zeros(R * KV * D);
    number *dv = zeros(R * KV * D);
    number *dq = zeros(R * H * D);
    number *dk = zeros(R * KV * D);
    number *dscore = zeros(R * (moe ? c->K : 1));
    if (moe) {
        experts_back(du, dscore, dx, s->u, w + EXPERTS, y->topk, y->score, R, c->K, C, c->F);
        route_back(du, w[ROUTER].g, dscore, y, load, aux, z_loss, s->u, w[ROUTER].w, R, c);
    } else
        experts_back(du, dscore, dx, s->u, w + ROUTER, y->topk, y->score, R, 1, C, c->I);
    norm_back(dx, w[MLP_NORM].g, du, s->mid, w[MLP_NORM].w, c->eps, R, C);
    linear_back(d_o, w[O_PROJ].g, dx, s->o, w[O_PROJ].w, R, C, H * D);
    attention_back(dqn, dkn, dv, d_o, s->p, s->qn, s->kn, s->v, R, T, c);
    dqn = rope(dqn, c->theta, -1, R, T, H, D);
    dkn = rope(dkn, c->theta, -1, R, T, KV, D);
    norm_back(dq, w[Q_NORM].g, dqn, s->q, w[Q_NORM].w, c->eps, R * H, D);
    norm_back(dk, w[K_NORM].g, dkn, s->k, w[K_NORM].w, c->eps, R * KV, D);
    linear_back(dh, w[Q_PROJ].g, dq, s->h, w[Q_PROJ].w, R, H * D, C);
    linear_back(dh, w[K_PROJ].g, dk, s->h, w[K_PROJ].w, R, KV * D, C);
    linear_back(dh, w[V_PROJ].g, dv, s->h, w[V_PROJ].w, R, KV * D, C);
    norm_back(dx, w[ATTN_NORM].g, dh, s->x, w[ATTN_NORM].w, c->eps, R, C);
}

// Forward and backward of a batch. The gradients of loss + aux_coef * aux + z_coef * z are added to
// those of `all`; with N valid targets every token's loss counts 1/N, and nothing is averaged.
static void naive_model(NaiveBatch *b, const NaiveConfig *c, const Weights *all) {
    int64_t R = b->B * b->T, C = c->C, V = c->V, E = c->E, L = c->L;
    int64_t n_moe = 0;
    double valid = 0;
    Weight *embed = all->weight;
    Weight *last = all->weight + all->n - (c->tied ? 1 : 2);
    Weight *head = c->tied ? embed : last + 1;
    Weight *w = embed + 1;
    NaiveLayer *layer = (NaiveLayer *)naive_allocate((size_t)L, sizeof(NaiveLayer));
    number *x = zeros(R * C);
    number *load = zeros(E + 1);
    number *mean = zeros(E + 1);
    for (int64_t i = 0; i < R * C; i++) x[i] = embed->w[b->ids[i / C] * C + i % C];
    for (int64_t l = 0; l < L; w += EXPERTS + (c->is_moe[l] ? 3 * E : 2), l++) {
        const int *given = b->topk ? b->topk + n_moe * R * c->K : 0;
        x = naive_layer(&layer[l], x, w, given, c->is_moe[l], R, b->T, c);
        n_moe += c->is_moe[l];
    }
    number *xf = norm(x, last->w, c->eps, R, C);
    b->logits = linear(xf, head->w, R, V, C);

    // The router's losses: load and mean pooled over the layers (each layer's share is equal).
    b->loss = b->aux = b->z = 0;
    for (int64_t l = 0; l < L; l++) {
        const NaiveRouting *y = &layer[l].routing;
        for (int64_t r = 0; c->is_moe[l] && r < R; r++)
            b->z += (double)y->lse[r] * y->lse[r] / (double)(R * n_moe);
        for (int64_t e = 0; c->is_moe[l] && e < E; e++) {
            load[e] += y->load[e] / n_moe;
            mean[e] += y->mean[e] / n_moe;
            if (b->aux_per_layer) b->aux += (double)(E * y->load[e] * y->mean[e]) / (double)n_moe;
        }
    }
    for (int64_t e = 0; !b->aux_per_layer && e < E; e++) b->aux += (double)(E * load[e] * mean[e]);

    // Cross entropy: -log of the target's probability; dlogits = (p - one at the target) / N.
    number *dlogits = zeros(R * V);
    number *dxf = zeros(R * C);
    number *dx = zeros(R * C);
    for (int64_t r = 0; r < R; r++) valid += b->targets[r] >= 0;
    for (int64_t r = 0; r < R; r++) {
        const number *z = b->logits + r * V;
        double sum = 0;
        for (int64_t v = 0; v < V; v++) sum += exp(z[v]);
        if (b->targets[r] < 0) continue;
        b->loss += (log(sum) - z[b->targets[r]]) / valid;
        for (int64_t v = 0; v < V; v++)
            dlogits[r * V + v] = Q((exp(z[v]) / sum - (v == b->targets[r])) / valid);
    }
    linear_back(dxf, head->g, dlogits, xf, head->w, R, V, C);
    norm_back(dx, last->g, dxf, x, last->w, c->eps, R, C);
    double share = n_moe ? 1 / (double)(R * n_moe) : 0; // of a token in the router's losses
    for (int64_t l = L - 1; l >= 0; l--) {
        w -= EXPERTS + (c->is_moe[l] ? 3 * E : 2);
        naive_layer_back(dx, &layer[l], w, c->is_moe[l],
                         b->aux_per_layer ? layer[l].routing.load : load, b->aux_coef * share,
                         b->z_coef * share, R, b->T, c);
    }
    for (int64_t i = 0; i < R * C; i++)
        if (b->ids[i / C] != c->pad) embed->g[b->ids[i / C] * C + i % C] += dx[i];
    free(layer);
}
#endif
