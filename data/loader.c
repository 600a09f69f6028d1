// Token files as windows (loader.h). A window is read with open, fstat, pread and close. Keeping
// descriptors open would end at the limit of open files: a set of 100 billion tokens has a thousand
// shards. Mapping the files would turn a file that is truncated during the run, or an error of a
// network file system, into SIGBUS instead of a message. fstat also notices that a file was
// rewritten. Uses mix64 of kernels/random.h for the order.
#define _POSIX_C_SOURCE 200809L
#define _FILE_OFFSET_BITS 64
#include "loader.h"
#include "../kernels/fail.h"
#include "../kernels/random.h"
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { HEADER_BYTES = 1024, CHUNK_BYTES = 1 << 15, ROUNDS = 8 };
static const uint32_t MAGIC_UINT16 = 20240520;
static const uint32_t MAGIC_UINT32 = 20240801;
// Read when files are opened, all of them together: a fraction of a second from the page cache.
static const int64_t SCAN_BYTES = (int64_t)256 << 20;

typedef struct {
    char *name;
    int64_t tokens;       // in the file
    int64_t start;        // bytes before the first token: 0 or HEADER_BYTES
    int64_t first_window; // number of its first window among the windows of all files
    int width;            // bytes of a token: 1, 2 or 4
    int states_largest;   // the header states the largest id
    off_t size;           // a changed size or time is a changed file; inode and device numbers may
    time_t modified;      // change under a file on a network mount
} File;

struct Loader {
    File *files; // (n_files)
    int n_files, seq_len, shuffle;
    uint32_t vocab;
    uint64_t seed;
    int64_t windows, tokens;
};

// ---- reading --------------------------------------------------------------------------------
static void read_exactly(int fd, const File *f, void *to, int64_t bytes, int64_t offset) {
    for (int64_t done = 0; done < bytes;) {
        ssize_t n = pread(fd, (char *)to + done, (size_t)(bytes - done), (off_t)(offset + done));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0)
            die("%s: cannot read %lld bytes at byte %lld: %s|check the disk or the mount", f->name,
                (long long)bytes, (long long)offset, strerror(errno));
        if (!n)
            die("%s: ends at byte %lld, expected %lld more|the file was truncated: copy or "
                "tokenize it again",
                f->name, (long long)(offset + done), (long long)(bytes - done));
        done += n;
    }
}

