// The command line. One table gives parser, help, defaults and the dump in run.json.
#ifndef MOE_OPTIONS_H
#define MOE_OPTIONS_H
#include "../kernels/types.h"
#include <stdio.h>
struct cJSON;
MOE_BEGIN_C

typedef struct { const char **name; int n; } FileList;

// kind: TEXT const char*, INT int64_t, REAL double, FLAG int (alone, or followed by on|off), CHOICE int (index into the choices), FILES FileList (values up to the next --option)
//       field             name                kind    default     choices or unit                  help
#define OPTION_TABLE(GROUP, X)                                                                                                                                  \
    GROUP("model and data")                                                                                                                                     \
    X(model,             "model",            TEXT,   "",         "DIR",                           "start from a Hugging Face checkpoint")                       \
    X(init,              "init",             TEXT,   "",         "CONFIG.json",                   "start from scratch with a Hugging Face config")              \
    X(train,             "train",            FILES,  "",         "FILE...",                       "token shards (quoted globs too) or .txt (bytes)")            \
    X(val,               "val",              FILES,  "",         "FILE...",                       "validation tokens, likewise")                                \
    X(tokens,            "tokens",           TEXT,   "",         "FILE.vocab",                    "decode table for samples (default: the one beside --train)") \
    X(seq_len,           "seq-len",          INT,    "0",        "T",                             "tokens of a sequence (0: 512, or what the model has positions for)") \
    X(batch,             "batch",            INT,    "0",        "B",                             "distinct sequences of an update over all ranks (0: 8, or the next number that divides)") \
    X(micro_batch,       "micro-batch",      INT,    "0",        "M",                             "sequences of a micro-batch on a rank (0: all of a round)")   \
    X(rounds,            "rounds",           INT,    "1",        "N",                             "passes over all layers per update, for batches larger than memory") \
    X(shuffle,           "shuffle",          CHOICE, "on",       "off|on",                        "order of windows: a permutation of (seed, epoch), or file order") \
    X(ignore_target,     "ignore-target",    INT,    "-1",       "ID",                            "targets equal to this id do not count")                      \
    X(seed,              "seed",             INT,    "1337",     "N",                             "of weights, order, stochastic rounding and samples")         \
    X(threads,           "threads",          INT,    "0",        "N",                             "threads per rank (0: cores / ranks of this machine)")        \
    GROUP("the run")                                                                                                                                            \
    X(steps,             "steps",            INT,    "100",      "N",                             "updates in all; 0 only converts, evaluates or generates")    \
    X(out,               "out",              TEXT,   "",         "DIR",                           "log.jsonl, run.json and checkpoints go here")                \
    X(resume,            "resume",           FLAG,   "off",      "",                              "continue the newest complete checkpoint under --out")        \
    X(save_every,        "save-every",       INT,    "0",        "N",                             "updates between checkpoints (0: only after the last)")       \
    X(keep,              "keep",             INT,    "0",        "N",                             "checkpoints that stay (0: all)")                             \
    X(save_dtype,        "save-dtype",       TEXT,   "",         "f32|bf16|source",               "of saved weights (default: the build's precision)")          \
    X(save_layout,       "save-layout",      CHOICE, "experts",  "experts|fused",                 "one tensor per expert, or transformers' fused 3-D tensors")  \
    X(eval_every,        "eval-every",       INT,    "0",        "N",                             "updates between evaluations (0: before the first, after the last)") \
    X(eval_batches,      "eval-batches",     INT,    "20",       "N",                             "batches of B sequences, from the start of --val")            \
    X(sample_every,      "sample-every",     INT,    "0",        "N",                             "updates between text samples (0: none)")                     \
    X(prompt,            "prompt",           TEXT,   "",         "STR",                           "what samples begin with")                                    \
    X(generate,          "generate",         INT,    "0",        "N",                             "tokens to generate at the end")                              \
    X(temperature,       "temperature",      REAL,   "0.8",      "",                              "of sampling; 0 takes the likeliest token")                   \
    GROUP("optimizer")                                                                                                                                          \
    X(optimizer,         "optimizer",        CHOICE, "adamw",    "sgd|adamw|adamw8bit",           "")                                                           \
    X(lr,                "lr",               REAL,   "3e-4",     "",                              "learning rate")                                              \
    X(momentum,          "momentum",         REAL,   "0",        "",                              "of sgd")                                                     \
    X(beta1,             "beta1",            REAL,   "0.9",      "",                              "")                                                           \
    X(beta2,             "beta2",            REAL,   "0.999",    "",                              "")                                                           \
    X(eps,               "eps",              REAL,   "1e-8",     "",                              "")                                                           \
    X(weight_decay,      "weight-decay",     REAL,   "0",        "",                              "on all but norm weights")                                    \
    X(grad_clip,         "grad-clip",        REAL,   "1",        "",                              "largest gradient norm (0: none)")                            \
    X(schedule,          "schedule",         CHOICE, "constant", "constant|linear|cosine|wsd",    "of the learning rate")                                       \
    X(warmup,            "warmup",           TEXT,   "0",        "N|ratio",                       "updates, or with a point in it a share of --steps")          \
    X(decay,             "decay",            TEXT,   "0.2",      "N|ratio",                       "wsd's last part, linear down to --final-lr")                 \
    X(final_lr,          "final-lr",         REAL,   "0",        "FRACTION",                      "of --lr, where falling schedules end")                       \
    X(update,            "update",           CHOICE, "end",      "end|layer",                     "step at the end, or each layer inside backward (clips by the previous norm)") \
    X(recompute,         "recompute",        CHOICE, "none",     "none|moe|layer|auto",           "activations made again in backward instead of kept")         \
    X(master,            "master",           CHOICE, "on",       "off|on",                        "fp32 master weights; off: stochastic rounding (bf16 builds)") \
    X(skip_nonfinite,    "skip-nonfinite",   FLAG,   "off",      "",                              "skip updates with a non-finite gradient instead of ending")  \
    GROUP("experts")                                                                                                                                            \
    X(aux_coef,          "aux-coef",         TEXT,   "config",   "F",                             "load-balancing loss (default: router_aux_loss_coef)")        \
    X(aux_pool,          "aux-pool",         CHOICE, "layers",   "layers|layer",                  "statistics pooled over layers as transformers does, or mean of layers") \
    X(z_coef,            "z-coef",           REAL,   "0",        "F",                             "router z-loss")                                              \
    X(balance,           "balance",          CHOICE, "none",     "none|bias",                     "auxiliary-loss-free balancing: a bias on selection only")    \
    X(balance_rate,      "balance-rate",     REAL,   "0.001",    "F",                             "step of that bias")                                          \
    X(expert_grad_scale, "expert-grad-scale", FLAG,  "off",      "",                              "experts' gradients times mean count / own count")            \
    GROUP("ranks")                                                                                                                                              \
    X(dp,                "dp",               INT,    "1",        "N",                             "data-parallel copies")                                       \
    X(fsdp,              "fsdp",             INT,    "0",        "N",                             "shards of each copy (0: the ranks that dp and ep leave)")    \
    X(ep,                "ep",               INT,    "1",        "N",                             "ranks that share the experts")                               \
    X(dispatch,          "dispatch",         CHOICE, "alltoall", "alltoall|allgather|allreduce",  "how tokens reach experts")                                   \
    X(attention,         "attention",        CHOICE, "data",     "data|heads",                    "every rank all heads, or heads split over ep")               \
    X(attention_kernel,  "attention-kernel", TEXT,   "auto",     "NAME",                          "of the backend")                                             \
    X(timeout,           "timeout",          REAL,   "600",      "SECONDS",                       "a rank that waits longer ends the run with a report")        \
    X(force_comm,        "force-comm",       FLAG,   "off",      "",                              "groups of one send to themselves through every call")        \
    X(check_comm,        "check-comm",       FLAG,   "off",      "",                              "compare the calls of all ranks each update; poison destinations") \
    GROUP("looking inside")                                                                                                                                     \
    X(plan,              "plan",             FLAG,   "off",      "",                              "print memory (and communication) of a layout and stop")      \
    X(world,             "world",            INT,    "0",        "W",                             "ranks to plan for (default: those of this run)")             \
    X(plan_device,       "plan-device",      TEXT,   "h200",     "h200|h100|a100|b200|cpu",       "whose speed and links --plan assumes")                       \
    X(gpus_per_node,     "gpus-per-node",    INT,    "0",        "N",                             "ranks of a machine that --plan assumes (0: as the device has)") \
    X(gpu_mem,           "gpu-mem",          REAL,   "0",        "GiB",                           "memory of a rank, for --plan and --recompute auto")          \
    X(selftest,          "selftest",         FLAG,   "off",      "",                              "build all groups, check and time every collective, stop; needs no model") \
    X(dump,              "dump",             TEXT,   "",         "FILE.safetensors",              "the first update's logits, loss, aux and gradients")         \
    X(profile,           "profile",          INT,    "0",        "STEP",                          "print where the time of that update went")                   \
    X(trace_token,       "trace-token",      INT,    "-1",       "I",                             "follow token I of the first update through the experts")     \
    X(router_every,      "router-every",     INT,    "0",        "N",                             "updates between heat maps of expert load (also in the log)") \
    X(help,              "help",             FLAG,   "off",      "",                              "this page")

#define OPTION_TEXT const char *
#define OPTION_INT int64_t
#define OPTION_REAL double
#define OPTION_FLAG int
#define OPTION_CHOICE int
#define OPTION_FILES FileList
#define OPTION_NO_GROUP(title)
#define OPTION_FIELD(field, name, kind, value, choices, help) OPTION_##kind field;
typedef struct { OPTION_TABLE(OPTION_NO_GROUP, OPTION_FIELD) } Options;

// Reads argv. Dies (naming the option, and the nearest existing one) on unknown options, missing or malformed values, values outside a choice.
Options options_parse(int argc, char **argv);
void options_help(FILE *out);
// All values as a JSON object (caller: cJSON_Delete).
struct cJSON *options_json(const Options *o);
// "12" or "0.1" of total -> updates; a value with a point (or exponent) is a ratio of total, rounded up. Dies naming the option.
int64_t options_count(const char *name, const char *value, int64_t total);
double options_real(const char *name, const char *value);
MOE_END_C
#endif
