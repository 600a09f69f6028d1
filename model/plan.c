// Memory, bytes and time of a layout from the config alone: memory is trainer_create on a counting
// arena, bytes follow the collectives of model/step.c in its order, time is a roofline. Contracts
// in plan.h.
#include "plan.h"
#include "../kernels/fail.h"
#include <stdlib.h>
#include <string.h>

// ---- bytes ----------------------------------------------------------------------------------
// Everybody sends directly to everybody: in an all-gather a rank sends its part to n - 1 others, in
// a reduce-scatter n - 1 parts, and in an all-reduce both: the pieces of the others, then its own
// sum to each of them. Pieces have ceil(count / n) elements, the last ones fewer.
static double all_reduce_bytes(int64_t count, double width, int n, int rank) {
    if (n < 2) return 0;
    int64_t piece = (count + n - 1) / n;
    int64_t mine = count - rank * piece;
    if (mine < 0) mine = 0;
    if (mine > piece) mine = piece;
    return (double)(count - mine + (n - 1) * mine) * width;
}

static int tokens_move(const Config *c, const Grid *g) {
    return g->ep > 1 && g->dispatch != DISPATCH_ALLREDUCE && c->n_moe > 0;
}

double plan_uniform_rows(const Config *c, const Grid *g, int64_t R) {
    if (!tokens_move(c, g)) return 0;
    if (g->dispatch == DISPATCH_ALLGATHER) return (double)((g->ep - 1) * R);
    // The probability that none of K distinct experts lives on a given rank is
    // C(E - E/ep, K) / C(E, K).
    double none = 1;
    for (int k = 0; k < c->K; k++) {
        int elsewhere = c->E - c->E / g->ep - k;
        none *= elsewhere > 0 ? (double)elsewhere / (c->E - k) : 0;
    }
    return (double)(R * (g->ep - 1)) * (1 - none);
}

double plan_most_rows(const Config *c, const Grid *g, int64_t R) {
    if (!tokens_move(c, g)) return 0;
    int64_t copies = g->ep - 1;
    if (g->dispatch == DISPATCH_ALLTOALL && c->K < copies) copies = c->K;
    return (double)(copies * R);
}

// A layer's weights travel for forward and for backward, those of the ends once, and a tied
// embedding to both ends.
static void block_traffic(Traffic *s, const Model *m, const Grid *g, const StepOptions *o) {
    const double X = sizeof(floatX), G = sizeof(gradX);
    for (int b = 0; b < m->n_blocks; b++) {
        const Block *k = &m->block[b];
        double shard = (double)k->shard;
        double gathers = 2;
        if (k->layer < 0) gathers = m->c.tied ? 2 : 1;
        if (k->layer == m->c.L) gathers = 1;
        int n = k->local ? g->fsdp : g->fsdp * g->ep;
        s->bytes[k->local ? SEND_LOCAL_WEIGHTS : SEND_DENSE_WEIGHTS] +=
            gathers * o->rounds * (n - 1) * shard * X;
        s->bytes[k->local ? SEND_LOCAL_GRADS : SEND_DENSE_GRADS] += o->rounds * (n - 1) * shard * G;
        s->bytes[SEND_DP] += all_reduce_bytes(k->shard, G, g->dp, g->dp_rank);
    }
}

// passes: (MoE layer, micro-batch) pairs; token: elements of a micro-batch.
static void token_traffic(Traffic *s, const Config *c, const Grid *g, int64_t R, double passes,
                          Routing routing) {
    const double X = sizeof(floatX);
    const double copy = c->C * X;
    const double score = c->K * sizeof(real);
    if (g->dispatch == DISPATCH_ALLREDUCE) { // y forward, dy backward; every rank knows topk
        s->bytes[SEND_TOKENS] = 2 * passes * all_reduce_bytes(R * c->C, X, g->ep, g->ep_rank);
        return;
    }
    // topk, for forward's row index and for backward's where it is not saved.
    s->bytes[SEND_ROUTING] =
        (1 + routing.rerouted) * passes * (g->ep - 1) * (double)(R * c->K) * sizeof(int);
    // A dispatch sends, a combine sends back what came. Forward: dispatch (token, scores), combine.
    // Backward: dispatch dy, combine (dx, dscore), and forward's dispatch where its pool is not
    // saved.
    s->bytes[SEND_TOKENS] =
        passes * (routing.sent * (2 * copy + score + routing.respread * (copy + score)) +
                  routing.received * (2 * copy + score));
}

