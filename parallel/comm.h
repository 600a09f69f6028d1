// Communication: groups of ranks, four collectives on device memory, five calls for agreement on
// host memory. comm.c is written once; one transport is linked below it: comm_mpi.c (CPUs, and
// several ranks on one GPU in tests), comm_nccl.cu (GPUs) or comm_none.c (one process).
//
// Rules
// - I2, collectives do not depend on data: every rank issues the same calls in the same order, per
// layer,
//   never per expert, empty messages included.
// - A started call follows everything that COMPUTE was given before it, and owns its buffers until
//   comm_wait: the source must not change and the destination must not be read. CommOptions.check
//   tests both.
// - I8, deterministic by default: sums are made in fp32 (fp64 for doubles) in the order of ranks 0,
// 1, ...,
//   n-1, so that the bits do not depend on the library or on what arrives first. All ranks of an
//   all-reduce hold the same bits.
// - A group of one costs nothing: calls return at once and calls in place touch nothing. With
//   --force-comm it sends to itself through the transport.
#ifndef MOE_COMM_H
#define MOE_COMM_H
#include "../kernels/device.h"
MOE_BEGIN_C

typedef struct Comm Comm; // a group
typedef struct {
    int id; // what comm_wait takes; negative: nothing to wait for
} Request;
typedef struct {
    double timeout; // seconds a call may wait before the run is ended with a report (--timeout)
    int force;      // --force-comm
    int check;      // debug: ranks compare every call before it moves, destinations are poison and
                    // both buffers are compared between start and wait
} CommOptions;

// Reads what the launcher said (MPI: MPI_Init; NCCL: comm_join.h; one process: nothing). Is called
// first in main; may rewrite argc and argv.
void comm_init(int *argc, char ***argv);
// Applies the options, meets the other ranks and starts the watchdog. Is called once the command
// line is read.
void comm_start(CommOptions options);
// Waits for all ranks and leaves; then the program may exit with status 0.
void comm_finish(void);
// Ends all ranks at once; die() calls it.
void comm_abort(int status);
int comm_world_rank(void);
int comm_world_size(void);
// Rank and size among the ranks of this machine, found by asking the machine and not derived from
// the world rank. Valid after comm_start.
int comm_local_rank(void);
int comm_local_size(void);
// Names the transport: "none", "mpi (Open MPI 4.1.4)", ...
const char *comm_describe(void);

// Makes the group of the `n` given world ranks (ascending, this one included). Ranks that belong to
// no group of this call pass n = 0 and get 0. Every rank of the world calls this, in the same
// order. `name` shows in reports.
Comm *comm_group(const char *name, const int *world_ranks, int n);
int comm_rank(const Comm *g);
int comm_size(const Comm *g);
// Returns 1 for a group of one in which nothing moves; 0 for more ranks, or with --force-comm.
int comm_is_local(const Comm *g);

// Names the place of the calls that follow, for reports and comparisons: "step 12, layer 3
// backward". step -1: the step named last; layer -1: none.
void comm_where(int64_t step, int layer, const char *phase);

// ---- collectives ----------------------------------------------------------------------------
// All buffers are device pointers; counts are elements of `type`. `stream` is whose order the call
// joins: STREAM_GATHER or STREAM_EXCHANGE.

// Starts recv (n * count) = the ranks' send (count) in rank order. send may be recv + rank * count.
Request all_gather_start(Comm *g, void *recv, const void *send, size_t count, Dtype type,
                         Stream stream);
// Starts recv (count) = sum over ranks of their send[rank * count ...]. recv may be send + rank *
// count. accumulate: recv += the sum instead (then not in place).
Request reduce_scatter_start(Comm *g, void *recv, const void *send, size_t count, Dtype type,
                             int accumulate, Stream stream);
// Starts buffer (count) = sum over ranks, identical bits everywhere. Types F32, F64, BF16 (summed
// in fp32, rounded once), I32, I64.
Request all_reduce_start(Comm *g, void *buffer, size_t count, Dtype type, Stream stream);
// Starts an exchange of rows of row_bytes: send_rows[j] rows to rank j from send, back to back in
// rank order; recv_rows[i] rows from rank i into recv, back to back. Host arrays (n).
Request all_to_all_start(Comm *g, void *recv, const int64_t *recv_rows, const void *send,
                         const int64_t *send_rows, size_t row_bytes, Stream stream);
// Orders the call before what COMPUTE is given from now on. Dies on a second wait.
void comm_wait(Request r);

// ---- agreement: blocking, small, on host memory ---------------------------------------------
// Copies host (bytes) from rank `root` to all.
void comm_broadcast(Comm *g, void *host, size_t bytes, int root);
// Fills recv (n * bytes) with the ranks' send (bytes) in rank order.
void comm_all_gather_host(Comm *g, void *recv, const void *send, size_t bytes);
// Returns when all ranks of the group have called it.
void comm_barrier(Comm *g);
// Returns the largest value of any rank.
int64_t comm_max(Comm *g, int64_t value);
// Returns the sum of the ranks' values, added in rank order.
double comm_sum(Comm *g, double value);
// Ends a step for `check`: compares the number of calls of all ranks and dies where they disagree.
void comm_step_end(void);

// ---- traffic and memory ---------------------------------------------------------------------
typedef struct {
    int64_t calls, bytes; // bytes that this rank sent to other ranks, payload only
    double seconds;       // spent in start and wait
} CommTraffic;
enum { COMM_ALL_GATHER, COMM_REDUCE_SCATTER, COMM_ALL_REDUCE, COMM_ALL_TO_ALL, COMM_KINDS };
// Returns what went through g in calls of `kind` since the last call with reset != 0.
CommTraffic comm_traffic(Comm *g, int kind, int reset);
// Names a kind: "all_gather", ...
const char *comm_kind_name(int kind);
// Takes from the arena the device memory that sums over g need (reduce_scatter, all_reduce), before
// the first such call. `bytes`: the largest buffer of such a call (n * count elements of a
// reduce_scatter); longer sums go through it in rounds. g is 0 where a plan counts for a grid that
// does not run.
void comm_reserve(Comm *g, size_t bytes, Arena *arena);
MOE_END_C
#endif
