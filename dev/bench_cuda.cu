// Every kernel of kernels.h on the GPU at the shapes of Qwen3-30B-A3B, against what the card can do
// at best in the same run. JSON lines on stdout; `make bench-cuda`.
//
//   bench_cuda [--tokens 4096,32768] [--only SUBSTRING] [--seconds 0.15] [--tiny]
//
// First the ceilings: a copy of 2 GiB (read + write) by a kernel and by cudaMemcpy, the better one
// counts; a cuBLASLt product of 8192^3 in floatX on normal numbers. They are measured again at the
// end: a card that got warm is slower, and then all shares are a little too low. Then each kernel:
// `us` is the median time by events on the stream, after three calls that do not count; `flops` and
// `bytes` are the least possible ones (dev/costs.h); `share` = max(flops / product ceiling, bytes /
// copy ceiling) / time. Before every call 256 MiB are written: operands come from memory and not
// from the L2 cache, as in a step, and the call is queued before the GPU reaches it, so that the
// time to launch is not in it. Sequences have 4,096 tokens (32,768 tokens are 8 of them), the head
// works in chunks of at most 1 GiB of logits (model/trainer.c). Routing: `even`, K distinct experts
// drawn alike; `skewed`, expert e drawn with weight (e + 1)^-1/2, and the rows of the most loaded
// expert over the mean in `load`. Left out: rope_table, router_share, sum_in_order, clip_scale,
// gradient_scale, rows_sum_real: less than a megabyte, or once a run.
// --tiny: shapes for the emulator (dev/cuemu), where times mean nothing.
#include "../kernels/cuda/experts.cuh"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <algorithm>
#include <functional>
#include <string>
#include <vector>

typedef struct {
    int B, T, C, H, KV, D, E, K, F, V;
    int64_t P;
} Shape;
static const Shape full = {
    0, 4096, 2048, 32, 4, 128, 128, 8, 768, 151936, 3ll * 128 * 2048 * 768
};
static const Shape tiny = { 2, 32, 64, 4, 2, 16, 8, 2, 16, 160, 3ll * 8 * 64 * 16 };
static const char *only;
static double seconds = 0.15;
static double peak_flops, peak_bytes;
static int warm_calls = 3;
static int least_calls = 5;
static size_t flush_bytes = (size_t)256 << 20;
static void *flush_memory;

// ---- time -----------------------------------------------------------------------------------
// Median microseconds of call, at least least_calls and at most 101 times, as many as fit into
// `seconds`.
static double time_us(const std::function<void()> &call) {
    static cudaEvent_t begin, end;
    if (!begin) {
        CUDA_CHECK(cudaEventCreate(&begin));
        CUDA_CHECK(cudaEventCreate(&end));
    }
    std::vector<double> us;
    double spent = 0;
    for (int i = -warm_calls; i < least_calls || (i < 101 && spent < seconds * 1e6); i++) {
        CUDA_CHECK(cudaMemsetAsync(flush_memory, i & 255, flush_bytes, compute_stream()));
        CUDA_CHECK(cudaEventRecord(begin, compute_stream()));
        call();
        CUDA_CHECK(cudaEventRecord(end, compute_stream()));
        CUDA_CHECK(cudaEventSynchronize(end));
        float ms;
        CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
        if (i < 0) continue;
        us.push_back(1e3 * ms);
        spent += 1e3 * ms;
    }
    std::sort(us.begin(), us.end());
    return us[us.size() / 2];
}

