// The experts' products: the functions of kernels.h, and the portable version (mma.sync: sm_80 and
// newer, both precisions), by the tiles of tile.cuh. A row m of expert e belongs to pool token p =
// row_token[m]:
//   H = pool[p] W1^T = [gate | up],  A = silu(gate) up,  Y = A W2^T
// Backward, with g = dpool[p] W2 (F wide): dY = score dpool[p], so dA = dY W2 = score g, and
// because Y = A W2^T,
//   dscore = <dpool[p], Y> = <dpool[p], A W2^T> = <g, A>.
// So neither Y nor dY is ever needed, and the score joins A: dW2 = dpool[p]^T (score A).
//
// Rows of an expert are padded to 128, so a row tile belongs to one expert. The grid covers the
// host's bound M, and tiles after the last row leave at once: no size goes to the host (I11, the
// host does not wait). Column tiles of the same rows are neighbours in the grid, so the gathered
// rows stay in the L2 cache. Per routed row, at C = 2048, F = 768, bf16 (weights come on top: 9.4
// MB an expert):
//                           FLOPs    bytes
//   experts_up              4 C F    C in, 2F and F out                 8.7 KB
//   experts_down            2 C F    F in, C out                        5.6 KB
//   experts_down_backward   2 C F    C and 2F in, 2F and F out         11.8 KB
//   experts_up_backward     4 C F    2F in, C out                       7.2 KB
//   experts_wgrad           6 C F    2F and C, then C and F in         10.2 KB, and 18.9 MB of
//                                                                      gradients an expert
// At 2,048 rows an expert all are bound by the tensor cores.
#include <stdlib.h>
#include "experts.cuh"
#include "tile.cuh"

// Returns the expert of row tile `tile`, the last e with expert_row[e] <= row, or -1 after the last
// row.
static __device__ __forceinline__ int expert_of_tile(const RowIndex &plan, int tile) {
    int row = tile * TILE;
    int low = 0;
    int high = plan.E;
    if (row >= plan.expert_row[plan.E]) return -1;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (plan.expert_row[middle] <= row)
            low = middle;
        else
            high = middle;
    }
    return low;
}
static __device__ __forceinline__ void put_pair(floatX *tile, int row, int column, float left,
                                                float right) {
    floatX *p = tile + row * LD_OUT + column;
    store(p, left);
    store(p + 1, right);
}

