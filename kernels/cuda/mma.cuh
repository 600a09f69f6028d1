// Tensor-core fragments for both precisions. A warp multiplies 16 x 16 by 16 x 8 tiles, acc (16 x
// 8, fp32) += a b, with operands in registers. Lane 4 g + t holds
//   of a    rows g and g + 8, columns 2t, 2t + 1, 2t + 8 and 2t + 9
//   of b    rows (k) 2t, 2t + 1, 2t + 8 and 2t + 9 of column g
//   of acc  (g, 2t), (g, 2t + 1), (g + 8, 2t) and (g + 8, 2t + 1)
// In bf16 builds that is mma.sync.m16n8k16 (sm_80 and newer), with fragments read from shared
// memory by ldmatrix; fp32 builds multiply the same distribution by shuffles and FFMA, for
// validation, so one kernel source serves both. Two neighbouring accumulator tiles, rounded, are
// the left operand of the next product (pack_a): probabilities go from one product to the next
// without leaving their registers.
//
// Shared tiles have rows of `ld` elements, a multiple of 16 bytes and an odd multiple of it modulo
// 128 bytes: then the eight rows of an ldmatrix fall into different banks.
#ifndef MOE_CUDA_MMA_CUH
#define MOE_CUDA_MMA_CUH
#include "common.cuh"
#include "ptx.h"

// 32-bit registers of a fragment: 4 and 2 (bf16), 8 and 4 (fp32).
enum { FRAGMENT_A = 2 * sizeof(floatX), FRAGMENT_B = sizeof(floatX) };
struct FragmentA {
    uint32_t r[FRAGMENT_A];
};
struct FragmentB {
    uint32_t r[FRAGMENT_B];
};

// Tile row `row`, column `col`; TRANSPOSED: the tile holds the transpose, element (i, k) of the
// operand stands at row k, column i.
static __device__ __forceinline__ const floatX *tile_at(const floatX *tile, int ld, int row,
                                                        int col) {
    return tile + row * ld + col;
}

#if defined(MOE_BF16)
// a: rows [row, row+16), k [k, k+16) of the operand.
template <bool TRANSPOSED>
static __device__ __forceinline__ void load_a(FragmentA &a, const floatX *tile, int ld, int row,
                                              int k) {
    int lane = threadIdx.x % 32;
    if (TRANSPOSED)
        ptx_ldmatrix_x4_trans(
            a.r, tile_at(tile, ld, k + lane % 8 + lane / 16 * 8, row + lane / 8 % 2 * 8));
    else
        ptx_ldmatrix_x4(a.r, tile_at(tile, ld, row + lane % 16, k + lane / 16 * 8));
}
// b: columns [col, col+16) as two fragments, k [k, k+16). Not TRANSPOSED: the tile is (n, k), as a
// weight (out, in) is; TRANSPOSED: (k, n).
template <bool TRANSPOSED>
static __device__ __forceinline__ void load_b(FragmentB (&b)[2], const floatX *tile, int ld,
                                              int col, int k) {
    int lane = threadIdx.x % 32;
    uint32_t r[4];
    if (TRANSPOSED)
        ptx_ldmatrix_x4_trans(r, tile_at(tile, ld, k + lane % 16, col + lane / 16 * 8));
    else
        ptx_ldmatrix_x4(r, tile_at(tile, ld, col + lane % 8 + lane / 16 * 8, k + lane / 8 % 2 * 8));
    b[0].r[0] = r[0];
    b[0].r[1] = r[1];
    b[1].r[0] = r[2];
    b[1].r[1] = r[3];
}
static __device__ __forceinline__ uint32_t pack_two(float low, float high) {
    __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &two, 4);
    return bits;
}
static __device__ __forceinline__ void pack_a(FragmentA &a, const float (&left)[4],
                                              const float (&right)[4]) {
    a.r[0] = pack_two(left[0], left[1]);
    a.r[1] = pack_two(left[2], left[3]);
    a.r[2] = pack_two(right[0], right[1]);
    a.r[3] = pack_two(right[2], right[3]);
}
static __device__ __forceinline__ void multiply(float (&acc)[4], const FragmentA &a,
                                                const FragmentB &b) {
    ptx_mma_m16n8k16_bf16(acc, a.r, b.r, acc);
}
#else
template <bool TRANSPOSED>
static __device__ __forceinline__ uint32_t tile_word(const floatX *tile, int ld, int row, int k) {
    return __float_as_uint(TRANSPOSED ? tile_at(tile, ld, k, row)->v
                                      : tile_at(tile, ld, row, k)->v);
}
template <bool TRANSPOSED>
static __device__ __forceinline__ void load_a(FragmentA &a, const floatX *tile, int ld, int row,
                                              int k) {
    int g = threadIdx.x % 32 / 4;
    int t = threadIdx.x % 4;
    for (int i = 0; i < 8; i++)
        a.r[i] =
            tile_word<TRANSPOSED>(tile, ld, row + g + i / 2 % 2 * 8, k + 2 * t + i % 2 + i / 4 * 8);
}
template <bool TRANSPOSED>
static __device__ __forceinline__ void load_b(FragmentB (&b)[2], const floatX *tile, int ld,
                                              int col, int k) {
    int g = threadIdx.x % 32 / 4;
    int t = threadIdx.x % 4;
    for (int i = 0; i < 8; i++)
        b[i / 4].r[i % 4] =
            tile_word<TRANSPOSED>(tile, ld, col + g + i / 4 * 8, k + 2 * t + i % 2 + i / 2 % 2 * 8);
}
static __device__ __forceinline__ void pack_a(FragmentA &a, const float (&left)[4],
                                              const float (&right)[4]) {
    for (int i = 0; i < 4; i++) {
        a.r[i] = __float_as_uint(left[i]);
        a.r[4 + i] = __float_as_uint(right[i]);
    }
}
static __device__ __forceinline__ void multiply(float (&acc)[4], const FragmentA &a,
                                                const FragmentB &b) {
    ptx_mma_m16n8k16_f32(acc, a.r, b.r, acc);
}
#endif
// acc[j] += a b for N (even) neighbouring column tiles, the j-th at column col + 8 j.
template <int N, bool TRANSPOSED>
static __device__ __forceinline__ void multiply_row(float (&acc)[N][4], const FragmentA &a,
                                                    const floatX *tile, int ld, int col, int k) {
#pragma unroll
    for (int j = 0; j < N; j += 2) {
        FragmentB b[2];
        load_b<TRANSPOSED>(b, tile, ld, col + 8 * j, k);
        multiply(acc[j], a, b[0]);
        multiply(acc[j + 1], a, b[1]);
    }
}

// ---- copies to shared memory ----------------------------------------------------------------
// 16 bytes, asynchronously; valid = false writes zeros and does not read.
static __device__ __forceinline__ void copy_pack(floatX *shared, const floatX *global, bool valid) {
    ptx_cp_async_16(shared, global, valid ? 16 : 0);
}
#endif
