// How fast one process trains, and how fast each kernel is, against the matrix product of this
// machine. `make bench-cpu` builds and runs it (dev/bench_cpu.sh).
//
//   bench_cpu tokens FILE VOCABULARY N        writes N random token ids as an llm.c shard (uint16)
//   bench_cpu step DIR FILE [options]         updates of a checkpoint: one line of JSON
//   bench_cpu kernels DIR [options]           every kernel at the shapes of that model: a table
//       --seq-len 512 --batch 8 --steps 8 --warmup 3 --threads 0 --embed 1 --skew 1
//
// The peak is device_peak_flops(): square products, one on each thread, best of 0.2 s; it is
// measured before and after every update, because other programs and the clock of the processor
// change it within seconds, and an update is judged by the mean of its two neighbours. Model FLOPs
// of a token: config_flops_per_token = 6 x parameters a token meets in matrix products + 12 x
// layers x heads x head_dim x T / 2. Two scalings of the checkpoint, in memory, the same in
// dev/hf/bench.py: --embed S multiplies the embedding, so that what a token routes to is decided by
// the token and not by what its neighbours share (near-balanced with random tokens); --skew S
// multiplies the router's rows of the first eighth of the experts: their logits dispatch S times as
// far, so they are chosen more often.
#define _GNU_SOURCE
#include "../kernels/cpu/gemm.h"
#include "../kernels/fail.h"
#include "../model/checkpoint.h"
#include "../model/profile.h"
#include "../model/step.h"
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>

typedef struct {
    int T, batch, steps, warmup, threads;
    double embed, skew;
} Bench;

static void write_tokens(const char *path, int vocabulary, int n) {
    FILE *f = fopen(path, "wb");
    if (!f) die("cannot write %s|name a file in a writable folder", path);
    int32_t head[256] = { 20240520, 1, n, vocabulary };
    fwrite(head, sizeof head, 1, f);
    uint64_t x = 1;
    for (int i = 0; i < n; i++) {
        x = x * 6364136223846793005ull +
            1442695040888963407ull; // Knuth's MMIX constants; the high bits are the good ones
        uint16_t id = (uint16_t)((x >> 33) % (uint64_t)vocabulary);
        fwrite(&id, sizeof id, 1, f);
    }
    if (fclose(f)) die("cannot write %s|free space", path);
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}
static double median(double *x, int n) {
    qsort(x, (size_t)n, sizeof *x, by_value);
    return n % 2 ? x[n / 2] : 0.5 * (x[n / 2 - 1] + x[n / 2]);
}

// ---- the whole update -----------------------------------------------------------------------
static void scale(Trainer *t, ParamId id, int layer, int64_t n, double factor) {
    const Param *p = model_param(t->m, id, layer);
    if (!p || factor == 1) return;
    floatX *w = t->optimizer.state[p->block].param + p->offset;
    for (int64_t i = 0; i < n; i++) store(w + i, load(w + i) * (real)factor);
}

static Trainer *start(Model *m, Grid *grid, const Bench *b, const char *dir) {
    *grid = grid_build(&m->c, 1, 1, 1, DISPATCH_ALLTOALL, 0);
    *m = model_build(m->c, grid_shard_spec(grid));
    StepOptions s = { .T = b->T,
                      .batch = b->batch,
                      .rounds = 1,
                      .clip = 1,
                      .aux_coef = m->c.aux_coef,
                      .ignore_target = -2,
                      .seed = 1 };
    OptimizerOptions o = {
        .kind = OPT_ADAMW, .lr = 1e-5, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .master = 1
    };
    Trainer *t = trainer_create(m, grid, s, o, 0, 0);
    Arena staging = arena_counting("checkpoint");
    checkpoint_free(checkpoint_create(m, grid->all, 1, &staging));
    arena_commit(&staging);
    Checkpoint *k = checkpoint_create(m, grid->all, 1, &staging);
    checkpoint_load_model(k, dir, t->optimizer.state);
    checkpoint_free(k);
    arena_free(&staging);
    const Config *c = &m->c;
    scale(t, P_EMBED, -1, (int64_t)c->V * c->C, b->embed);
    for (int l = 0; l < c->L; l++) scale(t, P_ROUTER, l, c->E / 8 * c->C, b->skew);
    return t;
}

