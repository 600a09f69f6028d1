// comm.h over MPI. Only nonblocking point-to-point messages are used; the collectives, their order of summation and their checks are this file's, so that results do not depend
// on the MPI library.
//
// A started collective is a CALL that goes through phases. A phase posts all its receives, then all its sends; when all have completed, the next is posted:
//
//   all_gather       GATHER     every rank sends its piece to every other
//   reduce_scatter   REDUCE...  piece j goes to rank j, in rounds of what the staging area holds; after each round the owner adds the parts in rank order
//   all_reduce       REDUCE... GATHER   a piece per rank, so that one rank makes each sum and all hold its bits
//   all_to_all       EXCHANGE   uneven rows, empty messages too: a message of the wrong length is then always noticed
//
// With `check` a phase RECORDS comes first: the ranks of the group exchange what they believe the call to be, so the first call where they disagree is named at once.
// Any wait progresses every call in flight. Posting never blocks, and ranks issue calls and waits in one order (I2), so nothing can deadlock. Messages of one call between two
// ranks share a tag (the number of the call in its group) and MPI keeps their order; calls differ in tag, so one may overtake another.
//
// Transport works on host memory. Where the device has its own, or `check` wants destinations poisoned, a call works on private copies that comm_wait writes back.
#define _GNU_SOURCE
#include "comm_common.h"
#include "../kernels/fail.h"
#include <mpi.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#ifndef COMM_MESSAGE_BYTES
#define COMM_MESSAGE_BYTES ((size_t)1 << 30)     // MPI counts are int: longer messages are sent in pieces
#endif
#ifndef COMM_STAGE_BYTES
#define COMM_STAGE_BYTES ((size_t)32 << 20)      // of a group's sums; longer ones take rounds
#endif
enum { MAX_CALLS = 64, TAGS = 32768 };   // MPI guarantees tags up to 32767

struct Comm {
    char name[24];
    int n, rank, local;              // local: one rank and not --force-comm
    int *world;                      // (n) world rank of each member
    MPI_Comm mpi;
    int64_t calls;
    char *stage;                     // parts of a sum from the other ranks
    size_t stage_bytes;
    int stage_owner;                 // the call in flight that uses it, -1 = none
    int stage_malloced;              // nobody reserved it
    const void **part;               // (n) argument of sum_parts
    int64_t *numbers;                // (n) of comm_max and comm_sum
    CommTraffic traffic[COMM_KINDS];
};

typedef enum { RECORDS, EXCHANGE, REDUCE, GATHER, FINISHED } Phase;
typedef struct { int peer, receive, done; size_t bytes; } Message;
typedef struct { char *p; size_t bytes; } Room;              // memory that grows and stays
typedef struct {
    int serial;                      // 0 = free
    Comm *g;
    CallRecord record;
    Phase phase;
    size_t width, count, round;      // bytes of an element; elements of a piece; round of REDUCE
    int accumulate, root;
    char *dst, *own;                 // what the transport works on; own: this rank's contribution to a gather or sum
    const char *src;
    char *user_dst;                  // copied to by comm_wait where it is not dst
    size_t dst_bytes, src_bytes;
    uint64_t dst_sum, src_sum;       // check: sums of the program's buffers while the call owns them
    const char *user_src;
    size_t *rows;                    // (2n) all_to_all: bytes to, then bytes from each rank
    Room copy_dst, copy_src, rows_room, records_room;
    int n_messages, pending, capacity;
    Message *message;                // (capacity)
    MPI_Request *request;            // (capacity)
} Call;

static int world_rank, world_size, local_rank, local_size, thread_level, oversubscribed, on_device;
static Comm **groups;                            // (n_groups) in the order of their building
static int n_groups;
static Call calls[MAX_CALLS];
static int active[MAX_CALLS], n_active;          // calls not FINISHED, oldest first
static int serial;
static int *done_index;                          // of MPI_Testsome, (done_capacity)
static MPI_Status *done_status;
static int done_capacity;

static void mpi_check(int error, const char *what) {
    if (error == MPI_SUCCESS) return;
    char text[MPI_MAX_ERROR_STRING];
    int length;
    MPI_Error_string(error, text, &length);
    die("MPI: %s: %s|see whether all ranks still run and the network is up", what, text);
}

static char *room(Room *r, size_t bytes) {
    if (bytes > r->bytes) {
        free(r->p);
        r->p = (char *)xmalloc(bytes, "communication buffers");
        r->bytes = bytes;
    }
    return r->p;
}

