// The router: which experts a token goes to, with what weight, and the gradient of that choice. The
// functions router_... of kernels.h are here. Logits, probabilities and scores are fp32 whatever
// floatX is: a logit rounded to bf16 makes ties, and ties make routing depend on noise.
//
// Selection is a constant of the backward pass. With p = softmax(z), S the chosen set, d_e the
// gradient of score_e, c = sum_S score d:
//   normalised  score_e = p_e / sum_S p = softmax of z restricted to S, so dz_e = score_e (d_e - c)
//               on S and exactly 0 elsewhere.
//   not         score_e = p_e on S, so dp = d on S, and the Jacobian of softmax gives dz_e =
//               p_e ([e in S] d_e - c).
//   aux         = E sum_e f_e P_e with f constant, P_e the mean of p_e over `positions`: daux/dp_e
//   =
//               E f_e / positions, hence the same Jacobian on f.
//   z           = mean of lse^2: dlse/dz_e = p_e, hence 2 lse p_e / positions.
//
// The three products (R x E x C, E = 128) run on the tensor cores. Forward: bf16 operands are
// exact, sums are fp32. Backward: dz is fp32 and is written as the sum of two bf16 numbers, dz = hi
// + lo (16 bits of mantissa, error 2^-17); then
//   du += [hi | lo] [W ; W]   and   dW = hi^T u + lo^T u
// have bf16 operands. fp32 builds take dz as it is.
// FLOPs: 6 R E C forward and backward (times 2 for the split): 0.1 % of the layer. The kernels here
// are one warp a token and bound by memory: 0.5 KB of logits in, 64 bytes out.
#include "common.cuh"

enum { WARPS = 8, E_MAX = 1024 }; // a warp handles a token at a time

