// Checks of plans, row maps, experts and router of the CPU backend against slow truths.
// Build (one precision; -DMOE_BF16, -DMOE_FP64; with or without -fopenmp and -DMOE_BLAS -lopenblas)
// and run alone:
//   cc -O2 -march=native kernels/test_experts.c kernels/cpu/*.c kernels/fail.c -lm -o
//   build/test_experts && build/test_experts
#include "test.h"
#include "device.h"

enum {
    MANY = 3
}; // threads; teams of 1 and MANY only: a runtime that shrinks a team ends threads together with
   // their scratch memory

// ---- plans ----------------------------------------------------------------------------------
static RowIndex take_plan(int P, int K, int E) {
    RowIndex plan = { 0, 0, 0, row_index_bound(P, K, E), P, E, K };
    plan.row_token = TEST_TAKE(int, plan.M);
    plan.token_row = TEST_TAKE(int, (int64_t)P *K);
    plan.expert_row = TEST_TAKE(int, E + 1);
    memset(plan.row_token, 0x55, plan.M * sizeof(int));
    memset(plan.token_row, 0x55, (size_t)P * K * sizeof(int)); // 0xff would read as -1
    return plan;
}
// A random choice of K of E experts for each of P tokens, ascending, each slot absent (-1) with
// probability `absent`. favourite >= 0: chosen by all.
static int *take_choice(int P, int K, int E, double absent, int favourite) {
    int *choice = TEST_TAKE(int, (int64_t)P *K + 1);
    for (int p = 0; p < P; p++) {
        int taken[256] = { 0 };
        int n = 0;
        if (favourite >= 0) {
            taken[favourite] = 1;
            n++;
        }
        while (n < K) {
            int e = test_below(E);
            n += !taken[e];
            taken[e] = 1;
        }
        for (int e = 0, k = 0; e < E; e++)
            if (taken[e]) choice[(int64_t)p * K + k++] = test_uniform() < absent ? -1 : e;
    }
    return choice;
}
static int plan_is_right(const RowIndex *plan, const int *choice, int first) {
    int tile = device_row_tile();
    int row = 0;
    int ok = 1;
    for (int e = 0; e < plan->E; e++) { // the definition, expert by expert
        ok &= plan->expert_row[e] == row;
        for (int p = 0; p < plan->P; p++)
            for (int k = 0; k < plan->K; k++)
                if (choice[p * plan->K + k] == first + e) {
                    ok &= row < plan->M && plan->row_token[row] == p &&
                          plan->token_row[p * plan->K + k] == row;
                    row++;
                }
        for (; row % tile; row++) ok &= row < plan->M && plan->row_token[row] == -1;
    }
    ok &= plan->expert_row[plan->E] == row && row <= plan->M;
    for (; row < plan->M; row++) ok &= plan->row_token[row] == -1;
    for (int i = 0; i < plan->P * plan->K; i++) {
        int e = choice[i];
        if (e < first || e >= first + plan->E) ok &= plan->token_row[i] == -1;
    }
    return ok;
}
static void test_plan(void) {
    int ok = 1;
    for (int i = 0; i < 300; i++) {
        int E = 1 + test_below(12);
        int local = 1 + test_below(E);
        int first = test_below(E - local + 1);
        int K = 1 + test_below(E < 8 ? E : 8), P = test_below(40);
        RowIndex plan = take_plan(P, K, local);
        int *choice = take_choice(P, K, E, i % 3 ? 0 : 0.2, i % 5 ? -1 : test_below(E));
        row_index_build(&plan, choice, first);
        ok &= plan_is_right(&plan, choice, first);
        test_release("plan");
    }
    check(ok, "row_index_build is the stable counting sort of its definition");
    // The bound is reached: by the worst counts, found by trying all of a small case.
    int tile = device_row_tile();
    int most = 0;
    for (int a = 0; a <= 5; a++)
        for (int b = 0; b <= 5; b++)
            for (int c = 0; c <= 5; c++)
                if (a + b + c <= 10)
                    most = (int)fmax(most, ((a + tile - 1) / tile + (b + tile - 1) / tile +
                                            (c + tile - 1) / tile) *
                                               tile);
    check(row_index_bound(5, 2, 3) == most && row_index_bound(0, 2, 3) == 0 &&
              row_index_bound(5, 8, 2) >= 10,
          "row_index_bound is the worst case, not more");
    test_release("plan");
}
// <gather x, y> = <x, sum y> with the plan's two indices, and byte-wise gather against its
// definition.
static void test_rows(void) {
    enum { P = 37, K = 3, E = 5, C = 300 };
    RowIndex plan = take_plan(P, K, E);
    int *choice = take_choice(P, K, E, 0.2, -1);
    row_index_build(&plan, choice, 0);
    size_t n = (size_t)P * C;
    size_t m = plan.M * C;
    floatX *x = test_x(test_random(n, 1, 0), n);
    floatX *y = test_x(test_random(m, 1, 0), m);
    floatX *px = TEST_TAKE(floatX, m);
    floatX *ty = TEST_TAKE(floatX, n);
    floatX *sum = TEST_TAKE(floatX, n);
    rows_gather(px, x, plan.row_token, plan.M, C * sizeof(floatX));
    rows_weighted_sum(ty, y, 0, &plan, C);
    rows_sum(sum, y, plan.token_row, P, K, C);
    double left = test_dot(from_x(px, m), from_x(y, m), m);
    double right = test_dot(from_x(x, n), from_x(ty, n), n);
    // Rounding of ty: 2^-9 (bf16), 2^-24 or 2^-53 relative to terms whose sum has a root mean
    // square of sqrt(m).
    double unit = sizeof(floatX) == 2 ? 0x1p-8 : 0x1p-22;
    if (sizeof(floatX) == 8) unit = 0x1p-50;
    check(fabs(left - right) <= 4 * unit * sqrt((double)m),
          "gather and combine are adjoint: %.9g %.9g", left, right);
    check(memcmp(ty, sum, n * sizeof(floatX)) == 0, "rows_sum is rows_weighted_sum without scores");
    real *rx = test_real(test_random_real(plan.M * 4, 1, 0), plan.M * 4);
    real *ry = TEST_TAKE(real, P * 4);
    rows_sum_real(ry, rx, plan.token_row, P, K, 4);
    int ok = 1;
    for (int p = 0; p < P; p++)
        for (int c = 0; c < 4; c++) {
            real s = 0;
            for (int k = 0; k < K; k++)
                if (plan.token_row[p * K + k] >= 0) s += rx[plan.token_row[p * K + k] * 4 + c];
            ok &= s == ry[p * 4 + c];
        }
    for (int i = 0; i < plan.M; i++)
        for (int c = 0; c < C; c++)
            ok &= load(px + (size_t)i * C + c) ==
                  (plan.row_token[i] < 0 ? 0 : load(x + (size_t)plan.row_token[i] * C + c));
    check(ok, "rows_sum_real and rows_gather follow their definition");
    test_release("rows");
}

