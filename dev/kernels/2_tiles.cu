// Rung 2, tiles: a block computes 64 rows x 32 elements (gate and up: 64 columns) and shares what
// it reads.
//
// What is new: 16 of k at a time, the block's 64 rows of the pool and 64 rows of weights go to
// shared memory once (as fp32, k across the rows, so that neighbours lie in neighbouring banks) and
// are used 64 times each; a thread keeps 4 rows x 2 elements x 2 sums in registers and uses what it
// loads from shared memory 4 times. Why faster: traffic from the caches falls by 64, uncoalesced
// loads are gone, and the multiply-adds become the limit. Roofline: FFMA on ordinary cores, 67
// TFLOP/s = 7 % of the tensor cores. 8 loads from shared memory for 16 multiply-adds halve that.
// Expected: 2 to 3 %.
#include "ladder.h"

enum { ROWS = 64, ELEMENTS = 32, STEP = 16 };
static __global__ void __launch_bounds__(256)
    tiles_kernel(floatX *H, floatX *A, const floatX *pool, const floatX *W1, RowIndex plan, int C,
                 int F) {
    __shared__ float x[STEP][ROWS + 1], w[STEP][2 * ELEMENTS + 1];
    int m0 = blockIdx.x * ROWS;
    int f0 = blockIdx.y * ELEMENTS;
    if (m0 >= plan.expert_row[plan.E]) return;
    const floatX *weights =
        W1 + (int64_t)expert_of(plan, m0) * 2 * F *
                 C; // rows of an expert are padded to 128: a tile has one expert
    int r = threadIdx.x / 16 * 4;
    int c = threadIdx.x % 16; // this thread: rows r..r+3, elements c and c + 16
    float sum[4][4] = {};     // columns: gate c, gate c + 16, up c, up c + 16
    for (int k0 = 0; k0 < C; k0 += STEP) {
        for (int i = threadIdx.x; i < ROWS * STEP; i += 256) {
            int row = i / STEP;
            int k = i % STEP;
            int token = plan.row_token[m0 + row];
            int f = f0 + row % ELEMENTS;
            x[k][row] = token >= 0 && k0 + k < C ? load(pool + (int64_t)token * C + k0 + k) : 0;
            w[k][row] = f < F && k0 + k < C
                            ? load(weights + ((int64_t)(row / ELEMENTS) * F + f) * C + k0 + k)
                            : 0;
        }
        __syncthreads();
        for (int k = 0; k < STEP; k++)
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) sum[i][j] += x[k][r + i] * w[k][c + 16 * j];
        __syncthreads();
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++)
            if (f0 + c + 16 * j < F)
                store_gate_up(H, A, m0 + r + i, f0 + c + 16 * j, F, sum[i][j], sum[i][j + 2]);
}
void up_tiles(floatX *H, floatX *A, const floatX *pool, const floatX *W1, const RowIndex *plan,
              int C, int F) {
    tiles_kernel<<<dim3((unsigned)(plan->M / ROWS), (unsigned)div_up(F, ELEMENTS)), 256, 0,
                   compute_stream()>>>(H, A, pool, W1, *plan, C, F);
    LAUNCHED();
}
