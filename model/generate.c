// Text from the model in training: one forward pass a token (trainer_logits), one draw from its
// logits. Offers generate.
#define _POSIX_C_SOURCE 200809L
#include "inspect.h"
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
    double sum = 0;
    double at = 0;
    for (int v = 0; v < usable; v++) sum += exp((logits[v] - logits[best]) / temperature);
    for (int v = 0; v < usable; v++) {
        at += exp((logits[v] - logits[best]) / temperature);
        if (at > uniform * sum) return v;
    }
    return best;
}

// The tokens of the prompt with room for n more; *length of them are filled in, at least one.
static int *encode_prompt(const Tokens *tokens, const char *prompt, int V, int n, int64_t *length) {
    int64_t count = tokens_encode(tokens, 0, 0, prompt, strlen(prompt));
    int *ids = (int *)xmalloc((count + n + 1) * sizeof(int), "sample");
    tokens_encode(tokens, ids, count, prompt, strlen(prompt));
    for (int64_t i = 0; i < count; i++)
        if (ids[i] >= V)
            die("the prompt has token %d, the vocabulary %d entries|"
                "use the decode table of this model (--tokens)",
                ids[i], V);
    int end = tokens_eot(tokens);
    if (!count) ids[count++] = end >= 0 && end < V ? end : '\n';
    *length = count;
    return ids;
}

// The text so far. Bytes of a character whose last ones are in the next token wait in `held`.
typedef struct {
    char held[4];
    size_t n;
    FILE *kept; // writes to `text`
    char *text;
    size_t bytes, shown;
} Output;

// Prints what was added to the text since the last call.
static void show(Output *out) {
    if (fflush(out->kept)) die("out of host memory for a sample|free memory");
    fwrite(out->text + out->shown, 1, out->bytes - out->shown, stdout);
    out->shown = out->bytes;
    fflush(stdout);
}

static void print_token(Output *out, const Tokens *tokens, int id) {
    size_t bytes;
    const char *piece = tokens_piece(tokens, id, &bytes);
    if (id == tokens_eot(tokens)) {
        piece = "<|endoftext|>";
        bytes = strlen(piece);
    }
    for (size_t i = 0; piece && i < bytes; i++) {
        out->held[out->n++] = piece[i];
        size_t done = tokens_print(out->kept, out->held, out->n, 1);
        out->n -= done;
        memmove(out->held, out->held + done, out->n);
    }
    show(out);
}

char *generate(Trainer *t, const Tokens *tokens, const char *prompt, int n, double temperature,
               int64_t step) {
    int V = t->m->c.V, T = t->o.T;
    int speaks = t->g->rank == 0;
    // Rows of the vocabulary without a token are never drawn.
    int usable = tokens_vocab(tokens) < V ? tokens_vocab(tokens) : V;
    int64_t length;
    int *ids = encode_prompt(tokens, prompt, V, n, &length);
    float *logits = (float *)xmalloc(V * sizeof(float), "logits");
    Output out;
    memset(&out, 0, sizeof out);
    if (speaks) {
        out.kept = open_memstream(&out.text, &out.bytes);
        if (!out.kept) die("out of host memory for a sample|free memory");
        printf("sample> ");
        tokens_print(out.kept, prompt, strlen(prompt), 0);
        show(&out);
    }
    for (int64_t total = length + n; length < total; length++) {
        int64_t first = length > T ? length - T : 0;
        trainer_logits(t, ids + first, (int)(length - first), logits);
        ids[length] = sample(logits, usable, temperature, draw(t->o.seed, step, length));
        if (speaks) print_token(&out, tokens, ids[length]);
    }
    if (speaks) {
        tokens_print(out.kept, out.held, out.n, 0);
        show(&out);
        printf("\n");
        fflush(stdout);
        fclose(out.kept);
    }
    free(ids);
    free(logits);
    return out.text;
}
