// Text from the model in training: for looking at it, not for serving it (every token is a full
// forward pass, without a cache).
#ifndef MOE_GENERATE_H
#define MOE_GENERATE_H
#include "step.h"
#include "../data/tokens.h"
MOE_BEGIN_C
// Continues `prompt` by n tokens and prints the text on rank 0 as it comes (see tokens_print).
// Returns the text as printed, prompt first (rank 0; else 0); the caller frees it. An
// empty prompt is the end-of-text token, or a newline if there is none. temperature 0 takes the
// likeliest token. Longer texts see their last T tokens. All ranks call it and draw the same
// tokens: a draw is a function of (seed, step, position). Dies on a prompt token outside the
// vocabulary.
char *generate(Trainer *t, const Tokens *tokens, const char *prompt, int n, double temperature,
               int64_t step);
MOE_END_C
#endif
