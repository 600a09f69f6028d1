// Tests of dispatch.c and heads.c under any number of ranks:   mpirun -np 4 build/test_dispatch
// (test_dispatch.sh runs 1, 2, 3 and 4 and adds up)
//
//   adjoint   <S x, Y> = <x, S' Y> for both passes, scores included. All numbers are small
//             multiples of 1/4, whose sums are exact in every precision: the sides must be EQUAL.
//   layer     A whole MoE layer (without router), forward and backward, against one process on all
//             tokens, with the same kernels: y, dx, dscore, dW1, dW2, each expert.
//   edges     Nobody's experts chosen on one rank, everything to one expert, everything to one
//             rank, only own tokens, only the neighbour's.
//   calls     50 calls on two exchanges in flight, other routing every time, memory poisoned with
//             NaN before each.
//   load      Sizes known to the host against a naive count.
//   traffic   Bytes on the wire against the formulas of README.md.
//   picture   The example drawn in README.md, number by number.
//   heads     Both maps of heads.c: values and adjoints.
//
// The problem is always the one of n R tokens; with allreduce every rank holds all of them and dy
// is non-zero on the own slice alone, so that the replicas' dy add up to the same gradient (I1, one
// gradient rule). Hence one reference for the three dispatchers, and they are compared with each
// other too.
#include "dispatch.h"
#include "heads.h"
#include "../kernels/fail.h"
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// fp32: the sum over a token's experts is taken per rank, then over ranks: another association of
// at most K additions, each off by at most 2^-24 of the partial sums, so ~K 6e-8 norm-wise; 1e-5
// leaves room for cancellation between the terms. bf16: partial outputs are rounded to 8 bits once
// more on the way, 2^-9 each. fp64 as fp32 with 2^-53.
#if defined(MOE_BF16)
#define TOLERANCE 8e-3
#elif defined(MOE_FP64)
#define TOLERANCE 1e-13
#else
#define TOLERANCE 1e-5
#endif
static const char *dispatch_name[] = { "alltoall", "allgather", "allreduce" };
static int passed, failed, world_rank;
static Comm *everyone;

// One check on all ranks: it passes where it does on every rank. ok may be computed from other data
// on each.
static void check(int ok, const char *format, ...) {
    va_list a;
    char text[256];
    va_start(a, format);
    vsnprintf(text, sizeof text, format, a);
    va_end(a);
    if (!ok) {
        printf("rank %d: FAIL %s\n", world_rank, text);
        fflush(stdout);
    }
    if (comm_max(everyone, !ok))
        failed++;
    else
        passed++;
}

#include "test_dispatch_problem.h"

// ---- a slot: what one micro-batch needs on this rank ----------------------------------------
typedef struct {
    Arena dispatcher_arena, arena;
    Dispatcher *e;
    Route route, saved;          // saved: with lists of its own
    int R, first_token, experts; // tokens here, the first of them in the problem, experts here
    int *topk, *topk_other, *lists;
    int *table; // host: two of them, 0 if nothing moves
    int64_t table_size, sent;
    floatX *x, *y, *dy, *dx, *W1, *W2, *H, *A, *sA, *Y; // Y (M,C) also holds dX
    real *score, *dscore;
    gradX *dW1, *dW2;
    const floatX *pool;
    const real *pool_score;
} Slot;

static void slot_take(Slot *s, const Grid *g, const Config *c, int R) {
    int bound = dispatch_pool_bound(g, R);
    int local = c->E / g->ep;
    size_t M = row_index_bound(bound, c->K, local);
    size_t x = (size_t)R * c->C;
    size_t k = (size_t)R * c->K;
    size_t w = (size_t)local * c->F * c->C;
    Arena *a = &s->arena;
    s->e = dispatcher_create(g, c, R, &s->dispatcher_arena);
    s->topk_other = ARENA_TAKE(a, int, k, "t");
    s->sent = 0;
    if (g->dispatch == DISPATCH_ALLTOALL) s->sent = R * (g->ep < c->K ? g->ep : c->K);
    s->lists = ARENA_TAKE(a, int, (int64_t)M + bound * c->K + local + 1 + 2 * s->sent, "t");
    s->topk = ARENA_TAKE(a, int, k, "t");
    s->score = ARENA_TAKE(a, real, k, "t");
    s->dscore = ARENA_TAKE(a, real, k, "t");
    s->x = ARENA_TAKE(a, floatX, x, "t");
    s->y = ARENA_TAKE(a, floatX, x, "t");
    s->dy = ARENA_TAKE(a, floatX, x, "t");
    s->dx = ARENA_TAKE(a, floatX, x, "t");
    s->W1 = ARENA_TAKE(a, floatX, 2 * w, "t");
    s->W2 = ARENA_TAKE(a, floatX, w, "t");
    s->dW1 = ARENA_TAKE(a, gradX, 2 * w, "t");
    s->dW2 = ARENA_TAKE(a, gradX, w, "t");
    s->H = ARENA_TAKE(a, floatX, M * 2 * c->F, "t");
    s->A = ARENA_TAKE(a, floatX, M * c->F, "t");
    s->sA = ARENA_TAKE(a, floatX, M * c->F, "t");
    s->Y = ARENA_TAKE(a, floatX, M * c->C, "t");
}
static Slot slot_new(const Grid *g, const Config *c, int R) {
    Slot s = { .dispatcher_arena = arena_counting("exchange"), .arena = arena_counting("test") };
    slot_take(&s, g, c, R);
    dispatcher_free(s.e);
    arena_commit(&s.dispatcher_arena);
    arena_commit(&s.arena);
    slot_take(&s, g, c, R);
    s.table_size = dispatch_table_size(g, c, R);
    if (s.table_size) s.table = (int *)xcalloc(2 * s.table_size, sizeof(int), "tables");
    s.route.table = s.saved.table = s.table;
    s.R = R;
    s.experts = c->E / g->ep;
    s.first_token = g->dispatch == DISPATCH_ALLREDUCE ? 0 : g->ep_rank * R;
    return s;
}
static void slot_free(Slot *s) {
    free(s->table);
    dispatcher_free(s->e);
    arena_free(&s->dispatcher_arena);
    arena_free(&s->arena);
}

