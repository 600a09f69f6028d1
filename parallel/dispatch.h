// Tokens to experts and back: two linear maps and their adjoints. Dispatch brings tokens to the
// ranks whose experts they chose (a pool); combine adds the ranks' partial outputs back at the
// source. Backward runs the adjoints: it dispatches dy with combine's transpose, and combines dx
// and dscore with dispatch's.
//
//   alltoall    uneven exchange, one copy of a token for each destination rank; combine is its
//               transpose, summed at the source in rank order
//   allgather   all-gather of the tokens, reduce-scatter of the outputs; the experts' work still
//               grows with routed rows only
//   allreduce   tokens are replicated over ep: dispatch is the identity, combine an all-reduce.
//               Backward: an all-reduce of dy, and dx stays a partial sum (I1, one gradient rule)
//
// With ep = 1 every call returns its argument and nothing is copied or waited for (--force-comm: a
// group of one sends to itself).
//
//   forward    dispatch_route;  dispatch_start(x, score), dispatch_wait -> pool;
//              experts write combine_target;  combine_start, combine_wait -> y
//   backward   dispatch_route_again;  the FORWARD dispatch again unless the caller saved the pool;
//              dispatch(dy) -> dpool;  experts write combine_target;  combine -> dx, dscore
//
// The dispatches of both passes of one Dispatcher may be in flight together; a combine starts after
// both were waited for. Everything is issued whatever the routing is (I2, collectives do not depend
// on data).
#ifndef MOE_DISPATCH_H
#define MOE_DISPATCH_H
#include "grid.h"
MOE_BEGIN_C
typedef enum { FORWARD, BACKWARD } Pass;
// One for each micro-batch in flight; its pools stay valid until it routes again.
typedef struct Dispatcher Dispatcher;

// Takes buffers for the worst routing of R tokens of every rank from the arena (which may be
// counting): nothing can overflow, nothing is dropped.
Dispatcher *dispatcher_create(const Grid *g, const Config *c, int64_t R, Arena *arena);
void dispatcher_free(Dispatcher *d);
// Returns the tokens of the largest pool: ep * R, or R where tokens do not move. The bound of the
// expert rows is row_index_bound(bound, K, E/ep). Dies where an int cannot hold it.
int64_t dispatch_pool_bound(const Grid *g, int64_t R);
// Returns the ints of Route.table: 0 with ep = 1.
int64_t dispatch_table_size(const Grid *g, const Config *c, int64_t R);

// Fills route from topk (R,K), ascending global expert ids on the device, and route->table, which
// is the caller's. With ep > 1 it all-gathers topk, and the host reads the table: the one read of a
// layer and micro-batch (I11, the host does not wait). The other arrays are the dispatcher's, valid
// until it routes again. index.P and index.M are then the numbers of this routing; with ep = 1 they
// are the bounds.
void dispatch_route(Route *route, Dispatcher *d, const int *topk);
// Returns to forward's routing, for backward, without a read: `saved` is a copy of forward's route
// with its table. Where its index.row_token is 0 the device makes the lists again from topk.
void dispatch_route_again(Route *route, Dispatcher *d, const int *topk, const Route *saved);

// Starts to dispatch x (R,C) and score (R,K), which is 0 in BACKWARD. Both stay untouched until
// dispatch_wait; where tokens do not move they are the pool and stay until its last use.
void dispatch_start(Dispatcher *d, Pass pass, const floatX *x, const real *score);
// Returns the pool (P,C), and in *score (P,K) its tokens' scores, of which those of experts
// elsewhere (token_row is -1) are not to be read. BACKWARD: *score = 0. score may be 0.
const floatX *dispatch_wait(Dispatcher *d, Pass pass, const real **score);
// Returns where the experts write their combined output (P,C); in BACKWARD *pool_dscore (P,K) takes
// the score gradient, 0 where the expert is elsewhere. y (R,C) and dscore (R,K; 0 in FORWARD) are
// where the sums land, the same pointers as combine_start gets; they are themselves the target
// where tokens do not move. pool_dscore may be 0 in FORWARD.
floatX *combine_target(Dispatcher *d, Pass pass, floatX *y, real *dscore, real **pool_dscore);
void combine_start(Dispatcher *d, Pass pass, floatX *y, real *dscore);
// Completes y and dscore, which are overwritten. allreduce in BACKWARD: with this rank's part of a
// sum over ep (I1, one gradient rule).
void combine_wait(Dispatcher *d, Pass pass);

// What the host knows since the routing: for stores of actual size, logs, traces and the check of
// the planner. ep = 1: bounds, nothing was read.
typedef struct {
    int64_t pool, rows;         // of this rank: tokens of the pool, expert rows including padding
    int64_t pool_max, rows_max; // the largest of any rank of the ep group: the same number on all
                                // of them, so a decision made from it is agreed
    int64_t sent_rows, received_rows; // rows of C floatX that this rank sends to, and gets from,
                                      // other ranks in a dispatch; a combine sends back what a
                                      // dispatch brought. With K numbers each: scores in the
                                      // FORWARD dispatch, their gradients in the BACKWARD combine
    int64_t reads;                    // tables that the host has read so far
} DispatchLoad;
const DispatchLoad *dispatch_load(const Dispatcher *d);
MOE_END_C
#endif
