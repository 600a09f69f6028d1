// Learning-rate schedules, the optimizer's state of this rank's shards, and one update of a block.
// The formulas are torch's; weight decay follows transformers' groups: all but norm weights.
#ifndef MOE_OPTIMIZER_H
#define MOE_OPTIMIZER_H
#include "model.h"
MOE_BEGIN_C

typedef enum { SCHEDULE_CONSTANT, SCHEDULE_LINEAR, SCHEDULE_COSINE, SCHEDULE_WSD } ScheduleKind;
typedef struct {
    ScheduleKind kind;
    int64_t steps, warmup, decay; // of the run, of the linear rise from 0, of wsd's last part
    double final_lr;              // fraction of lr that falling schedules end at
} Schedule;
// Returns the factor of the learning rate for update number `update` (from 1), that of
// transformers' LambdaLR at s = update - 1, so that the first update of a warmup has factor 0:
//   warmup   s / warmup                                             for s < warmup
//   linear   final + (1 - final) * (steps - s) / (steps - warmup)
//   cosine   final + (1 - final) * (1 + cos(pi (s - warmup) / (steps - warmup))) / 2
//   wsd      1 until steps - decay, then linear down to final
//   constant 1
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
    OptimizerState *state; // (n_blocks) of this rank's shards; the trainer sets param
} Optimizer;
// Takes the state of all blocks from the arena, which may be counting, as zeros.
Optimizer optimizer_create(const Model *m, OptimizerOptions o, Arena *arena);
void optimizer_free(Optimizer *opt);
// Updates a block's shard by `grad` times factor times device_factor (1, device); leaves everything
// as it is if device_factor is not finite. t counts the updates made, from 1 (bias correction);
// update is the number of this one (stochastic rounding).
void optimizer_step(Optimizer *opt, int block, const gradX *grad, double lr, int64_t t,
                    int64_t update, double factor, const real *device_factor);
MOE_END_C
#endif
