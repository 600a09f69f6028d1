// Everything a run allocates, in one pass over an arena: first counted and printed, then taken
// (I10, the planner is the allocator). Contracts in step.h.
#include "plan.h"
#include "../kernels/fail.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// ---- the store of saved activations ---------------------------------------------------------
// Counts the bytes that saving everything --recompute allows would take. Where tokens travel, only
// the routing knows the rows: the store then has room for half as many again as uniform routing
// brings, and what does not fit is computed again.
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
        int64_t pool = dispatch_pool_bound(t->g, t->R);
        int64_t rows = row_index_bound(pool, c->K, c->E / t->g->ep);
        int64_t generous = t->R * c->K * 3 / 2;
        if (w->tokens_move && rows > generous) rows = generous;
        if (w->tokens_move && pool > generous) pool = generous;
        total += saved_expert_bytes(w, l, rows, pool);
    }
    return total * t->n_micro;
}

static void take_store(Trainer *t, Arena *a) {
    size_t wanted = store_wanted(t);
    if (t->o.recompute == RECOMPUTE_AUTO) {
        size_t limit = t->o.memory ? t->o.memory : device_memory() / 10 * 9;
        size_t free_bytes = limit > a->used ? limit - a->used : 0;
        if (a->base)
            free_bytes = a->capacity - a->used;
        else if (t->g->all) { // as the rank with the least: all must decide alike
            free_bytes = -comm_max(t->g->all, -(int64_t)free_bytes);
            free_bytes -= free_bytes % 256;
        }
        if (wanted > free_bytes) wanted = free_bytes;
    }
    t->act.store_size = wanted;
    t->act.store = (char *)arena_take(a, wanted, "kept activations");
}

// ---- creation -------------------------------------------------------------------------------
// Loading and saving find a block's parameters beside its optimizer state.
static void take_parameters(Trainer *t, OptimizerOptions opt, Arena *a) {
    Model *m = t->m;
    t->fsdp = fsdp_create(m, t->g, !t->o.update_layer, a);
    fsdp_rounds(t->fsdp, t->o.rounds);
    t->optimizer = optimizer_create(m, opt, a);
    for (int b = 0; b < m->n_blocks; b++) {
        floatX *shard = t->optimizer.state[b].param = fsdp_shard(t->fsdp, b);
        // Whole, because nobody writes the padding after a parameter.
        if (shard) device_zero(shard, m->block[b].shard * sizeof(floatX));
    }
}

static void take_activations(Trainer *t, Arena *a) {
    const Config *c = &t->m->c;
    int64_t R = t->R;
    int64_t n = t->n_micro;
    int64_t table = c->n_moe ? dispatch_table_size(t->g, c, R) : 0;
    t->act.saved = (Saved *)xcalloc((c->L + 1) * n, sizeof(Saved), "kept activations");
    t->act.tables = (int *)xcalloc(c->n_moe * n * table + 1, sizeof(int), "routing");
    for (int l = 0; l <= c->L; l++)
        for (int64_t m = 0; m < n; m++) {
            Saved *s = &t->act.saved[l * n + m];
            s->x = ARENA_TAKE(a, floatX, R * c->C, "layer inputs");
            if (l == c->L || !c->is_moe[l]) continue;
            s->route.table = t->act.tables + (t->m->moe_index[l] * n + m) * table;
            s->topk = ARENA_TAKE(a, int, R * c->K, "routing");
            s->score = ARENA_TAKE(a, real, R * c->K, "routing");
            s->logits = ARENA_TAKE(a, real, R * c->E, "routing");
        }
    t->act.dx = ARENA_TAKE(a, floatX, n * R * c->C, "running gradient");
}

// As many tokens at a time as keep the logits near a size above which products gain nothing.
static void take_head(Trainer *t, Arena *a) {
    const Config *c = &t->m->c;
    Head *h = &t->head;
    size_t bytes = !strcmp(device_backend(), "cuda") ? (size_t)1 << 30 : (size_t)128 << 20;
    int64_t chunk = (int64_t)(bytes / (c->V * sizeof(floatX)));
    if (chunk < 128) chunk = 128;
    if (chunk > 8192) chunk = 8192;
    if (chunk > t->R) chunk = t->R;
    h->chunk = (int)chunk;
    h->x = ARENA_TAKE(a, floatX, chunk * c->C, "head");
    h->dx = ARENA_TAKE(a, floatX, chunk * c->C, "head");
    h->logits = ARENA_TAKE(a, floatX, chunk * c->V, "head");
    h->rstd = ARENA_TAKE(a, real, chunk, "head");
}

