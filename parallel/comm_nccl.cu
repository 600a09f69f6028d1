// comm.h over NCCL: one GPU a rank, device memory to device memory. Ranks meet by comm_join.h; the
// world's communicator is made from an id of rank 0, every group is split from it.
//
// Order     A call first waits for COMPUTE as it stands (stream_order), then runs on its own
// stream; comm_wait makes COMPUTE wait for its event. The host never waits. Calls of one
//           group run one after another even where they name different streams. Groups are used
//           from two streams at once, so two communicators can be at work on one GPU; that cannot
//           deadlock as long as all GPUs start their operations in one order: every rank issues the
//           same calls in the same order (I2), and NCCL_LAUNCH_ORDER_IMPLICIT (NCCL 2.26, set here)
//           makes the GPU keep the host's order of launches across communicators. With an older
//           NCCL, or that variable at 0, they run one after another. The price: in backward with ep
//           > 1 a layer's exchange starts behind the whole reduction of the layer above, which the
//           host has launched before it.
// Memory    NCCL makes the connections of a group, and their buffers on the GPU (some GiB for 8
// GPUs that all send to each other), at the group's first call. So that call is made when the
//           group is, before the arenas look at what is free.
// Sums      Piece j of a sum goes to rank j by grouped sends and receives, in rounds of what the
// staging area holds; the owner adds the parts in the order of ranks, in fp32 (F64 in
//           fp64), and rounds once. So the bits follow from the group alone, and all ranks of an
//           all-reduce hold the bits that one rank made. On the links of one machine this costs
//           what a ring costs. Between machines of G GPUs it sends up to G times a ring's bytes, so
//           there sums from NATIVE_BYTES on go through NCCL's own reduce-scatter and all-reduce
//           (never bf16, which NCCL rounds at every hop, and never accumulating ones): their order
//           is NCCL's, the same every time on the same machines with the same NCCL settings, equal
//           bits on all ranks. MOE_COMM_SUMS=rank|nccl in the environment forces one way for all of
//           them.
// Watch     The watchdog asks NCCL twice a second for asynchronous errors, looks for ranks that are
// gone, and ends the run when a call is not complete `timeout` seconds after its
//           start. Communicators are not aborted first: the end of the process stops its kernels,
//           and an abort can hang where the network does.
// check     Calls are compared across ranks before they start, work on private copies while the
// program's destination is poison, and both buffers are compared at the wait.
#include "comm_common.h"
#include "comm_join.h"
#include "../kernels/cuda/common.cuh"
#include <nccl.h>
#include <stdio.h>
#include <stdlib.h>
#if NCCL_VERSION_CODE < NCCL_VERSION(2, 18, 0)
#error "NCCL 2.18 or newer is needed (ncclCommSplit)"
#endif

enum { MAX_CALLS = 1024, NATIVE_BYTES = 1 << 20 };
enum { SUMS_AUTO, SUMS_RANK, SUMS_NCCL };

struct Comm {
    char name[24];
    int n, rank, local; // local: one rank and not --force-comm
    int across;         // its ranks are on more than one machine
    int *world;         // (n) world rank of each member
    ncclComm_t nccl;
    int64_t calls; // the program's, as records number them
    int used;
    cudaEvent_t last; // after the latest operation, on stream last_stream
    Stream last_stream;
    char *stage; // device: parts of a sum from the other ranks
    size_t stage_bytes;
    int stage_malloced; // nobody reserved it
    CommTraffic traffic[COMM_KINDS];
};

typedef struct {
    int serial, waiting;
    Comm *g;
    CallRecord record;
    cudaEvent_t done;
    double since;
    int launched;
    char *user_dst, *copy; // check: the program's destination, and the copy that the call works on
    const char *user_src;
    size_t dst_bytes, src_bytes;
    uint64_t sums[2]; // check: of destination and source while the call owns them
} Call;

static ncclComm_t world_nccl;
static Comm **groups; // (n_groups) in the order of their building
static int n_groups, sums_by = SUMS_AUTO, device = -1;
static int one_at_a_time; // no two communicators at work together: each operation waits for the
                          // latest one of any group
static Comm *latest;
static Call calls[MAX_CALLS]; // a ring; the watchdog reads it under watch_lock
static unsigned next_call, oldest_call;
static int serial;
static struct {
    char *p;
    size_t bytes;
} host_room;                           // device: of host collectives
static unsigned long long *check_sums; // device: (2)

