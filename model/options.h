// The command line. One table gives the parser, the bounds, the help page, the defaults and the
// copy in run.json.
#ifndef MOE_OPTIONS_H
#define MOE_OPTIONS_H
#include "checkpoint.h"
#include "step.h"
#include <math.h>
#include <stdio.h>
struct cJSON;
MOE_BEGIN_C

typedef struct {
    const char **name;
    int n;
} FileList;

// The bounds of numbers: an int, ranks (products of two stay an int64_t, a loop over all of them is
// short), 15 decimal digits (what a JSON number keeps exactly), no bound.
#define MANY 2147483647.0
#define RANKS 1048576.0
#define DIGITS_15 999999999999999.0
#define BELOW_1 0.99999999999999988
#define ANY HUGE_VAL

// Kinds and the type of their field: TEXT const char *, INT int64_t, REAL double, FLAG int (alone,
// or followed by on|off), CHOICE int (index into the choices), FILES FileList (values up to the
// next
// --option). Least and most bound INT and REAL; other kinds have 0 there.
//    field, name, kind, default, least, most, choices or unit, help
#define OPTION_TABLE(GROUP, X)                                                                    \
    GROUP("model and data")                                                                       \
    X(model, "model", TEXT, "", 0, 0, "DIR", "start from a Hugging Face checkpoint")              \
    X(init, "init", TEXT, "", 0, 0, "CONFIG.json",                                                \
      "start from random weights with the shape of a Hugging Face config")                        \
    X(train, "train", FILES, "", 0, 0, "FILE...",                                                 \
      "token shards or .txt (bytes), globs too; mixed by weight: 'a/*.bin@0.7' b.bin@0.3")        \
    X(val, "val", FILES, "", 0, 0, "FILE...", "validation data; name=FILE... for parts")          \
    X(tokens, "tokens", TEXT, "", 0, 0, "FILE.vocab",                                             \
      "text of each token id, for samples (default: the table beside --train)")                   \
    X(seq_len, "seq-len", INT, "0", 0, MANY, "T",                                                 \
      "tokens of a sequence (0: 512, or the model's maximum if that is less)")                    \
    X(batch, "batch", INT, "0", 0, MANY, "B",                                                     \
      "sequences of an update over all ranks (0: 8, or the next that divides)")                   \
    X(micro_batch, "micro-batch", INT, "0", 0, MANY, "M",                                         \
      "sequences of a micro-batch on one rank (0: its whole share of a round)")                   \
    X(rounds, "rounds", INT, "1", 1, MANY, "N",                                                   \
      "passes over the layers per update, for batches larger than memory")                        \
    X(shuffle, "shuffle", CHOICE, "on", 0, 0, "off|on",                                           \
      "order of sequences: a permutation by (seed, epoch), or file order")                        \
    X(loss_mask, "loss-mask", CHOICE, "auto", 0, 0, "auto|off|require",                           \
      "which tokens are targets: the file x.mask beside each shard x.bin says it")                \
    X(documents, "documents", CHOICE, "join", 0, 0, "join|mask",                                  \
      "mask: attention and positions begin again after each end-of-text token")                   \
    X(document_end, "document-end", INT, "-1", -1, MANY, "ID",                                    \
      "the end-of-text token of --documents mask (-1: the config's eos_token_id)")                \
    X(ignore_target, "ignore-target", INT, "-1", -MANY, MANY, "ID",                               \
      "targets equal to this id do not count")                                                    \
    X(seed, "seed", INT, "1337", -DIGITS_15, DIGITS_15, "N",                                      \
      "seeds weights, data order, stochastic rounding and samples")                               \
    X(threads, "threads", INT, "0", 0, MANY, "N",                                                 \
      "threads per rank (0: cores / ranks of this machine)")                                      \
    GROUP("the run")                                                                              \
    X(steps, "steps", INT, "100", 0, MANY, "N",                                                   \
      "updates in all; 0: convert, evaluate or generate only")                                    \
    X(out, "out", TEXT, "", 0, 0, "DIR", "log.jsonl, run.json and checkpoints go here")           \
    X(resume, "resume", FLAG, "off", 0, 0, "",                                                    \
      "continue the newest complete checkpoint under --out")                                      \
    X(allow_changed, "allow-changed", FILES, "", 0, 0, "NAME...",                                 \
      "resume with another data, precision or config field")                                      \
    X(save_every, "save-every", INT, "0", 0, MANY, "N",                                           \
      "updates between checkpoints (0: only after the last)")                                     \
    X(keep, "keep", INT, "0", 0, MANY, "N", "checkpoints that stay (0: all)")                     \
    X(save_dtype, "save-dtype", TEXT, "", 0, 0, "f32|bf16|source",                                \
      "dtype of saved weights (default: that of the build)")                                      \
    X(save_layout, "save-layout", CHOICE, "experts", 0, 0, "experts|fused",                       \
      "one tensor per expert, or transformers' fused 3-D tensors")                                \
    X(eval_every, "eval-every", INT, "0", 0, MANY, "N",                                           \
      "updates between evaluations (0: only before the first and after the last)")                \
    X(eval_batches, "eval-batches", INT, "20", 1, MANY, "N",                                      \
      "evaluate so many times --batch sequences, from the start of --val")                        \
    X(sample_every, "sample-every", INT, "0", 0, MANY, "N",                                       \
      "updates between text samples of 128 tokens (0: none)")                                     \
    X(prompt, "prompt", TEXT, "", 0, 0, "STR", "text that samples continue")                      \
    X(generate, "generate", INT, "0", 0, MANY, "N", "tokens to generate at the end")              \
    X(temperature, "temperature", REAL, "0.8", 0, ANY, "F",                                       \
      "sampling temperature; 0: always the likeliest token")                                      \
    GROUP("optimizer")                                                                            \
    X(optimizer, "optimizer", CHOICE, "adamw", 0, 0, "sgd|adamw|adamw8bit",                       \
      "adamw8bit: 2 bytes of state a parameter instead of 8")                                     \
    X(lr, "lr", REAL, "3e-4", 0, ANY, "F", "learning rate")                                       \
    X(momentum, "momentum", REAL, "0", 0, BELOW_1, "F", "momentum of sgd")                        \
    X(beta1, "beta1", REAL, "0.9", 0, BELOW_1, "F", "decay of adamw's first moment")              \
    X(beta2, "beta2", REAL, "0.999", 0, BELOW_1, "F", "decay of adamw's second moment")           \
    X(eps, "eps", REAL, "1e-8", 0, ANY, "F", "added to sqrt(v) in adamw")                         \
    X(weight_decay, "weight-decay", REAL, "0", 0, ANY, "F", "of all parameters but norm weights") \
    X(grad_clip, "grad-clip", REAL, "1", 0, ANY, "F", "largest gradient norm (0: none)")          \
    X(schedule, "schedule", CHOICE, "constant", 0, 0, "constant|linear|cosine|wsd",               \
      "course of the learning rate over --steps")                                                 \
    X(warmup, "warmup", TEXT, "0", 0, 0, "N|ratio",                                               \
      "updates of linear warmup; with a decimal point: share of --steps")                         \
    X(decay, "decay", TEXT, "0.2", 0, 0, "N|ratio",                                               \
      "wsd: length of the final linear decay, likewise")                                          \
    X(final_lr, "final-lr", REAL, "0", 0, 1, "FRACTION",                                          \
      "learning rate at the end of a falling schedule, as a share of --lr")                       \
    X(update, "update", CHOICE, "end", 0, 0, "end|layer",                                         \
      "step all at the end, or each layer inside backward (clips by the last update's norm)")     \
    X(recompute, "recompute", CHOICE, "none", 0, 0, "none|moe|layer|auto",                        \
      "what backward computes again instead of keeping (auto: keep what fits)")                   \
    X(master, "master", CHOICE, "on", 0, 0, "off|on",                                             \
      "fp32 master weights; off: stochastic rounding (bf16 builds)")                              \
    X(skip_nonfinite, "skip-nonfinite", FLAG, "off", 0, 0, "",                                    \
      "skip updates with a non-finite gradient instead of ending")                                \
    GROUP("experts")                                                                              \
    X(aux_coef, "aux-coef", TEXT, "config", 0, 0, "F",                                            \
      "weight of the load-balancing loss (default: router_aux_loss_coef)")                        \
    X(aux_pool, "aux-pool", CHOICE, "layers", 0, 0, "layers|layer",                               \
      "its statistics pooled over layers as transformers does, or per layer")                     \
    X(z_coef, "z-coef", REAL, "0", 0, ANY, "F", "weight of the router z-loss")                    \
    X(balance, "balance", CHOICE, "none", 0, 0, "none|bias",                                      \
      "by a bias on selection only (alone: --aux-coef 0)")                                        \
    X(balance_rate, "balance-rate", REAL, "0.001", 0, ANY, "F", "step of that bias per update")   \
    X(expert_grad_scale, "expert-grad-scale", FLAG, "off", 0, 0, "",                              \
      "scale each expert's gradient by mean count / own count")                                   \
    GROUP("ranks")                                                                                \
    X(dp, "dp", INT, "1", 1, RANKS, "N", "data-parallel copies")                                  \
    X(fsdp, "fsdp", INT, "0", 0, RANKS, "N",                                                      \
      "shards of each copy (0: the ranks that dp and ep leave)")                                  \
    X(ep, "ep", INT, "1", 1, RANKS, "N", "ranks that share the experts")                          \
    X(dispatch, "dispatch", CHOICE, "alltoall", 0, 0, "alltoall|allgather|allreduce",             \
      "how tokens reach experts; all three make the same update")                                 \
    X(attention, "attention", CHOICE, "data", 0, 0, "data|heads",                                 \
      "heads: split attention heads over ep (each rank else has all heads)")                      \
    X(attention_kernel, "attention-kernel", TEXT, "auto", 0, 0, "NAME",                           \
      "auto; CPU: blas; CUDA: cudnn, flash")                                                      \
    X(timeout, "timeout", REAL, "600", 0.001, 1e9, "SECONDS",                                     \
      "longest wait for other ranks before the run ends with a report")                           \
    X(force_comm, "force-comm", FLAG, "off", 0, 0, "",                                            \
      "testing: groups of one rank send to themselves")                                           \
    X(check_comm, "check-comm", FLAG, "off", 0, 0, "",                                            \
      "debugging: compare the calls of all ranks, poison buffers in flight")                      \
    X(kernel_check, "kernel-check", FLAG, "on", 0, 0, "",                                         \
      "GPUs, at the start: each fast kernel beside a slow one, each call")                        \
    GROUP("looking inside")                                                                       \
    X(plan, "plan", FLAG, "off", 0, 0, "",                                                        \
      "print memory, traffic and estimated time of a layout, then stop")                          \
    X(world, "world", INT, "0", 0, RANKS, "W", "ranks to plan for (default: those of this run)")  \
    X(plan_device, "plan-device", TEXT, "h200", 0, 0, "h200|h100|a100|b200|cpu",                  \
      "whose speed and links --plan assumes")                                                     \
    X(gpus_per_node, "gpus-per-node", INT, "0", 0, MANY, "N",                                     \
      "ranks per machine for --plan (0: 8, cpu: 64)")                                             \
    X(gpu_mem, "gpu-mem", REAL, "0", 0, 1e9, "GiB",                                               \
      "memory of a rank, for --plan and --recompute auto")                                        \
    X(verify, "verify", TEXT, "", 0, 0, "DIR",                                                    \
      "compare every byte of a checkpoint with its checksums, then stop")                         \
    X(selftest, "selftest", FLAG, "off", 0, 0, "",                                                \
      "build all groups, check and time every collective, then stop")                             \
    X(dump, "dump", TEXT, "", 0, 0, "FILE.safetensors",                                           \
      "the first update's logits, loss, aux, routing and gradients")                              \
    X(routing_record, "routing-record", TEXT, "", 0, 0, "DIR",                                    \
      "write the experts of every token of every update to DIR/step_N.safetensors")               \
    X(routing_replay, "routing-replay", TEXT, "", 0, 0, "DIR|FILE",                               \
      "take the experts of every token from there (a file: in the first update)")                 \
    X(profile, "profile", INT, "0", 0, MANY, "STEP",                                              \
      "print where the time of that update went; --out gets it as a trace (Perfetto)")            \
    X(trace_token, "trace-token", INT, "-1", -1, MANY, "I",                                       \
      "follow token I of the first update through the experts")                                   \
    X(router_every, "router-every", INT, "0", 0, MANY, "N",                                       \
      "updates between heat maps of expert load (also in the log)")                               \
    X(help, "help", FLAG, "off", 0, 0, "", "this page")

