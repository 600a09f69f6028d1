// The experts' products on Hopper: the mathematics of experts.cu by TMA and wgmma, for bf16 builds.
// The functions hopper_... of experts.cuh are here; hopper.cuh has the machinery. Persistent blocks
// of three warpgroups walk over tiles of 128 rows:
//
//   warpgroup 0, producers             shared memory             warpgroups 1 and 2, consumers:
//                                                                64 rows each
//   one thread: weights by TMA ---->   [ A | B ] stage 0 --full--> wgmma m64nNk16, A and B from
//   all: rows of the pool, by          [ A | B ] stage 1           shared memory, sums in registers
//   cp.async through row_token         [ A | B ] stage 2 <-empty-    |
//   (TMA cannot gather here);                                        v  SwiGLU, its backward or
//   they load the next tile while      [ out ] [ out ] <----------  nothing: bf16 or fp32 blocks
//   the consumers write this one          |       |
//                                         v       v   TMA stores, beside the next tile's products
//
// mbarriers carry all order between the roles. `full` counts the bytes of TMA and, where rows are
// gathered, the 128 producers; `empty` counts the 8 consumer warps.
//
//                 tile        k     A               B                       results
//   up            128 x 256   C     gathered rows   W1: gate, up in a box   H, A = silu(gate) up
//   down          128 x 256   F     A               W2                      Y
//   down_backward 128 x 128   C     gathered rows   W2, MN-major            dH, score A, dscore
//   up_backward   128 x 256   2F    dH              W1, MN-major            dX
//   wgrad         128 x 256   rows  one operand by TMA, one gathered,       dW1, dW2 in fp32:
//                                   both MN-major                           stored, or added by TMA
// down_backward also takes H, by TMA, and leaves dscore in shares, one a column tile.
//
// A stage feeds 128 x N x 64 multiply-adds from (128 + N) x 128 bytes: 128 N / (128 + N) FLOPs a
// byte, 85 at N = 256 and 64 at N = 128. Without clusters all of these bytes come from the L2
// cache. So N is 256, the most a wgmma takes (128 registers), in three stages of 48 KB with 32 KB
// of results a warpgroup. down_backward has three results and an input beside its products: 48 KB a
// warpgroup leave room for N = 128.
//
// W1 keeps its Hugging Face order. Seen as (2E, F, C), the box of expert e has two layers, gate
// rows and up rows, each cut off at F, and an accumulator pair of one thread is gate and up of one
// element. Tiles of the same rows are neighbours, so blocks that run together share rows and
// weights in the L2 cache. Which block computes a tile changes nothing in it: the bits are the same
// on any number of multiprocessors. Sizes stay on the device (I11, the host does not wait).
#include "experts.cuh"
#if defined(MOE_BF16)
#include "hopper.cuh"
#include <stdlib.h>

typedef Shared<256, 3, 4> Wide;   // 208 KB
typedef Shared<128, 4, 6> Narrow; // 224 KB
static_assert(sizeof(Wide) <= 232448 && sizeof(Narrow) <= 232448,
              "a block has 227 KB of shared memory");

