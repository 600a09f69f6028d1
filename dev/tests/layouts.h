// Every layout against one process, under mpirun: the theorem of I1, one gradient rule (adjoints
// and plain sums give layout invariance), tested on every number that an update makes.
//
// The reference is made inside the same processes: each rank first runs the update alone (a group
// of one). Compared: logits, loss, aux, z, gradient norm, EVERY gradient of the first update and
// every parameter after five. SGD, because Adam divides a constant factor away; clipping active;
// aux and z on; momentum and decay on; and valid targets dispatch as unevenly as can be: in some
// updates half of the windows have none, so ranks have none. fp32: sums over ranks regroup what one
// process sums in one piece: 1e-7 typically, 1e-6 where terms cancel; the bound 1e-5 is far below
// what a wrong factor makes. bf16: partial sums are rounded where they travel, so a token whose
// experts are nearly tied may choose others: a single expert's gradient then differs by that
// token's share. Only the gradient as a whole is bounded there; what a layout may do wrong is
// independent of the element type and caught in fp32.
#ifndef MOE_LAYOUTS_H
#define MOE_LAYOUTS_H
#include "harness.h"

// ---- tokens with unequal valid targets ------------------------------------------------------
// The fixture's tokens; windows whose bit is set in ignored[update] keep no target but `ignore`,
// which does not count. T targets of window w are tokens wT+1 .. wT+T.
static char *uneven_tokens(const Fixture *f, int ignore, int batch, int updates) {
    static const unsigned ignored[] = {
        0x0f, 0xf0, 0xef, 0x00, 0x2a
    }; // first half, second half, all but one, none, every other
    char *path = xasprintf("%s/uneven%d.bin", temporary, comm_world_rank());
    unsigned char *bytes = (unsigned char *)xcalloc(1 << 20, 1, "tokens");
    FILE *in = fopen(f->tokens, "rb");
    FILE *out = fopen(path, "wb");
    size_t n = in ? fread(bytes, 1, 1 << 20, in) : 0;
    if (!out || n < 1024 + 2 * (size_t)(updates * batch * f->T + 1))
        die("%s: too few tokens for %d updates|write the fixtures again", f->tokens, updates);
    for (int w = 0; w < updates * batch; w++)
        for (int t = 1; t <= f->T && ignored[w / batch % 5] >> (w % batch) & 1; t++) {
            bytes[1024 + 2 * (w * f->T + t)] = (unsigned char)ignore;
            bytes[1024 + 2 * (w * f->T + t) + 1] = 0;
        }
    fwrite(bytes, 1, n, out);
    fclose(in);
    if (fclose(out)) die("%s: cannot write|free space", path);
    free(bytes);
    return path;
}

// ---- which combinations ---------------------------------------------------------------------
enum { FACTORS = 6, MAX_VALUES = 16, MAX_CASES = 4096 };
typedef struct {
    int value[FACTORS];
} Case; // layout, dispatch, heads, recompute, micro-batch, update
typedef struct {
    int dp, fsdp, ep;
} Shape;
static const char *const dispatch_names[] = { "alltoall", "allgather", "allreduce" };
enum { DISPATCHERS = sizeof dispatch_names / sizeof *dispatch_names };
static const char *const recompute_names[] = { "none", "moe", "layer", "auto" };
static const char *const attention_names[] = { "data", "heads" };
static const char *const update_names[] = { "end", "layer" };
static const char *const copies_text[] = { "; COPIES DIFFER", "" };
static const char *const counts_text[] = { "; COUNTS DIFFER", "" };

// The micro-batch: choice 0 = all, 1 = single sequences, 2 = halves.
static int micro_of(int choice, int sequences) {
    if (choice == 0) return sequences;
    return choice == 1 ? 1 : sequences / 2;
}

