// The process grid: checks a layout against the model, builds the groups in one order on all ranks
// (comm.h), and prints who is where and what was sent.
#define _GNU_SOURCE
#include "grid.h"
#include "../kernels/fail.h"
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char *const dispatch_name[] = { "alltoall", "allgather", "allreduce" };

// The values of ep that would fit: divisors of the world and of `must` (experts or KV heads) and of
// `also`. For hints.
static void divisors(char *text, size_t size, int world, int must, int also) {
    size_t n = 0;
    text[0] = 0;
    for (int e = 1; e <= world && n + 16 < size; e++)
        if (world % e == 0 && must % e == 0 && also % e == 0)
            n += snprintf(text + n, size - n, "%s%d", n ? ", " : "", e);
}

static void check_layout(const Config *c, int world, int dp, int *fsdp, int ep, int split_heads) {
    char fits[256];
    if (dp < 1 || ep < 1 || *fsdp < 0)
        die("--dp %d --fsdp %d --ep %d: sizes of groups are at least 1|leave --fsdp out to use the "
            "ranks that dp and ep leave",
            dp, *fsdp, ep);
    int64_t rest = (int64_t)dp * ep;
    if (dp > world || ep > world || *fsdp > world || rest > world)
        die("--dp %d --fsdp %d --ep %d needs %lld ranks and there are %d|start more ranks (mpirun "
            "-np %lld) or make the groups smaller",
            dp, *fsdp, ep, (long long)(rest * (*fsdp ? *fsdp : 1)), world,
            (long long)(rest * (*fsdp ? *fsdp : 1)));
    if (*fsdp == 0) {
        if (world % rest)
            die("--dp %d x --ep %d does not divide the %d ranks|choose dp and ep whose product "
                "divides %d",
                dp, ep, world, world);
        *fsdp = (int)(world / rest);
    }
    if (rest * *fsdp != world) {
        if (world % rest == 0)
            die("--dp %d x --fsdp %d x --ep %d = %lld, but there are %d ranks|with this dp and ep "
                "--fsdp %d fits (or leave --fsdp out)",
                dp, *fsdp, ep, (long long)(rest * *fsdp), world, (int)(world / rest));
        die("--dp %d x --fsdp %d x --ep %d = %lld, but there are %d ranks|choose sizes whose "
            "product is %d",
            dp, *fsdp, ep, (long long)(rest * *fsdp), world, world);
    }
    if (c->n_moe && c->E % ep) {
        divisors(fits, sizeof fits, world / dp, c->E, split_heads ? c->KV : 0);
        die("--ep %d does not divide the model's %d experts|--ep that fits here: %s", ep, c->E,
            fits);
    }
    if (split_heads && c->KV % ep) {
        divisors(fits, sizeof fits, world / dp, c->KV, c->n_moe ? c->E : 0);
        die("--attention heads with --ep %d does not divide the model's %d KV heads|--ep that fits "
            "here: %s; or --attention data",
            ep, c->KV, fits);
    }
}

Grid grid_plan(const Config *c, int world, int dp, int fsdp, int ep, Dispatch dispatch,
               int split_heads) {
    Grid g;
    memset(&g, 0, sizeof g);
    check_layout(c, world, dp, &fsdp, ep, split_heads);
    g.world = world;
    g.dp = dp;
    g.fsdp = fsdp;
    g.ep = ep;
    g.dispatch = dispatch;
    g.split_heads = split_heads;
    // allreduce replicates tokens over ep: the ranks of an ep group read the same data and count as
    // one.
    g.data_ranks = world / (dispatch == DISPATCH_ALLREDUCE ? ep : 1);
    return g;
}

Grid grid_build(const Config *c, int dp, int fsdp, int ep, Dispatch dispatch, int split_heads) {
    Grid g = grid_plan(c, comm_world_size(), dp, fsdp, ep, dispatch, split_heads);
    g.rank = comm_world_rank();
    g.ep_rank = g.rank % g.ep;
    g.fsdp_rank = g.rank / g.ep % g.fsdp;
    g.dp_rank = g.rank / (g.ep * g.fsdp);
    g.data_rank = g.rank / (g.world / g.data_ranks);
    // Four families of groups are arithmetic progressions of world ranks: (first member, stride,
    // size).
    int *ranks = (int *)xmalloc(g.world * sizeof *ranks, "ranks of a group");
    struct {
        const char *name;
        int first, stride, n;
        Comm **group;
    } family[] = {
        { "all", 0, 1, g.world, &g.all },
        { "ep", g.rank - g.ep_rank, 1, g.ep, &g.ep_group },
        { "fsdp", g.rank - g.fsdp_rank * g.ep, g.ep, g.fsdp, &g.fsdp_group },
        { "dense", g.dp_rank * g.fsdp * g.ep, 1, g.fsdp * g.ep, &g.dense_group },
        { "dp", g.fsdp_rank * g.ep + g.ep_rank, g.fsdp * g.ep, g.dp, &g.dp_group },
    };
    for (size_t f = 0; f < sizeof family / sizeof *family; f++) {
        for (int i = 0; i < family[f].n; i++) ranks[i] = family[f].first + i * family[f].stride;
        *family[f].group = comm_group(family[f].name, ranks, family[f].n);
    }
    free(ranks);
    return g;
}

