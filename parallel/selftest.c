// Every collective (comm.h) over every group beside what it should bring: at length and timed
// (--selftest), or in the first second of a run on GPUs (grid.h). Numbers are small integers that
// fp32 adds exactly, so a result is right or wrong; test_comm.c looks at the order of sums.
#include "grid.h"
#include "transport.h"
#include "../kernels/fail.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

// Elements of the whole message, for latency and for bandwidth; the fastest of REPEAT counts.
enum { SMALL = 256, LARGE = 1 << 20, REPEAT = 5, GROUPS = 5 };

// The largest difference of a call: where, what is there, and what should be.
typedef struct {
    int64_t at; // -1: none
    double is, should;
} Worst;

typedef struct {
    Arena arena;
    Comm *g;
    float *host, *a, *b; // (2 most) host memory; (most) and (2 most) of the device
    int64_t *to, *from;  // (n) rows
    Worst worst;
} Bench;

static Comm *group_at(const Grid *g, int i) {
    Comm *const all[GROUPS] = { g->all, g->ep_group, g->fsdp_group, g->dense_group, g->dp_group };
    return all[i];
}
static const char *const group_name[GROUPS] = { "all", "ep", "fsdp", "dense", "dp" };

// Takes memory for messages of `most` elements, and for the sums of all groups.
static Bench bench_open(const Grid *g, size_t most) {
    size_t bytes = most * sizeof(float);
    Bench t = { .arena = arena_counting("self-test"), .worst.at = -1 };
    t.host = (float *)xmalloc(2 * bytes, "self-test");
    t.to = (int64_t *)xmalloc((size_t)g->world * 8, "self-test");
    t.from = (int64_t *)xmalloc((size_t)g->world * 8, "self-test");
    for (int pass = 0; pass < 2; pass++) {
        t.a = (float *)arena_take(&t.arena, bytes, "messages");
        // An all_to_all can bring up to twice the mean.
        t.b = (float *)arena_take(&t.arena, 2 * bytes, "messages");
        for (int i = 0; i < GROUPS; i++) comm_reserve(group_at(g, i), bytes, &t.arena);
        if (pass == 0) arena_commit(&t.arena);
    }
    return t;
}
static void bench_free(Bench *t) {
    free(t->host);
    free(t->to);
    free(t->from);
}

static float value(int rank, size_t i) { return (float)((i * 7 + (size_t)rank * 13) % 101); }

// Rows that rank i sends to rank j: uneven, some none. `part` elements is the mean.
static int64_t rows(int i, int j, size_t part) { return (int64_t)(((i + 2 * j) % 3) * part / 2); }

// One call of `kind` on a message of `count` elements in all (a multiple of the ranks); returns
// seconds.
static double run(Bench *t, int kind, size_t count) {
    int n = comm_size(t->g);
    int me = comm_rank(t->g);
    size_t part = count / (size_t)n;
    for (int j = 0; j < n; j++) {
        t->to[j] = rows(me, j, part);
        t->from[j] = rows(j, me, part);
    }
    comm_barrier(t->g);
    double since = now_seconds();
    Request r = { -1 };
    switch (kind) {
    case COMM_ALL_GATHER:
        r = all_gather_start(t->g, t->b, t->a, part, DTYPE_F32, STREAM_GATHER);
        break;
    case COMM_REDUCE_SCATTER:
        r = reduce_scatter_start(t->g, t->b, t->a, part, DTYPE_F32, 0, STREAM_GATHER);
        break;
    case COMM_ALL_REDUCE: // the last rank's piece is shorter
        r = all_reduce_start(t->g, t->a, count - 1, DTYPE_F32, STREAM_GATHER);
        break;
    case COMM_ALL_TO_ALL:
        r = all_to_all_start(t->g, t->b, t->from, t->a, t->to, sizeof(float), STREAM_EXCHANGE);
        break;
    }
    comm_wait(r);
    device_sync();
    return now_seconds() - since;
}

static void look(Bench *t, size_t at, double should) {
    double is = t->host[at];
    double off = fabs(is - should);
    if (off == 0) return;
    if (t->worst.at >= 0 && !(off > fabs(t->worst.is - t->worst.should))) return;
    t->worst.at = (int64_t)at;
    t->worst.is = is;
    t->worst.should = should;
}

// Runs a call on known numbers; returns 1 where it brings others, the worst of them in t->worst.
static int wrong(Bench *t, int kind, size_t count) {
    int n = comm_size(t->g);
    int me = comm_rank(t->g);
    size_t part = count / (size_t)n;
    size_t at = 0;
    t->worst.at = -1;
    for (size_t i = 0; i < count; i++) t->host[i] = value(me, i);
    device_upload(t->a, t->host, count * sizeof(float));
    memset(t->host, 0xff, count * sizeof(float));
    device_upload(t->b, t->host, count * sizeof(float));
    run(t, kind, count);
    size_t got = part;
    if (kind == COMM_ALL_GATHER) got = count;
    if (kind == COMM_ALL_REDUCE) got = count - 1;
    if (kind == COMM_ALL_TO_ALL) {
        got = 0;
        for (int j = 0; j < n; j++) got += t->from[j];
    }
    device_download(t->host, kind == COMM_ALL_REDUCE ? t->a : t->b, got * sizeof(float));
    if (kind == COMM_ALL_GATHER)
        for (size_t i = 0; i < count; i++) look(t, i, value((int)(i / part), i % part));
    else if (kind != COMM_ALL_TO_ALL)
        for (size_t i = 0; i < got; i++) {
            double sum = 0;
            for (int j = 0; j < n; j++)
                sum += value(j, kind == COMM_ALL_REDUCE ? i : me * part + i);
            look(t, i, sum);
        }
    else
        for (int j = 0; j < n; j++) {
            size_t first = 0; // where rank j's rows to this rank begin in what it sends
            for (int k = 0; k < me; k++) first += rows(j, k, part);
            for (int64_t i = 0; i < t->from[j]; i++) look(t, at++, value(j, first + i));
        }
    return t->worst.at >= 0;
}

