// Matrix products on CPUs. C (m,n) = op(A) op(B) + beta C, everything row-major.
//   op(A) (m,k): A is (m,k) with row stride lda, or (k,m) where ta = 1.    op(B) (k,n): B is (k,n),
//   or (n,k) where tb = 1. beta is 0 (C is never read: it may hold NaN) or 1.  m, n, k may be 0; k
//   = 0 leaves beta C.
// One BLAS thread per call with OpenMP around the calls beats threads inside BLAS on the shapes of
// a MoE by a quarter: gemm, gemm_x and gemm_xx run on the calling thread and are meant to be called
// from parallel loops; gemm_parallel_* are such loops. With MOE_BLAS the products are
// cblas_?gemm's; without, those of the packed kernel in gemm.c.
#ifndef MOE_CPU_GEMM_H
#define MOE_CPU_GEMM_H
#include "math.h"
MOE_BEGIN_C
// reals, one thread
void gemm(int ta, int tb, int64_t m, int64_t n, int64_t k, const real *A, int64_t lda,
          const real *B, int64_t ldb, real beta, real *C, int64_t ldc);
// floatX operands, real result, one thread. fp32, fp64: gemm itself. bf16: panels are widened to
// fp32 scratch, blocks of 256 x 512 x 512.
void gemm_x(int ta, int tb, int64_t m, int64_t n, int64_t k, const floatX *A, int64_t lda,
            const floatX *B, int64_t ldb, real beta, real *C, int64_t ldc);
// The same with the result rounded once to floatX (beta = 1: C is added before the rounding).
void gemm_xx(int ta, int tb, int64_t m, int64_t n, int64_t k, const floatX *A, int64_t lda,
             const floatX *B, int64_t ldb, real beta, floatX *C, int64_t ldc);
// All threads: C is cut into tiles whose size depends on m, n, k alone (I8), each computed by one
// thread. Not from parallel loops.
void gemm_parallel_x(int ta, int tb, int64_t m, int64_t n, int64_t k, const floatX *A, int64_t lda,
                     const floatX *B, int64_t ldb, real beta, real *C, int64_t ldc);
void gemm_parallel_xx(int ta, int tb, int64_t m, int64_t n, int64_t k, const floatX *A, int64_t lda,
                      const floatX *B, int64_t ldb, real beta, floatX *C, int64_t ldc);
// One BLAS thread from now on, whatever the environment says; the library's name and core type
// ("OpenBLAS 0.3.21 SkylakeX") for the report.
void gemm_init(void);
const char *gemm_library(void);
MOE_END_C
#endif
