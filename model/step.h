// The update: the only place that gathers weights, reduces gradients and steps the optimizer.
// Layers outside, micro-batches inside, in both directions.
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
    int update_layer; // step a layer inside backward, clipped by the norm of the update before
    double clip;      // gradient norm, 0 = no clipping
    double aux_coef, z_coef;
    int aux_per_layer;           // aux is the mean of the layers' values, not one pooled statistic
    int ignore_target;           // this id does not count as a target; -1 = none
    int documents, document_end; // 1: attention and positions begin again after that token
    int skip_nonfinite;          // a non-finite gradient skips the update instead of ending the run
    int expert_grad_scale;       // an expert's gradient is multiplied by mean count / own count
    double balance_rate;         // bias += rate * sign(mean count - count) after an update; 0 = off
    size_t memory;               // bytes to use for RECOMPUTE_AUTO; 0 = what device_memory() says
    uint64_t seed;
} StepOptions;

typedef struct { // what one update tells, equal on all ranks
    double loss, aux, z, grad_norm, lr;
    int64_t tokens, valid;  // distinct positions, and targets that count
    double visible;         // mean length of the document that a token is in (T without documents)
    int nonfinite;          // 1: the gradient is not finite, and nothing was changed
    int expert_dead;        // (layer, expert) pairs without a token
    double expert_load_max; // max / mean of the worst layer
} StepResult;

typedef struct Dump Dump;   // checkpoint.h
typedef struct Trace Trace; // inspect.h
typedef struct RoutingFiles RoutingFiles;

typedef struct {                  // tokens of this rank
    int64_t sequences;            // of the update
    int *ids, *targets;           // (n_micro,R) device: the round
    int *position;                // (n_micro,A) device, host: in its document; 0 = in its sequence
    int *host_position;           // A = attention rows
    int64_t update;               // whose tokens were read and not used yet; 0 = none
    double valid, pairs;          // of the update and all ranks: targets that count, pairs of a
                                  // token and an earlier or equal one of its document, halves
    int *host_ids, *host_targets; // (sequences,T): the update
} TokenBuffers;

typedef struct {                   // what the layers leave for backward
    Saved *saved;                  // (L+1,n_micro); row L has x alone: the head's input
    int *tables;                   // host: the tables of their routings
    floatX *dx;                    // (n_micro,R,C) running gradient of every micro-batch
    char *store;                   // saved groups at their actual size, appended in forward
    size_t store_size, store_used; // bytes
} Activations;

typedef struct {              // what became of them in this update, on this rank
    int all, attention, none; // (layer, micro-batch) pairs by the groups that were saved
    int64_t sent, received;   // rows of forward dispatches to and from other ranks
    int64_t redispatched;     // of those sent, rows that backward dispatches again
    int64_t rerouted;         // pairs whose row index backward makes again
    int64_t reattended;       // pairs whose attention is computed again
} SavedCounts;

typedef struct {             // logits exist for one chunk of tokens at a time
    int chunk;               // tokens
    floatX *x, *dx, *logits; // (chunk,C) normed (chunk,C) (chunk,V)
    real *rstd;              // (chunk)
    double *loss_sum;        // (1)
} Head;

typedef struct {                       // statistics of the router; n = MoE layers
    int64_t *count;                    // (n,E) device: choices in this round
    double *prob, *z;                  // (n,E) (n,2) device: see RouterStats
    double *share;                     // (n,E), or (1,E) pooled: see RouterLoss
    real *bias;                        // (n,E) device, 0 = off
    int64_t *host_count, *round_count; // (n,E) of the update, of a round
    double *host_prob, *round_prob;    // (n,E)
    double *host_z, *round_z;          // (n,2)
    float *host_bias;                  // (n,E)
} RouterTotals;

typedef struct {                // device, but host_blocks and previous
    double *segments, *blocks;  // (most segments) (n_blocks): squares of the gradient
    real *norm, *clip, *finite; // (1) each; clip and finite: factor of the gradient, NaN = skip
    float *factor;              // (most segments) of --expert-grad-scale
    double *host_blocks;        // (n_blocks)
    double previous;            // norm of the update before, unclipped; < 0: none yet
} Norms;

typedef struct Trainer {
    Model *m;
    Grid *g;
    StepOptions o;
    Fsdp *fsdp;
    Optimizer optimizer;
    Arena arena;
    int64_t R;           // rows of a micro-batch
    int n_micro, round;  // micro-batches of a round; the round under way
    int n_in_flight;     // micro-batches in flight at once
    InFlight *in_flight; // (n_in_flight)
    Workspace work;
    TokenBuffers tokens;
    Activations act;
    SavedCounts counts;
    Head head;
    RouterTotals router;
    Norms norms;
    int64_t updates;       // made so far (t of the optimizer: skipped ones do not count)
    Dump *dump;            // 0, or writes this update's logits and gradients
    Trace *trace;          // 0, or follows one token of this update
    RoutingFiles *routing; // 0, or records or replays the routing
} Trainer;

// ---- trainer.c ------------------------------------------------------------------------------
// Counts, then allocates everything; with plan_only it only counts. Prints the byte table to
// `report` if it is not 0. All weights are zero until trainer_init or a checkpoint fills them. Dies
// where the options do not divide the batch or contradict each other.
Trainer *trainer_create(Model *m, Grid *g, StepOptions o, OptimizerOptions opt, int plan_only,
                        FILE *report);
void trainer_free(Trainer *t);
// Fills the weights as transformers initialises them: N(0, init_std), norms one, the embedding's
// pad row zero.
void trainer_init(Trainer *t);

