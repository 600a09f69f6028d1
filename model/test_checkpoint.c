// Checkpoints, configs and the safetensors format: numbered checks, alone on one process.
//   cc -std=c11 -o test_checkpoint model/test_checkpoint.c model/config.c model/model.c
//   model/safetensors.c model/checkpoint*.c kernels/fail.c kernels/cpu/*.c
//      parallel/comm_none.c parallel/comm.c -lcjson -lm;   ./test_checkpoint [folder with
//      fixtures]
//
// Every number in a checkpoint is a hash of (HF tensor, index, what it is): a wrong expert, row,
// part or rank cannot go unnoticed. Several ranks are played in one process: each gets the model
// cut its way, and the phases of a save are run rank after rank. Everything is compared bit for
// bit: a checkpoint has no tolerance.
#define _GNU_SOURCE
#include "checkpoint_parts.h"
#include "safetensors.h"
#include "../kernels/fail.h"
#include "../kernels/random.h"
#include <cjson/cJSON.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static int passed, failed;
static char *work; // the folder of this run

static void check(int ok, const char *format, ...) MOE_PRINTF(2, 3);
static void check(int ok, const char *format, ...) {
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    printf("%3d %s  %s\n", passed + failed + 1, ok ? "ok  " : "FAIL", text);
    if (ok)
        passed++;
    else
        failed++;
}

// ---- files ----------------------------------------------------------------------------------
static char *in(const char *name) { return xasprintf("%s/%s", work, name); }

static char *slurp(const char *path, size_t *bytes) {
    FILE *f = fopen(path, "rb");
    if (!f) return 0;
    fseek(f, 0, SEEK_END);
    *bytes = ftell(f);
    rewind(f);
    char *text = (char *)xcalloc(*bytes + 1, 1, "test file");
    *bytes = fread(text, 1, *bytes, f);
    fclose(f);
    return text;
}

static void spill(const char *path, const void *data, size_t bytes) {
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(data, 1, bytes, f) != bytes || fclose(f))
        die("%s: the test cannot write|give it a disk", path);
}

static void copy_folder(const char *from, const char *to) {
    folder_make(to);
    DIR *d = opendir(from);
    for (struct dirent *e; d && (e = readdir(d));) {
        char *a = xasprintf("%s/%s", from, e->d_name);
        char *b = xasprintf("%s/%s", to, e->d_name);
        size_t n;
        char *text = e->d_name[0] == '.' ? 0 : slurp(a, &n);
        if (text) spill(b, text, n);
        free(text);
        free(a);
        free(b);
    }
    if (d) closedir(d);
}

// ---- a model whose every number is known ----------------------------------------------------
static const char *SMALL =
    "{\"model_type\": \"qwen3_moe\", \"vocab_size\": 300, \"hidden_size\": 64, "
    "\"intermediate_size\": 40, \"num_hidden_layers\": 3,\n"
    " \"num_attention_heads\": 4, \"num_key_value_heads\": 2, \"head_dim\": 16, \"num_experts\": "
    "8, \"num_experts_per_tok\": 2, \"moe_intermediate_size\": 32,\n"
    " \"norm_topk_prob\": true, \"mlp_only_layers\": [1], \"max_position_embeddings\": 128, "
    "\"rope_theta\": 10000.0, \"hidden_act\": \"silu\", \"attention_bias\": false,\n"
    " \"sliding_window\": null, \"rope_scaling\": null, \"tie_word_embeddings\": false, "
    "\"a_key_nobody_knows\": [1, 2]}\n";

static Arena pool; // staging, one for all: the ranks take turns
typedef struct {
    Model m;
    Arena arena;
    Checkpoint *k;
    OptimizerState *shard;
    unsigned state;
} Rank;
enum { VALUE_WEIGHT = 1, VALUE_M, VALUE_V, VALUE_M8, VALUE_V8, VALUE_M_SCALE, VALUE_V_SCALE };

