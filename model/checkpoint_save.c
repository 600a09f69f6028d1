// Writing checkpoints: see checkpoint.h.
//
//   plan     every rank: which files, which tensor where. A function of config and options alone,
//   so all ranks agree without talking. begin    one rank: is there room?, folder
//   incomplete_step_N, every file at its full size with its header shards   every rank that writes:
//   its own byte ranges of all files, synced finish   one rank: index, config, tokenizer,
//   trainer.json; then the folder gets its name
#define _GNU_SOURCE // fallocate
#include "checkpoint_parts.h"
#include "../kernels/fail.h"
#include <cjson/cJSON.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define DEFAULT_FILE_BYTES 5000000000 // Hugging Face's customary 5 GB
enum {
    SMALL_FILES = 1 << 20
}; // room for configs, index and folder, beside what is counted exactly

SaveDtype save_dtype_parse(const char *text) {
    static const char *names[] = { "", "f32", "bf16", "source" };
    for (int i = 0; i < 4; i++)
        if (!strcmp(text, names[i])) return (SaveDtype)i;
    die("--save-dtype %s|use f32, bf16 or source", text);
}

static const char *torch_name(Dtype t) {
    static const char *const names[] = { [DTYPE_F32] = "float32",
                                         [DTYPE_BF16] = "bfloat16",
                                         [DTYPE_F16] = "float16",
                                         [DTYPE_F64] = "float64" };
    return names[t];
}

// ---- plan -----------------------------------------------------------------------------------
static Dtype save_type(const Checkpoint *checkpoint, SaveDtype option, int weight) {
    if (option == SAVE_F32) return DTYPE_F32;
    if (option == SAVE_BF16) return DTYPE_BF16;
    return option == SAVE_SOURCE && checkpoint->has_source ? checkpoint->source[weight]
                                                           : DTYPE_FLOATX;
}

// Every number of type `has` is a number of type `to`.
static int holds(Dtype to, Dtype has) {
    return to == has || to == DTYPE_F64 ||
           (to == DTYPE_F32 && (has == DTYPE_BF16 || has == DTYPE_F16));
}

static SafeTensor new_tensor(char *name, Dtype type, int n_dims, int64_t d0, int64_t d1,
                             int64_t d2) {
    SafeTensor t;
    memset(&t, 0, sizeof t);
    t.name = name;
    t.type = type;
    t.n_dims = n_dims;
    t.shape[0] = d0;
    t.shape[1] = d1;
    t.shape[2] = d2;
    return t;
}

typedef struct {
    int tensor;
    int64_t base;
} Home; // the tensor of the file that holds a weight, and where the weight begins in it

// The model's tensors in the layout asked for, in table order, and each weight's home among them.
static int model_tensors(const Checkpoint *checkpoint, SaveOptions o, SafeTensor *t, Home *home) {
    int n = 0;
    for (int i = 0; i < checkpoint->n; i++) {
        const Weight *w = &checkpoint->weight[i];
        char fused[FUSED_NAME];
        int64_t shape[3];
        int64_t base = 0;
        if (o.fused && checkpoint_fused(&checkpoint->m->c, w->name, fused, &base, shape)) {
            if (!base)
                t[n++] = new_tensor(xasprintf("%s", fused), save_type(checkpoint, o.dtype, i), 3,
                                    shape[0], shape[1], shape[2]);
        } else
            t[n++] = new_tensor(xasprintf("%s", w->name), save_type(checkpoint, o.dtype, i),
                                w->vector ? 1 : 2, w->vector ? w->cols : w->rows,
                                w->vector ? 0 : w->cols, 0);
        home[i].tensor = n - 1; // an expert's tensors follow one another in the table
        home[i].base = base;
    }
    return n;
}

// Cuts n tensors into files of at most `limit` bytes; t[i].file becomes the file's number. Returns
// how many.
static int cut_files(SafeTensor *t, int n, int64_t limit) {
    int file = 0;
    int64_t used = 0;
    for (int i = 0; i < n; i++) {
        int64_t bytes = safetensors_elements(&t[i]) * (int64_t)dtype_size(t[i].type);
        if (used && used + bytes > limit) {
            file++;
            used = 0;
        }
        used += bytes;
        t[i].file = file;
    }
    return file + 1;
}

static void add_file(SavePlan *p, char *name, SafeTensor *t, int n) {
    OutFile *f = &p->file[p->n_files++];
    f->name = name;
    f->header = safetensors_layout(t, n, &f->header_bytes, &f->bytes);
    p->bytes += f->bytes;
}