static void bench_step(Model *m, const Bench *b, const char *dir, const char *tokens) {
    Grid grid;
    Trainer *t = start(m, &grid, b, dir);
    LoaderOptions options = { b->T, 1, 0, m->c.V, LOSS_MASK_AUTO, 0 };
    Loader *data = loader_open(&tokens, 1, options);
    double *seconds = (double *)xmalloc(3 * (size_t)b->steps * sizeof(double), "timings"),
           *peak = seconds + b->steps, *share = peak + b->steps;
    double flops = config_flops_per_token(&m->c, b->T) * b->T * b->batch, before = 0, load = 0,
           first_loss = 0;
    StepResult r = { 0 };
    for (int i = -b->warmup; i < b->steps; i++) {
        if (i == 0) before = device_peak_flops();
        double begin = now_seconds();
        r = trainer_step(t, data, i + b->warmup + 1, 1e-5);
        if (i == -b->warmup) first_loss = r.loss;
        if (i < 0) continue;
        seconds[i] = now_seconds() - begin;
        double after = device_peak_flops();
        peak[i] = 0.5 * (before + after);
        share[i] = flops / seconds[i] / peak[i];
        before = after;
        load += r.expert_load_max / b->steps;
    }
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    double s = median(seconds, b->steps);
    printf("{\"who\":\"moe.c\",\"skew\":%g,\"tokens\":%d,\"steps\":%d,\"seconds\":%.6g,\"tok_s\":%."
           "6g,\"gflops\":%.6g,\"peak_gflops\":%.6g,\"share\":%.4g,\"fastest\":%.6g,"
           "\"load\":%.4g,\"first_loss\":%.9g,\"memory_mib\":%.5g,\"flops_per_token\":%.9g,"
           "\"device\":\"%s\"}\n",
           b->skew, b->T * b->batch, b->steps, s, b->T * b->batch / s, flops / s * 1e-9,
           median(peak, b->steps) * 1e-9, median(share, b->steps), seconds[0], load, first_loss,
           (double)usage.ru_maxrss / 1024, config_flops_per_token(&m->c, b->T), device_describe());
    fflush(stdout);
    Profile *profile = profile_start(t->g->all);
    trainer_step(t, data, b->warmup + b->steps + 1, 1e-5);
    fprintf(stderr, "kernels of one update\n");
    profile_print(profile, stderr);
    profile_free(profile);
    free(seconds);
    loader_close(data);
    trainer_free(t);
}

// ---- single kernels -------------------------------------------------------------------------
static double table_total, table_peak;

static void row(const char *name, double calls, double flops, double bytes, double seconds) {
    char rate[64];
    if (flops > 0)
        snprintf(rate, sizeof rate, "%8.1f GFLOP/s %5.1f %%", flops / seconds * 1e-9,
                 100 * flops / seconds / table_peak);
    else
        snprintf(rate, sizeof rate, "%8.1f GB/s", bytes / seconds * 1e-9);
    printf("| %-34s | %8.3f | %5.0f | %9.2f | %-26s |\n", name, 1e3 * seconds, calls,
           1e3 * seconds * calls, rate);
    table_total += seconds * calls;
}
// Median of at least 5 calls and 0.1 s; the first call is not counted. calls: in one update. flops,
// bytes: of one call, bytes as if each operand moved once.
#define KERNEL(name, calls, flops, bytes, call)                        \
    do {                                                               \
        double times_[1000];                                           \
        int n_ = 0;                                                    \
        call;                                                          \
        for (double begin_ = now_seconds();                            \
             n_ < 1000 && (n_ < 5 || now_seconds() - begin_ < 0.1);) { \
            double at_ = now_seconds();                                \
            call;                                                      \
            times_[n_++] = now_seconds() - at_;                        \
        }                                                              \
        row(name, calls, flops, bytes, median(times_, n_));            \
    } while (0)

