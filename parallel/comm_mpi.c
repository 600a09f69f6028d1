// comm.h over MPI: joining, groups, starting and waiting. How a call moves is in comm_mpi_call.c,
// the picture of both in comm_mpi.h.
//
// The transport works on host memory. Where the device has its own, or `check` wants destinations
// poisoned, a call works on private copies that comm_wait writes back.
#define _GNU_SOURCE
#include "comm_mpi.h"
#include "../kernels/fail.h"
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int mpi_world_rank, mpi_oversubscribed;
static int world_size, local_rank, local_size, thread_level, on_device;
static Comm **groups; // (n_groups) in the order of their building
static int n_groups;
static MPI_Win board_window = MPI_WIN_NULL;
static volatile int *board; // (local_size + 1) 1: that rank waits; last: 1 + the rank that speaks
                            // for all when the run ends. 0 where there is no shared memory
static int *board_place;    // (world_size) place on the board, MPI_UNDEFINED = another machine

// ---- joining and leaving --------------------------------------------------------------------
void comm_abort(int status) {
    if (world_size == 1)
        _exit(status ? status : 1); // nobody else to end, and MPI_Abort would print ten lines
                                    // behind the one that matters
    // MPI_Abort may itself be stuck when the network is: the signal then ends this process, and the
    // launcher the others.
    signal(SIGALRM, SIG_DFL);
    alarm(5);
    MPI_Abort(MPI_COMM_WORLD, status);
    _exit(status ? status : 1);
}

static void abort_all(void) { comm_abort(1); }

static void build_board(MPI_Comm here) {
    int *mine, unit;
    MPI_Aint bytes;
    MPI_Comm_set_errhandler(here, MPI_ERRORS_RETURN);
    int last = local_rank + 1 == local_size;
    if (MPI_Win_allocate_shared((MPI_Aint)sizeof *mine * (1 + last), sizeof *mine, MPI_INFO_NULL,
                                here, &mine, &board_window) != MPI_SUCCESS)
        return; // reports then say less
    mine[0] = mine[last] = 0;
    MPI_Barrier(here);
    int *first;
    MPI_Win_shared_query(board_window, 0, &bytes, &unit,
                         &first); // the ranks' pieces lie behind one another
    board = first;
    int *ranks = (int *)xmalloc((size_t)world_size * sizeof *ranks, "ranks of this machine");
    board_place = (int *)xmalloc((size_t)world_size * sizeof *board_place, "ranks of this machine");
    for (int i = 0; i < world_size; i++) ranks[i] = i;
    MPI_Group all, local;
    MPI_Comm_group(MPI_COMM_WORLD, &all);
    MPI_Comm_group(here, &local);
    MPI_Group_translate_ranks(all, world_size, ranks, local, board_place);
    MPI_Group_free(&all);
    MPI_Group_free(&local);
    free(ranks);
}

static int claim_last_words(void) {
    return !board || __sync_bool_compare_and_swap(&board[local_size], 0, 1 + mpi_world_rank) ||
           board[local_size] == 1 + mpi_world_rank;
}

void mpi_set_waiting(int waiting) {
    if (board) board[local_rank] = waiting;
}
int mpi_is_waiting(int world_rank) {
    return board && board_place[world_rank] != MPI_UNDEFINED ? board[board_place[world_rank]] : -1;
}

void comm_init(int *argc, char ***argv) {
    // More ranks than cores: MPI's own blocking calls must give the core away. Before MPI_Init only
    // the launcher's variable tells.
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    const char *ranks_here = getenv("OMPI_COMM_WORLD_LOCAL_SIZE");
    if (ranks_here && atol(ranks_here) > cores) setenv("OMPI_MCA_mpi_yield_when_idle", "1", 0);
    // Started without a launcher: Open MPI would first start a daemon of its own, for ranks that
    // are never spawned.
    if (!ranks_here && !getenv("PMIX_RANK") && !getenv("PMI_RANK") && !getenv("SLURM_PROCID"))
        setenv("OMPI_MCA_ess_singleton_isolated", "1", 0);
    mpi_check(MPI_Init_thread(argc, argv, MPI_THREAD_MULTIPLE, &thread_level), "MPI_Init");
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    MPI_Comm_rank(MPI_COMM_WORLD, &mpi_world_rank);
    MPI_Comm_size(MPI_COMM_WORLD, &world_size);
    die_set(mpi_world_rank, abort_all);
    MPI_Comm here;
    mpi_check(MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, mpi_world_rank,
                                  MPI_INFO_NULL, &here),
              "ranks of this machine");
    MPI_Comm_rank(here, &local_rank);
    MPI_Comm_size(here, &local_size);
    build_board(here);
    die_claim_set(claim_last_words);
    MPI_Comm_free(&here);
    mpi_oversubscribed = local_size > cores;
}