// ---- joining and leaving ---------------------------------------------------------------------------------------------------------------------------------
void comm_abort(int status) {
    // MPI_Abort may itself be stuck when the network is: the signal then ends this process, and the launcher the others.
    signal(SIGALRM, SIG_DFL);
    alarm(5);
    MPI_Abort(MPI_COMM_WORLD, status);
    _exit(status ? status : 1);
}

static void abort_all(void) { comm_abort(1); }

void comm_init(int *argc, char ***argv) {
    // More ranks than cores: MPI's own blocking calls must give the core away. Before MPI_Init only the launcher's variable tells.
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    const char *ranks_here = getenv("OMPI_COMM_WORLD_LOCAL_SIZE");
    if (ranks_here && atol(ranks_here) > cores) setenv("OMPI_MCA_mpi_yield_when_idle", "1", 0);
    mpi_check(MPI_Init_thread(argc, argv, MPI_THREAD_MULTIPLE, &thread_level), "MPI_Init");
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    MPI_Comm_rank(MPI_COMM_WORLD, &world_rank);
    MPI_Comm_size(MPI_COMM_WORLD, &world_size);
    die_set(world_rank, abort_all);
    MPI_Comm here;
    mpi_check(MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, world_rank, MPI_INFO_NULL, &here), "ranks of this machine");
    MPI_Comm_rank(here, &local_rank);
    MPI_Comm_size(here, &local_size);
    MPI_Comm_free(&here);
    oversubscribed = local_size > cores;
}

void comm_start(CommOptions options) {
    comm_options = options;
    on_device = strcmp(device_backend(), "cpu") != 0;
    watch_start(world_rank, thread_level >= MPI_THREAD_MULTIPLE, comm_abort);
}

static void report_text(const void *context, char *text, size_t size) { snprintf(text, size, "%s", (const char *)context); }

void comm_finish(void) {
    watch_enter(report_text, "end of the run, MPI_Finalize");
    mpi_check(MPI_Barrier(MPI_COMM_WORLD), "end of the run");
    for (int i = 0; i < n_groups; i++) {
        Comm *g = groups[i];
        MPI_Comm_free(&g->mpi);
        if (g->stage_malloced) free(g->stage);
        free(g->world); free(g->part); free(g->numbers);
        free(g);
    }
    for (int i = 0; i < MAX_CALLS; i++) {
        Call *c = &calls[i];
        free(c->copy_dst.p); free(c->copy_src.p); free(c->rows_room.p); free(c->records_room.p); free(c->message); free(c->request);
    }
    free(done_index); free(done_status); free(groups);
    MPI_Finalize();
    watch_leave();
    watch_stop();
}

int comm_world_rank(void) { return world_rank; }
int comm_world_size(void) { return world_size; }
int comm_local_rank(void) { return local_rank; }
int comm_local_size(void) { return local_size; }

const char *comm_describe(void) {
    static char text[MPI_MAX_LIBRARY_VERSION_STRING + 8];
    char version[MPI_MAX_LIBRARY_VERSION_STRING];
    int length;
    MPI_Get_library_version(version, &length);
    version[strcspn(version, ",\n")] = 0;
    snprintf(text, sizeof text, "mpi (%s)", version);
    return text;
}

// ---- groups -----------------------------------------------------------------------------------------------------------------------------------------------
Comm *comm_group(const char *name, const int *world_ranks, int n) {
    MPI_Comm mpi;
    char text[96];
    snprintf(text, sizeof text, "building group %s, MPI_Comm_split", name);
    watch_enter(report_text, text);
    mpi_check(MPI_Comm_split(MPI_COMM_WORLD, n ? world_ranks[0] : MPI_UNDEFINED, world_rank, &mpi), text);
    watch_leave();
    if (n == 0) return 0;
    groups = (Comm **)realloc(groups, (size_t)(n_groups + 1) * sizeof *groups);
    if (!groups) die("out of host memory for groups of ranks|free memory");
    Comm *g = (Comm *)xcalloc(1, sizeof *g, "group");
    snprintf(g->name, sizeof g->name, "%s", name);
    g->n = n;
    g->mpi = mpi;
    g->local = n == 1 && !comm_options.force;
    g->world = (int *)xmalloc((size_t)n * sizeof *g->world, "group");
    g->part = (const void **)xmalloc((size_t)n * sizeof *g->part, "group");
    g->numbers = (int64_t *)xmalloc((size_t)n * sizeof *g->numbers, "group");
    memcpy(g->world, world_ranks, (size_t)n * sizeof *g->world);
    g->stage_owner = -1;
    int size;
    MPI_Comm_size(mpi, &size);
    MPI_Comm_rank(mpi, &g->rank);
    if (size != n || world_ranks[g->rank] != world_rank)
        die("group %s: rank %d names %d members, MPI found %d|a bug of the caller: groups of one call must not overlap, ranks ascend", name, world_rank, n, size);
    MPI_Comm_set_errhandler(mpi, MPI_ERRORS_RETURN);
    return groups[n_groups++] = g;
}

