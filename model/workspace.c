// The memory of layers (layer.h): where the saved activations of a micro-batch lie, the scratch
// that the stages share, and what each micro-batch in flight has of its own. With a counting arena
// the same code is the plan (I10, the planner is the allocator).
#include "layer.h"

// ---- saved activations ----------------------------------------------------------------------
// Takes one array of `count` elements from memory that begins at base and has *used bytes taken;
// with base 0 only counts.
static void *append(char *base, size_t *used, int64_t count, size_t size) {
    void *array = base ? base + *used : 0;
    *used += (count * size + 255) / 256 * 256;
    return array;
}

static int64_t q_size(const Workspace *w) { return w->attention_rows * w->heads * w->c->D; }
static int64_t kv_size(const Workspace *w) { return w->attention_rows * w->kv_heads * w->c->D; }

static size_t attention_layout(Saved *s, const Workspace *w, char *base) {
    size_t used = 0;
    s->q = (floatX *)append(base, &used, q_size(w), sizeof(floatX));
    s->k = (floatX *)append(base, &used, kv_size(w), sizeof(floatX));
    s->v = (floatX *)append(base, &used, kv_size(w), sizeof(floatX));
    s->o = (floatX *)append(base, &used, q_size(w), sizeof(floatX));
    s->lse = (real *)append(base, &used, w->attention_rows * w->heads, sizeof(real));
    s->mid = (floatX *)append(base, &used, w->R * w->c->C, sizeof(floatX));
    return used;
}

// The lists of a routing, if there are other ranks.
static void route_layout(Route *route, const Workspace *w, int layer, int64_t rows, int64_t pool,
                         char *base, size_t *used) {
    const Config *c = w->c;
    RowIndex none = { 0, 0, 0, 0, 0, 0, 0 };
    RowIndex *index = &route->index;
    int64_t sent = w->R * w->destinations;
    *index = none;
    route->send_token = route->sum_row = 0;
    if (w->ep == 1 || !c->is_moe[layer]) return;
    index->row_token = (int *)append(base, used, rows, sizeof(int));
    index->token_row = (int *)append(base, used, pool * c->K, sizeof(int));
    index->expert_row = (int *)append(base, used, c->E / w->ep + 1, sizeof(int));
    if (!sent) return;
    route->send_token = (int *)append(base, used, sent, sizeof(int));
    route->sum_row = (int *)append(base, used, sent, sizeof(int));
}

void saved_route_copy(Saved *s, const Workspace *w, const Route *route) {
    RowIndex *to = &s->route.index;
    const RowIndex *from = &route->index;
    to->M = from->M;
    to->P = from->P;
    to->E = from->E;
    to->K = from->K;
    device_copy(to->row_token, from->row_token, to->M * sizeof(int));
    device_copy(to->token_row, from->token_row, to->P * to->K * sizeof(int));
    device_copy(to->expert_row, from->expert_row, (to->E + 1) * sizeof(int));
    size_t sent = w->R * w->destinations * sizeof(int);
    if (!sent) return;
    device_copy(s->route.send_token, route->send_token, sent);
    device_copy(s->route.sum_row, route->sum_row, sent);
}

static size_t expert_layout(Saved *s, const Workspace *w, int layer, int64_t rows, int64_t pool,
                            char *base) {
    const Config *c = w->c;
    int64_t F = c->is_moe[layer] ? c->F : c->I;
    size_t used = 0;
    s->H = (floatX *)append(base, &used, rows * 2 * F, sizeof(floatX));
    route_layout(&s->route, w, layer, rows, pool, base, &used);
    s->pool = 0;
    s->pool_score = 0;
    if (w->tokens_move && c->is_moe[layer]) {
        s->pool = (floatX *)append(base, &used, pool * c->C, sizeof(floatX));
        s->pool_score = (real *)append(base, &used, pool * c->K, sizeof(real));
    }
    return used;
}

size_t saved_attention_bytes(const Workspace *w) {
    Saved s;
    return attention_layout(&s, w, 0);
}
size_t saved_expert_bytes(const Workspace *w, int layer, int64_t rows, int64_t pool) {
    Saved s;
    return expert_layout(&s, w, layer, rows, pool, 0);
}

void saved_attention_place(Saved *s, const Workspace *w, const InFlight *f, char *memory) {
    s->has_attention = memory != 0;
    if (memory) {
        attention_layout(s, w, memory);
        return;
    }
    s->q = f->scratch.q;
    s->k = f->scratch.k;
    s->v = f->scratch.v;
    s->o = f->scratch.o;
    s->lse = f->scratch.lse;
    s->mid = f->scratch.mid;
}

void saved_expert_place(Saved *s, const Workspace *w, int layer, int64_t rows, int64_t pool,
                        char *memory) {
    s->has_experts = memory != 0;
    expert_layout(s, w, layer, rows, pool, memory);
    if (!memory) s->H = w->H;
}