// H and A: a column tile holds 64 gate columns and the 64 up columns of the same elements (FOLD),
// so that SwiGLU stays within a thread and W1 keeps its Hugging Face order. A is computed from the
// rounded H: recomputing it from H gives the same bits.
static __global__ void __launch_bounds__(TILE_THREADS, TILE_BLOCKS)
    up_kernel(floatX *H, floatX *A, const floatX *pool, const floatX *W1, RowIndex plan, int C,
              int F) {
    extern __shared__ __align__(16) floatX shared[];
    int column_tiles = (F + 63) / 64;
    int tile = blockIdx.x / column_tiles;
    int f0 = blockIdx.x % column_tiles * 64;
    int m0 = tile * TILE;
    int e = expert_of_tile(plan, tile);
    if (e < 0) return;
    Operand a = { pool, plan.row_token, C, (int)plan.M, C, 0 };
    Operand b = { W1 + (int64_t)e * 2 * F * C, 0, C, F, C, F };
    Accumulator acc;
    tile_product<false, false, true>(acc, shared, a, b, m0, f0, 0, C);
    for_pairs<true>([&](int i, int j, int l, int row, int column) {
        put_pair(shared, row, column, acc[i][j][l], acc[i][j][l + 1]);
    });
    __syncthreads();
    floatX *h = H + (int64_t)m0 * 2 * F + f0;
    store_tile(h, 2 * F, F - f0, shared, 0, 64);
    store_tile(h + F, 2 * F, F - f0, shared, 64, 64);
    if (!A) return;
    __syncthreads();
    for_pairs<true>([&](int i, int j, int l, int row, int column) {
        if (j >= 2) return; // columns of gate; those of up are two further on in the same thread
        float gate[2], up[2];
        for (int n = 0; n < 2; n++) {
            gate[n] = round_x(acc[i][j][l + n]);
            up[n] = round_x(acc[i][j + 2][l + n]);
        }
        put_pair(shared, row, column, gate[0] * sigmoid(gate[0]) * up[0],
                 gate[1] * sigmoid(gate[1]) * up[1]);
    });
    __syncthreads();
    store_tile(A + (int64_t)m0 * F + f0, F, F - f0, shared, 0, 64);
}
// out (M,N) = in (M,K) W[e]^T, W (E,N,K); TRANSPOSED: out = in W[e], W (E,K,N).
template <bool TRANSPOSED>
static __global__ void __launch_bounds__(TILE_THREADS, TILE_BLOCKS)
    rows_kernel(floatX *out, const floatX *in, const floatX *W, RowIndex plan, int N, int K) {
    extern __shared__ __align__(16) floatX shared[];
    int column_tiles = (N + TILE - 1) / TILE;
    int tile = blockIdx.x / column_tiles;
    int n0 = blockIdx.x % column_tiles * TILE;
    int m0 = tile * TILE;
    int e = expert_of_tile(plan, tile);
    if (e < 0) return;
    Operand a = { in, 0, K, (int)plan.M, K, 0 };
    int rows = TRANSPOSED ? K : N; // of W, whose rows are `width` long
    int width = TRANSPOSED ? N : K;
    Operand b = { W + (int64_t)e * N * K, 0, width, rows, width, 0 };
    Accumulator acc;
    tile_product<false, TRANSPOSED, false>(acc, shared, a, b, m0, n0, 0, K);
    for_pairs<false>([&](int i, int j, int l, int row, int column) {
        put_pair(shared, row, column, acc[i][j][l], acc[i][j][l + 1]);
    });
    __syncthreads();
    store_tile(out + (int64_t)m0 * N + n0, N, N - n0, shared, 0, TILE);
}
// partial (M, column tiles) or 0: this tile's share of <g, a>. g leaves the accumulators through
// shared memory as fp32, so that the elementwise part runs along rows: TILE / PACK lanes a row, 16
// bytes each. dH may be H: a lane reads its elements before it writes them.
static __global__ void __launch_bounds__(TILE_THREADS, TILE_BLOCKS)
    down_backward_kernel(floatX *dH, floatX *sA, float *partial, const floatX *dpool,
                         const floatX *H, const floatX *W2, const float *row_score, RowIndex plan,
                         int C, int F) {
    extern __shared__ __align__(16) floatX shared[];
    const int LD_G = TILE + 4;
    const int LANES = TILE / PACK;
    float *tile_g = (float *)shared;
    int column_tiles = (F + TILE - 1) / TILE;
    int tile = blockIdx.x / column_tiles;
    int f0 = blockIdx.x % column_tiles * TILE;
    int m0 = tile * TILE;
    int e = expert_of_tile(plan, tile);
    if (e < 0) return;
    Operand a = { dpool, plan.row_token, C, (int)plan.M, C, 0 };
    Operand b = { W2 + (int64_t)e * C * F, 0, F, C, F, 0 };
    Accumulator acc;
    tile_product<false, true, false>(acc, shared, a, b, m0, f0, 0, C);
    for_pairs<false>([&](int i, int j, int l, int row, int column) {
        tile_g[row * LD_G + column] = acc[i][j][l];
        tile_g[row * LD_G + column + 1] = acc[i][j][l + 1];
    });
    __syncthreads();
    int column = threadIdx.x % LANES * PACK;
    bool inside = f0 + column < F; // all lanes take part in the sum of a row
    for (int row = threadIdx.x / LANES; row < TILE; row += TILE_THREADS / LANES) {
        int64_t m = m0 + row;
        int64_t at = m * 2 * F + f0 + column;
        float s = row_score[m];
        float dot = 0;
        float gate[PACK] = {};
        float up[PACK] = {};
        float act[PACK];
        if (inside && plan.row_token[m] >= 0) {
            load_n(gate, H + at);
            load_n(up, H + at + F);
        }
        for (int n = 0; n < PACK; n++)
            swiglu_backward(gate[n], up[n], act[n], dot, tile_g[row * LD_G + column + n], s);
        dot = group_sum(dot, LANES);
        if (partial && column == 0) partial[m * column_tiles + f0 / TILE] = dot;
        if (!inside) continue;
        store_n(sA + m * F + f0 + column, act);
        store_n(dH + at, gate);
        store_n(dH + at + F, up);
    }
}
// The score of each row's slot; padding rows have 0.
static __global__ void row_score_kernel(float *row_score, const real *score, RowIndex plan) {
    int64_t m = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (m >= plan.expert_row[plan.E]) return;
    int token = plan.row_token[m];
    float s = 0;
    for (int k = 0; token >= 0 && k < plan.K; k++) {
        int64_t slot = (int64_t)token * plan.K + k;
        if (plan.token_row[slot] == m) s = score ? score[slot] : 1;
    }
    row_score[m] = s;
}
// dscore[p,k] = the column tiles' shares in order; 0 where the slot has no row.
static __global__ void dscore_kernel(real *dscore, const float *partial, const int *token_row,
                                     int64_t n, int column_tiles) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    int64_t row = token_row[i];
    float sum = 0;
    for (int t = 0; row >= 0 && t < column_tiles; t++) sum += partial[row * column_tiles + t];
    dscore[i] = sum;
}
// dW[e] (N,O) (+)= sum over the expert's rows m of left[m]^T right[m]; left (.,N), right (.,O), one
// of them through row_token. Block: (tile of O, tile of N, e).
static __global__ void __launch_bounds__(TILE_THREADS, TILE_BLOCKS)
    wgrad_kernel(gradX *dW, const floatX *left, const int *left_index, const floatX *right,
                 const int *right_index, RowIndex plan, int accumulate, int N, int O) {
    extern __shared__ __align__(16) floatX shared[];
    int o0 = blockIdx.x * TILE;
    int n0 = blockIdx.y * TILE;
    int e = blockIdx.z;
    int first = plan.expert_row[e];
    int last = plan.expert_row[e + 1];
    if (first == last && accumulate) return;
    Operand a = { left, left_index, N, last, N, 0 };
    Operand b = { right, right_index, O, last, O, 0 };
    Accumulator acc;
    tile_product<true, true, false>(acc, shared, a, b, n0, o0, first, last);
    gradX *out = dW + ((int64_t)e * N + n0) * O + o0;
    for_pairs<false>([&](int i, int j, int l, int row, int column) {
        if (n0 + row >= N || o0 + column >= O) return;
        float2 *to = (float2 *)(out + (int64_t)row * O + column);
        float2 old = accumulate ? *to : make_float2(0, 0);
        *to = make_float2(old.x + acc[i][j][l], old.y + acc[i][j][l + 1]);
    });
}

