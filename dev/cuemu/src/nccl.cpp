// nccl.cpp - NCCL stand-in over MPI. Before every collective all ranks of the communicator compare
// what they are about to do; a difference, or a rank that does not come (CUEMU_NCCL_TIMEOUT
// seconds, default 20), gives a report that names ranks and calls. Then the job is aborted, or with
// CUEMU_NCCL_ON_ERROR=return the communicator gets an asynchronous error. Reductions are done in
// rank order in f32, so all ranks get the same bits.
#include "gemm.h"
#include "cuemu/core.h"
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mpi.h>
#include <nccl.h>
#include <sched.h>
#include <unistd.h>
#include <string>
#include <vector>
using namespace cuemu;

struct ncclComm {
    MPI_Comm mpi;
    int rank, size;
    long id;                            // the same on all its ranks
    long calls;                         // collectives so far
    std::map<int, long> sent, received; // point-to-point calls so far by peer
    std::vector<int> world;             // world rank of each rank
    ncclResult_t async_error;
};

namespace {
const int TAG_INIT = 30001;
const int TAG_P2P = 30002;
enum Kind {
    ALL_REDUCE,
    REDUCE,
    REDUCE_SCATTER,
    ALL_GATHER,
    BROADCAST,
    ALL_TO_ALL,
    GATHER,
    SCATTER,
    SEND,
    RECV,
    SPLIT
};
const char *kind_name[] = { "AllReduce", "Reduce",   "ReduceScatter", "AllGather",
                            "Broadcast", "AlltoAll", "Gather",        "Scatter",
                            "Send",      "Recv",     "CommSplit" };
struct Call {
    int kind, type, op, root;
    size_t count;
}; // compared between ranks
struct Job {
    Call c;
    const void *in;
    void *out;
    ncclComm *comm;
    cudaStream_t stream;
};

int group_depth;
std::vector<Job> group;

size_t type_bytes(int t) {
    switch (t) {
    case ncclInt8:
    case ncclUint8: return 1;
    case ncclHalf:
    case ncclBfloat16: return 2;
    case ncclInt32:
    case ncclUint32:
    case ncclFloat: return 4;
    case ncclInt64:
    case ncclUint64:
    case ncclDouble: return 8;
    }
    fail("nccl: data type %d is not emulated", t);
}
const char *type_name(int t) {
    static const char *n[] = { "int8",   "uint8", "int32", "uint32", "int64",
                               "uint64", "half",  "float", "double", "bf16" };
    return t >= 0 && t < 10 ? n[t] : "?";
}
std::string describe(const Call &c) {
    static const char *ops[] = { "sum", "prod", "max", "min", "avg" };
    char s[160];
    if (c.kind == SPLIT)
        snprintf(s, sizeof s, "CommSplit");
    else if (c.kind == SEND || c.kind == RECV)
        snprintf(s, sizeof s, "%s(%zu x %s, peer %d)", kind_name[c.kind], c.count,
                 type_name(c.type), c.root);
    else {
        bool reduces = c.kind <= REDUCE_SCATTER;
        bool rooted =
            c.kind == REDUCE || c.kind == BROADCAST || c.kind == GATHER || c.kind == SCATTER;
        int n = snprintf(s, sizeof s, "%s(%zu x %s", kind_name[c.kind], c.count, type_name(c.type));
        if (reduces) n += snprintf(s + n, sizeof s - (size_t)n, ", %s", ops[c.op]);
        if (rooted) n += snprintf(s + n, sizeof s - (size_t)n, ", root %d", c.root);
        snprintf(s + n, sizeof s - (size_t)n, ")");
    }
    return s;
}

// ---- what each rank is doing, in memory shared by the ranks of this machine: read when somebody
// waits too long
struct Status {
    char text[200];
};
Status *board;
int world_rank, world_size;

void finalize() {
    int done;
    MPI_Finalized(&done);
    if (!done) MPI_Finalize();
}
void start_mpi() {
    static bool started;
    if (started) return;
    started = true;
    int yes;
    MPI_Initialized(&yes);
    if (!yes) {
        int got;
        MPI_Init_thread(nullptr, nullptr, MPI_THREAD_SERIALIZED, &got);
        atexit(finalize);
    }
    MPI_Comm_rank(MPI_COMM_WORLD, &world_rank);
    MPI_Comm_size(MPI_COMM_WORLD, &world_size);
}
// Collective: ncclGetUniqueId, which one rank alone may call, must not come here.
void start_board() {
    static bool started;
    if (started) return;
    started = true;
    MPI_Win w;
    Status *mine;
    MPI_Comm node;
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &node);
    int node_size;
    MPI_Comm_size(node, &node_size);
    if (node_size == world_size && world_size > 1) {
        MPI_Win_allocate_shared(sizeof(Status), 1, MPI_INFO_NULL, node, &mine, &w);
        MPI_Aint n;
        int unit;
        MPI_Win_shared_query(w, 0, &n, &unit, &board);
        // the windows of all ranks are contiguous by default
        snprintf(board[world_rank].text, sizeof board->text, "no NCCL call yet");
        MPI_Barrier(MPI_COMM_WORLD);
    }
}
void set_status(const char *fmt, ...) {
    if (!board) return;
    va_list a;
    va_start(a, fmt);
    vsnprintf(board[world_rank].text, sizeof board->text, fmt, a);
    va_end(a);
}

