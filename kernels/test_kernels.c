// Checks of the CPU kernels that are not about experts: against naive loops in double, against
// finite differences (fp64 builds), against the naive bf16 version (bf16 builds), with 1 and more
// threads (same bits), and beyond 2^31 elements. test_experts.c checks the rest.
#define _GNU_SOURCE
#include "cpu/gemm.h"
#include "test.h"
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { FP64 = sizeof(real) == 8 };
#define BOTH                                   \
    for (test_rounding = 0; test_rounding < 2; \
         test_rounding++) // the truth, then the naive bf16 version
#define TAKE2(name, n) double *name[2] = { TEST_TAKE(double, n), TEST_TAKE(double, n) }

// ---- numbers --------------------------------------------------------------------------------
static void test_numbers(void) {
    // every bf16 value survives; halves go to even, anything above a half up, below it down
    int wrong = 0;
    for (uint32_t b = 0; b < 0x10000; b++) {
        float f = bf16_to_float((uint16_t)b);
        if (isnan(f)) {
            wrong += !isnan(bf16_to_float(float_to_bf16(f)));
            continue;
        }
        wrong += float_to_bf16(f) != b;
        if (isinf(f)) continue;
        uint32_t low[] = { 0x7fff, 0x8000, 0x8001 };
        uint32_t want[] = { b, b + (b & 1), b + 1 };
        for (int i = 0; i < 3; i++) {
            uint32_t u = b << 16 | low[i];
            float g;
            memcpy(&g, &u, 4);
            wrong += float_to_bf16(g) != (uint16_t)want[i];
        }
    }
    uint32_t nan_bits[] = { 0x7f800001u, 0xff800001u, 0x7fffffffu, 0xffffffffu };
    for (int i = 0; i < 4; i++) {
        float g;
        memcpy(&g, &nan_bits[i], 4);
        wrong += !isnan(bf16_to_float(float_to_bf16(g)));
    }
    compare(wrong == 0, "bf16 rounding: %d values", wrong);

    // exponential: fp32 within 2 units in the last place of libm's double result, denormals
    // included
    double worst = 0;
    for (int i = 0; i <= 400000; i++) {
        real x = (real)(-110.0 + i * (200.0 / 400000));
        double want = exp((double)x);
        double got = (double)exp_real(x);
        if (want > 3.4028235e38) {
            compare(FP64 || isinf(got), "exp(%g) = %g", (double)x, got);
            continue;
        }
        double ulp =
            ldexp(FP64 ? 0x1p-52 : 0x1p-23, (int)fmax(floor(log2(want)), FP64 ? -1022 : -126));
        worst = fmax(worst, fabs(got - want) / ulp);
    }
    compare(worst <= 2, "exp: %g units in the last place", worst);
    compare(exp_real(0) == 1 && exp_real(-(real)INFINITY) == 0 && exp_real(-1000) == 0,
            "exp at 0 and far below");
    compare(isinf(exp_real(1000)) && isinf(exp_real((real)INFINITY)) && isnan(exp_real((real)NAN)),
            "exp far above and of NaN");
    compare(sigmoid(-200) == 0 || FP64, "sigmoid far below");
    compare(sigmoid(200) == 1 && sigmoid(0) == (real)0.5 && silu(0) == 0 && silu(200) == 200 &&
                fabs((double)silu(-200)) < 1e-30,
            "sigmoid and silu");

    for (int n = 0; n < 70; n++) {
        double *x = test_random_real(n + 1, 1, 0);
        double *y = test_random_real(n + 1, 1, 0);
        double sum = 0;
        double dot = 0;
        double most = -INFINITY;
        for (int i = 0; i < n; i++) {
            sum += x[i];
            dot += x[i] * y[i];
            most = fmax(most, x[i]);
        }
        real *a = test_real(x, n);
        real *b = test_real(y, n);
        double bound = FP64 ? 1e-13 : 1e-5;
        compare(fabs((double)row_sum(a, n) - sum) <= bound &&
                    fabs((double)row_dot(a, b, n) - dot) <= bound && (double)row_max(a, n) == most,
                "reductions over %d", n);
        test_release("reductions");
    }
    test_group("numbers: bf16, exp, sigmoid, row reductions");
}

