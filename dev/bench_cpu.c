// How fast one process trains, and how fast each kernel is, against the matrix product of this
// machine. `make bench-cpu` builds and runs it (dev/bench_cpu.sh).
//
//   bench_cpu tokens FILE VOCABULARY N        writes N random token ids as an llm.c shard (uint16)
//   bench_cpu step DIR FILE [options]         updates of a checkpoint: one line of JSON
//   bench_cpu kernels DIR [options]           every kernel at the shapes of that model: a table
//       --seq-len 512 --batch 8 --steps 8 --warmup 3 --threads 0 --embed 1 --skew 1
//       --optimizer adamw|adamw8bit         adamw8bit: without master weights, the least memory
//
// The peak is device_peak_flops(): square products, one on each thread, best of 0.2 s; it is
// measured before and after every update, because other programs and the clock of the processor
// change it within seconds, and an update is judged by the mean of its two neighbours. A kernel is
// judged by its ceiling, which takes turns with it: BLAS's fp32 products of the shapes that one
// task of the kernel multiplies, or a copy of as many bytes as the kernel moves if each operand
// moves once. The share is the median over the turns; it may pass 100 % (a copy's target is not in
// the cache, a kernel's often is). attention_backward counts five products, one of them the second
// making of the scores. Model FLOPs of a token: config_flops_per_token = 6 x parameters a token
// meets in matrix products + 12 x layers x heads x head_dim x T / 2. Two scalings of the
// checkpoint, in memory, the same in dev/hf/bench.py: --embed S multiplies the embedding, so that
// what a token routes to is decided by the token and not by what its neighbours share
// (near-balanced with random tokens); --skew S multiplies the router's rows of the first eighth of
// the experts: their logits spread S times as far, so they are chosen more often.
#define _GNU_SOURCE
#include "../kernels/cpu/gemm.h"
#include "../kernels/fail.h"
#include "../model/checkpoint.h"
#include "../model/inspect.h"
#include "../model/step.h"
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>

typedef struct {
    int T, batch, steps, warmup, threads, small;
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
    double x = *(const double *)a;
    double y = *(const double *)b;
    return (x > y) - (x < y);
}
static double median(double *x, int n) {
    qsort(x, n, sizeof *x, by_value);
    return n % 2 ? x[n / 2] : 0.5 * (x[n / 2 - 1] + x[n / 2]);
}

