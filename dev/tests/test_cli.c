// The promises of the command line, checked through it alone: messages and exit status of bad
// inputs, the log, resuming, conversion, signals, schedules, samples.
//
//   build/.../tests/test_cli ./train_moe [--fixtures DIR] [--mpirun "mpirun --oversubscribe"]
//   [--only PART]
//
// Every run is a shell command in which $B is the program, $T a fresh folder (removed at the end)
// and $F the fixtures. Bit-equality is compared on files.
#define _GNU_SOURCE
#include "../../kernels/fail.h"
#include "../../model/safetensors.h"
#include <cjson/cJSON.h>
#include <dirent.h>
#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

// ---- checks and commands --------------------------------------------------------------------
static int passed, failed;
// How far the losses of two layouts may lie apart: in bf16 their sums are rounded at other places.
#if defined(MOE_BF16)
static const double same_losses = 1e-3;
#else
static const double same_losses = 1e-5;
#endif
MOE_PRINTF(2, 3) static int check(int ok, const char *format, ...) {
    char text[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    printf("%4d %s  %s\n", passed + failed + 1, ok ? "ok  " : "FAIL", text);
    fflush(stdout);
    if (ok)
        passed++;
    else
        failed++;
    return ok;
}

static char folder[256];
// Where a name under $T lies; valid for the next fifteen calls.
static const char *at(const char *name) {
    static char path[16][512];
    static int next;
    char *p = path[next++ & 15];
    snprintf(p, sizeof path[0], "%s/%s", folder, name);
    return p;
}
static char *slurp(const char *path, size_t *bytes) {
    FILE *f = fopen(path, "rb");
    size_t n = 0;
    size_t room = 1 << 16;
    char *text = (char *)xcalloc(room + 1, 1, "a file");
    if (bytes) *bytes = 0;
    if (!f) return text;
    for (size_t k; (k = fread(text + n, 1, room - n, f)) > 0;) {
        n += k;
        if (n == room) {
            text = (char *)realloc(text, 2 * room + 1);
            if (!text) die("out of memory for %s|free memory", path);
            room *= 2;
        }
    }
    text[n] = 0;
    fclose(f);
    if (bytes) *bytes = n;
    return text;
}

// Starts a shell command whose output goes to $T/NAME and $T/NAME.err.
static pid_t start_shell(const char *out, const char *err, const char *command) {
    fflush(stdout);
    pid_t child = fork();
    if (child < 0) die("cannot start a process|raise ulimit -u");
    if (child) return child;
    char *line = xasprintf("exec > \"$T/%s\" 2> \"$T/%s\" < /dev/null; %s", out, err, command);
    execl("/bin/sh", "sh", "-c", line, (char *)0);
    _exit(127);
}
static pid_t begin(const char *command) { return start_shell("stdout", "stderr", command); }
MOE_PRINTF(2, 3) static pid_t begin_as(const char *name, const char *format, ...) {
    char command[4096], err[100];
    va_list args;
    va_start(args, format);
    vsnprintf(command, sizeof command, format, args);
    va_end(args);
    snprintf(err, sizeof err, "%s.err", name);
    return start_shell(name, err, command);
}
// Exit status, 128 + signal.
static int end(pid_t child) {
    int status = 0;
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}
MOE_PRINTF(1, 2) static int run(const char *format, ...) {
    char command[4096];
    va_list args;
    va_start(args, format);
    vsnprintf(command, sizeof command, format, args);
    va_end(args);
    return end(begin(command));
}
// A run that should succeed; says what it said where it does not.
MOE_PRINTF(1, 2) static int good(const char *format, ...) {
    char command[4096];
    va_list args;
    va_start(args, format);
    vsnprintf(command, sizeof command, format, args);
    va_end(args);
    int status = end(begin(command));
    if (!status) return 1;
    char *said = slurp(at("stderr"), 0);
    check(0, "exit status %d of: %.300s: %.300s", status, command, said);
    free(said);
    return 0;
}
static int said(const char *stream, const char *fragment) {
    char *text = slurp(at(stream), 0);
    int found = strstr(text, fragment) != 0;
    free(text);
    return found;
}
static void pause_ms(int ms) {
    struct timespec t = { ms / 1000, ms % 1000 * 1000000L };
    nanosleep(&t, 0);
}

// ---- files ----------------------------------------------------------------------------------
static void write_file(const char *name, const void *data, size_t n) {
    FILE *f = fopen(at(name), "wb");
    if (!f || fwrite(data, 1, n, f) != n || fclose(f)) die("%s: cannot write|free space", at(name));
}
static int same_files(const char *a, const char *b) {
    size_t n, m;
    char *x = slurp(a, &n);
    char *y = slurp(b, &m);
    int same = n == m && n > 0 && !memcmp(x, y, n);
    free(x);
    free(y);
    return same;
}
// Tensors that differ in dtype, shape or bytes, or that only one side has.
static int tensors_differ(const char *a, const char *b) {
    SafeTensors x = safetensors_open_folder(a);
    SafeTensors y = safetensors_open_folder(b);
    int differ = abs(x.n - y.n);
    for (int i = 0; i < x.n; i++) {
        const SafeTensor *t = &x.tensor[i];
        const SafeTensor *u = safetensors_find(&y, t->name);
        if (!u || u->type != t->type || u->bytes != t->bytes || u->n_dims != t->n_dims ||
            memcmp(u->shape, t->shape, t->n_dims * sizeof t->shape[0])) {
            differ++;
            continue;
        }
        char *p = (char *)xmalloc(t->bytes, "a tensor");
        char *q = (char *)xmalloc(t->bytes, "a tensor");
        safetensors_read(&x, t, 0, p, t->bytes);
        safetensors_read(&y, u, 0, q, t->bytes);
        differ += memcmp(p, q, t->bytes) != 0;
        free(p);
        free(q);
    }
    safetensors_close(&x);
    safetensors_close(&y);
    return differ;
}
static int exists(const char *path) {
    struct stat st;
    return !stat(path, &st);
}

// ---- the log --------------------------------------------------------------------------------
enum { LINES = 512 };
typedef struct {
    int n;
    cJSON *line[LINES];
} Log;
static Log log_of(const char *out) {
    Log l;
    l.n = 0;
    char *path = xasprintf("%s/log.jsonl", at(out));
    char *text = slurp(path, 0);
    for (char *line = strtok(text, "\n"); line && l.n < LINES; line = strtok(0, "\n"))
        l.line[l.n++] = cJSON_Parse(line);
    free(text);
    free(path);
    return l;
}
static void log_free(Log *l) {
    while (l->n) cJSON_Delete(l->line[--l->n]);
}
static double number(const cJSON *object, const char *key) {
    const cJSON *v = cJSON_GetObjectItemCaseSensitive(object, key);
    return cJSON_IsNumber(v) ? v->valuedouble : NAN;
}
// A trace of --profile: events of every rank, in order, none inside another; with several ranks
// also calls that send bytes.
static void check_trace(const char *name, int ranks) {
    char *text = slurp(at(name), 0);
    cJSON *trace = text ? cJSON_Parse(text) : 0;
    const cJSON *events = cJSON_GetObjectItemCaseSensitive(trace, "traceEvents");
    const cJSON *e;
    double end[8] = { 0 };
    double bytes = 0;
    double flops = 0;
    int n[8] = { 0 };
    int overlaps = 0;
    int kernels = 0;
    cJSON_ArrayForEach(e, events) {
        const cJSON *args = cJSON_GetObjectItemCaseSensitive(e, "args");
        int rank = (int)number(e, "pid");
        if (strcmp(cJSON_GetObjectItemCaseSensitive(e, "ph")->valuestring, "X")) continue;
        overlaps += number(e, "ts") < end[rank] - 0.01;
        end[rank] = number(e, "ts") + number(e, "dur");
        bytes += number(args, "bytes");
        flops += number(args, "flops");
        kernels += !strcmp(cJSON_GetObjectItemCaseSensitive(e, "name")->valuestring, "experts_up");
        n[rank]++;
    }
    int all = ranks < 8 && n[ranks - 1] > 50 && !n[ranks];
    check(all && !overlaps && kernels > 0 && flops > 0 && (bytes > 0) == (ranks > 1),
          "%s: %d events of the first rank of %d, %d overlap, %g FLOP, %g bytes sent", name, n[0],
          ranks, overlaps, flops, bytes);
    cJSON_Delete(trace);
    free(text);
}

// A number of the line of update `step` (those with a loss).
static double logged(const Log *l, int step, const char *key) {
    for (int i = 0; i < l->n; i++)
        if (number(l->line[i], "step") == step &&
            cJSON_HasObjectItem(l->line[i], strcmp(key, "val_loss") ? "loss" : "val_loss"))
            return number(l->line[i], key);
    return NAN;
}
// Two logs are the same but for the times.
static int same_logs(const char *a, const char *b) {
    Log x = log_of(a);
    Log y = log_of(b);
    int same = x.n == y.n && x.n > 0;
    for (int i = 0; i < x.n && same; i++) {
        static const char *const times[] = { "ms", "tok_s", "mfu" };
        for (int k = 0; k < 3; k++) {
            cJSON_DeleteItemFromObject(x.line[i], times[k]);
            cJSON_DeleteItemFromObject(y.line[i], times[k]);
        }
        same = cJSON_Compare(x.line[i], y.line[i], 1);
    }
    log_free(&x);
    log_free(&y);
    return same;
}

// ---- inputs that every test shares ----------------------------------------------------------
// A model of 60 thousand parameters and 200 kB of text with some structure: words of a small
// lexicon, drawn by their neighbour.
static void write_inputs(void) {
    static const char config[] =
        "{\"model_type\":\"qwen3_moe\",\"architectures\":[\"Qwen3MoeForCausalLM\"],\"hidden_siz"
        "e\":32,\"num_hidden_layers\":2,\"num_attention_heads\":4,"
        "\"num_key_value_heads\":2,\"head_dim\":16,\"vocab_size\":257,\"num_experts\":8,\"num_exp"
        "erts_per_tok\":2,\"moe_intermediate_size\":24,\"intermediate_size\":48,"
        "\"max_position_embeddings\":128,\"norm_topk_prob\":true,\"rms_norm_eps\":1e-6,\"rope_the"
        "ta\":10000,\"router_aux_loss_coef\":0.01,\"hidden_act\":\"silu\","
        "\"initializer_range\":0.05,\"tie_word_embeddings\":false,\"mlp_only_layers\":[],\"decode"
        "r_sparse_step\":1}";
    static const char *const words[] = { "expert ",  "router ", "token ", "gradient ",
                                         "the ",     "a ",      "of ",    "sums ",
                                         "over ",    "ranks ",  "layer ", "and ",
                                         "chooses ", "its ",    "own ",   "\n" };
    enum { TEXT = 200000 };
    char *text = (char *)xcalloc(TEXT + 64, 1, "text");
    size_t n = 0;
    uint64_t state = 1;
    for (unsigned word = 0; n < TEXT;) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        word = (word * 5 + (unsigned)(state >> 33) % 4 + 1) % 16;
        n += sprintf(text + n, "%s", words[word]);
    }
    write_file("config.json", config, sizeof config - 1);
    write_file("text.txt", text, n - 20000);
    write_file("val.txt", text + n - 20000, 20000);
    write_file("short.txt", text, 30);
    free(text);
    // What most runs begin with: the model and the text, 4 sequences of 32 tokens.
    setenv("S", "--init $T/config.json --train $T/text.txt --seq-len 32 --batch 4 --threads 1", 1);
}