// ---- matrix products ------------------------------------------------------------------------
static void naive_gemm(double *C, int ta, int tb, int m, int n, int k, const double *A, int lda,
                       const double *B, int ldb, int beta, const double *C0) {
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) {
            double s = beta ? C0[i * n + j] : 0;
            for (int p = 0; p < k; p++) {
                int a = ta ? p * lda + i : i * lda + p;
                int b = tb ? j * ldb + p : p * ldb + j;
                s += A[a] * B[b];
            }
            C[i * n + j] = Q(s);
        }
}
static void test_gemm_shape(int ta, int tb, int m, int n, int k, int beta) {
    int pad = 3;
    int lda = (ta ? m : k) + pad;
    int ldb = (tb ? k : n) + pad;
    int ldc = n + pad;
    size_t na = lda * (size_t)(ta ? k : m);
    size_t nb = ldb * (size_t)(tb ? n : k);
    size_t nc = m * (size_t)n;
    double *A = test_random(na, 1, 0), *B = test_random(nb, 1, 0), *C0 = test_random(nc, 1, 0);
    TAKE2(want, nc);
    BOTH naive_gemm(want[test_rounding], ta, tb, m, n, k, A, lda, B, ldb, beta, C0);
    for (int form = 0; form < 5; form++) {
        // columns behind n belong to somebody else: they keep their NaN; with beta 0 all of C
        // starts as NaN
        real *C = TEST_TAKE(real, (size_t)m * (size_t)ldc);
        floatX *X = TEST_TAKE(floatX, (size_t)m * (size_t)ldc);
        for (int i = 0; i < m && beta; i++)
            for (int j = 0; j < n; j++) {
                C[i * ldc + j] = (real)C0[i * n + j];
                store(X + i * ldc + j, (real)C0[i * n + j]);
            }
        int rounded = form == 2 || form == 4;
        int foreign = 0;
        if (form == 0)
            gemm(ta, tb, m, n, k, test_real(A, na), lda, test_real(B, nb), ldb, (real)beta, C, ldc);
        if (form == 1)
            gemm_x(ta, tb, m, n, k, test_x(A, na), lda, test_x(B, nb), ldb, (real)beta, C, ldc);
        if (form == 2)
            gemm_xx(ta, tb, m, n, k, test_x(A, na), lda, test_x(B, nb), ldb, (real)beta, X, ldc);
        if (form == 3)
            gemm_parallel_x(ta, tb, m, n, k, test_x(A, na), lda, test_x(B, nb), ldb, (real)beta, C,
                            ldc);
        if (form == 4)
            gemm_parallel_xx(ta, tb, m, n, k, test_x(A, na), lda, test_x(B, nb), ldb, (real)beta, X,
                             ldc);
        double *got = TEST_TAKE(double, nc);
        for (int i = 0; i < m; i++) {
            for (int j = 0; j < n; j++)
                got[i * n + j] = (double)(rounded ? load(X + i * ldc + j) : C[i * ldc + j]);
            for (int j = n; j < ldc; j++)
                foreign += !isnan((double)(rounded ? load(X + i * ldc + j) : C[i * ldc + j]));
        }
        char name[96];
        snprintf(name, sizeof name, "product form %d, ta %d tb %d, %d x %d x %d, beta %d", form, ta,
                 tb, m, n, k, beta);
        check_close(name, got, want[0], rounded ? want[1] : want[0], nc, 1);
        compare(!foreign, "%s: touched columns behind n", name);
    }
    test_release("products");
}
static void test_gemm(void) {
    static const int shapes[][3] = { { 1, 1, 1 },      { 3, 5, 7 },     { 6, 16, 8 },
                                     { 13, 33, 17 },   { 65, 31, 300 }, { 97, 130, 70 },
                                     { 300, 40, 520 }, { 5, 530, 20 },  { 0, 4, 4 },
                                     { 4, 0, 4 },      { 4, 5, 0 } };
    for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++)
        for (int bits = 0; bits < 8; bits++)
            test_gemm_shape(bits & 1, bits >> 1 & 1, shapes[s][0], shapes[s][1], shapes[s][2],
                            bits >> 2);
    test_gemm_shape(0, 1, 1200, 300, 40, 0); // several tiles
    test_gemm_shape(1, 0, 300, 200, 1000, 1);
    test_group("matrix products: all layouts, edges, beta, empty sides");
}

// ---- ends -----------------------------------------------------------------------------------
static void test_embed(int R, int V, int C) {
    size_t nw = V * (size_t)C;
    size_t nx = R * (size_t)C;
    double *W = test_random(nw, 1, 0);
    double *dx = test_random(nx, 1, 0);
    double *old = test_random_real(nw, 1, 0);
    int *ids = TEST_TAKE(int, R);
    for (int r = 0; r < R; r++)
        ids[r] =
            test_below(V); // R > V in one shape: repeats; R < V in another: rows nobody looks up
    floatX *out = TEST_TAKE(floatX, nx);
    floatX *Wx = test_x(W, nw);
    floatX *dxx = test_x(dx, nx);
    embed_forward(out, ids, Wx, R, C);
    int wrong = 0;
    for (int r = 0; r < R; r++)
        wrong += memcmp(out + (int64_t)r * C, Wx + (int64_t)ids[r] * C, C * sizeof *out) != 0;
    compare(!wrong, "embedding: %d rows differ", wrong);
    for (int pad = -1; pad < V && R;
         pad += 1 + ids[0] - pad > 0 ? 1 + ids[0] - pad : V) // none, then one that occurs
        for (int accumulate = 0; accumulate < 2; accumulate++) {
            double *want = TEST_TAKE(double, nw);
            for (size_t i = 0; i < nw; i++) want[i] = accumulate ? old[i] : 0;
            for (int r = 0; r < R; r++)
                for (int c = 0; c < C && ids[r] != pad; c++) want[ids[r] * C + c] += dx[r * C + c];
            gradX *dW = accumulate ? test_grad(old, nw) : TEST_TAKE(gradX, nw);
            embed_backward(dW, dxx, ids, accumulate, pad, R, V, C);
            check_close("embedding gradient", from_grad(dW, nw), want, want, nw, 1);
        }
    gradX *dW = TEST_TAKE(gradX, nw);
    embed_backward(dW, dxx, ids, 0, -1, 0, V, C);
    int left = 0;
    for (size_t i = 0; i < nw; i++) left += dW[i].v != 0;
    compare(!left, "embedding gradient of no rows: %d elements not zero", left);
    test_release("embedding");
}

