// Dense products through cuBLASLt (linear.cu).
#ifndef MOE_CUDA_GEMM_CUH
#define MOE_CUDA_GEMM_CUH
#include "common.cuh"
// Computes C (m,n) = op(A) op(B) + beta C, all row-major; beta is 0 (C is never read) or 1.
//   op(A) (m,k): A is (m,k), or (k,m) where ta = 1; its rows are lda apart
//   op(B) (k,n): B is (k,n), or (n,k) where tb = 1; its rows and those of C stand without gaps
// A and B are floatX; C is floatX, or float where c_real = 1. Products are summed in fp32, and TF32
// is never used. Does nothing if m or n is 0; for k = 0, C becomes beta C.
void gemm(int ta, int tb, int64_t m, int64_t n, int64_t k, const floatX *A, int64_t lda,
          const floatX *B, int beta, void *C, int c_real);
void gemm_init(void);
void gemm_finish(void);
const char *gemm_library(void);
#endif
