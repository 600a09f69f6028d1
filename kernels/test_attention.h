// Attention and documents against plain loops; a part of test_kernels.c, whose helpers it uses.

// ---- attention ------------------------------------------------------------------------------
typedef struct {
    floatX *q, *k, *v, *o;
    real *lse;
    void *workspace;
    const int *position;
    const double *d_o;
    int B, T, H, KV, D;
} Attention;
static double attention_loss(void *context) {
    Attention *c = context;
    attention_forward(c->o, c->lse, c->q, c->k, c->v, c->position, c->workspace, c->B, c->T, c->H,
                      c->KV, c->D);
    double s = 0;
    for (int64_t i = 0; i < (int64_t)c->B * c->T * c->H * c->D; i++)
        s += (double)load(c->o + i) * c->d_o[i];
    return s;
}
static void naive_attention(double *o, double *lse, double *dq, double *dk, double *dv,
                            const double *d_o, const double *q, const double *k, const double *v,
                            const int *position, int B, int T, int H, int KV, int D) {
    double scale = 1 / sqrt(D);
    double *p = TEST_TAKE(double, T);
    double *ds = TEST_TAKE(double, T);
    memset(dk, 0, (size_t)(B * T * KV * D) * sizeof *dk);
    memset(dv, 0, (size_t)(B * T * KV * D) * sizeof *dv);
    for (int b = 0; b < B; b++)
        for (int h = 0; h < H; h++)
            for (int t = 0; t < T; t++) {
                int64_t row = ((int64_t)(b * T + t) * H + h) * D;
                int64_t key0 = ((int64_t)b * T * KV + h / (H / KV)) * D;
                int64_t step = (int64_t)KV * D;
                int first = position ? t - position[b * T + t] : 0;
                double most = -INFINITY;
                double sum = 0;
                double delta = 0;
                for (int j = first; j <= t; j++) {
                    p[j] = Q(Q(test_dot(q + row, k + key0 + j * step, (size_t)D)) * scale);
                    most = fmax(most, p[j]);
                }
                for (int j = first; j <= t; j++) sum += exp(p[j] - most);
                lse[(b * H + h) * T + t] = most + log(sum);
                for (int j = first; j <= t; j++) {
                    p[j] = Q(exp(p[j] - most) / sum);
                    ds[j] = Q(test_dot(d_o + row, v + key0 + j * step, (size_t)D));
                    delta += p[j] * ds[j];
                }
                for (int j = first; j <= t; j++) ds[j] = Q(p[j] * (ds[j] - delta));
                for (int i = 0; i < D; i++) {
                    double out = 0;
                    double dqi = 0;
                    for (int j = first; j <= t; j++) {
                        out += p[j] * v[key0 + j * step + i];
                        dqi += ds[j] * k[key0 + j * step + i];
                        dv[key0 + j * step + i] += p[j] * d_o[row + i];
                        dk[key0 + j * step + i] += scale * ds[j] * q[row + i];
                    }
                    o[row + i] = Q(out);
                    dq[row + i] = Q(dqi * scale);
                }
            }
    for (int64_t i = 0; i < (int64_t)B * T * KV * D; i++) {
        dk[i] = Q(dk[i]);
        dv[i] = Q(dv[i]);
    }
}
// Documents of these lengths one after another, another one first in each sequence.
static int *document_positions(int B, int T) {
    const int lengths[] = { 1, 290, 3, 17, 1, 1, 64 };
    int *position = TEST_TAKE(int, B *T);
    for (int b = 0; b < B; b++)
        for (int t = 0, at = 0, d = b; t < T; t++, at++) {
            if (at == lengths[d % 7]) {
                at = 0;
                d++;
            }
            position[b * T + t] = at;
        }
    return position;
}
static void test_attention_shape(int B, int T, int H, int KV, int D, double spread, int documents) {
    size_t nq = (size_t)(B * T * H * D);
    size_t nk = (size_t)(B * T * KV * D);
    size_t nl = (size_t)(B * H * T);
    double *q = test_random(nq, spread, 0);
    double *k = test_random(nk, spread, 0);
    double *v = test_random(nk, 1, 0);
    double *d_o = test_random(nq, 1, 0);
    TAKE2(o, nq);
    TAKE2(dq, nq);
    TAKE2(dk, nk);
    TAKE2(dv, nk);
    TAKE2(lse, nl);
    const int *position = documents ? document_positions(B, T) : 0;
    BOTH {
        int b = test_rounding;
        naive_attention(o[b], lse[b], dq[b], dk[b], dv[b], d_o, q, k, v, position, B, T, H, KV, D);
    }
    Attention c = { test_x(q, nq),
                    test_x(k, nk),
                    test_x(v, nk),
                    TEST_TAKE(floatX, nq),
                    TEST_TAKE(real, nl),
                    test_take(attention_workspace(B, T, H, KV, D)),
                    position,
                    d_o,
                    B,
                    T,
                    H,
                    KV,
                    D };
    floatX *dqx = TEST_TAKE(floatX, nq);
    floatX *dkx = TEST_TAKE(floatX, nk);
    floatX *dvx = TEST_TAKE(floatX, nk);
    attention_forward(c.o, c.lse, c.q, c.k, c.v, position, c.workspace, B, T, H, KV, D);
    memset(c.workspace, 0xff, attention_workspace(B, T, H, KV, D)); // nothing survives in it
    attention_backward(dqx, dkx, dvx, test_x(d_o, nq), c.o, c.lse, c.q, c.k, c.v, position,
                       c.workspace, B, T, H, KV, D);
    char name[64];
    snprintf(name, sizeof name, "attention %d x %d, %d/%d heads of %d%s:", B, T, H, KV, D,
             documents ? ", documents" : "");
    const char *what[] = { "o", "lse", "dq", "dk", "dv" };
    const double *got[] = { from_x(c.o, nq), from_real(c.lse, nl), from_x(dqx, nq), from_x(dkx, nk),
                            from_x(dvx, nk) };
    double **want[] = { o, lse, dq, dk, dv };
    size_t n[] = { nq, nl, nq, nk, nk };
    for (int i = 0; i < 5; i++) {
        char full[80];
        snprintf(full, sizeof full, "%s %s", name, what[i]);
        check_close(full, got[i], want[i][0], want[i][1], n[i],
                    i < 2 ? 1 : 10); // 10: dP - delta cancels, the more the sharper the softmax
    }
    if (FP64 && T < 80) {
        check_gradient("attention dq", (double *)dqx, (double *)c.q, nq, 40, attention_loss, &c);
        check_gradient("attention dk", (double *)dkx, (double *)c.k, nk, 40, attention_loss, &c);
        check_gradient("attention dv", (double *)dvx, (double *)c.v, nk, 40, attention_loss, &c);
    }
    test_release("attention");
}
// Numbers of document 1 must not reach a bit of document 2, whatever they are.
static void test_documents_apart(void) {
    enum { T = 560, FIRST = 40, H = 4, KV = 2, D = 8 };
    size_t nq = (size_t)T * H * D;
    size_t nk = (size_t)T * KV * D;
    int position[T];
    for (int t = 0; t < T; t++) position[t] = t < FIRST ? t : t - FIRST;
    double *data[] = { test_random(nq, 1, 0), test_random(nk, 1, 0), test_random(nk, 1, 0),
                       test_random(nq, 1, 0) };
    floatX *result[2][4];
    for (int version = 0; version < 2; version++) {
        if (version) // other numbers for the first document
            for (int i = 0; i < 4; i++)
                for (size_t j = 0; j < (i % 3 ? nk : nq) / T * FIRST; j++) data[i][j] *= -3;
        floatX *q = test_x(data[0], nq);
        floatX *k = test_x(data[1], nk);
        floatX *v = test_x(data[2], nk);
        floatX *d_o = test_x(data[3], nq);
        floatX *o = TEST_TAKE(floatX, nq);
        floatX **to = result[version];
        real *lse = TEST_TAKE(real, H * T);
        void *workspace = test_take(attention_workspace(1, T, H, KV, D));
        for (int i = 0; i < 4; i++) to[i] = TEST_TAKE(floatX, i < 2 ? nq : nk);
        attention_forward(to[0], lse, q, k, v, position, workspace, 1, T, H, KV, D);
        memcpy(o, to[0], nq * sizeof *o);
        attention_backward(to[1], to[2], to[3], d_o, o, lse, q, k, v, position, workspace, 1, T, H,
                           KV, D);
    }
    for (int i = 0; i < 4; i++) {
        size_t row = (i < 2 ? nq : nk) / T;
        size_t skip = row * FIRST;
        compare(
            !memcmp(result[0][i] + skip, result[1][i] + skip, row * (T - FIRST) * sizeof(floatX)) &&
                memcmp(result[0][i], result[1][i], skip * sizeof(floatX)),
            "documents apart: %s", (const char *[]){ "o", "dq", "dk", "dv" }[i]);
    }
    test_release("documents apart");
}
static void test_attention(void) {
    attention_select("auto");
    attention_select("blas");
    for (int documents = 0; documents < 2; documents++) {
        test_attention_shape(2, 7, 4, 2, 6, 1, documents);
        test_attention_shape(1, 1, 2, 2, 4, 1, documents);
        test_attention_shape(2, 70, 4, 1, 8, 1, documents);
        test_attention_shape(1, 40, 3, 3, 2, 2, documents);
        // Two blocks of keys, several of queries, the last ones ragged.
        test_attention_shape(1, 520, 2, 1, 8, 1, documents);
        // Three blocks of keys, sharp rows: the running maximum moves.
        test_attention_shape(1, 1040, 2, 2, 16, 3, documents);
        test_attention_shape(2, 129, 16, 1, 4, 1, documents);
        test_attention_shape(1, 64, 4, 2, 64, 1, documents);
        test_attention_shape(0, 8, 2, 1, 4, 1, documents);
    }
    test_documents_apart();
    test_group("attention, forward and backward, groups of 1 to 16 heads, documents");
}
