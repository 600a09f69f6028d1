// Three dispatchers behind one pair of linear maps. Notation: n = ep ranks, R tokens of each, J =
// min(n, K) = ranks that one token can go to, P = pool tokens here.
//
//   alltoall    S = the 0/1 matrix that copies a token once to every rank where one of its experts
//   lives; pool = S x, y = S^T out. Sent rows stand by (destination, token), a pool
//               by (source, token): ranks hold contiguous slices of the batch, so the rows of every
//               expert are in the order of the one-process batch.
//   allgather   S = all tokens to all ranks; S^T = the sum over ranks of their slices. The plan
//   drops the experts that live elsewhere, so expert rows are the routed ones. allreduce   x is the
//   same on all ranks; pool = x and y = sum of the ranks' parts. Adjoint: every replica of y got
//   its own dy (its loss share is 1/n of the token's), so
//               dpool = sum of the ranks' dy; and dx is one term of the sum over replicas that the
//               dense gradients make anyway (I1): nothing is sent.
//
// Which rows travel follows from topk alone, and after its all-gather every rank has all of it: no
// sizes are exchanged, and every rank knows the load of every other. Buffers, in tokens of C floatX
// (alltoall): pool, dpool, out of n R, stage of R J.
//   stage sends the FORWARD dispatch and receives every combine;  out sends the BACKWARD dispatch,
//   later it is the target of the experts: never two uses at a time.
#include "dispatch.h"
#include "../kernels/fail.h"
#include <stdlib.h>
#include <string.h>

struct Dispatcher {
    Comm *group;
    Dispatch dispatch;
    int local; // 1: nothing moves, every call returns its argument (ep = 1 without --force-comm)
    int n, me, R, C, E, K, J, bound; // E: all experts; bound: tokens of the largest pool
    int *row_token, *token_row, *expert_row;
    int *all_topk; // (n R, K) everybody's topk
    int *choice;   // (bound, K) topk of the pool; all_topk itself with allgather
    int *send_token, *sum_row,
        *pool_token; // alltoall: (R J) my token of each sent row; (R, J) sent rows of each token,
                     // -1; (bound) row of all_topk of each pool token
    floatX *pool[2], *out, *stage;      // by pass
    real *score, *dscore, *score_stage; // (bound, K) twice; (R J, K)
    int *host_topk, *host_index; // host: (n R, K);  send_token, sum_row, pool_token behind one
                                 // another as on the device
    int *expert_count,
        *per_rank; // host: (E) rows of every expert; (n) scratch of the loops over tokens
    int64_t *send_rows, *recv_rows; // host: (n)
    DispatchLoad load;
    struct {
        const floatX *x;
        const real *score;
        floatX *y;
        real *dscore;
        Request rows, scores;
    } at[2]; // what the calls between start and wait hold, by pass
};

int dispatch_pool_bound(const Grid *g, int R) {
    int64_t bound = g->dispatch == DISPATCH_ALLREDUCE ? R : (int64_t)g->ep * R;
    if (bound > INT32_MAX)
        die("%d ranks of an ep group with %d tokens each make a pool of %lld tokens|use a smaller --micro-batch or --ep",
            g->ep, R, (long long)bound);
    return (int)bound;
}