static void plan_model(const Checkpoint *checkpoint, SavePlan *p) {
    Home *home = (Home *)xmalloc(checkpoint->n * sizeof *home, "save plan");
    p->tensor = (SafeTensor *)xcalloc(checkpoint->n, sizeof *p->tensor, "save plan");
    p->n_tensors = model_tensors(checkpoint, p->options, p->tensor, home);
    p->dtype = torch_name(p->tensor[0].type);
    p->n_model_files =
        cut_files(p->tensor, p->n_tensors,
                  p->options.file_bytes > 0 ? p->options.file_bytes : DEFAULT_FILE_BYTES);
    p->file = (OutFile *)xcalloc(p->n_model_files + 1, sizeof *p->file, "save plan");
    for (int i = 0, first = 0; i < p->n_model_files; i++) {
        int n = 0;
        while (first + n < p->n_tensors && p->tensor[first + n].file == i) n++;
        add_file(p,
                 p->n_model_files == 1
                     ? xasprintf("model.safetensors")
                     : xasprintf("model-%05d-of-%05d.safetensors", i + 1, p->n_model_files),
                 p->tensor + first, n);
        first += n;
    }
    p->place[PART_WEIGHT] = (Place *)xmalloc(checkpoint->n * sizeof(Place), "save plan");
    for (int i = 0; i < checkpoint->n; i++) {
        const SafeTensor *t = &p->tensor[home[i].tensor];
        Place place = { t->file, t->type, t->at + home[i].base * (int64_t)dtype_size(t->type) };
        p->place[PART_WEIGHT][i] = place;
    }
    free(home);
}

// optimizer.safetensors: what resuming needs and the model's files do not hold. A weight gets a
// .master where its file type has fewer bits than training.
static void plan_state(const Checkpoint *checkpoint, SavePlan *p, unsigned state) {
    Dtype trained = state & STATE_MASTER ? DTYPE_REAL : DTYPE_FLOATX;
    SafeTensor *t = (SafeTensor *)xmalloc((size_t)checkpoint->n * PARTS * sizeof *t, "save plan");
    int n = 0;
    for (Part part = PART_MASTER; part < PARTS; part = (Part)(part + 1))
        p->place[part] = (Place *)xmalloc(checkpoint->n * sizeof(Place), "save plan");
    for (int i = 0; i < checkpoint->n; i++)
        for (Part part = PART_MASTER; part < PARTS; part = (Part)(part + 1)) {
            const Weight *w = &checkpoint->weight[i];
            int wanted = (state & PART[part].state) != 0;
            if (part == PART_MASTER) wanted = !holds(p->place[PART_WEIGHT][i].type, trained);
            // The place is an index for now, and the offset once the file is laid out.
            Place place = { wanted ? p->n_model_files : -1,
                            part == PART_MASTER ? trained : PART[part].type, n };
            p->place[part][i] = place;
            if (!wanted) continue;
            char *name = xasprintf("%s%s", w->name, PART[part].suffix);
            int64_t elements = checkpoint_part_elements(w, part);
            if (w->vector || PART[part].per_number > 1)
                t[n++] = new_tensor(name, place.type, 1, elements, 0, 0);
            else
                t[n++] = new_tensor(name, place.type, 2, w->rows, w->cols, 0);
        }
    add_file(p, xasprintf("optimizer.safetensors"), t,
             n); // without a tensor, too: a reader finds the same files in every checkpoint
    for (Part part = PART_MASTER; part < PARTS; part = (Part)(part + 1))
        for (int i = 0; i < checkpoint->n; i++)
            if (p->place[part][i].file >= 0) p->place[part][i].at = t[p->place[part][i].at].at;
    for (int i = 0; i < n; i++) free(t[i].name);
    free(t);
}

void checkpoint_plan_free(SavePlan *p) {
    for (int i = 0; i < p->n_files; i++) {
        free(p->file[i].name);
        free(p->file[i].header);
    }
    for (int i = 0; i < p->n_tensors; i++) free(p->tensor[i].name);
    for (int i = 0; i < PARTS; i++) free(p->place[i]);
    free(p->file);
    free(p->tensor);
    free(p->folder);
    free(p->sum);
    memset(p, 0, sizeof *p);
}

// Saving as the source was cannot bring back bits that training did not keep, and a model that was
// initialised has no source.
static void warn_source(Checkpoint *checkpoint, unsigned state) {
    Dtype trained = state & STATE_MASTER ? DTYPE_REAL : DTYPE_FLOATX;
    int narrowed = 0;
    for (int i = 0; checkpoint->has_source && i < checkpoint->n; i++)
        narrowed += !holds(trained, checkpoint->source[i]);
    if (checkpoint->warned++ || checkpoint->rank) return;
    if (!checkpoint->has_source)
        fprintf(stderr, "warning: --save-dtype source: the model was not loaded, saving as %s\n",
                dtype_name(DTYPE_FLOATX));
    else if (narrowed)
        fprintf(
            stderr,
            "warning: --save-dtype source: %d of %d tensors had more bits than %s, in which this "
            "run keeps them\n",
            narrowed, checkpoint->n, dtype_name(trained));
}

