// Follows one token through one update: see trace.h.
#include "trace.h"
#include "../kernels/fail.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    int *expert, *row;
    float *score;
    double norm_out, norm_back;
} LayerTrace;
struct Trace {
    int64_t token;
    int here, round, micro, row; // whether this rank has it, and where
    LayerTrace *layer;           // (L)
};

Trace *trace_open(const Trainer *t, int64_t token) {
    int64_t total = t->o.batch * t->o.T, per_rank = t->local_sequences * t->o.T,
            at = token - t->g->data_rank * per_rank;
    if (token < 0 || token >= total)
        die("--trace-token %lld: an update has tokens 0 to %lld|choose one of them",
            (long long)token, (long long)total - 1);
    Trace *trace = (Trace *)xcalloc(1, sizeof(Trace), "trace");
    trace->token = token;
    trace->here =
        at >= 0 && at < per_rank && (t->g->world == t->g->data_ranks || t->g->ep_rank == 0);
    trace->layer = (LayerTrace *)xcalloc((size_t)t->m->c.L, sizeof(LayerTrace), "trace");
    if (!trace->here) return trace;
    trace->round = (int)(at / ((int64_t)t->n_micro * t->R));
    trace->micro = (int)(at / t->R % t->n_micro);
    trace->row = (int)(at % t->R);
    for (int l = 0; l < t->m->c.L; l++) {
        trace->layer[l].expert = (int *)xcalloc((size_t)t->m->c.K, 2 * sizeof(int), "trace");
        trace->layer[l].row = trace->layer[l].expert + t->m->c.K;
        trace->layer[l].score = (float *)xcalloc((size_t)t->m->c.K, sizeof(float), "trace");
    }
    return trace;
}

static double row_norm(const floatX *device, int n) {
    floatX *row = (floatX *)xmalloc((size_t)n * sizeof(floatX), "trace");
    device_download(row, device, (size_t)n * sizeof(floatX));
    double sum = 0;
    for (int i = 0; i < n; i++) sum += (double)floatx_to_float(row[i]) * floatx_to_float(row[i]);
    free(row);
    return sqrt(sum);
}

void trace_forward(Trainer *t, int layer, int micro) {
    Trace *trace = t->trace;
    const Config *c = &t->m->c;
    if (!trace->here || t->round != trace->round || micro != trace->micro) return;
    LayerTrace *at = &trace->layer[layer];
    const Saved *kept = &t->kept[layer * t->n_micro + micro],
                *next = &t->kept[(layer + 1) * t->n_micro + micro];
    const InFlight *s = &t->slot[micro % t->n_slots];
    at->norm_out = row_norm(next->x + (size_t)trace->row * (size_t)c->C, c->C);
    if (!c->is_moe[layer]) return;
    real *score = (real *)xmalloc((size_t)c->K * sizeof(real), "trace");
    device_download(at->expert, kept->topk + (size_t)trace->row * (size_t)c->K,
                    (size_t)c->K * sizeof(int));
    device_download(score, kept->score + (size_t)trace->row * (size_t)c->K,
                    (size_t)c->K * sizeof(real));
    if (!t->work.moves)
        device_download(at->row, s->plan.token_row + (size_t)trace->row * (size_t)c->K,
                        (size_t)c->K * sizeof(int));
    for (int k = 0; k < c->K; k++) at->score[k] = (float)score[k];
    free(score);
}

void trace_backward(Trainer *t, int layer, int micro) {
    Trace *trace = t->trace;
    if (!trace->here || t->round != trace->round || micro != trace->micro) return;
    trace->layer[layer].norm_back = row_norm(
        t->dx + ((size_t)micro * (size_t)t->R + (size_t)trace->row) * (size_t)t->m->c.C, t->m->c.C);
}

void trace_close(Trainer *t, const Tokens *tokens) {
    Trace *trace = t->trace;
    const Config *c = &t->m->c;
    t->trace = 0;
    if (trace->here) {
        int64_t at = ((int64_t)trace->round * t->n_micro + trace->micro) * t->R + trace->row;
        int id = t->host_ids[at], target = t->host_targets[at], experts = c->E / t->g->ep;
        char text[64], next[64] = "(ignored)";
        tokens_show(tokens, text, sizeof text, id);
        if (target >= 0) tokens_show(tokens, next, sizeof next, target);
        printf(
            "token %lld of the update: id %d %s, target %d %s, on rank %d, micro-batch %d, row %d\n",
            (long long)trace->token, id, text, target, next, t->g->rank, trace->micro, trace->row);
        printf("  layer   experts (score -> %s)   |x| out   |dL/dx| back\n",
               t->work.moves ? "ep rank" : "expert row");
        for (int l = 0; l < c->L; l++) {
            LayerTrace *k = &trace->layer[l];
            printf("  %5d   ", l);
            if (!c->is_moe[l]) printf("dense MLP");
            for (int j = 0; j < c->K && c->is_moe[l]; j++)
                printf("%s%d (%.3f -> %d)", j ? ", " : "", k->expert[j], (double)k->score[j],
                       t->work.moves ? k->expert[j] / experts : k->row[j]);
            printf("   %.4g   %.4g\n", k->norm_out, k->norm_back);
        }
        if (t->work.moves)
            printf(
                "  bytes of this token per MoE layer and direction: one copy of %zu to each rank above but its own\n",
                (size_t)c->C * sizeof(floatX) + (size_t)c->K * sizeof(real));
        fflush(stdout);
    }
    for (int l = 0; l < c->L; l++) {
        free(trace->layer[l].expert);
        free(trace->layer[l].score);
    }
    free(trace->layer);
    free(trace);
}
