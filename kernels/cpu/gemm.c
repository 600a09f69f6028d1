// Matrix products: OpenBLAS or an own packed kernel on one thread, bf16 panels around it, tiles of
// the output spread over threads.
#include "gemm.h"
#include "../fail.h"
#include <stdio.h>

static void clear(real *C, int64_t ldc, int64_t m, int64_t n) {
    for (int64_t i = 0; i < m; i++) memset(C + i * ldc, 0, n * sizeof(real));
}

#if defined(MOE_BLAS)
// ---- BLAS -----------------------------------------------------------------------------------
#include <cblas.h>
// OpenBLAS's own calls, absent in other libraries that offer cblas_?gemm.
extern void openblas_set_num_threads(int) __attribute__((weak));
extern char *openblas_get_corename(void) __attribute__((weak));
extern char *openblas_get_config(void) __attribute__((weak));

void gemm_init(void) {
    gemm_bf16_kind();
    if (openblas_set_num_threads) openblas_set_num_threads(1);
}
const char *gemm_library(void) {
    static char text[96];
    if (!openblas_get_config || !openblas_get_corename) return "cblas";
    // The first two words of "OpenBLAS 0.3.21 NO_LAPACKE DYNAMIC_ARCH ...".
    char name[48] = "OpenBLAS";
    const char *config = openblas_get_config();
    const char *end = strchr(config, ' ');
    if (end) end = strchr(end + 1, ' ');
    if (end && end - config < (int)sizeof name)
        snprintf(name, sizeof name, "%.*s", (int)(end - config), config);
    snprintf(text, sizeof text, "%s, core %s", name, openblas_get_corename());
    return text;
}
void gemm(int ta, int tb, int64_t m, int64_t n, int64_t k, const real *A, int64_t lda,
          const real *B, int64_t ldb, real beta, real *C, int64_t ldc) {
    if (m == 0 || n == 0) return;
    if (k == 0) {
        if (beta == 0) clear(C, ldc, m, n);
        return;
    }
    // A reference BLAS multiplies C by beta even where beta is 0; OpenBLAS and the standard do not
    // read C then.
    CBLAS_TRANSPOSE transpose_a = ta ? CblasTrans : CblasNoTrans;
    CBLAS_TRANSPOSE transpose_b = tb ? CblasTrans : CblasNoTrans;
#if defined(MOE_FP64)
    cblas_dgemm(CblasRowMajor, transpose_a, transpose_b, (int)m, (int)n, (int)k, 1, A, (int)lda, B,
                (int)ldb, beta, C, (int)ldc);
#else
    cblas_sgemm(CblasRowMajor, transpose_a, transpose_b, (int)m, (int)n, (int)k, 1, A, (int)lda, B,
                (int)ldb, beta, C, (int)ldc);
#endif
}
#else
// ---- own kernel -----------------------------------------------------------------------------
// The five loops of Goto and van de Geijn: B is packed into strips of NR columns (KC x NC of it
// stays in the last cache level), A into strips of MR rows (MC x KC stays in the second level); the
// micro-kernel keeps MR x NR of C in registers and streams both strips. Vectors are the compiler's
// (GCC and clang vector extension), as wide as the target has them; edges are padded with zeros in
// the packs.
#if defined(__AVX512F__)
enum { VECTOR_BYTES = 64, MR = 12 };
#elif defined(__AVX__)
enum { VECTOR_BYTES = 32, MR = 6 };
#elif defined(__aarch64__)
enum { VECTOR_BYTES = 16, MR = 12 };
#else
enum { VECTOR_BYTES = 16, MR = 6 };
#endif
typedef real Vector __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real))));
enum {
    LANES = VECTOR_BYTES / sizeof(real),
    NR = 2 * LANES,
    MC = 16 * MR,
    KC = 256,
    NC = 2048 / NR * NR
};

void gemm_init(void) { gemm_bf16_kind(); }
const char *gemm_library(void) { return "own matrix product, no BLAS"; }