// FLOPs and bytes of a kernel at this shape; N = rows of a chunk of the head.
static int head_rows(const Shape *s) {
    return (int)std::min<int64_t>((int64_t)s->B * s->T,
                                  (1ll << 30) / ((int64_t)s->V * (int64_t)sizeof(floatX)));
}
static void cost(const Shape *s, const char *kernel, double *flops, double *bytes) {
    double R = (double)s->B * s->T, T = s->T, C = s->C, H = s->H, Q = H * s->D;
    double KVD = (double)s->KV * s->D;
    double E = s->E, K = s->K, F = s->F, V = s->V, P = (double)s->P;
    double N = head_rows(s), Z = R * K;
    double x = sizeof(floatX);
#define COST(name, f, b)          \
    if (!strcmp(kernel, #name)) { \
        *flops = f;               \
        *bytes = b;               \
        return;                   \
    }
#include "costs.h"
#undef COST
    die("dev/costs.h has no line for %s|add one", kernel);
}

// variant: what distinguishes several lines of one kernel; load: of the experts, 0 = not a matter
// of routing
static void bench(const Shape *s, const char *kernel, const char *variant, double load,
                  const std::function<void()> &call) {
    if (only && !strstr(kernel, only)) return;
    double flops, bytes;
    cost(s, kernel, &flops, &bytes);
    double us = time_us(call);
    double products = flops / peak_flops;
    double copies = bytes / peak_bytes;
    printf(
        "{\"kernel\": \"%s\", \"variant\": \"%s\", \"tokens\": %d, \"us\": %.2f, \"flops\": %.6g, "
        "\"bytes\": %.6g, \"tflops\": %.2f, \"gbs\": %.1f, \"bound\": \"%s\", \"share\": %.4f",
        kernel, variant, s->B * s->T, us, flops, bytes, 1e-6 * flops / us, 1e-3 * bytes / us,
        products > copies ? "products" : "copies", 1e6 * std::max(products, copies) / us);
    if (load > 0) printf(", \"load\": %.3f", load);
    printf("}\n");
    fflush(stdout);
}
#define BENCH(kernel, variant, ...) bench(s, kernel, variant, 0, [&] { __VA_ARGS__; })

// ---- operands: taken twice, from a counting arena and from a real one -----------------------
static floatX *normal(Arena *a, int64_t n, double std) {
    static uint64_t tensor;
    floatX *x = ARENA_TAKE(a, floatX, n, "operands");
    Segment all = { ++tensor, 0, n, 0, 0, 0 };
    if (x) init_segments(x, 0, &all, 1, 1, std);
    return x;
}
static int *integers(Arena *a, int64_t n, const std::function<int(int64_t)> &value) {
    int *p = ARENA_TAKE(a, int, n, "operands");
    if (!p) return 0;
    std::vector<int> host((size_t)n);
    for (int64_t i = 0; i < n; i++) host[(size_t)i] = value(i);
    device_upload(p, host.data(), (size_t)n * sizeof(int));
    return p;
}
static uint64_t mix(uint64_t x) { // the finaliser of MurmurHash3
    x = (x ^ x >> 33) * 0xff51afd7ed558ccdull;
    x = (x ^ x >> 33) * 0xc4ceb9fe1a85ec53ull;
    return x ^ x >> 33;
}
#define REALS(n) ARENA_TAKE(a, real, n, "operands")
#define GRADS(n) ARENA_TAKE(a, gradX, n, "operands")

typedef void Group(const Shape *s, Arena *a);
static void run(Group *group, const Shape *s) {
    Arena a = arena_counting("operands");
    group(s, &a);
    arena_commit(&a);
    group(s, &a);
    arena_free(&a);
}

// ---- the kernels ----------------------------------------------------------------------------
static __global__ void copy_kernel(int4 *to, const int4 *from, int64_t n) {
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n;
         i += (int64_t)gridDim.x * blockDim.x)
        to[i] = from[i];
}
static void ceilings(const Shape *s, Arena *a) {
    int toy = s->V < 10000;
    int side = toy ? 64 : 8192;
    size_t bytes = (size_t)1 << (toy ? 16 : 31);
    char *from = (char *)arena_take(a, bytes, "operands");
    char *to = (char *)arena_take(a, bytes, "operands");
    floatX *x = normal(a, (int64_t)side * side, 1);
    floatX *y = normal(a, (int64_t)side * side, 1);
    floatX *z = normal(a, (int64_t)side * side, 1);
    if (!a->base) return;
    int64_t n = (int64_t)(bytes / 16);
    double memcpy_us = time_us([&] { device_copy(to, from, bytes); });
    double kernel_us = time_us([&] {
        copy_kernel<<<grid_for(n, 512, 4096), 512, 0, compute_stream()>>>((int4 *)to,
                                                                          (const int4 *)from, n);
    });
    double product_us = time_us([&] { linear_forward(z, x, y, side, side, side); });
    LAUNCHED();
    peak_bytes = std::max(peak_bytes, 2e6 * (double)bytes / std::min(memcpy_us, kernel_us));
    peak_flops = std::max(peak_flops, 2e6 * side * (double)side * side / product_us);
    printf("{\"ceiling\": \"%s\", \"memcpy_gbs\": %.1f, \"copy_kernel_gbs\": %.1f, "
           "\"product_tflops\": %.2f, \"side\": %d, \"precision\": \"%s\"}\n",
           device_describe(), 2e-3 * (double)bytes / memcpy_us, 2e-3 * (double)bytes / kernel_us,
           2e-6 * side * (double)side * side / product_us, side, PRECISION_NAME);
}

