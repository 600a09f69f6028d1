// Dense products through cuBLASLt. Row-major C (m,n) = op(A) op(B) + beta C; beta 0 (C is never
// read) or 1.
//   op(A) (m,k): A is (m,k), or (k,m) where ta = 1.    op(B) (k,n): B is (k,n), or (n,k) where tb
//   = 1.   Rows of A are lda apart, those of B and C stand without gaps.
// A and B are floatX; C is floatX, or float where c_real = 1. Products are summed in fp32; TF32 is
// never used. m or n = 0: nothing happens. k = 0: C becomes beta C.
#ifndef MOE_CUDA_GEMM_CUH
#define MOE_CUDA_GEMM_CUH
#include "common.cuh"
void gemm(int ta, int tb, int64_t m, int64_t n, int64_t k, const floatX *A, int64_t lda,
          const floatX *B, int beta, void *C, int c_real);
void gemm_init(void);
void gemm_finish(void);
const char *gemm_library(void);
#endif
