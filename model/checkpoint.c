// Reading checkpoints: see checkpoint.h.  Writing is in checkpoint_save.c, folders in
// checkpoint_folder.c, the file format in safetensors.c.
//
// A Place says where element 0 of an HF tensor lies in some file; a Segment says which elements of
// it a rank owns. Together they are a byte range, in either layout: in the fused 3-D tensors
// gate_up_proj [E, 2F, C] and down_proj [E, C, F] each expert's gate, up and down is one contiguous
// range, at (2e) F C, (2e + 1) F C and e C F.
#define _POSIX_C_SOURCE 200809L
#include "checkpoint_parts.h"
#include "checkpoint_folder.h"
#include "../kernels/fail.h"
#include "../kernels/random.h"
#include <cjson/cJSON.h>
#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

const char *const PART_SUFFIX[PARTS] = { "",    ".master", ".m",       ".v",
                                         ".m8", ".v8",     ".m_scale", ".v_scale" };
enum { QBLOCK = 256 }; // elements that share a scale (kernels.h)

// ---- the list of tensors --------------------------------------------------------------------
static void add_weight(void *context, const char *name, int is_vector, int64_t rows, int64_t cols) {
    Checkpoint *k = (Checkpoint *)context;
    if (k->weight) {
        Weight w = { xasprintf("%s", name), rows, cols, is_vector };
        k->weight[k->n] = w;
        k->by_id[k->n].id = tensor_id(name);
        k->by_id[k->n].weight = k->n;
    }
    k->n++;
}

