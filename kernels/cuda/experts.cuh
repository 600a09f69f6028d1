// The experts' products exist twice: experts.cu (mma.sync: every card since sm_80, both precisions)
// and experts_hopper.cu (TMA and wgmma: sm_90a, bf16). The functions of kernels.h are in experts.cu
// and choose; the results differ by the order of sums within a product only, and each is the same
// for any number of multiprocessors.
#ifndef MOE_CUDA_EXPERTS_CUH
#define MOE_CUDA_EXPERTS_CUH
#include "common.cuh"

// Chooses the kernel "mma", "wgmma", or with "auto" wgmma where the card and this build have it;
// "auto" or the environment's MOE_EXPERT_KERNEL holds at the start. Returns false, and changes
// nothing, where they do not have it; dies on any other name.
bool experts_select(const char *name);
// Returns what computes: "mma" or "wgmma".
const char *experts_kernel(void);
// Leaves this many multiprocessors (0 at the start) to communication that runs beside persistent
// kernels, which use at least one. device_share calls it; the environment's MOE_EXPERT_LEAVE takes
// the place of its number.
void experts_leave(int multiprocessors);

// ---- experts_hopper.cu, in bf16 builds: M and E are not 0, widths are multiples of PACK -----
// Tells whether the card has compute capability 9.x and this build has code for sm_90a.
bool hopper_available();
void hopper_leave(int multiprocessors);
// Returns how many blocks share `tiles` where `left` multiprocessors are left to communication.
int64_t hopper_blocks(int64_t tiles, int multiprocessors, int left);
// Chooses how gathered stages are published (hopper.cuh).
void hopper_publish(bool copies);
void hopper_up(floatX *H, floatX *A, const floatX *pool, const floatX *W1, const RowIndex *plan,
               int64_t C, int64_t F);
void hopper_down(floatX *Y, const floatX *A, const floatX *W2, const RowIndex *plan, int64_t C,
                 int64_t F);
// partial (M, div_up(F, 128)) or 0: shares of <g, A>; row_score (M): the score of each row's slot.
void hopper_down_backward(floatX *dH, floatX *sA, float *partial, const floatX *dpool,
                          const floatX *H, const floatX *W2, const float *row_score,
                          const RowIndex *plan, int64_t C, int64_t F);
void hopper_up_backward(floatX *dX, const floatX *dH, const floatX *W1, const RowIndex *plan,
                        int64_t C, int64_t F);
void hopper_wgrad(gradX *dW1, gradX *dW2, const floatX *pool, const floatX *dpool, const floatX *dH,
                  const floatX *sA, const RowIndex *plan, int accumulate, int64_t C, int64_t F);

// 1 / (1 + e^-x); in bf16 builds by the multifunction unit alone: its error, some 1e-6 of the
// value, is a thousandth of the rounding that follows.
static __device__ __forceinline__ float sigmoid(float x) {
    return sizeof(floatX) == 2 ? __fdividef(1, 1 + __expf(-x)) : 1 / (1 + expf(-x));
}
// The backward of a = silu(gate) up for dA = score g. silu(x) = x s with s = 1/(1 + e^-x) and s' =
// s (1 - s), so d silu/dx = s + x s (1 - s) = s (1 + x (1 - s)), and
//   dgate = dA up s (1 + gate (1 - s)),  dup = dA gate s.
// One element: gate and up become dgate and dup, a becomes score a, and dot takes its share of
// <g, a> with the a that forward rounded and stored.
static __device__ __forceinline__ void swiglu_backward(float &gate, float &up, float &a, float &dot,
                                                       float g, float score) {
    float s = sigmoid(gate);
    float dA = score * g;
    float x = gate;
    float act = round_x(x * s * up);
    dot += g * act;
    a = score * act;
    gate = dA * up * s * (1 + x * (1 - s));
    up = dA * x * s;
}
#endif
