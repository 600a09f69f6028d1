// train_moe: trains Qwen3-MoE. This file is the program: the commands (--plan, --selftest, or a
// run), the loop over updates, evaluation, samples, saving. The update itself is model/step.c; what
// an option means for the model is in model/settings.c.
//
//   make train_moe
//   ./train_moe --init model/configs/tiny.json --train text.txt --steps 200 --out runs/first
//   mpirun -np 4 ./train_moe --model DIR --train 'shards/*.bin' --ep 2 --fsdp 2 --out runs/second
//
// The common subset of C11 and C++17: nvcc builds it for GPUs, `cc -x c` for CPUs.
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#include "kernels/fail.h"
#include "model/checkpoint.h"
#include "model/inspect.h"
#include "model/options.h"
#include "model/plan.h"
#include "model/report.h"
#include <cjson/cJSON.h>
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

// ---- signals --------------------------------------------------------------------------------
// SIGTERM, SIGINT and SIGHUP end the run after the update in hand, with a checkpoint; SIGUSR1 saves
// and goes on. Two flags, so that clearing one cannot lose the other.
enum { SIGNAL_NONE, SIGNAL_SAVE, SIGNAL_END, DATA_CHANGED, FOLDER_MOVED };
static volatile sig_atomic_t save_asked, end_asked;
static void on_signal(int s) {
    if (s == SIGUSR1)
        save_asked = 1;
    else
        end_asked = 1;
}

static void catch_signals(void) {
    struct sigaction action, was;
    memset(&action, 0, sizeof action);
    action.sa_handler = on_signal;
    action.sa_flags = SA_RESTART;
    sigaction(SIGTERM, &action, 0);
    sigaction(SIGINT, &action, 0);
    sigaction(SIGUSR1, &action, 0);
    // A closed terminal ends the run as SIGTERM does, unless nohup said to ignore it.
    if (!sigaction(SIGHUP, 0, &was) && was.sa_handler != SIG_IGN) sigaction(SIGHUP, &action, 0);
}

// What is an error of a write, with a message, where it matters: a limit on the size of files, and
// a reader of the screen that went away (`| head`).
static void ignore_signals(void) {
    signal(SIGXFSZ, SIG_IGN);
    signal(SIGPIPE, SIG_IGN);
}

// What this rank was asked since the last call; the ranks of a run agree on the largest.
static int signal_asked(void) {
    if (end_asked) return SIGNAL_END;
    if (!save_asked) return SIGNAL_NONE;
    save_asked = 0;
    return SIGNAL_SAVE;
}

// ---- a run ----------------------------------------------------------------------------------
typedef struct {
    const Options *o;
    RunFolder folder;
    int writes; // this run writes to the folder
    Grid grid;
    Model model;
    Loader *data, *val; // 0: not given
    Tokens *tokens;
    Trainer *trainer;
    Arena staging;
    Checkpoint *checkpoint;
    Report report;
    int64_t first; // updates that were made before this run
} Run;

// Opens --out and returns the step of the newest checkpoint in it, -1 where there is none. Rank 0
// owns the folder; a look at a run (--steps 0 --resume) takes no lock and writes nothing, so that
// it may look at one that is training.
static int64_t open_out(Run *r) {
    const Options *o = r->o;
    int empty = 1;
    int looks = 0;
    r->folder = run_folder_look("");
    if (!*o->out) return -1;
    if (comm_world_rank() == 0) {
        empty = run_folder_is_empty(o->out);
        looks = !empty && o->resume && !o->steps;
        if (!looks && (empty || o->resume)) {
            r->folder = run_folder_own(o->out);
            empty = run_folder_is_empty(o->out); // another run may have been here meanwhile
        }
        if (!empty && !o->resume)
            die("--out %s is not empty|add --resume to continue that run, or choose another folder",
                o->out);
    }
    comm_broadcast(r->grid.all, &empty, sizeof empty, 0);
    comm_broadcast(r->grid.all, &looks, sizeof looks, 0);
    if (r->folder.fd < 0) r->folder = run_folder_look(o->out);
    r->writes = !looks;
    int64_t found = empty ? -1 : checkpoint_find(r->grid.all, &r->folder);
    if (looks && found < 0)
        die("--out %s has no checkpoint yet|wait for the run's first one (SIGUSR1 makes it save)",
            o->out);
    return found;
}

