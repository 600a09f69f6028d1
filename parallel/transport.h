// What comm.c and the transport below it share. comm.c owns groups, numbers and records of calls,
// traffic, checks, agreement, groups of one and the watchdog; a transport only moves bytes and adds
// them.
#ifndef MOE_TRANSPORT_H
#define MOE_TRANSPORT_H
#include "comm.h"
MOE_BEGIN_C

// Calls that are not in comm.h's table: blocking, host memory, not in the traffic.
enum { COMM_HOST_GATHER = COMM_KINDS, COMM_BROADCAST, COMM_STEP_END };

// One call as reports show it and as ranks compare it. Equal on all ranks of the group, except
// sends and expects.
typedef struct {
    int64_t call; // 1-based number of the call in its group
    int64_t step;
    int32_t layer, kind, type;
    char phase[20];
    uint64_t count;          // elements of `type` per rank; all_to_all: bytes of a row
    uint64_t sends, expects; // bytes from the record's sender to its reader, and back (check only)
} CallRecord;

// Where a rank is, for the report on one that is stuck: the latest call that it has entered, and
// how many of each of its groups.
enum { PRESENCE_GROUPS = 8 };
typedef struct {
    int32_t known, stuck; // stuck: `at` is a call that has exceeded --timeout
    CallRecord at;
    char group[24];           // of `at`
    int32_t first, stride, n; // the group's world ranks; stride 0: they are not evenly spaced
    struct {
        char name[24];
        int64_t calls;
    } entered[PRESENCE_GROUPS];
} Presence;

struct Comm {
    char name[24];
    int n, rank, local; // local: one rank that does not send to itself
    int *world;         // (n) world rank of each member
    int64_t calls;
    char *stage; // parts of a sum from the other ranks: a multiple of the members' equal shares
    size_t stage_bytes;
    int stage_owned; // taken outside the arenas: nobody reserved it
    void *numbers;   // (n) 8-byte numbers of comm_max and comm_sum
    void *transport; // the transport's own part
    CommTraffic traffic[COMM_KINDS];
    char report[2][COMM_KINDS][40]; // names of start and wait for kernel_begin
};

// A collective between start and wait. comm.c fills it in, transport_post reads it.
enum { COMM_CALLS = 64 };
typedef struct {
    int serial; // 0 = free
    Comm *g;
    CallRecord record; // record.kind says what is done
    Stream stream;
    size_t width, count;                // bytes of an element, elements of record.type
    char *dst;                          // all_reduce: source too
    const char *src, *own;              // own: this rank's contribution to a gather or a sum
    size_t dst_bytes, src_bytes;        // src_bytes 0: the source lies in dst
    int keep;                           // dst holds something that the call reads
    int accumulate;                     // reduce_scatter
    const int64_t *to_rows, *from_rows; // all_to_all: (n) rows, valid in transport_post only
    char *user_dst;                     // check: where comm_wait copies dst
    uint64_t sums[2];                   // check: of user_dst and src while the call owns them
} Call;

typedef struct {
    int rank, size, local_rank, local_size;
} World;

// ---- what a transport offers ----------------------------------------------------------------
// Reads what the launcher said and calls die_set. No rank is met yet where that can wait.
void transport_init(int *argc, char ***argv);
// Meets the other ranks. Calls check_alone in a world of one, and watch_start.
void transport_start(void);
World transport_world(void);
const char *transport_describe(void);
// Returns 1 where a group of one can send to itself.
int transport_forces(void);
// Makes the transport's part of `g`; ranks outside of all groups of this call pass 0. All ranks.
void transport_group(Comm *g, const char *name);
void transport_group_free(Comm *g);
// Returns 1 where sums go through device memory, 0: through host memory.
int transport_stages_on_device(void);
// Starts the call in `slot` (0 ... COMM_CALLS - 1) of comm.c's table. The group has a staging area.
void transport_post(Call *c, int slot);
// Orders its end before what COMPUTE is given from now on.
void transport_wait(Call *c, int slot);
// Moves host memory and returns when it is there: recv (n * bytes) from all ranks' send (bytes), or
// with a root recv (bytes) from it (-1: no root). `r` is what reports show.
void transport_host(Comm *g, const CallRecord *r, void *recv, const void *send, size_t bytes,
                    int root);
// Waits until all ranks have called it; no collective follows.
void transport_leave(void);
void transport_finish(void);
void transport_abort(int status);

// ---- what comm.c offers to transports -------------------------------------------------------
extern CommOptions comm_options; // set by comm_start
// The longest message (1 GiB: MPI counts are int; longer ones are sent in pieces) and the staging
// of a group's sums (longer ones take rounds). Tests make both small.
extern size_t comm_message_bytes, comm_stage_bytes;
// Writes "step 12, layer 3 backward: call 57 in group fsdp, reduce_scatter of 4096 f32" into text.
void call_text(const CallRecord *r, const char *group, char *text, size_t size);
// Copies this rank's presence; under watch_lock.
Presence presence_now(void);
// Writes who has entered the call at which rank `stuck` waits and who has not, with what those do,
// from the presences of all ranks.
void presence_text(const Presence *all, int ranks, int stuck, char *text, size_t size);
// Cuts `total` elements into one piece for each rank, `piece` long but for the last ones: returns
// where piece j begins.
size_t piece_of(size_t total, size_t piece, int j, size_t *length);
// The rank that this one receives from, and sends to, in turn t of 1 ... n - 1, so that no rank is
// everybody's first. A group of one (--force-comm) has turn 0 alone, in which it is its own peer.
static inline int first_turn(const Comm *g) { return g->n == 1 ? 0 : 1; }
static inline int receive_peer(const Comm *g, int t) { return (g->rank - t + g->n) % g->n; }
static inline int send_peer(const Comm *g, int t) { return (g->rank + t) % g->n; }
// Writes out[i] = part[0][i] + part[1][i] + ... + part[n-1][i], in that order, in fp32 (doubles in
// fp64, integers as they are), rounded once; add: what out held plus that. out may be one of the
// parts. Host pointers. Dies on other types than F32, F64, BF16, I32, I64.
void sum_parts(void *out, const void *const *part, int n, size_t count, Dtype type, int add);
// Dies where a launcher says that it started several processes and this one is a world of its own:
// each would train alone, and write over the others' files.
void check_alone(const char *hint);

// ---- the watchdog: a thread that ends the run when one wait lasts longer than --timeout --------
// Writes who has not answered into text. It runs in the watchdog's thread, under watch_lock: what
// it reads may only be changed under watch_lock.
typedef void WatchReport(const void *context, char *text, size_t size);
// Starts the thread. may_abort: it may call transport_abort; else it ends this process alone.
void watch_start(int may_abort);
void watch_enter(WatchReport *report, const void *context);
void watch_leave(void);
// Lets the watchdog call `poll` twice a second, under watch_lock (0: no more). It returns 1 where
// the run is lost, and text (with its hint) says why; an empty text: another rank has said it.
void watch_poll(int (*poll)(char *text, size_t size));
void watch_lock(void);
void watch_unlock(void);
// A WatchReport whose context is the text itself.
void watch_text(const void *context, char *text, size_t size);
MOE_END_C
#endif
