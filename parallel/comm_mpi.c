// The transport over MPI (transport.h): CPUs, and several ranks on one GPU in tests, staged through
// the host. Only nonblocking point-to-point messages are used; the collectives and their order of
// summation are ours, so that results do not depend on the MPI library.
//
// A started call becomes a Transfer. A phase posts all its receives, then all its sends; when all
// have completed, the next is posted:
//
//   all_gather       GATHER             every rank sends its piece to every other
//   reduce_scatter   REDUCE...          piece j goes to rank j, in rounds of what the staging area
//                                       holds; after each the owner adds the parts in rank order
//   all_reduce       REDUCE... GATHER   a piece for each rank, so that one rank makes each sum and
//                                       all hold its bits
//   all_to_all       EXCHANGE           uneven rows, empty messages too: a message of the wrong
//                                       length is then always noticed
//
// Any wait progresses every call in flight. Posting never blocks, and ranks issue calls and waits
// in one order (I2, collectives do not depend on data), so nothing can deadlock. Messages of one
// call between two ranks share a tag (the number of the call in its group) and MPI keeps their
// order; calls differ in tag, so one may overtake another.
#define _GNU_SOURCE
#include "transport.h"
#include "../kernels/fail.h"
#include <mpi.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { TAGS = 32768 }; // MPI guarantees tags up to 32767

typedef enum { EXCHANGE, REDUCE, GATHER, FINISHED } Phase;
typedef struct {
    int peer, receive, done;
    size_t bytes;
} Message;
typedef struct {
    char *p;
    size_t bytes;
} Room; // memory that grows and stays
typedef struct {
    const Call *c;
    int kind, root; // kind: c->record.kind, or what moves host memory
    Phase phase;
    size_t piece, round; // elements of a rank's piece; round of REDUCE
    char *dst;           // host memory, as are src and own
    const char *src, *own;
    Room copy_dst, copy_src; // on a GPU: what dst and src are copies in
    int n_messages, pending, capacity;
    Message *message;     // (capacity)
    MPI_Request *request; // (capacity)
} Transfer;

static World world = { 0, 1, 0, 1 };
static int launched; // MPI was initialised
static int thread_level, oversubscribed;
static Transfer transfers[COMM_CALLS + 1]; // the last one moves host memory
static Transfer *active[COMM_CALLS + 1];   // not FINISHED, oldest first
static int n_active;
static int *done_index; // of MPI_Testsome, (done_capacity)
static MPI_Status *done_status;
static int done_capacity;
static MPI_Win board_window = MPI_WIN_NULL;
// (local_size + 1) in memory that the ranks of this machine share: 1 = that rank is inside a wait.
// A report can then tell the rank that holds everybody up from those that are held up too. The last
// place: 1 + the rank that speaks for all when the run ends. 0 where there is no shared memory.
static volatile int *board;
static int *board_place; // (world.size) place on the board, MPI_UNDEFINED = another machine

// The group's own part.
typedef struct {
    MPI_Comm mpi;
    Transfer *stage_user; // the transfer in flight that uses the staging area, or 0
    const void **part;    // (n) argument of sum_parts
} Group;
static Group *group_of(const Comm *g) { return (Group *)g->transport; }

static void mpi_check(int error, const char *what) {
    if (error == MPI_SUCCESS) return;
    char text[MPI_MAX_ERROR_STRING];
    int length;
    MPI_Error_string(error, text, &length);
    die("MPI: %s: %s|see whether all ranks still run and the network is up", what, text);
}

// ---- joining and leaving --------------------------------------------------------------------
void transport_abort(int status) {
    // A world of one has nobody else to end, and MPI_Abort would print ten lines after the one that
    // matters. MPI_Abort may itself be stuck when the network is: the signal then ends this
    // process, and the launcher the others.
    if (world.size > 1) {
        signal(SIGALRM, SIG_DFL);
        alarm(5);
        MPI_Abort(MPI_COMM_WORLD, status);
    }
    _exit(status ? status : 1);
}

static void abort_all(void) { transport_abort(1); }

