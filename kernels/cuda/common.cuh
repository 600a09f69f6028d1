// What every CUDA kernel shares: error checks, streams, scratch, 16-byte packets of floatX,
// reductions of a warp and a block.
//
// Rules of this folder
//   - Kernels run on STREAM_COMPUTE, never wait on the host (I11, the host does not wait) and never
//     allocate once every shape was seen (I10, no allocation after the first step).
//   - Sums have a fixed order: partial sums go to scratch and a second kernel adds them in index
//     order. Atomics are integer ones only (I8, deterministic).
//   - Offsets are 64-bit (I9, 64-bit offsets). Widths (C, F, D) are multiples of PACK, so that rows
//     can be moved 16 bytes at a time.
//   - Instructions beyond CUDA C++ come from ptx.h, so that the same source runs in dev/cuemu.
#ifndef MOE_CUDA_COMMON_CUH
#define MOE_CUDA_COMMON_CUH
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <string.h>
#include "../fail.h"
#include "../kernels.h"
#if defined(MOE_FP64)
#error "the CUDA backend has bf16 and fp32 kernels only: PRECISION=bf16 or fp32"
#endif

#define CUDA_CHECK(call)                                                           \
    do {                                                                           \
        cudaError_t error_ = (call);                                               \
        if (error_ != cudaSuccess) cuda_failed(error_, #call, __FILE__, __LINE__); \
    } while (0)
#define LAUNCHED() \
    CUDA_CHECK(cudaGetLastError()) // after every launch: what the launch itself rejects
MOE_NORETURN void cuda_failed(cudaError_t error, const char *call, const char *file, int line);
cudaStream_t device_stream(Stream stream);
static inline cudaStream_t compute_stream(void) { return device_stream(STREAM_COMPUTE); }
// Multiprocessors that one group's NCCL operations take at most, and that persistent kernels leave
// free while such operations run beside them.
enum { COMMUNICATION_CTAS = 16 };
// Device memory of one kind of kernel, grown on demand (only while shapes are new) and reused by
// the next kernel of that kind; its users are ordered by STREAM_COMPUTE.
enum { SCRATCH_PARTIAL, SCRATCH_SORT, SCRATCH_ROUTER, SCRATCH_SLOTS };
void *device_scratch(int slot, size_t bytes);
void attention_finish(void); // of device_finish
// Dies unless width is a multiple of PACK.
void require_packs(const char *what, int width);

static inline int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
// Grid of `items` threads in blocks of `threads`; grid-stride loops take it with a limit. CUDA
// refuses empty grids: callers return before.
static inline unsigned grid_for(int64_t items, int threads, int64_t limit = 0x7fffffff) {
    int64_t blocks = div_up(items, threads);
    return (unsigned)(blocks < limit ? blocks : limit);
}

// Opts a kernel into `bytes` of dynamic shared memory, which it needs above 48 KB. Once a kernel.
template <auto kernel> static void opt_into_shared(size_t bytes) {
    static bool done;
    if (done) return;
    CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    done = true;
}

// ---- floatX in registers --------------------------------------------------------------------
enum { PACK = 16 / sizeof(floatX) }; // elements of a 16-byte access: 8 (bf16) or 4 (fp32)
#if defined(MOE_BF16)
static __device__ __forceinline__ float load(const floatX *p) {
    return __uint_as_float((unsigned)p->bits << 16);
}
static __device__ __forceinline__ floatX to_x(float v) {
    __nv_bfloat16 b = __float2bfloat16(v);
    floatX x;
    memcpy(&x, &b, 2);
    return x;
}
#else
static __device__ __forceinline__ float load(const floatX *p) { return p->v; }
static __device__ __forceinline__ floatX to_x(float v) {
    floatX x;
    x.v = v;
    return x;
}
#endif
static __device__ __forceinline__ void store(floatX *p, float v) { *p = to_x(v); }
static __device__ __forceinline__ float round_x(float v) { // v as floatX would keep it
    floatX x = to_x(v);
    return load(&x);
}
// W elements at p: one 16-byte access where W = PACK (p then aligned to 16 bytes), else W single
// ones.
template <int W> static __device__ __forceinline__ void load_n(float (&v)[W], const floatX *p) {
    if (W == PACK) {
        int4 bits = *(const int4 *)p;
        floatX x[PACK];
        memcpy(x, &bits, 16);
#pragma unroll
        for (int i = 0; i < W; i++) v[i] = load(x + i);
    } else
#pragma unroll
        for (int i = 0; i < W; i++) v[i] = load(p + i);
}
template <int W> static __device__ __forceinline__ void store_n(floatX *p, const float (&v)[W]) {
    if (W == PACK) {
        floatX x[PACK];
#pragma unroll
        for (int i = 0; i < W; i++) x[i] = to_x(v[i]);
        int4 bits;
        memcpy(&bits, x, 16);
        *(int4 *)p = bits;
    } else
#pragma unroll
        for (int i = 0; i < W; i++) store(p + i, v[i]);
}

// ---- reductions -----------------------------------------------------------------------------
// Butterfly over groups of `width` lanes (a power of two): every lane gets the result, the order is
// fixed. All 32 lanes take part.
template <class T> static __device__ __forceinline__ T group_sum(T v, int width = 32) {
    for (int d = width / 2; d > 0; d /= 2) v += __shfl_xor_sync(0xffffffffu, v, d);
    return v;
}
static __device__ __forceinline__ float warp_max(float v) {
    for (int d = 16; d > 0; d /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, d));
    return v;
}
// Sum of a block of at most 1024 threads (a multiple of 32), to every thread. `shared` holds 32
// values; a caller that reuses it at once alternates between two of them: then one barrier a sum is
// enough.
template <class T> static __device__ __forceinline__ T block_sum(T v, T *shared) {
    int lane = threadIdx.x % 32;
    int warp = threadIdx.x / 32;
    int warps = blockDim.x / 32;
    v = group_sum(v);
    if (lane == 0) shared[warp] = v;
    __syncthreads();
    v = lane < warps ? shared[lane] : 0;
    return group_sum(v);
}
// Adds `rows` partial sums of n columns in row order: out_j (+)= sum over r of partial[r][j].
// norm_rope.cu.
void column_sums(gradX *out, const float *partial, int rows, int n, int accumulate);

// ---- dense products through cuBLASLt (linear.cu) --------------------------------------------
// Computes C (m,n) = op(A) op(B) + beta C, all row-major; beta is 0 (C is never read) or 1.
//   op(A) (m,k): A is (m,k), or (k,m) where ta = 1; its rows are lda apart
//   op(B) (k,n): B is (k,n), or (n,k) where tb = 1; its rows and those of C stand without gaps
// A and B are floatX; C is floatX, or float where c_real = 1. Products are summed in fp32, and TF32
// is never used. Does nothing if m or n is 0; for k = 0, C becomes beta C.
void gemm(int ta, int tb, int64_t m, int64_t n, int64_t k, const floatX *A, int64_t lda,
          const floatX *B, int beta, void *C, int c_real);
void gemm_init(void);
void gemm_finish(void);
const char *gemm_library(void);
#endif
