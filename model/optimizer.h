// Optimizer state of this rank's shards, learning-rate schedules, and one update of a block.
//
// The formulas are torch's (kernels.h: optimizer_update). Weight decay follows Hugging Face's
// groups: all parameters but norm weights.
#ifndef MOE_OPTIMIZER_H
#define MOE_OPTIMIZER_H
#include "params.h"
MOE_BEGIN_C

typedef enum { SCHEDULE_CONSTANT, SCHEDULE_LINEAR, SCHEDULE_COSINE, SCHEDULE_WSD } ScheduleKind;
typedef struct {
    ScheduleKind kind;
    int64_t steps, warmup, decay; // of the whole run; linear rise from 0; length of wsd's last part
    double final_lr;              // fraction of lr that falling schedules end at
} Schedule;
// Factor of the learning rate for update number `update` (1-based): Hugging Face's LambdaLR at s =
// update - 1, so the first warmup update has factor 0.
//   warmup   s / warmup                                             for s < warmup
//   linear   final + (1 - final) * (steps - s) / (steps - warmup)
//   cosine   final + (1 - final) * (1 + cos(pi (s - warmup) / (steps - warmup))) / 2
//   wsd      1 until steps - decay, then linear down to final
double schedule_factor(const Schedule *s, int64_t update);

typedef struct {
    OptimizerKind kind;
    double lr, momentum, beta1, beta2, eps, weight_decay;
    int master; // keep fp32 copies of bf16 weights (without effect where floatX is fp32 or wider)
    uint64_t seed; // of stochastic rounding
} OptimizerOptions;

typedef struct {
    OptimizerOptions o;
    const Model *m;
    OptimizerState *state; // (n_blocks) buffers of this rank's shards; the trainer sets param, grad
                           // is filled in at each update
} Optimizer;
// State of all blocks from the arena (may be counting), zero. Dies where the 8-bit optimizer meets
// a layout that cuts its 256-element blocks, naming layouts that fit.
Optimizer optimizer_create(const Model *m, OptimizerOptions o, Arena *arena);
void optimizer_free(Optimizer *opt);
// One update of a block's shard. t: 1-based count of updates made (bias correction); update: number
// of this update (stochastic rounding); grad_scale: see OptimizerStep; scale (device): not finite =
// leave everything as it is.
void optimizer_step(Optimizer *opt, int block, const gradX *grad, double lr, int64_t t,
                    int64_t update, double grad_scale, const real *scale);
MOE_END_C
#endif
