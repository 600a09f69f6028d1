// What a person and a plot see of a run: the screen, log.jsonl, run.json and the heat map of expert
// load. Rank 0 prints and writes; the contracts are in report.h.
#define _POSIX_C_SOURCE 200809L
#include "report.h"
#include "file.h"
#include "../kernels/fail.h"
#include <cjson/cJSON.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#ifndef MOE_COMMIT
#define MOE_COMMIT "unknown"
#endif

// ---- log.jsonl ------------------------------------------------------------------------------
// Where the lines of steps <= step end: they ascend, so what follows is of updates that are made
// again. Lines without a step are somebody else's and stay; a last line that a kill cut short goes.
static int64_t log_end(int fd, const char *path, int64_t size, int64_t step) {
    char block[65536], head[64];
    size_t n_head = 0;
    int64_t kept = 0;
    for (int64_t first = 0; first < size; first += (int64_t)sizeof block) {
        int64_t n = size - first;
        if (n > (int64_t)sizeof block) n = (int64_t)sizeof block;
        file_read_at(fd, path, first, block, n);
        for (int64_t i = 0; i < n; i++) {
            if (block[i] != '\n') {
                if (n_head < sizeof head - 1) head[n_head++] = block[i];
                continue;
            }
            head[n_head] = 0;
            n_head = 0;
            const char *at = strstr(head, "\"step\":");
            if (at && strtoll(at + 7, 0, 10) > step) return kept;
            kept = first + i + 1;
        }
    }
    return kept;
}

static void open_log(Report *r, int64_t step) {
    char *path = xasprintf("%s/log.jsonl", r->folder->path);
    struct stat st;
    r->log_fd = file_edit(r->folder->fd, "log.jsonl");
    if (r->log_fd < 0 || fstat(r->log_fd, &st))
        die("cannot open %s: %s|choose an --out folder that can be written", path, file_why(errno));
    r->log_size = log_end(r->log_fd, path, st.st_size, step);
    if (ftruncate(r->log_fd, r->log_size))
        die("cannot cut %s: %s|make the folder writable", path, strerror(errno));
    r->line = (LogLine *)xcalloc(1, sizeof *r->line, "a line of the log");
    r->log = open_memstream(&r->line->text, &r->line->bytes);
    if (!r->log) die("out of host memory for a line of the log|free memory");
    free(path);
}

// Logging is not worth a run: what the disk refuses is held in memory and written with the next
// line.
static void write_log(Report *r) {
    enum { MOST = 64 << 20 };
    int error = file_write_at(r->log_fd, r->log_size, r->held, (int64_t)r->held_bytes);
    if (!error) {
        r->log_size += (int64_t)r->held_bytes;
        r->held_bytes = 0;
        return;
    }
    if (ftruncate(r->log_fd, r->log_size)) error = errno;
    if (!r->warned++)
        warn("cannot write %s/log.jsonl: %s: its lines wait in memory", r->folder->path,
             strerror(error));
    if (r->held_bytes > MOST) {
        warn("lines of %s/log.jsonl are lost: the disk has no room", r->folder->path);
        r->held_bytes = 0;
    }
}

static void log_line_end(Report *r) {
    if (fputs("}\n", r->log) < 0 || fflush(r->log))
        die("out of host memory for the log|free memory");
    r->held = (char *)xrealloc(r->held, r->held_bytes + r->line->bytes, 1, "the log");
    memcpy(r->held + r->held_bytes, r->line->text, r->line->bytes);
    r->held_bytes += r->line->bytes;
    rewind(r->log);
    write_log(r);
    run_folder_in_place(r->folder);
}

void report_sync(Report *r) {
    struct stat ours, named;
    if (!r->log) return;
    write_log(r);
    int error = file_sync(r->log_fd);
    if (error) warn("%s/log.jsonl may not be on the disk: %s", r->folder->path, strerror(error));
    int gone = fstatat(r->folder->fd, "log.jsonl", &named, AT_SYMLINK_NOFOLLOW);
    if (fstat(r->log_fd, &ours) || (!gone && named.st_ino == ours.st_ino) || r->replaced++) return;
    warn("%s/log.jsonl was removed or replaced under this run: its lines are lost from there on",
         r->folder->path);
}

