// Causal attention with grouped KV heads, by blocks of scores that stay in cache: the matrix of all
// scores never exists.
//
//   S = scale q k^T, P_tj = e^(S_tj - lse_t) for j <= t else 0, o = P v.            With d = dL/d:
//   dP = do v^T;  dS = P (dP - delta), delta_t = sum_j P_tj dP_tj = do_t . o_t;  dq = scale dS k,
//   dk = scale dS^T q,  dv = P^T do.
// The G = H/KV query heads that read one KV head are stacked: a block of `positions` queries is a
// matrix of positions * G rows (t, head), so every product is G times taller and k, v are packed
// once for all of them. Blocks of keys above the diagonal are skipped. Forward keeps a running
// maximum m and sum l of each row (online softmax): when m grows, o and l shrink by e^(m_old -
// m_new). Backward recomputes P from lse, one thread per (sequence, KV head), so dk and dv have one
// order of summation (I8).
#include "../fail.h"
#include "gemm.h"

// Taller blocks feed the products better, shorter ones waste less above the diagonal; 192 x 256
// scores are 192 KiB.
enum { STACKED_ROWS = 192, POSITIONS_MAX = 128, POSITIONS_MIN = 16, KEYS = 256 };

static int positions_per_block(int H, int KV) {
    int p = STACKED_ROWS / (H / KV);
    return p > POSITIONS_MAX ? POSITIONS_MAX : p < POSITIONS_MIN ? POSITIONS_MIN : p;
}
void attention_select(const char *name) {
    if (strcmp(name, "auto") && strcmp(name, "blas"))
        die("the CPU backend has no attention kernel \"%s\"|choose --attention-kernel auto or blas",
            name);
}

// What one thread works in; rows = positions * G.
typedef struct {
    real *q, *o, *d_o, *dq; // (rows, D)
    real *s, *ds;           // (rows, KEYS)
    real *most, *sum;       // (rows)       running maximum and sum; backward: lse and delta
    real *k, *v;            // (KEYS, D)    widened, bf16 builds only
    real *dk, *dv;          // (T, D)       sums over query blocks and heads
} Work;
// Lays the pieces out behind `base`; returns the bytes of one thread.
static size_t work_layout(Work *w, void *base, int T, int H, int KV, int D) {
    size_t rows = (size_t)positions_per_block(H, KV) * (size_t)(H / KV), at = 0;
    size_t widened = sizeof(floatX) == sizeof(real) ? 0 : (size_t)KEYS * D;
    size_t counts[] = { rows * D, rows * D, rows * D, rows * D, rows * KEYS,   rows * KEYS,
                        rows,     rows,     widened,  widened,  (size_t)T * D, (size_t)T * D };
    real **pieces[] = { &w->q,    &w->o,   &w->d_o, &w->dq, &w->s,  &w->ds,
                        &w->most, &w->sum, &w->k,   &w->v,  &w->dk, &w->dv };
    for (size_t i = 0; i < sizeof counts / sizeof counts[0]; i++) {
        *pieces[i] = base ? (real *)((char *)base + at) : 0;
        at += (counts[i] * sizeof(real) + 255) / 256 * 256;
    }
    return at;
}
// One piece for each thread that the OpenMP runtime would start now.
size_t attention_workspace(int B, int T, int H, int KV, int D) {
    (void)B;
    Work w;
    return work_layout(&w, 0, T, H, KV, D) * (size_t)thread_count();
}
static Work work_of_thread(void *workspace, int T, int H, int KV, int D) {
    Work w;
    size_t bytes = work_layout(&w, 0, T, H, KV, D);
    int thread = 0;
#ifdef _OPENMP
    thread = omp_get_thread_num();
#endif
    work_layout(&w, (char *)workspace + bytes * (size_t)thread, T, H, KV, D);
    return w;
}