// ---- errors ---------------------------------------------------------------------------------
static MOE_NORETURN void nccl_failed(ncclResult_t error, const char *call) {
    die("NCCL: %s in %.60s: %s|NCCL_DEBUG=INFO says more. Every rank needs a GPU of its own: for several on one GPU (tests) build with COMM=mpi",
        ncclGetErrorString(error), call, ncclGetLastError(0));
}
#define NCCL_CHECK(call)                                       \
    do {                                                       \
        ncclResult_t error_ = (call);                          \
        if (error_ != ncclSuccess) nccl_failed(error_, #call); \
    } while (0)

static void report_text(const void *context, char *text, size_t size) {
    snprintf(text, size, "%s", (const char *)context);
}

// The watchdog's look around, under watch_lock.
static int look_around(char *text, size_t size) {
    int gone = join_lost();
    if (device >= 0)
        cudaSetDevice(
            device); // or this thread's first CUDA call makes a context on GPU 0, half a GiB a rank
    if (gone >= 0) {
        snprintf(text, size, "the process of rank %d is gone  hint: its own message says why",
                 gone);
        return 1;
    }
    for (int i = 0; i < n_groups; i++) {
        ncclResult_t error = ncclSuccess;
        if (!groups[i]->nccl || ncclCommGetAsyncError(groups[i]->nccl, &error) != ncclSuccess ||
            error == ncclSuccess || error == ncclInProgress)
            continue;
        snprintf(
            text, size,
            "NCCL, group %s: %s: %s  hint: another rank or the network failed; NCCL_DEBUG=INFO says more",
            groups[i]->name, ncclGetErrorString(error), ncclGetLastError(groups[i]->nccl));
        return 1;
    }
    for (; oldest_call != next_call; oldest_call++) {
        Call *c = &calls[oldest_call % MAX_CALLS];
        double waited = now_seconds() - c->since;
        if (next_call - oldest_call > MAX_CALLS) continue; // its place holds a later call
        if (!c->launched) break;
        if (waited < comm_options.timeout) break;
        if (cudaEventQuery(c->done) != cudaErrorNotReady) continue;
        char what[256];
        call_text(&c->record, c->g->name, what, sizeof what);
        snprintf(
            text, size,
            "waited %.1f s (--timeout %g): %s: not complete on this GPU  hint: see whether the group's other ranks still run; a slow one needs a larger --timeout",
            waited, comm_options.timeout, what);
        return 1;
    }
    return 0;
}

// ---- joining and leaving --------------------------------------------------------------------
void comm_abort(int status) { join_abort(status); }

void comm_init(int *argc, char ***argv) {
    setenv("NCCL_LAUNCH_ORDER_IMPLICIT", "1", 0); // read when the first communicator is made
    comm_stage_bytes =
        (size_t)64
        << 20; // a round of 8 ranks is then some 200 us on NVLink, twenty times its start-up cost
    join_init(argc, argv);
}

void comm_start(CommOptions options) {
    comm_options = options;
    const char *sums = getenv("MOE_COMM_SUMS");
    if (sums && *sums) {
        sums_by = !strcmp(sums, "rank") ? SUMS_RANK : !strcmp(sums, "nccl") ? SUMS_NCCL : SUMS_AUTO;
        if (sums_by == SUMS_AUTO && strcmp(sums, "auto"))
            die("MOE_COMM_SUMS=%s|it is auto, rank or nccl", sums);
    }
    if (joined()->size == 1)
        check_alone(
            "MPI found no other rank: srun --mpi=list shows what fits; or torchrun, or srun --mpi=none with a build without MPI");
    join_connect(options.timeout > 0 ? options.timeout : 600);
    watch_start(joined()->rank, join_threads(), comm_abort);
    watch_poll(look_around);
}

void comm_finish(void) {
    watch_stop();
    for (int i = 0; i < n_groups; i++) {
        Comm *g = groups[i];
        if (g->nccl) NCCL_CHECK(ncclCommDestroy(g->nccl));
        if (g->stage_malloced) CUDA_CHECK(cudaFree(g->stage));
        if (g->last) CUDA_CHECK(cudaEventDestroy(g->last));
        free(g->world), free(g);
    }
    if (world_nccl) NCCL_CHECK(ncclCommDestroy(world_nccl));
    for (int i = 0; i < MAX_CALLS; i++)
        if (calls[i].done) CUDA_CHECK(cudaEventDestroy(calls[i].done));
    if (host_room.p) CUDA_CHECK(cudaFree(host_room.p));
    if (check_sums) CUDA_CHECK(cudaFree(check_sums));
    free(groups);
    groups = 0, n_groups = 0, world_nccl = 0, latest = 0, device = -1;
    join_leave();
}

int comm_world_rank(void) { return joined()->rank; }
int comm_world_size(void) { return joined()->size; }
int comm_local_rank(void) { return joined()->local_rank; }
int comm_local_size(void) { return joined()->local_size; }

const char *comm_describe(void) {
    static const char *const sums[] = { "", ", sums in rank order", ", sums by NCCL" };
    static char text[640];
    int v = 0;
    ncclGetVersion(&v);
    snprintf(text, sizeof text, "nccl %d.%d.%d, joined by %s%s", v / 10000, v / 100 % 100, v % 100,
             join_describe(), sums[sums_by]);
    return text;
}

// ---- groups ---------------------------------------------------------------------------------
static void join_world(void) {
    const Joined *j = joined();
    const char *order = getenv("NCCL_LAUNCH_ORDER_IMPLICIT");
    int version = 0, mine = -1;
    ncclUniqueId id;
    memset(&id, 0, sizeof id);
    CUDA_CHECK(cudaGetDevice(&mine));
    watch_lock(); // the watchdog reads it
    device = mine;
    watch_unlock();
    NCCL_CHECK(ncclGetVersion(&version));
    if (version < NCCL_VERSION(2, 18, 0))
        die("the NCCL found at run time has version code %d, older than 2.18|LD_LIBRARY_PATH names an old one",
            version);
    one_at_a_time = version < NCCL_VERSION(2, 26, 0) || (order && !strcmp(order, "0"));
    if (j->rank == 0) NCCL_CHECK(ncclGetUniqueId(&id));
    watch_enter(report_text, "meeting the other ranks, ncclCommInitRank");
    join_broadcast(&id, sizeof id);
    NCCL_CHECK(ncclCommInitRank(&world_nccl, j->size, id, j->rank));
    watch_leave();
}

// Device memory of calls on host memory; it grows.
static char *room(size_t bytes) {
    if (bytes > host_room.bytes) {
        if (host_room.p) CUDA_CHECK(cudaFree(host_room.p));
        host_room.bytes = bytes < 4096 ? 4096 : bytes;
        CUDA_CHECK(cudaMalloc((void **)&host_room.p, host_room.bytes));
    }
    return host_room.p;
}

// The stream on which the group's next operation runs: behind its last one.
static cudaStream_t group_stream(Comm *g, Stream stream) {
    const Comm *before = one_at_a_time ? latest : g->used ? g : 0;
    if (before && stream != before->last_stream)
        CUDA_CHECK(cudaStreamWaitEvent(device_stream(stream), before->last, 0));
    g->used = 1;
    g->last_stream = stream;
    return device_stream(stream);
}
static void group_stream_done(Comm *g) {
    CUDA_CHECK(cudaEventRecord(g->last, device_stream(g->last_stream)));
    latest = g;
}
// A byte from every member to every other, then a gather of a real size: NCCL makes the connections
// and buffers of each of its algorithms when it first uses it, and chooses by size.
static void connect_members(Comm *g) {
    char text[96];
    snprintf(text, sizeof text, "connecting the members of group %s", g->name);
    char *all = room((size_t)g->n + 1), *mine = all + g->n, *large;
    size_t part = ((size_t)32 << 20) / (size_t)g->n;
    cudaStream_t s = group_stream(g, STREAM_EXCHANGE);
    CUDA_CHECK(cudaMalloc((void **)&large, part * (size_t)g->n));
    watch_enter(report_text, text);
    CUDA_CHECK(cudaMemsetAsync(all, 0, (size_t)g->n + 1, s));
    CUDA_CHECK(cudaMemsetAsync(large, 0, part * (size_t)g->n, s));
    NCCL_CHECK(ncclAllGather(mine, all, 1, ncclUint8, g->nccl, s));
    NCCL_CHECK(ncclAllGather(large + part * (size_t)g->rank, large, part, ncclUint8, g->nccl, s));
    NCCL_CHECK(ncclGroupStart());
    for (int j = 0; j < g->n; j++) {
        NCCL_CHECK(ncclRecv(all + j, 1, ncclUint8, j, g->nccl, s));
        NCCL_CHECK(ncclSend(mine, 1, ncclUint8, j, g->nccl, s));
    }
    NCCL_CHECK(ncclGroupEnd());
    group_stream_done(g);
    CUDA_CHECK(cudaStreamSynchronize(s));
    watch_leave();
    CUDA_CHECK(cudaFree(large));
}

Comm *comm_group(const char *name, const int *world_ranks, int n) {
    const Joined *j = joined();
    ncclComm_t nccl = 0;
    char text[96];
    int rank = 0;
    while (rank < n && world_ranks[rank] != j->rank) rank++;
    if (n && rank == n)
        die("group %s: rank %d is not among its %d members|a bug of the caller", name, j->rank, n);
    if (j->size > 1 || comm_options.force) {
        if (!world_nccl) join_world();
        ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
        config.maxCTAs = COMMUNICATION_CTAS; // what device_share keeps free; NCCL_MAX_CTAS in the
                                             // environment wins
        snprintf(text, sizeof text, "building group %s, ncclCommSplit", name);
        int moves =
            n > 1 ||
            (n && comm_options
                      .force); // a group of one needs no communicator, but takes part in the split
        watch_enter(report_text, text);
        NCCL_CHECK(ncclCommSplit(world_nccl, moves ? world_ranks[0] : NCCL_SPLIT_NOCOLOR, j->rank,
                                 &nccl, &config));
        watch_leave();
    }
    if (n == 0) return 0;
    Comm *g = (Comm *)xcalloc(1, sizeof *g, "group");
    snprintf(g->name, sizeof g->name, "%s", name);
    g->n = n, g->rank = rank, g->nccl = nccl;
    g->local = n == 1 && !comm_options.force;
    g->world = (int *)xmalloc((size_t)n * sizeof *g->world, "group");
    memcpy(g->world, world_ranks, (size_t)n * sizeof *g->world);
    for (int i = 0; i < n; i++) g->across |= j->machine[world_ranks[i]] != j->machine[j->rank];
    if (nccl) {
        int size = 0, mine = -1;
        NCCL_CHECK(ncclCommCount(nccl, &size));
        NCCL_CHECK(ncclCommUserRank(nccl, &mine));
        if (size != n || mine != rank)
            die("group %s: rank %d names %d members, NCCL found %d|a bug of the caller: groups of one call must not overlap, ranks ascend",
                name, j->rank, n, size);
        CUDA_CHECK(cudaEventCreateWithFlags(&g->last, cudaEventDisableTiming));
    }
    watch_lock(); // the watchdog walks the list
    groups = (Comm **)realloc(groups, (size_t)(n_groups + 1) * sizeof *groups);
    if (!groups) die("out of host memory for groups of ranks|free memory");
    groups[n_groups++] = g;
    watch_unlock();
    if (nccl) connect_members(g);
    return g;
}

int comm_rank(const Comm *g) { return g->rank; }
int comm_size(const Comm *g) { return g->n; }
int comm_is_local(const Comm *g) { return g->local; }

void comm_reserve(Comm *g, size_t bytes, Arena *arena) {
    if (g && g->local) return;
    size_t least = (g ? (size_t)g->n : 1) * 64; // an element of any type from every rank
    if (bytes > comm_stage_bytes) bytes = comm_stage_bytes;
    if (bytes < least) bytes = least;
    char *p = (char *)arena_take(arena, bytes, "communication staging");
    if (!g || !p || (!g->stage_malloced && bytes <= g->stage_bytes)) return;
    if (g->stage_malloced) CUDA_CHECK(cudaFree(g->stage));
    g->stage_malloced = 0;
    g->stage = p;
    g->stage_bytes = bytes;
}

CommTraffic comm_traffic(Comm *g, int kind, int reset) {
    CommTraffic t = g->traffic[kind];
    if (reset) memset(&g->traffic[kind], 0, sizeof t);
    return t;
}

// ---- blocking calls on host memory: set-up and agreement, through small device buffers ------
// recv (n * bytes) from all ranks' send; or, with a root, recv (bytes) from it.
static void move_host(Comm *g, const CallRecord *r, void *recv, const void *send, size_t bytes,
                      int root) {
    if (!bytes) return;
    char text[256];
    size_t n = root < 0 ? (size_t)g->n : 1;
    char *device = room((n + 1) * bytes), *mine = device + n * bytes;
    cudaStream_t s = group_stream(g, STREAM_EXCHANGE);
    call_text(r, g->name, text, sizeof text);
    CUDA_CHECK(cudaMemcpyAsync(mine, send, bytes, cudaMemcpyHostToDevice, s));
    if (root < 0)
        NCCL_CHECK(ncclAllGather(mine, device, bytes, ncclUint8, g->nccl, s));
    else
        NCCL_CHECK(ncclBroadcast(mine, device, bytes, ncclUint8, root, g->nccl, s));
    group_stream_done(g);
    CUDA_CHECK(cudaMemcpyAsync(recv, device, n * bytes, cudaMemcpyDeviceToHost, s));
    watch_enter(report_text, text);
    CUDA_CHECK(cudaStreamSynchronize(s));
    watch_leave();
}

// check: what each rank believes the call to be, before it moves. all_to_all brings its rows.
static void compare_calls(Comm *g, const CallRecord *mine, const int64_t *send_rows,
                          const int64_t *recv_rows) {
    size_t n = (size_t)g->n;
    CallRecord *sent = (CallRecord *)xmalloc(n * (n + 1) * sizeof *sent, "records of calls"),
               *all = sent + n; // each rank's records, one per reader
    for (size_t i = 0; i < n; i++) {
        sent[i] = *mine;
        if (send_rows)
            sent[i].sends = (uint64_t)send_rows[i] * mine->count,
            sent[i].expects = (uint64_t)recv_rows[i] * mine->count;
    }
    move_host(g, mine, all, sent, n * sizeof *sent, -1);
    for (size_t i = 0; i < n; i++)
        records_compare(g->name, joined()->rank, g->world[i], &sent[i],
                        &all[i * n + (size_t)g->rank]);
    free(sent);
}

static void host_call(Comm *g, int kind, void *recv, const void *send, size_t bytes, int root) {
    CallRecord r = call_record(++g->calls, kind, DTYPE_U8, bytes);
    if (comm_options.check) compare_calls(g, &r, 0, 0);
    move_host(g, &r, recv, send, bytes, root);
}

void comm_broadcast(Comm *g, void *host, size_t bytes, int root) {
    if (g->n > 1) host_call(g, COMM_BROADCAST, host, host, bytes, root);
}

void comm_all_gather_host(Comm *g, void *recv, const void *send, size_t bytes) {
    char *mine = (char *)recv + (size_t)g->rank * bytes;
    if (mine != send && bytes) memmove(mine, send, bytes);
    if (g->n > 1) host_call(g, COMM_HOST_GATHER, recv, mine, bytes, -1);
}

void comm_barrier(Comm *g) {
    char *flags = (char *)xcalloc((size_t)g->n, 1, "a barrier");
    comm_all_gather_host(g, flags, flags + g->rank, 1);
    free(flags);
}

int64_t comm_max(Comm *g, int64_t value) {
    int64_t *all = (int64_t *)xmalloc((size_t)g->n * sizeof *all, "an agreement"), most = value;
    comm_all_gather_host(g, all, &value, sizeof value);
    for (int j = 0; j < g->n; j++)
        if (all[j] > most) most = all[j];
    free(all);
    return most;
}

double comm_sum(Comm *g, double value) {
    double *all = (double *)xmalloc((size_t)g->n * sizeof *all, "an agreement"), sum;
    comm_all_gather_host(g, all, &value, sizeof value);
    sum = all[0];
    for (int j = 1; j < g->n; j++) sum += all[j];
    free(all);
    return sum;
}

// ---- check ----------------------------------------------------------------------------------
// out[0] += a sum over the bytes that depends on their places; integers, so that the order of
// threads does not show.
static __global__ void sum_bytes(unsigned long long *out, const unsigned char *p, int64_t bytes) {
    unsigned long long sum = 0;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < bytes;
         i += (int64_t)gridDim.x * blockDim.x)
        sum += (p[i] + 1ull) * (((unsigned long long)i + 1) * 0x9e3779b97f4a7c15ull | 1);
    atomicAdd(out, sum);
}