static void log_string(FILE *f, const char *text) {
    cJSON *string = cJSON_CreateString(text);
    char *quoted = cJSON_PrintUnformatted(string);
    if (!quoted) die("out of host memory for a line of the log|free memory");
    fputs(quoted, f);
    free(quoted);
    cJSON_Delete(string);
}

static void log_number(FILE *f, const char *key, double x) {
    if (isfinite(x))
        fprintf(f, ",\"%s\":%.9g", key, x);
    else
        fprintf(f, ",\"%s\":null", key);
}

Report report_open(const Trainer *t, RunFolder *folder, int64_t step, int64_t steps, int again,
                   double peak) {
    Report r;
    memset(&r, 0, sizeof r);
    r.active = t->g->rank == 0;
    r.folder = folder;
    r.peak = peak * t->g->world;
    r.flops_per_token = config_flops_per_token(&t->m->c, t->o.T);
    r.first = step;
    r.steps = steps;
    r.begin = now_seconds();
    if (r.active && folder) open_log(&r, again ? step - 1 : step);
    return r;
}

void report_close(Report *r) {
    if (!r->log) return;
    report_sync(r);
    fclose(r->log);
    free(r->line->text);
    free(r->line);
    free(r->held);
    close(r->log_fd);
    r->log = 0;
}

// ---- start ----------------------------------------------------------------------------------
// The files of --train or --val as they were found: what a run trained on, source by source.
static void add_data(cJSON *run, const char *key, const Loader *data) {
    if (!data) return;
    cJSON *list = cJSON_AddArrayToObject(run, key);
    for (int i = 0; i < loader_sources(data); i++) {
        const LoaderSource *s = loader_source(data, i);
        cJSON *source = cJSON_CreateObject();
        cJSON_AddItemToArray(list, source);
        if (*s->name) cJSON_AddStringToObject(source, "name", s->name);
        cJSON_AddNumberToObject(source, "share", s->share);
        cJSON_AddNumberToObject(source, "tokens", (double)s->tokens);
        cJSON_AddNumberToObject(source, "windows", (double)s->windows);
        cJSON_AddNumberToObject(source, "targets", (double)s->targets);
        cJSON_AddBoolToObject(source, "masked", s->masked);
        cJSON *files = cJSON_AddArrayToObject(source, "files");
        for (int k = 0; k < s->files; k++) {
            const char *name = loader_file(data, s->first_file + k);
            cJSON_AddItemToArray(files, cJSON_CreateString(name));
        }
    }
}

static void write_run(const RunFolder *folder, const Options *o, const Trainer *t,
                      const Loader *train, const Loader *val) {
    cJSON *run = cJSON_CreateObject();
    cJSON *config = cJSON_Parse(t->m->c.json);
    cJSON_AddStringToObject(run, "commit", MOE_COMMIT);
    cJSON_AddStringToObject(run, "backend", device_backend());
    cJSON_AddStringToObject(run, "device", device_describe());
    cJSON_AddStringToObject(run, "precision", PRECISION_NAME);
    cJSON_AddNumberToObject(run, "world", t->g->world);
    cJSON_AddNumberToObject(run, "parameters", config_total_parameters(&t->m->c));
    cJSON_AddNumberToObject(run, "aux_coef", t->o.aux_coef);
    cJSON_AddItemToObject(run, "options", options_json(o));
    if (config) cJSON_AddItemToObject(run, "config", config);
    add_data(run, "train_data", train);
    add_data(run, "val_data", val);
    char *text = cJSON_Print(run);
    char *line = xasprintf("%s\n", text ? text : "");
    int error = file_replace(folder->fd, "run.json", line, strlen(line));
    if (error)
        die("cannot write %s/run.json: %s|free space or make the folder writable", folder->path,
            file_why(error));
    cJSON_Delete(run);
    free(text);
    free(line);
}

