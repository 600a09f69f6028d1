// The transport over NCCL (transport.h): one GPU a rank, device memory to device memory. Ranks meet
// by comm_join.h; the world's communicator is made from an id of rank 0, every group is split from
// it.
//
// Order. A call first waits for COMPUTE as it stands, then runs on its own stream; transport_wait
// makes COMPUTE wait for its event. The host never waits. Calls of one group run one after another
// even where they name different streams. Groups are used from two streams at once, so two
// communicators can be at work on one GPU. That cannot deadlock as long as all GPUs start their
// operations in one order: every rank issues the same calls in the same order (I2, calls do not
// depend on data), and NCCL_LAUNCH_ORDER_IMPLICIT (NCCL 2.26, set here) makes the GPU keep the
// host's order of launches across communicators. With an older NCCL, or that variable at 0, they
// run one after another. The price: in backward with ep > 1 a layer's exchange starts after the
// whole reduction of the layer above, which the host has launched before it.
//
// Memory. NCCL makes the connections of a group, and their buffers on the GPU (some GiB for 8 GPUs
// that all send to each other), at the group's first call. So that call is made when the group is,
// before the arenas look at what is free.
//
// Sums. Piece j of a sum goes to rank j by grouped sends and receives; the owner adds the parts in
// the order of ranks, in fp32 (F64 in fp64), and rounds once. What the staging area does not hold
// comes in rounds that take turns with its halves: one arrives while the one before is added up on
// a stream of its own. So the bits follow from the group alone, and all ranks of an all-reduce hold
// the bits that one rank made. On the links of one machine this costs what a ring costs. Between
// machines of G GPUs it sends up to G times a ring's bytes, so there sums from NATIVE_BYTES on go
// through NCCL's own reduce-scatter and all-reduce (never bf16, which NCCL rounds at every hop, and
// never accumulating ones). Their order is NCCL's: the same every time on the same machines with
// the same NCCL settings, and equal bits on all ranks. MOE_COMM_SUMS=rank|nccl in the environment
// forces one way for all of them.
//
// Watch. The watchdog asks NCCL twice a second for asynchronous errors, looks for ranks that are
// gone, and ends the run when a call is not complete `timeout` seconds after its start.
// Communicators are not aborted first: the end of the process stops its kernels, and an abort can
// hang where the network does.
#include "transport.h"
#include "comm_join.h"
#include "../kernels/cuda/common.cuh"
#include <nccl.h>
#include <stdio.h>
#include <stdlib.h>
#if NCCL_VERSION_CODE < NCCL_VERSION(2, 18, 0)
#error "NCCL 2.18 or newer is needed (ncclCommSplit)"
#endif

enum { FLIGHTS = 1024, NATIVE_BYTES = 1 << 20 };
enum { ANSWER = 5 }; // seconds that rank 0 has for its report on a stuck rank
enum { SUMS_AUTO, SUMS_RANK, SUMS_NCCL };

// The group's own part.
typedef struct {
    ncclComm_t nccl; // 0: a group of one that sends nothing
    int across;      // its ranks are on more than one machine
    int used;
    cudaEvent_t last; // after the latest operation, on stream last_stream
    Stream last_stream;
    cudaStream_t adder; // adds the parts of a round while the next one arrives
    cudaEvent_t received[2], added[2];
} Group;
static Group *group_of(const Comm *g) { return (Group *)g->transport; }

// What the watchdog knows about a call until the GPU has completed it.
typedef struct {
    CallRecord record;
    Comm *g;
    cudaEvent_t done;
    double since;
    int launched, waiting; // waiting: comm_wait has not come yet
} Flight;

static ncclComm_t world_nccl;
static Comm **groups; // (n_groups) with a communicator, in the order of their building
static int n_groups;
static int sums_by = SUMS_AUTO;
static int device = -1;
static int one_at_a_time; // no two communicators at work together: each operation waits for the
                          // latest one of any group
static Group *latest;
static Flight flights[FLIGHTS]; // a ring; the watchdog reads it under watch_lock
static unsigned next_flight, oldest_flight;
static Flight *flight_of[COMM_CALLS];
static Presence *presences; // on rank 0: (world size) the latest of every rank
static struct {
    char *p;
    size_t bytes;
} host_room; // device: of host collectives