static int by_id(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

Checkpoint *checkpoint_create(const Model *m, Comm *all, int writer, Arena *arena) {
    Checkpoint *k = (Checkpoint *)xcalloc(1, sizeof *k, "checkpoint");
    k->m = m;
    k->all = all;
    k->writer = writer;
    k->rank = all ? comm_rank(all) : 0;
    k->device = arena_take(arena, CHECKPOINT_STAGING, "checkpoint staging");
    model_visit(&m->c, add_weight, k);
    k->weight = (Weight *)xcalloc((size_t)k->n, sizeof *k->weight, "tensor list");
    k->by_id = xcalloc((size_t)k->n, sizeof *k->by_id, "tensor list");
    k->source = (Dtype *)xcalloc((size_t)k->n, sizeof *k->source, "tensor list");
    k->n = 0;
    model_visit(&m->c, add_weight, k);
    qsort(k->by_id, (size_t)k->n, sizeof *k->by_id, by_id);
    for (int i = 1; i < k->n; i++)
        if (k->by_id[i].id == k->by_id[i - 1].id)
            die("tensors %s and %s have the same 64-bit identity|rename one",
                k->weight[k->by_id[i].weight].name, k->weight[k->by_id[i - 1].weight].name);
    return k;
}

void checkpoint_free(Checkpoint *k) {
    checkpoint_plan_free(&k->plan);
    for (int i = 0; i < k->n; i++) free(k->weight[i].name);
    for (int i = 0; i < k->n_attachments; i++) {
        free(k->attachment[i].name);
        free(k->attachment[i].data);
    }
    free(k->weight);
    free(k->by_id);
    free(k->source);
    free(k->attachment);
    free(k->host);
    free(k);
}

int checkpoint_weight(const Checkpoint *k, const Segment *g) {
    for (int lo = 0, hi = k->n; lo < hi;) {
        int mid = lo + (hi - lo) / 2;
        if (k->by_id[mid].id == g->tensor) return k->by_id[mid].weight;
        if (g->tensor < k->by_id[mid].id)
            hi = mid;
        else
            lo = mid + 1;
    }
    die("a segment of tensor %016" PRIx64
        " belongs to no tensor of the model|the table and the segments disagree",
        g->tensor);
}

int checkpoint_fused(const Config *c, const char *name, char *fused, int64_t *base,
                     int64_t shape[3]) {
    const char *experts = strstr(name, ".mlp.experts.");
    if (!experts) return 0;
    int prefix = (int)(experts - name) + 12; // up to and with ".mlp.experts"
    char *end;
    int64_t e = strtoll(name + prefix + 1, &end, 10), size = (int64_t)c->F * c->C;
    int down = !strcmp(end, ".down_proj.weight"), up = !strcmp(end, ".up_proj.weight");
    snprintf(fused, 160, "%.*s.%s", prefix, name, down ? "down_proj" : "gate_up_proj");
    *base = down ? e * size : (2 * e + up) * size;
    shape[0] = c->E;
    shape[1] = down ? c->C : 2 * c->F;
    shape[2] = down ? c->F : c->C;
    return 1;
}

int64_t checkpoint_part_elements(const Weight *w, Part part) {
    int64_t n = w->rows * w->cols;
    return part == PART_M_SCALE || part == PART_V_SCALE ? (n + QBLOCK - 1) / QBLOCK : n;
}

static void *part_base(Part part, const OptimizerState *s) {
    switch (part) {
    case PART_M: return s->m;
    case PART_V: return s->v;
    case PART_M8: return s->m8;
    case PART_V8: return s->v8;
    case PART_M_SCALE: return s->m_scale;
    case PART_V_SCALE: return s->v_scale;
    default:
        return s->master ? (void *)s->master
                         : (void *)s->param; // weights and masters: the number with the most bits
    }
}

Piece checkpoint_piece(Part part, const OptimizerState *s, const Segment *g) {
    Piece p = { (char *)part_base(part, s), DTYPE_REAL, g->first, g->count };
    int64_t at = g->offset;
    if (part <= PART_MASTER && !s->master) p.type = DTYPE_FLOATX;
    if (part == PART_M8 || part == PART_V8) p.type = DTYPE_U8;
    if (part >= PART_M_SCALE) {
        p.type = DTYPE_F32;
        p.first = g->first / QBLOCK;
        p.count = (g->count + QBLOCK - 1) / QBLOCK;
        at = g->qblock;
    }
    if (p.data) p.data += at * (int64_t)dtype_size(p.type);
    return p;
}

void checkpoint_check_blocks(const Checkpoint *k) {
    if (model_cuts_blocks(k->m))
        die("8-bit optimizer state: this layout cuts blocks of 256 elements|choose --fsdp and --ep so that shards fall on whole blocks");
}

unsigned checkpoint_state(const OptimizerState *s) {
    return (s->master ? STATE_MASTER : 0u) | (s->m ? STATE_M : 0u) | (s->v ? STATE_V : 0u) |
           (s->m8 ? STATE_8BIT : 0u);
}

// One line on a terminal that rewrites itself, for what takes longer than two seconds.
void checkpoint_progress_start(Checkpoint *k, int64_t total) {
    k->moved = 0;
    k->to_move = total;
    k->began = k->shown = now_seconds();
}

void checkpoint_progress(Checkpoint *k, const char *verb, int64_t bytes) {
    k->moved += bytes;
    double now = now_seconds();
    if (k->rank || now - k->shown < 2 || !isatty(2)) return;
    k->shown = now;
    fprintf(stderr, "\r%s %.1f ", verb, (double)k->moved / 1e9);
    if (k->to_move) fprintf(stderr, "of %.1f ", (double)k->to_move / 1e9);
    fprintf(stderr, "GB, %.2f GB/s ", (double)k->moved / 1e9 / (now - k->began));
}

void checkpoint_progress_end(const Checkpoint *k) {
    if (k->shown > k->began) fprintf(stderr, "\n");
}

// ---- where the tensors of a loaded model are ------------------------------------------------
static int has_shape(const SafeTensor *t, int n, const int64_t *shape) {
    if (t->n_dims != n) return 0;
    for (int i = 0; i < n; i++)
        if (t->shape[i] != shape[i]) return 0;
    return 1;
}

// The tensor of weight w in either layout and the first element of w in it; 0 where neither is
// there.
static const SafeTensor *find_weight(const Checkpoint *k, const SafeTensors *s, const Weight *w,
                                     int64_t *base) {
    int64_t shape[3] = { w->vector ? w->cols : w->rows, w->cols, 0 };
    int n = w->vector ? 1 : 2;
    char fused[160], has[192], want[192];
    const SafeTensor *t = safetensors_find(s, w->name);
    *base = 0;
    if (!t && checkpoint_fused(&k->m->c, w->name, fused, base, shape)) {
        t = safetensors_find(s, fused);
        n = 3;
    }
    if (!t) return 0;
    if (!has_shape(t, n, shape)) {
        SafeTensor wanted;
        wanted.n_dims = n;
        memcpy(wanted.shape, shape, sizeof shape);
        die("%s: tensor %s has shape %s, config.json means %s|is this the config of this checkpoint?",
            s->path[t->file], t->name, safetensors_shape(t, has), safetensors_shape(&wanted, want));
    }
    if (t->type != DTYPE_F32 && t->type != DTYPE_BF16 && t->type != DTYPE_F16 &&
        t->type != DTYPE_F64)
        die("%s: tensor %s: weights of dtype %s are not supported|use a checkpoint in F32, BF16 or F16",
            s->path[t->file], t->name, dtype_name(t->type));
    return t;
}

static void warn_extra(const Checkpoint *k, const SafeTensors *s, const char *dir,
                       const char *used) {
    int n = 0, shown = 0;
    for (int i = 0; i < s->n; i++) {
        const char *name = s->tensor[i].name,
                   *inv = strstr(name, "rotary_emb.inv_freq"); // a table that old versions saved
        if (used[i] || inv || (k->m->c.tied && !strcmp(name, "lm_head.weight"))) continue;
        if (!n++)
            fprintf(stderr,
                    "warning: %s: tensors that this model has no place for are ignored:", dir);
        if (shown < 5) {
            fprintf(stderr, " %s", name);
            shown++;
        }
    }
    if (n) fprintf(stderr, "%s (%d in all)\n", n > shown ? " ..." : "", n);
}

// A tied model has no head of its own; a file may bring one all the same, and should then bring the
// embedding again.
static void check_tied(const Checkpoint *k, const SafeTensors *s, const char *dir) {
    const SafeTensor *head = safetensors_find(s, "lm_head.weight"),
                     *embed = safetensors_find(s, "model.embed_tokens.weight");
    if (!k->m->c.tied || !head || !embed) return;
    int same = head->type == embed->type && head->bytes == embed->bytes;
    int64_t half = CHECKPOINT_STAGING / 2;
    for (int64_t at = 0; same && at < head->bytes; at += half) {
        int64_t n = head->bytes - at < half ? head->bytes - at : half;
        safetensors_read(s, head, at, k->host, n);
        safetensors_read(s, embed, at, k->host + half, n);
        same = !memcmp(k->host, k->host + half, (size_t)n);
    }
    if (!same)
        fprintf(
            stderr,
            "warning: %s: lm_head.weight differs from model.embed_tokens.weight, but tie_word_embeddings is true: lm_head.weight is ignored\n",
            dir);
}

// Fills place (k->n) and k->source.
static void place_model(Checkpoint *k, const SafeTensors *s, const char *dir, Place *place) {
    char *used = (char *)xcalloc((size_t)s->n + 1, 1, "tensor list");
    const char *missing = 0;
    int n_missing = 0;
    for (int i = 0; i < k->n; i++) {
        int64_t base;
        const SafeTensor *t = find_weight(k, s, &k->weight[i], &base);
        if (!t) {
            if (!n_missing++) missing = k->weight[i].name;
            continue;
        }
        used[t - s->tensor] = 1;
        place[i].file = t->file;
        place[i].type = k->source[i] = t->type;
        place[i].at = t->at + base * (int64_t)dtype_size(t->type);
    }
    if (missing)
        die("%s: tensor %s is missing (%d of %d are)|is the checkpoint complete, and is this its config.json?",
            dir, missing, n_missing, k->n);
    k->has_source = 1;
    if (!k->rank) {
        warn_extra(k, s, dir, used);
        check_tied(k, s, dir);
    }
    free(used);
}

// ---- moving ---------------------------------------------------------------------------------
// Index of the first element that is not finite, -1 where all are: exponent bits all ones.
static int64_t not_finite(const void *data, Dtype type, int64_t n) {
    uint64_t bad = 0;
    const uint16_t *h = (const uint16_t *)data, mask16 = type == DTYPE_BF16 ? 0x7f80 : 0x7c00;
    const uint32_t *f = (const uint32_t *)data, mask32 = 0x7f800000;
    const uint64_t *d = (const uint64_t *)data, mask64 = 0x7ff0000000000000;
    if (dtype_size(type) == 2)
        for (int64_t i = 0; i < n; i++) bad |= (h[i] & mask16) == mask16;
    if (type == DTYPE_F32)
        for (int64_t i = 0; i < n; i++) bad |= (f[i] & mask32) == mask32;
    if (type == DTYPE_F64)
        for (int64_t i = 0; i < n; i++) bad |= (d[i] & mask64) == mask64;
    for (int64_t i = 0; bad && i < n; i++)
        if (dtype_size(type) == 2 ? (h[i] & mask16) == mask16
            : type == DTYPE_F32   ? (f[i] & mask32) == mask32
                                  : (d[i] & mask64) == mask64)
            return i;
    return -1;
}

typedef struct {
    int fd;
    const char *path;
} Source;

// Reads one part of one segment into the shard. Weights go to the master first; the parameter is
// the master rounded once, as after an update.
static void read_piece(Checkpoint *k, const Source *source, Place place, Part part,
                       const OptimizerState *s, const Segment *g, const char *name) {
    Piece p = checkpoint_piece(part, s, g);
    int64_t size = (int64_t)dtype_size(place.type), step = CHECKPOINT_STAGING / 8;
    const Source *from = &source[place.file];
    for (int64_t i = 0; i < p.count; i += step) {
        int64_t n = p.count - i < step ? p.count - i : step, bad;
        file_read_at(from->fd, from->path, place.at + (p.first + i) * size, k->host, n * size);
        if (part == PART_WEIGHT && (bad = not_finite(k->host, place.type, n)) >= 0)
            die("%s: tensor %s: element %lld is NaN or infinite|the checkpoint is damaged or its training diverged",
                from->path, name, (long long)(p.first + i + bad));
        char *dst = p.data + i * (int64_t)dtype_size(p.type);
        if (place.type == p.type)
            device_upload(dst, k->host, (size_t)(n * size));
        else {
            device_upload(k->device, k->host, (size_t)(n * size));
            convert(dst, p.type, k->device, place.type, (size_t)n);
        }
        if (part == PART_WEIGHT && s->master)
            convert(s->param + g->offset + i, DTYPE_FLOATX, dst, DTYPE_REAL, (size_t)n);
        checkpoint_progress(k, "reading", n * size);
    }
}

static void read_part(Checkpoint *k, const Source *source, const Place *place, Part part,
                      const OptimizerState *shard) {
    for (int b = 0; b < k->m->n_blocks; b++)
        for (int i = 0; i < k->m->block[b].n_segments; i++) {
            const Segment *g = &k->m->block[b].segment[i];
            int w = checkpoint_weight(k, g);
            read_piece(k, source, place[w], part, &shard[b], g, k->weight[w].name);
        }
}

// ---- tokenizer files ------------------------------------------------------------------------
enum { MAX_ATTACHMENT = 256 << 20 };
static int is_attachment(const char *name) {
    static const char *names[] = { "vocab.json", "merges.txt", "special_tokens_map.json",
                                   "added_tokens.json", "generation_config.json" };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (!strcmp(name, names[i])) return 1;
    return !strncmp(name, "tokenizer", 9) || !strncmp(name, "chat_template", 13);
}

// Saved in memory (a few megabytes): the folder that the model came from may be gone by the time of
// a save, removed by --keep for one.
static void load_attachments(Checkpoint *k, const char *dir) {
    DIR *d = opendir(dir);
    for (struct dirent *e; d && (e = readdir(d));) {
        struct stat st;
        char *path = xasprintf("%s/%s", dir, e->d_name);
        FILE *f = is_attachment(e->d_name) && !stat(path, &st) && S_ISREG(st.st_mode) &&
                          st.st_size <= MAX_ATTACHMENT
                      ? fopen(path, "rb")
                      : 0;
        if (f) {
            Attachment a = { xasprintf("%s", e->d_name),
                             (char *)xmalloc((size_t)st.st_size, "tokenizer file"), 0 };
            a.bytes = fread(a.data, 1, (size_t)st.st_size, f);
            fclose(f);
            k->attachment =
                (Attachment *)realloc(k->attachment, (size_t)(k->n_attachments + 1) * sizeof a);
            if (!k->attachment) die("out of host memory for tokenizer files|free memory");
            k->attachment[k->n_attachments++] = a;
        }
        free(path);
    }
    if (d) closedir(d);
}

// ---- load and resume ------------------------------------------------------------------------
// Where part p of every weight lies in the optimizer's file, which is file number `file`.
static void place_state(const Checkpoint *k, const SafeTensors *s, int file, Part part, Dtype type,
                        Place *place) {
    for (int i = 0; i < k->n; i++) {
        char *name = xasprintf("%s%s", k->weight[i].name, PART_SUFFIX[part]);
        const SafeTensor *t = s->n_files ? safetensors_find(s, name) : 0;
        if (!t && part == PART_MASTER) {
            free(name);
            continue;
        }
        if (!t)
            die("%s: %s is missing|the checkpoint was written by another optimizer, or by sgd without momentum: resume with that",
                s->n_files ? s->path[0] : "optimizer.safetensors", name);
        int is_real = t->type == DTYPE_F32 || t->type == DTYPE_F64 ||
                      (part == PART_MASTER && t->type == DTYPE_BF16);
        if (safetensors_elements(t) != checkpoint_part_elements(&k->weight[i], part) ||
            (type == DTYPE_U8 ? t->type != DTYPE_U8 : !is_real))
            die("%s: %s has another size or dtype than the model|the file belongs to another checkpoint",
                s->path[0], name);
        place[i].file = file;
        place[i].type = t->type;
        place[i].at = t->at;
        free(name);
    }
}

static void load(Checkpoint *k, const char *dir, const OptimizerState *shard, int with_state) {
    SafeTensors model = safetensors_open_folder(dir), state;
    memset(&state, 0, sizeof state);
    char *path = xasprintf("%s/optimizer.safetensors", dir);
    if (with_state && !access(path, F_OK)) state = safetensors_open(path);
    Source *source = (Source *)xmalloc((size_t)(model.n_files + 1) * sizeof *source, "file list");
    for (int i = 0; i < model.n_files; i++) {
        source[i].fd = model.fd[i];
        source[i].path = model.path[i];
    }
    source[model.n_files].fd = state.n_files ? state.fd[0] : -1;
    source[model.n_files].path = path;
    Place *place = (Place *)xmalloc((size_t)k->n * sizeof *place, "tensor places");
    if (!k->host) k->host = (char *)xmalloc(CHECKPOINT_STAGING, "checkpoint staging");
    checkpoint_progress_start(k, 0);
    place_model(k, &model, dir, place);
    if (with_state)
        place_state(k, &state, model.n_files, PART_MASTER, DTYPE_REAL,
                    place); // more bits than the model file, where it is there
    read_part(k, source, place, PART_WEIGHT, shard);
    if (with_state) {
        unsigned want = checkpoint_state(shard);
        if (want & STATE_8BIT) checkpoint_check_blocks(k);
        for (Part part = PART_M; part < PARTS; part = (Part)(part + 1)) {
            Dtype type = part == PART_M8 || part == PART_V8 ? DTYPE_U8 : DTYPE_F32;
            if (!(want & (part == PART_M ? STATE_M : part == PART_V ? STATE_V : STATE_8BIT)))
                continue;
            place_state(k, &state, model.n_files, part, type, place);
            read_part(k, source, place, part, shard);
        }
    }
    device_sync();
    checkpoint_progress_end(k);
    if (!k->rank && !k->n_attachments) load_attachments(k, dir);
    safetensors_close(&model);
    safetensors_close(&state);
    free(source);
    free(place);
    free(path);
    free(k->host);
    k->host = 0;
}

void checkpoint_load_model(Checkpoint *k, const char *dir, const OptimizerState *shard) {
    load(k, dir, shard, 0);
}
void checkpoint_resume(Checkpoint *k, const char *dir, const OptimizerState *shard) {
    load(k, dir, shard, 1);
}

// ---- folders and trainer.json ---------------------------------------------------------------
int64_t checkpoint_find(Comm *all, const char *out) {
    int64_t step = !all || !comm_rank(all) ? folder_newest(out) : 0;
    if (all) comm_broadcast(all, &step, sizeof step, 0);
    return step;
}

char *checkpoint_folder(const char *out, int64_t step) {
    return xasprintf("%s/checkpoints/step_%" PRId64, out, step);
}

struct cJSON *checkpoint_trainer(const char *dir) {
    char *path = xasprintf("%s/trainer.json", dir);
    struct stat st;
    FILE *f = fopen(path, "rb");
    if (!f || fstat(fileno(f), &st))
        die("%s: cannot open: %s|resume from a checkpoint of this program", path, strerror(errno));
    char *text = (char *)xcalloc((size_t)st.st_size + 1, 1, "trainer.json");
    size_t n = fread(text, 1, (size_t)st.st_size, f);
    text[n] = 0;
    fclose(f);
    cJSON *root = cJSON_Parse(text);
    if (!cJSON_IsObject(root))
        die("%s: not valid JSON|the checkpoint is damaged: remove its folder and resume from the one before",
            path);
    free(text);
    free(path);
    return root;
}

double trainer_number(const struct cJSON *trainer, const char *key) {
    const cJSON *v = cJSON_GetObjectItemCaseSensitive(trainer, key);
    if (!cJSON_IsNumber(v))
        die("trainer.json: no number %s|the checkpoint was written by another version of this program",
            key);
    return v->valuedouble;
}

const char *trainer_text(const struct cJSON *trainer, const char *key) {
    const cJSON *v = cJSON_GetObjectItemCaseSensitive(trainer, key);
    if (!cJSON_IsString(v))
        die("trainer.json: no text %s|the checkpoint was written by another version of this program",
            key);
    return v->valuestring;
}