typedef struct {
    floatX *logits, *work;
    const int *targets;
    int N, V;
    real seed;
} CrossEntropy;
static double cross_entropy_loss(void *context) {
    CrossEntropy *c = context;
    double loss = 0;
    cross_entropy(c->logits, &loss, c->targets, 1, 0, c->N, c->V);
    return loss * (double)c->seed;
}
static void test_cross_entropy(int N, int V, double spread) {
    size_t n = N * (size_t)V;
    double *x = test_random(n, spread, 0);
    double seed = 0.37;
    double want_loss = 0;
    int *targets = TEST_TAKE(int, N);
    for (int r = 0; r < N; r++) targets[r] = r % 3 == 1 ? -1 - r : test_below(V);
    TAKE2(d, n);
    BOTH for (int r = 0; r < N; r++) {
        double most = -INFINITY;
        double sum = 0;
        for (int i = 0; i < V; i++) most = fmax(most, x[r * V + i]);
        for (int i = 0; i < V; i++) sum += exp(x[r * V + i] - most);
        for (int i = 0; i < V; i++)
            d[test_rounding][r * V + i] =
                targets[r] < 0 ? 0 : Q((exp(x[r * V + i] - most) / sum - (i == targets[r])) * seed);
        if (targets[r] >= 0 && !test_rounding) want_loss += log(sum) + most - x[r * V + targets[r]];
    }
    CrossEntropy c = { test_x(x, n), test_x(x, n), targets, N, V, (real)seed };
    double loss = 100; // added to, not overwritten
    cross_entropy(c.work, &loss, targets, (real)seed, 0, N, V);
    compare(!memcmp(c.work, c.logits, n * sizeof(floatX)),
            "cross entropy without backward changed the logits");
    compare(fabs(loss - 100 - want_loss) <= (FP64 ? 1e-11 : 1e-6) * (1 + want_loss),
            "cross entropy: loss %.9g, not %.9g", loss - 100, want_loss);
    cross_entropy(c.work, &loss, targets, (real)seed, 1, N, V);
    double *got = from_x(c.work, n);
    check_close("dlogits", got, d[0], d[1], n, 1);
    int nonzero = 0;
    for (int r = 1; r < N; r += 3)
        for (int i = 0; i < V; i++) nonzero += got[r * V + i] != 0;
    compare(!nonzero, "cross entropy: %d gradients of ignored rows", nonzero);
    if (FP64) check_gradient("dlogits", got, (double *)c.logits, n, 60, cross_entropy_loss, &c);
    test_release("cross entropy");
}
static void test_ends(void) {
    test_embed(40, 9, 70);
    test_embed(5, 30, 3);
    test_embed(0, 4, 4);
    test_group("embedding, forward and backward");
    test_cross_entropy(7, 50, 2);
    test_cross_entropy(2, 1, 1);
    test_cross_entropy(1, 17, 30);
    test_cross_entropy(0, 5, 1);
    test_cross_entropy(5, 151936, 3); // the real vocabulary
    test_group("cross entropy and its gradient");
}

