// comm.h above the transport that is linked (transport.h): groups, numbers and records of calls,
// traffic, the checks of CommOptions.check, groups of one, agreement on host memory, sums in rank
// order, and the watchdog. Nothing here moves a byte between ranks.
#define _POSIX_C_SOURCE 200809L
#include "transport.h"
#include "../kernels/fail.h"
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

CommOptions comm_options;
size_t comm_message_bytes = (size_t)1 << 30;
size_t comm_stage_bytes = (size_t)32 << 20;
static Comm **groups; // (n_groups) in the order of their building
static int n_groups;
static Call calls[COMM_CALLS];
static int serial;
static struct {
    int64_t step;
    int layer;
    char phase[20];
} place = { 0, -1, "set-up" };

// ---- joining and leaving --------------------------------------------------------------------
void comm_init(int *argc, char ***argv) { transport_init(argc, argv); }

void comm_start(CommOptions options) {
    comm_options = options;
    transport_start();
}

static void give_stage(Comm *g);
static void watch_stop(void);
void comm_finish(void) {
    watch_enter(watch_text, "end of the run: not all ranks have come to it");
    transport_leave();
    for (int i = 0; i < n_groups; i++) {
        Comm *g = groups[i];
        transport_group_free(g);
        give_stage(g);
        free(g->world);
        free(g->numbers);
        free(g);
    }
    free(groups);
    groups = 0;
    n_groups = 0;
    transport_finish();
    watch_leave();
    watch_stop();
}

void comm_abort(int status) { transport_abort(status); }
int comm_world_rank(void) { return transport_world().rank; }
int comm_world_size(void) { return transport_world().size; }
int comm_local_rank(void) { return transport_world().local_rank; }
int comm_local_size(void) { return transport_world().local_size; }
const char *comm_describe(void) { return transport_describe(); }

void check_alone(const char *hint) {
    static const char *const variables[] = { "OMPI_COMM_WORLD_SIZE", "PMI_SIZE",
                                             "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS" };
    for (int i = 0; i < 4; i++) {
        const char *n = getenv(variables[i]);
        if (n && atoi(n) > 1)
            die("a launcher started %s processes (%s), but this one finds no other|%s", n,
                variables[i], hint);
        // The first one set is the nearest to the program: a launcher inside a Slurm step inherits
        // the step's variables.
        if (n) return;
    }
    const char *ranks = getenv("WORLD_SIZE");
    if (ranks && atoi(ranks) > 1 && getenv("RANK"))
        die("torchrun started %s processes (WORLD_SIZE), which this program cannot join|"
            "start it with mpirun, or build it for GPUs with NCCL",
            ranks);
}

// ---- groups ---------------------------------------------------------------------------------
Comm *comm_group(const char *name, const int *world_ranks, int n) {
    int me = comm_world_rank();
    int rank = 0;
    while (rank < n && world_ranks[rank] != me) rank++;
    if (n && rank == n)
        die("group %s: rank %d is not among its %d members|a bug of the caller", name, me, n);
    Comm *g = 0;
    if (n) {
        g = (Comm *)xcalloc(1, sizeof *g, "group");
        snprintf(g->name, sizeof g->name, "%s", name);
        g->n = n;
        g->rank = rank;
        g->local = n == 1 && !(comm_options.force && transport_forces());
        g->world = (int *)xmalloc(n * sizeof *g->world, "group");
        memcpy(g->world, world_ranks, n * sizeof *g->world);
        g->numbers = xmalloc(n * sizeof(int64_t), "group");
        for (int kind = 0; kind < COMM_KINDS; kind++) {
            char *start = g->report[0][kind];
            char *wait = g->report[1][kind];
            snprintf(start, sizeof g->report[0][0], "%s (%s)", comm_kind_name(kind), name);
            snprintf(wait, sizeof g->report[0][0], "%s (%s), wait", comm_kind_name(kind), name);
        }
    }
    transport_group(g, name);
    if (!g) return 0;
    groups = (Comm **)realloc(groups, (n_groups + 1) * sizeof *groups);
    if (!groups) die("out of host memory for groups of ranks|free memory");
    return groups[n_groups++] = g;
}