static size_t multiple_of(size_t count, int n) { return (count + n - 1) / n * n; }

// What a rank has found, as the ranks tell each other.
typedef struct {
    int64_t group, kind, n;
    Worst worst;
} Finding;

void comm_check(const Grid *g) {
    const double deadline = 30;
    const double timeout = comm_options.timeout;
    if (!strcmp(device_backend(), "cpu")) return;
    Finding mine = { .worst.at = -1 };
    Finding *all;
    size_t most = multiple_of(SMALL, g->world) + g->world;
    Bench t = bench_open(g, most); // the arena stays: the groups keep their shares
    watch_lock();                  // the watchdog reads it
    if (timeout > deadline) comm_options.timeout = deadline;
    watch_unlock();
    comm_where(0, -1, "first check");
    for (int i = 0; i < GROUPS; i++) {
        t.g = group_at(g, i);
        for (int kind = 0; kind < COMM_KINDS && !comm_is_local(t.g); kind++) {
            int n = comm_size(t.g);
            int bad = wrong(&t, kind, multiple_of(SMALL, n));
            if (bad && mine.worst.at < 0) mine = (Finding){ i, kind, n, t.worst };
            comm_traffic(t.g, kind, 1);
        }
    }
    bench_free(&t);
    all = (Finding *)xmalloc((size_t)g->world * sizeof *all, "the findings of the ranks");
    comm_all_gather_host(g->all, all, &mine, sizeof mine);
    // The first call that was wrong anywhere, on the lowest rank: later ones can follow from it.
    int who = g->rank;
    for (int j = 0; j < g->world; j++) {
        int64_t order = all[j].group * COMM_KINDS + all[j].kind;
        int64_t best = mine.group * COMM_KINDS + mine.kind;
        if (all[j].worst.at < 0 || all[j].group >= GROUPS || all[j].kind >= COMM_KINDS) continue;
        if (mine.worst.at < 0 || order < best || (order == best && j < who)) mine = all[who = j];
    }
    if (mine.worst.at >= 0)
        die("the check of the collectives: %s in group %s of %d ranks brings rank %d wrong "
            "numbers, the worst at element %lld: %.9g, not %.9g|another version of NCCL or of the "
            "driver; NCCL_P2P_DISABLE=1 goes other ways; --selftest checks more; --kernel-check "
            "off to go on all the same",
            comm_kind_name((int)mine.kind), group_name[mine.group], (int)mine.n, who,
            (long long)mine.worst.at, mine.worst.is, mine.worst.should);
    free(all);
    watch_lock();
    comm_options.timeout = timeout;
    watch_unlock();
}

int comm_selftest(const Grid *g, FILE *out) {
    Bench t = bench_open(g, LARGE);
    int failures = 0;
    if (g->rank == 0)
        fprintf(out,
                "self-test of communication: %s\n  group  ranks  call            correct   latency "
                "us    MB/s sent per rank\n",
                comm_describe());
    for (int i = 0; i < GROUPS; i++) {
        t.g = group_at(g, i);
        if (comm_is_local(t.g)) {
            if (g->rank == 0) fprintf(out, "  %-5s  %5d  (nothing moves)\n", group_name[i], 1);
            continue;
        }
        int n = comm_size(t.g);
        size_t small = multiple_of(SMALL, n);
        size_t large = LARGE / n * n;
        for (int kind = 0; kind < COMM_KINDS; kind++) {
            comm_where(0, -1, "self-test");
            int bad = wrong(&t, kind, small) + wrong(&t, kind, large);
            double best[2] = { 1e30, 1e30 };
            comm_traffic(t.g, kind, 1);
            for (int repeat = 0; repeat < REPEAT; repeat++)
                for (int size = 0; size < 2; size++) {
                    if (size == 1) comm_traffic(t.g, kind, 1);
                    double s = (double)comm_max(
                                   t.g, (int64_t)(1e9 * run(&t, kind, size ? large : small))) *
                               1e-9;
                    if (s < best[size]) best[size] = s;
                }
            double sent = (double)comm_traffic(t.g, kind, 1).bytes; // of the last large call
            bad = (int)comm_max(g->all, bad); // somewhere, in any group of this family
            failures += bad;
            if (g->rank == 0)
                fprintf(out, "  %-5s  %5d  %-14s  %-7s  %11.1f  %12.1f\n", group_name[i], n,
                        comm_kind_name(kind), bad ? "WRONG" : "yes", 1e6 * best[0],
                        sent / best[1] * 1e-6);
        }
    }
    arena_free(&t.arena);
    bench_free(&t);
    return failures;
}