static uint64_t value_bits(uint64_t tensor, int64_t index, int what) {
    return mix64(tensor ^ mix64((uint64_t)index * 16 + (uint64_t)what));
}
static float value(uint64_t tensor, int64_t index, int what) {
    return ((float)(value_bits(tensor, index, what) >> 40) / 8388608.0f - 1.0f) * 0.7f;
}

static void take(Rank *r) {
    Arena *a = &r->arena;
    a->used = 0;
    for (int b = 0; b < r->m.n_blocks; b++) {
        OptimizerState *s = &r->shard[b];
        size_t n = r->m.block[b].shard;
        size_t q = r->m.block[b].n_qblocks;
        s->param = ARENA_TAKE(a, floatX, n, "param");
        if (r->state & STATE_MASTER) s->master = ARENA_TAKE(a, real, n, "master");
        if (r->state & STATE_M) s->m = ARENA_TAKE(a, real, n, "m");
        if (r->state & STATE_V) s->v = ARENA_TAKE(a, real, n, "v");
        if (!(r->state & STATE_8BIT)) continue;
        s->m8 = ARENA_TAKE(a, uint8_t, n, "m8");
        s->v8 = ARENA_TAKE(a, uint8_t, n, "v8");
        s->m_scale = ARENA_TAKE(a, float, q + 1, "scales");
        s->v_scale = ARENA_TAKE(a, float, q + 1, "scales");
    }
}

static Rank rank_new(const char *config, ShardSpec cut, unsigned state) {
    Rank r;
    memset(&r, 0, sizeof r);
    r.m = model_build(config_read(config), cut);
    r.state = state;
    r.shard = (OptimizerState *)xcalloc(r.m.n_blocks, sizeof *r.shard, "shards");
    r.arena = arena_counting("test shards");
    take(&r);
    arena_commit(&r.arena);
    take(&r);
    return r;
}

// Separate: the model must have its final address.
static void rank_open(Rank *r) {
    if (!pool.base) {
        pool = arena_counting("test staging");
        arena_take(&pool, CHECKPOINT_STAGING, "staging");
        arena_commit(&pool);
    }
    pool.used = 0;
    r->k = checkpoint_create(&r->m, 0, 1, &pool);
}

static void rank_free(Rank *r) {
    if (r->k) checkpoint_free(r->k);
    arena_free(&r->arena);
    model_free(&r->m);
    free(r->shard);
}

typedef struct {
    void *here;
    Dtype type;
    int64_t n, first;
    int what;
} Buffer;
// The buffers of a segment: [0] the weight with the most bits, [1] the parameter under a master,
// then the state.
static int buffers(const OptimizerState *s, const Segment *g, Buffer *out) {
    Buffer all[] = { { s->master ? (void *)(s->master + g->offset) : (void *)(s->param + g->offset),
                       s->master ? DTYPE_REAL : DTYPE_FLOATX, g->count, g->first, VALUE_WEIGHT },
                     { s->m ? s->m + g->offset : 0, DTYPE_REAL, g->count, g->first, VALUE_M },
                     { s->v ? s->v + g->offset : 0, DTYPE_REAL, g->count, g->first, VALUE_V },
                     { s->m8 ? s->m8 + g->offset : 0, DTYPE_U8, g->count, g->first, VALUE_M8 },
                     { s->v8 ? s->v8 + g->offset : 0, DTYPE_U8, g->count, g->first, VALUE_V8 },
                     { s->m8 ? s->m_scale + g->qblock : 0, DTYPE_F32, (g->count + 255) / 256,
                       g->first / 256, VALUE_M_SCALE },
                     { s->m8 ? s->v_scale + g->qblock : 0, DTYPE_F32, (g->count + 255) / 256,
                       g->first / 256, VALUE_V_SCALE } };
    int n = 0;
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (all[i].here) out[n++] = all[i];
    return n;
}