void report_limits(const Config *c, int fused) {
    int scaled = !c->norm_topk && c->n_moe;
    int dense = c->n_moe < c->L;
    if (!scaled && !dense && !fused) return;
    printf("exports    not for every program:%s%s%s\n",
           scaled ? " llama.cpp renormalises the experts' weights, this model does not;" : "",
           dense ? " llama.cpp has no dense layers in such a model;" : "",
           fused ? " transformers 4.57 loads fused experts as random numbers, 5 as they are;" : "");
}

void report_start(const Report *r, const Trainer *t, const Options *o, const char *source,
                  const Loader *train, const Loader *val) {
    if (!r->active) return;
    const Config *c = &t->m->c;
    const Grid *g = t->g;
    double total = config_total_parameters(c);
    double multiplied = config_matrix_parameters(c);
    printf("moe.c      commit %s, %s\n", MOE_COMMIT, PRECISION_NAME);
    printf("device     %s\n", device_describe());
    printf("ranks      %d over %s, %d on this machine\n", g->world, comm_describe(),
           comm_local_size());
    if (g->world > 1) {
        char *rows = grid_table(g);
        fputs(rows, stdout);
        free(rows);
    }
    printf("model      %s: %d layers (%d with experts), hidden %d, %d/%d heads of %d, vocabulary "
           "%d%s\n",
           source, c->L, c->n_moe, c->C, c->H, c->KV, c->D, c->V, c->tied ? ", tied head" : "");
    if (c->n_moe)
        printf("experts    %d of width %d, top-%d%s\n", c->E, c->F, c->K,
               c->norm_topk ? ", scores renormalised" : "");
    if (c->n_moe && c->K == 1 && c->norm_topk)
        printf("warning    top_k = 1 with norm_topk_prob: every score is 1 and the router gets no "
               "gradient from the language model\n");
    printf("parameters %.0f, of which a token meets %.0f in matrix products\n", total, multiplied);
    if (train) loader_print(stdout, "train", train);
    if (val) loader_print(stdout, "val", val);
    const char *twice = train ? loader_shared(train, train) : 0;
    const char *seen = train && val ? loader_shared(train, val) : 0;
    if (twice) printf("warning    %s is given twice in --train\n", twice);
    if (seen) printf("warning    %s is given in --val, but also in --train\n", seen);
    printf("update     %lld sequences of %d = %lld tokens; on each rank %d round%s of %d "
           "micro-batch%s of %d\n",
           (long long)t->o.batch, t->o.T, (long long)t->o.batch * t->o.T, t->o.rounds,
           t->o.rounds > 1 ? "s" : "", t->n_micro, t->n_micro > 1 ? "es" : "",
           (int)(t->R / t->o.T));
    if (train && t->o.batch > loader_windows(train))
        printf("warning    the training data has %lld windows, an update takes %lld: every update "
               "sees some of them twice\n",
               (long long)loader_windows(train), (long long)t->o.batch);
    char word[OPTION_WORD];
    if (t->o.documents)
        printf("documents  attention sees its own document, which ends with token %d\n",
               t->o.document_end);
    printf("optimizer  %s, lr %g, weight decay %g, clip %g, update %s",
           options_choice(o, "optimizer", word), o->lr, o->weight_decay, o->grad_clip,
           t->o.update_layer ? "layer (clips by the previous update's norm, the first is unclipped)"
                             : "end");
    printf(", recompute %s\n", options_choice(o, "recompute", word));
    if (c->n_moe)
        printf("losses     cross entropy + %g * aux (%s; %d at perfect balance) + %g * z%s%s\n",
               t->o.aux_coef, t->o.aux_per_layer ? "mean of layers" : "pooled over layers", c->K,
               t->o.z_coef, t->o.rounds > 1 ? "; aux per round" : "",
               t->o.balance_rate > 0 ? "; selection bias on (transformers will not apply it)" : "");
    if (r->peak > 0)
        printf(
            "mfu        %.4g FLOP a token = 6 x %.0f parameters in matrix products + 12 x layers "
            "x heads x head_dim x T / 2; peak %.4g FLOP/s (%s)\n",
            r->flops_per_token, multiplied, r->peak,
            !strcmp(device_backend(), "cpu") ? "a short sgemm on this machine"
                                             : "dense, by device name");
    else
        printf("mfu        not printed: the peak of this device is not known\n");
    fflush(stdout);
    if (r->folder) write_run(r->folder, o, t, train, val);
}

