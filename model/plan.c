// Memory, bytes and time of a layout: see plan.h.
#include "plan.h"
#include "../kernels/fail.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

static const char *const send_name[SEND_KINDS] = {
    "weights, dense",    "weights, experts", "gradients, dense", "gradients, experts",
    "gradients over dp", "routing ids",      "tokens",           "attention heads",
    "statistics"
};

// ---- bytes: the collectives of model/step.c, in its order. Direct exchange: an all-gather sends a
// rank's part to n-1 others, a reduce-scatter n-1 parts, an all-reduce both: the pieces of the
// others, then its own sum to each of them. Pieces are ceil(count / n) elements, the last ones
// shorter. ------------------------------------------------------------------
static double all_reduce_bytes(int64_t count, double width, int n, int rank) {
    if (n < 2) return 0;
    int64_t piece = (count + n - 1) / n, left = count - rank * piece,
            mine = left < 0       ? 0
                   : left < piece ? left
                                  : piece;
    return (double)(count - mine + (n - 1) * mine) * width;
}

double plan_uniform_rows(const Config *c, const Grid *g, int R) {
    if (g->ep < 2 || g->dispatch == DISPATCH_ALLREDUCE || !c->n_moe) return 0;
    if (g->dispatch == DISPATCH_ALLGATHER) return (double)(g->ep - 1) * R;
    double none = 1; // probability that none of K distinct experts lives on a given rank: C(E -
                     // E/ep, K) / C(E, K)
    for (int k = 0; k < c->K; k++)
        none *= (double)(c->E - c->E / g->ep - k > 0 ? c->E - c->E / g->ep - k : 0) / (c->E - k);
    return R * (g->ep - 1) * (1 - none);
}

double plan_most_rows(const Config *c, const Grid *g, int R) {
    if (g->ep < 2 || g->dispatch == DISPATCH_ALLREDUCE || !c->n_moe) return 0;
    int most = g->dispatch == DISPATCH_ALLTOALL && c->K < g->ep - 1 ? c->K : g->ep - 1;
    return (double)most * R;
}

