// Three dispatchers behind one pair of linear maps (dispatch.h), on collectives of comm.h and the
// routing kernels of kernels.h. Notation: n = ep ranks, R tokens of each, J = min(n, K) = ranks
// that one token can go to, P = pool tokens here.
//
//   alltoall    S = the 0/1 matrix that copies a token once to every rank where one of its experts
//               lives; pool = S x, y = S^T out. Sent rows stand by (destination, token), a pool by
//               (source, token): ranks hold contiguous slices of the batch, so the rows of every
//               expert are in the order of the one-process batch.
//   allgather   S = all tokens to all ranks; S^T = the sum over ranks of their slices. The row
//   index
//               drops the experts that live elsewhere, so expert rows are the routed ones.
//   allreduce   x is the same on all ranks; pool = x and y = sum of the ranks' parts. Adjoint:
//   every
//               replica of y got its own dy (its loss share is 1/n of the token's), so dpool = sum
//               of the ranks' dy; and dx is one term of the sum over replicas that the dense
//               gradients make anyway (I1, one gradient rule): nothing is sent.
//
// Which rows travel follows from topk alone, and after its all-gather every rank's device has all
// of it: no sizes are exchanged, and the table of rows tells every host the load of every rank.
// Buffers, in tokens of C floatX (alltoall): pool, dpool, out of n R, stage of R J. stage sends the
// FORWARD dispatch and receives every combine; out sends the BACKWARD dispatch and is later the
// target of the experts: never two uses at a time.
#include "dispatch.h"
#include "../kernels/fail.h"
#include <stdlib.h>
#include <string.h>

struct Dispatcher {
    Comm *group;
    Dispatch kind;
    int local; // 1: nothing moves, every call returns its argument (ep = 1 without --force-comm)
    int n, me;
    int64_t R, C, E, K, J, bound; // E: all experts; bound: tokens of the largest pool
    RouteShape shape;
    RowIndex index;                     // with the arrays of its own
    int *all_topk;                      // (n R, K) everybody's topk
    int *table;                         // (route_table_size)
    int *choice;                        // (bound, K) alltoall: topk of the pool
    int *own_send_token, *own_sum_row;  // alltoall: see Route
    const int *send_token, *sum_row;    // of the routing at hand: its own, or saved ones
    floatX *pool[2], *out, *stage;      // by pass
    real *score, *dscore, *score_stage; // (bound, K) twice; (R J, K)
    int64_t *send_rows, *recv_rows;     // host: (n)
    DispatchLoad load;
    struct { // what the calls between start and wait hold, by pass
        const floatX *x;
        const real *score;
        floatX *y;
        real *dscore;
        Request rows, scores;
    } at[2];
};

int64_t dispatch_pool_bound(const Grid *g, int64_t R) {
    int64_t bound = g->dispatch == DISPATCH_ALLREDUCE ? R : g->ep * R;
    if (bound > INT32_MAX)
        die("%d ranks of an ep group with %lld tokens each make a pool of %lld tokens|use a "
            "smaller --micro-batch or --ep",
            g->ep, (long long)R, (long long)bound);
    return bound;
}

static RouteShape shape_of(const Grid *g, const Config *c, int64_t R) {
    RouteShape s = { g->dispatch == DISPATCH_ALLREDUCE ? 1 : g->ep, g->ep, R, c->K, c->E };
    return s;
}

static int is_local(const Grid *g) {
    if (!g->ep_group) return g->ep == 1; // no group: a plan for a grid that does not run
    return comm_is_local(g->ep_group);
}

int64_t dispatch_table_size(const Grid *g, const Config *c, int64_t R) {
    return is_local(g) ? 0 : route_table_size(shape_of(g, c, R));
}

