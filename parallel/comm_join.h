// Joining a run before there is a transport: who takes part, where each rank runs, a few bytes from
// rank 0 to all, and how the run ends. comm_nccl.cu starts from here.
//
//   mpi     started by mpirun, or by a Slurm that speaks PMI, in a program built with MPI
//   tcp     WORLD_SIZE, RANK, MASTER_ADDR, MASTER_PORT as torchrun sets them; or a Slurm step's
//           SLURM_STEP_NUM_TASKS (SLURM_NTASKS), SLURM_PROCID and the first host of
//           SLURM_STEP_NODELIST (SLURM_NODELIST). Rank 0 listens at MASTER_ADDR, port MASTER_PORT
//           (Slurm: 10000 + job id mod 20000, below the ports that Linux gives to clients), and the
//           others connect. The connections stay, so that a rank that is gone is noticed by rank 0
//           and, once rank 0 has ended, by all.
//   single  nothing of that is set: one process
//
// An MPI launcher's variables decide for mpi (MPI_Init under a launcher that it does not know can
// end the process); else the first pair found. With tcp the ranks of a run know each other by a
// token made of MOE_RUN_ID, TORCHELASTIC_RUN_ID, SLURM_JOB_ID and SLURM_STEP_ID, as far as they are
// set: whoever else connects is dropped, and neither ends nor delays the run. MOE_JOIN=tcp chooses
// tcp under an MPI launcher too.
#ifndef MOE_COMM_JOIN_H
#define MOE_COMM_JOIN_H
#include "../kernels/types.h"
MOE_BEGIN_C

typedef struct {
    int rank, size;
    int local_rank, local_size; // among the ranks of this machine, in the order of world ranks
    const uint64_t
        *machine; // (size) where each rank runs: equal numbers, one machine. After join_connect
} Joined;

// Reads the launcher's variables, or calls MPI_Init. No connection yet, so that --help needs no
// other rank.
void join_init(int *argc, char ***argv);
// Meets the other ranks, for at most `timeout` seconds; all ranks. Dies with what is missing.
void join_connect(double timeout);
const Joined *joined(void);
// n bytes from rank 0 to all; all ranks, set-up only.
void join_broadcast(void *bytes, size_t n);
// The watchdog asks: the world rank whose process is gone, -1 = none is known to be. MPI ends the
// run by itself, then always -1.
int join_lost(void);
// 1: other threads may call join_abort through MPI.
int join_threads(void);
// The channel by which the watchdogs talk, from any thread of a rank, one at a time: sends a
// message of `bytes` (the same number always) to rank 0, and drops it where it would have to wait.
// Does nothing where MPI's threads may not.
void join_publish(const void *message, size_t bytes);
// On rank 0: overwrites all[r] (each `bytes`) by the latest message of every rank r that has sent
// one since.
void join_collect(void *all, size_t bytes);
// On rank 0: tells the others that the run ends and that rank 0 has said why.
void join_tell_end(void);
// Returns 1 where rank 0 has told so.
int join_told_end(void);
// All ranks: waits for all, then leaves.
void join_leave(void);
// Ends this process at once, and with MPI all others; without it they notice the closed connection.
void join_abort(int status);
const char *join_describe(
    void); // "mpi (Open MPI 4.1.4)", "tcp, rank 0 at node1:29500", "one process"
// The first name of a Slurm node list: "gpu[03-07,9],login" -> "gpu03"; into name.
void join_first_host(const char *list, char *name, size_t size);
MOE_END_C
#endif
