// The first minute on a card: every fast kernel runs once on small ragged shapes beside a slow twin
// that computes the same (kernel_check of device.h). The fast kernels use instructions and
// libraries that can be wrong on one machine only; the twins use ordinary ones.
//
//   fast                          twin
//   experts by wgmma and TMA      experts by mma.sync
//   attention by cuDNN            attention by the kernel "flash"
//   products by cuBLASLt          one thread an element
//
// Tolerance. Both sides add the same bf16 products in fp32 and differ by the order of the sums and
// by the rounding of results, inputs of a later product included: TOLERANCE of an element, and as
// much of the root mean square for what cancels. Attention also rounds probabilities at different
// places: four times that. A wrong descriptor, scale or tile is wrong by about the root mean square
// itself.
#include "common.cuh"
#include "attention.h"
#include "experts.cuh"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <vector>

enum { MOST_BUFFERS = 64 };
static const double DEADLINE = 30; // seconds for one kernel, the load of its code included
static const double TOLERANCE = 0x1p-6;

// One run of the check: its memory, and what it found.
struct Check {
    int print, failed, buffers;
    void *memory[MOST_BUFFERS];
    size_t bytes[MOST_BUFFERS];
    uint64_t random;
    const char *name; // the kernel that runs
    char wrong[256];  // its worst element, empty where all are right
    double tolerance; // of what runs now
    double worst;     // largest difference in units of the tolerance
};
static double uniform(Check *c) { // [-1, 1)
    c->random = c->random * 6364136223846793005u + 1442695040888963407u;
    return (double)(c->random >> 11) * 0x1p-52 - 1;
}
static void *take(Check *c, size_t bytes) {
    void *memory = device_take(bytes);
    if (!memory || c->buffers == MOST_BUFFERS)
        die("the kernel check finds no %zu bytes on the GPU|end other programs on it, or "
            "--kernel-check off",
            bytes);
    c->memory[c->buffers] = memory;
    c->bytes[c->buffers++] = bytes;
    return memory;
}
static void give_all(Check *c) {
    while (c->buffers > 0) {
        c->buffers--;
        device_give(c->memory[c->buffers], c->bytes[c->buffers]);
    }
}
template <class T> static T *upload(Check *c, const std::vector<T> &host) {
    T *memory = (T *)take(c, host.size() * sizeof(T));
    device_upload(memory, host.data(), host.size() * sizeof(T));
    return memory;
}
static floatX host_x(double value) {
    floatX x;
#if defined(MOE_BF16)
    x.bits = float_to_bf16((float)value);
#else
    x.v = (float)value;
#endif
    return x;
}
static floatX *random_x(Check *c, int64_t n, double scale) {
    std::vector<floatX> host(n);
    for (auto &x : host) x = host_x(scale * uniform(c));
    return upload(c, host);
}
static float *random_real(Check *c, int64_t n) {
    std::vector<float> host(n);
    for (auto &x : host) x = (float)uniform(c);
    return upload(c, host);
}
static double number(floatX x) { return (double)floatx_to_float(x); }
static double number(float x) { return (double)x; }

