// Calls in flight over MPI: see comm_mpi.h.
#define _GNU_SOURCE
#include "comm_mpi.h"
#include "../kernels/fail.h"
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MAX_CALLS = 64, TAGS = 32768 }; // MPI guarantees tags up to 32767

static Call calls[MAX_CALLS];
static int active[MAX_CALLS], n_active; // calls not FINISHED, oldest first
static int serial;
static int *done_index; // of MPI_Testsome, (done_capacity)
static MPI_Status *done_status;
static int done_capacity;

void mpi_check(int error, const char *what) {
    if (error == MPI_SUCCESS) return;
    char text[MPI_MAX_ERROR_STRING];
    int length;
    MPI_Error_string(error, text, &length);
    die("MPI: %s: %s|see whether all ranks still run and the network is up", what, text);
}

char *room(Room *r, size_t bytes) {
    if (bytes > r->bytes) {
        free(r->p);
        r->p = (char *)xmalloc(bytes, "communication buffers");
        r->bytes = bytes;
    }
    return r->p;
}

// ---- messages -------------------------------------------------------------------------------
static void post(Call *c, int receive, int peer, void *p, size_t bytes) {
    Comm *g = c->g;
    do { // an empty message is a message
        if (c->n_messages == c->capacity) {
            c->capacity = c->capacity ? 2 * c->capacity : 16;
            c->message = (Message *)realloc(c->message, (size_t)c->capacity * sizeof *c->message);
            c->request =
                (MPI_Request *)realloc(c->request, (size_t)c->capacity * sizeof *c->request);
            if (!c->message || !c->request) die("out of host memory for messages|free memory");
        }
        size_t part = bytes < comm_message_bytes ? bytes : comm_message_bytes;
        Message *m = &c->message[c->n_messages];
        m->peer = peer;
        m->receive = receive;
        m->done = 0;
        m->bytes = part;
        MPI_Request *request = &c->request[c->n_messages++];
        int tag = (int)(c->record.call % TAGS);
        mpi_check(receive ? MPI_Irecv(p, (int)part, MPI_BYTE, peer, tag, g->mpi, request)
                          : MPI_Isend(p, (int)part, MPI_BYTE, peer, tag, g->mpi, request),
                  "posting a message");
        c->pending++;
        p = (char *)p + part;
        bytes -= part;
    } while (bytes);
}

// Distance 1..n-1 from this rank to the peer of turn i, so that no rank is everybody's first; a
// group of one (--force-comm) is its own peer.
static int first_turn(const Comm *g) { return g->n == 1 ? 0 : 1; }
static int receive_peer(const Comm *g, int turn) { return (g->rank - turn + g->n) % g->n; }
static int send_peer(const Comm *g, int turn) { return (g->rank + turn) % g->n; }

size_t call_piece(const Call *c, int j, size_t *length) {
    size_t begin = (size_t)j * c->count;
    *length = c->count;
    if (c->record.kind == COMM_ALL_REDUCE) {
        size_t total = c->dst_bytes / c->width;
        if (begin > total) begin = total;
        if (*length > total - begin) *length = total - begin;
    }
    return begin;
}

// Elements of a piece that a round of REDUCE sums: what the staging area holds of one rank, of n
// - 1.
static size_t round_elements(const Call *c) {
    return c->g->stage_bytes / ((size_t)(c->g->n > 1 ? c->g->n - 1 : 1) * c->width);
}

static char *stage_of(const Call *c, int peer) {
    const Comm *g = c->g;
    return g->stage + (size_t)(peer > g->rank ? peer - 1 : peer) * round_elements(c) * c->width;
}

// The elements of piece j in the current round.
static size_t round_piece(const Call *c, int j, size_t *length) {
    size_t most = round_elements(c), skip = c->round * most, begin = call_piece(c, j, length);
    if (skip > *length) skip = *length;
    *length -= skip;
    if (*length > most) *length = most;
    return begin + skip;
}

static void post_records(Call *c) {
    Comm *g = c->g;
    CallRecord *r = (CallRecord *)room(&c->records_room,
                                       2 * (size_t)g->n * sizeof *r); // to, then from each rank
    for (int j = 0; j < g->n; j++) {
        r[j] = c->record;
        if (c->rows) {
            r[j].sends = c->rows[j];
            r[j].expects = c->rows[g->n + j];
        }
    }
    for (int t = first_turn(g); t < g->n; t++)
        post(c, 1, receive_peer(g, t), r + g->n + receive_peer(g, t), sizeof *r);
    for (int t = first_turn(g); t < g->n; t++)
        post(c, 0, send_peer(g, t), r + send_peer(g, t), sizeof *r);
}

