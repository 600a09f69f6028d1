// train_moe: trains Qwen3-MoE. This file is the program: options, the loop over updates,
// evaluation, samples, saving. The update itself is model/step.c.
//
//   make train_moe && ./train_moe --init model/configs/tiny.json --train text.txt --steps 200 --out
//   runs/first mpirun -np 4 ./train_moe --model DIR --train 'shards/*.bin' --ep 2 --fsdp 2 --out
//   runs/second
//
// The common subset of C11 and C++17: nvcc builds it for GPUs, `cc -x c` for CPUs.
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#include "kernels/fail.h"
#include "model/checkpoint.h"
#include "model/checkpoint_folder.h"
#include "model/dump.h"
#include "model/generate.h"
#include "model/options.h"
#include "model/plan.h"
#include "model/profile.h"
#include "model/report.h"
#include "model/trace.h"
#include "parallel/selftest.h"
#include <cjson/cJSON.h>
#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

// ---- signals: SIGTERM and SIGINT end the run after the update in hand, with a checkpoint; SIGUSR1
// saves and goes on ----
enum { SIGNAL_NONE, SIGNAL_SAVE, SIGNAL_END };
static volatile sig_atomic_t save_asked, end_asked; // two flags: clearing one cannot lose the other
static void on_signal(int s) {
    if (s == SIGUSR1)
        save_asked = 1;
    else
        end_asked = 1;
}

static void catch_signals(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = on_signal;
    sigaction(SIGTERM, &action, 0);
    sigaction(SIGINT, &action, 0);
    sigaction(SIGUSR1, &action, 0);
    signal(
        SIGXFSZ,
        SIG_IGN); // a file-size limit is then an error of the write, with a message, not a signal
}

// ---- from options to the model --------------------------------------------------------------
static void check_options(const Options *o) {
    if (!*o->model == !*o->init && !(o->selftest && !*o->model))
        die("%s|give --model DIR (a Hugging Face checkpoint) or --init CONFIG.json (from scratch)",
            *o->model ? "both --model and --init were given" : "no model was given");
    const struct {
        const char *name;
        int64_t value, least;
    } counts[] = {
        { "seq-len", o->seq_len, 0 },
        { "batch", o->batch, 0 },
        { "micro-batch", o->micro_batch, 0 },
        { "rounds", o->rounds, 1 },
        { "steps", o->steps, 0 },
        { "eval-every", o->eval_every, 0 },
        { "eval-batches", o->eval_batches, 1 },
        { "save-every", o->save_every, 0 },
        { "keep", o->keep, 0 },
        { "generate", o->generate, 0 },
        { "dp", o->dp, 1 },
        { "fsdp", o->fsdp, 0 },
        { "ep", o->ep, 1 },
        { "threads", o->threads, 0 },
        { "sample-every", o->sample_every, 0 },
        { "router-every", o->router_every, 0 },
        { "profile", o->profile, 0 },
        { "trace-token", o->trace_token, -1 },
        { "world", o->world, 0 },
        { "gpus-per-node", o->gpus_per_node, 0 },
    };
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
        if (counts[i].value < counts[i].least || counts[i].value > INT32_MAX)
            die("--%s %lld is out of range|give a number of at least %lld", counts[i].name,
                (long long)counts[i].value, (long long)counts[i].least);
    if (o->lr < 0 || o->weight_decay < 0 || o->grad_clip < 0 || o->eps < 0)
        die("--lr, --weight-decay, --grad-clip and --eps cannot be negative|give 0 or more");
    if (o->z_coef < 0 || o->temperature < 0 || o->gpu_mem < 0)
        die("--z-coef, --temperature and --gpu-mem cannot be negative|give 0 or more");
    if (o->beta1 < 0 || o->beta1 >= 1 || o->beta2 < 0 || o->beta2 >= 1 || o->momentum < 0 ||
        o->momentum >= 1)
        die("--beta1, --beta2 and --momentum lie in [0, 1)|give such numbers");
    if (o->seed > 999999999999999 || o->seed < -999999999999999)
        die("--seed %lld has more than 15 digits, which trainer.json would round|give a shorter one",
            (long long)o->seed);
    if (o->final_lr < 0 || o->final_lr > 1)
        die("--final-lr %g is a fraction of --lr|give a number from 0 to 1", o->final_lr);
    if (o->timeout <= 0) die("--timeout %g|give seconds above 0", o->timeout);
    if (o->steps > 0 && !o->train.n && !o->plan && !o->selftest)
        die("no training data was given|add --train FILE..., or --steps 0 to convert, evaluate or generate only");
    if (o->resume && !*o->out) die("--resume needs the folder of the run|add --out DIR");
    if (o->balance && o->balance_rate <= 0)
        die("--balance-rate %g|give a number above 0", o->balance_rate);
    save_dtype_parse(o->save_dtype);
}

