// One update, top to bottom (DESIGN 4):
//
//   tokens                                    this rank's windows of the update; N = valid targets
//   of all ranks (I1) for each round:
//     forward    layer 0 .. L-1:              gather(l+1) in flight; every micro-batch through
//     layer l balance                                 router statistics summed over the ranks: the
//     auxiliary losses are exact over the round head       in chunks of tokens:         logits,
//     loss and dlogits in one pass backward   layer L-1 .. 0:              gather(l-1) in flight;
//     every micro-batch back through layer l; reduce(l)
//   update                                    norm, clip, optimizer: at the end, or (--update
//   layer) each layer right behind its backward report                                    the one
//   moment the host waits and reads (I11)
#include "step.h"
#include "checkpoint.h"
#include "trace.h"
#include "../kernels/fail.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// ---- tokens ---------------------------------------------------------------------------------
// Reads this rank's contiguous part of the update's windows. Returns N: valid targets over all
// ranks, replicas included (I1).
static double read_tokens(Trainer *t, Loader *data, int64_t update) {
    int T = t->o.T;
    int64_t first = (update - 1) * t->o.batch + t->g->data_rank * t->local_sequences, valid = 0;
    for (int64_t s = 0; s < t->local_sequences; s++) {
        int *target = t->host_targets + s * T;
        loader_read(data, first + s, t->host_ids + s * T, target);
        for (int i = 0; i < T; i++) {
            if (target[i] == t->o.ignore_target) target[i] = -1;
            valid += target[i] >= 0;
        }
    }
    return comm_sum(t->g->all, (double)valid);
}

static void upload_round(Trainer *t, int round) {
    size_t n = (size_t)t->n_micro * (size_t)t->R;
    device_upload(t->ids, t->host_ids + (size_t)round * n, n * sizeof(int));
    device_upload(t->targets, t->host_targets + (size_t)round * n, n * sizeof(int));
}

// ---- the store: activations at their actual size, bumped in forward, all free again at the next
// round ----
static char *store_take(Trainer *t, size_t bytes) {
    if (t->store_used + bytes > t->store_size) return 0;
    char *p = t->store + t->store_used;
    t->store_used += bytes;
    return p;
}

static void place_attention(Trainer *t, Saved *k, const InFlight *s, int training) {
    int keep = training && t->o.recompute != RECOMPUTE_LAYER;
    saved_attention_place(k, &t->work, s,
                          keep ? store_take(t, saved_attention_bytes(&t->work)) : 0);
}

// The size is the largest of any rank of the ep group, so all of them keep or recompute alike:
// recomputing dispatches again (I2).
static void place_experts(Trainer *t, Saved *k, const InFlight *s, int layer, int training) {
    const DispatchLoad *load = t->m->c.is_moe[layer] ? dispatch_load(s->exchange) : 0;
    int64_t rows = t->work.dense.M, pool = 0;
    if (load) {
        rows = load->rows_max;
        pool = load->pool_max;
    }
    int keep = training && (t->o.recompute == RECOMPUTE_NONE || t->o.recompute == RECOMPUTE_AUTO);
    saved_expert_place(k, &t->work, layer, rows, pool,
                       keep ? store_take(t, saved_expert_bytes(&t->work, layer, rows, pool)) : 0);
    if (!training) return;
    if (load) {
        t->sent_rows += load->sent_rows;
        t->received_rows += load->received_rows;
        t->redispatched_rows += k->has_experts ? 0 : load->sent_rows;
    }
    t->reattended += !k->has_attention;
    if (k->has_attention && k->has_experts)
        t->kept_all++;
    else if (k->has_attention)
        t->kept_attention++;
    else
        t->kept_none++;
}

// ---- blocks ---------------------------------------------------------------------------------
static void gather_layer(Trainer *t, int layer) {
    if (layer < 0 || layer >= t->m->c.L) return;
    fsdp_gather(t->fsdp, t->m->dense_block[layer]);
    if (t->m->local_block[layer] >= 0) fsdp_gather(t->fsdp, t->m->local_block[layer]);
}

