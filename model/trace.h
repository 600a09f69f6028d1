// --trace-token I: the way of token I of the first update: layer by layer the experts that it
// chose, scores, expert rows or ranks, and the gradient that came back.
#ifndef MOE_TRACE_H
#define MOE_TRACE_H
#include "step.h"
#include "../data/tokens.h"
MOE_BEGIN_C
// Starts to follow token `token` of the update's B*T tokens in data order. Dies if there is none.
// Every rank calls it; the one that has the token prints.
Trace *trace_open(const Trainer *t, int64_t token);
// Notes what the layer did to it, after forward and after backward of that micro-batch.
void trace_forward(Trainer *t, int layer, int micro);
void trace_backward(Trainer *t, int layer, int micro);
// Prints what was noted, frees the trace and sets t->trace to 0.
void trace_close(Trainer *t, const Tokens *tokens);
MOE_END_C
#endif