// ---- tiles ----------------------------------------------------------------------------------
// Calls f(first row, column tile) for this block's tiles of 128 rows x a column tile, ascending.
// The steps of gridDim.x tiles are taken in (row tile, column tile) without a division.
template <class F>
static __device__ __forceinline__ void for_row_tiles(const RowIndex &plan, int column_tiles, F f) {
    int rows = plan.expert_row[plan.E] / 128;
    int row = blockIdx.x / column_tiles;
    int column = blockIdx.x % column_tiles;
    int row_step = gridDim.x / column_tiles;
    int column_step = gridDim.x % column_tiles;
    while (row < rows) {
        f(128 * row, column);
        row += row_step;
        column += column_step;
        if (column < column_tiles) continue;
        column -= column_tiles;
        row++;
    }
}
// Calls f(n0, o0, expert, first row, last row) for this block's tiles of the gradients (E,N,O). A
// tile without rows is zeros (I3, unused is zero), or nothing to add. Steps as above.
template <class F>
static __device__ __forceinline__ void for_weight_tiles(const RowIndex &plan, int N, int O,
                                                        int accumulate, F f) {
    int across = (O + 255) / 256;
    int down = (N + 127) / 128;
    int each = down * across;
    int e = blockIdx.x / each;
    int n = blockIdx.x % each / across;
    int o = blockIdx.x % across;
    int e_step = gridDim.x / each;
    int n_step = gridDim.x % each / across;
    int o_step = gridDim.x % across;
    while (e < plan.E) {
        int first = plan.expert_row[e];
        int last = plan.expert_row[e + 1];
        if (first < last || !accumulate) f(128 * n, 256 * o, e, first, last);
        o += o_step;
        n += n_step;
        e += e_step;
        if (o >= across) {
            o -= across;
            n++;
        }
        if (n >= down) {
            n -= down;
            e++;
        }
    }
}
struct Nothing {
    __device__ void operator()() const {}
};