// What buffer b of tensor t must hold: the hash, rounded to `through` on its way (the type of a
// file) and then to the buffer's type. malloc'd.
static void *expected(uint64_t tensor, Buffer b, Dtype through) {
    size_t n = b.n;
    char *file = (char *)xmalloc(n * 8, "expected");
    char *out = (char *)xmalloc(n * 8, "expected");
    if (b.type == DTYPE_U8) {
        for (size_t i = 0; i < n; i++)
            out[i] = (char)value_bits(tensor, b.first + (int64_t)i, b.what);
    } else {
        float *v = (float *)xmalloc(n * 4, "expected");
        for (size_t i = 0; i < n; i++) v[i] = value(tensor, b.first + (int64_t)i, b.what);
        if (b.what != VALUE_WEIGHT) through = DTYPE_F32;
        convert(file, through, v, DTYPE_F32, n);
        convert(out, b.type, file, through, n);
        free(v);
    }
    free(file);
    return out;
}

// fill 1: writes every number; 0: compares, returns how many bytes differ.
static int64_t sweep(Rank *r, int fill, Dtype through) {
    int64_t wrong = 0;
    Buffer list[8];
    for (int b = 0; b < r->m.n_blocks; b++)
        for (int i = 0; i < r->m.block[b].n_segments; i++) {
            const Segment *g = &r->m.block[b].segment[i];
            OptimizerState *s = &r->shard[b];
            int n = buffers(s, g, list);
            if (fill && s->master)
                list[n++] = (Buffer){ s->param + g->offset, DTYPE_FLOATX, g->count, g->first,
                                      VALUE_WEIGHT };
            for (int j = 0; j < n; j++) {
                size_t bytes = list[j].n * dtype_size(list[j].type);
                char *want = (char *)expected(g->tensor, list[j], through);
                char *have = (char *)xmalloc(bytes, "have");
                if (fill) device_upload(list[j].here, want, bytes);
                device_download(have, list[j].here, bytes);
                for (size_t x = 0; x < bytes; x++) wrong += want[x] != have[x];
                if (!fill && j == 0 && s->master) { // the parameter is the master, rounded once
                    char *p = (char *)xmalloc(bytes, "parameter");
                    char *q = (char *)xmalloc(bytes, "parameter");
                    convert(p, DTYPE_FLOATX, have, DTYPE_REAL, list[j].n);
                    device_download(q, s->param + g->offset, list[j].n * sizeof(floatX));
                    wrong += memcmp(p, q, list[j].n * sizeof(floatX)) != 0;
                    free(p);
                    free(q);
                }
                free(want);
                free(have);
            }
        }
    return wrong;
}

static ShardSpec cut_of(int ep, int fsdp, int split, int rank) {
    ShardSpec c = { ep, rank % ep, ep * fsdp, rank, fsdp, rank / ep, split };
    return c;
}

// Saves with a grid of ep x fsdp played in one process. dtype of the weights before: `through`.
static void save_grid(const char *config, int ep, int fsdp, int split, unsigned state,
                      Dtype through, const char *out, int64_t step, SaveOptions o,
                      const char *load_from) {
    enum { MOST = 8 };
    Rank r[MOST];
    RunFolder run = run_folder_own(out);
    cJSON *trainer = cJSON_Parse("{\"seed\": 7, \"optimizer\": \"adamw\", \"step\": -1}");
    for (int i = 0; i < ep * fsdp; i++) {
        r[i] = rank_new(config, cut_of(ep, fsdp, split, i), state);
        rank_open(&r[i]);
        if (load_from)
            checkpoint_load_model(r[i].k, load_from, r[i].shard);
        else
            sweep(&r[i], 1, through);
        checkpoint_save_plan(r[i].k, &run, step, o, state);
        if (!i) checkpoint_save_begin(r[i].k);
    }
    for (int i = ep * fsdp - 1; i >= 0; i--) checkpoint_save_shards(r[i].k, r[i].shard);
    checkpoint_save_sums(r[0].k);
    checkpoint_save_finish(r[0].k, trainer);
    for (int i = 0; i < ep * fsdp; i++) rank_free(&r[i]);
    run_folder_close(&run);
    cJSON_Delete(trainer);
}