ShardSpec grid_shard_spec(const Grid *g) {
    ShardSpec shard;
    shard.ep = g->ep;
    shard.ep_rank = g->ep_rank;
    shard.dense_shards = g->fsdp * g->ep;
    shard.dense_index = g->fsdp_rank * g->ep + g->ep_rank;
    shard.local_shards = g->fsdp;
    shard.local_index = g->fsdp_rank;
    shard.split_heads = g->split_heads;
    return shard;
}

// ---- the table ------------------------------------------------------------------------------
typedef struct {
    char *p;
    size_t used, size;
} Text;

static void append(Text *t, const char *format, ...) MOE_PRINTF(2, 3);
static void append(Text *t, const char *format, ...) {
    va_list args;
    va_start(args, format);
    int n = vsnprintf(t->p + t->used, t->size - t->used, format, args);
    va_end(args);
    t->used += (size_t)n < t->size - t->used ? (size_t)n : t->size - t->used - 1;
}

// "0 1 2 3" up to 8 members, else "0 4 8 .. 124".
static void append_members(Text *t, int width, int first, int stride, int n) {
    char s[96];
    Text list = { s, 0, sizeof s };
    for (int i = 0; i < n && n <= 8; i++) append(&list, "%s%d", i ? " " : "", first + i * stride);
    if (n > 8)
        append(&list, "%d %d %d .. %d", first, first + stride, first + 2 * stride,
               first + (n - 1) * stride);
    append(t, "  %-*s", width, s);
}

enum { TABLE_ROWS = 32, TABLE_LINE = 256 };

char *grid_table(const Grid *g) {
    Text t = { 0, 0, (TABLE_ROWS + 4) * TABLE_LINE };
    t.p = (char *)xmalloc(t.size, "grid table");
    append(&t,
           "grid: %d rank%s = dp %d x fsdp %d x ep %d, dispatch %s, attention %s, %d read%s "
           "distinct data\n",
           g->world, g->world == 1 ? "" : "s", g->dp, g->fsdp, g->ep, dispatch_name[g->dispatch],
           g->split_heads ? "heads" : "data", g->data_ranks, g->data_ranks == 1 ? "s" : "");
    if (g->world == 1) return t.p;
    append(&t, "  rank  dp fsdp  ep  data  %-22s  %-22s  %-22s  %s\n", "tokens travel (ep)",
           "expert shards (fsdp)", "dense shards (dense)", "copies (dp)");
    int rows = g->world < TABLE_ROWS ? g->world : TABLE_ROWS;
    for (int r = 0; r < rows; r++) {
        int e = r % g->ep;
        int f = r / g->ep % g->fsdp;
        int d = r / (g->ep * g->fsdp);
        int inner = g->fsdp * g->ep;
        append(&t, "  %4d %3d %4d %3d %5d", r, d, f, e,
               g->dispatch == DISPATCH_ALLREDUCE ? r / g->ep : r);
        append_members(&t, 22, r - e, 1, g->ep);
        append_members(&t, 22, r - f * g->ep, g->ep, g->fsdp);
        append_members(&t, 22, d * inner, 1, inner);
        append_members(&t, 1, f * g->ep + e, inner, g->dp);
        append(&t, "\n");
    }
    if (g->world > rows) append(&t, "  ... %d more\n", g->world - rows);
    return t.p;
}

char *grid_traffic(const Grid *g, int reset) {
    const struct {
        const char *name;
        Comm *group;
    } family[] = {
        { "ep: tokens, routing, heads", g->ep_group },
        { "fsdp: experts", g->fsdp_group },
        { "dense: all other weights", g->dense_group },
        { "dp: sums of shards", g->dp_group },
        { "all: statistics", g->all },
    };
    enum { FAMILIES = (int)(sizeof family / sizeof *family) };
    Text t = { 0, 0, (FAMILIES * COMM_KINDS + 2) * TABLE_LINE };
    CommTraffic total = { 0, 0, 0 };
    t.p = (char *)xmalloc(t.size, "traffic table");
    t.p[0] = 0;
    for (int f = 0; f < FAMILIES; f++)
        for (int k = 0; k < COMM_KINDS; k++) {
            CommTraffic c = comm_traffic(family[f].group, k, reset);
            if (!c.calls || comm_is_local(family[f].group)) continue;
            if (!total.calls)
                append(&t, "communication of rank %d\n  %-28s %-16s %8s %14s %10s\n", g->rank,
                       "group", "call", "calls", "bytes sent", "ms");
            append(&t, "  %-28s %-16s %8lld %14lld %10.2f\n", family[f].name, comm_kind_name(k),
                   (long long)c.calls, (long long)c.bytes, 1e3 * c.seconds);
            total.calls += c.calls;
            total.bytes += c.bytes;
            total.seconds += c.seconds;
        }
    if (total.calls)
        append(&t, "  %-28s %-16s %8lld %14lld %10.2f\n", "together", "", (long long)total.calls,
               (long long)total.bytes, 1e3 * total.seconds);
    return t.p;
}

int grid_threads(int option) {
    if (option > 0) return option;
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    int ranks = comm_local_size();
    int threads = cores > ranks ? (int)(cores / ranks) : 1;
    // A launcher may have bound the rank to fewer cores: more threads than those would only wait
    // for each other.
    cpu_set_t bound;
    if (!sched_getaffinity(0, sizeof bound, &bound) && CPU_COUNT(&bound) > 0 &&
        CPU_COUNT(&bound) < threads)
        threads = CPU_COUNT(&bound);
    return threads;
}
