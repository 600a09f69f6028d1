// Forward alone: the validation loss and the logits that sampling needs, by the same kernels and
// collectives as training, on all ranks. Contracts in step.h.
#include "step.h"
#include "../kernels/fail.h"
#include <stdlib.h>

// Reads `sequences` windows of a source from `first` on. Windows from n_windows on, which the last
// pass may reach, count nothing, and neither does any once *fault has been filled in. Returns the
// targets that count.
static int64_t read_windows(const Trainer *t, Loader *data, int source, int64_t first,
                            int64_t sequences, int64_t n_windows, int *ids, int *targets,
                            Fault *fault) {
    int64_t T = t->o.T;
    int64_t valid = 0;
    for (int64_t s = 0; s < sequences; s++) {
        int counts = first + s < n_windows && !(fault && fault->what);
        int *window = ids + s * T;
        if (counts)
            counts = loader_read_source(data, source, first + s, window, targets + s * T, fault);
        if (!counts) memset(window, 0, T * sizeof *window);
        for (int64_t i = 0; i < T && !counts; i++) targets[s * T + i] = -1;
        valid += step_targets(t, ids + s * T, targets + s * T);
    }
    return valid;
}

// Every rank makes the same number of passes (I2, collectives do not depend on data).
double trainer_evaluate(Trainer *t, Loader *data, int source, int64_t n_windows, double *n_targets,
                        Fault *fault) {
    int64_t tokens = t->n_micro * t->R;
    int64_t sequences = tokens / t->o.T;
    int64_t valid = 0;
    size_t bytes = 2 * tokens * sizeof(int);
    int *ids = (int *)xmalloc(bytes, "validation tokens");
    int *targets = ids + tokens;
    device_zero(t->head.loss_sum, sizeof(double));
    for (int64_t pass = 0; pass < n_windows; pass += sequences * t->g->data_ranks) {
        int64_t first = pass + t->g->data_rank * sequences;
        valid += read_windows(t, data, source, first, sequences, n_windows, ids, targets, fault);
        step_upload(t, ids, targets, t->n_micro);
        step_forward(t, t->n_micro, 0, 0);
        step_head(t, 0);
    }
    free(ids);
    comm_wait(all_reduce_start(t->g->all, t->head.loss_sum, 1, DTYPE_F64, STREAM_EXCHANGE));
    double sum;
    double n = comm_sum(t->g->all, (double)valid);
    device_download(&sum, t->head.loss_sum, sizeof sum);
    if (n_targets) *n_targets = n;
    return sum / n;
}

// The sequence is the first of a micro-batch; what follows it repeats token 0, which causal
// attention keeps out of its logits. No cache of keys and values: sampling is for looking at a
// model.
void trainer_logits(Trainer *t, const int *ids, int length, float *logits) {
    const Config *c = &t->m->c;
    Head *h = &t->head;
    int *padded = (int *)xcalloc(t->R, sizeof(int), "prompt");
    memcpy(padded, ids, length * sizeof(int));
    step_upload(t, padded, 0, 1);
    free(padded);
    step_forward(t, 1, 0, 0);
    HeadPointers p = head_get(t, 0);
    const floatX *x = saved_of(t, c->L, 0)->x + (int64_t)(length - 1) * c->C;
    rmsnorm_forward(h->x, h->rstd, x, p.norm, (real)c->rms_eps, 1, c->C);
    linear_forward(h->logits, h->x, p.matrix, 1, c->V, c->C);
    head_release(t);
    size_t bytes = c->V * sizeof(floatX);
    floatX *staged = (floatX *)xmalloc(bytes, "logits");
    device_download(staged, h->logits, bytes);
    for (int v = 0; v < c->V; v++) logits[v] = floatx_to_float(staged[v]);
    free(staged);
}