static void take_sums(const Call *c, uint64_t *sums) {
    if (!check_sums) CUDA_CHECK(cudaMalloc((void **)&check_sums, 2 * sizeof *check_sums));
    device_zero(check_sums, 2 * sizeof *check_sums);
    if (c->dst_bytes)
        sum_bytes<<<grid_for((int64_t)c->dst_bytes, 256, 256), 256, 0, compute_stream()>>>(
            check_sums, (const unsigned char *)c->user_dst, (int64_t)c->dst_bytes);
    if (c->src_bytes)
        sum_bytes<<<grid_for((int64_t)c->src_bytes, 256, 256), 256, 0, compute_stream()>>>(
            check_sums + 1, (const unsigned char *)c->user_src, (int64_t)c->src_bytes);
    LAUNCHED();
    device_download(sums, check_sums, 2 * sizeof *check_sums);
}

// The destination that the call works on: the program's, or a copy of it. keep: it holds something
// that the call reads (in place, accumulate).
static char *take_destination(Call *c, void *dst, size_t dst_bytes, const void *src,
                              size_t src_bytes, int keep) {
    if (!comm_options.check) return (char *)dst;
    c->user_dst = (char *)dst, c->dst_bytes = dst_bytes, c->user_src = (const char *)src,
    c->src_bytes = src_bytes;
    CUDA_CHECK(cudaMalloc((void **)&c->copy, dst_bytes + 1));
    if (keep) device_copy(c->copy, dst, dst_bytes);
    if (dst_bytes)
        CUDA_CHECK(
            cudaMemsetAsync(dst, 0xff, dst_bytes, compute_stream())); // NaN in every floating type
    take_sums(c, c->sums);
    return c->copy;
}

