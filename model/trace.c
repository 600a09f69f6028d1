// Follows one token through one update: where it went, layer by layer, and the gradient that came
// back. Reads the trainer's saved activations after each layer; offers what inspect.h says.
#include "inspect.h"
#include "../kernels/fail.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    int *expert, *row; // (K)
    real *score;       // (K)
    double norm_out, norm_back;
} LayerTrace;
struct Trace {
    int64_t token;
    int here, round, micro; // whether this rank has it, and where
    int64_t row;
    LayerTrace *layer; // (L)
};

Trace *trace_open(const Trainer *t, int64_t token) {
    int64_t total = t->o.batch * t->o.T;
    int64_t per_rank = t->tokens.sequences * t->o.T;
    int64_t at = token - t->g->data_rank * per_rank;
    size_t K = t->m->c.K;
    if (token < 0 || token >= total)
        die("--trace-token %lld: an update has tokens 0 to %lld|choose one of them",
            (long long)token, (long long)total - 1);
    Trace *trace = (Trace *)xcalloc(1, sizeof(Trace), "trace");
    int first_copy = t->g->world == t->g->data_ranks || t->g->ep_rank == 0;
    trace->token = token;
    trace->here = at >= 0 && at < per_rank && first_copy;
    trace->layer = (LayerTrace *)xcalloc(t->m->c.L, sizeof(LayerTrace), "trace");
    if (!trace->here) return trace;
    trace->round = (int)(at / (t->n_micro * t->R));
    trace->micro = (int)(at / t->R % t->n_micro);
    trace->row = at % t->R;
    for (int l = 0; l < t->m->c.L; l++) {
        LayerTrace *k = &trace->layer[l];
        k->expert = (int *)xcalloc(K, sizeof(int), "trace");
        k->row = (int *)xcalloc(K, sizeof(int), "trace");
        k->score = (real *)xcalloc(K, sizeof(real), "trace");
    }
    return trace;
}

static double row_norm(const floatX *device, int64_t n) {
    floatX *row = (floatX *)xmalloc(n * sizeof(floatX), "trace");
    device_download(row, device, n * sizeof(floatX));
    double sum = 0;
    for (int64_t i = 0; i < n; i++) {
        double x = (double)floatx_to_float(row[i]);
        sum += x * x;
    }
    free(row);
    return sqrt(sum);
}

static int follows(const Trainer *t, int micro) {
    return t->trace->here && t->round == t->trace->round && micro == t->trace->micro;
}

void trace_forward(Trainer *t, int layer, int micro) {
    const Config *c = &t->m->c;
    if (!follows(t, micro)) return;
    int64_t row = t->trace->row;
    int64_t chosen = row * c->K;
    LayerTrace *k = &t->trace->layer[layer];
    const Saved *s = saved_of(t, layer, micro);
    k->norm_out = row_norm(saved_of(t, layer + 1, micro)->x + row * c->C, c->C);
    if (!c->is_moe[layer]) return;
    device_download(k->expert, s->topk + chosen, c->K * sizeof(int));
    device_download(k->score, s->score + chosen, c->K * sizeof(real));
    if (t->work.tokens_move) return;
    const RowIndex *index = &in_flight_of(t, micro)->route.index;
    device_download(k->row, index->token_row + chosen, c->K * sizeof(int));
}

void trace_backward(Trainer *t, int layer, int micro) {
    if (!follows(t, micro)) return;
    int64_t C = t->m->c.C;
    t->trace->layer[layer].norm_back = row_norm(micro_dx(t, micro) + t->trace->row * C, C);
}

static void print_trace(const Trainer *t, const Trace *trace, const Tokens *tokens) {
    const Config *c = &t->m->c;
    int moves = t->work.tokens_move;
    int experts = c->E / t->g->ep;
    int64_t at = (trace->round * t->n_micro + trace->micro) * t->R + trace->row;
    int id = t->tokens.host_ids[at];
    int target = t->tokens.host_targets[at];
    char text[64];
    char next[64] = "(ignored)";
    tokens_show(tokens, text, sizeof text, id);
    if (target >= 0) tokens_show(tokens, next, sizeof next, target);
    printf("token %lld of the update: id %d %s, target %d %s, on rank %d, micro-batch %d, "
           "row %lld\n",
           (long long)trace->token, id, text, target, next, t->g->rank, trace->micro,
           (long long)trace->row);
    printf("  layer   experts (score -> %s)   |x| out   |dL/dx| back\n",
           moves ? "ep rank" : "expert row");
    for (int l = 0; l < c->L; l++) {
        const LayerTrace *k = &trace->layer[l];
        printf("  %5d   ", l);
        if (!c->is_moe[l]) printf("dense MLP");
        for (int j = 0; j < c->K && c->is_moe[l]; j++)
            printf("%s%d (%.3f -> %d)", j ? ", " : "", k->expert[j], (double)(float)k->score[j],
                   moves ? k->expert[j] / experts : k->row[j]);
        printf("   %.4g   %.4g\n", k->norm_out, k->norm_back);
    }
    if (moves)
        printf("  bytes of this token per MoE layer and direction: one copy of %zu to each rank "
               "above but its own\n",
               c->C * sizeof(floatX) + c->K * sizeof(real));
    fflush(stdout);
}

void trace_close(Trainer *t, const Tokens *tokens) {
    Trace *trace = t->trace;
    t->trace = 0;
    if (trace->here) print_trace(t, trace, tokens);
    for (int l = 0; l < t->m->c.L; l++) {
        free(trace->layer[l].expert);
        free(trace->layer[l].row);
        free(trace->layer[l].score);
    }
    free(trace->layer);
    free(trace);
}
