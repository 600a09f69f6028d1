// The same bits for any number of threads; a part of test_kernels.c, whose helpers it uses.

// ---- the same bits whatever the number of threads (I8, deterministic) ----------------
static uint64_t hash_bytes(uint64_t h, const void *p, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) h = (h ^ ((const unsigned char *)p)[i]) * 0x100000001b3u;
    return h;
}
#define HASH(p, n) h = hash_bytes(h, (p), (size_t)(n) * sizeof *(p))
static void run_everything(uint64_t out[6]) {
    enum {
        B = 3,
        T = 150,
        R = B * T,
        C = 200,
        O = 330,
        V = 77,
        H = 4,
        KV = 2,
        D = 16,
        NQ = R * H * D,
        NK = R * KV * D
    };
    test_state = 42;
    floatX *x = test_x(test_random(R * C, 1, 0), R * C);
    floatX *dy = test_x(test_random(R * O, 1, 0), R * O);
    floatX *W = test_x(test_random(O * C, 1, 0), O * C);
    floatX *y = TEST_TAKE(floatX, R * O);
    floatX *dx = TEST_TAKE(floatX, R * C);
    floatX *w = test_x(test_random(C, 1, 0), C);
    floatX *z = TEST_TAKE(floatX, R * C);
    gradX *dW = TEST_TAKE(gradX, O * C);
    gradX *dw = TEST_TAKE(gradX, C);
    gradX *dE = TEST_TAKE(gradX, V * C);
    uint64_t h = 0;
    linear_forward(y, x, W, R, O, C);
    linear_backward_input(dx, dy, W, R, O, C);
    linear_backward_input_add(dx, dy, W, R, O, C);
    linear_backward_weight(dW, dy, x, 0, R, O, C);
    HASH(y, R * O);
    HASH(dx, R * C);
    HASH(dW, O * C);
    out[0] = h;
    h = 0;
    real *rstd = TEST_TAKE(real, R);
    rmsnorm_forward(z, rstd, x, w, (real)EPS, R, C);
    rmsnorm_backward(dx, dw, dx, z, x, w, rstd, 0, R, C);
    add(z, z, x, R * C);
    HASH(z, R * C);
    HASH(dx, R * C);
    HASH(dw, C);
    HASH(rstd, R);
    out[1] = h;
    h = 0;
    int *ids = TEST_TAKE(int, R);
    for (int r = 0; r < R; r++) ids[r] = test_below(V);
    embed_backward(dE, x, ids, 0, -1, R, V, C);
    embed_forward(z, ids, x, R, C);
    HASH(dE, V * C);
    HASH(z, R * C);
    out[2] = h;
    h = 0;
    double loss = 0;
    cross_entropy(y, &loss, ids, (real)0.01, 1, R, O);
    HASH(y, R * O);
    HASH(&loss, 1);
    out[3] = h;
    h = 0;
    floatX *q = test_x(test_random(NQ, 1, 0), NQ);
    floatX *k = test_x(test_random(NK, 1, 0), NK);
    floatX *v = test_x(test_random(NK, 1, 0), NK);
    floatX *g = test_x(test_random(NQ, 1, 0), NQ);
    floatX *o = TEST_TAKE(floatX, NQ);
    floatX *dq = TEST_TAKE(floatX, NQ);
    floatX *dk = TEST_TAKE(floatX, NK);
    floatX *dv = TEST_TAKE(floatX, NK);
    real *lse = TEST_TAKE(real, R * H);
    real *c = TEST_TAKE(real, T * D / 2);
    real *s = TEST_TAKE(real, T * D / 2);
    void *workspace = test_take(attention_workspace(B, T, H, KV, D));
    attention_forward(o, lse, q, k, v, 0, workspace, B, T, H, KV, D);
    attention_backward(dq, dk, dv, g, o, lse, q, k, v, 0, workspace, B, T, H, KV, D);
    HASH(o, NQ);
    HASH(lse, R * H);
    HASH(dq, NQ);
    HASH(dk, NK);
    HASH(dv, NK);
    out[4] = h;
    h = 0;
    rope_table(c, s, 1e4, T, D);
    qk_norm_rope_forward(o, dk, q, k, w, w + D, c, s, 0, (real)EPS, R, T, H, KV, D);
    HASH(o, NQ);
    HASH(dk, NK);
    qk_norm_rope_backward(dq, dk, dw, dw + D, dq, dk, q, k, w, w + D, c, s, 0, (real)EPS, 0, R, T,
                          H, KV, D);
    HASH(dq, NQ);
    HASH(dk, NK);
    HASH(dw, 2 * D);
    HASH(c, T * D / 2);
    HASH(s, T * D / 2);
    out[5] = h;
    test_release("threads");
}
static void test_determinism(void) {
    static const char *name[] = { "linear",        "rmsnorm",   "embedding",
                                  "cross entropy", "attention", "heads" };
    uint64_t one[6], more[6];
    int before = thread_count();
    test_threads(1);
    run_everything(one);
    for (int threads = 2; threads <= 3; threads++) {
        test_threads(threads);
        run_everything(more);
        for (int i = 0; i < 6; i++)
            compare(one[i] == more[i], "%s: other bits with %d threads", name[i], threads);
    }
    test_threads(before);
    test_group("the same bits with 1, 2 and 3 threads");
}