static void check_buffers(Call *c) {
    uint64_t now[2];
    char text[256];
    take_sums(c, now);
    call_text(&c->record, c->g->name, text, sizeof text);
    if (now[0] != c->sums[0] || now[1] != c->sums[1])
        die("%s: its %s changed between start and wait|the call owns its buffers until comm_wait",
            text, now[0] != c->sums[0] ? "destination" : "source");
    device_copy(c->user_dst, c->copy, c->dst_bytes);
    device_sync();
    CUDA_CHECK(cudaFree(c->copy));
}

// ---- start and wait -------------------------------------------------------------------------
static ncclDataType_t nccl_type(Dtype t) {
    return t == DTYPE_F32    ? ncclFloat32
           : t == DTYPE_F64  ? ncclFloat64
           : t == DTYPE_BF16 ? ncclBfloat16
           : t == DTYPE_F16  ? ncclFloat16
           : t == DTYPE_I32  ? ncclInt32
           : t == DTYPE_I64  ? ncclInt64
                             : ncclUint8;
}

// A call of group g, numbered and compared, on `stream` behind what COMPUTE has been given so far.
static Call *call_new(Comm *g, int kind, Dtype type, size_t count, Stream stream,
                      const int64_t *send_rows, const int64_t *recv_rows) {
    double since = now_seconds();
    Call *c = &calls[next_call % MAX_CALLS];
    if (c->waiting)
        die("more than %d collectives started and not waited for, group %s|a bug of the caller: comm_wait",
            MAX_CALLS, g->name);
    if (!c->done) CUDA_CHECK(cudaEventCreateWithFlags(&c->done, cudaEventDisableTiming));
    CallRecord r = call_record(++g->calls, kind, type, count);
    if (comm_options.check) compare_calls(g, &r, send_rows, recv_rows);
    stream_order(STREAM_COMPUTE, stream);
    group_stream(g, stream);
    serial = serial % (INT32_MAX / MAX_CALLS - 1) + 1;
    watch_lock();
    c->serial = serial, c->g = g, c->record = r, c->since = since, c->launched = 0, c->waiting = 1,
    c->copy = 0;
    next_call++;
    watch_unlock();
    return c;
}

