// RMSNorm over rows and over heads, rotary position embedding, residual add: the functions of
// kernels.h with these names. All of it is bound by memory: one visit of each row.
//
// y_j = n_j w_j with n = x r, r = (mean(x^2) + eps)^-1/2. With t_j = dL/dn_j = dy_j w_j and
// dr/dx_j = -r^3 x_j / C:
//   dx_j = t_j r + (sum over i of t_i x_i) dr/dx_j = r (t_j - n_j mean_i(t_i n_i)),
//   dw_j = sum over rows of dy_j n_j.
#include "math.h"

static real inverse_rms(const real *x, real eps, int64_t n) {
    return 1 / square_root(row_dot(x, x, n) / (real)n + eps);
}

// ---- RMSNorm of rows ------------------------------------------------------------------------
void rmsnorm_forward(floatX *y, real *rstd, const floatX *x, const floatX *w, real eps, int64_t R,
                     int64_t C) {
    kernel_begin("rmsnorm_forward", 0);
    PARALLEL_FOR_BYTES(R * C * sizeof *y)
    for (int64_t row = 0; row < R; row++) {
        const real *xr = view_row(x + row * C, SCRATCH(SCRATCH_LOCAL, real, C), C);
        floatX *yr = y + row * C;
        real r = inverse_rms(xr, eps, C);
        for (int64_t j = 0; j < C; j++) store(yr + j, round_x(xr[j] * r) * load(w + j));
        if (rstd) rstd[row] = r;
    }
}
void rmsnorm_backward(floatX *dx, gradX *dw, const floatX *residual, const floatX *dy,
                      const floatX *x, const floatX *w, const real *rstd, int accumulate, int64_t R,
                      int64_t C) {
    kernel_begin("rmsnorm_backward", 0);
    // dw: threads share the columns and walk down all rows. Sums of 64 rows are added to the total:
    // two short sums err less than a long one.
    enum { STRIP = 64, ROWS = 64 };
    PARALLEL_FOR_BYTES(R * C * sizeof *dx)
    for (int64_t c0 = 0; c0 < C; c0 += STRIP) {
        int n = (int)lesser(STRIP, C - c0);
        real total[STRIP] = { 0 };
        for (int64_t r0 = 0; r0 < R; r0 += ROWS) {
            real part[STRIP] = { 0 };
            for (int64_t row = r0; row < lesser(R, r0 + ROWS); row++) {
                const floatX *d = dy + row * C + c0;
                const floatX *v = x + row * C + c0;
                for (int j = 0; j < n; j++) part[j] += load(d + j) * (load(v + j) * rstd[row]);
            }
            for (int j = 0; j < n; j++) total[j] += part[j];
        }
        for (int j = 0; j < n; j++) dw[c0 + j].v = accumulate ? dw[c0 + j].v + total[j] : total[j];
    }
    PARALLEL_FOR_BYTES(R * C * sizeof *dx)
    for (int64_t row = 0; row < R; row++) {
        int64_t at = row * C;
        real *t = SCRATCH(SCRATCH_LOCAL, real, 2 * C);
        real r = rstd[row];
        const real *xr = view_row(x + at, t + C, C);
        for (int64_t j = 0; j < C; j++) t[j] = load(dy + at + j) * load(w + j);
        real mean = row_dot(t, xr, C) * r / (real)C;
        if (residual)
            for (int64_t j = 0; j < C; j++)
                store(dx + at + j, load(residual + at + j) + r * (t[j] - xr[j] * r * mean));
        else
            for (int64_t j = 0; j < C; j++) store(dx + at + j, r * (t[j] - xr[j] * r * mean));
    }
}
void add(floatX *out, const floatX *a, const floatX *b, size_t n) {
    kernel_begin("add", 0);
    enum { PIECE = 1 << 14 };
    int64_t pieces = div_up((int64_t)n, PIECE);
    PARALLEL_FOR_BYTES(n * sizeof *out)
    for (int64_t p = 0; p < pieces; p++) {
        int64_t end = lesser((int64_t)n, (p + 1) * PIECE);
        for (int64_t i = p * PIECE; i < end; i++) store(out + i, load(a + i) + load(b + i));
    }
}