// ---- updates --------------------------------------------------------------------------------
static void print_eta(double seconds) {
    int64_t s = (int64_t)(seconds + 0.5);
    if (s >= 3600)
        printf(" | ETA %lld:%02d:%02d", (long long)(s / 3600), (int)(s / 60 % 60), (int)(s % 60));
    else
        printf(" | ETA %d:%02d", (int)(s / 60), (int)(s % 60));
}

// The share of each expert in its layer's choices, a list per layer.
static void log_expert_load(FILE *log, const Trainer *t) {
    const Config *c = &t->m->c;
    fprintf(log, ",\"expert_load\":");
    for (int l = 0; l < c->n_moe; l++) {
        const int64_t *count = t->router.host_count + (int64_t)l * c->E;
        int64_t total = 0;
        for (int e = 0; e < c->E; e++) total += count[e];
        fputs(l ? ",[" : "[[", log);
        for (int e = 0; e < c->E; e++)
            fprintf(log, "%s%.4g", e ? "," : "", total ? (double)count[e] / (double)total : 0.0);
        fputs("]", log);
    }
    fputs("]", log);
}

void report_step(Report *r, const Trainer *t, int64_t step, const StepResult *s, double seconds,
                 int with_experts) {
    if (!r->active) return;
    const Config *c = &t->m->c;
    double rate = (double)s->tokens / seconds;
    double mfu = r->peak > 0 ? rate * config_flops_per_token(c, s->visible) / r->peak : NAN;
    printf("step %lld/%lld (%.0f%%) | ", (long long)step, (long long)r->steps,
           100.0 * (double)step / (double)r->steps);
    if (s->valid)
        printf("loss %.4f", s->loss);
    else
        printf("no targets");
    if (c->n_moe) printf(" aux %.3f", s->aux);
    printf(" | norm %.3g lr %.3g", s->grad_norm, s->lr);
    if (c->n_moe) printf(" | load %.1fx", s->expert_load_max);
    if (s->expert_dead) printf(" dead %d", s->expert_dead);
    printf(" | %.0f ms %.0f tok/s", 1e3 * seconds, rate);
    if (r->peak > 0) printf(" mfu %.1f%%", 100 * mfu);
    print_eta((now_seconds() - r->begin) / (double)(step - r->first) * (double)(r->steps - step));
    if (s->nonfinite) printf(" | %sgradient not finite", t->o.skip_nonfinite ? "SKIPPED: " : "");
    printf("\n");
    fflush(stdout);
    if (!r->log) return;
    fprintf(r->log, "{\"step\":%lld", (long long)step);
    log_number(r->log, "loss", s->loss);
    log_number(r->log, "aux", s->aux);
    log_number(r->log, "z", s->z);
    log_number(r->log, "grad_norm", s->grad_norm);
    log_number(r->log, "lr", s->lr);
    fprintf(r->log, ",\"tokens\":%lld,\"targets\":%lld", (long long)s->tokens, (long long)s->valid);
    log_number(r->log, "ms", 1e3 * seconds);
    log_number(r->log, "tok_s", rate);
    log_number(r->log, "mfu", mfu);
    log_number(r->log, "expert_load_max", s->expert_load_max);
    fprintf(r->log, ",\"expert_dead\":%d", s->expert_dead);
    if (s->nonfinite && t->o.skip_nonfinite) fprintf(r->log, ",\"skipped\":true");
    if (with_experts && c->n_moe) log_expert_load(r->log, t);
    log_line_end(r);
}

