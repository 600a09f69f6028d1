// Causal attention with grouped KV heads by tiles of scores that never leave the registers (flash
// attention), on mma.sync: sm_80 and newer, both precisions. The functions flash_attention_... of
// attention.h are here.
//
//   S = scale q k^T,  P_tj = e^(S_tj - lse_t) for j <= t, else 0,  o = P v.     With d = dL/d:
//   dP = do v^T,  dS = P (dP - delta),  delta_t = sum_j P_tj dP_tj = do_t . o_t,
//   dq = scale dS k,  dk = scale dS^T q,  dv = P^T do.
//
// Forward. A block owns 64 queries of a head, a warp 16 of them, and walks over the keys with a
// running maximum m and sum l of each row: when m grows, o and l shrink by e^(m_old - m_new). P
// goes from the accumulators of q k^T into the left operand of P v without shared memory. Backward.
// delta comes first. Then one kernel owns 64 keys of a KV head and walks over the queries of all
// its H / KV query heads (dk, dv); another owns 64 queries and walks over the keys (dq). S and dP
// are computed in both: 7 products instead of 5, but every sum has one owner and one order, without
// atomics (I8, deterministic) and without buffers between them.
//
// FLOPs of a causal head: forward 2 T^2 D, backward 7 T^2 D. Bytes: q, k, v and o once; K and V of
// a head again for each of T / 64 query tiles, from the L2 cache. The tile that moves is copied by
// cp.async while the tile before it is multiplied. Long rows of the triangle start first.
#include "common.cuh"
#include "attention.h"
#include "mma.cuh"

// Rows of the tile that a block owns (16 for each of 4 warps) and of the tile that walks by.
enum { OWNED = 64, WALKED = sizeof(floatX) == 2 ? 64 : 32, WALKED_BACKWARD = 32 };
enum { ATTENTION_THREADS = 128 };
static const float LOG2E = 1.44269504088896341f;
static const float LN2 = 0.69314718055994531f;

// ---- pieces ---------------------------------------------------------------------------------
// Rows of shared tiles are LD elements apart, an odd multiple of 16 bytes (mma.cuh).
template <int D> struct Head {
    enum { LD = D + PACK, PACKS = D / PACK };
};
// Starts tile (N, D) = rows [first, first + N) of a head; x points at its row 0, rows are `stride`
// elements apart, and rows from T on are zeros.
template <int D, int N>
static __device__ __forceinline__ void load_rows(floatX *tile, const floatX *x, int64_t stride,
                                                 int first, int T) {
#pragma unroll 4
    for (int id = threadIdx.x; id < N * Head<D>::PACKS; id += ATTENTION_THREADS) {
        int row = id / Head<D>::PACKS;
        int column = id % Head<D>::PACKS * PACK;
        bool valid = first + row < T;
        copy_pack(tile + row * Head<D>::LD + column,
                  valid ? x + (first + row) * stride + column : x, valid);
    }
}
// acc (16, 8 N) = rows [row, row+16) of a times rows [0, 8 N) of b, both (., D).
template <int D, int N>
static __device__ __forceinline__ void scores(float (&acc)[N][4], const floatX *a, int row,
                                              const floatX *b) {
#pragma unroll
    for (int j = 0; j < N; j++)
        for (int l = 0; l < 4; l++) acc[j][l] = 0;
#pragma unroll
    for (int d = 0; d < D; d += 16) {
        FragmentA fragment;
        load_a<false>(fragment, a, Head<D>::LD, row, d);
        multiply_row<N, false>(acc, fragment, b, Head<D>::LD, 0, d);
    }
}
// out (16, D) += p (16, 8 N), rounded, times the 8 N rows of x (., D).
template <int D, int N>
static __device__ __forceinline__ void accumulate(float (&out)[D / 8][4], const float (&p)[N][4],
                                                  const floatX *x) {
#pragma unroll
    for (int j = 0; j < N; j += 2) {
        FragmentA fragment;
        pack_a(fragment, p[j], p[j + 1]);
        multiply_row<D / 8, true>(out, fragment, x, Head<D>::LD, 0, 8 * j);
    }
}
// Stores the warp's 16 rows of acc times factor[row half], through its own 16 rows of `tile`, to x
// (rows `stride` apart). Rows from T on are dropped.
template <int D>
static __device__ __forceinline__ void store_rows(floatX *x, int64_t stride, int first, int T,
                                                  floatX *tile, const float (&acc)[D / 8][4],
                                                  const float (&factor)[2]) {
    int lane = threadIdx.x % 32;
    int warp = threadIdx.x / 32;
    int g = lane / 4;
    int t = lane % 4;
    floatX *mine = tile + 16 * warp * Head<D>::LD;
#pragma unroll
    for (int j = 0; j < D / 8; j++)
        for (int l = 0; l < 4; l++)
            store(mine + (g + l / 2 * 8) * Head<D>::LD + 8 * j + 2 * t + l % 2,
                  acc[j][l] * factor[l / 2]);
    __syncwarp();
    for (int id = lane; id < 16 * Head<D>::PACKS; id += 32) {
        int row = id / Head<D>::PACKS;
        int column = id % Head<D>::PACKS * PACK;
        int at = first + 16 * warp + row;
        if (at < T)
            *(int4 *)(x + at * stride + column) =
                *(const int4 *)(mine + row * Head<D>::LD + column);
    }
}

