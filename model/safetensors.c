// Reading and laying out safetensors files: see safetensors.h. A downloaded file may be cut short,
// a pointer of git-lfs, or hostile: every number of the header is checked against the file before
// it is used.
#define _POSIX_C_SOURCE 200809L
#include "safetensors.h"
#include "../kernels/fail.h"
#include <cjson/cJSON.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAX_HEADER 100000000          // the limit of the reference implementation
#define MAX_OFFSET 9007199254740992.0 // 2^53: JSON numbers arrive as doubles, exact up to here

static const struct {
    const char *name;
    Dtype type;
} TYPES[] = { { "F32", DTYPE_F32 }, { "BF16", DTYPE_BF16 }, { "F16", DTYPE_F16 },
              { "F64", DTYPE_F64 }, { "I32", DTYPE_I32 },   { "I64", DTYPE_I64 },
              { "U8", DTYPE_U8 } };
enum { N_TYPES = sizeof TYPES / sizeof *TYPES };

const char *dtype_name(Dtype type) {
    for (int i = 0; i < N_TYPES; i++)
        if (TYPES[i].type == type) return TYPES[i].name;
    return "?";
}

// ---- reading a header -----------------------------------------------------------------------
int64_t safetensors_elements(const SafeTensor *t) {
    int64_t n = 1;
    for (int i = 0; i < t->n_dims; i++) n *= t->shape[i];
    return n;
}

char *safetensors_shape(const SafeTensor *t, char *text) {
    int n = sprintf(text, "[");
    for (int i = 0; i < t->n_dims; i++)
        n += sprintf(text + n, "%s%lld", i ? ", " : "", (long long)t->shape[i]);
    sprintf(text + n, "]");
    return text;
}

// A number of the header that must be a whole one in [0, 2^53].
static int64_t whole(const cJSON *v, const char *path, const char *name, const char *what) {
    if (!cJSON_IsNumber(v) || !(v->valuedouble >= 0) || v->valuedouble > MAX_OFFSET ||
        v->valuedouble != (double)(int64_t)v->valuedouble)
        die("%s: tensor %s: %s is not a list of whole numbers|"
            "the file is damaged, copy or download it again",
            path, name, what);
    return (int64_t)v->valuedouble;
}

// One entry of the header; data_start: first byte behind the header.
static SafeTensor parse_tensor(const cJSON *entry, const char *path, int file, int64_t data_start,
                               int64_t file_bytes) {
    SafeTensor t;
    memset(&t, 0, sizeof t);
    const char *name = entry->string;
    const cJSON *type = cJSON_GetObjectItemCaseSensitive(entry, "dtype");
    const cJSON *shape = cJSON_GetObjectItemCaseSensitive(entry, "shape");
    const cJSON *dim = 0;
    const cJSON *offsets = cJSON_GetObjectItemCaseSensitive(entry, "data_offsets");
    if (!cJSON_IsString(type) || !cJSON_IsArray(shape) || cJSON_GetArraySize(offsets) != 2)
        die("%s: tensor %s: dtype, shape or data_offsets is missing|"
            "the file is damaged, copy or download it again",
            path, name);
    int i = 0;
    while (i < N_TYPES && strcmp(TYPES[i].name, type->valuestring)) i++;
    t.type = i < N_TYPES ? TYPES[i].type : SAFETENSORS_OTHER;
    if (cJSON_GetArraySize(shape) > SAFETENSORS_DIMS)
        die("%s: tensor %s has more than %d dimensions|this is no Qwen3-MoE checkpoint", path, name,
            SAFETENSORS_DIMS);
    double elements = 1;
    cJSON_ArrayForEach(dim, shape) {
        elements *= (double)(t.shape[t.n_dims++] = whole(dim, path, name, "shape"));
        if (elements > MAX_OFFSET / 8)
            die("%s: tensor %s: shape of %.3g elements|"
                "the file is damaged, copy or download it again",
                path, name, elements);
    }
    int64_t begin = whole(cJSON_GetArrayItem(offsets, 0), path, name, "data_offsets");
    int64_t end = whole(cJSON_GetArrayItem(offsets, 1), path, name, "data_offsets");
    if (begin > end || end > file_bytes - data_start)
        die("%s: tensor %s: offsets [%lld, %lld) out of range, the file has %lld bytes of data|"
            "it was cut short: copy or download it again",
            path, name, (long long)begin, (long long)end, (long long)(file_bytes - data_start));
    t.bytes = end - begin;
    t.at = data_start + begin;
    t.file = file;
    char text[192];
    if (t.type != SAFETENSORS_OTHER &&
        t.bytes != safetensors_elements(&t) * (int64_t)dtype_size(t.type))
        die("%s: tensor %s: %lld bytes do not hold shape %s of %s|"
            "the file is damaged, copy or download it again",
            path, name, (long long)t.bytes, safetensors_shape(&t, text), dtype_name(t.type));
    // The dtype's own name lies after the tensor's: see safetensors_dtype().
    size_t n = strlen(name) + 1;
    size_t n_type = strlen(type->valuestring) + 1;
    t.name = (char *)xmalloc(n + n_type, "tensor name");
    memcpy(t.name, name, n);
    memcpy(t.name + n, type->valuestring, n_type);
    return t;
}