static void dense(const Shape *s, Arena *a) {
    int R = s->B * s->T, T = s->T, C = s->C, H = s->H, KV = s->KV, D = s->D, Q = H * D, W = KV * D;
    double fan = 1 / sqrt((double)C);
    floatX *x = normal(a, (int64_t)R * C, 1);
    floatX *y = normal(a, (int64_t)R * C, 1);
    floatX *dy = normal(a, (int64_t)R * C, 1);
    floatX *w = normal(a, C, 1);
    floatX *q = normal(a, (int64_t)R * Q, 1);
    floatX *k = normal(a, (int64_t)R * W, 1);
    floatX *v = normal(a, (int64_t)R * W, 1);
    floatX *o = normal(a, (int64_t)R * Q, 1);
    floatX *qn = normal(a, (int64_t)R * Q, 1);
    floatX *kn = normal(a, (int64_t)R * W, 1);
    floatX *dq = normal(a, (int64_t)R * Q, 1);
    floatX *dk = normal(a, (int64_t)R * W, 1);
    floatX *dv = normal(a, (int64_t)R * W, 1);
    floatX *Wq = normal(a, (int64_t)Q * C, fan);
    gradX *dW = GRADS((int64_t)Q * C);
    gradX *dw = GRADS(C > 2 * D ? C : 2 * D);
    real *rstd = REALS(R);
    real *cosine = REALS((int64_t)T * D / 2);
    real *sine = REALS((int64_t)T * D / 2);
    real *lse = REALS((int64_t)R * H);
    int *index = integers(a, R, [&](int64_t i) { return (int)(mix((uint64_t)i) % (uint64_t)R); });
    void *workspace = arena_take(a, attention_workspace(s->B, T, H, KV, D), "operands");
    if (!a->base) return;
    rope_table(cosine, sine, 1e6, T, D);
    BENCH("rmsnorm_forward", "", rmsnorm_forward(y, rstd, x, w, 1e-6f, R, C));
    if (only) rmsnorm_forward(y, rstd, x, w, 1e-6f, R, C); // rstd is wanted below
    BENCH("rmsnorm_backward", "", rmsnorm_backward(y, dw, dy, dy, x, w, rstd, 0, R, C));
    BENCH("add", "", add(y, x, dy, (size_t)R * (size_t)C));
    BENCH("rows_gather", "", rows_gather(y, x, index, R, (size_t)C * sizeof(floatX)));
    BENCH("linear_forward_q", "", linear_forward(q, x, Wq, R, Q, C));
    BENCH("linear_forward_kv", "", linear_forward(k, x, Wq, R, W, C));
    BENCH("linear_forward_o", "", linear_forward(y, q, Wq, R, C, Q));
    BENCH("linear_backward_input_q", "", linear_backward_input(y, q, Wq, R, Q, C));
    BENCH("linear_backward_input_add_kv", "", linear_backward_input_add(y, k, Wq, R, W, C));
    BENCH("linear_backward_input_o", "", linear_backward_input(dq, dy, Wq, R, C, Q));
    BENCH("linear_backward_weight_q", "", linear_backward_weight(dW, q, x, 0, R, Q, C));
    BENCH("linear_backward_weight_kv", "", linear_backward_weight(dW, k, x, 0, R, W, C));
    BENCH("linear_backward_weight_o", "", linear_backward_weight(dW, dy, q, 0, R, C, Q));
    BENCH("qk_norm_rope_forward", "",
          qk_norm_rope_forward(qn, kn, q, k, w, w, cosine, sine, 0, 1e-6f, R, T, H, KV, D));
    BENCH("qk_norm_rope_backward", "",
          qk_norm_rope_backward(dq, dk, dw, dw + D, qn, kn, q, k, w, w, cosine, sine, 0, 1e-6f, 0,
                                R, T, H, KV, D));
    static const char *const attention[] = {
#ifdef MOE_CUDNN
        "cudnn",
#endif
        "flash"
    };
    for (const char *name : attention) {
        attention_select(name);
        if (only && strstr("attention_backward", only))
            attention_forward(o, lse, qn, kn, v, 0, workspace, s->B, T, H, KV, D);
        BENCH("attention_forward", name,
              attention_forward(o, lse, qn, kn, v, 0, workspace, s->B, T, H, KV, D));
        BENCH(
            "attention_backward", name,
            attention_backward(dq, dk, dv, q, o, lse, qn, kn, v, 0, workspace, s->B, T, H, KV, D));
    }
}

