// Checks of the whole model, numbered: alone against transformers' numbers, against a naive model
// in double, against finite differences and against itself; under mpirun every layout against one
// process. It drives model/ as train_moe does, on whatever backend and precision is linked.
//
//   make test_moe && ./test_moe [--fixtures DIR] [--only FIXTURE] [--threads N] [--force-comm]
//   [--quick]        mpirun -np 4 ./test_moe
//
// --quick: two updates where there would be five to twenty, and none of the checks that need
// dozens: what an emulated GPU or a sanitizer has time for.
//
// Tolerances. fp32: transformers in fp32 is 1e-6 from itself in fp64, at worst 5e-6
// (dev/hf/README.md); 1e-5 for losses and logits, 2e-5 for gradients are above rounding and far
// below what any mistake makes (8e-5 and more). fp64: what remains is 1e-16 times the condition of
// the sums. bf16: at most twice the error of the naive bf16 version.
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#include "dev/tests/harness.h"
#include "dev/tests/documents.h"

static const char *const fixture_names[] = { "gqa", "tied", "dense", "wide", "parallel", "skewed" };
enum { FIXTURES = sizeof fixture_names / sizeof *fixture_names };
// Packed documents, loss masks, and both with tied heads: compared with transformers only.
static const char *const data_names[] = { "documents", "masks", "chat" };
enum { DATA_FIXTURES = sizeof data_names / sizeof *data_names };

#include "dev/tests/transformers.h"

// ---- the naive model, and finite differences ------------------------------------------------
// SGD whose buffer is the unscaled gradient in `real` and whose step is zero: momentum, no
// clipping, no decay, lr 0.
static Setup probe_setup(const Fixture *f) {
    Setup s = fixture_setup(f, OPT_SGD);
    s.step.clip = 0;
    s.opt.momentum = 0.5;
    s.opt.weight_decay = 0;
    s.opt.lr = 0;
    return s;
}

static double total(const StepResult *s, const Setup *p) {
    return s->loss + p->step.aux_coef * s->aux + p->step.z_coef * s->z;
}

// The naive model's update: gradients into all, and with rounding 1 rounded as it stores them.
static void naive_run(NaiveBatch *b, const Config *config, Weights *all, int rounding) {
    NaiveConfig c = naive_config(config);
    for (int i = 0; i < all->n; i++) memset(all->weight[i].g, 0, all->weight[i].n * sizeof(double));
    naive_rounding = rounding;
    naive_model(b, &c, all);
    for (int i = 0; i < all->n; i++)
        for (int64_t k = 0; k < all->weight[i].n; k++) all->weight[i].g[k] = Q(all->weight[i].g[k]);
}

