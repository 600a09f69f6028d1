// Schedules and optimizer state: see optimizer.h.
#include "optimizer.h"
#include "../kernels/fail.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

double schedule_factor(const Schedule *k, int64_t update) {
    double s = (double)(update - 1), warmup = (double)k->warmup, steps = (double)k->steps;
    if (s < warmup) return s / (warmup > 1 ? warmup : 1);
    double span = steps - warmup > 1 ? steps - warmup : 1, left = (steps - s) / span, f;
    if (left < 0) left = 0;
    switch (k->kind) {
    case SCHEDULE_LINEAR: f = left; break;
    case SCHEDULE_COSINE: f = 0.5 * (1 + cos(3.14159265358979323846 * (1 - left))); break;
    case SCHEDULE_WSD:
        f = k->decay > 0 ? (steps - s) / (double)k->decay : 1;
        f = f > 1 ? 1 : f < 0 ? 0 : f;
        break;
    default: return 1;
    }
    return k->final_lr + (1 - k->final_lr) * f;
}

// State begins as zeros: said here, because debug builds fill arenas with NaN.
static void *take_zero(Arena *arena, size_t bytes, const char *what) {
    void *p = arena_take(arena, bytes, what);
    if (p) device_zero(p, bytes);
    return p;
}

Optimizer optimizer_create(const Model *m, OptimizerOptions o, Arena *arena) {
    Optimizer opt;
    opt.o = o;
    opt.m = m;
    opt.state =
        (OptimizerState *)xcalloc((size_t)m->n_blocks, sizeof(OptimizerState), "optimizer table");
    int master = o.master && sizeof(floatX) < sizeof(float), adam = o.kind == OPT_ADAMW;
    for (int b = 0; b < m->n_blocks; b++) {
        const Block *block = &m->block[b];
        OptimizerState *s = &opt.state[b];
        size_t n = (size_t)block->shard, q = (size_t)block->n_qblocks;
        if (master) s->master = (real *)take_zero(arena, n * sizeof(real), "fp32 master weights");
        if (adam || (o.kind == OPT_SGD && o.momentum != 0))
            s->m = (real *)take_zero(arena, n * sizeof(real), "optimizer state");
        if (adam) s->v = (real *)take_zero(arena, n * sizeof(real), "optimizer state");
        if (o.kind == OPT_ADAMW8) {
            s->m8 = (uint8_t *)take_zero(arena, n, "optimizer state");
            s->v8 = (uint8_t *)take_zero(arena, n, "optimizer state");
            s->m_scale = (float *)take_zero(arena, q * sizeof(float), "optimizer state");
            s->v_scale = (float *)take_zero(arena, q * sizeof(float), "optimizer state");
        }
    }
    return opt;
}

void optimizer_free(Optimizer *opt) {
    free(opt->state);
    memset(opt, 0, sizeof *opt);
}

void optimizer_step(Optimizer *opt, int block, const gradX *grad, double lr, int64_t t,
                    int64_t update, double grad_scale, const real *scale) {
    const OptimizerOptions *o = &opt->o;
    OptimizerStep step = { o->kind,         lr, o->momentum, o->beta1, o->beta2,  o->eps,
                           o->weight_decay, t,  o->seed,     update,   grad_scale };
    OptimizerState *s = &opt->state[block];
    s->grad = grad;
    optimizer_update(s, opt->m->block[block].segment, opt->m->block[block].n_segments, &step,
                     scale);
}
