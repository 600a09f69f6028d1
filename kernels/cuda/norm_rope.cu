// RMSNorm over rows and over heads, rotary position embedding, residual add. All of it is bound by
// memory: one visit a row, 16 bytes a thread.
//
// y_j = n_j w_j with n = x r, r = (mean(x^2) + eps)^-1/2. With t_j = dL/dn_j = dy_j w_j and dr/dx_j
// = -r^3 x_j / C:
//   dx_j = t_j r + (sum_i t_i x_i) dr/dx_j = r (t_j - n_j mean_i(t_i n_i)),
//   dw_j = the sum over rows of dy_j n_j.
// Bytes a row (bf16, C = 2048): forward 8 KB (x, y); backward 16 KB (x, dy, residual, dx). Weights
// stay in the caches.
#include "common.cuh"

// ---- RMSNorm of rows ------------------------------------------------------------------------
// One warp a row. The second visit of x hits the L1 cache, for a row is 4 KB.
static __global__ void rmsnorm_kernel(floatX *y, real *rstd, const floatX *x, const floatX *w,
                                      real eps, int R, int C) {
    int64_t row = (int64_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    int lane = threadIdx.x % 32;
    if (row >= R) return;
    const floatX *xr = x + row * C;
    float square = 0;
    float v[PACK], weight[PACK];
    for (int j = lane * PACK; j < C; j += 32 * PACK) {
        load_n(v, xr + j);
        for (int l = 0; l < PACK; l++) square += v[l] * v[l];
    }
    float r = 1 / sqrtf(group_sum(square) / (float)C + eps);
    if (lane == 0 && rstd) rstd[row] = r;
    for (int j = lane * PACK; j < C; j += 32 * PACK) {
        load_n(v, xr + j);
        load_n(weight, w + j);
        for (int l = 0; l < PACK; l++) v[l] = round_x(v[l] * r) * weight[l];
        store_n(y + row * C + j, v);
    }
}
void rmsnorm_forward(floatX *y, real *rstd, const floatX *x, const floatX *w, real eps, int64_t R,
                     int64_t C) {
    kernel_begin("rmsnorm_forward", 0);
    require_packs("the width of a norm", C);
    if (R == 0) return;
    rmsnorm_kernel<<<grid_for(R, 8), 256, 0, compute_stream()>>>(y, rstd, x, w, eps, R, C);
    LAUNCHED();
}
// A block walks down `rows` rows; each thread owns N packs of columns, whose weight gradients it
// keeps in registers. partial (gridDim, C). A row costs one barrier, because the sums of
// consecutive rows use two places in turn.
template <int N>
static __global__ void rmsnorm_backward_kernel(floatX *dx, float *partial, const floatX *residual,
                                               const floatX *dy, const floatX *x, const floatX *w,
                                               const real *rstd, int rows, int R, int C) {
    __shared__ float shared[2][32];
    float dw[N][PACK] = {};
    float weight[N][PACK];
    int first = blockIdx.x * rows;
    int last = first + rows < R ? first + rows : R;
#pragma unroll
    for (int i = 0; i < N; i++) {
        int j = (i * blockDim.x + threadIdx.x) * PACK;
        if (j < C) load_n(weight[i], w + j);
    }
    for (int row = first; row < last; row++) {
        float t[N][PACK], n[N][PACK];
        float dot = 0;
        float r = rstd[row];
        int4 rest[N]; // the residual, on its way while the row is summed
#pragma unroll
        for (int i = 0; i < N; i++) {
            int j = (i * blockDim.x + threadIdx.x) * PACK;
            if (j >= C) continue;
            load_n(t[i], dy + (int64_t)row * C + j);
            load_n(n[i], x + (int64_t)row * C + j);
            rest[i] =
                residual ? *(const int4 *)(residual + (int64_t)row * C + j) : make_int4(0, 0, 0, 0);
            for (int l = 0; l < PACK; l++) {
                n[i][l] *= r;
                dw[i][l] += t[i][l] * n[i][l];
                t[i][l] *= weight[i][l];
                dot += t[i][l] * n[i][l];
            }
        }
        float mean = block_sum(dot, shared[row % 2]) / (float)C;
#pragma unroll
        for (int i = 0; i < N; i++) {
            int j = (i * blockDim.x + threadIdx.x) * PACK;
            if (j >= C) continue;
            float v[PACK];
            floatX kept[PACK];
            memcpy(kept, &rest[i], 16);
            for (int l = 0; l < PACK; l++) v[l] = load(kept + l) + r * (t[i][l] - n[i][l] * mean);
            store_n(dx + (int64_t)row * C + j, v);
        }
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        int j = (i * blockDim.x + threadIdx.x) * PACK;
        if (j >= C) continue;
        for (int l = 0; l < PACK; l++) partial[(int64_t)blockIdx.x * C + j + l] = dw[i][l];
    }
}
// 32 columns a block; warp w adds rows w, w + 8, ...; then the eight sums are added in order.
static __global__ void column_sums_kernel(gradX *out, const float *partial, int rows, int n,
                                          int accumulate) {
    __shared__ float sums[8][32];
    int lane = threadIdx.x % 32;
    int warp = threadIdx.x / 32;
    int column = blockIdx.x * 32 + lane;
    float sum = 0;
    if (column < n)
        for (int r = warp; r < rows; r += 8) sum += partial[(int64_t)r * n + column];
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || column >= n) return;
    sum = accumulate ? out[column].v : 0;
    for (int i = 0; i < 8; i++) sum += sums[i][lane];
    out[column].v = sum;
}
void column_sums(gradX *out, const float *partial, int rows, int n, int accumulate) {
    column_sums_kernel<<<grid_for(n, 32), 256, 0, compute_stream()>>>(out, partial, rows, n,
                                                                      accumulate);
    LAUNCHED();
}
void rmsnorm_backward(floatX *dx, gradX *dw, const floatX *residual, const floatX *dy,
                      const floatX *x, const floatX *w, const real *rstd, int accumulate, int64_t R,
                      int64_t C) {
    kernel_begin("rmsnorm_backward", 0);
    // Blocks: about one wave of an H200, and a constant, so that the order of sums depends on
    // shapes alone. WIDEST: 32 columns a thread, four arrays of which are 128 registers.
    const int BLOCKS = 1024;
    const int WIDEST = 8192;
    require_packs("the width of a norm", C);
    if (R == 0) {
        if (!accumulate) device_zero(dw, C * sizeof *dw);
        return;
    }
    int rows = (int)div_up(R, BLOCKS);
    int blocks = (int)div_up(R, rows);
    int packs = C / PACK;
    int threads = packs < 256 ? (int)div_up(packs, 32) * 32 : 256;
    float *partial = (float *)device_scratch(SCRATCH_PARTIAL, (size_t)blocks * C * sizeof(float));
    if (C > WIDEST) die("a norm of width %d|at most %d on this backend", (int)C, WIDEST);
    auto kernel = rmsnorm_backward_kernel<WIDEST / 256 / PACK>;
    if (packs <= 2 * threads) kernel = rmsnorm_backward_kernel<2>;
    if (packs <= threads) kernel = rmsnorm_backward_kernel<1>;
    kernel<<<blocks, threads, 0, compute_stream()>>>(dx, partial, residual, dy, x, w, rstd, rows,
                                                     (int)R, (int)C);
    LAUNCHED();
    column_sums(dw, partial, blocks, C, accumulate);
}
static __global__ void add_kernel(floatX *out, const floatX *a, const floatX *b, int64_t n) {
    for (int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * PACK; i < n;
         i += (int64_t)gridDim.x * blockDim.x * PACK) {
        float x[PACK], y[PACK];
        if (i + PACK <= n) {
            load_n(x, a + i);
            load_n(y, b + i);
            for (int l = 0; l < PACK; l++) x[l] += y[l];
            store_n(out + i, x);
        } else
            for (int64_t j = i; j < n; j++) store(out + j, load(a + j) + load(b + j));
    }
}
void add(floatX *out, const floatX *a, const floatX *b, size_t n) {
    kernel_begin("add", 0);
    if (n == 0) return;
    add_kernel<<<grid_for(div_up((int64_t)n, PACK), 256, 1 << 20), 256, 0, compute_stream()>>>(
        out, a, b, (int64_t)n);
    LAUNCHED();
}

