// Rung 4, Hopper's instructions in their simplest form: a warpgroup multiplies 64 rows x 128
// elements (256 columns) by wgmma, straight from shared memory.
//
// What is new: operands lie in 128-byte rows in the 128-byte swizzle (kernels/cuda/hopper.cuh) and
// no thread loads fragments: wgmma reads both from shared memory. One thread asks TMA for 64 k of
// the weights: one box of two layers, 128 gate rows and the 128 up rows of the same elements. TMA
// cannot gather, so the 128 threads copy the pool's rows themselves; fence.proxy.async shows
// ordinary stores to wgmma. Why faster: an instruction is 64 x 256 x 16 multiply-adds, and the
// tensor cores' full rate is open only to wgmma. What limits it: still nothing overlaps within a
// block; loads are hidden only by the other two blocks of the multiprocessor, and the results leave
// two bytes at a time. Roofline: 51 FLOPs a byte of L2 traffic x some 6 TB/s: 300 TFLOP/s.
// Expected: 20 to 30 % of 989.
#include "ladder.h"
#include "../../kernels/cuda/hopper.cuh"

struct Tile {
    char x[BLOCK_BYTES], w[4 * BLOCK_BYTES];
    uint64_t arrived;
};
static __global__ void __launch_bounds__(128)
    wgmma_kernel(floatX *H, floatX *A, const floatX *pool, const __grid_constant__ CUtensorMap W1,
                 RowIndex plan, int C, int F) {
#ifdef HOPPER_CODE
    extern __shared__ __align__(1024) char shared[];
    Tile *tile = (Tile *)shared;
    int m0 = blockIdx.x * 64;
    int f0 = blockIdx.y * 128;
    int chunk = threadIdx.x % 8;
    if (m0 >= plan.expert_row[plan.E]) return;
    int e = expert_of(plan, m0);
    const int4 zeros = make_int4(0, 0, 0, 0);
    if (threadIdx.x == 0) {
        ptx_mbar_init(&tile->arrived, 1);
        ptx_fence_mbar_init();
    }
    __syncthreads();
    float acc[128]; // gate: 0..63, up: 64..127
    for (int i = 0; i < 128; i++) acc[i] = 0;
    for (int k0 = 0, phase = 0; k0 < C; k0 += K_STEP, phase ^= 1) {
        if (threadIdx.x == 0) {
            ptx_mbar_arrive_expect_tx(&tile->arrived, sizeof tile->w);
            ptx_tma_load_3d(tile->w, &W1, &tile->arrived, k0, f0, 2 * e);
        }
        for (int row = threadIdx.x / 8; row < 64; row += 16) {
            int token = plan.row_token[m0 + row];
            int k = k0 + chunk * PACK;
            *(int4 *)chunk_at(tile->x, row, chunk) =
                token >= 0 && k < C ? *(const int4 *)(pool + (int64_t)token * C + k) : zeros;
        }
        ptx_fence_proxy_async();
        __syncthreads();
        ptx_mbar_wait(&tile->arrived, phase);
        ptx_wgmma_hold(acc);
        ptx_wgmma_fence();
        for (int k = 0; k < 4; k++)
            ptx_wgmma<256>(acc, ptx_wgmma_desc(tile->x + 32 * k, LBO_K_MAJOR, 1024, 128),
                           ptx_wgmma_desc(tile->w + 32 * k, LBO_K_MAJOR, 1024, 128), 1);
        ptx_wgmma_commit();
        ptx_wgmma_wait<0>();
        ptx_wgmma_hold(acc);
        __syncthreads(); // nobody reads the tile any more
    }
    int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    int t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 64; i++) {
        int f = f0 + i / 4 * 8 + 2 * t + i % 2;
        if (f < F) store_gate_up(H, A, m0 + row + i / 2 % 2 * 8, f, F, acc[i], acc[64 + i]);
    }
#endif
}
void up_wgmma(floatX *H, floatX *A, const floatX *pool, const floatX *W1, const RowIndex *plan,
              int C, int F) {
    CUtensorMap map = tensor_map(
        W1, 3, { { C, F, 2 * plan->E }, { 1, C, (int64_t)F * C }, { 64, 128, 2 } }, false);
    CUDA_CHECK(cudaFuncSetAttribute(wgmma_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    (int)sizeof(Tile)));
    wgmma_kernel<<<dim3((unsigned)(plan->M / 64), (unsigned)div_up(F, 128)), 128, sizeof(Tile),
                   compute_stream()>>>(H, A, pool, map, *plan, C, F);
    LAUNCHED();
}
