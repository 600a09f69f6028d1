// Who sends what to whom in an ep group (kernels.h): the table of rows that the host needs to post
// messages, counted with integer atomics, whose order does not show; and the lists that follow a
// token to the ranks of its experts and back, by the stable sort of sort.cuh. Ids ascend, so the
// experts of one rank are neighbours in a token's list, and a change of rank is a new destination.
#include "sort.cuh"

// The rank of the k-th choice if it is the token's first there, else -1.
static __device__ __forceinline__ int new_rank(const int *ids, int k, int local, int64_t E) {
    if (ids[k] < 0 || ids[k] >= E) return -1;
    int rank = ids[k] / local;
    return k > 0 && ids[k - 1] >= rank * local ? -1 : rank;
}

// counts (E) of choices of every expert; blockIdx.y is the source. Shared: pairs (ranks), experts
// (E).
static __global__ void route_count(int *table, int *counts, const int *ids, RouteShape s) {
    extern __shared__ int tally[];
    int *experts = tally + s.ranks;
    int local = (int)(s.E / s.ranks);
    for (int i = threadIdx.x; i < s.ranks + s.E; i += blockDim.x) tally[i] = 0;
    __syncthreads();
    for (int64_t r = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; r < s.R;
         r += (int64_t)gridDim.x * blockDim.x) {
        const int *id = ids + (blockIdx.y * s.R + r) * s.K;
        for (int k = 0; k < s.K; k++) {
            int rank = new_rank(id, k, local, s.E);
            if (rank >= 0) atomicAdd(&tally[rank], 1);
            if (id[k] >= 0 && id[k] < s.E)
                atomicAdd(&experts[id[k]], 1);
            else
                atomicAdd(&table[(s.sources + 1) * s.ranks], 1);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < s.ranks; i += blockDim.x)
        if (tally[i]) atomicAdd(&table[blockIdx.y * s.ranks + i], tally[i]);
    for (int i = threadIdx.x; i < s.E; i += blockDim.x)
        if (experts[i]) atomicAdd(&counts[i], experts[i]);
}

static __global__ void route_rows(int *rows, const int *counts, RouteShape s, int tile) {
    int local = (int)(s.E / s.ranks);
    for (int j = threadIdx.x; j < s.ranks; j += blockDim.x) {
        int sum = 0;
        for (int e = j * local; e < (j + 1) * local; e++)
            sum += (counts[e] + tile - 1) / tile * tile;
        rows[j] = sum;
    }
}

void route_table(int *table, const int *ids, RouteShape s) {
    kernel_begin("route_table", 0);
    enum { THREADS = 256, BLOCKS = 32 }; // of each source
    size_t shared = (size_t)(s.ranks + s.E) * sizeof(int);
    int *counts = (int *)device_scratch(SCRATCH_SORT, s.E * sizeof(int));
    device_zero(table, route_table_size(s) * sizeof(int));
    device_zero(counts, s.E * sizeof(int));
    dim3 grid(grid_for(s.R > 0 ? s.R : 1, THREADS, BLOCKS), (unsigned)s.sources);
    route_count<<<grid, THREADS, shared, compute_stream()>>>(table, counts, ids, s);
    LAUNCHED();
    route_rows<<<1, THREADS, 0, compute_stream()>>>(table + s.sources * s.ranks, counts, s,
                                                    device_row_tile());
    LAUNCHED();
}

// This rank's tokens, sorted by destination.
struct SendSource {
    int *send_token, *sum_row;
    const int *ids; // (R,K)
    RouteShape s;
    int J, local;
    __device__ int count() const { return (int)s.R; }
    __device__ int keys() const { return (int)s.K; }
    __device__ int key(int r, int k) const { return new_rank(ids + r * s.K, k, local, s.E); }
    // A thread places the choices of its token in order: the first one clears the token's list.
    __device__ void place(int r, int k, int at) const {
        int *row = sum_row + (int64_t)r * J;
        int j = 0;
        for (; k == 0 && j < J; j++) row[j] = -1;
        if (at < 0) return;
        for (j = 0; row[j] >= 0;) j++;
        row[j] = at;
        send_token[at] = r;
    }
};

// All tokens; those with an expert of rank `me` are its pool.
struct PoolSource {
    int *choice;
    const int *ids;
    RouteShape s;
    int first, end; // the rank's experts
    __device__ int count() const { return (int)(s.sources * s.R); }
    __device__ int keys() const { return 1; }
    __device__ int key(int t, int) const {
        int here = 0;
        for (int k = 0; k < s.K; k++) {
            int id = ids[t * s.K + k];
            here |= id >= first && id < end;
        }
        return here - 1;
    }
    __device__ void place(int t, int, int at) const {
        for (int k = 0; at >= 0 && k < s.K; k++) choice[at * s.K + k] = ids[t * s.K + k];
    }
};

void route_lists(int *send_token, int *sum_row, int *choice, const int *ids, int me, RouteShape s) {
    kernel_begin("route_lists", 0);
    int64_t local = s.E / s.ranks;
    int64_t J = s.ranks < s.K ? s.ranks : s.K;
    int64_t all = s.ranks * s.R;
    if (s.R == 0) return;
    size_t sends = sort_counts_size((int)s.ranks, s.R);
    size_t pools = sort_counts_size(1, all);
    size_t most = sends > pools ? sends : pools;
    int *counts = (int *)device_scratch(SCRATCH_SORT, (most + s.ranks + 1) * sizeof(int));
    int *start = counts + most; // of the buckets; nobody reads it
    SendSource send = { send_token, sum_row, ids + me * s.R * s.K, s, (int)J, (int)local };
    stable_sort(counts, start, send, (int)s.ranks, (int)s.R, 1);
    PoolSource pool = { choice, ids, s, (int)(me * local), (int)((me + 1) * local) };
    stable_sort(counts, start, pool, 1, (int)all, 1);
}
