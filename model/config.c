// Reading, checking and writing a Hugging Face config.json of model_type qwen3_moe.
//
// Absent keys take the defaults of transformers' Qwen3MoeConfig, which are not the values of the
// released models (norm_topk_prob false, 24 layers, theta 1e4). Two generations of spellings are
// read: 4.x (num_experts, torch_dtype, rope_theta, rope_scaling) and 5.x (num_local_experts, dtype,
// rope_parameters). A field that changes the mathematics and that this program does not compute
// ends the run by name: a silently ignored window or scaling would train another model.
#define _POSIX_C_SOURCE 200809L
#include "model.h"
#include "file.h"
#include "../kernels/fail.h"
#include <cjson/cJSON.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { MAX_CONFIG = 16 << 20 }; // bytes; a config is a few kilobytes

static cJSON *read_json(const char *path, char **text) {
    int64_t bytes;
    char why[JSON_WHY];
    int error = file_load(AT_FDCWD, path, 0, MAX_CONFIG, text, &bytes);
    if (error == ENOENT) file_check_link(path);
    if (error)
        die("%s: cannot open: %s|give a Hugging Face model folder, or the path of a config.json",
            path, file_why(error));
    cJSON *root = json_parse(*text, bytes, why);
    if (!root) die("%s: %s|repair the file", path, why);
    if (!cJSON_IsObject(root)) die("%s: not a JSON object|give a Hugging Face config.json", path);
    return root;
}

// ---- keys: `at` is the file for messages; a key that is null counts as absent ---------------
typedef struct {
    const cJSON *root;
    const char *at;
} Keys;

static const cJSON *get(const Keys *k, const char *name) {
    const cJSON *v = cJSON_GetObjectItemCaseSensitive(k->root, name);
    return v && !cJSON_IsNull(v) ? v : 0;
}

static double number(const Keys *k, const char *name, double absent) {
    const cJSON *v = get(k, name);
    if (!v) return absent;
    if (!cJSON_IsNumber(v) || !isfinite(v->valuedouble))
        die("%s: %s is not a number|correct this key", k->at, name);
    return v->valuedouble;
}

static int integer(const Keys *k, const char *name, int absent, int lowest) {
    double v = number(k, name, absent);
    if (v != floor(v) || v < lowest || v > 2147483647.0)
        die("%s: %s = %g must be an integer of at least %d|correct this key", k->at, name, v,
            lowest);
    return (int)v;
}

static int boolean(const Keys *k, const char *name, int absent) {
    const cJSON *v = get(k, name);
    if (!v) return absent;
    if (!cJSON_IsBool(v)) die("%s: %s must be true or false|correct this key", k->at, name);
    return cJSON_IsTrue(v);
}

// A token id, -1 where there is none. Hugging Face allows a list (several end tokens): the first
// counts.
static int token(const Keys *k, const char *name) {
    const cJSON *v = get(k, name);
    if (v && cJSON_IsArray(v)) v = cJSON_GetArrayItem(v, 0);
    if (!v) return -1;
    if (!cJSON_IsNumber(v) || v->valuedouble != floor(v->valuedouble) ||
        fabs(v->valuedouble) > 2147483647.0)
        die("%s: %s must be a token id|correct this key", k->at, name);
    return (int)v->valuedouble;
}

// rope_parameters (5.x) or rope_scaling (4.x): only "default" (or nothing) is plain rotary
// embedding.
static void check_rope(const Keys *k, const char *name) {
    const cJSON *rope = get(k, name);
    if (!rope) return;
    if (!cJSON_IsObject(rope))
        die("%s: %s must be an object or null|correct this key", k->at, name);
    const cJSON *type = cJSON_GetObjectItemCaseSensitive(rope, "rope_type");
    if (!type) type = cJSON_GetObjectItemCaseSensitive(rope, "type");
    if (type && !cJSON_IsNull(type) &&
        (!cJSON_IsString(type) || strcmp(type->valuestring, "default")))
        die("%s: %s.rope_type = \"%s\" is not supported, only \"default\"|"
            "rope scaling (yarn, linear, ...) changes the attention; train without it",
            k->at, name, cJSON_IsString(type) ? type->valuestring : "?");
    if (!type && cJSON_GetObjectItemCaseSensitive(rope, "factor"))
        die("%s: %s scales positions, which is not supported|set it to null", k->at, name);
    const cJSON *part = cJSON_GetObjectItemCaseSensitive(rope, "partial_rotary_factor");
    if (part && cJSON_IsNumber(part) && part->valuedouble != 1)
        die("%s: %s.partial_rotary_factor = %g is not supported|the whole head must rotate", k->at,
            name, part->valuedouble);
}