// ---- heads: RMSNorm, then rotation ----------------------------------------------------------
// The angle is computed as Hugging Face computes it: inverse frequency and angle are rounded to
// fp32. Written once a run.
static __global__ void rope_kernel(real *cos_table, real *sin_table, double theta, int T, int D) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    int64_t half = D / 2;
    if (i >= T * half) return;
    float frequency = (float)pow(theta, -2.0 * (double)(i % half) / D);
    float angle = (float)(i / half) * frequency;
    cos_table[i] = (float)cos((double)angle);
    sin_table[i] = (float)sin((double)angle);
}
void rope_table(real *cos_table, real *sin_table, double theta, int64_t T, int64_t D) {
    int64_t n = (int64_t)T * (D / 2);
    if (n == 0) return;
    rope_kernel<<<grid_for(n, 256), 256, 0, compute_stream()>>>(cos_table, sin_table, theta, T, D);
    LAUNCHED();
}
// Pair (j, j + D/2) turns by angle a_j: y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin. The backward
// turns by -a_j. A group of `width` = D / (2 PACK) lanes owns a head; a lane holds PACK elements of
// the first half and their partners of the second, so the rotation stays within a lane and the norm
// is a butterfly over the group. Row r turns by the angles of position[r], or of r mod T where
// there is no `position`.
enum { HEAD_THREADS = 256 };
static int head_lanes(int D) {
    int width = D / (2 * PACK);
    if (D % (2 * PACK) || width > 32 || (width & (width - 1)))
        die("head_dim %d|the CUDA backend has norms for powers of two from %d to %d", D, 2 * PACK,
            64 * PACK);
    return width;
}
static __device__ __forceinline__ void load_table(float (&v)[PACK], const real *p) {
    for (int l = 0; l < PACK; l += 4) {
        float4 four = *(const float4 *)(p + l);
        v[l] = four.x;
        v[l + 1] = four.y;
        v[l + 2] = four.z;
        v[l + 3] = four.w;
    }
}
static __device__ __forceinline__ int64_t angle_row(const int *position, int64_t row, int T) {
    return position ? position[row] : row % T;
}
static __global__ void __launch_bounds__(HEAD_THREADS)
    qk_forward_kernel(floatX *y, const floatX *x, const floatX *w, const real *cos_table,
                      const real *sin_table, const int *position, real eps, int64_t heads, int H,
                      int T, int D, int width) {
    int group = HEAD_THREADS / width;
    int half = D / 2;
    int j = (threadIdx.x % width) * PACK;
    int64_t head = (int64_t)blockIdx.x * group + threadIdx.x / width;
    bool valid = head < heads; // all lanes take part in the butterfly
    float a[PACK] = {};
    float b[PACK] = {};
    float c[PACK], s[PACK], wa[PACK], wb[PACK];
    float square = 0;
    if (valid) {
        load_n(a, x + head * D + j);
        load_n(b, x + head * D + half + j);
    }
    for (int l = 0; l < PACK; l++) square += a[l] * a[l] + b[l] * b[l];
    float r = 1 / sqrtf(group_sum(square, width) / (float)D + eps);
    if (!valid) return;
    int64_t at = angle_row(position, head / H, T) * half + j;
    load_table(c, cos_table + at);
    load_table(s, sin_table + at);
    load_n(wa, w + j);
    load_n(wb, w + half + j);
    for (int l = 0; l < PACK; l++) {
        float u = a[l] * r * wa[l];
        float v = b[l] * r * wb[l];
        a[l] = u * c[l] - v * s[l];
        b[l] = v * c[l] + u * s[l];
    }
    store_n(y + head * D + j, a);
    store_n(y + head * D + half + j, b);
}
// dx may be dy, for a lane reads its elements before it writes them. partial (gridDim, D): a lane
// sees the same columns of every head it visits and adds them in registers; at the end the groups
// of the block are added in order.
static __global__ void __launch_bounds__(HEAD_THREADS)
    qk_backward_kernel(floatX *dx, float *partial, const floatX *dy, const floatX *x,
                       const floatX *w, const real *cos_table, const real *sin_table,
                       const int *position, real eps, int64_t heads, int H, int T, int D,
                       int width) {
    extern __shared__ float sums[]; // (group, D)
    int group = HEAD_THREADS / width;
    int mine = threadIdx.x / width;
    int half = D / 2;
    int j = (threadIdx.x % width) * PACK;
    float da[PACK] = {};
    float db[PACK] = {};
    float wa[PACK], wb[PACK];
    load_n(wa, w + j);
    load_n(wb, w + half + j);
    for (int64_t base = (int64_t)blockIdx.x * group; base < heads;
         base += (int64_t)gridDim.x * group) {
        int64_t head = base + mine;
        bool valid = head < heads;
        float a[PACK] = {};
        float b[PACK] = {};
        float ta[PACK] = {};
        float tb[PACK] = {};
        float c[PACK], s[PACK];
        float square = 0;
        float dot = 0;
        if (valid) {
            load_n(a, x + head * D + j);
            load_n(b, x + head * D + half + j);
            load_n(ta, dy + head * D + j);
            load_n(tb, dy + head * D + half + j);
        }
        for (int l = 0; l < PACK; l++) square += a[l] * a[l] + b[l] * b[l];
        float r = 1 / sqrtf(group_sum(square, width) / (float)D + eps);
        int64_t at = (valid ? angle_row(position, head / H, T) : 0) * half + j;
        load_table(c, cos_table + at);
        load_table(s, sin_table + at);
        for (int l = 0; l < PACK; l++) {
            float u = ta[l] * c[l] + tb[l] * s[l];
            float v = tb[l] * c[l] - ta[l] * s[l];
            a[l] *= r;
            b[l] *= r;
            da[l] += u * a[l];
            db[l] += v * b[l];
            ta[l] = u * wa[l];
            tb[l] = v * wb[l];
            dot += ta[l] * a[l] + tb[l] * b[l];
        }
        float mean = group_sum(dot, width) / (float)D;
        if (!valid) continue;
        for (int l = 0; l < PACK; l++) {
            ta[l] = r * (ta[l] - a[l] * mean);
            tb[l] = r * (tb[l] - b[l] * mean);
        }
        store_n(dx + head * D + j, ta);
        store_n(dx + head * D + half + j, tb);
    }
    for (int l = 0; l < PACK; l++) {
        sums[mine * D + j + l] = da[l];
        sums[mine * D + half + j + l] = db[l];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < D; i += HEAD_THREADS) {
        float sum = 0;
        for (int g = 0; g < group; g++) sum += sums[g * D + i];
        partial[(int64_t)blockIdx.x * D + i] = sum;
    }
}
static void qk_forward(floatX *y, const floatX *x, const floatX *w, const real *cos_table,
                       const real *sin_table, const int *position, real eps, int64_t R, int64_t T,
                       int64_t H, int64_t D) {
    int width = head_lanes((int)D);
    int group = HEAD_THREADS / width;
    if (R * H == 0) return;
    qk_forward_kernel<<<grid_for(R * H, group), HEAD_THREADS, 0, compute_stream()>>>(
        y, x, w, cos_table, sin_table, position, eps, R * H, (int)H, (int)T, (int)D, width);
    LAUNCHED();
}
static void qk_backward(floatX *dx, gradX *dw, const floatX *dy, const floatX *x, const floatX *w,
                        const real *cos_table, const real *sin_table, const int *position, real eps,
                        int accumulate, int64_t R, int64_t T, int64_t H, int64_t D) {
    int width = head_lanes((int)D);
    int group = HEAD_THREADS / width;
    if (R * H == 0) {
        if (!accumulate) device_zero(dw, D * sizeof *dw);
        return;
    }
    int64_t blocks = grid_for(R * H, group, 1024);
    size_t shared = group * D * sizeof(float);
    float *partial = (float *)device_scratch(SCRATCH_PARTIAL, blocks * D * sizeof(float));
    qk_backward_kernel<<<(unsigned)blocks, HEAD_THREADS, shared, compute_stream()>>>(
        dx, partial, dy, x, w, cos_table, sin_table, position, eps, R * H, (int)H, (int)T, (int)D,
        width);
    LAUNCHED();
    column_sums(dw, partial, (int)blocks, (int)D, accumulate);
}
void qk_norm_rope_forward(floatX *qn, floatX *kn, const floatX *q, const floatX *k,
                          const floatX *wq, const floatX *wk, const real *cos_table,
                          const real *sin_table, const int *position, real eps, int64_t R,
                          int64_t T, int64_t H, int64_t KV, int64_t D) {
    kernel_begin("qk_norm_rope_forward", 0);
    qk_forward(qn, q, wq, cos_table, sin_table, position, eps, R, T, H, D);
    qk_forward(kn, k, wk, cos_table, sin_table, position, eps, R, T, KV, D);
}
void qk_norm_rope_backward(floatX *dq, floatX *dk, gradX *dwq, gradX *dwk, const floatX *dqn,
                           const floatX *dkn, const floatX *q, const floatX *k, const floatX *wq,
                           const floatX *wk, const real *cos_table, const real *sin_table,
                           const int *position, real eps, int accumulate, int64_t R, int64_t T,
                           int64_t H, int64_t KV, int64_t D) {
    kernel_begin("qk_norm_rope_backward", 0);
    qk_backward(dq, dwq, dqn, q, wq, cos_table, sin_table, position, eps, accumulate, R, T, H, D);
    qk_backward(dk, dwk, dkn, k, wk, cos_table, sin_table, position, eps, accumulate, R, T, KV, D);
}