static void make_plan(Checkpoint *checkpoint, RunFolder *run, int64_t step, SaveOptions o,
                      unsigned state) {
    SavePlan *p = &checkpoint->plan;
    checkpoint_plan_free(p);
    p->options = o;
    p->step = step;
    p->run = run;
    snprintf(p->name, sizeof p->name, "incomplete_step_%" PRId64, step);
    p->folder = xasprintf("%s/checkpoints/%s", run->path, p->name);
    if (state & STATE_8BIT) checkpoint_check_blocks(checkpoint);
    plan_model(checkpoint, p);
    plan_state(checkpoint, p, state);
}

void checkpoint_save_plan(Checkpoint *checkpoint, RunFolder *run, int64_t step, SaveOptions o,
                          unsigned state) {
    if (o.dtype == SAVE_SOURCE) warn_source(checkpoint, state);
    make_plan(checkpoint, run, step, o, state);
}

// ---- begin ----------------------------------------------------------------------------------
// A save that cannot be finished gives its space back before it ends the run.
static void fail(const SavePlan *p, const char *file, int error) MOE_NORETURN;
static void fail(const SavePlan *p, const char *file, int error) {
    int at = folder_open(p->run->fd, "checkpoints", O_NOFOLLOW);
    if (at >= 0) folder_remove(at, p->name);
    die("%s/%s: cannot write: %s|"
        "free disk space, lower --keep or choose another --out; earlier checkpoints are intact",
        p->folder, file, file_why(error));
}

// The descriptor of the folder that is being written.
static int open_folder(const SavePlan *p) {
    int at = checkpoints_open(p->run, 1);
    int fd = folder_open(at, p->name, O_NOFOLLOW);
    if (fd < 0) fail(p, "", errno);
    close(at);
    return fd;
}

int checkpoint_create_file(int at, const char *name, const OutFile *f) {
    int fd = file_create(at, name);
    int error = fd < 0 ? errno : 0;
    // Takes the blocks now where the file system can: a full disk or quota shows before the first
    // byte is written.
    if (!error && fallocate(fd, 0, 0, (off_t)f->bytes) &&
        (errno == ENOSPC || errno == EDQUOT || errno == EFBIG))
        error = errno;
    if (!error && ftruncate(fd, (off_t)f->bytes)) error = errno;
    if (!error) error = file_write_at(fd, 0, f->header, (int64_t)f->header_bytes);
    if (!error) error = file_sync(fd);
    if (fd >= 0 && close(fd) && !error && errno != EINTR) error = errno;
    return error;
}

static void check_room(const Checkpoint *checkpoint, int at) {
    const SavePlan *p = &checkpoint->plan;
    int64_t room = folder_free_bytes(at);
    int64_t need = p->bytes + SMALL_FILES;
    for (int i = 0; i < checkpoint->n_attachments; i++)
        need += (int64_t)checkpoint->attachment[i].bytes;
    if (room >= 0 && room < need)
        die("%s/checkpoints: a checkpoint needs %.3f GB, the disk has %.3f GB free|"
            "free disk space, lower --keep or choose another --out; earlier checkpoints are intact",
            p->run->path, (double)need / 1e9, (double)room / 1e9);
}

void checkpoint_check_room(Checkpoint *checkpoint, RunFolder *run, SaveOptions o,
                           const OptimizerState *shard) {
    make_plan(checkpoint, run, 0, o, checkpoint_state(shard)); // the source is not known yet
    if (!checkpoint->rank) check_room(checkpoint, run->fd);
    checkpoint_plan_free(&checkpoint->plan);
}

void checkpoint_save_begin(Checkpoint *checkpoint) {
    SavePlan *p = &checkpoint->plan;
    if (!p->run->moved && !run_folder_in_place(p->run))
        die("--out %s is not the folder that this run began with: it was renamed, removed or "
            "unmounted|give the folder its name back and --resume",
            p->run->path);
    int at = checkpoints_open(p->run, 1);
    check_room(checkpoint, at);
    int error = folder_remove(at, p->name);
    int fd = error ? -1 : folder_enter(at, p->name);
    if (fd < 0) fail(p, "", error ? error : errno);
    close(at);
    for (int i = 0; i < p->n_files; i++) {
        error = checkpoint_create_file(fd, p->file[i].name, &p->file[i]);
        if (error) fail(p, p->file[i].name, error);
    }
    close(fd);
}