// ---- norms and rope -------------------------------------------------------------------------
static const double EPS = 1e-3; // large enough to matter in the comparison
typedef struct {
    floatX *x, *w, *y;
    real *rstd;
    const double *dy;
    int R, C;
} Norm;
static double norm_loss(void *context) {
    Norm *c = context;
    rmsnorm_forward(c->y, c->rstd, c->x, c->w, (real)EPS, c->R, c->C);
    double s = 0;
    for (int64_t i = 0; i < (int64_t)c->R * c->C; i++) s += (double)load(c->y + i) * c->dy[i];
    return s;
}
static void test_rmsnorm(int R, int C) {
    size_t n = R * (size_t)C;
    double *x = test_random(n, 0.5, 0.1);
    double *w = test_random(C, 0.3, 1);
    double *dy = test_random(n, 1, 0);
    double *res = test_random(n, 1, 0);
    double *old = test_random_real(C, 1, 0);
    TAKE2(y, n);
    TAKE2(dx, n);
    TAKE2(dw, C);
    Norm c = { test_x(x, n), test_x(w, C), TEST_TAKE(floatX, n), TEST_TAKE(real, R), dy, R, C };
    floatX *dyx = test_x(dy, n);
    rmsnorm_forward(c.y, 0, c.x, c.w, (real)EPS, R, C); // rstd not wanted
    for (int mode = 0; mode < 6;
         mode++) { // residual: none, another buffer, dx itself; dw written or added
        int accumulate = mode & 1;
        int residual = mode >> 1;
        BOTH {
            int b = test_rounding;
            for (int j = 0; j < C; j++) dw[b][j] = 0;
            for (int r = 0; r < R; r++) {
                double v = 0;
                double mean = 0;
                for (int j = 0; j < C; j++) v += x[r * C + j] * x[r * C + j] / C;
                double rs = 1 / sqrt(v + EPS);
                for (int j = 0; j < C; j++) {
                    double nj = Q(x[r * C + j] * rs);
                    y[b][r * C + j] = Q(nj * w[j]);
                    dw[b][j] += dy[r * C + j] * nj;
                    mean += Q(dy[r * C + j] * w[j]) * x[r * C + j] * rs / C;
                }
                for (int j = 0; j < C; j++) {
                    double t = Q(rs * (Q(dy[r * C + j] * w[j]) - x[r * C + j] * rs * mean));
                    dx[b][r * C + j] = residual ? Q(res[r * C + j] + t) : t;
                }
            }
            for (int j = 0; j < C; j++) dw[b][j] = Q(dw[b][j]) + accumulate * old[j];
        }
        rmsnorm_forward(c.y, c.rstd, c.x, c.w, (real)EPS, R, C);
        floatX *d = residual == 2 ? test_x(res, n) : TEST_TAKE(floatX, n);
        gradX *g = accumulate ? test_grad(old, C) : TEST_TAKE(gradX, C);
        const floatX *path = residual == 1 ? test_x(res, n) : 0;
        if (residual == 2) path = d;
        rmsnorm_backward(d, g, path, dyx, c.x, c.w, c.rstd, accumulate, R, C);
        check_close("rmsnorm", from_x(c.y, n), y[0], y[1], n, 1);
        check_close("rmsnorm dx", from_x(d, n), dx[0], dx[1], n, 1);
        check_close("rmsnorm dw", from_grad(g, C), dw[0], dw[1], C, 1);
        if (FP64 && mode == 0) {
            check_gradient("rmsnorm dx", (double *)d, (double *)c.x, n, 50, norm_loss, &c);
            check_gradient("rmsnorm dw", (double *)g, (double *)c.w, C, 50, norm_loss, &c);
        }
    }
    test_release("rmsnorm");
}

static void test_rope_table(void) {
    enum { T = 1001, D = 128 };
    real *c = TEST_TAKE(real, T * D / 2);
    real *s = TEST_TAKE(real, T * D / 2);
    rope_table(c, s, 1e6, T, D);
    // fp32: frequency and angle are rounded, 1000 * 2^-25 = 3e-5 each at most
    double tolerance = FP64 ? 1e-12 : 6.5e-5;
    double worst = 0;
    for (int t = 0; t < T; t++)
        for (int j = 0; j < D / 2; j++) {
            double a = t * pow(1e6, -2.0 * j / D);
            worst = fmax(worst, fmax(fabs((double)c[t * D / 2 + j] - cos(a)),
                                     fabs((double)s[t * D / 2 + j] - sin(a))));
        }
    compare(worst <= tolerance, "rope table deviates by %g", worst);
    // known values at position 1000 of Qwen3's table
    compare(fabs((double)c[64000 + 1] + 0.02366990) < 4e-5 &&
                fabs((double)s[64000 + 63] - 1.24093744e-3) < 1e-8,
            "rope table: known values");
    if (!FP64) { // the last bit of HF's table: fp32 frequency times fp32 position, rounded
        float frequency = (float)pow(1e6, -2.0 / D);
        float angle = 999.0f * frequency;
        compare(c[999 * 64 + 1] == (float)cos((double)angle),
                "rope table rounds as Hugging Face's");
    }
}