// ---- the workspace --------------------------------------------------------------------------
static void dense_index_create(Workspace *w, Arena *arena) {
    RowIndex *index = &w->dense;
    index->M = row_index_bound(w->R, 1, 1);
    index->P = w->R;
    index->E = index->K = 1;
    index->row_token = ARENA_TAKE(arena, int, index->M, "row index");
    index->token_row = ARENA_TAKE(arena, int, w->R, "row index");
    index->expert_row = ARENA_TAKE(arena, int, 2, "row index");
}

void workspace_create(Workspace *w, const Model *m, const Grid *g, int64_t B, int64_t T,
                      Arena *arena) {
    const Config *c = &m->c;
    int parts = m->shard_spec.split_heads ? g->ep : 1;
    memset(w, 0, sizeof *w);
    w->c = c;
    w->B = B;
    w->T = T;
    w->R = B * T;
    w->heads = c->H / parts;
    w->kv_heads = c->KV / parts;
    w->attention_rows = heads_rows(g, w->R);
    w->tokens_move = g->ep > 1 && g->dispatch != DISPATCH_ALLREDUCE;
    w->ep = g->ep;
    w->destinations = 0;
    if (g->ep > 1 && g->dispatch == DISPATCH_ALLTOALL)
        w->destinations = g->ep < c->K ? g->ep : c->K;
    w->split = heads_create(g, c, w->R, arena);
    int64_t rows = 0;   // most expert rows of any kind of layer
    int64_t hidden = 0; // most rows * width
    if (c->n_moe) {
        rows = row_index_bound(dispatch_pool_bound(g, w->R), c->K, c->E / g->ep);
        hidden = rows * c->F;
    }
    if (c->n_moe < c->L) {
        dense_index_create(w, arena);
        if (w->dense.M > rows) rows = w->dense.M;
        if ((int64_t)w->dense.M * c->I > hidden) hidden = (int64_t)w->dense.M * c->I;
    }
    w->cos = ARENA_TAKE(arena, real, T * c->D / 2, "rope table");
    w->sin = ARENA_TAKE(arena, real, T * c->D / 2, "rope table");
    if (w->cos) rope_table(w->cos, w->sin, c->rope_theta, T, c->D);
    const char *attention = "working set: attention";
    const char *experts = "working set: experts";
    w->h = ARENA_TAKE(arena, floatX, w->R * c->C, attention);
    w->qn = ARENA_TAKE(arena, floatX, q_size(w), attention);
    w->kn = ARENA_TAKE(arena, floatX, kv_size(w), attention);
    w->dq = ARENA_TAKE(arena, floatX, q_size(w), attention);
    w->dk = ARENA_TAKE(arena, floatX, kv_size(w), attention);
    w->dv = ARENA_TAKE(arena, floatX, kv_size(w), attention);
    w->d_o = ARENA_TAKE(arena, floatX, q_size(w), attention);
    w->dh = ARENA_TAKE(arena, floatX, w->R * c->C, attention);
    size_t bytes = attention_workspace(w->attention_rows / T, T, w->heads, w->kv_heads, c->D);
    w->attention = arena_take(arena, bytes, attention);
    w->H = ARENA_TAKE(arena, floatX, 2 * hidden, experts);
    w->A = ARENA_TAKE(arena, floatX, hidden, experts);
    w->Y = ARENA_TAKE(arena, floatX, rows * c->C, experts);
    w->rstd = ARENA_TAKE(arena, real, w->R, attention);
    w->dz = ARENA_TAKE(arena, real, c->n_moe ? w->R * c->E : 0, experts);
    if (w->dense.row_token) { // every token chooses expert 0: rstd lends the memory for R zeros
        device_zero(w->rstd, w->R * sizeof(int));
        row_index_build(&w->dense, (const int *)w->rstd, 0);
        device_poison(w->rstd, w->R * sizeof(real));
    }
}

void workspace_free(Workspace *w) {
    heads_free(w->split);
    w->split = 0;
}

// ---- micro-batches in flight ----------------------------------------------------------------
void in_flight_create(InFlight *f, const Workspace *w, const Grid *g, Arena *arena) {
    const Config *c = w->c;
    const char *what = "working set: micro-batches in flight";
    memset(f, 0, sizeof *f);
    f->u = ARENA_TAKE(arena, floatX, w->R * c->C, what);
    f->y = ARENA_TAKE(arena, floatX, w->R * c->C, what);
    f->rstd = ARENA_TAKE(arena, real, w->R, what);
    f->dscore = ARENA_TAKE(arena, real, w->R * c->K, what);
    char *scratch = (char *)arena_take(arena, saved_attention_bytes(w), what);
    if (scratch) attention_layout(&f->scratch, w, scratch);
    if (c->n_moe) f->dispatcher = dispatcher_create(g, c, w->R, arena);
}

void in_flight_free(InFlight *f) {
    if (f->dispatcher) dispatcher_free(f->dispatcher);
    f->dispatcher = 0;
}