// ---- producers ------------------------------------------------------------------------------
// Starts the load of B of one stage: K-major in one box, MN-major in a box for each 64 columns.
template <bool B_MN, class S>
static __device__ __forceinline__ void load_b(S *s, int stage, const CUtensorMap *map, int k,
                                              int n0, int layer) {
    const int WIDTH = B_MN ? (int)BLOCK_BYTES : (int)sizeof s->b[0];
    for (int i = 0; i < (int)sizeof s->b[0] / WIDTH; i++)
        ptx_tma_load_3d(s->b[stage] + i * WIDTH, map, &s->full[stage], B_MN ? n0 + 64 * i : k,
                        B_MN ? k : n0, layer);
}
// Ends a stage's copies; returns the stage that is still to be published, or -1.
template <Publish HOW, class S>
static __device__ __forceinline__ int copies_started(S *s, int stage) {
    if (HOW == BY_WAIT) ptx_cp_async_commit();
    if (HOW == BY_COPIES) ptx_cp_async_mbar_arrive_noinc(&s->full[stage]);
    return HOW == BY_WAIT ? stage : -1;
}
// Fills stages with rows of `pool` (K wide) gathered through row_token, and with weights from layer
// `layers` x expert at column tile x `width`. All producers.
template <bool B_MN, Publish HOW, class S>
static __device__ __forceinline__ void produce_gathered(S *s, const floatX *pool,
                                                        const CUtensorMap *weights,
                                                        const RowIndex &plan, int column_tiles,
                                                        int width, int layers, int K) {
    Ring ring = { 0, 0 };
    int started = -1; // the stage whose copies are not yet published
    int e = 0;
    for_row_tiles(plan, column_tiles, [&](int m0, int column) {
        int row[8];
        for (int i = 0; i < 8; i++) row[i] = plan.row_token[m0 + threadIdx.x / 8 + 16 * i];
        while (plan.expert_row[e + 1] <= m0) e++;
        publish(s, started);
        started = -1;
        for (int k = 0; k < K; k += K_STEP) {
            ptx_mbar_wait(&s->empty[ring.stage], ring.phase ^ 1);
            if (threadIdx.x == 0) {
                ptx_mbar_arrive_expect_tx(&s->full[ring.stage], sizeof s->b[0]);
                load_b<B_MN>(s, ring.stage, weights, k, column * width, layers * e);
            }
            publish(s, started);
            gather_block(s->a[ring.stage], pool, row, K, k, K);
            gather_block(s->a[ring.stage] + BLOCK_BYTES, pool, row + 4, K, k, K);
            started = copies_started<HOW>(s, ring.stage);
            advance<S>(ring);
        }
    });
    publish(s, started);
}
// Fills stages with rows in place. One thread.
template <bool B_MN, class S>
static __device__ __forceinline__ void produce_rows(S *s, const CUtensorMap *rows,
                                                    const CUtensorMap *weights,
                                                    const RowIndex &plan, int column_tiles, int K) {
    Ring ring = { 0, 0 };
    int e = 0;
    for_row_tiles(plan, column_tiles, [&](int m0, int column) {
        while (plan.expert_row[e + 1] <= m0) e++;
        for (int k = 0; k < K; k += K_STEP) {
            ptx_mbar_wait(&s->empty[ring.stage], ring.phase ^ 1);
            ptx_mbar_arrive_expect_tx(&s->full[ring.stage], S::STAGE_BYTES);
            ptx_tma_load_2d(s->a[ring.stage], rows, &s->full[ring.stage], k, m0);
            load_b<B_MN>(s, ring.stage, weights, k, column * 256, e);
            advance<S>(ring);
        }
    });
}
// Fills stages with the operands of the gradients, whose k runs over the rows of an expert: one
// comes by TMA in blocks of 64 rows x 64 columns, the other is gathered (GATHER_LEFT: it is A). All
// producers.
template <bool GATHER_LEFT, Publish HOW>
static __device__ __forceinline__ void produce_wgrad(Wide *s, const CUtensorMap *dense,
                                                     const floatX *pool, const RowIndex &plan,
                                                     int N, int O, int accumulate) {
    const int A_BLOCKS = 2;
    const int DENSE = GATHER_LEFT ? Wide::B_BLOCKS : A_BLOCKS;
    const int GATHERED = A_BLOCKS + Wide::B_BLOCKS - DENSE;
    Ring ring = { 0, 0 };
    int started = -1;
    int width = GATHER_LEFT ? N : O;
    for_weight_tiles(plan, N, O, accumulate, [&](int n0, int o0, int, int first, int last) {
        int dense_column = GATHER_LEFT ? o0 : n0;
        int gathered_column = GATHER_LEFT ? n0 : o0;
        int token[4];
        auto tokens = [&](int m0) { // of the next stage: their latency passes under this one
            for (int i = 0; i < 4 && m0 < last; i++)
                token[i] = plan.row_token[m0 + threadIdx.x / 8 + 16 * i];
        };
        tokens(first);
        for (int m0 = first; m0 < last; m0 += K_STEP) {
            char *dense_to = GATHER_LEFT ? s->b[ring.stage] : s->a[ring.stage];
            char *gathered_to = GATHER_LEFT ? s->a[ring.stage] : s->b[ring.stage];
            ptx_mbar_wait(&s->empty[ring.stage], ring.phase ^ 1);
            if (threadIdx.x == 0) {
                ptx_mbar_arrive_expect_tx(&s->full[ring.stage], DENSE * BLOCK_BYTES);
                for (int i = 0; i < DENSE; i++)
                    ptx_tma_load_2d(dense_to + i * BLOCK_BYTES, dense, &s->full[ring.stage],
                                    dense_column + 64 * i, m0);
            }
            publish(s, started);
            for (int i = 0; i < GATHERED; i++)
                gather_block(gathered_to + i * BLOCK_BYTES, pool, token, width,
                             gathered_column + 64 * i, width);
            started = copies_started<HOW>(s, ring.stage);
            tokens(m0 + K_STEP);
            advance<Wide>(ring);
        }
    });
    publish(s, started);
}

