// Layouts at their edges, each against one process: routings that leave ranks or experts with
// nothing, counts that change every update, rounds, utilisation scaling and a moving bias, a head
// in several chunks; and the bytes that travel.
//
//   make build/.../tests/edge;  mpirun -np 4 edge [--fixtures DIR] [--quick]            DEBUG=1: on
//   NaN-filled memory
//
// The reference is made inside the same processes, as in layouts.h, with its bounds.
#define _GNU_SOURCE
#pragma GCC diagnostic ignored \
    "-Wunused-function" // the headers of test_moe.c: a part of them is needed here
#include "traffic.h"
#include <sys/stat.h>

static Shape shapes[MAX_VALUES];
static int n_shapes;

// The layouts of this world with every dispatcher that does something, one after another; heads
// where they divide and `turn` is odd.
static int next_layout(Layout *l, const Config *c, int *turn) {
    for (; *turn < DISPATCHERS * n_shapes; (*turn)++) {
        const Shape *s = &shapes[*turn / DISPATCHERS];
        if (s->ep == 1 && *turn % DISPATCHERS) continue;
        l->dp = s->dp;
        l->fsdp = s->fsdp;
        l->ep = s->ep;
        l->dispatch = (Dispatch)(*turn % DISPATCHERS);
        l->heads = s->ep > 1 && *turn % 2 && c->KV % s->ep == 0;
        (*turn)++;
        return 1;
    }
    return 0;
}

// A selection bias (n_moe, E): experts [first, first + n) may be chosen, no other.
static float *only_experts(const Config *c, int first, int n) {
    float *bias = floats((int64_t)c->n_moe * c->E + 1);
    for (int i = 0; i < c->n_moe * c->E; i++)
        bias[i] = i % c->E >= first && i % c->E < first + n ? 0.0f : -1000.0f;
    return bias;
}

static int same_finite(const Outcome *o) {
    int ok = o->equal;
    for (int i = 0; i < o->steps; i++)
        ok = ok && isfinite(o->r[i].loss) && isfinite(o->r[i].grad_norm) && o->r[i].grad_norm > 0;
    return ok;
}

// Every layout makes the updates that one process makes with the same options. aux: whether the
// auxiliary values are comparable (not with rounds, whose windows depend on the layout).
static void compare_layouts(const Fixture *f, const Config *c, Setup s, int steps, int dead,
                            int aux, const char *what) {
    Setup one = s;
    one.step.rounds = 1;
    Outcome solo = outcome_of(f, 0, &one, steps);
    Layout l;
    double worst = 0;
    int cases = 0;
    int wrong = 0;
    char text[700] = "";
    for (int turn = 0; next_layout(&l, c, &turn);) {
        int ranks = l.dp * l.fsdp * l.ep / (l.dispatch == DISPATCH_ALLREDUCE ? l.ep : 1);
        if (s.step.batch % (ranks * s.step.rounds)) continue;
        s.step.micro_batch = (int)(s.step.batch / ranks / s.step.rounds) > 1 && turn % 2 ? 1 : 0;
        s.step.recompute = (Recompute)(turn % 4);
        Outcome o = outcome_of(f, &l, &s, steps);
        Difference d = difference_of(&o, &solo);
        if (!aux) d.aux = 0;
        int ok = difference_worst(&d) <= layout_bound() && same_finite(&o) &&
                 (dead < 0 || o.r[steps - 1].expert_dead == dead);
        worst = fmax(worst, difference_worst(&d));
        if (!ok && !wrong)
            snprintf(text, sizeof text, "; dp %d fsdp %d ep %d, %s, heads %d: %s", l.dp, l.fsdp,
                     l.ep, dispatch_names[l.dispatch], l.heads, difference_text(&d));
        wrong += !ok;
        cases++;
        outcome_free(&o);
    }
    if (cases)
        check(!wrong, "%s: %d updates in %d layouts, worst %.1e (%d wrong%s)", what, steps, cases,
              worst, wrong, text);
    outcome_free(&solo);
}