static LayerWeights get_layer(Trainer *t, int layer) {
    const floatX *dense = fsdp_get(t->fsdp, t->m->dense_block[layer]);
    const floatX *local =
        t->m->local_block[layer] >= 0 ? fsdp_get(t->fsdp, t->m->local_block[layer]) : 0;
    return layer_weights(t->m, layer, dense, local);
}

static void release_layer(Trainer *t, int layer) {
    fsdp_release(t->fsdp, t->m->dense_block[layer]);
    if (t->m->local_block[layer] >= 0) fsdp_release(t->fsdp, t->m->local_block[layer]);
}

// Whether a kernel adds to the gradient of a block: behind the first micro-batch, and behind the
// first round where the buffer is the final one (I5).
static int accumulates(Trainer *t, int block, int micro, int round) {
    return micro > 0 || (round > 0 && fsdp_accumulates_in_place(t->fsdp, block));
}

static int moe_index(const Config *c, int layer) {
    int n = 0;
    for (int l = 0; l < layer; l++) n += c->is_moe[l];
    return n;
}

static RouterStats layer_stats(Trainer *t, int layer) {
    const Config *c = &t->m->c;
    size_t i = (size_t)moe_index(c, layer);
    RouterStats s = { t->count + i * (size_t)c->E, t->prob + i * (size_t)c->E, t->zstat + 2 * i };
    return s;
}

// ---- forward --------------------------------------------------------------------------------
// From t->ids to the head's input kept[L]. The three stages of up to three micro-batches overlap:
// while m is between dispatch and combine, m+1 starts and m-1 ends.
void step_forward(Trainer *t, int n, int training) {
    const Config *c = &t->m->c;
    int lag1 = t->n_slots > 1 ? 1 : 0, lag2 = 2 * lag1;
    const RouterStats none = { 0, 0, 0 };
    t->store_used = 0;
    gather_layer(t, 0);
    const floatX *embedding = fsdp_get(t->fsdp, t->m->embed_block);
    for (int m = 0; m < n; m++)
        embed_forward(t->kept[m].x, t->ids + (size_t)m * (size_t)t->R, embedding, t->R, c->C);
    fsdp_release(t->fsdp, t->m->embed_block);
    for (int l = 0; l < c->L; l++) {
        gather_layer(t, l + 1);
        if (l + 1 == c->L) fsdp_gather(t->fsdp, t->m->head_block);
        LayerWeights w = get_layer(t, l);
        RouterStats stats = training && c->is_moe[l] ? layer_stats(t, l) : none;
        const real *bias =
            t->bias && c->is_moe[l] ? t->bias + (size_t)moe_index(c, l) * (size_t)c->E : 0;
        Saved *kept = t->kept + (size_t)l * (size_t)t->n_micro;
        comm_where(-1, l, "forward");
        for (int i = 0; i < n + lag2; i++) {
            int m = i, m1 = i - lag1, m2 = i - lag2;
            if (m < n) {
                InFlight *s = &t->slot[m % t->n_slots];
                place_attention(t, &kept[m], s, training);
                layer_forward_start(&t->work, s, &kept[m], l, &w, stats, bias);
                place_experts(t, &kept[m], s, l, training);
            }
            if (m1 >= 0 && m1 < n)
                layer_forward_experts(&t->work, &t->slot[m1 % t->n_slots], &kept[m1], l, &w);
            if (m2 >= 0 && m2 < n)
                layer_forward_finish(&t->work, &t->slot[m2 % t->n_slots], &kept[m2], l,
                                     kept[t->n_micro + m2].x);
            if (t->trace && training && m2 >= 0 && m2 < n) trace_forward(t, l, m2);
        }
        release_layer(t, l);
    }
}

// ---- balance --------------------------------------------------------------------------------
static double round_positions(const Trainer *t) { return (double)t->R * t->n_micro * t->g->world; }