static void post_exchange(Call *c) {
    Comm *g = c->g;
    if (c->record.kind == COMM_BROADCAST) {
        if (c->root != g->rank) {
            post(c, 1, c->root, c->dst, c->dst_bytes);
            return;
        }
        for (int t = first_turn(g); t < g->n && g->n > 1; t++)
            post(c, 0, send_peer(g, t), c->dst, c->dst_bytes);
        return;
    }
    size_t to = 0, from = 0; // offsets of a rank's rows: found by walking the ranks in order
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
    for (int t = first_turn(g); t < g->n; t++)
        post(c, 1, receive_peer(g, t), stage_of(c, receive_peer(g, t)), length * c->width);
    for (int t = first_turn(g); t < g->n; t++) {
        size_t begin = round_piece(c, send_peer(g, t), &length);
        // A group of one sends its own contribution, which an in-place destination may have moved.
        post(c, 0, send_peer(g, t),
             g->n == 1 ? c->own + begin * c->width : (char *)c->src + begin * c->width,
             length * c->width);
    }
}

static void post_gather(Call *c) {
    Comm *g = c->g;
    size_t length, mine, begin = call_piece(c, g->rank, &mine);
    if (g->n == 1 && c->own == c->dst) return; // in place: it would send a buffer into itself
    for (int t = first_turn(g); t < g->n; t++) {
        size_t at = call_piece(c, receive_peer(g, t), &length);
        post(c, 1, receive_peer(g, t), c->dst + at * c->width, length * c->width);
    }
    const char *from = c->record.kind == COMM_ALL_REDUCE ? c->dst + begin * c->width : c->own;
    for (int t = first_turn(g); t < g->n; t++)
        post(c, 0, send_peer(g, t), (void *)from, mine * c->width);
}

static void post_phase(Call *c) {
    c->n_messages = 0;
    switch (c->phase) {
    case RECORDS: post_records(c); break;
    case EXCHANGE: post_exchange(c); break;
    case REDUCE: post_reduce(c); break;
    case GATHER: post_gather(c); break;
    case FINISHED: break;
    }
}

// ---- phases ---------------------------------------------------------------------------------
static Phase first_phase(const Call *c) {
    switch (c->record.kind) {
    case COMM_REDUCE_SCATTER:
    case COMM_ALL_REDUCE: return REDUCE;
    case COMM_ALL_GATHER:
    case COMM_HOST_GATHER: return GATHER;
    case COMM_STEP_END: return FINISHED; // its records say it all
    default: return EXCHANGE;
    }
}

static void compare_records(const Call *c) {
    const Comm *g = c->g;
    const CallRecord *r = (const CallRecord *)(void *)c->records_room.p; // to, then from each rank
    for (int j = 0; j < g->n; j++)
        if (j != g->rank || g->n == 1)
            records_compare(g->name, mpi_world_rank, g->world[j], &r[j], &r[g->n + j]);
}

// All parts of this round are here: their sum, in rank order, is this rank's piece.
static void sum_round(Call *c) {
    Comm *g = c->g;
    size_t length, at = round_piece(c, g->rank, &length),
                   begin = call_piece(c, g->rank, &(size_t){ 0 });
    for (int j = 0; j < g->n; j++)
        g->part[j] = j == g->rank && g->n > 1 ? c->own + (at - begin) * c->width : stage_of(c, j);
    char *out = c->record.kind == COMM_ALL_REDUCE ? c->dst + at * c->width
                                                  : c->dst + (at - begin) * c->width;
    sum_parts(out, g->part, g->n, length, (Dtype)c->record.type, c->accumulate);
}

static Phase next_phase(Call *c) {
    switch (c->phase) {
    case RECORDS: compare_records(c); return first_phase(c);
    case REDUCE:
        sum_round(c);
        if (++c->round * round_elements(c) < c->count) return REDUCE;
        c->g->stage_owner = -1;
        return c->record.kind == COMM_ALL_REDUCE ? GATHER : FINISHED;
    default: return FINISHED;
    }
}

// Posts phases until one has messages on their way.
static void enter_phase(Call *c, Phase phase) {
    for (c->phase = phase, post_phase(c); c->pending == 0 && c->phase != FINISHED; post_phase(c))
        c->phase = next_phase(c);
    if (c->phase != FINISHED) return;
    int slot = (int)(c - calls), k = 0;
    for (int i = 0; i < n_active; i++)
        if (active[i] != slot) active[k++] = active[i];
    n_active = k;
}

// ---- progress -------------------------------------------------------------------------------
static void wrong_length(const Call *c, const Message *m, int longer, int bytes) {
    char text[256];
    call_text(&c->record, c->g->name, text, sizeof text);
    static const char *const hint =
        "all ranks must issue the same calls in the same order, with sizes that agree (I2)";
    if (longer)
        die("ranks disagree: %s: rank %d expects %zu bytes from rank %d, which sends more|%s", text,
            mpi_world_rank, m->bytes, c->g->world[m->peer], hint);
    die("ranks disagree: %s: rank %d expects %zu bytes from rank %d, which sends %d|%s", text,
        mpi_world_rank, m->bytes, c->g->world[m->peer], bytes, hint);
}

