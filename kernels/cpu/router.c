// The router: which experts a token goes to, with what weight, and the gradient of that choice.
// Everything here is fp32 (fp64 in fp64 builds) whatever floatX is: a logit rounded to bf16 makes
// ties, and ties make routing depend on noise.
//
// Selection is a constant of the backward pass. With p = softmax(z), S the chosen set, d_e the
// gradient of score_e:
//   normalised: score_e = p_e / sum_S p = softmax of z restricted to S, so dz_e = score_e (d_e -
//   sum_S score d) on S and exactly 0 elsewhere. not:        score_e = p_e on S, so dp = d on S,
//   and softmax's Jacobian gives dz_e = p_e ([e in S] d_e - sum_S p d). aux = E sum_e f_e P_e with
//   f constant, P_e = mean of p_e over `positions`: daux/dp_e = E f_e / positions, hence the same
//   Jacobian on f. z = mean of lse^2: dlse/dz_e = p_e, hence 2 lse p_e / positions.
#include "gemm.h"

enum {
    CHUNK = 128,
    COLUMNS = 64,
    REDUCE = 512
}; // rows of a task; columns of a dW task; rows of a step along its reduction

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
        for (; at > 0 && v > value[at - 1]; at--)
            value[at] = value[at - 1], topk[at] = topk[at - 1];
        value[at] = v, topk[at] = e;
    }
    for (int i = 1; i < K; i++) {
        int id = topk[i], at = i;
        for (; at > 0 && topk[at - 1] > id; at--) topk[at] = topk[at - 1];
        topk[at] = id;
    }
}
void router_forward(real *logits, int *topk, real *score, RouterStats stats, const floatX *u,
                    const floatX *W, const real *bias, int given, int normalize, int64_t R,
                    int64_t C, int64_t E, int64_t K) {
    kernel_begin("router_forward", 2.0 * R * C * E);
    int chunks = (int)div_up(R, CHUNK),
        width = 2 * E + 2; // a chunk's statistics: E probabilities, E counts, lse^2, entropy
    double *partial = SCRATCH(SCRATCH_SHARED, double, (int64_t)chunks *width + 1);
    PARALLEL_TILES
    for (int chunk = 0; chunk < chunks; chunk++) {
        int first = chunk * CHUNK, rows = (int)lesser(CHUNK, R - first);
        double *sum = partial + (int64_t)chunk * width;
        for (int i = 0; i < width; i++) sum[i] = 0;
        gemm_x(0, 1, rows, E, C, u + (int64_t)first * C, C, W, C, 0, logits + (int64_t)first * E,
               E);
        real *p = SCRATCH(SCRATCH_LOCAL, real, 2 * E + K), *entropy = p + E, *value = p + 2 * E;
        for (int64_t r = first; r < first + rows; r++) {
            const real *z = logits + r * E;
            int *ids = topk + r * K;
            real lse = softmax(p, z, E), total = 0;
            if (!given) select_top(ids, value, p, bias, E, K);
            for (int k = 0; k < K; k++) total += p[ids[k]];
            for (int k = 0; k < K; k++)
                score[r * K + k] = normalize ? p[ids[k]] / total : p[ids[k]];
            for (int e = 0; e < E; e++)
                entropy[e] =
                    p[e] == 0 ? 0 : p[e] * (lse - z[e]); // 0 log 0 = 0 also where z is -inf
            for (int e = 0; e < E; e++) sum[e] += p[e];
            for (int k = 0; k < K; k++) sum[E + ids[k]] += 1;
            sum[2 * E] += (double)lse * lse;
            sum[2 * E + 1] += row_sum(entropy, E);
        }
    }
    for (int i = 0; i < width; i++) {
        double total = 0;
        for (int chunk = 0; chunk < chunks; chunk++) total += partial[(int64_t)chunk * width + i];
        if (i < E && stats.prob) stats.prob[i] += total;
        if (i >= E && i < 2 * E && stats.count) stats.count[i - E] += (int64_t)total;
        if (i >= 2 * E && stats.z) stats.z[i - 2 * E] += total;
    }
}

static void logits_backward(real *dz, real *p, real *fp, const real *dscore, const real *z,
                            const int *ids, const real *score, const double *f, double aux_scale,
                            double z_scale, int normalize, int64_t E, int64_t K) {
    real lse = softmax(p, z, E), c = 0, mean = 0;
    for (int k = 0; k < K; k++) c += (normalize ? score[k] : p[ids[k]]) * dscore[k];
    real common = (real)(2 * z_scale * lse) - (normalize ? 0 : c);
    if (aux_scale != 0) {
        for (int e = 0; e < E; e++) fp[e] = (real)f[e] * p[e];
        mean = row_sum(fp, E);
        for (int e = 0; e < E; e++) dz[e] = p[e] * (common + (real)aux_scale * ((real)f[e] - mean));
    } else
        for (int e = 0; e < E; e++) dz[e] = p[e] * common;
    for (int k = 0; k < K; k++)
        dz[ids[k]] += normalize ? score[k] * (dscore[k] - c) : p[ids[k]] * dscore[k];
}
// du (rows,C) += dz (rows,E) W; w: W as reals.
static void add_input_gradient(floatX *du, const real *dz, const real *w, int rows, int64_t C,
                               int64_t E) {
#if defined(MOE_BF16)
    real *sum = SCRATCH(SCRATCH_LOCAL2, real, (int64_t)rows * C);
    load_row(sum, du, (int64_t)rows * C);
    gemm(0, 0, rows, C, E, dz, E, w, C, 1, sum, C);
    store_row(du, sum, (int64_t)rows * C);
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
    real *copy = SCRATCH(SCRATCH_SHARED, real, (int64_t)E * C);
#else
    real *copy = 0;
#endif
    const real *w = view_row(W, copy, (int64_t)E * C);
    PARALLEL_TILES
    for (int first = 0; first < R; first += CHUNK) {
        int rows = (int)lesser(CHUNK, R - first);
        real *p = SCRATCH(SCRATCH_LOCAL, real, 2 * E);
        for (int64_t r = first; r < first + rows; r++)
            logits_backward(dz + r * E, p, p + E, dscore + r * K, logits + r * E, topk + r * K,
                            score + r * K, f, aux_scale, z_scale, normalize, E, K);
        add_input_gradient(du + (int64_t)first * C, dz + (int64_t)first * E, w, rows, C, E);
    }
    PARALLEL_TILES
    for (int c = 0; c < C; c += COLUMNS) {
        int width = (int)lesser(COLUMNS, C - c);
        real *panel = SCRATCH(SCRATCH_LOCAL, real, REDUCE * COLUMNS), beta = accumulate ? 1 : 0;
        for (int64_t r = 0; r < R || r == 0;
             r += REDUCE, beta = 1) { // r == 0: without rows the zeros are still written
            int rows = (int)lesser(REDUCE, R - r);
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
        for (int l = 0; l < n_layers; l++) total += count[(int64_t)l * E + e];
        f[e] = (double)total / positions;
    }
}