void give_up(ncclComm *c, const std::string &report) {
    fflush(stdout);
    fprintf(stderr, "cuemu: NCCL ERROR seen by rank %d: %s", c ? c->rank : world_rank,
            report.c_str());
    fflush(stderr);
    const char *e = getenv("CUEMU_NCCL_ON_ERROR");
    if (c && e && !strcmp(e, "return")) {
        c->async_error = ncclRemoteError;
        return;
    }
    usleep(200000); // let the other ranks report as well
    MPI_Abort(MPI_COMM_WORLD, 3);
    abort();
}
// Wait for MPI requests; false (and a report) if that takes too long.
bool wait_all(ncclComm *c, std::vector<MPI_Request> &q, const char *what) {
    static const double limit =
        getenv("CUEMU_NCCL_TIMEOUT") ? atof(getenv("CUEMU_NCCL_TIMEOUT")) : 20;
    double start = MPI_Wtime();
    for (;;) {
        int done;
        MPI_Testall((int)q.size(), q.data(), &done, MPI_STATUSES_IGNORE);
        if (done) return true;
        if (MPI_Wtime() - start > limit) {
            std::string r = std::string("no progress in ") + what + "; the ranks are at\n";
            for (int i = 0; board && i < world_size; i++)
                r += "  world rank " + std::to_string(i) + ": " + board[i].text + "\n";
            give_up(c, r);
            return false;
        }
        sched_yield();
    }
}

// ---- comparing calls
struct Record {
    Call c;
    long calls;
};
bool same_call(ncclComm *c, const Call &call) {
    Record mine;
    memset(&mine, 0, sizeof mine);
    mine.c.kind = call.kind;
    mine.c.type = call.type;
    mine.c.op = call.op;
    mine.c.root = call.root;
    mine.c.count = call.count;
    mine.calls = c->calls++;
    std::vector<Record> all((size_t)c->size);
    set_status("%s, call %ld on communicator %ld", describe(call).c_str(), mine.calls, c->id);
    std::vector<MPI_Request> q(1);
    MPI_Iallgather(&mine, sizeof mine, MPI_BYTE, all.data(), sizeof mine, MPI_BYTE, c->mpi, &q[0]);
    if (!wait_all(c, q, describe(call).c_str())) return false;
    for (auto &r : all)
        if (memcmp(&r, &mine, sizeof r)) {
            std::string s = "the ranks of communicator " + std::to_string(c->id) +
                            " disagree in call " + std::to_string(mine.calls) + "\n";
            for (int i = 0; i < c->size; i++)
                s += "  rank " + std::to_string(i) + " (world rank " +
                     std::to_string(c->world[(size_t)i]) + "): " + describe(all[(size_t)i].c) +
                     "\n";
            give_up(c, s);
            return false;
        }
    return true;
}