// Sequences of a rank in this case; 0 where the case is impossible, or the same as another one:
// without ep nothing travels, one sequence is not split. A pair of values counts as covered only
// where both do something.
static int local_sequences(const Config *c, const Shape *shape, const Case *k, int batch) {
    const Shape *s = &shape[k->value[0]];
    int ranks = s->dp * s->fsdp * s->ep / (k->value[1] == DISPATCH_ALLREDUCE ? s->ep : 1);
    int sequences = batch % ranks ? 0 : batch / ranks;
    if (s->ep == 1 && (k->value[1] || k->value[2])) return 0;
    if (k->value[2] && c->KV % s->ep) return 0;
    if ((k->value[4] == 1 && sequences < 2) ||
        (k->value[4] == 2 && (sequences < 4 || sequences % 2)))
        return 0;
    return sequences;
}

// A set of cases in which every possible pair of values of two factors occurs: greedily, the case
// that covers most pairs not yet covered comes next. The same on all ranks.
static int covering(Case *out, const Config *c, const Shape *shape, int n_shapes, int batch) {
    const int size[FACTORS] = { n_shapes, DISPATCHERS, 2, 4, 3, 2 };
    int total = 1;
    for (int f = 0; f < FACTORS; f++) total *= size[f];
    static unsigned char covered[FACTORS][MAX_VALUES][FACTORS][MAX_VALUES];
    static Case all[MAX_CASES];
    int n_all = 0;
    int n = 0;
    memset(covered, 0, sizeof covered);
    for (int i = 0; i < total; i++) {
        Case k;
        for (int f = 0, rest = i; f < FACTORS; f++) {
            k.value[f] = rest % size[f];
            rest /= size[f];
        }
        if (local_sequences(c, shape, &k, batch)) all[n_all++] = k;
    }
    for (;;) {
        int best = -1;
        int most = 0;
        for (int i = 0; i < n_all; i++) {
            int gain = 0;
            for (int a = 0; a < FACTORS; a++)
                for (int b = 0; b < a; b++)
                    gain += !covered[a][all[i].value[a]][b][all[i].value[b]];
            if (gain > most) {
                most = gain;
                best = i;
            }
        }
        if (best < 0) return n;
        for (int a = 0; a < FACTORS; a++)
            for (int b = 0; b < a; b++) covered[a][all[best].value[a]][b][all[best].value[b]] = 1;
        out[n++] = all[best];
    }
}

static int shapes_of(Shape *shape, int world, const Config *c) {
    int n = 0;
    for (int dp = 1; dp <= world; dp++)
        for (int fsdp = 1; dp * fsdp <= world; fsdp++) {
            int ep = world / (dp * fsdp);
            if (dp * fsdp * ep == world && c->E % ep == 0 && n < MAX_VALUES) {
                shape[n].dp = dp;
                shape[n].fsdp = fsdp;
                shape[n++].ep = ep;
            }
        }
    return n;
}

// ---- the tests ------------------------------------------------------------------------------
// fp64: gradients come from dumps, which are fp32.
static double layout_bound(void) { return by_precision(1e-7, 1e-5, 4e-2); }