static void build_board(MPI_Comm here) {
    int *mine, *first, unit;
    int last = world.local_rank + 1 == world.local_size;
    MPI_Aint bytes;
    MPI_Comm_set_errhandler(here, MPI_ERRORS_RETURN);
    if (MPI_Win_allocate_shared((MPI_Aint)sizeof *mine * (1 + last), sizeof *mine, MPI_INFO_NULL,
                                here, &mine, &board_window) != MPI_SUCCESS)
        return; // reports then say less
    mine[0] = mine[last] = 0;
    MPI_Barrier(here);
    MPI_Win_shared_query(board_window, 0, &bytes, &unit, &first); // the ranks' pieces are adjacent
    board = first;
    size_t table = world.size * sizeof(int);
    int *ranks = (int *)xmalloc(table, "ranks of this machine");
    board_place = (int *)xmalloc(table, "ranks of this machine");
    for (int i = 0; i < world.size; i++) ranks[i] = i;
    MPI_Group all, local;
    MPI_Comm_group(MPI_COMM_WORLD, &all);
    MPI_Comm_group(here, &local);
    MPI_Group_translate_ranks(all, world.size, ranks, local, board_place);
    MPI_Group_free(&all);
    MPI_Group_free(&local);
    free(ranks);
}

static int claim_last_words(void) {
    if (!board) return 1;
    volatile int *speaker = &board[world.local_size];
    return __sync_bool_compare_and_swap(speaker, 0, 1 + world.rank) || *speaker == 1 + world.rank;
}

// 1 where something started this process that MPI knows, or --force-comm wants its transport. A
// process that stands alone does not touch MPI, whose start can fail when many begin at once.
static int is_launched(int argc, char **argv) {
    static const char *const set_by[] = { "OMPI_COMM_WORLD_SIZE",
                                          "PMIX_RANK",
                                          "PMI_RANK",
                                          "PMI_SIZE",
                                          "PMI_FD",
                                          "MPI_LOCALNRANKS",
                                          "PALS_RANKID",
                                          "MV2_COMM_WORLD_SIZE",
                                          "ALPS_APP_PE",
                                          "FLUX_TASK_RANK",
                                          "JSM_NAMESPACE_RANK" };
    for (size_t i = 0; i < sizeof set_by / sizeof *set_by; i++)
        if (getenv(set_by[i])) return 1;
    for (int i = 1; i < argc; i++)
        if (!strncmp(argv[i], "--force-comm", 12)) return 1;
    return 0;
}

void transport_init(int *argc, char ***argv) {
    die_set(0, abort_all);
    launched = is_launched(*argc, *argv);
    if (!launched) return;
    // More ranks than cores: MPI's own blocking calls must give the core away. Before MPI_Init only
    // the launcher's variable tells.
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    const char *ranks_here = getenv("OMPI_COMM_WORLD_LOCAL_SIZE");
    if (ranks_here && atol(ranks_here) > cores) setenv("OMPI_MCA_mpi_yield_when_idle", "1", 0);
    // --force-comm without a launcher: Open MPI would first start a daemon of its own, for ranks
    // that are never spawned.
    if (!ranks_here && !getenv("PMIX_RANK") && !getenv("PMI_RANK") && !getenv("SLURM_PROCID"))
        setenv("OMPI_MCA_ess_singleton_isolated", "1", 0);
    mpi_check(MPI_Init_thread(argc, argv, MPI_THREAD_MULTIPLE, &thread_level), "MPI_Init");
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    MPI_Comm_rank(MPI_COMM_WORLD, &world.rank);
    MPI_Comm_size(MPI_COMM_WORLD, &world.size);
    die_set(world.rank, abort_all);
    MPI_Comm here;
    mpi_check(
        MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, world.rank, MPI_INFO_NULL, &here),
        "ranks of this machine");
    MPI_Comm_rank(here, &world.local_rank);
    MPI_Comm_size(here, &world.local_size);
    build_board(here);
    die_claim_set(claim_last_words);
    MPI_Comm_free(&here);
    oversubscribed = world.local_size > cores;
}

void transport_start(void) {
    if (world.size == 1)
        check_alone("use the mpirun of the MPI it was built with; under Slurm: srun --mpi=list "
                    "shows what fits");
    watch_start(thread_level >= MPI_THREAD_MULTIPLE);
}

World transport_world(void) { return world; }
int transport_forces(void) { return launched; }
void transport_leave(void) {
    if (launched) mpi_check(MPI_Barrier(MPI_COMM_WORLD), "end of the run");
}

void transport_finish(void) {
    if (!launched) return;
    for (int i = 0; i <= COMM_CALLS; i++) {
        free(transfers[i].copy_dst.p);
        free(transfers[i].copy_src.p);
        free(transfers[i].message);
        free(transfers[i].request);
    }
    free(done_index);
    free(done_status);
    if (board) MPI_Win_free(&board_window);
    board = 0;
    free(board_place);
    MPI_Finalize();
}

