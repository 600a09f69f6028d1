// Text from the model in training: for looking at it, not for serving it (every token is a full
// forward pass, without a cache).
#ifndef MOE_GENERATE_H
#define MOE_GENERATE_H
#include "step.h"
#include "../data/tokens.h"
MOE_BEGIN_C
// Continues `prompt` (may be "": then the end-of-text token, or a newline byte) by n tokens and
// prints text (see tokens_print) as it comes on rank 0. temperature 0: the likeliest token. All
// ranks call it and draw the same tokens: the draws are a function of (seed, step, position).
// Longer texts see the last T tokens.
void generate(Trainer *t, const Tokens *tokens, const char *prompt, int n, double temperature,
              int64_t step);
MOE_END_C
#endif