// Sums counts and probabilities of the round over the ranks; the shares f follow, pooled over
// layers as HF does, or layer by layer.
static void balance(Trainer *t) {
    const Config *c = &t->m->c;
    if (!c->n_moe) return;
    size_t E = (size_t)c->n_moe * (size_t)c->E;
    comm_where(-1, -1, "router statistics");
    comm_wait(all_reduce_start(t->g->all, t->count, E, DTYPE_I64, STREAM_EXCHANGE));
    comm_wait(all_reduce_start(t->g->all, t->prob, E, DTYPE_F64, STREAM_EXCHANGE));
    comm_wait(
        all_reduce_start(t->g->all, t->zstat, 2 * (size_t)c->n_moe, DTYPE_F64, STREAM_EXCHANGE));
    if (!t->o.aux_per_layer) {
        router_share(t->share, t->count, round_positions(t) * c->n_moe, c->n_moe, c->E);
        return;
    }
    for (int i = 0; i < c->n_moe; i++)
        router_share(t->share + (size_t)i * (size_t)c->E, t->count + (size_t)i * (size_t)c->E,
                     round_positions(t), 1, c->E);
}

static RouterLoss router_loss(const Trainer *t, int layer) {
    const Config *c = &t->m->c;
    double pooled =
        round_positions(t) * c->n_moe *
        t->o.rounds; // the update's aux is the mean of its rounds'; z is one mean over all
    RouterLoss r = { t->share +
                         (t->o.aux_per_layer ? (size_t)moe_index(c, layer) * (size_t)c->E : 0),
                     t->o.aux_coef * c->E / pooled, t->o.z_coef / pooled };
    return r;
}

// ---- head -----------------------------------------------------------------------------------
// Loss and, in training, dx and the gradients of norm and head. The [tokens, V] logits exist for
// one chunk at a time.
void step_head(Trainer *t, int training, int round, double N) {
    const Config *c = &t->m->c;
    Model *m = t->m;
    int matrix_block = c->tied ? m->embed_block : m->head_block;
    const Param *norm = model_param(m, P_FINAL_NORM, c->L),
                *matrix = c->tied ? model_param(m, P_EMBED, -1) : model_param(m, P_HEAD, c->L);
    comm_where(-1, c->L, "head");
    const floatX *wn = fsdp_get(t->fsdp, m->head_block) + norm->offset,
                 *wh = fsdp_get(t->fsdp, matrix_block) + matrix->offset;
    gradX *dn = training ? fsdp_grad(t->fsdp, m->head_block) + norm->offset : 0,
          *dh = training ? fsdp_grad(t->fsdp, matrix_block) + matrix->offset : 0;
    real seed = (real)(N > 0 ? 1 / N : 0);
    if (training) gather_layer(t, c->L - 1);
    for (int i = 0, pass = 0; i < t->n_micro; i++) {
        Saved *kept = &t->kept[(size_t)c->L * (size_t)t->n_micro + (size_t)i];
        for (int row = 0; row < t->R; row += t->head_chunk, pass++) {
            int n = t->R - row < t->head_chunk ? t->R - row : t->head_chunk;
            const floatX *x = kept->x + (size_t)row * (size_t)c->C;
            rmsnorm_forward(t->yf, t->head_rstd, x, wn, (real)c->rms_eps, n, c->C);
            linear_forward(t->logits, t->yf, wh, n, c->V, c->C);
            if (t->dump && training)
                dump_logits(t->dump, t, ((int64_t)round * t->n_micro + i) * t->R + row, n);
            cross_entropy(t->logits, t->loss_sum, t->targets + (size_t)i * (size_t)t->R + row, seed,
                          training, n, c->V);
            if (!training) continue;
            floatX *dx = t->dx + ((size_t)i * (size_t)t->R + (size_t)row) * (size_t)c->C;
            linear_backward_weight(dh, t->logits, t->yf, accumulates(t, matrix_block, pass, round),
                                   n, c->V, c->C);
            linear_backward_input(t->dyf, t->logits, wh, n, c->V, c->C);
            rmsnorm_backward(dx, dn, 0, t->dyf, x, wn, t->head_rstd,
                             accumulates(t, m->head_block, pass, round), n, c->C);
        }
    }
    fsdp_release(t->fsdp, m->head_block);
    if (c->tied) fsdp_release(t->fsdp, m->embed_block);
}