// ---- which kernels --------------------------------------------------------------------------
static int chosen = -1; // 1: those of experts_hopper.cu; -1: not asked yet
static const bool HOPPER_BUILD = sizeof(floatX) == 2; // fp32 builds have no Hopper version
static bool wgmma_available() {
    if constexpr (HOPPER_BUILD) return hopper_available();
    return false;
}
bool experts_select(const char *name) {
    bool automatic = !strcmp(name, "auto");
    bool mma = !strcmp(name, "mma");
    if (!automatic && !mma && strcmp(name, "wgmma"))
        die("there is no expert kernel '%s'|auto, mma, wgmma", name);
    bool available = !mma && wgmma_available();
    if (!automatic && !mma && !available) return false;
    chosen = available;
    return true;
}
static bool use_wgmma() {
    if (chosen < 0) {
        const char *name = getenv("MOE_EXPERT_KERNEL");
        if (!experts_select(name && *name ? name : "auto"))
            die("MOE_EXPERT_KERNEL=%s: needs a GPU of compute capability 9.0, PRECISION=bf16 and a "
                "build for sm_90a|leave it out, or mma",
                name);
    }
    return chosen;
}
const char *experts_kernel(void) { return use_wgmma() ? "wgmma" : "mma"; }
void experts_leave(int multiprocessors) {
    if constexpr (HOPPER_BUILD) hopper_leave(multiprocessors);
}