int comm_rank(const Comm *g) { return g->rank; }
int comm_size(const Comm *g) { return g->n; }
int comm_is_local(const Comm *g) { return g->local && !comm_options.force; }

CommTraffic comm_traffic(Comm *g, int kind, int reset) {
    CommTraffic t = g->traffic[kind];
    if (reset) memset(&g->traffic[kind], 0, sizeof t);
    return t;
}

void comm_reserve(Comm *g, size_t bytes, Arena *arena) {
    if (g && g->local) return;
    if (!transport_stages_on_device()) return;
    // At least two rounds of 64 bytes from each of 8,192 ranks.
    size_t least = (size_t)1 << 20;
    if (bytes < least) bytes = least;
    if (bytes > comm_stage_bytes) bytes = comm_stage_bytes;
    char *p = (char *)arena_take(arena, bytes, "communication staging");
    if (!g || !p || (!g->stage_owned && bytes <= g->stage_bytes)) return;
    give_stage(g);
    g->stage = p;
    g->stage_bytes = bytes;
}

static int stage_on_gpu(void) {
    return transport_stages_on_device() && strcmp(device_backend(), "cpu") != 0;
}

// On a GPU it goes with the process: comm_finish comes after device_finish.
static void give_stage(Comm *g) {
    if (g->stage_owned && !stage_on_gpu()) free(g->stage);
    g->stage_owned = 0;
}

// For sums of a group for which nobody reserved memory (tests, set-up, staging through the host).
static void take_stage(Comm *g) {
    size_t least = (size_t)g->n * 128;
    g->stage_bytes = comm_stage_bytes > least ? comm_stage_bytes : least;
    g->stage_owned = 1;
    if (stage_on_gpu())
        g->stage = (char *)device_take(g->stage_bytes);
    else
        g->stage = (char *)xmalloc(g->stage_bytes, "communication staging");
    if (!g->stage)
        die("no device memory for the sums of group %s (%zu bytes)|use a smaller --micro-batch",
            g->name, g->stage_bytes);
}

size_t piece_of(size_t total, size_t piece, int j, size_t *length) {
    size_t begin = j * piece;
    if (begin > total) begin = total;
    *length = piece < total - begin ? piece : total - begin;
    return begin;
}

// ---- records --------------------------------------------------------------------------------
void comm_where(int64_t step, int layer, const char *phase) {
    if (step >= 0) place.step = step;
    place.layer = layer;
    snprintf(place.phase, sizeof place.phase, "%s", phase);
}

// Every call notes where this rank is; the watchdog reads it.
static Presence presence;

static void note_presence(const Comm *g, const CallRecord *r) {
    int slot = 0;
    watch_lock();
    presence.known = 1;
    presence.at = *r;
    memcpy(presence.group, g->name, sizeof presence.group);
    presence.n = g->n;
    presence.first = g->world[0];
    presence.stride = g->n > 1 ? g->world[1] - g->world[0] : 1;
    for (int i = 1; i < g->n; i++)
        if (g->world[i] != g->world[0] + i * presence.stride) presence.stride = 0;
    while (slot < PRESENCE_GROUPS - 1 && presence.entered[slot].name[0] &&
           strcmp(presence.entered[slot].name, g->name))
        slot++;
    memcpy(presence.entered[slot].name, g->name, sizeof g->name);
    presence.entered[slot].calls = r->call;
    watch_unlock();
}

Presence presence_now(void) { return presence; }

// The record of the next call of g, at the place that comm_where named.
static CallRecord call_record(Comm *g, int kind, Dtype type, size_t count) {
    CallRecord r;
    memset(&r, 0, sizeof r); // padding too: records travel as bytes
    r.call = ++g->calls;
    r.kind = kind;
    r.type = (int32_t)type;
    r.count = count;
    r.step = place.step;
    r.layer = place.layer;
    memcpy(r.phase, place.phase, sizeof r.phase);
    note_presence(g, &r);
    return r;
}