Traffic plan_traffic(const Model *m, const Grid *g, const StepOptions *o, Routing routing) {
    const Config *c = &m->c;
    Traffic s;
    memset(&s, 0, sizeof s);
    double X = sizeof(floatX), G = sizeof(gradX), rounds = o->rounds,
           micro =
               (double)(o->batch / g->data_ranks) / o->micro_batch; // micro-batches of the update
    int64_t R = (int64_t)o->micro_batch * o->T,
            token = R * c->C; // rows and elements of a micro-batch
    for (int b = 0; b < m->n_blocks; b++) {
        const Block *k = &m->block[b];
        int n = k->local ? g->fsdp : g->fsdp * g->ep, ends = k->layer < 0 || k->layer == c->L;
        double gathers = (ends ? 1 + (c->tied && k->layer < 0) : 2) *
                         rounds; // a layer's weights forward and backward; ends once (a tied
                                 // embedding at both ends)
        s.bytes[k->local ? SEND_LOCAL_WEIGHTS : SEND_DENSE_WEIGHTS] +=
            gathers * (n - 1) * (double)k->shard * X;
        s.bytes[k->local ? SEND_LOCAL_GRADS : SEND_DENSE_GRADS] +=
            rounds * (n - 1) * (double)k->shard * G;
        s.bytes[SEND_DP] += all_reduce_bytes(k->shard, G, g->dp, g->dp_rank);
    }
    double passes = micro * c->n_moe, pairs = micro * c->L, others = g->ep - 1;
    int replicated = g->dispatch == DISPATCH_ALLREDUCE;
    if (replicated)
        s.bytes[SEND_TOKENS] =
            2 * passes *
            all_reduce_bytes(token, X, g->ep,
                             g->ep_rank); // y forward, dy backward; every rank knows topk
    else {
        double score = c->K * sizeof(real), copy = c->C * X;
        s.bytes[SEND_ROUTING] = 2 * passes * others * (double)R * c->K *
                                sizeof(int); // topk for forward's plan and for backward's
        // A dispatch sends, a combine sends back what came. Forward: dispatch (token, scores),
        // combine. Backward: dispatch dy, combine (dx, dscore), and the first again where the pool
        // was not kept.
        s.bytes[SEND_TOKENS] =
            passes * (routing.sent * (2 * copy + score + routing.respread * (copy + score)) +
                      routing.received * (2 * copy + score));
    }
    if (g->split_heads) {
        // forward: gather x, reduce the output. Backward: gather x again, gather d_out, reduce dx.
        // Recomputing attention repeats forward's two. Replicated tokens: reduce the output, reduce
        // d_out, and the output again where it is recomputed.
        s.bytes[SEND_HEADS] =
            replicated
                ? (2 + routing.reattended) * pairs * all_reduce_bytes(token, X, g->ep, g->ep_rank)
                : (5 + 2 * routing.reattended) * pairs * others * (double)token * X;
    }
    if (c->n_moe) { // counts, probabilities, z and entropy of a round
        int64_t E = (int64_t)c->n_moe * c->E;
        s.bytes[SEND_STATISTICS] = rounds * (2 * all_reduce_bytes(E, 8, g->world, g->rank) +
                                             all_reduce_bytes(2 * c->n_moe, 8, g->world, g->rank));
    }
    s.bytes[SEND_STATISTICS] += all_reduce_bytes(1, 8, g->world, g->rank); // the loss
    int dense = g->fsdp * g->ep, dense_rank = g->fsdp_rank * g->ep + g->ep_rank;
    if (!o->update_layer)
        s.bytes[SEND_STATISTICS] += all_reduce_bytes(
            m->n_blocks, 8, dense,
            dense_rank); // squares of the gradients: of all blocks at once, or layer by layer
    for (int l = -1; l <= c->L && o->update_layer; l++)
        s.bytes[SEND_STATISTICS] += all_reduce_bytes(
            l >= 0 && l < c->L && m->local_block[l] >= 0 ? 2 : 1, 8, dense, dense_rank);
    return s;
}

// ---- time: a roofline -----------------------------------------------------------------------
static const Machine machines[] = {
    // model FLOPs that the kernels of an update reach together: predicted from published kernels
    // for h200 (dev/ledger.py), for the others by the ratio of their dense products, 650, 250
    // and 1,500 to 700 TFLOP/s; copies; memory that a program gets; NVLink and network per GPU and
    // direction as collectives reach them
    { "h200", 445e12, 4.3e12, 139.0 * 1073741824, 300e9, 45e9, 8 },
    { "h100", 415e12, 2.9e12, 78.0 * 1073741824, 300e9, 45e9, 8 },
    { "a100", 160e12, 1.7e12, 78.0 * 1073741824, 200e9, 22e9, 8 },
    { "b200", 950e12, 7.0e12, 178.0 * 1073741824, 650e9, 45e9, 8 },
    { "cpu", 0.2e12, 2e10, 0, 5e9, 1e9, 64 },
};
enum { MACHINES = (int)(sizeof machines / sizeof machines[0]) };

Machine plan_machine(const char *name) {
    for (int i = 0; i < MACHINES; i++)
        if (!strcmp(machines[i].name, name)) return machines[i];
    die("--plan-device %s is not known|choose h200, h100, a100, b200 or cpu", name);
}

typedef struct {
    double compute, weights, tokens, exposed, optimizer, step, memory;
} Estimate; // exposed: of tokens, what no compute hides

// A group crosses nodes when its span of ranks does.
static double group_bandwidth(const Machine *k, int span) {
    return span > k->per_node ? k->network : k->link;
}