// Everything is poisoned, then this rank's part of the problem is put in.
static void slot_load(Slot *s, const Problem *p) {
    size_t t = s->first_token;
    size_t C = p->C;
    size_t w = p->F * C;
    size_t first = (size_t)p->me * s->experts;
    poison(&s->dispatcher_arena);
    poison(&s->arena);
    device_upload(s->topk, p->topk + t * p->K, (size_t)s->R * p->K * sizeof(int));
    int *other = (int *)xmalloc((size_t)s->R * p->K * sizeof(int), "another routing");
    for (int i = 0; i < s->R * p->K; i++) other[i] = p->E - p->K + i % p->K; // the last K experts
    device_upload(s->topk_other, other, (size_t)s->R * p->K * sizeof(int));
    free(other);
    put(s->score, DTYPE_REAL, p->score + t * p->K, (size_t)s->R * p->K);
    put(s->x, DTYPE_FLOATX, p->x + t * C, s->R * C);
    put(s->W1, DTYPE_FLOATX, p->W1 + first * 2 * w, s->experts * 2 * w);
    put(s->W2, DTYPE_FLOATX, p->W2 + first * w, s->experts * w);
    double *dy = numbers(s->R * C);
    for (int r = 0; r < s->R; r++)
        if ((s->first_token + r) / p->R == p->me)
            memcpy(dy + r * C, p->dy + (t + r) * C, C * sizeof(double));
    put(s->dy, DTYPE_FLOATX, dy, s->R * C);
    free(dy);
}

