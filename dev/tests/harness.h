// What the checks of the whole model share: fixtures, one run of the trainer in any layout, and
// what comes out of it in a form that any two runs can be compared in. Uses only what every backend
// has: device_upload and device_download bring numbers in and out.
#ifndef MOE_HARNESS_H
#define MOE_HARNESS_H
#include "../naive/naive.h"
#include "../../data/loader.h"
#include "../../kernels/fail.h"
#include "../../model/checkpoint.h"
#include "../../model/safetensors.h"
#include "../../model/step.h"
#include <cjson/cJSON.h>
#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

// ---- checks: printed by rank 0, decided by what every rank knows ----------------------------
static int passed, failed;
static int quick;           // few updates each: --quick of test_moe
static char temporary[256]; // folder of this run, the same on all ranks

MOE_PRINTF(2, 3) static void check(int ok, const char *format, ...) {
    if (comm_world_rank() == 0) {
        char text[1024];
        va_list args;
        va_start(args, format);
        vsnprintf(text, sizeof text, format, args);
        va_end(args);
        printf("%4d %s  %s\n", passed + failed + 1, ok ? "ok  " : "FAIL", text);
        fflush(stdout);
    }
    if (ok)
        passed++;
    else
        failed++;
}

// ---- zeroed arrays, freed by the caller -----------------------------------------------------
static double *doubles(int64_t n) {
    return (double *)xcalloc((size_t)n + 1, sizeof(double), "a test array");
}
static float *floats(int64_t n) {
    return (float *)xcalloc((size_t)n + 1, sizeof(float), "a test array");
}
static int *ints(int64_t n) { return (int *)xcalloc((size_t)n + 1, sizeof(int), "a test array"); }

// ---- tensors of a whole model, in double: those of the naive model -----------------------------
static NaiveConfig naive_config(const Config *c) {
    NaiveConfig n = { c->V,    c->C,   c->L,       c->H,         c->KV,     c->D,
                      c->E,    c->K,   c->F,       c->I,         c->is_moe, c->norm_topk,
                      c->tied, c->pad, c->rms_eps, c->rope_theta };
    return n;
}
static Weights weights_new(const Config *c) {
    NaiveConfig n = naive_config(c);
    return naive_weights(&n);
}
static void weights_free(Weights *all) {
    for (int i = 0; i < all->n; i++) {
        free(all->weight[i].w);
        free(all->weight[i].g);
    }
    free(all->weight);
    all->n = 0;
}
static int weights_find(const Weights *all, const char *name) {
    for (int i = 0; i < all->n; i++)
        if (!strcmp(all->weight[i].name, name)) return i;
    die("no tensor %s|the naive model and the parameter table disagree", name);
}

// ---- fixtures: see dev/hf/README.md ---------------------------------------------------------
typedef struct {
    double lr, momentum, beta1, beta2, eps, weight_decay, grad_clip;
} RunOptions;
typedef struct {
    const char *name;
    char *dir, *tokens;
    int B, T, ignore, aux_per_layer;
    int documents, document_end; // as --documents mask --document-end
    double aux_coef, z_coef;
    RunOptions sgd, adamw;
    SafeTensors expected;
} Fixture;