// ---- errors ---------------------------------------------------------------------------------
static MOE_NORETURN void nccl_failed(ncclResult_t error, const char *call) {
    die("NCCL: %s in %.60s: %s|NCCL_DEBUG=INFO says more. Every rank needs a GPU of its own: for "
        "several on one GPU (tests) build with COMM=mpi",
        ncclGetErrorString(error), call, ncclGetLastError(0));
}
#define NCCL_CHECK(call)                                       \
    do {                                                       \
        ncclResult_t error_ = (call);                          \
        if (error_ != ncclSuccess) nccl_failed(error_, #call); \
    } while (0)

// 1: a group's communicator has failed.
static int has_failed(const Comm *g, char *text, size_t size) {
    ncclResult_t error = ncclSuccess;
    ncclComm_t nccl = group_of(g)->nccl;
    if (ncclCommGetAsyncError(nccl, &error) != ncclSuccess) return 0;
    if (error == ncclSuccess || error == ncclInProgress) return 0;
    snprintf(text, size,
             "NCCL, group %s: %s: %s  hint: another rank or the network failed; NCCL_DEBUG=INFO "
             "says more",
             g->name, ncclGetErrorString(error), ncclGetLastError(nccl));
    return 1;
}

// Tells rank 0 where this rank is; `stuck` is the flight that has exceeded the time limit, or 0.
static void publish(const Flight *stuck) {
    Presence now = presence_now();
    if (stuck) {
        const Comm *g = stuck->g;
        now.stuck = 1;
        now.at = stuck->record;
        memcpy(now.group, g->name, sizeof now.group);
        now.n = g->n;
        now.first = g->world[0];
        now.stride = g->n > 1 ? g->world[1] - g->world[0] : 1;
        for (int i = 1; i < g->n; i++)
            if (g->world[i] != g->world[0] + i * now.stride) now.stride = 0;
    }
    if (joined()->rank == 0)
        presences[0] = now;
    else
        join_publish(&now, sizeof now);
}

// Rank 0: a second after a rank has said that it is stuck, when all have published once more, this
// is who has entered its call and who has not.
static int report_stuck(char *text, size_t size) {
    static double since;
    int stuck = 0;
    int ranks = joined()->size;
    join_collect(presences, sizeof *presences);
    while (stuck < ranks && !presences[stuck].stuck) stuck++;
    if (stuck == ranks)
        since = 0;
    else if (since == 0)
        since = now_seconds();
    if (stuck == ranks || now_seconds() - since < 1) return 0;
    char who[1600];
    presence_text(presences, ranks, stuck, who, sizeof who);
    snprintf(text, size,
             "rank %d waited more than --timeout %g: %s  hint: see whether the ranks named still "
             "run; a slow one needs a larger --timeout",
             stuck, comm_options.timeout, who);
    join_tell_end();
    return 1;
}

// The watchdog's look around, under watch_lock.
static int look_around(char *text, size_t size) {
    text[0] = 0;
    if (join_told_end()) return 1; // rank 0 has said why
    int gone = join_lost();
    // Without it this thread's first CUDA call would make a context on GPU 0, half a GiB a rank.
    if (device >= 0) cudaSetDevice(device);
    if (gone >= 0) {
        snprintf(text, size, "the process of rank %d is gone  hint: its own message says why",
                 gone);
        return 1;
    }
    for (int i = 0; i < n_groups; i++)
        if (has_failed(groups[i], text, size)) return 1;
    int told = 0;
    for (; oldest_flight != next_flight; oldest_flight++) {
        Flight *f = &flights[oldest_flight % FLIGHTS];
        double waited = now_seconds() - f->since;
        if (next_flight - oldest_flight > FLIGHTS) continue; // its place holds a later call
        if (waited < comm_options.timeout) break;
        // A launch can itself wait for the other ranks; its event is recorded after it.
        if (f->launched && cudaEventQuery(f->done) != cudaErrorNotReady) continue;
        publish(f);
        told = 1;
        if (joined()->rank == 0) break;                    // all the ranks are asked first
        if (waited < comm_options.timeout + ANSWER) break; // rank 0 reports
        char what[256];
        call_text(&f->record, f->g->name, what, sizeof what);
        snprintf(text, size,
                 "waited %.1f s (--timeout %g): %s: not complete on this GPU  hint: see whether "
                 "the group's other ranks still run; a slow one needs a larger --timeout",
                 waited, comm_options.timeout, what);
        return 1;
    }
    if (!told) publish(0);
    return joined()->rank == 0 && report_stuck(text, size);
}

// ---- joining and leaving --------------------------------------------------------------------
void transport_abort(int status) { join_abort(status); }

void transport_init(int *argc, char ***argv) {
    setenv("NCCL_LAUNCH_ORDER_IMPLICIT", "1", 0); // read when the first communicator is made
    // A round of 8 ranks is then some 200 us on NVLink, twenty times its start-up cost.
    comm_stage_bytes = (size_t)64 << 20;
    join_init(argc, argv);
}

void transport_start(void) {
    const char *sums = getenv("MOE_COMM_SUMS");
    if (sums && !strcmp(sums, "rank")) sums_by = SUMS_RANK;
    if (sums && !strcmp(sums, "nccl")) sums_by = SUMS_NCCL;
    if (sums && *sums && sums_by == SUMS_AUTO && strcmp(sums, "auto"))
        die("MOE_COMM_SUMS=%s|it is auto, rank or nccl", sums);
    if (joined()->size == 1)
        check_alone("MPI found no other rank: srun --mpi=list shows what fits; or torchrun, or "
                    "srun --mpi=none with a build without MPI");
    join_connect(comm_options.timeout > 0 ? comm_options.timeout : 600);
    presences = (Presence *)xcalloc(joined()->size, sizeof *presences, "ranks");
    watch_start(join_threads());
    watch_poll(look_around);
}

// From here on connections close: the watchdog must not take that for a rank that is gone.
void transport_leave(void) { watch_poll(0); }

void transport_finish(void) {
    if (world_nccl) NCCL_CHECK(ncclCommDestroy(world_nccl));
    for (int i = 0; i < FLIGHTS; i++)
        if (flights[i].done) CUDA_CHECK(cudaEventDestroy(flights[i].done));
    if (host_room.p) CUDA_CHECK(cudaFree(host_room.p));
    free(groups);
    free(presences);
    groups = 0;
    n_groups = 0;
    world_nccl = 0;
    latest = 0;
    device = -1;
    join_leave();
}

World transport_world(void) {
    const Joined *j = joined();
    World w = { j->rank, j->size, j->local_rank, j->local_size };
    return w;
}

int transport_forces(void) { return 1; }
int transport_stages_on_device(void) { return 1; }

const char *transport_describe(void) {
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
    int version = 0;
    int mine = -1;
    ncclUniqueId id;
    memset(&id, 0, sizeof id);
    CUDA_CHECK(cudaGetDevice(&mine));
    watch_lock(); // the watchdog reads it
    device = mine;
    watch_unlock();
    NCCL_CHECK(ncclGetVersion(&version));
    if (version < NCCL_VERSION(2, 18, 0))
        die("the NCCL found at run time has version code %d, older than 2.18|LD_LIBRARY_PATH names "
            "an old one",
            version);
    one_at_a_time = version < NCCL_VERSION(2, 26, 0) || (order && !strcmp(order, "0"));
    if (j->rank == 0) NCCL_CHECK(ncclGetUniqueId(&id));
    watch_enter(watch_text, "meeting the other ranks, ncclCommInitRank");
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

// The stream on which the group's next operation runs: after its last one.
static cudaStream_t group_stream(Comm *of, Stream stream) {
    Group *g = group_of(of);
    const Group *before = g->used ? g : 0;
    if (one_at_a_time) before = latest;
    if (before && stream != before->last_stream)
        CUDA_CHECK(cudaStreamWaitEvent(device_stream(stream), before->last, 0));
    g->used = 1;
    g->last_stream = stream;
    return device_stream(stream);
}

static void group_stream_done(Comm *of) {
    Group *g = group_of(of);
    CUDA_CHECK(cudaEventRecord(g->last, device_stream(g->last_stream)));
    latest = g;
}

// A byte from every member to every other, then a gather of a real size: NCCL makes the connections
// and buffers of each of its algorithms when it first uses it, and chooses by size.
static void connect_members(Comm *g) {
    char text[96];
    snprintf(text, sizeof text, "connecting the members of group %s", g->name);
#ifdef CUEMU // which has one algorithm
    size_t part = 64;
#else
    size_t part = ((size_t)32 << 20) / g->n;
#endif
    size_t n = g->n;
    char *all = room(n + 1);
    char *mine = all + n;
    char *large;
    ncclComm_t nccl = group_of(g)->nccl;
    cudaStream_t s = group_stream(g, STREAM_EXCHANGE);
    CUDA_CHECK(cudaMalloc((void **)&large, part * n));
    watch_enter(watch_text, text);
    CUDA_CHECK(cudaMemsetAsync(all, 0, n + 1, s));
    CUDA_CHECK(cudaMemsetAsync(large, 0, part * n, s));
    NCCL_CHECK(ncclAllGather(mine, all, 1, ncclUint8, nccl, s));
    NCCL_CHECK(ncclAllGather(large + part * g->rank, large, part, ncclUint8, nccl, s));
    NCCL_CHECK(ncclGroupStart());
    for (int j = 0; j < g->n; j++) {
        NCCL_CHECK(ncclRecv(all + j, 1, ncclUint8, j, nccl, s));
        NCCL_CHECK(ncclSend(mine, 1, ncclUint8, j, nccl, s));
    }
    NCCL_CHECK(ncclGroupEnd());
    group_stream_done(g);
    CUDA_CHECK(cudaStreamSynchronize(s));
    watch_leave();
    CUDA_CHECK(cudaFree(large));
}

static int crosses_machines(const Comm *g) {
    const Joined *j = joined();
    int across = 0;
    for (int i = 0; i < g->n; i++) across |= j->machine[g->world[i]] != j->machine[j->rank];
    return across;
}
static void split_world(Comm *g, const char *name, ncclComm_t *nccl) {
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    // Two groups at a time fit into what device_share keeps free: within a machine half of it feeds
    // NVLink, across machines one group takes all. NCCL_MAX_CTAS in the environment wins.
    config.maxCTAs = g && crosses_machines(g) ? COMMUNICATION_CTAS : COMMUNICATION_CTAS / 2;
    char text[96];
    snprintf(text, sizeof text, "building group %s, ncclCommSplit", name);
    // A group of one needs no communicator, but takes part in the split.
    int color = g && !g->local ? g->world[0] : NCCL_SPLIT_NOCOLOR;
    if (!world_nccl) join_world();
    watch_enter(watch_text, text);
    NCCL_CHECK(ncclCommSplit(world_nccl, color, joined()->rank, nccl, &config));
    watch_leave();
}

void transport_group(Comm *g, const char *name) {
    const Joined *j = joined();
    ncclComm_t nccl = 0;
    if (j->size > 1 || comm_options.force) split_world(g, name, &nccl);
    if (!g) return;
    Group *own = (Group *)xcalloc(1, sizeof *own, "group");
    g->transport = own;
    own->nccl = nccl;
    own->across = crosses_machines(g);
    if (!nccl) return;
    int size = 0;
    int mine = -1;
    NCCL_CHECK(ncclCommCount(nccl, &size));
    NCCL_CHECK(ncclCommUserRank(nccl, &mine));
    if (size != g->n || mine != g->rank)
        die("group %s: rank %d names %d members, NCCL found %d|a bug of the caller: groups of one "
            "call must not overlap, ranks ascend",
            name, j->rank, g->n, size);
    int least, greatest;
    CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    CUDA_CHECK(cudaStreamCreateWithPriority(&own->adder, cudaStreamNonBlocking, greatest));
    cudaEvent_t *events[] = { &own->last, own->received, own->received + 1, own->added,
                              own->added + 1 };
    for (cudaEvent_t *event : events)
        CUDA_CHECK(cudaEventCreateWithFlags(event, cudaEventDisableTiming));
    watch_lock(); // the watchdog walks the list
    groups = (Comm **)realloc(groups, (n_groups + 1) * sizeof *groups);
    if (!groups) die("out of host memory for groups of ranks|free memory");
    groups[n_groups++] = g;
    watch_unlock();
    connect_members(g);
}

void transport_group_free(Comm *g) {
    Group *own = group_of(g);
    if (own->nccl) NCCL_CHECK(ncclCommDestroy(own->nccl));
    if (own->adder) CUDA_CHECK(cudaStreamDestroy(own->adder));
    for (cudaEvent_t event :
         { own->last, own->received[0], own->received[1], own->added[0], own->added[1] })
        if (event) CUDA_CHECK(cudaEventDestroy(event));
    free(own);
}

// For the watchdog: who has come to the call, where rank 0 knows it.
static void report_host(const void *context, char *text, size_t size) {
    watch_text(context, text, size);
    if (joined()->rank > 0) return;
    join_collect(presences, sizeof *presences);
    presences[0] = presence_now();
    presence_text(presences, joined()->size, 0, text, size);
}

// ---- blocking calls on host memory: set-up and agreement, through small device buffers ------
void transport_host(Comm *g, const CallRecord *r, void *recv, const void *send, size_t bytes,
                    int root) {
    if (!bytes) return;
    char text[256];
    size_t n = root < 0 ? g->n : 1;
    char *all = room((n + 1) * bytes);
    char *mine = all + n * bytes;
    ncclComm_t nccl = group_of(g)->nccl;
    cudaStream_t s = group_stream(g, STREAM_EXCHANGE);
    call_text(r, g->name, text, sizeof text);
    CUDA_CHECK(cudaMemcpyAsync(mine, send, bytes, cudaMemcpyHostToDevice, s));
    if (root < 0)
        NCCL_CHECK(ncclAllGather(mine, all, bytes, ncclUint8, nccl, s));
    else
        NCCL_CHECK(ncclBroadcast(mine, all, bytes, ncclUint8, root, nccl, s));
    group_stream_done(g);
    CUDA_CHECK(cudaMemcpyAsync(recv, all, n * bytes, cudaMemcpyDeviceToHost, s));
    watch_enter(report_host, text);
    CUDA_CHECK(cudaStreamSynchronize(s));
    watch_leave();
}

// ---- sums -----------------------------------------------------------------------------------
static ncclDataType_t nccl_type(Dtype t) {
    switch (t) {
    case DTYPE_F32: return ncclFloat32;
    case DTYPE_F64: return ncclFloat64;
    case DTYPE_BF16: return ncclBfloat16;
    case DTYPE_F16: return ncclFloat16;
    case DTYPE_I32: return ncclInt32;
    case DTYPE_I64: return ncclInt64;
    case DTYPE_U8: break;
    }
    return ncclUint8;
}

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
            int place = j > me && me >= 0 ? j - 1 : j;
            A x = as_sum(j == me ? own[i] : stage[place * stride + i]);
            sum = j ? sum + x : x;
        }
        from_sum(out + i, add ? as_sum(out[i]) + sum : sum);
    }
}
template <class T, class A>
static void launch_sum(void *out, const void *own, const void *stage, int64_t stride, int n, int me,
                       int64_t count, int add, cudaStream_t s) {
    // Two blocks on each of 132 multiprocessors saturate the memory and leave room for COMPUTE.
    enum { THREADS = 256, BLOCKS = 264 };
    sum_parts_kernel<T, A><<<grid_for(count, THREADS, BLOCKS), THREADS, 0, s>>>(
        (T *)out, (const T *)own, (const T *)stage, stride, n, me, count, add);
    LAUNCHED();
}

