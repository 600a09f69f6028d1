// Three ways to look at a model in training: text that it writes, the way of one token through it,
// and where the time of an update goes.
#ifndef MOE_INSPECT_H
#define MOE_INSPECT_H
#include "file.h"
#include "step.h"
#include "../data/tokens.h"
MOE_BEGIN_C
// ---- generate.c: text, for looking at it, not for serving it (every token is a full forward pass,
// without a cache) ----
// Continues `prompt` by n tokens and prints the text on rank 0 as it comes (see tokens_print).
// Returns the text as printed, prompt first (rank 0; else 0); the caller frees it. An
// empty prompt is the end-of-text token, or a newline if there is none. temperature 0 takes the
// likeliest token. Longer texts see their last T tokens. All ranks call it and draw the same
// tokens: a draw is a function of (seed, step, position). Dies on a prompt token outside the
// vocabulary.
char *generate(Trainer *t, const Tokens *tokens, const char *prompt, int n, double temperature,
               int64_t step);

// ---- trace.c: --trace-token I, the way of token I of the first update: layer by layer the experts
// that it chose, scores, expert rows or ranks, and the gradient that came back ----
// Starts to follow token `token` of the update's B*T tokens in data order. Dies if there is none.
// Every rank calls it; the one that has the token prints.
Trace *trace_open(const Trainer *t, int64_t token);
// Notes what the layer did to it, after forward and after backward of that micro-batch.
void trace_forward(Trainer *t, int layer, int micro);
void trace_backward(Trainer *t, int layer, int micro);
// Prints what was noted, frees the trace and sets t->trace to 0.
void trace_close(Trainer *t, const Tokens *tokens);

// ---- profile.c: --profile STEP. Every kernel, every collective and every wait for one reports
// itself when it begins (kernels/device.h), and lasts until the next one does ----
typedef struct Profile Profile;
// Starts to listen; the ranks of `all` together, so that their clocks begin at one moment. Each
// report then waits for the device: times are exact, but nothing overlaps and the update is slower.
Profile *profile_start(Comm *all);
// Stops to listen and prints the reports by time, those of one name and about one size together;
// nothing if `file` is 0.
void profile_print(Profile *profile, FILE *file);
// Writes one report an event in the format of Chrome's tracing and of Perfetto, with a process for
// each rank and a row for each stream, to profile-<step>.trace.json. All ranks call it, rank 0
// writes, and warns where it cannot.
void profile_trace(const Profile *profile, const RunFolder *folder, int64_t step);
void profile_free(Profile *profile);
MOE_END_C
#endif