// ---- update ---------------------------------------------------------------------------------
// Squares of a block's final gradient into block_sum; the dump sees it, and utilisation scaling is
// applied, before.
static const gradX *finish_gradient(Trainer *t, int block) {
    const Block *b = &t->m->block[block];
    gradX *grad = fsdp_grad_shard(t->fsdp, block);
    if (t->o.expert_grad_scale && b->local) {
        const Config *c = &t->m->c;
        float *factor =
            (float *)xmalloc((size_t)b->n_segments * sizeof(float) + 1, "utilisation factors");
        const int64_t *count = t->host_count + (size_t)moe_index(c, b->layer) * (size_t)c->E;
        double mean = 0;
        for (int e = 0; e < c->E; e++) mean += (double)count[e] / c->E;
        for (int i = 0; i < b->n_segments; i++) {
            const Param *p = &t->m->param[b->segment_param[i]];
            int e = p->first + b->segment_slice[i] / p->parts;
            factor[i] = p->kind == EXPERT && count[e] > 0 ? (float)(mean / (double)count[e]) : 1.0f;
        }
        device_upload(t->factor, factor, (size_t)b->n_segments * sizeof(float));
        gradient_scale(grad, b->segment, b->n_segments, t->factor);
        free(factor);
    }
    if (t->dump) dump_gradient(t->dump, t, block, grad);
    gradient_squares(t->segment_sum, grad, b->segment, b->n_segments);
    sum_in_order(t->block_sum + block, t->segment_sum, b->n_segments);
    return grad;
}

// --update layer: steps the blocks of a layer (-1 embedding, L head) inside backward. Clipped by
// the previous update's norm; a non-finite gradient leaves it untouched.
static void update_layer(Trainer *t, int layer, int64_t update, double lr) {
    const Model *m = t->m;
    double clip = t->o.clip, previous = t->previous_norm,
           scale =
               clip > 0 && previous >= 0 && previous + 1e-6 > clip ? clip / (previous + 1e-6) : 1;
    int first = layer < 0         ? m->embed_block
                : layer == m->c.L ? m->head_block
                                  : m->dense_block[layer],
        n = 1;
    if (layer >= 0 && layer < m->c.L && m->local_block[layer] >= 0) n = 2;
    const gradX *grad[2];
    for (int i = 0; i < n; i++) grad[i] = finish_gradient(t, first + i);
    comm_where(-1, layer, "finite check");
    comm_wait(all_reduce_start(t->g->dense_group, t->block_sum + first, (size_t)n, DTYPE_F64,
                               STREAM_GATHER));
    clip_scale(t->norm, t->finite, t->block_sum + first, n, 0);
    for (int i = 0; i < n; i++) {
        optimizer_step(&t->optimizer, first + i, grad[i], lr, t->updates + 1, update, scale,
                       t->finite);
        fsdp_grad_done(t->fsdp, first + i);
    }
}

// --update end: norm over every unique number, once; then all blocks.
static void update_all(Trainer *t, int64_t update, double lr) {
    int n = t->m->n_blocks;
    for (int b = 0; b < n; b++) finish_gradient(t, b);
    comm_where(-1, -1, "gradient norm");
    comm_wait(
        all_reduce_start(t->g->dense_group, t->block_sum, (size_t)n, DTYPE_F64, STREAM_GATHER));
    clip_scale(t->norm, t->scale, t->block_sum, n, t->o.clip);
    for (int b = 0; b < n; b++) {
        optimizer_step(&t->optimizer, b, fsdp_grad_shard(t->fsdp, b), lr, t->updates + 1, update, 1,
                       t->scale);
        fsdp_grad_done(t->fsdp, b);
    }
}