typedef struct {
    floatX *q, *k, *wq, *wk, *qn, *kn;
    real *c, *s;
    const double *gq, *gk;
    int R, T, H, KV, D;
} Heads;
static double heads_loss(void *context) {
    Heads *h = context;
    qk_norm_rope_forward(h->qn, h->kn, h->q, h->k, h->wq, h->wk, h->c, h->s, 0, (real)EPS, h->R,
                         h->T, h->H, h->KV, h->D);
    double s = 0;
    for (int64_t i = 0; i < (int64_t)h->R * h->H * h->D; i++)
        s += (double)load(h->qn + i) * h->gq[i];
    for (int64_t i = 0; i < (int64_t)h->R * h->KV * h->D; i++)
        s += (double)load(h->kn + i) * h->gk[i];
    return s;
}
static void naive_heads(double *y, double *dx, double *dw, const double *x, const double *w,
                        const double *dy, const real *c, const real *s, int R, int T, int H,
                        int D) {
    int half = D / 2;
    for (int j = 0; j < D; j++) dw[j] = 0;
    for (int r = 0; r < R * H; r++) {
        const double *v = x + r * D;
        const double *g = dy + r * D;
        const real *cr = c + r / H % T * half;
        const real *sr = s + r / H % T * half;
        double mean2 = 0;
        double mean = 0;
        for (int j = 0; j < D; j++) mean2 += v[j] * v[j] / D;
        double rs = 1 / sqrt(mean2 + EPS);
        double *m = TEST_TAKE(double, D);
        double *t = TEST_TAKE(double, D);
        for (int j = 0; j < D; j++) m[j] = Q(Q(v[j] * rs) * w[j]);
        for (int j = 0; j < half; j++) {
            double cj = (double)cr[j];
            double sj = (double)sr[j];
            y[r * D + j] = Q(Q(m[j] * cj) - Q(m[j + half] * sj));
            y[r * D + j + half] = Q(Q(m[j + half] * cj) + Q(m[j] * sj));
            t[j] = Q(Q(g[j] * cj) + Q(g[j + half] * sj));
            t[j + half] = Q(Q(g[j + half] * cj) - Q(g[j] * sj));
        }
        for (int j = 0; j < D; j++) {
            dw[j] += t[j] * Q(v[j] * rs);
            t[j] = Q(t[j] * w[j]);
            mean += t[j] * v[j] * rs / D;
        }
        for (int j = 0; j < D; j++) dx[r * D + j] = Q(rs * (t[j] - v[j] * rs * mean));
    }
    for (int j = 0; j < D; j++) dw[j] = Q(dw[j]);
}
static void test_heads(int B, int T, int H, int KV, int D) {
    int R = B * T;
    size_t nq = R * (size_t)(H * D);
    size_t nk = R * (size_t)(KV * D);
    size_t nd = D;
    double *q = test_random(nq, 1, 0.2);
    double *k = test_random(nk, 1, 0);
    double *wq = test_random(nd, 0.3, 1);
    double *wk = test_random(nd, 0.3, 1);
    double *gq = test_random(nq, 1, 0);
    double *gk = test_random(nk, 1, 0);
    double *old = test_random_real(nd, 1, 0);
    TAKE2(qn, nq);
    TAKE2(dq, nq);
    TAKE2(dwq, nd);
    TAKE2(kn, nk);
    TAKE2(dk, nk);
    TAKE2(dwk, nd);
    Heads h = { test_x(q, nq),
                test_x(k, nk),
                test_x(wq, nd),
                test_x(wk, nd),
                TEST_TAKE(floatX, nq),
                TEST_TAKE(floatX, nk),
                TEST_TAKE(real, T * D / 2),
                TEST_TAKE(real, T * D / 2),
                gq,
                gk,
                R,
                T,
                H,
                KV,
                D };
    rope_table(h.c, h.s, 100, T, D);
    BOTH {
        int b = test_rounding;
        naive_heads(qn[b], dq[b], dwq[b], q, wq, gq, h.c, h.s, R, T, H, D);
        naive_heads(kn[b], dk[b], dwk[b], k, wk, gk, h.c, h.s, R, T, KV, D);
    }
    qk_norm_rope_forward(h.qn, h.kn, h.q, h.k, h.wq, h.wk, h.c, h.s, 0, (real)EPS, R, T, H, KV, D);
    check_close("qk norm rope: q", from_x(h.qn, nq), qn[0], qn[1], nq, 1);
    check_close("qk norm rope: k", from_x(h.kn, nk), kn[0], kn[1], nk, 1);
    for (int mode = 0; mode < 4; mode++) { // written or added; own buffers or in place
        int accumulate = mode & 1;
        floatX *gqx = test_x(gq, nq);
        floatX *gkx = test_x(gk, nk);
        floatX *dqx = mode & 2 ? gqx : TEST_TAKE(floatX, nq);
        floatX *dkx = mode & 2 ? gkx : TEST_TAKE(floatX, nk);
        gradX *a = accumulate ? test_grad(old, nd) : TEST_TAKE(gradX, nd);
        gradX *b = accumulate ? test_grad(old, nd) : TEST_TAKE(gradX, nd);
        qk_norm_rope_backward(dqx, dkx, a, b, gqx, gkx, h.q, h.k, h.wq, h.wk, h.c, h.s, 0,
                              (real)EPS, accumulate, R, T, H, KV, D);
        check_close("qk norm rope: dq", from_x(dqx, nq), dq[0], dq[1], nq, 1);
        check_close("qk norm rope: dk", from_x(dkx, nk), dk[0], dk[1], nk, 1);
        if (accumulate)
            for (int i = 0; i < D; i++) {
                a[i].v -= (real)old[i];
                b[i].v -= (real)old[i];
            }
        check_close("qk norm rope: dwq", from_grad(a, nd), dwq[0], dwq[1], nd,
                    2); // 2: the old value is added and taken off again
        check_close("qk norm rope: dwk", from_grad(b, nd), dwk[0], dwk[1], nd, 2);
        if (FP64 && mode == 0) {
            check_gradient("qk norm rope: dq", (double *)dqx, (double *)h.q, nq, 40, heads_loss,
                           &h);
            check_gradient("qk norm rope: dk", (double *)dkx, (double *)h.k, nk, 40, heads_loss,
                           &h);
            check_gradient("qk norm rope: dwq", (double *)a, (double *)h.wq, nd, 40, heads_loss,
                           &h);
            check_gradient("qk norm rope: dwk", (double *)b, (double *)h.wk, nd, 40, heads_loss,
                           &h);
        }
    }
    // Positions given by hand = the same rows of the tables in that order.
    int *position = TEST_TAKE(int, R);
    real *c = TEST_TAKE(real, R * D / 2);
    real *sine = TEST_TAKE(real, R * D / 2);
    floatX *forward = TEST_TAKE(floatX, nq);
    floatX *same = TEST_TAKE(floatX, nk);
    for (int r = 0; r < R; r++) {
        position[r] = (int)(r * 7 % T);
        memcpy(c + (int64_t)r * D / 2, h.c + (int64_t)position[r] * D / 2,
               (size_t)D / 2 * sizeof *c);
        memcpy(sine + (int64_t)r * D / 2, h.s + (int64_t)position[r] * D / 2,
               (size_t)D / 2 * sizeof *c);
    }
    floatX *saved_dq = 0;
    for (int way = 0; way < 2; way++) {
        gradX *a = TEST_TAKE(gradX, nd);
        gradX *b = TEST_TAKE(gradX, nd);
        floatX *dqx = test_x(gq, nq);
        floatX *dkx = test_x(gk, nk);
        floatX *want[] = { h.qn, h.kn, forward, same };
        qk_norm_rope_forward(way ? forward : h.qn, way ? same : h.kn, h.q, h.k, h.wq, h.wk,
                             way ? h.c : c, way ? h.s : sine, way ? position : 0, (real)EPS, R,
                             way ? T : R, H, KV, D);
        qk_norm_rope_backward(dqx, dkx, a, b, dqx, dkx, h.q, h.k, h.wq, h.wk, way ? h.c : c,
                              way ? h.s : sine, way ? position : 0, (real)EPS, 0, R, way ? T : R, H,
                              KV, D);
        if (way) {
            compare(!memcmp(want[0], want[2], nq * sizeof(floatX)), "qk norm rope: q by position");
            compare(!memcmp(want[1], want[3], nk * sizeof(floatX)), "qk norm rope: k by position");
            compare(!memcmp(dqx, saved_dq, nq * sizeof(floatX)), "qk norm rope: dq by position");
        }
        if (!way) saved_dq = dqx;
    }
    test_release("qk norm rope");
}
static void test_norms(void) {
    test_rmsnorm(5, 7);
    test_rmsnorm(1, 64);
    test_rmsnorm(130, 100);
    test_rmsnorm(3, 130);
    test_rmsnorm(0, 5);
    test_group("rmsnorm, forward and backward");
    test_rope_table();
    test_heads(2, 5, 4, 2, 8);
    test_heads(1, 1, 1, 1, 2);
    test_heads(3, 30, 2, 2, 6);
    test_heads(1, 70, 4, 1, 16);
    test_heads(0, 4, 2, 1, 4);
    test_group("rope table, norm and rotation of heads");
}

