// The update: the only place that gathers weights, reduces gradients and steps the optimizer
// (DESIGN 4). Layer-major: layers outside, micro-batches inside, both ways.
#ifndef MOE_STEP_H
#define MOE_STEP_H
#include "layer.h"
#include "optimizer.h"
#include "../parallel/fsdp.h"
#include "../data/loader.h"
#include <stdio.h>
MOE_BEGIN_C

typedef enum { RECOMPUTE_NONE, RECOMPUTE_MOE, RECOMPUTE_LAYER, RECOMPUTE_AUTO } Recompute;
typedef struct {
    int T;           // tokens of a sequence
    int64_t batch;   // distinct sequences of an update, over all ranks
    int micro_batch; // sequences of a micro-batch on a rank; 0 = all that a round has
    int rounds;
    Recompute recompute;
    int update_layer; // --update layer: step a layer inside backward, clipping by the previous
                      // step's norm
    double clip;      // gradient norm, 0 = no clipping
    double aux_coef, z_coef;
    int aux_per_layer; // --aux-pool layer: mean of per-layer values instead of one pooled statistic
    int ignore_target; // this id does not count as a target; -1 = none
    int skip_nonfinite;    // a non-finite gradient skips the update instead of ending the run
    int expert_grad_scale; // experts' gradients times mean count / own count, after the sum
    double balance_rate;   // auxiliary-loss-free balancing: bias += rate * sign(mean - count) after
                           // each update; 0 = off
    size_t
        memory; // bytes that may be used in all, for RECOMPUTE_AUTO; 0 = what device_memory() says
    uint64_t seed;
} StepOptions;

typedef struct { // what one update tells, equal on all ranks
    double loss, aux, z, grad_norm, lr;
    int64_t tokens, valid;  // distinct positions, and targets that count
    int nonfinite;          // 1: the gradient is not finite, so nothing was changed; without
                            // --skip-nonfinite the run ends (trainer_die_nonfinite)
    int expert_dead;        // (layer, expert) pairs without a token
    double expert_load_max; // max / mean of the worst layer
} StepResult;

typedef struct Dump Dump;   // dump.h
typedef struct Trace Trace; // trace.h

typedef struct Trainer {
    Model *m;
    Grid *g;
    StepOptions o;
    Fsdp *fsdp;
    Optimizer optimizer;
    Arena arena;
    Workspace work;
    int n_micro, n_slots, R; // micro-batches of a round, in flight at once, rows of each
    int round;               // the one under way
    InFlight *slot;          // (n_slots)
    Saved *kept;             // (L+1, n_micro); row L: input of the head
    char *store;             // activations kept at their actual size, bumped in forward
    size_t store_size, store_used;
    int kept_all, kept_attention,
        kept_none; // of this update: (layer, micro-batch) pairs by what was kept
    int64_t sent_rows, received_rows, redispatched_rows,
        reattended; // of this update: rows sent and received by forward dispatches, those sent that
                    // backward dispatches again; pairs whose attention is recomputed
    floatX *dx;     // (n_micro, R, C) running gradient of every micro-batch
    floatX *yf, *logits, *dyf;    // head: (chunk,C) (chunk,V) (chunk,C)
    real *head_rstd;              // (chunk)
    int head_chunk;               // tokens of a head pass
    int *ids, *targets;           // (n_micro, R) device
    int *host_ids, *host_targets; // this rank's part of the whole update, (local_sequences, T)
    int64_t local_sequences;
    int64_t *count; // (n_moe,E) device: choices in this round, summed over ranks after forward
    double *prob, *zstat;        // (n_moe,E) (n_moe,2)
    double *share;               // (n_moe,E), or (1,E) pooled
    real *bias;                  // (n_moe,E) device, 0 = off
    double *loss_sum;            // (1)
    double *segment_sum;         // (largest number of segments)
    double *block_sum;           // (n_blocks) squares of each block's gradient
    real *norm, *scale, *finite; // (1) each, device
    float *factor;               // (segments) utilisation factors
    // host side of the same, valid after an update
    int64_t *host_count;        // (n_moe,E) of the whole update
    double *host_prob, *host_z; // (n_moe,E) (n_moe,2)
    double *host_block_sum;
    float *host_bias;     // (n_moe,E)
    int64_t updates;      // made so far (t of the optimizer: skipped ones do not count)
    double previous_norm; // unclipped, of the previous update; < 0: none yet
    Dump *dump;           // 0, or writes this update's logits and gradients
    Trace *trace;         // 0, or follows one token of this update
} Trainer;

// Counts, then allocates everything (I10). With plan_only the table is printed and nothing is
// allocated. report: where the byte table goes, 0 = silent. The model's weights are zero
// afterwards: trainer_init or a checkpoint fills them.
Trainer *trainer_create(Model *m, Grid *g, StepOptions o, OptimizerOptions opt, int plan_only,
                        FILE *report_file);
void trainer_free(Trainer *t);
// Random weights as Hugging Face initialises: N(0, init_std), norms one, pad row of the embedding
// zero.
void trainer_init(Trainer *t);
// One update from windows [ (update-1) * batch, update * batch ) of data. Ends the run (or skips)
// on a non-finite gradient, on all ranks together.
StepResult trainer_step(Trainer *t, Loader *data, int64_t update, double lr);
// Ends the run where a step found a gradient that is not finite, naming the first block of backward
// that has one.
void trainer_die_nonfinite(Trainer *t, int64_t update);
// Mean cross entropy over the first n_windows windows of data, in file order; the same on every
// layout.
double trainer_evaluate(Trainer *t, Loader *data, int source, int64_t n_windows, double *n_targets);
// Parts of an update that evaluation shares: the first n_micro micro-batches of t->ids to the
// head's input, and the loss sum (round, N: training only).
void step_forward(Trainer *t, int n_micro, int training);
void step_head(Trainer *t, int training, int round, double N);
// Logits of the token after ids[length - 1] into logits (V), fp32; ids (length <= T) and logits are
// host memory. Every rank calls it with the same ids and gets the same numbers.
void trainer_logits(Trainer *t, const int *ids, int length, float *logits);
// The balancing bias (n_moe,E) of a resumed run, from host memory; n = n_moe * E.
void trainer_set_bias(Trainer *t, const float *bias, size_t n);
MOE_END_C
#endif
