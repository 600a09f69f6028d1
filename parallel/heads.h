// --attention heads: inside an ep group tokens are traded for heads. Before attention every rank
// gets all tokens of the group (all-gather) and computes its own heads; the partial outputs of the
// output projection are summed back to their sources (reduce-scatter). The two are each other's
// adjoint. With replicated tokens (--dispatch allreduce) the first is the identity and the second
// an all-reduce; backward is an all-reduce of the incoming gradient, and dx stays a partial sum
// (I1, one gradient rule).
//
//   forward    all = heads_gather(normed x);  q, k, v, attention of the own heads;
//              o-projection -> heads_target(out);  heads_reduce(out)
//   backward   all = heads_gather(normed x) again;  d_partial = heads_reduce_adjoint(d_out);
//              dWo, do, attention, dq dk dv;  dq Wq + dk Wk + dv Wv -> heads_gather_target(dx);
//              dWq dWk dWv from `all`;  heads_gather_adjoint(dx)
//
// h = 0 (heads are not split, or ep = 1) is allowed everywhere: every call returns its argument and
// nothing moves. One Heads serves all micro-batches: its calls start and wait at once.
#ifndef MOE_HEADS_H
#define MOE_HEADS_H
#include "grid.h"
MOE_BEGIN_C
typedef struct Heads Heads;
// Takes buffers for micro-batches of R tokens a rank from the arena. Returns 0 where heads are not
// split, and for ep = 1 without --force-comm.
Heads *heads_create(const Grid *g, const Config *c, int R, Arena *arena);
void heads_free(Heads *h);
// Returns the number of tokens that this rank's heads see: ep * R, or R where nothing moves.
int heads_rows(const Grid *g, int R);
// Returns `all` (heads_rows, C), the group's x (R,C) in rank order, valid until the next
// heads_gather; x itself with replicated tokens.
const floatX *heads_gather(Heads *h, const floatX *x);
// Returns where the o-projection writes its partial sums (heads_rows, C); out itself with
// replicated tokens.
floatX *heads_target(Heads *h, floatX *out);
// Writes out (R,C) = this rank's rows of the sum over the group of what is in heads_target(out).
void heads_reduce(Heads *h, floatX *out);
// Returns the adjoint of heads_reduce, (heads_rows, C) from d_out (R,C), valid until
// heads_gather_target's buffer is written, which is the same one.
const floatX *heads_reduce_adjoint(Heads *h, const floatX *d_out);
// Returns where the gradient of `all` is written (heads_rows, C); dx itself with replicated tokens.
// Every reader of heads_reduce_adjoint's result must have been issued.
floatX *heads_gather_target(Heads *h, floatX *dx);
// Writes the adjoint of heads_gather: dx (R,C) = this rank's rows of the sum over the group. With
// replicated tokens dx stays this rank's part of a sum.
void heads_gather_adjoint(Heads *h, floatX *dx);
MOE_END_C
#endif
