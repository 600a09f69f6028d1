// Weights and gradients of blocks: gather, get, release; grad, reduce. A rank owns one shard of
// every block: parameters, master, optimizer state and final gradient. In a group of one nothing
// moves: fsdp_get returns the shard, and the gradient is made in its final place.
//
//   forward of layer l:    fsdp_gather(l+1);  W = fsdp_get(l);  ... ;  fsdp_release(l)
//   backward of layer l:   fsdp_gather(l-1);  W = fsdp_get(l);  G = fsdp_grad(l);  ... ;
//                          fsdp_release(l);  fsdp_reduce(l)
//
// There are two slots of gathered weights for each kind of block (dense, local; one for embedding
// and head each while in use) and two of full gradients, so the reduction of layer l runs under the
// backward of layer l-1. A call against these rules is a bug of the caller and dies naming the
// block.
#ifndef MOE_FSDP_H
#define MOE_FSDP_H
#include "grid.h"
MOE_BEGIN_C
typedef struct Fsdp Fsdp;
// Takes shards, slots and final gradients from the arena (which may be counting: then all pointers
// are 0, but the sizes are the same). keep_grads 1: every block keeps its final gradient until the
// end of the update (--update end). 0: a pair of buffers is reused (--update layer; a tied
// embedding keeps its own). Weight shards start as zeros.
Fsdp *fsdp_create(const Model *m, const Grid *g, int keep_grads, Arena *arena);
void fsdp_free(Fsdp *f);
// Sets the number of rounds whose gradients add up before the shard gradient is whole (default 1).
// The all-reduce over dp waits for the last round's reduction.
void fsdp_rounds(Fsdp *f, int rounds);
// Returns this rank's parameters of the block (block.shard).
floatX *fsdp_shard(Fsdp *f, int block);

// Starts the all-gather of `block`. Does nothing for block -1 or a block that is already here.
void fsdp_gather(Fsdp *f, int block);
// Returns the whole block (block.size) once it is gathered; starts the gather if nobody did.
const floatX *fsdp_get(Fsdp *f, int block);
// Lets the block's slot be filled again once the work started so far has read it.
void fsdp_release(Fsdp *f, int block);

// Returns the buffer of the block's full gradient (block.size), which the caller writes or adds to
// until fsdp_reduce.
gradX *fsdp_grad(Fsdp *f, int block);
// Returns 1 where fsdp_grad is the final shard gradient itself (its group has one rank), so that
// rounds after the first must accumulate in the kernels. Returns 0 where it is a full buffer that
// each round overwrites, while the shard gradient adds up the rounds in fsdp_reduce.
int fsdp_accumulates_in_place(const Fsdp *f, int block);
// Returns 1 where reductions take time: with keep_grads 0 the caller steps layer l + 1 after the
// backward of layer l. Returns 0 where they are done when fsdp_reduce returns (one process): there
// is one buffer of a kind, and layer l is stepped before the gradient of l - 1 is asked for.
int fsdp_reduces(const Fsdp *f);
// Starts the sum of the block's gradient over the ranks (reduce-scatter, then all-reduce over dp).
// accumulate: adds to what the shard gradient holds, in exactly the rounds after the first.
void fsdp_reduce(Fsdp *f, int block, int accumulate);
// Returns the shard gradient (block.shard) once it is reduced: the plain sum over all ranks with a
// copy (I1, one gradient rule).
gradX *fsdp_grad_shard(Fsdp *f, int block);
// Says that the shard gradient has been used; with keep_grads 0 its buffer may be reused.
void fsdp_grad_done(Fsdp *f, int block);
MOE_END_C
#endif