// K distinct experts of every token, ascending: the K largest of log weight + Gumbel noise are a
// draw without replacement in proportion to the weights.
static double skew;
static int *choices(const Shape *s, Arena *a, double *load) {
    int R = s->B * s->T, E = s->E, K = s->K;
    std::vector<int> all((size_t)R * (size_t)K), rows((size_t)E), id((size_t)E);
    std::vector<double> key((size_t)E);
    for (int r = 0; r < R && a->base; r++) {
        for (int e = 0; e < E; e++) {
            id[(size_t)e] = e;
            key[(size_t)e] =
                -skew * log(e + 1.0) -
                log(-log(((double)(mix((uint64_t)r * 4096 + (uint64_t)e + 1) >> 11) + 0.5) *
                         0x1p-53));
        }
        std::partial_sort(id.begin(), id.begin() + K, id.end(),
                          [&](int i, int j) { return key[(size_t)i] > key[(size_t)j]; });
        std::sort(id.begin(), id.begin() + K);
        for (int k = 0; k < K; k++) {
            all[(size_t)r * (size_t)K + (size_t)k] = id[(size_t)k];
            rows[(size_t)id[(size_t)k]]++;
        }
    }
    *load = *std::max_element(rows.begin(), rows.end()) * (double)E / ((double)R * K);
    return integers(a, (int64_t)R * K, [&](int64_t i) { return all[(size_t)i]; });
}
static void experts(const Shape *s, Arena *a) {
    int R = s->B * s->T, C = s->C, E = s->E, K = s->K, F = s->F;
    int64_t M = row_index_bound(R, K, E);
    double load;
    double fan = 1 / sqrt((double)C);
    double fan2 = 1 / sqrt((double)F);
    const char *routing = skew > 0 ? "skewed" : "even";
    floatX *x = normal(a, (int64_t)R * C, 1);
    floatX *y = normal(a, (int64_t)R * C, 1);
    floatX *dy = normal(a, (int64_t)R * C, 1);
    floatX *W1 = normal(a, (int64_t)E * 2 * F * C, fan);
    floatX *W2 = normal(a, (int64_t)E * C * F, fan2);
    floatX *Wr = normal(a, (int64_t)E * C, fan);
    floatX *Y = normal(a, M * C, 1);
    floatX *H = normal(a, M * 2 * F, 1);
    floatX *dH = normal(a, M * 2 * F, 1);
    floatX *A = normal(a, M * F, 1);
    gradX *dW1 = GRADS((int64_t)E * 2 * F * C);
    gradX *dW2 = GRADS((int64_t)E * C * F);
    gradX *dWr = GRADS((int64_t)E * C);
    real *z = REALS((int64_t)R * E);
    real *dz = REALS((int64_t)R * E);
    real *score = REALS((int64_t)R * K);
    real *dscore = REALS((int64_t)R * K);
    int *topk = ARENA_TAKE(a, int, (int64_t)R *K, "operands");
    int *choice = choices(s, a, &load);
    double *share = ARENA_TAKE(a, double, E, "operands");
    RouterStats stats = { ARENA_TAKE(a, int64_t, E, "operands"),
                          ARENA_TAKE(a, double, E, "operands"),
                          ARENA_TAKE(a, double, 2, "operands") };
    RowIndex plan = { ARENA_TAKE(a, int, M, "operands"),
                      ARENA_TAKE(a, int, (int64_t)R *K, "operands"),
                      ARENA_TAKE(a, int, E + 1, "operands"),
                      (int)M,
                      R,
                      E,
                      K };
    if (!a->base) return;
    router_forward(z, topk, score, stats, x, Wr, 0, 0, 1, R, C, E,
                   K); // scores for what follows; the router is timed with choices of its own
    router_share(share, stats.count, R, 1, E);
    row_index_build(&plan, choice, 0);
    if (skew == 0) {
        BENCH("router_forward", "",
              router_forward(z, topk, score, stats, x, Wr, 0, 0, 1, R, C, E, K));
        BENCH("router_backward_add", "",
              router_backward_add(dy, dWr, dz, score, z, topk, score, x, Wr, share, 1e-3, 0, 1, 0,
                                  R, C, E, K));
    }
#define ROUTED(kernel, ...) bench(s, kernel, variant.c_str(), load, [&] { __VA_ARGS__; })
    std::string variant = routing;
    ROUTED("row_index_build", row_index_build(&plan, choice, 0));
    ROUTED("rows_weighted_sum", rows_weighted_sum(y, Y, score, &plan, C));
    ROUTED("rows_sum", rows_sum(y, Y, plan.token_row, R, K, C));
    for (const char *name : { "wgmma", "mma" }) {
        if (!experts_select(name)) continue;
        variant = std::string(routing) + " " + name;
        ROUTED("experts_up", experts_up(H, A, x, W1, &plan, C, F));
        ROUTED("experts_up_again", experts_up(H, 0, x, W1, &plan, C, F));
        ROUTED("experts_down", experts_down(Y, A, W2, &plan, C, F));
        ROUTED("experts_down_backward",
               experts_down_backward(dH, A, dscore, dy, H, W2, score, &plan, C, F));
        ROUTED("experts_up_backward", experts_up_backward(Y, dH, W1, &plan, C, F));
        ROUTED("experts_wgrad", experts_wgrad(dW1, dW2, x, dy, dH, A, &plan, 0, C, F));
    }
}

