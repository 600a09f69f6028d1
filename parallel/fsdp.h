// Weights and gradients of blocks: gather, get, release; grad, reduce. A rank owns one shard of
// every block: parameters, master, optimizer state and final gradient. In a group of one nothing
// moves: get returns the shard, the gradient is made in its final place.
//
//   forward of layer l:    fsdp_gather(l+1);  W = fsdp_get(l);  ... ;  fsdp_release(l)
//   backward of layer l:   fsdp_gather(l-1);  W = fsdp_get(l);  G = fsdp_grad(l);  ... ;
//   fsdp_release(l);  fsdp_reduce(l)
// Two slots of gathered weights per kind of block (dense, local, and one for embedding and head
// each while in use) and two of full gradients: the reduction of layer l runs under the backward of
// layer l-1.
#ifndef MOE_FSDP_H
#define MOE_FSDP_H
#include "grid.h"
MOE_BEGIN_C
typedef struct Fsdp Fsdp;
// Slots, shards and final gradients come from the arena (which may be counting: then 0 pointers
// everywhere, but the same sizes). keep_grads: 1 = every block keeps its final gradient until the
// end of the update (--update end), 0 = one pair of buffers is reused (--update layer; a tied
// embedding keeps its own).  Weight shards are floatX; they start as zeros.
Fsdp *fsdp_create(const Model *m, const Grid *g, int keep_grads, Arena *arena);
void fsdp_free(Fsdp *f);
// Rounds whose gradients add up before the shard gradient is whole (default 1). The all-reduce over
// dp waits for the last round's reduction.
void fsdp_rounds(Fsdp *f, int rounds);
floatX *fsdp_shard(Fsdp *f, int block); // (block.shard) this rank's parameters
void fsdp_gather(Fsdp *f, int block);   // starts; block -1 or a block already here: nothing
const floatX *fsdp_get(Fsdp *f,
                       int block); // (block.size) waits; starts the gather itself if nobody did
void fsdp_release(Fsdp *f,
                  int block); // the slot may be refilled once the work started so far has read it
gradX *fsdp_grad(Fsdp *f, int block); // (block.size) full gradient buffer; the caller writes or
                                      // accumulates; stays until fsdp_reduce
// 1: fsdp_grad is the final shard gradient itself (its group has one rank), so rounds after the
// first must ACCUMULATE in the kernels; 0: it is a full buffer that each round overwrites (the
// first micro-batch of every round has accumulate 0) while the shard gradient adds up the rounds in
// fsdp_reduce.
int fsdp_accumulates_in_place(const Fsdp *f, int block);
// 1: reductions take time, and a caller of keep_grads 0 steps layer l + 1 behind the backward of
// layer l. 0 (one process): they are done when fsdp_reduce returns, there is one buffer of a kind,
// and layer l must be stepped before the gradient of l - 1 is asked for.
int fsdp_reduces(const Fsdp *f);
// The gradient of `block` is final on this rank: starts its sum over the ranks (reduce-scatter,
// then all-reduce over dp). accumulate: adds to what the shard gradient holds (exactly the rounds
// after the first).
void fsdp_reduce(Fsdp *f, int block, int accumulate);
gradX *fsdp_grad_shard(Fsdp *f, int block); // (block.shard) waits for the reduction: the plain SUM
                                            // over all ranks with a copy (I1)
void fsdp_grad_done(
    Fsdp *f,
    int block); // the shard gradient has been used; with keep_grads 0 its buffer may be reused.
MOE_END_C
#endif
