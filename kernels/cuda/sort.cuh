// Stable counting sort on the device, without the host and without atomics whose order matters (I8,
// deterministic; I11, the host does not wait).
//
// Items 0..n-1 have up to K keys each, all different, in [0, buckets). Entry (i, k) with key b gets
// the place
//   start[b] + (number of items before i that have key b)
// where start is the exclusive scan of the bucket sizes, each rounded up to `tile`. A block looks
// at SPAN items and sets one bit an entry in mask[bucket][item] by integer atomicOr, whose result
// no order changes. The rank of an item within the block is the number of bits before its own; the
// rest is a scan over blocks. Three launches:
//   sort_count   counts[bucket][block]
//   sort_starts  scans both ways
//   sort_place   every entry learns its place
// Bytes: the keys twice, one write an entry: microseconds beside the products that use the result.
//
// A Source is a struct with
//   __device__ int count() const             items in use, at most n
//   __device__ int keys() const              K
//   __device__ int key(int i, int k) const   bucket, or -1
//   __device__ void place(int i, int k, int at) const
// and place is called for every entry with its place, or with -1 where the key is -1 or i is not in
// use.
#ifndef MOE_CUDA_SORT_CUH
#define MOE_CUDA_SORT_CUH
#include "common.cuh"

enum { SORT_SPAN = 256, SORT_WORDS = SORT_SPAN / 32, SORT_BUCKETS_MAX = 1024 };

template <class Source>
static __device__ void sort_masks(unsigned *mask, const Source &source, int buckets) {
    for (int i = threadIdx.x; i < buckets * SORT_WORDS; i += SORT_SPAN) mask[i] = 0;
    __syncthreads();
    int item = blockIdx.x * SORT_SPAN + threadIdx.x;
    for (int k = 0; item < source.count() && k < source.keys(); k++) {
        int b = source.key(item, k);
        if (b >= 0) atomicOr(&mask[b * SORT_WORDS + threadIdx.x / 32], 1u << (threadIdx.x % 32));
    }
    __syncthreads();
}
// counts (buckets, gridDim.x)
template <class Source> static __global__ void sort_count(int *counts, Source source, int buckets) {
    extern __shared__ unsigned mask[];
    sort_masks(mask, source, buckets);
    for (int b = threadIdx.x; b < buckets; b += SORT_SPAN) {
        int sum = 0;
        for (int w = 0; w < SORT_WORDS; w++) sum += __popc(mask[b * SORT_WORDS + w]);
        counts[(int64_t)b * gridDim.x + blockIdx.x] = sum;
    }
}
// Inclusive sum over the lanes of a warp.
static __device__ __forceinline__ int warp_scan(int v) {
    for (int d = 1; d < 32; d *= 2) {
        int below = __shfl_up_sync(0xffffffffu, v, d);
        if ((int)threadIdx.x % 32 >= d) v += below;
    }
    return v;
}
// counts (buckets, blocks) becomes its exclusive scan over blocks; start (buckets + 1). One block
// of 1024 threads.
static __global__ void sort_starts(int *counts, int *start, int buckets, int blocks, int tile) {
    __shared__ int total[SORT_BUCKETS_MAX];
    int lane = threadIdx.x % 32;
    int warp = threadIdx.x / 32;
    for (int b = warp; b < buckets; b += 32) {
        int *row = counts + (int64_t)b * blocks;
        int before = 0;
        for (int i = 0; i < blocks; i += 32) {
            int v = i + lane < blocks ? row[i + lane] : 0;
            int sum = warp_scan(v);
            if (i + lane < blocks) row[i + lane] = before + sum - v;
            before += __shfl_sync(0xffffffffu, sum, 31);
        }
        if (lane == 0) total[b] = (before + tile - 1) / tile * tile;
    }
    __syncthreads();
    if (warp > 0) return;
    int before = 0;
    for (int i = 0; i < buckets; i += 32) {
        int v = i + lane < buckets ? total[i + lane] : 0;
        int sum = warp_scan(v);
        if (i + lane < buckets) start[i + lane] = before + sum - v;
        before += __shfl_sync(0xffffffffu, sum, 31);
    }
    if (lane == 0) start[buckets] = before;
}
template <class Source>
static __global__ void sort_place(const int *counts, const int *start, Source source, int buckets,
                                  int n) {
    extern __shared__ unsigned mask[];
    sort_masks(mask, source, buckets);
    int item = blockIdx.x * SORT_SPAN + threadIdx.x;
    int word = threadIdx.x / 32;
    for (int k = 0; item < n && k < source.keys(); k++) {
        int b = item < source.count() ? source.key(item, k) : -1;
        int at = -1;
        if (b >= 0) {
            at = start[b] + counts[(int64_t)b * gridDim.x + blockIdx.x];
            for (int w = 0; w < word; w++) at += __popc(mask[b * SORT_WORDS + w]);
            at += __popc(mask[b * SORT_WORDS + word] & ((1u << (threadIdx.x % 32)) - 1));
        }
        source.place(item, k, at);
    }
}
static inline size_t sort_counts_size(int buckets, int64_t n) {
    return (size_t)buckets * (size_t)div_up(n, SORT_SPAN);
}
// counts: sort_counts_size() ints of scratch; start (buckets + 1) is a result. n > 0.
template <class Source>
static void stable_sort(int *counts, int *start, const Source &source, int buckets, int n,
                        int tile) {
    if (buckets > SORT_BUCKETS_MAX)
        die("%d experts on one GPU|at most %d: spread them over more ranks with --ep", buckets,
            SORT_BUCKETS_MAX);
    unsigned blocks = grid_for(n, SORT_SPAN);
    size_t shared = buckets * SORT_WORDS * sizeof(unsigned);
    sort_count<Source><<<blocks, SORT_SPAN, shared, compute_stream()>>>(counts, source, buckets);
    LAUNCHED();
    sort_starts<<<1, 1024, 0, compute_stream()>>>(counts, start, buckets, (int)blocks, tile);
    LAUNCHED();
    sort_place<Source>
        <<<blocks, SORT_SPAN, shared, compute_stream()>>>(counts, start, source, buckets, n);
    LAUNCHED();
}
#endif