// ---- kernels --------------------------------------------------------------------------------
#ifdef HOPPER_CODE
static __device__ __forceinline__ int stages(int k) { return (k + K_STEP - 1) / K_STEP; }
// Rows of H or dH, (M, 2, F): the blocks of 64 gate columns 0 and 1, then those of up.
static __device__ __forceinline__ void store_halves(const CUtensorMap *map, const char *out, int f0,
                                                    int m) {
    for (int i = 0; i < 4; i++)
        ptx_tma_store_3d(map, out + i * BLOCK_BYTES, f0 + i % 2 * 64, i / 2, m);
}
// `blocks` blocks of 64 columns from `column` on.
static __device__ __forceinline__ void store_rows(const CUtensorMap *map, const char *out,
                                                  int blocks, int column, int m) {
    for (int i = 0; i < blocks; i++)
        ptx_tma_store_2d(map, out + i * BLOCK_BYTES, column + 64 * i, m);
}
#endif
template <class... Maps> static __device__ __forceinline__ void prefetch_maps(const Maps *...maps) {
    if (threadIdx.x == 0) (ptx_tma_prefetch_map(maps), ...);
}
// mapH: (M, 2, F); mapA: (M, F), not used where write_A is 0.
template <Publish HOW>
static __global__ void __launch_bounds__(HOPPER_THREADS, 1)
    up_kernel(const __grid_constant__ CUtensorMap mapH, const __grid_constant__ CUtensorMap mapA,
              const __grid_constant__ CUtensorMap mapW1, const floatX *pool, RowIndex plan,
              int write_A, int C, int F) {
#ifdef HOPPER_CODE
    extern __shared__ __align__(1024) char shared[];
    prefetch_maps(&mapH, &mapA, &mapW1);
    int column_tiles = (F + 127) / 128;
    auto produce = [&](Wide *s) {
        produce_gathered<false, HOW>(s, pool, &mapW1, plan, column_tiles, 128, 2, C);
    };
    auto consume = [&](Consumer<Wide> &own) {
        for_row_tiles(plan, column_tiles, [&](int m0, int column) {
            float acc[128]; // gate: 0..63, up: 64..127
            int m = m0 + 64 * own.group;
            int f0 = 128 * column;
            multiply_stages<256, 0, 0, HOW>(acc, own, stages(C), Nothing());
            out_free(own.group, own.first);
            for (int i = 0; i < 4; i++) put_block(own.out + i * BLOCK_BYTES, acc, 32 * i);
            out_written(own.group);
            if (own.first) {
                store_halves(&mapH, own.out, f0, m);
                ptx_bulk_commit();
            }
            if (!write_A) return;
                // A is computed from the rounded H, so that recomputing it from H gives the same
                // bits; H leaves meanwhile.
#pragma unroll
            for (int i = 0; i < 64; i += 2) { // two at a time: one conversion rounds both
                float2 gate = unpack_two(pack_two(acc[i], acc[i + 1]));
                float2 up = unpack_two(pack_two(acc[64 + i], acc[65 + i]));
                acc[i] = gate.x * sigmoid(gate.x) * up.x;
                acc[i + 1] = gate.y * sigmoid(gate.y) * up.y;
            }
            out_free(own.group, own.first);
            for (int i = 0; i < 2; i++) put_block(own.out + i * BLOCK_BYTES, acc, 32 * i);
            out_written(own.group);
            if (own.first) {
                store_rows(&mapA, own.out, 2, f0, m);
                ptx_bulk_commit();
            }
        });
    };
    hopper_roles<Wide>(shared, PRODUCERS + 1, produce, consume);
#endif
}
// out (M,N) = in (M,K) W[e]^T, W (E,N,K); TRANSPOSED: out = in W[e], W (E,K,N).
template <bool TRANSPOSED>
static __global__ void __launch_bounds__(HOPPER_THREADS, 1)
    rows_kernel(const __grid_constant__ CUtensorMap map_out,
                const __grid_constant__ CUtensorMap map_in,
                const __grid_constant__ CUtensorMap mapW, RowIndex plan, int N, int K) {
#ifdef HOPPER_CODE
    extern __shared__ __align__(1024) char shared[];
    prefetch_maps(&map_out, &map_in, &mapW);
    int column_tiles = (N + 255) / 256;
    auto produce = [&](Wide *s) {
        if (threadIdx.x == 0) produce_rows<TRANSPOSED>(s, &map_in, &mapW, plan, column_tiles, K);
    };
    auto consume = [&](Consumer<Wide> &own) {
        for_row_tiles(plan, column_tiles, [&](int m0, int column) {
            float acc[128];
            multiply_stages<256, 0, TRANSPOSED>(acc, own, stages(K), Nothing());
            out_free(own.group, own.first);
            for (int i = 0; i < 4; i++) put_block(own.out + i * BLOCK_BYTES, acc, 32 * i);
            out_written(own.group);
            if (!own.first) return;
            store_rows(&map_out, own.out, 4, 256 * column, m0 + 64 * own.group);
            ptx_bulk_commit();
        });
    };
    hopper_roles<Wide>(shared, 1, produce, consume);
#endif
}
// The blocks of a warpgroup hold gate (0, 1), up (2, 3), which TMA brings during the products and
// dH replaces in place, and score A (4, 5): dH may be H.
template <Publish HOW>
static __global__ void __launch_bounds__(HOPPER_THREADS, 1)
    down_backward_kernel(const __grid_constant__ CUtensorMap map_dH,
                         const __grid_constant__ CUtensorMap map_sA,
                         const __grid_constant__ CUtensorMap mapH,
                         const __grid_constant__ CUtensorMap mapW2, float *partial,
                         const floatX *dpool, const float *row_score, RowIndex plan, int C, int F) {
#ifdef HOPPER_CODE
    extern __shared__ __align__(1024) char shared[];
    prefetch_maps(&map_dH, &map_sA, &mapH, &mapW2);
    int column_tiles = (F + 127) / 128;
    auto produce = [&](Narrow *s) {
        produce_gathered<true, HOW>(s, dpool, &mapW2, plan, column_tiles, 128, 1, C);
    };
    auto consume = [&](Consumer<Narrow> &own) {
        int lane = threadIdx.x % 32;
        int t = lane % 4;
        int row0 = threadIdx.x / 32 % 4 * 16 + lane / 4;
        uint64_t *loaded = &own.s->loaded[own.group];
        uint32_t phase = 0;
        for_row_tiles(plan, column_tiles, [&](int m0, int column) {
            float acc[64], score[2];
            float dot[2] = { 0, 0 };
            bool used[2];
            int m = m0 + 64 * own.group;
            int f0 = 128 * column;
            multiply_stages<128, 0, 1, HOW>(acc, own, stages(C), [&] {
                for (int r = 0; r < 2; r++) {
                    score[r] = row_score[m + row0 + 8 * r];
                    used[r] = plan.row_token[m + row0 + 8 * r] >= 0;
                }
                if (!own.first) return;
                ptx_bulk_wait_read<0>();
                ptx_mbar_arrive_expect_tx(loaded, 4 * BLOCK_BYTES);
                for (int i = 0; i < 4; i++)
                    ptx_tma_load_3d(own.out + i * BLOCK_BYTES, &mapH, loaded, f0 + i % 2 * 64,
                                    i / 2, m);
            });
            ptx_mbar_wait(loaded, phase);
            phase ^= 1;
#pragma unroll
            for (int i = 0; i < 16; i++) // 8 columns: one chunk of the rows
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    char *block = own.out + i / 8 * BLOCK_BYTES;
                    uint32_t *gate_at = (uint32_t *)(chunk_at(block, row0 + 8 * r, i % 8) + 4 * t);
                    uint32_t *up_at = gate_at + 2 * BLOCK_BYTES / 4;
                    uint32_t *sA_at = up_at + 2 * BLOCK_BYTES / 4;
                    float2 gate = unpack_two(used[r] ? *gate_at : 0);
                    float2 up = unpack_two(used[r] ? *up_at : 0);
                    float2 a;
                    swiglu_backward(gate.x, up.x, a.x, dot[r], acc[4 * i + 2 * r], score[r]);
                    swiglu_backward(gate.y, up.y, a.y, dot[r], acc[4 * i + 2 * r + 1], score[r]);
                    *gate_at = pack_two(gate.x, gate.y);
                    *up_at = pack_two(up.x, up.y);
                    *sA_at = pack_two(a.x, a.y);
                }
            for (int r = 0; r < 2; r++) {
                float sum = group_sum(dot[r], 4);
                if (partial && t == 0)
                    partial[(int64_t)(m + row0 + 8 * r) * column_tiles + column] = sum;
            }
            out_written(own.group);
            if (!own.first) return;
            store_halves(&map_dH, own.out, f0, m);
            store_rows(&map_sA, own.out + 4 * BLOCK_BYTES, 2, f0, m);
            ptx_bulk_commit();
        });
    };
    hopper_roles<Narrow>(shared, PRODUCERS + 1, produce, consume);