static void sum_stage(Dtype type, void *out, const void *own, const void *stage, int64_t stride,
                      int n, int me, int64_t count, int add, cudaStream_t s) {
    switch (type) {
    case DTYPE_F32: launch_sum<float, float>(out, own, stage, stride, n, me, count, add, s); break;
    case DTYPE_F64:
        launch_sum<double, double>(out, own, stage, stride, n, me, count, add, s);
        break;
    case DTYPE_BF16:
        launch_sum<__nv_bfloat16, float>(out, own, stage, stride, n, me, count, add, s);
        break;
    case DTYPE_I32:
        launch_sum<int32_t, int32_t>(out, own, stage, stride, n, me, count, add, s);
        break;
    case DTYPE_I64:
        launch_sum<int64_t, int64_t>(out, own, stage, stride, n, me, count, add, s);
        break;
    case DTYPE_F16:
    case DTYPE_U8:
        die("no sums over ranks for element type %d|use f32, f64, bf16, i32 or i64", (int)type);
    }
}

// Elements [begin + skip, ...) of rank j's piece that a round of at most `most` moves: returns
// their number.
static size_t round_length(size_t total, size_t piece, int j, size_t skip, size_t most) {
    size_t length;
    piece_of(total, piece, j, &length);
    length = length > skip ? length - skip : 0;
    return length < most ? length : most;
}

