// Rows through an index: the gather, and its adjoint, the weighted sum of a token's rows (rows_...
// of kernels.h). Sums read through the inverse index in a fixed order: nothing is scattered,
// nothing is atomic (I8, deterministic).
//   out_p = sum over k of score_pk Y[token_row_pk]
// Bytes of rows_weighted_sum with K = 8, C = 2048: 8 rows read and one written a token, 36.9
// KB: 1.21 GB at 32k tokens, 0.28 ms at 4.3 TB/s. A thread owns 16 bytes of one token's row; a
// row's index and weight are the same for all threads of a token and come from the L1 cache.
#include "common.cuh"

enum { THREADS = 256 };

enum { AT_A_TIME = 4 }; // rows in flight: their loads are started before any is added
static __global__ void __launch_bounds__(THREADS, 4)
    sum_kernel(floatX *out, const floatX *in, const int *index, const real *weight, int64_t packs,
               int J, int C) {
    int per_row = C / PACK;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < packs;
         i += (int64_t)gridDim.x * THREADS) {
        int64_t row = i / per_row;
        int64_t column = (i - row * per_row) * PACK;
        float sum[PACK] = {};
        for (int first = 0; first < J; first += AT_A_TIME) {
            int from[AT_A_TIME];
            float w[AT_A_TIME];
            int4 bits[AT_A_TIME];
#pragma unroll
            for (int u = 0; u < AT_A_TIME; u++)
                from[u] = first + u < J ? index[row * J + first + u] : -1;
#pragma unroll
            for (int u = 0; u < AT_A_TIME; u++) {
                w[u] = weight && from[u] >= 0 ? weight[row * J + first + u] : 1;
                bits[u] = from[u] >= 0 ? *(const int4 *)(in + (int64_t)from[u] * C + column)
                                       : make_int4(0, 0, 0, 0);
            }
#pragma unroll
            for (int u = 0; u < AT_A_TIME; u++) {
                floatX x[PACK];
                memcpy(x, &bits[u], 16);
#pragma unroll
                for (int l = 0; l < PACK; l++)
                    sum[l] += w[u] * load(x + l); // a row that is not there adds 0
            }
        }
        store_n(out + row * C + column, sum);
    }
}
static void sum_rows(floatX *out, const floatX *in, const int *index, const real *weight, int64_t R,
                     int J, int C) {
    require_packs("the width of summed rows", C);
    int64_t packs = R * (C / PACK);
    if (packs == 0) return;
    sum_kernel<<<grid_for(packs, THREADS, 1 << 20), THREADS, 0, compute_stream()>>>(
        out, in, index, weight, packs, J, C);
    LAUNCHED();
}
void rows_weighted_sum(floatX *out, const floatX *Y, const real *score, const RowIndex *plan,
                       int64_t C) {
    kernel_begin("rows_weighted_sum", 0);
    sum_rows(out, Y, plan->token_row, score, plan->P, plan->K, C);
}
void rows_sum(floatX *out, const floatX *in, const int *index, int64_t R, int64_t J, int64_t C) {
    kernel_begin("rows_sum", 0);
    sum_rows(out, in, index, 0, R, J, C);
}

// One thread a number: rows of scores are K = 8 reals, too short for packets.
static __global__ void sum_real_kernel(real *out, const real *in, const int *index, int64_t n,
                                       int J, int C) {
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n;
         i += (int64_t)gridDim.x * THREADS) {
        int64_t row = i / C;
        int64_t column = i % C;
        real sum = 0;
        for (int j = 0; j < J; j++) {
            int64_t from = index[row * J + j];
            if (from >= 0) sum += in[from * C + column];
        }
        out[i] = sum;
    }
}
void rows_sum_real(real *out, const real *in, const int *index, int64_t R, int64_t J, int64_t C) {
    kernel_begin("rows_sum_real", 0);
    int64_t n = (int64_t)R * C;
    if (n == 0) return;
    sum_real_kernel<<<grid_for(n, THREADS, 1 << 20), THREADS, 0, compute_stream()>>>(out, in, index,
                                                                                     n, J, C);
    LAUNCHED();
}

// Word: int4 where the rows and their addresses allow it, else 4 bytes.
template <class Word>
static __global__ void gather_kernel(Word *out, const Word *in, const int *index, int64_t n,
                                     int64_t per_row) {
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n;
         i += (int64_t)gridDim.x * THREADS) {
        int64_t from = index[i / per_row];
        Word zero = {};
        out[i] = from < 0 ? zero : in[from * per_row + i % per_row];
    }
}
template <class Word>
static void gather(void *out, const void *in, const int *index, int64_t n, size_t row_bytes) {
    int64_t per_row = (int64_t)(row_bytes / sizeof(Word));
    int64_t words = n * per_row;
    if (words == 0) return;
    gather_kernel<Word><<<grid_for(words, THREADS, 1 << 20), THREADS, 0, compute_stream()>>>(
        (Word *)out, (const Word *)in, index, words, per_row);
    LAUNCHED();
}
void rows_gather(void *out, const void *in, const int *index, int64_t n, size_t row_bytes) {
    kernel_begin("rows_gather", 0);
    if (row_bytes % 4) die("rows of %zu bytes cannot be gathered|a multiple of 4", row_bytes);
    if ((row_bytes | (size_t)out | (size_t)in) % 16 == 0)
        gather<int4>(out, in, index, n, row_bytes);
    else
        gather<int>(out, in, index, n, row_bytes);
}