static floatX *normal(Arena *a, size_t n, uint64_t key) {
    floatX *x = ARENA_TAKE(a, floatX, n, "x");
    Segment s = { .tensor = key, .first = 0, .count = (int64_t)n, .offset = 0 };
    if (x) init_segments(x, 0, &s, 1, 7, 0.1);
    return x;
}

static void kernels(const Config *c, const Trainer *t, const Bench *b, Arena *arena) {
    const int T = b->T, B = b->batch, R = T * B, C = c->C, Q = c->H * c->D, KV = c->KV * c->D,
              E = c->E, K = c->K, F = c->F, V = c->V, M = row_index_bound(R, K, E);
    const int chunk = t->head.chunk < R ? t->head.chunk : R;
    const double L = c->n_moe, chunks = (double)R / chunk, x = sizeof(floatX), g = sizeof(gradX);
    const double RC = (double)R * C, rows = (double)R * K;
    floatX *h = normal(arena, (size_t)R * C, 1), *y = normal(arena, (size_t)R * C, 2),
           *dy = normal(arena, (size_t)R * C, 3), *w = normal(arena, (size_t)C, 4);
    floatX *q = normal(arena, (size_t)R * Q, 5), *k = normal(arena, (size_t)R * KV, 6),
           *v = normal(arena, (size_t)R * KV, 7), *qn = normal(arena, (size_t)R * Q, 8);
    floatX *kn = normal(arena, (size_t)R * KV, 9), *o = normal(arena, (size_t)R * Q, 10),
           *dq = normal(arena, (size_t)R * Q, 11), *dk = normal(arena, (size_t)R * KV, 12);
    floatX *dv = normal(arena, (size_t)R * KV, 13), *Wq = normal(arena, (size_t)Q * C, 14),
           *Wr = normal(arena, (size_t)E * C, 15), *W1 = normal(arena, (size_t)E * 2 * F * C, 16);
    floatX *W2 = normal(arena, (size_t)E * C * F, 17), *H = normal(arena, (size_t)M * 2 * F, 18),
           *dH = normal(arena, (size_t)M * 2 * F, 19), *A = normal(arena, (size_t)M * F, 20);
    floatX *Y = normal(arena, (size_t)M * C, 21), *We = normal(arena, (size_t)V * C, 22),
           *logits = normal(arena, (size_t)chunk * V, 23);
    gradX *dW1 = ARENA_TAKE(arena, gradX, (size_t)E * 2 * F * C, "x"),
          *dW2 = ARENA_TAKE(arena, gradX, (size_t)E * C * F, "x"),
          *dWe = ARENA_TAKE(arena, gradX, (size_t)V * C, "x");
    gradX *dW = ARENA_TAKE(arena, gradX, (size_t)(Q > E ? Q : E) * C, "x"),
          *dw = ARENA_TAKE(arena, gradX, C, "x");
    real *cosine = ARENA_TAKE(arena, real, (size_t)T * c->D, "x"),
         *sine = ARENA_TAKE(arena, real, (size_t)T * c->D, "x"),
         *rstd = ARENA_TAKE(arena, real, R, "x");
    real *lse = ARENA_TAKE(arena, real, (size_t)R * c->H, "x"),
         *z = ARENA_TAKE(arena, real, (size_t)R * E, "x"),
         *dz = ARENA_TAKE(arena, real, (size_t)R * E, "x");
    real *score = ARENA_TAKE(arena, real, (size_t)R * K, "x"),
         *dscore = ARENA_TAKE(arena, real, (size_t)R * K, "x"),
         *norm = ARENA_TAKE(arena, real, 2, "x");
    int *ids = ARENA_TAKE(arena, int, R, "x"), *topk = ARENA_TAKE(arena, int, (size_t)R *K, "x");
    double *share = ARENA_TAKE(arena, double, E, "x"), *loss = ARENA_TAKE(arena, double, 1, "x");
    double *sums = ARENA_TAKE(arena, double, 1 << 16, "x");
    void *workspace = arena_take(arena, attention_workspace(B, T, c->H, c->KV, c->D), "x");
    RowIndex plan = { ARENA_TAKE(arena, int, M, "x"),
                      ARENA_TAKE(arena, int, (size_t)R *K, "x"),
                      ARENA_TAKE(arena, int, E + 1, "x"),
                      M,
                      R,
                      E,
                      K };
    RouterStats stats = { ARENA_TAKE(arena, int64_t, E, "x"), ARENA_TAKE(arena, double, E, "x"),
                          ARENA_TAKE(arena, double, 2, "x") };
    int64_t largest = 0;
    for (int i = 0; i < t->m->n_blocks; i++)
        if (t->m->block[i].shard > largest) largest = t->m->block[i].shard;
    gradX *grad = ARENA_TAKE(arena, gradX, largest, "x"); // zeros serve every block
    if (!arena->base) return;                             // the counting pass
    for (int i = 0; i < R; i++) ids[i] = (int)((int64_t)i * 2654435761u % V);
    for (int i = 0; i < E / 8 * C; i++) store(Wr + i, load(Wr + i) * (real)b->skew);
    rope_table(cosine, sine, c->rope_theta, T, c->D);

    table_peak = device_peak_flops();
    printf("sgemm on %d threads: %.1f GFLOP/s (side 512, one product a thread)\n\n", thread_count(),
           table_peak * 1e-9);
    printf("| kernel                             |  ms/call | calls | ms/update | rate             "
           "          |\n|---|---|---|---|---|\n");
    KERNEL("embed_forward", 1, 0, 2 * RC * x, embed_forward(h, ids, We, R, C));
    KERNEL("embed_backward", 1, 0, RC * x + (double)V * C * g,
           embed_backward(dWe, dy, ids, 0, -1, R, V, C));
    KERNEL("rmsnorm_forward", 4 * L + chunks, 0, 2 * RC * x,
           rmsnorm_forward(y, rstd, h, w, (real)1e-6, R, C));
    KERNEL("rmsnorm_backward", 2 * L + 1, 0, 4 * RC * x,
           rmsnorm_backward(y, dw, dy, dy, h, w, rstd, 0, R, C));
    KERNEL("add (residual)", 2 * L, 0, 3 * RC * x, add(y, h, dy, (size_t)R * C));
    KERNEL("linear_forward q, o", 2 * L, 2 * RC * Q, 0, linear_forward(q, h, Wq, R, Q, C));
    KERNEL("linear_forward k, v", 2 * L, 2 * RC * KV, 0, linear_forward(k, h, Wq, R, KV, C));
    KERNEL("linear_backward_input q, o", 2 * L, 2 * RC * Q, 0,
           linear_backward_input(y, q, Wq, R, Q, C));
    KERNEL("linear_backward_input_add k, v", 2 * L, 2 * RC * KV, 0,
           linear_backward_input_add(y, k, Wq, R, KV, C));
    KERNEL("linear_backward_weight q, o", 2 * L, 2 * RC * Q, 0,
           linear_backward_weight(dW, q, h, 0, R, Q, C));
    KERNEL("linear_backward_weight k, v", 2 * L, 2 * RC * KV, 0,
           linear_backward_weight(dW, k, h, 0, R, KV, C));
    KERNEL("qk_norm_rope_forward", L, 0, 2.0 * R * (Q + KV) * x,
           qk_norm_rope_forward(qn, kn, q, k, w, w, cosine, sine, 0, (real)1e-6, R, T, c->H, c->KV,
                                c->D));
    KERNEL("qk_norm_rope_backward", L, 0, 3.0 * R * (Q + KV) * x,
           qk_norm_rope_backward(dq, dk, dw, dw + c->D, qn, kn, q, k, w, w, cosine, sine, 0,
                                 (real)1e-6, 0, R, T, c->H, c->KV, c->D));
    KERNEL("attention_forward (causal half)", L, 2.0 * R * T * Q, 0,
           attention_forward(o, lse, qn, kn, v, 0, workspace, B, T, c->H, c->KV, c->D));
    KERNEL("attention_backward (causal half)", L, 4.0 * R * T * Q, 0,
           attention_backward(dq, dk, dv, q, o, lse, qn, kn, v, 0, workspace, B, T, c->H, c->KV,
                              c->D));
    KERNEL("router_forward", L, 2 * RC * E, 0,
           router_forward(z, topk, score, stats, h, Wr, 0, 0, c->norm_topk, R, C, E, K));
    router_share(share, stats.count, R, 1, E);
    for (int i = 0; i < R * K; i++) dscore[i] = (real)0.01 * (real)(i % 7);
    KERNEL("router_backward_add", L, 4 * RC * E, 0,
           router_backward_add(y, dW, dz, dscore, z, topk, score, h, Wr, share, 1e-3, 0,
                               c->norm_topk, 0, R, C, E, K));
    KERNEL("row_index_build", 2 * L, 0, 3 * rows * sizeof(int), row_index_build(&plan, topk, 0));
    KERNEL("experts_up", L, 4 * rows * F * C, 0, experts_up(H, A, h, W1, &plan, C, F));
    KERNEL("experts_down", L, 2 * rows * F * C, 0, experts_down(Y, A, W2, &plan, C, F));
    KERNEL("rows_weighted_sum", 2 * L, 0, (rows + R) * C * x,
           rows_weighted_sum(y, Y, score, &plan, C));
    KERNEL("experts_down_backward", L, 2 * rows * F * C, 0,
           experts_down_backward(dH, A, dscore, dy, H, W2, score, &plan, C, F));
    KERNEL("experts_up_backward", L, 4 * rows * F * C, 0,
           experts_up_backward(Y, dH, W1, &plan, C, F));
    KERNEL("experts_wgrad", L, 6 * rows * F * C, 0,
           experts_wgrad(dW1, dW2, h, dy, dH, A, &plan, 0, C, F));
    double head = 2.0 * chunk * C * V;
    KERNEL("linear_forward head", chunks, head, 0, linear_forward(logits, h, We, chunk, V, C));
    KERNEL("cross_entropy", chunks, 0, 2.0 * chunk * V * x,
           cross_entropy(logits, loss, ids, (real)1 / R, 1, chunk, V));
    KERNEL("linear_backward_input head", chunks, head, 0,
           linear_backward_input(y, logits, We, chunk, V, C));
    KERNEL("linear_backward_weight head", chunks, head, 0,
           linear_backward_weight(dWe, logits, h, 1, chunk, V, C));
    double n = config_total_parameters(c);
    norm[0] = 1;
#define EVERY_BLOCK(call) \
    for (int i = 0; i < t->m->n_blocks; i++) call
    KERNEL("gradient_squares", 1, 0, n * g,
           EVERY_BLOCK(
               gradient_squares(sums, grad, t->m->block[i].segment, t->m->block[i].n_segments)));
    KERNEL("optimizer_update (AdamW)", 1, 0, n * (2 * x + g + 4 * sizeof(real)),
           EVERY_BLOCK(optimizer_step((Optimizer *)&t->optimizer, i, grad, 1e-5, 2, 2, 1, norm)));
    printf("\nsum over an update: %.0f ms; with model FLOPs that is %.1f %% of the sgemm measured "
           "here\n",
           1e3 * table_total, 100 * config_flops_per_token(c, T) * R / table_total / table_peak);
    printf("one sgemm a thread (M = N = K):");
    for (int side = 64; side <= 2048; side *= 2) {
        size_t size = (size_t)side * side;
        real *s = (real *)xmalloc(3 * size * (size_t)thread_count() * sizeof(real), "matrices"),
             best = 0;
        for (size_t i = 0; i < 3 * size * (size_t)thread_count(); i++) s[i] = (real)(i % 5);
        for (double begin = now_seconds(), at; now_seconds() - begin < 0.2;) {
            at = now_seconds();
            PARALLEL_FOR
            for (int j = 0; j < thread_count(); j++) {
                real *a = s + 3 * size * (size_t)j;
                gemm(0, 1, side, side, side, a, side, a + size, side, 0, a + 2 * size, side);
            }
            real speed =
                (real)(2.0 * (double)size * side * thread_count() / (now_seconds() - at) * 1e-9);
            if (speed > best) best = speed;
        }
        printf(" %d: %.0f", side, (double)best);
        free(s);
    }
    printf(" GFLOP/s\n");
}