#define OPTION_TEXT const char *
#define OPTION_INT int64_t
#define OPTION_REAL double
#define OPTION_FLAG int
#define OPTION_CHOICE int
#define OPTION_FILES FileList
#define OPTION_NO_GROUP(title)
#define OPTION_FIELD(field, name, kind, value, least, most, choices, help) OPTION_##kind field;
typedef struct {
    OPTION_TABLE(OPTION_NO_GROUP, OPTION_FIELD)
} Options;

// Reads argv. Ends the run, naming the option (and the nearest existing one), on unknown options,
// missing or malformed values, numbers out of bounds and values outside a choice.
Options options_parse(int argc, char **argv);
void options_free(Options *o);
// Prints every option with its unit or choices, its meaning and its default.
void options_help(FILE *out);
// Copies the word chosen for the CHOICE option `name` (without dashes) to `word` and returns it.
enum { OPTION_WORD = 32 };
const char *options_choice(const Options *o, const char *name, char word[OPTION_WORD]);
// Returns all values as a JSON object, which the caller deletes.
struct cJSON *options_json(const Options *o);
// Returns updates: of "12", 12; of "0.1" (a value with a point or an exponent is a ratio) or "10%",
// a tenth of `total`, rounded up. Ends the run, naming the option, where `value` is neither.
int64_t options_count(const char *name, const char *value, int64_t total);
// Returns the number in `value`. Ends the run, naming the option, where it is none or not finite.
double options_real(const char *name, const char *value);

// ---- settings.c: what the options mean for the model ----
// Ends the run where options exclude each other, one lacks another that it needs, or one asks for
// something that this run never comes to; warns (rank 0) of those that mean nothing.
void options_check(const Options *o);
// Sets --batch 0 to 8 sequences, or the next number that ranks, rounds and micro-batches divide.
void options_default_batch(Options *o, const Grid *g);
// Return what the options say of the learning rate, an update, the optimizer and a save. They end
// the run on a value that cannot be.
Schedule options_schedule(const Options *o);
StepOptions options_step(const Options *o, const Config *c);
OptimizerOptions options_optimizer(const Options *o);
SaveOptions options_save(const Options *o);
MOE_END_C
#endif
