// Causal attention with grouped KV heads, by blocks of scores that stay in cache: the matrix of all
// scores never exists. Reads the products of gemm.h; offers kernels.h's section "attention".
//
// A query at row t sees the keys first(t)..t, where first(t) is the first row of its document
// (0 where a sequence is one document).
//
//   forward    S = scale q k^T,  P_tj = e^(S_tj - lse_t) for first(t) <= j <= t, else 0,  o = P v
//   backward   with d x = dL/dx:
//              dP = do v^T,  dS = P (dP - delta),  delta_t = sum_j P_tj dP_tj = do_t . o_t,
//              dq = scale dS k,  dk = scale dS^T q,  dv = P^T do
//
// The G = H/KV query heads that read one KV head are stacked: a block of n query rows is a matrix
// of n * G rows (t, head), so every product is G times taller and k, v are packed once for all of
// them. Blocks of keys that no row of the block sees are skipped. Forward keeps a running maximum m
// and sum l of each row (online softmax): when m grows, o and l shrink by e^(m_old - m_new).
// Backward recomputes P from lse, one thread per (sequence, KV head), so that dk and dv have one
// order of summation (I8, deterministic).
#include "../fail.h"
#include "gemm.h"

// Taller blocks feed the products better, shorter ones waste less above the diagonal. 128 x 512
// scores are 256 KiB.
enum { STACKED_ROWS = 128, QUERIES_MAX = 128, QUERIES_MIN = 16, KEYS = 512 };

static int64_t queries_per_block(int64_t H, int64_t KV) {
    int64_t n = STACKED_ROWS / (H / KV);
    if (n > QUERIES_MAX) return QUERIES_MAX;
    return n < QUERIES_MIN ? QUERIES_MIN : n;
}
void attention_select(const char *name) {
    if (strcmp(name, "auto") && strcmp(name, "blas"))
        die("the CPU backend has no attention kernel \"%s\"|choose --attention-kernel auto or blas",
            name);
}

// What one thread works in; rows = queries * G. Operands of products are floatX, results reals.
typedef struct {
    floatX *q, *d_o;  // (rows, D)
    real *o, *dq;     // (rows, D)
    real *s, *ds;     // (rows, KEYS)
    floatX *p, *dp;   // (rows, KEYS)  s and ds rounded; themselves where floatX is a real
    real *most, *sum; // (rows)        running maximum and sum; backward: lse and delta
    real *dk, *dv;    // (T, D)        sums over query blocks and heads
} Work;
// Lays the pieces out from `base` on. Returns the bytes of one thread.
static int64_t work_layout(Work *w, void *base, int64_t T, int64_t H, int64_t KV, int64_t D) {
    int64_t rows = queries_per_block(H, KV) * (H / KV);
    int64_t at = 0;
    int64_t rounded = sizeof(floatX) == sizeof(real) ? 0 : rows * KEYS;
    struct {
        void *piece;
        int64_t count, size;
    } table[] = { { &w->q, rows * D, sizeof(floatX) },  { &w->d_o, rows * D, sizeof(floatX) },
                  { &w->p, rounded, sizeof(floatX) },   { &w->dp, rounded, sizeof(floatX) },
                  { &w->o, rows * D, sizeof(real) },    { &w->dq, rows * D, sizeof(real) },
                  { &w->s, rows * KEYS, sizeof(real) }, { &w->ds, rows * KEYS, sizeof(real) },
                  { &w->most, rows, sizeof(real) },     { &w->sum, rows, sizeof(real) },
                  { &w->dk, T * D, sizeof(real) },      { &w->dv, T * D, sizeof(real) } };
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++) {
        void *piece = base ? (char *)base + at : 0;
        memcpy(table[i].piece, &piece, sizeof piece);
        at += div_up(table[i].count * table[i].size, 256) * 256;
    }
    return at;
}
// One piece for each thread that the OpenMP runtime would start now.
size_t attention_workspace(int64_t B, int64_t T, int64_t H, int64_t KV, int64_t D) {
    (void)B;
    Work w;
    return work_layout(&w, 0, T, H, KV, D) * thread_count();
}
static Work work_of_thread(void *workspace, int64_t T, int64_t H, int64_t KV, int64_t D) {
    Work w;
    int64_t bytes = work_layout(&w, 0, T, H, KV, D);
    work_layout(&w, (char *)workspace + bytes * thread_index(), T, H, KV, D);
    return w;
}