// ---- heads: RMSNorm, then rotation ----------------------------------------------------------
void rope_table(real *cos_table, real *sin_table, double theta, int64_t T, int64_t D) {
    int64_t half = D / 2;
    PARALLEL_FOR
    for (int64_t t = 0; t < T; t++)
        for (int j = 0; j < half; j++) {
            // Both are rounded to fp32 where real is, as those of transformers are.
            real frequency = (real)pow(theta, -2.0 * j / D);
            real angle = (real)t * frequency;
            cos_table[t * half + j] = (real)cos((double)angle);
            sin_table[t * half + j] = (real)sin((double)angle);
        }
}
// Pair (j, j + D/2) turns by angle a_j: y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin. The backward
// turns by -a_j.
static void head_forward(floatX *y, const floatX *x, const real *w, const real *c, const real *s,
                         real eps, int64_t D, real *buffer) {
    int half = D / 2;
    const real *v = view_row(x, buffer, D);
    real r = inverse_rms(v, eps, D);
    for (int j = 0; j < half; j++) {
        real a = v[j] * r * w[j];
        real b = v[j + half] * r * w[j + half];
        store(y + j, a * c[j] - b * s[j]);
        store(y + j + half, b * c[j] + a * s[j]);
    }
}
// Adds to dw (D). dx may be dy, which is read before dx is written. buffer (3D).
static void head_backward(floatX *dx, real *dw, const floatX *dy, const floatX *x, const real *w,
                          const real *c, const real *s, real eps, int64_t D, real *buffer) {
    int half = D / 2;
    real *n = buffer + D;
    real *t = buffer + 2 * D;
    const real *v = view_row(x, buffer, D);
    real r = inverse_rms(v, eps, D);
    for (int j = 0; j < D; j++) n[j] = v[j] * r;
    for (int j = 0; j < half; j++) {
        real a = load(dy + j);
        real b = load(dy + j + half);
        t[j] = a * c[j] + b * s[j];
        t[j + half] = b * c[j] - a * s[j];
    }
    for (int j = 0; j < D; j++) {
        dw[j] += t[j] * n[j];
        t[j] *= w[j];
    }
    real mean = row_dot(t, n, D) / (real)D;
    for (int j = 0; j < D; j++) store(dx + j, r * (t[j] - n[j] * mean));
}
void qk_norm_rope_forward(floatX *qn, floatX *kn, const floatX *q, const floatX *k,
                          const floatX *wq, const floatX *wk, const real *cos_table,
                          const real *sin_table, const int *position, real eps, int64_t R,
                          int64_t T, int64_t H, int64_t KV, int64_t D) {
    kernel_begin("qk_norm_rope_forward", 0);
    PARALLEL_FOR_BYTES(R * (H + KV) * D * sizeof *qn)
    for (int64_t row = 0; row < R; row++) {
        real *buffer = SCRATCH(SCRATCH_LOCAL, real, 3 * D);
        int64_t t = position ? position[row] : row % T;
        const real *c = cos_table + t * (D / 2);
        const real *s = sin_table + t * (D / 2);
        const real *weight_q = view_row(wq, buffer + D, D);
        const real *weight_k = view_row(wk, buffer + 2 * D, D);
        for (int h = 0; h < H; h++) {
            int64_t at = (row * H + h) * D;
            head_forward(qn + at, q + at, weight_q, c, s, eps, D, buffer);
        }
        for (int h = 0; h < KV; h++) {
            int64_t at = (row * KV + h) * D;
            head_forward(kn + at, k + at, weight_k, c, s, eps, D, buffer);
        }
    }
}
void qk_norm_rope_backward(floatX *dq, floatX *dk, gradX *dwq, gradX *dwk, const floatX *dqn,
                           const floatX *dkn, const floatX *q, const floatX *k, const floatX *wq,
                           const floatX *wk, const real *cos_table, const real *sin_table,
                           const int *position, real eps, int accumulate, int64_t R, int64_t T,
                           int64_t H, int64_t KV, int64_t D) {
    kernel_begin("qk_norm_rope_backward", 0);
    // Weight gradients: rows are cut into SLICES (whatever the number of threads: I8,
    // deterministic), each with its own sums, added in order at the end.
    enum { SLICES = 64 };
    real *sums = SCRATCH(SCRATCH_SHARED, real, 2 * SLICES * D);
    PARALLEL_FOR_BYTES(R * (H + KV) * D * sizeof *dq)
    for (int64_t slice = 0; slice < SLICES; slice++) {
        real *buffer = SCRATCH(SCRATCH_LOCAL, real, 5 * D);
        real *sum_q = sums + 2 * slice * D;
        real *sum_k = sum_q + D;
        const real *weight_q = view_row(wq, buffer + 3 * D, D);
        const real *weight_k = view_row(wk, buffer + 4 * D, D);
        memset(sum_q, 0, 2 * D * sizeof(real));
        for (int64_t row = R * slice / SLICES; row < R * (slice + 1) / SLICES; row++) {
            int64_t t = position ? position[row] : row % T;
            const real *c = cos_table + t * (D / 2);
            const real *s = sin_table + t * (D / 2);
            for (int h = 0; h < H; h++) {
                int64_t at = (row * H + h) * D;
                head_backward(dq + at, sum_q, dqn + at, q + at, weight_q, c, s, eps, D, buffer);
            }
            for (int h = 0; h < KV; h++) {
                int64_t at = (row * KV + h) * D;
                head_backward(dk + at, sum_k, dkn + at, k + at, weight_k, c, s, eps, D, buffer);
            }
        }
    }
    for (int j = 0; j < D; j++) {
        real sq = 0;
        real sk = 0;
        for (int64_t slice = 0; slice < SLICES; slice++) {
            sq += sums[2 * slice * D + j];
            sk += sums[2 * slice * D + D + j];
        }
        dwq[j].v = accumulate ? dwq[j].v + sq : sq;
        dwk[j].v = accumulate ? dwk[j].v + sk : sk;
    }
}