#include "test_cli_bad.h"
#include "test_cli_data.h"
#include "test_cli_looking.h"

// ---- the log, run.json, help ----------------------------------------------------------------
static void test_log(void) {
    if (!good("eval exec $B $S --val $T/val.txt --steps 6 --eval-every 3 --eval-batches 2 "
              "--router-every 2 --out $T/log --aux-coef 0.02 --keep 1"))
        return;
    Log l = log_of("log");
    static const char *const keys[] = {
        "step",   "loss", "aux",   "z",   "grad_norm",       "lr",
        "tokens", "ms",   "tok_s", "mfu", "expert_load_max", "expert_dead"
    };
    int updates = 0;
    int missing = 0;
    int wrong = 0;
    int loads = 0;
    for (int i = 0; i < l.n; i++) {
        if (!cJSON_HasObjectItem(l.line[i], "loss")) continue;
        updates++;
        for (size_t k = 0; k < sizeof keys / sizeof *keys; k++)
            missing += isnan(number(l.line[i], keys[k]));
        wrong += number(l.line[i], "step") != updates || number(l.line[i], "tokens") != 128 ||
                 number(l.line[i], "mfu") <= 0;
        // The peak is measured at the start, perhaps while other programs compute here.
        wrong += number(l.line[i], "mfu") > 10;
        wrong += fabs(number(l.line[i], "tok_s") * number(l.line[i], "ms") / 1e3 / 128 - 1) > 1e-6;
        const cJSON *load = cJSON_GetObjectItemCaseSensitive(l.line[i], "expert_load");
        loads +=
            cJSON_GetArraySize(load) == 2 && cJSON_GetArraySize(cJSON_GetArrayItem(load, 0)) == 8;
    }
    check(updates == 6 && !missing && !wrong,
          "log.jsonl: one line per update with all %d keys, steps from 1, tokens = batch x length, "
          "tok_s = tokens / time",
          (int)(sizeof keys / sizeof *keys));
    check(loads == 3, "--router-every 2: the load of every expert in 3 of 6 lines");
    check(number(l.line[0], "step") == 0 && !cJSON_HasObjectItem(l.line[0], "loss") &&
              logged(&l, 0, "val_loss") > 0 && logged(&l, 3, "val_loss") > 0 &&
              logged(&l, 6, "val_loss") > 0 && l.n == 9,
          "validation lines at steps 0, 3 and 6 have val_loss and no loss");
    check(said("stdout", "expert load by layer") && said("stdout", "max/mean"),
          "a heat map of expert load on screen");
    log_free(&l);
    // %.9g of every number, read back and printed again, is what the file has
    char *text = slurp(at("log/log.jsonl"), 0);
    char again[64];
    int differ = 0;
    int numbers = 0;
    for (const char *p = text; (p = strstr(p, "\":"));) {
        p += 2;
        size_t n = strspn(p, "0123456789.e+-");
        if (!n) continue;
        snprintf(again, sizeof again, "%.9g", strtod(p, 0));
        differ += n != strlen(again) || strncmp(p, again, n);
        numbers++;
    }
    check(numbers > 60 && !differ, "its %d numbers are printed as %%.9g", numbers);
    free(text);
    text = slurp(at("log/run.json"), 0);
    cJSON *json = cJSON_Parse(text);
    const cJSON *o = cJSON_GetObjectItemCaseSensitive(json, "options");
    const cJSON *optimizer = cJSON_GetObjectItemCaseSensitive(o, "optimizer");
    check(json && number(o, "steps") == 6 && number(o, "seq-len") == 32 &&
              number(o, "beta2") == 0.999 && cJSON_IsString(optimizer) &&
              !strcmp(optimizer->valuestring, "adamw") &&
              number(cJSON_GetObjectItemCaseSensitive(json, "config"), "hidden_size") == 32 &&
              number(json, "aux_coef") == 0.02,
          "run.json: options with defaults, the model's config, the coefficient in force");
    cJSON_Delete(json);
    free(text);
    run("$B --help");
    check(said("stdout", "--seq-len T") && said("stdout", "--aux-pool layers|layer") &&
              said("stdout", "[adamw]") && run("$B") == 0,
          "--help lists options, choices and defaults; no option at all does the same");
}

