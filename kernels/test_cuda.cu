// Every CUDA kernel against its CPU twin, over ragged and degenerate shapes with the production
// tile widths. Runs in dev/cuemu (make test-cuemu) and on a GPU. The CPU kernels are linked in
// twice under other names (dev/mk/kernel_tests.mk): ref_* in the precision of this build, true_*
// in fp32.
//
// Tolerance, FlashAttention's rule: the same (bf16) inputs go through all three; the fp32 CPU
// result is the truth, and the error of the CUDA kernel may be at most twice that of the CPU's bf16
// version, in the root mean square of an output, plus 1e-5 of its size for sums in another order. A
// single element may be off by four times the largest error of the bf16 version, plus 1e-4 of the
// largest number. fp32 builds have only the second terms. Inputs are of size 1: what is zero in
// exact arithmetic (dq of a single position) may be 1e-6. Integers, random numbers and conversions
// must agree in every bit.
#ifdef MOE_CUDNN
#include "cuda/attention.h"
#endif
#include "cuda/experts.cuh"
#include <math.h>
#include <algorithm>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <string>
#include <vector>
typedef std::vector<double> Numbers;

enum World { CUDA, SAME, TRUTH, WORLDS };
#define TWIN(name)                        \
    extern "C" decltype(name) ref_##name; \
    extern "C" decltype(name) true_##name // nvcc 13 loses the second of two in one declaration
TWIN(embed_forward);
TWIN(embed_backward);
TWIN(cross_entropy);
TWIN(rmsnorm_forward);
TWIN(rmsnorm_backward);
TWIN(linear_forward);
TWIN(linear_backward_input);
TWIN(linear_backward_input_add);
TWIN(linear_backward_weight);
TWIN(add);
TWIN(rope_table);
TWIN(qk_norm_rope_forward);
TWIN(qk_norm_rope_backward);
TWIN(attention_forward);
TWIN(attention_backward);
TWIN(attention_workspace);
TWIN(router_forward);
TWIN(router_backward_add);
TWIN(router_share);
TWIN(row_index_bound);
TWIN(row_index_build);
TWIN(experts_up);
TWIN(experts_down);
TWIN(rows_weighted_sum);
TWIN(experts_down_backward);
TWIN(experts_up_backward);
TWIN(experts_wgrad);
TWIN(rows_gather);
TWIN(rows_sum);
TWIN(rows_sum_real);
TWIN(optimizer_update);
TWIN(gradient_squares);
TWIN(sum_in_order);
TWIN(gradient_scale);
TWIN(clip_scale);
TWIN(init_segments);
TWIN(convert);
TWIN(device_init);
TWIN(route_table);
TWIN(route_lists);
// The function of world `w`.
template <class F> static F *of_world(int w, F *cuda, F *same, F *truth) {
    F *all[WORLDS] = { cuda, same, truth };
    return all[w];
}
#define CALL(w, name, ...) of_world(w, name, ref_##name, true_##name)(__VA_ARGS__)