// ---- reductions
template <class T> T combined(T s, T v, int op) {
    switch (op) {
    case ncclMax: return v > s ? v : s;
    case ncclMin: return v < s ? v : s;
    case ncclProd: return (T)(s * v);
    default: return (T)(s + v); // ncclSum, ncclAvg
    }
}
template <class T>
void reduce_as(const char *all, size_t n, int ranks, size_t stride, int op, T *out) {
    for (size_t i = 0; i < n; i++) {
        T s = ((const T *)all)[i];
        for (int r = 1; r < ranks; r++)
            s = combined(s, ((const T *)(all + (size_t)r * stride))[i], op);
        out[i] = op == ncclAvg ? (T)(s / (T)ranks) : s;
    }
}
void reduce(const char *all, size_t n, int ranks, size_t stride, int type, int op, void *out) {
    if (type == ncclBfloat16 || type == ncclHalf) {
        cudaDataType t = type == ncclHalf ? CUDA_R_16F : CUDA_R_16BF;
        std::vector<float> f((size_t)ranks * n), o(n);
        for (int r = 0; r < ranks; r++)
            for (size_t i = 0; i < n; i++)
                f[(size_t)r * n + i] = load_element(all + (size_t)r * stride, t, i);
        reduce_as((const char *)f.data(), n, ranks, n * 4, op, o.data());
        for (size_t i = 0; i < n; i++) store_element(out, t, i, o[i]);
    } else if (type == ncclFloat)
        reduce_as(all, n, ranks, stride, op, (float *)out);
    else if (type == ncclDouble)
        reduce_as(all, n, ranks, stride, op, (double *)out);
    else if (type == ncclInt8)
        reduce_as(all, n, ranks, stride, op, (int8_t *)out);
    else if (type == ncclUint8)
        reduce_as(all, n, ranks, stride, op, (uint8_t *)out);
    else if (type == ncclInt32)
        reduce_as(all, n, ranks, stride, op, (int32_t *)out);
    else if (type == ncclUint32)
        reduce_as(all, n, ranks, stride, op, (uint32_t *)out);
    else if (type == ncclInt64)
        reduce_as(all, n, ranks, stride, op, (int64_t *)out);
    else
        reduce_as(all, n, ranks, stride, op, (uint64_t *)out);
}

// CUEMU_NCCL_WRONG=AllReduce, Recv, ...: the last float that such a call brings to its highest rank
// is another one. For tests of those who check.
void spoil(const Job &j, size_t bytes) {
    static const char *kind = getenv("CUEMU_NCCL_WRONG");
    if (!kind || strcmp(kind, kind_name[j.c.kind]) || j.c.type != ncclFloat || !bytes) return;
    if (j.comm->rank == j.comm->size - 1) ((float *)((char *)j.out + bytes))[-1] += 1;
}