// --batch 0: 8 sequences, or the next number that ranks, rounds and micro-batches divide.
static void default_batch(Options *o, const Grid *g) {
    int64_t unit = g->data_ranks * o->rounds * (o->micro_batch ? o->micro_batch : 1);
    if (!o->batch) o->batch = (8 + unit - 1) / unit * unit;
}

static StepOptions step_options(const Options *o, const Config *c) {
    StepOptions s;
    memset(&s, 0, sizeof s);
    s.T = (int)o->seq_len;
    s.batch = o->batch;
    s.micro_batch = (int)o->micro_batch;
    s.rounds = (int)o->rounds;
    s.recompute = (Recompute)o->recompute;
    s.update_layer = o->update;
    s.clip = o->grad_clip;
    s.aux_coef =
        !strcmp(o->aux_coef, "config") ? c->aux_coef : options_real("aux-coef", o->aux_coef);
    if (s.aux_coef < 0) die("--aux-coef %g cannot be negative|give 0 or more", s.aux_coef);
    s.z_coef = o->z_coef;
    s.aux_per_layer = o->aux_pool;
    s.ignore_target =
        o->ignore_target < 0 ? -2 : (int)o->ignore_target; // -1 marks ignored targets themselves
    s.skip_nonfinite = o->skip_nonfinite;
    s.expert_grad_scale = o->expert_grad_scale;
    s.balance_rate = o->balance ? o->balance_rate : 0;
    s.memory = (size_t)(o->gpu_mem * 1073741824.0);
    s.seed = (uint64_t)o->seed;
    return s;
}

// Without updates there is nothing to remember: a conversion needs memory and disk for weights, not
// for moments.
static OptimizerOptions optimizer_options(const Options *o) {
    if (!o->steps) {
        OptimizerOptions none = { OPT_SGD, 0, 0, 0, 0, 0, 0, o->master, (uint64_t)o->seed };
        return none;
    }
    OptimizerOptions p = { (OptimizerKind)o->optimizer,
                           o->lr,
                           o->momentum,
                           o->beta1,
                           o->beta2,
                           o->eps,
                           o->weight_decay,
                           o->master,
                           (uint64_t)o->seed };
    return p;
}

static Schedule schedule_options(const Options *o) {
    Schedule s = { (ScheduleKind)o->schedule, o->steps,
                   options_count("warmup", o->warmup, o->steps),
                   options_count("decay", o->decay, o->steps), o->final_lr };
    if (s.warmup < 0) die("--warmup %s is negative|give a count or a ratio", o->warmup);
    if (s.decay < 0) die("--decay %s is negative|give a count or a ratio", o->decay);
    return s;
}

// ---- the folder of a run --------------------------------------------------------------------
static int folder_is_empty(const char *path) {
    DIR *d = opendir(path);
    struct dirent *e;
    int empty = 1;
    if (!d && errno == ENOENT) return 1;
    if (!d)
        die("--out %s: cannot read the folder: %s|choose a folder that this user may read and write",
            path, strerror(errno));
    while ((e = readdir(d)))
        if (strcmp(e->d_name, ".") && strcmp(e->d_name, "..")) empty = 0;
    closedir(d);
    return empty;
}

// The newest checkpoint, -1 where there is none. Rank 0 looks; everybody hears.
static int64_t open_folder(const Options *o, Comm *all) {
    if (!*o->out) return -1;
    int empty = 1;
    if (comm_world_rank() == 0) {
        empty = folder_is_empty(o->out);
        if (!empty && !o->resume)
            die("--out %s is not empty|add --resume to continue that run, or choose another folder",
                o->out);
        folder_make(o->out);
    }
    comm_broadcast(all, &empty, sizeof empty, 0);
    return empty ? -1 : checkpoint_find(all, o->out);
}

