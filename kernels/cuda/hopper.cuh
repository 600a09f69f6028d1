// Hopper's asynchronous machinery as the products of experts_hopper.cu use it: tensor maps, a ring
// of stages in shared memory, the gathers that fill it, the loop of wgmma that empties it, and
// blocks of results on their way out. For sm_90a (and the emulator); elsewhere kernels have empty
// bodies and are never launched.
//
// Everything in shared memory is made of BLOCKS: 64 rows of 128 bytes (64 bf16 or 32 fp32 numbers),
// 8 KB, aligned to 1024 bytes, in the 128-byte swizzle of TMA and wgmma: the 16-byte chunk c of row
// r stands at chunk c ^ (r mod 8), so that eight rows of one chunk column fall into different
// banks.
//   operand with k along its rows (K-major):   64 rows of the operand x 64 k a block; more rows:
//   blocks behind one another operand with k across its rows (MN-major): 64 k x 64 columns of the
//   operand a block; more columns: blocks behind one another
// wgmma takes both for bf16, so no operand is ever transposed in memory. Numbers outside a matrix
// are zeros: TMA and cp.async fill them in.
#ifndef MOE_CUDA_HOPPER_CUH
#define MOE_CUDA_HOPPER_CUH
#include "mma.cuh"
#if defined(CUEMU) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HOPPER_CODE
#endif

enum {
    PRODUCERS = 128,
    CONSUMERS = 256,
    HOPPER_THREADS = PRODUCERS + CONSUMERS
}; // warpgroup 0 loads, warpgroups 1 and 2 multiply 64 rows each
// 65,536 registers of a multiprocessor: 2 x 128 x 224 + 128 x 56. The producers hold 8 row numbers,
// the consumers up to 128 accumulators.
enum { PRODUCER_REGISTERS = 56, CONSUMER_REGISTERS = 224 };
enum { K_STEP = 64, ROW_BYTES = 128, BLOCK_BYTES = 64 * ROW_BYTES, BLOCK_FLOATS = ROW_BYTES / 4 };

// A: 128 rows (2 blocks), B: N columns (N / 64 blocks) a stage. out: OUT blocks for each consumer
// warpgroup.
template <int N, int STAGES_, int OUT> struct Shared {
    enum { STAGES = STAGES_, B_BLOCKS = N / 64, STAGE_BYTES = (2 + B_BLOCKS) * BLOCK_BYTES };
    char a[STAGES][2 * BLOCK_BYTES], b[STAGES][B_BLOCKS * BLOCK_BYTES], out[2][OUT * BLOCK_BYTES];
    uint64_t full[STAGES],
        empty[STAGES];  // mbarriers: a stage holds its operands; all consumers are done with it
    uint64_t loaded[2]; // a consumer warpgroup's own loads into `out`
};
struct Ring { // a place in the ring of stages; phase: the parity of the round
    int stage;
    uint32_t phase;
};
template <class S> static __device__ __forceinline__ void advance(Ring &ring) {
    if (++ring.stage == S::STAGES) ring.stage = 0, ring.phase ^= 1;
}
// arrivals: producer threads that report a full stage. A stage is empty when each of the eight
// consumer warps has said so: the wait for a wgmma is a warp's.
template <class S> static __device__ __forceinline__ void hopper_begin(S *s, int arrivals) {
    if (threadIdx.x == 0) {
        for (int i = 0; i < S::STAGES; i++)
            ptx_mbar_init(&s->full[i], arrivals), ptx_mbar_init(&s->empty[i], CONSUMERS / 32);
        for (int w = 0; w < 2; w++) ptx_mbar_init(&s->loaded[w], 1);
        ptx_fence_mbar_init();
    }
    __syncthreads();
}

// ---- producers ------------------------------------------------------------------------------
static __device__ __forceinline__ char *chunk_at(char *block, int row, int chunk) {
    return block + row * ROW_BYTES + ((chunk ^ (row & 7)) << 4);
}
// Gathers a block: 64 rows of `base` (ld elements apart), 64 columns from `column` on. A producer
// thread copies one chunk of the rows threadIdx.x / 8 + 16 i, which come from row[i]; -1 and
// columns behind `width` give zeros.
static __device__ __forceinline__ void gather_block(char *block, const floatX *base, const int *row,
                                                    int64_t ld, int column, int width) {
    int chunk = threadIdx.x % 8, at = column + chunk * PACK;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        bool valid = row[i] >= 0 && at < width;
        ptx_cp_async_16(chunk_at(block, threadIdx.x / 8 + 16 * i, chunk),
                        valid ? base + row[i] * ld + at : base, valid ? 16 : 0);
    }
}
// This thread's part of `stage` has arrived when all but its latest PENDING groups of copies have.
// The copies are ordinary writes of shared memory: the fence shows them to wgmma. The wait for a
// stage stands behind the start of the next one, so two stages are under way. stage -1: none.
template <int PENDING, class S> static __device__ __forceinline__ void publish(S *s, int stage) {
    if (stage < 0) return;
    ptx_cp_async_wait<PENDING>();
    ptx_fence_proxy_async();
    ptx_mbar_arrive(&s->full[stage]);
}