static double json_number(const cJSON *object, const char *key) {
    const cJSON *v = cJSON_GetObjectItemCaseSensitive(object, key);
    return cJSON_IsNumber(v) ? v->valuedouble : 0;
}
static char *read_text(const char *path) {
    FILE *f = fopen(path, "rb");
    if (!f) return 0;
    char *text = (char *)xcalloc(1 << 22, 1, "a test file");
    size_t n = fread(text, 1, (1 << 22) - 1, f);
    text[n] = 0;
    fclose(f);
    return text;
}
static RunOptions run_options(const cJSON *o) {
    RunOptions r = { json_number(o, "lr"),       json_number(o, "momentum"),
                     json_number(o, "beta1"),    json_number(o, "beta2"),
                     json_number(o, "eps"),      json_number(o, "weight_decay"),
                     json_number(o, "grad_clip") };
    return r;
}
static Fixture fixture_open(const char *root, const char *name) {
    Fixture f;
    f.name = name;
    f.dir = xasprintf("%s/%s", root, name);
    f.tokens = xasprintf("%s/tokens.bin", f.dir);
    char *path = xasprintf("%s/meta.json", f.dir);
    char *text = read_text(path);
    cJSON *meta = text ? cJSON_Parse(text) : 0;
    if (!meta)
        die("%s: cannot read|run from the root of the repository, or give --fixtures DIR", path);
    f.B = (int)json_number(meta, "B");
    f.T = (int)json_number(meta, "T");
    f.ignore = (int)json_number(meta, "ignore_target");
    const cJSON *pool = cJSON_GetObjectItemCaseSensitive(meta, "aux_pool");
    f.aux_per_layer = cJSON_IsString(pool) && !strcmp(pool->valuestring, "layer");
    const cJSON *documents = cJSON_GetObjectItemCaseSensitive(meta, "documents");
    f.documents = cJSON_IsString(documents) && !strcmp(documents->valuestring, "mask");
    f.document_end = (int)json_number(meta, "document_end");
    f.aux_coef = json_number(meta, "aux_coef");
    f.z_coef = json_number(meta, "z_coef");
    f.sgd = run_options(cJSON_GetObjectItemCaseSensitive(meta, "sgd"));
    f.adamw = run_options(cJSON_GetObjectItemCaseSensitive(meta, "adamw"));
    cJSON_Delete(meta);
    free(text);
    free(path);
    path = xasprintf("%s/expected.safetensors", f.dir);
    f.expected = safetensors_open(path);
    free(path);
    return f;
}
static void fixture_close(Fixture *f) {
    safetensors_close(&f->expected);
    free(f->dir);
    free(f->tokens);
}

// A tensor of fp32 or int32 numbers as doubles (caller frees); *n elements.
static double *read_tensor(const SafeTensors *s, const char *name, int64_t *n) {
    const SafeTensor *t = safetensors_find(s, name);
    if (!t || dtype_size(t->type) != 4)
        die("%s: no 4-byte tensor %s|write the fixtures again", s->path[0], name);
    *n = safetensors_elements(t);
    float *raw = (float *)xmalloc((size_t)*n * 4, "a test tensor");
    double *d = (double *)xmalloc((size_t)*n * sizeof(double), "a test tensor");
    safetensors_read(s, t, 0, raw, *n * 4);
    for (int64_t i = 0; i < *n; i++) {
        int32_t id;
        memcpy(&id, raw + i, 4);
        d[i] = t->type == DTYPE_I32 ? (double)id : (double)raw[i];
    }
    free(raw);
    return d;
}

// ---- runs -----------------------------------------------------------------------------------
typedef struct {
    int dp, fsdp, ep;
    Dispatch dispatch;
    int heads;
} Layout; // dp 0: this rank by itself, whatever the world
typedef struct {
    StepOptions step;
    OptimizerOptions opt;
    const char *tokens;
    const float *bias;  // (n_moe, E) selection bias of the whole run, 0 = none
    const char *replay; // file with the routing of the first update, 0 = none
} Setup;
typedef struct {
    Model m;
    Grid g;
    Trainer *t;
    Checkpoint *k;
    Arena staging;
    Loader *data;
    double lr;
} Run;

// The options that a fixture's expected numbers were made with.
static Setup fixture_setup(const Fixture *f, OptimizerKind kind) {
    Setup s;
    memset(&s, 0, sizeof s);
    const RunOptions *o = kind == OPT_SGD ? &f->sgd : &f->adamw;
    s.step.T = f->T;
    s.step.batch = f->B;
    s.step.rounds = 1;
    s.step.clip = o->grad_clip;
    s.step.aux_coef = f->aux_coef;
    s.step.z_coef = f->z_coef;
    s.step.aux_per_layer = f->aux_per_layer;
    s.step.ignore_target = f->ignore < 0 ? -2 : f->ignore;
    s.step.documents = f->documents;
    s.step.document_end = f->document_end;
    s.step.seed = 1;
    s.opt.kind = kind;
    s.opt.lr = o->lr;
    s.opt.momentum = o->momentum;
    s.opt.beta1 = o->beta1;
    s.opt.beta2 = o->beta2;
    s.opt.eps = o->eps;
    s.opt.weight_decay = o->weight_decay;
    s.opt.master = 1;
    s.opt.seed = 1;
    s.tokens = f->tokens;
    return s;
}

// One rank as a world of its own: what every layout is compared with, inside the same process.
static Grid solo_grid(void) {
    Grid g;
    memset(&g, 0, sizeof g);
    int me = comm_world_rank();
    Comm **group[5] = { &g.all, &g.ep_group, &g.fsdp_group, &g.dense_group, &g.dp_group };
    for (int i = 0; i < 5; i++) *group[i] = comm_group("solo", &me, 1);
    g.world = g.dp = g.fsdp = g.ep = g.data_ranks = 1;
    return g;
}