const char *transport_describe(void) {
    static char text[MPI_MAX_LIBRARY_VERSION_STRING + 8];
    char version[MPI_MAX_LIBRARY_VERSION_STRING];
    int length;
    MPI_Get_library_version(version, &length);
    version[strcspn(version, ",\n")] = 0;
    snprintf(text, sizeof text, "mpi (%s)", version);
    return text;
}

// ---- groups ---------------------------------------------------------------------------------
void transport_group(Comm *g, const char *name) {
    if (!launched) return;
    MPI_Comm mpi;
    char text[96];
    snprintf(text, sizeof text, "building group %s, MPI_Comm_split", name);
    watch_enter(watch_text, text);
    mpi_check(MPI_Comm_split(MPI_COMM_WORLD, g ? g->world[0] : MPI_UNDEFINED, world.rank, &mpi),
              text);
    watch_leave();
    if (!g) return;
    int size, rank;
    MPI_Comm_size(mpi, &size);
    MPI_Comm_rank(mpi, &rank);
    if (size != g->n || rank != g->rank)
        die("group %s: rank %d names %d members, MPI found %d|a bug of the caller: groups of one "
            "call must not overlap, ranks ascend",
            name, world.rank, g->n, size);
    MPI_Comm_set_errhandler(mpi, MPI_ERRORS_RETURN);
    Group *own = (Group *)xcalloc(1, sizeof *own, "group");
    own->mpi = mpi;
    own->part = (const void **)xmalloc(g->n * sizeof *own->part, "group");
    g->transport = own;
}

void transport_group_free(Comm *g) {
    if (!launched) return;
    MPI_Comm_free(&group_of(g)->mpi);
    free(group_of(g)->part);
    free(g->transport);
}

static int on_gpu(void) { return strcmp(device_backend(), "cpu") != 0; }
int transport_stages_on_device(void) { return !on_gpu(); }

// ---- messages -------------------------------------------------------------------------------
static void post(Transfer *t, int receive, int peer, const void *memory, size_t bytes) {
    char *p = (char *)memory;
    do { // an empty message is a message
        if (t->n_messages == t->capacity) {
            t->capacity = t->capacity ? 2 * t->capacity : 16;
            size_t n = t->capacity;
            t->message = (Message *)realloc(t->message, n * sizeof *t->message);
            t->request = (MPI_Request *)realloc(t->request, n * sizeof *t->request);
            if (!t->message || !t->request) die("out of host memory for messages|free memory");
        }
        size_t part = bytes < comm_message_bytes ? bytes : comm_message_bytes;
        Message message = { peer, receive, 0, part };
        t->message[t->n_messages] = message;
        MPI_Request *request = &t->request[t->n_messages++];
        MPI_Comm mpi = group_of(t->c->g)->mpi;
        int tag = (int)(t->c->record.call % TAGS);
        mpi_check(receive ? MPI_Irecv(p, (int)part, MPI_BYTE, peer, tag, mpi, request)
                          : MPI_Isend(p, (int)part, MPI_BYTE, peer, tag, mpi, request),
                  "posting a message");
        t->pending++;
        p += part;
        bytes -= part;
    } while (bytes);
}

// Piece j of a gather or a sum: returns its first element.
static size_t piece_begin(const Transfer *t, int j, size_t *length) {
    size_t total = t->piece * t->c->g->n;
    if (t->kind == COMM_ALL_REDUCE) total = t->c->count; // cuts the last pieces short
    return piece_of(total, t->piece, j, length);
}

// Elements of a piece that a round of REDUCE sums: the staging area holds those of n - 1 ranks.
static size_t round_elements(const Transfer *t) {
    const Comm *g = t->c->g;
    return g->stage_bytes / ((g->n > 1 ? g->n - 1 : 1) * t->c->width);
}

static char *stage_of(const Transfer *t, int peer) {
    const Comm *g = t->c->g;
    size_t place = peer > g->rank ? peer - 1 : peer;
    return g->stage + place * round_elements(t) * t->c->width;
}

// The elements of piece j in the current round.
static size_t round_begin(const Transfer *t, int j, size_t *length) {
    size_t most = round_elements(t);
    size_t skip = t->round * most;
    size_t begin = piece_begin(t, j, length);
    if (skip > *length) skip = *length;
    *length -= skip;
    if (*length > most) *length = most;
    return begin + skip;
}