#endif
}
// dW[e] (N,O) (+)= the sum over the expert's rows m of left[m]^T right[m]; `dense` is the one that
// is not gathered. A tile leaves in two halves of 128 columns, four blocks of 32 floats each. Odd
// rows write 8 columns j ^ 2 where even rows write j: together the eight rows of a store then meet
// each of the 8 chunks of 16 bytes, and so each bank, once.
template <bool GATHER_LEFT, Publish HOW>
static __global__ void __launch_bounds__(HOPPER_THREADS, 1)
    wgrad_kernel(const __grid_constant__ CUtensorMap map_dW,
                 const __grid_constant__ CUtensorMap dense, const floatX *pool, RowIndex plan,
                 int accumulate, int N, int O) {
#ifdef HOPPER_CODE
    extern __shared__ __align__(1024) char shared[];
    prefetch_maps(&map_dW, &dense);
    auto produce = [&](Wide *s) {
        produce_wgrad<GATHER_LEFT, HOW>(s, &dense, pool, plan, N, O, accumulate);
    };
    auto consume = [&](Consumer<Wide> &own) {
        int lane = threadIdx.x % 32;
        int t = lane % 4;
        int row0 = threadIdx.x / 32 % 4 * 16 + lane / 4;
        bool odd = row0 % 2;
        for_weight_tiles(plan, N, O, accumulate, [&](int n0, int o0, int e, int begin, int end) {
            float acc[128];
            multiply_stages<256, 1, 1, HOW>(acc, own, (end - begin) / K_STEP, Nothing());
#pragma unroll
            for (int half = 0; half < 2; half++) {
                out_free(own.group, own.first);
#pragma unroll
                for (int j = 0; j < 16; j++) // 8 columns
#pragma unroll
                    for (int r = 0; r < 2; r++) {
                        int even_i = 64 * half + 4 * j + 2 * r;
                        int odd_i = even_i ^ 8;
                        int column_chunk = (odd ? j ^ 2 : j) % 4 * 2 + t / 2;
                        char *chunk =
                            chunk_at(own.out + j / 4 * BLOCK_BYTES, row0 + 8 * r, column_chunk);
                        // constant indices: acc stays in registers
                        float left = odd ? acc[odd_i] : acc[even_i];
                        float right = odd ? acc[odd_i + 1] : acc[even_i + 1];
                        *(float2 *)(chunk + t % 2 * 8) = make_float2(left, right);
                    }
                out_written(own.group);
                if (!own.first) continue;
                for (int i = 0; i < 4; i++) {
                    const char *block = own.out + i * BLOCK_BYTES;
                    int column = o0 + 128 * half + BLOCK_FLOATS * i;
                    int n = n0 + 64 * own.group;
                    if (accumulate)
                        ptx_tma_add_3d(&map_dW, block, column, n, e);
                    else
                        ptx_tma_store_3d(&map_dW, block, column, n, e);
                }
                ptx_bulk_commit();
            }
        });
    };
    hopper_roles<Wide>(shared, PRODUCERS + 1, produce, consume);
#endif
}