// The stacked rows of positions [t0, t0 + n) of one KV head's group: their G * D numbers are
// contiguous in x (T,H,D).
static void stack(real *out, const floatX *x, int t0, int n, int H, int G, int D, real scale) {
    for (int t = 0; t < n; t++) {
        const floatX *from = x + (int64_t)(t0 + t) * H * D;
        real *to = out + (int64_t)t * G * D;
        for (int i = 0; i < G * D; i++) to[i] = load(from + i) * scale;
    }
}
static void unstack(floatX *x, const real *in, int t0, int n, int H, int G, int D, real scale) {
    for (int t = 0; t < n; t++) {
        const real *from = in + (int64_t)t * G * D;
        floatX *to = x + (int64_t)(t0 + t) * H * D;
        for (int i = 0; i < G * D; i++) store(to + i, from[i] * scale);
    }
}
// Rows [j0, j0 + n) of one head of x (T,KV,D) as a real matrix with row stride *ld: in place where
// floatX is a real, else in buffer.
static const real *key_rows(const floatX *x, real *buffer, int j0, int n, int KV, int D,
                            int64_t *ld) {
    const floatX *from = x + (int64_t)j0 * KV * D;
#if defined(MOE_BF16)
    for (int j = 0; j < n; j++) load_row(buffer + (int64_t)j * D, from + (int64_t)j * KV * D, D);
    *ld = D;
    return buffer;
#else
    (void)buffer, (void)n;
    *ld = (int64_t)KV * D;
    return &from->v;
#endif
}
// Keys of block [j0, j0 + nj) that position t sees.
static int visible(int t, int j0, int nj) {
    int n = t + 1 - j0;
    return n < 0 ? 0 : n > nj ? nj : n;
}

void attention_forward(floatX *o, real *lse, const floatX *q, const floatX *k, const floatX *v,
                       void *workspace, int B, int T, int H, int KV, int D) {
    kernel_begin("attention_forward", 2.0 * B * T * T * H * D);
    int G = H / KV, positions = positions_per_block(H, KV), blocks = (int)div_up(T, positions);
    real scale = 1 / square_root((real)D);
    PARALLEL_TILES
    for (int item = 0; item < B * KV * blocks;
         item++) { // the last block of queries, which sees most keys, first
        Work w = work_of_thread(workspace, T, H, KV, D);
        int block = blocks - 1 - item / (B * KV), b = item % (B * KV) / KV, kv = item % KV;
        int t0 = block * positions, n = (int)lesser(positions, T - t0), rows = n * G;
        int64_t first_q = (int64_t)b * T * H * D + (int64_t)kv * G * D,
                first_k = (int64_t)b * T * KV * D + (int64_t)kv * D, ldk, ldv;
        stack(w.q, q + first_q, t0, n, H, G, D, scale);
        for (int j0 = 0; j0 < t0 + n; j0 += KEYS) {
            int nj = (int)lesser(KEYS, t0 + n - j0);
            const real *kj = key_rows(k + first_k, w.k, j0, nj, KV, D, &ldk),
                       *vj = key_rows(v + first_k, w.v, j0, nj, KV, D, &ldv);
            gemm(0, 1, rows, nj, D, w.q, D, kj, ldk, 0, w.s, nj);
            for (int r = 0; r < rows; r++) {
                real *s = w.s + (int64_t)r * nj, *out = w.o + (int64_t)r * D;
                int seen = visible(t0 + r / G, j0, nj);
                real before = j0 ? w.most[r] : -(real)INFINITY,
                     most = larger(row_max(s, seen),
                                   before); // block 0 shows key 0 to every row: finite
                for (int j = 0; j < seen; j++) s[j] = exp_real(s[j] - most);
                for (int j = seen; j < nj; j++) s[j] = 0;
                real shrink = exp_real(before - most), sum = row_sum(s, seen);
                if (j0 && shrink != 1)
                    for (int i = 0; i < D; i++) out[i] *= shrink;
                w.sum[r] = j0 ? w.sum[r] * shrink + sum : sum;
                w.most[r] = most;
            }
            gemm(0, 0, rows, D, nj, w.s, nj, vj, ldv, j0 ? 1 : 0, w.o, D);
        }
        for (int r = 0; r < rows; r++) {
            real inverse = 1 / w.sum[r], *out = w.o + (int64_t)r * D;
            for (int i = 0; i < D; i++) out[i] *= inverse;
            lse[((int64_t)b * H + kv * G + r % G) * T + t0 + r / G] =
                w.most[r] + (real)log((double)w.sum[r]);
        }
        unstack(o + first_q, w.o, t0, n, H, G, D, 1);
    }
}