static void route_and_dispatch(Slot *s) {
    dispatch_route(&s->route, s->e, s->topk);
    dispatch_start(s->e, FORWARD, s->x, s->score);
}
// Back to forward's routing: makes the lists again, or takes saved ones.
enum { NOT_AGAIN, MAKE_AGAIN, TAKE_SAVED, AGAIN_WAYS };
static void copy_ints(int *to, const int *from, int64_t n) {
    if (from) device_copy(to, from, n * sizeof(int));
}
static void save_route(Slot *s, int again) {
    RowIndex *to = &s->saved.index;
    RowIndex *from = &s->route.index;
    int *lists = s->lists;
    memset(to, 0, sizeof *to);
    if (again != TAKE_SAVED || !s->table) return;
    *to = *from;
    to->row_token = lists;
    to->token_row = lists + from->M;
    to->expert_row = to->token_row + from->P * from->K;
    copy_ints(to->row_token, from->row_token, from->M);
    copy_ints(to->token_row, from->token_row, from->P * from->K);
    copy_ints(to->expert_row, from->expert_row, from->E + 1);
    s->saved.send_token = to->expert_row + from->E + 1;
    s->saved.sum_row = s->saved.send_token + s->sent;
    copy_ints(s->saved.send_token, s->route.send_token, s->sent);
    copy_ints(s->saved.sum_row, s->route.sum_row, s->sent);
}
static void route_again(Slot *s, const int *other_topk) {
    // Another micro-batch has used the dispatcher in between.
    Route other = s->route;
    if (s->table) {
        other.table = s->table + s->table_size;
        dispatch_route(&other, s->e, other_topk);
    }
    dispatch_route_again(&s->route, s->e, s->topk, &s->saved);
    dispatch_start(s->e, FORWARD, s->x, s->score);
}
static void forward(Slot *s, int C, int F) {
    s->pool = dispatch_wait(s->e, FORWARD, &s->pool_score);
    experts_up(s->H, s->A, s->pool, s->W1, &s->route.index, C, F);
    experts_down(s->Y, s->A, s->W2, &s->route.index, C, F);
    rows_weighted_sum(combine_target(s->e, FORWARD, s->y, 0, 0), s->Y, s->pool_score,
                      &s->route.index, C);
    combine_start(s->e, FORWARD, s->y, 0);
}
static void backward(Slot *s, int again, int C,
                     int F) { // again: the forward dispatch is in flight too, H is made anew
    const floatX *dpool = dispatch_wait(s->e, BACKWARD, 0);
    real *pool_dscore;
    floatX *target = combine_target(s->e, BACKWARD, s->dx, s->dscore, &pool_dscore);
    if (again) {
        s->pool = dispatch_wait(s->e, FORWARD, &s->pool_score);
        experts_up(s->H, 0, s->pool, s->W1, &s->route.index, C, F);
    }
    experts_down_backward(s->H, s->sA, pool_dscore, dpool, s->H, s->W2, s->pool_score,
                          &s->route.index, C, F);
    experts_up_backward(s->Y, s->H, s->W1, &s->route.index, C, F);
    rows_weighted_sum(target, s->Y, 0, &s->route.index, C);
    combine_start(s->e, BACKWARD, s->dx, s->dscore);
    experts_wgrad(s->dW1, s->dW2, s->pool, dpool, s->H, s->sA, &s->route.index, 0, C, F);
}
// The phases of `slots` micro-batches interleaved, as a pipelined layer issues them.
static void run(Slot *s, int slots, int again, int C, int F) {
    for (int i = 0; i < slots; i++) route_and_dispatch(s + i);
    for (int i = 0; i < slots; i++) forward(s + i, C, F);
    for (int i = 0; i < slots; i++) combine_wait(s[i].e, FORWARD);
    for (int i = 0; i < slots; i++) {
        if (again) save_route(s + i, again);
        if (again) route_again(s + i, s[i].topk_other);
        dispatch_start(s[i].e, BACKWARD, s[i].dy, 0);
    }
    for (int i = 0; i < slots; i++) backward(s + i, again, C, F);
    for (int i = 0; i < slots; i++) combine_wait(s[i].e, BACKWARD);
}
// The same layer on all tokens and experts, in this process alone.
static void solve(Problem *p, const Config *c) {
    Grid alone = { .world = 1, .dp = 1, .fsdp = 1, .ep = 1 };
    Slot s = slot_new(&alone, c, p->N);
    Problem whole = *p;
    whole.n = 1;
    whole.me = 0;
    whole.R = p->N;
    slot_load(&s, &whole);
    run(&s, 1, 0, p->C, p->F);
    size_t x = (size_t)p->N * p->C;
    size_t w = (size_t)p->E * p->F * p->C;
    get(p->y, s.y, DTYPE_FLOATX, x);
    get(p->dx, s.dx, DTYPE_FLOATX, x);
    get(p->dscore, s.dscore, DTYPE_REAL, (size_t)p->N * p->K);
    get(p->dW1, s.dW1, DTYPE_REAL, 2 * w);
    get(p->dW2, s.dW2, DTYPE_REAL, w);
    slot_free(&s);
}

// The part of a token tensor that this rank ends up with, as a whole (N, width) tensor: slices side
// by side, or with allreduce the sum over ranks of partial tensors (`partial`).
static void whole(double *out, const void *part, Dtype type, const Slot *s, const Problem *p,
                  const Grid *g, int partial, int width) {
    size_t n = (size_t)s->R * width;
    double *mine = numbers(n);
    double *all = numbers(n * p->n);
    get(mine, part, type, n);
    comm_all_gather_host(g->ep_group, all, mine, n * sizeof(double));
    if (g->dispatch != DISPATCH_ALLREDUCE)
        memcpy(out, all, n * p->n * sizeof(double));
    else
        for (size_t i = 0; i < n; i++) {
            out[i] = partial ? 0 : mine[i];
            for (int j = 0; j < p->n && partial; j++) out[i] += all[j * n + i];
        }
    free(mine);
    free(all);
}
typedef struct {
    double *y, *dx, *dscore, *dW1, *dW2;
} Answer; // as the answers of Problem, dW of the own experts
static Answer answer(const Slot *s, const Problem *p, const Grid *g) {
    size_t x = (size_t)p->N * p->C;
    size_t w = (size_t)s->experts * p->F * p->C;
    Answer a = { numbers(x), numbers(x), numbers((size_t)p->N * p->K), numbers(2 * w), numbers(w) };
    whole(a.y, s->y, DTYPE_FLOATX, s, p, g, 0, p->C);
    whole(a.dx, s->dx, DTYPE_FLOATX, s, p, g, 1, p->C);
    whole(a.dscore, s->dscore, DTYPE_REAL, s, p, g, 1, p->K);
    get(a.dW1, s->dW1, DTYPE_REAL, 2 * w);
    get(a.dW2, s->dW2, DTYPE_REAL, w);
    return a;
}
static void answer_free(Answer *a) {
    free(a->y);
    free(a->dx);
    free(a->dscore);
    free(a->dW1);
    free(a->dW2);
}
static double largest(double a, double b) {
    if (isnan(b)) return INFINITY;
    return a >= b ? a : b;
}
static double error_of(const Answer *a, const Problem *p, const Slot *s) {
    size_t x = (size_t)p->N * p->C;
    size_t w = (size_t)p->F * p->C;
    size_t first = (size_t)p->me * s->experts;
    double e = largest(distance(a->y, p->y, x), distance(a->dx, p->dx, x));
    e = largest(e, distance(a->dscore, p->dscore, (size_t)p->N * p->K));
    for (size_t i = 0; i < (size_t)s->experts;
         i++) { // per expert: one without tokens must be exactly zero (I3, unused is zero)
        e = largest(e, distance(a->dW1 + i * 2 * w, p->dW1 + (first + i) * 2 * w, 2 * w));
        e = largest(e, distance(a->dW2 + i * w, p->dW2 + (first + i) * w, w));
    }
    return e;
}