void comm_start(CommOptions options) {
    comm_options = options;
    if (comm_world_size() == 1)
        check_alone(
            "use the mpirun of the MPI it was built with; under Slurm: srun --mpi=list shows what fits");
    on_device = strcmp(device_backend(), "cpu") != 0;
    watch_start(mpi_world_rank, thread_level >= MPI_THREAD_MULTIPLE, comm_abort);
}

static void report_text(const void *context, char *text, size_t size) {
    snprintf(text, size, "%s", (const char *)context);
}

void comm_finish(void) {
    watch_enter(report_text, "end of the run, MPI_Finalize");
    mpi_check(MPI_Barrier(MPI_COMM_WORLD), "end of the run");
    for (int i = 0; i < n_groups; i++) {
        Comm *g = groups[i];
        MPI_Comm_free(&g->mpi);
        if (g->stage_malloced) free(g->stage);
        free(g->world);
        free(g->part);
        free(g->numbers);
        free(g);
    }
    free(groups);
    calls_free_memory();
    if (board) MPI_Win_free(&board_window);
    board = 0;
    free(board_place);
    MPI_Finalize();
    watch_leave();
    watch_stop();
}

int comm_world_rank(void) { return mpi_world_rank; }
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

// ---- groups ---------------------------------------------------------------------------------
Comm *comm_group(const char *name, const int *world_ranks, int n) {
    MPI_Comm mpi;
    char text[96];
    snprintf(text, sizeof text, "building group %s, MPI_Comm_split", name);
    watch_enter(report_text, text);
    mpi_check(
        MPI_Comm_split(MPI_COMM_WORLD, n ? world_ranks[0] : MPI_UNDEFINED, mpi_world_rank, &mpi),
        text);
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
    if (size != n || world_ranks[g->rank] != mpi_world_rank)
        die("group %s: rank %d names %d members, MPI found %d|a bug of the caller: groups of one call must not overlap, ranks ascend",
            name, mpi_world_rank, n, size);
    MPI_Comm_set_errhandler(mpi, MPI_ERRORS_RETURN);
    return groups[n_groups++] = g;
}

int comm_rank(const Comm *g) { return g->rank; }
int comm_size(const Comm *g) { return g->n; }
int comm_is_local(const Comm *g) { return g->local; }