// ---- linear maps, sums ----------------------------------------------------------------------
typedef struct {
    floatX *x, *W, *y;
    const double *dy;
    int R, O, N;
} Linear;
static double linear_loss(void *context) {
    Linear *c = context;
    linear_forward(c->y, c->x, c->W, c->R, c->O, c->N);
    double s = 0;
    for (int64_t i = 0; i < (int64_t)c->R * c->O; i++) s += (double)load(c->y + i) * c->dy[i];
    return s;
}
static void test_linear_shape(int R, int O, int N) {
    size_t nx = R * (size_t)N;
    size_t nw = O * (size_t)N;
    size_t ny = R * (size_t)O;
    double *x = test_random(nx, 1, 0);
    double *W = test_random(nw, 1, 0);
    double *dy = test_random(ny, 1, 0);
    double *oldx = test_random(nx, 1, 0);
    double *oldw = test_random_real(nw, 1, 0);
    Linear c = { test_x(x, nx), test_x(W, nw), TEST_TAKE(floatX, ny), dy, R, O, N };
    floatX *dyx = test_x(dy, ny);
    TAKE2(y, ny);
    TAKE2(dx, nx);
    TAKE2(dw, nw);
    for (int add_to = 0; add_to < 2; add_to++) {
        BOTH {
            int b = test_rounding;
            naive_gemm(y[b], 0, 1, R, O, N, x, N, W, N, 0, 0);
            naive_gemm(dx[b], 0, 0, R, N, O, dy, O, W, N, 0, 0);
            for (size_t i = 0; i < nx && add_to; i++) dx[b][i] = Q(oldx[i] + dx[b][i]);
            naive_gemm(dw[b], 1, 0, O, N, R, dy, O, x, N, add_to, oldw);
        }
        floatX *d = add_to ? test_x(oldx, nx) : TEST_TAKE(floatX, nx);
        gradX *g = add_to ? test_grad(oldw, nw) : TEST_TAKE(gradX, nw);
        linear_forward(c.y, c.x, c.W, R, O, N);
        add_to ? linear_backward_input_add(d, dyx, c.W, R, O, N)
               : linear_backward_input(d, dyx, c.W, R, O, N);
        linear_backward_weight(g, dyx, c.x, add_to, R, O, N);
        check_close("linear", from_x(c.y, ny), y[0], y[1], ny, 1);
        check_close("linear dx", from_x(d, nx), dx[0], dx[1], nx, 1);
        check_close("linear dW", from_grad(g, nw), dw[0], dw[1], nw, 1);
        if (FP64 && !add_to) {
            check_gradient("linear dx", (double *)d, (double *)c.x, nx, 40, linear_loss, &c);
            check_gradient("linear dW", (double *)g, (double *)c.W, nw, 40, linear_loss, &c);
        }
    }
    test_release("linear");
}
static void test_linear(void) {
    test_linear_shape(5, 7, 3);
    test_linear_shape(1, 1, 1);
    test_linear_shape(70, 33, 130);
    test_linear_shape(0, 6, 5);
    test_group("linear maps, forward and backward");
    static const size_t sizes[] = { 0, 1, 1000, 40000 };
    for (int i = 0; i < 4; i++)
        for (int alias = 0; alias < 3; alias++) {
            size_t n = sizes[i];
            double *a = test_random(n, 1, 0);
            double *b = test_random(n, 1, 0);
            TAKE2(want, n);
            BOTH for (size_t j = 0; j < n; j++) want[test_rounding][j] = Q(a[j] + b[j]);
            floatX *ax = test_x(a, n);
            floatX *bx = test_x(b, n);
            floatX *outs[] = { TEST_TAKE(floatX, n), ax, bx };
            floatX *out = outs[alias];
            add(out, ax, bx, n);
            check_close("add", from_x(out, n), want[0], want[1], n, 1);
        }
    test_group("add");
}