// ---- loads ----------------------------------------------------------------------------------
// The fixture with one expert a token: a folder with another config and the same tensors.
static Fixture one_expert_fixture(const Fixture *f) {
    Fixture g = *f;
    g.dir = xasprintf("%s/single%d", temporary, comm_world_rank());
    if (mkdir(g.dir, 0700)) die("%s: cannot make it|free space", g.dir);
    static const char *const names[] = { "config.json", "model.safetensors.index.json",
                                         "model.safetensors", 0 };
    char from[600], to[600];
    char *full = realpath(f->dir, 0);
    for (int i = 1; names[i]; i++) {
        snprintf(from, sizeof from, "%s/%s", full, names[i]);
        snprintf(to, sizeof to, "%s/%s", g.dir, names[i]);
        if (!access(from, R_OK) && symlink(from, to)) die("%s: cannot link|free space", to);
    }
    for (int i = 1; i <= 99; i++)
        for (int n = i; n <= 99; n++) {
            snprintf(from, sizeof from, "%s/model-%05d-of-%05d.safetensors", full, i, n);
            snprintf(to, sizeof to, "%s/model-%05d-of-%05d.safetensors", g.dir, i, n);
            if (!access(from, R_OK) && symlink(from, to)) die("%s: cannot link|free space", to);
        }
    snprintf(from, sizeof from, "%s/config.json", full);
    snprintf(to, sizeof to, "%s/config.json", g.dir);
    char *text = read_text(from);
    cJSON *config = cJSON_Parse(text);
    cJSON_ReplaceItemInObject(config, "num_experts_per_tok", cJSON_CreateNumber(1));
    cJSON_ReplaceItemInObject(config, "norm_topk_prob", cJSON_CreateFalse());
    free(text);
    text = cJSON_Print(config);
    FILE *out = fopen(to, "wb");
    if (!out || fputs(text, out) < 0 || fclose(out)) die("%s: cannot write|free space", to);
    cJSON_Delete(config);
    free(text);
    free(full);
    return g;
}
static void remove_folder(const Fixture *f) {
    char *command = xasprintf("rm -rf '%s'", f->dir);
    if (system(command)) fprintf(stderr, "%s stays\n", f->dir);
    free(command);
    free(f->dir);
}

static void test_loads(const Fixture *f, const Config *c, int batch) {
    Setup s = fixture_setup(f, OPT_SGD);
    s.step.batch = batch;
    s.step.balance_rate = 1e-30; // switches the bias on without moving it
    float *half = only_experts(c, 0, c->E / 2);
    float *last;
    s.bias = half;
    compare_layouts(f, c, s, 20, -1, 1,
                    "experts 0 .. E/2-1 only: ranks of the upper half get no token");
    Fixture g = one_expert_fixture(f);
    char *path = xasprintf("%s/config.json", g.dir);
    Config single = config_read(path);
    free(path);
    s.bias = last = only_experts(&single, single.E - 1, 1);
    compare_layouts(&g, &single, s, 20, single.n_moe * (single.E - 1), 1,
                    "all tokens to one expert");
    config_free(&single);
    remove_folder(&g);
    free(half);
    free(last);
}

// AdamW with decay, 20 updates, one expert never chosen: its moments are zero bits and its weights
// are p (1 - lr wd) twenty times, to the last bit. In bf16 the first and the last weight are those
// of an fp32 master, rounded: they agree to 2^-7, where 20 decays without effect are 2 % apart.
static void test_unused(const Fixture *f, const Config *c, int batch) {
    Setup s = fixture_setup(f, OPT_ADAMW);
    s.opt.weight_decay = 0.1;
    s.opt.lr = 1e-2;
    s.step.batch = batch;
    s.step.balance_rate = 1e-30;
    float *bias = only_experts(c, 0, c->E - 1);
    s.bias = bias;
    Layout l;
    int wrong = 0;
    int cases = 0;
    int tensors = 0;
    for (int turn = 0; next_layout(&l, c, &turn);) {
        int ranks = l.dp * l.fsdp * l.ep / (l.dispatch == DISPATCH_ALLREDUCE ? l.ep : 1);
        if (batch % ranks) continue;
        Run *r = run_open(f, &l, &s);
        Weights first = weights_new(c);
        Weights last = weights_new(c);
        int equal, copies;
        read_all(r, &first, 0, 0, &equal);
        for (int i = 1; i <= 20; i++) run_step(r, i, r->lr, 0);
        read_all(r, &last, 0, 0, &equal);
        read_all(r, &last, 1, 1, &copies);
        real keep = (real)(1 - s.opt.lr * s.opt.weight_decay);
        for (int i = 0; i < first.n; i++) {
            int layer, expert;
            if (sscanf(first.weight[i].name, "model.layers.%d.mlp.experts.%d.", &layer, &expert) !=
                    2 ||
                expert != c->E - 1)
                continue;
            for (int64_t k = 0; k < first.weight[i].n; k++) {
                real p = (real)first.weight[i].w[k];
                for (int n = 0; n < 20; n++) p *= keep;
                double expected = x_double(double_x((double)p));
                double rounding = BF16 ? fabs(expected) / 128 : 0;
                wrong +=
                    fabs(last.weight[i].w[k] - expected) > rounding || last.weight[i].g[k] != 0;
            }
            tensors++;
        }
        wrong += !equal || !copies;
        cases++;
        weights_free(&first);
        weights_free(&last);
        run_close(r);
    }
    check(!wrong && tensors == 3 * c->n_moe * cases,
          "an expert without tokens for 20 updates of AdamW in %d layouts: moments 0, weights (1 - "
          "lr wd)^20 to the last bit (%d numbers differ)",
          cases, wrong);
    free(bias);
}