// Logits and every gradient against the naive model. bf16: error at most twice the naive bf16
// version's. A tensor of a few numbers (a q norm of 8) has an error that is a small sample of a
// random variable, so the yardstick of a tensor is the larger of its own naive error and the median
// over all tensors. What both round alike (the fp32 parts) adds 1e-5.
static void test_naive(const Fixture *f, const char *replay) {
    Setup s = probe_setup(f);
    s.replay = replay;
    Run *r = run_open(f, 0, &s);
    const Config *c = &r->m.c;
    Weights ours = weights_new(c);
    Weights truth = weights_new(c);
    Weights naive = weights_new(c);
    char *dump = xasprintf("%s/naive.safetensors", temporary);
    int equal;
    StepResult x = run_step(r, 1, 0, dump);
    read_all(r, &ours, 1, 1, &equal);
    read_all(r, &truth, 0, 0, &equal);
    read_all(r, &naive, 0, 0, &equal);
    int *topk = read_routing(r);
    NaiveBatch b = { .B = f->B,
                     .T = f->T,
                     .ids = r->t->tokens.host_ids,
                     .targets = r->t->tokens.host_targets,
                     .topk = topk,
                     .aux_coef = f->aux_coef,
                     .z_coef = f->z_coef,
                     .aux_per_layer = f->aux_per_layer };
    NaiveBatch rounded = b;
    naive_run(&b, c, &truth, 0);
    SafeTensors d = safetensors_open(dump);
    int64_t n;
    double *logits = read_tensor(&d, "logits", &n);
    double bound = FP64 ? 1e-7 : 1e-5; // the dump is fp32, whatever the build
    double *e = doubles(truth.n);
    double median = 0;
    if (BF16) {
        naive_run(&rounded, c, &naive, 1);
        bound += 2 * distance(rounded.logits, b.logits, n);
        for (int i = 0; i < truth.n; i++) { // median by insertion
            double v = distance(naive.weight[i].g, truth.weight[i].g, truth.weight[i].n);
            int k = i;
            for (; k > 0 && e[k - 1] > v; k--) e[k] = e[k - 1];
            e[k] = v;
        }
        median = e[truth.n / 2];
    }
    double error = distance(logits, b.logits, n);
    check(error <= bound, "%s: logits against the naive model %.1e, bound %.1e", f->name, error,
          bound);
    double wide = by_precision(1e-11, 1e-5, 1e-2);
    check(relative(x.loss, b.loss) <= wide && relative(x.aux, b.aux) <= wide &&
              relative(x.z, b.z) <= wide,
          "%s: loss %.1e, aux %.1e, z %.1e against the naive model", f->name,
          relative(x.loss, b.loss), relative(x.aux, b.aux), relative(x.z, b.z));
    double worst = 0;
    double worst_error = 0;
    const char *name = "-";
    for (int i = 0; i < truth.n; i++) {
        error = distance(ours.weight[i].g, truth.weight[i].g, truth.weight[i].n);
        bound = FP64 ? 1e-10 : 2e-5;
        if (BF16)
            bound = 1e-5 + 2 * fmax(median, distance(naive.weight[i].g, truth.weight[i].g,
                                                     truth.weight[i].n));
        if (!(error / bound <= worst)) {
            worst = error / bound;
            worst_error = error;
            name = truth.weight[i].name;
        }
    }
    if (BF16)
        check(worst <= 1,
              "%s: %d gradients in bf16, worst %.2f of twice the naive error (%s: %.1e; median of "
              "the naive errors %.1e)",
              f->name, truth.n, worst, name, worst_error, median);
    else
        check(worst <= 1, "%s: %d gradients against the naive model, worst %.1e (%s)", f->name,
              truth.n, worst_error, name);
    free(e);
    free(logits);
    free(topk);
    safetensors_close(&d);
    naive_release();
    unlink(dump);
    free(dump);
    weights_free(&ours);
    weights_free(&truth);
    weights_free(&naive);
    run_close(r);
}

// A replayed routing, which the router would not choose: the naive model with the same choice. And
// what a run records gives the same bits when it is replayed.
static void test_replay(const Fixture *f) {
    char *path = xasprintf("%s/config.json", f->dir);
    char *step = 0;
    Config c = config_read(path);
    free(path);
    path = xasprintf("%s/routing", temporary);
    if (c.n_moe) {
        write_routing(path, &c, f->B, f->T);
        test_naive(f, path);
        Setup s = probe_setup(f);
        s.replay = path;
        Run *r = run_open(f, 0, &s);
        run_step(r, 1, 0, 0);
        int64_t n;
        int64_t differ = 0;
        int *chosen = read_routing(r);
        SafeTensors file = safetensors_open(path);
        double *given = read_tensor(&file, "topk", &n);
        for (int64_t i = 0; i < n; i++) differ += chosen[i] != (int)given[i];
        check(!differ, "%s: a replayed routing is taken as it is (%lld of %lld choices differ)",
              f->name, (long long)differ, (long long)n);
        safetensors_close(&file);
        free(given);
        free(chosen);
        run_close(r);
        unlink(path);
        s = probe_setup(f);
        r = run_open(f, 0, &s);
        r->t->routing = routing_open(r->t, path, "", 1, 1);
        StepResult recorded = run_step(r, 1, 0, 0);
        run_close(r);
        step = xasprintf("%s/step_1.safetensors", path);
        s.replay = step;
        r = run_open(f, 0, &s);
        StepResult replayed = run_step(r, 1, 0, 0);
        run_close(r);
        check(recorded.loss == replayed.loss && recorded.grad_norm == replayed.grad_norm,
              "%s: a recorded routing replayed: loss %.1e, norm %.1e", f->name,
              relative(replayed.loss, recorded.loss),
              relative(replayed.grad_norm, recorded.grad_norm));
        unlink(step);
        rmdir(path);
    }
    free(step);
    free(path);
    config_free(&c);
}