const char *comm_kind_name(int kind) {
    static const char *const names[] = { "all_gather", "reduce_scatter",  "all_reduce",
                                         "all_to_all", "host all_gather", "broadcast",
                                         "end of step" };
    return names[kind];
}

void call_text(const CallRecord *r, const char *group, char *text, size_t size) {
    static const char *const types[] = { "f32", "bf16", "f16", "f64", "i32", "i64", "bytes" };
    char layer[32] = "";
    if (r->layer >= 0) snprintf(layer, sizeof layer, "layer %d ", r->layer);
    snprintf(text, size, "step %lld, %s%s: call %lld in group %s, %s of %llu %s",
             (long long)r->step, layer, r->phase, (long long)r->call, group,
             comm_kind_name(r->kind), (unsigned long long)r->count,
             r->kind == COMM_ALL_TO_ALL ? "bytes a row" : types[r->type]);
}

// Returns 1 where two ranks mean the same call (sends and expects aside).
static int call_equal(const CallRecord *a, const CallRecord *b) {
    return a->call == b->call && a->step == b->step && a->layer == b->layer && a->kind == b->kind &&
           a->type == b->type && a->count == b->count &&
           !memcmp(a->phase, b->phase, sizeof a->phase);
}

static int64_t calls_entered(const Presence *p, const char *group) {
    for (int i = 0; i < PRESENCE_GROUPS; i++)
        if (!strcmp(p->entered[i].name, group)) return p->entered[i].calls;
    return 0;
}

// Appends to a text that may be full.
static void append(char *text, size_t size, const char *format, ...) MOE_PRINTF(3, 4);
static void append(char *text, size_t size, const char *format, ...) {
    size_t used = strlen(text);
    va_list args;
    va_start(args, format);
    vsnprintf(text + used, size - used, format, args);
    va_end(args);
}

void presence_text(const Presence *all, int ranks, int stuck, char *text, size_t size) {
    const Presence *s = &all[stuck];
    char there[256];
    char others[900] = "";
    int missing = 0;
    int entered = 0;
    call_text(&s->at, s->group, text, size);
    append(text, size, ": entered by rank");
    for (int i = 0; i < s->n && s->stride; i++) {
        int rank = s->first + i * s->stride;
        const Presence *p = rank < ranks ? &all[rank] : s;
        int here = calls_entered(p, s->group) >= s->at.call;
        int same = !here || p->at.call != s->at.call || strcmp(p->group, s->group) ||
                   call_equal(&p->at, &s->at);
        if (here && same) append(text, size, "%s %d", entered++ ? "," : "", rank);
        if (here && same) continue;
        if (missing++ == 4) append(others, sizeof others, "; and others");
        if (missing > 4) continue;
        call_text(&p->at, p->group, there, sizeof there);
        append(others, sizeof others, "%s rank %d, whose latest call is %s", missing > 1 ? ";" : "",
               rank, p->known ? there : "not known");
    }
    append(text, size, missing ? "; not by%s" : "%s: all of them, so a GPU or the network is stuck",
           others);
}

// Dies where this rank at call `mine` and world rank `other` at call `theirs` do not mean the same
// call, or not the same bytes between them.
static void compare_records(const char *group, int other, const CallRecord *mine,
                            const CallRecord *theirs) {
    char here[256], there[256];
    int rank = comm_world_rank();
    call_text(mine, group, here, sizeof here);
    if (!call_equal(mine, theirs)) {
        call_text(theirs, group, there, sizeof there);
        // The lower rank speaks first, so that all ranks report the pair in one order.
        int swap = other < rank;
        die("ranks disagree: rank %d is at %s; rank %d is at %s|all ranks must issue the same "
            "calls in the same order (I2, collectives do not depend on data)",
            swap ? other : rank, swap ? there : here, swap ? rank : other, swap ? here : there);
    }
    if (theirs->sends != mine->expects)
        die("%s: rank %d sends %llu bytes to rank %d, which expects %llu|send_rows and recv_rows "
            "of the two must agree",
            here, other, (unsigned long long)theirs->sends, rank,
            (unsigned long long)mine->expects);
    if (theirs->expects != mine->sends)
        die("%s: rank %d sends %llu bytes to rank %d, which expects %llu|send_rows and recv_rows "
            "of the two must agree",
            here, rank, (unsigned long long)mine->sends, other,
            (unsigned long long)theirs->expects);
}

