// Reading checkpoints: see checkpoint.h.  Writing is in checkpoint_save.c, folders in
// checkpoint_folder.c, the file format in safetensors.c.
//
// A Place says where element 0 of an HF tensor lies in some file; a Segment says which elements of
// it a rank owns. Together they are a byte range, in either layout: in the fused 3-D tensors
// gate_up_proj [E, 2F, C] and down_proj [E, C, F] each expert's gate, up and down is one contiguous
// range, at (2e) F C, (2e + 1) F C and e C F.
#define _XOPEN_SOURCE 700 // realpath
#include "checkpoint_parts.h"
#include "../kernels/fail.h"
#include "../kernels/random.h"
#include <cjson/cJSON.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// Blocks of 256 elements share a scale (kernels/quant8.h).
#define FIELD(name) offsetof(OptimizerState, name)
const PartRow PART[PARTS] = {
    [PART_WEIGHT] = { "", 0, DTYPE_FLOATX, 1, FIELD(param) },
    [PART_MASTER] = { ".master", STATE_MASTER, DTYPE_REAL, 1, FIELD(master) },
    [PART_M] = { ".m", STATE_M, DTYPE_REAL, 1, FIELD(m) },
    [PART_V] = { ".v", STATE_V, DTYPE_REAL, 1, FIELD(v) },
    [PART_M8] = { ".m8", STATE_8BIT, DTYPE_U8, 1, FIELD(m8) },
    [PART_V8] = { ".v8", STATE_8BIT, DTYPE_U8, 1, FIELD(v8) },
    [PART_M_SCALE] = { ".m_scale", STATE_8BIT, DTYPE_F32, 256, FIELD(m_scale) },
    [PART_V_SCALE] = { ".v_scale", STATE_8BIT, DTYPE_F32, 256, FIELD(v_scale) },
};

// ---- the list of tensors --------------------------------------------------------------------
static void add_weight(void *context, const char *name, int is_vector, int64_t rows, int64_t cols) {
    Checkpoint *checkpoint = (Checkpoint *)context;
    if (checkpoint->weight) {
        Weight w = { xasprintf("%s", name), rows, cols, is_vector };
        checkpoint->weight[checkpoint->n] = w;
        checkpoint->by_id[checkpoint->n].id = tensor_id(name);
        checkpoint->by_id[checkpoint->n].weight = checkpoint->n;
    }
    checkpoint->n++;
}

