// Causal attention with grouped KV heads by tiles of scores that never leave the registers (flash
// attention), on mma.sync: sm_80 and newer.
//
//   S = scale q k^T, P_tj = e^(S_tj - lse_t) for j <= t else 0, o = P v.            With d = dL/d:
//   dP = do v^T;  dS = P (dP - delta), delta_t = sum_j P_tj dP_tj = do_t . o_t;  dq = scale dS k,
//   dk = scale dS^T q,  dv = P^T do.
//
// forward   a block owns 64 queries of a head, a warp 16 of them, and walks over the keys with a
// running maximum m and sum l of each row: when m grows,
//           o and l shrink by e^(m_old - m_new). P goes from the accumulators of q k^T into the
//           left operand of P v without shared memory.
// backward  delta first. Then one kernel owns 64 keys of a KV head and walks over the queries of
// all its H/KV query heads (dk, dv); another owns
//           64 queries and walks over the keys (dq). S and dP are computed in both: 7 products
//           instead of 5, but every sum has one owner and one order, without atomics (I8) and
//           without buffers between them.
// FLOPs of a causal head: forward 2 T^2 D, backward 7 T^2 D. Bytes: q, k, v, o once; K and V of a
// head again for each of T/64 query tiles, from the L2 cache. The tile that moves is copied by
// cp.async while its predecessor is multiplied. Long rows of the triangle start first.
#include "attention.cuh"
#include "mma.cuh"

enum {
    OWNED = 64,
    WALKED = sizeof(floatX) == 2 ? 64 : 32,
    WALKED_BACKWARD = 32,
    ATTENTION_THREADS = 128
}; // rows; 4 warps x 16 owned rows
static const float LOG2E = 1.44269504088896341f, LN2 = 0.69314718055994531f;

// ---- pieces ---------------------------------------------------------------------------------
template <int D> struct Head {
    enum { LD = D + PACK, PACKS = D / PACK };
}; // rows of shared tiles: an odd multiple of 16 bytes
// tile (N, D) = rows [first, first + N) of a head; x points at its row 0, rows are `stride`
// elements apart; rows from T on are zeros.
template <int D, int N>
static __device__ __forceinline__ void load_rows(floatX *tile, const floatX *x, int64_t stride,
                                                 int first, int T) {
#pragma unroll 4
    for (int id = threadIdx.x; id < N * Head<D>::PACKS; id += ATTENTION_THREADS) {
        int row = id / Head<D>::PACKS, column = id % Head<D>::PACKS * PACK;
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
    for (int j = 0; j < N; j++) acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0;
#pragma unroll
    for (int d = 0; d < D; d += 16) {
        FragmentA fragment;
        load_a<false>(fragment, a, Head<D>::LD, row, d);
        multiply_row<N, false>(acc, fragment, b, Head<D>::LD, 0, d);
    }
}
// out (16, D) += p (16, 8 N), rounded, times the N * 8 rows of x (., D).
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
// The warp's 16 rows of acc times factor[row half], through its own 16 rows of `tile`, to x (row
// stride `stride`); rows from T on are dropped.
template <int D>
static __device__ __forceinline__ void store_rows(floatX *x, int64_t stride, int first, int T,
                                                  floatX *tile, const float (&acc)[D / 8][4],
                                                  const float (&factor)[2]) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    floatX *mine = tile + 16 * warp * Head<D>::LD;
#pragma unroll
    for (int j = 0; j < D / 8; j++)
        for (int l = 0; l < 4; l++)
            store(mine + (g + l / 2 * 8) * Head<D>::LD + 8 * j + 2 * t + l % 2,
                  acc[j][l] * factor[l / 2]);
    __syncwarp();
    for (int id = lane; id < 16 * Head<D>::PACKS; id += 32) {
        int row = id / Head<D>::PACKS, column = id % Head<D>::PACKS * PACK,
            at = first + 16 * warp + row;
        if (at < T)
            *(int4 *)(x + at * stride + column) =
                *(const int4 *)(mine + row * Head<D>::LD + column);
    }
}