static void test_cover(const Fixture *f, const Config *c, const Shape *shape, int n_shapes,
                       int batch) {
    static Case cases[MAX_CASES];
    int n = covering(cases, c, shape, n_shapes, batch);
    int steps = quick ? 2 : 5;
    if (quick && n > 8)
        n = 8; // each covers as many of the open pairs as one case can: the first ones most of them
    const int ignore = f->ignore < 0 ? 0 : f->ignore;
    char *tokens = uneven_tokens(f, ignore, batch, 5);
    Setup s = fixture_setup(f, OPT_SGD);
    s.tokens = tokens;
    s.step.ignore_target = ignore;
    s.step.batch = batch;
    Outcome solo[2];
    for (int update = 0; update < 2; update++) {
        s.step.update_layer = update;
        solo[update] = outcome_of(f, 0, &s, steps);
    }
    int clipped = 0;
    for (int i = 0; i < steps; i++) clipped += solo[0].r[i].grad_norm > s.step.clip;
    check(clipped > 0 && solo[0].r[0].valid <= (batch - 4) * f->T,
          "one process: %d of %d updates are clipped, %lld of %d targets count in the first",
          clipped, steps, (long long)solo[0].r[0].valid, batch * f->T);
    for (int i = 0; i < n; i++) {
        const int *v = cases[i].value;
        Layout l = { shape[v[0]].dp, shape[v[0]].fsdp, shape[v[0]].ep, (Dispatch)v[1], v[2] };
        int sequences = local_sequences(c, shape, &cases[i], batch);
        s.step.recompute = (Recompute)v[3];
        s.step.micro_batch = micro_of(v[4], sequences);
        s.step.update_layer = v[5];
        Outcome o = outcome_of(f, &l, &s, steps);
        Difference d = difference_of(&o, &solo[v[5]]);
        int counts = 1;
        for (int k = 0; k < steps; k++)
            counts = counts && o.r[k].valid == solo[0].r[k].valid &&
                     o.r[k].expert_dead == solo[v[5]].r[k].expert_dead;
        check(difference_worst(&d) <= layout_bound() && o.equal && (counts || BF16),
              "dp %d fsdp %d ep %d, %s, attention %s, recompute %s, micro-batch %d of %d, update "
              "%s: %s%s%s",
              l.dp, l.fsdp, l.ep, dispatch_names[v[1]], attention_names[v[2]],
              recompute_names[v[3]], s.step.micro_batch, sequences, update_names[v[5]],
              difference_text(&d), copies_text[o.equal], counts_text[counts]);
        outcome_free(&o);
    }
    outcome_free(&solo[0]);
    outcome_free(&solo[1]);
    unlink(tokens);
    free(tokens);
}

// Each layout against transformers itself: ten SGD losses and gradient norms, and the first
// update's gradients.
static void test_layout_transformers(const Fixture *f, const Config *c, const Shape *shape,
                                     int n_shapes) {
    for (int i = 0; i < n_shapes; i++) {
        Layout l = { shape[i].dp, shape[i].fsdp, shape[i].ep, (Dispatch)(i % DISPATCHERS),
                     c->KV % shape[i].ep == 0 && i % 2 };
        Setup s = fixture_setup(f, OPT_SGD);
        const int updates = quick ? 2 : 10;
        Outcome o = outcome_of(f, &l, &s, updates);
        int64_t n;
        double *losses = read_tensor(&f->expected, "losses_sgd", &n);
        double *norms = read_tensor(&f->expected, "grad_norms_sgd", &n);
        double *logits = read_tensor(&f->expected, "logits", &n);
        double loss = 0;
        double norm = 0;
        double gradient = 0;
        double z = n == o.n_logits ? distance(o.logits, logits, n) : INFINITY;
        for (int k = 0; k < updates; k++) {
            loss = fmax(loss, relative(o.r[k].loss, losses[k]));
            norm = fmax(norm, relative(o.r[k].grad_norm, norms[k]));
        }
        for (int k = 0; k < o.all.n; k++) {
            char key[200];
            snprintf(key, sizeof key, "grad.%s", o.all.weight[k].name);
            double *g = read_tensor(&f->expected, key, &n);
            gradient = fmax(gradient, distance(o.all.weight[k].g, g, n));
            free(g);
        }
        double bound =
            BF16 ? 0.2 : 1e-5; // bf16: near choices of the router fall differently than in fp32
        check(loss <= bound && norm <= bound && z <= bound && (gradient <= 2 * bound || BF16),
              "dp %d fsdp %d ep %d, %s, attention %s against transformers: logits %.1e, gradients "
              "%.1e, %d losses %.1e, norms %.1e",
              l.dp, l.fsdp, l.ep, dispatch_names[l.dispatch], l.heads ? "heads" : "data", z,
              gradient, updates, loss, norm);
        free(losses);
        free(norms);
        free(logits);
        outcome_free(&o);
    }
}