// ---- tests ----------------------------------------------------------------------------------
static void test_load(const Slot *s, const Problem *p, const Grid *g, const char *what) {
    const DispatchLoad *l = dispatch_load(s->e);
    DispatchLoad want = { 0, 0, 0, 0, 0, 0, l->reads };
    int tile = device_row_tile();
    int n = p->n;
    int local = p->E / n;
    for (int j = 0; j < n; j++) {
        int rows = 0;
        int pool = 0;
        int sent = 0;
        int received = 0;
        for (int e = j * local; e < (j + 1) * local; e++) {
            int count = 0;
            for (int i = 0; i < p->N * p->K; i++) count += p->topk[i] == e;
            rows += (count + tile - 1) / tile * tile;
        }
        for (int t = 0; t < p->N; t++) {
            int goes = 0;
            for (int k = 0; k < p->K; k++) goes |= p->topk[(size_t)t * p->K + k] / local == j;
            if (g->dispatch != DISPATCH_ALLTOALL) goes = 1;
            pool += goes;
            sent += goes && t / p->R == p->me && j != p->me;
            received += goes && t / p->R != p->me && j == p->me;
        }
        if (j == p->me) {
            want.pool = pool;
            want.rows = rows;
        }
        if (pool > want.pool_max) want.pool_max = pool;
        if (rows > want.rows_max) want.rows_max = rows;
        if (g->dispatch != DISPATCH_ALLREDUCE) {
            want.sent_rows += sent;
            want.received_rows += received;
        }
    }
    check(comm_is_local(g->ep_group) || memcmp(l, &want, sizeof want) == 0,
          "%s: pool %lld rows %lld largest %lld %lld sent %lld received %lld, want %lld %lld %lld "
          "%lld %lld %lld",
          what, (long long)l->pool, (long long)l->rows, (long long)l->pool_max,
          (long long)l->rows_max, (long long)l->sent_rows, (long long)l->received_rows,
          (long long)want.pool, (long long)want.rows, (long long)want.pool_max,
          (long long)want.rows_max, (long long)want.sent_rows, (long long)want.received_rows);
}

static void test_layers(const Config *c, const Grid grid[3], int R) {
    Problem p = problem_new(&grid[0], c, R);
    Slot slot[3];
    for (int d = 0; d < 3; d++) slot[d] = slot_new(&grid[d], c, d == DISPATCH_ALLREDUCE ? p.N : R);
    for (int routing = 0; routing < ROUTINGS; routing++) {
        Answer a[3];
        problem_fill(&p, routing, 100 + (uint64_t)routing);
        solve(&p, c);
        for (int d = 0; d < 3; d++) {
            char what[160];
            snprintf(what, sizeof what, "ep %d K %d %s, %s", p.n, c->K, dispatch_name[d],
                     routing_name[routing]);
            int64_t reads = dispatch_load(slot[d].e)->reads;
            slot_load(slot + d, &p);
            run(slot + d, 1, routing % AGAIN_WAYS, p.C, p.F);
            test_load(slot + d, &p, grid + d, what);
            // One read in forward, none in backward; test's own routing of another micro-batch
            // aside.
            reads = dispatch_load(slot[d].e)->reads - reads - (routing % AGAIN_WAYS != NOT_AGAIN);
            check(comm_is_local(grid[d].ep_group) || reads == 1, "%s: the host read %lld tables",
                  what, (long long)reads);
            a[d] = answer(slot + d, &p, grid + d);
            double e = error_of(a + d, &p, slot + d);
            double bits = 0;
            check(e <= TOLERANCE, "%s: distance to one process %.2e", what, e);
            // Rows of an expert stand in the order of the whole batch whichever way tokens travel,
            // and dy and x travel unchanged: the weight gradients are the same bits.
            size_t w = (size_t)p.F * p.C * slot[d].experts;
            size_t first = p.me * w;
            for (size_t i = 0; i < 2 * w; i++) bits += a[d].dW1[i] != p.dW1[2 * first + i];
            for (size_t i = 0; i < w; i++) bits += a[d].dW2[i] != p.dW2[first + i];
            check(bits == 0, "%s: %g elements of dW1, dW2 differ in bits from one process", what,
                  bits);
        }
        for (int d = 1; d < 3; d++) {
            double e = largest(largest(distance(a[d].y, a[0].y, (size_t)p.N * p.C),
                                       distance(a[d].dx, a[0].dx, (size_t)p.N * p.C)),
                               distance(a[d].dscore, a[0].dscore, (size_t)p.N * p.K));
            check(e <= TOLERANCE, "ep %d %s against alltoall, %s: %.2e", p.n, dispatch_name[d],
                  routing_name[routing], e);
        }
        for (int d = 0; d < 3; d++) answer_free(a + d);
    }
    for (int d = 0; d < 3; d++) slot_free(slot + d);
    problem_free(&p);
}

