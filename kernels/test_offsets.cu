// Offsets beyond 2^31 elements in every CUDA kernel (I9, 64-bit offsets). A test runs a kernel
// twice on the same numbers: on small buffers, where test_cuda compares it with the CPU, and where
// the index of what it reads or writes exceeds 2^31. The bits must agree; an index that passed
// through an int lands elsewhere, usually outside the buffer.
//
// Sparse tests touch few elements of a large buffer: a row of an embedding, the last of 16,400
// experts, a segment at the end of a shard. dev/cuemu maps large allocations and commits only pages
// that are touched, so these run everywhere (not under AddressSanitizer, which commits all of
// them). Whole tests need kernels that visit all of the buffer. All of them together need a GPU
// with 60 GB; in the emulator they run small, which checks the test but not the kernel.
//   make test-cuemu-kernels, make test-cuda-gpu
#include "cuda/common.cuh"
#include "cuda/experts.cuh"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <vector>

#ifdef CUEMU
static const int64_t BEYOND = 1 << 12;
#else
static const int64_t BEYOND = ((int64_t)1 << 31) + (1 << 20);
#endif
static const int64_t FAR = ((int64_t)1 << 31) + (1 << 20);

// ---- buffers and checks ---------------------------------------------------------------------
static std::vector<void *> taken;
template <class T> static T *take(int64_t n) {
    T *p;
    CUDA_CHECK(cudaMalloc((void **)&p, (size_t)n * sizeof(T)));
    taken.push_back(p);
    return p;
}
template <class T> static T *take_zeros(int64_t n) {
    T *p = take<T>(n);
    device_zero(p, (size_t)n * sizeof(T));
    return p;
}
template <class T> static void put(T *at, const std::vector<T> &v) {
    device_upload(at, v.data(), v.size() * sizeof(T));
}
template <class T> static T *taken_from(const std::vector<T> &v) {
    T *p = take<T>((int64_t)v.size());
    put(p, v);
    return p;
}
static uint64_t state = 1;
static float uniform() { // [-1, 1) with 8 bits: exact in bf16
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (float)((int)(state >> 57) - 64) / 64;
}
static floatX host_x(float v) {
    floatX x;
#if defined(MOE_BF16)
    __nv_bfloat16 b = __float2bfloat16(v);
    memcpy(&x, &b, 2);
#else
    x.v = v;
#endif
    return x;
}
static std::vector<floatX> some_x(int64_t n) {
    std::vector<floatX> v((size_t)n);
    for (auto &x : v) x = host_x(uniform());
    return v;
}
static std::vector<real> some_real(int64_t n) {
    std::vector<real> v((size_t)n);
    for (auto &x : v) x = uniform();
    return v;
}
static int passed, failed;
static bool good;
static const char *name;
static void begin(const char *what) {
    name = what;
    good = true;
}
template <class T> static void same(const char *what, const T *far, const T *near, int64_t n) {
    std::vector<T> a((size_t)n), b((size_t)n);
    device_download(a.data(), far, a.size() * sizeof(T));
    device_download(b.data(), near, b.size() * sizeof(T));
    if (memcmp(a.data(), b.data(), a.size() * sizeof(T))) {
        printf("     %s: %s differs from the same call on small buffers\n", name, what);
        good = false;
    }
}
static void end() {
    for (void *p : taken) CUDA_CHECK(cudaFree(p));
    taken.clear();
    printf("%4d %s offsets beyond 2^31: %s\n", passed + failed + 1, good ? "ok    " : "FAILED",
           name);
    fflush(stdout);
    good ? passed++ : failed++;
}

