// Matrix products on CPUs: C (m,n) = op(A) op(B) + beta C, everything row-major.
//   op(A) (m,k)   A is (m,k) with row stride lda, or (k,m) where ta = 1
//   op(B) (k,n)   B is (k,n), or (n,k) where tb = 1
//   beta          0 (C is never read: it may hold NaN) or 1
// m, n and k may be 0; k = 0 leaves beta C. One BLAS thread for each call with OpenMP around the
// calls beats threads inside BLAS on the shapes of a mixture of experts by a quarter: gemm, gemm_x
// and gemm_xx run on the calling thread and are meant to be called from parallel loops;
// gemm_parallel_* are such loops. With MOE_BLAS the products are cblas_?gemm's; without, those of
// the packed kernel in gemm.c.
#ifndef MOE_CPU_GEMM_H
#define MOE_CPU_GEMM_H
#include "math.h"
MOE_BEGIN_C
// Multiplies reals on the calling thread.
void gemm(int ta, int tb, int64_t m, int64_t n, int64_t k, const real *A, int64_t lda,
          const real *B, int64_t ldb, real beta, real *C, int64_t ldc);
// Multiplies floatX operands into reals on the calling thread. fp32 and fp64 builds: gemm itself.
// bf16 builds: panels are packed (or widened to fp32) in blocks of 256 x 512 x 512.
void gemm_x(int ta, int tb, int64_t m, int64_t n, int64_t k, const floatX *A, int64_t lda,
            const floatX *B, int64_t ldb, real beta, real *C, int64_t ldc);
// Does the same and rounds the result once to floatX (beta = 1: C is added before the rounding).
void gemm_xx(int ta, int tb, int64_t m, int64_t n, int64_t k, const floatX *A, int64_t lda,
             const floatX *B, int64_t ldb, real beta, floatX *C, int64_t ldc);
// Multiply on all threads: C is cut into tiles whose size depends on m, n, k alone (I8,
// deterministic), each computed by one thread. Not to be called from parallel loops.
void gemm_parallel_x(int ta, int tb, int64_t m, int64_t n, int64_t k, const floatX *A, int64_t lda,
                     const floatX *B, int64_t ldb, real beta, real *C, int64_t ldc);
void gemm_parallel_xx(int ta, int tb, int64_t m, int64_t n, int64_t k, const floatX *A, int64_t lda,
                      const floatX *B, int64_t ldb, real beta, floatX *C, int64_t ldc);
// Returns the side lengths of those tiles in *tile_m and *tile_n.
void gemm_tile(int64_t m, int64_t n, int64_t k, int64_t *tile_m, int64_t *tile_n);
// ---- bf16 by the processor's own instructions: gemm_bf16.c ----------------------------------
typedef enum { GEMM_WIDENED, GEMM_AVX512, GEMM_AMX } GemmBf16;
// Returns what this processor multiplies bf16 by; GEMM_WIDENED: nothing but fp32 products.
GemmBf16 gemm_bf16_kind(void);
// Return the elements of packed panels of op(A) (m,k) and op(B) (k,n).
size_t gemm_bf16_a_size(int64_t m, int64_t k);
size_t gemm_bf16_b_size(int64_t n, int64_t k);
// Return k rounded up to what a panel holds.
int64_t gemm_bf16_padded(int64_t k);
// Packs `lines` rows of op(A) (is_a = 1) or columns of op(B). lines_first = 1: X holds k
// consecutive numbers of each line (A is (m,k), B is (n,k)); 0: a row of X has one k of all lines.
void gemm_bf16_pack(uint16_t *out, const uint16_t *X, int64_t ld, int lines_first, int64_t lines,
                    int64_t k, int is_a);
// Multiplies two packed panels: C (m,n) = a b + beta C with beta 0 or 1; where X is given, that is
// rounded to bf16 in X, and C is not written. kind is not GEMM_WIDENED.
void gemm_bf16(GemmBf16 kind, float *C, int64_t ldc, uint16_t *X, int64_t ldx, const uint16_t *a,
               const uint16_t *b, int64_t m, int64_t n, int64_t k, int beta);
// Sets BLAS to one thread, whatever the environment says.
void gemm_init(void);
// Returns the library's name and core type ("OpenBLAS 0.3.21, core SkylakeX") for the report.
const char *gemm_library(void);
MOE_END_C
#endif
