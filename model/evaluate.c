// Forward alone: validation loss and the logits that sampling needs. The same kernels and
// collectives as training, on all ranks.
#include "step.h"
#include "../kernels/fail.h"
#include <stdlib.h>
#include <string.h>

// Windows behind n_windows, which the last pass may reach, count nothing: every rank makes the same
// passes (I2).
double trainer_evaluate(Trainer *t, Loader *data, int source, int64_t n_windows,
                        double *n_targets) {
    int T = t->o.T, per_rank = t->n_micro * t->R / T;
    int64_t per_pass = (int64_t)per_rank * t->g->data_ranks, valid = 0;
    int *ids = (int *)xcalloc((size_t)per_rank * (size_t)T, 2 * sizeof(int), "validation tokens"),
        *targets = ids + (size_t)per_rank * (size_t)T;
    device_zero(t->loss_sum, sizeof(double));
    for (int64_t first = 0; first < n_windows; first += per_pass) {
        for (int s = 0; s < per_rank; s++) {
            int64_t window = first + (int64_t)t->g->data_rank * per_rank + s;
            int *id = ids + (size_t)s * (size_t)T, *target = targets + (size_t)s * (size_t)T;
            loader_read_source(data, source, window < n_windows ? window : 0, id, target);
            for (int i = 0; i < T; i++) {
                if (window >= n_windows || target[i] == t->o.ignore_target) target[i] = -1;
                valid += target[i] >= 0;
            }
        }
        device_upload(t->ids, ids, (size_t)per_rank * (size_t)T * sizeof(int));
        device_upload(t->targets, targets, (size_t)per_rank * (size_t)T * sizeof(int));
        step_forward(t, t->n_micro, 0);
        step_head(t, 0, 0, 0);
    }
    free(ids);
    comm_wait(all_reduce_start(t->g->all, t->loss_sum, 1, DTYPE_F64, STREAM_EXCHANGE));
    double sum, n = comm_sum(t->g->all, (double)valid);
    device_download(&sum, t->loss_sum, sizeof sum);
    if (n_targets) *n_targets = n;
    return sum / n;
}

// One sequence in the first row block of a micro-batch; the other sequences repeat token 0 and are
// ignored. No cache of keys and values: sampling is for looking at a model, not for serving it.
void trainer_logits(Trainer *t, const int *ids, int length, float *logits) {
    const Config *c = &t->m->c;
    int *padded = (int *)xcalloc((size_t)t->R, sizeof(int), "prompt");
    memcpy(padded, ids, (size_t)length * sizeof(int));
    device_upload(t->ids, padded, (size_t)t->R * sizeof(int));
    free(padded);
    step_forward(t, 1, 0);
    const Param *norm = model_param(t->m, P_FINAL_NORM, c->L),
                *matrix =
                    c->tied ? model_param(t->m, P_EMBED, -1) : model_param(t->m, P_HEAD, c->L);
    int block = c->tied ? t->m->embed_block : t->m->head_block;
    const floatX *wn = fsdp_get(t->fsdp, t->m->head_block) + norm->offset,
                 *wh = fsdp_get(t->fsdp, block) + matrix->offset;
    rmsnorm_forward(t->yf, t->head_rstd,
                    t->kept[(size_t)c->L * (size_t)t->n_micro].x +
                        (size_t)(length - 1) * (size_t)c->C,
                    wn, (real)c->rms_eps, 1, c->C);
    linear_forward(t->logits, t->yf, wh, 1, c->V, c->C);
    fsdp_release(t->fsdp, t->m->head_block);
    if (c->tied) fsdp_release(t->fsdp, t->m->embed_block);
    floatX *staged = (floatX *)xmalloc((size_t)c->V * sizeof(floatX), "logits");
    device_download(staged, t->logits, (size_t)c->V * sizeof(floatX));
    for (int v = 0; v < c->V; v++) logits[v] = floatx_to_float(staged[v]);
    free(staged);
}