// 50 calls, two micro-batches in flight, another routing each time, two of three with the
// forward dispatch repeated in backward (recompute).
static void test_calls(const Config *c, const Grid *g, int R) {
    Problem p[2] = { problem_new(g, c, R), problem_new(g, c, R) };
    int tokens = g->dispatch == DISPATCH_ALLREDUCE ? p->N : R;
    Slot s[2] = { slot_new(g, c, tokens), slot_new(g, c, tokens) };
    double worst = 0;
    int pools = 0;
    int last = -1;
    for (int call = 0; call < 50; call++) {
        for (int i = 0; i < 2; i++) {
            problem_fill(p + i, (call + 3 * i) % ROUTINGS, 1000 + (uint64_t)(2 * call + i));
            solve(p + i, c);
            slot_load(s + i, p + i);
        }
        run(s, 2, call % AGAIN_WAYS, c->C, c->F);
        for (int i = 0; i < 2; i++) {
            Answer a = answer(s + i, p + i, g);
            worst = largest(worst, error_of(&a, p + i, s + i));
            answer_free(&a);
        }
        pools += s->route.index.P != last;
        last = s->route.index.P;
    }
    check(worst <= TOLERANCE, "ep %d %s, 50 calls on poisoned memory: distance %.2e", g->ep,
          dispatch_name[g->dispatch], worst);
    check(g->ep == 1 || g->dispatch != DISPATCH_ALLTOALL || pools > 15,
          "ep %d: the pool's size changed in %d of 50 calls", g->ep, pools);
    for (int i = 0; i < 2; i++) {
        slot_free(s + i);
        problem_free(p + i);
    }
}

static void test_adjoint(const Config *c, const Grid *g, int R) {
    Problem p = problem_new(g, c, R);
    int tokens = g->dispatch == DISPATCH_ALLREDUCE ? p.N : R;
    Slot s = slot_new(g, c, tokens);
    size_t x = (size_t)tokens * p.C;
    size_t k = (size_t)tokens * p.K;
    size_t bound = dispatch_pool_bound(g, tokens);
    double *X = numbers(x);
    double *Y = numbers(bound * p.C);
    double *a = numbers(bound * p.C);
    double *b = numbers(bound * p.C);
    double *score = numbers(k);
    double *D = numbers(bound * p.K);
    int *token_row = (int *)xcalloc(bound * p.K, sizeof(int), "rows");
    for (int routing = 0; routing < ROUTINGS; routing++) {
        uint64_t seed = 31 + (uint64_t)routing * 64 +
                        (uint64_t)world_rank; // other numbers on every rank, replicas too: the maps
                                              // are linear in each copy
        const real *pool_score;
        real *pool_dscore;
        problem_fill(&p, routing, 7);
        slot_load(&s, &p);
        for (size_t i = 0; i < x; i++) X[i] = quarter(&seed);
        for (size_t i = 0; i < k; i++) score[i] = quarter(&seed);
        put(s.x, DTYPE_FLOATX, X, x);
        put(s.score, DTYPE_REAL, score, k);
        route_and_dispatch(&s);
        size_t P = s.route.index.P * p.C;
        size_t PK = s.route.index.P * p.K;
        device_download(token_row, s.route.index.token_row, PK * sizeof(int));
        for (size_t i = 0; i < P; i++) Y[i] = quarter(&seed);
        for (size_t i = 0; i < PK; i++) D[i] = token_row[i] < 0 ? 0 : quarter(&seed);
        // <dispatch_F (x, score), (Y, D)> = <(x, score), combine_B (Y, D)>
        const floatX *pool = dispatch_wait(s.e, FORWARD, &pool_score);
        get(a, pool, DTYPE_FLOATX, P);
        double left = dot(a, Y, P);
        get(a, pool_score, DTYPE_REAL, PK);
        for (size_t i = 0; i < PK; i++)
            if (token_row[i] < 0) a[i] = 0; // what is not read may be anything
        double left_score = dot(a, D, PK);
        floatX *target = combine_target(s.e, BACKWARD, s.dx, s.dscore, &pool_dscore);
        put(target, DTYPE_FLOATX, Y, P);
        put(pool_dscore, DTYPE_REAL, D, PK);
        combine_start(s.e, BACKWARD, s.dx, s.dscore);
        combine_wait(s.e, BACKWARD);
        get(a, s.dx, DTYPE_FLOATX, x);
        get(b, s.dscore, DTYPE_REAL, k);
        double l = comm_sum(g->ep_group, left);
        double r = comm_sum(g->ep_group, dot(a, X, x));
        check(l == r, "ep %d %s, %s: <Sx,Y> %.17g <x,S'Y> %.17g", p.n, dispatch_name[g->dispatch],
              routing_name[routing], l, r);
        l = comm_sum(g->ep_group, left_score);
        r = comm_sum(g->ep_group, dot(b, score, k));
        check(l == r, "ep %d %s, %s: scores <Sx,Y> %.17g <x,S'Y> %.17g", p.n,
              dispatch_name[g->dispatch], routing_name[routing], l, r);
        // <combine_F Y, dy> = <Y, dispatch_B dy>
        for (size_t i = 0; i < x; i++) X[i] = quarter(&seed);
        put(combine_target(s.e, FORWARD, s.y, 0, 0), DTYPE_FLOATX, Y, P);
        combine_start(s.e, FORWARD, s.y, 0);
        combine_wait(s.e, FORWARD);
        get(a, s.y, DTYPE_FLOATX, x);
        l = comm_sum(g->ep_group, dot(a, X, x));
        put(s.dy, DTYPE_FLOATX, X, x);
        dispatch_start(s.e, BACKWARD, s.dy, 0);
        get(a, dispatch_wait(s.e, BACKWARD, 0), DTYPE_FLOATX, P);
        r = comm_sum(g->ep_group, dot(a, Y, P));
        check(l == r, "ep %d %s, %s: <combine Y,dy> %.17g <Y,dispatch dy> %.17g", p.n,
              dispatch_name[g->dispatch], routing_name[routing], l, r);
        get(b, s.dy, DTYPE_FLOATX, x);
        check(memcmp(b, X, x * sizeof(double)) == 0, "ep %d %s: dy is untouched", p.n,
              dispatch_name[g->dispatch]);
    }
    free(X);
    free(Y);
    free(a);
    free(b);
    free(score);
    free(D);
    free(token_row);
    slot_free(&s);
    problem_free(&p);
}