// ---- launches -------------------------------------------------------------------------------
CUtensorMap tensor_map(const void *base, int rank, Dimensions d, bool is_float) {
    typedef CUresult (*Encode)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                               const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                               const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                               CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    static Encode encode; // a function of the driver, asked for here so that the program also
                          // starts where there is no driver
    if (!encode) {
        cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
        CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", (void **)&encode,
                                                    12000, cudaEnableDefault, &found));
#else // the versioned call came with CUDA 12.5
        CUDA_CHECK(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", (void **)&encode,
                                           cudaEnableDefault, &found));
#endif
        if (found != cudaDriverEntryPointSuccess)
            die("the driver has no cuTensorMapEncodeTiled|a driver for CUDA 12.0 or newer, or "
                "MOE_EXPERT_KERNEL=mma");
    }
    CUtensorMap map;
    cuuint64_t dim[3], stride[2];
    cuuint32_t box[3];
    cuuint32_t one[3] = { 1, 1, 1 };
    for (int i = 0; i < rank; i++) {
        dim[i] = (cuuint64_t)d.dim[i];
        box[i] = d.box[i];
        if (i > 0) stride[i - 1] = (cuuint64_t)d.stride[i] * (is_float ? 4 : 2);
    }
    CUresult error =
        encode(&map, is_float ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
               (cuuint32_t)rank, (void *)base, dim, stride, box, one, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (error != CUDA_SUCCESS)
        die("cuTensorMapEncodeTiled refuses (%d) %lld x %lld x %lld at %p|a defect of the program",
            (int)error, (long long)d.dim[0], (long long)d.dim[1],
            rank > 2 ? (long long)d.dim[2] : 1, base);
    return map;
}
static CUtensorMap matrix_map(const floatX *base, int64_t rows, int64_t columns,
                              unsigned box_rows) {
    Dimensions d = { { columns, rows }, { 1, columns }, { 64, box_rows } };
    return tensor_map(base, 2, d, false);
}
static CUtensorMap stack_map(const floatX *base, int64_t layers, int64_t rows, int64_t columns,
                             unsigned box_rows, unsigned box_layers) {
    Dimensions d = { { columns, rows, layers },
                     { 1, columns, rows * columns },
                     { 64, box_rows, box_layers } };
    return tensor_map(base, 3, d, false);
}
static CUtensorMap halves_map(const floatX *H, int64_t M, int64_t F) {
    Dimensions d = { { F, 2, M }, { 1, F, 2 * F }, { 64, 1, 64 } };
    return tensor_map(H, 3, d, false);
}