// Central differences of the total loss through the whole model, fp64 builds: for every HF tensor
// along a random direction of signs (sees every element), and along its element of the largest
// gradient. Step h = 1e-5 (over sqrt(n) for directions): truncation h^2 f''' ~ 1e-10 f''',
// cancellation 1e-16 f / h ~ 1e-10; both against the tensor's gradient norm, but not less than 1e-3
// of the whole gradient's per-tensor mean. The routing must not change under h: then the loss is
// smooth. Checked by comparing all choices.
static void test_differences(const Fixture *f) {
    Setup s = probe_setup(f);
    Run *r = run_open(f, 0, &s);
    Weights all = weights_new(&r->m.c);
    char name[160];
    int equal;
    int flips = 0;
    int probes = 0;
    StepResult x = run_step(r, 1, 0, 0);
    read_all(r, &all, 1, 1, &equal);
    int *routing = read_routing(r);
    size_t routing_bytes = r->m.c.n_moe * r->t->R * r->m.c.K * sizeof(int);
    double floor_norm = 1e-3 * x.grad_norm / sqrt(all.n);
    double worst = 0;
    char worst_name[160] = "-";
    uint64_t bits = 88172645463325252u;
    for (int b = 0; b < r->m.n_blocks; b++)
        for (int i = 0; i < r->m.block[b].n_segments; i++) {
            const Segment *g = &r->m.block[b].segment[i];
            param_hf_name(&r->m.param[r->m.block[b].segment_param[i]],
                          r->m.block[b].segment_slice[i], name);
            const Weight *w = &all.weight[weights_find(&all, name)];
            floatX *device = r->t->optimizer.state[b].param + g->offset;
            size_t n = g->count;
            floatX *keep = (floatX *)xmalloc(n * sizeof(floatX), "a tensor");
            floatX *moved = (floatX *)xmalloc(n * sizeof(floatX), "a tensor");
            double *direction = doubles(n);
            device_download(keep, device, n * sizeof(floatX));
            for (int which = 0; which < 2; which++) {
                size_t most = 0;
                double slope = 0;
                double norm = 0;
                double value[2];
                for (size_t k = 0; k < n; k++) {
                    bits ^= bits << 13;
                    bits ^= bits >> 7;
                    bits ^= bits << 17;
                    int64_t index = g->first + (int64_t)k;
                    int pad = r->m.c.pad >= 0 && !strcmp(name, "model.embed_tokens.weight") &&
                              index / r->m.c.C ==
                                  r->m.c.pad; // no gradient by definition, not by calculus
                    direction[k] = 0;
                    if (!which && !pad) direction[k] = (bits & 1 ? 1 : -1) / sqrt((double)n);
                    if (!pad && fabs(w->g[index]) > fabs(w->g[g->first + (int64_t)most])) most = k;
                }
                if (which) direction[most] = 1;
                for (size_t k = 0; k < n; k++) {
                    slope += direction[k] * w->g[g->first + (int64_t)k];
                    norm += w->g[g->first + (int64_t)k] * w->g[g->first + (int64_t)k];
                }
                const double h = 1e-5;
                for (int side = 0; side < 2; side++) {
                    for (size_t k = 0; k < n; k++)
                        moved[k] = double_x(x_double(keep[k]) + (side ? -h : h) * direction[k]);
                    device_upload(device, moved, n * sizeof(floatX));
                    x = run_step(r, 1, 0, 0);
                    value[side] = total(&x, &s);
                    int *now = read_routing(r);
                    flips += memcmp(now, routing, routing_bytes) != 0;
                    free(now);
                }
                double e =
                    fabs((value[0] - value[1]) / (2 * h) - slope) / fmax(sqrt(norm), floor_norm);
                if (!(e <= worst)) {
                    worst = e;
                    strcpy(worst_name, name);
                }
                probes++;
            }
            device_upload(device, keep, n * sizeof(floatX));
            free(keep);
            free(moved);
            free(direction);
        }
    check(worst <= 1e-6 && !flips,
          "%s: finite differences, %d directions over %d tensors, worst %.1e of the tensor's "
          "gradient (%s), %d changes of routing",
          f->name, probes, all.n, worst, worst_name, flips);
    free(routing);
    weights_free(&all);
    run_close(r);
}