// check: the ranks of the group exchange what they believe the call to be before it moves, so the
// first call where they disagree is named at once. The rows of an all_to_all differ by reader.
static void compare_calls(Comm *g, const CallRecord *mine, const int64_t *to_rows,
                          const int64_t *from_rows) {
    size_t n = g->n;
    CallRecord *sent = (CallRecord *)xmalloc(n * (n + 1) * sizeof *sent, "records of calls");
    CallRecord *all = sent + n; // every rank's records, one for each reader
    for (size_t i = 0; i < n; i++) {
        sent[i] = *mine;
        if (to_rows) sent[i].sends = (uint64_t)to_rows[i] * mine->count;
        if (from_rows) sent[i].expects = (uint64_t)from_rows[i] * mine->count;
    }
    transport_host(g, mine, all, sent, n * sizeof *sent, -1);
    for (size_t i = 0; i < n; i++)
        compare_records(g->name, g->world[i], &sent[i], &all[i * n + g->rank]);
    free(sent);
}

void comm_step_end(void) {
    if (!comm_options.check) return;
    for (int i = 0; i < n_groups; i++) {
        if (groups[i]->n < 2) continue;
        CallRecord r = call_record(groups[i], COMM_STEP_END, DTYPE_U8, 0);
        compare_calls(groups[i], &r, 0, 0);
    }
}

// ---- check: who touches a buffer while a call owns it ----------------------------------------
static uint64_t buffer_sum(const void *device, size_t bytes) {
    char *host = (char *)xmalloc(bytes + 1, "a checked buffer");
    uint64_t sum = bytes;
    uint64_t word;
    if (bytes) device_download(host, device, bytes);
    size_t i = 0;
    for (; i + 8 <= bytes; i += 8) {
        memcpy(&word, host + i, 8);
        sum = (sum ^ word) * 0x9e3779b97f4a7c15u;
    }
    for (; i < bytes; i++) sum = (sum ^ (unsigned char)host[i]) * 0x9e3779b97f4a7c15u;
    free(host);
    return sum;
}

// Lets the call work on a copy of its destination, while the program's is NaN.
static void own_buffers(Call *c) {
    char *copy = (char *)device_take(c->dst_bytes + 1);
    char *poison = (char *)xmalloc(c->dst_bytes + 1, "poison");
    if (!copy) die("no device memory for the copies of --comm-check|use a smaller --micro-batch");
    if (c->dst_bytes) {
        memset(poison, 0xff, c->dst_bytes); // NaN in every floating type
        if (c->keep) device_copy(copy, c->dst, c->dst_bytes);
        device_upload(c->dst, poison, c->dst_bytes);
    }
    free(poison);
    // What lies in the destination is now found in the copy.
    if (c->own >= c->dst && c->own < c->dst + c->dst_bytes) c->own = copy + (c->own - c->dst);
    if (!c->src_bytes) c->src = copy;
    c->user_dst = c->dst;
    c->dst = copy;
    c->sums[0] = buffer_sum(c->user_dst, c->dst_bytes);
    c->sums[1] = buffer_sum(c->src, c->src_bytes);
}

static void give_buffers_back(Call *c) {
    char text[256];
    call_text(&c->record, c->g->name, text, sizeof text);
    const char *changed = 0;
    if (buffer_sum(c->src, c->src_bytes) != c->sums[1]) changed = "source";
    if (buffer_sum(c->user_dst, c->dst_bytes) != c->sums[0]) changed = "destination";
    if (changed)
        die("%s: its %s changed between start and wait|the call owns its buffers until comm_wait",
            text, changed);
    if (c->dst_bytes) device_copy(c->user_dst, c->dst, c->dst_bytes);
    device_sync();
    device_give(c->dst, c->dst_bytes + 1);
}