static void bench_kernels(Model *m, const Bench *b, const char *dir) {
    if (m->c.n_moe != m->c.L)
        die("%s has dense layers|the table is of a model whose layers all have experts", dir);
    Grid grid;
    Trainer *t = start(m, &grid, b, dir);
    Arena arena = arena_counting("kernels");
    kernels(&m->c, t, b, &arena);
    arena_commit(&arena);
    kernels(&m->c, t, b, &arena);
    arena_free(&arena);
    trainer_free(t);
}

int main(int argc, char **argv) {
    device_prepare(argv);
    if (argc == 5 && !strcmp(argv[1], "tokens")) {
        write_tokens(argv[2], atoi(argv[3]), atoi(argv[4]));
        return 0;
    }
    int step = argc > 3 && !strcmp(argv[1], "step"),
        kernel = argc > 2 && !strcmp(argv[1], "kernels");
    if (!step && !kernel) die("nothing to do|see the first lines of dev/bench_cpu.c");
    Bench b = {
        .T = 512, .batch = 8, .steps = 8, .warmup = 3, .threads = 0, .embed = 1, .skew = 1
    };
    for (int i = step ? 4 : 3; i < argc; i += 2) {
        const char *name = argv[i], *value = i + 1 < argc ? argv[i + 1] : "";
        if (!strcmp(name, "--seq-len"))
            b.T = atoi(value);
        else if (!strcmp(name, "--batch"))
            b.batch = atoi(value);
        else if (!strcmp(name, "--steps"))
            b.steps = atoi(value);
        else if (!strcmp(name, "--warmup"))
            b.warmup = atoi(value);
        else if (!strcmp(name, "--threads"))
            b.threads = atoi(value);
        else if (!strcmp(name, "--embed"))
            b.embed = atof(value);
        else if (!strcmp(name, "--skew"))
            b.skew = atof(value);
        else
            die("unknown option %s|see the first lines of dev/bench_cpu.c", name);
    }
    if (b.T < 1 || b.batch < 1 || b.steps < 1 || b.warmup < 0 || b.embed <= 0 || b.skew <= 0)
        die("a number is missing or out of range|see the first lines of dev/bench_cpu.c");
    comm_init(&argc, &argv);
    CommOptions comm = { 600, 0, 0 };
    comm_start(comm);
    device_init(0, grid_threads(b.threads));
    char *path = xasprintf("%s/config.json", argv[2]);
    Model m = { .c = config_read(path) };
    free(path);
    if (step)
        bench_step(&m, &b, argv[2], argv[3]);
    else
        bench_kernels(&m, &b, argv[2]);
    model_free(&m);
    device_finish();
    comm_finish();
    return 0;
}