// A run continues with the data order, the batch and the optimizer it began with; anything else
// would be another run under the same name. Step 0 holds weights that the same seed makes again: a
// conversion had no batch and no optimizer.
static void check_resumed(const cJSON *trainer, const Options *o, const char *dir, int64_t step) {
    struct {
        const char *key;
        int64_t now;
    } same[] = { { "seed", o->seed },
                 { "batch", o->batch },
                 { "seq_len", o->seq_len },
                 { "shuffle", o->shuffle } };
    for (int i = 0; i < (step ? 4 : 1); i++) {
        int64_t was = (int64_t)trainer_number(trainer, same[i].key);
        if (was == same[i].now) continue;
        if (i == 3)
            die("%s was trained with --shuffle %s|resume with the same value, or start a new --out",
                dir, was ? "on" : "off");
        die("%s was trained with --%s %lld, now it is %lld|resume with the same value, or start a new --out",
            dir, i == 2 ? "seq-len" : same[i].key, (long long)was, (long long)same[i].now);
    }
    const char *optimizer = options_choice(o, "optimizer");
    if (step && strcmp(trainer_text(trainer, "optimizer"), optimizer))
        die("%s was trained with --optimizer %s, now it is %s|resume with the same optimizer, or start a new --out",
            dir, trainer_text(trainer, "optimizer"), optimizer);
}

static void restore_trainer(Trainer *t, const cJSON *trainer) {
    t->updates = (int64_t)trainer_number(trainer, "updates");
    t->previous_norm = trainer_number(trainer, "previous_norm");
    const cJSON *bias = cJSON_GetObjectItemCaseSensitive(trainer, "router_bias");
    size_t n = (size_t)t->m->c.n_moe * (size_t)t->m->c.E;
    if (!t->bias || !bias) return;
    if ((size_t)cJSON_GetArraySize(bias) != n)
        die("trainer.json has %d router biases, the model needs %zu|the checkpoint is of another model",
            cJSON_GetArraySize(bias), n);
    float *value = (float *)xmalloc(n * sizeof(float), "router bias");
    size_t i = 0;
    for (const cJSON *b = bias->child; b; b = b->next) value[i++] = (float)b->valuedouble;
    trainer_set_bias(t, value, n);
    free(value);
}

static void save(Checkpoint *k, const Trainer *t, const Options *o, int64_t step) {
    double begin = now_seconds();
    cJSON *trainer = cJSON_CreateObject();
    cJSON_AddNumberToObject(trainer, "seed", (double)o->seed);
    cJSON_AddNumberToObject(trainer, "batch", (double)o->batch);
    cJSON_AddNumberToObject(trainer, "seq_len", (double)o->seq_len);
    cJSON_AddNumberToObject(trainer, "shuffle", o->shuffle);
    cJSON_AddStringToObject(trainer, "optimizer", options_choice(o, "optimizer"));
    cJSON_AddNumberToObject(trainer, "updates", (double)t->updates);
    cJSON_AddNumberToObject(trainer, "previous_norm", t->previous_norm);
    if (t->bias) {
        cJSON *bias = cJSON_AddArrayToObject(trainer, "router_bias");
        for (int i = 0; i < t->m->c.n_moe * t->m->c.E; i++)
            cJSON_AddItemToArray(bias, cJSON_CreateNumber((double)t->host_bias[i]));
    }
    SaveOptions s = { save_dtype_parse(o->save_dtype), o->save_layout, (int)o->keep, 0 };
    int64_t bytes = checkpoint_save(k, o->out, step, s, t->optimizer.state, trainer);
    cJSON_Delete(trainer);
    if (t->g->rank == 0) {
        printf("saved %s/checkpoints/step_%lld: %.1f MB in %.2f s%s\n", o->out, (long long)step,
               (double)bytes / 1e6, now_seconds() - begin,
               t->bias ? " (the selection bias is in trainer.json; transformers will not apply it)"
                       : "");
        fflush(stdout);
    }
}