int comm_rank(const Comm *g) { return g->rank; }
int comm_size(const Comm *g) { return g->n; }
int comm_is_local(const Comm *g) { return g->local; }

void comm_reserve(Comm *g, size_t bytes, Arena *arena) {
    if (g && g->local) return;
    size_t least = (g ? (size_t)g->n : 1) * 64;      // an element of any type from every rank
    if (bytes > COMM_STAGE_BYTES) bytes = COMM_STAGE_BYTES;
    if (bytes < least) bytes = least;
    // Staging is read and written by the host: on a GPU it is host memory, and not the arena's.
    if (strcmp(device_backend(), "cpu")) return;
    char *p = (char *)arena_take(arena, bytes, "communication staging");
    if (!g || !p || (!g->stage_malloced && bytes <= g->stage_bytes)) return;
    if (g->stage_malloced) free(g->stage);
    g->stage_malloced = 0;
    g->stage = p;
    g->stage_bytes = bytes;
}

CommTraffic comm_traffic(Comm *g, int kind, int reset) {
    CommTraffic t = g->traffic[kind];
    if (reset) memset(&g->traffic[kind], 0, sizeof t);
    return t;
}

// ---- messages -----------------------------------------------------------------------------------------------------------------------------------------------
static void post(Call *c, int receive, int peer, void *p, size_t bytes) {
    Comm *g = c->g;
    do {                                             // an empty message is a message
        if (c->n_messages == c->capacity) {
            c->capacity = c->capacity ? 2 * c->capacity : 16;
            c->message = (Message *)realloc(c->message, (size_t)c->capacity * sizeof *c->message);
            c->request = (MPI_Request *)realloc(c->request, (size_t)c->capacity * sizeof *c->request);
            if (!c->message || !c->request) die("out of host memory for messages|free memory");
        }
        size_t part = bytes < COMM_MESSAGE_BYTES ? bytes : COMM_MESSAGE_BYTES;
        Message *m = &c->message[c->n_messages];
        m->peer = peer; m->receive = receive; m->done = 0; m->bytes = part;
        MPI_Request *request = &c->request[c->n_messages++];
        int tag = (int)(c->record.call % TAGS);
        mpi_check(receive ? MPI_Irecv(p, (int)part, MPI_BYTE, peer, tag, g->mpi, request) : MPI_Isend(p, (int)part, MPI_BYTE, peer, tag, g->mpi, request), "posting a message");
        c->pending++;
        p = (char *)p + part;
        bytes -= part;
    } while (bytes);
}

// Distance 1..n-1 from this rank to the peer of turn i, so that no rank is everybody's first; a group of one (--force-comm) is its own peer.
static int first_turn(const Comm *g) { return g->n == 1 ? 0 : 1; }
static int receive_peer(const Comm *g, int turn) { return (g->rank - turn + g->n) % g->n; }
static int send_peer(const Comm *g, int turn) { return (g->rank + turn) % g->n; }

// Piece j of a gather or sum: elements [begin, begin + length) of the whole. all_reduce cuts `count` of its last pieces short.
static size_t piece(const Call *c, int j, size_t *length) {
    size_t begin = (size_t)j * c->count;
    *length = c->count;
    if (c->record.kind == COMM_ALL_REDUCE) {
        size_t total = c->dst_bytes / c->width;
        if (begin > total) begin = total;
        if (*length > total - begin) *length = total - begin;
    }
    return begin;
}

// Elements of a piece that a round of REDUCE sums: what the staging area holds of one rank, of n - 1.
static size_t round_elements(const Call *c) {
    return c->g->stage_bytes / ((size_t)(c->g->n > 1 ? c->g->n - 1 : 1) * c->width);
}

static char *stage_of(const Call *c, int peer) {
    const Comm *g = c->g;
    return g->stage + (size_t)(peer > g->rank ? peer - 1 : peer) * round_elements(c) * c->width;
}

// The elements of piece j in the current round.
static size_t round_piece(const Call *c, int j, size_t *length) {
    size_t most = round_elements(c), skip = c->round * most, begin = piece(c, j, length);
    if (skip > *length) skip = *length;
    *length -= skip;
    if (*length > most) *length = most;
    return begin + skip;
}