static void test_training(void) {
    if (!good("eval exec $B $S --val $T/val.txt --batch 8 --steps 120 --lr 3e-3 --eval-batches 4 "
              "--out $T/learn"))
        return;
    Log l = log_of("learn");
    double first = logged(&l, 0, "val_loss");
    double last = logged(&l, 120, "val_loss");
    check(fabs(first - log(257)) < 0.3 && last < 0.6 * first,
          "training learns: validation loss %.3f (log of the vocabulary: %.3f), after 120 updates "
          "%.3f",
          first, log(257), last);
    // 8-bit moments on the same run: a moment is within 1/16 of the exact one, an update within
    // about a tenth; curves stay within 2 % of each other
    if (good("eval exec $B $S --val $T/val.txt --batch 8 --steps 120 --lr 3e-3 --eval-batches 4 "
             "--optimizer adamw8bit --out $T/learn8")) {
        Log k = log_of("learn8");
        double mean = 0;
        for (int i = 61; i <= 120; i++)
            mean += (logged(&k, i, "loss") / logged(&l, i, "loss") - 1) / 60;
        check(fabs(mean) < 0.02 && logged(&k, 120, "loss") != logged(&l, 120, "loss"),
              "AdamW with 8-bit moments: losses of updates 61 to 120 are %+.2f %% of exact AdamW's",
              100 * mean);
        log_free(&k);
    }
    log_free(&l);
    // momentum: the buffer starts as the gradient, so two updates' losses are those of plain SGD
    // and the third is not
    if (!good("eval exec $B $S --steps 3 --optimizer sgd --lr 0.1 --out $T/sgd") ||
        !good("eval exec $B $S --steps 3 --optimizer sgd --lr 0.1 --momentum 0.9 --out $T/mom"))
        return;
    Log a = log_of("sgd");
    Log b = log_of("mom");
    check(logged(&a, 2, "loss") == logged(&b, 2, "loss") &&
              logged(&a, 3, "loss") != logged(&b, 3, "loss"),
          "sgd with momentum: the first step is the plain one, the second is not");
    log_free(&a);
    log_free(&b);
    good("eval exec $B $S --steps 2 --profile 2 --out $T/profiled");
    check_trace("profiled/profile-2.trace.json", 1);
    good("eval exec $B $S --steps 4 --threads 2 --out $T/two --dump $T/two.safetensors");
    good("eval exec $B $S --steps 4 --threads 1 --out $T/one --dump $T/one.safetensors");
    check(same_logs("one", "two") && same_files(at("one.safetensors"), at("two.safetensors")) &&
              !tensors_differ(at("one/checkpoints/step_4"), at("two/checkpoints/step_4")),
          "one thread and two: the same bits in log, dump and weights");
    good("eval exec $B $S --steps 4 --grad-clip 0 --out $T/end");
    good("eval exec $B $S --steps 4 --grad-clip 0 --update layer --recompute layer --out $T/layer");
    check(same_logs("end", "layer") &&
              !tensors_differ(at("end/checkpoints/step_4"), at("layer/checkpoints/step_4")),
          "--update layer --recompute layer, unclipped: the same bits as --update end");
    Log x = log_of("one");
    double on = logged(&x, 1, "loss");
    log_free(&x);
    good("eval exec $B $S --steps 1 --seed 7 --lr 0 --out $T/seed");
    good("eval exec $B $S --steps 1 --shuffle off --out $T/order");
    Log s = log_of("seed");
    Log o = log_of("order");
    check(logged(&s, 1, "loss") != on && logged(&o, 1, "loss") != on,
          "--seed and --shuffle change what is read");
    log_free(&s);
    log_free(&o);
}