// Bytes that differ after loading with a grid (resume: with the optimizer's state).
static int64_t load_grid(const char *dir, int ep, int fsdp, int split, unsigned state,
                         Dtype through, int resume) {
    int64_t wrong = 0;
    char *config = xasprintf("%s/config.json", dir);
    for (int i = 0; i < ep * fsdp; i++) {
        Rank r = rank_new(config, cut_of(ep, fsdp, split, i), state);
        rank_open(&r);
        if (resume)
            checkpoint_resume(r.k, dir, r.shard);
        else
            checkpoint_load_model(r.k, dir, r.shard);
        wrong += sweep(&r, 0, through);
        rank_free(&r);
    }
    free(config);
    return wrong;
}

// Finds the newest checkpoint as the owner of the folder does, who cleans up.
static int64_t find_newest(const char *out) {
    RunFolder run = run_folder_own(out);
    int64_t step = checkpoint_find(0, &run);
    run_folder_close(&run);
    return step;
}

// A dying child cleans nothing up: leak checkers look at the parent.
static void leave(void) { _exit(1); }

// 1 where looking for the newest checkpoint ends the program with an error.
static int dies_finding(const char *out) {
    int status;
    fflush(stdout);
    pid_t child = fork();
    if (!child) {
        die_set(0, leave);
        find_newest(out);
        _exit(0);
    }
    waitpid(child, &status, 0);
    return WIFEXITED(status) && WEXITSTATUS(status) == 1;
}

static SaveOptions options(SaveDtype dtype, int fused, int64_t file_bytes) {
    SaveOptions o = { dtype, fused, 0, file_bytes };
    return o;
}

static int exists(const char *dir, const char *name) {
    char *path = xasprintf("%s/%s", dir, name);
    int ok = !access(path, F_OK);
    free(path);
    return ok;
}

// ---- 1. configs -----------------------------------------------------------------------------
static int same_config(const Config *a, const Config *b) {
    return a->C == b->C && a->L == b->L && a->H == b->H && a->KV == b->KV && a->D == b->D &&
           a->V == b->V && a->E == b->E && a->K == b->K && a->F == b->F && a->I == b->I &&
           a->max_positions == b->max_positions && a->norm_topk == b->norm_topk &&
           a->tied == b->tied && a->pad == b->pad && a->bos == b->bos && a->eos == b->eos &&
           a->rope_theta == b->rope_theta && a->rms_eps == b->rms_eps &&
           a->init_std == b->init_std && a->aux_coef == b->aux_coef && a->n_moe == b->n_moe &&
           !memcmp(a->is_moe, b->is_moe, a->L);
}

static Config from_text(const char *text) {
    char *path = in("some.json");
    spill(path, text, strlen(text));
    Config c = config_read(path);
    free(path);
    return c;
}