static void post_records(Call *c) {
    Comm *g = c->g;
    CallRecord *r = (CallRecord *)room(&c->records_room, 2 * (size_t)g->n * sizeof *r);   // to, then from each rank
    for (int j = 0; j < g->n; j++) {
        r[j] = c->record;
        if (c->rows) { r[j].sends = c->rows[j]; r[j].expects = c->rows[g->n + j]; }
    }
    for (int t = first_turn(g); t < g->n; t++) post(c, 1, receive_peer(g, t), r + g->n + receive_peer(g, t), sizeof *r);
    for (int t = first_turn(g); t < g->n; t++) post(c, 0, send_peer(g, t), r + send_peer(g, t), sizeof *r);
}

static void post_exchange(Call *c) {
    Comm *g = c->g;
    if (c->record.kind == COMM_BROADCAST) {
        if (c->root != g->rank) { post(c, 1, c->root, c->dst, c->dst_bytes); return; }
        for (int t = first_turn(g); t < g->n && g->n > 1; t++) post(c, 0, send_peer(g, t), c->dst, c->dst_bytes);
        return;
    }
    size_t to = 0, from = 0;                         // offsets of a rank's rows: found by walking the ranks in order
    for (int j = 0; j < g->n; j++) {
        size_t bytes = c->rows[g->n + j];
        if (j != g->rank || g->n == 1) post(c, 1, j, c->dst + from, bytes);
        from += bytes;
    }
    for (int j = 0; j < g->n; j++) {
        size_t bytes = c->rows[j];
        if (j != g->rank || g->n == 1) post(c, 0, j, (void *)(c->src + to), bytes);
        to += bytes;
    }
}

static void post_reduce(Call *c) {
    Comm *g = c->g;
    size_t length;
    round_piece(c, g->rank, &length);
    for (int t = first_turn(g); t < g->n; t++) post(c, 1, receive_peer(g, t), stage_of(c, receive_peer(g, t)), length * c->width);
    for (int t = first_turn(g); t < g->n; t++) {
        size_t begin = round_piece(c, send_peer(g, t), &length);
        // A group of one sends its own contribution, which an in-place destination may have moved.
        post(c, 0, send_peer(g, t), g->n == 1 ? c->own + begin * c->width : (char *)c->src + begin * c->width, length * c->width);
    }
}

static void post_gather(Call *c) {
    Comm *g = c->g;
    size_t length, mine, begin = piece(c, g->rank, &mine);
    if (g->n == 1 && c->own == c->dst) return;       // in place: it would send a buffer into itself
    for (int t = first_turn(g); t < g->n; t++) {
        size_t at = piece(c, receive_peer(g, t), &length);
        post(c, 1, receive_peer(g, t), c->dst + at * c->width, length * c->width);
    }
    const char *from = c->record.kind == COMM_ALL_REDUCE ? c->dst + begin * c->width : c->own;
    for (int t = first_turn(g); t < g->n; t++) post(c, 0, send_peer(g, t), (void *)from, mine * c->width);
}

static void post_phase(Call *c) {
    c->n_messages = 0;
    switch (c->phase) {
        case RECORDS:  post_records(c); break;
        case EXCHANGE: post_exchange(c); break;
        case REDUCE:   post_reduce(c); break;
        case GATHER:   post_gather(c); break;
        case FINISHED: break;
    }
}

// ---- phases ---------------------------------------------------------------------------------------------------------------------------------------------------
static Phase first_phase(const Call *c) {
    switch (c->record.kind) {
        case COMM_REDUCE_SCATTER: case COMM_ALL_REDUCE: return REDUCE;
        case COMM_ALL_GATHER: case COMM_HOST_GATHER: return GATHER;
        case COMM_STEP_END: return FINISHED;         // its records say it all
        default: return EXCHANGE;
    }
}

static void compare_records(const Call *c) {
    const Comm *g = c->g;
    const CallRecord *theirs = (const CallRecord *)(void *)c->records_room.p + g->n;
    char mine[256], other[256];
    call_text(&c->record, g->name, mine, sizeof mine);
    for (int j = 0; j < g->n; j++) {
        if (j == g->rank && g->n > 1) continue;
        if (!call_equal(&c->record, &theirs[j])) {
            call_text(&theirs[j], g->name, other, sizeof other);
            // The lower rank speaks first, so that all ranks report the pair in one order.
            int swap = g->world[j] < world_rank;
            die("ranks disagree: rank %d is at %s; rank %d is at %s|all ranks must issue the same calls in the same order (I2)", swap ? g->world[j] : world_rank,
                swap ? other : mine, swap ? world_rank : g->world[j], swap ? mine : other);
        }
        if (c->rows && (theirs[j].sends != c->rows[g->n + j] || theirs[j].expects != c->rows[j])) {
            int back = theirs[j].sends != c->rows[g->n + j];         // the direction that disagrees
            die("%s: rank %d sends %llu bytes to rank %d, which expects %llu|send_rows and recv_rows of the two must agree", mine, back ? g->world[j] : world_rank,
                (unsigned long long)(back ? theirs[j].sends : c->rows[j]), back ? world_rank : g->world[j],
                (unsigned long long)(back ? c->rows[g->n + j] : theirs[j].expects));
        }
    }
}

