// Documents (--documents mask), updates without targets, and replayed routings: what test_moe
// checks of them, alone and in every layout. Included by test_moe.c after layouts.h.
#ifndef MOE_DOCUMENTS_H
#define MOE_DOCUMENTS_H
#include "layouts.h"

// A document is FIRST, random ids, LAST; one of a single token is LAST.
enum { FIRST, LAST, OTHERS };

// Writes a shard of `windows` * T + 1 tokens, documents of the given lengths in turn. Documents
// with number 0 modulo n_lengths have ids of the lower half of the vocabulary, from `seed`; the
// others of the upper half.
static void write_documents(const char *path, int vocab, int64_t tokens, const int *length,
                            int n_lengths, uint32_t seed) {
    unsigned char *file = (unsigned char *)xcalloc(1024 + 2 * (size_t)tokens, 1, "a shard");
    int head[3] = { 20240520, 1, (int)tokens };
    int half = vocab / 2;
    memcpy(file, head, sizeof head);
    uint32_t lower = seed;
    uint32_t upper = 7;
    for (int64_t at = 0, document = 0; at < tokens; document++) {
        int n = length[document % n_lengths];
        for (int i = 0; i < n && at < tokens; i++, at++) {
            lower = lower * 1664525u + 1013904223u;
            upper = upper * 1664525u + 1013904223u;
            int id = document % n_lengths
                         ? half + (int)((upper >> 8) % (uint32_t)(vocab - half))
                         : OTHERS + (int)((lower >> 8) % (uint32_t)(half - OTHERS));
            if (i == 0) id = FIRST;
            if (i == n - 1) id = LAST;
            file[1024 + 2 * at] = (unsigned char)id;
            file[1025 + 2 * at] = (unsigned char)(id >> 8);
        }
    }
    FILE *f = fopen(path, "wb");
    size_t bytes = 1024 + 2 * (size_t)tokens;
    if (!f || fwrite(file, 1, bytes, f) != bytes || fclose(f))
        die("cannot write %s|set TMPDIR", path);
    free(file);
}

static Setup document_setup(const Fixture *f, const char *tokens, int T, int batch) {
    Setup s = fixture_setup(f, OPT_SGD);
    s.tokens = tokens;
    s.step.T = T;
    s.step.batch = batch;
    s.step.ignore_target = -2;
    s.step.documents = 1;
    s.step.document_end = LAST;
    return s;
}

// A window of three documents is three windows: logits and every gradient, whatever is computed
// again. In the windows the first token of a document does not count as a target.
static void test_three_windows(const Fixture *f, const Config *c, const char *tokens) {
    int length = f->T / 3;
    int T = 3 * length;
    write_documents(tokens, c->V, (int64_t)f->B * T + 1, &length, 1, 1);
    Setup s = document_setup(f, tokens, length, 3 * f->B);
    s.step.documents = 0;
    s.step.ignore_target = FIRST;
    Outcome windows = outcome_of(f, 0, &s, 1);
    // A document of two or three tokens has one to three keys a row: the gradients of the norms of
    // q and k are then small differences of large terms, and the order of sums, which micro-batches
    // change, shows in fp32 (6e-5 was seen in a debug build). fp64 builds keep the bound.
    double bound = layout_bound() * (length < 4 && !BF16 && !FP64 ? 10 : 1);
    for (int recompute = RECOMPUTE_NONE; recompute <= RECOMPUTE_AUTO; recompute++) {
        s = document_setup(f, tokens, T, f->B);
        s.step.recompute = (Recompute)recompute;
        s.step.micro_batch = recompute % 2;
        Outcome o = outcome_of(f, 0, &s, 1);
        Difference d = difference_of(&o, &windows);
        check(difference_worst(&d) <= bound && o.r[0].valid == windows.r[0].valid &&
                  o.r[0].visible == length && windows.r[0].visible == length,
              "%s: a window of three documents of %d is three windows, recompute %s: %s", f->name,
              length, recompute_names[recompute], difference_text(&d));
        outcome_free(&o);
    }
    outcome_free(&windows);
    s = document_setup(f, tokens, T, f->B);
    Run *r = run_open(f, 0, &s);
    StepResult x = run_step(r, 1, 0, 0);
    double loss = trainer_evaluate(r->t, r->data, 0, f->B, 0, 0);
    check(relative(loss, x.loss) <= 1e-6, "%s: evaluation sees the same documents (%.1e)", f->name,
          relative(loss, x.loss));
    run_close(r);
    unlink(tokens);
}

// Another first document, with the same routing, changes no bit of the others' logits, nor of the
// embedding's gradient at ids that only they have.
static void test_first_document(const Fixture *f, const Config *c, const char *tokens) {
    int length[] = { f->T / 2, f->T - f->T / 2 - 1, 1 };
    char *routing = xasprintf("%s/routing.safetensors", temporary);
    Setup s = document_setup(f, tokens, f->T, f->B);
    Outcome o[2];
    if (c->n_moe) {
        write_routing(routing, c, f->B, f->T);
        s.replay = routing;
    }
    for (int i = 0; i < 2; i++) {
        write_documents(tokens, c->V, (int64_t)f->B * f->T + 1, length, 3, 1 + (uint32_t)i);
        o[i] = outcome_of(f, 0, &s, 1);
    }
    int64_t first = 0;
    int64_t others = 0;
    int64_t changed = 0;
    for (int64_t i = 0; i < o[0].n_logits; i++) {
        int differs = o[0].logits[i] != o[1].logits[i];
        if (i / c->V % f->T < length[0])
            first += differs;
        else
            others += differs;
    }
    int embedding = weights_find(&o[0].all, "model.embed_tokens.weight");
    const double *g[2] = { o[0].all.weight[embedding].g, o[1].all.weight[embedding].g };
    for (int64_t i = (int64_t)(c->V / 2) * c->C; i < (int64_t)c->V * c->C && !c->tied; i++)
        changed += g[0][i] != g[1][i];
    check(first > 0 && !others && !changed && o[0].r[0].valid == f->B * (f->T - 3),
          "%s: another first document changes %lld of its logits, %lld of the others', "
          "%lld of their embedding's gradients",
          f->name, (long long)first, (long long)others, (long long)changed);
    for (int i = 0; i < 2; i++) outcome_free(&o[i]);
    unlink(tokens);
    if (c->n_moe) unlink(routing);
    free(routing);
}