// The first key that query `row` of a sequence sees: the first token of its document. position (T):
// the place of each token in its document; 0: the sequence is one document.
static __device__ __forceinline__ int first_key(const int *position, int row, int T) {
    return position && row < T ? row - position[row] : 0;
}
// P (16, 8 N) of 16 rows of `own` and the 8 N rows of `walked`, one of which are queries and the
// other keys: e^(c q k - lse) where they see each other. visible(r, column) and lse(r, column, in
// base 2) are those of row g + 8 r of the 16 and of column `column`.
template <int D, int N, class Visible, class Lse>
static __device__ __forceinline__ void probabilities(float (&p)[N][4], const floatX *own, int row,
                                                     const floatX *walked, float c, Visible visible,
                                                     Lse lse) {
    int t = threadIdx.x % 4;
    scores<D, N>(p, own, row, walked);
#pragma unroll
    for (int j = 0; j < N; j++)
        for (int l = 0; l < 4; l++) {
            int r = l / 2;
            int column = 8 * j + 2 * t + l % 2;
            p[j][l] = visible(r, column) ? exp2f(p[j][l] * c - lse(r, column)) : 0;
        }
}
// dS (16, 8 N) = P (dP - delta) of the same rows; dP is the product of `own` and `walked`, do and v
// or v and do.
template <int D, int N, class Delta>
static __device__ __forceinline__ void score_gradients(float (&ds)[N][4], const float (&p)[N][4],
                                                       const floatX *own, int row,
                                                       const floatX *walked, Delta delta) {
    int t = threadIdx.x % 4;
    scores<D, N>(ds, own, row, walked);
#pragma unroll
    for (int j = 0; j < N; j++)
        for (int l = 0; l < 4; l++)
            ds[j][l] = p[j][l] * (ds[j][l] - delta(l / 2, 8 * j + 2 * t + l % 2));
}