// ---- buffers: the same numbers in every world's types ---------------------------------------
enum Kind { X, REAL, DOUBLE, INT, INT64, BYTE };
static uint64_t random_state = 1;
static double uniform() { // [-1, 1)
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (double)(random_state >> 11) * 0x1p-52 - 1;
}
static int below(int n) { return (int)((uniform() + 1) / 2 * n); }
static size_t element_size(Kind k, int w) {
    if (k == X) return w == TRUTH ? 4 : sizeof(floatX);
    if (k == BYTE) return 1;
    return k == DOUBLE || k == INT64 ? 8 : 4;
}
static double on_grid(double v) { // as floatX keeps it
#if defined(MOE_BF16)
    return (double)__bfloat162float(__float2bfloat16((float)v));
#else
    return (double)(float)v;
#endif
}
static void put(void *p, Kind k, int w, double v) {
    if (k == DOUBLE)
        *(double *)p = v;
    else if (k == INT64)
        *(int64_t *)p = (int64_t)v;
    else if (k == INT)
        *(int *)p = (int)v;
    else if (k == BYTE)
        *(uint8_t *)p = (uint8_t)v;
    else if (k == X && w != TRUTH && sizeof(floatX) == 2) {
        __nv_bfloat16 b = __float2bfloat16((float)v);
        memcpy(p, &b, 2);
    } else
        *(float *)p = (float)v;
}
static double get(const void *p, Kind k, int w) {
    if (k == DOUBLE) return *(const double *)p;
    if (k == INT64) return (double)*(const int64_t *)p;
    if (k == INT) return *(const int *)p;
    if (k == BYTE) return *(const uint8_t *)p;
    if (k == X && w != TRUTH && sizeof(floatX) == 2) {
        __nv_bfloat16 b;
        memcpy(&b, p, 2);
        return (double)__bfloat162float(b);
    }
    return *(const float *)p;
}
struct Buffer {
    Kind kind;
    size_t n;
    void *memory[WORLDS];
    floatX *x(int w) const { return (floatX *)memory[w]; }
    gradX *g(int w) const { return (gradX *)memory[w]; }
    real *r(int w) const { return (real *)memory[w]; }
    double *d(int w) const { return (double *)memory[w]; }
    int *i(int w) const { return (int *)memory[w]; }
    int64_t *l(int w) const { return (int64_t *)memory[w]; }
    uint8_t *b(int w) const { return (uint8_t *)memory[w]; }
};
static std::vector<Buffer> all_buffers;
static void write(const Buffer &b, int w, const Numbers &v) {
    size_t size = element_size(b.kind, w);
    std::vector<char> host(v.size() * size + 1);
    for (size_t i = 0; i < v.size(); i++) put(&host[i * size], b.kind, w, v[i]);
    if (w == CUDA)
        device_upload(b.memory[w], host.data(), v.size() * size);
    else
        memcpy(b.memory[w], host.data(), v.size() * size);
}
static Numbers read(const Buffer &b, int w) {
    size_t size = element_size(b.kind, w);
    std::vector<char> host(b.n * size + 1);
    if (w == CUDA)
        device_download(host.data(), b.memory[w], b.n * size);
    else
        memcpy(host.data(), b.memory[w], b.n * size);
    Numbers v(b.n);
    for (size_t i = 0; i < b.n; i++) v[i] = get(&host[i * size], b.kind, w);
    return v;
}
// What stands after a buffer: NaN in every type, but not the NaN that rounding to bf16 makes, and
// not -1.
static const unsigned char BEHIND[17] =
    "\xc1\x7f\xc1\x7f\xc1\x7f\xc1\x7f\xc1\x7f\xc1\x7f\xc1\x7f\xc1\x7f";
// n elements, NaN bytes in every world: what a kernel does not write is found.
static Buffer output(Kind kind, size_t n) {
    Buffer b;
    b.kind = kind;
    b.n = n;
    for (int w = CUDA; w < WORLDS; w++) {
        size_t bytes = n * element_size(kind, w) + 16;
        if (w == CUDA) {
            CUDA_CHECK(cudaMalloc(&b.memory[w], bytes));
            CUDA_CHECK(cudaMemsetAsync(b.memory[w], 0xff, bytes, compute_stream()));
            device_upload((char *)b.memory[w] + bytes - 16, BEHIND, 16);
        } else
            memset(b.memory[w] = xmalloc(bytes, "a test buffer"), 0xff, bytes);
    }
    all_buffers.push_back(b);
    return b;
}
static Buffer input(Kind kind, const Numbers &v) {
    Buffer b = output(kind, v.size());
    for (int w = CUDA; w < WORLDS; w++) write(b, w, v);
    return b;
}
static Buffer random_input(Kind kind, size_t n, double scale = 1) {
    Numbers v(n);
    for (auto &x : v)
        x = kind == X ? on_grid(uniform() * scale) : (double)(float)(uniform() * scale);
    return input(kind, v);
}
static Buffer zeros(Kind kind, size_t n) { return input(kind, Numbers(n, 0.0)); }