#include "test_attention.h"

#include "test_determinism.h"

// ---- offsets beyond 2^31 elements (I9, 64-bit offsets): sparse mappings of which a few pages are
// touched ----
static void *sparse(size_t bytes) {
    void *p =
        mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) die("cannot map %zu bytes without reserving them|raise ulimit -v", bytes);
    return p;
}
static void test_offsets(void) {
    enum { V = 151936, N = 14200, C = 16384 }; // N*V = 2.16e9, V*C = 2.49e9
    size_t bytes = (size_t)V * N * sizeof(floatX);
    floatX *logits = sparse(bytes);
    int *targets = TEST_TAKE(int, N);
    for (int r = 0; r < N; r++) targets[r] = r == N - 1 ? 5 : -1;
    store(logits + (int64_t)V * (N - 1) + 5, 20);
    double loss = 0;
    double want =
        log(1 + (V - 1) *
                    exp(-20.0)); // a sure row: nothing of the small terms may get lost beside the 1
    cross_entropy(logits, &loss, targets, 1, 0, N, V);
    compare(fabs(loss - want) < 1e-6, "cross entropy beyond 2^31 logits: %g, not %g", loss, want);
    munmap(logits, bytes);

    bytes = (size_t)V * C * sizeof(gradX);
    gradX *dW = sparse(bytes);
    int ids[2] = { V - 1, 3 };
    floatX *x = test_x(test_random(2 * C, 1, 0), 2 * C);
    floatX *out = TEST_TAKE(floatX, 2 * C);
    embed_backward(dW, x, ids, 1, -1, 2, V, C);
    compare((double)dW[(int64_t)(V - 1) * C + C - 1].v == (double)load(x + C - 1) &&
                (double)dW[3 * C].v == (double)load(x + C),
            "embedding gradient beyond 2^31");
    munmap(dW, bytes);
    floatX *W = sparse((size_t)V * C * sizeof(floatX));
    memcpy(W + (int64_t)(V - 1) * C, x, C * sizeof *x);
    embed_forward(out, ids, W, 2, C);
    compare(!memcmp(out, x, C * sizeof *x), "embedding beyond 2^31");
    munmap(W, (size_t)V * C * sizeof(floatX));

    // four rows, 2^30 elements apart: A and C, then B
    const int64_t STRIDE = 1 << 30;
    bytes = (3 * STRIDE + 64) * sizeof(floatX);
    floatX *A = sparse(bytes), *D = sparse(bytes), *I = test_x(test_random(16, 0, 0), 16);
    for (int i = 0; i < 4; i++) {
        store(I + 5 * i, 1);
        for (int j = 0; j < 4; j++) store(A + i * STRIDE + j, (real)(1 + i + 4 * j));
    }
    for (int form = 0; form < 4; form++) {
        int wrong = 0;
        memset(D + 3 * STRIDE, 0xff, 4 * sizeof *D);
        if (form == 0) gemm_xx(0, 0, 4, 4, 4, A, STRIDE, I, 4, 0, D, STRIDE);
        if (form == 1) gemm_parallel_xx(0, 0, 4, 4, 4, A, STRIDE, I, 4, 0, D, STRIDE);
        if (form == 2) gemm_xx(0, 0, 4, 4, 4, I, 4, A, STRIDE, 0, D, STRIDE);
        if (form == 3) gemm_parallel_xx(0, 0, 4, 4, 4, I, 4, A, STRIDE, 0, D, STRIDE);
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 4; j++) wrong += load(D + i * STRIDE + j) != (real)(1 + i + 4 * j);
        compare(!wrong, "product form %d with rows beyond 2^31 elements: %d wrong", form, wrong);
    }
    munmap(A, bytes);
    munmap(D, bytes);
    test_group("offsets beyond 2^31 elements");
}

