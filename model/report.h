// What a run says of itself. To a person and a plot: the page at the start, a line an update,
// log.jsonl, run.json, the heat map of expert load; rank 0 prints and writes these, on other ranks
// the functions report_... do nothing. And to the run that goes on with it: trainer.json.
#ifndef MOE_REPORT_H
#define MOE_REPORT_H
#include "step.h"
#include "options.h"
#include "file.h"
struct cJSON;
MOE_BEGIN_C
typedef struct {
    char *text;
    size_t bytes;
} LogLine;
typedef struct {
    int active;        // rank 0
    RunFolder *folder; // where log.jsonl and run.json go, 0 = nowhere
    FILE *log;         // the line of log.jsonl in the making, 0 = no log
    LogLine *line;     // its text
    char *held;        // complete lines that the disk has not taken yet
    size_t held_bytes;
    int log_fd, warned, replaced;
    int64_t log_size;       // bytes of complete lines in the file
    double peak;            // FLOP/s of all ranks, 0 = unknown: then MFU is not printed
    double flops_per_token; // forward and backward, active parameters
    int64_t first, steps;   // updates already made at the start, and in all
    double begin;           // time of the first update, of now_seconds()
} Report;

// Opens log.jsonl in `folder` (0: no log) and cuts it back to lines of steps <= step (again: <
// step, whose evaluation is to come). Ends the run where it cannot be read or written.
Report report_open(const Trainer *t, RunFolder *folder, int64_t step, int64_t steps, int again,
                   double peak);
// Makes the lines so far durable: called before a checkpoint is published, so that no checkpoint is
// ahead of its log. Warns where the disk refuses, or another file has taken the place of the log.
void report_sync(Report *r);
void report_close(Report *r);
// Prints one line on what other programs cannot do with checkpoints of a model, if there is
// anything.
void report_limits(const Config *c, int fused);
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
// Logs text that the model wrote after update `step`. Does nothing where there is no log.
void report_sample(Report *r, int64_t step, const char *text);
// Prints a line per MoE layer: the load of every expert (or of groups of experts) as shades in
// steps of a quarter of the mean, then max/mean, dead experts, entropy of the router in bits.
void report_heat_map(const Trainer *t, FILE *out);

// ---- resume.c: what a run remembers of itself in trainer.json, and what has to be the same when
// it goes on: the data order, the optimizer, and everything that defines the mathematics. A run
// that went on with anything else would be another run under the same name ---- Returns the values
// of trainer.json that are the caller's of checkpoint_save(); the caller deletes it. data: the
// training data, 0 = none.
struct cJSON *resume_json(const Trainer *t, const Options *o, const Loader *data);
// Compares a checkpoint in `dir`, of which trainer.json is `trainer`, with this run. Ends the run
// on another seed, batch, sequence length, order or optimizer; and on another precision
// (`precision`), config.json (the name of the field) or training data (`data`) unless
// --allow-changed names it. A look at a run (--steps 0) only has to have the same config. Says on
// `screen` (0: silent) which rates and schedules are new, and whether loss masks let other targets
// count. Step 0 is a conversion: it had no data and no optimizer.
void resume_check(const struct cJSON *trainer, const Options *o, const Config *c,
                  const Loader *data, const char *dir, int64_t step, FILE *screen);
// Gives the trainer its counters and biases. Ends the run where one is out of range.
void resume_restore(Trainer *t, const struct cJSON *trainer, int64_t step);
MOE_END_C
#endif
