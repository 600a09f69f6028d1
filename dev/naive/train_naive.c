// Trains model/configs/tiny.json on a text, a byte a token, in fp32, with the model of naive.h.
//
//   cc -std=c11 -O3 -march=native -ffast-math dev/naive/train_naive.c -lm -o naive
//   ./naive TEXT [--config FILE] [--steps N] [--batch B] [--seq-len T] [--lr F]
//           [--optimizer adamw|sgd] [--weight-decay F] [--clip F] [--seed N]
//   ./naive --example         one layer of experts with six tokens, every number
//
// Initial weights are those of train_moe (kernels/random.h), windows come in the order of the text:
// `train_moe --init CONFIG --train TEXT --shuffle off` with the same values prints the same losses.
#define NUMBER float
#include "example.h"
#include "../../kernels/random.h"

static _Noreturn void fail(const char *what, const char *where, const char *hint) {
    fprintf(stderr, "error: %s: %s\n  hint: %s\n", what, where, hint);
    exit(1);
}
// The bytes of a file, with a zero after them.
static unsigned char *read_file(const char *path, int64_t *n) {
    FILE *f = fopen(path, "rb");
    if (!f) fail("cannot read", path, "./naive TEXT trains on a text file");
    fseek(f, 0, SEEK_END);
    *n = ftell(f);
    rewind(f);
    unsigned char *text = naive_allocate(*n + 1, 1);
    if (fread(text, 1, *n, f) != (size_t)*n) fail("cannot read", path, "is it a file?");
    fclose(f);
    return text;
}

// ---- the config: a scanner that finds a key and reads the number, list or word after it ---------
static const char *config_value(const char *json, const char *key) {
    char quoted[80];
    snprintf(quoted, sizeof quoted, "\"%s\":", key);
    const char *at = strstr(json, quoted);
    if (!at) fail("no such key in the config", key, "see model/configs/tiny.json");
    return at + strlen(quoted) + strspn(at + strlen(quoted), " \n\t");
}
static double config_number(const char *json, const char *key) {
    return strtod(config_value(json, key), 0);
}
static NaiveConfig config_load(const char *path, double *init, double *aux) {
    int64_t n;
    const char *json = (const char *)read_file(path, &n);
    NaiveConfig c = { 0 };
    c.V = (int64_t)config_number(json, "vocab_size");
    c.C = (int64_t)config_number(json, "hidden_size");
    c.L = (int64_t)config_number(json, "num_hidden_layers");
    c.H = (int64_t)config_number(json, "num_attention_heads");
    c.KV = (int64_t)config_number(json, "num_key_value_heads");
    c.D = (int64_t)config_number(json, "head_dim");
    c.E = (int64_t)config_number(json, "num_experts");
    c.K = (int64_t)config_number(json, "num_experts_per_tok");
    c.F = (int64_t)config_number(json, "moe_intermediate_size");
    c.I = (int64_t)config_number(json, "intermediate_size");
    c.norm_topk = *config_value(json, "norm_topk_prob") == 't';
    c.tied = *config_value(json, "tie_word_embeddings") == 't';
    c.pad = -1;
    c.eps = config_number(json, "rms_norm_eps");
    c.theta = config_number(json, "rope_theta");
    *init = config_number(json, "initializer_range");
    *aux = config_number(json, "router_aux_loss_coef");
    unsigned char *is_moe = naive_allocate(c.L, 1);
    memset(is_moe, 1, c.L);
    const char *at = config_value(json, "mlp_only_layers") + 1; // after the bracket
    for (char *end; strcspn(at, "0123456789") < strcspn(at, "]"); at = end)
        is_moe[strtol(at + strcspn(at, "0123456789"), &end, 10)] = 0;
    c.is_moe = is_moe;
    return c;
}

// ---- the update -------------------------------------------------------------------------------
typedef struct {
    int adamw;
    double lr, decay, clip, beta1, beta2, eps;
} Optimizer;

static int is_norm(const Weight *w) { return strstr(w->name, "norm.weight") != 0; }

