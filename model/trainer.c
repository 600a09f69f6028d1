// Everything a run allocates, in one pass over arenas: counted first, printed, then taken (I10).
// See step.h.
#include "plan.h"
#include "../kernels/fail.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// ---- the store of kept activations ----------------------------------------------------------
// Bytes that keeping everything --recompute allows would take. Where tokens travel, only routing
// knows the rows: the store then has room for half as many again as uniform routing brings, and
// what does not fit is recomputed.
static size_t store_wanted(const Trainer *t) {
    const Config *c = &t->m->c;
    const Workspace *w = &t->work;
    if (t->o.recompute == RECOMPUTE_LAYER) return 0;
    size_t total = 0;
    for (int l = 0; l < c->L; l++) {
        total += saved_attention_bytes(w);
        if (t->o.recompute == RECOMPUTE_MOE) continue;
        if (!c->is_moe[l]) {
            total += saved_expert_bytes(w, l, w->dense.M, 0);
            continue;
        }
        int64_t pool = dispatch_pool_bound(t->g, t->R),
                rows = row_index_bound((int)pool, c->K, c->E / t->g->ep);
        if (w->moves) {
            int64_t uniform = (int64_t)t->R * c->K * 3 / 2;
            if (rows > uniform) rows = uniform;
            if (pool > uniform) pool = uniform;
        }
        total += saved_expert_bytes(w, l, rows, pool);
    }
    return total * (size_t)t->n_micro;
}

// ---- creation -------------------------------------------------------------------------------
static void allocate(Trainer *t, OptimizerOptions opt, Arena *a) {
    const Config *c = &t->m->c;
    Model *m = t->m;
    int R = t->R, n = t->n_micro, segments = 0;
    size_t x = (size_t)R * c->C, E = (size_t)c->n_moe * c->E;
    for (int b = 0; b < m->n_blocks; b++)
        if (m->block[b].n_segments > segments) segments = m->block[b].n_segments;
    t->fsdp = fsdp_create(m, t->g, !t->o.update_layer, a);
    fsdp_rounds(t->fsdp, t->o.rounds);
    t->optimizer = optimizer_create(m, opt, a);
    for (int b = 0; b < m->n_blocks; b++) {
        floatX *shard = t->optimizer.state[b].param =
            fsdp_shard(t->fsdp, b); // loading and saving find parameters and state in one place
        if (shard)
            device_zero(shard, (size_t)m->block[b].shard *
                                   sizeof(floatX)); // the padding behind parameters too
    }
    workspace_create(&t->work, m, t->g, R / t->o.T, t->o.T, a);
    t->slot = (InFlight *)xcalloc((size_t)t->n_slots, sizeof(InFlight), "slots");
    for (int i = 0; i < t->n_slots; i++) in_flight_create(&t->slot[i], &t->work, t->g, a);
    t->kept = (Saved *)xcalloc((size_t)(c->L + 1) * (size_t)n, sizeof(Saved), "kept activations");
    for (int i = 0; i < (c->L + 1) * n; i++) {
        Saved *k = &t->kept[i];
        k->x = ARENA_TAKE(a, floatX, x, "layer inputs");
        if (i / n == c->L || !c->is_moe[i / n]) continue;
        k->topk = ARENA_TAKE(a, int, (size_t)R * c->K, "routing");
        k->score = ARENA_TAKE(a, real, (size_t)R * c->K, "routing");
        k->logits = ARENA_TAKE(a, real, (size_t)R * c->E, "routing");
    }
    t->dx = ARENA_TAKE(a, floatX, x * (size_t)n, "running gradient");
    // head: as many tokens at a time as keep the logits near a size that the products no longer
    // notice
    size_t chunk = (!strcmp(device_backend(), "cuda") ? (size_t)1 << 30 : (size_t)128 << 20) /
                   ((size_t)c->V * sizeof(floatX));
    t->head_chunk = chunk < 128 ? 128 : chunk > 8192 ? 8192 : (int)chunk;
    if (t->head_chunk > R) t->head_chunk = R;
    t->yf = ARENA_TAKE(a, floatX, (size_t)t->head_chunk * c->C, "head");
    t->dyf = ARENA_TAKE(a, floatX, (size_t)t->head_chunk * c->C, "head");
    t->logits = ARENA_TAKE(a, floatX, (size_t)t->head_chunk * c->V, "head");
    t->head_rstd = ARENA_TAKE(a, real, t->head_chunk, "head");
    t->ids = ARENA_TAKE(a, int, (size_t)R *n, "tokens");
    t->targets = ARENA_TAKE(a, int, (size_t)R *n, "tokens");
    t->count = ARENA_TAKE(a, int64_t, E, "router statistics");
    t->prob = ARENA_TAKE(a, double, E, "router statistics");
    t->zstat = ARENA_TAKE(a, double, 2 * c->n_moe, "router statistics");
    t->share = ARENA_TAKE(a, double, E, "router statistics");
    t->bias = t->o.balance_rate > 0 ? ARENA_TAKE(a, real, E, "router statistics") : 0;
    if (t->bias) device_zero(t->bias, E * sizeof(real));
    t->loss_sum = ARENA_TAKE(a, double, 1, "norms and losses");
    t->segment_sum = ARENA_TAKE(a, double, segments, "norms and losses");
    t->block_sum = ARENA_TAKE(a, double, m->n_blocks, "norms and losses");
    t->norm = ARENA_TAKE(a, real, 1, "norms and losses");
    t->scale = ARENA_TAKE(a, real, 1, "norms and losses");
    t->finite = ARENA_TAKE(a, real, 1, "norms and losses");
    t->factor = ARENA_TAKE(a, float, t->o.expert_grad_scale ? segments : 0, "norms and losses");
    size_t stats = E * sizeof(double);
    if (t->g->all || t->g->world > 1)
        comm_reserve(t->g->all, stats > 4096 ? stats : 4096,
                     a); // a plan has no groups, only their sizes
    if (t->g->dense_group || t->g->fsdp * t->g->ep > 1)
        comm_reserve(t->g->dense_group, (size_t)m->n_blocks * sizeof(double), a);
    t->store_size = store_wanted(t);
    if (t->o.recompute == RECOMPUTE_AUTO) {
        size_t limit = t->o.memory ? t->o.memory : device_memory() / 10 * 9,
               free_bytes = limit > a->used ? limit - a->used : 0;
        if (a->base)
            free_bytes = a->capacity - a->used;
        else if (t->g->all) { // ranks of a group must decide alike (I2): the smallest of all
            free_bytes = (size_t)-comm_max(t->g->all, -(int64_t)free_bytes);
            free_bytes -= free_bytes % 256;
        }
        if (t->store_size > free_bytes) t->store_size = free_bytes;
    }
    t->store = (char *)arena_take(a, t->store_size, "kept activations");
}

