// Attention exists twice: attention_cudnn.c (cuDNN's own kernels, in bf16 builds where make found
// cuDNN) and attention_flash.cu: the readable one, the fp32 one, the emulated one, and the one for
// shapes that cuDNN has no plan for. The functions of kernels.h are in attention.cu and choose.
#ifndef MOE_CUDA_ATTENTION_CUH
#define MOE_CUDA_ATTENTION_CUH
#include "common.cuh"

// As kernels.h's, B and T not 0; D is 16, 32, 64 or 128, any other dies. delta (B,H,T): workspace.
// STREAM_COMPUTE.
void flash_attention_forward(floatX *o, real *lse, const floatX *q, const floatX *k,
                             const floatX *v, int B, int T, int H, int KV, int D);
void flash_attention_backward(floatX *dq, floatX *dk, floatX *dv, const floatX *d_o,
                              const floatX *o, const real *lse, const floatX *q, const floatX *k,
                              const floatX *v, float *delta, int B, int T, int H, int KV, int D);
#endif
