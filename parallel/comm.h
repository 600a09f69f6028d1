// Communication: groups of ranks, four collectives on device memory, five calls for agreement on
// host memory. One implementation is linked: comm_none.c (one process), comm_mpi.c (CPU, and
// several ranks on one GPU in tests, staged through the host), comm_nccl.cu (GPUs).
//
// Rules
//   I2   Every rank issues the same calls in the same order, whatever its data: per layer, never
//   per expert, empty messages included. start/wait   A started call follows everything that
//   COMPUTE was given before it, and owns its buffers until comm_wait: the source must not
//        change, the destination must not be read (debug builds poison it).
//   Sums are made in fp32 (fp64 for doubles) in the order of ranks 0, 1, ..., n-1, so that the bits
//   do not depend on library or arrival; all ranks of an all-reduce
//        hold the same bits.
//   A group of one costs nothing: calls return at once, in-place calls touch nothing; with
//   --force-comm it sends to itself through the transport.
#ifndef MOE_COMM_H
#define MOE_COMM_H
#include "../kernels/device.h"
MOE_BEGIN_C

typedef struct Comm Comm; // a group
typedef struct {
    int id;
} Request; // what comm_wait takes; id < 0: nothing to wait for
typedef struct {
    double timeout; // seconds a call may wait before the run is ended with a report (--timeout)
    int force;      // --force-comm
    int check; // debug: poison destinations until wait; hash of (step, layer, call, group, bytes)
               // compared across ranks each step; sends against receives
} CommOptions;

// Reads what the launcher said (MPI: MPI_Init; NCCL: comm_join.h; one process: nothing). Called
// first in main; argc, argv may be rewritten.
void comm_init(int *argc, char ***argv);
// Applies options and starts the watchdog thread. After the command line is read.
void comm_start(CommOptions options);
void comm_finish(void);      // all ranks; then the program may exit 0
void comm_abort(int status); // ends all ranks at once; what die() calls
int comm_world_rank(void);
int comm_world_size(void);
int comm_local_rank(void); // among the ranks of this machine (found by asking the machine, not
                           // derived from the world rank); NCCL: valid after comm_start
int comm_local_size(void);
const char *comm_describe(void); // "none", "mpi (Open MPI 4.1.4)", ...

// The group of the given world ranks (ascending, mine included) or 0 where `n` is 0; every rank of
// the world calls this in the same order. `name` shows in reports.
Comm *comm_group(const char *name, const int *world_ranks, int n);
int comm_rank(const Comm *g);
int comm_size(const Comm *g);
// 1: a group of one in which nothing moves; 0: more ranks, or --force-comm.
int comm_is_local(const Comm *g);

// What the watchdog and the hash say about the calls that follow: "step 12, layer 3 backward". step
// -1: the step named last; layer -1: none.
void comm_where(int64_t step, int layer, const char *phase);

// ---- collectives. All buffers are device pointers; counts are elements of `type`. stream: whose
// order the call joins (STREAM_GATHER or STREAM_EXCHANGE) ---- recv (n * count) = the ranks' send
// (count) in rank order; send may be recv + rank * count (in place).
Request all_gather_start(Comm *g, void *recv, const void *send, size_t count, Dtype type,
                         Stream stream);
// recv (count) = sum over ranks of their send[rank * count ...]; recv may be send + rank * count
// (in place). accumulate: recv += instead (then not in place).
Request reduce_scatter_start(Comm *g, void *recv, const void *send, size_t count, Dtype type,
                             int accumulate, Stream stream);
// buffer (count) = sum over ranks, identical bits everywhere. Types F32, F64, BF16 (summed in fp32,
// rounded once), I32, I64.
Request all_reduce_start(Comm *g, void *buffer, size_t count, Dtype type, Stream stream);
// Rows of row_bytes: send_rows[j] rows to rank j from send, back to back in rank order;
// recv_rows[i] rows from rank i into recv, back to back. Host arrays (n).
Request all_to_all_start(Comm *g, void *recv, const int64_t *recv_rows, const void *send,
                         const int64_t *send_rows, size_t row_bytes, Stream stream);
void comm_wait(Request r); // COMPUTE work started later sees the result
// Blocking, host memory, for set-up and agreement (small).
void comm_broadcast(Comm *g, void *host, size_t bytes, int root);
void comm_all_gather_host(Comm *g, void *recv, const void *send, size_t bytes); // recv (n * bytes)
void comm_barrier(Comm *g);
int64_t comm_max(Comm *g, int64_t value); // agreement: the largest value of any rank
double comm_sum(Comm *g, double value);   // in rank order
// Bytes this rank sent to other ranks through g since the last call with reset != 0 (payload only),
// and seconds spent in start and wait.
typedef struct {
    int64_t calls, bytes;
    double seconds;
} CommTraffic;
enum { COMM_ALL_GATHER, COMM_REDUCE_SCATTER, COMM_ALL_REDUCE, COMM_ALL_TO_ALL, COMM_KINDS };
CommTraffic comm_traffic(Comm *g, int kind, int reset);
const char *comm_kind_name(int kind); // "all_gather", ...
// Ends the step for the hash check (all ranks): compares, names the first call where ranks
// disagree, dies there.
void comm_step_end(void);
// Device memory that sums over g will need (reduce_scatter, all_reduce), taken from the arena
// before the first call; `bytes`: the largest buffer of such a call (n * count elements of a
// reduce_scatter). Longer sums go through it in rounds. g may be 0 where a plan counts for a grid
// that does not run.
void comm_reserve(Comm *g, size_t bytes, Arena *arena);
MOE_END_C
#endif