static void save(Run *r, int64_t step) {
    const Options *o = r->o;
    const Trainer *t = r->trainer;
    double begin = now_seconds();
    cJSON *trainer = resume_json(t, o, r->data);
    SaveOptions s = options_save(o);
    report_sync(&r->report);
    int64_t bytes =
        checkpoint_save(r->checkpoint, &r->folder, step, s, t->optimizer.state, trainer);
    cJSON_Delete(trainer);
    if (t->g->rank) return;
    printf("saved %s/checkpoints/step_%lld: %.1f MB in %.2f s%s\n", o->out, (long long)step,
           (double)bytes / 1e6, now_seconds() - begin,
           t->router.bias
               ? " (the selection bias is in trainer.json; transformers will not apply it)"
               : "");
    fflush(stdout);
}

// Evaluates every part of --val and reports it. Returns 0 on all ranks, with *fault on those that
// saw it, where a validation file cannot be read or is no longer the same.
static int evaluate(Run *r, int64_t step, Fault *fault) {
    int n = loader_sources(r->val);
    double *loss = (double *)xmalloc(n * sizeof(double), "validation losses");
    double sum = 0;
    double all = 0;
    double targets;
    for (int i = 0; i < n; i++) {
        int64_t wanted = r->o->eval_batches * r->o->batch;
        int64_t have = loader_source(r->val, i)->windows;
        loss[i] =
            trainer_evaluate(r->trainer, r->val, i, wanted < have ? wanted : have, &targets, fault);
        if (targets > 0) sum += loss[i] * targets;
        all += targets;
    }
    int good = !fault || comm_max(r->grid.all, fault->what != 0) == 0;
    if (good) report_evaluation(&r->report, step, n > 1 ? sum / all : loss[0], r->val, loss);
    free(loss);
    return good;
}

// Text of the model as it is after `step` updates; with `draw` as the step of its random numbers.
static void sample(Run *r, int64_t step, int n, int64_t draw) {
    const Options *o = r->o;
    char *text = generate(r->trainer, r->tokens, o->prompt, n, o->temperature, draw);
    if (text) report_sample(&r->report, step, text);
    free(text);
}

// 1 at every multiple of an interval; an interval of 0 is never.
static int due(int64_t step, int64_t every) { return every && step % every == 0; }

static StepResult update(Run *r, int64_t step, double lr) {
    Trainer *t = r->trainer;
    if (step != r->o->profile) return trainer_step(t, r->data, step, lr);
    free(grid_traffic(t->g, 1));
    Profile *profile = profile_start(t->g->all);
    StepResult s = trainer_step(t, r->data, step, lr);
    profile_print(profile, t->g->rank == 0 ? stdout : 0);
    if (*r->o->out) profile_trace(profile, &r->folder, step);
    profile_free(profile);
    char *traffic = grid_traffic(t->g, 0);
    if (t->g->rank == 0) printf("%s", traffic);
    free(traffic);
    return s;
}