static void post_broadcast(Transfer *t) {
    const Comm *g = t->c->g;
    if (t->root != g->rank) {
        post(t, 1, t->root, t->dst, t->c->dst_bytes);
        return;
    }
    for (int turn = 1; turn < g->n; turn++) post(t, 0, send_peer(g, turn), t->own, t->c->dst_bytes);
}

static void post_exchange(Transfer *t) {
    const Comm *g = t->c->g;
    const int64_t *rows[2] = { t->c->to_rows, t->c->from_rows };
    for (int receive = 1; receive >= 0; receive--) {
        const char *p = receive ? t->dst : t->src; // the ranks' rows lie back to back
        for (int j = 0; j < g->n; j++) {
            size_t bytes = rows[receive][j] * t->c->count;
            if (j != g->rank || g->n == 1) post(t, receive, j, p, bytes);
            p += bytes;
        }
    }
}

static void post_reduce(Transfer *t) {
    const Comm *g = t->c->g;
    size_t length;
    size_t width = t->c->width;
    round_begin(t, g->rank, &length);
    for (int turn = first_turn(g); turn < g->n; turn++) {
        int peer = receive_peer(g, turn);
        post(t, 1, peer, stage_of(t, peer), length * width);
    }
    // A group of one sends its own contribution, which an in-place destination may have moved.
    const char *from = g->n == 1 ? t->own : t->src;
    for (int turn = first_turn(g); turn < g->n; turn++) {
        int peer = send_peer(g, turn);
        size_t begin = round_begin(t, peer, &length);
        post(t, 0, peer, from + begin * width, length * width);
    }
}

static void post_gather(Transfer *t) {
    const Comm *g = t->c->g;
    size_t length, mine;
    size_t begin = piece_begin(t, g->rank, &mine);
    size_t width = t->c->width;
    if (g->n == 1 && t->own == t->dst) return; // in place: it would send a buffer into itself
    for (int turn = first_turn(g); turn < g->n; turn++) {
        size_t at = piece_begin(t, receive_peer(g, turn), &length);
        post(t, 1, receive_peer(g, turn), t->dst + at * width, length * width);
    }
    const char *from = t->kind == COMM_ALL_REDUCE ? t->dst + begin * width : t->own;
    for (int turn = first_turn(g); turn < g->n; turn++)
        post(t, 0, send_peer(g, turn), from, mine * width);
}

static void post_phase(Transfer *t) {
    t->n_messages = 0;
    switch (t->phase) {
    case EXCHANGE:
        if (t->kind == COMM_BROADCAST)
            post_broadcast(t);
        else
            post_exchange(t);
        break;
    case REDUCE: post_reduce(t); break;
    case GATHER: post_gather(t); break;
    case FINISHED: break;
    }
}

// ---- phases ---------------------------------------------------------------------------------
// All parts of this round are here: their sum, in rank order, is this rank's piece.
static void sum_round(Transfer *t) {
    const Comm *g = t->c->g;
    size_t length, all;
    size_t width = t->c->width;
    size_t at = round_begin(t, g->rank, &length);
    size_t begin = piece_begin(t, g->rank, &all);
    const void **part = group_of(g)->part;
    for (int j = 0; j < g->n; j++) part[j] = stage_of(t, j);
    if (g->n > 1) part[g->rank] = t->own + (at - begin) * width;
    if (t->kind == COMM_REDUCE_SCATTER) at -= begin; // its destination is the piece alone
    sum_parts(t->dst + at * width, part, g->n, length, (Dtype)t->c->record.type, t->c->accumulate);
}

static Phase next_phase(Transfer *t) {
    switch (t->phase) {
    case REDUCE:
        sum_round(t);
        if (++t->round * round_elements(t) < t->piece) return REDUCE;
        group_of(t->c->g)->stage_user = 0;
        return t->kind == COMM_ALL_REDUCE ? GATHER : FINISHED;
    case EXCHANGE:
    case GATHER:
    case FINISHED: break;
    }
    return FINISHED;
}

// Posts phases until one has messages on their way.
static void enter_phase(Transfer *t, Phase phase) {
    t->phase = phase;
    post_phase(t);
    while (t->pending == 0 && t->phase != FINISHED) {
        t->phase = next_phase(t);
        post_phase(t);
    }
    if (t->phase != FINISHED) return;
    int k = 0;
    for (int i = 0; i < n_active; i++)
        if (active[i] != t) active[k++] = active[i];
    n_active = k;
}