static void release(Trainer *t) {
    for (int i = 0; i < t->n_slots; i++) in_flight_free(&t->slot[i]);
    free(t->slot);
    free(t->kept);
    workspace_free(&t->work);
    optimizer_free(&t->optimizer);
    fsdp_free(t->fsdp);
}

static void print_table(FILE *out, const Arena *a) {
    fprintf(out, "memory of a rank      %12.3f MiB in one arena\n", (double)a->used / 1048576);
    for (int i = 0; i < a->rows; i++)
        if (a->row[i].bytes)
            fprintf(out, "  %-44s %12.3f MiB\n", a->row[i].what, (double)a->row[i].bytes / 1048576);
}

Trainer *trainer_create(Model *m, Grid *g, StepOptions o, OptimizerOptions opt, int plan_only,
                        FILE *report_file) {
    Trainer *t = (Trainer *)xcalloc(1, sizeof(Trainer), "trainer");
    const Config *c = &m->c;
    t->m = m;
    t->g = g;
    if (o.batch % g->data_ranks)
        die("--batch %lld cannot be divided over %d ranks that read distinct data|use a multiple of %d",
            (long long)o.batch, g->data_ranks, g->data_ranks);
    t->local_sequences = o.batch / g->data_ranks;
    if (t->local_sequences % o.rounds)
        die("--batch %lld over %d ranks gives %lld sequences each, not divisible by --rounds %d|change one of them",
            (long long)o.batch, g->data_ranks, (long long)t->local_sequences, o.rounds);
    int64_t per_round = t->local_sequences / o.rounds;
    if (!o.micro_batch) o.micro_batch = (int)per_round;
    if (per_round % o.micro_batch)
        die("%lld sequences per rank and round cannot be divided into --micro-batch %d|use a divisor",
            (long long)per_round, o.micro_batch);
    if ((int64_t)o.micro_batch * o.T > INT32_MAX / 64)
        die("a micro-batch of %d x %d tokens is too large|use a smaller --micro-batch",
            o.micro_batch, o.T);
    if (o.rounds > 1 && o.update_layer)
        die("--rounds %d needs the gradients of all layers at once|use --update end, or one round with a smaller --micro-batch",
            o.rounds);
    if (o.skip_nonfinite && o.update_layer)
        die("--skip-nonfinite cannot undo layers that are already stepped|use --update end");
    if (o.T > c->max_positions)
        die("--seq-len %d is longer than the model's max_position_embeddings %d|use a shorter sequence",
            o.T, c->max_positions);
    if (opt.kind == OPT_ADAMW8) plan_check_blocks(c, g);
    t->n_micro = (int)(per_round / o.micro_batch);
    t->R = o.micro_batch * o.T;
    t->n_slots = g->ep > 1 && t->n_micro > 1 ? (t->n_micro < 3 ? t->n_micro : 3) : 1;
    t->o = o;
    t->previous_norm = -1;
    t->arena = arena_counting("device");
    allocate(t, opt, &t->arena);
    if (report_file) print_table(report_file, &t->arena);
    if (plan_only) return t;
    release(t);
    arena_commit(&t->arena);
    allocate(t, opt, &t->arena);
    device_share(
        g->world >
        1); // weights, gradients and other micro-batches' tokens travel while the experts compute
    t->host_ids = (int *)xcalloc((size_t)t->local_sequences * (size_t)o.T, sizeof(int),
                                 "tokens of an update");
    t->host_targets = (int *)xcalloc((size_t)t->local_sequences * (size_t)o.T, sizeof(int),
                                     "tokens of an update");
    size_t E = (size_t)c->n_moe * (size_t)c->E;
    t->host_count =
        (int64_t *)xcalloc(2 * E, sizeof(int64_t), "router statistics"); // second half: a round's
    t->host_prob = (double *)xcalloc(2 * E, sizeof(double), "router statistics");
    t->host_z = (double *)xcalloc(4 * (size_t)c->n_moe, sizeof(double), "router statistics");
    t->host_bias = (float *)xcalloc(E, sizeof(float), "router bias");
    t->host_block_sum = (double *)xcalloc((size_t)m->n_blocks, sizeof(double), "norms");
    return t;
}