static Request launched(Call *c, size_t bytes) {
    Comm *g = c->g;
    CommTraffic *t = &g->traffic[c->record.kind];
    Request r = { c->serial * MAX_CALLS + (int)(c - calls) };
    group_stream_done(g);
    CUDA_CHECK(cudaEventRecord(c->done, device_stream(g->last_stream)));
    watch_lock();
    c->launched = 1;
    watch_unlock();
    t->calls++, t->bytes += (int64_t)bytes, t->seconds += now_seconds() - c->since;
    return r;
}

static Request nothing(Comm *g, int kind) {
    g->traffic[kind].calls++;
    Request r = { -1 };
    return r;
}

void comm_wait(Request r) {
    if (r.id < 0) return;
    double since = now_seconds();
    Call *c = &calls[r.id % MAX_CALLS];
    if (c->serial != r.id / MAX_CALLS || !c->waiting)
        die("comm_wait for a call that was waited for already|a bug of the caller");
    CUDA_CHECK(cudaStreamWaitEvent(compute_stream(), c->done, 0));
    if (c->copy) check_buffers(c);
    c->waiting = 0;
    c->g->traffic[c->record.kind].seconds += now_seconds() - since;
}

void comm_step_end(void) {
    if (!comm_options.check) return;
    for (int i = 0; i < n_groups; i++) {
        if (groups[i]->n < 2) continue;
        CallRecord r = call_record(++groups[i]->calls, COMM_STEP_END, DTYPE_U8, 0);
        compare_calls(groups[i], &r, 0, 0);
    }
}

