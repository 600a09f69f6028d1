// Tokens to experts and back: two linear maps and their adjoints (DESIGN 6). dispatch brings tokens
// to the ranks whose experts they chose (a pool), combine adds the ranks' partial outputs back at
// the source. Backward runs the adjoints: it dispatches dy with combine's transpose and combines dx
// and dscore with dispatch's.
//
//   alltoall    uneven exchange, one copy of a token per destination rank; combine = its transpose,
//   summed at the source in rank order allgather   all-gather of the tokens, reduce-scatter of the
//   outputs; expert work still grows with routed rows only allreduce   tokens are replicated over
//   ep: dispatch = identity, combine = all-reduce.  Backward: all-reduce dy, dx stays a partial sum
//   (I1)
// With ep = 1 every call returns its argument and nothing is copied or waited for (--force-comm: a
// group of one sends to itself).
//
//   forward    dispatch_route; dispatch_start(x, score), dispatch_wait -> pool; experts write
//   combine_target; combine_start, combine_wait -> y backward   dispatch_route (the same topk: I7)
//   and the FORWARD dispatch again unless the caller kept the pool; dispatch(dy) -> dpool; experts
//   write combine_target; combine -> dx, dscore
// Of one Dispatcher the dispatches of both passes may be in flight together; a combine starts after
// both were waited for. Everything is issued whatever the routing is (I2).
#ifndef MOE_DISPATCH_H
#define MOE_DISPATCH_H
#include "grid.h"
MOE_BEGIN_C
typedef enum { FORWARD, BACKWARD } Pass;
typedef struct Dispatcher
    Dispatcher; // one per micro-batch in flight; its pools stay valid until its next dispatch_route

// R: tokens of a micro-batch of every rank (equal on all). Buffers for the worst routing come from
// the arena (may be counting): nothing can overflow, nothing is dropped.
Dispatcher *dispatcher_create(const Grid *g, const Config *c, int R, Arena *arena);
void dispatcher_free(Dispatcher *e);
// Bound of the pool, tokens of the worst routing: ep * R, or R where tokens do not move; dies where
// an int cannot hold it. Bound of the expert rows: row_index_bound(bound, K, E/ep).
int dispatch_pool_bound(const Grid *g, int R);
// Fills plan (whose arrays the exchange owns) from topk (R,K) ascending global expert ids (device).
// ep > 1: all-gathers topk, from which every rank knows every size; the one host read (I11).
// plan->P and plan->M are then the actual numbers of this routing, with ep = 1 they are the bounds.
void dispatch_route(RowIndex *plan, Dispatcher *e, const int *topk);
// x (R,C); score (R,K), 0 in BACKWARD. Both stay untouched until dispatch_wait; where tokens do not
// move they ARE the pool and stay until its last use.
void dispatch_start(Dispatcher *e, Pass pass, const floatX *x, const real *score);
// The pool (P,C); *score (P,K): the token's scores, those of experts elsewhere are not to be read
// (token_row is -1). BACKWARD: *score = 0. score may be 0.
const floatX *dispatch_wait(Dispatcher *e, Pass pass, const real **score);
// Where the experts write their combined output (P,C), and in BACKWARD the score gradient
// *pool_dscore (P,K), 0 where the expert is elsewhere. y (R,C), dscore (R,K; 0 in FORWARD): where
// the sums land, the same pointers as combine_start gets; they are themselves the target where
// tokens do not move. pool_dscore may be 0 in FORWARD.
floatX *combine_target(Dispatcher *e, Pass pass, floatX *y, real *dscore, real **pool_dscore);
void combine_start(Dispatcher *e, Pass pass, floatX *y, real *dscore);
void combine_wait(Dispatcher *e, Pass pass); // y and dscore are complete (overwritten); allreduce
                                             // in BACKWARD: this rank's part of a sum over ep (I1)

// What the host knows since dispatch_route: for stores of actual size, logs, traces and the check
// of the planner. ep = 1: bounds, nothing was read.
typedef struct {
    int pool, rows; // of this rank: tokens of the pool, expert rows including padding (= plan->P,
                    // plan->M)
    int pool_max, rows_max; // the largest of any rank of the ep group: the same number on all of
                            // them, so a decision made from it is agreed (I2)
    int64_t sent_rows, received_rows; // rows of C floatX that this rank sends to, and gets from,
                                      // OTHER ranks in one dispatch; a combine sends back what a
                                      // dispatch brought. With K numbers each: scores in the
                                      // FORWARD dispatch, their gradients in the BACKWARD combine
} DispatchLoad;
const DispatchLoad *dispatch_load(const Dispatcher *e);
MOE_END_C
#endif