// Bytes that a step of the optimizer reads and writes for one parameter: gradient (twice: the
// norm), weight (or master read and written, weight written), moments read and written.
static double optimizer_bytes(OptimizerOptions o) {
    double weight = o.master ? 2 * sizeof(real) + sizeof(floatX) : 2 * sizeof(floatX);
    double moments = o.kind == OPT_ADAMW    ? 4 * sizeof(real)
                     : o.kind == OPT_ADAMW8 ? 4
                     : o.momentum != 0      ? 2 * sizeof(real)
                                            : 0;
    return 2 * sizeof(gradX) + weight + moments;
}

static Estimate estimate(const Model *m, const Grid *g, const StepOptions *o, OptimizerOptions opt,
                         const Traffic *s, size_t memory, const Machine *k) {
    const Config *c = &m->c;
    double extra = o->recompute == RECOMPUTE_LAYER ? 0.21
                   : o->recompute == RECOMPUTE_MOE ? 0.10
                                                   : 0; // of the time without it (dev/ledger.py)
    double tokens = (double)o->batch * o->T / g->data_ranks, shard = 0;
    for (int b = 0; b < m->n_blocks; b++) shard += (double)m->block[b].shard;
    Estimate e;
    e.memory = (double)memory;
    e.compute = tokens * config_flops_per_token(c, o->T) * (1 + extra) / k->flops;
    int inner = g->ep * g->fsdp;
    e.weights =
        (s->bytes[SEND_DENSE_WEIGHTS] + s->bytes[SEND_DENSE_GRADS]) / group_bandwidth(k, inner) +
        (s->bytes[SEND_LOCAL_WEIGHTS] + s->bytes[SEND_LOCAL_GRADS]) / group_bandwidth(k, inner) +
        s->bytes[SEND_DP] / group_bandwidth(k, g->world);
    e.tokens = (s->bytes[SEND_TOKENS] + s->bytes[SEND_ROUTING] + s->bytes[SEND_HEADS]) /
               group_bandwidth(k, g->ep);
    e.optimizer = shard * optimizer_bytes(opt) / k->memory_bandwidth;
    // Weight traffic runs under compute; token exchange does where there are at least three
    // micro-batches to interleave.
    double micro = (double)(o->batch / g->data_ranks) / o->rounds / o->micro_batch;
    e.exposed = micro >= 3 ? e.tokens / micro : e.tokens;
    double work = e.compute + e.exposed;
    e.step = (work > e.weights ? work : e.weights) + e.optimizer;
    return e;
}

static void print_bytes(FILE *out, double b) {
    if (b >= 1e9)
        fprintf(out, "%10.3f GB", b / 1e9);
    else if (b >= 1e6)
        fprintf(out, "%10.3f MB", b / 1e6);
    else
        fprintf(out, "%10.3f kB", b / 1e3);
}

// The tables of a layout; model_free takes them down.
static Model layout_model(const Config *c, const Grid *g) {
    Config copy = *c;
    copy.json = 0;
    copy.is_moe = (unsigned char *)xmalloc((size_t)c->L, "config");
    memcpy(copy.is_moe, c->is_moe, (size_t)c->L);
    return model_build(copy, grid_shard_spec(g));
}

static int keeps_blocks(const Config *c, const Grid *g) {
    Model m = layout_model(c, g);
    int keeps = !model_cuts_blocks(&m);
    model_free(&m);
    return keeps;
}

// g with other sizes of ep and fsdp; 0 where they divide neither the world nor the model.
static int other_layout(const Config *c, const Grid *g, int ep, int fsdp, Grid *other) {
    *other = *g;
    other->ep = ep, other->fsdp = fsdp, other->dp = g->world / ep / fsdp;
    other->data_ranks = g->world / (g->dispatch == DISPATCH_ALLREDUCE ? ep : 1);
    return g->world % (ep * fsdp) == 0 && (!c->n_moe || c->E % ep == 0) &&
           (!g->split_heads || c->KV % ep == 0);
}

