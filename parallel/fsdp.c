// Blocks in motion: see fsdp.h. Dense blocks live on the group fsdp x ep, local ones (experts,
// split heads) on the group fsdp; shards are summed over dp.
//
// Each kind of block has its own slots, because one block of each kind is in use at a time: dense,
// local (two slots each: one in use, one in flight) and the ends. An untied model needs the
// embedding and the head at different times, so they share one slot; a tied one uses the embedding
// at both ends, so each has its own.
//
// Rules of the slots
//   S1  A block is in at most one weight slot and one full-gradient slot, both of its own kind.
//   S2  A weight slot is free, or gathering (its all-gather not waited for), or present. Only
//       fsdp_release frees it, and it forgets the content: the update changes the shard, so a
//       gathered copy never outlives its use.
//   S3  A full-gradient slot is free, or written (between fsdp_grad and fsdp_reduce), or
//       scattering; a scattering slot is freed by waiting for its reduce-scatter.
//   S4  A kind has at most one reduce-scatter and one all-reduce in flight; a new one first waits
//       for the old. So the order of waits follows from the order of calls (I2, collectives do not
//       depend on data).
//   S5  A shard gradient is all-reduced over dp once, after the reduce-scatter of its last round,
//       and handed out only after that.
//   S6  In a group of one there are no slots: fsdp_get and fsdp_grad return the shard's buffers.
#include "fsdp.h"
#include "../kernels/fail.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// KIND_HEAD: the last block of a tied model
enum { KIND_DENSE, KIND_LOCAL, KIND_ENDS, KIND_HEAD, SLOT_KINDS };
enum { MAX_SLOTS = 2, NONE = -1 };

typedef struct {
    floatX *data;         // (largest block of the kind)
    int block, gathering; // NONE: free
    Request gather;
} WeightSlot;
typedef struct {
    gradX *data; // (largest block of the kind)
    int block, scattering;
} GradSlot;
typedef struct { // a shard-gradient buffer of --update layer
    gradX *data; // (largest shard of the kind)
    int block;
} ShardSlot;
typedef struct {
    int n_slots, n_shards;
    int64_t size, shard; // largest block and shard of the kind
    WeightSlot weight[MAX_SLOTS];
    GradSlot grad[MAX_SLOTS];
    ShardSlot own[MAX_SLOTS];
    int scattering, reducing; // the block whose reduce-scatter, all-reduce is in flight (S4)
    Request scatter_request, reduce_request;
} SlotKind;

// The life of a block's gradient within an update. SUMMED: over its group, in an earlier round than
// the last.
typedef enum { IDLE, WRITTEN, SCATTERING, SUMMED, REDUCING, WHOLE } GradState;

static const char *state_name(GradState state) {
    switch (state) {
    case IDLE: return "idle";
    case WRITTEN: return "being written";
    case SCATTERING: return "being reduced";
    case SUMMED: return "reduced, more rounds to come";
    case REDUCING: return "being reduced over dp";
    case WHOLE: break;
    }
    return "whole";
}

typedef struct {
    int kind, moves; // moves: its group gathers and scatters
    Comm *group;
    floatX *weight; // (shard)
    gradX *grad;    // (shard) its own (keep_grads) or one of the kind's while in use, else 0
    int keeps;      // has its own gradient shard
    GradState state;
    int rounds; // reductions of this update so far
} BlockState;

struct Fsdp {
    const Model *m;
    Comm *dp_group;
    int dp_moves, rounds;
    SlotKind kind[SLOT_KINDS];
    BlockState *block; // (m->n_blocks)
};

// How messages call a block.
typedef struct {
    char text[48];
} BlockName;
static BlockName block_name(const Fsdp *f, int block) {
    const Model *m = f->m;
    BlockName name;
    if (block == m->embed_block)
        snprintf(name.text, sizeof name.text, "embedding block");
    else if (block == m->head_block)
        snprintf(name.text, sizeof name.text, "head block");
    else
        snprintf(name.text, sizeof name.text, "%s block of layer %d",
                 m->block[block].local ? "local" : "dense", m->block[block].layer);
    return name;
}

static BlockState *state_of(Fsdp *f, int block, const char *call) {
    if (block < 0 || block >= f->m->n_blocks)
        die("%s of block %d, but the model has %d|a bug of the caller", call, block,
            f->m->n_blocks);
    return &f->block[block];
}

// ---- creation -------------------------------------------------------------------------------
static int group_moves(const Comm *g, int n) {
    return g ? !comm_is_local(g) : n > 1;
} // no group: a plan for a grid that does not run