static const real *at(const real *A, int64_t lda, int transposed, int64_t row, int64_t column) {
    return A + (transposed ? column * lda + row : row * lda + column);
}
// Strips of `width` rows of op(A) (or columns of op(B), handed over transposed):
// out[strip][p][width].
static void pack(real *out, const real *A, int64_t lda, int transposed, int rows, int64_t k,
                 int width) {
    for (int64_t i0 = 0; i0 < rows; i0 += width) {
        int64_t w = lesser(width, rows - i0);
        if (w < width) memset(out, 0, width * k * sizeof(real));
        if (transposed)
            for (int64_t p = 0; p < k; p++)
                for (int64_t i = 0; i < w; i++) out[p * width + i] = A[p * lda + i0 + i];
        else
            for (int64_t i = 0; i < w; i++)
                for (int64_t p = 0; p < k; p++) out[p * width + i] = A[(i0 + i) * lda + p];
        out += width * k;
    }
}
// c (MR,NR) = a b over k, both packed; the two vectors of each row of c are separate variables of
// the loop so that they live in registers.
static void micro_kernel(real *c, const real *a, const real *b, int64_t k) {
    Vector c0[MR], c1[MR];
    for (int64_t i = 0; i < MR; i++) c0[i] = c1[i] = (Vector){ 0 };
    for (int64_t p = 0; p < k; p++, a += MR, b += NR) {
        Vector b0 = *(const Vector *)b;
        Vector b1 = *(const Vector *)(b + LANES);
#pragma GCC unroll 12
        for (int64_t i = 0; i < MR; i++) {
            c0[i] += a[i] * b0;
            c1[i] += a[i] * b1;
        }
    }
    for (int64_t i = 0; i < MR; i++) {
        *(Vector *)(c + i * NR) = c0[i];
        *(Vector *)(c + i * NR + LANES) = c1[i];
    }
}
void gemm(int ta, int tb, int64_t m, int64_t n, int64_t k, const real *A, int64_t lda,
          const real *B, int64_t ldb, real beta, real *C, int64_t ldc) {
    if (m == 0 || n == 0) return;
    if (beta == 0) clear(C, ldc, m, n);
    int64_t kc = lesser(KC, k);
    int64_t nc = div_up(lesser(NC, n), NR) * NR;
    real *packed_b = SCRATCH(SCRATCH_PACK, real, kc * (nc + MC));
    real *packed_a = packed_b + kc * nc;
    for (int64_t j0 = 0; j0 < n; j0 += NC)
        for (int64_t p0 = 0; p0 < k; p0 += KC) {
            int64_t nj = lesser(NC, n - j0);
            int64_t kp = lesser(KC, k - p0);
            pack(packed_b, at(B, ldb, tb, p0, j0), ldb, !tb, nj, kp, NR);
            for (int64_t i0 = 0; i0 < m; i0 += MC) {
                int64_t mi = lesser(MC, m - i0);
                pack(packed_a, at(A, lda, ta, i0, p0), lda, ta, mi, kp, MR);
                for (int64_t j = 0; j < nj; j += NR)
                    for (int64_t i = 0; i < mi; i += MR) {
                        real c[MR * NR];
                        micro_kernel(c, packed_a + i * kp, packed_b + j * kp, kp);
                        int64_t rows = lesser(MR, mi - i);
                        int64_t columns = lesser(NR, nj - j);
                        real *out = C + (i0 + i) * ldc + j0 + j;
                        for (int64_t r = 0; r < rows; r++)
                            for (int64_t s = 0; s < columns; s++) out[r * ldc + s] += c[r * NR + s];
                    }
            }
        }
}
#endif

// ---- floatX operands ------------------------------------------------------------------------
#if defined(MOE_BF16)
enum { BLOCK_M = 256, BLOCK_N = 512, BLOCK_K = 512 };

