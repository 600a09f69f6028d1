// The row index between pool tokens and expert rows, and the two exact linear maps that use it:
// gather (tokens to rows) and its adjoint, the sum of a token's rows. Sums read through the inverse
// index in a fixed order: nothing is scattered, nothing is atomic (I8).
#include "../device.h"
#include "../fail.h"
#include "math.h"
#include <limits.h>

// N = P min(K,E) choices at most, no expert more than P of them. The padded total is tile * (number
// of tiles), and tiles are cheapest where they are nearly empty: a first tile costs an expert one
// row, every further one costs it `tile` rows more. So give one row to each of E' = min(E,N)
// experts, then spend what is left in pieces of `tile`, at most floor((P-1)/tile) an expert. With
// tile 1 this is N.
int64_t row_index_bound(int64_t P, int64_t K, int64_t E_local) {
    int64_t tile = device_row_tile(), choices = (int64_t)P * lesser(K, E_local),
            experts = lesser(E_local, choices);
    if (choices <= 0) return 0;
    int64_t further = lesser((choices - experts) / tile, experts * ((P - 1) / tile)),
            rows = (experts + further) * tile;
    if (rows > INT_MAX)
        die("%lld expert rows for a pool of %lld tokens|use a smaller --micro-batch",
            (long long)rows, (long long)P);
    return rows;
}
// A stable counting sort by expert: count, cumulate (each expert padded to the tile), then hand out
// rows in pool order.
void row_index_build(RowIndex *plan, const int *choice, const int *n_pool, int first_expert) {
    kernel_begin("row_index_build", 0);
    int P = plan->P, E = plan->E, K = plan->K, M = plan->M, tile = device_row_tile(),
        *start = plan->expert_row;
    int tokens = n_pool && *n_pool < P ? *n_pool : P;
    int64_t n = (int64_t)tokens * K;
    int *next = SCRATCH(SCRATCH_SHARED, int, E + 1);
    memset(next, 0, sizeof(int) * (size_t)(E + 1));
    for (int64_t i = 0; i < n; i++) {
        unsigned e = (unsigned)choice[i] -
                     (unsigned)first_expert; // -1 and experts of other ranks wrap around past E
        if (choice[i] >= 0 && e < (unsigned)E) next[e]++;
    }
    int64_t row = 0;
    for (int e = 0; e < E; e++) {
        int64_t count = next[e];
        start[e] = next[e] = (int)row;
        row += div_up(count, tile) * tile;
        if (row > M)
            die("%lld or more expert rows where the plan has room for %d|a plan needs row_index_bound(P, K, E) rows",
                (long long)row, M);
    }
    start[E] = (int)row;
    for (int m = 0; m < M; m++) plan->row_token[m] = -1;
    for (int64_t i = 0; i < n; i++) {
        unsigned e = (unsigned)choice[i] - (unsigned)first_expert;
        int here = choice[i] >= 0 && e < (unsigned)E;
        plan->token_row[i] = here ? next[e] : -1;
        if (here) plan->row_token[next[e]++] = (int)(i / K);
    }
    for (int64_t i = n; i < (int64_t)P * K; i++) plan->token_row[i] = -1;
}
void row_index_dense(RowIndex *plan, int64_t R) {
    int rows = (int)div_up(R, device_row_tile()) * device_row_tile();
    if (R > plan->P || rows > plan->M || plan->K != 1 || plan->E != 1)
        die("a dense index of %lld tokens where P = %lld, M = %lld, K = %lld, E = %lld|it needs P >= R, M >= row_index_bound(R, 1, 1), K = E = 1",
            (long long)R, (long long)plan->P, (long long)plan->M, (long long)plan->K,
            (long long)plan->E);
    plan->expert_row[0] = 0, plan->expert_row[1] = rows;
    for (int m = 0; m < plan->M; m++) plan->row_token[m] = m < R ? m : -1;
    for (int p = 0; p < plan->P; p++) plan->token_row[p] = p < R ? p : -1;
}

// ---- gather and its adjoint -----------------------------------------------------------------
void rows_gather(void *out, const void *in, const int *index, int64_t n, size_t row_bytes) {
    kernel_begin("rows_gather", 0);
    PARALLEL_FOR
    for (int i = 0; i < n; i++) {
        char *to = (char *)out + (size_t)i * row_bytes;
        if (index[i] < 0)
            memset(to, 0, row_bytes);
        else
            memcpy(to, (const char *)in + (size_t)index[i] * row_bytes, row_bytes);
    }
}
// out_r = sum over j of weight_rj in[index_rj], in the order of j, in stripes that stay in
// registers and the first cache level.
enum { STRIPE = 256 };
static void sum_row(floatX *out, const floatX *in, const int *index, const real *weight, int64_t J,
                    int64_t C) {
    for (int c = 0; c < C; c += STRIPE) {
        int width = (int)lesser(STRIPE, C - c);
        real sum[STRIPE] = { 0 };
        for (int j = 0; j < J; j++) {
            if (index[j] < 0) continue;
            const floatX *x = in + (int64_t)index[j] * C + c;
            real w = weight ? weight[j] : 1;
            for (int i = 0; i < width; i++) sum[i] += w * load(x + i);
        }
        store_row(out + c, sum, width);
    }
}
void rows_weighted_sum(floatX *out, const floatX *Y, const real *score, const RowIndex *plan,
                       int64_t C) {
    kernel_begin("rows_weighted_sum", 0);
    int K = plan->K;
    PARALLEL_FOR
    for (int p = 0; p < plan->P; p++)
        sum_row(out + (int64_t)p * C, Y, plan->token_row + (int64_t)p * K,
                score ? score + (int64_t)p * K : 0, K, C);
}
void rows_sum(floatX *out, const floatX *in, const int *index, int64_t R, int64_t J, int64_t C) {
    kernel_begin("rows_sum", 0);
    PARALLEL_FOR
    for (int r = 0; r < R; r++) sum_row(out + (int64_t)r * C, in, index + (int64_t)r * J, 0, J, C);
}
void rows_sum_real(real *out, const real *in, const int *index, int64_t R, int64_t J, int64_t C) {
    kernel_begin("rows_sum_real", 0);
    PARALLEL_FOR
    for (int r = 0; r < R; r++) {
        real *to = out + (int64_t)r * C;
        for (int c = 0; c < C; c++) to[c] = 0;
        for (int j = 0; j < J; j++) {
            int row = index[(int64_t)r * J + j];
            if (row < 0) continue;
            for (int c = 0; c < C; c++) to[c] += in[(int64_t)row * C + c];
        }
    }
}