// ---- the same update by other ways ----------------------------------------------------------
static void same_bits(const char *name, const char *what, const Fixture *f, const Setup *s,
                      const Outcome *base, int steps) {
    Outcome o = outcome_of(f, 0, s, steps);
    Difference d = difference_of(&o, base);
    if (difference_worst(&d) == 0)
        check(1, "%s: %s has the same bits", name, what);
    else
        check(0, "%s: %s has the same bits: %s", name, what, difference_text(&d));
    outcome_free(&o);
}
// Splitting regroups sums over rows: each group is rounded once more. fp32: a few 6e-8 relative to
// the terms, up to 30 times the sum where they cancel; after 5 updates the parameters differ by
// less than the gradients did. bf16: gradients are fp32 sums of the same bf16 products, unless a
// router flips, and activations do not know the split.
static void same_rounded(const char *name, const char *what, const Fixture *f, const Setup *s,
                         const Outcome *base, int steps) {
    Outcome o = outcome_of(f, 0, s, steps);
    Difference d = difference_of(&o, base);
    double bound = by_precision(1e-7, 5e-6, 2e-2); // fp64: dumps are written in fp32
    check(difference_worst(&d) <= bound, "%s: %s: %s", name, what, difference_text(&d));
    outcome_free(&o);
}

static void test_variants(const Fixture *f) {
    const int steps = quick ? 2 : 4;
    static const char *const recompute[] = { "none", "moe", "layer", "auto" };
    for (int kind = OPT_SGD; kind <= OPT_ADAMW8; kind++) {
        Setup s = fixture_setup(f, kind == OPT_SGD ? OPT_SGD : OPT_ADAMW);
        char what[120];
        s.opt.kind = (OptimizerKind)kind;
        Outcome base = outcome_of(f, 0, &s, steps);
        for (int k = RECOMPUTE_MOE; k <= RECOMPUTE_AUTO && kind == OPT_SGD; k++) {
            Setup v = s;
            v.step.recompute = (Recompute)k;
            snprintf(what, sizeof what, "--recompute %s", recompute[k]);
            same_bits(f->name, what, f, &v, &base, steps);
        }
        if (kind == OPT_SGD) {
            for (int micro = 1; micro < f->B; micro++) {
                if (f->B % micro) continue;
                Setup v = s;
                v.step.micro_batch = micro;
                snprintf(what, sizeof what, "--micro-batch %d of %d", micro, f->B);
                same_rounded(f->name, what, f, &v, &base, steps);
                Outcome split = outcome_of(f, 0, &v, steps);
                v.step.recompute = RECOMPUTE_LAYER;
                snprintf(what, sizeof what, "--micro-batch %d --recompute layer", micro);
                same_bits(f->name, what, f, &v, &split, steps);
                outcome_free(&split);
            }
            // rounds: aux is per round (f of its own tokens), so without it the update is the same
            // sum
            Setup v = s;
            v.step.aux_coef = 0;
            Outcome plain = outcome_of(f, 0, &v, steps);
            for (int rounds = 2; rounds <= f->B; rounds++) {
                if (f->B % rounds) continue;
                v.step.rounds = rounds;
                Outcome o = outcome_of(f, 0, &v, steps);
                Difference d = difference_of(&o, &plain);
                d.aux = 0;
                check(difference_worst(&d) <= by_precision(1e-7, 5e-6, 2e-2),
                      "%s: --rounds %d without aux: %s", f->name, rounds, difference_text(&d));
                outcome_free(&o);
            }
            outcome_free(&plain);
        }
        Setup end = s;
        Setup layer;
        end.step.clip = 0;
        layer = end;
        layer.step.update_layer = 1;
        Outcome unclipped = outcome_of(f, 0, &end, steps);
        static const char *const optimizer[] = { "sgd", "adamw", "adamw8bit" };
        snprintf(what, sizeof what, "--update layer, %s, unclipped", optimizer[kind]);
        same_bits(f->name, what, f, &layer, &unclipped, steps);
        outcome_free(&unclipped);
        outcome_free(&base);
    }
}

