// The first update, ten of SGD and ten of AdamW beside the numbers that transformers wrote
// (dev/fixtures); a part of test_moe.c.

// ---- transformers' numbers ------------------------------------------------------------------
static double scalar(const Fixture *f, const char *name) {
    int64_t n;
    double *v = read_tensor(&f->expected, name, &n);
    double first = v[0];
    free(v);
    return first;
}

// topk of the last update of a run with one micro-batch: (n_moe, R, K).
static int *read_routing(const Run *r) {
    const Config *c = &r->m.c;
    int R = r->t->R;
    int *topk = ints((int64_t)c->n_moe * R * c->K + 1);
    int *to = topk;
    for (int l = 0; l < c->L; l++) {
        if (!c->is_moe[l]) continue;
        device_download(to, r->t->act.saved[l].topk, (size_t)R * (size_t)c->K * sizeof(int));
        to += R * c->K;
    }
    return topk;
}

typedef struct {
    const char *name;
    double norm;
} NamedNorm;
static int by_name(const void *a, const void *b) {
    return strcmp(((const NamedNorm *)a)->name, ((const NamedNorm *)b)->name);
}

// L2 norms of all parameters, sorted by name, against final_<optimizer>: what sees a forgotten
// weight decay.
static double final_norms(const Run *r, const Fixture *f, const char *optimizer,
                          const char **name) {
    Weights all = weights_new(&r->m.c);
    static char worst_name[160];
    int64_t n;
    int equal;
    char *key = xasprintf("final_%s", optimizer);
    double *expected = read_tensor(&f->expected, key, &n);
    double worst = n == all.n ? 0 : INFINITY;
    NamedNorm *norm = (NamedNorm *)xcalloc((size_t)all.n, sizeof *norm, "norms");
    read_all(r, &all, 0, 0, &equal);
    for (int i = 0; i < all.n; i++) {
        double s = 0;
        for (int64_t k = 0; k < all.weight[i].n; k++) s += all.weight[i].w[k] * all.weight[i].w[k];
        norm[i].name = all.weight[i].name;
        norm[i].norm = sqrt(s);
    }
    qsort(norm, (size_t)all.n, sizeof *norm, by_name);
    strcpy(worst_name, "-");
    for (int i = 0; i < all.n && i < n; i++) {
        double e = relative(norm[i].norm, expected[i]);
        if (e > worst) {
            worst = e;
            strcpy(worst_name, norm[i].name);
        }
    }
    *name = worst_name;
    free(norm);
    free(expected);
    free(key);
    weights_free(&all);
    return worst;
}

static void check_first_update(const Fixture *f, const Run *r, const StepResult *s,
                               const char *dump) {
    Outcome got;
    memset(&got, 0, sizeof got);
    got.all = weights_new(&r->m.c);
    read_dump(dump, &got);
    int64_t n;
    double *logits = read_tensor(&f->expected, "logits", &n);
    double e = n == got.n_logits ? distance(got.logits, logits, n) : INFINITY;
    check(e <= 1e-5, "%s: logits %.1e", f->name, e);
    check(relative(s->loss, scalar(f, "loss")) <= 1e-5, "%s: loss %.1e", f->name,
          relative(s->loss, scalar(f, "loss")));
    check(relative(s->aux, scalar(f, "aux")) <= 1e-5, "%s: aux %.1e", f->name,
          relative(s->aux, scalar(f, "aux")));
    check(relative(s->z, scalar(f, "z")) <= 1e-5, "%s: z %.1e", f->name,
          relative(s->z, scalar(f, "z")));
    double worst = 0;
    const char *name = "-";
    int gradients = 0;
    for (int i = 0; i < f->expected.n; i++)
        gradients += !strncmp(f->expected.tensor[i].name, "grad.", 5);
    for (int i = 0; i < got.all.n; i++) {
        char key[200];
        snprintf(key, sizeof key, "grad.%s", got.all.weight[i].name);
        double *g = read_tensor(&f->expected, key, &n);
        e = n == got.all.weight[i].n ? distance(got.all.weight[i].g, g, n) : INFINITY;
        if (e > worst) {
            worst = e;
            name = got.all.weight[i].name;
        }
        free(g);
    }
    check(worst <= 2e-5 && gradients == got.all.n, "%s: %d gradients, worst %.1e (%s)", f->name,
          gradients, worst, name);
    int *topk = read_routing(r);
    int differ = 0;
    double *expected = read_tensor(&f->expected, "topk", &n);
    for (int64_t i = 0; i < n; i++) differ += topk[i] != (int)expected[i];
    check(n == (int64_t)r->m.c.n_moe * r->t->R * r->m.c.K && !differ,
          "%s: experts of every token (%lld choices, %d differ)", f->name, (long long)n, differ);
    free(logits);
    free(expected);
    free(topk);
    outcome_free(&got);
}

// Ten updates with SGD and ten with AdamW. bf16 builds: the curves stay near (each loss carries
// 2^-9 of rounding in its logits and in the weights it came from).
static void test_transformers(const Fixture *f) {
    for (int kind = OPT_SGD; kind <= OPT_ADAMW; kind++) {
        const char *optimizer = kind == OPT_SGD ? "sgd" : "adamw";
        Setup s = fixture_setup(f, (OptimizerKind)kind);
        Run *r = run_open(f, 0, &s);
        char *dump = xasprintf("%s/hf.safetensors", temporary);
        char key[40];
        int64_t n;
        snprintf(key, sizeof key, "losses_%s", optimizer);
        double *losses = read_tensor(&f->expected, key, &n);
        double worst_loss = n == 10 ? 0 : INFINITY;
        double worst_norm = 0;
        snprintf(key, sizeof key, "grad_norms_%s", optimizer);
        double *norms = read_tensor(&f->expected, key, &n);
        int updates = quick ? 2 : 10;
        for (int i = 0; i < updates; i++) {
            StepResult x = run_step(r, i + 1, r->lr, i || kind ? 0 : dump);
            if (!i && !kind && !BF16) check_first_update(f, r, &x, dump);
            worst_loss = fmax(worst_loss, relative(x.loss, losses[i]));
            worst_norm = fmax(worst_norm, relative(x.grad_norm, norms[i]));
        }
        const char *name;
        double final = final_norms(r, f, optimizer, &name);
        check(worst_loss <= (BF16 ? 1e-2 : 1e-5), "%s: %d %s losses %.1e", f->name, updates,
              optimizer, worst_loss);
        check(worst_norm <= (BF16 ? 5e-2 : 1e-5), "%s: %d %s gradient norms %.1e", f->name, updates,
              optimizer, worst_norm);
        if (!quick)
            check(final <= (BF16 ? 5e-3 : 2e-6),
                  "%s: norms of all parameters after 10 %s updates %.1e (%s)", f->name, optimizer,
                  final, name);
        unlink(dump);
        free(dump);
        free(losses);
        free(norms);
        run_close(r);
    }
}
