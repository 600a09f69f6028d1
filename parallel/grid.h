// The process grid: world = dp x fsdp x ep, ep innermost (neighbours on NVLink), dp outermost:
// rank = (dp_rank * fsdp + fsdp_rank) * ep + ep_rank.
#ifndef MOE_GRID_H
#define MOE_GRID_H
#include "comm.h"
#include "../model/model.h"
#include <stdio.h>
MOE_BEGIN_C
typedef enum { DISPATCH_ALLTOALL, DISPATCH_ALLGATHER, DISPATCH_ALLREDUCE } Dispatch;
typedef struct {
    int world, rank;
    int dp, fsdp, ep;
    int dp_rank, fsdp_rank, ep_rank;
    Dispatch dispatch;
    int split_heads;   // --attention heads
    Comm *all;         // every rank
    Comm *ep_group;    // same dp, fsdp: tokens travel here
    Comm *fsdp_group;  // same dp, ep: local (expert) blocks are gathered and reduce-scattered here
    Comm *dense_group; // same dp: fsdp x ep, dense blocks; rank in it = fsdp_rank * ep + ep_rank
    Comm *dp_group;    // same fsdp, ep: shards are all-reduced here
    int data_ranks; // ranks that read distinct data: world, or world / ep with DISPATCH_ALLREDUCE
    int data_rank;  // this rank's place among them
} Grid;
// Checks the layout against the model before any allocation and builds the groups. fsdp 0: the
// ranks that dp and ep leave. Dies on an impossible layout and says which ones fit: a product that
// is not the world, experts that ep does not divide, KV heads that it does not divide with
// split_heads.
Grid grid_build(const Config *c, int dp, int fsdp, int ep, Dispatch dispatch, int split_heads);
// Returns the grid of rank 0 in a world that does not run, for plans: sizes without groups (0).
// Checks as grid_build does.
Grid grid_plan(const Config *c, int world, int dp, int fsdp, int ep, Dispatch dispatch,
               int split_heads);
// Says which part of every block this rank holds.
ShardSpec grid_shard_spec(const Grid *g);
// Returns the table of who belongs to which group, at most 32 rows, for the startup report
// (malloc'd).
char *grid_table(const Grid *g);
// Returns a table by group and kind of call of what this rank has sent since the last reset, and
// how long it was in communication calls (malloc'd; empty where nothing moves).
char *grid_traffic(const Grid *g, int reset);
// Returns the threads for this rank: the option, or the machine's cores / the ranks on it, at least
// 1.
int grid_threads(int option);
// Runs every collective once over every group on a few known numbers (GPUs only), all ranks, before
// training. Ends the run where one brings other numbers, or takes longer than 30 s or --timeout:
// the line names call, group, rank and worst element. Leaves every group its least memory for sums.
void comm_check(const Grid *g);
// Checks and times every collective over every group of the grid (--selftest); all ranks call it.
// Rank 0 writes the table of its own groups to out; a time is that of the group's slowest rank.
// Returns the number of wrong results over all ranks.
int comm_selftest(const Grid *g, FILE *out);
MOE_END_C
#endif