// ---- checks ---------------------------------------------------------------------------------
static int passed, failed;
static const char *only;
static std::string group;
static bool group_good;
static clock_t group_begin;
// Begins a test. Its numbers follow from its name alone, so that no other test changes them.
static void begin(const char *name) {
    group = name;
    group_good = true;
    group_begin = clock();
    random_state = 1;
    for (const char *c = name; *c; c++) random_state = random_state * 1099511628211u + *c;
}
static void complain(const char *what, const char *text) {
    printf("     %s: %s: %s\n", group.c_str(), what, text);
    group_good = false;
}
static void compare_numbers(const char *what, const Numbers &mine, const Numbers &same,
                            const Numbers &truth) {
    double square = 0;
    double square_same = 0;
    double size = 0;
    double most = 0;
    double most_same = 0;
    double largest = 0;
    for (size_t i = 0; i < truth.size(); i++) {
        double e = fabs(mine[i] - truth[i]);
        double f = fabs(same[i] - truth[i]);
        square += e * e;
        square_same += f * f;
        size += truth[i] * truth[i];
        if (!(e <= most)) most = e;
        if (!(f <= most_same)) most_same = f;
        if (fabs(truth[i]) > largest) largest = fabs(truth[i]);
    }
    char text[200];
    snprintf(text, sizeof text,
             "rms error %.3g (CPU %.3g, size %.3g), largest %.3g (CPU %.3g, size %.3g) of %zu",
             sqrt(square), sqrt(square_same), sqrt(size), most, most_same, largest, truth.size());
    double noise = 1e-6 * sqrt((double)truth.size());
    if (!(sqrt(square) <= 2 * sqrt(square_same) + 1e-5 * sqrt(size) + noise) ||
        !(most <= 4 * most_same + 1e-4 * largest + 1e-6))
        complain(what, text);
}
static void compare(const char *what, const Buffer &b) {
    compare_numbers(what, read(b, CUDA), read(b, SAME), read(b, TRUTH));
}
static void exact_numbers(const char *what, const Numbers &a, const Numbers &b) {
    for (size_t i = 0; i < b.size(); i++)
        if (!(a[i] == b[i]) && !(a[i] != a[i] && b[i] != b[i])) {
            char text[120];
            snprintf(text, sizeof text, "element %zu is %.9g, on the CPU %.9g", i, a[i], b[i]);
            return complain(what, text);
        }
}
static void exact(const char *what, const Buffer &b) {
    exact_numbers(what, read(b, CUDA), read(b, SAME));
}
static void end() {
    for (auto &b : all_buffers) {
        unsigned char behind[16];
        device_download(behind, (char *)b.memory[CUDA] + b.n * element_size(b.kind, CUDA), 16);
        if (memcmp(behind, BEHIND, 16)) complain("a buffer", "written behind its end");
        CUDA_CHECK(cudaFree(b.memory[CUDA]));
        free(b.memory[SAME]);
        free(b.memory[TRUTH]);
    }
    all_buffers.clear();
    double seconds = (double)(clock() - group_begin) / CLOCKS_PER_SEC; // of the processor
    printf("%4d %s %s, %.2f s\n", passed + failed + 1, group_good ? "ok    " : "FAILED",
           group.c_str(), seconds);
    fflush(stdout);
    group_good ? passed++ : failed++;
}

// ---- ends -----------------------------------------------------------------------------------
static void test_embedding(int R, int V, int C, int pad) {
    begin("embedding");
    Numbers id(R);
    for (int i = 0; i < R; i++) id[i] = i % 3 ? below(V) : V / 2; // one frequent id
    Buffer ids = input(INT, id);
    Buffer W = random_input(X, (size_t)V * C);
    Buffer out = output(X, (size_t)R * C);
    Buffer dx = random_input(X, (size_t)R * C);
    Buffer fresh = output(REAL, (size_t)V * C);
    Buffer sum = random_input(REAL, (size_t)V * C);
    for (int w = CUDA; w < WORLDS; w++) {
        CALL(w, embed_forward, out.x(w), ids.i(w), W.x(w), R, C);
        CALL(w, embed_backward, fresh.g(w), dx.x(w), ids.i(w), 0, pad, R, V, C);
        CALL(w, embed_backward, sum.g(w), dx.x(w), ids.i(w), 1, -1, R, V, C);
    }
    // the same additions in the same order
    exact("out", out);
    exact("dW", fresh);
    exact("dW accumulated", sum);
    end();
}
static void test_cross_entropy(int N, int V) {
    begin("cross entropy");
    Numbers target(N);
    for (int i = 0; i < N; i++) target[i] = i % 4 == 2 ? V - 1 : below(V);
    for (int i = 3; i < N; i += 4) target[i] = -1;
    Buffer targets = input(INT, target);
    Buffer logits = random_input(X, (size_t)N * V, 8);
    Buffer again = random_input(X, (size_t)N * V);
    Buffer loss = zeros(DOUBLE, 1);
    Buffer loss2 = zeros(DOUBLE, 1);
    for (int w = CUDA; w < WORLDS; w++) {
        CALL(w, cross_entropy, logits.x(w), loss.d(w), targets.i(w), 0.125f, 1, N, V);
        CALL(w, cross_entropy, again.x(w), loss2.d(w), targets.i(w), 0.125f, 0, N, V);
    }
    compare("dlogits", logits);
    exact("logits left alone", again);
    compare("loss", loss);
    compare("loss without backward", loss2);
    end();
}

