// Comparing a checkpoint with the run that goes on from it, and the values that a run saves for
// that: see report.h. --allow-changed takes names from here.
#define _POSIX_C_SOURCE 200809L
#include "report.h"
#include "checkpoint.h"
#include "../kernels/fail.h"
#include <cjson/cJSON.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

// ---- what may change, and is said -----------------------------------------------------------
static const char SAID[] = "|lr|schedule|warmup|decay|final-lr|momentum|beta1|beta2|eps|grad-clip|"
                           "update|weight-decay|aux-coef|aux-pool|z-coef|balance|balance-rate|"
                           "loss-mask|documents|document-end|ignore-target|rounds|master|"
                           "skip-nonfinite|expert-grad-scale|";

static cJSON *said_json(const Options *o) {
    cJSON *all = options_json(o);
    for (cJSON *v = all->child, *next; v; v = next) {
        char *word = xasprintf("|%s|", v->string);
        next = v->next;
        if (!strstr(SAID, word)) cJSON_Delete(cJSON_DetachItemViaPointer(all, v));
        free(word);
    }
    return all;
}

static void say_changed(const cJSON *trainer, const Options *o, FILE *screen) {
    const cJSON *was = cJSON_GetObjectItemCaseSensitive(trainer, "options");
    const cJSON *v = 0;
    cJSON *now = said_json(o);
    cJSON_ArrayForEach(v, now) {
        const cJSON *old = cJSON_GetObjectItemCaseSensitive(was, v->string);
        if (!old || cJSON_Compare(old, v, 1) || !screen) continue;
        char *a = cJSON_PrintUnformatted(old);
        char *b = cJSON_PrintUnformatted(v);
        char shown[200];
        fprintf(screen, "changed    --%s is %s, ", v->string, b);
        fprintf(screen, "the checkpoint was trained with %s\n", printable(shown, sizeof shown, a));
        cJSON_free(a);
        cJSON_free(b);
    }
    cJSON_Delete(now);
}

// ---- data -----------------------------------------------------------------------------------
static void add_text(cJSON *list, char *text) {
    cJSON_AddItemToArray(list, cJSON_CreateString(text));
    free(text);
}

// Of an epoch of every source, those that count.
static int64_t epoch_targets(const Loader *data) {
    int64_t n = 0;
    for (int i = 0; i < loader_sources(data); i++) n += loader_source(data, i)->targets;
    return n;
}

// Files by their own names (a data set may lie elsewhere now) and sizes, the tokens of all, and the
// sources of a mixture: with other weights another source would give each window.
static cJSON *data_json(const Loader *data) {
    cJSON *json = cJSON_CreateObject();
    cJSON *files = cJSON_AddArrayToObject(json, "files");
    cJSON *sources = cJSON_AddArrayToObject(json, "sources");
    cJSON_AddNumberToObject(json, "tokens", (double)loader_tokens(data));
    cJSON_AddNumberToObject(json, "targets", (double)epoch_targets(data));
    for (int i = 0; i < loader_files(data); i++) {
        const char *path = loader_file(data, i);
        const char *slash = strrchr(path, '/');
        add_text(files, xasprintf("%s, %lld bytes", slash ? slash + 1 : path,
                                  (long long)loader_file_bytes(data, i)));
    }
    for (int i = 0; i < loader_sources(data); i++) {
        const LoaderSource *s = loader_source(data, i);
        add_text(sources,
                 xasprintf("%.13g of the windows from %d of the files", s->share, s->files));
    }
    return json;
}

static int allowed(const Options *o, const char *name) {
    for (int i = 0; i < o->allow_changed.n; i++)
        if (!strcmp(o->allow_changed.name[i], name)) return 1;
    return 0;
}

static const char *text_of(const cJSON *list, int i) {
    const cJSON *v = cJSON_GetArrayItem(list, i);
    return cJSON_IsString(v) ? v->valuestring : "nothing";
}

// Compares one list of data_json. A checkpoint without it is taken as equal.
static void check_list(const cJSON *was, const cJSON *now, const char *list, const char *what,
                       const char *dir) {
    const cJSON *old = cJSON_GetObjectItemCaseSensitive(was, list);
    const cJSON *new_list = cJSON_GetObjectItemCaseSensitive(now, list);
    int n = cJSON_GetArraySize(new_list);
    int m = cJSON_GetArraySize(old);
    for (int i = 0; old && (i < n || i < m); i++)
        if (strcmp(text_of(new_list, i), text_of(old, i)))
            die("%s was trained on other data: %s %d of --train is %s, it was %s|"
                "give the same --train, or accept another with --allow-changed data",
                dir, what, i + 1, text_of(new_list, i), text_of(old, i));
}