// ---- backward -------------------------------------------------------------------------------
static void reduce_layer(Trainer *t, int layer, int round) {
    fsdp_reduce(t->fsdp, t->m->dense_block[layer], round > 0);
    if (t->m->local_block[layer] >= 0) fsdp_reduce(t->fsdp, t->m->local_block[layer], round > 0);
}

// With --update layer the reduction of a layer runs under the backward of the next one down, and
// the layer is stepped behind that; in one process, where there is nothing to wait for, at once:
// one layer's gradient is alive.
static void step_backward(Trainer *t, int round, int64_t update, double lr) {
    const Config *c = &t->m->c;
    Model *m = t->m;
    int n = t->n_micro, lag1 = t->n_slots > 1 ? 1 : 0, lag2 = 2 * lag1;
    int behind = fsdp_reduces(t->fsdp);
    fsdp_reduce(t->fsdp, m->head_block, round > 0);
    if (t->o.update_layer && !behind) update_layer(t, c->L, update, lr);
    for (int l = c->L - 1; l >= 0; l--) {
        gather_layer(t, l - 1);
        LayerWeights w = get_layer(t, l);
        int local = m->local_block[l] >= 0 ? m->local_block[l] : m->dense_block[l];
        LayerGrads d = layer_grads(m, l, fsdp_grad(t->fsdp, m->dense_block[l]),
                                   m->local_block[l] >= 0 ? fsdp_grad(t->fsdp, local) : 0);
        RouterLoss loss = router_loss(t, l);
        Saved *kept = t->kept + (size_t)l * (size_t)n;
        comm_where(-1, l, "backward");
        for (int i = 0; i < n + lag2; i++) {
            int k = i, k1 = i - lag1, k2 = i - lag2;
            if (k < n) {
                InFlight *s = &t->slot[k % t->n_slots];
                if (!kept[k].has_attention) saved_attention_place(&kept[k], &t->work, s, 0);
                layer_backward_start(&t->work, s, &kept[k], l, &w,
                                     t->dx + (size_t)k * (size_t)t->R * (size_t)c->C);
            }
            if (k1 >= 0 && k1 < n)
                layer_backward_experts(
                    &t->work, &t->slot[k1 % t->n_slots], &kept[k1], l, &w, &d,
                    t->dx + (size_t)k1 * (size_t)t->R * (size_t)c->C,
                    accumulates(t, c->is_moe[l] ? local : m->dense_block[l], k1, round));
            if (k2 >= 0 && k2 < n) {
                floatX *dx = t->dx + (size_t)k2 * (size_t)t->R * (size_t)c->C;
                layer_backward_finish(
                    &t->work, &t->slot[k2 % t->n_slots], &kept[k2], l, &w, &d, &loss, dx,
                    accumulates(t, m->dense_block[l], k2, round),
                    accumulates(t, m->shard_spec.split_heads ? local : m->dense_block[l], k2,
                                round));
                if (t->trace) trace_backward(t, l, k2);
            }
        }
        release_layer(t, l);
        reduce_layer(t, l, round);
        if (t->o.update_layer) update_layer(t, l + behind, update, lr);
    }
    gradX *de = fsdp_grad(t->fsdp, m->embed_block);
    for (int k = 0; k < n; k++)
        embed_backward(
            de, t->dx + (size_t)k * (size_t)t->R * (size_t)c->C, t->ids + (size_t)k * (size_t)t->R,
            c->tied || accumulates(t, m->embed_block, k, round), c->pad, t->R, c->V, c->C);
    fsdp_reduce(t->fsdp, m->embed_block, round > 0);
    if (!t->o.update_layer) return;
    if (behind) update_layer(t, 0, update, lr);
    update_layer(t, -1, update, lr);
}