// --update layer clips by the norm of the update before; the first is unclipped. With plain SGD
// that is --update end without clipping at a learning rate times that scale.
static void test_layer_clip(const Fixture *f) {
    Setup s = fixture_setup(f, OPT_SGD);
    s.opt.momentum = 0;
    s.opt.weight_decay = 0;
    s.step.clip = 0;
    Setup layer = s;
    layer.step.update_layer = 1;
    layer.step.clip = 0.3;
    Run *a = run_open(f, 0, &layer);
    Run *b = run_open(f, 0, &s);
    double scale = 1;
    double worst = 0;
    double smallest = 1;
    for (int i = 1; i <= (quick ? 2 : 5); i++) {
        StepResult x = run_step(a, i, a->lr, 0);
        StepResult y = run_step(b, i, b->lr * scale, 0);
        worst = fmax(worst, fmax(relative(x.loss, y.loss), relative(x.grad_norm, y.grad_norm)));
        scale = fmin(1, 0.3 / (x.grad_norm + 1e-6));
        smallest = fmin(smallest, scale);
    }
    check(worst <= by_precision(1e-12, 2e-6, 1e-2) && smallest < 0.9,
          "%s: --update layer clips by the previous norm: %.1e (scale down to %.2f)", f->name,
          worst, smallest);
    run_close(a);
    run_close(b);
}

// --recompute auto with room for a part: some layers keep, others recompute, the bits are the same.
static void test_auto(const Fixture *f) {
    Setup s = fixture_setup(f, OPT_SGD);
    s.step.micro_batch = 1;
    const int steps = quick ? 2 : 3;
    Outcome base = outcome_of(f, 0, &s, steps);
    Run *r = run_open(f, 0, &s);
    size_t store = r->t->act.store_size;
    size_t used = r->t->arena.used;
    run_close(r);
    s.step.recompute = RECOMPUTE_AUTO;
    s.step.memory = used - store / 2;
    Outcome o = outcome_of(f, 0, &s, steps);
    Difference d = difference_of(&o, &base);
    check(difference_worst(&d) == 0 && o.kept_all > 0 && o.kept_all < base.kept_all,
          "%s: --recompute auto in half the memory keeps %d of %d, %d attention only, %d nothing; "
          "same bits",
          f->name, o.kept_all, base.kept_all, o.kept_attention, o.kept_none);
    outcome_free(&o);
    outcome_free(&base);
}