static int kind_of(const Model *m, int b) {
    if (b == m->head_block) return m->c.tied ? KIND_HEAD : KIND_ENDS;
    if (b == m->embed_block) return KIND_ENDS;
    return m->block[b].local ? KIND_LOCAL : KIND_DENSE;
}

Fsdp *fsdp_create(const Model *m, const Grid *g, int keep_grads, Arena *arena) {
    Fsdp *f = (Fsdp *)xcalloc(1, sizeof *f, "blocks");
    f->m = m;
    f->rounds = 1;
    f->dp_group = g->dp_group;
    f->dp_moves = group_moves(g->dp_group, g->dp);
    f->block = (BlockState *)xcalloc(m->n_blocks, sizeof *f->block, "blocks");
    int dense_moves = group_moves(g->dense_group, g->fsdp * g->ep);
    int local_moves = group_moves(g->fsdp_group, g->fsdp);
    int blocks[SLOT_KINDS] = { 0 };
    int64_t largest[2] = { 0, 0 }; // [local]
    int64_t largest_shard = 0;
    for (int b = 0; b < m->n_blocks; b++) {
        BlockState *s = &f->block[b];
        const Block *block = &m->block[b];
        s->kind = kind_of(m, b);
        s->group = block->local ? g->fsdp_group : g->dense_group;
        s->moves = block->local ? local_moves : dense_moves;
        s->keeps = keep_grads || (m->c.tied && b == m->embed_block);
        SlotKind *k = &f->kind[s->kind];
        if (block->size > k->size) k->size = block->size;
        if (block->shard > k->shard) k->shard = block->shard;
        if (block->size > largest[block->local]) largest[block->local] = block->size;
        if (block->shard > largest_shard) largest_shard = block->shard;
        blocks[s->kind]++;
        s->weight =
            ARENA_TAKE(arena, floatX, block->shard, s->moves ? "weights (shards)" : "weights");
        if (s->keeps)
            s->grad = ARENA_TAKE(arena, gradX, block->shard,
                                 s->moves ? "gradients (shards)" : "gradients");
    }
    // Where sums take time, the next gradient is written while one is summed.
    int takes_time = dense_moves || local_moves || f->dp_moves;
    for (int i = 0; i < SLOT_KINDS; i++) {
        SlotKind *k = &f->kind[i];
        int moves = i == KIND_LOCAL ? local_moves : dense_moves;
        int two = i == KIND_DENSE || i == KIND_LOCAL;
        int slots = two ? 2 : 1;
        int shards = takes_time ? 2 : 1;
        k->n_slots = blocks[i] < slots ? blocks[i] : slots;
        if (!moves) k->n_slots = 0;
        // The embedding of a tied model keeps its gradient: then no block is left in KIND_ENDS that
        // would need a buffer of the kind.
        int keep_all = keep_grads || (m->c.tied && i == KIND_ENDS);
        k->n_shards = blocks[i] < shards ? blocks[i] : shards;
        if (keep_all) k->n_shards = 0;
        for (int s = 0; s < k->n_slots; s++) {
            k->weight[s].data = ARENA_TAKE(arena, floatX, k->size, "weights (gathered, slots)");
            k->grad[s].data = ARENA_TAKE(arena, gradX, k->size, "gradients (full, slots)");
            k->weight[s].block = k->grad[s].block = NONE;
        }
        for (int s = 0; s < k->n_shards; s++) {
            k->own[s].data =
                ARENA_TAKE(arena, gradX, k->shard, moves ? "gradients (shards)" : "gradients");
            k->own[s].block = NONE;
        }
        k->scattering = k->reducing = NONE;
    }
    if (dense_moves) comm_reserve(g->dense_group, largest[0] * sizeof(gradX), arena);
    if (local_moves && largest[1]) comm_reserve(g->fsdp_group, largest[1] * sizeof(gradX), arena);
    if (f->dp_moves) comm_reserve(g->dp_group, largest_shard * sizeof(gradX), arena);
    return f;
}

void fsdp_free(Fsdp *f) {
    if (!f) return;
    free(f->block);
    free(f);
}

void fsdp_rounds(Fsdp *f, int rounds) { f->rounds = rounds; }

floatX *fsdp_shard(Fsdp *f, int block) { return state_of(f, block, "fsdp_shard")->weight; }
int fsdp_accumulates_in_place(const Fsdp *f, int block) { return !f->block[block].moves; }