// ---- the whole update -----------------------------------------------------------------------
static void scale(Trainer *t, ParamId id, int layer, int64_t n, double factor) {
    const Param *p = model_param(t->m, id, layer);
    if (!p || factor == 1) return;
    const OptimizerState *state = t->optimizer.state + p->block;
    floatX *w = state->param + p->offset;
    for (int64_t i = 0; i < n; i++) store(w + i, load(w + i) * (real)factor);
    // The next update makes the weights from their fp32 masters, where there are any.
    for (int64_t i = 0; state->master && i < n; i++) state->master[p->offset + i] *= (real)factor;
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
    if (b->small) {
        o.kind = OPT_ADAMW8;
        o.master = 0;
    }
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
    double *seconds = (double *)xmalloc(3 * (size_t)b->steps * sizeof(double), "timings");
    double *peak = seconds + b->steps;
    double *share = peak + b->steps;
    double flops = config_flops_per_token(&m->c, b->T) * b->T * b->batch;
    double before = 0;
    double load = 0;
    double first_loss = 0;
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
    printf(
        "{\"who\":\"moe.c%s\",\"skew\":%g,\"tokens\":%d,\"steps\":%d,\"seconds\":%.6g,\"tok_s\":%."
        "6g,\"gflops\":%.6g,\"peak_gflops\":%.6g,\"share\":%.4g,\"fastest\":%.6g,"
        "\"load\":%.4g,\"first_loss\":%.9g,\"memory_mib\":%.5g,\"flops_per_token\":%.9g,"
        "\"device\":\"%s\"}\n",
        b->small ? ", adamw8bit" : "", b->skew, b->T * b->batch, b->steps, s, b->T * b->batch / s,
        flops / s * 1e-9, median(peak, b->steps) * 1e-9, median(share, b->steps), seconds[0], load,
        first_loss, (double)usage.ru_maxrss / 1024, config_flops_per_token(&m->c, b->T),
        device_describe());
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
// A product C (m,n) = op(A) op(B) that a kernel makes `times` times for one measure of its work.
typedef struct {
    int ta, tb;
    int64_t m, n, k, times;
} Product;
enum { SAMPLES = 1000, PRODUCTS = 3 };
// One row of the table while it is measured. A kernel and its ceiling take turns.
typedef struct {
    const char *name;
    double calls, flops, bytes; // calls in one update; flops or bytes of one call
    Product product[PRODUCTS];
    real *memory;
    int n;
    double begin, at, seconds[SAMPLES], ceiling[SAMPLES], share[SAMPLES];
} Row;
static struct { double seconds, at_ceiling, peak; } table;

static size_t product_size(const Product *p) { return p->m * p->k + p->k * p->n + p->m * p->n; }
// Returns the FLOP/s of the row's products, each thread making them alone and from operands of its
// own; every thread makes at least 0.2 GFLOP.
static double products_speed(const Row *row) {
    double flops = 0;
    size_t size = 0;
    for (const Product *p = row->product; p < row->product + PRODUCTS; p++) {
        flops += 2.0 * (double)(p->m * p->n * p->k * p->times);
        if (product_size(p) > size) size = product_size(p);
    }
    int repeats = (int)(2e8 / flops) + 1;
    double begin = now_seconds();
    PARALLEL_FOR
    for (int t = 0; t < thread_count(); t++)
        for (int i = 0; i < repeats; i++)
            for (const Product *p = row->product; p < row->product + PRODUCTS; p++)
                for (int64_t j = 0; j < p->times; j++) {
                    real *A = row->memory + size * (size_t)t, *B = A + p->m * p->k;
                    gemm(p->ta, p->tb, p->m, p->n, p->k, A, p->ta ? p->m : p->k, B,
                         p->tb ? p->k : p->n, 0, B + p->k * p->n, p->n);
                }
    return flops * repeats * thread_count() / (now_seconds() - begin);
}
// Returns the bytes a second of a copy that moves as many bytes as a call of the kernel, half of
// them read and half written, in one piece a thread.
static double copy_speed(const Row *row) {
    size_t half = (size_t)(row->bytes / 2 / thread_count());
    double begin = now_seconds();
    PARALLEL_FOR
    for (int t = 0; t < thread_count(); t++) {
        char *from = (char *)row->memory + 2 * half * (size_t)t;
        memcpy(from + half, from, half);
    }
    return 2.0 * (double)half * thread_count() / (now_seconds() - begin);
}
static Row row_of(const char *name, double calls, double flops, double bytes,
                  const Product product[PRODUCTS]) {
    Row row = { .name = name, .calls = calls, .flops = flops, .bytes = bytes };
    size_t size = 0;
    for (int i = 0; i < PRODUCTS && product; i++) {
        row.product[i] = product[i];
        if (product_size(product + i) > size) size = product_size(product + i);
    }
    size_t count = flops > 0 ? size * thread_count() : (size_t)bytes / sizeof(real) + 1;
    row.memory = (real *)xmalloc(count * sizeof(real), "operands of a ceiling");
    for (size_t i = 0; i < count; i++) row.memory[i] = (real)(i % 7) * (real)0.125;
    return row;
}
static Row products(const char *name, double calls, double flops, const Product p[PRODUCTS]) {
    return row_of(name, calls, flops, 0, p);
}
static Row memory(const char *name, double calls, double bytes) {
    return row_of(name, calls, 0, bytes, 0);
}
// The tile in which linear_* hand out a product of (m,k) with (k,n).
static Product tile(int ta, int tb, int64_t m, int64_t n, int64_t k) {
    Product p = { ta, tb, 0, 0, k, 1 };
    gemm_tile(m, n, k, &p.m, &p.n);
    return p;
}
static void print_row(Row *row) {
    int flops = row->flops > 0;
    double work = flops ? row->flops : row->bytes;
    double seconds = median(row->seconds, row->n);
    double ceiling = median(row->ceiling, row->n);
    double share = median(row->share, row->n);
    char peak[16] = "";
    if (flops) snprintf(peak, sizeof peak, "%.1f %%", 100 * work / seconds / table.peak);
    printf("| %-30s | %8.3f | %5.0f | %9.2f | %6.1f %-7s | %7s | %7.1f | %5.1f %% |\n", row->name,
           1e3 * seconds, row->calls, 1e3 * seconds * row->calls, work / seconds * 1e-9,
           flops ? "GFLOP/s" : "GB/s", peak, ceiling * 1e-9, 100 * share);
    table.seconds += seconds * row->calls;
    table.at_ceiling += seconds * share * row->calls;
    free(row->memory);
}
// Goes before each call of a kernel: true until it was called for 0.15 s, its ceiling included,
// and at least 5 times after a first call that does not count; prints the row at the end.
static int measured(Row *row) {
    double now = now_seconds();
    if (row->at > 0 && row->begin > 0) {
        double work = row->flops > 0 ? row->flops : row->bytes;
        row->seconds[row->n] = now - row->at;
        row->ceiling[row->n] = row->flops > 0 ? products_speed(row) : copy_speed(row);
        row->share[row->n] = work / row->seconds[row->n] / row->ceiling[row->n];
        row->n++;
    } else if (row->at > 0) {
        row->begin = now;
    }
    if (row->n == SAMPLES || (row->n >= 5 && now_seconds() - row->begin > 0.15)) {
        print_row(row);
        return 0;
    }
    row->at = now_seconds();
    return 1;
}

static floatX *normal(Arena *a, size_t n, uint64_t key) {
    floatX *x = ARENA_TAKE(a, floatX, n, "x");
    Segment s = { .tensor = key, .first = 0, .count = (int64_t)n, .offset = 0 };
    if (x) init_segments(x, 0, &s, 1, 7, 0.1);
    return x;
}

static void kernels(const Config *c, const Trainer *t, const Bench *b, Arena *arena) {
    const int T = b->T, B = b->batch, R = T * B, C = c->C, Q = c->H * c->D, KV = c->KV * c->D;
    const int E = c->E, K = c->K, F = c->F, V = c->V, M = row_index_bound(R, K, E);
    // Rows of a task: of an expert at balance; of a block of attention (kernels/cpu/attention.c).
    const int each = (int)lesser(1024, div_up((int64_t)R * K, E));
    const int keys = 512;
    const int stacked = 128;
    const int chunk = t->head.chunk < R ? t->head.chunk : R;
    const double L = c->n_moe;
    const double chunks = (double)R / chunk;
    const double x = sizeof(floatX);
    const double g = sizeof(gradX);
    const double RC = (double)R * C;
    const double rows = (double)R * K;
    floatX *h = normal(arena, (size_t)R * C, 1);
    floatX *y = normal(arena, (size_t)R * C, 2);
    floatX *dy = normal(arena, (size_t)R * C, 3);
    floatX *w = normal(arena, C, 4);
    floatX *q = normal(arena, (size_t)R * Q, 5);
    floatX *k = normal(arena, (size_t)R * KV, 6);
    floatX *v = normal(arena, (size_t)R * KV, 7);
    floatX *qn = normal(arena, (size_t)R * Q, 8);
    floatX *kn = normal(arena, (size_t)R * KV, 9);
    floatX *o = normal(arena, (size_t)R * Q, 10);
    floatX *dq = normal(arena, (size_t)R * Q, 11);
    floatX *dk = normal(arena, (size_t)R * KV, 12);
    floatX *dv = normal(arena, (size_t)R * KV, 13);
    floatX *Wq = normal(arena, (size_t)Q * C, 14);
    floatX *Wr = normal(arena, (size_t)E * C, 15);
    floatX *W1 = normal(arena, (size_t)E * 2 * F * C, 16);
    floatX *W2 = normal(arena, (size_t)E * C * F, 17);
    floatX *H = normal(arena, (size_t)M * 2 * F, 18);
    floatX *dH = normal(arena, (size_t)M * 2 * F, 19);
    floatX *A = normal(arena, (size_t)M * F, 20);
    floatX *Y = normal(arena, (size_t)M * C, 21);
    floatX *We = normal(arena, (size_t)V * C, 22);
    floatX *logits = normal(arena, (size_t)chunk * V, 23);
    gradX *dW1 = ARENA_TAKE(arena, gradX, (size_t)E * 2 * F * C, "x");
    gradX *dW2 = ARENA_TAKE(arena, gradX, (size_t)E * C * F, "x");
    gradX *dWe = ARENA_TAKE(arena, gradX, (size_t)V * C, "x");
    gradX *dW = ARENA_TAKE(arena, gradX, (size_t)(Q > E ? Q : E) * C, "x");
    gradX *dw = ARENA_TAKE(arena, gradX, C, "x");
    real *cosine = ARENA_TAKE(arena, real, (size_t)T * c->D, "x");
    real *sine = ARENA_TAKE(arena, real, (size_t)T * c->D, "x");
    real *rstd = ARENA_TAKE(arena, real, R, "x");
    real *lse = ARENA_TAKE(arena, real, (size_t)R * c->H, "x");
    real *z = ARENA_TAKE(arena, real, (size_t)R * E, "x");
    real *dz = ARENA_TAKE(arena, real, (size_t)R * E, "x");
    real *score = ARENA_TAKE(arena, real, (size_t)R * K, "x");
    real *dscore = ARENA_TAKE(arena, real, (size_t)R * K, "x");
    real *norm = ARENA_TAKE(arena, real, 2, "x");
    int *ids = ARENA_TAKE(arena, int, R, "x");
    int *topk = ARENA_TAKE(arena, int, (size_t)R *K, "x");
    double *share = ARENA_TAKE(arena, double, E, "x");
    double *loss = ARENA_TAKE(arena, double, 1, "x");
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

    table.peak = device_peak_flops();
    printf("sgemm on %d threads: %.1f GFLOP/s (side 512, one product a thread)\n\n", thread_count(),
           table.peak * 1e-9);
    printf(
        "| kernel | ms/call | calls | ms/update | rate | of that sgemm | ceiling | of the ceiling "
        "|\n|---|---|---|---|---|---|---|---|\n");
    for (Row r = memory("embed_forward", 1, 2 * RC * x); measured(&r);)
        embed_forward(h, ids, We, R, C);
    for (Row r = memory("embed_backward", 1, RC * x + (double)V * C * g); measured(&r);)
        embed_backward(dWe, dy, ids, 0, -1, R, V, C);
    for (Row r = memory("rmsnorm_forward", 4 * L + chunks, 2 * RC * x); measured(&r);)
        rmsnorm_forward(y, rstd, h, w, (real)1e-6, R, C);
    for (Row r = memory("rmsnorm_backward", 2 * L + 1, 4 * RC * x); measured(&r);)
        rmsnorm_backward(y, dw, dy, dy, h, w, rstd, 0, R, C);
    for (Row r = memory("add (residual)", 2 * L, 3 * RC * x); measured(&r);)
        add(y, h, dy, (size_t)R * C);
    for (Row r = products("linear_forward q, o", 2 * L, 2 * RC * Q,
                          (Product[PRODUCTS]){ tile(0, 1, R, Q, C) });
         measured(&r);)
        linear_forward(q, h, Wq, R, Q, C);
    for (Row r = products("linear_forward k, v", 2 * L, 2 * RC * KV,
                          (Product[PRODUCTS]){ tile(0, 1, R, KV, C) });
         measured(&r);)
        linear_forward(k, h, Wq, R, KV, C);
    for (Row r = products("linear_backward_input q, o", 2 * L, 2 * RC * Q,
                          (Product[PRODUCTS]){ tile(0, 0, R, C, Q) });
         measured(&r);)
        linear_backward_input(y, q, Wq, R, Q, C);
    for (Row r = products("linear_backward_input_add k, v", 2 * L, 2 * RC * KV,
                          (Product[PRODUCTS]){ tile(0, 0, R, C, KV) });
         measured(&r);)
        linear_backward_input_add(y, k, Wq, R, KV, C);
    for (Row r = products("linear_backward_weight q, o", 2 * L, 2 * RC * Q,
                          (Product[PRODUCTS]){ tile(1, 0, Q, C, R) });
         measured(&r);)
        linear_backward_weight(dW, q, h, 0, R, Q, C);
    for (Row r = products("linear_backward_weight k, v", 2 * L, 2 * RC * KV,
                          (Product[PRODUCTS]){ tile(1, 0, KV, C, R) });
         measured(&r);)
        linear_backward_weight(dW, k, h, 0, R, KV, C);
    for (Row r = memory("qk_norm_rope_forward", L, 2.0 * R * (Q + KV) * x); measured(&r);)
        qk_norm_rope_forward(qn, kn, q, k, w, w, cosine, sine, 0, (real)1e-6, R, T, c->H, c->KV,
                             c->D);
    for (Row r = memory("qk_norm_rope_backward", L, 3.0 * R * (Q + KV) * x); measured(&r);)
        qk_norm_rope_backward(dq, dk, dw, dw + c->D, qn, kn, q, k, w, w, cosine, sine, 0,
                              (real)1e-6, 0, R, T, c->H, c->KV, c->D);
    for (Row r = products("attention_forward", L, 2.0 * R * T * Q,
                          (Product[PRODUCTS]){ { 0, 1, stacked, keys, c->D, 1 },
                                               { 0, 0, stacked, c->D, keys, 1 } });
         measured(&r);)
        attention_forward(o, lse, qn, kn, v, 0, workspace, B, T, c->H, c->KV, c->D);
    for (Row r = products("attention_backward", L, 5.0 * R * T * Q,
                          (Product[PRODUCTS]){ { 0, 1, stacked, keys, c->D, 2 },
                                               { 1, 0, keys, c->D, stacked, 2 },
                                               { 0, 0, stacked, c->D, keys, 1 } });
         measured(&r);)
        attention_backward(dq, dk, dv, q, o, lse, qn, kn, v, 0, workspace, B, T, c->H, c->KV, c->D);
    for (Row r = products("router_forward", L, 2 * RC * E,
                          (Product[PRODUCTS]){ { 0, 1, 128, E, C, 1 } });
         measured(&r);)
        router_forward(z, topk, score, stats, h, Wr, 0, 0, c->norm_topk, R, C, E, K);
    router_share(share, stats.count, R, 1, E);
    for (int i = 0; i < R * K; i++) dscore[i] = (real)0.01 * (real)(i % 7);
    for (Row r = products("router_backward_add", L, 4 * RC * E,
                          (Product[PRODUCTS]){ { 0, 0, 128, C, E, 4 }, { 1, 0, E, 64, 512, 8 } });
         measured(&r);)
        router_backward_add(y, dW, dz, dscore, z, topk, score, h, Wr, share, 1e-3, 0, c->norm_topk,
                            0, R, C, E, K);
    for (Row r = memory("row_index_build", 2 * L, 3 * rows * sizeof(int)); measured(&r);)
        row_index_build(&plan, topk, 0);
    for (Row r = products("experts_up", L, 4 * rows * F * C,
                          (Product[PRODUCTS]){ { 0, 1, each, 2 * F, C, 1 } });
         measured(&r);)
        experts_up(H, A, h, W1, &plan, C, F);
    for (Row r = products("experts_down", L, 2 * rows * F * C,
                          (Product[PRODUCTS]){ { 0, 1, each, C, F, 1 } });
         measured(&r);)
        experts_down(Y, A, W2, &plan, C, F);
    for (Row r = memory("rows_weighted_sum", 2 * L, (rows + R) * C * x); measured(&r);)
        rows_weighted_sum(y, Y, score, &plan, C);
    for (Row r = products("experts_down_backward", L, 2 * rows * F * C,
                          (Product[PRODUCTS]){ { 0, 0, each, F, C, 1 } });
         measured(&r);)
        experts_down_backward(dH, A, dscore, dy, H, W2, score, &plan, C, F);
    for (Row r = products("experts_up_backward", L, 4 * rows * F * C,
                          (Product[PRODUCTS]){ { 0, 0, each, C, 2 * F, 1 } });
         measured(&r);)
        experts_up_backward(Y, dH, W1, &plan, C, F);
    for (Row r = products("experts_wgrad", L, 6 * rows * F * C,
                          (Product[PRODUCTS]){ { 1, 0, 2 * F, lesser(512, C), each, 1 },
                                               { 1, 0, lesser(512, C), F, each, 1 } });
         measured(&r);)
        experts_wgrad(dW1, dW2, h, dy, dH, A, &plan, 0, C, F);
    double head = 2.0 * chunk * C * V;
    for (Row r = products("linear_forward head", chunks, head,
                          (Product[PRODUCTS]){ tile(0, 1, chunk, V, C) });
         measured(&r);)
        linear_forward(logits, h, We, chunk, V, C);
    for (Row r = memory("cross_entropy", chunks, 2.0 * chunk * V * x); measured(&r);)
        cross_entropy(logits, loss, ids, (real)1 / R, 1, chunk, V);
    for (Row r = products("linear_backward_input head", chunks, head,
                          (Product[PRODUCTS]){ tile(0, 0, chunk, C, V) });
         measured(&r);)
        linear_backward_input(y, logits, We, chunk, V, C);
    for (Row r = products("linear_backward_weight head", chunks, head,
                          (Product[PRODUCTS]){ tile(1, 0, V, C, chunk) });
         measured(&r);)
        linear_backward_weight(dWe, logits, h, 1, chunk, V, C);
    double n = config_total_parameters(c);
    norm[0] = 1;
    for (Row r = memory("gradient_squares", 1, n * g); measured(&r);)
        for (int i = 0; i < t->m->n_blocks; i++)
            gradient_squares(sums, grad, t->m->block[i].segment, t->m->block[i].n_segments);
    for (Row r = memory("optimizer_update (AdamW)", 1, n * (2 * x + g + 4 * sizeof(real)));
         measured(&r);)
        for (int i = 0; i < t->m->n_blocks; i++)
            optimizer_step((Optimizer *)&t->optimizer, i, grad, 1e-5, 2, 2, 1, norm);
    printf("\nsum over an update: %.0f ms; with model FLOPs that is %.1f %% of the sgemm measured "
           "here; at the ceilings it would be %.0f ms\n",
           1e3 * table.seconds, 100 * config_flops_per_token(c, T) * R / table.seconds / table.peak,
           1e3 * table.at_ceiling);
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
    int step = argc > 3 && !strcmp(argv[1], "step");
    int kernel = argc > 2 && !strcmp(argv[1], "kernels");
    if (!step && !kernel) die("nothing to do|see the first lines of dev/bench_cpu.c");
    Bench b = {
        .T = 512, .batch = 8, .steps = 8, .warmup = 3, .threads = 0, .embed = 1, .skew = 1
    };
    for (int i = step ? 4 : 3; i < argc; i += 2) {
        const char *name = argv[i];
        const char *value = i + 1 < argc ? argv[i + 1] : "";
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
        else if (!strcmp(name, "--optimizer"))
            b.small = !strcmp(value, "adamw8bit");
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
