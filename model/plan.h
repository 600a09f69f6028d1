// --plan: what a layout needs and costs, from the config alone. Memory is the allocator run on a
// counting arena, so it cannot disagree with the program; bytes sent follow the calls of
// model/step.c one by one (tests compare them with what is measured); time is a roofline, printed
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
// What only a run knows (Trainer.counts), or a guess of it.
typedef struct {
    double sent, received; // token copies in the forward dispatch of a micro-batch, mean over MoE
                           // layers and micro-batches
    double respread;       // share of those sent that backward dispatches again (pool not saved)
    double rerouted;       // share of dispatches whose row index backward makes again
    double reattended;     // share of (layer, micro-batch) pairs whose attention is computed again
} Routing;
// Computes the bytes from the sizes of the collectives.
Traffic plan_traffic(const Model *m, const Grid *g, const StepOptions *o, Routing routing);
// Return the copies that a rank sends for R tokens where every set of K experts is equally likely,
// and the most that any routing asks for.
double plan_uniform_rows(const Config *c, const Grid *g, int64_t R);
double plan_most_rows(const Config *c, const Grid *g, int64_t R);

typedef struct {
    const char *name;
    double flops;            // model FLOP/s of a whole update's bf16 kernels
    double memory_bandwidth; // bytes/s of copies
    double memory;           // bytes that a program can use
    double link, network;    // bytes/s per rank and direction: inside a node, between nodes
    int per_node;
} Machine;
// Finds a machine by name (h200, h100, a100, b200, cpu). Dies naming the choices.
Machine plan_machine(const char *name);

// Dies where the layout cuts a 256-element block of the 8-bit optimizer's state, naming layouts of
// the same number of ranks that do not.
void plan_check_blocks(const Config *c, const Grid *g);
// Prints the plan of one layout: memory, traffic, time, what limits it, warnings; then the best
// layouts of this world that fit.
void plan_print(FILE *out, const Config *c, const Grid *g, StepOptions o, OptimizerOptions opt,
                const Machine *machine);
MOE_END_C
#endif