void trainer_free(Trainer *t) {
    if (!t) return;
    release(t);
    arena_free(&t->arena);
    free(t->host_ids);
    free(t->host_targets);
    free(t->host_count);
    free(t->host_prob);
    free(t->host_z);
    free(t->host_bias);
    free(t->host_block_sum);
    free(t);
}

void trainer_init(Trainer *t) {
    const Model *m = t->m;
    for (int b = 0; b < m->n_blocks; b++) {
        const Block *k = &m->block[b];
        for (int i = 0; i < k->n_segments; i++) {
            const Param *p = &m->param[k->segment_param[i]];
            init_segments(fsdp_shard(t->fsdp, b), t->optimizer.state[b].master, &k->segment[i], 1,
                          t->o.seed, p->init == INIT_ONES ? -1 : m->c.init_std);
            int64_t begin = (int64_t)m->c.pad * m->c.C, end = begin + m->c.C,
                    first = k->segment[i].first; // the pad row starts as zeros
            if (p->id != P_EMBED || m->c.pad < 0 || first >= end ||
                first + k->segment[i].count <= begin)
                continue;
            if (begin < first) begin = first;
            if (end > first + k->segment[i].count) end = first + k->segment[i].count;
            int64_t at = k->segment[i].offset + begin - first;
            device_zero(fsdp_shard(t->fsdp, b) + at, (size_t)(end - begin) * sizeof(floatX));
            if (t->optimizer.state[b].master)
                device_zero(t->optimizer.state[b].master + at,
                            (size_t)(end - begin) * sizeof(real));
        }
    }
}