// ---- changing counts ------------------------------------------------------------------------
static long resident_pages(void) {
    long size = 0;
    long resident = 0;
    FILE *f = fopen("/proc/self/statm", "r");
    if (f) {
        if (fscanf(f, "%ld %ld", &size, &resident) != 2) resident = 0;
        fclose(f);
    }
    return resident;
}

// Debug builds run under AddressSanitizer, which keeps freed blocks in quarantine: their resident
// set says nothing.
#if defined(MOE_DEBUG)
enum { QUARANTINE = 1 };
#else
enum { QUARANTINE = 0 };
#endif
// A new random bias before every update moves most tokens: every message has another size. lr 0, so
// that one process and the layout see the same weights for ever. Memory may not grow after the
// first updates: arena fixed, resident set constant up to what the message library still sets up (1
// MiB).
static void test_changing(const Fixture *f, const Config *c, int batch, int updates) {
    Setup s = fixture_setup(f, OPT_SGD);
    s.opt.lr = 0;
    s.opt.momentum = 0;
    s.opt.weight_decay = 0;
    s.step.batch = batch;
    s.step.balance_rate = 1e-30;
    s.step.micro_batch = 1;
    size_t n = c->n_moe * (size_t)c->E;
    float *bias = floats(n);
    Layout l;
    for (int turn = 0; next_layout(&l, c, &turn);) {
        int ranks = l.dp * l.fsdp * l.ep / (l.dispatch == DISPATCH_ALLREDUCE ? l.ep : 1);
        if (l.ep == 1 || batch % ranks ||
            (l.dispatch != DISPATCH_ALLTOALL && l.ep != comm_world_size()))
            continue;
        Run *one = run_open(f, 0, &s);
        Run *r = run_open(f, &l, &s);
        uint64_t bits = 0x9e3779b97f4a7c15u;
        int64_t *before = (int64_t *)xcalloc(n, sizeof(int64_t), "counts");
        int unchanged = 0;
        long early = 0;
        long late = 0;
        size_t arena = r->t->arena.used;
        double worst = 0;
        for (int i = 1; i <= updates; i++) {
            for (size_t k = 0; k < n; k++) {
                bits ^= bits << 13;
                bits ^= bits >> 7;
                bits ^= bits << 17;
                bias[k] = (float)(bits >> 40) / (float)(1 << 24) - 0.5f;
            }
            trainer_set_bias(one->t, bias, n);
            trainer_set_bias(r->t, bias, n);
            StepResult a = run_step(one, i, 0, 0);
            StepResult b = run_step(r, i, 0, 0);
            worst = fmax(worst, fmax(relative(b.loss, a.loss), relative(b.grad_norm, a.grad_norm)));
            unchanged += !memcmp(before, r->t->router.host_count, n * sizeof(int64_t));
            memcpy(before, r->t->router.host_count, n * sizeof(int64_t));
            if (i == 5) early = resident_pages();
        }
        late = resident_pages();
        int64_t grown = comm_max(r->g.all, (int64_t)(late - early) * 4);
        check(!unchanged && worst <= layout_bound() && (QUARANTINE || grown <= 1024) &&
                  r->t->arena.used == arena,
              "dp %d fsdp %d ep %d, %s: other counts in each of %d updates: loss and norm %.1e, "
              "resident memory "
              "%+lld KiB after the fifth",
              l.dp, l.fsdp, l.ep, dispatch_names[l.dispatch], updates, worst, (long long)grown);
        free(before);
        run_close(r);
        run_close(one);
    }
    free(bias);
}

// ---- options that layouts.h leaves alone ----------------------------------------------------
static void test_options(const Fixture *f, const Config *c, int batch) {
    Setup s = fixture_setup(f, OPT_SGD);
    s.step.batch = batch;
    Setup v = s;
    v.step.expert_grad_scale = 1;
    compare_layouts(f, c, v, 5, -1, 1, "--expert-grad-scale");
    v = s;
    v.step.balance_rate = 0.02;
    compare_layouts(f, c, v, 10, -1, 1, "--balance bias, moving");
    v = s;
    v.step.rounds = 2;
    v.step.aux_coef = 0;
    compare_layouts(f, c, v, 5, -1, 0, "--rounds 2 without aux");
}