// ---- shards ---------------------------------------------------------------------------------
int checkpoint_write_piece(Checkpoint *checkpoint, int fd, Place place, Piece p) {
    int64_t size = (int64_t)dtype_size(place.type);
    int64_t step = CHECKPOINT_STAGING / 8;
    int error = 0;
    for (int64_t i = 0; i < p.count && !error; i += step) {
        int64_t n = p.count - i < step ? p.count - i : step;
        const void *src = p.data + i * (int64_t)dtype_size(p.type);
        if (place.type != p.type) {
            convert(checkpoint->device, place.type, src, p.type, n);
            src = checkpoint->device;
        }
        device_download(checkpoint->host, src, n * size);
        int saves = checkpoint->plan.run != 0; // a dump is free to hold what is not finite
        int64_t bad = saves ? checkpoint_not_finite(checkpoint->host, place.type, n) : -1;
        if (bad >= 0) {
            checkpoint->bad = p.first + i + bad;
            return EDOM;
        }
        int64_t at = place.at + (p.first + i) * size;
        error = file_write_at(fd, at, checkpoint->host, n * size);
        if (saves) sums_add(&checkpoint->sums, place.file, at, checkpoint->host, n * size);
        checkpoint_progress(checkpoint, "writing", n * size);
    }
    return error;
}

// A checkpoint that is not finite would replace the last one that is.
static void fail_not_finite(const Checkpoint *checkpoint, Part part, const Segment *g) MOE_NORETURN;
static void fail_not_finite(const Checkpoint *checkpoint, Part part, const Segment *g) {
    const SavePlan *p = &checkpoint->plan;
    int at = folder_open(p->run->fd, "checkpoints", O_NOFOLLOW);
    if (at >= 0) folder_remove(at, p->name);
    die("step %lld is not saved: tensor %s%s: element %lld is NaN or infinite|"
        "the last checkpoint is intact: resume from it with a lower --lr or with --grad-clip",
        (long long)p->step, checkpoint->weight[checkpoint_weight(checkpoint, g)].name,
        PART[part].suffix, (long long)checkpoint->bad);
}

void checkpoint_save_shards(Checkpoint *checkpoint, const OptimizerState *shard) {
    SavePlan *p = &checkpoint->plan;
    if (!checkpoint->writer) return;
    checkpoint->host = (char *)xmalloc(CHECKPOINT_STAGING, "checkpoint staging");
    int *fd = (int *)xmalloc(p->n_files * sizeof *fd, "file list");
    int folder = open_folder(p);
    for (int i = 0; i < p->n_files; i++) {
        fd[i] = file_edit(folder, p->file[i].name);
        if (fd[i] < 0) fail(p, p->file[i].name, errno);
    }
    close(folder);
    int64_t total = 0;
    for (int pass = 0; pass < 2; pass++) { // the first counts
        if (pass) checkpoint_progress_start(checkpoint, total);
        for (int b = 0; b < checkpoint->m->n_blocks; b++)
            for (Part part = PART_WEIGHT; part < PARTS; part = (Part)(part + 1))
                for (int i = 0; i < checkpoint->m->block[b].n_segments; i++) {
                    const Segment *g = &checkpoint->m->block[b].segment[i];
                    Place place = p->place[part][checkpoint_weight(checkpoint, g)];
                    if (place.file < 0) continue;
                    Piece piece = checkpoint_piece(part, &shard[b], g);
                    total += piece.count * (int64_t)dtype_size(place.type);
                    int error =
                        pass ? checkpoint_write_piece(checkpoint, fd[place.file], place, piece) : 0;
                    if (error == EDOM) fail_not_finite(checkpoint, part, g);
                    if (error) fail(p, p->file[place.file].name, error);
                }
    }
    checkpoint_progress_end(checkpoint);
    for (int i = 0; i < p->n_files; i++) {
        int error = file_sync(fd[i]);
        if (close(fd[i]) && !error && errno != EINTR) error = errno;
        if (error) fail(p, p->file[i].name, error);
    }
    free(fd);
    free(checkpoint->host);
    checkpoint->host = 0;
}