static void test_configs(void) {
    Config a = from_text("{\"model_type\": \"qwen3_moe\"}");
    check(a.L == 24 && a.C == 2048 && a.D == 64 && a.norm_topk == 0 && a.rope_theta == 10000 &&
              a.K == 8 && a.E == 128 && a.n_moe == 24 && a.pad == -1 && a.eos == -1,
          "absent keys take the class's defaults, head_dim hidden / heads");
    Config b = from_text(
        "{\"model_type\": \"qwen3_moe\", \"num_local_experts\": 6, \"dtype\": \"float32\", "
        "\"rope_parameters\": {\"rope_theta\": 5e5, \"rope_type\": \"default\"},"
        " \"eos_token_id\": [7, 8], \"decoder_sparse_step\": 2, \"mlp_only_layers\": [3, 99], "
        "\"num_hidden_layers\": 6, \"num_experts_per_tok\": 6, \"pad_token_id\": -1,"
        " \"rope_scaling\": {\"type\": \"default\"}, \"use_sliding_window\": false, "
        "\"sliding_window\": 4096}");
    check(b.E == 6 && b.rope_theta == 5e5 && b.eos == 7 && b.pad == b.V - 1,
          "5.x spellings; a list of end tokens; pad -1 counts from the end as torch does");
    check(b.n_moe == 2 && b.is_moe[1] && !b.is_moe[3] && b.is_moe[5] && !b.is_moe[0],
          "decoder_sparse_step 2 and mlp_only_layers [3]: layers 1 and 5 have experts");
    Config old =
        from_text("{\"model_type\": \"qwen3_moe\", \"rope_scaling\": {\"rope_type\": \"default\", "
                  "\"rope_theta\": 500.0}}");
    check(old.rope_theta == 500, "rope_theta inside rope_scaling, as transformers reads it");
    config_free(&old);
    char *text = config_export(&b, "bfloat16");
    Config c = from_text(text);
    cJSON *root = cJSON_Parse(text);
    check(same_config(&b, &c) && cJSON_HasObjectItem(root, "num_experts") &&
              !cJSON_HasObjectItem(root, "num_local_experts") &&
              !cJSON_HasObjectItem(root, "rope_parameters") &&
              cJSON_HasObjectItem(root, "rope_theta") && cJSON_HasObjectItem(root, "torch_dtype") &&
              cJSON_HasObjectItem(root, "dtype"),
          "export: 4.x keys, same model when read again");
    cJSON_Delete(root);
    cJSON_free(text);
    Config d = from_text(SMALL);
    text = config_export(&d, "float32");
    check(strstr(text, "a_key_nobody_knows") != 0, "export keeps keys that it does not know");
    cJSON_free(text);
    config_free(&a);
    config_free(&b);
    config_free(&c);
    config_free(&d);
    // hidden 2048, 48 layers, 128 experts of 768: the published totals
    a = from_text("{\"model_type\": \"qwen3_moe\", \"num_hidden_layers\": 48, \"head_dim\": 128}");
    check(config_total_parameters(&a) == 30532122624.0 &&
              config_active_parameters(&a) == 3041867776.0,
          "Qwen3-30B-A3B has 30,532,122,624 parameters, a token meets 3,041,867,776 beside the "
          "embedding");
    ShardSpec one = { 1, 0, 1, 0, 1, 0, 0 };
    Model m = model_build(a, one);
    Arena count = arena_counting("count");
    Checkpoint *k = checkpoint_create(&m, 0, 1, &count);
    RunFolder run = run_folder_look(work);
    checkpoint_save_plan(k, &run, 0, options(SAVE_F32, 0, 0), STATE_M | STATE_V);
    double bytes = (double)k->plan.bytes;
    double payload = 30532122624.0 * (4 + 2 * (double)sizeof(real));
    double masters = sizeof(floatX) == 8 ? 30532122624.0 * 8 : 0;
    check(bytes > payload + masters && bytes < payload + masters + 2e7,
          "its F32 checkpoint with both moments: %.3f GB (offsets beyond 2^32)", bytes / 1e9);
    checkpoint_free(k);
    run_folder_close(&run);
    model_free(&m);
}

// ---- 2. round trips -------------------------------------------------------------------------
static void test_round_trips(const char *config) {
    static const SaveDtype types[] = { SAVE_PRECISION, SAVE_F32, SAVE_BF16 };
    static const Dtype through[] = { DTYPE_FLOATX, DTYPE_F32, DTYPE_BF16 };
    static const char *const type_name[] = { "floatX", "f32", "bf16" };
    for (int fused = 0; fused < 2; fused++)
        for (int t = 0; t < 3; t++)
            for (int64_t limit = 0; limit <= 20000; limit += 20000) {
                char *out = xasprintf("%s/rt%d%d%d", work, fused, t, limit > 0);
                char *dir = checkpoint_folder(out, 3);
                save_grid(config, 1, 1, 0, 0, DTYPE_FLOATX, out, 3, options(types[t], fused, limit),
                          0);
                int64_t wrong = load_grid(dir, 1, 1, 0, 0, through[t], 0);
                SafeTensors s = safetensors_open_folder(dir);
                // 3 outside the layers, 8 per layer, dense MLP 3, MoE 1 + (3 x 8 or 2)
                int want = 3 + 3 * 8 + 3 + 2 * (fused ? 3 : 25);
                int files = s.n_files;
                int several = limit > 0 && files > 5 && !exists(dir, "model.safetensors");
                check(!wrong && s.n == want && (several || (!limit && files == 1)),
                      "round trip: %s layout, %s, %d file%s, %d tensors",
                      fused ? "fused" : "experts", type_name[t], files, files > 1 ? "s" : "", s.n);
                safetensors_close(&s);
                free(out);
                free(dir);
            }
}