static void take_norms(Trainer *t, Arena *a) {
    const Model *m = t->m;
    int segments = 0;
    for (int b = 0; b < m->n_blocks; b++)
        if (m->block[b].n_segments > segments) segments = m->block[b].n_segments;
    const char *what = "norms and losses";
    t->head.loss_sum = ARENA_TAKE(a, double, 1, what);
    t->norms.segments = ARENA_TAKE(a, double, segments, what);
    t->norms.blocks = ARENA_TAKE(a, double, m->n_blocks, what);
    t->norms.norm = ARENA_TAKE(a, real, 1, what);
    t->norms.clip = ARENA_TAKE(a, real, 1, what);
    t->norms.finite = ARENA_TAKE(a, real, 1, what);
    t->norms.factor = ARENA_TAKE(a, float, t->o.expert_grad_scale ? segments : 0, what);
}

// Communication buffers for what the step itself sums. A plan has no groups, only their sizes.
static void reserve_messages(Trainer *t, Arena *a) {
    const Config *c = &t->m->c;
    size_t statistics = c->n_moe * (size_t)c->E * sizeof(double);
    if (t->g->all || t->g->world > 1)
        comm_reserve(t->g->all, statistics > 4096 ? statistics : 4096, a);
    if (t->g->dense_group || t->g->fsdp * t->g->ep > 1)
        comm_reserve(t->g->dense_group, t->m->n_blocks * sizeof(double), a);
}

static void allocate(Trainer *t, OptimizerOptions opt, Arena *a) {
    take_parameters(t, opt, a);
    workspace_create(&t->work, t->m, t->g, t->R / t->o.T, t->o.T, a);
    t->in_flight = (InFlight *)xcalloc(t->n_in_flight, sizeof(InFlight), "micro-batches");
    for (int i = 0; i < t->n_in_flight; i++) in_flight_create(&t->in_flight[i], &t->work, t->g, a);
    take_activations(t, a);
    take_head(t, a);
    int64_t documents = t->o.documents ? t->work.attention_rows * t->n_micro : 0;
    t->tokens.ids = ARENA_TAKE(a, int, t->R * t->n_micro, "tokens");
    t->tokens.targets = ARENA_TAKE(a, int, t->R * t->n_micro, "tokens");
    t->tokens.position = documents ? ARENA_TAKE(a, int, documents, "tokens") : 0;
    router_totals_create(&t->router, t->m, t->o.balance_rate > 0, a);
    take_norms(t, a);
    reserve_messages(t, a);
    take_store(t, a);
}

static void release(Trainer *t) {
    for (int i = 0; i < t->n_in_flight; i++) in_flight_free(&t->in_flight[i]);
    free(t->in_flight);
    free(t->act.saved);
    free(t->act.tables);
    workspace_free(&t->work);
    optimizer_free(&t->optimizer);
    fsdp_free(t->fsdp);
}

static void print_table(FILE *out, const Arena *a) {
    fprintf(out, "memory of a rank      %12.3f MiB in one arena\n", (double)a->used / 1048576);
    for (int i = 0; i < a->rows; i++) {
        if (!a->row[i].bytes) continue;
        fprintf(out, "  %-44s %12.3f MiB\n", a->row[i].what, (double)a->row[i].bytes / 1048576);
    }
}