// Waits for what COMPUTE was given. Ends the program where it does not end: nothing can be computed
// on a GPU whose multiprocessors are held.
static void wait_or_die(Check *c) {
    cudaEvent_t done;
    CUDA_CHECK(cudaEventCreateWithFlags(&done, cudaEventDisableTiming));
    CUDA_CHECK(cudaEventRecord(done, compute_stream()));
    double start = now_seconds();
    cudaError_t state;
    while ((state = cudaEventQuery(done)) == cudaErrorNotReady)
        if (now_seconds() - start > DEADLINE)
            die("the kernel check: %s has not ended after %.0f s|MOE_EXPERT_KERNEL=mma for "
                "experts, --attention-kernel flash for attention, --kernel-check off to skip the "
                "check",
                c->name, DEADLINE);
    CUDA_CHECK(state);
    CUDA_CHECK(cudaEventDestroy(done));
}
// Compares `n` numbers of the fast kernel with those of the twin, `columns` a row, and keeps the
// worst.
template <class T>
static void compare(Check *c, const char *what, const T *fast, const T *twin, int64_t n,
                    int64_t columns) {
    std::vector<T> a(n), b(n);
    device_download(a.data(), fast, a.size() * sizeof(T));
    device_download(b.data(), twin, b.size() * sizeof(T));
    double square = 0;
    for (auto x : b) square += number(x) * number(x);
    double root = sqrt(square / (double)(n ? n : 1));
    for (int64_t i = 0; i < n; i++) {
        double x = number(a[i]);
        double y = number(b[i]);
        double units = fabs(x - y) / (c->tolerance * (fabs(y) + root) + 1e-30);
        if (units <= c->worst) continue; // not for NaN
        c->worst = units == units ? units : INFINITY;
        if (units <= 1) continue;
        snprintf(c->wrong, sizeof c->wrong, "%s, row %lld, column %lld: %.6g, the twin %.6g", what,
                 (long long)(i / columns), (long long)(i % columns), x, y);
    }
}
// Runs one comparison and reports it; returns whether the fast kernel was right. `instead` says
// what is used where it was not.
template <class F>
static bool checked(Check *c, const char *name, const char *shape, const char *instead, F run) {
    c->name = name;
    c->wrong[0] = 0;
    c->worst = 0;
    c->tolerance = TOLERANCE;
    run();
    give_all(c);
    bool right = !c->wrong[0];
    if (c->print)
        printf("  %-6s %-28s %-40s largest difference %.2f of the tolerance\n",
               right ? "ok" : "WRONG", name, shape, c->worst);
    if (right) return true;
    c->failed++;
    warn("kernel check: %s, %s, computes %s; %s", name, shape, c->wrong, instead);
    return false;
}

// ---- products -------------------------------------------------------------------------------
// C = op(A) op(B) + beta C by one thread an element: what common.cuh promises, read literally.
static __global__ void plain_product(int ta, int tb, int m, int n, int k, const floatX *A, int lda,
                                     const floatX *B, int beta, void *C, int c_real) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= m * n) return;
    int row = i / n;
    int column = i % n;
    float sum = 0;
    for (int j = 0; j < k; j++) {
        const floatX *a = ta ? A + j * lda + row : A + row * lda + j;
        const floatX *b = tb ? B + column * k + j : B + j * n + column;
        sum += load(a) * load(b);
    }
    if (beta) sum += c_real ? ((float *)C)[i] : load((floatX *)C + i);
    if (c_real)
        ((float *)C)[i] = sum;
    else
        store((floatX *)C + i, sum);
}
static void check_product(Check *c, int ta, int tb, int beta, int c_real) {
    const int m = 136;
    const int n = 72;
    const int k = 200;
    std::vector<float> old((size_t)m * n);
    std::vector<floatX> old_x((size_t)m * n);
    for (size_t i = 0; i < old.size(); i++) {
        old[i] = (float)uniform(c);
        old_x[i] = host_x(old[i]);
    }
    const floatX *A = random_x(c, m * k, 1), *B = random_x(c, k * n, 1);
    void *fast = c_real ? (void *)upload(c, old) : (void *)upload(c, old_x); // C (m,n)
    void *twin = c_real ? (void *)upload(c, old) : (void *)upload(c, old_x);
    gemm(ta, tb, m, n, k, A, ta ? m : k, B, beta, fast, c_real);
    wait_or_die(c);
    plain_product<<<grid_for(m * n, 256), 256, 0, compute_stream()>>>(
        ta, tb, m, n, k, A, ta ? m : k, B, beta, twin, c_real);
    LAUNCHED();
    if (c_real)
        compare(c, "C", (float *)fast, (float *)twin, m * n, n);
    else
        compare(c, "C", (floatX *)fast, (floatX *)twin, m * n, n);
}