// Payload to other ranks of one forward and backward: the formulas of README.md with the measured
// rows.
static void test_traffic(const Config *c, const Grid *g, int R) {
    Problem p = problem_new(g, c, R);
    int64_t tokens = g->dispatch == DISPATCH_ALLREDUCE ? p.N : R;
    int64_t others = g->ep - 1;
    int64_t row = (int64_t)p.C * (int64_t)sizeof(floatX);
    int64_t ids = (int64_t)p.K * (int64_t)sizeof(real);
    Slot s = slot_new(g, c, (int)tokens);
    problem_fill(&p, RANDOM, 5);
    slot_load(&s, &p);
    for (int kind = 0; kind < COMM_KINDS; kind++) comm_traffic(g->ep_group, kind, 1);
    run(&s, 1, 0, p.C, p.F);
    int64_t sent[COMM_KINDS];
    int64_t want[COMM_KINDS] = { 0 };
    for (int kind = 0; kind < COMM_KINDS; kind++)
        sent[kind] = comm_traffic(g->ep_group, kind, 1).bytes;
    int64_t out = dispatch_load(s.e)->sent_rows;
    int64_t back = dispatch_load(s.e)->pool; // combines send back what arrived from others
    for (int r = 0; r < p.R && g->dispatch == DISPATCH_ALLTOALL; r++) {
        int own = 0;
        for (int k = 0; k < p.K; k++)
            own |= p.topk[((size_t)p.me * p.R + r) * p.K + k] / (p.E / p.n) == p.me;
        back -= own;
    }
    if (g->ep > 1 && g->dispatch == DISPATCH_ALLTOALL) {
        want[COMM_ALL_TO_ALL] = (out + back) * (2 * row + ids);
        want[COMM_ALL_GATHER] = others * tokens * p.K * 4;
    }
    if (g->ep > 1 && g->dispatch == DISPATCH_ALLGATHER) {
        want[COMM_ALL_GATHER] = others * tokens * (2 * row + ids + p.K * 4);
        want[COMM_REDUCE_SCATTER] = others * tokens * (2 * row + ids);
    }
    for (int kind = 0; kind < COMM_KINDS; kind++)
        if (kind != COMM_ALL_REDUCE)
            check(sent[kind] == want[kind], "ep %d %s: collective %d sent %lld bytes, formula %lld",
                  p.n, dispatch_name[g->dispatch], kind, (long long)sent[kind],
                  (long long)want[kind]);
    // An all-reduce is a reduce-scatter and an all-gather of pieces, which need not be equal: the
    // formula holds for the group.
    double group = comm_sum(g->ep_group, (double)sent[COMM_ALL_REDUCE]);
    double formula =
        g->ep > 1 && g->dispatch == DISPATCH_ALLREDUCE ? 2.0 * 2 * others * tokens * row : 0;
    check(group == formula, "ep %d %s: all-reduces of the group sent %.0f bytes, formula %.0f", p.n,
          dispatch_name[g->dispatch], group, formula);
    slot_free(&s);
    problem_free(&p);
}

