// --attention heads: inside an ep group tokens are traded for heads. Before attention every rank
// gets all tokens of the group (all-gather), computes its own heads, and the partial outputs of the
// output projection are summed back to their sources (reduce-scatter): the two are each other's
// adjoint. With replicated tokens (allreduce) the first is the identity and the second an
// all-reduce, and backward: all-reduce of the incoming gradient, partial dx (I1).
//
//   forward    all = heads_gather(normed x);  q, k, v, attention of the own heads;  o-projection ->
//   heads_target(out);  heads_reduce(out) backward   all = heads_gather(normed x) again;  d_partial
//   = heads_reduce_adjoint(d_out): dWo, do, attention, dq dk dv;  dq Wq + dk Wk + dv Wv ->
//   heads_gather_target(dx);
//              dWq dWk dWv from `all`;  heads_gather_adjoint(dx)
// h = 0 (unsplit or ep = 1) is allowed everywhere: every call returns its argument and nothing
// moves. One Heads serves all micro-batches: its calls start and wait at once.
#ifndef MOE_HEADS_H
#define MOE_HEADS_H
#include "grid.h"
MOE_BEGIN_C
typedef struct Heads Heads;
Heads *heads_create(const Grid *g, const Config *c, int R,
                    Arena *arena); // 0 unless split_heads and ep > 1 (or --force-comm)
void heads_free(Heads *h);
int heads_rows(const Grid *g,
               int R); // tokens this rank's heads see: ep * R; R with allreduce or unsplit
// all (heads_rows, C) = the group's x (R,C) in rank order; valid until the next heads_gather. x
// itself with allreduce and unsplit.
const floatX *heads_gather(Heads *h, const floatX *x);
// Where the o-projection writes its partial sums (heads_rows, C): out itself with allreduce and
// unsplit.
floatX *heads_target(Heads *h, floatX *out);
// out (R,C) = this rank's rows of the sum over the group of what was written to heads_target(out).
void heads_reduce(Heads *h, floatX *out);
// Adjoint of heads_reduce: d_out (R,C) -> (heads_rows, C), valid until heads_gather_target's buffer
// is written (it is the same one). d_out itself unsplit.
const floatX *heads_reduce_adjoint(Heads *h, const floatX *d_out);
// Where the gradient of `all` is written (heads_rows, C): dx itself with allreduce and unsplit.
// Every reader of d_partial must have been issued.
floatX *heads_gather_target(Heads *h, floatX *dx);
// Adjoint of heads_gather: dx (R,C) = this rank's rows of the sum over the group (allreduce: dx
// stays this rank's part of a sum).
void heads_gather_adjoint(Heads *h, floatX *dx);
MOE_END_C
#endif