// ---- start and wait -------------------------------------------------------------------------
// A call of g without its buffers, numbered; dies where too many are in flight.
static Call *call_new(Comm *g, int kind, Dtype type, size_t count, Stream stream) {
    int slot = 0;
    while (slot < COMM_CALLS && calls[slot].serial) slot++;
    if (slot == COMM_CALLS)
        die("more than %d collectives started and not waited for, group %s|a bug of the caller: "
            "comm_wait",
            COMM_CALLS, g->name);
    Call *c = &calls[slot];
    memset(c, 0, sizeof *c);
    serial = serial % (INT32_MAX / COMM_CALLS - 1) + 1;
    c->serial = serial;
    c->g = g;
    c->stream = stream;
    c->record = call_record(g, kind, type, count);
    c->width = dtype_size(type);
    c->count = count;
    return c;
}

// sent: bytes that go to other ranks.
static Request call_start(Call *c, size_t sent) {
    double since = now_seconds();
    Comm *g = c->g;
    CommTraffic *t = &g->traffic[c->record.kind];
    int slot = (int)(c - calls);
    call_begin(g->report[0][c->record.kind], c->stream, (double)sent);
    if (comm_options.check) {
        compare_calls(g, &c->record, c->to_rows, c->from_rows);
        own_buffers(c);
    }
    if (!g->stage && (c->record.kind == COMM_REDUCE_SCATTER || c->record.kind == COMM_ALL_REDUCE))
        take_stage(g);
    transport_post(c, slot);
    t->calls++;
    t->bytes += (int64_t)sent;
    t->seconds += now_seconds() - since;
    Request r = { c->serial * COMM_CALLS + slot };
    return r;
}

void comm_wait(Request r) {
    if (r.id < 0) return;
    double since = now_seconds();
    Call *c = &calls[r.id % COMM_CALLS];
    if (c->serial != r.id / COMM_CALLS)
        die("comm_wait for a call that was waited for already|a bug of the caller");
    call_begin(c->g->report[1][c->record.kind], c->stream, 0);
    transport_wait(c, (int)(c - calls));
    if (c->user_dst) give_buffers_back(c);
    c->serial = 0;
    c->g->traffic[c->record.kind].seconds += now_seconds() - since;
}

// In a group in which nothing moves: recv (bytes) = send, on COMPUTE.
static Request call_local(Comm *g, int kind, void *recv, const void *send, size_t bytes,
                          Stream stream) {
    stream_order(stream, STREAM_COMPUTE);
    if (recv != send && bytes) device_copy(recv, send, bytes);
    g->traffic[kind].calls++;
    Request nothing = { -1 };
    return nothing;
}

// recv (count) += send. Only tests ask for it: fsdp.c does not reduce where nothing moves.
static void add_local(void *recv, const void *send, size_t count, Dtype type) {
    size_t bytes = count * dtype_size(type);
    char *host = (char *)xmalloc(2 * bytes, "communication staging");
    const void *part = host + bytes;
    device_download(host, recv, bytes);
    device_download(host + bytes, send, bytes);
    sum_parts(host, &part, 1, count, type, 1);
    device_upload(recv, host, bytes);
    free(host);
}

static int overlaps(const void *a, const void *b, size_t b_bytes) {
    return (const char *)a >= (const char *)b && (const char *)a < (const char *)b + b_bytes;
}

Request all_gather_start(Comm *g, void *recv, const void *send, size_t count, Dtype type,
                         Stream stream) {
    size_t bytes = count * dtype_size(type);
    size_t all = g->n * bytes;
    if (g->local) return call_local(g, COMM_ALL_GATHER, recv, send, bytes, stream);
    Call *c = call_new(g, COMM_ALL_GATHER, type, count, stream);
    c->keep = overlaps(send, recv, all);
    c->dst = (char *)recv;
    c->dst_bytes = all;
    c->src = c->own = (const char *)send;
    c->src_bytes = c->keep ? 0 : bytes;
    return call_start(c, all - bytes);
}