// The drawing of README.md: 2 ranks, 6 tokens a to f, 4 experts, 2 a token. Every array is what the
// page shows.
static int same(const int *device, const int *want, int n) {
    int got[16];
    device_download(got, device, n * sizeof(int));
    return memcmp(got, want, n * sizeof(int)) == 0;
}
static void test_picture(const Config *base, const Grid *g) {
    static const int topk[2][6] = { { 0, 1, 1, 3, 2, 3 }, { 0, 2, 2, 3, 0, 1 } };
    static const int row_token[2][6] = { { 0, 2, 3, 0, 1, 3 }, { 1, 2, 3, 0, 1, 3 } };
    static const int expert_row[3] = { 0, 3, 6 };
    static const int token_row[2][8] = { { 0, 3, 4, -1, 1, -1, 2, 5 },
                                         { -1, 3, 0, 4, -1, 1, 2, 5 } };
    static const double x[2][3] = { { 1, 2, 3 }, { 4, 5, 6 } };
    static const double pool[2][4] = { { 1, 2, 4, 6 }, { 2, 3, 4, 5 } };
    static const double sum[2][3] = { { 1, 4, 3 }, { 8, 5, 6 } };
    Config c = *base;
    c.C = 1;
    c.E = 4;
    c.K = 2;
    Slot s = slot_new(g, &c, 3);
    double got[4];
    double score[6] = { 0 };
    int me = g->ep_rank;
    device_upload(s.topk, topk[me], sizeof topk[me]);
    put(s.x, DTYPE_FLOATX, x[me], 3);
    put(s.score, DTYPE_REAL, score, 6);
    route_and_dispatch(&s);
    const floatX *arrived = dispatch_wait(s.e, FORWARD, 0);
    check(s.route.index.P == 4 && dispatch_load(s.e)->sent_rows == 2,
          "picture: %lld pool tokens, %lld sent", (long long)s.route.index.P,
          (long long)dispatch_load(s.e)->sent_rows);
    if (device_row_tile() == 1)
        check(same(s.route.index.row_token, row_token[me], 6) &&
                  same(s.route.index.token_row, token_row[me], 8) &&
                  same(s.route.index.expert_row, expert_row, 3),
              "picture: plan");
    get(got, arrived, DTYPE_FLOATX, 4);
    check(memcmp(got, pool[me], sizeof got) == 0, "picture: pool %g %g %g %g", got[0], got[1],
          got[2], got[3]);
    put(combine_target(s.e, FORWARD, s.y, 0, 0), DTYPE_FLOATX, pool[me],
        4); // experts that hand back what they got: y = x times the ranks visited
    combine_start(s.e, FORWARD, s.y, 0);
    combine_wait(s.e, FORWARD);
    get(got, s.y, DTYPE_FLOATX, 3);
    check(memcmp(got, sum[me], 3 * sizeof(double)) == 0, "picture: sums %g %g %g", got[0], got[1],
          got[2]);
    slot_free(&s);
}