static void ends(const Shape *s, Arena *a) {
    int R = s->B * s->T, C = s->C, V = s->V, N = head_rows(s);
    floatX *x = normal(a, (int64_t)R * C, 1);
    floatX *We = normal(a, (int64_t)V * C, 1 / sqrt((double)C));
    floatX *logits = normal(a, (int64_t)N * V, 1);
    floatX *y = normal(a, (int64_t)N * C, 1);
    gradX *dW = GRADS((int64_t)V * C);
    double *loss = ARENA_TAKE(a, double, 1, "operands");
    int *ids = integers(a, R, [&](int64_t i) { return (int)(mix((uint64_t)i) % (uint64_t)V); });
    if (!a->base) return;
    BENCH("embed_forward", "", embed_forward(x, ids, We, R, C));
    BENCH("embed_backward", "", embed_backward(dW, x, ids, 0, -1, R, V, C));
    BENCH("head_forward", "", linear_forward(logits, y, We, N, V, C));
    BENCH("head_backward_input", "", linear_backward_input(y, logits, We, N, V, C));
    BENCH("head_backward_weight", "", linear_backward_weight(dW, logits, y, 1, N, V, C));
    BENCH("cross_entropy", "",
          cross_entropy(logits, loss, ids, 1.f / (float)R, 1, N,
                        V)); // last: in place, it leaves nearly constant numbers
}