// ---- sparse ---------------------------------------------------------------------------------
static void test_embedding() {
    const int V = 151936, C = 16384; // 2.49e9 weights
    begin("embedding");
    std::vector<floatX> rows = some_x(2 * C);
    std::vector<gradX> sums((size_t)(2 * C));
    for (auto &g : sums) g.v = uniform();
    floatX *W = take<floatX>((int64_t)V * C);
    floatX *near = taken_from(rows);
    floatX *out = take<floatX>(2 * C);
    floatX *out_near = take<floatX>(2 * C);
    floatX *dx = taken_from(some_x(2 * C));
    gradX *dW = take<gradX>((int64_t)V * C);
    gradX *dW_near = taken_from(sums);
    int *ids = taken_from(std::vector<int>{ V - 1, 0 });
    int *ids_near = taken_from(std::vector<int>{ 1, 0 });
    for (int i = 0; i < 2; i++) {
        int64_t row = i ? (int64_t)(V - 1) * C : 0;
        put(W + row, std::vector<floatX>(rows.begin() + i * C, rows.begin() + (i + 1) * C));
        put(dW + row, std::vector<gradX>(sums.begin() + i * C, sums.begin() + (i + 1) * C));
    }
    embed_forward(out, ids, W, 2, C);
    embed_forward(out_near, ids_near, near, 2, C);
    embed_backward(dW, dx, ids, 1, -1, 2, V, C);
    embed_backward(dW_near, dx, ids_near, 1, -1, 2, 2, C);
    same("out", out, out_near, 2 * C);
    same("dW, first row", dW, dW_near, C);
    same("dW, last row", dW + (int64_t)(V - 1) * C, dW_near + C, C);
    end();
}
static void test_cross_entropy() {
    const int V = 1 << 20, N = (int)(FAR / V) + 1;
    begin("cross entropy");
    std::vector<int> targets((size_t)N, -1);
    targets.back() = 77;
    std::vector<floatX> row = some_x(V);
    floatX *logits = take<floatX>((int64_t)N * V);
    put(logits + (int64_t)(N - 1) * V, row);
    double *loss = take_zeros<double>(1);
    double *loss_near = take_zeros<double>(1);
    cross_entropy(logits, loss, taken_from(targets), 1, 0, N, V);
    cross_entropy(taken_from(row), loss_near, taken_from(std::vector<int>{ 77 }), 1, 0, 1, V);
    same("loss", loss, loss_near, 1);
    end();
}
static void test_rows() {
    const int C = 2048;
    const int LAST = (int)(FAR / C);
    const int K = 8;
    const int LAST_REAL = (int)(FAR / K);
    begin("rows by index");
    std::vector<floatX> two = some_x(2 * C);
    std::vector<real> scores = some_real(2 * K);
    floatX *in = take<floatX>((int64_t)(LAST + 1) * C);
    floatX *near = taken_from(two);
    floatX *out = take<floatX>(4 * C);
    floatX *out_near = take<floatX>(4 * C);
    real *in_real = take<real>((int64_t)(LAST_REAL + 1) * K);
    real *near_real = taken_from(scores);
    real *sum = take<real>(2 * K);
    real *sum_near = take<real>(2 * K);
    real *weight = taken_from(some_real(4));
    put(in, std::vector<floatX>(two.begin(), two.begin() + C));
    put(in + (int64_t)LAST * C, std::vector<floatX>(two.begin() + C, two.end()));
    put(in_real, std::vector<real>(scores.begin(), scores.begin() + K));
    put(in_real + (int64_t)LAST_REAL * K, std::vector<real>(scores.begin() + K, scores.end()));
    int *index = taken_from(std::vector<int>{ LAST, 0, -1, LAST });
    int *index_near = taken_from(std::vector<int>{ 1, 0, -1, 1 });
    int *index_real = taken_from(std::vector<int>{ LAST_REAL, 0, -1, LAST_REAL });
    rows_gather(out, in, index, 4, C * sizeof(floatX));
    rows_gather(out_near, near, index_near, 4, C * sizeof(floatX));
    same("gather", out, out_near, 4 * C);
    rows_sum(out, in, index, 2, 2, C);
    rows_sum(out_near, near, index_near, 2, 2, C);
    same("sum", out, out_near, 2 * C);
    rows_sum_real(sum, in_real, index_real, 2, 2, K);
    rows_sum_real(sum_near, near_real, index_near, 2, 2, K);
    same("sum of scores", sum, sum_near, 2 * K);
    RowIndex plan = { nullptr, index, nullptr, LAST + 1, 2, 1, 2 };
    RowIndex plan_near = { nullptr, index_near, nullptr, 2, 2, 1, 2 };
    rows_weighted_sum(out, in, weight, &plan, C);
    rows_weighted_sum(out_near, near, weight, &plan_near, C);
    same("combine", out, out_near, 2 * C);
    end();
}
// The last of E experts has two rows, of pool tokens LAST and 0; no other has any.
static void test_experts(const char *kernel) {
    if (!experts_select(kernel)) return; // not on this card
    const int C = 2048, F = 64, E = (int)(FAR / (C * F)) + 2;
    const int LAST = (int)(FAR / C);
    const int TILE = device_row_tile();
    const int64_t W = (int64_t)2 * F * C;
    begin(strcmp(kernel, "mma") ? "experts by wgmma" : "experts by mma.sync");
    RowIndex plan[2];
    floatX *pool[2], *dpool[2], *W1[2], *W2[2], *H[2], *A[2], *Y[2], *dH[2], *sA[2], *dX[2];
    gradX *dW1[2], *dW2[2];
    real *dscore[2];
    std::vector<floatX> tokens = some_x(2 * C), dtokens = some_x(2 * C), w1 = some_x(W),
                        w2 = some_x(W / 2);
    std::vector<gradX> g1((size_t)W), g2((size_t)(W / 2));
    for (auto &g : g1) g.v = uniform();
    for (auto &g : g2) g.v = uniform();
    for (int far = 0; far < 2; far++) {
        int experts = far ? E : 1;
        int last = far ? LAST : 1;
        std::vector<int> row_token((size_t)TILE, -1), token_row((size_t)last + 1, -1),
            expert_row((size_t)experts + 1, 0);
        row_token[0] = last;
        row_token[1] = 0;
        token_row[last] = 0;
        token_row[0] = 1;
        expert_row[experts] = TILE;
        RowIndex p = { taken_from(row_token),
                       taken_from(token_row),
                       taken_from(expert_row),
                       TILE,
                       last + 1,
                       experts,
                       1 };
        plan[far] = p;
        pool[far] = take<floatX>((int64_t)(last + 1) * C);
        dpool[far] = take<floatX>((int64_t)(last + 1) * C);
        put(pool[far], std::vector<floatX>(tokens.begin(), tokens.begin() + C));
        put(pool[far] + (int64_t)last * C, std::vector<floatX>(tokens.begin() + C, tokens.end()));
        put(dpool[far], std::vector<floatX>(dtokens.begin(), dtokens.begin() + C));
        put(dpool[far] + (int64_t)last * C,
            std::vector<floatX>(dtokens.begin() + C, dtokens.end()));
        W1[far] = take<floatX>(experts * W);
        W2[far] = take<floatX>(experts * W / 2);
        dW1[far] = take<gradX>(experts * W);
        dW2[far] = take<gradX>(experts * W / 2);
        put(W1[far] + (experts - 1) * W, w1);
        put(W2[far] + (experts - 1) * W / 2, w2);
        put(dW1[far] + (experts - 1) * W, g1);
        put(dW2[far] + (experts - 1) * W / 2, g2);
        H[far] = take<floatX>(TILE * 2 * F);
        A[far] = take<floatX>(TILE * F);
        Y[far] = take<floatX>((int64_t)TILE * C);
        dH[far] = take<floatX>(TILE * 2 * F);
        sA[far] = take<floatX>(TILE * F);
        dX[far] = take<floatX>((int64_t)TILE * C);
        dscore[far] = take<real>(last + 1);
        experts_up(H[far], A[far], pool[far], W1[far], &plan[far], C, F);
        experts_down(Y[far], A[far], W2[far], &plan[far], C, F);
        experts_down_backward(dH[far], sA[far], dscore[far], dpool[far], H[far], W2[far], 0,
                              &plan[far], C, F);
        experts_up_backward(dX[far], dH[far], W1[far], &plan[far], C, F);
        experts_wgrad(dW1[far], dW2[far], pool[far], dpool[far], dH[far], sA[far], &plan[far], 1, C,
                      F);
    }
    same("H", H[1], H[0], 2 * 2 * F);
    same("A", A[1], A[0], 2 * F);
    same("Y", Y[1], Y[0], 2 * C);
    same("dH", dH[1], dH[0], 2 * 2 * F);
    same("sA", sA[1], sA[0], 2 * F);
    same("dX", dX[1], dX[0], 2 * C);
    same("dscore", dscore[1] + LAST, dscore[0] + 1, 1);
    same("dW1", dW1[1] + (E - 1) * W, dW1[0], W);
    same("dW2", dW2[1] + (E - 1) * W / 2, dW2[0], W / 2);
    end();
}
// A segment of 700 elements that begins at 2^31 + 768 of a shard and of its tensor.
static void test_optimizer(OptimizerKind kind, int master) {
    const int64_t AT = ((int64_t)1 << 31) + 768;
    const int64_t N = 700;
    const int64_t BLOCKS = 3;
    static const char *const names[] = {
        "SGD", "SGD, master", "AdamW", "AdamW, master", "AdamW, 8 bits", "AdamW, 8 bits, master"
    };
    begin(names[2 * kind + master]);
    std::vector<floatX> p = some_x(N);
    std::vector<gradX> g((size_t)N);
    std::vector<real> w = some_real(N), m = some_real(N), v = some_real(N);
    std::vector<uint8_t> codes((size_t)N);
    std::vector<float> scales = { 0.5f, 0.25f, 0.125f };
    for (int i = 0; i < N; i++) {
        g[i].v = uniform();
        v[i] = fabsf(v[i]);
        codes[i] = (uint8_t)(i * 37);
    }
    OptimizerState s[2];
    OptimizerStep step = { kind, 1e-2, 0.9, 0.9, 0.99, 1e-8, 0.1, 3, 42, 7, 1 };
    gradX *grad[2];
    real *scale = taken_from(std::vector<real>{ 1 });
    double *squares[2];
    for (int far = 0; far < 2; far++) {
        int64_t at = far ? AT : 0;
        int64_t block = at / 256;
        Segment segment = { 0x123456789abcdef, AT, N, at, block, 1 };
        memset(&s[far], 0, sizeof s[far]);
        s[far].param = take<floatX>(at + N);
        put(s[far].param + at, p);
        if (master) {
            s[far].master = take<real>(at + N);
            put(s[far].master + at, w);
        }
        grad[far] = take<gradX>(at + N);
        put(grad[far] + at, g);
        s[far].grad = grad[far];
        if (kind == OPT_ADAMW8) {
            s[far].m8 = take<uint8_t>(at + N);
            s[far].v8 = take<uint8_t>(at + N);
            s[far].m_scale = take<float>(block + BLOCKS);
            s[far].v_scale = take<float>(block + BLOCKS);
            put(s[far].m8 + at, codes);
            put(s[far].v8 + at, codes);
            put(s[far].m_scale + block, scales);
            put(s[far].v_scale + block, scales);
        } else {
            s[far].m = take<real>(at + N);
            s[far].v = take<real>(at + N);
            put(s[far].m + at, m);
            put(s[far].v + at, v);
        }
        squares[far] = take<double>(1);
        gradient_squares(squares[far], grad[far], &segment, 1);
        optimizer_update(&s[far], &segment, 1, &step, scale);
        gradient_scale(grad[far], &segment, 1, taken_from(std::vector<float>{ 0.75f }));
    }
    same("param", s[1].param + AT, s[0].param, N);
    same("gradient", grad[1] + AT, grad[0], N);
    same("squares", squares[1], squares[0], 1);
    if (master) same("master", s[1].master + AT, s[0].master, N);
    if (kind == OPT_ADAMW8) {
        same("m", s[1].m8 + AT, s[0].m8, N);
        same("v", s[1].v8 + AT, s[0].v8, N);
        same("m scale", s[1].m_scale + AT / 256, s[0].m_scale, BLOCKS);
        same("v scale", s[1].v_scale + AT / 256, s[0].v_scale, BLOCKS);
    } else
        same("m", s[1].m + AT, s[0].m, N);
    for (int far = 0; far < 2; far++) {
        Segment segment = { 0x123456789abcdef, AT, N, far ? AT : 0, 0, 1 };
        init_segments(s[far].param, s[far].master, &segment, 1, 42, 0.02);
    }
    same("initial weights", s[1].param + AT, s[0].param, N);
    end();
}