static void test_heads(const Config *c, const Grid *g, int R) {
    Arena arena = arena_counting("heads");
    int rows = heads_rows(g, R);
    int n = g->ep;
    int C = c->C;
    int same = g->dispatch == DISPATCH_ALLREDUCE;
    size_t x = (size_t)R * C;
    size_t all = (size_t)rows * C;
    Heads *h = 0;
    floatX *dx = 0;
    floatX *out = 0;
    for (int commit = 0; commit < 2; commit++) {
        heads_free(h);
        h = heads_create(g, c, R, &arena);
        dx = ARENA_TAKE(&arena, floatX, x, "t");
        out = ARENA_TAKE(&arena, floatX, x, "t");
        if (!commit) arena_commit(&arena);
    }
    check((h == 0) == comm_is_local(g->ep_group), "ep %d: heads exist where they are split", n);
    poison(&arena);
    double *X = numbers(x);
    double *Y = numbers(all);
    double *a = numbers(all);
    double *gathered = numbers(x * n);
    double *parts = numbers(all * n);
    uint64_t seed = 99 + (uint64_t)world_rank;
    for (size_t i = 0; i < x; i++) X[i] = quarter(&seed);
    for (size_t i = 0; i < all; i++) Y[i] = quarter(&seed);
    comm_all_gather_host(g->ep_group, gathered, X, x * sizeof(double));
    comm_all_gather_host(g->ep_group, parts, Y, all * sizeof(double));
    put(dx, DTYPE_FLOATX, X, x);
    get(a, heads_gather(h, dx), DTYPE_FLOATX, all);
    check(memcmp(a, same ? X : gathered, all * sizeof(double)) == 0,
          "heads ep %d %s: gathered tokens", n, dispatch_name[g->dispatch]);
    double left = comm_sum(g->ep_group, dot(a, Y, all));
    put(heads_gather_target(h, out), DTYPE_FLOATX, Y, all);
    heads_gather_adjoint(h, out);
    get(a, out, DTYPE_FLOATX, x);
    double right = comm_sum(g->ep_group, dot(a, X, x));
    check(left == right, "heads ep %d %s: <gather x,Y> %.17g <x,adjoint Y> %.17g", n,
          dispatch_name[g->dispatch], left, right);

    put(heads_target(h, out), DTYPE_FLOATX, Y, all);
    heads_reduce(h, out);
    get(a, out, DTYPE_FLOATX, x);
    int wrong = 0;
    for (size_t i = 0; i < x; i++) {
        double sum = 0;
        for (int j = 0; j < n; j++) sum += parts[j * all + (same ? 0 : g->ep_rank * x) + i];
        wrong += sum != a[i];
    }
    check(!wrong, "heads ep %d %s: %d sums of partial outputs are wrong", n,
          dispatch_name[g->dispatch], wrong);
    left = comm_sum(g->ep_group, dot(a, X, x));
    get(a, heads_reduce_adjoint(h, dx), DTYPE_FLOATX, all);
    right = comm_sum(g->ep_group, dot(a, Y, all));
    check(left == right, "heads ep %d %s: <reduce Y,dy> %.17g <Y,adjoint dy> %.17g", n,
          dispatch_name[g->dispatch], left, right);
    get(a, dx, DTYPE_FLOATX, x);
    check(memcmp(a, X, x * sizeof(double)) == 0,
          "heads ep %d %s: the incoming gradient is untouched", n, dispatch_name[g->dispatch]);
    free(X);
    free(Y);
    free(a);
    free(gathered);
    free(parts);
    heads_free(h);
    arena_free(&arena);
}

int main(int argc, char **argv) {
    comm_init(&argc, &argv);
    int world = comm_world_size();
    world_rank = comm_world_rank();
    device_init(comm_local_rank(), 1);
    int force = argc > 1 && strcmp(argv[1], "--force-comm") ==
                                0; // one rank: the exchange with itself instead of nothing
    comm_start((CommOptions){ .timeout = 60, .force = force, .check = 1 });
    unsigned char is_moe[1] = { 1 };
    Arena memory = arena_counting("scratch");
    Arena staging[12];
    int n_staging = 0;
    for (int commit = 0; commit < 2; commit++) {
        scratch = (char *)arena_take(&memory, 1 << 20, "conversion");
        if (!commit) arena_commit(&memory);
    }
    // Heads and experts divide by the ranks (12: 1, 2, 3, 4, 6); sizes are not multiples of
    // anything a kernel likes. K = 1: one destination per token.
    int many = 12 % world ? 3 * world : 12;
    Config config[2] = { { .C = 20,
                           .L = 1,
                           .H = many,
                           .KV = many,
                           .D = 4,
                           .V = 32,
                           .E = many,
                           .K = 3,
                           .F = 10,
                           .I = 8,
                           .is_moe = is_moe,
                           .n_moe = 1 } };
    config[1] = config[0];
    config[1].K = 1;
    for (int ep = world; ep > 1 || ep == world;
         ep = ep == 4 ? 2 : 0) // 4 ranks: ep 4, then two ep groups of 2
        for (int k = 0; k < 2; k++) {
            Grid grid[3];
            for (int d = 0; d < 3; d++)
                grid[d] = grid_build(config + k, world / ep, 1, ep, (Dispatch)d, 1);
            everyone = grid[0].all;
            for (int d = 0; d < 3; d++) { // staging of sums that outlives the arenas of the tests
                Arena *a = staging + n_staging++;
                for (int commit = 0; commit < 2; commit++) {
                    if (!commit) *a = arena_counting("staging");
                    comm_reserve(grid[d].ep_group, 1 << 20, a);
                    if (!commit) arena_commit(a);
                }
            }
            for (int d = 0; d < 3; d++) {
                test_adjoint(config + k, grid + d, 13);
                test_traffic(config + k, grid + d, 13);
            }
            if (ep == 2 && k == 0) test_picture(config, grid + DISPATCH_ALLTOALL);
            test_layers(config + k, grid, 13);
            for (int d = 0; d < 3; d++) {
                test_calls(config + k, grid + d, 9);
                test_heads(config + k, grid + d, 7);
            }
        }
    if (world_rank == 0)
        printf("test_dispatch, %d rank%s%s, %s: %d passed, %d failed\n", world,
               world == 1 ? "" : "s", force ? ", --force-comm" : "", PRECISION_NAME, passed,
               failed);
    comm_finish();
    while (n_staging) arena_free(staging + --n_staging);
    arena_free(&memory);
    device_finish();
    return failed != 0;
}
