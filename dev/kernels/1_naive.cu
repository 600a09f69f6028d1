// Rung 1, naive: one thread computes gate and up of one element, as the formula says. The truth for
// the other rungs.
//
// What limits it: every multiply-add needs two numbers from memory and keeps nothing. A thread
// reads one row of the pool and two rows of W1, 6 C bytes for 4 C FLOPs; the threads of a warp
// share the pool's row and read 32 rows of weights side by side, each load a sector of 32 bytes for
// 2 that are wanted (the L1 cache keeps the others for the next steps, while it can). Roofline:
// 0.67 FLOP a byte of cache traffic. 132 multiprocessors x 128 bytes a cycle give at most 20
// TFLOP/s; with 32 sectors a load, an eighth of that or less. Expected: 0.1 to 0.3 % of the tensor
// cores' 989 TFLOP/s.
#include "ladder.h"

static __global__ void naive_kernel(floatX *H, floatX *A, const floatX *pool, const floatX *W1,
                                    RowIndex plan, int C, int F) {
    int f = blockIdx.y * blockDim.x + threadIdx.x;
    int m = blockIdx.x;
    if (f >= F || m >= plan.expert_row[plan.E]) return;
    int token = plan.row_token[m];
    const floatX *x = pool + (int64_t)token * C;
    const floatX *gate_row = W1 + ((int64_t)expert_of(plan, m) * 2 * F + f) * C;
    const floatX *up_row = gate_row + (int64_t)F * C;
    float gate = 0;
    float up = 0;
    for (int k = 0; token >= 0 && k < C; k++) {
        gate += load(x + k) * load(gate_row + k);
        up += load(x + k) * load(up_row + k);
    }
    store_gate_up(H, A, m, f, F, gate, up);
}
void up_naive(floatX *H, floatX *A, const floatX *pool, const floatX *W1, const RowIndex *plan,
              int C, int F) {
    naive_kernel<<<dim3((unsigned)plan->M, (unsigned)div_up(F, 128)), 128, 0, compute_stream()>>>(
        H, A, pool, W1, *plan, C, F);
    LAUNCHED();
}