Dispatcher *dispatcher_create(const Grid *g, const Config *c, int64_t R, Arena *arena) {
    static const char *const index = "row index of the experts";
    static const char *const exchange = "token exchange";
    Dispatcher *d = (Dispatcher *)xcalloc(1, sizeof(Dispatcher), "a dispatcher");
    const int64_t n = g->ep;
    const int64_t K = c->K, C = c->C, P = dispatch_pool_bound(g, R);
    const int64_t J = n < K ? n : K, M = row_index_bound(P, K, c->E / n);
    d->group = g->ep_group;
    d->local = is_local(g);
    d->kind = g->dispatch;
    d->n = g->ep;
    d->me = g->ep_rank;
    d->R = R;
    d->C = C;
    d->E = c->E;
    d->K = K;
    d->J = J;
    d->bound = P;
    d->shape = shape_of(g, c, R);
    d->index.row_token = ARENA_TAKE(arena, int, M, index);
    d->index.token_row = ARENA_TAKE(arena, int, P *K, index);
    d->index.expert_row = ARENA_TAKE(arena, int, c->E / n + 1, index);
    d->index.K = K;
    d->index.E = c->E / n;
    d->load.pool = d->load.pool_max = P;
    d->load.rows = d->load.rows_max = M;
    if (d->local) return d;

    d->table = ARENA_TAKE(arena, int, route_table_size(d->shape), exchange);
    d->pool[BACKWARD] = ARENA_TAKE(arena, floatX, P * C, exchange);
    if (d->kind == DISPATCH_ALLREDUCE) {
        comm_reserve(d->group, P * C * sizeof(floatX), arena);
        return d;
    }
    d->all_topk = ARENA_TAKE(arena, int, P *K, exchange);
    d->pool[FORWARD] = ARENA_TAKE(arena, floatX, P * C, exchange);
    d->out = ARENA_TAKE(arena, floatX, P * C, exchange);
    d->score = ARENA_TAKE(arena, real, P * K, exchange);
    d->dscore = ARENA_TAKE(arena, real, P * K, exchange);
    if (d->kind == DISPATCH_ALLGATHER) {
        comm_reserve(d->group, P * C * sizeof(floatX), arena);
        return d;
    }
    d->choice = ARENA_TAKE(arena, int, P *K, exchange);
    d->own_send_token = ARENA_TAKE(arena, int, R *J, exchange);
    d->own_sum_row = ARENA_TAKE(arena, int, R *J, exchange);
    d->stage = ARENA_TAKE(arena, floatX, R * J * C, exchange);
    d->score_stage = ARENA_TAKE(arena, real, R * J * K, exchange);
    d->send_rows = (int64_t *)xcalloc(n, sizeof(int64_t), "send sizes");
    d->recv_rows = (int64_t *)xcalloc(n, sizeof(int64_t), "receive sizes");
    return d;
}

void dispatcher_free(Dispatcher *d) {
    if (!d) return;
    free(d->send_rows);
    free(d->recv_rows);
    free(d);
}

// ---- routing --------------------------------------------------------------------------------
static void poison(void *p, int64_t count, size_t size) {
    if (p) device_poison(p, count * size);
}

static void poison_buffers(Dispatcher *d) {
    poison(d->pool[FORWARD], d->bound * d->C, sizeof(floatX));
    poison(d->pool[BACKWARD], d->bound * d->C, sizeof(floatX));
    poison(d->out, d->bound * d->C, sizeof(floatX));
    poison(d->score, d->bound * d->K, sizeof(real));
    poison(d->dscore, d->bound * d->K, sizeof(real));
    poison(d->stage, d->R * d->J * d->C, sizeof(floatX));
    poison(d->score_stage, d->R * d->J * d->K, sizeof(real));
}

// The ids that the routing kernels look at: everybody's, or the replicated tokens'.
static const int *gather_ids(Dispatcher *d, const int *topk) {
    if (d->kind == DISPATCH_ALLREDUCE) return topk;
    comm_wait(
        all_gather_start(d->group, d->all_topk, topk, d->R * d->K, DTYPE_I32, STREAM_EXCHANGE));
    return d->all_topk;
}