// " name 1.2345"; null, as in the log, where no target counts (a mean of none).
static void print_loss(const char *name, double loss) {
    if (isfinite(loss))
        printf(" %s %.4f", name, loss);
    else
        printf(" %s null", name);
}

void report_evaluation(Report *r, int64_t step, double loss, const Loader *val,
                       const double *part) {
    if (!r->active) return;
    int n = loader_sources(val) > 1 ? loader_sources(val) : 0;
    printf("val  %lld/%lld |", (long long)step, (long long)r->steps);
    print_loss("val_loss", loss);
    for (int i = 0; i < n; i++) {
        printf(" |");
        print_loss(loader_source(val, i)->name, part[i]);
    }
    printf("\n");
    fflush(stdout);
    if (!r->log) return;
    fprintf(r->log, "{\"step\":%lld", (long long)step);
    log_number(r->log, "val_loss", loss);
    for (int i = 0; i < n; i++) {
        char *key = xasprintf("val_loss.%s", loader_source(val, i)->name);
        log_number(r->log, key, part[i]);
        free(key);
    }
    log_line_end(r);
}

void report_sources(Report *r, int64_t step, const Loader *data, int64_t windows) {
    int n = loader_sources(data);
    if (!r->active || n < 2) return;
    if (r->log) fprintf(r->log, "{\"step\":%lld,\"sources\":{", (long long)step);
    for (int i = 0; i < n; i++) {
        const LoaderSource *s = loader_source(data, i);
        int64_t given = loader_count(data, i, windows);
        double epochs = (double)given / (double)s->windows;
        printf("source     %s: %lld windows, %.3g epochs\n", s->name, (long long)given, epochs);
        if (!r->log) continue;
        if (i) fputs(",", r->log);
        log_string(r->log, s->name);
        fprintf(r->log, ":{\"windows\":%lld,\"epochs\":%.9g}", (long long)given, epochs);
    }
    if (!r->log) return;
    fprintf(r->log, "}");
    log_line_end(r);
}

void report_sample(Report *r, int64_t step, const char *text) {
    if (!r->log) return;
    fprintf(r->log, "{\"step\":%lld,\"sample\":", (long long)step);
    log_string(r->log, text);
    log_line_end(r);
}

void report_heat_map(const Trainer *t, FILE *out) {
    const Config *c = &t->m->c;
    static const char shades[] = " .:-=+*#%@";
    enum { COLUMNS = 64 };
    int columns = c->E < COLUMNS ? c->E : COLUMNS;
    double positions = (double)t->R * t->n_micro * t->g->world * t->o.rounds;
    fprintf(out,
            "expert load by layer (%d experts%s; ' ' none, '=' about the mean, '@' above 2.1x the "
            "mean)\n",
            c->E, columns < c->E ? ", grouped" : "");
    for (int l = 0, i = 0; l < c->L; l++) {
        if (!c->is_moe[l]) continue;
        const int64_t *count = t->router.host_count + (size_t)i * c->E;
        int64_t total = 0;
        int64_t most = 0;
        int dead = 0;
        for (int e = 0; e < c->E; e++) {
            total += count[e];
            dead += count[e] == 0;
            if (count[e] > most) most = count[e];
        }
        fprintf(out, "  %3d [", l);
        for (int k = 0; k < columns; k++) {
            int begin = (int)((int64_t)k * c->E / columns);
            int end = (int)((int64_t)(k + 1) * c->E / columns);
            int64_t n = 0;
            for (int e = begin; e < end; e++) n += count[e];
            double load = total ? (double)n * c->E / ((double)total * (end - begin)) : 0;
            int shade = n == 0 ? 0 : 1 + (int)fmax(0, 4 * load - 0.5);
            fputc(shades[shade > 9 ? 9 : shade], out);
        }
        fprintf(out, "] max/mean %.2f, dead %d, entropy %.2f of %.2f bits\n",
                total ? (double)most * c->E / (double)total : 0, dead,
                t->router.host_z[2 * i + 1] / positions / log(2), log2(c->E));
        i++;
    }
    fflush(out);
}
