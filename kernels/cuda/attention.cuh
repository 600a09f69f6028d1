// Attention exists twice: attention_cudnn.c (cuDNN's own kernels, in bf16 builds where make found
// cuDNN) and attention_flash.cu: the readable one, the fp32 one, the emulated one, and the one for
// shapes that cuDNN has no plan for. The functions of kernels.h are in attention.cu and choose.
#ifndef MOE_CUDA_ATTENTION_CUH
#define MOE_CUDA_ATTENTION_CUH
#include "common.cuh"

// Returns which kernel computes whole sequences: "cudnn" or "flash".
const char *attention_kernel(void);
// attention_forward and attention_backward of kernels.h for B and T above 0. Dies unless D is 16,
// 32, 64 or 128. delta (B,H,T) is scratch.
void flash_attention_forward(floatX *o, real *lse, const floatX *q, const floatX *k,
                             const floatX *v, const int *position, int64_t B, int64_t T, int64_t H,
                             int64_t KV, int64_t D);
void flash_attention_backward(floatX *dq, floatX *dk, floatX *dv, const floatX *d_o,
                              const floatX *o, const real *lse, const floatX *q, const floatX *k,
                              const floatX *v, const int *position, float *delta, int64_t B,
                              int64_t T, int64_t H, int64_t KV, int64_t D);
#endif