// ---- dense ----------------------------------------------------------------------------------
static void test_rmsnorm(int R, int C) {
    begin("rmsnorm");
    Buffer x = random_input(X, (size_t)R * C, 3);
    Buffer w_ = random_input(X, C, 2);
    Buffer y = output(X, (size_t)R * C);
    Buffer y2 = output(X, (size_t)R * C);
    Buffer rstd = output(REAL, R);
    Buffer dy = random_input(X, (size_t)R * C);
    Buffer dx = output(X, (size_t)R * C);
    Buffer inplace = random_input(X, (size_t)R * C);
    Buffer dw = output(REAL, C);
    Buffer dw2 = random_input(REAL, C);
    for (int w = CUDA; w < WORLDS; w++) {
        CALL(w, rmsnorm_forward, y.x(w), rstd.r(w), x.x(w), w_.x(w), 1e-6f, R, C);
        CALL(w, rmsnorm_forward, y2.x(w), 0, x.x(w), w_.x(w), 1e-6f, R, C);
        CALL(w, rmsnorm_backward, dx.x(w), dw.g(w), 0, dy.x(w), x.x(w), w_.x(w), rstd.r(w), 0, R,
             C);
        CALL(w, rmsnorm_backward, inplace.x(w), dw2.g(w), inplace.x(w), dy.x(w), x.x(w), w_.x(w),
             rstd.r(w), 1, R, C);
    }
    compare("y", y);
    compare("y without rstd", y2);
    compare("rstd", rstd);
    compare("dx", dx);
    compare("dx with residual in place", inplace);
    compare("dw", dw);
    compare("dw accumulated", dw2);
    end();
}
static void test_linear(int R, int O, int N) {
    begin("linear and add");
    Buffer x = random_input(X, (size_t)R * N);
    Buffer W = random_input(X, (size_t)O * N);
    Buffer y = output(X, (size_t)R * O);
    Buffer dy = random_input(X, (size_t)R * O);
    Buffer dx = output(X, (size_t)R * N);
    Buffer dx2 = random_input(X, (size_t)R * N);
    Buffer dW = output(REAL, (size_t)O * N);
    Buffer dW2 = random_input(REAL, (size_t)O * N);
    Buffer sum = random_input(X, R * N);
    for (int w = CUDA; w < WORLDS; w++) {
        CALL(w, linear_forward, y.x(w), x.x(w), W.x(w), R, O, N);
        CALL(w, linear_backward_input, dx.x(w), dy.x(w), W.x(w), R, O, N);
        CALL(w, linear_backward_input_add, dx2.x(w), dy.x(w), W.x(w), R, O, N);
        CALL(w, linear_backward_weight, dW.g(w), dy.x(w), x.x(w), 0, R, O, N);
        CALL(w, linear_backward_weight, dW2.g(w), dy.x(w), x.x(w), 1, R, O, N);
        CALL(w, add, sum.x(w), x.x(w), dx2.x(w), (size_t)R * N - (R > 0)); // ragged
    }
    compare("y", y);
    compare("dx", dx);
    compare("dx added", dx2);
    compare("dW", dW);
    compare("dW accumulated", dW2);
    compare("add", sum);
    end();
}