// Elements of the file's tensor, from `base`, that are not the numbers of HF tensor `hf`.
static int64_t foreign(const SafeTensors *s, const char *tensor, int64_t base, const char *hf,
                       int what, int64_t n) {
    const SafeTensor *t = safetensors_find(s, tensor);
    if (!t || t->type != DTYPE_F32) return -1;
    float *v = (float *)xmalloc(n * 4, "numbers");
    int64_t wrong = 0;
    safetensors_read(s, t, base * 4, v, n * 4);
    for (int64_t i = 0; i < n; i++) wrong += v[i] != value(tensor_id(hf), i, what);
    free(v);
    return wrong;
}

// The bytes themselves, without our own reader's idea of where they are.
static void test_contents(const char *config) {
    char *out = in("contents");
    char *dir = checkpoint_folder(out, 1);
    char *path = xasprintf("%s/optimizer.safetensors", dir);
    unsigned master =
        sizeof(floatX) == 2 ? STATE_MASTER : 0; // bf16 parameters alone would not have these bits
    save_grid(config, 2, 2, 0, STATE_M | STATE_V | master, DTYPE_F32, out, 1,
              options(SAVE_F32, 1, 0), 0);
    SafeTensors s = safetensors_open_folder(dir);
    const int64_t size = 32 * 64;
    check(!foreign(&s, "model.layers.2.mlp.experts.gate_up_proj", 10 * size,
                   "model.layers.2.mlp.experts.5.gate_proj.weight", VALUE_WEIGHT, size) &&
              !foreign(&s, "model.layers.2.mlp.experts.gate_up_proj", 11 * size,
                       "model.layers.2.mlp.experts.5.up_proj.weight", VALUE_WEIGHT, size) &&
              !foreign(&s, "model.layers.2.mlp.experts.down_proj", 5 * size,
                       "model.layers.2.mlp.experts.5.down_proj.weight", VALUE_WEIGHT, size),
          "fused layout: expert 5 is row 5, its gate before its up");
    safetensors_close(&s);
    if (sizeof(real) == 4) {
        s = safetensors_open(path);
        check(!foreign(&s, "model.layers.0.self_attn.o_proj.weight.m", 0,
                       "model.layers.0.self_attn.o_proj.weight", VALUE_M, 64 * 64) &&
                  !foreign(&s, "model.layers.0.mlp.experts.7.up_proj.weight.v", 0,
                           "model.layers.0.mlp.experts.7.up_proj.weight", VALUE_V, size),
              "optimizer.safetensors: .m is the first moment, .v the second");
        safetensors_close(&s);
    }
    free(out);
    free(dir);
    free(path);
}

// A model folder with types mixed as no sane tool writes them: tensor i gets F32, BF16, F16 in
// turn.
static void mixed_model(const char *config, const char *dir) {
    char *out = in("mixed_source");
    char *from = checkpoint_folder(out, 0);
    char *path = xasprintf("%s/model.safetensors", dir);
    save_grid(config, 1, 1, 0, 0, DTYPE_FLOATX, out, 0, options(SAVE_F32, 0, 0), 0);
    copy_folder(from, dir);
    char *trainer = xasprintf("%s/trainer.json", dir);
    unlink(trainer); // another program's model has none, and so no checksums
    free(trainer);
    SafeTensors s = safetensors_open_folder(from);
    SafeTensor *t = (SafeTensor *)xmalloc(s.n * sizeof *t, "tensors");
    static const Dtype types[] = { DTYPE_F32, DTYPE_BF16, DTYPE_F16 };
    for (int i = 0; i < s.n; i++) {
        t[i] = s.tensor[i];
        t[i].type = types[i % 3];
    }
    size_t header;
    int64_t bytes;
    char *h = safetensors_layout(t, s.n, &header, &bytes);
    char *file = (char *)xcalloc(bytes, 1, "file");
    memcpy(file, h, header);
    for (int i = 0; i < s.n; i++) {
        char *data = (char *)xmalloc(s.tensor[i].bytes, "tensor");
        safetensors_read(&s, &s.tensor[i], 0, data, s.tensor[i].bytes);
        convert(file + t[i].at, t[i].type, data, DTYPE_F32, safetensors_elements(&t[i]));
        free(data);
    }
    spill(path, file, bytes);
    safetensors_close(&s);
    free(t);
    free(h);
    free(file);
    free(path);
    free(out);
    free(from);
}

