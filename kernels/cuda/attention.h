// Attention exists twice: attention_cudnn.c (cuDNN's own kernels, in bf16 builds where make found
// cuDNN) and attention_flash.cu: the readable one, the fp32 one, the emulated one, and the one for
// shapes that cuDNN has no plan for. The functions of kernels.h are in attention.cu and choose.
#ifndef MOE_CUDA_ATTENTION_H
#define MOE_CUDA_ATTENTION_H
#include "../kernels.h"
#include <cuda_runtime_api.h>
MOE_BEGIN_C
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

// ---- cuDNN, in builds with MOE_CUDNN. attention.cu asks here first, and flash where cuDNN has no
// plan ----
// attention_forward and attention_backward of kernels.h on `stream`, B and T above 0; workspace:
// cudnn_attention_workspace() bytes. 0: cuDNN has no deterministic plan (I8, deterministic) for the
// shape on this GPU; the outputs are to be computed otherwise, and one line on stderr has said so.
// A plan that exists and fails ends the run.
int cudnn_attention_forward(floatX *o, real *lse, const floatX *q, const floatX *k, const floatX *v,
                            void *workspace, int B, int T, int H, int KV, int D,
                            cudaStream_t stream);
int cudnn_attention_backward(floatX *dq, floatX *dk, floatX *dv, const floatX *d_o, const floatX *o,
                             const real *lse, const floatX *q, const floatX *k, const floatX *v,
                             void *workspace, int B, int T, int H, int KV, int D,
                             cudaStream_t stream);
// A bound that depends on the shape alone, so that --plan needs no GPU; an engine that wants more
// is not taken.
size_t cudnn_attention_workspace(int B, int T, int H, int KV, int D);
// Loads cuDNN onto the GPU: before the arenas look at what is free. 0 where it does not start. The
// functions above do it where nobody has.
int cudnn_attention_start(void);
void cudnn_attention_finish(void);
extern int64_t cudnn_attention_chunk; // backward runs in calls that need about so many bytes beside
                                      // the tensors (576 MiB); tests make it small
// Without a GPU: how many engine configurations cuDNN has for the graph on the GPU that `device`
// describes (JSON: kernels/test_cudnn.c; `major` begins its compute capability), 0 where none would
// be taken; *why then names what refused it. *workspace: bytes of the one that would be taken.
int cudnn_attention_check(const char *device, int major, int backward, int B, int T, int H, int KV,
                          int D, int64_t *workspace, const char **why);
MOE_END_C
#endif
