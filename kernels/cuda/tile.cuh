// One block computes a 128 x 128 tile of a product: acc = the sum over k of a(m,k) b(n,k). It has 8
// warps, 2 x 4 of them, each with 64 x 32 of the tile: 4 x 4 mma tiles in 64 accumulator registers.
// Operands come through a ring of STAGES shared buffers filled by cp.async, 64 bytes of k at a
// time.
//
// An operand is a row-major matrix in memory, read in one of two ways:
//   rows along the tile  (weights, activations forward)  the tile's 128 rows are matrix rows, and k
//                                                        runs along them
//   TRANSPOSED           (weight gradients, dX)          k runs over matrix rows, and the tile's
//   128
//                                                        columns are matrix columns
// Its rows may go through an index: the gather through row_token costs one more load and no copy.
// -1 and everything outside reads as zeros.
//
// Per k step a tile moves 2 x 128 x 64 bytes for 2 x 128 x 128 x 32 FLOPs (bf16): 64 FLOPs a byte
// of traffic from the L2 cache, the price of 128 x 128 tiles without clusters. Shared memory: 80
// KB, so two blocks a multiprocessor on sm_80 and sm_90, and one computes while the other stores.
#ifndef MOE_CUDA_TILE_CUH
#define MOE_CUDA_TILE_CUH
#include "mma.cuh"

enum { TILE = 128, TILE_THREADS = 256, STEP = 4 * PACK, STAGES = 4 };
// Elements between rows of shared tiles, odd multiples of 16 bytes (mma.cuh).
enum { LD_ROWS = STEP + PACK, LD_TRANSPOSED = TILE + PACK, LD_OUT = TILE + PACK };
enum { TILE_BLOCKS = sizeof(floatX) == 2 ? 2 : 1 }; // a multiprocessor; fp32 needs the registers
enum { OPERAND_SIZE = TILE * LD_ROWS > STEP *LD_TRANSPOSED ? TILE *LD_ROWS : STEP *LD_TRANSPOSED };
static const size_t TILE_SHARED = (size_t)STAGES * 2 * OPERAND_SIZE * sizeof(floatX);

struct Operand {
    const floatX *base;
    const int *index; // matrix row of logical row r is index[r]; 0: r itself
    int64_t ld;       // elements between matrix rows
    int rows, cols;   // logical rows; columns
    int fold; // not 0: logical rows come in two halves of the tile: 64 rows from `first` on, and
              // the 64 that stand `fold` rows later
};
typedef float Accumulator[4][4][4]; // [16 rows][8 columns][mma fragment] of the warp's part