// ---- forward --------------------------------------------------------------------------------
// Grid (query tiles, H, B).
template <int D>
static __global__ void __launch_bounds__(ATTENTION_THREADS, 2)
    attention_kernel(floatX *o, real *lse, const floatX *q, const floatX *k, const floatX *v, int T,
                     int H, int KV, float scale) {
    extern __shared__ __align__(16) floatX shared[];
    floatX *tile_q = shared, *ring = tile_q + OWNED * Head<D>::LD; // (2, {k, v}, WALKED, LD)
    const int SIZE = WALKED * Head<D>::LD;
    int q0 = (int)(gridDim.x - 1 - blockIdx.x) * OWNED, h = blockIdx.y, b = blockIdx.z,
        warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    int64_t row_q = (int64_t)H * D, row_k = (int64_t)KV * D, at_q = (int64_t)b * T * row_q + h * D,
            at_k = (int64_t)b * T * row_k + h / (H / KV) * D;
    int end = q0 + OWNED < T ? q0 + OWNED : T, tiles = (end + WALKED - 1) / WALKED;
    float out[D / 8][4] = {}, most[2] = { -INFINITY, -INFINITY }, sum[2] = { 0, 0 },
                  c = scale * LOG2E;

    auto load = [&](int i) {
        floatX *to = ring + i % 2 * 2 * SIZE;
        if (i < tiles)
            load_rows<D, WALKED>(to, k + at_k, row_k, i * WALKED, T),
                load_rows<D, WALKED>(to + SIZE, v + at_k, row_k, i * WALKED, T);
        ptx_cp_async_commit();
    };
    load_rows<D, OWNED>(tile_q, q + at_q, row_q, q0, T);
    load(0);
    for (int i = 0; i < tiles; i++) {
        load(i + 1);
        ptx_cp_async_wait<1>();
        __syncthreads();
        const floatX *tile_k = ring + i % 2 * 2 * SIZE, *tile_v = tile_k + SIZE;
        float p[WALKED / 8][4];
        scores<D, WALKED / 8>(p, tile_q, 16 * warp, tile_k);
        if ((i + 1) * WALKED > q0 + 1)
            for (int j = 0; j < WALKED / 8; j++)
                for (int l = 0; l < 4; l++)
                    if (i * WALKED + 8 * j + 2 * t + l % 2 > q0 + 16 * warp + g + l / 2 * 8)
                        p[j][l] = -INFINITY;
#pragma unroll
        for (int r = 0; r < 2; r++) { // rows g and g + 8; key 0 is visible to all: most is finite
                                      // from the first tile on
            float top = most[r], total = 0;
            for (int j = 0; j < WALKED / 8; j++)
                top = fmaxf(top, fmaxf(p[j][2 * r], p[j][2 * r + 1]));
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
            float shrink = exp2f((most[r] - top) * c);
            for (int j = 0; j < WALKED / 8; j++)
                for (int l = 2 * r; l < 2 * r + 2; l++)
                    total += p[j][l] = exp2f((p[j][l] - top) * c);
            sum[r] = sum[r] * shrink + total, most[r] = top; // of this lane's columns
            for (int j = 0; j < D / 8; j++) out[j][2 * r] *= shrink, out[j][2 * r + 1] *= shrink;
        }
        accumulate<D, WALKED / 8>(out, p, tile_v);
        __syncthreads();
    }
    float inverse[2];
    for (int r = 0; r < 2; r++) {
        sum[r] = group_sum(sum[r], 4);
        inverse[r] = 1 / sum[r];
        int row = q0 + 16 * warp + g + 8 * r;
        if (t == 0 && row < T)
            lse[((int64_t)b * H + h) * T + row] = most[r] * scale + LN2 * log2f(sum[r]);
    }
    store_rows<D>(o + at_q, row_q, q0, T, tile_q, out, inverse);
}

