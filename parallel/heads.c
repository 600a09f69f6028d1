// Two linear maps over an ep group and their adjoints, all plain collectives (comm.h). For the
// stacked tokens x = (x_0 .. x_{n-1}) of the n ranks:
//   gather   all_i = x on every rank i
//            adjoint: dx_j = sum over i of d_all_i[j], a reduce-scatter
//   reduce   out_j = sum over i of partial_i[j]
//            adjoint: d_partial_i = (d_out_0 .. d_out_{n-1}), an all-gather
// Replicated tokens: gather is the identity, and so is its adjoint: dx stays one term of the sum
// over ranks (I1, one gradient rule). reduce is an all-reduce: out_j = sum over i of partial_i for
// every replica j, so d_partial_i = sum over j of d_out_j, an all-reduce again.
//
// Backward needs `all`, d_partial and the gradient of `all`. The last is first written when
// attention's backward is done, and d_partial was last read before it: they share a buffer.
#include "heads.h"
#include "../kernels/fail.h"
#include <stdlib.h>

struct Heads {
    Comm *group;
    int replicated;
    size_t count;       // R * C elements of one rank's tokens
    floatX *all, *sums; // (heads_rows, C) each; all is 0 where tokens are replicated
};

static int splits(const Grid *g) {
    return g->split_heads && (g->ep_group ? !comm_is_local(g->ep_group) : g->ep > 1);
}

int heads_rows(const Grid *g, int R) {
    return splits(g) && g->dispatch != DISPATCH_ALLREDUCE ? g->ep * R : R;
}

Heads *heads_create(const Grid *g, const Config *c, int R, Arena *arena) {
    if (!splits(g)) return 0;
    Heads *h = (Heads *)xcalloc(1, sizeof(Heads), "the head split");
    const size_t count = (size_t)heads_rows(g, R) * c->C;
    h->group = g->ep_group;
    h->replicated = g->dispatch == DISPATCH_ALLREDUCE;
    h->count = (size_t)R * c->C;
    if (!h->replicated) h->all = ARENA_TAKE(arena, floatX, count, "attention by heads");
    h->sums = ARENA_TAKE(arena, floatX, count, "attention by heads");
    comm_reserve(h->group, count * sizeof(floatX), arena);
    return h;
}

void heads_free(Heads *h) { free(h); }

// The collectives on all tokens of the group; a call is waited for at once.
static void gather(Heads *h, floatX *all, const floatX *x) {
    comm_wait(all_gather_start(h->group, all, x, h->count, DTYPE_FLOATX, STREAM_EXCHANGE));
}

static void scatter(Heads *h, floatX *out, const floatX *sums) {
    comm_wait(
        reduce_scatter_start(h->group, out, sums, h->count, DTYPE_FLOATX, 0, STREAM_EXCHANGE));
}

static void reduce(Heads *h, floatX *out) {
    comm_wait(all_reduce_start(h->group, out, h->count, DTYPE_FLOATX, STREAM_EXCHANGE));
}

const floatX *heads_gather(Heads *h, const floatX *x) {
    if (!h || h->replicated) return x;
    gather(h, h->all, x);
    return h->all;
}

floatX *heads_target(Heads *h, floatX *out) { return h && !h->replicated ? h->sums : out; }

void heads_reduce(Heads *h, floatX *out) {
    if (!h) return;
    if (h->replicated)
        reduce(h, out);
    else
        scatter(h, out, h->sums);
}

const floatX *heads_reduce_adjoint(Heads *h, const floatX *d_out) {
    if (!h) return d_out;
    if (!h->replicated) {
        gather(h, h->sums, d_out);
        return h->sums;
    }
    device_copy(h->sums, d_out, h->count * sizeof(floatX)); // d_out goes on, on the residual path
    reduce(h, h->sums);
    return h->sums;
}

floatX *heads_gather_target(Heads *h, floatX *dx) { return heads_target(h, dx); }

void heads_gather_adjoint(Heads *h, floatX *dx) {
    if (h && !h->replicated) scatter(h, dx, h->sums);
}