// ---- experts --------------------------------------------------------------------------------
// What the functions of the experts write, by one kernel.
struct ExpertResults {
    floatX *H, *A, *Y, *dH, *sA, *dX;
    float *dscore;
    gradX *dW1, *dW2;
};
static ExpertResults run_experts(Check *c, const RowIndex *index, const floatX *pool,
                                 const floatX *dpool, const floatX *W1, const floatX *W2,
                                 const float *score, int64_t C, int64_t F) {
    int64_t M = index->M;
    int64_t n1 = index->E * 2 * F * C;
    int64_t n2 = index->E * F * C;
    size_t x = sizeof(floatX);
    ExpertResults r = { (floatX *)take(c, M * 2 * F * x),
                        (floatX *)take(c, M * F * x),
                        (floatX *)take(c, M * C * x),
                        (floatX *)take(c, M * 2 * F * x),
                        (floatX *)take(c, M * F * x),
                        (floatX *)take(c, M * C * x),
                        (float *)take(c, index->P * index->K * sizeof(float)),
                        (gradX *)take(c, n1 * sizeof(gradX)),
                        (gradX *)take(c, n2 * sizeof(gradX)) };
    experts_up(r.H, r.A, pool, W1, index, C, F);
    wait_or_die(c);
    experts_down(r.Y, r.A, W2, index, C, F);
    wait_or_die(c);
    experts_down_backward(r.dH, r.sA, r.dscore, dpool, r.H, W2, score, index, C, F);
    wait_or_die(c);
    experts_up_backward(r.dX, r.dH, W1, index, C, F);
    wait_or_die(c);
    for (int accumulate = 0; accumulate < 2; accumulate++) {
        experts_wgrad(r.dW1, r.dW2, pool, dpool, r.dH, r.sA, index, accumulate, C, F);
        wait_or_die(c);
    }
    return r;
}
static void check_experts(Check *c) {
    // Three experts of 35, 35 and 70 rows and one without rows. One block computes all tiles, so
    // the ring of stages wraps within a tile and from tile to tile.
    const int64_t P = 70, K = 2, E = 4, C = 264, F = 136;
    std::vector<int> choice;
    for (int64_t p = 0; p < P; p++) {
        choice.push_back((int)(p % 2));
        choice.push_back(2);
    }
    int64_t M = row_index_bound(P, K, E);
    RowIndex index;
    index.row_token = (int *)take(c, M * sizeof(int));
    index.token_row = (int *)take(c, P * K * sizeof(int));
    index.expert_row = (int *)take(c, (E + 1) * sizeof(int));
    index.M = M;
    index.P = P;
    index.E = E;
    index.K = K;
    row_index_build(&index, upload(c, choice), 0);
    const floatX *pool = random_x(c, P * C, 1);
    const floatX *dpool = random_x(c, P * C, 1);
    const floatX *W1 = random_x(c, E * 2 * F * C, 0.2), *W2 = random_x(c, E * C * F, 0.2);
    const float *score = random_real(c, P * K);
    experts_select("wgmma");
    experts_leave(1 << 20);
    ExpertResults fast = run_experts(c, &index, pool, dpool, W1, W2, score, C, F);
    experts_leave(0);
    experts_select("mma");
    ExpertResults twin = run_experts(c, &index, pool, dpool, W1, W2, score, C, F);
    int rows;
    device_download(&rows, index.expert_row + E, sizeof rows);
    compare(c, "H", fast.H, twin.H, rows * 2 * F, 2 * F);
    compare(c, "A", fast.A, twin.A, rows * F, F);
    compare(c, "Y", fast.Y, twin.Y, rows * C, C);
    compare(c, "dscore", fast.dscore, twin.dscore, P * K, K);
    compare(c, "dH", fast.dH, twin.dH, rows * 2 * F, 2 * F);
    compare(c, "score A", fast.sA, twin.sA, rows * F, F);
    compare(c, "dX", fast.dX, twin.dX, rows * C, C);
    compare(c, "dW1", (float *)fast.dW1, (float *)twin.dW1, E * 2 * F * C, C);
    compare(c, "dW2", (float *)fast.dW2, (float *)twin.dW2, E * C * F, F);
}

