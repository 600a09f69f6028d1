// --plan: what a layout needs and costs, from the config alone. Memory is the allocator run on a
// counting arena, so it cannot disagree with the program; bytes sent follow the calls of
// model/step.c one by one (tests compare them with what is measured); times are a roofline, printed
// with its assumptions.
#ifndef MOE_PLAN_H
#define MOE_PLAN_H
#include "step.h"
#include <stdio.h>
MOE_BEGIN_C

// Bytes that this rank (in a plan: rank 0) sends to others in one update, by purpose; what ranks
// agree on through the host (a few numbers an update) is not counted.
typedef enum {
    SEND_DENSE_WEIGHTS,
    SEND_LOCAL_WEIGHTS,
    SEND_DENSE_GRADS,
    SEND_LOCAL_GRADS,
    SEND_DP,
    SEND_ROUTING,
    SEND_TOKENS,
    SEND_HEADS,
    SEND_STATISTICS,
    SEND_KINDS
} SendKind;
typedef struct {
    double bytes[SEND_KINDS];
} Traffic;
// What only a run knows, or a guess of it.
typedef struct {
    double sent,
        received; // token copies in the forward dispatch of a micro-batch, mean over MoE layers and
                  // micro-batches: measured (Trainer), plan_uniform_rows(), plan_most_rows()
    double respread; // share of the sent ones that backward dispatches again, because what arrived
                     // was not kept
    double reattended; // share of (layer, micro-batch) pairs whose attention is recomputed
} Routing;
Traffic plan_traffic(const Model *m, const Grid *g, const StepOptions *o, Routing routing);
double plan_uniform_rows(const Config *c, const Grid *g, int R); // every expert set equally likely
double plan_most_rows(const Config *c, const Grid *g, int R);    // no routing sends more

typedef struct {
    const char *name;
    double flops,
        memory_bandwidth; // model FLOP/s of a whole update's bf16 kernels, bytes/s of copies
    double memory;        // bytes that a program can use
    double link, network; // bytes/s per rank and direction: inside a node, between nodes
    int per_node;
} Machine;
// By name (h200, h100, a100, b200, cpu), dies naming the choices.
Machine plan_machine(const char *name);

// For the 8-bit optimizer: dies where the layout cuts a block of its state, naming layouts of the
// same number of ranks that do not.
void plan_check_blocks(const Config *c, const Grid *g);
// Prints the plan of one layout: memory, traffic (uniform, and the most that routing could ask
// for), time by roofline, what limits, warnings; then the best layouts of this world that fit.
void plan_print(FILE *out, const Config *c, const Grid *g, StepOptions o, OptimizerOptions opt,
                const Machine *machine);
MOE_END_C
#endif