// ---- whole ----------------------------------------------------------------------------------
static void test_norms() {
    const int C = 1024, R = (int)(BEYOND / C) + 3;
    const int64_t AT = (int64_t)(R - 1) * C;
    begin("norm, sum of rows");
    std::vector<floatX> row = some_x(C), drow = some_x(C);
    floatX *x = take_zeros<floatX>((int64_t)R * C);
    floatX *dy = take_zeros<floatX>((int64_t)R * C);
    floatX *y = take<floatX>((int64_t)R * C);
    floatX *w = taken_from(some_x(C));
    floatX *dx = take<floatX>((int64_t)R * C);
    floatX *xn = taken_from(row);
    floatX *dyn = taken_from(drow);
    floatX *yn = take<floatX>(C);
    floatX *dxn = take<floatX>(C);
    real *rstd = take<real>(R);
    real *rstd_n = take<real>(1);
    gradX *dw = take<gradX>(C);
    gradX *dw_n = take<gradX>(C);
    put(x + AT, row);
    put(dy + AT, drow);
    rmsnorm_forward(y, rstd, x, w, 1e-6f, R, C);
    rmsnorm_forward(yn, rstd_n, xn, w, 1e-6f, 1, C);
    rmsnorm_backward(dx, dw, dy, dy, x, w, rstd, 0, R, C);
    rmsnorm_backward(dxn, dw_n, dyn, dyn, xn, w, rstd_n, 0, 1, C);
    // rows of zeros add zeros
    same("y", y + AT, yn, C);
    same("rstd", rstd + R - 1, rstd_n, 1);
    same("dx", dx + AT, dxn, C);
    same("dw", dw, dw_n, C);
    add(dx, x, dy, (size_t)R * C);
    add(dxn, xn, dyn, C);
    same("sum", dx + AT, dxn, C);
    end();
}
static void test_attention() {
    const int T = 32, H = 16, KV = 2, D = 128, B = (int)(BEYOND / (T * H * D)) + 1;
    const int64_t NQ = (int64_t)T * H * D;
    const int64_t NK = (int64_t)T * KV * D;
    const int64_t NL = (int64_t)T * H;
    const int64_t LAST = B - 1;
    begin("attention, q/k norm and RoPE");
    floatX *q = take_zeros<floatX>(B * NQ);
    floatX *d_o = take_zeros<floatX>(B * NQ);
    floatX *o = take<floatX>(B * NQ);
    floatX *dq = take<floatX>(B * NQ);
    floatX *qn = take<floatX>(NQ);
    floatX *d_on = take<floatX>(NQ);
    floatX *on = take<floatX>(NQ);
    floatX *dqn = take<floatX>(NQ);
    floatX *k = take_zeros<floatX>(B * NK);
    floatX *v = take_zeros<floatX>(B * NK);
    floatX *dk = take<floatX>(B * NK);
    floatX *dv = take<floatX>(B * NK);
    floatX *kn = take<floatX>(NK);
    floatX *vn = take<floatX>(NK);
    floatX *dkn = take<floatX>(NK);
    floatX *dvn = take<floatX>(NK);
    floatX *wq = taken_from(some_x(D));
    floatX *wk = taken_from(some_x(D));
    real *lse = take<real>(B * NL);
    real *lse_n = take<real>(NL);
    real *cosines = take<real>(T * D / 2);
    real *sines = take<real>(T * D / 2);
    gradX *dw = take<gradX>(D);
    void *workspace = take<char>((int64_t)attention_workspace(B, T, H, KV, D));
    std::vector<floatX> vq = some_x(NQ), vd = some_x(NQ), vk = some_x(NK), vv = some_x(NK);
    put(q + LAST * NQ, vq);
    put(qn, vq);
    put(d_o + LAST * NQ, vd);
    put(d_on, vd);
    put(k + LAST * NK, vk);
    put(kn, vk);
    put(v + LAST * NK, vv);
    put(vn, vv);
    attention_forward(o, lse, q, k, v, 0, workspace, B, T, H, KV, D);
    attention_forward(on, lse_n, qn, kn, vn, 0, workspace, 1, T, H, KV, D);
    attention_backward(dq, dk, dv, d_o, o, lse, q, k, v, 0, workspace, B, T, H, KV, D);
    attention_backward(dqn, dkn, dvn, d_on, on, lse_n, qn, kn, vn, 0, workspace, 1, T, H, KV, D);
    same("o", o + LAST * NQ, on, NQ);
    same("lse", lse + LAST * NL, lse_n, NL);
    same("dq", dq + LAST * NQ, dqn, NQ);
    same("dk", dk + LAST * NK, dkn, NK);
    same("dv", dv + LAST * NK, dvn, NK);
    rope_table(cosines, sines, 1e6, T, D);
    qk_norm_rope_forward(o, dk, q, k, wq, wk, cosines, sines, 0, 1e-6f, B * T, T, H, KV, D);
    qk_norm_rope_forward(on, dkn, qn, kn, wq, wk, cosines, sines, 0, 1e-6f, T, T, H, KV, D);
    same("q normed", o + LAST * NQ, on, NQ);
    same("k normed", dk + LAST * NK, dkn, NK);
    qk_norm_rope_backward(dq, dk, dw, dw, d_o, v, q, k, wq, wk, cosines, sines, 0, 1e-6f, 0, B * T,
                          T, H, KV, D);
    qk_norm_rope_backward(dqn, dkn, dw, dw, d_on, vn, qn, kn, wq, wk, cosines, sines, 0, 1e-6f, 0,
                          T, T, H, KV, D);
    same("dq through the norm", dq + LAST * NQ, dqn, NQ);
    same("dk through the norm", dk + LAST * NK, dkn, NK);
    end();
}
static void test_router() {
    const int E = 1024, K = 4, C = 8, R = (int)(BEYOND / E) + 3;
    begin("router");
    std::vector<floatX> row = some_x(C), drow = some_x(C);
    std::vector<real> ds = some_real(K);
    floatX *u = take_zeros<floatX>((int64_t)R * C);
    floatX *un = taken_from(row);
    floatX *du = take_zeros<floatX>((int64_t)R * C);
    floatX *dun = taken_from(drow);
    floatX *W = taken_from(some_x(E * C));
    real *logits = take<real>((int64_t)R * E);
    real *logits_n = take<real>(E);
    real *dz = take<real>((int64_t)R * E);
    real *dzn = take<real>(E);
    real *score = take<real>((int64_t)R * K);
    real *score_n = take<real>(K);
    real *dscore = take_zeros<real>((int64_t)R * K);
    real *dscore_n = taken_from(ds);
    int *topk = take<int>((int64_t)R * K);
    int *topk_n = take<int>(K);
    gradX *dW = take<gradX>(E * C);
    double *f = take_zeros<double>(E);
    RouterStats none = {};
    put(u + (int64_t)(R - 1) * C, row);
    put(du + (int64_t)(R - 1) * C, drow);
    put(dscore + (int64_t)(R - 1) * K, ds);
    router_forward(logits, topk, score, none, u, W, 0, 0, 1, R, C, E, K);
    router_forward(logits_n, topk_n, score_n, none, un, W, 0, 0, 1, 1, C, E, K);
    router_backward_add(du, dW, dz, dscore, logits, topk, score, u, W, f, 0, 0.5, 1, 0, R, C, E, K);
    router_backward_add(dun, dW, dzn, dscore_n, logits_n, topk_n, score_n, un, W, f, 0, 0.5, 1, 0,
                        1, C, E, K);
    same("topk", topk + (int64_t)(R - 1) * K, topk_n, K);
    same("score", score + (int64_t)(R - 1) * K, score_n, K);
    same("dz", dz + (int64_t)(R - 1) * E, dzn, E);
    end();
}
static void test_gradient_of_logits() {
    const int V = 1000, N = (int)(BEYOND / V) + 2;
    begin("gradient of logits, conversion");
    std::vector<floatX> row = some_x(V);
    std::vector<int> targets((size_t)N, -1);
    targets.back() = 5;
    floatX *logits = take_zeros<floatX>((int64_t)N * V);
    floatX *near = taken_from(row);
    double *loss = take_zeros<double>(1);
    put(logits + (int64_t)(N - 1) * V, row);
    cross_entropy(logits, loss, taken_from(targets), 1, 1, N, V);
    cross_entropy(near, loss, taken_from(std::vector<int>{ 5 }), 1, 1, 1, V);
    same("dlogits", logits + (int64_t)(N - 1) * V, near, V);
    float *wide = take<float>((int64_t)N * V);
    float *wide_near = take<float>(V);
    convert(wide, DTYPE_F32, logits, DTYPE_FLOATX, (size_t)N * V);
    convert(wide_near, DTYPE_F32, near, DTYPE_FLOATX, V);
    same("conversion", wide + (int64_t)(N - 1) * V, wide_near, V);
    end();
}

int main(void) {
    device_init(0, 0);
    test_embedding();
    test_cross_entropy();
    test_rows();
    test_experts("mma");
    test_experts("wgmma");
    for (int kind = 0; kind < 3; kind++)
        for (int master = 0; master < 2; master++) test_optimizer((OptimizerKind)kind, master);
    test_norms();
    test_attention();
    test_router();
    test_gradient_of_logits();
    device_finish();
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