const char *safetensors_dtype(const SafeTensor *t) { return t->name + strlen(t->name) + 1; }

static int by_place(const void *a, const void *b) {
    const SafeTensor *x = (const SafeTensor *)a;
    const SafeTensor *y = (const SafeTensor *)b;
    if (x->at != y->at) return x->at < y->at ? -1 : 1;
    return (x->bytes > y->bytes) - (x->bytes < y->bytes);
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const SafeTensor *)a)->name, ((const SafeTensor *)b)->name);
}

int safetensors_equal(const SafeTensors *s, const SafeTensor *a, const SafeTensor *b) {
    enum { PIECE = 1 << 20 };
    int same = !strcmp(safetensors_dtype(a), safetensors_dtype(b)) && a->bytes == b->bytes &&
               a->n_dims == b->n_dims && !memcmp(a->shape, b->shape, sizeof a->shape);
    char *x = (char *)xmalloc(2 * PIECE, "tensors");
    char *y = x + PIECE;
    for (int64_t at = 0; same && at < a->bytes; at += PIECE) {
        int64_t n = a->bytes - at < PIECE ? a->bytes - at : PIECE;
        safetensors_read(s, a, at, x, n);
        safetensors_read(s, b, at, y, n);
        same = !memcmp(x, y, n);
    }
    free(x);
    return same;
}

// Sorts by name. A tensor that several files hold counts once, if it is the same in all.
static void sort_names(SafeTensors *s) {
    int n = 0;
    qsort(s->tensor, s->n, sizeof *s->tensor, by_name);
    for (int i = 0; i < s->n; i++) {
        SafeTensor *t = &s->tensor[i];
        SafeTensor *last = &s->tensor[n - 1];
        if (!n || strcmp(last->name, t->name)) {
            s->tensor[n++] = *t;
            continue;
        }
        if (!safetensors_equal(s, last, t))
            die("%s: tensor %s appears twice, with other numbers in %s|"
                "the checkpoint is damaged, copy or download it again",
                s->path[last->file], t->name, s->path[t->file]);
        free(t->name);
    }
    s->n = n;
}

// The JSON of the header (caller frees) and the first byte behind it.
static char *read_header(int fd, const char *path, int64_t file_bytes, int64_t *data_start) {
    unsigned char head[9] = { 0 };
    file_read_at(fd, path, 0, head, file_bytes < 8 ? file_bytes : 8);
    if (!memcmp(head, "version ", 8))
        die("%s: a git-lfs pointer, not the weights|run: git lfs pull", path);
    if (file_bytes < 8)
        die("%s: truncated: %lld bytes are no safetensors file|copy or download it again", path,
            (long long)file_bytes);
    uint64_t length = 0;
    for (int i = 7; i >= 0; i--) length = length << 8 | head[i];
    if (length > MAX_HEADER)
        die("%s: header length %llu exceeds 100 MB|this is no safetensors file", path,
            (unsigned long long)length);
    if ((int64_t)length > file_bytes - 8)
        die("%s: truncated: the header has %llu bytes, the file %lld|copy or download it again",
            path, (unsigned long long)length, (long long)file_bytes);
    char *text = (char *)xmalloc(length + 1, "safetensors header");
    file_read_at(fd, path, 8, text, (int64_t)length);
    text[length] = 0;
    *data_start = 8 + (int64_t)length;
    return text;
}

