// What a run remembers of itself in trainer.json, and what has to be the same when it goes on: the
// data order, the optimizer, and everything that defines the mathematics. A run that went on with
// anything else would be another run under the same name.
#ifndef MOE_RESUME_H
#define MOE_RESUME_H
#include "step.h"
#include "options.h"
struct cJSON;
MOE_BEGIN_C
// Returns the values of trainer.json that are the caller's of checkpoint_save(); the caller deletes
// it. data: the training data, 0 = none.
struct cJSON *resume_json(const Trainer *t, const Options *o, const Loader *data);
// Compares a checkpoint in `dir`, of which trainer.json is `trainer`, with this run. Ends the run
// on another seed, batch, sequence length, order or optimizer; and on another precision
// (`precision`), config.json (the name of the field) or training data (`data`) unless
// --allow-changed names it. A look at a run (--steps 0) only has to have the same config. Says on
// `screen` (0: silent) which rates and schedules are new. Step 0 is a conversion: it had no data
// and no optimizer.
void resume_check(const struct cJSON *trainer, const Options *o, const Config *c,
                  const Loader *data, const char *dir, int64_t step, FILE *screen);
// Gives the trainer its counters and biases. Ends the run where one is out of range.
void resume_restore(Trainer *t, const struct cJSON *trainer, int64_t step);
MOE_END_C
#endif