// Dies where the options contradict each other or do not divide the batch. Fills in the sizes.
static void divide_batch(Trainer *t, const Config *c) {
    const Grid *g = t->g;
    StepOptions *o = &t->o;
    if (o->batch % g->data_ranks)
        die("--batch %lld cannot be divided over %d ranks that read distinct data|"
            "use a multiple of %d",
            (long long)o->batch, g->data_ranks, g->data_ranks);
    int64_t sequences = t->tokens.sequences = o->batch / g->data_ranks;
    if (sequences % o->rounds)
        die("--batch %lld over %d ranks gives %lld sequences each, not divisible by --rounds %d|"
            "change one of them",
            (long long)o->batch, g->data_ranks, (long long)sequences, o->rounds);
    int64_t per_round = sequences / o->rounds;
    if (!o->micro_batch) o->micro_batch = (int)per_round;
    if (per_round % o->micro_batch)
        die("%lld sequences per rank and round cannot be divided into --micro-batch %d|"
            "use a divisor",
            (long long)per_round, o->micro_batch);
    if ((int64_t)o->micro_batch * o->T > INT32_MAX / 64)
        die("a micro-batch of %d x %d tokens is too large|use a smaller --micro-batch",
            o->micro_batch, o->T);
    if (o->rounds > 1 && o->update_layer)
        die("--rounds %d needs the gradients of all layers at once|"
            "use --update end, or one round with a smaller --micro-batch",
            o->rounds);
    if (o->skip_nonfinite && o->update_layer)
        die("--skip-nonfinite cannot undo layers that are already stepped|use --update end");
    if (o->T > c->max_positions)
        die("--seq-len %d is longer than the model's max_position_embeddings %d|"
            "use a shorter sequence",
            o->T, c->max_positions);
    t->n_micro = (int)(per_round / o->micro_batch);
    t->R = (int64_t)o->micro_batch * o->T;
    t->n_in_flight = 1;
    if (g->ep > 1) t->n_in_flight = t->n_micro < 3 ? t->n_micro : 3;
}

Trainer *trainer_create(Model *m, Grid *g, StepOptions o, OptimizerOptions opt, int plan_only,
                        FILE *report) {
    Trainer *t = (Trainer *)xcalloc(1, sizeof(Trainer), "trainer");
    t->m = m;
    t->g = g;
    t->o = o;
    t->norms.previous = -1;
    divide_batch(t, &m->c);
    if (opt.kind == OPT_ADAMW8) plan_check_blocks(&m->c, g);
    t->arena = arena_counting("device");
    allocate(t, opt, &t->arena);
    if (report) print_table(report, &t->arena);
    if (plan_only) return t;
    release(t);
    arena_commit(&t->arena);
    allocate(t, opt, &t->arena);
    // Weights, gradients and other micro-batches' tokens travel while the experts compute.
    device_share(g->world > 1);
    size_t tokens = t->tokens.sequences * o.T;
    t->tokens.host_ids = (int *)xcalloc(tokens, sizeof(int), "tokens of an update");
    t->tokens.host_targets = (int *)xcalloc(tokens, sizeof(int), "tokens of an update");
    // What the ep group has, what this rank has, and the group's in the order of attention.
    size_t positions = (2 * t->work.attention_rows + t->R) * t->n_micro;
    t->tokens.host_position = (int *)xcalloc(positions, sizeof(int), "positions in documents");
    router_totals_create_host(&t->router, m);
    t->norms.host_blocks = (double *)xcalloc(m->n_blocks, sizeof(double), "norms");
    return t;
}

void trainer_free(Trainer *t) {
    if (!t) return;
    release(t);
    arena_free(&t->arena);
    router_totals_free(&t->router);
    free(t->tokens.host_ids);
    free(t->tokens.host_targets);
    free(t->tokens.host_position);
    free(t->norms.host_blocks);
    free(t);
}

// ---- weights --------------------------------------------------------------------------------
// The part of the embedding's pad row that this segment holds starts as zeros.
static void zero_pad_row(Trainer *t, int block, const Segment *s) {
    const Config *c = &t->m->c;
    int64_t begin = (int64_t)c->pad * c->C;
    int64_t end = begin + c->C;
    if (begin < s->first) begin = s->first;
    if (end > s->first + s->count) end = s->first + s->count;
    if (begin >= end) return;
    int64_t at = s->offset + begin - s->first;
    OptimizerState *state = &t->optimizer.state[block];
    device_zero(state->param + at, (end - begin) * sizeof(floatX));
    if (state->master) device_zero(state->master + at, (end - begin) * sizeof(real));
}

void trainer_init(Trainer *t) {
    const Model *m = t->m;
    for (int b = 0; b < m->n_blocks; b++) {
        const Block *block = &m->block[b];
        OptimizerState *state = &t->optimizer.state[b];
        for (int i = 0; i < block->n_segments; i++) {
            const Param *p = &m->param[block->segment_param[i]];
            const Segment *s = &block->segment[i];
            init_segments(state->param, state->master, s, 1, t->o.seed,
                          p->init == INIT_ONES ? -1 : m->c.init_std);
            if (p->id == P_EMBED && m->c.pad >= 0) zero_pad_row(t, b, s);
        }
    }
}