static Run *run_open(const Fixture *f, const Layout *l, const Setup *s) {
    Run *r = (Run *)xcalloc(1, sizeof(Run), "a run");
    char *path = xasprintf("%s/config.json", f->dir);
    Config config = config_read(path);
    free(path);
    r->g = l && l->dp ? grid_build(&config, l->dp, l->fsdp, l->ep, l->dispatch, l->heads)
                      : solo_grid();
    r->m = model_build(config, grid_shard_spec(&r->g));
    LoaderOptions data = { s->step.T, 1, 0, config.V, LOSS_MASK_AUTO, 0 };
    r->data = loader_open(&s->tokens, 1, data);
    r->t = trainer_create(&r->m, &r->g, s->step, s->opt, 0, 0);
    r->lr = s->opt.lr;
    r->staging = arena_counting("checkpoint");
    checkpoint_free(checkpoint_create(&r->m, r->g.all, 1, &r->staging));
    arena_commit(&r->staging);
    r->k = checkpoint_create(&r->m, r->g.all, r->g.dp_rank == 0, &r->staging);
    checkpoint_load_model(r->k, f->dir, r->t->optimizer.state);
    if (s->replay) r->t->routing = routing_open(r->t, "", s->replay, 1, 1);
    if (s->bias) trainer_set_bias(r->t, s->bias, (size_t)config.n_moe * (size_t)config.E);
    return r;
}
static void run_close(Run *r) {
    routing_close(r->t->routing);
    trainer_free(r->t);
    checkpoint_free(r->k);
    arena_free(&r->staging);
    loader_close(r->data);
    model_free(&r->m);
    free(r);
}
static StepResult run_step(Run *r, int64_t update, double lr, const char *dump) {
    if (dump) r->t->dump = dump_open(dump, r->t);
    return trainer_step(r->t, r->data, update, lr);
}

static double x_double(floatX x) {
#if defined(MOE_FP64)
    return x.v;
#else
    return (double)floatx_to_float(x);
#endif
}
static floatX double_x(double v) {
    floatX x;
#if defined(MOE_BF16)
    union {
        float f;
        uint32_t u;
    } y;
    y.f = (float)v;
    x.bits = (uint16_t)((y.u + 0x7fff + (y.u >> 16 & 1)) >> 16);
#else
    x.v = (real)v;
#endif
    return x;
}

// This rank's shards into the tensors they belong to: parameters (state 0), or the first moment
// (state 1), into w or g. Other elements stay.
static void read_shards(const Run *r, Weights *all, int state, int into_g) {
    char name[160];
    int at = 0;
    for (int b = 0; b < r->m.n_blocks; b++)
        for (int i = 0; i < r->m.block[b].n_segments; i++) {
            const Segment *s = &r->m.block[b].segment[i];
            const OptimizerState *o = &r->t->optimizer.state[b];
            param_hf_name(&r->m.param[r->m.block[b].segment_param[i]],
                          r->m.block[b].segment_slice[i], name);
            if (strcmp(all->weight[at].name, name)) at = weights_find(all, name);
            double *to = (into_g ? all->weight[at].g : all->weight[at].w) + s->first;
            size_t n = (size_t)s->count;
            size_t width = state ? sizeof(real) : sizeof(floatX);
            char *raw = (char *)xmalloc(n * width, "a shard");
            device_download(raw,
                            state ? (const char *)(o->m + s->offset)
                                  : (const char *)(o->param + s->offset),
                            n * width);
            for (size_t k = 0; k < n; k++)
                to[k] = state ? (double)((real *)raw)[k] : x_double(((floatX *)raw)[k]);
            free(raw);
        }
}

