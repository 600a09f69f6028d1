// The self-test of the communication (grid.h): every collective (comm.h) over every group, checked
// and timed before a long run is trusted to the machines. Numbers are small integers that fp32 adds
// exactly, so a result is right or wrong; test_comm.c looks at the order of sums.
#include "grid.h"
#include "../kernels/fail.h"
#include <stdlib.h>
#include <string.h>

// Elements of the whole message, for latency and for bandwidth; the fastest of REPEAT counts.
enum { SMALL = 256, LARGE = 1 << 20, REPEAT = 5 };

typedef struct {
    Comm *g;
    float *host, *a, *b; // (2 LARGE) host memory; (LARGE) and (2 LARGE) of the device
    int64_t *to, *from;  // (n) rows
} Bench;

static float value(int rank, size_t i) { return (float)((i * 7 + (size_t)rank * 13) % 101); }

// Rows that rank i sends to rank j: uneven, some none. `part` elements is the mean.
static int64_t rows(int i, int j, size_t part) { return (int64_t)(((i + 2 * j) % 3) * part / 2); }

// One call of `kind` on a message of `count` elements in all (a multiple of the ranks); returns
// seconds.
static double run(Bench *t, int kind, size_t count) {
    int n = comm_size(t->g), me = comm_rank(t->g);
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
    case COMM_ALL_REDUCE: r = all_reduce_start(t->g, t->a, count, DTYPE_F32, STREAM_GATHER); break;
    case COMM_ALL_TO_ALL:
        r = all_to_all_start(t->g, t->b, t->from, t->a, t->to, sizeof(float), STREAM_EXCHANGE);
        break;
    }
    comm_wait(r);
    device_sync();
    return now_seconds() - since;
}

static int wrong(Bench *t, int kind, size_t count) {
    int n = comm_size(t->g), me = comm_rank(t->g), bad = 0;
    size_t part = count / (size_t)n, at = 0;
    for (size_t i = 0; i < count; i++) t->host[i] = value(me, i);
    device_upload(t->a, t->host, count * sizeof(float));
    memset(t->host, 0xff, count * sizeof(float));
    device_upload(t->b, t->host, count * sizeof(float));
    run(t, kind, count);
    size_t got = kind == COMM_ALL_GATHER || kind == COMM_ALL_REDUCE ? count : part;
    if (kind == COMM_ALL_TO_ALL) {
        got = 0;
        for (int j = 0; j < n; j++) got += t->from[j];
    }
    device_download(t->host, kind == COMM_ALL_REDUCE ? t->a : t->b, got * sizeof(float));
    if (kind == COMM_ALL_GATHER)
        for (size_t i = 0; i < count; i++) bad |= t->host[i] != value((int)(i / part), i % part);
    else if (kind != COMM_ALL_TO_ALL)
        for (size_t i = 0; i < got; i++) {
            float sum = 0;
            for (int j = 0; j < n; j++)
                sum += value(j, kind == COMM_ALL_REDUCE ? i : me * part + i);
            bad |= t->host[i] != sum;
        }
    else
        for (int j = 0; j < n; j++) {
            size_t first = 0; // where rank j's rows to this rank begin in what it sends
            for (int k = 0; k < me; k++) first += rows(j, k, part);
            for (int64_t i = 0; i < t->from[j]; i++) bad |= t->host[at++] != value(j, first + i);
        }
    return bad;
}

int comm_selftest(const Grid *g, FILE *out) {
    struct {
        const char *name;
        Comm *g;
    } group[] = { { "all", g->all },
                  { "ep", g->ep_group },
                  { "fsdp", g->fsdp_group },
                  { "dense", g->dense_group },
                  { "dp", g->dp_group } };
    const size_t bytes = LARGE * sizeof(float);
    Bench t = { 0,
                (float *)xmalloc(2 * bytes, "self-test"),
                0,
                0,
                (int64_t *)xmalloc((size_t)g->world * 8, "self-test"),
                (int64_t *)xmalloc((size_t)g->world * 8, "self-test") };
    Arena arena = arena_counting("self-test");
    for (int pass = 0; pass < 2; pass++) {
        t.a = (float *)arena_take(&arena, bytes, "messages");
        t.b = (float *)arena_take(&arena, 2 * bytes,
                                  "messages"); // all_to_all can bring up to twice the mean
        for (size_t i = 0; i < sizeof group / sizeof *group; i++)
            comm_reserve(group[i].g, bytes, &arena);
        if (pass == 0) arena_commit(&arena);
    }
    int failures = 0;
    if (g->rank == 0)
        fprintf(out,
                "self-test of communication: %s\n  group  ranks  call            correct   latency "
                "us    MB/s sent per rank\n",
                comm_describe());
    for (size_t i = 0; i < sizeof group / sizeof *group; i++) {
        if (comm_is_local(group[i].g)) {
            if (g->rank == 0) fprintf(out, "  %-5s  %5d  (nothing moves)\n", group[i].name, 1);
            continue;
        }
        int n = comm_size(group[i].g), small = (SMALL + n - 1) / n * n, large = LARGE / n * n;
        t.g = group[i].g;
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
                fprintf(out, "  %-5s  %5d  %-14s  %-7s  %11.1f  %12.1f\n", group[i].name, n,
                        comm_kind_name(kind), bad ? "WRONG" : "yes", 1e6 * best[0],
                        sent / best[1] * 1e-6);
        }
    }
    arena_free(&arena);
    free(t.host);
    free(t.to);
    free(t.from);
    return failures;
}