// --attention heads: what a rank gathers of q, k, v and o to compute a layer is 1/ep of what it
// gathers without.
static void test_head_weights(const Fixture *f, const Config *c) {
    Setup s = fixture_setup(f, OPT_SGD);
    for (int i = 0; i < n_shapes; i++) {
        if (shapes[i].ep == 1 || c->KV % shapes[i].ep) continue;
        int64_t gathered[2] = { 0, 0 };
        for (int heads = 0; heads < 2; heads++) {
            Layout l = { shapes[i].dp, shapes[i].fsdp, shapes[i].ep, DISPATCH_ALLTOALL, heads };
            Run *r = run_open(f, &l, &s);
            for (int k = 0; k < r->m.n_params; k++)
                if (r->m.param[k].id == P_Q || r->m.param[k].id == P_KEY ||
                    r->m.param[k].id == P_VALUE || r->m.param[k].id == P_O)
                    gathered[heads] += r->m.param[k].size;
            run_close(r);
        }
        check(gathered[0] == gathered[1] * shapes[i].ep,
              "dp %d fsdp %d ep %d: q, k, v, o gathered by a rank: %lld numbers, with --attention "
              "heads %lld",
              shapes[i].dp, shapes[i].fsdp, shapes[i].ep, (long long)gathered[0],
              (long long)gathered[1]);
    }
}

// The head sees 24 tokens at a time instead of all: logits, loss and every gradient as before, up
// to the order of sums over tokens.
static void test_head_chunks(const Fixture *f) {
    Setup s = fixture_setup(f, OPT_SGD);
    Outcome whole, chunked;
    Outcome *o[] = { &whole, &chunked };
    for (int k = 0; k < 2; k++) {
        memset(o[k], 0, sizeof whole);
        Run *r = run_open(f, 0, &s);
        char *path = xasprintf("%s/head%d.safetensors", temporary, comm_world_rank());
        o[k]->all = weights_new(&r->m.c);
        o[k]->steps = 1;
        if (k) r->t->head.chunk = 24;
        o[k]->r[0] = run_step(r, 1, r->lr, path);
        read_dump(path, o[k]);
        read_all(r, &o[k]->all, 0, 0, &o[k]->equal);
        unlink(path);
        free(path);
        run_close(r);
    }
    Difference d = difference_of(&chunked, &whole);
    check(difference_worst(&d) <= layout_bound() / 2,
          "%s: the head in chunks of 24 of %d tokens: %s", f->name, f->B * f->T,
          difference_text(&d));
    outcome_free(&whole);
    outcome_free(&chunked);
}

int main(int argc, char **argv) {
    const char *root = "dev/fixtures";
    const char *base = getenv("TMPDIR");
    int quick = 0;
    CommOptions comm = { 120, 0, 1 };
    comm_init(&argc, &argv);
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--fixtures") && i + 1 < argc)
            root = argv[++i];
        else if (!strcmp(argv[i], "--quick"))
            quick = 1;
        else
            die("edge does not know %s|edge [--fixtures DIR] [--quick]", argv[i]);
    }
    comm_start(comm);
    device_init(comm_local_rank(), 1);
    int world = comm_world_size();
    int *ranks = ints(world);
    for (int i = 0; i < world; i++) ranks[i] = i;
    Comm *all = comm_group("test", ranks, world);
    free(ranks);
    snprintf(temporary, sizeof temporary, "%.200s/edge.XXXXXX", base && *base ? base : "/tmp");
    if (comm_world_rank() == 0 && !mkdtemp(temporary))
        die("cannot make a folder like %s|set TMPDIR", temporary);
    comm_broadcast(all, temporary, sizeof temporary, 0);
    Fixture f = fixture_open(root, "parallel");
    char *path = xasprintf("%s/config.json", f.dir);
    Config c = config_read(path);
    free(path);
    n_shapes = shapes_of(shapes, world, &c);
    int batch = f.B % world ? 2 * world : f.B;
    if (world == 1) {
        static const char *const names[] = { "parallel", "tied" };
        for (int i = 0; i < 2; i++) {
            Fixture g = fixture_open(root, names[i]);
            test_head_chunks(&g);
            fixture_close(&g);
        }
        test_unused(&f, &c, batch);
    } else {
        test_options(&f, &c, batch);
        test_head_weights(&f, &c);
        test_loads(&f, &c, batch);
        test_unused(&f, &c, batch);
        test_changing(&f, &c, batch, quick ? 50 : 500);
        test_traffic(&f, quick);
    }
    config_free(&c);
    fixture_close(&f);
    comm_barrier(all);
    if (comm_world_rank() == 0) {
        rmdir(temporary);
        printf("edge: %s, %s, %d rank%s: %d passed, %d failed\n", PRECISION_NAME, device_backend(),
               world, world > 1 ? "s" : "", passed, failed);
    }
    device_finish();
    comm_finish();
    return failed > 0;
}