// Learning rates in the log against the formulas, update u at index s = u - 1.
static void schedule_case(const char *name, const char *options, double (*f)(double s)) {
    good("rm -rf $T/lr; eval exec $B $S --steps 20 --lr 2e-3 --out $T/lr --seq-len 4 --batch 1 %s",
         options);
    Log l = log_of("lr");
    double worst = l.n == 20 ? 0 : INFINITY;
    for (int u = 1; u <= 20; u++) {
        double e = fabs(logged(&l, u, "lr") - 2e-3 * f(u - 1));
        if (!(e <= worst)) worst = isnan(e) ? INFINITY : e;
    }
    check(worst <= 1e-11, "%s: learning rates of 20 updates, largest deviation %.1e", name,
          worst); // nine digits of 2e-3
    log_free(&l);
}
static double constant_rate(double s) { return s < 4 ? s / 4 : 1; }
static double long_warmup(double s) { return s / 40; }
static double linear_rate(double s) { return s < 5 ? s / 5 : 0.1 + 0.9 * (20 - s) / 15; }
static double cosine_rate(double s) { return s < 4 ? s / 4 : 0.5 * (1 + cos(M_PI * (s - 4) / 16)); }
static double wsd_rate(double s) {
    if (s < 2) return s / 2;
    return s < 14 ? 1 : 0.5 + 0.5 * (20 - s) / 6;
}
static void test_schedules(void) {
    schedule_case("constant, warmup 4", "--warmup 4", constant_rate);
    schedule_case("constant, warmup longer than the run", "--warmup 40", long_warmup);
    schedule_case("linear to a tenth, warmup ratio 0.25",
                  "--schedule linear --warmup 0.25 --final-lr 0.1", linear_rate);
    schedule_case("cosine, warmup 4", "--schedule cosine --warmup 4", cosine_rate);
    schedule_case("wsd, warmup 2, decay ratio 0.3 to a half",
                  "--schedule wsd --warmup 2 --decay 0.3 --final-lr 0.5", wsd_rate);
}