// ---- consumers ------------------------------------------------------------------------------
// acc = sum over the next `steps` stages of A B, this warpgroup's 64 rows of A: m64nNk16 four times
// a stage. A stage is handed back when the group of wgmma behind it is under way, so one is
// multiplied while the next is waited for. halfway() runs in the middle of the loop, when the
// results of the tile before have long left. acc[4 j + 2 r + i] of lane 4 g + t of warp v is row 16
// v + g + 8 r, column 8 j + 2 t + i.
template <int N, int A_MN, int B_MN, class S, class F>
static __device__ __forceinline__ void multiply_stages(float (&acc)[N / 2], S *s, Ring &ring,
                                                       int group, int steps, F halfway) {
    int before = 0;
#pragma unroll
    for (int i = 0; i < N / 2; i++) acc[i] = 0;
    ptx_wgmma_hold(acc);
    for (int step = 0; step < steps; step++) {
        const char *a = s->a[ring.stage] + group * BLOCK_BYTES, *b = s->b[ring.stage];
        ptx_mbar_wait(&s->full[ring.stage], ring.phase);
        ptx_wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; k++) // 16 of k: 32 bytes within the rows, or 16 rows
            ptx_wgmma<N, A_MN, B_MN>(
                acc,
                ptx_wgmma_desc(a + k * (A_MN ? 16 * ROW_BYTES : 32),
                               A_MN ? BLOCK_BYTES : LBO_K_MAJOR, 8 * ROW_BYTES, 128),
                ptx_wgmma_desc(b + k * (B_MN ? 16 * ROW_BYTES : 32),
                               B_MN ? BLOCK_BYTES : LBO_K_MAJOR, 8 * ROW_BYTES, 128),
                1);
        ptx_wgmma_commit();
        ptx_wgmma_wait<1>();
        if (step > 0 && threadIdx.x % 32 == 0) ptx_mbar_arrive(&s->empty[before]);
        if (step == steps / 2) halfway();
        before = ring.stage;
        advance<S>(ring);
    }
    if (steps == 0) halfway();
    ptx_wgmma_wait<0>();
    ptx_wgmma_hold(acc);
    if (steps > 0 && threadIdx.x % 32 == 0) ptx_mbar_arrive(&s->empty[before]);
}
static __device__ __forceinline__ void group_barrier(int group) { ptx_bar_sync(1 + group, 128); }
// The three steps of a result on its way out: the stores before have read `out`; the warpgroup
// writes its blocks; one thread (`first`) stores them by TMA.
static __device__ __forceinline__ void out_free(int group, bool first) {
    if (first) ptx_bulk_wait_read<0>();
    group_barrier(group);
}
static __device__ __forceinline__ void out_written(int group) {
    ptx_fence_proxy_async();
    group_barrier(group);
}
// 64 columns of accumulators (from acc[first] on) as a bf16 block: stmatrix, four 8 x 8 matrices at
// a time, conflict-free by the swizzle.
template <int N>
static __device__ __forceinline__ void put_block(char *block, const float (&acc)[N], int first) {
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane % 16;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        uint32_t r[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            r[i] = pack_two(acc[first + 8 * j + 2 * i], acc[first + 8 * j + 2 * i + 1]);
        ptx_stmatrix_x4(chunk_at(block, row, 2 * j + lane / 16), r);
    }
}

static __device__ __forceinline__ float2 unpack_two(uint32_t bits) {
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}

// ---- tensor maps (host) ---------------------------------------------------------------------
// A row-major matrix or a stack of them, innermost dimension first: dim[0..rank), stride[1..rank)
// in elements; loads and stores move box[0..rank) elements. Coordinates outside read as zeros and
// are not written. base and strides are multiples of 16 bytes. experts_hopper.cu.
struct Dimensions {
    int64_t dim[3], stride[3];
    unsigned box[3];
};
CUtensorMap tensor_map(const void *base, int rank, Dimensions d, bool is_float);
#endif