// Piece j of the `total` elements at src, `piece` long but for the last ones, goes to rank j; out:
// this rank's piece of the sum. c->own: this rank's part of it, out itself when in place.
static void sum_pieces(const Call *c, char *out, size_t total, size_t piece, cudaStream_t s) {
    Comm *g = c->g;
    Dtype type = (Dtype)c->record.type;
    size_t w = c->width;
    size_t others = g->n > 1 ? (size_t)g->n - 1 : 1;
    Group *own = group_of(g);
    size_t room = piece * w * others <= g->stage_bytes ? g->stage_bytes : g->stage_bytes / 2;
    // NCCL copies 16 bytes at a time only where both ends are aligned, else single ones.
    size_t most = room / others / 64 * 64 / w;
    int turn = 0;
    for (size_t skip = 0; skip < piece; skip += most, turn ^= 1) {
        size_t mine = round_length(total, piece, g->rank, skip, most);
        char *stage = g->stage + turn * others * most * w;
        if (skip >= 2 * most) CUDA_CHECK(cudaStreamWaitEvent(s, own->added[turn], 0));
        NCCL_CHECK(ncclGroupStart());
        for (int t = first_turn(g); t < g->n; t++) {
            int from = receive_peer(g, t);
            int to = send_peer(g, t);
            int place = from > g->rank ? from - 1 : from;
            // A group of one sends its own part, which an in-place destination may have moved.
            const char *send = g->n == 1 ? c->own : c->src + (size_t)to * piece * w;
            NCCL_CHECK(ncclRecv(stage + (size_t)place * most * w, mine, nccl_type(type), from,
                                own->nccl, s));
            NCCL_CHECK(ncclSend(send + skip * w, round_length(total, piece, to, skip, most),
                                nccl_type(type), to, own->nccl, s));
        }
        NCCL_CHECK(ncclGroupEnd());
        CUDA_CHECK(cudaEventRecord(own->received[turn], s));
        CUDA_CHECK(cudaStreamWaitEvent(own->adder, own->received[turn], 0));
        if (mine)
            sum_stage(type, out + skip * w, c->own + skip * w, stage, (int64_t)most, g->n,
                      g->n == 1 ? -1 : g->rank, (int64_t)mine, c->accumulate, own->adder);
        CUDA_CHECK(cudaEventRecord(own->added[turn], own->adder));
    }
    if (piece) CUDA_CHECK(cudaStreamWaitEvent(s, own->added[turn ^ 1], 0)); // the last round
}