// 20 updates in which every token chooses the same K experts, all on the first rank of each ep
// group: the others receive nothing, the first everything.
static void test_edge_load(const Fixture *f, const Config *c, const Shape *shape, int n_shapes,
                           int batch) {
    float *bias = floats((int64_t)c->n_moe * c->E);
    for (int i = 0; i < c->n_moe * c->E; i++) bias[i] = i % c->E < c->K ? 0.0f : -1000.0f;
    Setup s = fixture_setup(f, OPT_SGD);
    s.step.batch = batch;
    s.step.balance_rate = 1e-30; // switches the bias on without moving it
    s.bias = bias;
    // The loader wraps, so more updates than the file has are fine; fewer keep odd worlds short.
    int steps = 20 * batch > 10 * f->B ? 10 : 20;
    if (quick) steps = 2;
    Outcome solo = outcome_of(f, 0, &s, steps);
    for (int i = 0; i < n_shapes; i++)
        for (int dispatch = 0; dispatch < DISPATCHERS && shape[i].ep > 1; dispatch++) {
            Layout l = { shape[i].dp, shape[i].fsdp, shape[i].ep, (Dispatch)dispatch, 0 };
            Case k = { { i, dispatch, 0, 0, 0, 0 } };
            int sequences = local_sequences(c, shape, &k, batch);
            if (!sequences) continue;
            s.step.micro_batch = 1;
            Outcome o = outcome_of(f, &l, &s, steps);
            Difference d = difference_of(&o, &solo);
            check(
                difference_worst(&d) <= layout_bound() &&
                    o.r[0].expert_dead == c->n_moe * (c->E - c->K),
                "dp %d fsdp %d ep %d, %s, all tokens to %d experts of one rank for %d updates: %s",
                l.dp, l.fsdp, l.ep, dispatch_names[dispatch], c->K, steps, difference_text(&d));
            outcome_free(&o);
        }
    outcome_free(&solo);
    free(bias);
}

// Evaluation does not depend on the layout, whatever the number of windows (the last pass may be
// partly empty).
static void test_layout_evaluation(const Fixture *f, const Shape *shape, int n_shapes, int batch) {
    Setup s = fixture_setup(f, OPT_SGD);
    s.step.batch = batch;
    Run *r = run_open(f, 0, &s);
    double expected = trainer_evaluate(r->t, r->data, 0, batch + 1, 0, 0);
    double worst = 0;
    run_close(r);
    for (int i = 0; i < n_shapes; i++) {
        Layout l = { shape[i].dp, shape[i].fsdp, shape[i].ep, DISPATCH_ALLTOALL, 0 };
        r = run_open(f, &l, &s);
        worst =
            fmax(worst, relative(trainer_evaluate(r->t, r->data, 0, batch + 1, 0, 0), expected));
        run_close(r);
    }
    check(worst <= (BF16 ? 1e-2 : 1e-6), "validation loss of %d windows in %d layouts: %.1e",
          batch + 1, n_shapes, worst);
}

static void wait_for_all(void) {
    int n = comm_world_size();
    int *ranks = (int *)xcalloc((size_t)n, sizeof(int), "ranks");
    for (int i = 0; i < n; i++) ranks[i] = i;
    comm_barrier(comm_group("wait", ranks, n));
    free(ranks);
}

static void test_layouts(const Fixture *f) {
    char *path = xasprintf("%s/config.json", f->dir);
    Config c = config_read(path);
    free(path);
    Shape shape[MAX_VALUES];
    const int windows = 8; // what uneven_tokens marks
    int world = comm_world_size();
    int n = shapes_of(shape, world, &c);
    int batch = windows - windows % world; // the most that divides, at least one each
    if (batch == 0) batch = world;
    if (f->B % world == 0) test_layout_transformers(f, &c, shape, n);
    test_cover(f, &c, shape, n, batch);
    test_edge_load(f, &c, shape, n, batch);
    test_layout_evaluation(f, shape, n, batch);
    config_free(&c);
}
#endif
