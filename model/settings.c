// What the options mean for the model: the schedule, one update, the optimizer, a save; and what
// the table of options cannot say, which of them need or exclude each other. Contracts in
// options.h.
#include "options.h"
#include "../kernels/fail.h"
#include <string.h>

Schedule options_schedule(const Options *o) {
    Schedule s = { (ScheduleKind)o->schedule, o->steps,
                   options_count("warmup", o->warmup, o->steps),
                   options_count("decay", o->decay, o->steps), o->final_lr };
    if (s.warmup < 0) die("--warmup %s is negative|give a count or a ratio", o->warmup);
    if (s.decay < 0) die("--decay %s is negative|give a count or a ratio", o->decay);
    return s;
}

// Options that ask for something that this run never comes to.
static void check_reached(const Options *o) {
    int updates = *o->dump || *o->routing_record || *o->routing_replay || o->trace_token >= 0;
    if (o->plan || o->selftest) return;
    if (!o->steps && updates)
        die("--dump, --routing-record, --routing-replay and --trace-token are about updates, and "
            "--steps 0 makes none|give --steps 1; with --lr 0 it leaves the weights as they are");
    if (comm_world_rank()) return;
    if (o->profile > o->steps)
        warn("--profile %lld: --steps %lld ends the run before it", (long long)o->profile,
             (long long)o->steps);
    if (o->document_end >= 0 && !o->documents)
        warn("--document-end %lld means nothing without --documents mask",
             (long long)o->document_end);
}

// What the table of options cannot say: which of them need or exclude each other.
void options_check(const Options *o) {
    if (*o->model && *o->init)
        die("both --model and --init were given|"
            "--model continues a checkpoint, --init starts anew");
    if (!*o->model && !*o->init && !o->selftest)
        die("no model was given|"
            "give --model DIR (a Hugging Face checkpoint) or --init CONFIG.json");
    if (o->steps > 0 && !o->train.n && !o->plan && !o->selftest)
        die("no training data was given|"
            "add --train FILE..., or --steps 0 to convert, evaluate or generate only");
    if (o->resume && !*o->out) die("--resume needs the folder of the run|add --out DIR");
    if (o->balance && o->balance_rate <= 0)
        die("--balance-rate %g|give a number above 0", o->balance_rate);
    save_dtype_parse(o->save_dtype);
    Schedule schedule = options_schedule(o);
    if (o->steps && schedule.warmup > o->steps && comm_world_rank() == 0)
        warn("--warmup %s is longer than the run of --steps %lld: its rate is never reached",
             o->warmup, (long long)o->steps);
    if (strcmp(o->aux_coef, "config")) options_real("aux-coef", o->aux_coef);
    check_reached(o);
}

// --batch 0: 8 sequences, or the next number that ranks, rounds and micro-batches divide.
void options_default_batch(Options *o, const Grid *g) {
    int64_t unit = g->data_ranks * o->rounds * (o->micro_batch ? o->micro_batch : 1);
    if (!o->batch) o->batch = (8 + unit - 1) / unit * unit;
}

StepOptions options_step(const Options *o, const Config *c) {
    StepOptions s;
    memset(&s, 0, sizeof s);
    s.T = (int)o->seq_len;
    s.batch = o->batch;
    s.micro_batch = (int)o->micro_batch;
    s.rounds = (int)o->rounds;
    s.recompute = (Recompute)o->recompute;
    s.update_layer = o->update;
    s.clip = o->grad_clip;
    s.aux_coef = c->aux_coef;
    if (strcmp(o->aux_coef, "config")) s.aux_coef = options_real("aux-coef", o->aux_coef);
    if (s.aux_coef < 0) die("--aux-coef %g cannot be negative|give 0 or more", s.aux_coef);
    s.z_coef = o->z_coef;
    s.aux_per_layer = o->aux_pool;
    // -1 marks ignored targets themselves, so no id is asked for by -2.
    s.ignore_target = o->ignore_target < 0 ? -2 : (int)o->ignore_target;
    s.documents = o->documents;
    s.document_end = o->document_end < 0 ? c->eos : (int)o->document_end;
    if (s.documents && (s.document_end < 0 || s.document_end >= c->V))
        die("--documents mask: the model has no end-of-text token %d|"
            "give --document-end ID, from 0 to %d",
            s.document_end, c->V - 1);
    s.skip_nonfinite = o->skip_nonfinite;
    s.expert_grad_scale = o->expert_grad_scale;
    s.balance_rate = o->balance ? o->balance_rate : 0;
    s.memory = (size_t)(o->gpu_mem * 1073741824.0);
    s.seed = (uint64_t)o->seed;
    return s;
}

// Without updates there is nothing to remember: a conversion needs memory and disk for weights, not
// for moments.
OptimizerOptions options_optimizer(const Options *o) {
    OptimizerOptions p = { OPT_SGD, 0, 0, 0, 0, 0, 0, o->master, (uint64_t)o->seed };
    if (!o->steps) return p;
    p.kind = (OptimizerKind)o->optimizer;
    p.lr = o->lr;
    p.momentum = o->momentum;
    p.beta1 = o->beta1;
    p.beta2 = o->beta2;
    p.eps = o->eps;
    p.weight_decay = o->weight_decay;
    return p;
}

SaveOptions options_save(const Options *o) {
    SaveOptions s = { save_dtype_parse(o->save_dtype), o->save_layout, (int)o->keep, 0 };
    return s;
}