// Returns the last update that was made.
static int64_t train(Run *r) {
    const Options *o = r->o;
    Trainer *t = r->trainer;
    Schedule schedule = options_schedule(o);
    if (r->val && r->first == 0) evaluate(r, 0, 0);
    r->report.begin = now_seconds();
    if (r->first < o->steps && *o->dump) t->dump = dump_open(o->dump, t);
    if (r->first < o->steps && o->trace_token >= 0) t->trace = trace_open(t, o->trace_token);
    if (r->first < o->steps)
        t->routing = routing_open(t, o->routing_record, o->routing_replay, r->first + 1, o->steps);
    for (int64_t step = r->first + 1; step <= o->steps; step++) {
        double begin = now_seconds();
        StepResult s = update(r, step, o->lr * schedule_factor(&schedule, step));
        int show = due(step, o->router_every);
        int last = step == o->steps;
        report_step(&r->report, t, step, &s, now_seconds() - begin, show);
        if (s.nonfinite && !o->skip_nonfinite) trainer_die_nonfinite(t, step);
        if (show && t->g->rank == 0 && t->m->c.n_moe) report_heat_map(t, stdout);
        if (t->trace) trace_close(t, r->tokens);
        // The next update's tokens are read while this one can still be saved.
        Fault fault = { 0, 0 };
        int asks = signal_asked();
        if (!last && !trainer_read(t, r->data, step + 1, &fault)) asks = DATA_CHANGED;
        if (r->folder.moved) asks = FOLDER_MOVED;
        int asked = (int)comm_max(t->g->all, asks);
        int ends = asked >= SIGNAL_END;
        if (r->val && !ends && (last || due(step, o->eval_every)) && !evaluate(r, step, &fault)) {
            asked = DATA_CHANGED;
            ends = 1;
        }
        if (!ends && due(step, o->sample_every)) sample(r, step, 128, step);
        if (last || ends) report_sources(&r->report, step, r->data, step * o->batch);
        if (r->writes && (last || asked || due(step, o->save_every))) save(r, step);
        if (asked == FOLDER_MOVED)
            die("--out %s leads to another folder than it did: it was renamed or unmounted; update "
                "%lld is saved where it is now|give the folder its name back and --resume",
                o->out, (long long)step);
        if (fault.what)
            die("%s; update %lld is %s|%s", fault.what, (long long)step,
                *o->out ? "saved" : "not saved, without --out", fault.hint);
        if (asked == DATA_CHANGED) comm_barrier(t->g->all); // the rank that saw it ends all
        if (!ends) continue;
        if (t->g->rank == 0)
            printf("stopped by a signal after update %lld%s\n", (long long)step,
                   *o->out ? "; --resume continues" : "; nothing saved without --out");
        return step;
    }
    return r->first > o->steps ? r->first : o->steps;
}

// Weights from the checkpoint of the run, from the model, or from random numbers.
static void fill_weights(Run *r, const char *resumed, const cJSON *trainer) {
    const OptimizerState *state = r->trainer->optimizer.state;
    if (r->first > 0) {
        checkpoint_resume(r->checkpoint, resumed, state);
        resume_restore(r->trainer, trainer, r->first);
        int done = r->o->steps && r->first >= r->o->steps;
        if (r->grid.rank == 0)
            printf("resumed from %s%s\n", resumed,
                   done ? ": --steps asks for no more updates" : "");
    } else if (*r->o->model)
        checkpoint_load_model(r->checkpoint, r->o->model, state);
    else
        trainer_init(r->trainer);
}

static Loader *open_data(const FileList *files, const Options *o, const Config *c, int validation) {
    LoaderOptions l = { (int)o->seq_len,
                        validation ? 0 : (uint64_t)o->seed,
                        validation ? 0 : o->shuffle,
                        c->V,
                        (LossMask)o->loss_mask,
                        validation };
    return files->n ? loader_open(files->name, files->n, l) : 0;
}

// The table of token texts: the one given, the one beside a file of the training or validation
// data, the tokenizer of the model, else bytes. A table that nothing will use is not read.
static Tokens *open_tokens(const Run *r) {
    const Options *o = r->o;
    const Loader *loader[] = { r->data, r->val };
    char *table = *o->tokens ? xasprintf("%s", o->tokens) : 0;
    for (int i = 0; i < 2 && !table; i++)
        for (int k = 0; loader[i] && k < loader_files(loader[i]) && !table; k++)
            table = tokens_beside(loader_file(loader[i], k));
    const char *bytes = r->data ? loader_bytes(r->data) : 0;
    if (!bytes && r->val) bytes = loader_bytes(r->val);
    int used = o->generate || o->sample_every || o->trace_token >= 0;
    char *beside = xasprintf("%s/tokenizer.json", o->model);
    int there = !access(beside, F_OK) || errno != ENOENT;
    if (!table && !bytes && *o->model && used && there) {
        table = beside;
        beside = 0;
    }
    const char *warning = bytes ? bytes : "the prompt, for want of a table of token texts,";
    if (r->grid.rank == 0 && r->model.c.V > 512 && (bytes || (used && !table)))
        printf("warning    %s is read as bytes, but the model's vocabulary has %d ids: use the "
               "model's tokenizer (data/tokenize.py --tokenizer; --tokens)\n",
               warning, r->model.c.V);
    Tokens *tokens = tokens_open(table);
    free(table);
    free(beside);
    return tokens;
}