// Expert gradients times mean count / own count (1 where there is no token), nothing else changed;
// the norm is of what is left.
static void test_utilisation(const Fixture *f) {
    Setup s = probe_setup(f);
    Run *plain = run_open(f, 0, &s);
    s.step.expert_grad_scale = 1;
    Run *scaled = run_open(f, 0, &s);
    Weights a = weights_new(&plain->m.c);
    Weights b = weights_new(&plain->m.c);
    const Config *c = &plain->m.c;
    int equal;
    int unused = 0;
    run_step(plain, 1, 0, 0);
    run_step(scaled, 1, 0, 0);
    read_all(plain, &a, 1, 1, &equal);
    read_all(scaled, &b, 1, 1, &equal);
    double worst = 0;
    for (int i = 0; i < a.n; i++) {
        int layer, expert;
        int moe = 0;
        double factor = 1;
        if (sscanf(a.weight[i].name, "model.layers.%d.mlp.experts.%d.", &layer, &expert) == 2) {
            for (int l = 0; l < layer; l++) moe += c->is_moe[l];
            int64_t count = plain->t->router.host_count[(size_t)moe * c->E + expert];
            if (count)
                factor = (double)f->B * f->T * c->K / c->E / (double)count;
            else
                unused++;
        }
        for (int64_t k = 0; k < a.weight[i].n; k++) a.weight[i].g[k] *= factor;
        worst = fmax(worst, distance(b.weight[i].g, a.weight[i].g, a.weight[i].n));
    }
    check(worst <= 2e-7,
          "%s: --expert-grad-scale: mean count / count, %d tensors without tokens left alone: %.1e",
          f->name, unused, worst);
    weights_free(&a);
    weights_free(&b);
    run_close(plain);
    run_close(scaled);
}

// The bias: after an update, rate * sign(mean - count) for every expert; it selects and never
// weighs. Without learning, it evens the counts out.
static void test_bias(const Fixture *f) {
    Setup s = probe_setup(f);
    s.step.balance_rate = 0.005;
    Run *r = run_open(f, 0, &s);
    const Config *c = &r->m.c;
    int wrong = 0;
    double mean = (double)f->B * f->T * c->K / c->E;
    double dispatch[2] = { 0, 0 };
    run_step(r, 1, 0, 0);
    for (int i = 0; i < c->n_moe * c->E; i++) {
        double count = (double)r->t->router.host_count[i];
        wrong += r->t->router.host_bias[i] != (float)(0.005 * ((mean > count) - (mean < count)));
        dispatch[0] += (count - mean) * (count - mean);
    }
    for (int k = 0; k < 60; k++) {
        run_step(r, 1, 0, 0);
        for (int i = 0; i < c->n_moe * c->E; i++)
            if (k >= 50)
                dispatch[1] += ((double)r->t->router.host_count[i] - mean) *
                               ((double)r->t->router.host_count[i] - mean) / 10;
    }
    check(!wrong && dispatch[1] < 0.7 * dispatch[0],
          "%s: --balance bias: rate * sign(mean - count); variance of the counts after 50 updates "
          "%.2f of the first",
          f->name, dispatch[1] / dispatch[0]);
    run_close(r);
}

// An expert that nobody chooses for 20 updates: gradient exactly zero, so AdamW leaves p * (1 - lr
// wd)^20, rounded 20 times.
static void test_unused_expert(const Fixture *f) {
    Setup s = fixture_setup(f, OPT_ADAMW);
    s.opt.weight_decay = 0.1;
    s.opt.lr = 1e-2;
    s.step.balance_rate = 1e-30; // switches the bias on without moving it
    char *path = xasprintf("%s/config.json", f->dir);
    Config c = config_read(path);
    free(path);
    float *bias = floats((int64_t)c.n_moe * c.E);
    for (int l = 0; l < c.n_moe; l++) bias[l * c.E + c.E - 1] = -1000;
    s.bias = bias;
    Run *r = run_open(f, 0, &s);
    Weights first = weights_new(&c);
    Weights last = weights_new(&c);
    int equal;
    int changed = 0;
    int tensors = 0;
    double worst = 0;
    double size = 0;
    read_all(r, &first, 0, 0, &equal);
    for (int i = 1; i <= 20; i++) run_step(r, i, r->lr, 0);
    read_all(r, &last, 0, 0, &equal);
    read_all(r, &last, 1, 1, &equal);
    for (int i = 0; i < first.n; i++) {
        int layer, expert;
        if (sscanf(first.weight[i].name, "model.layers.%d.mlp.experts.%d.", &layer, &expert) != 2 ||
            expert != c.E - 1)
            continue;
        for (int64_t k = 0; k < first.weight[i].n; k++) {
            first.weight[i].w[k] *= pow(1 - 1e-3, 20);
            changed += last.weight[i].g[k] != 0;
            size += fabs(first.weight[i].w[k]);
        }
        worst = fmax(worst, distance(last.weight[i].w, first.weight[i].w, first.weight[i].n));
        tensors++;
    }
    check(
        tensors == 3 * c.n_moe && size > 0 && !changed && worst <= (BF16 ? 4e-3 : 2e-6),
        "%s: an expert without tokens for 20 updates: moments zero, weights (1 - lr wd)^20 to %.1e",
        f->name, worst);
    weights_free(&first);
    weights_free(&last);
    run_close(r);
    config_free(&c);
    free(bias);
}