static __device__ __forceinline__ int warp_row() { return threadIdx.x / 32 / 4 * 64; }
// First column of the warp's j-th 8 columns. FOLD: two from each half of the tile, so that a thread
// holds gate and up of the same elements.
template <bool FOLD> static __device__ __forceinline__ int warp_column(int j) {
    int w = threadIdx.x / 32 % 4;
    return FOLD ? j / 2 * 64 + w * 16 + j % 2 * 8 : w * 32 + j * 8;
}
// Where logical row r of the operand stands; -1: zeros.
static __device__ __forceinline__ int64_t source_row(const Operand &o, int r) {
    if (r >= o.rows) return -1;
    return o.index ? o.index[r] : r;
}
static __device__ __forceinline__ int64_t source_row_of_tile(const Operand &o, int first, int i) {
    if (!o.fold) return source_row(o, first + i);
    int64_t r = source_row(o, first + i % 64);
    return r < 0 || i < 64 ? r : r + o.fold;
}
// A thread copies two packs of an operand's tile a step. offset: rows along the tile stay the same
// for all steps.
template <bool TRANSPOSED>
static __device__ __forceinline__ void load_start(int64_t (&offset)[2], const Operand &o,
                                                  int first) {
    for (int i = 0; i < 2 && !TRANSPOSED; i++) {
        int64_t r = source_row_of_tile(o, first, (threadIdx.x + i * TILE_THREADS) / (STEP / PACK));
        offset[i] = r < 0 ? -1 : r * o.ld;
    }
}
template <bool TRANSPOSED>
static __device__ __forceinline__ void load_step(floatX *tile, const int64_t (&offset)[2],
                                                 const Operand &o, int first, int k) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int PER_ROW = TRANSPOSED ? TILE / PACK : STEP / PACK;
        int id = threadIdx.x + i * TILE_THREADS;
        int row = id / PER_ROW;
        int column = id % PER_ROW * PACK;
        int at = (TRANSPOSED ? first : k) + column;
        int64_t from = offset[i];
        if (TRANSPOSED) {
            int64_t r = source_row(o, k + row);
            from = r < 0 ? -1 : r * o.ld;
        }
        bool valid = from >= 0 && at < o.cols;
        copy_pack(tile + row * (TRANSPOSED ? LD_TRANSPOSED : LD_ROWS) + column,
                  valid ? o.base + from + at : o.base, valid);
    }
}
// acc of the tile at (first_a, first_b), k from k0 to k1 (a multiple of PACK apart where k runs
// along rows). `shared`: TILE_SHARED bytes. Ends with a barrier.
template <bool TRANSPOSED_A, bool TRANSPOSED_B, bool FOLD>
static __device__ __forceinline__ void tile_product(Accumulator &acc, floatX *shared,
                                                    const Operand &a, const Operand &b, int first_a,
                                                    int first_b, int k0, int k1) {
    int steps = (k1 - k0 + STEP - 1) / STEP;
    int64_t offset_a[2] = { 0, 0 };
    int64_t offset_b[2] = { 0, 0 };
    load_start<TRANSPOSED_A>(offset_a, a, first_a);
    load_start<TRANSPOSED_B>(offset_b, b, first_b);
#pragma unroll
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++)
            for (int l = 0; l < 4; l++) acc[i][j][l] = 0;
    auto load = [&](int step) {
        floatX *stage = shared + step % STAGES * 2 * OPERAND_SIZE;
        if (step < steps) {
            load_step<TRANSPOSED_A>(stage, offset_a, a, first_a, k0 + step * STEP);
            load_step<TRANSPOSED_B>(stage + OPERAND_SIZE, offset_b, b, first_b, k0 + step * STEP);
        }
        ptx_cp_async_commit(); // one group a step, empty ones too: the count below stays right
    };
    for (int step = 0; step < STAGES - 1; step++) load(step);
    for (int step = 0; step < steps; step++) {
        ptx_cp_async_wait<STAGES - 2>(); // this thread's part of `step` has arrived,
        __syncthreads(); // everybody's has, and nobody reads the stage that is filled next
        load(step + STAGES - 1);
        const floatX *tile_a = shared + step % STAGES * 2 * OPERAND_SIZE;
        const floatX *tile_b = tile_a + OPERAND_SIZE;
#pragma unroll
        for (int k = 0; k < STEP; k += 16) {
            FragmentA fragment[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                load_a<TRANSPOSED_A>(fragment[i], tile_a, TRANSPOSED_A ? LD_TRANSPOSED : LD_ROWS,
                                     warp_row() + 16 * i, k);
#pragma unroll
            for (int j = 0; j < 4; j += 2) {
                FragmentB column[2];
                load_b<TRANSPOSED_B>(column, tile_b, TRANSPOSED_B ? LD_TRANSPOSED : LD_ROWS,
                                     warp_column<FOLD>(j), k);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    multiply(acc[i][j], fragment[i], column[0]);
                    multiply(acc[i][j + 1], fragment[i], column[1]);
                }
            }
        }
    }
    ptx_cp_async_wait<0>();
    __syncthreads();
}
// Calls f(i, j, l, row, column) for this thread's accumulators, pairs of neighbouring columns: l =
// 0 (row g) and 2 (row g + 8).
template <bool FOLD, class F> static __device__ __forceinline__ void for_pairs(F f) {
    int g = threadIdx.x % 32 / 4;
    int t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int l = 0; l < 4; l += 2)
#pragma unroll
            for (int j = 0; j < 4; j++)
                f(i, j, l, warp_row() + 16 * i + g + 4 * l, warp_column<FOLD>(j) + 2 * t);
}
// Rounded tiles leave through shared memory, 16 bytes a thread: out[row][column] = tile[row][from +
// column] for `columns` columns that are inside.
static __device__ __forceinline__ void store_tile(floatX *out, int64_t ld, int columns,
                                                  const floatX *tile, int from, int width) {
    int per_row = width / PACK;
    for (int id = threadIdx.x; id < TILE * per_row; id += TILE_THREADS) {
        int row = id / per_row;
        int column = id % per_row * PACK;
        if (column < columns)
            *(int4 *)(out + row * ld + column) =
                *(const int4 *)(tile + row * LD_OUT + from + column);
    }
}
#endif