// The stacked rows [t0, t0 + n) of one KV head's group: their G * D numbers are contiguous in
// x (T,H,D).
static void stack(floatX *out, const floatX *x, int64_t t0, int64_t n, int64_t H, int64_t G,
                  int64_t D) {
    for (int64_t t = 0; t < n; t++)
        memcpy(out + t * G * D, x + (t0 + t) * H * D, G * D * sizeof *x);
}
static void unstack(floatX *x, const real *in, int64_t t0, int64_t n, int64_t H, int64_t G,
                    int64_t D, real scale) {
    for (int64_t t = 0; t < n; t++) {
        const real *from = in + t * G * D;
        floatX *to = x + (t0 + t) * H * D;
        for (int64_t i = 0; i < G * D; i++) store(to + i, from[i] * scale);
    }
}
// n results as an operand: in place where floatX is a real, else rounded into buffer.
static floatX *operand(real *x, floatX *buffer, int64_t n) {
#if defined(MOE_BF16)
    store_row(buffer, x, n);
    return buffer;
#else
    (void)buffer;
    (void)n;
    return (floatX *)x;
#endif
}
// One (sequence, KV head) of a call.
typedef struct {
    int64_t q, k, lse;   // its first element in q and o, in k and v, in lse
    const int *position; // (T) place of each row in its document, or 0
} Head;
static Head head_of(const int *position, int64_t b, int64_t kv, int64_t T, int64_t H, int64_t KV,
                    int64_t D) {
    int64_t G = H / KV;
    return (Head){ (b * T * H + kv * G) * D, (b * T * KV + kv) * D, (b * H + kv * G) * T,
                   position ? position + b * T : 0 };
}
// The first key that row t sees: the first row of its document. It never falls as t grows.
static int64_t first_key(const Head *h, int64_t t) { return h->position ? t - h->position[t] : 0; }
// The keys of block [j0, j0 + nj) that row t sees, as a range of columns; empty: from = to.
typedef struct {
    int64_t from, to;
} Seen;
static Seen seen_in_block(const Head *h, int64_t t, int64_t j0, int64_t nj) {
    int64_t from = first_key(h, t) - j0;
    int64_t to = lesser(t + 1 - j0, nj);
    if (from < 0) from = 0;
    return from < to ? (Seen){ from, to } : (Seen){ 0, 0 };
}
static void fill_outside(real *row, Seen seen, int64_t nj, real x) {
    for (int64_t j = 0; j < seen.from; j++) row[j] = x;
    for (int64_t j = seen.to; j < nj; j++) row[j] = x;
}

void attention_forward(floatX *o, real *lse, const floatX *q, const floatX *k, const floatX *v,
                       const int *position, void *workspace, int64_t B, int64_t T, int64_t H,
                       int64_t KV, int64_t D) {
    kernel_begin("attention_forward", 2.0 * B * T * T * H * D);
    int64_t G = H / KV;
    int64_t queries = queries_per_block(H, KV);
    int64_t blocks = div_up(T, queries);
    real scale = 1 / square_root((real)D);
    PARALLEL_TILES
    for (int64_t item = 0; item < B * KV * blocks; item++) {
        // The last block of queries sees most keys: it comes first.
        int64_t block = blocks - 1 - item / (B * KV);
        int64_t t0 = block * queries;
        int64_t n = lesser(queries, T - t0);
        int64_t rows = n * G;
        Head h = head_of(position, item % (B * KV) / KV, item % KV, T, H, KV, D);
        Work w = work_of_thread(workspace, T, H, KV, D);
        stack(w.q, q + h.q, t0, n, H, G, D);
        int64_t first = first_key(&h, t0);
        for (int64_t j0 = first; j0 < t0 + n; j0 += KEYS) {
            int64_t nj = lesser(KEYS, t0 + n - j0);
            const floatX *kj = k + h.k + j0 * KV * D;
            const floatX *vj = v + h.k + j0 * KV * D;
            gemm_x(0, 1, rows, nj, D, w.q, D, kj, KV * D, 0, w.s, nj);
            for (int64_t r = 0; r < rows; r++) {
                real *s = w.s + r * nj;
                real *out = w.o + r * D;
                real before = j0 > first ? w.most[r] : -(real)INFINITY;
                Seen seen = seen_in_block(&h, t0 + r / G, j0, nj);
                int empty = seen.to == seen.from;
                fill_outside(s, seen, nj, empty ? 0 : -(real)INFINITY); // whole rows vectorise best
                if (j0 == first) {
                    w.most[r] = before;
                    w.sum[r] = 0;
                }
                if (empty) continue;
                real most = larger(row_max(s, nj) * scale, before);
                for (int64_t j = 0; j < nj; j++) s[j] = exp_real(s[j] * scale - most);
                real shrink = exp_real(before - most);
                if (j0 > first && shrink != 1)
                    for (int64_t i = 0; i < D; i++) out[i] *= shrink;
                real sum = row_sum(s, nj);
                w.sum[r] = j0 > first ? w.sum[r] * shrink + sum : sum;
                w.most[r] = most;
            }
            floatX *p = operand(w.s, w.p, rows * nj);
            gemm_x(0, 0, rows, D, nj, p, nj, vj, KV * D, j0 > first ? 1 : 0, w.o, D);
        }
        for (int64_t r = 0; r < rows; r++) {
            real inverse = 1 / w.sum[r];
            real *out = w.o + r * D;
            for (int64_t i = 0; i < D; i++) out[i] *= inverse;
            lse[h.lse + r % G * T + t0 + r / G] = w.most[r] + (real)log((double)w.sum[r]);
        }
        unstack(o + h.q, w.o, t0, n, H, G, D, 1);
    }
}

