// Collectives, grid and blocks against the obvious answer, on any number of ranks: every rank can
// compute every other rank's buffers, so each checks its result alone.
//
//   test_comm [--force] [--check] [--big] [--fault NAME]          alone or under mpirun; prints "N
//   passed, M failed" on rank 0, exit status 1 if any rank failed
//
// --big adds messages over 2 GB. --fault does something wrong on purpose: the run must then end
// with a line that names it (test_comm.sh looks at the lines).
#define _GNU_SOURCE
#include "transport.h"
#include "fsdp.h"
#include "../kernels/fail.h"
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "test_device.h"

static int rank, world, passed, failed;

static void check(int ok, const char *what, const char *group, int n) {
    if (ok) {
        passed++;
        return;
    }
    failed++;
    printf("FAIL rank %d: %s, group %s of %d\n", rank, what, group, n);
    fflush(stdout);
}

// ---- numbers: a function of (who, index), so that nothing needs to be sent to know them -----
static uint64_t mix(uint64_t x) {
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9u;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebu;
    return x ^ x >> 31;
}
static double number(uint64_t who,
                     uint64_t i) { // wide range of magnitudes: the order of a sum shows in its bits
    uint64_t h = mix(who * 0x9e3779b97f4a7c15u + i + 1);
    double x = (double)(h >> 11) / (double)(1ull << 53) - 0.5;
    return x * (double)(1 << (h & 7));
}
static float from_bf16(uint16_t b) {
    uint32_t u = (uint32_t)b << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
static uint16_t to_bf16(float f) { // round to nearest even, by arithmetic rather than by bits:
                                   // candidates are the two neighbours
    uint32_t u;
    memcpy(&u, &f, 4);
    uint16_t lo = (uint16_t)(u >> 16);
    uint16_t hi = (uint16_t)(lo + 1);
    double a = (double)f - from_bf16(lo);
    double b = (double)from_bf16(hi) - f;
    if (f < 0) {
        a = -a;
        b = -b;
    }
    if (a == b) return lo & 1 ? hi : lo;
    return a < b ? lo : hi;
}
static void store(void *p, size_t i, Dtype t, double x) {
    if (t == DTYPE_F32)
        ((float *)p)[i] = (float)x;
    else if (t == DTYPE_F64)
        ((double *)p)[i] = x;
    else if (t == DTYPE_BF16)
        ((uint16_t *)p)[i] = to_bf16((float)x);
    else if (t == DTYPE_I32)
        ((int32_t *)p)[i] = (int32_t)(x * 1000);
    else
        ((int64_t *)p)[i] = (int64_t)(x * 1e12);
}
static void fill(void *p, size_t n, Dtype t, uint64_t who, size_t first) {
    for (size_t i = 0; i < n; i++) store(p, i, t, number(who, first + i));
}

// Adds element i of `from` to a running sum as the rule says (fp32 for fp32 and bf16, else the type
// itself), and stores a sum.
typedef struct {
    float f;
    double d;
    int64_t i;
} Sum;
static void sum_add(Sum *s, const void *from, size_t i, Dtype t) {
    if (t == DTYPE_F32)
        s->f += ((const float *)from)[i];
    else if (t == DTYPE_BF16)
        s->f += from_bf16(((const uint16_t *)from)[i]);
    else if (t == DTYPE_F64)
        s->d += ((const double *)from)[i];
    else if (t == DTYPE_I32)
        s->i += ((const int32_t *)from)[i];
    else
        s->i += ((const int64_t *)from)[i];
}
static void sum_store(const Sum *s, void *to, size_t i, Dtype t) {
    if (t == DTYPE_F32)
        ((float *)to)[i] = s->f;
    else if (t == DTYPE_BF16)
        ((uint16_t *)to)[i] = to_bf16(s->f);
    else if (t == DTYPE_F64)
        ((double *)to)[i] = s->d;
    else if (t == DTYPE_I32)
        ((int32_t *)to)[i] = (int32_t)s->i;
    else
        ((int64_t *)to)[i] = s->i;
}
// The sum over n ranks' elements [first, first + count) of what fill(rank j: salt + j) makes, added
// to `start` (or to nothing): the obvious loop.
static void expect_sum(void *out, const void *start, int n, size_t first, size_t count, Dtype t,
                       uint64_t salt) {
    char element[8];
    for (size_t i = 0; i < count; i++) {
        Sum s = { 0, 0, 0 };
        Sum base = { 0, 0, 0 };
        for (int j = 0; j < n; j++) {
            store(element, 0, t, number(salt + (uint64_t)j, first + i));
            sum_add(&s, element, 0, t);
        }
        if (start) {
            sum_add(&base, start, i, t);
            s.f = base.f + s.f;
            s.d = base.d + s.d;
            s.i = base.i + s.i;
        }
        sum_store(&s, out, i, t);
    }
}

// ---- groups ---------------------------------------------------------------------------------
typedef struct {
    const char *name;
    Comm *g;
} Group;
static Group group[4];
static int n_groups;

static void build_groups(void) {
    int *ranks = (int *)xmalloc(world * sizeof *ranks, "ranks");
    int n = 0;
    for (int r = 0; r < world; r++) ranks[n++] = r;
    group[n_groups].name = "all";
    group[n_groups++].g = comm_group("all", ranks, n);
    n = 0;
    for (int r = rank % 2; r < world; r += 2) ranks[n++] = r;
    group[n_groups].name = "parity";
    group[n_groups++].g = comm_group("parity", ranks, n);
    group[n_groups].name = "self";
    group[n_groups++].g = comm_group("self", &rank, 1);
    // The first rank stays outside: a group that not everybody is in.
    n = 0;
    for (int r = 1; r < world; r++) ranks[n++] = r;
    Comm *rest = comm_group("rest", ranks, rank ? n : 0);
    check(!!rest == (rank > 0), "ranks outside get no group", "rest", n);
    if (rest) {
        group[n_groups].name = "rest";
        group[n_groups++].g = rest;
    }
    free(ranks);
}

// ---- collectives ----------------------------------------------------------------------------
static const Dtype sum_types[] = { DTYPE_F32, DTYPE_F64, DTYPE_BF16, DTYPE_I32, DTYPE_I64 };
static const size_t lengths[] = {
    0, 1, 3, 256, 1003, 20000
}; // the longer ones take rounds and pieces: see main

static void test_all_gather(Group q, size_t count, Dtype t) {
    int n = comm_size(q.g);
    int me = comm_rank(q.g);
    size_t w = dtype_size(t);
    char *recv = malloc(n * count * w + 1);
    char *send = malloc(count * w + 1);
    char *want = malloc(n * count * w + 1);
    for (int j = 0; j < n; j++) fill(want + j * count * w, count, t, 100 + (uint64_t)j, 0);
    fill(send, count, t, 100 + (uint64_t)me, 0);
    memset(recv, 7, n * count * w);
    comm_wait(all_gather_start(q.g, recv, send, count, t, STREAM_GATHER));
    check(!memcmp(recv, want, n * count * w), "all_gather", q.name, n);
    memset(recv, 7, n * count * w);
    memcpy(recv + me * count * w, send, count * w);
    comm_wait(all_gather_start(q.g, recv, recv + me * count * w, count, t, STREAM_GATHER));
    check(!memcmp(recv, want, n * count * w), "all_gather in place", q.name, n);
    free(recv);
    free(send);
    free(want);
}

static void test_reduce_scatter(Group q, size_t count, Dtype t) {
    int n = comm_size(q.g);
    int me = comm_rank(q.g);
    size_t w = dtype_size(t);
    char *send = malloc(n * count * w + 1);
    char *before = malloc(n * count * w + 1);
    char *recv = malloc(count * w + 1);
    char *want = malloc(count * w + 1);
    fill(send, n * count, t, 200 + (uint64_t)me, 0);
    memcpy(before, send, n * count * w);
    expect_sum(want, 0, n, me * count, count, t, 200);
    memset(recv, 7, count * w);
    comm_wait(reduce_scatter_start(q.g, recv, send, count, t, 0, STREAM_GATHER));
    check(!memcmp(recv, want, count * w), "reduce_scatter: bits of the sum in rank order", q.name,
          n);
    check(!memcmp(send, before, n * count * w), "reduce_scatter leaves its source", q.name, n);
    fill(recv, count, t, 299, 0);
    char *start = malloc(count * w + 1);
    memcpy(start, recv, count * w);
    expect_sum(want, start, n, me * count, count, t, 200);
    comm_wait(reduce_scatter_start(q.g, recv, send, count, t, 1, STREAM_GATHER));
    check(!memcmp(recv, want, count * w), "reduce_scatter accumulating", q.name, n);
    expect_sum(want, 0, n, me * count, count, t, 200);
    comm_wait(reduce_scatter_start(q.g, send + me * count * w, send, count, t, 0, STREAM_GATHER));
    check(!memcmp(send + me * count * w, want, count * w), "reduce_scatter in place", q.name, n);
    free(send);
    free(before);
    free(recv);
    free(want);
    free(start);
}

static void test_all_reduce(Group q, size_t count, Dtype t) {
    int n = comm_size(q.g);
    int me = comm_rank(q.g);
    size_t w = dtype_size(t);
    char *buffer = malloc(count * w + 1);
    char *want = malloc(count * w + 1);
    fill(buffer, count, t, 300 + (uint64_t)me, 0);
    expect_sum(want, 0, n, 0, count, t, 300);
    comm_wait(all_reduce_start(q.g, buffer, count, t, STREAM_GATHER));
    check(!memcmp(buffer, want, count * w), "all_reduce: bits of the sum in rank order", q.name, n);
    free(buffer);
    free(want);
}

static int64_t rows_between(uint64_t salt, int from,
                            int to) { // about a third of the pairs exchange nothing
    uint64_t h = mix(salt * 1000003 + (uint64_t)from * 1009 + (uint64_t)to + 17);
    return h % 3 ? (int64_t)(h >> 8) % 40 : 0;
}

// Fills what rank `from` sends: its rows to 0, 1, ...: row r to rank `to` is number((from, to), r *
// row + i).
static void test_all_to_all(Group q, uint64_t salt, size_t row, int empty_rank) {
    int n = comm_size(q.g);
    int me = comm_rank(q.g);
    int64_t *to = malloc(n * sizeof *to);
    int64_t *from = malloc(n * sizeof *from);
    int64_t sends = 0;
    int64_t recvs = 0;
    for (int j = 0; j < n; j++) {
        to[j] = j == empty_rank ? 0 : rows_between(salt, me, j); // empty_rank receives nothing
        from[j] = me == empty_rank ? 0 : rows_between(salt, j, me);
        sends += to[j];
        recvs += from[j];
    }
    float *send = malloc((sends * row + 1) * 4);
    float *recv = malloc((recvs * row + 1) * 4);
    float *want = malloc((recvs * row + 1) * 4);
    float *p = send;
    for (int j = 0; j < n; j++) {
        fill(p, to[j] * row, DTYPE_F32, salt + (uint64_t)(me * 64 + j), 0);
        p += to[j] * row;
    }
    p = want;
    for (int j = 0; j < n; j++) {
        fill(p, from[j] * row, DTYPE_F32, salt + (uint64_t)(j * 64 + me), 0);
        p += from[j] * row;
    }
    comm_traffic(q.g, COMM_ALL_TO_ALL, 1);
    Request r = all_to_all_start(q.g, recv, from, send, to, row * 4, STREAM_EXCHANGE);
    // The arrays of sizes belong to the caller again as soon as the call is started.
    int64_t to_me = to[me];
    memset(to, 0xee, n * sizeof *to);
    memset(from, 0xee, n * sizeof *from);
    comm_wait(r);
    check(!memcmp(recv, want, recvs * row * 4), "all_to_all of uneven rows", q.name, n);
    CommTraffic t = comm_traffic(q.g, COMM_ALL_TO_ALL, 1);
    check(t.calls == 1 && t.bytes == (sends - to_me) * (int64_t)row * 4,
          "all_to_all: bytes sent to others", q.name, n);
    free(to);
    free(from);
    free(send);
    free(recv);
    free(want);
}

static void test_traffic(Group q) {
    int n = comm_size(q.g);
    int me = comm_rank(q.g);
    enum { COUNT = 37 };
    float *a = calloc((size_t)n * COUNT, 4);
    float *b = calloc((size_t)n * COUNT, 4);
    for (int k = 0; k < COMM_KINDS; k++) comm_traffic(q.g, k, 1);
    comm_wait(all_gather_start(q.g, a, b, COUNT, DTYPE_F32, STREAM_GATHER));
    comm_wait(reduce_scatter_start(q.g, b, a, COUNT, DTYPE_F32, 0, STREAM_GATHER));
    comm_wait(all_reduce_start(q.g, a, COUNT, DTYPE_F32, STREAM_GATHER));
    check(comm_traffic(q.g, COMM_ALL_GATHER, 0).bytes == (n - 1) * COUNT * 4,
          "traffic of all_gather", q.name, n);
    check(comm_traffic(q.g, COMM_REDUCE_SCATTER, 0).bytes == (n - 1) * COUNT * 4,
          "traffic of reduce_scatter", q.name, n);
    // Over the group an all-reduce moves 2 (n - 1) buffers: each piece to its owner, each sum to
    // the others.
    int64_t bytes = comm_traffic(q.g, COMM_ALL_REDUCE, 0).bytes;
    int64_t *every = malloc(n * sizeof *every);
    int64_t total = 0;
    comm_all_gather_host(q.g, every, &bytes, sizeof bytes);
    for (int j = 0; j < n; j++) total += every[j];
    check(total == 2ll * (n - 1) * COUNT * 4 && every[me] == bytes, "traffic of all_reduce", q.name,
          n);
    free(a);
    free(b);
    free(every);
}

// <P x, y> = <x, P' y> over the group. The numbers are small integers: every product and sum is
// exact, so the two sides are equal, not close.
static double small(uint64_t who, size_t i) { return (double)(mix(who * 7919 + i) % 17) - 8; }
static double dot(const double *a, const double *b, size_t n) {
    double s = 0;
    for (size_t i = 0; i < n; i++) s += a[i] * b[i];
    return s;
}
static double *small_vector(uint64_t who, size_t n) {
    double *v = malloc((n + 1) * 8);
    for (size_t i = 0; i < n; i++) v[i] = small(who, i);
    return v;
}

static void test_adjoints(Group q) {
    enum { COUNT = 501 };
    int n = comm_size(q.g);
    int me = comm_rank(q.g);
    size_t all = (size_t)n * COUNT;
    double *x = small_vector(400 + (uint64_t)me, COUNT);
    double *y = small_vector(500 + (uint64_t)me, all);
    double *Px = malloc(all * 8);
    double *Pty = malloc(all * 8);
    comm_wait(all_gather_start(q.g, Px, x, COUNT, DTYPE_F64, STREAM_GATHER));
    comm_wait(reduce_scatter_start(q.g, Pty, y, COUNT, DTYPE_F64, 0, STREAM_GATHER));
    double left = comm_sum(q.g, dot(Px, y, all));
    double right = comm_sum(q.g, dot(x, Pty, COUNT));
    check(left == right && (left != 0), "<Px,y> = <x,P'y>: all_gather, reduce_scatter", q.name, n);
    memcpy(Px, y, all * 8);
    double *z = small_vector(600 + (uint64_t)me, all);
    memcpy(Pty, z, all * 8);
    comm_wait(all_reduce_start(q.g, Px, all, DTYPE_F64, STREAM_GATHER));
    comm_wait(all_reduce_start(q.g, Pty, all, DTYPE_F64, STREAM_GATHER));
    left = comm_sum(q.g, dot(Px, z, all));
    right = comm_sum(q.g, dot(y, Pty, all));
    check(left == right && (left != 0), "<Px,y> = <x,P'y>: all_reduce is its own adjoint", q.name,
          n);
    free(x);
    free(y);
    free(z);
    free(Px);
    free(Pty);
    int64_t *to = malloc(n * sizeof *to);
    int64_t *from = malloc(n * sizeof *from);
    size_t sends = 0;
    size_t recvs = 0;
    for (int j = 0; j < n; j++) {
        to[j] = rows_between(77, me, j);
        from[j] = rows_between(77, j, me);
        sends += to[j];
        recvs += from[j];
    }
    x = small_vector(700 + (uint64_t)me, sends);
    y = small_vector(800 + (uint64_t)me, recvs);
    Px = malloc((recvs + 1) * 8);
    Pty = malloc((sends + 1) * 8);
    comm_wait(all_to_all_start(q.g, Px, from, x, to, 8, STREAM_EXCHANGE));
    comm_wait(all_to_all_start(q.g, Pty, to, y, from, 8, STREAM_EXCHANGE));
    left = comm_sum(q.g, dot(Px, y, recvs));
    right = comm_sum(q.g, dot(x, Pty, sends));
    check(left == right, "<Px,y> = <x,P'y>: all_to_all, reversed", q.name, n);
    free(x);
    free(y);
    free(Px);
    free(Pty);
    free(to);
    free(from);
}

// Many calls in flight on several groups, waited for in another order than started.
static void test_outstanding(void) {
    enum { CALLS = 12, COUNT = 3001 };
    float *buffer[CALLS], *recv[CALLS];
    Request r[CALLS];
    int ok = 1;
    for (int i = 0; i < CALLS; i++) {
        Comm *g = group[i % 3].g;
        int n = comm_size(g);
        int me = comm_rank(g);
        buffer[i] = malloc((size_t)n * COUNT * 4);
        recv[i] = malloc((size_t)n * COUNT * 4);
        fill(buffer[i], (size_t)n * COUNT, DTYPE_F32, 900 + (uint64_t)(i * 64 + me), 0);
        if (i % 4 == 0)
            r[i] = all_reduce_start(g, buffer[i], COUNT, DTYPE_F32, STREAM_GATHER);
        else if (i % 4 == 1)
            r[i] = all_gather_start(g, recv[i], buffer[i], COUNT, DTYPE_F32, STREAM_EXCHANGE);
        else
            r[i] = reduce_scatter_start(g, recv[i], buffer[i], COUNT, DTYPE_F32, 0, STREAM_GATHER);
    }
    for (int k = 0; k < CALLS; k++) comm_wait(r[k * 5 % CALLS]);
    for (int i = 0; i < CALLS; i++) {
        Comm *g = group[i % 3].g;
        int n = comm_size(g);
        int me = comm_rank(g);
        float *want = malloc((size_t)n * COUNT * 4);
        if (i % 4 == 1) {
            for (int j = 0; j < n; j++)
                fill(want + (size_t)j * COUNT, COUNT, DTYPE_F32, 900 + (uint64_t)(i * 64 + j), 0);
            ok &= !memcmp(want, recv[i], (size_t)n * COUNT * 4);
        } else {
            expect_sum(want, 0, n, i % 4 == 0 ? 0 : (size_t)me * COUNT, COUNT, DTYPE_F32,
                       900 + (uint64_t)(i * 64));
            ok &= !memcmp(want, i % 4 == 0 ? buffer[i] : recv[i], COUNT * 4);
        }
        free(want);
        free(buffer[i]);
        free(recv[i]);
    }
    check(ok, "many calls in flight, waits in another order", "all, parity, self", world);
}

static void test_host(Group q) {
    int n = comm_size(q.g);
    int me = comm_rank(q.g);
    int ok = 1;
    for (int root = 0; root < n; root++) {
        int64_t v[5];
        for (int i = 0; i < 5; i++) v[i] = me == root ? root * 10 + i : -1;
        comm_broadcast(q.g, v, sizeof v, root);
        for (int i = 0; i < 5; i++) ok &= v[i] == root * 10 + i;
    }
    check(ok, "broadcast from each rank", q.name, n);
    check(comm_max(q.g, me == n / 2 ? 1000 : -me) == 1000 && comm_max(q.g, -5 - me) == -5,
          "comm_max", q.name, n);
    double sum = number(1, 0);
    for (int j = 1; j < n; j++) sum += number(1, (uint64_t)j);
    check(comm_sum(q.g, number(1, (uint64_t)me)) == sum, "comm_sum in rank order", q.name, n);
    comm_barrier(q.g);
}

// One message over 2 GB in each direction: 64-bit sizes, pieces under MPI's int.
static void test_big(void) {
    size_t bytes = ((size_t)9 << 28) + 12345; // 2.25 GiB
    int n = world;
    if (n != 2) return;
    unsigned char *recv = malloc(2 * bytes);
    if (!recv) {
        printf("no memory for --big\n");
        return;
    }
    unsigned char *mine = recv + rank * bytes;
    unsigned char *other = recv + (1 - rank) * bytes;
    for (size_t i = 0; i < bytes; i++) {
        mine[i] = (unsigned char)(i * 31 + (i >> 24) + rank);
        other[i] = 0;
    }
    double since = now_seconds();
    comm_wait(all_gather_start(group[0].g, recv, mine, bytes, DTYPE_U8, STREAM_GATHER));
    if (rank == 0) printf("%.2f GB in %.1f s\n", 1e-9 * (double)bytes, now_seconds() - since);
    size_t wrong = 0;
    for (size_t i = 0; i < bytes; i++)
        wrong += other[i] != (unsigned char)(i * 31 + (i >> 24) + (1 - rank));
    check(wrong == 0, "message over 2 GB", "all", n);
    free(recv);
}

// ---- grid and blocks ------------------------------------------------------------------------
static const char *const config_text =
    "{\"model_type\": \"qwen3_moe\", \"hidden_size\": 24, \"num_hidden_layers\": 4, "
    "\"num_attention_heads\": 8, \"num_key_value_heads\": 4, \"head_dim\": 6,"
    "\"vocab_size\": 300, \"num_experts\": 24, \"num_experts_per_tok\": 2, "
    "\"moe_intermediate_size\": 10, \"intermediate_size\": 40, \"mlp_only_layers\": [1],"
    "\"decoder_sparse_step\": 1, \"max_position_embeddings\": 64, \"tie_word_embeddings\": %s}";

static Config small_config(int tied) {
    char path[64];
    snprintf(path, sizeof path, "/tmp/test_comm.%d.json", (int)getpid());
    FILE *file = fopen(path, "w");
    if (!file) die("cannot write %s|need a writable /tmp", path);
    fprintf(file, config_text, tied ? "true" : "false");
    fclose(file);
    Config c = config_read(path);
    unlink(path);
    return c;
}

// What element i of a gathered block holds, and the gradient that a rank makes for it. Local blocks
// differ by ep rank.
static uint64_t block_key(const Grid *g, int local, int block) {
    return 10000 + (uint64_t)block * 64 + (local ? (uint64_t)g->ep_rank + 1 : 0);
}
static uint64_t gradient_key(int world_rank, int block, int round) {
    return 50000 + (uint64_t)((block * 8 + round) * 64 + world_rank);
}

// number() as a weight or gradient of this build; reads of floatX and gradX go through bytes, as
// the types intend.
static double value_x(const void *p, int64_t i, Dtype t) {
    if (t == DTYPE_F64) return ((const double *)p)[i];
    return t == DTYPE_BF16 ? from_bf16(((const uint16_t *)p)[i]) : ((const float *)p)[i];
}

typedef struct {
    const Model *m;
    const Grid *g;
    Fsdp *f;
    int rounds, bad_weight, bad_gradient;
} Walk;

static void use_weights(Walk *w, int b) {
    if (b < 0) return;
    const Block *k = &w->m->block[b];
    floatX *W = (floatX *)xmalloc(k->size * sizeof *W, "weights");
    char want[8];
    device_download(W, fsdp_get(w->f, b), k->size * sizeof *W);
    for (int64_t i = 0; i < k->size; i++) {
        store(want, 0, DTYPE_FLOATX, number(block_key(w->g, k->local, b), (uint64_t)i));
        w->bad_weight += value_x(W, i, DTYPE_FLOATX) != value_x(want, 0, DTYPE_FLOATX);
    }
    free(W);
}

static void make_gradient(Walk *w, int b, int round) {
    if (b < 0) return;
    gradX *G = fsdp_grad(w->f, b);
    size_t bytes = w->m->block[b].size * sizeof(gradX);
    real *p = (real *)xmalloc(bytes, "gradients");
    device_download(p, G, bytes);
    int add = round > 0 && fsdp_accumulates_in_place(w->f, b); // what a kernel is told
    for (int64_t i = 0; i < w->m->block[b].size; i++) {
        real x = (real)number(gradient_key(w->g->rank, b, round), (uint64_t)i);
        p[i] = add ? p[i] + x : x;
    }
    device_upload(G, p, bytes);
    free(p);
}

// The shard gradient must be, bit by bit: over dp in rank order, of rounds in order, of the ranks
// of the group in order.
static void use_gradient(Walk *w, int b) {
    if (b < 0) return;
    const Grid *g = w->g;
    const Block *k = &w->m->block[b];
    real *shard = (real *)xmalloc(k->shard * sizeof *shard, "gradients");
    device_download(shard, fsdp_grad_shard(w->f, b), k->shard * sizeof *shard);
    int n = k->local ? g->fsdp : g->fsdp * g->ep;
    for (int64_t i = 0; i < k->shard; i++) {
        real total = 0;
        for (int d = 0; d < g->dp; d++) {
            real copy = 0;
            for (int round = 0; round < w->rounds; round++) {
                real sum = 0;
                for (int j = 0; j < n; j++) {
                    int r = d * g->fsdp * g->ep + (k->local ? j * g->ep + g->ep_rank : j);
                    sum += (real)number(gradient_key(r, b, round), (uint64_t)(k->shard0 + i));
                }
                copy += sum;
            }
            total += copy;
        }
        w->bad_gradient += shard[i] != total;
    }
    free(shard);
    fsdp_grad_done(w->f, b);
}

// The calls of one update as model/step makes them. layered: a layer's gradient is used as soon as
// the next one is made (--update layer).
static void walk_update(Walk *w, int layered) {
    const Model *m = w->m;
    int L = m->c.L;
    int tied = m->c.tied;
    for (int round = 0; round < w->rounds; round++) {
        int last = round == w->rounds - 1;
        fsdp_gather(w->f, m->embed_block);
        use_weights(w, m->embed_block);
        fsdp_release(w->f, m->embed_block);
        fsdp_gather(w->f, m->dense_block[0]);
        fsdp_gather(w->f, m->local_block[0]);
        for (int l = 0; l < L; l++) {
            if (l + 1 < L) {
                fsdp_gather(w->f, m->dense_block[l + 1]);
                fsdp_gather(w->f, m->local_block[l + 1]);
            }
            use_weights(w, m->dense_block[l]);
            use_weights(w, m->local_block[l]);
            fsdp_release(w->f, m->dense_block[l]);
            if (m->local_block[l] >= 0) fsdp_release(w->f, m->local_block[l]);
        }
        use_weights(w, m->head_block);
        if (tied) use_weights(w, m->embed_block);
        make_gradient(w, m->head_block, round);
        if (tied) make_gradient(w, m->embed_block, round);
        fsdp_release(w->f, m->head_block);
        if (tied) fsdp_release(w->f, m->embed_block);
        fsdp_reduce(w->f, m->head_block, round > 0);
        if (layered) use_gradient(w, m->head_block);
        fsdp_gather(w->f, m->dense_block[L - 1]);
        fsdp_gather(w->f, m->local_block[L - 1]);
        int waiting = -1;
        int behind = fsdp_reduces(w->f); // layer whose reduction runs under the next
                                         // one; used at once where nothing moves
        for (int l = L - 1; l >= 0; l--) {
            if (l > 0) {
                fsdp_gather(w->f, m->dense_block[l - 1]);
                fsdp_gather(w->f, m->local_block[l - 1]);
            }
            use_weights(w, m->dense_block[l]);
            use_weights(w, m->local_block[l]);
            make_gradient(w, m->dense_block[l], round);
            make_gradient(w, m->local_block[l], round);
            fsdp_release(w->f, m->dense_block[l]);
            if (m->local_block[l] >= 0) fsdp_release(w->f, m->local_block[l]);
            fsdp_reduce(w->f, m->dense_block[l], round > 0);
            if (m->local_block[l] >= 0) fsdp_reduce(w->f, m->local_block[l], round > 0);
            if (layered && waiting >= 0) {
                use_gradient(w, m->dense_block[waiting]);
                use_gradient(w, m->local_block[waiting]);
            }
            waiting = behind ? l : -1;
            if (layered && !behind) {
                use_gradient(w, m->dense_block[l]);
                use_gradient(w, m->local_block[l]);
            }
        }
        if (layered && waiting >= 0) {
            use_gradient(w, m->dense_block[waiting]);
            use_gradient(w, m->local_block[waiting]);
        }
        if (!tied) make_gradient(w, m->embed_block, round);
        fsdp_reduce(w->f, m->embed_block, round > 0);
        if (layered)
            use_gradient(w, m->embed_block);
        else if (last)
            for (int b = 0; b < m->n_blocks; b++) use_gradient(w, b);
    }
    comm_step_end();
}

static void test_fsdp(int dp, int fsdp, int ep, int tied, int split_heads, int layered,
                      int rounds) {
    Config c = small_config(tied);
    Grid g = grid_build(&c, dp, fsdp, ep, DISPATCH_ALLTOALL, split_heads);
    Model m = model_build(c, grid_shard_spec(&g));
    Arena count = arena_counting("blocks");
    Arena arena = arena_counting("blocks");
    fsdp_free(fsdp_create(&m, &g, !layered, &count));
    arena.capacity = count.used;
    fsdp_free(fsdp_create(&m, &g, !layered, &arena));
    check(count.used == arena.used && count.used > 0, "counting twice counts the same", "grid",
          world);
    arena_commit(&arena);
    Walk w = { &m, &g, 0, rounds, 0, 0 };
    w.f = fsdp_create(&m, &g, !layered, &arena);
    check(arena.used == count.used, "the arena holds what was counted", "grid", world);
    fsdp_rounds(w.f, rounds);
    for (int b = 0; b < m.n_blocks; b++) {
        floatX *W = (floatX *)xmalloc(m.block[b].shard * sizeof *W, "weights");
        fill(W, m.block[b].shard, DTYPE_FLOATX, block_key(&g, m.block[b].local, b),
             m.block[b].shard0);
        device_upload(fsdp_shard(w.f, b), W, m.block[b].shard * sizeof *W);
        free(W);
    }
    for (int update = 0; update < 2; update++) {
        comm_where(update + 1, -1, "update");
        walk_update(&w, layered);
    }
    char what[128];
    snprintf(what, sizeof what, "blocks dp %d fsdp %d ep %d%s%s%s rounds %d", dp, fsdp, ep,
             tied ? " tied" : "", split_heads ? " heads" : "", layered ? " update layer" : "",
             rounds);
    check(w.bad_weight == 0, what, "weights", world);
    check(w.bad_gradient == 0, what, "gradients", world);
    fsdp_free(w.f);
    arena_free(&arena);
    model_free(&m);
}

static void test_grid(void) {
    Config c = small_config(0);
    int ok = 1;
    for (int ep = 1; ep <= world; ep++) {
        if (world % ep || c.E % ep) continue;
        Grid g = grid_build(&c, 1, 0, ep, DISPATCH_ALLREDUCE, 0);
        ok &= g.fsdp == world / ep && (g.dp_rank * g.fsdp + g.fsdp_rank) * g.ep + g.ep_rank == rank;
        ok &= comm_size(g.ep_group) == ep && comm_rank(g.ep_group) == g.ep_rank &&
              comm_size(g.fsdp_group) == g.fsdp && comm_rank(g.fsdp_group) == g.fsdp_rank;
        ok &= comm_size(g.dense_group) == g.fsdp * g.ep &&
              comm_rank(g.dense_group) == g.fsdp_rank * g.ep + g.ep_rank &&
              comm_size(g.dp_group) == 1;
        ok &= g.data_ranks == world / ep && g.data_rank == rank / ep;
        char *table = grid_table(&g);
        if (rank == 0 && getenv("TEST_COMM_TABLE")) printf("%s", table);
        ok &= strlen(table) > 10;
        free(table);
    }
    config_free(&c);
    check(ok, "grid: ranks, groups, data ranks", "grid", world);
}

#include "test_comm_faults.h"

int main(int argc, char **argv) {
    comm_init(&argc, &argv);
    CommOptions o = { 60, 0, 0 };
    const char *fault_name = 0;
    int big = 0;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--force"))
            o.force = 1;
        else if (!strcmp(argv[i], "--check"))
            o.check = 1;
        else if (!strcmp(argv[i], "--big"))
            big = 1;
        else if (!strcmp(argv[i], "--timeout") && i + 1 < argc)
            o.timeout = atof(argv[++i]);
        else if (!strcmp(argv[i], "--fault") && i + 1 < argc)
            fault_name = argv[++i];
        else
            die("unknown argument %s|test_comm [--force] [--check] [--big] [--timeout S] [--fault "
                "NAME]",
                argv[i]);
    }
    if (!big) {
        comm_message_bytes = 5000;
        comm_stage_bytes = 8192;
    } // so that ordinary tests need several rounds and pieces
    comm_start(o);
    rank = comm_world_rank();
    world = comm_world_size();
    device_init(comm_local_rank(), 1);
    build_groups();
    if (fault_name) {
        fault(fault_name);
        comm_finish();
        return 0;
    }
    double since = now_seconds();
    for (int i = 0; i < n_groups; i++) {
        for (size_t l = 0; l < sizeof lengths / sizeof *lengths; l++)
            for (size_t t = 0; t < sizeof sum_types / sizeof *sum_types; t++) {
                test_all_gather(group[i], lengths[l], sum_types[t]);
                test_reduce_scatter(group[i], lengths[l], sum_types[t]);
                test_all_reduce(group[i], lengths[l], sum_types[t]);
            }
        for (uint64_t salt = 1; salt <= 30; salt++)
            test_all_to_all(group[i], salt, 1 + salt * salt % 97,
                            salt % 3 ? -1 : (int)salt % comm_size(group[i].g));
        test_traffic(group[i]);
        test_adjoints(group[i]);
        test_host(group[i]);
    }
    test_outstanding();
    if (big) test_big();
    test_grid();
    int turn = 0; // tied, heads, update mode and rounds vary from layout to layout
    for (int dp = 1; dp <= world; dp++)
        for (int ep = 1; dp * ep <= world; ep++) {
            if (world % (dp * ep) || ep > 4) continue;
            for (int rounds = 1; rounds <= 2; rounds++, turn++) {
                test_fsdp(dp, world / (dp * ep), ep, turn & 1, 4 % ep == 0 && turn & 2, 0, rounds);
                if (rounds == 1)
                    test_fsdp(dp, world / (dp * ep), ep, !(turn & 1), 4 % ep == 0 && !(turn & 2), 1,
                              1);
            }
        }
    int failures = (int)comm_sum(group[0].g, failed);
    if (rank == 0)
        printf("test_comm: %d rank%s, %s%s%s: %d passed, %d failed (%.1f s)\n", world,
               world == 1 ? "" : "s", comm_describe(), o.force ? ", forced" : "",
               o.check ? ", checked" : "", passed, failures, now_seconds() - since);
    device_finish();
    comm_finish();
    return failures > 0;
}