// How gathered stages are published: the environment's MOE_EXPERT_PUBLISH=copies, or by wait. `make
// gpu-check` times both.
static int publish_by_copies = -1; // -1: not asked yet
void hopper_publish(bool copies) { publish_by_copies = copies; }
template <Publish HOW> struct Publishing { static const Publish value = HOW; };
// Calls f with the chosen way as a type.
template <class F> static void with_publishing(F f) {
    if (publish_by_copies < 0) {
        const char *name = getenv("MOE_EXPERT_PUBLISH");
        publish_by_copies = name && !strcmp(name, "copies");
    }
    if (publish_by_copies)
        f(Publishing<BY_COPIES>());
    else
        f(Publishing<BY_WAIT>());
}
static int left_to_communication;
void hopper_leave(int multiprocessors) { left_to_communication = multiprocessors; }
static int multiprocessors() {
    static int count;
    if (!count) {
        int device;
        CUDA_CHECK(cudaGetDevice(&device));
        CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    }
    return count;
}
// With other ranks a multiprocessor gets up to MOST shares of the tiles, a block each: a block that
// finds it held by communication goes to the next that is free. A share begins and ends with empty
// stages, so it has at least LEAST tiles (of the worst routing; a fraction of them with ep).
int64_t hopper_blocks(int64_t tiles, int multiprocessors, int left) {
    enum { MOST = 4, LEAST = 48 };
    int64_t room = multiprocessors - left > 1 ? multiprocessors - left : 1;
    int64_t shares = 1;
    while (left > 0 && shares < MOST && tiles >= (shares + 1) * LEAST * room) shares++;
    return tiles < shares * room ? tiles : shares * room;
}
// Runs a kernel with shared memory S, of which a multiprocessor holds one block. The kernel is
// opted into it once.
template <class S, auto kernel, class... Arguments>
static void launch(int64_t tiles, const Arguments &...arguments) {
    opt_into_shared<kernel>(sizeof(S));
    int64_t blocks = hopper_blocks(tiles, multiprocessors(), left_to_communication);
    kernel<<<(unsigned)blocks, HOPPER_THREADS, sizeof(S), compute_stream()>>>(arguments...);
    LAUNCHED();
}