void attention_backward(floatX *dq, floatX *dk, floatX *dv, const floatX *d_o, const floatX *o,
                        const real *lse, const floatX *q, const floatX *k, const floatX *v,
                        const int *position, void *workspace, int64_t B, int64_t T, int64_t H,
                        int64_t KV, int64_t D) {
    kernel_begin("attention_backward", 5.0 * B * T * T * H * D);
    int64_t G = H / KV;
    int64_t queries = queries_per_block(H, KV);
    real scale = 1 / square_root((real)D);
    PARALLEL_TILES
    for (int64_t item = 0; item < B * KV; item++) {
        Head h = head_of(position, item / KV, item % KV, T, H, KV, D);
        Work w = work_of_thread(workspace, T, H, KV, D);
        for (int64_t i = 0; i < T * D; i++) w.dk[i] = w.dv[i] = 0;
        for (int64_t t0 = 0; t0 < T; t0 += queries) {
            int64_t n = lesser(queries, T - t0);
            int64_t rows = n * G;
            int64_t first = first_key(&h, t0);
            stack(w.q, q + h.q, t0, n, H, G, D);
            stack(w.d_o, d_o + h.q, t0, n, H, G, D);
            real *row_lse = w.most;
            real *delta = w.sum;
            for (int64_t r = 0; r < rows; r++) {
                row_lse[r] = lse[h.lse + r % G * T + t0 + r / G];
                const floatX *out = o + h.q + ((t0 + r / G) * H + r % G) * D;
                delta[r] = row_dot(view_row(w.d_o + r * D, w.o, D), view_row(out, w.o + D, D), D);
            }
            for (int64_t j0 = first; j0 < t0 + n; j0 += KEYS) {
                int64_t nj = lesser(KEYS, t0 + n - j0);
                const floatX *kj = k + h.k + j0 * KV * D;
                const floatX *vj = v + h.k + j0 * KV * D;
                gemm_x(0, 1, rows, nj, D, w.q, D, kj, KV * D, 0, w.s, nj);
                gemm_x(0, 1, rows, nj, D, w.d_o, D, vj, KV * D, 0, w.ds, nj);
                for (int64_t r = 0; r < rows; r++) {
                    real *p = w.s + r * nj;
                    real *ds = w.ds + r * nj;
                    real shift = row_lse[r];
                    real center = delta[r];
                    Seen seen = seen_in_block(&h, t0 + r / G, j0, nj);
                    for (int64_t j = seen.from; j < seen.to; j++) {
                        p[j] = exp_real(p[j] * scale - shift);
                        ds[j] = p[j] * (ds[j] - center);
                    }
                    fill_outside(p, seen, nj, 0);
                    fill_outside(ds, seen, nj, 0);
                }
                floatX *p = operand(w.s, w.p, rows * nj);
                floatX *dp = operand(w.ds, w.dp, rows * nj);
                gemm_x(1, 0, nj, D, rows, p, nj, w.d_o, D, 1, w.dv + j0 * D, D);
                gemm_x(1, 0, nj, D, rows, dp, nj, w.q, D, 1, w.dk + j0 * D, D);
                gemm_x(0, 0, rows, D, nj, dp, nj, kj, KV * D, j0 > first ? 1 : 0, w.dq, D);
            }
            unstack(dq + h.q, w.dq, t0, n, H, G, D, scale);
        }
        unstack(dk + h.k, w.dk, 0, T, KV, 1, D, scale);
        unstack(dv + h.k, w.dv, 0, T, KV, 1, D, 1);
    }
}
