// --trace-token I: the way of token I of the first update: layer by layer the experts that it
// chose, scores, pool rows and ranks, and the gradient that came back.
#ifndef MOE_TRACE_H
#define MOE_TRACE_H
#include "step.h"
#include "../data/tokens.h"
MOE_BEGIN_C
// token: index into the update's B*T tokens in data order; dies where it is outside. Every rank
// calls it; the one that has the token prints.
Trace *trace_open(const Trainer *t, int64_t token);
void trace_forward(Trainer *t, int layer,
                   int micro); // after the layer's forward of that micro-batch
void trace_backward(Trainer *t, int layer, int micro); // after its backward
// Prints what was combined and sets t->trace = 0.
void trace_close(Trainer *t, const Tokens *tokens);
MOE_END_C
#endif