Dispatcher *dispatcher_create(const Grid *g, const Config *c, int R, Arena *arena) {
    Dispatcher *e = (Dispatcher *)xcalloc(1, sizeof(Dispatcher), "an exchange");
    const int n = g->ep, K = c->K, C = c->C, bound = dispatch_pool_bound(g, R);
    e->group = g->ep_group,
    e->local = g->ep_group ? comm_is_local(g->ep_group)
                           : n == 1; // no group: a plan for a grid that does not run
    e->dispatch = g->dispatch, e->n = n, e->me = g->ep_rank, e->R = R, e->C = C, e->E = c->E,
    e->K = K, e->J = n < K ? n : K, e->bound = bound;
    const size_t P = (size_t)bound, sent = (size_t)R * (size_t)e->J,
                 M = (size_t)row_index_bound(bound, K, c->E / n);
    e->row_token = ARENA_TAKE(arena, int, M, "row index of the experts");
    e->token_row = ARENA_TAKE(arena, int, P *K, "row index of the experts");
    e->expert_row = ARENA_TAKE(arena, int, c->E / n + 1, "row index of the experts");
    e->load.pool = e->load.pool_max = bound, e->load.rows = e->load.rows_max = (int)M;
    if (e->local) return e;

    e->host_topk = (int *)xcalloc((size_t)n * R * K + 1, sizeof(int), "the routing of an ep group");
    e->expert_count = (int *)xcalloc((size_t)c->E, sizeof(int), "expert counts"),
    e->per_rank = (int *)xcalloc((size_t)n, sizeof(int), "pool sizes");
    e->pool[BACKWARD] = ARENA_TAKE(arena, floatX, P * C, "token exchange");
    if (e->dispatch == DISPATCH_ALLREDUCE) {
        comm_reserve(e->group, P * C * sizeof(floatX), arena);
        return e;
    }

    e->all_topk = ARENA_TAKE(arena, int, P *K, "token exchange");
    e->pool[FORWARD] = ARENA_TAKE(arena, floatX, P * C, "token exchange");
    e->out = ARENA_TAKE(arena, floatX, P * C, "token exchange");
    e->score = ARENA_TAKE(arena, real, P * K, "token exchange");
    e->dscore = ARENA_TAKE(arena, real, P * K, "token exchange");
    e->load.sent_rows = e->load.received_rows = (int64_t)(n - 1) * R;
    if (e->dispatch == DISPATCH_ALLGATHER) {
        e->choice = e->all_topk, comm_reserve(e->group, P * C * sizeof(floatX), arena);
        return e;
    }

    e->choice = ARENA_TAKE(arena, int, P *K, "token exchange");
    e->send_token = ARENA_TAKE(arena, int, 2 * sent + P, "token exchange");
    if (e->send_token) e->sum_row = e->send_token + sent, e->pool_token = e->sum_row + sent;
    e->stage = ARENA_TAKE(arena, floatX, sent * C, "token exchange");
    e->score_stage = ARENA_TAKE(arena, real, sent * K, "token exchange");
    e->host_index = (int *)xcalloc(2 * sent + P + 1, sizeof(int), "the index of an exchange");
    e->send_rows = (int64_t *)xcalloc((size_t)n, sizeof(int64_t), "send sizes"),
    e->recv_rows = (int64_t *)xcalloc((size_t)n, sizeof(int64_t), "receive sizes");
    return e;
}

void dispatcher_free(Dispatcher *e) {
    if (!e) return;
    free(e->host_topk), free(e->host_index), free(e->expert_count), free(e->per_rank),
        free(e->send_rows), free(e->recv_rows), free(e);
}

// ---- the plan -------------------------------------------------------------------------------
// Load of every rank from everybody's topk: expert rows are padded per expert as row_index_build
// does. Ids ascend, so the experts of one rank are neighbours in a token's list and a change of
// rank is a new destination.
static void measure(Dispatcher *e) {
    const int n = e->n, K = e->K, local = e->E / n, tile = device_row_tile(), tokens = e->bound;
    const int *topk = e->host_topk;
    memset(e->expert_count, 0, (size_t)e->E * sizeof(int)),
        memset(e->per_rank, 0, (size_t)n * sizeof(int));
    for (size_t t = 0; t < (size_t)tokens; t++, topk += K)
        for (int k = 0, end = 0; k < K; k++) { // end: first expert of the next rank
            if ((unsigned)topk[k] >= (unsigned)e->E)
                die("expert id %d of %d experts reached the exchange|the router's logits are not finite: lower the learning rate",
                    topk[k], e->E);
            e->expert_count[topk[k]]++;
            if (topk[k] >= end) e->per_rank[topk[k] / local]++, end = (topk[k] / local + 1) * local;
        }
    DispatchLoad *l = &e->load;
    l->pool_max = l->rows_max = 0;
    for (int j = 0; j < n; j++) {
        int rows = 0, pool = e->dispatch == DISPATCH_ALLTOALL ? e->per_rank[j] : tokens;
        for (int i = j * local; i < (j + 1) * local; i++)
            rows += (e->expert_count[i] + tile - 1) / tile * tile;
        if (j == e->me) l->pool = pool, l->rows = rows;
        if (pool > l->pool_max) l->pool_max = pool;
        if (rows > l->rows_max) l->rows_max = rows;
    }
}

