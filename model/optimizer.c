// Learning-rate schedules, and the optimizer's state and updates on this rank's shards: the
// formulas are in kernels/kernels.h (optimizer_update), the contracts in optimizer.h.
#include "optimizer.h"
#include "../kernels/fail.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

// ---- schedules ------------------------------------------------------------------------------
static double clamp01(double x) {
    if (x < 0) return 0;
    return x > 1 ? 1 : x;
}

// The part of a falling schedule between lr (1) and final_lr (0), at `left` of its way.
static double fall(const Schedule *k, double s, double left) {
    switch (k->kind) {
    case SCHEDULE_CONSTANT: return 1;
    case SCHEDULE_LINEAR: return left;
    case SCHEDULE_COSINE: return 0.5 * (1 + cos(3.14159265358979323846 * (1 - left)));
    case SCHEDULE_WSD: return k->decay > 0 ? clamp01(((double)k->steps - s) / (double)k->decay) : 1;
    }
    return 1;
}

double schedule_factor(const Schedule *k, int64_t update) {
    double s = (double)(update - 1);
    double warmup = (double)k->warmup;
    double steps = (double)k->steps;
    if (s < warmup) return s / (warmup > 1 ? warmup : 1);
    if (k->kind == SCHEDULE_CONSTANT) return 1;
    double span = steps - warmup > 1 ? steps - warmup : 1;
    double left = (steps - s) / span;
    double f = fall(k, s, left < 0 ? 0 : left);
    return k->final_lr + (1 - k->final_lr) * f;
}

// ---- state ----------------------------------------------------------------------------------
// State begins as zeros, also in debug builds, which fill arenas with NaN.
static void *take_zero(Arena *arena, size_t bytes, const char *what) {
    void *p = arena_take(arena, bytes, what);
    if (p) device_zero(p, bytes);
    return p;
}

Optimizer optimizer_create(const Model *m, OptimizerOptions o, Arena *arena) {
    Optimizer opt;
    opt.o = o;
    opt.m = m;
    opt.state = (OptimizerState *)xcalloc(m->n_blocks, sizeof(OptimizerState), "optimizer table");
    int master = o.master && sizeof(floatX) < sizeof(float);
    const char *what = "optimizer state";
    for (int b = 0; b < m->n_blocks; b++) {
        const Block *block = &m->block[b];
        OptimizerState *s = &opt.state[b];
        size_t n = block->shard;
        size_t q = block->n_qblocks;
        if (master) s->master = (real *)take_zero(arena, n * sizeof(real), "fp32 master weights");
        switch (o.kind) {
        case OPT_SGD:
            if (o.momentum != 0) s->m = (real *)take_zero(arena, n * sizeof(real), what);
            break;
        case OPT_ADAMW:
            s->m = (real *)take_zero(arena, n * sizeof(real), what);
            s->v = (real *)take_zero(arena, n * sizeof(real), what);
            break;
        case OPT_ADAMW8:
            s->m8 = (uint8_t *)take_zero(arena, n, what);
            s->v8 = (uint8_t *)take_zero(arena, n, what);
            s->m_scale = (float *)take_zero(arena, q * sizeof(float), what);
            s->v_scale = (float *)take_zero(arena, q * sizeof(float), what);
            break;
        }
    }
    return opt;
}

void optimizer_free(Optimizer *opt) {
    free(opt->state);
    memset(opt, 0, sizeof *opt);
}

void optimizer_step(Optimizer *opt, int block, const gradX *grad, double lr, int64_t t,
                    int64_t update, double factor, const real *device_factor) {
    const OptimizerOptions *o = &opt->o;
    OptimizerStep step = { o->kind,         lr, o->momentum, o->beta1, o->beta2, o->eps,
                           o->weight_decay, t,  o->seed,     update,   factor };
    OptimizerState *s = &opt->state[block];
    const Block *b = &opt->m->block[block];
    s->grad = grad;
    optimizer_update(s, b->segment, b->n_segments, &step, device_factor);
}