Request reduce_scatter_start(Comm *g, void *recv, const void *send, size_t count, Dtype type,
                             int accumulate, Stream stream) {
    size_t bytes = count * dtype_size(type);
    size_t all = g->n * bytes;
    if (g->local && accumulate && bytes) {
        add_local(recv, send, count, type);
        send = recv;
    }
    if (g->local) return call_local(g, COMM_REDUCE_SCATTER, recv, send, bytes, stream);
    Call *c = call_new(g, COMM_REDUCE_SCATTER, type, count, stream);
    int in_place = overlaps(recv, send, all);
    c->keep = in_place || accumulate;
    c->accumulate = accumulate;
    c->dst = (char *)recv;
    c->dst_bytes = bytes;
    c->src = (const char *)send;
    c->src_bytes = all;
    c->own = in_place ? c->dst : c->src + g->rank * bytes;
    return call_start(c, all - bytes);
}

Request all_reduce_start(Comm *g, void *buffer, size_t count, Dtype type, Stream stream) {
    if (g->local) return call_local(g, COMM_ALL_REDUCE, buffer, buffer, 0, stream);
    Call *c = call_new(g, COMM_ALL_REDUCE, type, count, stream);
    size_t n = g->n;
    size_t mine;
    c->keep = 1;
    c->dst = (char *)buffer;
    c->dst_bytes = count * c->width;
    c->src = c->dst;
    c->own = c->dst + piece_of(count, (count + n - 1) / n, g->rank, &mine) * c->width;
    // The others' pieces of this rank go out, then its own sum to each of them.
    return call_start(c, (count - mine + (n - 1) * mine) * c->width);
}

Request all_to_all_start(Comm *g, void *recv, const int64_t *recv_rows, const void *send,
                         const int64_t *send_rows, size_t row_bytes, Stream stream) {
    int64_t from = 0;
    int64_t to = 0;
    for (int j = 0; j < g->n; j++) {
        if (send_rows[j] < 0 || recv_rows[j] < 0)
            die("all_to_all in group %s: negative number of rows|a bug of the caller", g->name);
        to += send_rows[j];
        from += recv_rows[j];
    }
    if (send_rows[g->rank] != recv_rows[g->rank])
        die("all_to_all in group %s: rank %d sends itself %lld rows and expects %lld|a bug of the "
            "caller",
            g->name, comm_world_rank(), (long long)send_rows[g->rank],
            (long long)recv_rows[g->rank]);
    if (g->local) return call_local(g, COMM_ALL_TO_ALL, recv, send, to * row_bytes, stream);
    Call *c = call_new(g, COMM_ALL_TO_ALL, DTYPE_U8, row_bytes, stream);
    c->dst = (char *)recv;
    c->dst_bytes = from * row_bytes;
    c->src = (const char *)send;
    c->src_bytes = to * row_bytes;
    c->to_rows = send_rows;
    c->from_rows = recv_rows;
    return call_start(c, (to - send_rows[g->rank]) * row_bytes);
}

// ---- agreement ------------------------------------------------------------------------------
static void host_call(Comm *g, int kind, void *recv, const void *send, size_t bytes, int root) {
    if (g->n == 1) return;
    CallRecord r = call_record(g, kind, DTYPE_U8, bytes);
    if (comm_options.check) compare_calls(g, &r, 0, 0);
    transport_host(g, &r, recv, send, bytes, root);
}

void comm_broadcast(Comm *g, void *host, size_t bytes, int root) {
    host_call(g, COMM_BROADCAST, host, host, bytes, root);
}

void comm_all_gather_host(Comm *g, void *recv, const void *send, size_t bytes) {
    char *mine = (char *)recv + g->rank * bytes;
    if (mine != send && bytes) memmove(mine, send, bytes);
    host_call(g, COMM_HOST_GATHER, recv, mine, bytes, -1);
}

void comm_barrier(Comm *g) {
    char *flags = (char *)g->numbers;
    comm_all_gather_host(g, flags, flags + g->rank, 1);
}

int64_t comm_max(Comm *g, int64_t value) {
    int64_t *numbers = (int64_t *)g->numbers;
    comm_all_gather_host(g, numbers, &value, sizeof value);
    for (int j = 0; j < g->n; j++)
        if (numbers[j] > value) value = numbers[j];
    return value;
}

