// What the transports share: where the run is, the record of a call, sums in rank order, groups of
// one.
#ifndef MOE_COMM_COMMON_H
#define MOE_COMM_COMMON_H
#include "comm.h"
MOE_BEGIN_C

// Calls that are no collectives of comm.h's table: blocking, host memory, not in the traffic.
enum { COMM_HOST_GATHER = COMM_KINDS, COMM_BROADCAST, COMM_STEP_END };

// One call as reports show it and as ranks compare it with `check`. Equal on all ranks of the
// group, except sends and expects.
typedef struct {
    int64_t call; // 1-based number of the call in its group
    int64_t step;
    int32_t layer, kind, type;
    char phase[20];
    uint64_t count; // elements of `type` per rank (the row's bytes for all_to_all, whose rows
                    // differ by rank)
    uint64_t sends, expects; // bytes from the record's sender to its reader, and back (check only)
} CallRecord;

// Set by comm_start.
extern CommOptions comm_options;
// Longest message (1 GiB: MPI counts are int; longer ones are sent in pieces) and staging of a
// group's sums (32 MiB; longer ones take rounds). Tests make both small.
extern size_t comm_message_bytes, comm_stage_bytes;
// What comm_reserve takes for sums of up to `bytes`: at least 64 KiB, an element of any type from
// each of 8,192 ranks.
size_t stage_size(size_t bytes);
// A record of the next call at the place that comm_where named.
CallRecord call_record(int64_t call, int kind, Dtype type, size_t count);
// "step 12, layer 3 backward: call 57 in group fsdp, reduce_scatter of 4096 f32", into text.
void call_text(const CallRecord *r, const char *group, char *text, size_t size);
// 1 where two ranks mean the same call (sends and expects aside).
int call_equal(const CallRecord *a, const CallRecord *b);
// Dies where world rank `rank` at call `mine` and world rank `other` at call `theirs` do not mean
// the same call, or not the same bytes between them.
void records_compare(const char *group, int rank, int other, const CallRecord *mine,
                     const CallRecord *theirs);

// out[i] = part[0][i] + part[1][i] + ... + part[n-1][i], in that order, in fp32 (doubles in fp64,
// integers as they are), rounded once; add: plus what out held. out may be one of the parts. Host
// pointers. F32, F64, BF16, I32, I64; another type dies.
void sum_parts(void *out, const void *const *part, int n, size_t count, Dtype type, int add);

// For a world of one rank: dies where a launcher says that it started several. Each would train
// alone, and write over the others' files.
void check_alone(const char *hint);

// The collectives of a group in which nothing moves; device pointers.
void local_all_gather(void *recv, const void *send, size_t count, Dtype type);
void local_reduce_scatter(void *recv, const void *send, size_t count, Dtype type, int accumulate);
void local_all_to_all(const char *group, void *recv, int64_t recv_rows, const void *send,
                      int64_t send_rows, size_t row_bytes);

// ---- the watchdog (comm_watch.c) ------------------------------------------------------------
// A thread that ends the run when one wait lasts longer than comm_options.timeout. `report` writes
// who has not answered into text; it runs in the watchdog's thread, under watch_lock: what it reads
// must only be changed under watch_lock.
void watch_start(int rank, int threads_multiple, void (*abort_all)(int status));
void watch_stop(void);
void watch_enter(void (*report)(const void *context, char *text, size_t size), const void *context);
void watch_leave(void);
// Twice a second the watchdog also calls `poll`, under watch_lock: 1 = the run is lost, and text
// (with its hint) says why.
void watch_poll(int (*poll)(char *text, size_t size));
void watch_lock(void);
void watch_unlock(void);
MOE_END_C
#endif