// alltoall: the rows to send, where each token finds them when they come back, and the tokens that
// arrive.
static void route(Dispatcher *e) {
    const int n = e->n, R = e->R, K = e->K, J = e->J, local = e->E / n, first = e->me * local;
    const int *mine = e->host_topk + (size_t)e->me * R * K;
    int *send_token = e->host_index, *sum_row = send_token + (size_t)R * J,
        *pool_token = sum_row + (size_t)R * J, *row = e->per_rank; // row: next row to each rank
    for (int i = 0, p = 0; i < n; i++) {                           // who sends to me
        const int *topk = e->host_topk + (size_t)i * R * K, p0 = p;
        for (int r = 0; r < R; r++, topk += K) {
            int here = 0;
            for (int k = 0; k < K; k++) here |= topk[k] >= first && topk[k] < first + local;
            pool_token[p] = i * R + r,
            p += here; // branchless; the entry behind the last one is scratch
        }
        e->recv_rows[i] = p - p0;
    }
    memset(e->send_rows, 0, (size_t)n * sizeof(int64_t));
    for (int r = 0; r < R; r++)
        for (int k = 0, end = 0; k < K; k++) {
            int id = mine[(size_t)r * K + k];
            if (id >= end) e->send_rows[id / local]++, end = (id / local + 1) * local;
        }
    for (int j = 0, at = 0; j < n; j++) row[j] = at, at += (int)e->send_rows[j];
    for (int r = 0; r < R; r++) {
        int j = 0;
        for (int k = 0, end = 0; k < K; k++) {
            int id = mine[(size_t)r * K + k];
            if (id >= end)
                sum_row[(size_t)r * J + j++] = row[id / local], send_token[row[id / local]++] = r,
                                        end = (id / local + 1) * local;
        }
        for (; j < J; j++) sum_row[(size_t)r * J + j] = -1;
    }
    e->load.sent_rows = row[n - 1] - e->send_rows[e->me],
    e->load.received_rows = e->load.pool - e->recv_rows[e->me];
    device_upload(e->send_token, e->host_index,
                  (2 * (size_t)R * J + (size_t)e->load.pool) * sizeof(int));
    rows_gather(e->choice, e->all_topk, e->pool_token, e->load.pool, (size_t)K * sizeof(int));
}

void dispatch_route(RowIndex *plan, Dispatcher *e, const int *topk) {
    const int local = e->E / e->n;
    plan->row_token = e->row_token, plan->token_row = e->token_row,
    plan->expert_row = e->expert_row;
    plan->K = e->K, plan->E = local, plan->P = e->load.pool, plan->M = e->load.rows;
    if (e->local) {
        row_index_build(plan, topk, 0, 0);
        return;
    }

    const size_t P = (size_t)e->bound, ids = (size_t)e->R * e->K;
    for (int pass = 0; pass < 2; pass++)
        if (e->pool[pass]) device_poison(e->pool[pass], P * e->C * sizeof(floatX));
    if (e->out)
        device_poison(e->out, P * e->C * sizeof(floatX)),
            device_poison(e->score, P * e->K * sizeof(real)),
            device_poison(e->dscore, P * e->K * sizeof(real));
    if (e->stage)
        device_poison(e->stage, (size_t)e->R * e->J * e->C * sizeof(floatX)),
            device_poison(e->score_stage, (size_t)e->R * e->J * e->K * sizeof(real));
    if (e->dispatch == DISPATCH_ALLREDUCE)
        device_download(e->host_topk, topk, ids * sizeof(int));
    else {
        comm_wait(all_gather_start(e->group, e->all_topk, topk, ids, DTYPE_I32, STREAM_EXCHANGE));
        device_download(e->host_topk, e->all_topk, (size_t)e->n * ids * sizeof(int));
    }
    measure(e);
    if (e->dispatch == DISPATCH_ALLTOALL) route(e);
    plan->P = e->load.pool, plan->M = e->load.rows;
    row_index_build(plan, e->dispatch == DISPATCH_ALLREDUCE ? topk : e->choice, 0, e->me * local);
}

const DispatchLoad *dispatch_load(const Dispatcher *e) { return &e->load; }

// ---- dispatch ---------------------------------------------------------------------------------
static const Request NOTHING = { -1 };