static void widen(real *out, const floatX *A, int64_t lda, int transposed, int64_t row,
                  int64_t column, int64_t rows, int64_t columns) {
    const floatX *from = A + (transposed ? column * lda + row : row * lda + column);
    int64_t lines = transposed ? columns : rows;
    int64_t length = transposed ? rows : columns;
    for (int64_t i = 0; i < lines; i++) load_row(out + i * length, from + i * lda, length);
}
// real result in C, or floatX result in X
static void gemm_blocks(int ta, int tb, int64_t m, int64_t n, int64_t k, const floatX *A,
                        int64_t lda, const floatX *B, int64_t ldb, real beta, real *C, floatX *X,
                        int64_t ldc) {
    size_t a_size = (size_t)BLOCK_M * BLOCK_K;
    size_t b_size = (size_t)BLOCK_K * BLOCK_N;
    size_t c_size = X ? (size_t)BLOCK_M * BLOCK_N : 0;
    real *a = SCRATCH(SCRATCH_PANEL, real, a_size + b_size + c_size);
    real *b = a + a_size;
    real *c = b + b_size;
    GemmBf16 kind = gemm_bf16_kind();
    uint16_t *packed_a = (uint16_t *)a; // packed panels are smaller than widened ones
    uint16_t *packed_b = (uint16_t *)b;
    for (int64_t j = 0; j < n; j += BLOCK_N)
        for (int64_t i = 0; i < m; i += BLOCK_M) {
            int64_t mi = lesser(BLOCK_M, m - i);
            int64_t nj = lesser(BLOCK_N, n - j);
            real *out = X ? c : C + i * ldc + j;
            int64_t ldo = X ? nj : ldc;
            if (X && beta != 0)
                for (int64_t r = 0; r < mi; r++) load_row(c + r * nj, X + (i + r) * ldc + j, nj);
            if (beta == 0 && k == 0) clear(out, ldo, mi, nj);
            for (int64_t p = 0; p < k; p += BLOCK_K) {
                int64_t kp = lesser(BLOCK_K, k - p);
                real add = p == 0 ? beta : 1;
                int fresh = i == 0 || k > BLOCK_K; // one k block: b stays for all i
                if (kind == GEMM_WIDENED) {
                    widen(a, A, lda, ta, i, p, mi, kp);
                    if (fresh) widen(b, B, ldb, tb, p, j, kp, nj);
                    int64_t a_width = ta ? mi : kp;
                    int64_t b_width = tb ? kp : nj;
                    gemm(ta, tb, mi, nj, kp, a, a_width, b, b_width, add, out, ldo);
                    continue;
                }
                gemm_bf16_pack(packed_a, &A[ta ? p * lda + i : i * lda + p].bits, lda, !ta, mi, kp,
                               1);
                if (fresh)
                    gemm_bf16_pack(packed_b, &B[tb ? j * ldb + p : p * ldb + j].bits, ldb, tb, nj,
                                   kp, 0);
                int last = X && p + kp == k;
                gemm_bf16(kind, out, ldo, last ? &X[i * ldc + j].bits : 0, ldc, packed_a, packed_b,
                          mi, nj, kp, add != 0);
            }
            if (X && (kind == GEMM_WIDENED || k == 0))
                for (int64_t r = 0; r < mi; r++) store_row(X + (i + r) * ldc + j, c + r * nj, nj);
        }
}
void gemm_x(int ta, int tb, int64_t m, int64_t n, int64_t k, const floatX *A, int64_t lda,
            const floatX *B, int64_t ldb, real beta, real *C, int64_t ldc) {
    gemm_blocks(ta, tb, m, n, k, A, lda, B, ldb, beta, C, 0, ldc);
}
void gemm_xx(int ta, int tb, int64_t m, int64_t n, int64_t k, const floatX *A, int64_t lda,
             const floatX *B, int64_t ldb, real beta, floatX *C, int64_t ldc) {
    gemm_blocks(ta, tb, m, n, k, A, lda, B, ldb, beta, 0, C, ldc);
}
#else
void gemm_x(int ta, int tb, int64_t m, int64_t n, int64_t k, const floatX *A, int64_t lda,
            const floatX *B, int64_t ldb, real beta, real *C, int64_t ldc) {
    gemm(ta, tb, m, n, k, &A->v, lda, &B->v, ldb, beta, C, ldc);
}
void gemm_xx(int ta, int tb, int64_t m, int64_t n, int64_t k, const floatX *A, int64_t lda,
             const floatX *B, int64_t ldb, real beta, floatX *C, int64_t ldc) {
    gemm(ta, tb, m, n, k, &A->v, lda, &B->v, ldb, beta, &C->v, ldc);
}
#endif