// A gradient that is not finite: with --skip-nonfinite the update changes nothing and does not
// count; the next one goes on as if it had not been.
static void test_nonfinite(const Fixture *f) {
    Setup s = fixture_setup(f, OPT_ADAMW);
    s.step.skip_nonfinite = 1;
    Run *r = run_open(f, 0, &s);
    Outcome base = outcome_of(f, 0, &s, 1);
    int block = r->m.head_block;
    int equal;
    int differ = 0;
    floatX keep;
    floatX bad = double_x(INFINITY);
    device_download(&keep, r->t->optimizer.state[block].param, sizeof keep);
    device_upload(r->t->optimizer.state[block].param, &bad, sizeof bad);
    StepResult x = run_step(r, 1, r->lr, 0);
    device_upload(r->t->optimizer.state[block].param, &keep, sizeof keep);
    Weights all = weights_new(&r->m.c);
    StepResult y = run_step(r, 1, r->lr, 0);
    read_all(r, &all, 0, 0, &equal);
    for (int i = 0; i < all.n; i++)
        for (int64_t k = 0; k < all.weight[i].n; k++)
            differ += all.weight[i].w[k] != base.all.weight[i].w[k];
    check(x.nonfinite && !y.nonfinite && !differ && r->t->updates == 1,
          "%s: --skip-nonfinite: an update with infinite gradients changes no parameter, moment or "
          "counter (%d differ after the next)",
          f->name, differ);
    outcome_free(&base);
    weights_free(&all);
    run_close(r);
}

// Evaluation and sampling see the same model as training: the loss of a batch, and the logits of a
// position; with all sequences in one micro-batch and with one in each.
static void forward_only(const Fixture *f, int micro_batch) {
    Setup s = probe_setup(f);
    s.step.ignore_target = -2; // evaluation counts what the run counts
    s.step.micro_batch = micro_batch;
    Run *r = run_open(f, 0, &s);
    char *dump = xasprintf("%s/forward.safetensors", temporary);
    StepResult x = run_step(r, 1, 0, dump);
    double loss = trainer_evaluate(r->t, r->data, 0, f->B, 0, 0);
    SafeTensors d = safetensors_open(dump);
    int64_t n;
    int V = r->m.c.V;
    int length = f->T - 3;
    double *logits = read_tensor(&d, "logits", &n);
    double worst = 0;
    double *wide = doubles(V);
    float *got = floats(V);
    trainer_logits(r->t, r->t->tokens.host_ids, length, got);
    for (int v = 0; v < V; v++) wide[v] = (double)got[v];
    worst = distance(wide, logits + (length - 1) * (size_t)V, V);
    check(
        relative(loss, x.loss) <= 1e-6 && worst <= 1e-6,
        "%s: %d micro-batch%s: evaluation gives training's loss (%.1e), sampling its logits (%.1e)",
        f->name, r->t->n_micro, r->t->n_micro > 1 ? "es" : "", relative(loss, x.loss), worst);
    safetensors_close(&d);
    unlink(dump);
    free(dump);
    free(logits);
    free(wide);
    free(got);
    run_close(r);
}

static void test_forward_only(const Fixture *f) {
    forward_only(f, 0);
    forward_only(f, 1);
}