// The whole model on every rank. *equal: whether data-parallel copies of a shard hold the same
// bits.
static void read_all(const Run *r, Weights *all, int state, int into_g, int *equal) {
    size_t n = 0;
    size_t at;
    *equal = 1;
    read_shards(r, all, state, into_g);
    if (r->g.world == 1) return;
    for (int i = 0; i < all->n; i++) n += (size_t)all->weight[i].n;
    double *mine = doubles(n);
    double *every = doubles((int64_t)n * r->g.world);
    for (int i = 0; i < all->n; i++)
        for (int64_t k = 0; k < all->weight[i].n; k++)
            (into_g ? all->weight[i].g : all->weight[i].w)[k] = NAN;
    read_shards(r, all, state, into_g); // what is not here is NaN
    at = 0;
    for (int i = 0; i < all->n; i++) {
        memcpy(mine + at, into_g ? all->weight[i].g : all->weight[i].w,
               (size_t)all->weight[i].n * sizeof(double));
        at += (size_t)all->weight[i].n;
    }
    comm_all_gather_host(r->g.all, every, mine, n * sizeof(double));
    for (at = 0; at < n; at++) {
        double value = NAN;
        for (int k = 0; k < r->g.world; k++) {
            double v = every[(size_t)k * n + at];
            if (isnan(v)) continue;
            if (isnan(value))
                value = v;
            else if (v != value)
                *equal = 0;
        }
        mine[at] = value;
    }
    at = 0;
    for (int i = 0; i < all->n; i++) {
        memcpy(into_g ? all->weight[i].g : all->weight[i].w, mine + at,
               (size_t)all->weight[i].n * sizeof(double));
        at += (size_t)all->weight[i].n;
    }
    free(mine);
    free(every);
}

// A file for --routing-replay: K different experts for every token, at random, ascending.
static void write_routing(const char *path, const Config *c, int64_t B, int64_t T) {
    SafeTensor topk = { (char *)"topk", DTYPE_I32, 4, { c->n_moe, B, T, c->K }, 0, 0, 0 };
    size_t header_bytes;
    size_t n = (size_t)(c->n_moe * B * T) * (size_t)c->K;
    int64_t bytes;
    char *header = safetensors_layout(&topk, 1, &header_bytes, &bytes);
    int *choice = (int *)xcalloc(n, sizeof(int), "a routing");
    uint32_t state = 1;
    for (size_t i = 0; i < n; i += (size_t)c->K) {
        int chosen = 0;
        for (int e = 0; e < c->E && chosen < c->K; e++) {
            state = state * 1664525u + 1013904223u;
            // Selection sampling: each of the E - e experts left is one of the K - chosen wanted.
            if ((int)((state >> 8) % (uint32_t)(c->E - e)) < c->K - chosen)
                choice[i + (size_t)chosen++] = e;
        }
    }
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(header, 1, header_bytes, f) != header_bytes ||
        fwrite(choice, sizeof(int), n, f) != n || fclose(f))
        die("cannot write %s|set TMPDIR", path);
    free(header);
    free(choice);
}

// ---- outcomes: what a run of some updates gives, whatever its layout ------------------------
enum { MAX_STEPS = 32 };
typedef struct {
    int steps, equal; // equal: copies of a shard have the same bits
    StepResult r[MAX_STEPS];
    int64_t n_logits;
    double *logits; // (B, T, V) of the first update, data order
    Weights all; // w: parameters after the last update; g: gradient of the first, unclipped (from
                 // the dump, so in fp32)
    int kept_all, kept_attention, kept_none;
} Outcome;

static void read_dump(const char *path, Outcome *o) {
    SafeTensors s = safetensors_open(path);
    o->logits = read_tensor(&s, "logits", &o->n_logits);
    for (int i = 0; i < o->all.n; i++) {
        char name[200];
        int64_t n;
        snprintf(name, sizeof name, "grad.%s", o->all.weight[i].name);
        double *g = read_tensor(&s, name, &n);
        if (n != o->all.weight[i].n)
            die("%s: %s has %lld elements, the model %lld|the dump is wrong", path, name,
                (long long)n, (long long)o->all.weight[i].n);
        memcpy(o->all.weight[i].g, g, (size_t)n * sizeof(double));
        free(g);
    }
    safetensors_close(&s);
}

static Outcome outcome_of(const Fixture *f, const Layout *l, const Setup *s, int steps) {
    Outcome o;
    memset(&o, 0, sizeof o);
    Run *r = run_open(f, l, s);
    char *path = l && l->dp ? xasprintf("%s/dump.safetensors", temporary)
                            : xasprintf("%s/dump%d.safetensors", temporary, comm_world_rank());
    o.all = weights_new(&r->m.c);
    o.steps = steps;
    for (int i = 0; i < steps; i++) {
        o.r[i] = run_step(r, i + 1, r->lr, i ? 0 : path);
        if (i == 0) {
            o.kept_all = r->t->counts.all;
            o.kept_attention = r->t->counts.attention;
            o.kept_none = r->t->counts.none;
        }
    }
    read_dump(path, &o);
    read_all(r, &o.all, 0, 0, &o.equal);
    comm_barrier(r->g.all); // nobody reads any more
    if (!(l && l->dp) || r->g.rank == 0) unlink(path);
    free(path);
    run_close(r);
    return o;
}
static void outcome_free(Outcome *o) {
    free(o->logits);
    weights_free(&o->all);
}