// ---- device ---------------------------------------------------------------------------------
static void take_pieces(Arena *a, char *p[3]) {
    p[0] = ARENA_TAKE(a, char, 1000, "small");
    p[1] = ARENA_TAKE(a, char, 3 << 20, "large");
    p[2] = ARENA_TAKE(a, char, 1, "small");
}
// What a child that runs f prints to stderr; its exit status in *status.
static void output_of(void (*f)(void), char *text, size_t size, int *status) {
    int ends[2];
    if (pipe(ends)) die("pipe failed|a system limit");
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 2);
#ifdef _OPENMP
        omp_set_num_threads(1); // the runtime's other threads do not exist behind a fork
#endif
        f();
        _exit(0);
    }
    close(ends[1]);
    size_t at = 0;
    for (ssize_t got; at + 1 < size && (got = read(ends[0], text + at, size - 1 - at)) > 0;)
        at += got;
    text[at] = 0;
    close(ends[0]);
    waitpid(child, status, 0);
}
static void commit_too_much(void) {
    Arena a = arena_counting("activations");
    arena_take(&a, device_memory() + ((size_t)1 << 40), "logits");
    arena_take(&a, 1 << 20, "norms");
    arena_commit(&a);
}
static void take_too_much(void) {
    Arena a = arena_counting("scratch");
    arena_take(&a, 256, "one");
    arena_commit(&a);
    arena_take(&a, 257, "one");
}
static void select_nonsense(void) { attention_select("flash"); }
static void test_device(void) {
    compare(!strcmp(device_backend(), "cpu") && device_row_tile() == 1 && device_memory() > 1 << 20,
            "device: name, tile, memory");
    compare(strstr(device_describe(), "GFLOP/s") && strstr(device_describe(), "thread") &&
                device_peak_flops() > 1e7,
            "device: %s", device_describe());
    setenv("OPENBLAS_CORETYPE", "Prescott", 1);
    compare(strstr(device_describe(), "OPENBLAS_CORETYPE=Prescott") != 0,
            "device: the inherited core type is not named: %s", device_describe());
    unsetenv("OPENBLAS_CORETYPE");

    Arena a = arena_counting("test");
    char *p[3], *q[3];
    take_pieces(&a, p);
    size_t counted = a.used;
    compare(!p[0] && !p[1] && a.rows == 2 && a.row[0].bytes == 1024 + 256 &&
                a.row[1].bytes == 3 << 20 && counted == 1280 + (3 << 20),
            "arena: counting");
    arena_commit(&a);
    take_pieces(&a, q);
    int poisoned = 1;
    for (int i = 0; i < 3; i++) {
        compare(q[i] && (uintptr_t)q[i] % 256 == 0, "arena: piece %d is not aligned", i);
#ifdef MOE_DEBUG
        poisoned &= *q[i] == (char)0xff;
#else
        poisoned &= *q[i] == 0;
#endif
    }
    compare(poisoned && a.used == counted && q[1] - q[0] == 1024,
            "arena: contents or places of the pieces");
    device_zero(q[1], 3 << 20);
    device_upload(q[0], "abc", 4);
    device_copy(q[1] + (2 << 20) + 5, q[0], 4);
    char back[4];
    device_download(back, q[1] + (2 << 20) + 5, 4);
    compare(!strcmp(back, "abc") && q[1][0] == 0 && q[1][(3 << 20) - 1] == 0,
            "device: zero and copies");
    arena_free(&a);
    compare(!a.base && !a.used, "arena: free");

    char text[2048];
    int status;
    output_of(commit_too_much, text, sizeof text, &status);
    compare(WIFEXITED(status) && WEXITSTATUS(status) && strstr(text, "activations") &&
                strstr(text, "logits") && strstr(text, "GiB") && strstr(text, "hint:"),
            "arena too large: %s", text);
    output_of(take_too_much, text, sizeof text, &status);
    compare(WIFEXITED(status) && WEXITSTATUS(status) && strstr(text, "scratch"),
            "arena taken beyond its size: %s", text);
    output_of(select_nonsense, text, sizeof text, &status);
    compare(WIFEXITED(status) && WEXITSTATUS(status) && strstr(text, "flash") &&
                strstr(text, "blas"),
            "unknown attention kernel: %s", text);
    test_group("device: report, arenas, copies, errors");
}

int main(void) {
    device_init(0, 0);
    printf("kernels in %s: %s\n", PRECISION_NAME, device_describe());
    test_numbers();
    test_gemm();
    test_ends();
    test_norms();
    test_linear();
    test_attention();
    test_determinism();
    test_offsets();
    test_device();
    device_finish();
    return test_summary();
}