// Distance to the peer of turn t, so that no rank is everybody's first; a group of one
// (--force-comm) is its own peer.
static int first_turn(const Comm *g) { return g->n == 1 ? 0 : 1; }
static int from_peer(const Comm *g, int turn) { return (g->rank - turn + g->n) % g->n; }
static int to_peer(const Comm *g, int turn) { return (g->rank + turn) % g->n; }

static int overlaps(const void *a, const void *b, size_t b_bytes) {
    return (const char *)a >= (const char *)b && (const char *)a < (const char *)b + b_bytes;
}

// ---- sums -----------------------------------------------------------------------------------
// Arithmetic in A, rounded once when stored: bf16 in fp32, the others in their own type.
template <class T> static __device__ __forceinline__ T as_sum(T x) { return x; }
static __device__ __forceinline__ float as_sum(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T> static __device__ __forceinline__ void from_sum(T *p, T x) { *p = x; }
static __device__ __forceinline__ void from_sum(__nv_bfloat16 *p, float x) {
    *p = __float2bfloat16(x);
}

// out[i] = part 0 + part 1 + ... + part n-1 in that order, add: plus what out held. Part `me` is
// own, which may be out; the others lie `stride` apart in stage.
template <class T, class A>
static __global__ void sum_parts_kernel(T *out, const T *own, const T *stage, int64_t stride, int n,
                                        int me, int64_t count, int add) {
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += (int64_t)gridDim.x * blockDim.x) {
        A sum = 0;
        for (int j = 0; j < n; j++) {
            A x = as_sum(j == me ? own[i] : stage[(j > me && me >= 0 ? j - 1 : j) * stride + i]);
            sum = j ? sum + x : x;
        }
        from_sum(out + i, add ? as_sum(out[i]) + sum : sum);
    }
}
template <class T, class A>
static void launch_sum(void *out, const void *own, const void *stage, int64_t stride, int n, int me,
                       int64_t count, int add, cudaStream_t s) {
    enum {
        THREADS = 256,
        BLOCKS = 264
    }; // two blocks on each of 132 multiprocessors saturate the memory and leave room for COMPUTE
    sum_parts_kernel<T, A><<<grid_for(count, THREADS, BLOCKS), THREADS, 0, s>>>(
        (T *)out, (const T *)own, (const T *)stage, stride, n, me, count, add);
    LAUNCHED();
}