// ---- attention ------------------------------------------------------------------------------
// position (B,T): documents of 1 to 40 tokens (some of one), each sequence begins one.
static Buffer random_positions(int B, int T) {
    Numbers v;
    for (int b = 0; b < B; b++)
        for (int t = 0, left = 0, at = 0; t < T; t++, at++, left--) {
            if (left <= 0) {
                left = below(3) ? 1 + below(40) : 1;
                at = 0;
            }
            v.push_back(at);
        }
    return input(INT, v);
}
static void test_qk_norm_rope(int B, int T, int H, int KV, int D, bool documents = false) {
    begin(documents ? "q/k norm and RoPE of documents" : "q/k norm and RoPE");
    Buffer positions = random_positions(B, T);
    int R = B * T;
    size_t nq = (size_t)R * H * D;
    size_t nk = (size_t)R * KV * D;
    size_t table = (size_t)T * D / 2;
    Buffer cosines = output(REAL, table);
    Buffer sines = output(REAL, table);
    Buffer q = random_input(X, nq, 2);
    Buffer k = random_input(X, nk, 2);
    Buffer wq = random_input(X, D);
    Buffer wk = random_input(X, D);
    Buffer qn = output(X, nq);
    Buffer kn = output(X, nk);
    Buffer dq = random_input(X, nq);
    Buffer dk = output(X, nk);
    Buffer dkn = random_input(X, nk);
    Buffer dwq = output(REAL, D);
    Buffer dwk = random_input(REAL, D);
    Buffer unused = output(REAL, D);
    Buffer dq2 = output(X, nq);
    Buffer dk2 = output(X, nk);
    for (int w = CUDA; w < WORLDS; w++) {
        CALL(w, rope_table, cosines.r(w), sines.r(w), 1e6, T, D);
        CALL(w, qk_norm_rope_forward, qn.x(w), kn.x(w), q.x(w), k.x(w), wq.x(w), wk.x(w),
             cosines.r(w), sines.r(w), documents ? positions.i(w) : 0, 1e-6f, R, T, H, KV, D);
        CALL(w, qk_norm_rope_backward, dq2.x(w), dk2.x(w), unused.g(w), dwk.g(w), dq.x(w), dkn.x(w),
             q.x(w), k.x(w), wq.x(w), wk.x(w), cosines.r(w), sines.r(w),
             documents ? positions.i(w) : 0, 1e-6f, 0, R, T, H, KV, D);
        CALL(w, qk_norm_rope_backward, dq.x(w), dk.x(w), dwq.g(w), dwk.g(w), dq.x(w), dkn.x(w),
             q.x(w), k.x(w), wq.x(w), wk.x(w), cosines.r(w), sines.r(w),
             documents ? positions.i(w) : 0, 1e-6f, w * 0, R, T, H, KV, D);
        CALL(w, qk_norm_rope_backward, dq2.x(w), dk2.x(w), dwq.g(w), dwk.g(w), qn.x(w), kn.x(w),
             q.x(w), k.x(w), wq.x(w), wk.x(w), cosines.r(w), sines.r(w),
             documents ? positions.i(w) : 0, 1e-6f, 1, R, T, H, KV, D);
    }
    compare("cos", cosines);
    compare("sin", sines);
    compare("q", qn);
    compare("k", kn);
    compare("dq in place", dq);
    compare("dk", dk);
    compare("dwq accumulated", dwq);
    compare("dwk accumulated", dwk);
    compare("dwq", unused);
    compare("dq", dq2);
    end();
}
static void test_attention(const char *kernel, int B, int T, int H, int KV, int D,
                           bool documents = false) {
    char name[100];
    snprintf(name, sizeof name, "attention %s B %d T %d H %d KV %d D %d%s", kernel, B, T, H, KV, D,
             documents ? ", documents" : "");
    Buffer positions = random_positions(B, T);
    attention_select(kernel);
    begin(name);
    size_t nq = (size_t)B * T * H * D;
    size_t nk = (size_t)B * T * KV * D;
    Buffer q = random_input(X, nq, 2);
    Buffer k = random_input(X, nk, 2);
    Buffer v = random_input(X, nk);
    Buffer o = output(X, nq);
    Buffer lse = output(REAL, (size_t)B * H * T);
    Buffer d_o = random_input(X, nq);
    Buffer dq = output(X, nq);
    Buffer dk = output(X, nk);
    Buffer dv = output(X, nk);
    Buffer again_q = output(X, nq);
    Buffer again_k = output(X, nk);
    Buffer again_v = output(X, nk);
    size_t bytes = attention_workspace(B, T, H, KV, D);
    size_t other = ref_attention_workspace(B, T, H, KV, D);
    size_t largest = true_attention_workspace(B, T, H, KV, D);
    if (other > bytes) bytes = other;
    if (largest > bytes) bytes = largest;
    Buffer workspace = output(BYTE, bytes);
    for (int w = CUDA; w < WORLDS; w++) {
        CALL(w, attention_forward, o.x(w), lse.r(w), q.x(w), k.x(w), v.x(w),
             documents ? positions.i(w) : 0, workspace.memory[w], B, T, H, KV, D);
        CALL(w, attention_backward, dq.x(w), dk.x(w), dv.x(w), d_o.x(w), o.x(w), lse.r(w), q.x(w),
             k.x(w), v.x(w), documents ? positions.i(w) : 0, workspace.memory[w], B, T, H, KV, D);
    }
    attention_backward(again_q.x(CUDA), again_k.x(CUDA), again_v.x(CUDA), d_o.x(CUDA), o.x(CUDA),
                       lse.r(CUDA), q.x(CUDA), k.x(CUDA), v.x(CUDA),
                       documents ? positions.i(CUDA) : 0, workspace.memory[CUDA], B, T, H, KV, D);
    compare("o", o);
    compare("lse", lse);
    compare("dq", dq);
    compare("dk", dk);
    compare("dv", dv);
    exact_numbers("dq again (I8, deterministic)", read(again_q, CUDA), read(dq, CUDA));
    exact_numbers("dk again (I8, deterministic)", read(again_k, CUDA), read(dk, CUDA));
    exact_numbers("dv again (I8, deterministic)", read(again_v, CUDA), read(dv, CUDA));
    if (documents && B > 0) { // other numbers in the first document change no bit of the others
        Numbers at = read(positions, CUDA);
        Numbers before = read(o, CUDA);
        Numbers changed = read(k, CUDA);
        size_t length = 1;
        while (length < (size_t)T && at[length] > 0) length++;
        for (size_t i = 0; i < length * KV * D; i++) changed[i] = on_grid(changed[i] + 1);
        write(k, CUDA, changed);
        attention_forward(o.x(CUDA), lse.r(CUDA), q.x(CUDA), k.x(CUDA), v.x(CUDA),
                          positions.i(CUDA), workspace.memory[CUDA], B, T, H, KV, D);
        Numbers after = read(o, CUDA);
        before.erase(before.begin(), before.begin() + (ptrdiff_t)(length * H * D));
        after.erase(after.begin(), after.begin() + (ptrdiff_t)(length * H * D));
        exact_numbers("other documents", after, before);
    }
    end();
}

