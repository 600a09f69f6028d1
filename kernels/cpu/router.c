// The router: which experts a token goes to, with what weight, and the gradient of that choice.
// Offers kernels.h's router_*. Everything here is fp32 (fp64 in fp64 builds) whatever floatX is: a
// logit rounded to bf16 makes ties, and ties make routing depend on noise.
//
// Selection is a constant of the backward pass. With p = softmax(z), S the chosen set, d_e the
// gradient of score_e, and softmax's Jacobian J(y)_e = p_e (y_e - sum over j of p_j y_j):
//   normalised      score_e = p_e / sum over S of p is the softmax of z restricted to S, so
//                   dz_e = score_e (d_e - sum over S of score d) on S and exactly 0 elsewhere
//   not normalised  score_e = p_e on S: dp = d on S, dz_e = p_e ([e in S] d_e - sum over S of p d)
//   balance         aux = E sum over e of f_e P_e with f constant and P_e the mean of p_e over
//                   `positions`: daux/dp_e = E f_e / positions, dz = J(daux/dp)
//   z-loss          the mean of lse^2, and dlse/dz_e = p_e: dz_e = 2 lse p_e / positions
#include "gemm.h"

// Rows of a task; columns of a dW task; rows of a step along its reduction.
enum { CHUNK = 128, COLUMNS = 64, REDUCE = 512 };

// p (E) = softmax(z); returns log sum exp z. A NaN among z makes all of p NaN.
static real softmax(real *p, const real *z, int64_t E) {
    real top = row_max(z, E);
    for (int e = 0; e < E; e++) p[e] = exp_real(z[e] - top);
    real sum = row_sum(p, E);
    for (int e = 0; e < E; e++) p[e] /= sum;
    return top + (real)log((double)sum);
}
// The K largest of p + bias by (value descending, id ascending), written in ascending id. A strict
// comparison keeps the lower id of equals; NaN is never larger than anything and is displaced by
// nothing, so rows of NaN choose the lowest ids.
static void select_top(int *topk, real *value, const real *p, const real *bias, int64_t E,
                       int64_t K) {
    for (int e = 0; e < E; e++) {
        real v = bias ? p[e] + bias[e] : p[e];
        int n = e < K ? e : K;
        if (n == K && !(v > value[K - 1])) continue;
        int at = n < K ? n : K - 1;
        for (; at > 0 && v > value[at - 1]; at--) {
            value[at] = value[at - 1];
            topk[at] = topk[at - 1];
        }
        value[at] = v;
        topk[at] = e;
    }
    for (int i = 1; i < K; i++) {
        int id = topk[i];
        int at = i;
        for (; at > 0 && topk[at - 1] > id; at--) topk[at] = topk[at - 1];
        topk[at] = id;
    }
}
void router_forward(real *logits, int *topk, real *score, RouterStats stats, const floatX *u,
                    const floatX *W, const real *bias, int given, int normalize, int64_t R,
                    int64_t C, int64_t E, int64_t K) {
    kernel_begin("router_forward", 2.0 * R * C * E);
    // Statistics of a chunk: E probabilities, E counts, lse^2, entropy.
    int64_t chunks = div_up(R, CHUNK);
    int64_t width = 2 * E + 2;
    double *partial = SCRATCH(SCRATCH_SHARED, double, chunks *width + 1);
    PARALLEL_TILES
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        int64_t first = chunk * CHUNK;
        int64_t rows = lesser(CHUNK, R - first);
        double *sum = partial + chunk * width;
        for (int64_t i = 0; i < width; i++) sum[i] = 0;
        gemm_x(0, 1, rows, E, C, u + first * C, C, W, C, 0, logits + first * E, E);
        real *p = SCRATCH(SCRATCH_LOCAL, real, 2 * E + K);
        real *entropy = p + E;
        real *value = p + 2 * E;
        for (int64_t r = first; r < first + rows; r++) {
            const real *z = logits + r * E;
            int *ids = topk + r * K;
            real lse = softmax(p, z, E);
            real total = 0;
            if (!given) select_top(ids, value, p, bias, E, K);
            for (int k = 0; k < K; k++) total += p[ids[k]];
            for (int k = 0; k < K; k++)
                score[r * K + k] = normalize ? p[ids[k]] / total : p[ids[k]];
            // 0 log 0 = 0, also where z is -inf.
            for (int e = 0; e < E; e++) entropy[e] = p[e] == 0 ? 0 : p[e] * (lse - z[e]);
            for (int e = 0; e < E; e++) sum[e] += p[e];
            for (int k = 0; k < K; k++) sum[E + ids[k]] += 1;
            sum[2 * E] += (double)lse * lse;
            sum[2 * E + 1] += row_sum(entropy, E);
        }
    }
    for (int64_t i = 0; i < width; i++) {
        double total = 0;
        for (int64_t chunk = 0; chunk < chunks; chunk++) total += partial[chunk * width + i];
        if (i < E && stats.prob) stats.prob[i] += total;
        if (i >= E && i < 2 * E && stats.count) stats.count[i - E] += (int64_t)total;
        if (i >= 2 * E && stats.z) stats.z[i - 2 * E] += total;
    }
}