// Completes what MPI has completed, of every call in flight; 1 if anything has.
static int progress(void) {
    int any = 0;
    for (int i = 0; i < n_active; i++) {
        Call *c = &calls[active[i]];
        int n;
        if (done_capacity < c->n_messages) {
            done_capacity = c->capacity;
            free(done_index);
            free(done_status);
            done_index = (int *)xmalloc((size_t)done_capacity * sizeof *done_index, "messages");
            done_status =
                (MPI_Status *)xmalloc((size_t)done_capacity * sizeof *done_status, "messages");
        }
        int error = MPI_Testsome(c->n_messages, c->request, &n, done_index, done_status);
        if (error != MPI_SUCCESS && error != MPI_ERR_IN_STATUS)
            mpi_check(error, "testing messages");
        if (n == MPI_UNDEFINED || n == 0) continue;
        any = 1;
        watch_lock(); // the watchdog may be reading messages and phases
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
            if (n_active < before) i--; // its place holds the next call now
        }
        watch_unlock();
    }
    return any;
}

// Nothing has happened `idle` times in a row: give way, more and more. With a core to itself a rank
// first looks for about 50 us, then offers the core for a millisecond.
static void give_way(int idle) {
    if (!mpi_oversubscribed && idle < 200) return;
    if (idle < (mpi_oversubscribed ? 50 : 1000)) {
        sched_yield();
        return;
    }
    struct timespec nap = { 0, idle < 20000 ? 50000 : 500000 };
    nanosleep(&nap, 0);
}

// Watchdog: "step 3, layer 2 backward: call 17 in group ep, ...: no answer from ranks 3, 5, of
// which 5 waits for nobody (busy, stopped or gone)".
static void report_call(const void *context, char *text, size_t size) {
    const Call *c = (const Call *)context;
    const Comm *g = c->g;
    char what[256], who[512] = "", idle[512] = "";
    size_t n = 0, n_idle = 0;
    call_text(&c->record, g->name, what, sizeof what);
    int receives = 0, last = -1; // what has not come matters more than what was not taken
    for (int i = 0; i < c->n_messages; i++)
        receives |= c->message[i].receive && !c->message[i].done;
    for (int i = 0; i < c->n_messages && n + 16 < sizeof who; i++) {
        const Message *m = &c->message[i];
        if (m->done || m->receive != receives || m->peer == last)
            continue; // a long message comes in pieces
        last = m->peer;
        n += (size_t)snprintf(who + n, sizeof who - n, "%s %d", n ? "," : "", g->world[m->peer]);
        if (mpi_is_waiting(g->world[m->peer]) == 0)
            n_idle += (size_t)snprintf(idle + n_idle, sizeof idle - n_idle, "%s %d",
                                       n_idle ? "," : "", g->world[m->peer]);
    }
    snprintf(text, size, "%s: %s rank%s%s%s%s%s", what,
             receives ? "no answer from" : "not taken by", strchr(who, ',') ? "s" : "", who,
             n_idle ? ", of which" : "", idle,
             n_idle ? " waits for nobody (busy, stopped or gone)" : "");
}

void call_finish(Call *c) { // until no message of the call is on its way
    if (c->phase == FINISHED) return;
    mpi_set_waiting(1);
    watch_enter(report_call, c);
    for (int idle = 0; c->phase != FINISHED;) {
        if (progress())
            idle = 0;
        else
            give_way(idle++);
    }
    watch_leave();
    mpi_set_waiting(0);
}

// ---- calls ----------------------------------------------------------------------------------
Call *call_new(Comm *g, int kind, Dtype type, size_t count) {
    int slot = 0;
    while (slot < MAX_CALLS && calls[slot].serial) slot++;
    if (slot == MAX_CALLS)
        die("more than %d collectives started and not waited for, group %s|a bug of the caller: comm_wait",
            MAX_CALLS, g->name);
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

Request call_launch(Call *c) {
    Comm *g = c->g;
    Phase first = first_phase(c);
    if (first == REDUCE) {
        if (g->stage_owner >= 0) call_finish(&calls[g->stage_owner]);
        if (!g->stage) { // nobody reserved (tests, set-up): once, before the first step
            g->stage_bytes =
                comm_stage_bytes > (size_t)g->n * 64 ? comm_stage_bytes : (size_t)g->n * 64;
            g->stage = (char *)xmalloc(g->stage_bytes, "communication staging");
            g->stage_malloced = 1;
        }
        g->stage_owner = (int)(c - calls);
    }
    active[n_active++] = (int)(c - calls);
    enter_phase(c, comm_options.check ? RECORDS : first);
    Request r = { c->serial * MAX_CALLS + (int)(c - calls) };
    return r;
}

Call *call_of(Request r) {
    Call *c = &calls[r.id % MAX_CALLS];
    if (c->serial != r.id / MAX_CALLS)
        die("comm_wait for a call that was waited for already|a bug of the caller");
    return c;
}

void call_free(Call *c) { c->serial = 0; }

void calls_free_memory(void) {
    for (int i = 0; i < MAX_CALLS; i++) {
        Call *c = &calls[i];
        free(c->copy_dst.p);
        free(c->copy_src.p);
        free(c->rows_room.p);
        free(c->records_room.p);
        free(c->message);
        free(c->request);
    }
    free(done_index);
    free(done_status);
}