void checkpoint_save_sums(Checkpoint *checkpoint) {
    SavePlan *p = &checkpoint->plan;
    Source *file = (Source *)xmalloc(p->n_files * sizeof *file, "file list");
    int folder = open_folder(p);
    for (int i = 0; i < p->n_files; i++) {
        file[i].path = p->file[i].name;
        file[i].fd = file_open(folder, p->file[i].name, O_NOFOLLOW, &file[i].bytes);
        if (file[i].fd < 0) fail(p, p->file[i].name, errno);
    }
    p->sum = (uint32_t *)xcalloc(p->n_files, sizeof *p->sum, "checksums");
    checkpoint_whole_sums(checkpoint, file, p->n_files, p->sum);
    for (int i = 0; i < p->n_files; i++) close(file[i].fd);
    close(folder);
    free(file);
}

// ---- finish ---------------------------------------------------------------------------------
// Writes a small file and notes its checksum.
static void write_small(const SavePlan *p, int folder, cJSON *sums, const char *name,
                        const char *data, size_t bytes) {
    int error = file_write(folder, name, data, bytes);
    if (error) fail(p, name, error);
    if (sums) sums_json_add(sums, name, checksum(0, data, bytes));
}

static char *json_text(cJSON *root) {
    char *text = cJSON_Print(root);
    if (!text) die("out of host memory for the text of a checkpoint|free memory");
    cJSON_Delete(root);
    return text;
}

static char *index_text(const SavePlan *p) {
    cJSON *index = cJSON_CreateObject();
    cJSON *metadata = cJSON_AddObjectToObject(index, "metadata");
    cJSON *map = cJSON_AddObjectToObject(index, "weight_map");
    double bytes = 0;
    for (int i = 0; i < p->n_tensors; i++) {
        bytes += (double)p->tensor[i].bytes;
        cJSON_AddItemToObject(map, p->tensor[i].name,
                              cJSON_CreateString(p->file[p->tensor[i].file].name));
    }
    cJSON_AddNumberToObject(metadata, "total_size", bytes);
    return json_text(index);
}

void checkpoint_save_finish(Checkpoint *checkpoint, const struct cJSON *trainer) {
    SavePlan *p = &checkpoint->plan;
    int folder = open_folder(p);
    cJSON *root = trainer ? cJSON_Duplicate(trainer, 1) : cJSON_CreateObject();
    static const char *ours[] = { "step", "precision", "files", "checksums" };
    for (int i = 0; i < 4; i++) cJSON_DeleteItemFromObjectCaseSensitive(root, ours[i]);
    cJSON_AddNumberToObject(root, "step", (double)p->step);
    cJSON_AddStringToObject(root, "precision", PRECISION_NAME);
    cJSON *files = cJSON_AddObjectToObject(root, "files");
    cJSON *sums = cJSON_AddObjectToObject(root, "checksums");
    for (int i = 0; i < p->n_files; i++) {
        cJSON_AddNumberToObject(files, p->file[i].name, (double)p->file[i].bytes);
        sums_json_add(sums, p->file[i].name, p->sum[i]);
    }
    char *index = index_text(p);
    char *config = config_export(&checkpoint->m->c, p->dtype);
    write_small(p, folder, sums, "model.safetensors.index.json", index, strlen(index));
    write_small(p, folder, sums, "config.json", config, strlen(config));
    for (int i = 0; i < checkpoint->n_attachments; i++) {
        const Attachment *a = &checkpoint->attachment[i];
        write_small(p, folder, sums, a->name, a->data, a->bytes);
    }
    sums_json_add(sums, "trainer.json", 0);
    char *text = sums_sign(json_text(root));
    write_small(p, folder, 0, "trainer.json", text, strlen(text));
    cJSON_free(text);
    cJSON_free(index);
    cJSON_free(config);
    int error = folder_sync(folder);
    if (error) fail(p, "", error);
    close(folder);
    int at = checkpoints_open(p->run, 1);
    checkpoints_publish(p->run, at, p->step, p->options.keep);
    close(at);
}

int64_t checkpoint_save(Checkpoint *checkpoint, RunFolder *run, int64_t step, SaveOptions o,
                        const OptimizerState *shard, const struct cJSON *trainer) {
    checkpoint_save_plan(checkpoint, run, step, o, checkpoint_state(shard));
    int64_t bytes = checkpoint->plan.bytes;
    if (!checkpoint->rank) checkpoint_save_begin(checkpoint);
    if (checkpoint->all) comm_barrier(checkpoint->all);
    checkpoint_save_shards(checkpoint, shard);
    if (checkpoint->all) comm_barrier(checkpoint->all);
    checkpoint_save_sums(checkpoint);
    if (!checkpoint->rank) checkpoint_save_finish(checkpoint, trainer);
    if (checkpoint->all) comm_barrier(checkpoint->all);
    checkpoint_plan_free(&checkpoint->plan);
    return bytes;
}