// All parts of this round are here: their sum, in rank order, is this rank's piece.
static void sum_round(Call *c) {
    Comm *g = c->g;
    size_t length, at = round_piece(c, g->rank, &length), begin = piece(c, g->rank, &(size_t){ 0 });
    for (int j = 0; j < g->n; j++) g->part[j] = j == g->rank && g->n > 1 ? c->own + (at - begin) * c->width : stage_of(c, j);
    char *out = c->record.kind == COMM_ALL_REDUCE ? c->dst + at * c->width : c->dst + (at - begin) * c->width;
    sum_parts(out, g->part, g->n, length, (Dtype)c->record.type, c->accumulate);
}

static Phase next_phase(Call *c) {
    switch (c->phase) {
        case RECORDS:
            compare_records(c);
            return first_phase(c);
        case REDUCE:
            sum_round(c);
            if (++c->round * round_elements(c) < c->count) return REDUCE;
            c->g->stage_owner = -1;
            return c->record.kind == COMM_ALL_REDUCE ? GATHER : FINISHED;
        default:
            return FINISHED;
    }
}

// Posts phases until one has messages on their way.
static void enter_phase(Call *c, Phase phase) {
    for (c->phase = phase, post_phase(c); c->pending == 0 && c->phase != FINISHED; post_phase(c)) c->phase = next_phase(c);
    if (c->phase != FINISHED) return;
    int slot = (int)(c - calls), k = 0;
    for (int i = 0; i < n_active; i++) if (active[i] != slot) active[k++] = active[i];
    n_active = k;
}

// ---- progress ---------------------------------------------------------------------------------------------------------------------------------------------------
static void wrong_length(const Call *c, const Message *m, int longer, int bytes) {
    char text[256];
    call_text(&c->record, c->g->name, text, sizeof text);
    static const char *const hint = "all ranks must issue the same calls in the same order, with sizes that agree (I2)";
    if (longer) die("ranks disagree: %s: rank %d expects %zu bytes from rank %d, which sends more|%s", text, world_rank, m->bytes, c->g->world[m->peer], hint);
    die("ranks disagree: %s: rank %d expects %zu bytes from rank %d, which sends %d|%s", text, world_rank, m->bytes, c->g->world[m->peer], bytes, hint);
}

// Completes what MPI has completed, of every call in flight; 1 if anything has.
static int progress(void) {
    int any = 0;
    for (int i = 0; i < n_active; i++) {
        Call *c = &calls[active[i]];
        int n;
        if (done_capacity < c->n_messages) {
            done_capacity = c->capacity;
            free(done_index); free(done_status);
            done_index = (int *)xmalloc((size_t)done_capacity * sizeof *done_index, "messages");
            done_status = (MPI_Status *)xmalloc((size_t)done_capacity * sizeof *done_status, "messages");
        }
        int error = MPI_Testsome(c->n_messages, c->request, &n, done_index, done_status);
        if (error != MPI_SUCCESS && error != MPI_ERR_IN_STATUS) mpi_check(error, "testing messages");
        if (n == MPI_UNDEFINED || n == 0) continue;
        any = 1;
        watch_lock();                                // the watchdog may be reading messages and phases
        for (int k = 0; k < n; k++) {
            Message *m = &c->message[done_index[k]];
            if (error == MPI_ERR_IN_STATUS && done_status[k].MPI_ERROR != MPI_SUCCESS) {
                int class;
                MPI_Error_class(done_status[k].MPI_ERROR, &class);
                if (class == MPI_ERR_TRUNCATE) wrong_length(c, m, 1, 0);
                mpi_check(done_status[k].MPI_ERROR, "a message");
            }
            if (m->receive) {
                int bytes;
                MPI_Get_count(&done_status[k], MPI_BYTE, &bytes);
                if ((size_t)bytes != m->bytes) wrong_length(c, m, 0, bytes);
            }
            m->done = 1;
        }
        c->pending -= n;
        if (c->pending == 0) {
            int before = n_active;
            enter_phase(c, next_phase(c));
            if (n_active < before) i--;              // its place holds the next call now
        }
        watch_unlock();
    }
    return any;
}