// 1: the sum is NCCL's own (see the head of this file).
static int is_native(const Call *c, size_t bytes) {
    if (c->accumulate || c->record.type == DTYPE_BF16 || sums_by == SUMS_RANK) return 0;
    return sums_by == SUMS_NCCL || (group_of(c->g)->across && bytes >= NATIVE_BYTES);
}

// ---- collectives ----------------------------------------------------------------------------
static void post_reduce_scatter(const Call *c, cudaStream_t s) {
    ncclDataType_t type = nccl_type((Dtype)c->record.type);
    ncclComm_t nccl = group_of(c->g)->nccl;
    // NCCL takes a destination in the source only at the rank's own place, which a check's copy is
    // not.
    if (is_native(c, c->src_bytes) && !c->user_dst)
        NCCL_CHECK(ncclReduceScatter(c->src, c->dst, c->count, type, ncclSum, nccl, s));
    else
        sum_pieces(c, c->dst, (size_t)c->g->n * c->count, c->count, s);
}

static void post_all_reduce(const Call *c, cudaStream_t s) {
    const Comm *g = c->g;
    ncclDataType_t type = nccl_type((Dtype)c->record.type);
    ncclComm_t nccl = group_of(g)->nccl;
    if (is_native(c, c->dst_bytes)) {
        NCCL_CHECK(ncclAllReduce(c->dst, c->dst, c->count, type, ncclSum, nccl, s));
        return;
    }
    size_t piece = (c->count + (size_t)g->n - 1) / g->n;
    size_t mine, length;
    size_t begin = piece_of(c->count, piece, g->rank, &mine);
    sum_pieces(c, c->dst + begin * c->width, c->count, piece, s);
    NCCL_CHECK(ncclGroupStart());
    for (int t = 1; piece && t < g->n; t++) {
        int from = receive_peer(g, t);
        size_t at = piece_of(c->count, piece, from, &length);
        NCCL_CHECK(ncclRecv(c->dst + at * c->width, length, type, from, nccl, s));
        NCCL_CHECK(ncclSend(c->dst + begin * c->width, mine, type, send_peer(g, t), nccl, s));
    }
    NCCL_CHECK(ncclGroupEnd());
}