// ---- backward -------------------------------------------------------------------------------
// delta (B,H,T) = do . o; D / PACK lanes a row of (B,T,H).
static __global__ void delta_kernel(float *delta, const floatX *d_o, const floatX *o, int64_t rows,
                                    int T, int H, int D) {
    int lanes = D / PACK;
    int64_t row = (int64_t)blockIdx.x * (blockDim.x / lanes) + threadIdx.x / lanes,
            at = row * D + threadIdx.x % lanes * PACK;
    float x[PACK] = {}, y[PACK] = {}, sum = 0;
    if (row < rows) load_n(x, d_o + at), load_n(y, o + at);
    for (int l = 0; l < PACK; l++) sum += x[l] * y[l];
    sum = group_sum(sum, lanes);
    if (row < rows && threadIdx.x % lanes == 0)
        delta[(row / H / T * H + row % H) * T + row / H % T] = sum;
}
// Grid (key tiles, KV, B). Scores are transposed: rows are the block's keys, columns the queries
// that walk by, so that P^T and dS^T are left operands.
template <int D>
static __global__ void __launch_bounds__(ATTENTION_THREADS, 2)
    key_gradient_kernel(floatX *dk, floatX *dv, const floatX *d_o, const float *delta,
                        const real *lse, const floatX *q, const floatX *k, const floatX *v, int T,
                        int H, int KV, float scale) {
    extern __shared__ __align__(16) floatX shared[];
    const int SIZE = WALKED_BACKWARD * Head<D>::LD, N = WALKED_BACKWARD / 8;
    floatX *tile_k = shared, *tile_v = tile_k + OWNED * Head<D>::LD,
           *ring = tile_v + OWNED * Head<D>::LD; // (2, {q, do}, WALKED_BACKWARD, LD)
    __shared__ float shared_lse[2][WALKED_BACKWARD], shared_delta[2][WALKED_BACKWARD];
    int k0 = blockIdx.x * OWNED, b = blockIdx.z, group = H / KV, warp = threadIdx.x / 32,
        g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    int64_t row_q = (int64_t)H * D, row_k = (int64_t)KV * D,
            at_k = (int64_t)b * T * row_k + blockIdx.y * D;
    int first = k0 / WALKED_BACKWARD,
        per_head = (T + WALKED_BACKWARD - 1) / WALKED_BACKWARD - first, steps = group * per_head;
    float out_k[D / 8][4] = {}, out_v[D / 8][4] = {}, c = scale * LOG2E;

    auto load = [&](int i) {
        if (i < steps) {
            int h = blockIdx.y * group + i / per_head,
                q0 = (first + i % per_head) * WALKED_BACKWARD, row = q0 + threadIdx.x;
            int64_t at_q = (int64_t)b * T * row_q + h * D, at_row = ((int64_t)b * H + h) * T + row;
            floatX *to = ring + i % 2 * 2 * SIZE;
            load_rows<D, WALKED_BACKWARD>(to, q + at_q, row_q, q0, T);
            load_rows<D, WALKED_BACKWARD>(to + SIZE, d_o + at_q, row_q, q0, T);
            if (threadIdx.x < WALKED_BACKWARD) {
                shared_lse[i % 2][threadIdx.x] =
                    row < T ? lse[at_row] * LOG2E
                            : INFINITY; // e^-inf: queries from T on have P = 0
                shared_delta[i % 2][threadIdx.x] = row < T ? delta[at_row] : 0;
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
        const floatX *tile_q = ring + i % 2 * 2 * SIZE, *tile_do = tile_q + SIZE;
        int q0 = (first + i % per_head) * WALKED_BACKWARD;
        float p[N][4], ds[N][4];
        scores<D, N>(p, tile_k, 16 * warp, tile_q);
#pragma unroll
        for (int j = 0; j < N; j++)
            for (int l = 0; l < 4; l++) {
                int column = 8 * j + 2 * t + l % 2;
                bool visible = k0 + 16 * warp + g + l / 2 * 8 <= q0 + column;
                p[j][l] = visible ? exp2f(p[j][l] * c - shared_lse[i % 2][column]) : 0;
            }
        accumulate<D, N>(out_v, p, tile_do);
        scores<D, N>(ds, tile_v, 16 * warp, tile_do);
#pragma unroll
        for (int j = 0; j < N; j++)
            for (int l = 0; l < 4; l++)
                ds[j][l] = p[j][l] * (ds[j][l] - shared_delta[i % 2][8 * j + 2 * t + l % 2]);
        accumulate<D, N>(out_k, ds, tile_q);
        __syncthreads();
    }
    float one[2] = { 1, 1 }, scales[2] = { scale, scale };
    store_rows<D>(dk + at_k, row_k, k0, T, tile_k, out_k, scales);
    store_rows<D>(dv + at_k, row_k, k0, T, tile_v, out_v, one);
}
// Grid (query tiles, H, B).
template <int D>
static __global__ void __launch_bounds__(ATTENTION_THREADS, 2)
    query_gradient_kernel(floatX *dq, const floatX *d_o, const float *delta, const real *lse,
                          const floatX *q, const floatX *k, const floatX *v, int T, int H, int KV,
                          float scale) {
    extern __shared__ __align__(16) floatX shared[];
    const int SIZE = WALKED_BACKWARD * Head<D>::LD, N = WALKED_BACKWARD / 8;
    floatX *tile_q = shared, *tile_do = tile_q + OWNED * Head<D>::LD,
           *ring = tile_do + OWNED * Head<D>::LD; // (2, {k, v}, WALKED_BACKWARD, LD)
    int q0 = (int)(gridDim.x - 1 - blockIdx.x) * OWNED, h = blockIdx.y, b = blockIdx.z,
        warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    int64_t row_q = (int64_t)H * D, row_k = (int64_t)KV * D, at_q = (int64_t)b * T * row_q + h * D,
            at_k = (int64_t)b * T * row_k + h / (H / KV) * D;
    int end = q0 + OWNED < T ? q0 + OWNED : T,
        tiles = (end + WALKED_BACKWARD - 1) / WALKED_BACKWARD;
    float out[D / 8][4] = {}, row_lse[2], row_delta[2], c = scale * LOG2E;
    for (int r = 0; r < 2; r++) {
        int row = q0 + 16 * warp + g + 8 * r;
        int64_t at = ((int64_t)b * H + h) * T + row;
        row_lse[r] = row < T ? lse[at] * LOG2E : INFINITY, row_delta[r] = row < T ? delta[at] : 0;
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
    load(0);
    for (int i = 0; i < tiles; i++) {
        load(i + 1);
        ptx_cp_async_wait<1>();
        __syncthreads();
        const floatX *tile_k = ring + i % 2 * 2 * SIZE, *tile_v = tile_k + SIZE;
        float p[N][4], ds[N][4];
        scores<D, N>(p, tile_q, 16 * warp, tile_k);
        scores<D, N>(ds, tile_do, 16 * warp, tile_v);
#pragma unroll
        for (int j = 0; j < N; j++)
            for (int l = 0; l < 4; l++) {
                bool visible =
                    i * WALKED_BACKWARD + 8 * j + 2 * t + l % 2 <= q0 + 16 * warp + g + l / 2 * 8;
                float prob = visible ? exp2f(p[j][l] * c - row_lse[l / 2]) : 0;
                ds[j][l] = prob * (ds[j][l] - row_delta[l / 2]);
            }
        accumulate<D, N>(out, ds, tile_k);
        __syncthreads();
    }
    float scales[2] = { scale, scale };
    store_rows<D>(dq + at_q, row_q, q0, T, tile_q, out, scales);
}

// ---- launches -------------------------------------------------------------------------------
// Opts a kernel into `bytes` of shared memory, once.
#define ATTENTION_KERNEL(kernel, bytes)                                                          \
    do {                                                                                         \
        static int opted;                                                                        \
        if (!opted)                                                                              \
            CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, \
                                            (int)(bytes)));                                      \
        opted = 1;                                                                               \
    } while (0)
static dim3 tile_grid(int T, int heads, int B) {
    return dim3((unsigned)div_up(T, OWNED), (unsigned)heads, (unsigned)B);
}
template <int D>
static void forward(floatX *o, real *lse, const floatX *q, const floatX *k, const floatX *v, int B,
                    int T, int H, int KV) {
    size_t bytes = (size_t)(OWNED + 4 * WALKED) * Head<D>::LD * sizeof(floatX);
    ATTENTION_KERNEL(attention_kernel<D>, bytes);
    attention_kernel<D><<<tile_grid(T, H, B), ATTENTION_THREADS, bytes, compute_stream()>>>(
        o, lse, q, k, v, T, H, KV, 1 / sqrtf((float)D));
    LAUNCHED();
}
template <int D>
static void backward(floatX *dq, floatX *dk, floatX *dv, const floatX *d_o, const floatX *o,
                     const real *lse, const floatX *q, const floatX *k, const floatX *v,
                     float *delta, int B, int T, int H, int KV) {
    size_t bytes = (size_t)(2 * OWNED + 4 * WALKED_BACKWARD) * Head<D>::LD * sizeof(floatX);
    int64_t rows = (int64_t)B * T * H;
    float scale = 1 / sqrtf((float)D);
    delta_kernel<<<grid_for(rows, 256 / (D / PACK)), 256, 0, compute_stream()>>>(delta, d_o, o,
                                                                                 rows, T, H, D);
    LAUNCHED();
    ATTENTION_KERNEL(key_gradient_kernel<D>, bytes);
    key_gradient_kernel<D><<<tile_grid(T, KV, B), ATTENTION_THREADS, bytes, compute_stream()>>>(
        dk, dv, d_o, delta, lse, q, k, v, T, H, KV, scale);
    LAUNCHED();
    ATTENTION_KERNEL(query_gradient_kernel<D>, bytes);
    query_gradient_kernel<D><<<tile_grid(T, H, B), ATTENTION_THREADS, bytes, compute_stream()>>>(
        dq, d_o, delta, lse, q, k, v, T, H, KV, scale);
    LAUNCHED();
}
// Calls f<D>(...) for the head sizes that are compiled.
#define BY_HEAD_SIZE(D, f, ...)                                                       \
    do {                                                                              \
        if (D == 128)                                                                 \
            f<128>(__VA_ARGS__);                                                      \
        else if (D == 64)                                                             \
            f<64>(__VA_ARGS__);                                                       \
        else if (D == 32)                                                             \
            f<32>(__VA_ARGS__);                                                       \
        else if (D == 16)                                                             \
            f<16>(__VA_ARGS__);                                                       \
        else                                                                          \
            die("head_dim %d|the CUDA attention kernels take 16, 32, 64 and 128", D); \
    } while (0)
void flash_attention_forward(floatX *o, real *lse, const floatX *q, const floatX *k,
                             const floatX *v, int B, int T, int H, int KV, int D) {
    BY_HEAD_SIZE(D, forward, o, lse, q, k, v, B, T, H, KV);
}
void flash_attention_backward(floatX *dq, floatX *dk, floatX *dv, const floatX *d_o,
                              const floatX *o, const real *lse, const floatX *q, const floatX *k,
                              const floatX *v, float *delta, int B, int T, int H, int KV, int D) {
    BY_HEAD_SIZE(D, backward, dq, dk, dv, d_o, o, lse, q, k, v, delta, B, T, H, KV);
}
