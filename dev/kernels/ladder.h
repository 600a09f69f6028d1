// The ladder: one product of the program, the experts' up-projection, written five times from the
// obvious to what ships. Every rung computes
//   H (M,2F) = pool[row_token] W1^T = [gate | up],   A (M,F) = silu(gate) up          (experts_up
//   of kernels/kernels.h, bf16)
// for the rows that `plan` has in use; padding rows (row_token -1) come out as zeros. Widths are
// multiples of 8.
#ifndef MOE_LADDER_H
#define MOE_LADDER_H
#include "../../kernels/cuda/experts.cuh"
#if !defined(MOE_BF16)
#error "the ladder is in bf16: make ladder"
#endif
typedef void Rung(floatX *H, floatX *A, const floatX *pool, const floatX *W1, const RowIndex *plan,
                  int C, int F);
Rung up_naive, up_tiles, up_mma, up_wgmma, up_production;

// The expert of row m, which is in use.
static __device__ __forceinline__ int expert_of(const RowIndex &plan, int m) {
    int e = 0;
    while (plan.expert_row[e + 1] <= m) e++;
    return e;
}
// H and A of one element from its two sums; A from the rounded H.
static __device__ __forceinline__ void store_gate_up(floatX *H, floatX *A, int64_t m, int f, int F,
                                                     float gate, float up) {
    store(H + m * 2 * F + f, gate);
    store(H + m * 2 * F + F + f, up);
    gate = round_x(gate);
    store(A + m * F + f, gate * sigmoid(gate) * round_x(up));
}
#endif