// ---- doing it
void run_collective(const Job &j) {
    ncclComm *c = j.comm;
    if (c->async_error || !same_call(c, j.c)) return;
    DeviceAccess access;
    size_t bytes = j.c.count * type_bytes(j.c.type);
    size_t P = (size_t)c->size;
    int n = (int)bytes;
    int root = j.c.root;
    bool am_root = c->rank == root;
    std::vector<char> in, all;
    size_t in_bytes = j.c.kind == REDUCE_SCATTER || j.c.kind == ALL_TO_ALL || j.c.kind == SCATTER
                          ? bytes * P
                          : bytes;
    size_t out_bytes =
        j.c.kind == ALL_GATHER || j.c.kind == ALL_TO_ALL || j.c.kind == GATHER ? bytes * P : bytes;
    bool reads = !(j.c.kind == BROADCAST || j.c.kind == SCATTER) || am_root;
    bool writes = !(j.c.kind == REDUCE || j.c.kind == GATHER) || am_root;
    if (!bytes) return;
    if (reads) {
        check_device_range("nccl send buffer", j.in, in_bytes);
        in.assign((const char *)j.in, (const char *)j.in + in_bytes);
    }
    if (writes) check_device_range("nccl receive buffer", j.out, out_bytes);
    std::vector<MPI_Request> q(1);
    switch (j.c.kind) {
    case ALL_REDUCE:
    case ALL_GATHER:
        all.resize(bytes * P);
        MPI_Iallgather(in.data(), n, MPI_BYTE, all.data(), n, MPI_BYTE, c->mpi, &q[0]);
        break;
    case REDUCE:
    case GATHER:
        all.resize(bytes * P);
        MPI_Igather(in.data(), n, MPI_BYTE, all.data(), n, MPI_BYTE, root, c->mpi, &q[0]);
        break;
    case REDUCE_SCATTER:
    case ALL_TO_ALL:
        all.resize(bytes * P);
        MPI_Ialltoall(in.data(), n, MPI_BYTE, all.data(), n, MPI_BYTE, c->mpi, &q[0]);
        break;
    case SCATTER:
        all.resize(bytes);
        MPI_Iscatter(in.data(), n, MPI_BYTE, all.data(), n, MPI_BYTE, root, c->mpi, &q[0]);
        break;
    case BROADCAST:
        all = in;
        all.resize(bytes);
        MPI_Ibcast(all.data(), n, MPI_BYTE, root, c->mpi, &q[0]);
        break;
    }
    if (!wait_all(c, q, describe(j.c).c_str())) return;
    if (!writes) return;
    if (j.c.kind <= REDUCE_SCATTER)
        reduce(all.data(), j.c.count, c->size, bytes, j.c.type, j.c.op, j.out);
    else
        memcpy(j.out, all.data(), out_bytes);
    spoil(j, out_bytes);
    set_status("no call; last was %s, call %ld on communicator %ld", describe(j.c).c_str(),
               c->calls - 1, c->id);
}
// All sends and receives of a group together. A header goes before the data, so that sizes and
// types can be compared.
struct Header {
    long number;
    size_t count;
    int type;
};
void run_point_to_point(const std::vector<Job> &jobs) {
    DeviceAccess access;
    std::vector<MPI_Request> q;
    std::vector<Header> headers(jobs.size());
    std::vector<std::vector<char>> data(jobs.size());
    std::string text;
    ncclComm *c = jobs[0].comm;
    for (size_t i = 0; i < jobs.size(); i++) {
        const Job &j = jobs[i];
        if (j.comm->async_error) return;
        size_t bytes = j.c.count * type_bytes(j.c.type);
        text += (i ? ", " : "") + describe(j.c);
        MPI_Request r;
        if (j.c.kind == SEND) {
            if (bytes) check_device_range("nccl send buffer", j.in, bytes);
            memset(&headers[i], 0, sizeof headers[i]);
            headers[i].number = j.comm->sent[j.c.root]++;
            headers[i].count = j.c.count;
            headers[i].type = j.c.type;
            data[i].assign((const char *)j.in, (const char *)j.in + bytes);
            MPI_Issend(&headers[i], sizeof(Header), MPI_BYTE, j.c.root, TAG_P2P, j.comm->mpi, &r);
            q.push_back(r); // synchronous: a send that nobody receives must not pass
            MPI_Isend(data[i].data(), (int)bytes, MPI_BYTE, j.c.root, TAG_P2P, j.comm->mpi, &r);
            q.push_back(r);
        } else {
            if (bytes) check_device_range("nccl receive buffer", j.out, bytes);
            // room for a sender that sends too much: to be reported, not truncated
            data[i].resize(bytes + (1 << 16));
            MPI_Irecv(&headers[i], sizeof(Header), MPI_BYTE, j.c.root, TAG_P2P, j.comm->mpi, &r);
            q.push_back(r);
            MPI_Irecv(data[i].data(), (int)data[i].size(), MPI_BYTE, j.c.root, TAG_P2P, j.comm->mpi,
                      &r);
            q.push_back(r);
        }
    }
    set_status("group of %s on communicator %ld", text.substr(0, 140).c_str(), c->id);
    if (!wait_all(c, q, ("group of " + text).c_str())) return;
    for (size_t i = 0; i < jobs.size(); i++)
        if (jobs[i].c.kind == RECV) {
            const Job &j = jobs[i];
            Header &h = headers[i];
            long number = j.comm->received[j.c.root]++;
            if (h.count != j.c.count || h.type != j.c.type || h.number != number) {
                give_up(j.comm, "rank " + std::to_string(j.comm->rank) + " calls " + describe(j.c) +
                                    ", but rank " + std::to_string(j.c.root) + " sends " +
                                    std::to_string(h.count) + " x " + type_name(h.type) + "\n");
                return;
            }
            memcpy(j.out, data[i].data(), j.c.count * type_bytes(j.c.type));
            spoil(j, j.c.count * type_bytes(j.c.type));
        }
    set_status("no call; last was a group of %s", text.substr(0, 140).c_str());
}