static double rope_theta(const Keys *k) {
    const cJSON *rope = get(k, "rope_parameters");
    const cJSON *scaling = get(k, "rope_scaling");
    Keys inner = { rope ? rope : scaling, k->at };
    double theta = number(k, "rope_theta", 10000);
    return inner.root ? number(&inner, "rope_theta", theta) : theta;
}

static void check_mathematics(const Keys *k) {
    const cJSON *v = get(k, "model_type");
    if (!v || !cJSON_IsString(v) || strcmp(v->valuestring, "qwen3_moe"))
        die("%s: model_type \"%s\" is not supported|this program trains qwen3_moe models", k->at,
            v && cJSON_IsString(v) ? v->valuestring : "(missing)");
    v = get(k, "hidden_act");
    if (v &&
        (!cJSON_IsString(v) || (strcmp(v->valuestring, "silu") && strcmp(v->valuestring, "swish"))))
        die("%s: hidden_act = \"%s\" is not supported|only silu is", k->at,
            cJSON_IsString(v) ? v->valuestring : "?");
    if (boolean(k, "attention_bias", 0))
        die("%s: attention_bias = true is not supported|"
            "qwen3_moe models have no biases; set it to false",
            k->at);
    if (number(k, "attention_dropout", 0) != 0)
        die("%s: attention_dropout = %g is not supported|set it to 0", k->at,
            number(k, "attention_dropout", 0));
    // The class ignores sliding_window (default 4096) unless use_sliding_window is set; a window
    // given as null is no window.
    const cJSON *window = cJSON_GetObjectItemCaseSensitive(k->root, "sliding_window");
    if (boolean(k, "use_sliding_window", 0) && !(window && cJSON_IsNull(window)))
        die("%s: use_sliding_window with sliding_window = %d is not supported|"
            "set use_sliding_window to false",
            k->at, integer(k, "sliding_window", 4096, 1));
    if (get(k, "quantization_config"))
        die("%s: quantization_config: quantized weights are not supported|"
            "start from the F32, BF16 or F16 checkpoint",
            k->at);
    check_rope(k, "rope_parameters");
    check_rope(k, "rope_scaling");
}

// Products of these numbers are sizes of arrays: none may pass 64 bits, a head or a layer is
// counted in an int, and a model of more tensors than this is a mistake or an attack.
static void check_sizes(const Config *c, const char *path) {
    double tensors = (double)c->L * (9 + 3.0 * c->E);
    double widest = fmax((double)c->H * c->D, fmax(2.0 * c->F, 2.0 * c->I));
    double layer = (double)c->C * (2.0 * c->H * c->D + 3.0 * c->E * c->F + 3.0 * c->I);
    if (tensors > 4e6)
        die("%s: num_hidden_layers %d x num_experts %d are %.3g tensors|"
            "Qwen3-30B-A3B has 18,867; correct these keys",
            path, c->L, c->E, tensors);
    if (widest > 1073741824 || c->L * layer + 2.0 * c->V * c->C > 1e15)
        die("%s: a model of %.3g parameters, a layer %.3g wide|"
            "correct hidden_size, head_dim, the widths or vocab_size",
            path, c->L * layer + 2.0 * c->V * c->C, widest);
}

