// Rung 3, tensor cores: the same tiles, 128 rows x 64 elements (128 columns), multiplied by
// mma.sync m16n8k16 instead of FFMA.
//
// What is new: tiles stay bf16 in shared memory, rows of 64 k padded by 16 bytes so that the eight
// rows of an ldmatrix fall into different banks. A warp multiplies 64 x 32 of the tile: one
// instruction is 4,096 multiply-adds, 128 a lane. A warp takes 16 gate columns and the 16 up
// columns of the same elements, so SwiGLU stays in the thread. Why faster: 16 times the
// multiply-adds a cycle, half the bytes in shared memory, loads of 16 bytes. What limits it:
// nothing overlaps. A block loads, waits, multiplies, waits; only the second block of the
// multiprocessor fills the gaps. Roofline: mma.sync reaches about 60 % of what wgmma does on
// Hopper. Expected, with loads in the open: 15 to 25 % of 989 TFLOP/s.
#include "ladder.h"
#include "../../kernels/cuda/mma.cuh"

enum { ROWS = 128, STEP = 64, LD = STEP + PACK };
static __global__ void __launch_bounds__(256, 2)
    mma_kernel(floatX *H, floatX *A, const floatX *pool, const floatX *W1, RowIndex plan, int C,
               int F) {
    __shared__ __align__(16) floatX x[ROWS * LD], w[ROWS * LD];
    int m0 = blockIdx.x * ROWS;
    int f0 = blockIdx.y * 64;
    int warp = threadIdx.x / 32;
    if (m0 >= plan.expert_row[plan.E]) return;
    const floatX *weights = W1 + (int64_t)expert_of(plan, m0) * 2 * F * C;
    const int4 zeros = make_int4(0, 0, 0, 0);
    int rows = warp / 4 * 64;
    int columns = warp % 4 * 16; // of this warp; gate at `columns`, up at 64 + columns
    float acc[4][4][4] = {};     // [16 rows][8 columns: two of gate, two of up][fragment]
    for (int k0 = 0; k0 < C; k0 += STEP) {
        for (int i = threadIdx.x; i < ROWS * STEP / PACK; i += 256) {
            int row = i / (STEP / PACK);
            int k = i % (STEP / PACK) * PACK;
            int token = plan.row_token[m0 + row];
            int f = f0 + row % 64;
            *(int4 *)&x[row * LD + k] = token >= 0 && k0 + k < C
                                            ? *(const int4 *)(pool + (int64_t)token * C + k0 + k)
                                            : zeros;
            *(int4 *)&w[row * LD + k] =
                f < F && k0 + k < C
                    ? *(const int4 *)(weights + ((int64_t)(row / 64) * F + f) * C + k0 + k)
                    : zeros;
        }
        __syncthreads();
        for (int k = 0; k < STEP; k += 16) {
            FragmentB b[2][2];
            for (int half = 0; half < 2; half++)
                load_b<false>(b[half], w, LD, half * 64 + columns, k);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                FragmentA a;
                load_a<false>(a, x, LD, rows + 16 * i, k);
#pragma unroll
                for (int j = 0; j < 4; j++) multiply(acc[i][j], a, b[j / 2][j % 2]);
            }
        }
        __syncthreads();
    }
    int g = threadIdx.x % 32 / 4;
    int t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int l = 0; l < 4; l++) {
                int f = f0 + columns + 8 * j + 2 * t + l % 2;
                if (f < F)
                    store_gate_up(H, A, m0 + rows + 16 * i + g + 8 * (l / 2), f, F, acc[i][j][l],
                                  acc[i][j + 2][l]);
            }
}
void up_mma(floatX *H, floatX *A, const floatX *pool, const floatX *W1, const RowIndex *plan, int C,
            int F) {
    mma_kernel<<<dim3((unsigned)(plan->M / ROWS), (unsigned)div_up(F, 64)), 256, 0,
                 compute_stream()>>>(H, A, pool, W1, *plan, C, F);
    LAUNCHED();
}