// With NCCL_LAUNCH_ORDER_IMPLICIT=1 operations of all communicators start in the order in which the
// host launched them, as NCCL 2.26 does; else streams may reorder them, and where ranks then differ
// they wait for one another.
void launch(cudaStream_t s, std::function<void()> work) {
    static const bool ordered =
        getenv("NCCL_LAUNCH_ORDER_IMPLICIT") && atoi(getenv("NCCL_LAUNCH_ORDER_IMPLICIT"));
    static cudaEvent_t last;
    if (ordered && last) cudaStreamWaitEvent(s, last, 0);
    enqueue(s, std::move(work));
    if (ordered && !last) cudaEventCreate(&last);
    if (ordered) cudaEventRecord(last, s);
}

ncclResult_t launch_group() {
    std::vector<Job> jobs;
    jobs.swap(group);
    // Inside a group the order between communicators is free: bring it to one that all ranks share.
    std::stable_sort(jobs.begin(), jobs.end(),
                     [](const Job &a, const Job &b) { return a.comm->id < b.comm->id; });
    std::vector<Job> p2p;
    for (auto &j : jobs) {
        if (j.c.kind == SEND || j.c.kind == RECV)
            p2p.push_back(j);
        else
            launch(j.stream, [j] { run_collective(j); });
    }
    for (size_t i = 1; i < p2p.size(); i++)
        if (p2p[i].stream != p2p[0].stream) { // one batch: ordered after all streams it names
            cudaEvent_t e;
            cudaEventCreate(&e);
            cudaEventRecord(e, p2p[i].stream);
            cudaStreamWaitEvent(p2p[0].stream, e, 0);
        }
    if (!p2p.empty()) launch(p2p[0].stream, [p2p] { run_point_to_point(p2p); });
    return ncclSuccess;
}
ncclResult_t submit(Kind kind, const void *in, void *out, size_t count, int type, int op, int root,
                    ncclComm *c, cudaStream_t s) {
    if (!c) return ncclInvalidArgument;
    if (c->async_error) return c->async_error;
    if (type < 0 || type >= 10 || op < 0 || op > ncclAvg || root < 0 || root >= c->size) {
        fprintf(stderr, "cuemu: nccl%s: invalid type %d, op %d or peer %d\n", kind_name[kind], type,
                op, root);
        return ncclInvalidArgument;
    }
    Job j;
    memset(&j, 0, sizeof j);
    j.c.kind = kind;
    j.c.type = type;
    j.c.op = op;
    j.c.root = root;
    j.c.count = count;
    j.in = in;
    j.out = out;
    j.comm = c;
    j.stream = s;
    group.push_back(j);
    return group_depth ? ncclSuccess : launch_group();
}
} // namespace