// Tensors of a that b does not hold byte for byte under the same name, type and shape; -1 where b
// has others.
static int differing(const char *a, const char *b) {
    SafeTensors x = safetensors_open_folder(a);
    SafeTensors y = safetensors_open_folder(b);
    int n = 0;
    for (int i = 0; i < x.n; i++) {
        const SafeTensor *t = &x.tensor[i];
        const SafeTensor *u = safetensors_find(&y, t->name);
        if (!u || u->type != t->type || u->n_dims != t->n_dims ||
            memcmp(u->shape, t->shape, sizeof t->shape)) {
            n++;
            continue;
        }
        char *p = (char *)xmalloc(t->bytes, "tensor");
        char *q = (char *)xmalloc(t->bytes, "tensor");
        safetensors_read(&x, t, 0, p, t->bytes);
        safetensors_read(&y, u, 0, q, u->bytes);
        n += memcmp(p, q, t->bytes) != 0;
        free(p);
        free(q);
    }
    if (!n && x.n != y.n) n = -1;
    safetensors_close(&x);
    safetensors_close(&y);
    return n;
}

static void test_source(const char *config, const char *fixtures) {
    char *mixed = in("mixed");
    char *out = in("from_mixed");
    char *dir = checkpoint_folder(out, 0);
    mixed_model(config, mixed);
    char *tokenizer = xasprintf("%s/tokenizer.json", mixed);
    spill(tokenizer, "{\"a\": 1}", 8);
    unsigned state =
        sizeof(floatX) == 2 ? STATE_MASTER : 0; // bf16 parameters alone could not keep F32 and F16
    save_grid(config, 1, 1, 0, state, DTYPE_F32, out, 0, options(SAVE_SOURCE, 0, 0), mixed);
    check(!differing(mixed, dir),
          "import -> export with --save-dtype source: byte-equal, F32, BF16 and F16 mixed");
    check(exists(dir, "tokenizer.json"), "tokenizer files travel with the checkpoint");
    save_grid(config, 2, 2, 1, state, DTYPE_F32, out, 1, options(SAVE_SOURCE, 0, 30000), mixed);
    char *dir1 = checkpoint_folder(out, 1);
    check(!differing(mixed, dir1),
          "the same from 4 ranks (ep 2, fsdp 2, heads split) into several files");
    free(mixed);
    free(out);
    free(dir);
    free(dir1);
    free(tokenizer);
    DIR *d = fixtures ? opendir(fixtures) : 0;
    for (struct dirent *e; d && (e = readdir(d));) {
        char *from = xasprintf("%s/%s", fixtures, e->d_name);
        char *c = xasprintf("%s/config.json", from);
        char *o = xasprintf("%s/fx_%s", work, e->d_name);
        if (e->d_name[0] != '.' && !access(c, F_OK)) {
            char *a = checkpoint_folder(o, 0);
            char *b = checkpoint_folder(o, 1);
            char *round;
            save_grid(c, 1, 1, 0, state, DTYPE_F32, o, 0, options(SAVE_SOURCE, 0, 0), from);
            save_grid(c, 1, 1, 0, state, DTYPE_F32, o, 1, options(SAVE_SOURCE, 1, 0), a);
            round = checkpoint_folder(o, 2);
            save_grid(c, 1, 1, 0, state, DTYPE_F32, o, 2, options(SAVE_SOURCE, 0, 0), b);
            int fused_in = differing(from, b) == 0; // a fixture may itself be fused
            check((fused_in || !differing(from, a)) && !differing(a, round),
                  "fixture %s: byte-equal, and again through the fused layout", e->d_name);
            free(a);
            free(b);
            free(round);
        }
        free(from);
        free(c);
        free(o);
    }
    if (d) closedir(d);
}