// ---- bounds ---------------------------------------------------------------------------------
enum { FP64 = sizeof(real) == 8, BF16 = sizeof(floatX) == 2 };
static double by_precision(double fp64, double fp32, double bf16) {
    if (FP64) return fp64;
    return BF16 ? bf16 : fp32;
}

// ---- comparison -----------------------------------------------------------------------------
// |a - b| / |b| in the 2-norm. A tensor that must be zero (an expert without tokens: I3, unused is
// zero) must be exactly zero. NaN is infinitely far away.
static double distance(const double *a, const double *b, int64_t n) {
    double difference = 0;
    double size = 0;
    for (int64_t i = 0; i < n; i++) {
        difference += (a[i] - b[i]) * (a[i] - b[i]);
        size += b[i] * b[i];
    }
    if (size == 0) return difference == 0 ? 0 : INFINITY;
    double e = sqrt(difference / size);
    return isnan(e) ? INFINITY : e;
}
static double relative(double a, double b) {
    double e = b != 0 ? fabs(a - b) / fabs(b) : fabs(a - b);
    return isnan(e) ? INFINITY : e;
}

// The largest distance over all tensors, of gradients or of parameters, and whose it is. bf16
// gradients: over all of them together.
static double worst_of(const Weights *a, const Weights *b, int gradients, const char **name) {
    double worst = -1;
    if (gradients && BF16) { // bf16: see layouts.h
        double difference = 0;
        double size = 0;
        for (int i = 0; i < a->n; i++)
            for (int64_t k = 0; k < a->weight[i].n; k++) {
                difference += pow(a->weight[i].g[k] - b->weight[i].g[k], 2);
                size += pow(b->weight[i].g[k], 2);
            }
        *name = "all";
        worst = sqrt(difference / size);
        return isnan(worst) ? INFINITY : worst;
    }
    for (int i = 0; i < a->n; i++) {
        double e = gradients ? distance(a->weight[i].g, b->weight[i].g, a->weight[i].n)
                             : distance(a->weight[i].w, b->weight[i].w, a->weight[i].n);
        if (e > worst) {
            worst = e;
            *name = a->weight[i].name;
        }
    }
    return worst;
}
typedef struct {
    double logits, gradient, parameter, loss, aux, z, norm;
    const char *gradient_name, *parameter_name;
} Difference;
static Difference difference_of(const Outcome *a, const Outcome *b) {
    Difference d;
    memset(&d, 0, sizeof d);
    d.logits = a->n_logits == b->n_logits ? distance(a->logits, b->logits, b->n_logits) : INFINITY;
    d.gradient = worst_of(&a->all, &b->all, 1, &d.gradient_name);
    d.parameter = worst_of(&a->all, &b->all, 0, &d.parameter_name);
    for (int i = 0; i < b->steps; i++) {
        d.loss = fmax(d.loss, relative(a->r[i].loss, b->r[i].loss));
        d.aux = fmax(d.aux, relative(a->r[i].aux, b->r[i].aux));
        d.z = fmax(d.z, relative(a->r[i].z, b->r[i].z));
        d.norm = fmax(d.norm, relative(a->r[i].grad_norm, b->r[i].grad_norm));
    }
    return d;
}
static double difference_worst(const Difference *d) {
    return fmax(fmax(fmax(d->logits, d->gradient), fmax(d->parameter, d->loss)),
                fmax(fmax(d->aux, d->z), d->norm));
}
static char *difference_text(const Difference *d) { // valid until the next call
    static char text[600];
    snprintf(text, sizeof text,
             "logits %.1e, gradients %.1e (%s), parameters %.1e (%s), loss %.1e, aux %.1e, z %.1e, "
             "norm %.1e",
             d->logits, d->gradient, d->gradient_name, d->parameter, d->parameter_name, d->loss,
             d->aux, d->z, d->norm);
    return text;
}
#endif