#include "test_cuda_experts.h"

#include "test_cuda_optimizer.h"

static void test_convert(size_t n) {
    begin("conversions");
    static const Dtype types[] = { DTYPE_F32, DTYPE_BF16, DTYPE_F16, DTYPE_F64 };
    Numbers v(n);
    static const double size[5] = { 1e-6, 7e4, 1, 1, 1 };
    for (size_t i = 0; i < n; i++) v[i] = uniform() * size[i % 5];
    if (n > 4) {
        v[n % 8 ? n - 1 : 0] = INFINITY;
        v[1] = -0.0;
        v[2] = 65519.999;
        v[3] = 1 + 0x1p-8 + 0x1p-40;
    }
    Buffer wide = input(DOUBLE, v);
    Buffer from = output(BYTE, n * 8);
    Buffer to = output(BYTE, n * 8);
    for (int a = 0; a < 4; a++)
        for (int b = 0; b < 4; b++) {
            for (int w = CUDA; w <= SAME; w++) {
                CALL(w, convert, from.memory[w], types[a], wide.memory[w], DTYPE_F64, n);
                CALL(w, convert, to.memory[w], types[b], from.memory[w], types[a], n);
            }
            exact("conversion", to);
        }
    end();
}
static void test_device() {
    begin("arena, copies, streams");
    Arena a = arena_counting("test");
    // five pieces of an upload, one more than it has stages
    arena_take(&a, 1000, "one");
    arena_take(&a, 17u << 20, "two");
    size_t counted = a.used;
    arena_commit(&a);
    char *one = (char *)arena_take(&a, 1000, "one");
    char *two = (char *)arena_take(&a, 17u << 20, "two");
    if (a.used != counted || (size_t)two % 256 || two != one + 1024)
        complain("arena", "the second pass differs from the first");
    std::vector<char> host(17u << 20), back(17u << 20);
    for (size_t i = 0; i < host.size(); i++)
        host[i] = (char)(i * 7 + i / 4096 + (i >> 20)); // no two pieces alike
    std::vector<char> kept = host;
    device_upload(two, host.data(), host.size());
    memset(host.data(), 0, host.size()); // allowed as soon as upload returns
    stream_order(STREAM_COMPUTE, STREAM_GATHER);
    CUDA_CHECK(cudaMemsetAsync(two + 5, 1, 3, device_stream(STREAM_GATHER)));
    stream_order(STREAM_GATHER, STREAM_COMPUTE);
    device_copy(one, two, 1000);
    device_download(back.data(), two, back.size());
    kept[5] = kept[6] = kept[7] = 1;
    if (back != kept) complain("upload", "other bytes came back");
    device_download(back.data(), one, 1000);
    if (memcmp(back.data(), kept.data(), 1000)) complain("copy", "other bytes came back");
    arena_free(&a);
    end();
}