static void plan(Options *o, const Config *config) {
    if (comm_world_rank()) return;
    Machine machine = plan_machine(o->plan_device);
    if (o->gpu_mem > 0) machine.memory = o->gpu_mem * 1073741824.0;
    if (o->gpus_per_node) machine.per_node = (int)o->gpus_per_node;
    Grid grid = grid_plan(config, o->world ? (int)o->world : comm_world_size(), (int)o->dp,
                          (int)o->fsdp, (int)o->ep, (Dispatch)o->dispatch, o->attention == 1);
    default_batch(o, &grid);
    StepOptions step = step_options(o, config);
    if (!step.memory)
        step.memory =
            (size_t)machine.memory; // --recompute auto fills the planned machine, not this one
    plan_print(stdout, config, &grid, step, optimizer_options(o), &machine);
}

// ---- the run --------------------------------------------------------------------------------
static int64_t evaluation_windows(const Options *o, const Loader *val) {
    int64_t wanted = o->eval_batches * o->batch, have = loader_windows(val);
    return wanted < have ? wanted : have;
}

static void train(Trainer *t, const Options *o, Report *report, Checkpoint *checkpoint,
                  Loader *data, Loader *val, const Tokens *tokens, int64_t first) {
    Schedule schedule = schedule_options(o);
    if (val && first == 0)
        report_evaluation(report, 0, trainer_evaluate(t, val, evaluation_windows(o, val)));
    report->begin = now_seconds();
    Profile *profile = 0;
    for (int64_t step = first + 1; step <= o->steps; step++) {
        if (step == first + 1 && *o->dump) t->dump = dump_open(o->dump, t);
        if (step == first + 1 && o->trace_token >= 0) t->trace = trace_open(t, o->trace_token);
        if (step == o->profile) {
            free(grid_traffic(t->g, 1));
            profile = profile_start();
        }
        double begin = now_seconds();
        StepResult s = trainer_step(t, data, step, o->lr * schedule_factor(&schedule, step));
        if (step == o->profile) {
            profile_print(profile, t->g->rank == 0 ? stdout : 0);
            char *traffic = grid_traffic(t->g, 0);
            if (t->g->rank == 0) printf("%s", traffic);
            free(traffic);
        }
        int show = o->router_every && step % o->router_every == 0;
        report_step(report, t, step, &s, now_seconds() - begin, show);
        if (s.nonfinite && !o->skip_nonfinite) trainer_die_nonfinite(t, step);
        if (show && t->g->rank == 0 && t->m->c.n_moe) report_heat_map(t, stdout);
        if (t->trace) trace_close(t, tokens);
        int save_here = save_asked;
        if (save_here) save_asked = 0;
        int last = step == o->steps, asked = (int)comm_max(t->g->all, end_asked   ? SIGNAL_END
                                                                      : save_here ? SIGNAL_SAVE
                                                                                  : SIGNAL_NONE);
        if (val && asked != SIGNAL_END && (last || (o->eval_every && step % o->eval_every == 0)))
            report_evaluation(report, step, trainer_evaluate(t, val, evaluation_windows(o, val)));
        if (o->sample_every && asked != SIGNAL_END && step % o->sample_every == 0)
            generate(t, tokens, o->prompt, 128, o->temperature, step);
        if (*o->out && (last || asked || (o->save_every && step % o->save_every == 0)))
            save(checkpoint, t, o, step);
        if (asked == SIGNAL_END) {
            if (t->g->rank == 0)
                printf("stopped by a signal after update %lld%s\n", (long long)step,
                       *o->out ? "; --resume continues" : "; nothing saved without --out");
            return;
        }
    }
}