void comm_reserve(Comm *g, size_t bytes, Arena *arena) {
    if (g && g->local) return;
    bytes = stage_size(bytes);
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

// ---- start and wait -------------------------------------------------------------------------
// A sum over the bytes of a buffer in flight: `check` compares it at start and wait.
static uint64_t buffer_sum(const char *p, size_t bytes) {
    uint64_t sum = bytes, word;
    size_t i = 0;
    for (; i + 8 <= bytes; i += 8) {
        memcpy(&word, p + i, 8);
        sum = (sum ^ word) * 0x9e3779b97f4a7c15u;
    }
    for (; i < bytes; i++) sum = (sum ^ (unsigned char)p[i]) * 0x9e3779b97f4a7c15u;
    return sum;
}

static int is_staged(void) { return on_device || comm_options.check; }

// Gives the call its buffers: the program's, or private copies of them. keep: dst holds something
// that the call reads (in place, accumulate).
static void take_buffers(Call *c, void *dst, size_t dst_bytes, const void *src, size_t src_bytes,
                         int keep, Stream stream) {
    c->dst = c->user_dst = (char *)dst;
    c->src = c->user_src = (const char *)src;
    c->dst_bytes = dst_bytes;
    c->src_bytes = src_bytes;
    if (!is_staged()) return;
    c->dst = room(&c->copy_dst, dst_bytes);
    if (on_device) {
        stream_order(stream, STREAM_COMPUTE); // device_download waits for COMPUTE
        if (src_bytes) device_download(room(&c->copy_src, src_bytes), src, src_bytes);
        c->src = c->copy_src.p;
        if (keep && dst_bytes) device_download(c->dst, dst, dst_bytes);
        if (comm_options.check) device_poison(dst, dst_bytes);
        return;
    }
    if (keep && dst_bytes) memcpy(c->dst, dst, dst_bytes);
    if (dst_bytes) memset(dst, 0xff, dst_bytes); // NaN in every floating type
    c->dst_sum = buffer_sum(c->user_dst, dst_bytes);
    c->src_sum = buffer_sum(c->user_src, src_bytes);
}

static Request launch(Call *c, double since) {
    Request r = call_launch(c);
    if (c->record.kind < COMM_KINDS) c->g->traffic[c->record.kind].seconds += now_seconds() - since;
    return r;
}

static void count_traffic(Call *c, size_t bytes) {
    c->g->traffic[c->record.kind].calls++;
    c->g->traffic[c->record.kind].bytes += (int64_t)bytes;
}

static int overlaps(const void *a, const void *b, size_t b_bytes) {
    return (const char *)a >= (const char *)b && (const char *)a < (const char *)b + b_bytes;
}

static Request nothing(Comm *g, int kind) {
    g->traffic[kind].calls++;
    Request r = { -1 };
    return r;
}

Request all_gather_start(Comm *g, void *recv, const void *send, size_t count, Dtype type,
                         Stream stream) {
    if (g->local) {
        stream_order(stream, STREAM_COMPUTE);
        local_all_gather(recv, send, count, type);
        return nothing(g, COMM_ALL_GATHER);
    }
    double since = now_seconds();
    Call *c = call_new(g, COMM_ALL_GATHER, type, count);
    size_t bytes = count * c->width, all = (size_t)g->n * bytes;
    int in_place = overlaps(send, recv, all);
    take_buffers(c, recv, all, send, in_place ? 0 : bytes, in_place, stream);
    char *mine = c->dst + (size_t)g->rank * bytes;
    c->own = in_place ? mine : (char *)c->src;
    if (!in_place && g->n > 1 && bytes) memcpy(mine, c->src, bytes);
    count_traffic(c, (size_t)(g->n - 1) * bytes);
    return launch(c, since);
}

Request reduce_scatter_start(Comm *g, void *recv, const void *send, size_t count, Dtype type,
                             int accumulate, Stream stream) {
    if (g->local) {
        stream_order(stream, STREAM_COMPUTE);
        local_reduce_scatter(recv, send, count, type, accumulate);
        return nothing(g, COMM_REDUCE_SCATTER);
    }
    double since = now_seconds();
    Call *c = call_new(g, COMM_REDUCE_SCATTER, type, count);
    size_t bytes = count * c->width, all = (size_t)g->n * bytes;
    int in_place = overlaps(recv, send, all);
    take_buffers(c, recv, bytes, send, all, in_place || accumulate, stream);
    c->own = in_place ? c->dst : (char *)c->src + (size_t)g->rank * bytes;
    c->accumulate = accumulate;
    count_traffic(c, (size_t)(g->n - 1) * bytes);
    return launch(c, since);
}

Request all_reduce_start(Comm *g, void *buffer, size_t count, Dtype type, Stream stream) {
    if (g->local) {
        stream_order(stream, STREAM_COMPUTE);
        return nothing(g, COMM_ALL_REDUCE);
    }
    double since = now_seconds();
    Call *c = call_new(g, COMM_ALL_REDUCE, type, count);
    c->count = (count + (size_t)g->n - 1) / (size_t)g->n;
    take_buffers(c, buffer, count * c->width, 0, 0, 1, stream);
    size_t mine, begin = call_piece(c, g->rank, &mine);
    c->src = c->dst;
    c->own = c->dst + begin * c->width;
    // The others' pieces of this rank go out, then its own sum to each of them.
    count_traffic(c, (count - mine + (size_t)(g->n - 1) * mine) * c->width);
    return launch(c, since);
}

Request all_to_all_start(Comm *g, void *recv, const int64_t *recv_rows, const void *send,
                         const int64_t *send_rows, size_t row_bytes, Stream stream) {
    if (g->local) {
        stream_order(stream, STREAM_COMPUTE);
        local_all_to_all(g->name, recv, recv_rows[0], send, send_rows[0], row_bytes);
        return nothing(g, COMM_ALL_TO_ALL);
    }
    double since = now_seconds();
    Call *c = call_new(g, COMM_ALL_TO_ALL, DTYPE_U8, row_bytes);
    size_t from = 0, to = 0, n = (size_t)g->n, me = (size_t)g->rank, my_from = 0, my_to = 0;
    c->rows = (size_t *)(void *)room(&c->rows_room, 2 * n * sizeof *c->rows);
    for (size_t j = 0; j < n; j++) {
        if (send_rows[j] < 0 || recv_rows[j] < 0)
            die("all_to_all in group %s: negative number of rows|a bug of the caller", g->name);
        c->rows[j] = (size_t)send_rows[j] * row_bytes;
        c->rows[n + j] = (size_t)recv_rows[j] * row_bytes;
        if (j < me) {
            my_to += c->rows[j];
            my_from += c->rows[n + j];
        }
        to += c->rows[j];
        from += c->rows[n + j];
    }
    if (c->rows[me] != c->rows[n + me])
        die("all_to_all in group %s: rank %d sends itself %zu bytes and expects %zu|a bug of the caller",
            g->name, mpi_world_rank, c->rows[me], c->rows[n + me]);
    take_buffers(c, recv, from, send, to, 0, stream);
    if (n > 1 && c->rows[me]) memcpy(c->dst + my_from, c->src + my_to, c->rows[me]);
    count_traffic(c, to - c->rows[me]);
    return launch(c, since);
}

static void write_back(Call *c) {
    if (!is_staged() || c->record.kind >= COMM_KINDS) return;
    if (on_device) {
        if (c->dst_bytes) device_upload(c->user_dst, c->dst, c->dst_bytes);
        return;
    }
    char text[256];
    int dst_changed = buffer_sum(c->user_dst, c->dst_bytes) != c->dst_sum,
        src_changed = buffer_sum(c->user_src, c->src_bytes) != c->src_sum;
    if (dst_changed || src_changed) {
        call_text(&c->record, c->g->name, text, sizeof text);
        die("%s: its %s changed between start and wait|the call owns its buffers until comm_wait",
            text, dst_changed ? "destination" : "source");
    }
    if (c->dst_bytes) memcpy(c->user_dst, c->dst, c->dst_bytes);
}

void comm_wait(Request r) {
    if (r.id < 0) return;
    double since = now_seconds();
    Call *c = call_of(r);
    call_finish(c);
    write_back(c);
    call_free(c);
    if (c->record.kind < COMM_KINDS) c->g->traffic[c->record.kind].seconds += now_seconds() - since;
}

// ---- blocking calls on host memory ----------------------------------------------------------
void comm_broadcast(Comm *g, void *host, size_t bytes, int root) {
    if (g->n == 1) return;
    Call *c = call_new(g, COMM_BROADCAST, DTYPE_U8, bytes);
    c->dst = (char *)host;
    c->dst_bytes = bytes;
    c->root = root;
    comm_wait(launch(c, 0));
}

static void host_call(Comm *g, int kind, void *recv, const void *send, size_t bytes) {
    Call *c = call_new(g, kind, DTYPE_U8, bytes);
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
    for (int j = 0; j < g->n; j++)
        if (g->numbers[j] > value) value = g->numbers[j];
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
    for (int i = 0; i < n_groups; i++)
        if (groups[i]->n > 1) host_call(groups[i], COMM_STEP_END, 0, 0, 0);
}