extern "C" {
ncclResult_t ncclGetVersion(int *v) {
    // MPI_Init takes all ranks, and ncclGetUniqueId is called by one while the others wait for it.
    if (getenv("OMPI_COMM_WORLD_SIZE")) start_mpi();
    *v = NCCL_VERSION_CODE;
    return ncclSuccess;
}
const char *ncclGetErrorString(ncclResult_t r) {
    if (r == ncclSuccess) return "no error";
    if (r == ncclInvalidArgument) return "invalid argument";
    return r == ncclRemoteError ? "remote error (emulated)" : "NCCL error (emulated)";
}
const char *ncclGetLastError(ncclComm_t) { return ""; }

// The id carries the world rank of its maker, who collects the members and tells them each other's
// world ranks.
struct UniqueId {
    int magic, maker, number;
};
ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    static int number;
    start_mpi();
    UniqueId u = { 0x6e63636c, world_rank, ++number };
    memset(id, 0, sizeof *id);
    memcpy(id, &u, sizeof u);
    return ncclSuccess;
}
ncclResult_t ncclCommInitRank(ncclComm_t *out, int n, ncclUniqueId id, int rank) {
    start_mpi();
    if (n == world_size) start_board();
    UniqueId u;
    memcpy(&u, &id, sizeof u);
    if (u.magic != 0x6e63636c || rank < 0 || rank >= n) {
        fprintf(stderr, "cuemu: ncclCommInitRank: invalid id or rank %d of %d\n", rank, n);
        return ncclInvalidArgument;
    }
    auto *c = new ncclComm{ MPI_COMM_NULL,
                            rank,
                            n,
                            u.maker * 1000l + u.number,
                            0,
                            {},
                            {},
                            std::vector<int>((size_t)n, world_rank),
                            ncclSuccess };
    set_status("CommInitRank as rank %d of %d, communicator %ld", rank, n, c->id);
    int tag = TAG_INIT + 10 + u.number;
    int hello[3] = { rank, n, world_rank };
    std::vector<MPI_Request> q(1);
    if (world_rank != u.maker) {
        MPI_Isend(hello, 3, MPI_INT, u.maker, tag, MPI_COMM_WORLD, &q[0]);
        wait_all(nullptr, q, "ncclCommInitRank");
        MPI_Irecv(c->world.data(), n, MPI_INT, u.maker, tag, MPI_COMM_WORLD, &q[0]);
        wait_all(nullptr, q, "ncclCommInitRank");
    } else {
        std::vector<int> seen((size_t)n, 0), from;
        seen[(size_t)rank] = 1;
        for (int i = 1; i < n; i++) {
            int h[3];
            MPI_Irecv(h, 3, MPI_INT, MPI_ANY_SOURCE, tag, MPI_COMM_WORLD, &q[0]);
            wait_all(nullptr, q, "ncclCommInitRank");
            if (h[1] != n || h[0] < 0 || h[0] >= n || seen[(size_t)h[0]]++)
                give_up(nullptr, "ncclCommInitRank: world rank " + std::to_string(h[2]) +
                                     " joins as rank " + std::to_string(h[0]) + " of " +
                                     std::to_string(h[1]) + ", world rank " +
                                     std::to_string(world_rank) + " as rank " +
                                     std::to_string(rank) + " of " + std::to_string(n) + "\n");
            c->world[(size_t)h[0]] = h[2];
            from.push_back(h[2]);
        }
        for (int w : from) MPI_Send(c->world.data(), n, MPI_INT, w, tag, MPI_COMM_WORLD);
    }
    MPI_Group world, members;
    MPI_Comm_group(MPI_COMM_WORLD, &world);
    MPI_Group_incl(world, n, c->world.data(), &members);
    MPI_Comm_create_group(MPI_COMM_WORLD, members, tag, &c->mpi);
    MPI_Group_free(&world);
    MPI_Group_free(&members);
    set_status("no call; last was CommInitRank");
    *out = c;
    return ncclSuccess;
}
ncclResult_t ncclCommInitRankConfig(ncclComm_t *c, int n, ncclUniqueId id, int rank,
                                    ncclConfig_t *) {
    return ncclCommInitRank(c, n, id, rank);
}
ncclResult_t ncclCommSplit(ncclComm_t c, int color, int key, ncclComm_t *out, ncclConfig_t *) {
    cudaDeviceSynchronize();
    if (!same_call(c, Call{ SPLIT, 0, 0, 0, 0 })) return c->async_error;
    auto *s = new ncclComm{ MPI_COMM_NULL, 0, 0, 0, 0, {}, {}, {}, ncclSuccess };
    MPI_Comm_split(c->mpi, color == NCCL_SPLIT_NOCOLOR ? MPI_UNDEFINED : color, key, &s->mpi);
    *out = nullptr;
    if (s->mpi == MPI_COMM_NULL) {
        delete s;
        return ncclSuccess;
    }
    MPI_Comm_rank(s->mpi, &s->rank);
    MPI_Comm_size(s->mpi, &s->size);
    s->world.resize((size_t)s->size);
    MPI_Allgather(&world_rank, 1, MPI_INT, s->world.data(), 1, MPI_INT, s->mpi);
    s->id = c->id * 1000 + c->calls * 10 + color % 10;
    *out = s;
    return ncclSuccess;
}
ncclResult_t ncclCommFinalize(ncclComm_t) {
    cudaDeviceSynchronize();
    return ncclSuccess;
}
ncclResult_t ncclCommDestroy(ncclComm_t c) {
    cudaDeviceSynchronize();
    delete c;
    return ncclSuccess;
} // local: the MPI communicator stays
ncclResult_t ncclCommAbort(ncclComm_t c) {
    delete c;
    return ncclSuccess;
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t c, ncclResult_t *e) {
    *e = c->async_error;
    return ncclSuccess;
}
ncclResult_t ncclCommCount(const ncclComm_t c, int *n) {
    *n = c->size;
    return ncclSuccess;
}
ncclResult_t ncclCommUserRank(const ncclComm_t c, int *r) {
    *r = c->rank;
    return ncclSuccess;
}
ncclResult_t ncclCommCuDevice(const ncclComm_t, int *d) {
    *d = 0;
    return ncclSuccess;
}
ncclResult_t ncclCommRegister(const ncclComm_t, void *, size_t, void **h) {
    *h = nullptr;
    return ncclSuccess;
}
ncclResult_t ncclCommDeregister(const ncclComm_t, void *) { return ncclSuccess; }
ncclResult_t ncclMemAlloc(void **p, size_t n) {
    return cudaMalloc(p, n) ? ncclSystemError : ncclSuccess;
}
ncclResult_t ncclMemFree(void *p) { return cudaFree(p) ? ncclSystemError : ncclSuccess; }