// Nothing has happened `idle` times in a row: give way, more and more.
static void give_way(int idle) {
    if (!oversubscribed && idle < 200) return;       // about 50 us
    if (idle < 1000) { sched_yield(); return; }
    struct timespec t = { 0, idle < 4000 ? 50000 : 500000 };
    nanosleep(&t, 0);
}

// Watchdog: "step 3, layer 2 backward: call 17 in group ep, ...: no answer from rank 3 5".
static void report_call(const void *context, char *text, size_t size) {
    const Call *c = (const Call *)context;
    const Comm *g = c->g;
    char what[256], who[2][512] = { "", "" };
    size_t n[2] = { 0, 0 };
    call_text(&c->record, g->name, what, sizeof what);
    for (int i = 0; i < c->n_messages; i++) {
        const Message *m = &c->message[i];
        int again = i && m[-1].peer == m->peer && m[-1].receive == m->receive && !m[-1].done;       // a long message in pieces
        if (!m->done && !again && n[m->receive] + 12 < sizeof who[0])
            n[m->receive] += (size_t)snprintf(who[m->receive] + n[m->receive], sizeof who[0] - n[m->receive], " %d", g->world[m->peer]);
    }
    const char *plural = strchr(n[1] ? who[1] + 1 : who[0] + (n[0] > 0), ' ') ? "s" : "";
    if (n[1]) snprintf(text, size, "%s: no answer from rank%s%s", what, plural, who[1]);
    else snprintf(text, size, "%s: not taken by rank%s%s", what, plural, n[0] ? who[0] : " (none: sums in progress)");
}

static void finish(Call *c) {                        // until no message of the call is on its way
    if (c->phase == FINISHED) return;
    watch_enter(report_call, c);
    for (int idle = 0; c->phase != FINISHED; ) {
        if (progress()) idle = 0;
        else give_way(idle++);
    }
    watch_leave();
}

// ---- start and wait -------------------------------------------------------------------------------------------------------------------------------------------
// A sum over the bytes of a buffer in flight: `check` compares it at start and wait.
static uint64_t buffer_sum(const char *p, size_t bytes) {
    uint64_t sum = bytes, word;
    size_t i = 0;
    for (; i + 8 <= bytes; i += 8) { memcpy(&word, p + i, 8); sum = (sum ^ word) * 0x9e3779b97f4a7c15u; }
    for (; i < bytes; i++) sum = (sum ^ (unsigned char)p[i]) * 0x9e3779b97f4a7c15u;
    return sum;
}

static Call *new_call(Comm *g, int kind, Dtype type, size_t count) {
    int slot = 0;
    while (slot < MAX_CALLS && calls[slot].serial) slot++;
    if (slot == MAX_CALLS) die("more than %d collectives started and not waited for, group %s|a bug of the caller: comm_wait", MAX_CALLS, g->name);
    Call *c = &calls[slot];
    serial = serial % (INT32_MAX / MAX_CALLS - 1) + 1;
    c->serial = serial;
    c->g = g;
    c->record = call_record(++g->calls, kind, type, count);
    c->width = dtype_size(type);
    c->count = count;
    c->round = 0;
    c->accumulate = c->root = 0;
    c->dst = c->user_dst = c->own = 0;
    c->src = c->user_src = 0;
    c->dst_bytes = c->src_bytes = 0;
    c->rows = 0;
    c->n_messages = c->pending = 0;
    return c;
}

static int is_staged(void) { return on_device || comm_options.check; }

// Gives the call its buffers: the program's, or private copies of them. keep: dst holds something that the call reads (in place, accumulate).
static void take_buffers(Call *c, void *dst, size_t dst_bytes, const void *src, size_t src_bytes, int keep, Stream stream) {
    c->dst = c->user_dst = (char *)dst;
    c->src = c->user_src = (const char *)src;
    c->dst_bytes = dst_bytes;
    c->src_bytes = src_bytes;
    if (!is_staged()) return;
    c->dst = room(&c->copy_dst, dst_bytes);
    if (on_device) {
        stream_order(stream, STREAM_COMPUTE);        // device_download waits for COMPUTE
        if (src_bytes) device_download(room(&c->copy_src, src_bytes), src, src_bytes);
        c->src = c->copy_src.p;
        if (keep && dst_bytes) device_download(c->dst, dst, dst_bytes);
        if (comm_options.check) device_poison(dst, dst_bytes);
        return;
    }
    if (keep && dst_bytes) memcpy(c->dst, dst, dst_bytes);
    if (dst_bytes) memset(dst, 0xff, dst_bytes);     // NaN in every floating type
    c->dst_sum = buffer_sum(c->user_dst, dst_bytes);
    c->src_sum = buffer_sum(c->user_src, src_bytes);
}