static void post_all_to_all(const Call *c, cudaStream_t s) {
    const Comm *g = c->g;
    char *dst = c->dst;
    const char *src = c->src;
    ncclComm_t nccl = group_of(g)->nccl;
    NCCL_CHECK(ncclGroupStart());
    // Empty messages too (NCCL 2.12): ranks that disagree about one are then noticed.
    for (int j = 0; j < g->n; j++) {
        size_t to = (size_t)c->to_rows[j] * c->count;
        size_t from = (size_t)c->from_rows[j] * c->count;
        if (j != g->rank || g->n == 1) {
            NCCL_CHECK(ncclRecv(dst, from, ncclUint8, j, nccl, s));
            NCCL_CHECK(ncclSend(src, to, ncclUint8, j, nccl, s));
        } else if (to)
            CUDA_CHECK(cudaMemcpyAsync(dst, src, to, cudaMemcpyDeviceToDevice, s));
        dst += from;
        src += to;
    }
    NCCL_CHECK(ncclGroupEnd());
}

static Flight *flight_new(Call *c) {
    Flight *f = &flights[next_flight % FLIGHTS];
    if (f->waiting)
        die("%d collectives started after one that was not waited for, group %s|a bug of the "
            "caller: comm_wait",
            FLIGHTS, f->g->name);
    if (!f->done) CUDA_CHECK(cudaEventCreateWithFlags(&f->done, cudaEventDisableTiming));
    watch_lock();
    f->record = c->record;
    f->g = c->g;
    f->since = now_seconds();
    f->launched = 0;
    f->waiting = 1;
    next_flight++;
    watch_unlock();
    return f;
}

void transport_post(Call *c, int slot) {
    Comm *g = c->g;
    stream_order(STREAM_COMPUTE, c->stream);
    cudaStream_t s = group_stream(g, c->stream);
    Flight *f = flight_of[slot] = flight_new(c);
    switch (c->record.kind) {
    case COMM_ALL_GATHER:
        NCCL_CHECK(ncclAllGather(c->own, c->dst, c->count, nccl_type((Dtype)c->record.type),
                                 group_of(g)->nccl, s));
        break;
    case COMM_REDUCE_SCATTER: post_reduce_scatter(c, s); break;
    case COMM_ALL_REDUCE: post_all_reduce(c, s); break;
    case COMM_ALL_TO_ALL: post_all_to_all(c, s); break;
    }
    group_stream_done(g);
    CUDA_CHECK(cudaEventRecord(f->done, s));
    watch_lock();
    f->launched = 1;
    watch_unlock();
}

void transport_wait(Call *c, int slot) {
    (void)c;
    CUDA_CHECK(cudaStreamWaitEvent(compute_stream(), flight_of[slot]->done, 0));
    flight_of[slot]->waiting = 0;
}