// ---- resuming -------------------------------------------------------------------------------
static void test_resume(void) {
    static const char *const options[] = { "--optimizer adamw --weight-decay 0.1",
                                           "--optimizer sgd --momentum 0.9 --lr 0.05",
                                           "--optimizer adamw8bit",
                                           "--update layer --grad-clip 0.5",
                                           "--balance bias --balance-rate 0.01" };
    for (int i = 0; i < 5; i++) {
        good("rm -rf $T/a $T/b; eval exec $B $S --val $T/val.txt --eval-every 4 --eval-batches 1 "
             "--steps 10 --out $T/a %s",
             options[i]);
        good("eval exec $B $S --val $T/val.txt --eval-every 4 --eval-batches 1 --steps 5 --out "
             "$T/b %s",
             options[i]);
        // The shorter run evaluates at its own last update, which the longer one does not.
        good("sed -i /val_loss/d $T/a/log.jsonl; sed -i /val_loss/d $T/b/log.jsonl; exec true");
        good("eval exec $B $S --eval-batches 1 --steps 10 --resume --out $T/b %s", options[i]);
        check(same_files(at("a/checkpoints/step_10/model.safetensors"),
                         at("b/checkpoints/step_10/model.safetensors")) &&
                  same_files(at("a/checkpoints/step_10/optimizer.safetensors"),
                             at("b/checkpoints/step_10/optimizer.safetensors")) &&
                  same_logs("a", "b"),
              "5 updates, resumed to 10: weights, optimizer and log as in one go (%s)", options[i]);
    }
    // a log that ran ahead of the checkpoint is cut back; a torn last line goes with it
    good("printf '{\"step\":11,\"loss\":1}\\n{\"step\":12,\"lo' >> $T/b/log.jsonl; eval exec $B "
         "$S --steps 12 --resume --out $T/b --balance bias --balance-rate 0.01");
    Log l = log_of("b");
    check(l.n == 12 && number(l.line[11], "step") == 12 && number(l.line[10], "loss") != 1,
          "a log that ran ahead of the checkpoint is cut back to it");
    log_free(&l);
    // an evaluation that is made again takes the place of the one before: a run that began anew,
    // one that only evaluates
    const char *evaluated = "--val $T/text.txt --eval-batches 1";
    good("eval exec $B $S --steps 2 %s --out $T/again", evaluated);
    good("rm -r $T/again/checkpoints; eval exec $B $S --steps 2 %s --resume --out $T/again",
         evaluated);
    char *text = slurp(at("again/log.jsonl"), 0);
    int evaluations = 0;
    for (const char *p = text; (p = strstr(p, "val_loss")); p++) evaluations++;
    check(evaluations == 2,
          "begun anew and evaluated again: %d evaluations in the log, of steps 0 and 2",
          evaluations);
    free(text);
    good("eval exec $B $S --steps 8 --save-every 2 --keep 2 --out $T/keep");
    check(!exists(at("keep/checkpoints/step_4")) && exists(at("keep/checkpoints/step_6")) &&
              exists(at("keep/checkpoints/step_8")) &&
              exists(at("keep/checkpoints/latest/model.safetensors")),
          "--save-every 2 --keep 2: the two newest checkpoints stay, `latest` follows");
}