// ---- launches -------------------------------------------------------------------------------
template <auto kernel, class... Arguments>
static void launch(dim3 grid, const Arguments &...arguments) {
    opt_into_shared<kernel>(TILE_SHARED);
    kernel<<<grid, TILE_THREADS, TILE_SHARED, compute_stream()>>>(arguments...);
    LAUNCHED();
}
static unsigned tiles(const RowIndex *plan, int columns, int width, int C, int F) {
    require_packs("hidden_size", C);
    require_packs("the expert width", F);
    return (unsigned)((int64_t)(plan->M / TILE) * div_up(columns, width));
}
void experts_up(floatX *H, floatX *A, const floatX *pool, const floatX *W1, const RowIndex *plan,
                int64_t C, int64_t F) {
    kernel_begin("experts_up", 2 * expert_flops(plan, C, F));
    unsigned blocks = tiles(plan, F, 64, C, F);
    if (!blocks) return;
    if constexpr (HOPPER_BUILD)
        if (use_wgmma()) return hopper_up(H, A, pool, W1, plan, C, F);
    launch<up_kernel>(blocks, H, A, pool, W1, *plan, C, F);
}
void experts_down(floatX *Y, const floatX *A, const floatX *W2, const RowIndex *plan, int64_t C,
                  int64_t F) {
    kernel_begin("experts_down", expert_flops(plan, C, F));
    unsigned blocks = tiles(plan, C, TILE, C, F);
    if (!blocks) return;
    if constexpr (HOPPER_BUILD)
        if (use_wgmma()) return hopper_down(Y, A, W2, plan, C, F);
    launch<rows_kernel<false>>(blocks, Y, A, W2, *plan, C, F);
}
static void down_backward(floatX *dH, floatX *sA, float *partial, const floatX *dpool,
                          const floatX *H, const floatX *W2, const float *row_score,
                          const RowIndex *plan, unsigned blocks, int C, int F) {
    if constexpr (HOPPER_BUILD)
        if (use_wgmma())
            return hopper_down_backward(dH, sA, partial, dpool, H, W2, row_score, plan, C, F);
    launch<down_backward_kernel>(blocks, dH, sA, partial, dpool, H, W2, row_score, *plan, C, F);
}
void experts_down_backward(floatX *dH, floatX *sA, real *dscore, const floatX *dpool,
                           const floatX *H, const floatX *W2, const real *score,
                           const RowIndex *plan, int64_t C, int64_t F) {
    kernel_begin("experts_down_backward", expert_flops(plan, C, F));
    unsigned blocks = tiles(plan, F, TILE, C, F);
    int column_tiles = (int)div_up(F, TILE);
    int64_t n = (int64_t)plan->P * plan->K;
    int64_t shares = dscore ? column_tiles : 0;
    float *row_score =
        (float *)device_scratch(SCRATCH_PARTIAL, (size_t)(plan->M * (1 + shares)) * sizeof(float));
    float *partial = dscore ? row_score + plan->M : 0;
    if (blocks) {
        row_score_kernel<<<grid_for(plan->M, 256), 256, 0, compute_stream()>>>(row_score, score,
                                                                               *plan);
        LAUNCHED();
        down_backward(dH, sA, partial, dpool, H, W2, row_score, plan, blocks, C, F);
    }
    if (!dscore || n == 0) return;
    dscore_kernel<<<grid_for(n, 256), 256, 0, compute_stream()>>>(dscore, partial, plan->token_row,
                                                                  n, column_tiles);
    LAUNCHED();
}
void experts_up_backward(floatX *dX, const floatX *dH, const floatX *W1, const RowIndex *plan,
                         int64_t C, int64_t F) {
    kernel_begin("experts_up_backward", 2 * expert_flops(plan, C, F));
    unsigned blocks = tiles(plan, C, TILE, C, F);
    if (!blocks) return;
    if constexpr (HOPPER_BUILD)
        if (use_wgmma()) return hopper_up_backward(dX, dH, W1, plan, C, F);
    launch<rows_kernel<true>>(blocks, dX, dH, W1, *plan, C, 2 * F);
}
void experts_wgrad(gradX *dW1, gradX *dW2, const floatX *pool, const floatX *dpool,
                   const floatX *dH, const floatX *sA, const RowIndex *plan, int accumulate,
                   int64_t C, int64_t F) {
    kernel_begin("experts_wgrad", 3 * expert_flops(plan, C, F));
    require_packs("hidden_size", C);
    require_packs("the expert width", F);
    if (plan->E == 0) return;
    if constexpr (HOPPER_BUILD)
        if (plan->M > 0 && use_wgmma())
            return hopper_wgrad(dW1, dW2, pool, dpool, dH, sA, plan, accumulate, C, F);
    dim3 grid1((unsigned)div_up(C, TILE), (unsigned)div_up(2 * F, TILE), (unsigned)plan->E);
    dim3 grid2((unsigned)div_up(F, TILE), (unsigned)div_up(C, TILE), (unsigned)plan->E);
    const int *no_index = 0;
    const int *index = plan->row_token;
    launch<wgrad_kernel>(grid1, dW1, dH, no_index, pool, index, *plan, accumulate, 2 * F, C);
    launch<wgrad_kernel>(grid2, dW2, dpool, index, sA, no_index, *plan, accumulate, C, F);
}