// ---- forward --------------------------------------------------------------------------------
// Grid (query tiles, H, B). Tiles of keys before the first document of the block are skipped.
template <int D>
static __global__ void __launch_bounds__(ATTENTION_THREADS, 2)
    attention_kernel(floatX *o, real *lse, const floatX *q, const floatX *k, const floatX *v,
                     const int *position, int T, int H, int KV, float scale) {
    extern __shared__ __align__(16) floatX shared[];
    floatX *tile_q = shared;
    floatX *ring = tile_q + OWNED * Head<D>::LD; // (2, {k, v}, WALKED, LD)
    const int SIZE = WALKED * Head<D>::LD;
    const int N = WALKED / 8;
    int q0 = (int)(gridDim.x - 1 - blockIdx.x) * OWNED;
    int h = blockIdx.y;
    int b = blockIdx.z;
    int warp = threadIdx.x / 32;
    int g = threadIdx.x % 32 / 4;
    int t = threadIdx.x % 4;
    int64_t row_q = (int64_t)H * D;
    int64_t row_k = (int64_t)KV * D;
    int64_t at_q = (int64_t)b * T * row_q + h * D;
    int64_t at_k = (int64_t)b * T * row_k + h / (H / KV) * D;
    if (position) position += (int64_t)b * T;
    int end = q0 + OWNED < T ? q0 + OWNED : T;
    int tiles = (end + WALKED - 1) / WALKED;
    int begin = first_key(position, q0, T) / WALKED;
    float out[D / 8][4] = {};
    float most[2] = { -INFINITY, -INFINITY };
    float sum[2] = { 0, 0 };
    float c = scale * LOG2E;
    int row[2], first[2]; // this thread's queries, and the first key of each
    for (int r = 0; r < 2; r++) {
        row[r] = q0 + 16 * warp + g + 8 * r;
        first[r] = first_key(position, row[r], T);
    }
    auto load = [&](int i) {
        floatX *to = ring + i % 2 * 2 * SIZE;
        if (i < tiles) {
            load_rows<D, WALKED>(to, k + at_k, row_k, i * WALKED, T);
            load_rows<D, WALKED>(to + SIZE, v + at_k, row_k, i * WALKED, T);
        }
        ptx_cp_async_commit();
    };
    load_rows<D, OWNED>(tile_q, q + at_q, row_q, q0, T);
    load(begin);
    for (int i = begin; i < tiles; i++) {
        load(i + 1);
        ptx_cp_async_wait<1>();
        __syncthreads();
        const floatX *tile_k = ring + i % 2 * 2 * SIZE;
        const floatX *tile_v = tile_k + SIZE;
        float p[N][4];
        scores<D, N>(p, tile_q, 16 * warp, tile_k);
        if (position || (i + 1) * WALKED > q0 + 1)
            for (int j = 0; j < N; j++)
                for (int l = 0; l < 4; l++) {
                    int key = i * WALKED + 8 * j + 2 * t + l % 2;
                    if (key > row[l / 2] || key < first[l / 2]) p[j][l] = -INFINITY;
                }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float top = most[r];
            float total = 0;
            for (int j = 0; j < N; j++) top = fmaxf(top, fmaxf(p[j][2 * r], p[j][2 * r + 1]));
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
            float shift = top == -INFINITY ? 0 : top; // a row that has seen no key yet
            float shrink = exp2f((most[r] - shift) * c);
            for (int j = 0; j < N; j++)
                for (int l = 2 * r; l < 2 * r + 2; l++) {
                    p[j][l] = exp2f((p[j][l] - shift) * c);
                    total += p[j][l];
                }
            sum[r] = sum[r] * shrink + total; // of this lane's columns
            most[r] = top;
            for (int j = 0; j < D / 8; j++) {
                out[j][2 * r] *= shrink;
                out[j][2 * r + 1] *= shrink;
            }
        }
        accumulate<D, N>(out, p, tile_v);
        __syncthreads();
    }
    float inverse[2];
    for (int r = 0; r < 2; r++) {
        sum[r] = group_sum(sum[r], 4);
        inverse[r] = 1 / sum[r];
        if (t == 0 && row[r] < T)
            lse[((int64_t)b * H + h) * T + row[r]] = most[r] * scale + LN2 * log2f(sum[r]);
    }
    store_rows<D>(o + at_q, row_q, q0, T, tile_q, out, inverse);
}