static void check_data(const cJSON *trainer, const Options *o, const Loader *data,
                       const char *dir) {
    const cJSON *was = cJSON_GetObjectItemCaseSensitive(trainer, "data");
    if (!was || !data || allowed(o, "data")) return;
    cJSON *now = data_json(data);
    check_list(was, now, "files", "file", dir);
    check_list(was, now, "sources", "source", dir);
    if (trainer_number(was, "tokens") != trainer_number(now, "tokens"))
        die("%s was trained on other data: --train has %.0f tokens, it had %.0f|"
            "give the same files, or accept others with --allow-changed data",
            dir, trainer_number(now, "tokens"), trainer_number(was, "tokens"));
    cJSON_Delete(now);
}

// Loss masks are no other data, for --loss-mask may change, but a run should not lose them
// unnoticed.
static void say_masks(const cJSON *trainer, const Loader *data, FILE *screen) {
    const cJSON *was = cJSON_GetObjectItemCaseSensitive(
        cJSON_GetObjectItemCaseSensitive(trainer, "data"), "targets");
    if (!screen || !data || !cJSON_IsNumber(was) || was->valuedouble == (double)epoch_targets(data))
        return;
    fprintf(screen,
            "changed    %lld targets of an epoch count, "
            "the checkpoint was trained with %.0f\n",
            (long long)epoch_targets(data), was->valuedouble);
}

// ---- config.json ----------------------------------------------------------------------------
typedef struct {
    const char *name;
    double was, now;
} Field;

// The fields that define the mathematics. Returns how many.
enum { MOST_FIELDS = 24 };
static int list_fields(const Config *a, const Config *b, Field *f) {
    const Field all[] = { { "hidden_size", a->C, b->C },
                          { "num_hidden_layers", a->L, b->L },
                          { "num_attention_heads", a->H, b->H },
                          { "num_key_value_heads", a->KV, b->KV },
                          { "head_dim", a->D, b->D },
                          { "vocab_size", a->V, b->V },
                          { "num_experts", a->E, b->E },
                          { "num_experts_per_tok", a->K, b->K },
                          { "moe_intermediate_size", a->F, b->F },
                          { "intermediate_size", a->I, b->I },
                          { "norm_topk_prob", a->norm_topk, b->norm_topk },
                          { "tie_word_embeddings", a->tied, b->tied },
                          { "pad_token_id", a->pad, b->pad },
                          { "rope_theta", a->rope_theta, b->rope_theta },
                          { "rms_norm_eps", a->rms_eps, b->rms_eps },
                          { "router_aux_loss_coef", a->aux_coef, b->aux_coef } };
    int n = (int)(sizeof all / sizeof *all);
    memcpy(f, all, sizeof all);
    return n;
}

static void die_field(const char *dir, const char *name) MOE_NORETURN;
static void die_field(const char *dir, const char *name) {
    die("%s was trained with another %s in its config.json|"
        "resume with the same config, or accept the difference with --allow-changed %s",
        dir, name, name);
}

static void check_config(const Options *o, const Config *c, const char *dir) {
    char *path = xasprintf("%s/config.json", dir);
    Config was = config_read(path);
    Field field[MOST_FIELDS];
    int n = list_fields(&was, c, field);
    for (int i = 0; i < n; i++)
        if (field[i].was != field[i].now && !allowed(o, field[i].name))
            die("%s was trained with %s = %g in its config.json, now it is %g|"
                "resume with the same config, or accept the difference with --allow-changed %s",
                dir, field[i].name, field[i].was, field[i].now, field[i].name);
    int kinds = was.L == c->L && !memcmp(was.is_moe, c->is_moe, c->L);
    if (!kinds && !allowed(o, "mlp_only_layers")) die_field(dir, "mlp_only_layers");
    config_free(&was);
    free(path);
}

// A name that nothing is called would be a permission that does nothing.
static void check_allowed(const Options *o, const Config *c) {
    Field field[MOST_FIELDS];
    int n = list_fields(c, c, field);
    for (int i = 0; i < o->allow_changed.n; i++) {
        const char *name = o->allow_changed.name[i];
        int known =
            !strcmp(name, "data") || !strcmp(name, "precision") || !strcmp(name, "mlp_only_layers");
        for (int k = 0; k < n; k++) known |= !strcmp(name, field[k].name);
        if (!known)
            die("--allow-changed %s is not a name of this kind|"
                "it takes data, precision, or a field of config.json such as rope_theta",
                name);
    }
}