// The experts of one layer in one segment for each of 3 E matrices' worth of numbers.
static void optimizer(const Shape *s, Arena *a) {
    int64_t n = s->P;
    int64_t each = n / (3 * s->E);
    std::vector<Segment> segments;
    for (int64_t i = 0; i < n / each; i++) {
        Segment g = { (uint64_t)i + 1, 0, each, i * each, i * (each / 256 + 1), 1 };
        segments.push_back(g);
    }
    int count = (int)segments.size();
    floatX *param = normal(a, n, 0.02);
    real *master = REALS(n);
    real *m = REALS(n);
    real *v = REALS(n);
    real *one = REALS(1);
    gradX *grad = GRADS(n);
    uint8_t *m8 = ARENA_TAKE(a, uint8_t, n, "operands");
    uint8_t *v8 = ARENA_TAKE(a, uint8_t, n, "operands");
    int64_t blocks = (int64_t)count * (each / 256 + 1);
    float *m_scale = ARENA_TAKE(a, float, blocks, "operands");
    float *v_scale = ARENA_TAKE(a, float, blocks, "operands");
    double *sums = ARENA_TAKE(a, double, count, "operands");
    if (!a->base) return;
    float value = 1;
    device_upload(one, &value, sizeof value);
    convert(grad, DTYPE_F32, param, DTYPE_FLOATX, (size_t)n);
    OptimizerStep o = { OPT_SGD, 1e-4, 0, 0.9, 0.999, 1e-8, 0.1, 2, 1, 2, 1 };
    OptimizerState plain = { param, 0, grad, 0, 0, 0, 0, 0, 0 };
    OptimizerState full_state = { param, master, grad, m, v, 0, 0, 0, 0 };
    OptimizerState state8 = { param, 0, grad, 0, 0, m8, v8, m_scale, v_scale };
    BENCH("gradient_squares", "", gradient_squares(sums, grad, segments.data(), count));
    BENCH("optimizer_sgd", "", optimizer_update(&plain, segments.data(), count, &o, one));
    o.kind = OPT_ADAMW;
    BENCH("optimizer_adamw", "", optimizer_update(&full_state, segments.data(), count, &o, one));
    o.kind = OPT_ADAMW8;
    BENCH("optimizer_adamw8", "", optimizer_update(&state8, segments.data(), count, &o, one));
    BENCH("init_segments", "", init_segments(param, master, segments.data(), count, 1, 0.02));
    BENCH("convert", "", convert(master, DTYPE_F32, param, DTYPE_FLOATX, (size_t)n));
}

int main(int argc, char **argv) {
    Shape s = full;
    std::vector<int> tokens = { 4096, 32768 };
    for (int i = 1; i < argc; i++) {
        std::string name = argv[i], value = i + 1 < argc ? argv[i + 1] : "";
        if (name == "--tiny") {
            s = tiny;
            seconds = 0;
            warm_calls = 0;
            least_calls = 1;
            flush_bytes = 1024;
            tokens = { s.T, 2 * s.T };
            continue;
        }
        i++;
        if (name == "--only")
            only = argv[i];
        else if (name == "--seconds")
            seconds = atof(value.c_str());
        else if (name == "--tokens") {
            tokens.clear();
            for (size_t at = 0; at < value.size();
                 at = std::min(value.find(',', at), value.size() - 1) + 1)
                tokens.push_back(atoi(value.c_str() + at));
        } else
            die("unknown option %s|see the first lines of dev/bench_cuda.cu", name.c_str());
        if (value.empty())
            die("%s needs a value|see the first lines of dev/bench_cuda.cu", name.c_str());
    }
    device_init(0, 0);
    CUDA_CHECK(cudaMalloc(&flush_memory, flush_bytes));
    run(ceilings, &s);
    for (int n : tokens) {
        if (n < 1 || (n > s.T && n % s.T))
            die("--tokens %d|at most %d, or a multiple of it", n, s.T);
        Shape one = s;
        one.B = n > s.T ? n / s.T : 1;
        one.T = n > s.T ? s.T : n;
        run(dense, &one);
        for (double w : { 0.0, 0.5 }) {
            skew = w;
            run(experts, &one);
        }
        run(ends, &one);
    }
    s.B = 1;
    run(optimizer, &s);
    run(ceilings, &s);
    device_finish();
    return 0;
}