// Wait until the run in hand has logged `lines` lines, at most 60 s.
static int wait_lines(const char *out, int lines) {
    char *path = xasprintf("%s/log.jsonl", at(out));
    int n = 0;
    for (int i = 0; i < 6000 && n < lines; i++) {
        char *text = slurp(path, 0);
        n = 0;
        for (const char *p = text; *p; p++) n += *p == '\n';
        free(text);
        pause_ms(10);
    }
    free(path);
    return n >= lines;
}

static void test_signals(void) {
    const char *schedule = "--schedule cosine --warmup 10 --steps 150";
    good("eval exec $B $S %s --out $T/whole", schedule);
    static const int signals[] = { SIGTERM, SIGINT };
    for (int i = 0; i < 2; i++) {
        char *command = xasprintf("eval exec $B $S %s --out $T/cut", schedule);
        good("exec rm -rf $T/cut");
        pid_t child = begin(command);
        int seen = wait_lines("cut", 5);
        kill(child, signals[i]);
        int status = end(child);
        int stopped = said("stdout", "stopped by a signal");
        check(seen && status == 0 && stopped && exists(at("cut/checkpoints/latest/trainer.json")),
              "%s: saves and ends with status 0 (%d)", i ? "SIGINT" : "SIGTERM", status);
        good("eval exec $B $S %s --resume --out $T/cut", schedule);
        check(same_logs("whole", "cut") &&
                  !tensors_differ(at("whole/checkpoints/step_150"), at("cut/checkpoints/step_150")),
              "resumed, its log and weights are those of the run that was left alone");
        free(command);
    }
    char *command = xasprintf("eval exec $B $S %s --out $T/usr", schedule);
    pid_t child = begin(command);
    wait_lines("usr", 5);
    kill(child, SIGUSR1);
    int status = end(child);
    check(status == 0 && run("test $(ls $T/usr/checkpoints | grep -c step_) = 2") == 0 &&
              same_logs("whole", "usr"),
          "SIGUSR1: saves and goes on to the end");
    free(command);
    // kill -9 at ten moments, a dozen updates apart, saving after every update so that many fall
    // inside a save
    uint32_t state = 12345;
    int intact = 1;
    int killed = 0;
    for (int i = 0; i < 10; i++) {
        child = begin(
            "eval exec $B $S --schedule cosine --warmup 10 --steps 150 --save-every 1 --keep 3 "
            "--resume --out $T/kill");
        state = state * 1664525 + 1013904223;
        wait_lines("kill", 12 * (i + 1) + (int)(state >> 16) % 8);
        pause_ms((int)(state >> 20) % 10);
        kill(child, SIGKILL);
        status = end(child);
        killed += status == 128 + SIGKILL;
        if (status && status != 128 + SIGKILL)
            intact = check(0, "a resumed run ends with status %d", status);
        if (exists(at("kill/checkpoints/latest")))
            intact =
                good("exec $B --model $T/kill/checkpoints/latest --steps 0 --seq-len 32") && intact;
    }
    intact =
        good("eval exec $B $S --schedule cosine --warmup 10 --steps 150 --save-every 1 --keep 3 "
             "--resume --out $T/kill") &&
        intact;
    int logs = same_logs("whole", "kill");
    int tensors = tensors_differ(at("whole/checkpoints/step_150"), at("kill/checkpoints/step_150"));
    check(intact && killed > 0 && logs && !tensors,
          "kill -9 at random moments (%d times): the last checkpoint loads each time, and the run "
          "ends as if nothing had happened%s%s",
          killed, logs ? "" : "; LOGS DIFFER", tensors ? "; WEIGHTS DIFFER" : "");
}