// ---- report ---------------------------------------------------------------------------------
// Adds a round's statistics to the update's; the value of aux is the mean over rounds.
static double collect_statistics(Trainer *t) {
    const Config *c = &t->m->c;
    size_t E = (size_t)c->n_moe * (size_t)c->E;
    if (!E) return 0;
    int64_t *count = t->host_count + E;
    double *prob = t->host_prob + E, *z = t->host_z + 2 * c->n_moe, positions = round_positions(t),
           aux = 0;
    device_download(count, t->count, E * sizeof(int64_t));
    device_download(prob, t->prob, E * sizeof(double));
    device_download(z, t->zstat, 2 * (size_t)c->n_moe * sizeof(double));
    for (int e = 0; e < c->E; e++) {
        double f = 0, p = 0;
        for (int l = 0; l < c->n_moe; l++) {
            double fl = (double)count[(size_t)l * c->E + e] / positions,
                   pl = prob[(size_t)l * c->E + e] / positions;
            if (t->o.aux_per_layer) aux += c->E * fl * pl / c->n_moe;
            f += fl / c->n_moe;
            p += pl / c->n_moe;
        }
        if (!t->o.aux_per_layer) aux += c->E * f * p;
    }
    for (size_t i = 0; i < E; i++) {
        t->host_count[i] += count[i];
        t->host_prob[i] += prob[i];
    }
    for (int i = 0; i < 2 * c->n_moe; i++) t->host_z[i] += z[i];
    return aux;
}

static void clear_statistics(Trainer *t, int host) {
    const Config *c = &t->m->c;
    size_t E = (size_t)c->n_moe * (size_t)c->E;
    device_zero(t->count, E * sizeof(int64_t));
    device_zero(t->prob, E * sizeof(double));
    device_zero(t->zstat, 2 * (size_t)c->n_moe * sizeof(double));
    if (!host) return;
    memset(t->host_count, 0, E * sizeof(int64_t));
    memset(t->host_prob, 0, E * sizeof(double));
    memset(t->host_z, 0, 2 * (size_t)c->n_moe * sizeof(double));
}

// --balance bias: an expert with less than its share becomes easier to select (never heavier in the
// sum), the same integers and so the same bits on all ranks.
static void update_bias(Trainer *t) {
    const Config *c = &t->m->c;
    size_t E = (size_t)c->n_moe * (size_t)c->E;
    for (int l = 0; l < c->n_moe; l++) {
        const int64_t *count = t->host_count + (size_t)l * c->E;
        int64_t total = 0;
        for (int e = 0; e < c->E; e++) total += count[e];
        for (int e = 0; e < c->E; e++) {
            int64_t below = total - count[e] * c->E;
            t->host_bias[(size_t)l * c->E + e] +=
                (float)(t->o.balance_rate * ((below > 0) - (below < 0)));
        }
    }
    trainer_set_bias(t, t->host_bias, E);
}

void trainer_set_bias(Trainer *t, const float *bias, size_t n) {
    real *value = (real *)xmalloc(n * sizeof(real), "router bias");
    for (size_t i = 0; i < n; i++) {
        t->host_bias[i] = bias[i];
        value[i] = (real)bias[i];
    }
    device_upload(t->bias, value, n * sizeof(real));
    free(value);
}

// Names the first block of backward whose gradient is not finite: what lies below it got its
// gradient from there.
void trainer_die_nonfinite(Trainer *t, int64_t update) {
    const Model *m = t->m;
    char part[64] = "the embedding";
    for (int b = m->n_blocks - 1; b >= 0; b--) {
        if (isfinite(t->host_block_sum[b])) continue;
        int layer = m->block[b].layer;
        if (layer == m->c.L)
            strcpy(part, "the head");
        else if (layer >= 0)
            snprintf(part, sizeof part, "layer %d (%s)", layer,
                     m->block[b].local ? "experts" : "attention, norms and router");
        die("update %lld: the gradient of %s is not finite; %s|lower --lr, check data and checkpoint, or use --skip-nonfinite on",
            (long long)update, part,
            t->o.update_layer ? "this layer and those below it are unchanged"
                              : "no weight was changed by this update");
    }
    die("update %lld: the gradient norm is not finite, though every part of it is|lower --lr, or use --skip-nonfinite on",
        (long long)update);
}