// ---- attention ------------------------------------------------------------------------------
struct AttentionResults {
    floatX *o, *dq, *dk, *dv;
    float *lse;
};
static const int64_t ATTENTION_B = 2;
static const int64_t ATTENTION_T = 200;
static const int64_t ATTENTION_H = 4;
static const int64_t ATTENTION_KV = 2;
static const int64_t ATTENTION_D = 128;
static AttentionResults run_attention(Check *c, const floatX *q, const floatX *k, const floatX *v,
                                      const floatX *d_o) {
    const int64_t B = ATTENTION_B, T = ATTENTION_T, H = ATTENTION_H, KV = ATTENTION_KV,
                  D = ATTENTION_D;
    size_t x = sizeof(floatX);
    size_t nq = B * T * H * D;
    size_t nk = B * T * KV * D;
    AttentionResults r = { (floatX *)take(c, nq * x), (floatX *)take(c, nq * x),
                           (floatX *)take(c, nk * x), (floatX *)take(c, nk * x),
                           (float *)take(c, B * H * T * sizeof(float)) };
    void *workspace = take(c, attention_workspace(B, T, H, KV, D));
    attention_forward(r.o, r.lse, q, k, v, 0, workspace, B, T, H, KV, D);
    wait_or_die(c);
    attention_backward(r.dq, r.dk, r.dv, d_o, r.o, r.lse, q, k, v, 0, workspace, B, T, H, KV, D);
    wait_or_die(c);
    return r;
}
static void check_attention(Check *c) {
    const int64_t rows = ATTENTION_B * ATTENTION_T;
    const int64_t nq = rows * ATTENTION_H * ATTENTION_D;
    const int64_t nk = rows * ATTENTION_KV * ATTENTION_D;
    const floatX *q = random_x(c, nq, 2);
    const floatX *k = random_x(c, nk, 2);
    const floatX *v = random_x(c, nk, 1);
    const floatX *d_o = random_x(c, nq, 1);
    c->tolerance = 4 * TOLERANCE;
    attention_select("cudnn");
    AttentionResults fast = run_attention(c, q, k, v, d_o);
    attention_select("flash");
    AttentionResults twin = run_attention(c, q, k, v, d_o);
    compare(c, "o", fast.o, twin.o, nq, ATTENTION_D);
    compare(c, "log-sum-exp", fast.lse, twin.lse, rows * ATTENTION_H, ATTENTION_T);
    compare(c, "dq", fast.dq, twin.dq, nq, ATTENTION_D);
    compare(c, "dk", fast.dk, twin.dk, nk, ATTENTION_D);
    compare(c, "dv", fast.dv, twin.dv, nk, ATTENTION_D);
}

int kernel_check(int print) {
    static const struct {
        int ta, tb, beta, c_real;
        const char *shape;
    } products[] = { { 0, 1, 0, 0, "x W^T, 136 x 72 x 200" },
                     { 0, 0, 1, 0, "dy W, added, 136 x 72 x 200" },
                     { 1, 0, 0, 1, "dy^T x in fp32, 136 x 72 x 200" },
                     { 1, 0, 1, 1, "dy^T x in fp32, added, 136 x 72 x 200" } };
#ifdef CUEMU // the emulator computes the same everywhere: only --selftest and tests look
    if (!print) return 0;
#endif
    Check c;
    memset(&c, 0, sizeof c);
    c.print = print;
    c.random = 1;
    int wrong_products = 0;
    for (const auto &p : products)
        wrong_products += !checked(&c, "products by cuBLASLt", p.shape, "no other kernel does it",
                                   [&] { check_product(&c, p.ta, p.tb, p.beta, p.c_real); });
    if (!strcmp(experts_kernel(), "wgmma")) {
        bool right = checked(&c, "experts by wgmma", "4 experts, 264 x 136, 140 rows",
                             "the kernel \"mma\" computes them (MOE_EXPERT_KERNEL=wgmma and "
                             "--kernel-check off force wgmma)",
                             [&] { check_experts(&c); });
        experts_select(right ? "wgmma" : "mma");
    }
    if (!strcmp(attention_kernel(), "cudnn")) {
        bool right = checked(&c, "attention by cuDNN", "2 x 200 tokens, 4 heads on 2 of 128",
                             "the kernel \"flash\" computes it (--attention-kernel cudnn and "
                             "--kernel-check off force cuDNN)",
                             [&] { check_attention(&c); });
        attention_select(right ? "cudnn" : "flash");
    }
    if (wrong_products)
        die("the kernel check: %s computes wrong products|another version of the toolkit's "
            "libraries or of the driver; --kernel-check off to go on all the same",
            gemm_library());
    return c.failed;
}