void hopper_up(floatX *H, floatX *A, const floatX *pool, const floatX *W1, const RowIndex *plan,
               int64_t C, int64_t F) {
    with_publishing([&](auto how) {
        launch<Wide, up_kernel<decltype(how)::value>>(
            plan->M / 128 * div_up(F, 128), halves_map(H, plan->M, F),
            matrix_map(A ? A : H, plan->M, F, 64), stack_map(W1, 2 * plan->E, F, C, 128, 2), pool,
            *plan, A != 0, C, F);
    });
}
void hopper_down(floatX *Y, const floatX *A, const floatX *W2, const RowIndex *plan, int64_t C,
                 int64_t F) {
    launch<Wide, rows_kernel<false>>(plan->M / 128 * div_up(C, 256), matrix_map(Y, plan->M, C, 64),
                                     matrix_map(A, plan->M, F, 128),
                                     stack_map(W2, plan->E, C, F, 256, 1), *plan, C, F);
}
void hopper_down_backward(floatX *dH, floatX *sA, float *partial, const floatX *dpool,
                          const floatX *H, const floatX *W2, const float *row_score,
                          const RowIndex *plan, int64_t C, int64_t F) {
    with_publishing([&](auto how) {
        launch<Narrow, down_backward_kernel<decltype(how)::value>>(
            plan->M / 128 * div_up(F, 128), halves_map(dH, plan->M, F),
            matrix_map(sA, plan->M, F, 64), halves_map(H, plan->M, F),
            stack_map(W2, plan->E, C, F, 64, 1), partial, dpool, row_score, *plan, C, F);
    });
}
void hopper_up_backward(floatX *dX, const floatX *dH, const floatX *W1, const RowIndex *plan,
                        int64_t C, int64_t F) {
    launch<Wide, rows_kernel<true>>(plan->M / 128 * div_up(C, 256), matrix_map(dX, plan->M, C, 64),
                                    matrix_map(dH, plan->M, 2 * F, 128),
                                    stack_map(W1, plan->E, 2 * F, C, 64, 1), *plan, C, 2 * F);
}
template <bool GATHER_LEFT>
static void wgrad(gradX *dW, const floatX *dense, const floatX *pool, const RowIndex *plan,
                  int accumulate, int64_t N, int64_t O) {
    Dimensions d = { { O, N, plan->E }, { 1, O, N * O }, { BLOCK_FLOATS, 64, 1 } };
    with_publishing([&](auto how) {
        launch<Wide, wgrad_kernel<GATHER_LEFT, decltype(how)::value>>(
            plan->E * div_up(N, 128) * div_up(O, 256), tensor_map(dW, 3, d, true),
            matrix_map(dense, plan->M, GATHER_LEFT ? O : N, 64), pool, *plan, accumulate, N, O);
    });
}
void hopper_wgrad(gradX *dW1, gradX *dW2, const floatX *pool, const floatX *dpool, const floatX *dH,
                  const floatX *sA, const RowIndex *plan, int accumulate, int64_t C, int64_t F) {
    wgrad<false>(dW1, dH, pool, plan, accumulate, 2 * F, C);
    wgrad<true>(dW2, sA, dpool, plan, accumulate, C, F);
}

// The launch bounds of this kernel say what the card's code was compiled for: sm_90a, or something
// else, where the bodies of the products are empty.
#ifdef HOPPER_CODE
#define MARK_THREADS 128
#else
#define MARK_THREADS 256
#endif
static __global__ void __launch_bounds__(MARK_THREADS) hopper_mark() {}
bool hopper_available() {
#ifdef CUEMU
    return true;
#else
    int device, major;
    cudaFuncAttributes attributes;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    return major == 9 && cudaFuncGetAttributes(&attributes, hopper_mark) == cudaSuccess &&
           attributes.maxThreadsPerBlock == 128;
#endif
}
#endif