static Request launch(Call *c, double since) {
    Comm *g = c->g;
    Phase first = first_phase(c);
    if (first == REDUCE) {
        if (g->stage_owner >= 0) finish(&calls[g->stage_owner]);     // one sum at a time in a group: the same one on all ranks
        if (!g->stage) {                             // nobody reserved (tests, set-up): once, before the first step
            g->stage_bytes = COMM_STAGE_BYTES > (size_t)g->n * 64 ? COMM_STAGE_BYTES : (size_t)g->n * 64;
            g->stage = (char *)xmalloc(g->stage_bytes, "communication staging");
            g->stage_malloced = 1;
        }
        g->stage_owner = (int)(c - calls);
    }
    active[n_active++] = (int)(c - calls);
    enter_phase(c, comm_options.check ? RECORDS : first);
    Request r = { c->serial * MAX_CALLS + (int)(c - calls) };
    if (c->record.kind < COMM_KINDS) g->traffic[c->record.kind].seconds += now_seconds() - since;
    return r;
}

static void count_traffic(Call *c, size_t bytes) {
    c->g->traffic[c->record.kind].calls++;
    c->g->traffic[c->record.kind].bytes += (int64_t)bytes;
}

static int overlaps(const void *a, const void *b, size_t b_bytes) { return (const char *)a >= (const char *)b && (const char *)a < (const char *)b + b_bytes; }

static Request nothing(Comm *g, int kind) {
    g->traffic[kind].calls++;
    Request r = { -1 };
    return r;
}

Request all_gather_start(Comm *g, void *recv, const void *send, size_t count, Dtype type, Stream stream) {
    if (g->local) { stream_order(stream, STREAM_COMPUTE); local_all_gather(recv, send, count, type); return nothing(g, COMM_ALL_GATHER); }
    double since = now_seconds();
    Call *c = new_call(g, COMM_ALL_GATHER, type, count);
    size_t bytes = count * c->width, all = (size_t)g->n * bytes;
    int in_place = overlaps(send, recv, all);
    take_buffers(c, recv, all, send, in_place ? 0 : bytes, in_place, stream);
    char *mine = c->dst + (size_t)g->rank * bytes;
    c->own = in_place ? mine : (char *)c->src;
    if (!in_place && g->n > 1 && bytes) memcpy(mine, c->src, bytes);
    count_traffic(c, (size_t)(g->n - 1) * bytes);
    return launch(c, since);
}

Request reduce_scatter_start(Comm *g, void *recv, const void *send, size_t count, Dtype type, int accumulate, Stream stream) {
    if (g->local) { stream_order(stream, STREAM_COMPUTE); local_reduce_scatter(recv, send, count, type, accumulate); return nothing(g, COMM_REDUCE_SCATTER); }
    double since = now_seconds();
    Call *c = new_call(g, COMM_REDUCE_SCATTER, type, count);
    size_t bytes = count * c->width, all = (size_t)g->n * bytes;
    int in_place = overlaps(recv, send, all);
    take_buffers(c, recv, bytes, send, all, in_place || accumulate, stream);
    c->own = in_place ? c->dst : (char *)c->src + (size_t)g->rank * bytes;
    c->accumulate = accumulate;
    count_traffic(c, (size_t)(g->n - 1) * bytes);
    return launch(c, since);
}

Request all_reduce_start(Comm *g, void *buffer, size_t count, Dtype type, Stream stream) {
    if (g->local) { stream_order(stream, STREAM_COMPUTE); return nothing(g, COMM_ALL_REDUCE); }
    double since = now_seconds();
    Call *c = new_call(g, COMM_ALL_REDUCE, type, count);
    c->count = (count + (size_t)g->n - 1) / (size_t)g->n;
    take_buffers(c, buffer, count * c->width, 0, 0, 1, stream);
    size_t mine, begin = piece(c, g->rank, &mine);
    c->src = c->dst;
    c->own = c->dst + begin * c->width;
    // The others' pieces of this rank go out, then its own sum to each of them.
    count_traffic(c, (count - mine + (size_t)(g->n - 1) * mine) * c->width);
    return launch(c, since);
}

