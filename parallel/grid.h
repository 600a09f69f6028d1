// The process grid: world = dp x fsdp x ep, ep innermost (neighbours on NVLink), dp outermost. rank
// = (dp * FSDP + fsdp) * EP + ep.
#ifndef MOE_GRID_H
#define MOE_GRID_H
#include "comm.h"
#include "../model/model.h"
MOE_BEGIN_C
typedef enum { DISPATCH_ALLTOALL, DISPATCH_ALLGATHER, DISPATCH_ALLREDUCE } Dispatch;
typedef struct {
    int world, rank;
    int dp, fsdp, ep; // sizes; fsdp 0 on input = the ranks that dp and ep leave
    int dp_rank, fsdp_rank, ep_rank;
    Dispatch dispatch;
    int split_heads;   // --attention heads
    Comm *all;         // every rank
    Comm *ep_group;    // same dp, fsdp: tokens travel here
    Comm *fsdp_group;  // same dp, ep: local (expert) blocks are gathered and reduce-scattered here
    Comm *dense_group; // same dp: fsdp x ep, dense blocks, rank in it = fsdp_rank * ep + ep_rank
    Comm *dp_group;    // same fsdp, ep: shards are all-reduced here
    int data_ranks; // ranks that read distinct data: world, or world / ep with DISPATCH_ALLREDUCE
    int data_rank;  // this rank's place among them
} Grid;
// Checks the layout against the model before any allocation (dies on every impossible one: product,
// experts % ep, KV heads % ep with split heads, a size above the world), builds the groups, prints
// nothing.
Grid grid_build(const Config *c, int dp, int fsdp, int ep, Dispatch dispatch, int split_heads);
// The grid of rank 0 in a world that does not run: sizes without groups (0), for plans. Checks as
// above.
Grid grid_plan(const Config *c, int world, int dp, int fsdp, int ep, Dispatch dispatch,
               int split_heads);
ShardSpec grid_shard_spec(const Grid *g);
// The membership table, at most 32 rows, for the startup report (malloc'd text).
char *grid_table(const Grid *g);
// What this rank has sent, and how long it was in communication calls, since the last reset: a
// table by group and kind of call (malloc'd; empty where nothing moves).
char *grid_traffic(const Grid *g, int reset);
// Threads for this rank: the option, or cores of the machine / ranks on it, at least 1.
int grid_threads(int option);
MOE_END_C
#endif