// Piece j of the `total` elements at src, `piece` long but for the last ones, goes to rank j; out:
// this rank's piece of the sum. own: this rank's part of it, out itself when in place.
static void sum_pieces(Comm *g, char *out, const char *own, const char *src, size_t total,
                       size_t piece, Dtype type, int accumulate, cudaStream_t s) {
    size_t w = dtype_size(type), others = g->n > 1 ? (size_t)g->n - 1 : 1;
    if (!g->stage) { // nobody reserved (tests, set-up): once, before the first step
        g->stage_bytes =
            comm_stage_bytes > (size_t)g->n * 64 ? comm_stage_bytes : (size_t)g->n * 64;
        CUDA_CHECK(cudaMalloc((void **)&g->stage, g->stage_bytes));
        g->stage_malloced = 1;
    }
    size_t most =
        g->stage_bytes / others / 64 * 64 /
        w; // NCCL copies 16 bytes at a time only where both ends are aligned, else single ones
    for (size_t skip = 0; skip < piece; skip += most) {
        size_t mine = 0;
        NCCL_CHECK(ncclGroupStart());
        for (int t = first_turn(g); t < g->n; t++) {
            int from = from_peer(g, t), to = to_peer(g, t), ends[2] = { g->rank, to };
            size_t length[2];
            for (int e = 0; e < 2; e++) {
                size_t begin = (size_t)ends[e] * piece + skip, end = (size_t)(ends[e] + 1) * piece;
                if (end > total) end = total;
                length[e] = begin < end ? end - begin : 0;
                if (length[e] > most) length[e] = most;
            }
            mine = length[0];
            // A group of one sends its own part, which an in-place destination may have moved.
            const char *send = g->n == 1 ? own + skip * w : src + ((size_t)to * piece + skip) * w;
            NCCL_CHECK(ncclRecv(g->stage + (size_t)(from > g->rank ? from - 1 : from) * most * w,
                                length[0], nccl_type(type), from, g->nccl, s));
            NCCL_CHECK(ncclSend(send, length[1], nccl_type(type), to, g->nccl, s));
        }
        NCCL_CHECK(ncclGroupEnd());
        if (!mine) continue;
        void (*sum)(void *, const void *, const void *, int64_t, int, int, int64_t, int,
                    cudaStream_t) = type == DTYPE_F32    ? launch_sum<float, float>
                                    : type == DTYPE_F64  ? launch_sum<double, double>
                                    : type == DTYPE_BF16 ? launch_sum<__nv_bfloat16, float>
                                    : type == DTYPE_I32  ? launch_sum<int32_t, int32_t>
                                    : type == DTYPE_I64  ? launch_sum<int64_t, int64_t>
                                                         : 0;
        if (!sum)
            die("no sums over ranks for element type %d|use f32, f64, bf16, i32 or i64", (int)type);
        sum(out + skip * w, own + skip * w, g->stage, (int64_t)most, g->n, g->n == 1 ? -1 : g->rank,
            (int64_t)mine, accumulate, s);
    }
}

// 1: the sum is NCCL's own (see the head of this file).
static int is_native(const Comm *g, size_t bytes, Dtype type, int accumulate) {
    if (accumulate || type == DTYPE_BF16 || sums_by == SUMS_RANK) return 0;
    return sums_by == SUMS_NCCL || (g->across && bytes >= NATIVE_BYTES);
}

// ---- collectives ----------------------------------------------------------------------------
Request all_gather_start(Comm *g, void *recv, const void *send, size_t count, Dtype type,
                         Stream stream) {
    if (g->local) {
        stream_order(stream, STREAM_COMPUTE);
        local_all_gather(recv, send, count, type);
        return nothing(g, COMM_ALL_GATHER);
    }
    Call *c = call_new(g, COMM_ALL_GATHER, type, count, stream, 0, 0);
    size_t bytes = count * dtype_size(type), all = (size_t)g->n * bytes;
    int in_place = overlaps(send, recv, all);
    char *dst = take_destination(c, recv, all, send, in_place ? 0 : bytes, in_place);
    NCCL_CHECK(ncclAllGather(in_place ? dst + (size_t)g->rank * bytes : send, dst, count,
                             nccl_type(type), g->nccl, device_stream(stream)));
    return launched(c, (size_t)(g->n - 1) * bytes);
}

