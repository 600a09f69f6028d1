// The MPI transport's own table of contents: groups, and calls that go through phases. comm_mpi.c
// has the interface of comm.h, comm_mpi_call.c moves calls on.
//
// Only nonblocking point-to-point messages are used; the collectives, their order of summation and
// their checks are ours, so that results do not depend on the MPI library. A started collective is
// a CALL. A phase posts all its receives, then all its sends; when all have completed, the next is
// posted:
//
//   all_gather       GATHER     every rank sends its piece to every other
//   reduce_scatter   REDUCE...  piece j goes to rank j, in rounds of what the staging area holds;
//   after each round the owner adds the parts in rank order all_reduce       REDUCE... GATHER   a
//   piece per rank, so that one rank makes each sum and all hold its bits all_to_all       EXCHANGE
//   uneven rows, empty messages too: a message of the wrong length is then always noticed
//
// With `check` a phase RECORDS comes first: the ranks of the group exchange what they believe the
// call to be, so the first call where they disagree is named at once. Any wait progresses every
// call in flight. Posting never blocks, and ranks issue calls and waits in one order (I2), so
// nothing can deadlock. Messages of one call between two ranks share a tag (the number of the call
// in its group) and MPI keeps their order; calls differ in tag, so one may overtake another.
#ifndef MOE_COMM_MPI_H
#define MOE_COMM_MPI_H
#include "comm_common.h"
#include <mpi.h>

struct Comm {
    char name[24];
    int n, rank, local; // local: one rank and not --force-comm
    int *world;         // (n) world rank of each member
    MPI_Comm mpi;
    int64_t calls;
    char *stage; // parts of a sum from the other ranks
    size_t stage_bytes;
    int stage_owner;    // the call in flight that uses it, -1 = none
    int stage_malloced; // nobody reserved it
    const void **part;  // (n) argument of sum_parts
    int64_t *numbers;   // (n) of comm_max and comm_sum
    CommTraffic traffic[COMM_KINDS];
};

typedef enum { RECORDS, EXCHANGE, REDUCE, GATHER, FINISHED } Phase;
typedef struct {
    int peer, receive, done;
    size_t bytes;
} Message;
typedef struct {
    char *p;
    size_t bytes;
} Room; // memory that grows and stays
typedef struct {
    int serial; // 0 = free
    Comm *g;
    CallRecord record;
    Phase phase;
    size_t width, count, round; // bytes of an element; elements of a piece; round of REDUCE
    int accumulate, root;
    char *dst,
        *own; // what the transport works on; own: this rank's contribution to a gather or sum
    const char *src;
    char *user_dst; // copied to by comm_wait where it is not dst
    size_t dst_bytes, src_bytes;
    uint64_t dst_sum, src_sum; // check: sums of the program's buffers while the call owns them
    const char *user_src;
    size_t *rows; // (2n) all_to_all: bytes to, then bytes from each rank
    Room copy_dst, copy_src, rows_room, records_room;
    int n_messages, pending, capacity;
    Message *message;     // (capacity)
    MPI_Request *request; // (capacity)
} Call;

extern int mpi_world_rank, mpi_oversubscribed;

// A board in the machine's shared memory says which of its ranks are inside a wait, so that a
// report can tell the rank that holds everybody up from those that are held up too.
void mpi_set_waiting(int waiting);
int mpi_is_waiting(int world_rank); // 1, 0, or -1: on another machine
// Dies with MPI's text unless error is MPI_SUCCESS.
void mpi_check(int error, const char *what);
// At least `bytes` of memory that stays with the room.
char *room(Room *r, size_t bytes);
// Piece j of a gather or sum: elements [begin, begin + *length) of the whole; returns begin.
// all_reduce cuts `count` of its last pieces short.
size_t call_piece(const Call *c, int j, size_t *length);
// A call of group g with no buffers yet, numbered; dies where MAX_CALLS are in flight.
Call *call_new(Comm *g, int kind, Dtype type, size_t count);
// Puts it in flight. A group has one staging area: a sum first finishes the group's last one, the
// same one on all ranks.
Request call_launch(Call *c);
// The call of a request; dies where it was waited for already.
Call *call_of(Request r);
// Progresses all calls until this one has no message on its way; the watchdog watches. Then
// call_free.
void call_finish(Call *c);
void call_free(Call *c);
void calls_free_memory(void);
#endif