static int by_id(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a;
    uint64_t y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

Checkpoint *checkpoint_create(const Model *m, Comm *all, int writer, Arena *arena) {
    Checkpoint *checkpoint = (Checkpoint *)xcalloc(1, sizeof *checkpoint, "checkpoint");
    checkpoint->m = m;
    checkpoint->all = all;
    checkpoint->writer = writer;
    checkpoint->rank = all ? comm_rank(all) : 0;
    checkpoint->device = arena_take(arena, CHECKPOINT_STAGING, "checkpoint staging");
    model_visit(&m->c, add_weight, checkpoint);
    checkpoint->weight =
        (Weight *)xcalloc(checkpoint->n, sizeof *checkpoint->weight, "tensor list");
    checkpoint->by_id = xcalloc(checkpoint->n, sizeof *checkpoint->by_id, "tensor list");
    checkpoint->source = (Dtype *)xcalloc(checkpoint->n, sizeof *checkpoint->source, "tensor list");
    checkpoint->n = 0;
    model_visit(&m->c, add_weight, checkpoint);
    qsort(checkpoint->by_id, checkpoint->n, sizeof *checkpoint->by_id, by_id);
    for (int i = 1; i < checkpoint->n; i++)
        if (checkpoint->by_id[i].id == checkpoint->by_id[i - 1].id)
            die("tensors %s and %s have the same 64-bit identity|rename one",
                checkpoint->weight[checkpoint->by_id[i].weight].name,
                checkpoint->weight[checkpoint->by_id[i - 1].weight].name);
    return checkpoint;
}

void checkpoint_free(Checkpoint *checkpoint) {
    checkpoint_plan_free(&checkpoint->plan);
    for (int i = 0; i < checkpoint->n; i++) free(checkpoint->weight[i].name);
    for (int i = 0; i < checkpoint->n_attachments; i++) {
        free(checkpoint->attachment[i].name);
        free(checkpoint->attachment[i].data);
    }
    free(checkpoint->weight);
    free(checkpoint->by_id);
    free(checkpoint->source);
    free(checkpoint->attachment);
    sums_free(&checkpoint->sums);
    free(checkpoint->host);
    free(checkpoint);
}

int checkpoint_weight(const Checkpoint *checkpoint, const Segment *g) {
    for (int lo = 0, hi = checkpoint->n; lo < hi;) {
        int mid = lo + (hi - lo) / 2;
        if (checkpoint->by_id[mid].id == g->tensor) return checkpoint->by_id[mid].weight;
        if (g->tensor < checkpoint->by_id[mid].id)
            hi = mid;
        else
            lo = mid + 1;
    }
    die("a segment of tensor %016" PRIx64
        " belongs to no tensor of the model|the table and the segments disagree",
        g->tensor);
}

int checkpoint_fused(const Config *c, const char *name, char fused[FUSED_NAME], int64_t *base,
                     int64_t shape[3]) {
    const char *experts = strstr(name, ".mlp.experts.");
    if (!experts) return 0;
    int prefix = (int)(experts - name) + 12; // up to and with ".mlp.experts"
    char *end;
    int64_t e = strtoll(name + prefix + 1, &end, 10);
    int64_t size = (int64_t)c->F * c->C;
    int down = !strcmp(end, ".down_proj.weight");
    int up = !strcmp(end, ".up_proj.weight");
    snprintf(fused, FUSED_NAME, "%.*s.%s", prefix, name, down ? "down_proj" : "gate_up_proj");
    *base = down ? e * size : (2 * e + up) * size;
    shape[0] = c->E;
    shape[1] = down ? c->C : 2 * c->F;
    shape[2] = down ? c->F : c->C;
    return 1;
}

int64_t checkpoint_part_elements(const Weight *w, Part part) {
    int n = PART[part].per_number;
    return (w->rows * w->cols + n - 1) / n;
}

Piece checkpoint_piece(Part part, const OptimizerState *s, const Segment *g) {
    // The file of the weights and .master both hold the number with the most bits.
    if (part <= PART_MASTER) part = s->master ? PART_MASTER : PART_WEIGHT;
    const PartRow *row = &PART[part];
    int n = row->per_number;
    Piece p = { 0, row->type, g->first / n, (g->count + n - 1) / n };
    memcpy(&p.data, (const char *)s + row->field, sizeof p.data);
    if (p.data) p.data += (n > 1 ? g->qblock : g->offset) * (int64_t)dtype_size(p.type);
    return p;
}

void checkpoint_check_blocks(const Checkpoint *checkpoint) {
    if (model_cuts_blocks(checkpoint->m))
        die("8-bit optimizer state: this layout cuts blocks of 256 elements|"
            "choose --fsdp and --ep so that shards fall on whole blocks");
}

unsigned checkpoint_state(const OptimizerState *s) {
    unsigned state = 0;
    if (s->master) state |= STATE_MASTER;
    if (s->m) state |= STATE_M;
    if (s->v) state |= STATE_V;
    if (s->m8) state |= STATE_8BIT;
    return state;
}

// One line on a terminal that rewrites itself, for what takes longer than two seconds.
void checkpoint_progress_start(Checkpoint *checkpoint, int64_t total) {
    checkpoint->moved = 0;
    checkpoint->to_move = total;
    checkpoint->began = checkpoint->shown = now_seconds();
}

void checkpoint_progress(Checkpoint *checkpoint, const char *verb, int64_t bytes) {
    checkpoint->moved += bytes;
    double now = now_seconds();
    if (checkpoint->rank || now - checkpoint->shown < 2 || !isatty(2)) return;
    checkpoint->shown = now;
    fprintf(stderr, "\r%s %.1f ", verb, (double)checkpoint->moved / 1e9);
    if (checkpoint->to_move) fprintf(stderr, "of %.1f ", (double)checkpoint->to_move / 1e9);
    fprintf(stderr, "GB, %.2f GB/s ", (double)checkpoint->moved / 1e9 / (now - checkpoint->began));
}

void checkpoint_progress_end(const Checkpoint *checkpoint) {
    if (checkpoint->shown > checkpoint->began) fprintf(stderr, "\n");
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
static const SafeTensor *find_weight(const Checkpoint *checkpoint, const SafeTensors *s,
                                     const Weight *w, int64_t *base) {
    int64_t shape[3] = { w->vector ? w->cols : w->rows, w->cols, 0 };
    int n = w->vector ? 1 : 2;
    char fused[FUSED_NAME], has[192], want[192];
    const SafeTensor *t = safetensors_find(s, w->name);
    *base = 0;
    if (!t && checkpoint_fused(&checkpoint->m->c, w->name, fused, base, shape)) {
        t = safetensors_find(s, fused);
        n = 3;
    }
    if (!t) return 0;
    if (!has_shape(t, n, shape)) {
        SafeTensor wanted;
        wanted.n_dims = n;
        memcpy(wanted.shape, shape, sizeof shape);
        die("%s: tensor %s has shape %s, config.json means %s|"
            "is this the config of this checkpoint?",
            s->path[t->file], t->name, safetensors_shape(t, has), safetensors_shape(&wanted, want));
    }
    int fits = t->type == DTYPE_F32 || t->type == DTYPE_BF16 || t->type == DTYPE_F16 ||
               t->type == DTYPE_F64;
    if (!fits)
        die("%s: tensor %s: weights of dtype %s are not supported|"
            "use a checkpoint in F32, BF16 or F16",
            s->path[t->file], t->name, safetensors_dtype(t));
    return t;
}

static void warn_extra(const Checkpoint *checkpoint, const SafeTensors *s, const char *dir,
                       const char *used) {
    int n = 0;
    char *list = xasprintf("%s", "");
    for (int i = 0; i < s->n; i++) {
        const SafeTensor *t = &s->tensor[i];
        const char *inv = strstr(t->name, "rotary_emb.inv_freq"); // a table that old versions saved
        const SafeTensor *embed = safetensors_find(s, "model.embed_tokens.weight");
        int head = checkpoint->m->c.tied && !strcmp(t->name, "lm_head.weight") &&
                   safetensors_equal(s, t, embed); // a tied model has its embedding
        if (used[i] || inv || head || n++ >= 5) continue;
        char *longer = xasprintf("%s %s (%s)", list, t->name, safetensors_dtype(t));
        free(list);
        list = longer;
    }
    if (n)
        warn("%s: tensors that this model has no place for are ignored:%s%s (%d in all)", dir, list,
             n > 5 ? " ..." : "", n);
    free(list);
}

int checkpoint_has_own_head(const char *dir) {
    char *file = xasprintf("%s/model.safetensors", dir);
    char *index = xasprintf("%s.index.json", file);
    int found = !access(file, F_OK) || errno != ENOENT || !access(index, F_OK) || errno != ENOENT;
    free(file);
    free(index);
    if (!found) return 0;
    SafeTensors s = safetensors_open_folder(dir);
    const SafeTensor *head = safetensors_find(&s, "lm_head.weight");
    const SafeTensor *embed = safetensors_find(&s, "model.embed_tokens.weight");
    int own = head && embed && !safetensors_equal(&s, head, embed);
    safetensors_close(&s);
    return own;
}

// Fills place (checkpoint->n) and checkpoint->source.
static void place_model(Checkpoint *checkpoint, const SafeTensors *s, const char *dir,
                        Place *place) {
    char *used = (char *)xcalloc(s->n + 1, 1, "tensor list");
    const char *missing = 0;
    int n_missing = 0;
    for (int i = 0; i < checkpoint->n; i++) {
        int64_t base;
        const SafeTensor *t = find_weight(checkpoint, s, &checkpoint->weight[i], &base);
        if (!t) {
            if (!n_missing++) missing = checkpoint->weight[i].name;
            continue;
        }
        used[t - s->tensor] = 1;
        place[i].file = t->file;
        place[i].type = checkpoint->source[i] = t->type;
        place[i].at = t->at + base * (int64_t)dtype_size(t->type);
    }
    if (missing)
        die("%s: tensor %s is missing (%d of %d are); the files have %s ...|"
            "is the checkpoint complete, and is this its config.json?",
            dir, missing, n_missing, checkpoint->n, s->n ? s->tensor[0].name : "none");
    checkpoint->has_source = 1;
    if (!checkpoint->rank) {
        warn_extra(checkpoint, s, dir, used);
    }
    free(used);
}

// ---- moving ---------------------------------------------------------------------------------
// Index of the first element that is not finite, -1 where all are: exponent bits all ones.
int64_t checkpoint_not_finite(const void *data, Dtype type, int64_t n) {
    uint64_t bad = 0;
    const uint16_t *h = (const uint16_t *)data;
    const uint16_t mask16 = type == DTYPE_BF16 ? 0x7f80 : 0x7c00;
    const uint32_t *f = (const uint32_t *)data;
    const uint32_t mask32 = 0x7f800000;
    const uint64_t *d = (const uint64_t *)data;
    const uint64_t mask64 = 0x7ff0000000000000;
    if (dtype_size(type) == 2)
        for (int64_t i = 0; i < n; i++) bad |= (h[i] & mask16) == mask16;
    if (type == DTYPE_F32)
        for (int64_t i = 0; i < n; i++) bad |= (f[i] & mask32) == mask32;
    if (type == DTYPE_F64)
        for (int64_t i = 0; i < n; i++) bad |= (d[i] & mask64) == mask64;
    if (!bad) return -1;
    int64_t i = 0;
    if (dtype_size(type) == 2)
        while ((h[i] & mask16) != mask16) i++;
    if (type == DTYPE_F32)
        while ((f[i] & mask32) != mask32) i++;
    if (type == DTYPE_F64)
        while ((d[i] & mask64) != mask64) i++;
    return i;
}

// Reads one part of one segment into the shard. Weights go to the master first; the parameter is
// the master rounded once, as after an update.
static void read_piece(Checkpoint *checkpoint, const Source *source, Place place, Part part,
                       const OptimizerState *s, const Segment *g, const char *name) {
    Piece p = checkpoint_piece(part, s, g);
    int64_t size = (int64_t)dtype_size(place.type);
    int64_t step = CHECKPOINT_STAGING / 8;
    const Source *from = &source[place.file];
    for (int64_t i = 0; i < p.count; i += step) {
        int64_t n = p.count - i < step ? p.count - i : step;
        int64_t bad;
        file_read_at(from->fd, from->path, place.at + (p.first + i) * size, checkpoint->host,
                     n * size);
        bad = checkpoint_not_finite(checkpoint->host, place.type, n);
        if (bad >= 0)
            die("%s: tensor %s%s: element %lld is NaN or infinite|"
                "the checkpoint is damaged or its training diverged: use an earlier one",
                from->path, name, PART[part].suffix, (long long)(p.first + i + bad));
        if (from->bytes)
            sums_add(&checkpoint->sums, place.file, place.at + (p.first + i) * size,
                     checkpoint->host, n * size);
        char *dst = p.data + i * (int64_t)dtype_size(p.type);
        if (place.type == p.type)
            device_upload(dst, checkpoint->host, n * size);
        else {
            device_upload(checkpoint->device, checkpoint->host, n * size);
            convert(dst, p.type, checkpoint->device, place.type, n);
        }
        if (part == PART_WEIGHT && s->master)
            convert(s->param + g->offset + i, DTYPE_FLOATX, dst, DTYPE_REAL, n);
        checkpoint_progress(checkpoint, "reading", n * size);
    }
}

static void read_part(Checkpoint *checkpoint, const Source *source, const Place *place, Part part,
                      const OptimizerState *shard) {
    for (int b = 0; b < checkpoint->m->n_blocks; b++)
        for (int i = 0; i < checkpoint->m->block[b].n_segments; i++) {
            const Segment *g = &checkpoint->m->block[b].segment[i];
            int w = checkpoint_weight(checkpoint, g);
            read_piece(checkpoint, source, place[w], part, &shard[b], g,
                       checkpoint->weight[w].name);
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

// A hub cache holds a model as links to its own blobs; a link to anywhere else would copy a file of
// the machine into every checkpoint.
static int inside_model(const char *dir, const char *path) {
    char *file = realpath(path, 0);
    char *folder = realpath(dir, 0);
    char *hub = xasprintf("%s/../../blobs", dir);
    char *blobs = realpath(hub, 0);
    const char *place[] = { folder, blobs };
    int inside = !file; // what cannot be looked up is said by who opens it
    for (int i = 0; i < 2 && file; i++) {
        size_t n = place[i] ? strlen(place[i]) : 0;
        inside |= n && !strncmp(file, place[i], n) && file[n] == '/';
    }
    if (file && !inside)
        warn("%s is a link to a file outside of the model: it is not copied into checkpoints",
             path);
    free(file);
    free(folder);
    free(hub);
    free(blobs);
    return inside;
}

typedef struct {
    Checkpoint *checkpoint;
    const char *dir;
} Attaching;
static void add_attachment(void *context, const char *name) {
    Checkpoint *checkpoint = ((Attaching *)context)->checkpoint;
    const char *dir = ((Attaching *)context)->dir;
    if (!is_attachment(name)) return;
    Attachment a = { xasprintf("%s", name), 0, 0 };
    char *path = xasprintf("%s/%s", dir, name);
    int64_t bytes = 0;
    int inside = inside_model(dir, path);
    int error = inside ? file_load(AT_FDCWD, path, 0, MAX_ATTACHMENT, &a.data, &bytes) : 0;
    if (error) warn("%s is not copied into checkpoints: %s", path, file_why(error));
    a.bytes = bytes;
    checkpoint->attachment = (Attachment *)xrealloc(
        checkpoint->attachment, checkpoint->n_attachments + 1, sizeof a, "tokenizer files");
    if (a.data)
        checkpoint->attachment[checkpoint->n_attachments++] = a;
    else
        free(a.name);
    free(path);
}

// Saved in memory (a few megabytes): the folder that the model came from may be gone by the time of
// a save, removed by --keep for one.
static void load_attachments(Checkpoint *checkpoint, const char *dir) {
    Attaching to = { checkpoint, dir };
    int fd = folder_open(AT_FDCWD, dir, 0);
    int error = fd < 0 ? errno : folder_visit(fd, add_attachment, &to);
    if (error) die("%s: cannot read the folder: %s|check the disk", dir, strerror(error));
    close(fd);
}

// ---- load and resume ------------------------------------------------------------------------
// Where part p of every weight lies in the optimizer's file, which is file number `file`.
static void place_state(const Checkpoint *checkpoint, const SafeTensors *s, int file, Part part,
                        Place *place) {
    for (int i = 0; i < checkpoint->n; i++) {
        char *name = xasprintf("%s%s", checkpoint->weight[i].name, PART[part].suffix);
        const SafeTensor *t = s->n_files ? safetensors_find(s, name) : 0;
        if (!t && part == PART_MASTER) {
            free(name);
            continue;
        }
        if (!t)
            die("%s: %s is missing|"
                "the checkpoint was written by another optimizer, or by sgd without momentum: "
                "resume with that",
                s->n_files ? s->path[0] : "optimizer.safetensors", name);
        int is_real = t->type == DTYPE_F32 || t->type == DTYPE_F64 ||
                      (part == PART_MASTER && t->type == DTYPE_BF16);
        if (safetensors_elements(t) != checkpoint_part_elements(&checkpoint->weight[i], part) ||
            (PART[part].type == DTYPE_U8 ? t->type != DTYPE_U8 : !is_real))
            die("%s: %s has another size or dtype than the model|"
                "the file belongs to another checkpoint",
                s->path[0], name);
        place[i].file = file;
        place[i].type = t->type;
        place[i].at = t->at;
        free(name);
    }
}

// What trainer.json in `dir` says, 0 where there is none (a model of another program).
static cJSON *trainer_beside(const char *dir) {
    char *path = xasprintf("%s/trainer.json", dir);
    int there = !access(path, F_OK) || errno != ENOENT;
    free(path);
    return there ? checkpoint_trainer(dir) : 0;
}

// Compares what was read with the checksums of a checkpoint of ours.
static void verify(Checkpoint *checkpoint, const char *dir, const cJSON *trainer,
                   const Source *source, int n) {
    uint32_t *sum = (uint32_t *)xcalloc(n, sizeof *sum, "checksums");
    checkpoint_whole_sums(checkpoint, source, n, sum);
    for (int i = 0; i < n; i++)
        checkpoint_check_sum(dir, trainer, strrchr(source[i].path, '/') + 1, sum[i]);
    free(sum);
}

static void load(Checkpoint *checkpoint, const char *dir, const OptimizerState *shard,
                 int with_state) {
    cJSON *trainer = trainer_beside(dir);
    if (trainer && with_state) checkpoint_check_small(dir, trainer);
    SafeTensors model = safetensors_open_folder(dir);
    SafeTensors state;
    memset(&state, 0, sizeof state);
    char *path = xasprintf("%s/optimizer.safetensors", dir);
    if (with_state && (!access(path, F_OK) || errno != ENOENT)) state = safetensors_open(path);
    int n_files = model.n_files + state.n_files;
    int sums = cJSON_HasObjectItem(trainer, "checksums");
    Source *source = (Source *)xcalloc(n_files + 1, sizeof *source, "file list");
    for (int i = 0; i < n_files; i++) {
        const SafeTensors *from = i < model.n_files ? &model : &state;
        int file = i < model.n_files ? i : 0;
        source[i].fd = from->fd[file];
        source[i].path = from->path[file];
        if (sums) source[i].bytes = from->bytes[file];
    }
    Place *place = (Place *)xmalloc(checkpoint->n * sizeof *place, "tensor places");
    if (!checkpoint->host)
        checkpoint->host = (char *)xmalloc(CHECKPOINT_STAGING, "checkpoint staging");
    checkpoint_progress_start(checkpoint, 0);
    place_model(checkpoint, &model, dir, place);
    // Masters have more bits than the model's file, where they are there.
    if (with_state) place_state(checkpoint, &state, model.n_files, PART_MASTER, place);
    read_part(checkpoint, source, place, PART_WEIGHT, shard);
    unsigned want = with_state ? checkpoint_state(shard) : 0;
    if (want & STATE_8BIT) checkpoint_check_blocks(checkpoint);
    if (with_state)
        for (Part part = PART_M; part < PARTS; part = (Part)(part + 1)) {
            if (!(want & PART[part].state)) continue;
            place_state(checkpoint, &state, model.n_files, part, place);
            read_part(checkpoint, source, place, part, shard);
        }
    if (sums) verify(checkpoint, dir, trainer, source, n_files);
    device_sync();
    checkpoint_progress_end(checkpoint);
    if (!checkpoint->rank && !checkpoint->n_attachments) load_attachments(checkpoint, dir);
    safetensors_close(&model);
    safetensors_close(&state);
    cJSON_Delete(trainer);
    free(source);
    free(place);
    free(path);
    free(checkpoint->host);
    checkpoint->host = 0;
}

void checkpoint_load_model(Checkpoint *checkpoint, const char *dir, const OptimizerState *shard) {
    load(checkpoint, dir, shard, 0);
}
void checkpoint_resume(Checkpoint *checkpoint, const char *dir, const OptimizerState *shard) {
    load(checkpoint, dir, shard, 1);
}

// ---- folders and trainer.json ---------------------------------------------------------------
int64_t checkpoint_find(Comm *all, RunFolder *run) {
    int64_t step = !all || !comm_rank(all) ? checkpoints_newest(run, INT64_MAX) : 0;
    if (all) comm_broadcast(all, &step, sizeof step, 0);
    return step;
}

char *checkpoint_folder(const char *out, int64_t step) {
    return xasprintf("%s/checkpoints/step_%" PRId64, out, step);
}

struct cJSON *checkpoint_trainer(const char *dir) {
    char *path = xasprintf("%s/trainer.json", dir);
    char *text = 0;
    int64_t bytes;
    int error = file_load(AT_FDCWD, path, 0, MAX_TRAINER, &text, &bytes);
    if (error)
        die("%s: cannot read: %s|is it a checkpoint of this program, and the disk in order?", path,
            file_why(error));
    char why[JSON_WHY] = "not a JSON object";
    cJSON *root = json_parse(text, bytes, why);
    if (!cJSON_IsObject(root))
        die("%s: %s|the checkpoint is damaged: resume from the one before it", path, why);
    if (!sums_signed(text, bytes)) checkpoint_damaged(dir, "trainer.json");
    free(text);
    free(path);
    return root;
}

double trainer_number(const struct cJSON *trainer, const char *key) {
    const cJSON *v = cJSON_GetObjectItemCaseSensitive(trainer, key);
    if (!cJSON_IsNumber(v) || v->valuedouble - v->valuedouble != 0)
        die("trainer.json: no number %s|"
            "the checkpoint was written by another version of this program",
            key);
    return v->valuedouble;
}

const char *trainer_text(const struct cJSON *trainer, const char *key) {
    const cJSON *v = cJSON_GetObjectItemCaseSensitive(trainer, key);
    if (!cJSON_IsString(v))
        die("trainer.json: no text %s|"
            "the checkpoint was written by another version of this program",
            key);
    return v->valuestring;
}