// ---- all of it ------------------------------------------------------------------------------
struct cJSON *resume_json(const Trainer *t, const Options *o, const Loader *data) {
    char word[OPTION_WORD];
    cJSON *trainer = cJSON_CreateObject();
    cJSON_AddNumberToObject(trainer, "seed", (double)o->seed);
    cJSON_AddNumberToObject(trainer, "batch", (double)o->batch);
    cJSON_AddNumberToObject(trainer, "seq_len", (double)o->seq_len);
    cJSON_AddNumberToObject(trainer, "shuffle", o->shuffle);
    cJSON_AddStringToObject(trainer, "optimizer", options_choice(o, "optimizer", word));
    cJSON_AddItemToObject(trainer, "options", said_json(o));
    if (data) cJSON_AddItemToObject(trainer, "data", data_json(data));
    cJSON_AddNumberToObject(trainer, "updates", (double)t->updates);
    cJSON_AddNumberToObject(trainer, "previous_norm", t->norms.previous);
    if (!t->router.bias) return trainer;
    cJSON *bias = cJSON_AddArrayToObject(trainer, "router_bias");
    for (int i = 0; i < t->m->c.n_moe * t->m->c.E; i++)
        cJSON_AddItemToArray(bias, cJSON_CreateNumber((double)t->router.host_bias[i]));
    return trainer;
}

void resume_check(const struct cJSON *trainer, const Options *o, const Config *c,
                  const Loader *data, const char *dir, int64_t step, FILE *screen) {
    const struct {
        const char *key, *option;
        int64_t now;
    } same[] = { { "seed", "seed", o->seed },
                 { "batch", "batch", o->batch },
                 { "seq_len", "seq-len", o->seq_len } };
    const char *advice = "resume with the same value, or start a new --out";
    int looks = !o->steps;
    check_allowed(o, c);
    check_config(o, c, dir);
    for (int i = 0; i < (step ? 3 : 1) && !looks; i++) {
        double was = trainer_number(trainer, same[i].key);
        if (was != (double)same[i].now)
            die("%s was trained with --%s %.15g, now it is %lld|%s", dir, same[i].option, was,
                (long long)same[i].now, advice);
    }
    if (!step || looks) return;
    int shuffled = trainer_number(trainer, "shuffle") != 0;
    if (shuffled != o->shuffle)
        die("%s was trained with --shuffle %s|%s", dir, shuffled ? "on" : "off", advice);
    char word[OPTION_WORD];
    const char *was = trainer_text(trainer, "optimizer");
    const char *now = options_choice(o, "optimizer", word);
    if (strcmp(was, now))
        die("%s was trained with --optimizer %s, now it is %s|%s", dir, was, now, advice);
    const char *precision = trainer_text(trainer, "precision");
    if (strcmp(precision, PRECISION_NAME) && !allowed(o, "precision"))
        die("%s was trained in %s, this program computes in %s|"
            "build with PRECISION=%s, or accept the difference with --allow-changed precision",
            dir, precision, PRECISION_NAME, precision);
    check_data(trainer, o, data, dir);
    say_changed(trainer, o, screen);
    say_masks(trainer, data, screen);
}

void resume_restore(Trainer *t, const struct cJSON *trainer, int64_t step) {
    double updates = trainer_number(trainer, "updates");
    t->norms.previous = trainer_number(trainer, "previous_norm");
    if (!(updates >= 0 && updates <= (double)step) || !(t->norms.previous >= -1))
        die("trainer.json: updates %g or previous_norm %g is out of range|"
            "the checkpoint is damaged: resume from the one before it",
            updates, t->norms.previous);
    t->updates = (int64_t)updates;
    const cJSON *bias = cJSON_GetObjectItemCaseSensitive(trainer, "router_bias");
    const cJSON *b = 0;
    size_t n = t->m->c.n_moe * (size_t)t->m->c.E;
    size_t i = 0;
    if (!t->router.bias || !bias) return;
    if ((size_t)cJSON_GetArraySize(bias) != n)
        die("trainer.json has %d router biases, the model needs %zu|"
            "the checkpoint is of another model",
            cJSON_GetArraySize(bias), n);
    float *value = (float *)xmalloc(n * sizeof(float), "router bias");
    cJSON_ArrayForEach(b, bias) {
        value[i] = (float)b->valuedouble;
        if (!cJSON_IsNumber(b) || !isfinite(value[i++]))
            die("trainer.json: a router bias is not a number|"
                "the checkpoint is damaged: resume from the one before it");
    }
    trainer_set_bias(t, value, n);
    free(value);
}