#include "test_cli_folder.h"
#include "test_cli_models.h"
#include "test_cli_conversion.h"

// ---- several ranks --------------------------------------------------------------------------
static void test_ranks(const char *mpirun) {
    setenv("M", mpirun, 1);
    good("eval exec $M -np 2 $B $S --ep 2 --steps 2 --profile 2 --out $T/profiled");
    check_trace("profiled/profile-2.trace.json", 2);
    good("eval exec $B $S --steps 8 --out $T/r1 --lr 1e-3");
    good("eval exec $M -np 4 $B $S --steps 4 --ep 2 --fsdp 2 --out $T/r4 --lr 1e-3");
    static const char *const grids[] = { "$B", "$M -np 2 $B --fsdp 2", "$M -np 3 $B --batch 6",
                                         "$M -np 4 $B --ep 4" };
    Log whole = log_of("r1");
    for (int i = 0; i < 4; i++) {
        good("rm -rf $T/as; eval exec %s --model $T/r4/checkpoints/step_4 --steps 0 --save-dtype "
             "source --seq-len 32 --out $T/as",
             grids[i]);
        check(!tensors_differ(at("as/checkpoints/step_0"), at("r4/checkpoints/step_4")),
              "a checkpoint of ep 2 x fsdp 2 read and written by %s: every tensor byte for byte",
              grids[i]);
        if (i == 2) continue; // three ranks cannot share four sequences
        good("rm -rf $T/go; cp -r $T/r4 $T/go; eval exec %s $S --steps 8 --resume --out $T/go "
             "--lr 1e-3",
             grids[i]);
        Log l = log_of("go");
        double worst = l.n == 8 ? 0 : INFINITY;
        for (int u = 1; u <= 8; u++)
            worst = fmax(worst, fabs(logged(&l, u, "loss") / logged(&whole, u, "loss") - 1));
        check(worst <= same_losses, "resumed on %s: losses of 8 updates as of one process, %.1e",
              grids[i], worst);
        log_free(&l);
    }
    log_free(&whole);
    // one rank dies: the run ends by itself, soon, with a status, and what was saved loads
    pid_t child = begin(
        "eval exec $M -np 2 $B $S --steps 100000 --ep 2 --save-every 20 --keep 2 --timeout 20 "
        "--out $T/dead");
    int seen = wait_lines("dead", 50);
    double start = now_seconds();
    pid_t rank = child_of(child);
    int killed = rank ? kill(rank, SIGKILL) : -1;
    int status = end(child);
    double took = now_seconds() - start;
    check(
        seen && !killed && status != 0 && took < 30 &&
            run("exec $B --model $T/dead/checkpoints/latest --steps 0 --seq-len 32") == 0,
        "kill -9 of one rank: the run ends after %.1f s with status %d, its last checkpoint loads",
        took, status);
    check(run("eval exec $M -np 2 $B $S --steps 1 --ep 3") != 0 && said("stderr", "error: ") &&
              said("stderr", "--ep 3"),
          "an impossible grid is one error");
}