Config config_read(const char *path) {
    Config c;
    memset(&c, 0, sizeof c);
    cJSON *root = read_json(path, &c.json);
    Keys keys = { root, path };
    Keys *k = &keys;
    check_mathematics(k);

    c.V = integer(k, "vocab_size", 151936, 1);
    c.C = integer(k, "hidden_size", 2048, 1);
    c.I = integer(k, "intermediate_size", 6144, 1);
    c.L = integer(k, "num_hidden_layers", 24, 1);
    c.H = integer(k, "num_attention_heads", 32, 1);
    c.KV = integer(k, "num_key_value_heads", 4, 1);
    if (!get(k, "head_dim") && c.C % c.H)
        die("%s: hidden_size %d is not a multiple of num_attention_heads %d and head_dim is "
            "missing|add head_dim",
            path, c.C, c.H);
    c.D = integer(k, "head_dim", c.C / c.H, 1);
    c.E = integer(k, get(k, "num_experts") ? "num_experts" : "num_local_experts", 128, 1);
    c.K = integer(k, "num_experts_per_tok", 8, 1);
    c.F = integer(k, "moe_intermediate_size", 768, 1);
    c.max_positions = integer(k, "max_position_embeddings", 32768, 1);
    c.norm_topk = boolean(k, "norm_topk_prob", 0);
    c.tied = boolean(k, "tie_word_embeddings", 0);
    c.pad = token(k, "pad_token_id");
    c.bos = token(k, "bos_token_id");
    c.eos = token(k, "eos_token_id");
    c.rope_theta = rope_theta(k);
    c.rms_eps = number(k, "rms_norm_eps", 1e-6);
    c.init_std = number(k, "initializer_range", 0.02);
    c.aux_coef = number(k, "router_aux_loss_coef", 0.001);

    if (get(k, "num_experts") && get(k, "num_local_experts") &&
        integer(k, "num_local_experts", 0, 1) != c.E)
        die("%s: num_experts %d and num_local_experts %d differ|keep one of them", path, c.E,
            integer(k, "num_local_experts", 0, 1));
    if (c.H % c.KV)
        die("%s: num_attention_heads %d is not a multiple of num_key_value_heads %d|"
            "correct one of them",
            path, c.H, c.KV);
    if (c.D % 2)
        die("%s: head_dim %d is odd, rotary embedding turns pairs|use an even head_dim", path, c.D);
    if (c.K > c.E)
        die("%s: num_experts_per_tok %d exceeds num_experts %d|correct one of them", path, c.K,
            c.E);
    if (c.pad < -1 || (c.pad == -1 && get(k, "pad_token_id")))
        c.pad += c.V; // torch's padding_idx counts a negative index from the end
    if (c.pad >= c.V || c.pad < -1)
        die("%s: pad_token_id lies outside the vocabulary of %d|correct it or set it to null", path,
            c.V);
    if (!(c.rope_theta > 0))
        die("%s: rope_theta = %g must be positive|correct this key", path, c.rope_theta);
    if (!(c.rms_eps > 0))
        die("%s: rms_norm_eps = %g must be positive|correct this key", path, c.rms_eps);
    if (!(c.init_std >= 0) || !(c.aux_coef >= 0))
        die("%s: initializer_range and router_aux_loss_coef must not be negative|"
            "correct these keys",
            path);

    check_sizes(&c, path);
    int sparse_step = integer(k, "decoder_sparse_step", 1, 1);
    const cJSON *dense = get(k, "mlp_only_layers");
    const cJSON *item = 0;
    if (dense && !cJSON_IsArray(dense))
        die("%s: mlp_only_layers must be a list of layer numbers|correct this key", path);
    c.is_moe = (unsigned char *)xmalloc(c.L, "layer kinds");
    for (int l = 0; l < c.L; l++) c.is_moe[l] = (l + 1) % sparse_step == 0;
    cJSON_ArrayForEach(item, dense) {
        if (!cJSON_IsNumber(item))
            die("%s: mlp_only_layers must be a list of layer numbers|correct this key", path);
        if (item->valuedouble >= 0 && item->valuedouble < c.L) c.is_moe[(int)item->valuedouble] = 0;
    }
    for (int l = 0; l < c.L; l++) c.n_moe += c.is_moe[l];
    cJSON_Delete(root);
    return c;
}

void config_free(Config *c) {
    free(c->is_moe);
    free(c->json);
    memset(c, 0, sizeof *c);
}

// ---- export ---------------------------------------------------------------------------------
static void set(cJSON *root, const char *name, cJSON *value) {
    if (cJSON_GetObjectItemCaseSensitive(root, name))
        cJSON_ReplaceItemInObjectCaseSensitive(root, name, value);
    else
        cJSON_AddItemToObject(root, name, value);
}

static void set_default(cJSON *root, const char *name, cJSON *value) {
    const cJSON *old = cJSON_GetObjectItemCaseSensitive(root, name);
    if (old && !cJSON_IsNull(old))
        cJSON_Delete(value);
    else
        set(root, name, value);
}

// A number that is written as a float even when it is whole: strict readers do not take an integer
// where the class declares a float.
static cJSON *real_number(double v) {
    char text[40];
    for (int digits = 15; digits <= 17; digits++) {
        snprintf(text, sizeof text, "%.*g", digits, v);
        if (strtod(text, 0) == v) break;
    }
    if (!strpbrk(text, ".e")) strcat(text, ".0");
    return cJSON_CreateRaw(text);
}

