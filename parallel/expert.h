// Tokens to experts and back: two linear maps and their adjoints (DESIGN 6). spread brings tokens
// to the ranks whose experts they chose (a pool), collect adds the ranks' partial outputs back at
// the source. Backward runs the adjoints: it spreads dy with collect's transpose and collects dx
// and dscore with spread's.
//
//   alltoall    uneven exchange, one copy of a token per destination rank; collect = its transpose,
//   summed at the source in rank order allgather   all-gather of the tokens, reduce-scatter of the
//   outputs; expert work still grows with routed rows only allreduce   tokens are replicated over
//   ep: spread = identity, collect = all-reduce.  Backward: all-reduce dy, dx stays a partial sum
//   (I1)
// With ep = 1 every call returns its argument and nothing is copied or waited for (--force-comm: a
// group of one sends to itself).
//
//   forward    expert_plan; spread_start(x, score), spread_wait -> pool; experts write
//   collect_target; collect_start, collect_wait -> y backward   expert_plan (the same topk: I7) and
//   the FORWARD spread again unless the caller kept the pool; spread(dy) -> dpool; experts write
//   collect_target; collect -> dx, dscore
// Of one Exchange the spreads of both passes may be in flight together; a collect starts after both
// were waited for. Everything is issued whatever the routing is (I2).
#ifndef MOE_EXPERT_H
#define MOE_EXPERT_H
#include "grid.h"
MOE_BEGIN_C
typedef enum { FORWARD, BACKWARD } Pass;
typedef struct Exchange
    Exchange; // one per micro-batch in flight; its pools stay valid until its next expert_plan

// R: tokens of a micro-batch of every rank (equal on all). Buffers for the worst routing come from
// the arena (may be counting): nothing can overflow, nothing is dropped.
Exchange *exchange_create(const Grid *g, const Config *c, int R, Arena *arena);
void exchange_free(Exchange *e);
// Bound of the pool, tokens of the worst routing: ep * R, or R where tokens do not move; dies where
// an int cannot hold it. Bound of the expert rows: plan_rows(bound, K, E/ep).
int exchange_pool_bound(const Grid *g, int R);
// Fills plan (whose arrays the exchange owns) from topk (R,K) ascending global expert ids (device).
// ep > 1: all-gathers topk, from which every rank knows every size; the one host read (I11).
// plan->P and plan->M are then the actual numbers of this routing, with ep = 1 they are the bounds.
void expert_plan(Plan *plan, Exchange *e, const int *topk);
// x (R,C); score (R,K), 0 in BACKWARD. Both stay untouched until spread_wait; where tokens do not
// move they ARE the pool and stay until its last use.
void spread_start(Exchange *e, Pass pass, const floatX *x, const real *score);
// The pool (P,C); *score (P,K): the token's scores, those of experts elsewhere are not to be read
// (token_row is -1). BACKWARD: *score = 0. score may be 0.
const floatX *spread_wait(Exchange *e, Pass pass, const real **score);
// Where the experts write their combined output (P,C), and in BACKWARD the score gradient
// *pool_dscore (P,K), 0 where the expert is elsewhere. y (R,C), dscore (R,K; 0 in FORWARD): where
// the sums land, the same pointers as collect_start gets; they are themselves the target where
// tokens do not move. pool_dscore may be 0 in FORWARD.
floatX *collect_target(Exchange *e, Pass pass, floatX *y, real *dscore, real **pool_dscore);
void collect_start(Exchange *e, Pass pass, floatX *y, real *dscore);
void collect_wait(Exchange *e, Pass pass); // y and dscore are complete (overwritten); allreduce in
                                           // BACKWARD: this rank's part of a sum over ep (I1)

// What the host knows since expert_plan: for stores of actual size, logs, traces and the check of
// the planner. ep = 1: bounds, nothing was read.
typedef struct {
    int pool, rows; // of this rank: tokens of the pool, expert rows including padding (= plan->P,
                    // plan->M)
    int pool_max, rows_max; // the largest of any rank of the ep group: the same number on all of
                            // them, so a decision made from it is agreed (I2)
    int64_t sent_rows, received_rows; // rows of C floatX that this rank sends to, and gets from,
                                      // OTHER ranks in one spread; a collect sends back what a
                                      // spread brought. With K numbers each: scores in the FORWARD
                                      // spread, their gradients in the BACKWARD collect
} ExchangeLoad;
const ExchangeLoad *exchange_load(const Exchange *e);
MOE_END_C
#endif