int main(int argc, char **argv) {
    const char *program = 0;
    const char *fixtures = "dev/fixtures";
    const char *mpirun = 0;
    const char *only = 0;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--fixtures") && i + 1 < argc)
            fixtures = argv[++i];
        else if (!strcmp(argv[i], "--mpirun") && i + 1 < argc)
            mpirun = argv[++i];
        else if (!strcmp(argv[i], "--only") && i + 1 < argc)
            only = argv[++i];
        else
            program = argv[i];
    }
    if (!program || access(program, X_OK))
        die("test_cli needs the program to test|"
            "test_cli ./train_moe [--fixtures DIR] [--mpirun COMMAND]");
    const char *base = getenv("TMPDIR");
    snprintf(folder, sizeof folder, "%.200s/test_cli.XXXXXX", base && *base ? base : "/tmp");
    if (!mkdtemp(folder)) die("cannot make a folder like %s|set TMPDIR", folder);
    char *absolute = realpath(program, 0);
    char *root = realpath(fixtures, 0);
    if (!root)
        die("%s: no such folder|run from the root of the repository, or give --fixtures DIR",
            fixtures);
    setenv("B", absolute, 1);
    setenv("F", root, 1);
    setenv("T", folder, 1);
    write_inputs();
    static const struct {
        const char *name;
        void (*f)(void);
    } parts[] = { { "bad", test_bad },           { "log", test_log },
                  { "training", test_training }, { "schedules", test_schedules },
                  { "resume", test_resume },     { "signals", test_signals },
                  { "folder", test_folder },     { "conversion", test_conversion },
                  { "looking", test_looking },   { "data", test_data_files },
                  { "models", test_models } };
    for (size_t i = 0; i < sizeof parts / sizeof *parts && !mpirun; i++)
        if (!only || !strcmp(only, parts[i].name)) parts[i].f();
    if (mpirun) test_ranks(mpirun);
    if (mpirun) test_data_ranks();
    if (system("rm -rf \"$T\"")) check(0, "the folder %s could be removed", folder);
    free(absolute);
    free(root);
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