int main(int argc, char **argv) {
    comm_init(&argc, &argv);
    Options o = options_parse(argc, argv);
    if (o.help || argc == 1) {
        if (comm_world_rank() == 0) options_help(stdout);
        comm_finish();
        return 0;
    }
    check_options(&o);
    CommOptions comm = { o.timeout, o.force_comm, o.check_comm };
    comm_start(comm);
    int threads = grid_threads((int)o.threads); // NCCL knows the ranks of this machine only now
    if (o.plan && !o.threads && o.world > comm_world_size())
        threads = threads > o.world ? threads / (int)o.world
                                    : 1; // what a rank of that world would get here
    if (!o.plan || !strcmp(device_backend(), "cpu"))
        device_init(comm_local_rank(), threads); // a plan needs no GPU, but the number of threads
    attention_select(o.attention_kernel);
    char *path = *o.model ? xasprintf("%s/config.json", o.model) : xasprintf("%s", o.init);
    Config config;
    memset(&config, 0, sizeof config); // --selftest needs no model
    if (*path) config = config_read(path);
    if (!o.seq_len) o.seq_len = config.max_positions < 512 ? config.max_positions : 512;
    if (o.plan) {
        plan(&o, &config);
        config_free(&config);
        free(path);
        comm_finish();
        return 0;
    }
    Grid grid = grid_build(&config, (int)o.dp, (int)o.fsdp, (int)o.ep, (Dispatch)o.dispatch,
                           o.attention == 1);
    default_batch(&o, &grid);
    if (o.selftest) {
        int failed = comm_selftest(&grid, stdout);
        config_free(&config);
        free(path);
        comm_finish();
        return failed != 0;
    }
    Model model = model_build(config, grid_shard_spec(&grid));
    int64_t found = open_folder(&o, grid.all), first = found > 0 ? found : 0;
    char *resumed = found >= 0 ? checkpoint_folder(o.out, found) : 0;
    cJSON *trainer = resumed ? checkpoint_trainer(resumed) : 0;
    if (trainer)
        check_resumed(trainer, &o, resumed, found); // before anything under --out is touched
    Loader *data = o.train.n ? loader_open(o.train.name, o.train.n, (int)o.seq_len,
                                           (uint64_t)o.seed, o.shuffle, config.V)
                             : 0;
    Loader *val = o.val.n ? loader_open(o.val.name, o.val.n, (int)o.seq_len, 0, 0, config.V) : 0;
    char *table = *o.tokens   ? xasprintf("%s", o.tokens)
                  : o.train.n ? tokens_beside(o.train.name[0])
                              : 0;
    Tokens *tokens = tokens_open(table);
    double peak = device_peak_flops();
    FILE *screen = grid.rank == 0 ? stdout : 0;
    Trainer *t =
        trainer_create(&model, &grid, step_options(&o, &config), optimizer_options(&o), 0, screen);
    Arena staging = arena_counting("checkpoint");
    Checkpoint *checkpoint = checkpoint_create(&model, grid.all, grid.dp_rank == 0, &staging);
    checkpoint_free(checkpoint);
    arena_commit(&staging);
    checkpoint = checkpoint_create(&model, grid.all, grid.dp_rank == 0, &staging);
    Report report = report_open(t, o.out, first, o.steps, val && (first == 0 || !o.steps), peak);
    report_start(&report, t, &o, path, data, val);
    if (first > 0) {
        checkpoint_resume(checkpoint, resumed, t->optimizer.state);
        restore_trainer(t, trainer);
        if (screen)
            printf("resumed from %s%s\n", resumed,
                   o.steps && first >= o.steps ? ": --steps asks for no more updates" : "");
    } else if (*o.model)
        checkpoint_load_model(checkpoint, o.model, t->optimizer.state);
    else
        trainer_init(t);
    catch_signals();
    if (o.steps > 0)
        train(t, &o, &report, checkpoint, data, val, tokens, first);
    else {
        if (val)
            report_evaluation(&report, first,
                              trainer_evaluate(t, val, evaluation_windows(&o, val)));
        if (*o.out && first == 0) save(checkpoint, t, &o, 0);
    }
    if (o.generate) generate(t, tokens, o.prompt, (int)o.generate, o.temperature, -1);
    report_close(&report);
    checkpoint_free(checkpoint);
    arena_free(&staging);
    trainer_free(t);
    tokens_close(tokens);
    loader_close(data);
    loader_close(val);
    model_free(&model);
    cJSON_Delete(trainer);
    free(resumed);
    free(table);
    free(path);
    free((void *)o.train.name);
    free((void *)o.val.name);
    device_finish();
    comm_finish();
    return 0;
}