Request reduce_scatter_start(Comm *g, void *recv, const void *send, size_t count, Dtype type,
                             int accumulate, Stream stream) {
    if (g->local) {
        stream_order(stream, STREAM_COMPUTE);
        local_reduce_scatter(recv, send, count, type, accumulate);
        return nothing(g, COMM_REDUCE_SCATTER);
    }
    Call *c = call_new(g, COMM_REDUCE_SCATTER, type, count, stream, 0, 0);
    size_t bytes = count * dtype_size(type), all = (size_t)g->n * bytes;
    int in_place = overlaps(recv, send, all);
    char *dst = take_destination(c, recv, bytes, send, all, in_place || accumulate);
    const char *own = in_place ? dst : (const char *)send + (size_t)g->rank * bytes;
    cudaStream_t s = device_stream(stream);
    if (is_native(g, all, type, accumulate) && !c->copy)
        NCCL_CHECK(ncclReduceScatter(send, dst, count, nccl_type(type), ncclSum, g->nccl, s));
    else
        sum_pieces(g, dst, own, (const char *)send, (size_t)g->n * count, count, type, accumulate,
                   s);
    return launched(c, (size_t)(g->n - 1) * bytes);
}

Request all_reduce_start(Comm *g, void *buffer, size_t count, Dtype type, Stream stream) {
    if (g->local) {
        stream_order(stream, STREAM_COMPUTE);
        return nothing(g, COMM_ALL_REDUCE);
    }
    Call *c = call_new(g, COMM_ALL_REDUCE, type, count, stream, 0, 0);
    size_t n = (size_t)g->n, w = dtype_size(type), piece = (count + n - 1) / n, at[2] = { 0, 0 },
           length[2] = { 0, 0 };
    char *dst = take_destination(c, buffer, count * w, 0, 0, 1);
    cudaStream_t s = device_stream(stream);
    size_t begin = (size_t)g->rank * piece < count ? (size_t)g->rank * piece : count,
           mine = count - begin < piece ? count - begin : piece;
    if (is_native(g, count * w, type, 0))
        NCCL_CHECK(ncclAllReduce(dst, dst, count, nccl_type(type), ncclSum, g->nccl, s));
    else {
        sum_pieces(g, dst + begin * w, dst + begin * w, dst, count, piece, type, 0, s);
        NCCL_CHECK(ncclGroupStart());
        for (int t = 1; piece && t < g->n; t++) {
            int ends[2] = { from_peer(g, t), g->rank };
            for (int e = 0; e < 2; e++) {
                at[e] = (size_t)ends[e] * piece < count ? (size_t)ends[e] * piece : count;
                length[e] = count - at[e] < piece ? count - at[e] : piece;
            }
            NCCL_CHECK(ncclRecv(dst + at[0] * w, length[0], nccl_type(type), ends[0], g->nccl, s));
            NCCL_CHECK(
                ncclSend(dst + at[1] * w, length[1], nccl_type(type), to_peer(g, t), g->nccl, s));
        }
        NCCL_CHECK(ncclGroupEnd());
    }
    return launched(c, (count - mine + (n - 1) * mine) * w);
}

Request all_to_all_start(Comm *g, void *recv, const int64_t *recv_rows, const void *send,
                         const int64_t *send_rows, size_t row_bytes, Stream stream) {
    if (g->local) {
        stream_order(stream, STREAM_COMPUTE);
        local_all_to_all(g->name, recv, recv_rows[0], send, send_rows[0], row_bytes);
        return nothing(g, COMM_ALL_TO_ALL);
    }
    size_t total[2] = { 0, 0 }, n = (size_t)g->n, me = (size_t)g->rank,
           self = (size_t)send_rows[me] * row_bytes;
    for (size_t j = 0; j < n; j++) {
        if (send_rows[j] < 0 || recv_rows[j] < 0)
            die("all_to_all in group %s: negative number of rows|a bug of the caller", g->name);
        total[0] += (size_t)recv_rows[j] * row_bytes, total[1] += (size_t)send_rows[j] * row_bytes;
    }
    if (send_rows[me] != recv_rows[me])
        die("all_to_all in group %s: rank %d sends itself %zu bytes and expects %zu|a bug of the caller",
            g->name, joined()->rank, self, (size_t)recv_rows[me] * row_bytes);
    Call *c = call_new(g, COMM_ALL_TO_ALL, DTYPE_U8, row_bytes, stream, send_rows, recv_rows);
    char *dst = take_destination(c, recv, total[0], send, total[1], 0);
    const char *src = (const char *)send;
    cudaStream_t s = device_stream(stream);
    NCCL_CHECK(ncclGroupStart());
    for (size_t j = 0; j < n;
         j++) { // empty messages too (NCCL 2.12): ranks that disagree about one are then noticed
        size_t to = (size_t)send_rows[j] * row_bytes, from = (size_t)recv_rows[j] * row_bytes;
        if (j != me || n == 1) {
            NCCL_CHECK(ncclRecv(dst, from, ncclUint8, (int)j, g->nccl, s));
            NCCL_CHECK(ncclSend(src, to, ncclUint8, (int)j, g->nccl, s));
        } else if (self)
            CUDA_CHECK(cudaMemcpyAsync(dst, src, self, cudaMemcpyDeviceToDevice, s));
        dst += from, src += to;
    }
    NCCL_CHECK(ncclGroupEnd());
    return launched(c, total[1] - self);
}
