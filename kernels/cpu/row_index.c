// The row index between pool tokens and expert rows, and the two exact linear maps that use it:
// gather (tokens to rows) and its adjoint, the sum of a token's rows. Offers kernels.h's RowIndex
// functions and rows_*. A sum reads through the inverse index in a fixed order: nothing is
// scattered and nothing is atomic (I8, deterministic).
#include "../device.h"
#include "../fail.h"
#include "math.h"
#include <limits.h>

// There are at most N = P min(K,E) choices, and no expert has more than P of them. The padded total
// is tile * (number of tiles). Nearly empty tiles cost least: the first tile of an expert takes one
// row, every further one takes `tile` rows more. So give one row to each of min(E,N) experts, then
// spend what is left in pieces of `tile`, at most floor((P-1)/tile) for an expert. With tile 1 this
// is N.
int64_t row_index_bound(int64_t P, int64_t K, int64_t E_local) {
    int64_t tile = device_row_tile();
    int64_t choices = P * lesser(K, E_local);
    int64_t experts = lesser(E_local, choices);
    if (choices <= 0) return 0;
    int64_t further = lesser((choices - experts) / tile, experts * ((P - 1) / tile));
    int64_t rows = (experts + further) * tile;
    if (rows > INT_MAX)
        die("%lld expert rows for a pool of %lld tokens|use a smaller --micro-batch",
            (long long)rows, (long long)P);
    return rows;
}
// The local expert of a choice, or -1 where it is none or another rank's.
static int local_expert(int choice, int first_expert, int64_t E) {
    int64_t e = (int64_t)choice - first_expert;
    return choice >= 0 && e >= 0 && e < E ? (int)e : -1;
}
// A stable counting sort by expert: count, add up (each expert padded to the tile), then hand out
// rows in pool order.
void row_index_build(RowIndex *index, const int *choice, int first_expert) {
    kernel_begin("row_index_build", 0);
    int64_t E = index->E;
    int64_t n = index->P * index->K;
    int64_t tile = device_row_tile();
    int64_t row = 0;
    int *start = index->expert_row;
    int *next = SCRATCH(SCRATCH_SHARED, int, E + 1);
    for (int64_t e = 0; e < E; e++) next[e] = 0;
    for (int64_t i = 0; i < n; i++) {
        int e = local_expert(choice[i], first_expert, E);
        if (e >= 0) next[e]++;
    }
    for (int64_t e = 0; e < E; e++) {
        int64_t count = next[e];
        start[e] = next[e] = (int)row;
        row += div_up(count, tile) * tile;
        if (row > index->M)
            die("%lld or more expert rows where the index has room for %lld|an index needs "
                "row_index_bound(P, K, E) rows",
                (long long)row, (long long)index->M);
    }
    start[E] = (int)row;
    for (int64_t m = 0; m < index->M; m++) index->row_token[m] = -1;
    for (int64_t i = 0; i < n; i++) {
        int e = local_expert(choice[i], first_expert, E);
        index->token_row[i] = e >= 0 ? next[e] : -1;
        if (e >= 0) index->row_token[next[e]++] = (int)(i / index->K);
    }
}

// ---- gather and its adjoint -----------------------------------------------------------------
void rows_gather(void *out, const void *in, const int *index, int64_t n, size_t row_bytes) {
    kernel_begin("rows_gather", 0);
    PARALLEL_FOR_BYTES(n * row_bytes)
    for (int64_t i = 0; i < n; i++) {
        char *to = (char *)out + i * row_bytes;
        if (index[i] < 0)
            memset(to, 0, row_bytes);
        else
            memcpy(to, (const char *)in + index[i] * row_bytes, row_bytes);
    }
}
// out_r = sum over j of weight_rj in[index_rj], in the order of j, in stripes that stay in
// registers and the first cache level.
enum { STRIPE = 256 };
static void sum_row(floatX *out, const floatX *in, const int *index, const real *weight, int64_t J,
                    int64_t C) {
    for (int64_t c = 0; c < C; c += STRIPE) {
        int64_t width = lesser(STRIPE, C - c);
        real sum[STRIPE] = { 0 };
        for (int64_t j = 0; j < J; j++) {
            if (index[j] < 0) continue;
            const floatX *x = in + index[j] * C + c;
            real w = weight ? weight[j] : 1;
            for (int64_t i = 0; i < width; i++) sum[i] += w * load(x + i);
        }
        store_row(out + c, sum, width);
    }
}
void rows_weighted_sum(floatX *out, const floatX *Y, const real *score, const RowIndex *index,
                       int64_t C) {
    kernel_begin("rows_weighted_sum", 0);
    int64_t K = index->K;
    PARALLEL_FOR_BYTES(index->P * C * sizeof *out)
    for (int64_t p = 0; p < index->P; p++)
        sum_row(out + p * C, Y, index->token_row + p * K, score ? score + p * K : 0, K, C);
}
void rows_sum(floatX *out, const floatX *in, const int *index, int64_t R, int64_t J, int64_t C) {
    kernel_begin("rows_sum", 0);
    PARALLEL_FOR_BYTES(R * C * sizeof *out)
    for (int64_t r = 0; r < R; r++) sum_row(out + r * C, in, index + r * J, 0, J, C);
}
void rows_sum_real(real *out, const real *in, const int *index, int64_t R, int64_t J, int64_t C) {
    kernel_begin("rows_sum_real", 0);
    PARALLEL_FOR_BYTES(R * C * sizeof *out)
    for (int64_t r = 0; r < R; r++) {
        real *to = out + r * C;
        for (int64_t c = 0; c < C; c++) to[c] = 0;
        for (int64_t j = 0; j < J; j++) {
            int row = index[r * J + j];
            if (row < 0) continue;
            for (int64_t c = 0; c < C; c++) to[c] += in[row * C + c];
        }
    }
}