// ---- backward -------------------------------------------------------------------------------
// delta (B,H,T) = do . o; D / PACK lanes a row of (B,T,H).
static __global__ void delta_kernel(float *delta, const floatX *d_o, const floatX *o, int64_t rows,
                                    int T, int H, int D) {
    int lanes = D / PACK;
    int64_t row = (int64_t)blockIdx.x * (blockDim.x / lanes) + threadIdx.x / lanes;
    int64_t at = row * D + threadIdx.x % lanes * PACK;
    float x[PACK] = {};
    float y[PACK] = {};
    float sum = 0;
    if (row < rows) {
        load_n(x, d_o + at);
        load_n(y, o + at);
    }
    for (int l = 0; l < PACK; l++) sum += x[l] * y[l];
    sum = group_sum(sum, lanes);
    if (row < rows && threadIdx.x % lanes == 0)
        delta[(row / H / T * H + row % H) * T + row / H % T] = sum;
}
// The first query after `key` that does not see it, T where all do: queries of one document are
// contiguous, so halving finds it.
static __device__ __forceinline__ int last_query(const int *position, int key, int T) {
    if (!position) return T;
    int low = key + 1;
    int high = T;
    while (low < high) {
        int middle = (low + high) / 2;
        if (middle - position[middle] > key)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}
// Grid (key tiles, KV, B). Scores are transposed: rows are the block's keys, columns the queries
// that walk by, so that P^T and dS^T are left operands. Queries after the last document of the
// block's keys are skipped.
template <int D>
static __global__ void __launch_bounds__(ATTENTION_THREADS, 2)
    key_gradient_kernel(floatX *dk, floatX *dv, const floatX *d_o, const float *delta,
                        const real *lse, const floatX *q, const floatX *k, const floatX *v,
                        const int *position, int T, int H, int KV, float scale) {
    extern __shared__ __align__(16) floatX shared[];
    const int SIZE = WALKED_BACKWARD * Head<D>::LD;
    const int N = WALKED_BACKWARD / 8;
    floatX *tile_k = shared;
    floatX *tile_v = tile_k + OWNED * Head<D>::LD;
    floatX *ring = tile_v + OWNED * Head<D>::LD; // (2, {q, do}, WALKED_BACKWARD, LD)
    __shared__ float shared_lse[2][WALKED_BACKWARD], shared_delta[2][WALKED_BACKWARD];
    __shared__ int shared_first[2][WALKED_BACKWARD];
    int k0 = blockIdx.x * OWNED;
    int b = blockIdx.z;
    int group = H / KV;
    int warp = threadIdx.x / 32;
    int g = threadIdx.x % 32 / 4;
    int64_t row_q = (int64_t)H * D;
    int64_t row_k = (int64_t)KV * D;
    int64_t at_k = (int64_t)b * T * row_k + blockIdx.y * D;
    if (position) position += (int64_t)b * T;
    int end = last_query(position, k0 + OWNED < T ? k0 + OWNED - 1 : T - 1, T);
    int first = k0 / WALKED_BACKWARD;
    int per_head = (end + WALKED_BACKWARD - 1) / WALKED_BACKWARD - first;
    int steps = group * per_head;
    float out_k[D / 8][4] = {};
    float out_v[D / 8][4] = {};
    float c = scale * LOG2E;

    auto load = [&](int i) {
        if (i < steps) {
            int h = blockIdx.y * group + i / per_head;
            int q0 = (first + i % per_head) * WALKED_BACKWARD;
            int row = q0 + threadIdx.x;
            int64_t at_q = (int64_t)b * T * row_q + h * D;
            int64_t at_row = ((int64_t)b * H + h) * T + row;
            floatX *to = ring + i % 2 * 2 * SIZE;
            load_rows<D, WALKED_BACKWARD>(to, q + at_q, row_q, q0, T);
            load_rows<D, WALKED_BACKWARD>(to + SIZE, d_o + at_q, row_q, q0, T);
            if (threadIdx.x < WALKED_BACKWARD) { // e^-inf: queries from T on have P = 0
                shared_lse[i % 2][threadIdx.x] = row < T ? lse[at_row] * LOG2E : INFINITY;
                shared_delta[i % 2][threadIdx.x] = row < T ? delta[at_row] : 0;
                shared_first[i % 2][threadIdx.x] = first_key(position, row, T);
            }
        }
        ptx_cp_async_commit();
    };
    load_rows<D, OWNED>(tile_k, k + at_k, row_k, k0, T);
    load_rows<D, OWNED>(tile_v, v + at_k, row_k, k0, T);
    load(0);
    for (int i = 0; i < steps; i++) {
        load(i + 1);
        ptx_cp_async_wait<1>();
        __syncthreads();
        const floatX *tile_q = ring + i % 2 * 2 * SIZE;
        const floatX *tile_do = tile_q + SIZE;
        int q0 = (first + i % per_head) * WALKED_BACKWARD;
        auto visible = [&](int r, int column) {
            int key = k0 + 16 * warp + g + 8 * r;
            return key <= q0 + column && key >= shared_first[i % 2][column];
        };
        float p[N][4], ds[N][4];
        probabilities<D>(p, tile_k, 16 * warp, tile_q, c, visible,
                         [&](int, int column) { return shared_lse[i % 2][column]; });
        accumulate<D, N>(out_v, p, tile_do);
        score_gradients<D>(ds, p, tile_v, 16 * warp, tile_do,
                           [&](int, int column) { return shared_delta[i % 2][column]; });
        accumulate<D, N>(out_k, ds, tile_q);
        __syncthreads();
    }
    float one[2] = { 1, 1 };
    float scales[2] = { scale, scale };
    store_rows<D>(dk + at_k, row_k, k0, T, tile_k, out_k, scales);
    store_rows<D>(dv + at_k, row_k, k0, T, tile_v, out_v, one);
}
// Grid (query tiles, H, B).
template <int D>
static __global__ void __launch_bounds__(ATTENTION_THREADS, 2)
    query_gradient_kernel(floatX *dq, const floatX *d_o, const float *delta, const real *lse,
                          const floatX *q, const floatX *k, const floatX *v, const int *position,
                          int T, int H, int KV, float scale) {
    extern __shared__ __align__(16) floatX shared[];
    const int SIZE = WALKED_BACKWARD * Head<D>::LD;
    const int N = WALKED_BACKWARD / 8;
    floatX *tile_q = shared;
    floatX *tile_do = tile_q + OWNED * Head<D>::LD;
    floatX *ring = tile_do + OWNED * Head<D>::LD; // (2, {k, v}, WALKED_BACKWARD, LD)
    int q0 = (int)(gridDim.x - 1 - blockIdx.x) * OWNED;
    int h = blockIdx.y;
    int b = blockIdx.z;
    int warp = threadIdx.x / 32;
    int g = threadIdx.x % 32 / 4;
    int64_t row_q = (int64_t)H * D;
    int64_t row_k = (int64_t)KV * D;
    int64_t at_q = (int64_t)b * T * row_q + h * D;
    int64_t at_k = (int64_t)b * T * row_k + h / (H / KV) * D;
    if (position) position += (int64_t)b * T;
    int end = q0 + OWNED < T ? q0 + OWNED : T;
    int tiles = (end + WALKED_BACKWARD - 1) / WALKED_BACKWARD;
    int begin = first_key(position, q0, T) / WALKED_BACKWARD;
    float out[D / 8][4] = {};
    float row_lse[2], row_delta[2];
    float c = scale * LOG2E;
    int row[2], first[2];
    for (int r = 0; r < 2; r++) {
        row[r] = q0 + 16 * warp + g + 8 * r;
        first[r] = first_key(position, row[r], T);
        int64_t at = ((int64_t)b * H + h) * T + row[r];
        row_lse[r] = row[r] < T ? lse[at] * LOG2E : INFINITY;
        row_delta[r] = row[r] < T ? delta[at] : 0;
    }
    auto load = [&](int i) {
        floatX *to = ring + i % 2 * 2 * SIZE;
        if (i < tiles) {
            load_rows<D, WALKED_BACKWARD>(to, k + at_k, row_k, i * WALKED_BACKWARD, T);
            load_rows<D, WALKED_BACKWARD>(to + SIZE, v + at_k, row_k, i * WALKED_BACKWARD, T);
        }
        ptx_cp_async_commit();
    };
    load_rows<D, OWNED>(tile_q, q + at_q, row_q, q0, T);
    load_rows<D, OWNED>(tile_do, d_o + at_q, row_q, q0, T);
    load(begin);
    for (int i = begin; i < tiles; i++) {
        load(i + 1);
        ptx_cp_async_wait<1>();
        __syncthreads();
        const floatX *tile_k = ring + i % 2 * 2 * SIZE;
        const floatX *tile_v = tile_k + SIZE;
        auto visible = [&](int r, int column) {
            int key = i * WALKED_BACKWARD + column;
            return key <= row[r] && key >= first[r];
        };
        float p[N][4], ds[N][4];
        probabilities<D>(p, tile_q, 16 * warp, tile_k, c, visible,
                         [&](int r, int) { return row_lse[r]; });
        score_gradients<D>(ds, p, tile_do, 16 * warp, tile_v,
                           [&](int r, int) { return row_delta[r]; });
        accumulate<D, N>(out, ds, tile_k);
        __syncthreads();
    }
    float scales[2] = { scale, scale };
    store_rows<D>(dq + at_q, row_q, q0, T, tile_q, out, scales);
}

// ---- launches -------------------------------------------------------------------------------
static dim3 tile_grid(int64_t T, int64_t heads, int64_t B) {
    return dim3((unsigned)div_up(T, OWNED), (unsigned)heads, (unsigned)B);
}
template <int D> struct HeadSize {
    enum { value = D };
};
// Calls f with the head size as a type, for the sizes that are compiled.
template <class F> static void for_head_size(int64_t D, F f) {
    if (D == 128)
        f(HeadSize<128>());
    else if (D == 64)
        f(HeadSize<64>());
    else if (D == 32)
        f(HeadSize<32>());
    else if (D == 16)
        f(HeadSize<16>());
    else
        die("head_dim %lld|the CUDA attention kernels take 16, 32, 64 and 128", (long long)D);
}
void flash_attention_forward(floatX *o, real *lse, const floatX *q, const floatX *k,
                             const floatX *v, const int *position, int64_t B, int64_t T, int64_t H,
                             int64_t KV, int64_t head_size) {
    for_head_size(head_size, [&](auto size) {
        const int D = decltype(size)::value;
        size_t bytes = (size_t)(OWNED + 4 * WALKED) * Head<D>::LD * sizeof(floatX);
        opt_into_shared<attention_kernel<D>>(bytes);
        attention_kernel<D><<<tile_grid(T, H, B), ATTENTION_THREADS, bytes, compute_stream()>>>(
            o, lse, q, k, v, position, (int)T, (int)H, (int)KV, 1 / sqrtf((float)D));
        LAUNCHED();
    });
}
void flash_attention_backward(floatX *dq, floatX *dk, floatX *dv, const floatX *d_o,
                              const floatX *o, const real *lse, const floatX *q, const floatX *k,
                              const floatX *v, const int *position, float *delta, int64_t B,
                              int64_t T, int64_t H, int64_t KV, int64_t head_size) {
    for_head_size(head_size, [&](auto size) {
        const int D = decltype(size)::value;
        size_t bytes = (size_t)(2 * OWNED + 4 * WALKED_BACKWARD) * Head<D>::LD * sizeof(floatX);
        int64_t rows = B * T * H;
        float scale = 1 / sqrtf((float)D);
        delta_kernel<<<grid_for(rows, 256 / (D / PACK)), 256, 0, compute_stream()>>>(
            delta, d_o, o, rows, (int)T, (int)H, D);
        LAUNCHED();
        opt_into_shared<key_gradient_kernel<D>>(bytes);
        key_gradient_kernel<D><<<tile_grid(T, KV, B), ATTENTION_THREADS, bytes, compute_stream()>>>(
            dk, dv, d_o, delta, lse, q, k, v, position, (int)T, (int)H, (int)KV, scale);
        LAUNCHED();
        opt_into_shared<query_gradient_kernel<D>>(bytes);
        query_gradient_kernel<D>
            <<<tile_grid(T, H, B), ATTENTION_THREADS, bytes, compute_stream()>>>(
                dq, d_o, delta, lse, q, k, v, position, (int)T, (int)H, (int)KV, scale);
        LAUNCHED();
    });
}