ncclResult_t ncclGroupStart() {
    group_depth++;
    return ncclSuccess;
}
ncclResult_t ncclGroupEnd() {
    if (!group_depth) return ncclInvalidUsage;
    return --group_depth ? ncclSuccess : launch_group();
}
ncclResult_t ncclAllReduce(const void *in, void *out, size_t n, ncclDataType_t t, ncclRedOp_t op,
                           ncclComm_t c, cudaStream_t s) {
    return submit(ALL_REDUCE, in, out, n, t, op, 0, c, s);
}
ncclResult_t ncclReduce(const void *in, void *out, size_t n, ncclDataType_t t, ncclRedOp_t op,
                        int root, ncclComm_t c, cudaStream_t s) {
    return submit(REDUCE, in, out, n, t, op, root, c, s);
}
ncclResult_t ncclReduceScatter(const void *in, void *out, size_t n, ncclDataType_t t,
                               ncclRedOp_t op, ncclComm_t c, cudaStream_t s) {
    return submit(REDUCE_SCATTER, in, out, n, t, op, 0, c, s);
}
ncclResult_t ncclAllGather(const void *in, void *out, size_t n, ncclDataType_t t, ncclComm_t c,
                           cudaStream_t s) {
    return submit(ALL_GATHER, in, out, n, t, 0, 0, c, s);
}
ncclResult_t ncclBroadcast(const void *in, void *out, size_t n, ncclDataType_t t, int root,
                           ncclComm_t c, cudaStream_t s) {
    return submit(BROADCAST, in, out, n, t, 0, root, c, s);
}
ncclResult_t ncclBcast(void *p, size_t n, ncclDataType_t t, int root, ncclComm_t c,
                       cudaStream_t s) {
    return submit(BROADCAST, p, p, n, t, 0, root, c, s);
}
ncclResult_t ncclAlltoAll(const void *in, void *out, size_t n, ncclDataType_t t, ncclComm_t c,
                          cudaStream_t s) {
    return submit(ALL_TO_ALL, in, out, n, t, 0, 0, c, s);
}
ncclResult_t ncclGather(const void *in, void *out, size_t n, ncclDataType_t t, int root,
                        ncclComm_t c, cudaStream_t s) {
    return submit(GATHER, in, out, n, t, 0, root, c, s);
}
ncclResult_t ncclScatter(const void *in, void *out, size_t n, ncclDataType_t t, int root,
                         ncclComm_t c, cudaStream_t s) {
    return submit(SCATTER, in, out, n, t, 0, root, c, s);
}
ncclResult_t ncclSend(const void *p, size_t n, ncclDataType_t t, int peer, ncclComm_t c,
                      cudaStream_t s) {
    return submit(SEND, p, nullptr, n, t, 0, peer, c, s);
}
ncclResult_t ncclRecv(void *p, size_t n, ncclDataType_t t, int peer, ncclComm_t c, cudaStream_t s) {
    return submit(RECV, nullptr, p, n, t, 0, peer, c, s);
}
}