int fsdp_reduces(const Fsdp *f) {
    int moves = f->dp_moves;
    for (int b = 0; b < f->m->n_blocks; b++) moves |= f->block[b].moves;
    return moves;
}

// ---- weights --------------------------------------------------------------------------------
static WeightSlot *weight_slot(Fsdp *f, int block) { // the slot that holds the block, or 0
    SlotKind *k = &f->kind[f->block[block].kind];
    for (int s = 0; s < k->n_slots; s++)
        if (k->weight[s].block == block) return &k->weight[s];
    return 0;
}

void fsdp_gather(Fsdp *f, int block) {
    if (block < 0) return;
    BlockState *b = state_of(f, block, "fsdp_gather");
    if (!b->moves || weight_slot(f, block)) return;
    SlotKind *k = &f->kind[b->kind];
    WeightSlot *slot = 0;
    for (int s = 0; s < k->n_slots && !slot; s++)
        if (k->weight[s].block == NONE) slot = &k->weight[s];
    if (!slot)
        die("weights of %s wanted while all slots of its kind are in use (%s%s)|a bug of the "
            "caller: fsdp_release comes first",
            block_name(f, block).text, block_name(f, k->weight[0].block).text,
            k->n_slots > 1 ? " and another" : "");
    slot->block = block;
    slot->gathering = 1;
    // The call follows what COMPUTE was given so far: the shard's update, the slot's last reader.
    slot->gather = all_gather_start(b->group, slot->data, b->weight, f->m->block[block].shard,
                                    DTYPE_FLOATX, STREAM_GATHER);
}

static void weight_wait(WeightSlot *slot) {
    if (slot->gathering) comm_wait(slot->gather);
    slot->gathering = 0;
}

const floatX *fsdp_get(Fsdp *f, int block) {
    BlockState *b = state_of(f, block, "fsdp_get");
    if (!b->moves) return b->weight;
    fsdp_gather(f, block);
    WeightSlot *slot = weight_slot(f, block);
    weight_wait(slot);
    return slot->data;
}

void fsdp_release(Fsdp *f, int block) {
    BlockState *b = state_of(f, block, "fsdp_release");
    if (!b->moves) return;
    WeightSlot *slot = weight_slot(f, block);
    if (!slot)
        die("fsdp_release of %s, which is not gathered|a bug of the caller: one fsdp_get, one "
            "fsdp_release",
            block_name(f, block).text);
    weight_wait(slot); // gathered and never used
    slot->block = NONE;
}

// ---- gradients ------------------------------------------------------------------------------
static void reduce_wait(Fsdp *f, SlotKind *k) { // the all-reduce over dp in flight
    if (k->reducing == NONE) return;
    comm_wait(k->reduce_request);
    f->block[k->reducing].state = WHOLE;
    k->reducing = NONE;
}

// The sum over the block's group is there: on to dp, or whole, or the next round.
static void group_summed(Fsdp *f, int block) {
    BlockState *b = &f->block[block];
    SlotKind *k = &f->kind[b->kind];
    if (b->rounds < f->rounds) {
        b->state = SUMMED;
        return;
    }
    if (!f->dp_moves) {
        b->state = WHOLE;
        return;
    }
    reduce_wait(f, k);
    k->reduce_request =
        all_reduce_start(f->dp_group, b->grad, f->m->block[block].shard, DTYPE_REAL, STREAM_GATHER);
    k->reducing = block;
    b->state = REDUCING;
}

static void scatter_wait(
    Fsdp *f, SlotKind *k) { // the reduce-scatter in flight; frees its full-gradient slot (S3)
    if (k->scattering == NONE) return;
    int block = k->scattering;
    comm_wait(k->scatter_request);
    k->scattering = NONE;
    for (int s = 0; s < k->n_slots; s++)
        if (k->grad[s].block == block && k->grad[s].scattering) {
            k->grad[s].block = NONE;
            k->grad[s].scattering = 0;
        }
    group_summed(f, block);
}

static void take_shard_gradient(Fsdp *f, int block) { // --update layer: one of the kind's buffers
    BlockState *b = &f->block[block];
    SlotKind *k = &f->kind[b->kind];
    if (b->keeps || b->rounds > 0) return;
    for (int s = 0; s < k->n_shards; s++)
        if (k->own[s].block == NONE || k->own[s].block == block) {
            k->own[s].block = block;
            b->grad = k->own[s].data;
            return;
        }
    die("gradient of %s wanted while those of %s%s are not used up|a bug of the caller: "
        "fsdp_grad_done comes first",
        block_name(f, block).text, block_name(f, k->own[0].block).text,
        k->n_shards > 1 ? " and another" : "");
}