void dispatch_start(Dispatcher *e, Pass pass, const floatX *x, const real *score) {
    const size_t row = (size_t)e->C * sizeof(floatX), ids = (size_t)e->K * sizeof(real);
    e->at[pass].x = x, e->at[pass].score = score, e->at[pass].rows = e->at[pass].scores = NOTHING;
    if (e->local) return;
    if (e->dispatch == DISPATCH_ALLTOALL) {
        floatX *send = pass == FORWARD ? e->stage : e->out;
        int rows = (int)(e->load.sent_rows + e->send_rows[e->me]);
        rows_gather(send, x, e->send_token, rows, row);
        e->at[pass].rows = all_to_all_start(e->group, e->pool[pass], e->recv_rows, send,
                                            e->send_rows, row, STREAM_EXCHANGE);
        if (!score) return;
        rows_gather(e->score_stage, score, e->send_token, rows, ids);
        e->at[pass].scores = all_to_all_start(e->group, e->score, e->recv_rows, e->score_stage,
                                              e->send_rows, ids, STREAM_EXCHANGE);
    } else if (e->dispatch == DISPATCH_ALLGATHER) {
        e->at[pass].rows = all_gather_start(e->group, e->pool[pass], x, (size_t)e->R * e->C,
                                            DTYPE_FLOATX, STREAM_EXCHANGE);
        if (score)
            e->at[pass].scores = all_gather_start(e->group, e->score, score, (size_t)e->R * e->K,
                                                  DTYPE_REAL, STREAM_EXCHANGE);
    } else if (pass == BACKWARD) {
        device_copy(e->pool[BACKWARD], x, (size_t)e->R * row);
        e->at[pass].rows = all_reduce_start(e->group, e->pool[BACKWARD], (size_t)e->R * e->C,
                                            DTYPE_FLOATX, STREAM_EXCHANGE);
    }
}

const floatX *dispatch_wait(Dispatcher *e, Pass pass, const real **score) {
    int moves = !e->local && !(e->dispatch == DISPATCH_ALLREDUCE && pass == FORWARD);
    comm_wait(e->at[pass].rows), comm_wait(e->at[pass].scores);
    e->at[pass].rows = e->at[pass].scores = NOTHING;
    if (score) *score = moves && e->at[pass].score ? e->score : e->at[pass].score;
    return moves ? e->pool[pass] : e->at[pass].x;
}

// ---- combine --------------------------------------------------------------------------------
static int in_place(const Dispatcher *e) { return e->local || e->dispatch == DISPATCH_ALLREDUCE; }

floatX *combine_target(Dispatcher *e, Pass pass, floatX *y, real *dscore, real **pool_dscore) {
    if (pool_dscore) *pool_dscore = pass == FORWARD ? 0 : in_place(e) ? dscore : e->dscore;
    return in_place(e) ? y : e->out;
}

void combine_start(Dispatcher *e, Pass pass, floatX *y, real *dscore) {
    const size_t row = (size_t)e->C * sizeof(floatX), ids = (size_t)e->K * sizeof(real);
    e->at[pass].y = y, e->at[pass].dscore = dscore, e->at[pass].rows = e->at[pass].scores = NOTHING;
    if (e->local) return;
    if (e->dispatch == DISPATCH_ALLTOALL) {
        e->at[pass].rows = all_to_all_start(e->group, e->stage, e->send_rows, e->out, e->recv_rows,
                                            row, STREAM_EXCHANGE);
        if (dscore)
            e->at[pass].scores = all_to_all_start(e->group, e->score_stage, e->send_rows, e->dscore,
                                                  e->recv_rows, ids, STREAM_EXCHANGE);
    } else if (e->dispatch == DISPATCH_ALLGATHER) {
        e->at[pass].rows = reduce_scatter_start(e->group, y, e->out, (size_t)e->R * e->C,
                                                DTYPE_FLOATX, 0, STREAM_EXCHANGE);
        if (dscore)
            e->at[pass].scores = reduce_scatter_start(
                e->group, dscore, e->dscore, (size_t)e->R * e->K, DTYPE_REAL, 0, STREAM_EXCHANGE);
    } else if (pass == FORWARD)
        e->at[pass].rows =
            all_reduce_start(e->group, y, (size_t)e->R * e->C, DTYPE_FLOATX, STREAM_EXCHANGE);
}

void combine_wait(Dispatcher *e, Pass pass) {
    comm_wait(e->at[pass].rows), comm_wait(e->at[pass].scores);
    e->at[pass].rows = e->at[pass].scores = NOTHING;
    if (e->local || e->dispatch != DISPATCH_ALLTOALL) return;
    rows_sum(e->at[pass].y, e->stage, e->sum_row, e->R, e->J, e->C);
    if (e->at[pass].dscore)
        rows_sum_real(e->at[pass].dscore, e->score_stage, e->sum_row, e->R, e->J, e->K);
}