// Forward gathers x and reduces the output; backward gathers x and d_out and reduces dx; attention
// that is computed again repeats forward's two. Replicated tokens: reduces the output and d_out,
// and the output again with it. pairs: (layer, micro-batch).
static void head_traffic(Traffic *s, const Config *c, const Grid *g, int64_t R, double pairs,
                         Routing routing) {
    const double X = sizeof(floatX);
    const double again = routing.reattended;
    int64_t token = R * c->C;
    if (!g->split_heads) return;
    if (g->dispatch == DISPATCH_ALLREDUCE)
        s->bytes[SEND_HEADS] = (2 + again) * pairs * all_reduce_bytes(token, X, g->ep, g->ep_rank);
    else
        s->bytes[SEND_HEADS] = (5 + 2 * again) * pairs * (g->ep - 1) * (double)token * X;
}

static void statistics_traffic(Traffic *s, const Model *m, const Grid *g, const StepOptions *o) {
    const Config *c = &m->c;
    double *bytes = &s->bytes[SEND_STATISTICS];
    int64_t E = (int64_t)c->n_moe * c->E;
    if (c->n_moe) // counts and probabilities, and z and entropy, of a round
        *bytes = o->rounds * (2 * all_reduce_bytes(E, 8, g->world, g->rank) +
                              all_reduce_bytes(2 * c->n_moe, 8, g->world, g->rank));
    *bytes += all_reduce_bytes(1, 8, g->world, g->rank); // the loss
    // Squares of the gradients, of all blocks at once or layer by layer.
    int dense = g->fsdp * g->ep;
    int dense_rank = g->fsdp_rank * g->ep + g->ep_rank;
    if (!o->update_layer) *bytes += all_reduce_bytes(m->n_blocks, 8, dense, dense_rank);
    for (int l = -1; l <= c->L && o->update_layer; l++) {
        int blocks = l >= 0 && l < c->L && m->local_block[l] >= 0 ? 2 : 1;
        *bytes += all_reduce_bytes(blocks, 8, dense, dense_rank);
    }
}

Traffic plan_traffic(const Model *m, const Grid *g, const StepOptions *o, Routing routing) {
    Traffic s;
    memset(&s, 0, sizeof s);
    double micro = (double)(o->batch / g->data_ranks) / o->micro_batch; // of the update
    int64_t R = (int64_t)o->micro_batch * o->T;
    block_traffic(&s, m, g, o);
    token_traffic(&s, &m->c, g, R, micro * m->c.n_moe, routing);
    head_traffic(&s, &m->c, g, R, micro * m->c.L, routing);
    statistics_traffic(&s, m, g, o);
    return s;
}

