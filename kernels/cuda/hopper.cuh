// Hopper's asynchronous machinery as the products of experts_hopper.cu use it: tensor maps, a ring
// of stages in shared memory, the gathers that fill it, the loop of wgmma that empties it, and
// blocks of results on their way out. It exists for sm_90a and in the emulator; elsewhere kernels
// have empty bodies and are never launched.
//
// Everything in shared memory is made of blocks: 64 rows of 128 bytes (64 bf16 or 32 fp32 numbers),
// 8 KB, aligned to 1024 bytes, in the 128-byte swizzle of TMA and wgmma. The 16-byte chunk c of row
// r stands at chunk c ^ (r mod 8), so that eight rows of one chunk column fall into different
// banks.
//   K-major operand, k along its rows:    a block is 64 rows of the operand x 64 k
//   MN-major operand, k across its rows:  a block is 64 k x 64 columns of the operand
// Longer operands are several blocks, one after another. wgmma takes both kinds for bf16, so no
// operand is ever transposed in memory. Numbers outside a matrix are zeros, which TMA and cp.async
// fill in.
#ifndef MOE_CUDA_HOPPER_CUH
#define MOE_CUDA_HOPPER_CUH
#include "mma.cuh"
#if defined(CUEMU) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HOPPER_CODE
#endif

// Warpgroup 0 loads; warpgroups 1 and 2 multiply 64 rows each.
enum { PRODUCERS = 128, CONSUMERS = 256, HOPPER_THREADS = PRODUCERS + CONSUMERS };
// A multiprocessor has 65,536 registers: 2 x 128 x 224 + 128 x 56. The producers hold 8 row
// numbers, the consumers up to 128 accumulators.
enum { PRODUCER_REGISTERS = 56, CONSUMER_REGISTERS = 224 };
enum { K_STEP = 64, ROW_BYTES = 128, BLOCK_BYTES = 64 * ROW_BYTES, BLOCK_FLOATS = ROW_BYTES / 4 };

// Shared memory of a kernel. A stage has 128 rows of A (2 blocks) and N columns of B (N / 64
// blocks); each consumer warpgroup has OUT blocks of results.
template <int N, int STAGES_, int OUT> struct Shared {
    enum { STAGES = STAGES_, B_BLOCKS = N / 64, STAGE_BYTES = (2 + B_BLOCKS) * BLOCK_BYTES };
    char a[STAGES][2 * BLOCK_BYTES];
    char b[STAGES][B_BLOCKS * BLOCK_BYTES];
    char out[2][OUT * BLOCK_BYTES];
    uint64_t full[STAGES];  // mbarrier: the stage holds its operands
    uint64_t empty[STAGES]; // mbarrier: all consumers are done with the stage
    uint64_t loaded[2];     // mbarrier: a consumer warpgroup's own load into `out` has arrived
};
// A place in the ring of stages; `phase` is the parity of the round.
struct Ring {
    int stage;
    uint32_t phase;
};
template <class S> static __device__ __forceinline__ void advance(Ring &ring) {
    if (++ring.stage < S::STAGES) return;
    ring.stage = 0;
    ring.phase ^= 1;
}
// What a consumer thread knows of itself: its warpgroup (0 or 1), whether it is the one thread that
// starts the warpgroup's stores, and its warpgroup's results.
template <class S> struct Consumer {
    S *s;
    int group;
    bool first;
    char *out;
    Ring ring;
};
// Splits a block into its roles: the producers run produce(s), the consumers consume(consumer).
// `arrivals` producer threads report a full stage. A stage is empty when each of the eight consumer
// warps has said so, because the wait for a wgmma is a warp's.
template <class S, class Produce, class Consume>
static __device__ __forceinline__ void hopper_roles(char *shared, int arrivals, Produce produce,
                                                    Consume consume) {
    S *s = (S *)shared;
    if (threadIdx.x == 0) {
        for (int i = 0; i < S::STAGES; i++) {
            ptx_mbar_init(&s->full[i], arrivals);
            ptx_mbar_init(&s->empty[i], CONSUMERS / 32);
        }
        for (int w = 0; w < 2; w++) ptx_mbar_init(&s->loaded[w], 1);
        ptx_fence_mbar_init();
    }
    __syncthreads();
    if (threadIdx.x < PRODUCERS) {
        ptx_setmaxnreg_dec<PRODUCER_REGISTERS>();
        produce(s);
        return;
    }
    ptx_setmaxnreg_inc<CONSUMER_REGISTERS>();
    int group = __shfl_sync(0xffffffffu, (int)threadIdx.x / 128, 0) - 1;
    Consumer<S> consumer = { s, group, threadIdx.x % 128 == 0, s->out[group], { 0, 0 } };
    consume(consumer);
    if (consumer.first) ptx_bulk_wait<0>();
}