void plan_check_blocks(const Config *c, const Grid *g) {
    if (keeps_blocks(c, g)) return;
    char fits[512] = "";
    int n = 0;
    Grid other;
    for (int ep = 1; ep <= g->world && ep <= 64; ep++)
        for (int fsdp = 1; fsdp * ep <= g->world; fsdp++)
            if (n < 6 && other_layout(c, g, ep, fsdp, &other) && keeps_blocks(c, &other)) {
                size_t at = strlen(fits);
                snprintf(fits + at, sizeof fits - at, "%s--dp %d --fsdp %d --ep %d",
                         n++ ? ", " : "", other.dp, fsdp, ep);
            }
    die("--optimizer adamw8bit: --dp %d --fsdp %d --ep %d cuts tensors inside their blocks of 256 elements|of %d ranks these fit: %s; or --optimizer adamw",
        g->dp, g->fsdp, g->ep, g->world, n ? fits : "none");
}

// One candidate: its memory and time. The model's tables are built and thrown away. `table`: where
// the byte table goes, or 0.
static Estimate try_layout(const Config *c, const Grid *g, StepOptions *o, OptimizerOptions opt,
                           const Machine *k, FILE *table, Traffic *uniform, Traffic *most) {
    Model m = layout_model(c, g);
    Trainer *t = trainer_create(&m, (Grid *)g, *o, opt, 1, table);
    *o = t->o; // with the micro-batch filled in
    double respread = o->recompute == RECOMPUTE_NONE || o->recompute == RECOMPUTE_AUTO ? 0 : 1,
           reattended = o->recompute == RECOMPUTE_LAYER;
    double rows = plan_uniform_rows(c, g, t->R), rows_most = plan_most_rows(c, g, t->R);
    Routing expected = { rows, rows, respread, reattended },
            worst = { rows_most, (double)(g->ep - 1) * t->R, respread, reattended };
    *uniform = plan_traffic(&m, g, o, expected);
    *most = plan_traffic(&m, g, o, worst);
    Estimate e = estimate(&m, g, o, opt, uniform, t->arena.used, k);
    trainer_free(t);
    model_free(&m);
    return e;
}

// The fastest layouts by the estimate that fit into memory: ep over the divisors of the world up to
// 64, fsdp over powers of two, dp what they leave.
static void recommend(FILE *out, const Config *c, const Grid *g, StepOptions o,
                      OptimizerOptions opt, const Machine *k) {
    enum { KEEP = 3 };
    struct {
        Grid grid;
        Estimate e;
    } best[KEEP];
    int n = 0;
    for (int ep = 1; ep <= g->world && ep <= 64; ep++) {
        for (int fsdp = 1; fsdp * ep <= g->world; fsdp *= 2) {
            Grid candidate;
            if (!other_layout(c, g, ep, fsdp, &candidate) || o.batch % candidate.data_ranks ||
                o.batch / candidate.data_ranks % o.rounds)
                continue;
            if (opt.kind == OPT_ADAMW8 && !keeps_blocks(c, &candidate)) continue;
            if (o.micro_batch && o.batch / candidate.data_ranks / o.rounds % o.micro_batch)
                continue;
            StepOptions with = o;
            Traffic uniform, most;
            Estimate e = try_layout(c, &candidate, &with, opt, k, 0, &uniform, &most);
            if (k->memory > 0 && e.memory > k->memory) continue;
            int at = n < KEEP ? n++ : KEEP;
            while (at > 0 && best[at - 1].e.step > e.step) {
                if (at < KEEP) best[at] = best[at - 1];
                at--;
            }
            if (at < KEEP) {
                best[at].grid = candidate;
                best[at].e = e;
            }
        }
    }
    if (!n) {
        fprintf(
            out,
            "no layout of %d ranks fits into %.0f GiB with these options: more ranks, --recompute layer, --optimizer adamw8bit --master off, or a smaller --micro-batch\n",
            g->world, k->memory / 1073741824);
        return;
    }
    fprintf(out, "layouts of %d ranks that fit, fastest first by this estimate:\n", g->world);
    for (int i = 0; i < n; i++)
        fprintf(out, "  --dp %d --fsdp %d --ep %d: %.1f GiB a rank, %.0f ms an update\n",
                best[i].grid.dp, best[i].grid.fsdp, best[i].grid.ep, best[i].e.memory / 1073741824,
                1e3 * best[i].e.step);
}

