// Chooses which attention kernel computes: cuDNN's where this build and this GPU have it, else
// flash (attention.h). The functions attention_... of kernels.h are here.
#include "common.cuh"
#include "attention.h"
#include "experts.cuh"
#if defined(MOE_CUDNN) && defined(MOE_BF16)
#include <stdio.h>
#define CUDNN_OR_FLASH 1
#endif

static int use_cudnn;
#ifdef CUDNN_OR_FLASH
// cuDNN computes whole sequences; documents within one are flash's, which skips what they do not
// see. Said once.
static int cudnn_computes(const int *position) {
    static int said;
    if (use_cudnn && position && !said++)
        fprintf(stderr, "attention: documents within a sequence are computed by the kernel "
                        "\"flash\": cuDNN's graph knows whole sequences only\n");
    return use_cudnn && !position;
}
#endif
void attention_select(const char *name) {
    int automatic = !strcmp(name, "auto");
#ifdef CUDNN_OR_FLASH
    const char *hint = "auto (cudnn), cudnn or flash";
    use_cudnn = automatic || !strcmp(name, "cudnn");
    // without a stream this is a plan on a machine without a GPU
    if (use_cudnn && compute_stream() && !cudnn_attention_start()) {
        if (!automatic)
            die("cuDNN does not start on this GPU|--attention-kernel flash, or a newer driver");
        fprintf(stderr,
                "attention: cuDNN does not start on this GPU; the kernel \"flash\" computes it\n");
        use_cudnn = 0;
    }
#else
#ifndef CUEMU
    int device = 0;
    if (automatic && compute_stream() && !strcmp(experts_kernel(), "wgmma") &&
        cudaGetDevice(&device) == cudaSuccess && device == 0)
        warn("THIS BUILD HAS NO cuDNN: the kernel \"flash\" computes attention, and a layer takes "
             "some 40 %% longer (make detect says where cuDNN is looked for)");
#endif
    const char *hint =
        strcmp(name, "cudnn")
            ? "auto (flash) or flash"
            : "auto or flash; cudnn needs PRECISION=bf16 and a cuDNN that make found (make detect)";
#endif
    if (!use_cudnn && !automatic && strcmp(name, "flash"))
        die("the CUDA backend of this build has no attention kernel \"%s\"|choose "
            "--attention-kernel %s",
            name, hint);
}
const char *attention_kernel(void) { return use_cudnn ? "cudnn" : "flash"; }
size_t attention_workspace(int64_t B, int64_t T, int64_t H, int64_t KV, int64_t D) {
    size_t bytes = B * T * H * sizeof(float); // delta (B,H,T)
    (void)KV;
    (void)D;
#ifdef CUDNN_OR_FLASH
    size_t other = use_cudnn ? cudnn_attention_workspace(B, T, H, KV, D) : 0;
    if (other > bytes) return other;
#endif
    return bytes;
}
void attention_forward(floatX *o, real *lse, const floatX *q, const floatX *k, const floatX *v,
                       const int *position, void *workspace, int64_t B, int64_t T, int64_t H,
                       int64_t KV, int64_t D) {
    kernel_begin("attention_forward", 2.0 * B * T * T * H * D);
    (void)workspace;
    if (!B || !T) return;
#ifdef CUDNN_OR_FLASH
    if (cudnn_computes(position) &&
        cudnn_attention_forward(o, lse, q, k, v, workspace, B, T, H, KV, D, compute_stream()))
        return;
#endif
    flash_attention_forward(o, lse, q, k, v, position, B, T, H, KV, D);
}
void attention_backward(floatX *dq, floatX *dk, floatX *dv, const floatX *d_o, const floatX *o,
                        const real *lse, const floatX *q, const floatX *k, const floatX *v,
                        const int *position, void *workspace, int64_t B, int64_t T, int64_t H,
                        int64_t KV, int64_t D) {
    kernel_begin("attention_backward", 5.0 * B * T * T * H * D);
    if (!B || !T) return;
#ifdef CUDNN_OR_FLASH
    if (cudnn_computes(position) &&
        cudnn_attention_backward(dq, dk, dv, d_o, o, lse, q, k, v, workspace, B, T, H, KV, D,
                                 compute_stream()))
        return;
#endif
    flash_attention_backward(dq, dk, dv, d_o, o, lse, q, k, v, position, (float *)workspace, B, T,
                             H, KV, D);
}
void attention_finish(void) {
#ifdef CUDNN_OR_FLASH
    cudnn_attention_finish();
#endif
}
