// Both ends of the model: the embedding with its deterministic gradient (embed_... of kernels.h),
// and cross entropy with its gradient in one kernel.
#include "sort.cuh"
#include <float.h>

// ---- embedding ------------------------------------------------------------------------------
// Bytes: one row read, one written a token (8 KB in bf16 at C = 2048). A thread moves 16 bytes.
static __global__ void embed_kernel(floatX *out, const int *ids, const floatX *W, int64_t packs,
                                    int C) {
    int per_row = C / PACK;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < packs;
         i += (int64_t)gridDim.x * blockDim.x) {
        int64_t row = i / per_row;
        int64_t column = (i % per_row) * PACK;
        *(int4 *)(out + row * C + column) = *(const int4 *)(W + (int64_t)ids[row] * C + column);
    }
}
void embed_forward(floatX *out, const int *ids, const floatX *W, int64_t R, int64_t C) {
    kernel_begin("embed_forward", 0);
    require_packs("hidden_size", C);
    int64_t packs = (int64_t)R * (C / PACK);
    if (packs == 0) return;
    embed_kernel<<<grid_for(packs, 256, 1 << 20), 256, 0, compute_stream()>>>(out, ids, W, packs,
                                                                              C);
    LAUNCHED();
}

// out_r = W[id_r]  =>  dW_v = sum over r with id_r = v of dx_r, in ascending r. Positions are
// sorted by id, 8 bits of it at a time from the lowest (each pass is stable, so positions stay
// ascending); then the first position of every run of equal ids owns row id and adds the run up.
struct DigitSource { // item i is position order[i] (or i in the first pass)
    const int *order, *ids;
    int *sorted;
    int n, shift;
    __device__ int position(int i) const { return order ? order[i] : i; }
    __device__ int count() const { return n; }
    __device__ int keys() const { return 1; }
    __device__ int key(int i, int) const { return ids[position(i)] >> shift & 255; }
    __device__ void place(int i, int, int at) const { sorted[at] = position(i); }
};
// Block (i, column strip): a thread owns PACK columns. Runs are long only for a few frequent ids:
// four rows are in flight at a time.
static __global__ void embed_backward_kernel(gradX *dW, const floatX *dx, const int *ids,
                                             const int *order, int accumulate, int pad, int R,
                                             int C) {
    int i = blockIdx.x;
    int id = ids[order[i]];
    int64_t column = (int64_t)(blockIdx.y * blockDim.x + threadIdx.x) * PACK;
    if (id == pad || (i > 0 && ids[order[i - 1]] == id) || column >= C) return;
    gradX *to = dW + (int64_t)id * C + column;
    float sum[PACK];
    for (int l = 0; l < PACK; l++) sum[l] = accumulate ? to[l].v : 0;
    for (int j = i; j < R; j += 4) {
        float x[4][PACK];
        int n = 0;
#pragma unroll
        for (int u = 0; u < 4; u++) {
            int at = j + u < R ? order[j + u] : -1;
            if (n == u && at >= 0 && ids[at] == id) {
                load_n(x[u], dx + (int64_t)at * C + column);
                n++;
            }
        }
#pragma unroll
        for (int u = 0; u < 4; u++)
            for (int l = 0; l < PACK; l++)
                if (u < n) sum[l] += x[u][l];
        if (n < 4) break;
    }
    for (int l = 0; l < PACK; l += 4) {
        float4 four = { sum[l], sum[l + 1], sum[l + 2], sum[l + 3] };
        *(float4 *)(to + l) = four;
    }
}
void embed_backward(gradX *dW, const floatX *dx, const int *ids, int accumulate, int pad, int64_t R,
                    int64_t V, int64_t C) {
    kernel_begin("embed_backward", 0);
    require_packs("hidden_size", C);
    if (!accumulate) device_zero(dW, (size_t)V * C * sizeof *dW);
    if (R == 0) return;
    size_t counts = sort_counts_size(256, R);
    int *scratch = (int *)device_scratch(SCRATCH_SORT, (counts + 257 + 2 * R) * sizeof(int));
    int *start = scratch + counts;
    int *order[2] = { start + 257, start + 257 + R };
    int pass = 0;
    for (int shift = 0; shift == 0 || (V - 1) >> shift > 0; shift += 8, pass++) {
        DigitSource source = { pass ? order[(pass + 1) % 2] : 0, ids, order[pass % 2], (int)R,
                               shift };
        stable_sort(scratch, start, source, 256, R, 1);
    }
    int threads = C / PACK < 256 ? (int)div_up(C / PACK, 32) * 32 : 256;
    dim3 grid((unsigned)R, (unsigned)div_up(C / PACK, threads));
    embed_backward_kernel<<<grid, threads, 0, compute_stream()>>>(
        dW, dx, ids, order[(pass + 1) % 2], accumulate, pad, R, C);
    LAUNCHED();
}