// A prompt that has no tokens would else end the run at its first sample.
static void check_prompt(const Options *o, const Tokens *tokens, const Config *c) {
    int64_t n = tokens_encode(tokens, 0, 0, o->prompt, strlen(o->prompt));
    int *ids = (int *)xcalloc(n + 1, sizeof *ids, "prompt");
    tokens_encode(tokens, ids, n, o->prompt, strlen(o->prompt));
    for (int64_t i = 0; i < n; i++)
        if (ids[i] >= c->V)
            die("--prompt has token %d, the vocabulary %d entries|"
                "use the decode table of this model (--tokens)",
                ids[i], c->V);
    free(ids);
}

static void run_free(Run *r) {
    report_close(&r->report);
    run_folder_close(&r->folder);
    checkpoint_free(r->checkpoint);
    arena_free(&r->staging);
    routing_close(r->trainer->routing);
    trainer_free(r->trainer);
    tokens_close(r->tokens);
    loader_close(r->data);
    loader_close(r->val);
    model_free(&r->model);
}

// ---- commands -------------------------------------------------------------------------------
// The path of the model's config.json; "" for a self-test without a model.
static char *config_path(const Options *o) {
    return *o->model ? xasprintf("%s/config.json", o->model) : xasprintf("%s", o->init);
}

static Config open_config(Options *o, const char *path) {
    Config c;
    memset(&c, 0, sizeof c);
    if (*o->model) config_check_folder(o->model);
    if (*path) c = config_read(path);
    if (!o->seq_len) o->seq_len = c.max_positions < 512 ? c.max_positions : 512;
    return c;
}

// A config that ties the head to the embedding, beside a head that differs, is not the truth.
static void keep_own_head(Config *c, const Options *o, Comm *all) {
    int own = comm_world_rank() == 0 && checkpoint_has_own_head(o->model);
    if (comm_max(all, own) == 0) return;
    c->tied = 0;
    if (comm_world_rank() == 0)
        warn("%s: lm_head.weight differs from model.embed_tokens.weight though config.json ties "
             "them: it is kept as a head of its own",
             o->model);
}

static Grid open_grid(Options *o, const Config *c) {
    Grid grid = grid_build(c, (int)o->dp, (int)o->fsdp, (int)o->ep, (Dispatch)o->dispatch,
                           o->attention == 1);
    options_default_batch(o, &grid);
    return grid;
}

// --plan: memory, traffic and estimated time of a layout on a machine that need not be this one.
static void command_plan(Options *o) {
    char *path = config_path(o);
    Config c = open_config(o, path);
    if (comm_world_rank() == 0) {
        Machine machine = plan_machine(o->plan_device);
        if (o->gpu_mem > 0) machine.memory = o->gpu_mem * 1073741824.0;
        if (o->gpus_per_node) machine.per_node = (int)o->gpus_per_node;
        if (c.tied && *o->model && checkpoint_has_own_head(o->model)) c.tied = 0;
        Grid grid = grid_plan(&c, o->world ? (int)o->world : comm_world_size(), (int)o->dp,
                              (int)o->fsdp, (int)o->ep, (Dispatch)o->dispatch, o->attention == 1);
        options_default_batch(o, &grid);
        StepOptions step = options_step(o, &c);
        // --recompute auto fills the planned machine, not this one.
        if (!step.memory) step.memory = machine.memory;
        plan_print(stdout, &c, &grid, step, options_optimizer(o), &machine);
    }
    config_free(&c);
    free(path);
}

// --selftest: returns the program's exit status.
static int command_selftest(Options *o) {
    char *path = config_path(o);
    Config c = open_config(o, path);
    Grid grid = open_grid(o, &c);
    int failed = kernel_check(grid.rank == 0) + comm_selftest(&grid, stdout);
    config_free(&c);
    free(path);
    return failed != 0;
}