// ---- 8-bit moments --------------------------------------------------------------------------
// Ten updates with 8-bit moments stay beside ten with exact ones: the dynamic code's relative error
// is up to 1/16 of a moment, so a step is within about a tenth of the exact one and the losses,
// which the ten updates move by several percent, stay within half a percent of each other.
static void test_8bit(const Fixture *f) {
    Setup s = fixture_setup(f, OPT_ADAMW);
    Outcome exact = outcome_of(f, 0, &s, 10);
    s.opt.kind = OPT_ADAMW8;
    Outcome coded = outcome_of(f, 0, &s, 10);
    double worst = 0;
    for (int i = 0; i < 10; i++) worst = fmax(worst, relative(coded.r[i].loss, exact.r[i].loss));
    check(worst > 0 && worst <= 5e-3, "%s: 10 losses with 8-bit moments, %.1e from exact ones",
          f->name, worst);
    outcome_free(&exact);
    outcome_free(&coded);
}

int main(int argc, char **argv) {
    const char *root = "dev/fixtures";
    const char *only = 0;
    int threads = 1; // the models are tiny: one thread is fastest; test_kernels shows that the bits
                     // do not depend on it
    CommOptions comm = { 120, 0, 1 };
    comm_init(&argc, &argv);
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--fixtures") && i + 1 < argc)
            root = argv[++i];
        else if (!strcmp(argv[i], "--only") && i + 1 < argc)
            only = argv[++i];
        else if (!strcmp(argv[i], "--threads") && i + 1 < argc)
            threads = atoi(argv[++i]);
        else if (!strcmp(argv[i], "--force-comm"))
            comm.force = 1;
        else if (!strcmp(argv[i], "--quick"))
            quick = 1;
        else
            die("test_moe does not know %s|test_moe [--fixtures DIR] [--only FIXTURE] [--threads "
                "N] [--force-comm] [--quick]",
                argv[i]);
    }
    comm_start(comm);
    device_init(comm_local_rank(), threads);
    int rank = 0;
    int *ranks = ints(comm_world_size());
    for (; rank < comm_world_size(); rank++) ranks[rank] = rank;
    Comm *all = comm_group("test", ranks, comm_world_size());
    free(ranks);
    const char *base = getenv("TMPDIR");
    snprintf(temporary, sizeof temporary, "%.200s/test_moe.XXXXXX", base && *base ? base : "/tmp");
    if (comm_world_rank() == 0 && !mkdtemp(temporary))
        die("cannot make a folder like %s|set TMPDIR", temporary);
    comm_broadcast(all, temporary, sizeof temporary, 0);
    if (comm_world_rank() == 0)
        printf("test_moe: %s, %s, %d rank%s\n", PRECISION_NAME, device_backend(), comm_world_size(),
               comm_world_size() > 1 ? "s" : "");
    for (int i = 0; i < FIXTURES && comm_world_size() == 1; i++) {
        if (only && strcmp(only, fixture_names[i])) continue;
        Fixture f = fixture_open(root, fixture_names[i]);
        test_transformers(&f);
        test_naive(&f, 0);
        test_replay(&f);
        if (FP64) test_differences(&f);
        test_variants(&f);
        test_layer_clip(&f);
        test_auto(&f);
        test_utilisation(&f);
        test_nonfinite(&f);
        test_forward_only(&f);
        test_documents(&f);
        if (!quick) {
            test_bias(&f);
            test_unused_expert(&f);
            test_8bit(&f);
        }
        fixture_close(&f);
    }
    for (int i = 0; i < DATA_FIXTURES && comm_world_size() == 1; i++) {
        if (only && strcmp(only, data_names[i])) continue;
        Fixture f = fixture_open(root, data_names[i]);
        test_transformers(&f);
        fixture_close(&f);
    }
    if (comm_world_size() > 1 || comm.force) {
        Fixture f = fixture_open(root, "parallel");
        test_layouts(&f);
        test_layout_inputs(&f);
        fixture_close(&f);
    }
    if (comm_world_rank() == 0) {
        if (rmdir(temporary)) check(0, "the temporary folder %s is empty at the end", temporary);
        printf("%d passed, %d failed\n", passed, failed);
        fflush(stdout);
    }
    device_finish();
    comm_finish();
    return failed != 0;
}