// ---- 3. resume on other grids ---------------------------------------------------------------
static void test_resume(const char *config) {
    static const struct {
        unsigned state;
        const char *name;
    } states[] = { { 0, "no state" },
                   { STATE_M, "sgd" },
                   { STATE_M | STATE_V, "adamw" },
                   { STATE_8BIT, "adamw8bit" },
                   { STATE_MASTER | STATE_M | STATE_V, "adamw, masters" },
                   { STATE_MASTER | STATE_8BIT, "adamw8bit, masters" } };
    static const struct {
        int ep, fsdp, split;
    } grids[] = { { 1, 1, 0 }, { 2, 2, 0 }, { 4, 1, 0 }, { 1, 3, 0 },
                  { 2, 3, 0 }, { 2, 2, 1 }, { 8, 1, 0 } };
    for (int s = 0; s < 6; s++)
        for (int save = 0; save < 7; save++) {
            if ((states[s].state & STATE_8BIT) && grids[save].split)
                continue; // columns of o_proj cut blocks of 256: refused, see the bad inputs
            Dtype full = states[s].state & STATE_MASTER ? DTYPE_REAL : DTYPE_FLOATX;
            char *out = xasprintf("%s/resume%d%d", work, s, save);
            char *dir = checkpoint_folder(out, 12);
            // file types alternate: in half of the cases the model file has too few bits and the
            // optimizer's file must bring them
            save_grid(
                config, grids[save].ep, grids[save].fsdp, grids[save].split, states[s].state, full,
                out, 12,
                options(save % 2 ? SAVE_BF16 : SAVE_PRECISION, save / 2 % 2, save == 3 ? 20000 : 0),
                0);
            int64_t wrong = 0;
            for (int g = 0; g < 7; g++)
                if (!(states[s].state & STATE_8BIT) || !grids[g].split)
                    wrong += load_grid(dir, grids[g].ep, grids[g].fsdp, grids[g].split,
                                       states[s].state, full, 1);
            check(
                !wrong,
                "%s: saved by ep %d x fsdp %d%s, resumed on 1, 2x2, 4x1, 1x3, 2x3, 8x1: bit-equal",
                states[s].name, grids[save].ep, grids[save].fsdp,
                grids[save].split ? ", heads split" : "");
            folder_remove(AT_FDCWD, dir);
            free(out);
            free(dir);
        }
}

#include "test_checkpoint_folders.h"

#include "test_checkpoint_bad.h"

static int64_t room_in(const char *folder) {
    int fd = folder_open(AT_FDCWD, folder, 0);
    int64_t room = fd >= 0 && !access(folder, W_OK) ? folder_free_bytes(fd) : 0;
    if (fd >= 0) close(fd);
    return room;
}

int main(int argc, char **argv) {
    comm_init(&argc, &argv);
    device_init(0, 1);
    signal(SIGXFSZ,
           SIG_IGN); // as train_moe does: a limit on the size of files is an error of the write
    // In memory where there is room: hundreds of saves are synced.
    const char *base = getenv("TMPDIR");
    const char *memory = "/dev/shm";
    if (!base || !*base) base = room_in(memory) > 256 << 20 ? memory : "/tmp";
    char *pattern = xasprintf("%s/moe_checkpoint_XXXXXX", base);
    work = mkdtemp(pattern);
    if (!work) die("%s: cannot make a folder for the test|set TMPDIR", pattern);
    char *config = in("small.json");
    spill(config, SMALL, strlen(SMALL));
    test_configs();
    test_round_trips(config);
    test_contents(config);
    test_source(config, argc > 1 ? argv[1] : 0);
    test_resume(config);
    test_folders(config);
    test_kills(config);
    test_large_offsets();
    test_bad_inputs(config);
    char *clean = xasprintf("rm -rf '%s'", work);
    if (system(clean)) printf("    (left behind: %s)\n", work);
    free(clean);
    free(config);
    free(work);
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