// ---- step.c ---------------------------------------------------------------------------------
// Reads this rank's windows of an update, which the next trainer_step() makes. Returns 1; 0 with
// *fault where the data cannot be read or is no longer the same, or ends the run where fault is 0.
int trainer_read(Trainer *t, const Loader *data, int64_t update, Fault *fault);
// Makes one update from windows [(update - 1) * batch, update * batch) of data, which it reads
// itself where trainer_read() has not. Leaves everything unchanged, on all ranks alike, if the
// gradient is not finite.
StepResult trainer_step(Trainer *t, Loader *data, int64_t update, double lr);
// Ends the run after such an update, naming the first block of backward that is not finite.
void trainer_die_nonfinite(Trainer *t, int64_t update);
// Runs the first n micro-batches of the tokens through all layers. training: saves activations.
// given: the saved topk are already there, and the router computes their scores.
void step_forward(Trainer *t, int n, int training, int given);
// Adds the losses of all micro-batches to head.loss_sum. training: computes act.dx and the head's
// gradients with the loss seed 1/N (I1, one gradient rule), N = tokens.valid.
void step_head(Trainer *t, int training);
// The final norm and the head's matrix (a tied one is the embedding), and their gradients.
typedef struct {
    const floatX *norm, *matrix; // (C) (V,C)
    gradX *dnorm, *dmatrix;      // 0 unless training
    int matrix_block;
} HeadPointers;
// Gathers them, and gives them back.
HeadPointers head_get(Trainer *t, int training);
void head_release(Trainer *t);
// Reads a window: targets that do not count become -1. Returns those that count.
int64_t step_targets(const Trainer *t, const int *ids, int *targets);
// Uploads the first n micro-batches of the round's ids and, for documents, their positions, in
// which every rank of the ep group takes part. targets may be 0: not wanted.
void step_upload(Trainer *t, const int *ids, const int *targets, int n);
// Address the parts of a micro-batch.
int *micro_ids(const Trainer *t, int micro);             // (R)
floatX *micro_dx(const Trainer *t, int micro);           // (R,C)
Saved *saved_of(const Trainer *t, int layer, int micro); // layer L: the head's input
InFlight *in_flight_of(const Trainer *t, int micro);

// ---- router_totals.c ------------------------------------------------------------------------
// Takes the device's part from the arena, which may be counting.
void router_totals_create(RouterTotals *r, const Model *m, int with_bias, Arena *arena);
void router_totals_create_host(RouterTotals *r, const Model *m);
void router_totals_free(RouterTotals *r);
// Clears a round's statistics, and the update's with it if `update` is 1.
void router_totals_clear(Trainer *t, int update);
// Points to the statistics of a layer for router_forward; all 0 in a dense layer.
RouterStats router_totals_of(const Trainer *t, int layer);
const real *router_bias_of(const Trainer *t, int layer); // (E), or 0
// Sums the round's statistics over the ranks and computes the shares f from them.
void router_totals_sum(Trainer *t);
// Returns what the router's backward in a layer needs from them.
RouterLoss router_loss_of(const Trainer *t, int layer);
// Adds the round's statistics to the update's on the host. Returns the round's auxiliary loss.
double router_totals_collect(Trainer *t);
// Fills in z, expert_dead and expert_load_max from the update's.
void router_totals_report(const Trainer *t, StepResult *r);
// Moves the selection bias by the update's counts (--balance bias).
void router_bias_update(Trainer *t);
// Sets the selection bias (n) from host memory; n = MoE layers * E.
void trainer_set_bias(Trainer *t, const float *bias, size_t n);

// ---- routing.c ------------------------------------------------------------------------------
// Prepares to write the routing of every update to the folder `record`, and to take it from
// `replay`, a folder of such files or one file for the first update. "" is neither; returns 0 if
// both are. Dies if the model has no experts, or replay does not exist or is a folder without the
// file of one of the updates first to last.
RoutingFiles *routing_open(const Trainer *t, const char *record, const char *replay, int64_t first,
                           int64_t last);
void routing_close(RoutingFiles *f);
// Open and close the files of an update. Die on a file that is missing or not of its shape.
void routing_start(Trainer *t, int64_t update);
void routing_finish(Trainer *t);
// Before a round's forward: tells whether its choices are given, and puts them into the saved topk.
// Dies on ids that are not K different experts.
int routing_given(Trainer *t);
// After a round's forward: records its choices, also in a dump.
void routing_made(Trainer *t);
// Returns the first token of this rank's part of a round among all of the update.
int64_t routing_token(const Trainer *t);
// Tells whether this rank writes what belongs to its tokens: of replicas one does.
int routing_writer(const Trainer *t);
// Writes this rank's part of the round's topk (MoE layers, B, T, K), which begins at byte `at` of
// fd. Returns 0 or errno.
int routing_write(const Trainer *t, int fd, int64_t at);

// ---- evaluate.c -----------------------------------------------------------------------------
// Returns the mean cross entropy over the first n_windows windows of a source of data, in file
// order, the same on every layout; and in *n_targets, if it is not 0, the targets that it is a mean
// of. Where a window cannot be read, this rank gets *fault and goes on without it, so that all
// ranks come to the end; the loss then means nothing. Ends the run instead where fault is 0.
double trainer_evaluate(Trainer *t, Loader *data, int source, int64_t n_windows, double *n_targets,
                        Fault *fault);
// Computes the logits (V) of the token after ids[length - 1], length <= T, both in host memory.
// Every rank calls it with the same ids and gets the same numbers.
void trainer_logits(Trainer *t, const int *ids, int length, float *logits);
MOE_END_C
#endif