double comm_sum(Comm *g, double value) {
    double *numbers = (double *)g->numbers;
    comm_all_gather_host(g, numbers, &value, sizeof value);
    double sum = numbers[0];
    for (int j = 1; j < g->n; j++) sum += numbers[j];
    return sum;
}

// ---- sums in rank order ---------------------------------------------------------------------
// One function for each type in which sums are made. A block of elements at a time: the inner loops
// run over elements, so they vectorise, while each element still takes the parts in rank order.
enum { SUM_BLOCK = 1024 };

static inline float float_at(const void *p, int64_t i, Dtype type) {
    return type == DTYPE_BF16 ? bf16_to_float(((const uint16_t *)p)[i]) : ((const float *)p)[i];
}

static void sum_floats(void *out, const void *const *part, int n, int64_t at, int64_t length,
                       Dtype type, int add) {
    float sum[SUM_BLOCK];
    for (int64_t i = 0; i < length; i++) sum[i] = float_at(part[0], at + i, type);
    for (int r = 1; r < n; r++)
        for (int64_t i = 0; i < length; i++) sum[i] += float_at(part[r], at + i, type);
    if (add)
        for (int64_t i = 0; i < length; i++) sum[i] = float_at(out, at + i, type) + sum[i];
    if (type == DTYPE_BF16)
        for (int64_t i = 0; i < length; i++) ((uint16_t *)out)[at + i] = float_to_bf16(sum[i]);
    else
        memcpy((float *)out + at, sum, length * sizeof *sum);
}

static void sum_doubles(double *out, const double *const *part, int n, int64_t at, int64_t length,
                        int add) {
    double sum[SUM_BLOCK];
    for (int64_t i = 0; i < length; i++) sum[i] = part[0][at + i];
    for (int r = 1; r < n; r++)
        for (int64_t i = 0; i < length; i++) sum[i] += part[r][at + i];
    if (add)
        for (int64_t i = 0; i < length; i++) sum[i] = out[at + i] + sum[i];
    memcpy(out + at, sum, length * sizeof *sum);
}

// Unsigned, so that a sum that overflows wraps as the GPU's does.
static inline uint64_t integer_at(const void *p, int64_t i, Dtype type) {
    return type == DTYPE_I32 ? ((const uint32_t *)p)[i] : ((const uint64_t *)p)[i];
}

static void sum_integers(void *out, const void *const *part, int n, int64_t at, int64_t length,
                         Dtype type, int add) {
    for (int64_t i = at; i < at + length; i++) {
        uint64_t sum = add ? integer_at(out, i, type) : 0;
        for (int r = 0; r < n; r++) sum += integer_at(part[r], i, type);
        if (type == DTYPE_I32)
            ((uint32_t *)out)[i] = (uint32_t)sum;
        else
            ((uint64_t *)out)[i] = sum;
    }
}

void sum_parts(void *out, const void *const *part, int n, size_t count, Dtype type, int add) {
    int64_t blocks = ((int64_t)count + SUM_BLOCK - 1) / SUM_BLOCK;
    if (type == DTYPE_F16 || type == DTYPE_U8)
        die("no sums over ranks for element type %d|use f32, f64, bf16, i32 or i64", (int)type);
#ifdef _OPENMP
#pragma omp parallel for schedule(static) if (blocks > 64)
#endif
    for (int64_t b = 0; b < blocks; b++) {
        int64_t at = b * SUM_BLOCK;
        int64_t left = (int64_t)count - at;
        int64_t length = left < SUM_BLOCK ? left : SUM_BLOCK;
        if (type == DTYPE_F32 || type == DTYPE_BF16)
            sum_floats(out, part, n, at, length, type, add);
        else if (type == DTYPE_F64)
            sum_doubles((double *)out, (const double *const *)part, n, at, length, add);
        else
            sum_integers(out, part, n, at, length, type, add);
    }
}