void attention_backward(floatX *dq, floatX *dk, floatX *dv, const floatX *d_o, const floatX *o,
                        const real *lse, const floatX *q, const floatX *k, const floatX *v,
                        void *workspace, int B, int T, int H, int KV, int D) {
    kernel_begin("attention_backward", 5.0 * B * T * T * H * D);
    int G = H / KV, positions = positions_per_block(H, KV);
    real scale = 1 / square_root((real)D);
    PARALLEL_TILES
    for (int item = 0; item < B * KV; item++) {
        Work w = work_of_thread(workspace, T, H, KV, D);
        int b = item / KV, kv = item % KV;
        int64_t first_q = (int64_t)b * T * H * D + (int64_t)kv * G * D,
                first_k = (int64_t)b * T * KV * D + (int64_t)kv * D, ldk, ldv;
        memset(w.dk, 0, (size_t)T * D * sizeof(real));
        memset(w.dv, 0, (size_t)T * D * sizeof(real));
        for (int t0 = 0; t0 < T; t0 += positions) {
            int n = (int)lesser(positions, T - t0), rows = n * G;
            stack(w.q, q + first_q, t0, n, H, G, D, scale);
            stack(w.o, o + first_q, t0, n, H, G, D, 1);
            stack(w.d_o, d_o + first_q, t0, n, H, G, D, 1);
            real *row_lse = w.most, *delta = w.sum;
            for (int r = 0; r < rows; r++) {
                row_lse[r] = lse[((int64_t)b * H + kv * G + r % G) * T + t0 + r / G];
                delta[r] = row_dot(w.d_o + (int64_t)r * D, w.o + (int64_t)r * D, D);
            }
            for (int j0 = 0; j0 < t0 + n; j0 += KEYS) {
                int nj = (int)lesser(KEYS, t0 + n - j0);
                const real *kj = key_rows(k + first_k, w.k, j0, nj, KV, D, &ldk),
                           *vj = key_rows(v + first_k, w.v, j0, nj, KV, D, &ldv);
                gemm(0, 1, rows, nj, D, w.q, D, kj, ldk, 0, w.s, nj);
                gemm(0, 1, rows, nj, D, w.d_o, D, vj, ldv, 0, w.ds, nj);
                for (int r = 0; r < rows; r++) {
                    real *p = w.s + (int64_t)r * nj, *ds = w.ds + (int64_t)r * nj,
                         shift = row_lse[r], center = delta[r];
                    int seen = visible(t0 + r / G, j0, nj);
                    for (int j = 0; j < seen; j++) {
                        p[j] = exp_real(p[j] - shift);
                        ds[j] = p[j] * (ds[j] - center);
                    }
                    for (int j = seen; j < nj; j++) p[j] = ds[j] = 0;
                }
                gemm(1, 0, nj, D, rows, w.s, nj, w.d_o, D, 1, w.dv + (int64_t)j0 * D, D);
                gemm(1, 0, nj, D, rows, w.ds, nj, w.q, D, 1, w.dk + (int64_t)j0 * D,
                     D); // q carries the scale
                gemm(0, 0, rows, D, nj, w.ds, nj, kj, ldk, j0 ? 1 : 0, w.dq, D);
            }
            unstack(dq + first_q, w.dq, t0, n, H, G, D, scale);
        }
        unstack(dk + first_k, w.dk, 0, T, KV, 1, D, 1);
        unstack(dv + first_k, w.dv, 0, T, KV, 1, D, 1);
    }
}