static StepResult report(Trainer *t, int64_t update, double lr, double N, double aux) {
    const Config *c = &t->m->c;
    StepResult r;
    memset(&r, 0, sizeof r);
    double loss_sum;
    real norm;
    comm_where(-1, -1, "loss");
    comm_wait(all_reduce_start(t->g->all, t->loss_sum, 1, DTYPE_F64, STREAM_EXCHANGE));
    if (t->o.update_layer) clip_scale(t->norm, t->finite, t->block_sum, t->m->n_blocks, 0);
    device_download(&loss_sum, t->loss_sum, sizeof loss_sum);
    device_download(&norm, t->norm, sizeof norm);
    device_download(t->host_block_sum, t->block_sum, (size_t)t->m->n_blocks * sizeof(double));
    r.loss = N > 0 ? loss_sum / N : NAN;
    r.aux = aux / t->o.rounds;
    r.grad_norm = (double)norm;
    r.lr = lr;
    r.tokens = t->o.batch * t->o.T;
    r.valid = (int64_t)(N / (t->g->world / t->g->data_ranks));
    double positions = round_positions(t) * t->o.rounds;
    for (int l = 0; l < c->n_moe; l++) {
        int64_t most = 0, total = 0;
        for (int e = 0; e < c->E; e++) {
            int64_t n = t->host_count[(size_t)l * c->E + e];
            r.expert_dead += n == 0;
            total += n;
            if (n > most) most = n;
        }
        double load = total ? (double)most * c->E / (double)total : 0;
        if (load > r.expert_load_max) r.expert_load_max = load;
        r.z += t->host_z[2 * l] / (positions * c->n_moe);
    }
    int64_t bits =
        0; // the norm decides what every rank does next: it must be the same number everywhere
    memcpy(&bits, &norm, sizeof norm);
    if (comm_max(t->g->all, bits) != bits || comm_max(t->g->all, -bits) != -bits)
        die("update %lld: ranks hold different gradient norms (this one %.9g)|a collective is broken: run with --check-comm on",
            (long long)update, (double)norm);
    if (!isfinite(r.grad_norm)) {
        r.nonfinite = 1;
        return r;
    }
    t->updates++;
    t->previous_norm = r.grad_norm;
    if (t->bias) update_bias(t);
    return r;
}

StepResult trainer_step(Trainer *t, Loader *data, int64_t update, double lr) {
    comm_where(update, -1, "tokens");
    double N = read_tokens(t, data, update), aux = 0;
    device_zero(t->loss_sum, sizeof(double));
    t->kept_all = t->kept_attention = t->kept_none = 0;
    t->sent_rows = t->received_rows = t->redispatched_rows = t->reattended = 0;
    clear_statistics(t, 1);
    for (int round = 0; round < t->o.rounds; round++) {
        if (round) clear_statistics(t, 0);
        t->round = round;
        upload_round(t, round);
        step_forward(t, t->n_micro, 1);
        balance(t);
        step_head(t, 1, round, N);
        if (t->o.expert_grad_scale)
            aux += collect_statistics(
                t); // its factors need the counts on the host; everybody else reads them at the end
        step_backward(t, round, update, lr);
        if (!t->o.expert_grad_scale) aux += collect_statistics(t);
    }
    if (!t->o.update_layer) update_all(t, update, lr);
    StepResult r = report(t, update, lr, N, aux);
    if (t->dump) dump_finish(t->dump, t, r.loss, r.aux);
    comm_step_end();
    return r;
}