// torch's AdamW, or SGD with coupled decay. m, v: moments, one array a tensor. Returns the norm of
// all gradients before clipping, and clears them.
static double update(const Weights *all, number **m, number **v, const Optimizer *o, int step) {
    double squares = 0;
    double scale = 1;
    for (int i = 0; i < all->n; i++)
        for (int64_t j = 0; j < all->weight[i].n; j++)
            squares += (double)all->weight[i].g[j] * all->weight[i].g[j];
    if (o->clip > 0) scale = fmin(1, o->clip / (sqrt(squares) + 1e-6));
    for (int i = 0; i < all->n; i++) {
        Weight *w = &all->weight[i];
        double decay = is_norm(w) ? 0 : o->decay;
        for (int64_t j = 0; j < w->n; j++) {
            number g = w->g[j] * scale;
            w->g[j] = 0;
            if (!o->adamw) {
                w->w[j] -= o->lr * (g + decay * w->w[j]);
                continue;
            }
            m[i][j] = o->beta1 * m[i][j] + (1 - o->beta1) * g;
            v[i][j] = o->beta2 * v[i][j] + (1 - o->beta2) * g * g;
            double mean = m[i][j] / (1 - pow(o->beta1, step));
            double square = v[i][j] / (1 - pow(o->beta2, step));
            w->w[j] -= o->lr * (decay * w->w[j] + mean / (sqrt(square) + o->eps));
        }
    }
    return sqrt(squares);
}

int main(int argc, char **argv) {
    const char *text_path = 0;
    const char *config_path = "model/configs/tiny.json";
    Optimizer o = { 1, 1e-3, 0, 1, 0.9, 0.999, 1e-8 };
    int steps = 20;
    int B = 4, T = 64;
    uint64_t seed = 1337;
    for (int i = 1; i < argc; i++) {
        const char *name = argv[i];
        const char *value = i + 1 < argc ? argv[i + 1] : "";
        if (!strcmp(name, "--example")) {
            naive_example();
            return 0;
        }
        if (strncmp(name, "--", 2)) {
            text_path = name;
            continue;
        }
        if (!strcmp(name, "--config"))
            config_path = value;
        else if (!strcmp(name, "--steps"))
            steps = atoi(value);
        else if (!strcmp(name, "--batch"))
            B = atoi(value);
        else if (!strcmp(name, "--seq-len"))
            T = atoi(value);
        else if (!strcmp(name, "--lr"))
            o.lr = atof(value);
        else if (!strcmp(name, "--optimizer"))
            o.adamw = !strcmp(value, "adamw");
        else if (!strcmp(name, "--weight-decay"))
            o.decay = atof(value);
        else if (!strcmp(name, "--clip"))
            o.clip = atof(value);
        else if (!strcmp(name, "--seed"))
            seed = strtoull(value, 0, 10);
        else
            fail("unknown option", name, "the first lines of dev/naive/train_naive.c list them");
        i++;
    }
    if (!text_path) fail("no text given", "./naive TEXT", "any file will do: README.md");
    double init, aux_coef;
    NaiveConfig c = config_load(config_path, &init, &aux_coef);
    Weights all = naive_weights(&c);
    number **m = naive_allocate(all.n, sizeof *m);
    number **v = naive_allocate(all.n, sizeof *v);
    for (int i = 0; i < all.n; i++) {
        Weight *w = &all.weight[i];
        m[i] = naive_allocate(w->n, sizeof(number));
        v[i] = naive_allocate(w->n, sizeof(number));
        for (int64_t j = 0; j < w->n; j++)
            w->w[j] = is_norm(w) ? 1 : init * random_normal(seed, tensor_id(w->name), (uint64_t)j);
    }
    int64_t n;
    int64_t R = (int64_t)B * T;
    int64_t window = 0;
    unsigned char *text = read_file(text_path, &n);
    if ((n - 1) / T < 1) fail("too short for one window", text_path, "a smaller --seq-len");
    int *ids = naive_allocate(R, sizeof(int));
    int *targets = naive_allocate(R, sizeof(int));
    for (int step = 1; step <= steps; step++) {
        for (int64_t r = 0; r < R; r++) { // windows of T inputs; targets are the next bytes
            int64_t at = (window + r / T) % ((n - 1) / T) * T + r % T;
            ids[r] = text[at];
            targets[r] = text[at + 1];
        }
        window += B;
        NaiveBatch batch = { B, T, ids, targets, 0, aux_coef, 0, 0, 0, 0, 0, 0 };
        naive_model(&batch, &c, &all);
        naive_release();
        double norm = update(&all, m, v, &o, step);
        printf("step %d  loss %.7f  aux %.6f  grad_norm %.6f\n", step, batch.loss, batch.aux, norm);
        fflush(stdout);
    }
    return 0;
}