// ---- time: a roofline -----------------------------------------------------------------------
// Model FLOP/s that the kernels of an update reach together: predicted from published kernels for
// h200 (dev/ledger.py), for the others by the ratio of their dense products (650, 250 and 1,500 to
// 700 TFLOP/s); copies; the memory that a program gets; NVLink and network per GPU and direction as
// collectives reach them.
static const Machine machines[] = {
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

typedef struct { // seconds, but memory (bytes)
    double compute, weights, tokens, optimizer;
    double exposed; // of tokens, what no compute hides
    double step, memory;
} Estimate;

// A group crosses nodes when its span of ranks does.
static double group_bandwidth(const Machine *k, int span) {
    return span > k->per_node ? k->network : k->link;
}

// Bytes that a step of the optimizer reads and writes for one parameter: gradient (twice, with the
// norm), weight (or master read and written, weight written), moments read and written.
static double optimizer_bytes(OptimizerOptions o) {
    double weight = 2 * sizeof(floatX);
    double moments = 0;
    if (o.master) weight = 2 * sizeof(real) + sizeof(floatX);
    switch (o.kind) {
    case OPT_SGD: moments = o.momentum != 0 ? 2 * sizeof(real) : 0; break;
    case OPT_ADAMW: moments = 4 * sizeof(real); break;
    case OPT_ADAMW8: moments = 4; break;
    }
    return 2 * sizeof(gradX) + weight + moments;
}

// Share of the time without it (dev/ledger.py).
static double recompute_share(Recompute r) {
    switch (r) {
    case RECOMPUTE_LAYER: return 0.21;
    case RECOMPUTE_MOE: return 0.10;
    case RECOMPUTE_NONE:
    case RECOMPUTE_AUTO: return 0;
    }
    return 0;
}

static Estimate estimate(const Model *m, const Grid *g, const StepOptions *o, OptimizerOptions opt,
                         const Traffic *s, size_t memory, const Machine *k) {
    const double *bytes = s->bytes;
    double tokens = (double)o->batch * o->T / g->data_ranks;
    double shard = 0;
    double sharded = group_bandwidth(k, g->ep * g->fsdp);
    double ep = group_bandwidth(k, g->ep);
    for (int b = 0; b < m->n_blocks; b++) shard += (double)m->block[b].shard;
    Estimate e;
    e.memory = (double)memory;
    e.compute = tokens * config_flops_per_token(&m->c, o->T) * (1 + recompute_share(o->recompute)) /
                k->flops;
    e.weights = (bytes[SEND_DENSE_WEIGHTS] + bytes[SEND_DENSE_GRADS]) / sharded +
                (bytes[SEND_LOCAL_WEIGHTS] + bytes[SEND_LOCAL_GRADS]) / sharded +
                bytes[SEND_DP] / group_bandwidth(k, g->world);
    e.tokens = (bytes[SEND_TOKENS] + bytes[SEND_ROUTING] + bytes[SEND_HEADS]) / ep;
    e.optimizer = shard * optimizer_bytes(opt) / k->memory_bandwidth;
    // Weight traffic runs under compute; token exchange does where there are at least three
    // micro-batches to interleave.
    double micro = (double)(o->batch / g->data_ranks) / o->rounds / o->micro_batch;
    e.exposed = micro >= 3 ? e.tokens / micro : e.tokens;
    double work = e.compute + e.exposed;
    e.step = (work > e.weights ? work : e.weights) + e.optimizer;
    return e;
}

// The tables of a layout; model_free takes them down.
static Model layout_model(const Config *c, const Grid *g) {
    Config copy = *c;
    copy.json = 0;
    copy.is_moe = (unsigned char *)xmalloc(c->L, "config");
    memcpy(copy.is_moe, c->is_moe, c->L);
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
    other->ep = ep;
    other->fsdp = fsdp;
    other->dp = g->world / ep / fsdp;
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
    die("--optimizer adamw8bit: --dp %d --fsdp %d --ep %d cuts tensors inside their blocks of 256 "
        "elements|of %d ranks these fit: %s; or --optimizer adamw",
        g->dp, g->fsdp, g->ep, g->world, n ? fits : "none");
}

// One candidate: its memory and time. The model's tables are built and thrown away. `table`: where
// the byte table goes, or 0.
static Estimate try_layout(const Config *c, const Grid *g, StepOptions *o, OptimizerOptions opt,
                           const Machine *k, FILE *table, Traffic *uniform, Traffic *most) {
    Model m = layout_model(c, g);
    Trainer *t = trainer_create(&m, (Grid *)g, *o, opt, 1, table);
    *o = t->o; // with the micro-batch filled in
    double respread = o->recompute == RECOMPUTE_NONE || o->recompute == RECOMPUTE_AUTO ? 0 : 1;
    double reattended = o->recompute == RECOMPUTE_LAYER;
    double rows = plan_uniform_rows(c, g, t->R);
    double rows_most = plan_most_rows(c, g, t->R);
    Routing expected = { rows, rows, respread, respread, reattended };
    Routing worst = { rows_most, (double)(g->ep - 1) * t->R, respread, respread, reattended };
    *uniform = plan_traffic(&m, g, o, expected);
    *most = plan_traffic(&m, g, o, worst);
    Estimate e = estimate(&m, g, o, opt, uniform, t->arena.used, k);
    trainer_free(t);
    model_free(&m);
    return e;
}

// ---- the layouts of a world -----------------------------------------------------------------
typedef struct {
    Grid grid;
    Estimate e;
} Candidate;
enum { KEEP = 3 };

static void keep_fastest(Candidate *best, int *n, Candidate candidate) {
    int at = *n < KEEP ? (*n)++ : KEEP;
    for (; at > 0 && best[at - 1].e.step > candidate.e.step; at--)
        if (at < KEEP) best[at] = best[at - 1];
    if (at < KEEP) best[at] = candidate;
}

// Tells whether a layout divides the batch and, with the 8-bit optimizer, keeps its blocks whole.
static int divides(const Config *c, const Grid *g, const StepOptions *o, OptimizerOptions opt) {
    int64_t sequences = o->batch / g->data_ranks;
    int64_t per_round = sequences / o->rounds;
    if (o->batch % g->data_ranks || sequences % o->rounds) return 0;
    if (o->micro_batch && per_round % o->micro_batch) return 0;
    return opt.kind != OPT_ADAMW8 || keeps_blocks(c, g);
}

// The fastest layouts by the estimate that fit into memory: ep over the divisors of the world up to
// 64, fsdp over powers of two, dp what they leave.
static void recommend(FILE *out, const Config *c, const Grid *g, StepOptions o,
                      OptimizerOptions opt, const Machine *k) {
    Candidate best[KEEP], next;
    int n = 0;
    for (int ep = 1; ep <= g->world && ep <= 64; ep++) {
        for (int fsdp = 1; fsdp * ep <= g->world; fsdp *= 2) {
            if (!other_layout(c, g, ep, fsdp, &next.grid) || !divides(c, &next.grid, &o, opt))
                continue;
            StepOptions with = o;
            Traffic uniform, most;
            next.e = try_layout(c, &next.grid, &with, opt, k, 0, &uniform, &most);
            if (k->memory <= 0 || next.e.memory <= k->memory) keep_fastest(best, &n, next);
        }
    }
    if (!n) {
        fprintf(out,
                "no layout of %d ranks fits into %.0f GiB with these options: more ranks, "
                "--recompute layer, --optimizer adamw8bit --master off, "
                "or a smaller --micro-batch\n",
                g->world, k->memory / 1073741824);
        return;
    }
    fprintf(out, "layouts of %d ranks that fit, fastest first by this estimate:\n", g->world);
    for (int i = 0; i < n; i++)
        fprintf(out, "  --dp %d --fsdp %d --ep %d: %.1f GiB a rank, %.0f ms an update\n",
                best[i].grid.dp, best[i].grid.fsdp, best[i].grid.ep, best[i].e.memory / 1073741824,
                1e3 * best[i].e.step);
}

// ---- what is printed ------------------------------------------------------------------------
static void print_bytes(FILE *out, double b) {
    if (b >= 1e9)
        fprintf(out, "%10.3f GB", b / 1e9);
    else if (b >= 1e6)
        fprintf(out, "%10.3f MB", b / 1e6);
    else
        fprintf(out, "%10.3f kB", b / 1e3);
}

static void print_sent(FILE *out, const char *name, double uniform, double most) {
    fprintf(out, "  %-20s ", name);
    print_bytes(out, uniform);
    if (most > uniform) {
        fprintf(out, "  [");
        print_bytes(out, most);
        fprintf(out, "]");
    }
    fprintf(out, "\n");
}

static void print_traffic(FILE *out, const Traffic *uniform, const Traffic *most) {
    static const char *const name[SEND_KINDS] = {
        "weights, dense",    "weights, experts", "gradients, dense", "gradients, experts",
        "gradients over dp", "routing ids",      "tokens",           "attention heads",
        "statistics",
    };
    fprintf(out, "bytes that a rank sends in an update "
                 "(uniform routing; in brackets the most that any routing asks for)\n");
    double total = 0;
    double worst = 0;
    for (int i = 0; i < SEND_KINDS; i++) {
        total += uniform->bytes[i];
        worst += most->bytes[i];
        if (uniform->bytes[i] > 0) print_sent(out, name[i], uniform->bytes[i], most->bytes[i]);
    }
    print_sent(out, "together", total, worst);
}

static void print_time(FILE *out, const Estimate *e, const StepOptions *o, int world,
                       const Machine *k) {
    fprintf(out,
            "time by roofline on %s (kernels %.0f TFLOP/s together, copies %.1f TB/s, "
            "links %.0f GB/s in a node of %d, %.0f GB/s between nodes%s; not a measurement)\n",
            k->name, k->flops / 1e12, k->memory_bandwidth / 1e12, k->link / 1e9, k->per_node,
            k->network / 1e9,
            o->recompute == RECOMPUTE_AUTO ? "; --recompute auto counted as none" : "");
    fprintf(out,
            "  compute %.1f ms, weights and gradients %.1f ms (under compute), "
            "tokens %.1f ms (%.1f ms not under compute), optimizer %.1f ms\n",
            1e3 * e->compute, 1e3 * e->weights, 1e3 * e->tokens, 1e3 * e->exposed,
            1e3 * e->optimizer);
    double tokens = (double)o->batch * o->T;
    const char *limit = "compute";
    if (e->exposed > e->compute) limit = "moving tokens";
    if (e->weights > e->compute + e->exposed) limit = "moving weights and gradients";
    fprintf(out, "  update %.1f ms, %.0f tokens/s in all, %.0f a rank; limited by %s\n",
            1e3 * e->step, tokens / e->step, tokens / e->step / world, limit);
}

void plan_print(FILE *out, const Config *c, const Grid *g, StepOptions o, OptimizerOptions opt,
                const Machine *k) {
    StepOptions asked = o;
    Traffic uniform, most;
    fprintf(out,
            "plan       %d rank%s = dp %d x fsdp %d x ep %d; "
            "%lld sequences of %d an update; %s build\n",
            g->world, g->world > 1 ? "s" : "", g->dp, g->fsdp, g->ep, (long long)o.batch, o.T,
            PRECISION_NAME);
    if (sizeof(floatX) != 2 && strcmp(k->name, "cpu"))
        fprintf(out,
                "note       memory and bytes are those of this %s build, speeds those of bf16; "
                "`make PRECISION=bf16` plans what a GPU trains\n",
                PRECISION_NAME);
    Estimate e = try_layout(c, g, &o, opt, k, out, &uniform, &most);
    if (k->memory > 0)
        fprintf(out, "  %s of %.1f GiB\n",
                e.memory <= k->memory ? "fits: uses part" : "DOES NOT FIT into memory",
                k->memory / 1073741824);
    if (g->world > 1) print_traffic(out, &uniform, &most);
    print_time(out, &e, &o, g->world, k);
    if (g->ep > k->per_node)
        fprintf(out,
                "warning    ep %d leaves a node of %d: tokens cross the network at %.0f GB/s; "
                "uniform routing sends %.1f kB a token and layer in each direction\n",
                g->ep, k->per_node, k->network / 1e9,
                plan_uniform_rows(c, g, 1) * c->C * sizeof(floatX) / 1e3);
    recommend(out, c, g, asked, opt, k);
    fflush(out);
}