void plan_print(FILE *out, const Config *c, const Grid *g, StepOptions o, OptimizerOptions opt,
                const Machine *k) {
    StepOptions asked = o;
    Traffic uniform, most;
    fprintf(
        out,
        "plan       %d rank%s = dp %d x fsdp %d x ep %d; %lld sequences of %d an update; %s build\n",
        g->world, g->world > 1 ? "s" : "", g->dp, g->fsdp, g->ep, (long long)o.batch, o.T,
        PRECISION_NAME);
    if (sizeof(floatX) != 2 && strcmp(k->name, "cpu"))
        fprintf(
            out,
            "note       memory and bytes are those of this %s build, speeds those of bf16; `make PRECISION=bf16` plans what a GPU trains\n",
            PRECISION_NAME);
    Estimate e = try_layout(c, g, &o, opt, k, out, &uniform, &most);
    if (k->memory > 0)
        fprintf(out, "  %s of %.1f GiB\n",
                e.memory <= k->memory ? "fits: uses part" : "DOES NOT FIT into memory",
                k->memory / 1073741824);
    double total = 0, worst = 0;
    for (int i = 0; i < SEND_KINDS; i++) {
        total += uniform.bytes[i];
        worst += most.bytes[i];
    }
    if (g->world > 1) {
        fprintf(
            out,
            "bytes that a rank sends in an update (uniform routing; in brackets the most that any routing asks for)\n");
        for (int i = 0; i < SEND_KINDS; i++) {
            if (uniform.bytes[i] <= 0) continue;
            fprintf(out, "  %-20s ", send_name[i]);
            print_bytes(out, uniform.bytes[i]);
            if (most.bytes[i] > uniform.bytes[i]) {
                fprintf(out, "  [");
                print_bytes(out, most.bytes[i]);
                fprintf(out, "]");
            }
            fprintf(out, "\n");
        }
        fprintf(out, "  %-20s ", "together");
        print_bytes(out, total);
        if (worst > total) {
            fprintf(out, "  [");
            print_bytes(out, worst);
            fprintf(out, "]");
        }
        fprintf(out, "\n");
    }
    double tokens = (double)o.batch * o.T;
    fprintf(
        out,
        "time by roofline on %s (kernels %.0f TFLOP/s together, copies %.1f TB/s, links %.0f GB/s in a node of %d, %.0f GB/s between nodes%s; not a measurement)\n",
        k->name, k->flops / 1e12, k->memory_bandwidth / 1e12, k->link / 1e9, k->per_node,
        k->network / 1e9,
        o.recompute == RECOMPUTE_AUTO ? "; --recompute auto counted as none" : "");
    fprintf(
        out,
        "  compute %.1f ms, weights and gradients %.1f ms (under compute), tokens %.1f ms (%.1f ms not under compute), optimizer %.1f ms\n",
        1e3 * e.compute, 1e3 * e.weights, 1e3 * e.tokens, 1e3 * e.exposed, 1e3 * e.optimizer);
    fprintf(out, "  update %.1f ms, %.0f tokens/s in all, %.0f a rank; limited by %s\n",
            1e3 * e.step, tokens / e.step, tokens / e.step / g->world,
            e.weights > e.compute + e.exposed ? "moving weights and gradients"
            : e.exposed > e.compute           ? "moving tokens"
                                              : "compute");
    if (g->ep > k->per_node)
        fprintf(
            out,
            "warning    ep %d leaves a node of %d: tokens cross the network at %.0f GB/s; uniform routing sends %.1f kB a token and layer in each direction\n",
            g->ep, k->per_node, k->network / 1e9,
            plan_uniform_rows(c, g, 1) * c->C * sizeof(floatX) / 1e3);
    recommend(out, c, g, asked, opt, k);
    fflush(out);
}
