// comm.h for one process: every group has one rank, every call is done when it returns.
// --force-comm has no transport to go through here; it makes callers take the path with buffers and
// copies (comm_is_local is then 0).
#include "comm_common.h"
#include "../kernels/fail.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct Comm {
    const char *name;
    CommTraffic traffic[COMM_KINDS];
    struct Comm *next;
};

static Comm *groups; // for comm_finish

static const Request nothing = { -1 };

static void end_process(void) { exit(1); }

void comm_init(int *argc, char ***argv) {
    (void)argc;
    (void)argv;
    die_set(0, end_process);
}
void comm_start(CommOptions options) {
    comm_options = options;
    check_alone(
        "this program was built without MPI: build with it (make doctor says how), or start one process");
}
void comm_finish(void) {
    for (Comm *g = groups, *next; g; g = next) {
        next = g->next;
        free(g);
    }
    groups = 0;
}
void comm_abort(int status) { exit(status); }
int comm_world_rank(void) { return 0; }
int comm_world_size(void) { return 1; }
int comm_local_rank(void) { return 0; }
int comm_local_size(void) { return 1; }
const char *comm_describe(void) { return "none"; }

Comm *comm_group(const char *name, const int *world_ranks, int n) {
    if (n == 0) return 0;
    if (n != 1 || world_ranks[0] != 0)
        die("group %s of %d ranks in a program built without MPI|build with MPI (make doctor says how) and start with mpirun",
            name, n);
    Comm *g = (Comm *)xcalloc(1, sizeof *g, "group");
    g->name = name;
    g->next = groups;
    return groups = g;
}
int comm_rank(const Comm *g) {
    (void)g;
    return 0;
}
int comm_size(const Comm *g) {
    (void)g;
    return 1;
}
int comm_is_local(const Comm *g) {
    (void)g;
    return !comm_options.force;
}

static Request done(Comm *g, int kind) {
    g->traffic[kind].calls++;
    return nothing;
}

Request all_gather_start(Comm *g, void *recv, const void *send, size_t count, Dtype type,
                         Stream stream) {
    stream_order(stream, STREAM_COMPUTE); // copies run on COMPUTE
    local_all_gather(recv, send, count, type);
    return done(g, COMM_ALL_GATHER);
}
Request reduce_scatter_start(Comm *g, void *recv, const void *send, size_t count, Dtype type,
                             int accumulate, Stream stream) {
    stream_order(stream, STREAM_COMPUTE);
    local_reduce_scatter(recv, send, count, type, accumulate);
    return done(g, COMM_REDUCE_SCATTER);
}
Request all_reduce_start(Comm *g, void *buffer, size_t count, Dtype type, Stream stream) {
    (void)buffer;
    (void)count;
    (void)type;
    stream_order(stream, STREAM_COMPUTE);
    return done(g, COMM_ALL_REDUCE);
}
Request all_to_all_start(Comm *g, void *recv, const int64_t *recv_rows, const void *send,
                         const int64_t *send_rows, size_t row_bytes, Stream stream) {
    stream_order(stream, STREAM_COMPUTE);
    local_all_to_all(g->name, recv, recv_rows[0], send, send_rows[0], row_bytes);
    return done(g, COMM_ALL_TO_ALL);
}
void comm_wait(Request r) { (void)r; }

void comm_broadcast(Comm *g, void *host, size_t bytes, int root) {
    (void)g;
    (void)host;
    (void)bytes;
    (void)root;
}
void comm_all_gather_host(Comm *g, void *recv, const void *send, size_t bytes) {
    (void)g;
    if (recv != send && bytes) memcpy(recv, send, bytes);
}
void comm_barrier(Comm *g) { (void)g; }
int64_t comm_max(Comm *g, int64_t value) {
    (void)g;
    return value;
}
double comm_sum(Comm *g, double value) {
    (void)g;
    return value;
}
void comm_step_end(void) {}
void comm_reserve(Comm *g, size_t bytes, Arena *arena) {
    if (!g)
        arena_take(arena, stage_size(bytes),
                   "communication staging"); // the plan of a grid that does not run
}

CommTraffic comm_traffic(Comm *g, int kind, int reset) {
    CommTraffic t = g->traffic[kind];
    if (reset) memset(&g->traffic[kind], 0, sizeof t);
    return t;
}