// ---- all threads ----------------------------------------------------------------------------
// Large tiles amortise packing, small ones feed many threads. Sides below 256 cost a tenth of the
// speed or more (both kernels, AVX2), so 512 x 512 is halved, the longer side first, down to 256
// while there are fewer than 16 tiles, and down to 128 only where there are fewer than 4.
enum { TILE_LARGE = 512, TILE_MEDIUM = 256, TILE_SMALL = 128, TILES_WANTED = 16, TILES_NEEDED = 4 };
static const double TILE_MIN_FLOP = 2e6; // some 20 microseconds: less is not worth handing out

// Multiples of 16 keep the micro-kernels' edges rare.
static int64_t halved(int64_t side) { return div_up(div_up(side, 2), 16) * 16; }
void gemm_tile(int64_t m, int64_t n, int64_t k, int64_t *tile_m, int64_t *tile_n) {
    int64_t tm = lesser(TILE_LARGE, m > 0 ? m : 1);
    int64_t tn = lesser(TILE_LARGE, n > 0 ? n : 1);
    for (;;) {
        int64_t tiles = div_up(m, tm) * div_up(n, tn);
        int64_t side = tm >= tn ? tm : tn;
        int64_t least = TILE_LARGE;
        if (tiles < TILES_WANTED) least = TILE_MEDIUM;
        if (tiles < TILES_NEEDED) least = TILE_SMALL;
        if (side <= least || 1.0 * tm * tn * k < TILE_MIN_FLOP) break;
        if (tm >= tn)
            tm = halved(tm);
        else
            tn = halved(tn);
    }
    *tile_m = tm;
    *tile_n = tn;
}
static void gemm_parallel(int ta, int tb, int64_t m, int64_t n, int64_t k, const floatX *A,
                          int64_t lda, const floatX *B, int64_t ldb, real beta, real *C, floatX *X,
                          int64_t ldc) {
    int64_t tm, tn;
    gemm_tile(m, n, k, &tm, &tn);
    int64_t rows = div_up(m, tm);
    int64_t columns = div_up(n, tn);
    OMP(parallel for schedule(dynamic, 1) if (rows * columns > 1))
    for (int64_t t = 0; t < rows * columns; t++) {
        int64_t i = t % rows * tm;
        int64_t j = t / rows * tn;
        int64_t mi = lesser(tm, m - i);
        int64_t nj = lesser(tn, n - j);
        const floatX *a = A + (ta ? i : i * lda);
        const floatX *b = B + (tb ? j * ldb : j);
        if (X)
            gemm_xx(ta, tb, mi, nj, k, a, lda, b, ldb, beta, X + i * ldc + j, ldc);
        else
            gemm_x(ta, tb, mi, nj, k, a, lda, b, ldb, beta, C + i * ldc + j, ldc);
    }
}
void gemm_parallel_x(int ta, int tb, int64_t m, int64_t n, int64_t k, const floatX *A, int64_t lda,
                     const floatX *B, int64_t ldb, real beta, real *C, int64_t ldc) {
    gemm_parallel(ta, tb, m, n, k, A, lda, B, ldb, beta, C, 0, ldc);
}
void gemm_parallel_xx(int ta, int tb, int64_t m, int64_t n, int64_t k, const floatX *A, int64_t lda,
                      const floatX *B, int64_t ldb, real beta, floatX *C, int64_t ldc) {
    gemm_parallel(ta, tb, m, n, k, A, lda, B, ldb, beta, 0, C, ldc);
}
