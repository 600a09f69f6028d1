// The row index between pool tokens and expert rows: a stable counting sort by expert (sort.cuh),
// every expert padded to 128 rows, so that a tile of the expert products never holds rows of two
// experts. The functions row_index_... of kernels.h are here. All sizes that routing decides stay
// on the device (I11, the host does not wait).
#include "sort.cuh"
#include <limits.h>

// N = P min(K,E) choices at most, no expert more than P of them. The padded total is tile * (number
// of tiles), and tiles are cheapest where they are nearly empty: a first tile costs an expert one
// row, every further one costs it `tile` rows more. So give one row to each of E' = min(E,N)
// experts, then spend what is left in pieces of `tile`, at most floor((P-1)/tile) an expert.
int64_t row_index_bound(int64_t P, int64_t K, int64_t E_local) {
    int64_t tile = device_row_tile();
    int64_t choices = P * (K < E_local ? K : E_local);
    int64_t experts = E_local < choices ? E_local : choices;
    if (choices <= 0) return 0;
    int64_t by_choices = (choices - experts) / tile;
    int64_t by_expert = experts * ((P - 1) / tile);
    int64_t rows = (experts + (by_choices < by_expert ? by_choices : by_expert)) * tile;
    if (rows > INT_MAX)
        die("%lld expert rows for a pool of %lld tokens|use a smaller --micro-batch",
            (long long)rows, (long long)P);
    return rows;
}

struct ChoiceSource {
    RowIndex plan;
    const int *choice;
    int first;
    __device__ int count() const { return (int)plan.P; }
    __device__ int keys() const { return (int)plan.K; }
    __device__ int key(int i, int k) const {
        int c = choice[(int64_t)i * plan.K + k];
        int e = c - first;
        return c >= 0 && e >= 0 && e < plan.E ? e : -1;
    }
    __device__ void place(int i, int k, int at) const {
        plan.token_row[(int64_t)i * plan.K + k] = at;
        if (at >= 0) plan.row_token[at] = i;
    }
};
void row_index_build(RowIndex *plan, const int *choice, int first_expert) {
    kernel_begin("row_index_build", 0);
    if (plan->M)
        CUDA_CHECK(cudaMemsetAsync(plan->row_token, 0xff, plan->M * sizeof(int),
                                   compute_stream())); // -1
    if (plan->P == 0 || plan->K == 0)
        return device_zero(plan->expert_row, (size_t)(plan->E + 1) * sizeof(int));
    ChoiceSource source = { *plan, choice, first_expert };
    int *counts =
        (int *)device_scratch(SCRATCH_SORT, sort_counts_size(plan->E, plan->P) * sizeof(int));
    stable_sort(counts, plan->expert_row, source, plan->E, plan->P, device_row_tile());
}
