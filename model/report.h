// What a person and a plot see: the page at the start, a line an update, log.jsonl, run.json, the
// heat map of expert load. Rank 0 prints and writes; on other ranks these functions do nothing.
#ifndef MOE_REPORT_H
#define MOE_REPORT_H
#include "step.h"
#include "options.h"
MOE_BEGIN_C
typedef struct {
    int active;             // rank 0
    FILE *log;              // log.jsonl, or 0 without --out
    double peak;            // FLOP/s of all ranks, 0 = unknown: then MFU is not printed
    double flops_per_token; // forward and backward, active parameters
    int64_t first, steps;   // updates already made at the start, and in all
    double begin;           // time of the first update, of now_seconds()
} Report;

// Cuts log.jsonl under `out` back to lines of steps <= step (without the evaluation of `step` where
// `again` says that it is to come), then opens it for appending; "" = no log. Ends the run where it
// cannot be written.
Report report_open(const Trainer *t, const char *out, int64_t step, int64_t steps, int again,
                   double peak);
void report_close(Report *r);
// Prints model, precision, backend, grid, data, batch, losses, optimizer and the formula of MFU,
// and writes out/run.json. source: where the model comes from; train, val: 0 = not given.
void report_start(const Report *r, const Trainer *t, const Options *o, const char *source,
                  const Loader *train, const Loader *val);
// Prints and logs one update that took `seconds`; with_experts: with the load of every expert.
void report_step(Report *r, const Trainer *t, int64_t step, const StepResult *s, double seconds,
                 int with_experts);
// Prints and logs how many of the first `windows` sequences each source of a mixture gave. Does
// nothing for a single source.
void report_sources(Report *r, int64_t step, const Loader *data, int64_t windows);
// Prints and logs a validation loss and, where val has several sources, that of each (part).
void report_evaluation(Report *r, int64_t step, double loss, const Loader *val, const double *part);
// Prints a line per MoE layer: the load of every expert (or of groups of experts) as shades in
// steps of a quarter of the mean, then max/mean, dead experts, entropy of the router in bits.
void report_heat_map(const Trainer *t, FILE *out);
MOE_END_C
#endif