// Sizes of messages and the loads of all ranks, from the table.
static void read_table(Dispatcher *d, const int *table) {
    const int n = d->n;
    const int *rows = table + d->shape.sources * n;
    DispatchLoad *l = &d->load;
    if (rows[n])
        die("%d chosen expert ids are not among the %lld experts|the router's logits are not "
            "finite: lower the learning rate",
            rows[n], (long long)d->E);
    l->pool_max = l->rows_max = 0;
    for (int j = 0; j < n; j++) {
        int64_t pool = d->bound;
        if (d->kind == DISPATCH_ALLTOALL) {
            pool = 0;
            for (int i = 0; i < n; i++) pool += table[i * n + j];
            d->send_rows[j] = table[d->me * n + j];
            d->recv_rows[j] = table[j * n + d->me];
        }
        if (j == d->me) {
            l->pool = pool;
            l->rows = rows[j];
        }
        if (pool > l->pool_max) l->pool_max = pool;
        if (rows[j] > l->rows_max) l->rows_max = rows[j];
    }
    l->sent_rows = l->received_rows = 0;
    if (d->kind == DISPATCH_ALLGATHER) l->sent_rows = l->received_rows = (n - 1) * d->R;
    for (int j = 0; d->kind == DISPATCH_ALLTOALL && j < n; j++) {
        if (j == d->me) continue;
        l->sent_rows += d->send_rows[j];
        l->received_rows += d->recv_rows[j];
    }
    d->index.P = l->pool;
    d->index.M = l->rows;
}

// The routing at hand is that of the dispatcher's own lists.
static void route_with(Dispatcher *d, Route *route) {
    route->index = d->index;
    route->send_token = d->own_send_token;
    route->sum_row = d->own_sum_row;
    d->send_token = route->send_token;
    d->sum_row = route->sum_row;
}

// Without ranks to send to: bounds, and nothing to read.
static void route_local(Dispatcher *d, Route *route, const int *topk) {
    d->index.P = d->load.pool;
    d->index.M = d->load.rows;
    row_index_build(&d->index, topk, 0);
    route_with(d, route);
}

static void build_index(Dispatcher *d, const int *ids) {
    row_index_build(&d->index, d->kind == DISPATCH_ALLTOALL ? d->choice : ids,
                    d->me * (int)d->index.E);
}

static void build_lists(Dispatcher *d, const int *ids) {
    if (d->kind == DISPATCH_ALLTOALL)
        route_lists(d->own_send_token, d->own_sum_row, d->choice, ids, d->me, d->shape);
}

void dispatch_route(Route *route, Dispatcher *d, const int *topk) {
    if (d->local) {
        route_local(d, route, topk);
        return;
    }
    size_t bytes = route_table_size(d->shape) * sizeof(int);
    poison_buffers(d);
    const int *ids = gather_ids(d, topk);
    route_table(d->table, ids, d->shape);
    device_fetch_start(d->table, bytes);
    build_lists(d, ids); // while the host waits for the table
    memcpy(route->table, device_fetch_wait(), bytes);
    d->load.reads++;
    read_table(d, route->table);
    build_index(d, ids);
    route_with(d, route);
}

void dispatch_route_again(Route *route, Dispatcher *d, const int *topk, const Route *saved) {
    if (d->local) {
        route_local(d, route, topk);
        return;
    }
    poison_buffers(d);
    read_table(d, saved->table);
    if (saved->index.row_token) {
        *route = *saved;
        d->send_token = saved->send_token;
        d->sum_row = saved->sum_row;
        return;
    }
    const int *ids = gather_ids(d, topk);
    build_lists(d, ids);
    build_index(d, ids);
    route->table = saved->table;
    route_with(d, route);
}

const DispatchLoad *dispatch_load(const Dispatcher *d) { return &d->load; }

// ---- dispatch -------------------------------------------------------------------------------
static const Request NOTHING = { -1 };

static Request exchange(Dispatcher *d, void *recv, const int64_t *recv_rows, const void *send,
                        const int64_t *send_rows, size_t row) {
    return all_to_all_start(d->group, recv, recv_rows, send, send_rows, row, STREAM_EXCHANGE);
}