static void logits_backward(real *dz, real *p, real *fp, const real *dscore, const real *z,
                            const int *ids, const real *score, const double *f, double aux_scale,
                            double z_scale, int normalize, int64_t E, int64_t K) {
    real lse = softmax(p, z, E);
    real c = 0;
    real mean = 0;
    for (int k = 0; k < K; k++) c += (normalize ? score[k] : p[ids[k]]) * dscore[k];
    real common = (real)(2 * z_scale * lse) - (normalize ? 0 : c);
    if (aux_scale != 0) {
        for (int e = 0; e < E; e++) fp[e] = (real)f[e] * p[e];
        mean = row_sum(fp, E);
        for (int e = 0; e < E; e++) dz[e] = p[e] * (common + (real)aux_scale * ((real)f[e] - mean));
    } else {
        for (int e = 0; e < E; e++) dz[e] = p[e] * common;
    }
    for (int k = 0; k < K; k++)
        dz[ids[k]] += normalize ? score[k] * (dscore[k] - c) : p[ids[k]] * dscore[k];
}
// Adds dz (rows,E) W to du (rows,C). w: W as reals.
static void add_input_gradient(floatX *du, const real *dz, const real *w, int64_t rows, int64_t C,
                               int64_t E) {
#if defined(MOE_BF16)
    real *sum = SCRATCH(SCRATCH_LOCAL2, real, rows * C);
    load_row(sum, du, rows * C);
    gemm(0, 0, rows, C, E, dz, E, w, C, 1, sum, C);
    store_row(du, sum, rows * C);
#else
    gemm(0, 0, rows, C, E, dz, E, w, C, 1, &du->v, C);
#endif
}
void router_backward_add(floatX *du, gradX *dW, real *dz, const real *dscore, const real *logits,
                         const int *topk, const real *score, const floatX *u, const floatX *W,
                         const double *f, double aux_scale, double z_scale, int normalize,
                         int accumulate, int64_t R, int64_t C, int64_t E, int64_t K) {
    kernel_begin("router_backward_add", 4.0 * R * C * E);
#if defined(MOE_BF16)
    real *copy = SCRATCH(SCRATCH_SHARED, real, E * C);
#else
    real *copy = 0;
#endif
    const real *w = view_row(W, copy, E * C);
    PARALLEL_TILES
    for (int64_t first = 0; first < R; first += CHUNK) {
        int64_t rows = lesser(CHUNK, R - first);
        real *p = SCRATCH(SCRATCH_LOCAL, real, 2 * E);
        for (int64_t r = first; r < first + rows; r++)
            logits_backward(dz + r * E, p, p + E, dscore + r * K, logits + r * E, topk + r * K,
                            score + r * K, f, aux_scale, z_scale, normalize, E, K);
        add_input_gradient(du + first * C, dz + first * E, w, rows, C, E);
    }
    PARALLEL_TILES
    for (int64_t c = 0; c < C; c += COLUMNS) {
        int64_t width = lesser(COLUMNS, C - c);
        real *panel = SCRATCH(SCRATCH_LOCAL, real, REDUCE * COLUMNS);
        real beta = accumulate ? 1 : 0;
        // r == 0: without rows the zeros are still written (I3, unused is zero).
        for (int64_t r = 0; r < R || r == 0; r += REDUCE, beta = 1) {
            int64_t rows = lesser(REDUCE, R - r);
            for (int64_t i = 0; i < rows; i++)
                load_row(panel + i * width, u + (r + i) * C + c, width);
            gemm(1, 0, E, width, rows, dz + r * E, E, panel, width, beta, &dW[c].v, C);
        }
    }
}
void router_share(double *f, const int64_t *count, double positions, int64_t n_layers, int64_t E) {
    kernel_begin("router_share", 0);
    for (int e = 0; e < E; e++) {
        int64_t total = 0;
        for (int64_t l = 0; l < n_layers; l++) total += count[l * E + e];
        f[e] = (double)total / positions;
    }
}
