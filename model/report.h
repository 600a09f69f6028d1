// What a person and a plot see: startup report, a line per update, log.jsonl, run.json, the heat
// map of expert load. Rank 0 prints and writes; other ranks do nothing here.
#ifndef MOE_REPORT_H
#define MOE_REPORT_H
#include "step.h"
#include "options.h"
MOE_BEGIN_C
typedef struct {
    int active;  // rank 0
    FILE *log;   // log.jsonl, or 0 without --out
    double peak; // FLOP/s of all ranks, 0 = unknown: then MFU is not printed
    double flops_per_token;
    int64_t first, steps; // updates already made at the start, and in all
    double begin;         // wall clock of the first update
} Report;

// Cuts log.jsonl under `out` back to lines of steps <= step (resume; again: step itself is
// evaluated anew), then opens it for appending; out "" = no log. Dies where it cannot be written.
Report report_open(const Trainer *t, const char *out, int64_t step, int64_t steps, int again,
                   double peak);
void report_close(Report *r);
// The screen at the start: model, precision, backend, grid, data, batch, losses, optimizer, MFU
// formula. Also writes out/run.json.
void report_start(const Report *r, const Trainer *t, const Options *o, const char *source,
                  const Loader *train, const Loader *val);
void report_step(Report *r, const Trainer *t, int64_t step, const StepResult *s, double seconds,
                 int with_experts);
void report_evaluation(Report *r, int64_t step, double loss);
// One line per MoE layer: load of every expert (or of groups of experts) as shades in steps of a
// quarter of the mean, then max/mean, dead experts, entropy of the router in bits.
void report_heat_map(const Trainer *t, FILE *out);
MOE_END_C
#endif