void dispatch_start(Dispatcher *d, Pass pass, const floatX *x, const real *score) {
    const size_t row = d->C * sizeof(floatX);
    const size_t ids = d->K * sizeof(real);
    const size_t elements = d->R * d->C;
    const size_t scores = d->R * d->K;
    d->at[pass].x = x;
    d->at[pass].score = score;
    d->at[pass].rows = d->at[pass].scores = NOTHING;
    if (d->local) return;
    switch (d->kind) {
    case DISPATCH_ALLTOALL: {
        floatX *send = pass == FORWARD ? d->stage : d->out;
        int64_t rows = d->load.sent_rows + d->send_rows[d->me];
        rows_gather(send, x, d->send_token, rows, row);
        d->at[pass].rows = exchange(d, d->pool[pass], d->recv_rows, send, d->send_rows, row);
        if (!score) return;
        rows_gather(d->score_stage, score, d->send_token, rows, ids);
        d->at[pass].scores = exchange(d, d->score, d->recv_rows, d->score_stage, d->send_rows, ids);
        return;
    }
    case DISPATCH_ALLGATHER:
        d->at[pass].rows =
            all_gather_start(d->group, d->pool[pass], x, elements, DTYPE_FLOATX, STREAM_EXCHANGE);
        if (score)
            d->at[pass].scores =
                all_gather_start(d->group, d->score, score, scores, DTYPE_REAL, STREAM_EXCHANGE);
        return;
    case DISPATCH_ALLREDUCE:
        if (pass == FORWARD) return;
        device_copy(d->pool[BACKWARD], x, d->R * row);
        d->at[pass].rows =
            all_reduce_start(d->group, d->pool[BACKWARD], elements, DTYPE_FLOATX, STREAM_EXCHANGE);
        return;
    }
}

const floatX *dispatch_wait(Dispatcher *d, Pass pass, const real **score) {
    int moves = !d->local && !(d->kind == DISPATCH_ALLREDUCE && pass == FORWARD);
    comm_wait(d->at[pass].rows);
    comm_wait(d->at[pass].scores);
    d->at[pass].rows = d->at[pass].scores = NOTHING;
    if (score) *score = moves && d->at[pass].score ? d->score : d->at[pass].score;
    return moves ? d->pool[pass] : d->at[pass].x;
}

// ---- combine --------------------------------------------------------------------------------
static int in_place(const Dispatcher *d) { return d->local || d->kind == DISPATCH_ALLREDUCE; }

floatX *combine_target(Dispatcher *d, Pass pass, floatX *y, real *dscore, real **pool_dscore) {
    if (pool_dscore && pass == FORWARD) *pool_dscore = 0;
    if (pool_dscore && pass == BACKWARD) *pool_dscore = in_place(d) ? dscore : d->dscore;
    return in_place(d) ? y : d->out;
}

void combine_start(Dispatcher *d, Pass pass, floatX *y, real *dscore) {
    const size_t row = d->C * sizeof(floatX);
    const size_t ids = d->K * sizeof(real);
    const size_t elements = d->R * d->C;
    const size_t scores = d->R * d->K;
    d->at[pass].y = y;
    d->at[pass].dscore = dscore;
    d->at[pass].rows = d->at[pass].scores = NOTHING;
    if (d->local) return;
    switch (d->kind) {
    case DISPATCH_ALLTOALL:
        d->at[pass].rows = exchange(d, d->stage, d->send_rows, d->out, d->recv_rows, row);
        if (dscore)
            d->at[pass].scores =
                exchange(d, d->score_stage, d->send_rows, d->dscore, d->recv_rows, ids);
        return;
    case DISPATCH_ALLGATHER:
        d->at[pass].rows =
            reduce_scatter_start(d->group, y, d->out, elements, DTYPE_FLOATX, 0, STREAM_EXCHANGE);
        if (dscore)
            d->at[pass].scores = reduce_scatter_start(d->group, dscore, d->dscore, scores,
                                                      DTYPE_REAL, 0, STREAM_EXCHANGE);
        return;
    case DISPATCH_ALLREDUCE:
        if (pass == FORWARD)
            d->at[pass].rows =
                all_reduce_start(d->group, y, elements, DTYPE_FLOATX, STREAM_EXCHANGE);
        return;
    }
}

void combine_wait(Dispatcher *d, Pass pass) {
    comm_wait(d->at[pass].rows);
    comm_wait(d->at[pass].scores);
    d->at[pass].rows = d->at[pass].scores = NOTHING;
    if (d->local || d->kind != DISPATCH_ALLTOALL) return;
    rows_sum(d->at[pass].y, d->stage, d->sum_row, d->R, d->J, d->C);
    if (d->at[pass].dscore)
        rows_sum_real(d->at[pass].dscore, d->score_stage, d->sum_row, d->R, d->J, d->K);
}