// ---- the watchdog ---------------------------------------------------------------------------
// One thread a rank. It sleeps until the running wait is older than the time limit, reports, and
// ends the run.
static struct {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int running, stop, may_abort;
    WatchReport *report; // of the wait in progress, 0 = none
    const void *context;
    double since;
    int (*poll)(char *text, size_t size);
} watch = { .lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER };

void watch_lock(void) { pthread_mutex_lock(&watch.lock); }
void watch_unlock(void) { pthread_mutex_unlock(&watch.lock); }

void watch_text(const void *context, char *text, size_t size) {
    snprintf(text, size, "%s", (const char *)context);
}

// Should the transport be stuck too, the signal ends this process and the launcher the others.
static void end_run(const char *text) {
    die_claim();
    fflush(stdout);
    if (text) fprintf(stderr, "error: rank %d%s\n", comm_world_rank(), text);
    fflush(stderr);
    alarm(5);
    if (watch.may_abort) transport_abort(1);
    _exit(1);
}

static void end_waiting(double waited) {
    char who[2048] = "";
    char text[2400];
    watch.report(watch.context, who, sizeof who);
    snprintf(text, sizeof text,
             " waited %.1f s (--timeout %g): %s  hint: see whether the ranks named still run; a "
             "slow one needs a larger --timeout",
             waited, comm_options.timeout, who);
    end_run(text);
}

// Should the driver hold this thread too, the signal ends the process.
static void poll_transport(double limit) {
    char text[2048] = ": ";
    alarm((unsigned)(limit < 1e6 ? limit : 1e6) + 60);
    if (watch.poll(text + 2, sizeof text - 2)) end_run(text[2] ? text : 0);
    alarm(0);
}

// Sleeps on the condition for at most `seconds`.
static void sleep_locked(double seconds) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    int64_t ns = until.tv_nsec + (int64_t)(seconds * 1e9);
    until.tv_sec += (time_t)(ns / 1000000000);
    until.tv_nsec = (long)(ns % 1000000000);
    pthread_cond_timedwait(&watch.changed, &watch.lock, &until);
}

static void *watch_loop(void *unused) {
    (void)unused;
    // Ranks that wait for the same one run out of time together: each gives the lower ones a
    // moment, so that usually one report appears.
    int rank = comm_world_rank();
    double limit = comm_options.timeout;
    double patience = 0.15 * (rank < 10 ? rank : 10);
    pthread_mutex_lock(&watch.lock);
    while (!watch.stop) {
        double left = limit; // a wait that begins now cannot be over before `limit`
        if (watch.report) {
            double waited = now_seconds() - watch.since;
            left = limit + patience - waited;
            if (left < 0) end_waiting(waited);
        }
        if (watch.poll) {
            poll_transport(limit);
            if (left > 0.5) left = 0.5;
        }
        sleep_locked(left < 0.02 ? 0.02 : left);
    }
    pthread_mutex_unlock(&watch.lock);
    return 0;
}

void watch_start(int may_abort) {
    if (comm_options.timeout <= 0 || watch.running) return;
    watch.may_abort = may_abort;
    // Signals (save and go on, save and stop) belong to the main thread.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    if (pthread_create(&watch.thread, 0, watch_loop, 0))
        die("cannot start the watchdog's thread|raise the limit on processes (ulimit -u)");
    pthread_sigmask(SIG_SETMASK, &before, 0);
    watch.running = 1;
}

static void watch_stop(void) {
    if (!watch.running) return;
    watch_lock();
    watch.stop = 1;
    pthread_cond_signal(&watch.changed);
    watch_unlock();
    pthread_join(watch.thread, 0);
    watch.running = 0;
    watch.stop = 0;
}

void watch_poll(int (*poll)(char *text, size_t size)) {
    watch_lock();
    watch.poll = poll;
    pthread_cond_signal(&watch.changed);
    watch_unlock();
}

void watch_enter(WatchReport *report, const void *context) {
    watch_lock();
    watch.since = now_seconds();
    watch.context = context;
    watch.report = report;
    watch_unlock();
}

void watch_leave(void) { watch_enter(0, 0); }
