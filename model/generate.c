// Sampling: see generate.h.
#include "generate.h"
#include "../kernels/fail.h"
#include "../kernels/random.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static double draw(uint64_t seed, int64_t step, int64_t position) {
    return random_uniform(random_half(
        philox(seed, tensor_id("sample"), (uint64_t)position, (uint64_t)step, RANDOM_SAMPLE), 0));
}

static int sample(const float *logits, int usable, double temperature, double uniform) {
    int best = 0;
    for (int v = 1; v < usable; v++)
        if (logits[v] > logits[best]) best = v;
    if (temperature <= 0) return best;
    double sum = 0, at = 0;
    for (int v = 0; v < usable; v++) sum += exp((logits[v] - logits[best]) / temperature);
    for (int v = 0; v < usable; v++) {
        at += exp((logits[v] - logits[best]) / temperature);
        if (at > uniform * sum) return v;
    }
    return best;
}

void generate(Trainer *t, const Tokens *tokens, const char *prompt, int n, double temperature,
              int64_t step) {
    const Config *c = &t->m->c;
    int T = t->o.T, usable = tokens_vocab(tokens) < c->V
                                 ? tokens_vocab(tokens)
                                 : c->V; // rows of the vocabulary without a token are never drawn
    int64_t length = tokens_encode(tokens, 0, 0, prompt, strlen(prompt)), total;
    int *ids = (int *)xmalloc((size_t)(length + n + 1) * sizeof(int), "sample");
    tokens_encode(tokens, ids, length, prompt, strlen(prompt));
    for (int64_t i = 0; i < length; i++)
        if (ids[i] >= c->V)
            die("the prompt has token %d, the vocabulary %d entries|use the decode table of this model (--tokens)",
                ids[i], c->V);
    if (!length)
        ids[length++] =
            tokens_eot(tokens) >= 0 && tokens_eot(tokens) < c->V ? tokens_eot(tokens) : '\n';
    float *logits = (float *)xmalloc((size_t)c->V * sizeof(float), "logits");
    char held[4]; // bytes of a character whose last ones are in the next token
    size_t n_held = 0;
    if (t->g->rank == 0) printf("sample> %s", prompt);
    for (total = length + n; length < total; length++) {
        int64_t first = length > T ? length - T : 0;
        trainer_logits(t, ids + first, (int)(length - first), logits);
        ids[length] = sample(logits, usable, temperature, draw(t->o.seed, step, length));
        size_t bytes;
        const char *piece = tokens_piece(tokens, ids[length], &bytes);
        if (t->g->rank == 0) {
            if (ids[length] == tokens_eot(tokens)) piece = "<|endoftext|>", bytes = strlen(piece);
            for (size_t i = 0; piece && i < bytes; i++) {
                held[n_held++] = piece[i];
                size_t done = tokens_print(stdout, held, n_held, 1);
                memmove(held, held + done, n_held -= done);
            }
            fflush(stdout);
        }
    }
    if (t->g->rank == 0) {
        tokens_print(stdout, held, n_held, 0);
        printf("\n");
        fflush(stdout);
    }
    free(ids);
    free(logits);
}