// An update without a target: no loss, a gradient of zero, and the run goes on.
static void test_no_targets(const Fixture *f, const Layout *l, const char *tokens, int vocab,
                            int batch) {
    int length = 1; // every token is LAST
    Setup s = document_setup(f, tokens, f->T, batch);
    s.step.z_coef = 0.01;
    if (!(l && l->dp) || comm_world_rank() == 0)
        write_documents(tokens, vocab, (int64_t)batch * f->T + 1, &length, 1, 1);
    if (l && l->dp) wait_for_all();
    Run *r = run_open(f, l, &s);
    StepResult x = run_step(r, 1, r->lr, 0);
    check(isnan(x.loss) && x.valid == 0 && x.grad_norm == 0 && !x.nonfinite && r->t->updates == 1,
          "%s, dp %d fsdp %d ep %d: an update without targets: loss %g, gradient norm %g", f->name,
          r->g.dp, r->g.fsdp, r->g.ep, x.loss, x.grad_norm);
    run_close(r);
    if (l && l->dp) wait_for_all();
    if (!(l && l->dp) || comm_world_rank() == 0) unlink(tokens);
}

static void test_documents(const Fixture *f) {
    char *path = xasprintf("%s/config.json", f->dir);
    char *tokens = xasprintf("%s/documents.bin", temporary);
    Config c = config_read(path);
    test_three_windows(f, &c, tokens);
    test_first_document(f, &c, tokens);
    test_no_targets(f, 0, tokens, c.V, f->B);
    config_free(&c);
    free(tokens);
    free(path);
}

// ---- layouts --------------------------------------------------------------------------------
// One update of each layout, with the ways to exchange tokens and to compute again in turn, is that
// of one process.
static void compare_layouts(const Fixture *f, const Config *c, const Shape *shape, int n_shapes,
                            Setup s, const char *what) {
    Outcome solo = outcome_of(f, 0, &s, 1);
    for (int i = 0, n = 0; i < 2 * 3 * n_shapes; i++) {
        Case k = { { i / 6, i % 3, i / 3 % 2, 0, 0, 0 } };
        const Shape *x = &shape[k.value[0]];
        Layout l = { x->dp, x->fsdp, x->ep, (Dispatch)k.value[1], k.value[2] };
        int sequences = local_sequences(c, shape, &k, (int)s.step.batch);
        if (!sequences) continue;
        s.step.micro_batch = n % 2 ? sequences : 1;
        s.step.recompute = (Recompute)(n++ % 3);
        Outcome o = outcome_of(f, &l, &s, 1);
        Difference d = difference_of(&o, &solo);
        check(difference_worst(&d) <= layout_bound() && o.r[0].valid == solo.r[0].valid &&
                  o.r[0].visible == solo.r[0].visible,
              "%s: dp %d fsdp %d ep %d, %s, attention %s, recompute %s: %s", what, l.dp, l.fsdp,
              l.ep, dispatch_names[l.dispatch], l.heads ? "heads" : "data",
              recompute_names[s.step.recompute], difference_text(&d));
        outcome_free(&o);
    }
    outcome_free(&solo);
}

static void test_layout_inputs(const Fixture *f) {
    char *path = xasprintf("%s/config.json", f->dir);
    Config c = config_read(path);
    Shape shape[MAX_VALUES];
    const int windows = 8;
    const int length[] = { f->T / 2 + 1, 3, 1, f->T / 4 };
    int world = comm_world_size();
    int n = shapes_of(shape, world, &c);
    int batch = windows / world > 0 ? windows / world * world : world;
    free(path);
    path = xasprintf("%s/routing.safetensors", temporary);
    char *tokens = xasprintf("%s/documents.bin", temporary);
    if (comm_world_rank() == 0) {
        write_routing(path, &c, batch, f->T);
        write_documents(tokens, c.V, (int64_t)batch * f->T + 1, length, 4, 1);
    }
    wait_for_all();
    Setup s = fixture_setup(f, OPT_SGD);
    s.step.batch = batch;
    s.replay = path;
    compare_layouts(f, &c, shape, n, s, "a replayed routing");
    compare_layouts(f, &c, shape, n, document_setup(f, tokens, f->T, batch), "documents");
    wait_for_all();
    Layout l = { shape[0].dp, shape[0].fsdp, shape[0].ep, DISPATCH_ALLTOALL, 0 };
    test_no_targets(f, &l, tokens, c.V, batch);
    if (comm_world_rank() == 0) unlink(path);
    free(tokens);
    free(path);
    config_free(&c);
}
#endif