// A run: trains, or with --steps 0 converts, evaluates and generates.
static void command_train(Options *o) {
    char *path = config_path(o);
    Run r;
    memset(&r, 0, sizeof r);
    r.o = o;
    Config config = open_config(o, path);
    r.grid = open_grid(o, &config);
    if (o->kernel_check) comm_check(&r.grid);
    if (config.tied && *o->model) keep_own_head(&config, o, r.grid.all);
    r.model = model_build(config, grid_shard_spec(&r.grid));
    int64_t found = open_out(&r);
    r.first = found > 0 ? found : 0;
    char *resumed = found >= 0 ? checkpoint_folder(o->out, found) : 0;
    cJSON *trainer = resumed ? checkpoint_trainer(resumed) : 0;
    r.data = open_data(&o->train, o, &config, 0);
    r.val = open_data(&o->val, o, &config, 1);
    r.tokens = open_tokens(&r);
    // Before anything under --out is touched, and before weights are loaded.
    FILE *screen = r.grid.rank == 0 ? stdout : 0;
    if (trainer) resume_check(trainer, o, &config, r.data, resumed, found, screen);
    if (o->generate || (o->sample_every && o->steps)) check_prompt(o, r.tokens, &config);
    double peak = device_peak_flops();
    r.trainer = trainer_create(&r.model, &r.grid, options_step(o, &config), options_optimizer(o), 0,
                               screen);
    r.staging = arena_counting("checkpoint");
    checkpoint_free(checkpoint_create(&r.model, r.grid.all, r.grid.dp_rank == 0, &r.staging));
    arena_commit(&r.staging);
    r.checkpoint = checkpoint_create(&r.model, r.grid.all, r.grid.dp_rank == 0, &r.staging);
    if (r.writes)
        checkpoint_check_room(r.checkpoint, &r.folder, options_save(o), r.trainer->optimizer.state);
    int again = r.val && r.first == 0;
    r.report = report_open(r.trainer, r.writes ? &r.folder : 0, r.first, o->steps, again, peak);
    report_start(&r.report, r.trainer, o, path, r.data, r.val);
    if (r.writes && r.grid.rank == 0) report_limits(&r.model.c, o->save_layout);
    fill_weights(&r, resumed, trainer);
    cJSON_Delete(trainer);
    free(resumed);
    free(path);
    catch_signals();
    int64_t last = r.first;
    if (o->steps > 0)
        last = train(&r);
    else {
        if (r.val) evaluate(&r, r.first, 0);
        if (r.writes && found < 0) save(&r, 0);
    }
    if (o->generate) sample(&r, last, (int)o->generate, -1);
    run_free(&r);
    device_finish();
}

// Starts what every command needs: the ranks, then this rank's device and threads.
static void start(const Options *o) {
    CommOptions comm = { o->timeout, o->force_comm, o->check_comm };
    comm_start(comm);
    int threads = grid_threads((int)o->threads); // NCCL knows the ranks of this machine only now
    if (o->plan && !o->threads && o->world > comm_world_size()) {
        threads /= (int)o->world; // what a rank of that world would get here
        if (threads < 1) threads = 1;
    }
    // A plan needs no GPU, but the number of threads.
    if (!o->plan || !strcmp(device_backend(), "cpu")) device_init(comm_local_rank(), threads);
    attention_select(o->attention_kernel);
    if (o->kernel_check && !o->plan && !o->selftest) kernel_check(0);
}

int main(int argc, char **argv) {
    device_prepare(argv);
    ignore_signals();
    comm_init(&argc, &argv);
    Options o = options_parse(argc, argv);
    int status = 0;
    if (o.help || argc == 1) {
        if (comm_world_rank() == 0) options_help(stdout);
    } else if (*o.verify) {
        if (comm_world_rank() == 0) checkpoint_verify(o.verify, stdout);
    } else {
        options_check(&o);
        start(&o);
        if (o.plan)
            command_plan(&o);
        else if (o.selftest)
            status = command_selftest(&o);
        else
            command_train(&o);
    }
    options_free(&o);
    comm_finish();
    return status;
}