// The first-minute check finds nothing on kernels that are right, and leaves the fast ones chosen.
// What it says of wrong ones: dev/mutations/kernels.txt.
static void test_kernel_check() {
    begin("the check of the first minute");
    experts_select("auto");
    std::string before = experts_kernel();
    if (kernel_check(1)) complain("check", "a kernel is called wrong");
    if (before != experts_kernel()) complain("check", "another kernel is chosen");
    end();
}

// test_cuda [substring | -substring]: the groups whose name contains it, or all others. An exit
// status of 0 means all passed.
static bool chosen(const char *name) {
    return !only || (*only == '-' ? !strstr(name, only + 1) : strstr(name, only) != 0);
}
#define RUN(name, ...)                               \
    do {                                             \
        if (chosen(#name)) test_##name(__VA_ARGS__); \
    } while (0)
int main(int argc, char **argv) {
    only = argc > 1 ? argv[1] : 0;
    device_init(0, 0);
    ref_device_init(0, 1);
    true_device_init(0, 1);
    printf("%s\n", device_describe());
    RUN(device);
    RUN(kernel_check);
    RUN(embedding, 70, 300, 64, 150);
    RUN(embedding, 300, 70000, 8, -1);
    RUN(embedding, 0, 10, 16, -1);
    RUN(embedding, 1, 1, 2056, -1);
    RUN(cross_entropy, 6, 257);
    RUN(cross_entropy, 5, 4096);
    RUN(cross_entropy, 3, 5003);
    RUN(cross_entropy, 0, 64);
    RUN(cross_entropy, 4, 1);
    RUN(rmsnorm, 3, 64);
    RUN(rmsnorm, 37, 2048);
    RUN(rmsnorm, 1, 8);
    RUN(rmsnorm, 0, 64);
    RUN(rmsnorm, 1031, 520);
    RUN(rmsnorm, 2, 4104);
    RUN(linear, 33, 48, 40);
    RUN(linear, 1, 257, 8);
    RUN(linear, 0, 16, 16);
    RUN(linear, 130, 16, 136);
    RUN(qk_norm_rope, 2, 9, 4, 2, 128);
    RUN(qk_norm_rope, 1, 70, 4, 4, 16);
    RUN(qk_norm_rope, 1, 3, 6, 3, 64);
    RUN(qk_norm_rope, 0, 3, 2, 1, 32);
    RUN(qk_norm_rope, 2, 90, 4, 2, 64, true);
    std::vector<const char *> kernels = { "flash" };
#if defined(MOE_CUDNN) && defined(MOE_BF16)
    kernels.push_back("cudnn");
    RUN(attention, "cudnn", 2, 1000, 8, 2, 128);
    RUN(attention, "cudnn", 1, 512, 2, 2, 64);
    // MiB: backward in calls of two sequences and of one, then of one KV head each
    for (int64_t chunk : { 12, 3 }) {
        int64_t kept = cudnn_attention_chunk;
        cudnn_attention_chunk = chunk << 20;
        RUN(attention, "cudnn", 3, 500, 8, 2, 128);
        cudnn_attention_chunk = kept;
    }
#endif
    for (const char *kernel : kernels) {
        RUN(attention, kernel, 1, 1, 1, 1, 16);
        RUN(attention, kernel, 2, 65, 4, 2, 16);
        RUN(attention, kernel, 1, 130, 2, 1, 64);
        RUN(attention, kernel, 1, 97, 2, 1, 128);
        RUN(attention, kernel, 1, 64, 3, 1, 32);
        RUN(attention, kernel, 0, 5, 1, 1, 16);
        RUN(attention, kernel, 2, 230, 4, 2, 64, true);
        RUN(attention, kernel, 1, 70, 2, 1, 128, true);
    }
    RUN(router, 37, 64, 8, 2, 1, 0);
    RUN(router, 70, 40, 128, 8, 1, 0);
    RUN(router, 9, 64, 5, 5, 0, 0);
    RUN(router, 20, 16, 40, 3, 0, 0);
    RUN(router, 6, 16, 33, 4, 1, 1);
    RUN(router, 0, 16, 8, 2, 1, 0);
    RUN(router, 5, 16, 1, 1, 1, 0);
    RUN(router, 3, 16, 400, 8, 1, 0);
    RUN(plan, 300, 1, 1);
    RUN(plan, 600, 8, 128);
    RUN(plan, 257, 2, 3);
    RUN(plan, 0, 2, 4);
    RUN(plan, 40, 4, 700);
    for (const char *kernel : { "mma", "wgmma" }) {
        if (!experts_select(expert_kernel = kernel)) continue;
        RUN(experts, 5, 2, 4, 64, 24, DISPATCH);
        RUN(experts, 150, 2, 3, 72, 40, ONE);
        RUN(experts, 30, 2, 4, 136, 136, FOREIGN);
        RUN(experts, 6, 2, 3, 16, 8, EMPTY);
        RUN(experts, 0, 2, 3, 16, 8, DISPATCH);
        RUN(experts, 140, 1, 1, 264, 72, DISPATCH);
        RUN(experts, 30, 8, 40, 32, 16, DISPATCH);
        RUN(experts, 2, 4, 256, 16, 8, DISPATCH);
        RUN(experts, 130, 1, 2, 520, 264, ONE);
    }
    if (experts_select(expert_kernel = "wgmma")) RUN(experts_budget, 200, 2, 3, 136, 264);
#if defined(MOE_BF16)
    if (experts_select(expert_kernel = "wgmma")) { // the other way to publish gathered stages
        hopper_publish(true);
        RUN(experts, 5, 2, 4, 64, 24, DISPATCH);
        RUN(experts, 150, 2, 3, 72, 40, ONE);
        RUN(experts, 30, 2, 4, 136, 136, FOREIGN);
        RUN(experts_budget, 200, 2, 3, 136, 264);
        hopper_publish(false);
    }
    RUN(shares, 11136); // two shares a multiprocessor
    RUN(shares, 12672);
    RUN(shares, 49152); // four
#endif
    experts_select("auto");
#ifdef MOE_DEBUG // sanitizers look at accesses, of which a few cases have all
    RUN(routes, 60);
#else
    RUN(routes, 1000);
#endif
    RUN(rows, 20, 9, 3, 64);
    RUN(rows, 1, 1, 1, 2048);
    RUN(rows, 0, 4, 2, 8);
    RUN(rows, 5, 3, 11, 40);
    for (int master = 0; master < 2; master++) {
        RUN(optimizer, OPT_SGD, master, true, 5);
        RUN(optimizer, OPT_ADAMW, master, true, 70);
        RUN(optimizer, OPT_ADAMW8, master, false, 6);
    }
    RUN(norms, 70);
    RUN(convert, 3000);
    RUN(convert, 3003);
    RUN(convert, 1);
    RUN(convert, 0);
    device_finish();
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