// Sets p (E), shared memory of the warp, to softmax(z) and returns log sum exp z. All lanes.
static __device__ float softmax(float *p, const real *z, int E) {
    int lane = threadIdx.x % 32;
    float top = -INFINITY;
    float sum = 0;
    for (int e = lane; e < E; e += 32) top = fmaxf(top, z[e]);
    top = warp_max(top);
    for (int e = lane; e < E; e += 32) sum += p[e] = expf(z[e] - top);
    sum = group_sum(sum);
    for (int e = lane; e < E; e += 32) p[e] /= sum;
    __syncwarp();
    return top + logf(sum);
}
// One warp: the expert with the largest value, the lowest id of equals, among those whose count is
// not negative. Rows of NaN give the lowest ids: id E stands for "none yet", and any NaN beats it.
// A lane reads its own experts only.
static __device__ int best_left(const float *value, const int *count, int E) {
    int lane = threadIdx.x % 32;
    int id = E;
    float best = 0;
#pragma unroll 1
    for (int e = lane; e < E; e += 32)
        if (count[e] >= 0 && (id == E || value[e] > best)) {
            best = value[e];
            id = e;
        }
    for (int d = 16; d > 0; d /= 2) {
        float other = __shfl_xor_sync(0xffffffffu, best, d);
        int from = __shfl_xor_sync(0xffffffffu, id, d);
        if (from < E && (id == E || other > best || (!(best > other) && from < id))) {
            best = other;
            id = from;
        }
    }
    return id;
}
// Statistics of a block's tokens: partial (gridDim, 2E + 2) doubles: E probabilities, E counts,
// lse^2, entropy. GIVEN: the choice is in topk already (as an argument it spills a register).
template <bool GIVEN>
static __global__ void __launch_bounds__(WARPS * 32)
    route_kernel(int *topk, real *score, double *partial, const real *logits, const real *bias,
                 int normalize, int R, int E, int K, int tokens) {
    extern __shared__ float shared[]; // a warp: E probabilities, E values, E sums, E counts
    __shared__ double tail[WARPS][2];
    int lane = threadIdx.x % 32;
    int warp = threadIdx.x / 32;
    float *p = shared + (int64_t)warp * 4 * E;
    float *value = p + E;
    float *sum = p + 2 * E;
    int *count = (int *)(p + 3 * E);
    for (int e = lane; e < E; e += 32) {
        sum[e] = 0;
        count[e] = 0;
    }
    if (lane == 0) tail[warp][0] = tail[warp][1] = 0;
    int64_t first = (int64_t)blockIdx.x * tokens;
    int64_t last = first + tokens < R ? first + tokens : R;
    for (int64_t r = first + warp; r < last; r += WARPS) {
        const real *z = logits + r * E;
        float lse = softmax(p, z, E);
        float entropy = 0;
        float total = 0;
        for (int e = lane; e < E; e += 32) {
            value[e] = bias ? p[e] + bias[e] : p[e];
            sum[e] += p[e];
            entropy += p[e] == 0 ? 0 : p[e] * (lse - z[e]); // 0 log 0 = 0 also where z is -inf
        }
        entropy = group_sum(entropy);
        if (lane == 0) {
            tail[warp][0] += (double)lse * lse;
            tail[warp][1] += (double)entropy;
        }
        // A negative count marks the experts that are taken; a lane marks its own only.
        for (int k = 0; k < K; k++) {
            int id = GIVEN ? topk[r * K + k] : best_left(value, count, E);
            if (lane == id % 32) count[id] = -1 - count[id]; // undone below
        }
        __syncwarp(); // selection is over: the place of the values is free
        // Ascending ids: every lane looks at its 32nd of the experts, a ballot gives the place.
        int before = 0;
        for (int base = 0; base < E; base += 32) {
            int e = base + lane;
            int taken = e < E && count[e] < 0;
            unsigned ballot = __ballot_sync(0xffffffffu, taken);
            if (taken) {
                int at = before + __popc(ballot & ((1u << lane) - 1));
                topk[r * K + at] = e;
                value[at] = p[e];
                count[e] = -count[e]; // -1 - n becomes n + 1
            }
            before += __popc(ballot);
        }
        __syncwarp();
        for (int k = 0; k < K; k++) total += value[k];
        for (int k = lane; k < K; k += 32)
            score[r * K + k] = normalize ? value[k] / total : value[k];
    }
    __syncthreads();
    double *out = partial + (int64_t)blockIdx.x * (2 * E + 2);
    for (int i = threadIdx.x; i < 2 * E + 2; i += WARPS * 32) {
        double total = 0;
        for (int w = 0; w < WARPS; w++) {
            const float *of_warp = shared + (int64_t)w * 4 * E;
            if (i < E)
                total += (double)of_warp[2 * E + i];
            else if (i < 2 * E)
                total += (double)((const int *)of_warp)[2 * E + i];
            else
                total += tail[w][i - 2 * E];
        }
        out[i] = total;
    }
}
// 32 columns a block; warp w adds partial sums w, w + 32, ...; then the 32 sums are added in order.
enum { STATISTICS_WARPS = 32 };
static __global__ void __launch_bounds__(STATISTICS_WARPS * 32)
    statistics_kernel(RouterStats stats, const double *partial, int blocks, int E) {
    __shared__ double sums[STATISTICS_WARPS][32];
    int lane = threadIdx.x % 32;
    int warp = threadIdx.x / 32;
    int i = blockIdx.x * 32 + lane;
    int width = 2 * E + 2;
    double total = 0;
    if (i < width) {
#pragma unroll 4
        for (int b = warp; b < blocks; b += STATISTICS_WARPS)
            total += partial[(int64_t)b * width + i];
    }
    sums[warp][lane] = total;
    __syncthreads();
    if (warp > 0 || i >= width) return;
    total = 0;
    for (int w = 0; w < STATISTICS_WARPS; w++) total += sums[w][lane];
    if (i < E && stats.prob) stats.prob[i] += total;
    if (i >= E && i < 2 * E && stats.count) stats.count[i - E] += (int64_t)total;
    if (i >= 2 * E && stats.z) stats.z[i - 2 * E] += total;
}
// Bytes of shared memory for `floats` floats a warp. Above 48 KiB, a kernel's static memory
// included, the kernel must opt in: from 384 experts on.
template <class Kernel> static size_t warp_memory(Kernel kernel, int floats) {
    size_t bytes = (size_t)WARPS * floats * sizeof(float);
    if (bytes > 47 * 1024)
        CUDA_CHECK(
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
    return bytes;
}
static void check_experts(int E, int K) {
    if (E > E_MAX || K > E)
        die("a router with %d experts, %d a token|the CUDA backend takes up to %d experts", E, K,
            E_MAX);
}
void router_forward(real *logits, int *topk, real *score, RouterStats stats, const floatX *u,
                    const floatX *W, const real *bias, int given, int normalize, int64_t R,
                    int64_t C, int64_t E, int64_t K) {
    kernel_begin("router_forward", 2.0 * R * C * E);
    check_experts(E, K);
    if (R == 0) return;
    gemm(0, 1, R, E, C, u, C, W, 0, logits, 1);
    // Tokens of a block: a wave of some 500 blocks covers all of them, and the second kernel adds
    // at most so many partial sums.
    int tokens = (int)div_up(div_up(R, 512), WARPS) * WARPS;
    int blocks = (int)div_up(R, tokens);
    double *partial =
        (double *)device_scratch(SCRATCH_PARTIAL, (size_t)blocks * (2 * E + 2) * sizeof(double));
    auto kernel = given ? route_kernel<true> : route_kernel<false>;
    kernel<<<blocks, WARPS * 32, warp_memory(kernel, 4 * E), compute_stream()>>>(
        topk, score, partial, logits, bias, normalize, R, E, K, tokens);
    LAUNCHED();
    statistics_kernel<<<grid_for(2 * E + 2, 32), STATISTICS_WARPS * 32, 0, compute_stream()>>>(
        stats, partial, blocks, E);
    LAUNCHED();
}

// split (R,2E) bf16 builds: [hi | lo] of dz.
static __global__ void __launch_bounds__(WARPS * 32)
    logits_backward_kernel(real *dz, floatX *split, const real *dscore, const real *logits,
                           const int *topk, const real *score, const double *f, double aux_scale,
                           double z_scale, int normalize, int R, int E, int K) {
    extern __shared__ float shared[]; // (WARPS, 2E): p, then dz
    int lane = threadIdx.x % 32;
    int warp = threadIdx.x / 32;
    float *p = shared + (int64_t)warp * 2 * E;
    float *d = p + E;
    int64_t r = (int64_t)blockIdx.x * WARPS + warp;
    if (r >= R) return;
    float lse = softmax(p, logits + r * E, E);
    float c = 0;
    float mean = 0;
    for (int k = 0; k < K; k++)
        c += (normalize ? score[r * K + k] : p[topk[r * K + k]]) * dscore[r * K + k];
    float common = (float)(2 * z_scale * (double)lse) - (normalize ? 0 : c);
    if (aux_scale != 0) {
        for (int e = lane; e < E; e += 32) mean += (float)f[e] * p[e];
        mean = group_sum(mean);
    }
    for (int e = lane; e < E; e += 32)
        d[e] = p[e] * (common + (aux_scale != 0 ? (float)aux_scale * ((float)f[e] - mean) : 0));
    __syncwarp();
    for (int k = lane; k < K; k += 32) { // chosen experts are distinct
        int e = topk[r * K + k];
        d[e] += normalize ? score[r * K + k] * (dscore[r * K + k] - c) : p[e] * dscore[r * K + k];
    }
    __syncwarp();
    for (int e = lane; e < E; e += 32) {
        dz[r * E + e] = d[e];
        if (split) {
            float high = round_x(d[e]);
            store(split + r * 2 * E + e, high);
            store(split + r * 2 * E + E + e, d[e] - high);
        }
    }
}
void router_backward_add(floatX *du, gradX *dW, real *dz, const real *dscore, const real *logits,
                         const int *topk, const real *score, const floatX *u, const floatX *W,
                         const double *f, double aux_scale, double z_scale, int normalize,
                         int accumulate, int64_t R, int64_t C, int64_t E, int64_t K) {
    kernel_begin("router_backward_add", 4.0 * R * C * E);
    check_experts(E, K);
    if (R == 0) return gemm(1, 0, E, C, 0, u, E, u, accumulate, dW, 1);
    int is_bf16 = sizeof(floatX) == 2;
    size_t n = (size_t)R * E;
    size_t weights = (size_t)E * C;
    floatX *split =
        is_bf16 ? (floatX *)device_scratch(SCRATCH_ROUTER, (2 * n + 2 * weights) * sizeof(floatX))
                : 0;
    logits_backward_kernel<<<grid_for(R, WARPS), WARPS * 32,
                             warp_memory(logits_backward_kernel, 2 * E), compute_stream()>>>(
        dz, split, dscore, logits, topk, score, f, aux_scale, z_scale, normalize, R, E, K);
    LAUNCHED();
    if (!is_bf16) {
        gemm(0, 0, R, C, E, (const floatX *)dz, E, W, 1, du, 0);
        gemm(1, 0, E, C, R, (const floatX *)dz, E, u, accumulate, dW, 1);
        return;
    }
    floatX *twice = split + 2 * n;
    device_copy(twice, W, weights * sizeof(floatX));
    device_copy(twice + weights, W, weights * sizeof(floatX));
    gemm(0, 0, R, C, 2 * E, split, 2 * E, twice, 1, du, 0);
    gemm(1, 0, E, C, R, split, 2 * E, u, accumulate, dW, 1);
    gemm(1, 0, E, C, R, split + E, 2 * E, u, 1, dW, 1);
}
static __global__ void share_kernel(double *f, const int64_t *count, double positions, int n_layers,
                                    int E) {
    int e = blockIdx.x * blockDim.x + threadIdx.x;
    if (e >= E) return;
    int64_t total = 0;
    for (int l = 0; l < n_layers; l++) total += count[(int64_t)l * E + e];
    f[e] = (double)total / positions;
}
void router_share(double *f, const int64_t *count, double positions, int64_t n_layers, int64_t E) {
    kernel_begin("router_share", 0);
    if (E == 0) return;
    share_kernel<<<grid_for(E, 64), 64, 0, compute_stream()>>>(f, count, positions, n_layers, E);
    LAUNCHED();
}