// ---- progress -------------------------------------------------------------------------------
// What rank `peer` sends is not what this rank expects of it.
static void wrong_length(const Transfer *t, const Message *m, const char *sends) {
    char text[256];
    call_text(&t->c->record, t->c->g->name, text, sizeof text);
    die("ranks disagree: %s: rank %d expects %zu bytes from rank %d, which sends %s|all ranks must "
        "issue the same calls in the same order, with sizes that agree (I2, collectives do not "
        "depend on data)",
        text, world.rank, m->bytes, t->c->g->world[m->peer], sends);
}

static void message_done(const Transfer *t, Message *m, int error, MPI_Status *status) {
    int class = MPI_SUCCESS;
    int bytes;
    char sends[16];
    if (error == MPI_ERR_IN_STATUS) MPI_Error_class(status->MPI_ERROR, &class);
    if (class == MPI_ERR_TRUNCATE) wrong_length(t, m, "more");
    if (class != MPI_SUCCESS) mpi_check(status->MPI_ERROR, "a message");
    m->done = 1;
    if (!m->receive) return;
    MPI_Get_count(status, MPI_BYTE, &bytes);
    snprintf(sends, sizeof sends, "%d", bytes);
    if ((size_t)bytes != m->bytes) wrong_length(t, m, sends);
}

// Completes what MPI has completed, of every call in flight; 1 if anything has.
static int progress(void) {
    int any = 0;
    for (int i = 0; i < n_active; i++) {
        Transfer *t = active[i];
        int n;
        if (done_capacity < t->n_messages) {
            size_t capacity = t->capacity;
            done_capacity = t->capacity;
            free(done_index);
            free(done_status);
            done_index = (int *)xmalloc(capacity * sizeof *done_index, "messages");
            done_status = (MPI_Status *)xmalloc(capacity * sizeof *done_status, "messages");
        }
        int error = MPI_Testsome(t->n_messages, t->request, &n, done_index, done_status);
        if (error != MPI_ERR_IN_STATUS) mpi_check(error, "testing messages");
        if (n == MPI_UNDEFINED || n == 0) continue;
        any = 1;
        watch_lock(); // the watchdog may be reading messages and phases
        for (int k = 0; k < n; k++)
            message_done(t, &t->message[done_index[k]], error, &done_status[k]);
        t->pending -= n;
        if (t->pending == 0) {
            int before = n_active;
            enter_phase(t, next_phase(t));
            if (n_active < before) i--; // its place holds the next call now
        }
        watch_unlock();
    }
    return any;
}

// Nothing has happened `idle` times in a row: give way, more and more. With a core to itself a rank
// first looks for about 50 us, then offers the core for a millisecond.
static void give_way(int idle) {
    if (!oversubscribed && idle < 200) return;
    if (idle < (oversubscribed ? 50 : 1000)) {
        sched_yield();
        return;
    }
    struct timespec nap = { 0, idle < 20000 ? 50000 : 500000 };
    nanosleep(&nap, 0);
}

static int waits_for_nobody(int world_rank) {
    return board && board_place[world_rank] != MPI_UNDEFINED && !board[board_place[world_rank]];
}

// For the watchdog: "step 3, layer 2 backward: call 17 in group ep, ...: no answer from ranks 3, 5,
// of which 5 waits for nobody (busy, stopped or gone)".
static void report_transfer(const void *context, char *text, size_t size) {
    const Transfer *t = (const Transfer *)context;
    const Comm *g = t->c->g;
    char what[256];
    char who[512] = "";
    char idle[512] = "";
    size_t n = 0;
    size_t n_idle = 0;
    call_text(&t->c->record, g->name, what, sizeof what);
    int receives = 0;
    int last = -1; // what has not come matters more than what was not taken
    for (int i = 0; i < t->n_messages; i++)
        receives |= t->message[i].receive && !t->message[i].done;
    for (int i = 0; i < t->n_messages && n + 16 < sizeof who; i++) {
        const Message *m = &t->message[i];
        if (m->done || m->receive != receives || m->peer == last) continue;
        last = m->peer; // a long message comes in pieces
        int rank = g->world[m->peer];
        n += snprintf(who + n, sizeof who - n, "%s %d", n ? "," : "", rank);
        if (waits_for_nobody(rank))
            n_idle +=
                snprintf(idle + n_idle, sizeof idle - n_idle, "%s %d", n_idle ? "," : "", rank);
    }
    snprintf(text, size, "%s: %s rank%s%s%s%s%s", what,
             receives ? "no answer from" : "not taken by", strchr(who, ',') ? "s" : "", who,
             n_idle ? ", of which" : "", idle,
             n_idle ? " waits for nobody (busy, stopped or gone)" : "");
}