Request all_to_all_start(Comm *g, void *recv, const int64_t *recv_rows, const void *send, const int64_t *send_rows, size_t row_bytes, Stream stream) {
    if (g->local) {
        stream_order(stream, STREAM_COMPUTE);
        local_all_to_all(g->name, recv, recv_rows[0], send, send_rows[0], row_bytes);
        return nothing(g, COMM_ALL_TO_ALL);
    }
    double since = now_seconds();
    Call *c = new_call(g, COMM_ALL_TO_ALL, DTYPE_U8, row_bytes);
    size_t from = 0, to = 0, n = (size_t)g->n, me = (size_t)g->rank, my_from = 0, my_to = 0;
    c->rows = (size_t *)(void *)room(&c->rows_room, 2 * n * sizeof *c->rows);
    for (size_t j = 0; j < n; j++) {
        if (send_rows[j] < 0 || recv_rows[j] < 0) die("all_to_all in group %s: negative number of rows|a bug of the caller", g->name);
        c->rows[j] = (size_t)send_rows[j] * row_bytes;
        c->rows[n + j] = (size_t)recv_rows[j] * row_bytes;
        if (j < me) { my_to += c->rows[j]; my_from += c->rows[n + j]; }
        to += c->rows[j];
        from += c->rows[n + j];
    }
    if (c->rows[me] != c->rows[n + me])
        die("all_to_all in group %s: rank %d sends itself %zu bytes and expects %zu|a bug of the caller", g->name, world_rank, c->rows[me], c->rows[n + me]);
    take_buffers(c, recv, from, send, to, 0, stream);
    if (n > 1 && c->rows[me]) memcpy(c->dst + my_from, c->src + my_to, c->rows[me]);
    count_traffic(c, to - c->rows[me]);
    return launch(c, since);
}

static void write_back(Call *c) {
    if (!is_staged() || c->record.kind >= COMM_KINDS) return;
    if (on_device) { if (c->dst_bytes) device_upload(c->user_dst, c->dst, c->dst_bytes); return; }
    char text[256];
    int dst_changed = buffer_sum(c->user_dst, c->dst_bytes) != c->dst_sum, src_changed = buffer_sum(c->user_src, c->src_bytes) != c->src_sum;
    if (dst_changed || src_changed) {
        call_text(&c->record, c->g->name, text, sizeof text);
        die("%s: its %s changed between start and wait|the call owns its buffers until comm_wait", text, dst_changed ? "destination" : "source");
    }
    if (c->dst_bytes) memcpy(c->user_dst, c->dst, c->dst_bytes);
}

void comm_wait(Request r) {
    if (r.id < 0) return;
    Call *c = &calls[r.id % MAX_CALLS];
    if (c->serial != r.id / MAX_CALLS) die("comm_wait for a call that was waited for already|a bug of the caller");
    double since = now_seconds();
    finish(c);
    write_back(c);
    c->serial = 0;
    if (c->record.kind < COMM_KINDS) c->g->traffic[c->record.kind].seconds += now_seconds() - since;
}

// ---- blocking calls on host memory -------------------------------------------------------------------------------------------------------------------------------
void comm_broadcast(Comm *g, void *host, size_t bytes, int root) {
    if (g->n == 1) return;
    Call *c = new_call(g, COMM_BROADCAST, DTYPE_U8, bytes);
    c->dst = (char *)host;
    c->dst_bytes = bytes;
    c->root = root;
    comm_wait(launch(c, 0));
}

static void host_call(Comm *g, int kind, void *recv, const void *send, size_t bytes) {
    Call *c = new_call(g, kind, DTYPE_U8, bytes);
    c->dst = (char *)recv;
    c->dst_bytes = (size_t)g->n * bytes;
    c->own = (char *)send;
    comm_wait(launch(c, 0));
}

void comm_all_gather_host(Comm *g, void *recv, const void *send, size_t bytes) {
    char *mine = (char *)recv + (size_t)g->rank * bytes;
    if (mine != send && bytes) memmove(mine, send, bytes);
    if (g->n > 1) host_call(g, COMM_HOST_GATHER, recv, mine, bytes);
}

void comm_barrier(Comm *g) {
    char *flags = (char *)(void *)g->numbers;
    comm_all_gather_host(g, flags, flags + g->rank, 1);
}

int64_t comm_max(Comm *g, int64_t value) {
    comm_all_gather_host(g, g->numbers, &value, sizeof value);
    for (int j = 0; j < g->n; j++) if (g->numbers[j] > value) value = g->numbers[j];
    return value;
}

double comm_sum(Comm *g, double value) {
    double *numbers = (double *)(void *)g->numbers, sum;
    comm_all_gather_host(g, numbers, &value, sizeof value);
    sum = numbers[0];
    for (int j = 1; j < g->n; j++) sum += numbers[j];
    return sum;
}

void comm_step_end(void) {
    if (!comm_options.check) return;
    for (int i = 0; i < n_groups; i++) if (groups[i]->n > 1) host_call(groups[i], COMM_STEP_END, 0, 0, 0);
}