// ---- experts --------------------------------------------------------------------------------
typedef struct {
    int P, K, E, first, local, C, F, use_score, accumulate;
    double absent;
    int favourite;
    const char *name;
} Case;
typedef struct { // everything in doubles; rows are addressed by slot p*K + k; (slots, *) rows that
                 // are not here stay 0
    const Case *c;
    const int *choice;
    double *x, *W1, *W2, *score, *seed;                      // inputs; seed (P,C) = dout
    double *H, *A, *out, *dH, *sA, *dscore, *dx, *dW1, *dW2; // results
    double *dW1_before, *dW2_before;
} Naive;

static double *zeros(size_t n) {
    double *d = TEST_TAKE(double, n);
    memset(d, 0, n * sizeof *d);
    return d;
}
static int here(const Naive *s, int slot) {
    return s->choice[slot] >= s->c->first && s->choice[slot] < s->c->first + s->c->local;
}
static void naive_forward(Naive *s) {
    const Case *c = s->c;
    int C = c->C, F = c->F;
    double *y = TEST_TAKE(double, C);
    for (int p = 0; p < c->P; p++)
        for (int j = 0; j < C; j++) s->out[p * C + j] = 0;
    for (int slot = 0; slot < c->P * c->K; slot++) {
        if (!here(s, slot)) continue;
        int e = s->choice[slot] - c->first;
        int p = slot / c->K;
        double *h = s->H + (int64_t)slot * 2 * F;
        double *a = s->A + (int64_t)slot * F;
        for (int f = 0; f < 2 * F; f++)
            h[f] = Q(test_dot(s->x + p * C, s->W1 + ((int64_t)e * 2 * F + f) * C, C));
        for (int f = 0; f < F; f++) a[f] = Q(Q(h[f] / (1 + exp(-h[f]))) * h[F + f]);
        for (int j = 0; j < C; j++) {
            y[j] = Q(test_dot(a, s->W2 + ((int64_t)e * C + j) * F, F));
            s->out[p * C + j] = Q(s->out[p * C + j] + Q(s->score[slot] * y[j]));
        }
    }
}
static void naive_backward(
    Naive *s) { // every intermediate an op-by-op program would store is rounded
    const Case *c = s->c;
    int C = c->C, F = c->F;
    double *g = TEST_TAKE(double, F);
    double *dx = TEST_TAKE(double, C);
    for (int p = 0; p < c->P * C; p++) s->dx[p] = 0;
    for (int slot = 0; slot < c->P * c->K; slot++) {
        s->dscore[slot] = 0;
        if (!here(s, slot)) continue;
        int e = s->choice[slot] - c->first;
        int p = slot / c->K;
        const double *h = s->H + (int64_t)slot * 2 * F;
        const double *a = s->A + (int64_t)slot * F;
        const double *dy = s->seed + p * C;
        double *dh = s->dH + (int64_t)slot * 2 * F;
        double *sa = s->sA + (int64_t)slot * F;
        for (int f = 0; f < F; f++) {
            g[f] = 0;
            for (int j = 0; j < C; j++) g[f] += dy[j] * s->W2[((int64_t)e * C + j) * F + f];
            g[f] = Q(g[f]);
            double sg = 1 / (1 + exp(-h[f]));
            double dA = Q(s->score[slot] * g[f]);
            s->dscore[slot] += g[f] * a[f];
            sa[f] = Q(s->score[slot] * a[f]);
            dh[f] = Q(Q(dA * h[F + f]) * Q(sg * (1 + h[f] * (1 - sg))));
            dh[F + f] = Q(dA * Q(h[f] * sg));
        }
        for (int j = 0; j < C; j++) {
            dx[j] = 0;
            for (int f = 0; f < 2 * F; f++)
                dx[j] += dh[f] * s->W1[((int64_t)e * 2 * F + f) * C + j];
            s->dx[p * C + j] = Q(s->dx[p * C + j] + Q(dx[j]));
            for (int f = 0; f < 2 * F; f++)
                s->dW1[((int64_t)e * 2 * F + f) * C + j] += dh[f] * s->x[p * C + j];
            for (int f = 0; f < F; f++) s->dW2[((int64_t)e * C + j) * F + f] += dy[j] * sa[f];
        }
    }
}
static double naive_loss(void *context) {
    Naive *s = (Naive *)context;
    int pieces = test_pieces;
    naive_forward(s);
    double loss = test_dot(s->out, s->seed, (size_t)s->c->P * s->c->C);
    while (test_pieces > pieces) free(test_piece[--test_pieces].memory);
    return loss;
}
static void naive_results(Naive *s) {
    const Case *c = s->c;
    size_t slots = (size_t)c->P * c->K;
    size_t w1 = (size_t)c->local * 2 * c->F * c->C;
    size_t w2 = (size_t)c->local * c->F * c->C;
    size_t n = (size_t)c->P * c->C;
    s->H = zeros(slots * 2 * c->F);
    s->A = zeros(slots * c->F);
    s->out = zeros(n);
    s->dH = zeros(slots * 2 * c->F);
    s->sA = zeros(slots * c->F);
    s->dscore = zeros(slots);
    s->dx = zeros(n);
    s->dW1 = zeros(w1);
    s->dW2 = zeros(w2);
    if (c->accumulate) {
        memcpy(s->dW1, s->dW1_before, w1 * sizeof(double));
        memcpy(s->dW2, s->dW2_before, w2 * sizeof(double));
    }
    naive_forward(s);
    naive_backward(s);
}
// (M,width) rows of a kernel as (P*K,width) slots.
static double *by_slot(const floatX *rows, const RowIndex *plan, int width) {
    double *d = zeros(plan->P * plan->K * width);
    for (int i = 0; i < plan->P * plan->K; i++)
        for (int j = 0; plan->token_row[i] >= 0 && j < width; j++)
            d[(int64_t)i * width + j] =
                (double)load(rows + (int64_t)plan->token_row[i] * width + j);
    return d;
}
static void test_experts_case(const Case *c) {
    size_t slots = (size_t)c->P * c->K;
    size_t w1 = (size_t)c->local * 2 * c->F * c->C;
    size_t w2 = (size_t)c->local * c->F * c->C;
    size_t n = (size_t)c->P * c->C;
    Naive exact = { 0 };
    Naive naive;
    exact.c = c;
    exact.choice = take_choice(c->P, c->K, c->E, c->absent, c->favourite);
    exact.x = test_random(n, 1, 0);
    exact.W1 = test_random(w1, 1 / sqrt(c->C), 0);
    exact.W2 = test_random(w2, 1 / sqrt(c->F), 0);
    exact.score = c->use_score ? test_random_real(slots, 0.2, 0.5) : zeros(slots);
    exact.seed = test_random(n, 1, 0);
    for (size_t i = 0; !c->use_score && i < slots; i++) exact.score[i] = 1;
    exact.dW1_before = test_random_real(w1, 1, 0);
    exact.dW2_before = test_random_real(w2, 1, 0);
    naive = exact;
    naive_results(&exact);
    test_rounding = 1;
    naive_results(&naive);
    test_rounding = 0;

    RowIndex plan = take_plan(c->P, c->K, c->local);
    row_index_build(&plan, exact.choice, c->first);
    size_t M = plan.M;
    floatX *x = test_x(exact.x, n);
    floatX *W1 = test_x(exact.W1, w1);
    floatX *W2 = test_x(exact.W2, w2);
    floatX *seed = test_x(exact.seed, n);
    real *score = c->use_score ? test_real(exact.score, slots) : 0;
    floatX *result[3][8];
    real *dscore[3];
    gradX *dW1[3], *dW2[3];
    for (int run = 0; run < 3; run++) { // one thread, then MANY; the last with dH in place of H
        test_threads(run ? MANY : 1);
        floatX *H = TEST_TAKE(floatX, M * 2 * c->F);
        floatX *A = TEST_TAKE(floatX, M * c->F);
        floatX *Y = TEST_TAKE(floatX, M * c->C);
        floatX *out = TEST_TAKE(floatX, n);
        floatX *dH = TEST_TAKE(floatX, M * 2 * c->F);
        floatX *sA = TEST_TAKE(floatX, M * c->F);
        floatX *dX = TEST_TAKE(floatX, M * c->C);
        floatX *dx = TEST_TAKE(floatX, n);
        dscore[run] = TEST_TAKE(real, slots);
        dW1[run] = c->accumulate ? test_grad(exact.dW1_before, w1) : TEST_TAKE(gradX, w1);
        dW2[run] = c->accumulate ? test_grad(exact.dW2_before, w2) : TEST_TAKE(gradX, w2);
        experts_up(H, A, x, W1, &plan, c->C, c->F);
        experts_down(Y, A, W2, &plan, c->C, c->F);
        rows_weighted_sum(out, Y, score, &plan, c->C);
        if (run == 1) experts_up(H, 0, x, W1, &plan, c->C, c->F);
        floatX *kept = test_x(from_x(H, M * 2 * c->F), M * 2 * c->F);
        if (run == 2) dH = H;
        experts_down_backward(dH, sA, c->use_score || run == 0 ? dscore[run] : 0, seed, H, W2,
                              score, &plan, c->C, c->F);
        experts_up_backward(dX, dH, W1, &plan, c->C, c->F);
        rows_weighted_sum(dx, dX, 0, &plan, c->C);
        experts_wgrad(dW1[run], dW2[run], x, seed, dH, sA, &plan, c->accumulate, c->C, c->F);
        floatX *all[8] = { kept, A, Y, out, dH, sA, dX, dx };
        memcpy(result[run], all, sizeof all);
    }
    test_threads(MANY);
    size_t used = plan.expert_row[c->local];
    size_t size[8] = { used * 2 * c->F, used * c->F, used * c->C, n,
                       used * 2 * c->F, used * c->F, used * c->C, n };
    int same = 1;
    for (int run = 1; run < 3; run++) {
        for (int i = 0; i < 8; i++)
            same &= memcmp(result[0][i], result[run][i], size[i] * sizeof(floatX)) == 0;
        same &= memcmp(dW1[0], dW1[run], w1 * sizeof(gradX)) == 0 &&
                memcmp(dW2[0], dW2[run], w2 * sizeof(gradX)) == 0;
        if (c->use_score) same &= memcmp(dscore[0], dscore[run], slots * sizeof(real)) == 0;
    }
    compare(same, "experts: not the same bits with 1 and 3 threads, by recompute or in place");
    check_close("H", by_slot(result[0][0], &plan, 2 * c->F), exact.H, naive.H, slots * 2 * c->F, 1);
    check_close("A", by_slot(result[0][1], &plan, c->F), exact.A, naive.A, slots * c->F, 1);
    check_close("out", from_x(result[0][3], n), exact.out, naive.out, n, 1);
    check_close("dH", by_slot(result[0][4], &plan, 2 * c->F), exact.dH, naive.dH, slots * 2 * c->F,
                1);
    check_close("sA", by_slot(result[0][5], &plan, c->F), exact.sA, naive.sA, slots * c->F, 1);
    check_close("dscore", from_real(dscore[0], slots), exact.dscore, naive.dscore, slots, 1);
    check_close("dx", from_x(result[0][7], n), exact.dx, naive.dx, n, 1);
    check_close("dW1", from_grad(dW1[0], w1), exact.dW1, naive.dW1, w1, 1);
    check_close("dW2", from_grad(dW2[0], w2), exact.dW2, naive.dW2, w2, 1);
    if (sizeof(real) == 8 && !c->accumulate && c->P < 20) {
        double *keep_dscore = from_real(dscore[0], slots);
        check_gradient("dx", from_x(result[0][7], n), exact.x, n, 40, naive_loss, &exact);
        check_gradient("dW1", from_grad(dW1[0], w1), exact.W1, w1, 40, naive_loss, &exact);
        check_gradient("dW2", from_grad(dW2[0], w2), exact.W2, w2, 40, naive_loss, &exact);
        check_gradient("dscore", keep_dscore, exact.score, slots, 40, naive_loss, &exact);
    }
    char name[160];
    snprintf(name, sizeof name, "experts, %s: forward, backward, bits with 1 and 3 threads%s",
             c->name,
             sizeof(real) == 8 && !c->accumulate && c->P < 20 ? ", finite differences" : "");
    test_group(name);
}
static void test_experts(void) {
    static const Case cases[] = {
        // P   K  E  first local C   F  score acc absent favourite
        { 13, 3, 6, 0, 6, 24, 10, 1, 0, 0, -1, "top 3 of 6" },
        { 13, 3, 6, 0, 6, 24, 10, 1, 1, 0, -1, "accumulated" },
        { 11, 2, 6, 2, 3, 16, 9, 1, 0, 0.2, -1, "local experts 2..4 of 6, absent slots" },
        { 9, 1, 4, 0, 4, 20, 8, 0, 0, 0, 2, "all tokens on one of four, no scores" },
        { 17, 8, 8, 0, 8, 12, 6, 1, 0, 0, -1, "all of 8" },
        { 0, 2, 4, 0, 4, 8, 6, 1, 0, 0, -1, "an empty pool" },
        { 0, 2, 4, 0, 4, 8, 6, 1, 1, 0, -1, "an empty pool, accumulated" },
        { 1300, 2, 5, 0, 5, 96, 20, 1, 0, 0, 1, "1300 tokens, one expert chosen by all" },
        { 1100, 1, 1, 0, 1, 70, 33, 0, 0, 0, -1, "a dense MLP as one expert" },
        { 60, 2, 3, 0, 3, 40, 600, 1, 0, 0, -1, "wide experts, several column blocks" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) test_experts_case(cases + i);
}

// ---- router ---------------------------------------------------------------------------------
typedef struct {
    int R, C, E, K, normalize;
    double aux, z;
} Gate;
typedef struct {
    const Gate *c;
    double *u, *W, *seed, *f, *logits, *score, *dz, *du, *dW; // seed (R,K) = dscore
    int *topk;
} NaiveGate;

static double gate_softmax(double *p, const double *z, int E) {
    double top = -INFINITY;
    double sum = 0;
    for (int e = 0; e < E; e++) top = fmax(top, z[e]);
    for (int e = 0; e < E; e++) sum += p[e] = exp(z[e] - top);
    for (int e = 0; e < E; e++) p[e] /= sum;
    return top + log(sum);
}
// The loss whose gradient router_backward_add adds: <score, seed> + aux sum_r sum_e f_e p_e + z
// sum_r lse^2, the choice frozen.
static double gate_loss(void *context) {
    NaiveGate *s = (NaiveGate *)context;
    const Gate *c = s->c;
    double loss = 0;
    double p[256];
    for (int r = 0; r < c->R; r++) {
        double *z = s->logits + (int64_t)r * c->E;
        double total = 0;
        for (int e = 0; e < c->E; e++)
            z[e] = test_dot(s->u + (int64_t)r * c->C, s->W + (int64_t)e * c->C, c->C);
        double lse = gate_softmax(p, z, c->E);
        for (int k = 0; k < c->K; k++) total += p[s->topk[r * c->K + k]];
        for (int k = 0; k < c->K; k++) {
            s->score[r * c->K + k] = p[s->topk[r * c->K + k]] / (c->normalize ? total : 1);
            loss += s->score[r * c->K + k] * s->seed[r * c->K + k];
        }
        for (int e = 0; e < c->E; e++) loss += c->aux * s->f[e] * p[e];
        loss += c->z * lse * lse;
    }
    return loss;
}
// dz in the long form: dp first, then the softmax's Jacobian; nothing of the closed forms is
// reused.
static void gate_backward(NaiveGate *s) {
    const Gate *c = s->c;
    double p[256], dp[256];
    for (int r = 0; r < c->R; r++) {
        double lse = gate_softmax(p, s->logits + (int64_t)r * c->E, c->E);
        double total = 0;
        double inner = 0;
        double dot = 0;
        const int *ids = s->topk + r * c->K;
        for (int k = 0; k < c->K; k++) total += p[ids[k]];
        for (int k = 0; k < c->K; k++) inner += p[ids[k]] / total * s->seed[r * c->K + k];
        for (int e = 0; e < c->E; e++) dp[e] = c->aux * s->f[e];
        for (int k = 0; k < c->K; k++)
            dp[ids[k]] +=
                c->normalize ? (s->seed[r * c->K + k] - inner) / total : s->seed[r * c->K + k];
        for (int e = 0; e < c->E; e++) dot += p[e] * dp[e];
        for (int e = 0; e < c->E; e++) {
            double dz = s->dz[(int64_t)r * c->E + e] = p[e] * (dp[e] - dot) + 2 * c->z * lse * p[e];
            for (int j = 0; j < c->C; j++) {
                s->du[(int64_t)r * c->C + j] += dz * s->W[(int64_t)e * c->C + j];
                s->dW[(int64_t)e * c->C + j] += dz * s->u[(int64_t)r * c->C + j];
            }
        }
    }
}
static void test_router_case(const Gate *c) {
    size_t n = (size_t)c->R * c->C;
    size_t w = (size_t)c->E * c->C;
    size_t z = (size_t)c->R * c->E;
    size_t k = (size_t)c->R * c->K;
    NaiveGate s = { c,
                    test_random(n, 1, 0),
                    test_random(w, 1 / sqrt(c->C), 0),
                    test_random_real(k, 1, 0),
                    zeros(c->E),
                    zeros(z),
                    zeros(k),
                    zeros(z),
                    0,
                    0,
                    0 };
    for (int e = 0; e < c->E; e++) s.f[e] = (double)c->K / c->E * (0.5 + test_uniform());
    double *du_before = test_random(n, 1, 0);
    double *dW_before = test_random_real(w, 1, 0);
    floatX *u = test_x(s.u, n);
    floatX *W = test_x(s.W, w);
    floatX *du[2];
    real *logits[2], *score[2], *dz[2];
    real *dscore = test_real(s.seed, k);
    int *topk[2];
    gradX *dW[2];
    int64_t *count[2];
    double *prob[2], *stat[2];
    for (int run = 0; run < 2; run++) {
        test_threads(run ? MANY : 1);
        logits[run] = TEST_TAKE(real, z);
        score[run] = TEST_TAKE(real, k);
        topk[run] = TEST_TAKE(int, k);
        dz[run] = TEST_TAKE(real, z);
        count[run] = TEST_TAKE(int64_t, c->E);
        prob[run] = zeros(c->E);
        stat[run] = zeros(2);
        for (int e = 0; e < c->E; e++) count[run][e] = 5;
        RouterStats stats = { count[run], prob[run], stat[run] };
        router_forward(logits[run], topk[run], score[run], stats, u, W, 0, 0, c->normalize, c->R,
                       c->C, c->E, c->K);
        du[run] = test_x(du_before, n);
        dW[run] = run ? test_grad(dW_before, w) : TEST_TAKE(gradX, w);
        router_backward_add(du[run], dW[run], dz[run], dscore, logits[run], topk[run], score[run],
                            u, W, c->aux != 0 ? s.f : 0, c->aux, c->z, c->normalize, run, c->R,
                            c->C, c->E, c->K);
    }
    test_threads(MANY);
    int same = memcmp(logits[0], logits[1], z * sizeof(real)) == 0 &&
               memcmp(topk[0], topk[1], k * sizeof(int)) == 0 &&
               memcmp(score[0], score[1], k * sizeof(real)) == 0 &&
               memcmp(dz[0], dz[1], z * sizeof(real)) == 0 &&
               memcmp(du[0], du[1], n * sizeof(floatX)) == 0 &&
               memcmp(prob[0], prob[1], sizeof(double) * c->E) == 0 &&
               memcmp(stat[0], stat[1], 16) == 0;
    int sorted = 1;
    int counted = 1;
    double lse2 = 0;
    double entropy = 0;
    double *p = TEST_TAKE(double, c->E);
    double *mass = zeros(c->E);
    double *chosen = zeros(c->E);
    double *got = zeros(c->E);
    s.topk = topk[0];
    gate_loss(&s);
    for (int r = 0; r < c->R; r++) {
        double lse = gate_softmax(p, s.logits + (int64_t)r * c->E, c->E);
        double least = 1;
        double most = 0;
        int taken[256] = { 0 };
        lse2 += lse * lse;
        for (int e = 0; e < c->E; e++) {
            entropy -= p[e] * log(p[e]);
            mass[e] += p[e];
        }
        for (int i = 0; i < c->K; i++) {
            int id = topk[0][r * c->K + i];
            sorted &= id >= 0 && id < c->E && (i == 0 || id > topk[0][r * c->K + i - 1]);
            taken[id] = 1;
            chosen[id]++;
            least = fmin(least, p[id]);
        }
        for (int e = 0; e < c->E; e++) most = taken[e] ? most : fmax(most, p[e]);
        sorted &=
            c->K == c->E ||
            least >
                most * (1 - 1e-5); // fp32 logits may order neighbours closer than 1e-5 differently
    }
    for (int e = 0; e < c->E; e++) {
        counted &= count[0][e] == 5 + (int64_t)chosen[e];
        got[e] = prob[0][e];
    }
    double stat_truth[2] = { lse2, entropy };
    compare(same, "router: not the same bits with 1 and 3 threads");
    compare(sorted, "router: wrong choice");
    compare(counted, "router: wrong counts");
    if (c->R) {
        check_close("router prob", got, mass, mass, c->E, 1);
        check_close("router z", stat[0], stat_truth, stat_truth, 2, 1);
    }
    check_close("router score", from_real(score[0], k), s.score, s.score, k, 1);
    s.du = zeros(n);
    s.dW = zeros(w);
    gate_backward(&s);
    if (sizeof(real) == 8 && c->R && c->R < 20) {
        check_gradient("router du", s.du, s.u, n, 40, gate_loss, &s);
        check_gradient("router dW", s.dW, s.W, w, 40, gate_loss, &s);
    }
    double *du_naive = zeros(n);
    double *dW_sum = zeros(w);
    for (size_t i = 0; i < n; i++) {
        s.du[i] += du_before[i];
        du_naive[i] = (double)bf16_to_float(float_to_bf16((float)s.du[i]));
    }
    for (size_t i = 0; i < w; i++) dW_sum[i] = s.dW[i] + dW_before[i];
    check_close("router dz", from_real(dz[0], z), s.dz, s.dz, z, 2);
    check_close("router du", from_x(du[0], n), s.du, du_naive, n, 1);
    check_close("router dW", from_grad(dW[0], w), s.dW, s.dW, w, 2);
    check_close("router dW accumulated", from_grad(dW[1], w), dW_sum, dW_sum, w, 2);
    char name[160];
    snprintf(
        name, sizeof name,
        "router, R %d E %d K %d %s aux %g z %g: choice, statistics, gradients, bits with 1 and "
        "3 threads",
        c->R, c->E, c->K, c->normalize ? "normalised" : "raw", c->aux, c->z);
    test_group(name);
}
// One token whose logits are given: u = 1, W = the logits.
static void route(const double *logits, int E, int K, const real *bias, int normalize, int *topk,
                  real *score) {
    floatX *W = test_x(logits, E);
    floatX *u = TEST_TAKE(floatX, 1);
    RouterStats none = { 0, 0, 0 };
    store(u, 1);
    router_forward(TEST_TAKE(real, E), topk, score, none, u, W, bias, 0, normalize, 1, 1, E, K);
}
static void test_router(void) {
    static const Gate cases[] = {
        { 13, 24, 6, 3, 1, 0, 0 },           { 13, 24, 6, 3, 0, 0, 0 },
        { 13, 24, 6, 3, 1, 0.3, 0.01 },      { 13, 24, 6, 3, 0, 0.3, 0.01 },
        { 7, 10, 8, 1, 1, 0.1, 0 },          { 7, 10, 5, 5, 0, 0, 0.1 },
        { 700, 130, 128, 8, 1, 1e-3, 1e-4 }, { 0, 10, 4, 2, 1, 0.1, 0.1 }
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) test_router_case(cases + i);
    // Published vectors: one token, z = [2,1,0,-1], K = 2. f = [1,1,0,0], coef = 1, E = 4:
    // aux_scale 4.
    static const double z[4] = { 2, 1, 0, -1 };
    static const double want_score[2] = { 0.73105858, 0.26894142 };
    static const double want[3][4] = { { 0.58983580, -0.58983580, 0, 0 },
                                       { 0.53435313, -0.51407092, -0.01482749, -0.00545473 },
                                       { 0.30702585, 0.11294850, -0.30702585, -0.11294850 } };
    for (int i = 0; i < 3; i++) {
        int topk[2];
        real score[2];
        real logits[4] = { 2, 1, 0, -1 };
        real dz[4];
        real dscore[2] = { i < 2 ? 1 : 0, i < 2 ? -2 : 0 };
        double f[4] = { 1, 1, 0, 0 };
        double off = 0;
        floatX *u = test_x(z, 1);
        floatX *W = test_x(z, 4);
        floatX du[1];
        gradX dW[4];
        route(z, 4, 2, 0, i != 1, topk, score);
        store(du, 0);
        router_backward_add(du, dW, dz, dscore, logits, topk, score, u, W, f, i == 2 ? 4 : 0, 0,
                            i != 1, 0, 1, 1, 4, 2);
        for (int e = 0; e < 4; e++) off = fmax(off, fabs((double)dz[e] - want[i][e]));
        if (i == 0)
            off = fmax(off, fmax(fabs((double)score[0] - want_score[0]),
                                 fabs((double)score[1] - want_score[1])));
        // the vectors have 8 decimals; fp32 adds a few 6e-8
        check(topk[0] == 0 && topk[1] == 1 && off < (sizeof(real) == 8 ? 1e-8 : 3e-7) &&
                  (i != 0 || (dz[2] == 0 && dz[3] == 0)),
              "router vector %d: off by %.1e", i, off);
    }
    int topk[8];
    real score[8];
    real bias[6] = { 0, 0, 0, 0, 1, 1 };
    static const double ties[6] = { 1, 2, 1, 2, 1, 1 };
    static const double poison[6] = { 0, NAN, 3, 4, 5, 6 };
    static const double infinite[6] = { 0, 1, INFINITY, 2, 3, 4 };
    static const double far[6] = { 0, -2000, -3000, -4000, -2000, -1000 };
    route(ties, 6, 3, 0, 1, topk, score);
    check(topk[0] == 0 && topk[1] == 1 && topk[2] == 3,
          "ties go to the lowest id, choice is sorted by id");
    route(far, 6, 3, 0, 1, topk, score);
    check(topk[0] == 0 && topk[1] == 1 && topk[2] == 2 && score[0] == 1 && score[1] == 0,
          "probabilities that underflow tie");
    route(ties, 6, 2, bias, 0, topk, score);
    check(topk[0] == 4 && topk[1] == 5 &&
              fabs((double)score[0] - exp(1) / (2 * exp(2) + 4 * exp(1))) < 1e-6,
          "a bias chooses but does not weigh");
    int given[2] = { 2, 4 };
    RouterStats none = { 0, 0, 0 };
    floatX *u = test_x(ties + 4, 1);
    floatX *W = test_x(ties, 6);
    router_forward(TEST_TAKE(real, 6), given, score, none, u, W, 0, 1, 1, 1, 1, 6, 2);
    check(given[0] == 2 && given[1] == 4 && score[0] == (real)0.5 && score[1] == (real)0.5,
          "a given choice stays, its scores are of the present logits");
    route(poison, 6, 3, 0, 1, topk, score);
    check(topk[0] == 0 && topk[1] == 1 && topk[2] == 2 && isnan(score[0]),
          "a NaN logit chooses the lowest ids and stays visible");
    route(infinite, 6, 6, 0, 1, topk, score);
    check(topk[0] == 0 && topk[5] == 5, "an infinite logit does not crash");
    int64_t count[6] = { 1, 2, 3, 4, 5, 6 };
    double f[3];
    router_share(f, count, 4, 2, 3);
    check(f[0] == 1.25 && f[1] == 1.75 && f[2] == 2.25, "router_share pools the layers");
    test_release("router");
}

int main(void) {
    device_init(0, MANY);
    printf("kernels: plan, rows, experts, router; " PRECISION_NAME ", %s\n", device_describe());
    test_plan();
    test_rows();
    test_experts();
    test_router();
    test_group("nothing was written behind a buffer");
    device_finish();
    return test_summary();
}