gradX *fsdp_grad(Fsdp *f, int block) {
    BlockState *b = state_of(f, block, "fsdp_grad");
    SlotKind *k = &f->kind[b->kind];
    if (b->state == SCATTERING) scatter_wait(f, k); // an earlier round of this block
    if (b->state == REDUCING) reduce_wait(f, k);
    if (b->state == WHOLE && b->keeps) fsdp_grad_done(f, block); // a new update begins
    if (b->state == WHOLE)
        die("fsdp_grad of %s, whose last gradient was not used up|a bug of the caller: "
            "fsdp_grad_done comes first",
            block_name(f, block).text);
    if (!b->moves) {
        if (b->state == IDLE) take_shard_gradient(f, block);
        b->state = WRITTEN;
        return b->grad;
    }
    GradSlot *slot = 0;
    for (int s = 0; s < k->n_slots; s++)
        if (k->grad[s].block == block) return k->grad[s].data;
    for (int pass = 0; pass < 2 && !slot; pass++) {
        if (pass) scatter_wait(f, k); // no slot is free: the one in flight becomes free
        for (int s = 0; s < k->n_slots && !slot; s++)
            if (k->grad[s].block == NONE) slot = &k->grad[s];
    }
    if (!slot)
        die("gradient of %s wanted while %s is being written|a bug of the caller: fsdp_reduce "
            "comes first",
            block_name(f, block).text, block_name(f, k->grad[0].block).text);
    slot->block = block;
    slot->scattering = 0;
    b->state = WRITTEN;
    // A reduce-scatter on GATHER may have read this slot last; its comm_wait ordered that before
    // what COMPUTE writes now.
    return slot->data;
}

void fsdp_reduce(Fsdp *f, int block, int accumulate) {
    BlockState *b = state_of(f, block, "fsdp_reduce");
    SlotKind *k = &f->kind[b->kind];
    if (b->state != WRITTEN)
        die("fsdp_reduce of %s, whose gradient is %s|a bug of the caller: fsdp_grad comes first",
            block_name(f, block).text, state_name(b->state));
    if (b->rounds >= f->rounds)
        die("fsdp_reduce of %s: round %d of %d|a bug of the caller: fsdp_rounds",
            block_name(f, block).text, b->rounds + 1, f->rounds);
    if ((accumulate != 0) != (b->rounds > 0))
        die("fsdp_reduce of %s in round %d with accumulate %d|a bug of the caller: rounds after "
            "the first accumulate",
            block_name(f, block).text, b->rounds + 1, accumulate);
    if (!b->moves) {
        b->rounds++;
        group_summed(f, block);
        return;
    }
    scatter_wait(f, k); // S4
    take_shard_gradient(f, block);
    GradSlot *slot = 0;
    for (int s = 0; s < k->n_slots; s++)
        if (k->grad[s].block == block) slot = &k->grad[s];
    slot->scattering = 1;
    k->scatter_request =
        reduce_scatter_start(b->group, b->grad, slot->data, f->m->block[block].shard, DTYPE_REAL,
                             accumulate, STREAM_GATHER);
    k->scattering = block;
    b->state = SCATTERING;
    b->rounds++;
}

gradX *fsdp_grad_shard(Fsdp *f, int block) {
    BlockState *b = state_of(f, block, "fsdp_grad_shard");
    SlotKind *k = &f->kind[b->kind];
    if (b->state == SCATTERING) scatter_wait(f, k);
    if (b->state == REDUCING) reduce_wait(f, k);
    if (b->state != WHOLE)
        die("fsdp_grad_shard of %s, whose gradient is %s|a bug of the caller: fsdp_reduce comes "
            "first",
            block_name(f, block).text, state_name(b->state));
    return b->grad;
}

void fsdp_grad_done(Fsdp *f, int block) {
    BlockState *b = state_of(f, block, "fsdp_grad_done");
    SlotKind *k = &f->kind[b->kind];
    if (b->state != WHOLE)
        die("fsdp_grad_done of %s, whose gradient is %s|a bug of the caller: fsdp_grad_shard comes "
            "first",
            block_name(f, block).text, state_name(b->state));
    for (int s = 0; s < k->n_shards; s++)
        if (k->own[s].block == block) k->own[s].block = NONE;
    if (!b->keeps) b->grad = 0;
    b->state = IDLE;
    b->rounds = 0;
}