// ---- cross entropy --------------------------------------------------------------------------
// With m = max_j x_j and s = sum_j e^(x_j - m):  -log p_t = log s + m - x_t,  d/dx_j of it = e^(x_j
// - m) / s - [j = t]. One block a row. First pass: every thread keeps its own running (m, s) and
// rescales s when m grows; second pass writes the gradient over the logits. Bytes: read, read again
// (a row of 152k bf16 is 304 KB: the second read comes from the L2 cache), write.
enum { CE_THREADS = 512 };
// e^x; in bf16 builds by the multifunction unit alone, as sigmoid in experts.cuh: a thousandth of
// the rounding that follows.
static __device__ __forceinline__ float exp_x(float x) {
    return sizeof(floatX) == 2 ? __expf(x) : expf(x);
}
template <class T>
static __device__ __forceinline__ void softmax_merge(float &m, T &s, float m2, T s2) {
    float most = fmaxf(m, m2);
    s = s * expf(m - most) + s2 * expf(m2 - most);
    m = most;
}
template <int W>
static __global__ void __launch_bounds__(CE_THREADS)
    cross_entropy_kernel(floatX *logits, double *loss, const int *targets, real seed, int backward,
                         int V) {
    __shared__ float shared_m[CE_THREADS / 32];
    __shared__ double shared_s[CE_THREADS / 32];
    int target = targets[blockIdx.x];
    int lane = threadIdx.x % 32;
    int warp = threadIdx.x / 32;
    floatX *row = logits + (int64_t)blockIdx.x * V;
    if (target < 0) {
        float zero[W] = {};
        if (backward)
            for (int64_t i = threadIdx.x * W; i < V; i += CE_THREADS * W) store_n(row + i, zero);
        if (threadIdx.x == 0) loss[blockIdx.x] = 0;
        return;
    }
    float m = -FLT_MAX; // not -infinity: two of them would have no difference
    float s = 0;
    for (int i = threadIdx.x * W; i < V; i += CE_THREADS * W) {
        float x[W];
        float most = m;
        load_n(x, row + i);
        for (int l = 0; l < W; l++) most = fmaxf(most, x[l]);
        if (most > m) {
            s *= exp_x(m - most);
            m = most;
        }
        for (int l = 0; l < W; l++) s += exp_x(x[l] - m);
    }
    double total = s; // beside the 1 of a sure target, 1e5 terms of 1e-9 would not move a float
    for (int d = 16; d > 0; d /= 2) {
        float m2 = __shfl_xor_sync(0xffffffffu, m, d);
        double s2 = __shfl_xor_sync(0xffffffffu, total, d);
        softmax_merge(m, total, m2, s2);
    }
    if (lane == 0) {
        shared_m[warp] = m;
        shared_s[warp] = total;
    }
    __syncthreads();
    m = shared_m[0];
    total = shared_s[0];
    for (int w = 1; w < CE_THREADS / 32; w++) softmax_merge(m, total, shared_m[w], shared_s[w]);
    if (threadIdx.x == 0) loss[blockIdx.x] = log(total) + ((double)m - (double)load(row + target));
    if (!backward) return;
    __syncthreads(); // the target's logit is read before it is overwritten
    float scale = (float)(1 / total) * seed;
    for (int i = threadIdx.x * W; i < V; i += CE_THREADS * W) {
        float x[W];
        load_n(x, row + i);
        for (int l = 0; l < W; l++) x[l] = exp_x(x[l] - m) * scale;
        if ((unsigned)(target - i) < (unsigned)W)
#pragma unroll
            for (int l = 0; l < W; l++)
                if (i + l == target) x[l] -= seed;
        store_n(row + i, x);
    }
}
static __global__ void loss_kernel(double *loss_sum, const double *loss, int N) {
    __shared__ double shared[32];
    double sum = 0;
    for (int i = threadIdx.x; i < N; i += blockDim.x) sum += loss[i];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) loss_sum[0] += sum;
}
void cross_entropy(floatX *logits, double *loss_sum, const int *targets, real seed, int backward,
                   int64_t N, int64_t V) {
    kernel_begin("cross_entropy", 0);
    if (N == 0) return;
    double *loss = (double *)device_scratch(SCRATCH_PARTIAL, N * sizeof(double));
    if (V % PACK == 0 && (size_t)logits % 16 == 0)
        cross_entropy_kernel<PACK><<<(unsigned)N, CE_THREADS, 0, compute_stream()>>>(
            logits, loss, targets, seed, backward, V);
    else
        cross_entropy_kernel<1><<<(unsigned)N, CE_THREADS, 0, compute_stream()>>>(
            logits, loss, targets, seed, backward, V);
    LAUNCHED();
    loss_kernel<<<1, 1024, 0, compute_stream()>>>(loss_sum, loss, N);
    LAUNCHED();
}