static void add_file(SafeTensors *s, const char *path) {
    int64_t size = 0;
    int fd = file_open(AT_FDCWD, path, 0, &size);
    int file = s->n_files++;
    int error = fd < 0 ? errno : 0;
    if (error) file_check_link(path);
    if (error) die("%s: cannot open: %s|is the checkpoint complete?", path, file_why(error));
    s->path = (char **)xrealloc(s->path, s->n_files, sizeof *s->path, "list of files");
    s->fd = (int *)xrealloc(s->fd, s->n_files, sizeof *s->fd, "list of files");
    s->bytes = (int64_t *)xrealloc(s->bytes, s->n_files, sizeof *s->bytes, "list of files");
    s->bytes[file] = size;
    s->path[file] = xasprintf("%s", path);
    s->fd[file] = fd;

    int64_t data_start;
    char *text = read_header(fd, path, size, &data_start);
    char why[JSON_WHY] = "not an object";
    cJSON *root = json_parse(text, data_start - 8, why);
    if (!cJSON_IsObject(root))
        die("%s: the header is not valid: %s|the file is damaged, copy or download it again", path,
            why);
    int first = s->n;
    size_t most = s->n + (size_t)cJSON_GetArraySize(root) + 1;
    s->tensor = (SafeTensor *)xrealloc(s->tensor, most, sizeof *s->tensor, "list of tensors");
    const cJSON *entry = 0;
    cJSON_ArrayForEach(entry, root) if (strcmp(entry->string, "__metadata__")) s->tensor[s->n++] =
        parse_tensor(entry, path, file, data_start, size);
    cJSON_Delete(root);
    free(text);
    qsort(s->tensor + first, s->n - first, sizeof *s->tensor, by_place);
    for (int i = first + 1; i < s->n; i++)
        if (s->tensor[i].at < s->tensor[i - 1].at + s->tensor[i - 1].bytes)
            die("%s: tensors %s and %s overlap|the file is damaged, copy or download it again",
                path, s->tensor[i - 1].name, s->tensor[i].name);
}

SafeTensors safetensors_open(const char *path) {
    SafeTensors s;
    memset(&s, 0, sizeof s);
    add_file(&s, path);
    sort_names(&s);
    return s;
}

// ---- folders --------------------------------------------------------------------------------
// The weight_map of an index, 0 where there is no index.
static cJSON *read_index(const char *path) {
    char *text = 0;
    int64_t bytes = 0;
    int error = file_load(AT_FDCWD, path, 0, MAX_HEADER, &text, &bytes);
    if (error) file_check_link(path);
    if (error == ENOENT) return 0;
    if (error) die("%s: cannot open: %s|is the checkpoint complete?", path, file_why(error));
    char why[JSON_WHY];
    cJSON *root = json_parse(text, bytes, why);
    if (!root) die("%s: %s|the index is damaged, copy or download it again", path, why);
    cJSON *map = cJSON_DetachItemFromObjectCaseSensitive(root, "weight_map");
    if (!cJSON_IsObject(map) || !map->child)
        die("%s: no weight_map in it|the index is damaged, copy or download it again", path);
    cJSON_Delete(root);
    free(text);
    return map;
}

// What a folder without weights has instead, for the true reason.
typedef struct {
    int shards, pickles;
} Found;
static void look_for(void *context, const char *name) {
    Found *f = (Found *)context;
    size_t n = strlen(name);
    f->shards += n > 12 && !strncmp(name, "model", 5) && !strcmp(name + n - 12, ".safetensors");
    f->pickles += n > 4 && (!strcmp(name + n - 4, ".bin") || !strcmp(name + n - 4, ".pth"));
}

static void die_without_weights(const char *dir) MOE_NORETURN;
static void die_without_weights(const char *dir) {
    Found f = { 0, 0 };
    int fd = folder_open(AT_FDCWD, dir, 0);
    int error = fd < 0 ? errno : folder_visit(fd, look_for, &f);
    const char *is = "neither model.safetensors nor model.safetensors.index.json is there";
    if (error) die("%s: cannot read the folder: %s|check the disk", dir, strerror(error));
    if (f.shards)
        die("%s: %d safetensors files, but no model.safetensors.index.json|"
            "the index says which tensor is where: copy or download it, too",
            dir, f.shards);
    if (f.pickles) die("%s: %s|its .bin files are pickles: convert them to safetensors", dir, is);
    die("%s: %s|give a folder with a Hugging Face model, completely downloaded", dir, is);
}

// The name of a file beside the index, without a "./" before it; 0 for anything else.
static const char *file_beside(const cJSON *entry) {
    const char *file = cJSON_IsString(entry) ? entry->valuestring : "";
    while (!strncmp(file, "./", 2)) file += 2;
    return *file && !strchr(file, '/') ? file : 0;
}