static int file_open(const File *f) {
    int fd = open(f->name, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        die("%s: cannot open: %s|check the path given to --train or --val and its permissions",
            f->name, strerror(errno));
    return fd;
}

// The unsigned little-endian number at p, whatever the byte order of this machine.
static int64_t number_at(const unsigned char *p, int width) {
    int64_t value = 0;
    for (int i = 0; i < width; i++) value |= (int64_t)p[i] << (8 * i);
    return value;
}

// Checks tokens first to first + n - 1 of f and copies them to out (n) unless that is 0.
static void read_ids(const Loader *loader, int fd, const File *f, int64_t first, int64_t n,
                     int *out) {
    unsigned char chunk[CHUNK_BYTES];
    int64_t step = CHUNK_BYTES / f->width;
    for (int64_t i = 0; i < n; i += step) {
        int64_t count = n - i < step ? n - i : step;
        read_exactly(fd, f, chunk, count * f->width, f->start + (first + i) * f->width);
        for (int64_t k = 0; k < count; k++) {
            int64_t id = number_at(chunk + k * f->width, f->width);
            if (id >= loader->vocab)
                die("%s: token %lld is id %lld, but the model's vocabulary has %u ids (0 to %u)|"
                    "tokenize the text with this model's tokenizer, or use a config whose "
                    "vocab_size is above %lld",
                    f->name, (long long)(first + i + k), (long long)id, loader->vocab,
                    loader->vocab - 1, (long long)id);
            if (out) out[i + k] = (int)id;
        }
    }
}

// ---- the files ------------------------------------------------------------------------------
static int ends_in(const char *name, const char *ending) {
    size_t n = strlen(name);
    size_t m = strlen(ending);
    return n >= m && !strcmp(name + n - m, ending);
}

static void check_shard(const Loader *loader, File *f, int fd) {
    unsigned char header[HEADER_BYTES];
    if (f->size < HEADER_BYTES)
        die("%s: %lld bytes are too short for a token shard, whose header has %d|give shards of "
            "data/tokenize.py or .txt files",
            f->name, (long long)f->size, HEADER_BYTES);
    read_exactly(fd, f, header, HEADER_BYTES, 0);
    uint32_t magic = (uint32_t)number_at(header, 4);
    uint32_t version = (uint32_t)number_at(header + 4, 4);
    if (magic != MAGIC_UINT16 && magic != MAGIC_UINT32)
        die("%s: not a token shard: magic %u, expected %u (uint16) or %u (uint32)|tokenize it with "
            "data/tokenize.py; plain text must be named .txt",
            f->name, magic, MAGIC_UINT16, MAGIC_UINT32);
    uint32_t expected = magic == MAGIC_UINT16 ? 1 : 7;
    if (version != expected)
        die("%s: shard version %u, expected %u for magic %u|tokenize the text again with "
            "data/tokenize.py",
            f->name, version, expected, magic);
    f->width = magic == MAGIC_UINT16 ? 2 : 4;
    f->start = HEADER_BYTES;
    f->tokens = number_at(header + 8, 4);
    if (!f->tokens)
        die("%s: empty shard: its header says 0 tokens|remove it from --train or --val", f->name);
    int64_t bytes = HEADER_BYTES + f->tokens * f->width;
    if (f->size != bytes)
        die("%s: %s: %lld bytes, but its header says %lld tokens of %d bytes, which are %lld|copy "
            "or tokenize it again",
            f->name, f->size < bytes ? "truncated" : "longer than it says", (long long)f->size,
            (long long)f->tokens, f->width, (long long)bytes);
    int64_t vocab = number_at(header + 12, 4);
    int64_t largest = number_at(header + 16, 4);
    f->states_largest = largest > 0 && largest < vocab;
    if (f->states_largest && largest >= loader->vocab)
        die("%s: its largest id is %lld (tokenizer of %lld ids), but the model's vocabulary has %u "
            "ids|tokenize the text with this model's tokenizer, or use a config whose vocab_size "
            "is above %lld",
            f->name, (long long)largest, (long long)vocab, loader->vocab, (long long)largest);
}

static void check_file(const Loader *loader, File *f) {
    int fd = file_open(f);
    struct stat s;
    if (fstat(fd, &s))
        die("%s: cannot stat: %s|check the disk or the mount", f->name, strerror(errno));
    if (!S_ISREG(s.st_mode))
        die("%s: not a regular file|name the shards themselves, for example '%s/*.bin'", f->name,
            f->name);
    f->size = s.st_size;
    f->modified = s.st_mtime;
    if (ends_in(f->name, ".txt")) {
        f->width = 1;
        f->tokens = s.st_size;
        f->states_largest = loader->vocab >= 256; // no byte is larger than 255
        if (!f->tokens) die("%s: empty file|remove it from --train or --val", f->name);
    } else
        check_shard(loader, f, fd);
    close(fd);
}

static int by_name(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static void add_file(Loader *loader, const char *name) {
    loader->files = (File *)realloc(loader->files, ((size_t)loader->n_files + 1) * sizeof(File));
    if (!loader->files)
        die("out of host memory for the list of %d token files|name fewer files",
            loader->n_files + 1);
    File *f = &loader->files[loader->n_files++];
    memset(f, 0, sizeof *f);
    f->name = xasprintf("%s", name);
}

// Adds the files that the pattern matches. A name that exists is taken as it is, brackets included.
// The matches are sorted here: glob(3) sorts by the locale, which may differ between machines.
static void add_files(Loader *loader, const char *pattern) {
    struct stat s;
    if (!stat(pattern, &s)) {
        add_file(loader, pattern);
        return;
    }
    glob_t found;
    int error = glob(pattern, GLOB_NOSORT, 0, &found);
    if (error == GLOB_NOSPACE)
        die("out of host memory for the matches of '%s'|name fewer files", pattern);
    if (error || !found.gl_pathc)
        die("no file matches '%s'|check the path given to --train or --val, relative to the "
            "current folder; make shards with data/tokenize.py",
            pattern);
    qsort(found.gl_pathv, found.gl_pathc, sizeof *found.gl_pathv, by_name);
    for (size_t i = 0; i < found.gl_pathc; i++) add_file(loader, found.gl_pathv[i]);
    globfree(&found);
}

static void die_too_short(const Loader *loader, int64_t longest) {
    const char *name = loader->files[0].name;
    if (longest < 2)
        die("%s: 1 token is too little for an input and its target|give a longer text", name);
    die("%s%s: %lld tokens, at most %lld in one file; a window of --seq-len %d needs %lld (the "
        "inputs and one more target)|use --seq-len %lld or less, or more text",
        name, loader->n_files > 1 ? " and the other files" : "", (long long)loader->tokens,
        (long long)longest, loader->seq_len, (long long)loader->seq_len + 1,
        (long long)longest - 1);
}

// Compares the first ids of every file that does not state its largest one with the vocabulary.
static void scan_ids(const Loader *loader) {
    int64_t unstated = 0;
    for (int i = 0; i < loader->n_files; i++) unstated += !loader->files[i].states_largest;
    for (int i = 0; i < loader->n_files; i++) {
        const File *f = &loader->files[i];
        if (f->states_largest) continue;
        int64_t share = SCAN_BYTES / unstated / f->width;
        int fd = file_open(f);
        read_ids(loader, fd, f, 0, f->tokens < share ? f->tokens : share, 0);
        close(fd);
    }
}

Loader *loader_open(const char *const *patterns, int n_patterns, int seq_len, uint64_t seed,
                    int shuffle, int vocab) {
    if (n_patterns < 1) die("no token file given|name shards or .txt files after --train");
    if (seq_len < 1)
        die("sequence length %d is not positive|set --seq-len to the window length in tokens",
            seq_len);
    if (vocab < 1)
        die("vocabulary of %d ids is not positive|check vocab_size in the model's config", vocab);
    Loader *loader = (Loader *)xcalloc(1, sizeof *loader, "the data loader");
    loader->seq_len = seq_len;
    loader->shuffle = shuffle;
    loader->seed = seed;
    loader->vocab = (uint32_t)vocab;
    for (int p = 0; p < n_patterns; p++) add_files(loader, patterns[p]);

    int64_t longest = 0;
    for (int i = 0; i < loader->n_files; i++) {
        File *f = &loader->files[i];
        check_file(loader, f);
        f->first_window = loader->windows;
        loader->windows += (f->tokens - 1) / seq_len;
        loader->tokens += f->tokens;
        if (f->tokens > longest) longest = f->tokens;
    }
    if (!loader->windows) die_too_short(loader, longest);
    scan_ids(loader);
    return loader;
}

void loader_close(Loader *loader) {
    if (!loader) return;
    for (int i = 0; i < loader->n_files; i++) free(loader->files[i].name);
    free(loader->files);
    free(loader);
}

int64_t loader_windows(const Loader *loader) { return loader->windows; }
int64_t loader_tokens(const Loader *loader) { return loader->tokens; }
int loader_files(const Loader *loader) { return loader->n_files; }
const char *loader_file(const Loader *loader, int i) { return loader->files[i].name; }

// ---- the order ------------------------------------------------------------------------------
// A Feistel round (L, R) -> (R, L ^ f(R)) can be undone whatever f is, so the network is a
// bijection of [0, 4^h). Walking on while the value is n or more follows its cycle to the next
// member of [0, n). This is still one-to-one, because walking back along the cycle undoes it.
int64_t loader_permute(int64_t i, int64_t n, uint64_t seed, uint64_t epoch) {
    const uint64_t golden = 0x9e3779b97f4a7c15u; // 2^64 / golden ratio, splitmix64's increment
    int h = 0;
    while (h < 31 && (int64_t)1 << (2 * h) < n) h++;
    uint64_t mask = ((uint64_t)1 << h) - 1;
    uint64_t key = mix64(mix64(seed + golden) + epoch + golden);
    uint64_t x = (uint64_t)i;
    do {
        uint64_t left = x >> h;
        uint64_t right = x & mask;
        for (uint64_t r = 1; r <= ROUNDS; r++) {
            uint64_t next = left ^ (mix64(key + r * golden + right) & mask);
            left = right;
            right = next;
        }
        x = left << h | right;
    } while (x >= (uint64_t)n);
    return (int64_t)x;
}

// The file that holds `window`: the last one whose first window is not above it. A file without
// windows shares its first_window with the next file, so it is never that last one.
static int file_of(const Loader *loader, int64_t window) {
    int low = 0;
    int high = loader->n_files - 1;
    while (low < high) {
        int middle = low + (high - low + 1) / 2;
        if (loader->files[middle].first_window <= window)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

int loader_where(const Loader *loader, int64_t position, int64_t *first) {
    if (position < 0)
        die("sequence number %lld is negative|steps count from 0 here", (long long)position);
    int64_t epoch = position / loader->windows;
    int64_t window = position % loader->windows;
    if (loader->shuffle)
        window = loader_permute(window, loader->windows, loader->seed, (uint64_t)epoch);
    int file = file_of(loader, window);
    *first = (window - loader->files[file].first_window) * loader->seq_len;
    return file;
}

void loader_read(const Loader *loader, int64_t position, int *inputs, int *targets) {
    int64_t first, T = loader->seq_len;
    const File *f = &loader->files[loader_where(loader, position, &first)];
    int fd = file_open(f);
    struct stat s;
    if (fstat(fd, &s) || s.st_size != f->size || s.st_mtime != f->modified)
        die("%s: changed since the run started|leave token files alone while they are read; "
            "restart with --resume",
            f->name);
    read_ids(loader, fd, f, first, T, inputs);
    read_ids(loader, fd, f, first + T, 1, targets + T - 1);
    close(fd);
    memmove(targets, inputs + 1, (size_t)(T - 1) * sizeof *targets);
}