// Progresses all transfers until no message of this one is on its way; the watchdog watches.
static void finish(Transfer *t) {
    if (t->phase == FINISHED) return;
    if (board) board[world.local_rank] = 1;
    watch_enter(report_transfer, t);
    for (int idle = 0; t->phase != FINISHED;) {
        if (progress())
            idle = 0;
        else
            give_way(idle++);
    }
    watch_leave();
    if (board) board[world.local_rank] = 0;
}

// ---- calls ----------------------------------------------------------------------------------
static char *room(Room *r, size_t bytes) {
    if (bytes > r->bytes) {
        free(r->p);
        r->p = (char *)xmalloc(bytes, "communication buffers");
        r->bytes = bytes;
    }
    return r->p;
}

// On a GPU the call works on host copies, which transport_wait writes back.
static void take_host_copies(Transfer *t, const Call *c) {
    stream_order(c->stream, STREAM_COMPUTE); // device_download waits for COMPUTE
    t->dst = room(&t->copy_dst, c->dst_bytes);
    t->src = t->dst;
    if (c->src_bytes) {
        t->src = room(&t->copy_src, c->src_bytes);
        device_download(t->copy_src.p, c->src, c->src_bytes);
    }
    if (c->keep && c->dst_bytes) device_download(t->dst, c->dst, c->dst_bytes);
    int in_dst = c->own >= c->dst && c->own < c->dst + c->dst_bytes;
    t->own = in_dst ? t->dst + (c->own - c->dst) : t->src + (c->own - c->src);
    device_poison(c->dst, c->dst_bytes);
}

static void launch(Transfer *t, Phase first) {
    active[n_active++] = t;
    t->round = 0;
    t->pending = 0;
    enter_phase(t, first);
}

// What this rank sends to itself is copied, unless the group is alone (--force-comm).
static void copy_own(Transfer *t) {
    const Comm *g = t->c->g;
    size_t me = g->rank;
    size_t bytes = t->piece * t->c->width;
    size_t from = me * bytes;
    size_t to = 0;
    if (t->kind == COMM_ALL_TO_ALL) {
        from = 0;
        for (size_t j = 0; j < me; j++) {
            to += t->c->to_rows[j] * t->c->count;
            from += t->c->from_rows[j] * t->c->count;
        }
        bytes = t->c->to_rows[me] * t->c->count;
    }
    const char *own = t->kind == COMM_ALL_TO_ALL ? t->src + to : t->own;
    if (g->n > 1 && bytes && own != t->dst + from) memcpy(t->dst + from, own, bytes);
}

void transport_post(Call *c, int slot) {
    Transfer *t = &transfers[slot];
    Comm *g = c->g;
    t->c = c;
    t->kind = c->record.kind;
    t->piece = c->count;
    t->dst = c->dst;
    t->src = c->src;
    t->own = c->own;
    if (on_gpu()) take_host_copies(t, c);
    if (t->kind == COMM_ALL_GATHER || t->kind == COMM_ALL_TO_ALL) {
        copy_own(t);
        launch(t, t->kind == COMM_ALL_GATHER ? GATHER : EXCHANGE);
        return;
    }
    if (t->kind == COMM_ALL_REDUCE) t->piece = (c->count + g->n - 1) / (size_t)g->n;
    // A group has one staging area: a sum first finishes the group's last one, which is the same on
    // all ranks.
    Group *own = group_of(g);
    if (own->stage_user) finish(own->stage_user);
    own->stage_user = t;
    launch(t, REDUCE);
}

void transport_wait(Call *c, int slot) {
    Transfer *t = &transfers[slot];
    finish(t);
    if (on_gpu() && c->dst_bytes) device_upload(c->dst, t->dst, c->dst_bytes);
}

void transport_host(Comm *g, const CallRecord *r, void *recv, const void *send, size_t bytes,
                    int root) {
    Transfer *t = &transfers[COMM_CALLS];
    Call c;
    memset(&c, 0, sizeof c);
    c.g = g;
    c.record = *r;
    c.width = 1;
    c.dst_bytes = bytes;
    t->c = &c;
    t->kind = root < 0 ? COMM_HOST_GATHER : COMM_BROADCAST;
    t->root = root;
    t->piece = bytes;
    t->dst = (char *)recv;
    t->own = (const char *)send;
    if (root < 0) copy_own(t);
    launch(t, root < 0 ? GATHER : EXCHANGE);
    finish(t);
}