SafeTensors safetensors_open_folder(const char *dir) {
    SafeTensors s;
    memset(&s, 0, sizeof s);
    struct stat st;
    if (stat(dir, &st) || !S_ISDIR(st.st_mode))
        die("%s: no such model folder|give a folder with config.json and model*.safetensors", dir);
    char *single = xasprintf("%s/model.safetensors", dir);
    char *index = xasprintf("%s/model.safetensors.index.json", dir);
    cJSON *map = 0;
    // As in transformers, the single file wins. A link that leads nowhere is a file that is
    // missing.
    if (!lstat(single, &st))
        add_file(&s, single);
    else if (!(map = read_index(index)))
        die_without_weights(dir);
    const cJSON *entry = 0;
    const char *last = 0;
    cJSON_ArrayForEach(entry, map) {
        const char *file = file_beside(entry);
        if (!file)
            die("%s: tensor %s: \"%s\" is not the name of a file beside it|the index is damaged",
                index, entry->string, cJSON_IsString(entry) ? entry->valuestring : "");
        if (last && !strcmp(last, file)) continue;
        last = file;
        char *path = xasprintf("%s/%s", dir, file);
        int i = 0;
        while (i < s.n_files && strcmp(s.path[i], path)) i++;
        if (i == s.n_files) add_file(&s, path);
        free(path);
    }
    sort_names(&s);
    // An index may name the head of a tied model, which no file has.
    cJSON_ArrayForEach(entry, map) {
        if (!safetensors_find(&s, entry->string) && strcmp(entry->string, "lm_head.weight"))
            die("%s: tensor %s is not in %s|"
                "the checkpoint is incomplete, copy or download it again",
                index, entry->string, file_beside(entry));
    }
    cJSON_Delete(map);
    free(single);
    free(index);
    return s;
}

void safetensors_close(SafeTensors *s) {
    for (int i = 0; i < s->n_files; i++) {
        close(s->fd[i]);
        free(s->path[i]);
    }
    for (int i = 0; i < s->n; i++) free(s->tensor[i].name);
    free(s->path);
    free(s->fd);
    free(s->bytes);
    free(s->tensor);
    memset(s, 0, sizeof *s);
}

const SafeTensor *safetensors_find(const SafeTensors *s, const char *name) {
    for (int lo = 0, hi = s->n; lo < hi;) {
        int mid = lo + (hi - lo) / 2;
        int order = strcmp(name, s->tensor[mid].name);
        if (!order) return &s->tensor[mid];
        if (order < 0)
            hi = mid;
        else
            lo = mid + 1;
    }
    return 0;
}

void safetensors_read(const SafeTensors *s, const SafeTensor *t, int64_t first, void *dst,
                      int64_t bytes) {
    if (first < 0 || bytes < 0 || first > t->bytes - bytes)
        die("%s: tensor %s: bytes [%lld, +%lld) are not in it|report this", s->path[t->file],
            t->name, (long long)first, (long long)bytes);
    file_read_at(s->fd[t->file], s->path[t->file], t->at + first, dst, bytes);
}

// ---- writing --------------------------------------------------------------------------------
char *safetensors_layout(SafeTensor *tensor, int n, size_t *header_bytes, int64_t *file_bytes) {
    size_t capacity = 64;
    size_t used = 8;
    for (int i = 0; i < n; i++) capacity += strlen(tensor[i].name) + 80 + 20 * SAFETENSORS_DIMS;
    char *h = (char *)xmalloc(capacity + 16, "safetensors header");
    used += sprintf(h + used, "{\"__metadata__\":{\"format\":\"pt\"}");
    int64_t at = 0;
    for (size_t size = 8; size; size /= 2)
        for (int i = 0; i < n; i++) {
            SafeTensor *t = &tensor[i];
            if (dtype_size(t->type) != size) continue;
            t->at = at;
            t->bytes = safetensors_elements(t) * (int64_t)size;
            used += sprintf(h + used, ",\"%s\":{\"dtype\":\"%s\",\"shape\":[", t->name,
                            dtype_name(t->type));
            for (int d = 0; d < t->n_dims; d++)
                used += sprintf(h + used, d ? ",%lld" : "%lld", (long long)t->shape[d]);
            used += sprintf(h + used, "],\"data_offsets\":[%lld,%lld]}", (long long)at,
                            (long long)(at + t->bytes));
            at += t->bytes;
        }
    h[used++] = '}';
    while (used % 64) h[used++] = ' ';
    if (used - 8 > MAX_HEADER)
        die("a safetensors header of %zu bytes exceeds the format's 100 MB|"
            "use more layers per file or the fused layout",
            used);
    for (int i = 0; i < 8; i++) h[i] = (char)((uint64_t)(used - 8) >> (8 * i) & 255);
    for (int i = 0; i < n; i++) tensor[i].at += (int64_t)used;
    *header_bytes = used;
    *file_bytes = (int64_t)used + at;
    return h;
}