// ---- producers ------------------------------------------------------------------------------
static __device__ __forceinline__ char *chunk_at(char *block, int row, int chunk) {
    return block + row * ROW_BYTES + ((chunk ^ (row & 7)) << 4);
}
// Starts the gather of a block: 64 rows of `base` (ld elements apart), 64 columns from `column` on.
// A producer thread copies one chunk of the rows threadIdx.x / 8 + 16 i, which come from row[i]; -1
// and columns from `width` on give zeros.
static __device__ __forceinline__ void gather_block(char *block, const floatX *base, const int *row,
                                                    int64_t ld, int column, int width) {
    int chunk = threadIdx.x % 8;
    int at = column + chunk * PACK;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        bool valid = row[i] >= 0 && at < width;
        const floatX *from = valid ? base + row[i] * ld + at : base;
        ptx_cp_async_16(chunk_at(block, threadIdx.x / 8 + 16 * i, chunk), from, valid ? 16 : 0);
    }
}
// How a gathered stage becomes known as full. The copies are ordinary writes of shared memory, so a
// proxy fence has to show them to wgmma, and the fence is a memory barrier in the machine's code.
//   BY_WAIT    a producer waits for its copies of one stage, fences and arrives, just before it
//              starts the copies of the next: the barrier finds nothing in flight
//   BY_COPIES  the copies arrive themselves when they are complete, no producer waits, and the
//              consumers fence after their wait (CUTLASS's way)
enum Publish { BY_WAIT, BY_COPIES };
// Reports this thread's part of `stage`, BY_WAIT; does nothing for stage -1.
template <class S> static __device__ __forceinline__ void publish(S *s, int stage) {
    if (stage < 0) return;
    ptx_cp_async_wait<0>();
    ptx_fence_proxy_async();
    ptx_mbar_arrive(&s->full[stage]);
}

// ---- consumers ------------------------------------------------------------------------------
// acc = the sum over the next `steps` stages of A B, for this warpgroup's 64 rows of A: m64nNk16
// four times a stage, the very first without the old sums. A stage is handed back when the group of
// wgmma after it is under way, so one is multiplied while the next is waited for. halfway() runs in
// the middle of the loop, when the results of the tile before have long left. acc[4 j + 2 r + i] of
// lane 4 g + t of warp v is row 16 v + g + 8 r, column 8 j + 2 t + i.
template <int N, int A_MN, int B_MN, Publish HOW = BY_WAIT, class S, class F>
static __device__ __forceinline__ void multiply_stages(float (&acc)[N / 2], Consumer<S> &own,
                                                       int steps, F halfway) {
    // 16 of k further on: 16 rows, or 32 bytes within the rows; the descriptors' lbo.
    const int A_STEP = A_MN ? 16 * ROW_BYTES : 32;
    const int B_STEP = B_MN ? 16 * ROW_BYTES : 32;
    const int A_LBO = A_MN ? (int)BLOCK_BYTES : (int)LBO_K_MAJOR;
    const int B_LBO = B_MN ? (int)BLOCK_BYTES : (int)LBO_K_MAJOR;
    Ring &ring = own.ring;
    S *s = own.s;
    auto start_stage = [&](int scale_d) {
        const char *a = s->a[ring.stage] + own.group * BLOCK_BYTES;
        const char *b = s->b[ring.stage];
        ptx_mbar_wait(&s->full[ring.stage], ring.phase);
        if (HOW == BY_COPIES) ptx_fence_proxy_async();
        ptx_wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; k++)
            ptx_wgmma<N, A_MN, B_MN>(acc, ptx_wgmma_desc(a + k * A_STEP, A_LBO, 8 * ROW_BYTES, 128),
                                     ptx_wgmma_desc(b + k * B_STEP, B_LBO, 8 * ROW_BYTES, 128),
                                     scale_d || k > 0);
        ptx_wgmma_commit();
    };
    if (steps == 0) {
#pragma unroll
        for (int i = 0; i < N / 2; i++) acc[i] = 0;
        halfway();
        return;
    }
    ptx_wgmma_hold(acc);
    start_stage(0);
    if (steps == 1) halfway();
    for (int step = 1; step < steps; step++) {
        int before = ring.stage;
        advance<S>(ring);
        start_stage(1);
        ptx_wgmma_wait<1>();
        if (threadIdx.x % 32 == 0) ptx_mbar_arrive(&s->empty[before]);
        if (step == steps / 2) halfway();
    }
    ptx_wgmma_wait<0>();
    ptx_wgmma_hold(acc);
    if (threadIdx.x % 32 == 0) ptx_mbar_arrive(&s->empty[ring.stage]);
    advance<S>(ring);
}
static __device__ __forceinline__ void group_barrier(int group) { ptx_bar_sync(1 + group, 128); }
// A result leaves in three steps. out_free waits until the stores before have read `out`; then the
// warpgroup writes its blocks; after out_written one thread (`first`) stores them by TMA.
static __device__ __forceinline__ void out_free(int group, bool first) {
    if (first) ptx_bulk_wait_read<0>();
    group_barrier(group);
}
static __device__ __forceinline__ void out_written(int group) {
    ptx_fence_proxy_async();
    group_barrier(group);
}
// Writes 64 columns of accumulators, from acc[first] on, as a bf16 block: stmatrix, four 8 x 8
// matrices at a time, free of bank conflicts by the swizzle.
template <int N>
static __device__ __forceinline__ void put_block(char *block, const float (&acc)[N], int first) {
    int lane = threadIdx.x % 32;
    int row = threadIdx.x / 32 % 4 * 16 + lane % 16;
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
// in elements; loads and stores move box[0..rank) elements. The base and all strides are multiples
// of 16 bytes.
struct Dimensions {
    int64_t dim[3], stride[3];
    unsigned box[3];
};
// Returns the tensor map of `d` (experts_hopper.cu). Coordinates outside read as zeros and are not
// written. Dies where the driver has no tensor maps.
CUtensorMap tensor_map(const void *base, int rank, Dimensions d, bool is_float);
#endif