char *config_export(const Config *c, const char *dtype) {
    cJSON *root = cJSON_Parse(c->json);
    if (!root) die("config.json: not valid JSON any more|the text was changed in memory");
    static const char *gone[] = { "num_local_experts", "rope_parameters", "rope_theta",
                                  "rope_scaling", "auto_map" };
    for (size_t i = 0; i < sizeof gone / sizeof *gone; i++)
        cJSON_DeleteItemFromObjectCaseSensitive(root, gone[i]);
    cJSON *architectures = cJSON_CreateArray();
    cJSON_AddItemToArray(architectures, cJSON_CreateString("Qwen3MoeForCausalLM"));
    set(root, "architectures", architectures);
    // Written out whatever the input left to defaults: readers differ in theirs.
    struct {
        const char *name;
        int value;
    } ints[] = { { "vocab_size", c->V },
                 { "hidden_size", c->C },
                 { "intermediate_size", c->I },
                 { "num_hidden_layers", c->L },
                 { "num_attention_heads", c->H },
                 { "num_key_value_heads", c->KV },
                 { "head_dim", c->D },
                 { "num_experts", c->E },
                 { "num_experts_per_tok", c->K },
                 { "moe_intermediate_size", c->F },
                 { "max_position_embeddings", c->max_positions },
                 { "decoder_sparse_step", 1 } };
    for (size_t i = 0; i < sizeof ints / sizeof *ints; i++)
        set_default(root, ints[i].name, cJSON_CreateNumber(ints[i].value));
    set_default(root, "mlp_only_layers", cJSON_CreateArray());
    set_default(root, "norm_topk_prob", cJSON_CreateBool(c->norm_topk));
    set(root, "tie_word_embeddings", cJSON_CreateBool(c->tied));
    set_default(root, "hidden_act", cJSON_CreateString("silu"));
    set_default(root, "attention_bias", cJSON_CreateFalse());
    set_default(root, "attention_dropout", real_number(0));
    set_default(root, "use_sliding_window", cJSON_CreateFalse());
    set(root, "sliding_window", cJSON_CreateNull());
    set_default(root, "output_router_logits", cJSON_CreateFalse());
    set(root, "rope_theta", real_number(c->rope_theta));
    set(root, "rope_scaling", cJSON_CreateNull());
    set(root, "rms_norm_eps", real_number(c->rms_eps));
    set(root, "initializer_range", real_number(c->init_std));
    set(root, "router_aux_loss_coef", real_number(c->aux_coef));
    set(root, "dtype", cJSON_CreateString(dtype));
    set(root, "torch_dtype", cJSON_CreateString(dtype));
    set_default(root, "transformers_version", cJSON_CreateString("4.51.0"));
    char *text = cJSON_Print(root);
    if (!text) die("config.json: out of memory for its text|free memory");
    cJSON_Delete(root);
    return text;
}

// ---- sizes ----------------------------------------------------------------------------------
// Weights of matrix products in the layers (of each MoE layer, `experts` experts), without
// embedding and head; and of norms.
static double layer_matrices(const Config *c, double experts) {
    double attention = 2.0 * c->H * c->D * c->C + 2.0 * c->KV * c->D * c->C;
    double moe = (double)c->E * c->C + experts * 3 * c->F * c->C;
    double mlp = 3.0 * c->I * c->C;
    return c->L * attention + c->n_moe * moe + (c->L - c->n_moe) * mlp;
}
static double norm_weights(const Config *c) { return c->L * (2.0 * c->C + 2.0 * c->D) + c->C; }

double config_matrix_parameters(const Config *c) {
    return layer_matrices(c, c->K) + (double)c->V * c->C;
}

double config_active_parameters(const Config *c) {
    return config_matrix_parameters(c) + norm_weights(c);
}

double config_total_parameters(const Config *c) {
    return layer_matrices(c, c->E) + norm_weights(c) + (c->tied ? 1.0 : 2.0) * c->V * c->C;
}

double config_flops_per_token(const Config *c, double T) {
    return 6 * config_matrix_parameters(c) + 12.0 * c->L * c->H * c->D * T / 2;
}

// What people give instead: a file of the model, or a name on the hub.
void config_check_folder(const char *model) {
    struct stat st;
    if (!stat(model, &st) && !S_ISDIR(st.st_mode))
        die("--model %s is a file|give the folder that it lies in", model);
    if (stat(model, &st) && *model != '/' && *model != '.' && strchr(model, '/') &&
        strchr(model, '/') == strrchr(model, '/'))
        die("--model %s is no folder here|"
            "if it is a name on the hub: hf download %s --local-dir DIR",
            model, model);
}
