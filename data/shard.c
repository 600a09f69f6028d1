// Token files and loss masks (shard.h; the formats are in loader.h). A file is read with open,
// fstat, pread and close. Keeping descriptors open would end at the limit of open files: a set of
// 100 billion tokens has a thousand shards. Mapping the files would turn a file that is truncated
// during the run, or an error of a network file system, into SIGBUS instead of a message.
#define _POSIX_C_SOURCE 200809L
#define _FILE_OFFSET_BITS 64
#include "shard.h"
#include "../kernels/fail.h"
#include "../kernels/random.h"
#include "../model/file.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { HEADER_BYTES = 1024, CHUNK_BYTES = 1 << 15, SAMPLES = 16, SAMPLE_BYTES = 4096 };
static const uint32_t MAGIC_UINT16 = 20240520;
static const uint32_t MAGIC_UINT32 = 20240801;
static const uint32_t MAGIC_MASK = 20260520;

// ---- reading --------------------------------------------------------------------------------
// Takes `what`. Ends the run, or fills in *fault where there is one. Returns 0.
static int fail(Fault *fault, char *what, const char *hint) {
    if (!fault) die("%s|%s", what, hint);
    fault->what = what;
    fault->hint = hint;
    return 0;
}

// Those of the functions below that take a Fault return 0 where they failed.
static int read_exactly(int fd, const char *name, void *to, int64_t bytes, int64_t offset,
                        Fault *fault) {
    for (int64_t done = 0; done < bytes;) {
        ssize_t n = pread(fd, (char *)to + done, bytes - done, (off_t)(offset + done));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0)
            return fail(fault,
                        xasprintf("%s: cannot read %lld bytes at byte %lld: %s", name,
                                  (long long)bytes, (long long)offset, strerror(errno)),
                        "check the disk or the mount");
        if (!n)
            return fail(fault,
                        xasprintf("%s: ends at byte %lld, expected %lld more", name,
                                  (long long)(offset + done), (long long)(bytes - done)),
                        "the file was truncated: copy or tokenize it again");
        done += n;
    }
    return 1;
}

static int sample_file(int fd, const char *name, int64_t size, uint64_t *samples, Fault *fault) {
    unsigned char piece[SAMPLE_BYTES];
    uint64_t hash = (uint64_t)size;
    for (int i = 0; i < SAMPLES; i++) {
        int64_t last = size > SAMPLE_BYTES ? size - SAMPLE_BYTES : 0;
        int64_t bytes = size < SAMPLE_BYTES ? size : SAMPLE_BYTES;
        if (!read_exactly(fd, name, piece, bytes, last / (SAMPLES - 1) * i, fault)) return 0;
        for (int64_t k = 0; k < bytes; k++) hash = (hash ^ piece[k]) * 0x100000001b3u;
        hash = mix64(hash);
        if (!last) break;
    }
    *samples = hash;
    return 1;
}

static int fail_unopened(const char *name, Fault *fault) {
    return fail(fault, xasprintf("%s: cannot open: %s", name, strerror(errno)),
                "check the path given to --train or --val and its permissions");
}

// Opens a file that was described before. Returns -1 where that fails, or it is no longer the same;
// a new time of change alone does not matter.
static int open_same(const Identity *id, Fault *fault) {
    int64_t size;
    int fd = file_open(AT_FDCWD, id->name, 0, &size);
    struct stat s;
    if (fd < 0) return fail_unopened(id->name, fault) - 1;
    int same = !fstat(fd, &s) && S_ISREG(s.st_mode) && s.st_size == id->size;
    int touched = same && (s.st_mtim.tv_sec != id->modified.tv_sec ||
                           s.st_mtim.tv_nsec != id->modified.tv_nsec);
    uint64_t samples = id->samples;
    int read = !touched || sample_file(fd, id->name, s.st_size, &samples, fault);
    if (read && same && samples == id->samples) return fd;
    close(fd);
    if (read)
        fail(fault, xasprintf("%s is not the file that this run began with", id->name),
             "leave token files alone while they are read; bring the file back and --resume");
    return -1;
}

// The unsigned little-endian number at p, whatever the byte order of this machine.
static int64_t number_at(const unsigned char *p, int width) {
    int64_t value = 0;
    for (int i = 0; i < width; i++) value |= (int64_t)p[i] << (8 * i);
    return value;
}

// Checks tokens first to first + n - 1 of f and copies them to out (n) unless that is 0.
static int read_ids(int fd, const Shard *f, int64_t first, int64_t n, uint32_t vocab, int *out,
                    Fault *fault) {
    unsigned char chunk[CHUNK_BYTES];
    int64_t step = CHUNK_BYTES / f->width;
    for (int64_t i = 0; i < n; i += step) {
        int64_t count = n - i < step ? n - i : step;
        int64_t at = f->start + (first + i) * f->width;
        if (!read_exactly(fd, f->id.name, chunk, count * f->width, at, fault)) return 0;
        for (int64_t k = 0; k < count; k++) {
            int64_t id = number_at(chunk + k * f->width, f->width);
            if (id >= vocab)
                return fail(fault,
                            xasprintf("%s: token %lld is id %lld, but the model's vocabulary has "
                                      "%u ids (0 to %u)",
                                      f->id.name, (long long)(first + i + k), (long long)id, vocab,
                                      vocab - 1),
                            "tokenize the text with this model's tokenizer, or use a config with a "
                            "larger vocab_size");
            if (out) out[i + k] = (int)id;
        }
    }
    return 1;
}

// Sets the targets that do not count to -1: those among tokens first to first + n - 1 whose byte in
// the mask is 0. Adds the number of those that count to *counted. targets (n) may be 0.
static int read_mask(int fd, const Shard *f, int64_t first, int64_t n, int *targets,
                     int64_t *counted, Fault *fault) {
    unsigned char chunk[CHUNK_BYTES];
    for (int64_t i = 0; i < n; i += CHUNK_BYTES) {
        int64_t bytes = n - i < CHUNK_BYTES ? n - i : CHUNK_BYTES;
        if (!read_exactly(fd, f->mask.name, chunk, bytes, HEADER_BYTES + first + i, fault))
            return 0;
        for (int64_t k = 0; k < bytes; k++) {
            if (chunk[k] > 1)
                return fail(fault,
                            xasprintf("%s: the byte of token %lld is %d, not 0 or 1", f->mask.name,
                                      (long long)(first + i + k), chunk[k]),
                            "write the mask again, or use --loss-mask off");
            *counted += chunk[k];
            if (targets && !chunk[k]) targets[i + k] = -1;
        }
    }
    return 1;
}

// ---- the files ------------------------------------------------------------------------------
static int ends_in(const char *name, const char *ending) {
    size_t n = strlen(name);
    size_t m = strlen(ending);
    return n >= m && !strcmp(name + n - m, ending);
}

static void check_header(Shard *f, int fd, uint32_t vocab) {
    unsigned char header[HEADER_BYTES];
    if (f->id.size < HEADER_BYTES)
        die("%s: %lld bytes are too short for a token shard, whose header has %d|give shards of "
            "data/tokenize.py or .txt files",
            f->id.name, (long long)f->id.size, HEADER_BYTES);
    read_exactly(fd, f->id.name, header, HEADER_BYTES, 0, 0);
    uint32_t magic = (uint32_t)number_at(header, 4);
    uint32_t version = (uint32_t)number_at(header + 4, 4);
    if (magic != MAGIC_UINT16 && magic != MAGIC_UINT32)
        die("%s: not a token shard: magic %u, expected %u (uint16) or %u (uint32)|name the .bin "
            "files of data/tokenize.py, or plain text as .txt",
            f->id.name, magic, MAGIC_UINT16, MAGIC_UINT32);
    uint32_t expected = magic == MAGIC_UINT16 ? 1 : 7;
    if (version != expected)
        die("%s: shard version %u, expected %u for magic %u|tokenize the text again with "
            "data/tokenize.py",
            f->id.name, version, expected, magic);
    f->width = magic == MAGIC_UINT16 ? 2 : 4;
    f->start = HEADER_BYTES;
    f->tokens = number_at(header + 8, 4);
    if (!f->tokens)
        die("%s: empty shard: its header says 0 tokens|remove it from --train or --val",
            f->id.name);
    int64_t bytes = HEADER_BYTES + f->tokens * f->width;
    if (f->id.size != bytes)
        die("%s: %s: %lld bytes, but its header says %lld tokens of %d bytes, which are %lld|copy "
            "or tokenize it again",
            f->id.name, f->id.size < bytes ? "truncated" : "longer than it says",
            (long long)f->id.size, (long long)f->tokens, f->width, (long long)bytes);
    int64_t stated_vocab = number_at(header + 12, 4);
    int64_t largest = number_at(header + 16, 4);
    f->are_bytes = stated_vocab == 257;
    f->states_largest = largest > 0 && largest < stated_vocab;
    if (f->states_largest && largest >= vocab)
        die("%s: its largest id is %lld (tokenizer of %lld ids), but the model's vocabulary has %u "
            "ids|tokenize the text with this model's tokenizer, or use a config whose vocab_size "
            "is above %lld",
            f->id.name, (long long)largest, (long long)stated_vocab, vocab, (long long)largest);
}

// Opens the file and notes what tells it apart. The caller closes it.
static int identify(Identity *id) {
    int64_t size;
    int fd = file_open(AT_FDCWD, id->name, 0, &size);
    struct stat s;
    if (fd < 0 && errno == ESPIPE)
        die("%s: not a regular file|name the shards themselves, for example '%s/*.bin'", id->name,
            id->name);
    if (fd < 0) fail_unopened(id->name, 0);
    if (fstat(fd, &s))
        die("%s: cannot stat: %s|check the disk or the mount", id->name, strerror(errno));
    id->size = s.st_size;
    id->modified = s.st_mtim;
    id->device = s.st_dev;
    id->inode = s.st_ino;
    sample_file(fd, id->name, s.st_size, &id->samples, 0);
    return fd;
}

Shard shard_describe(const char *name, uint32_t vocab) {
    Shard f;
    memset(&f, 0, sizeof f);
    f.id.name = xasprintf("%s", name);
    int fd = identify(&f.id);
    if (ends_in(name, ".txt")) {
        f.width = 1;
        f.are_bytes = 1;
        f.tokens = f.id.size;
        f.states_largest = vocab >= 256; // no byte is larger than 255
        if (!f.tokens) die("%s: empty file|remove it from --train or --val", name);
    } else
        check_header(&f, fd, vocab);
    close(fd);
    return f;
}

void shard_free(Shard *f) {
    free(f->id.name);
    free(f->mask.name);
}

void shard_check_ids(const Shard *f, int64_t n, uint32_t vocab) {
    int fd = open_same(&f->id, 0);
    read_ids(fd, f, 0, f->tokens < n ? f->tokens : n, vocab, 0, 0);
    close(fd);
}

void shard_find_mask(Shard *f) {
    if (!ends_in(f->id.name, ".bin")) return;
    f->mask.name = xasprintf("%.*s.mask", (int)strlen(f->id.name) - 4, f->id.name);
    struct stat s;
    int error = stat(f->mask.name, &s) ? errno : 0;
    if (!error) return;
    // A link that leads nowhere is a mask that is lost, not a shard without one.
    if (error != ENOENT || !lstat(f->mask.name, &s))
        die("%s: cannot stat: %s|check the disk or the mount, or use --loss-mask off", f->mask.name,
            strerror(error));
    free(f->mask.name);
    f->mask.name = 0;
}

int64_t shard_check_mask(Shard *f, int64_t n_targets) {
    unsigned char header[HEADER_BYTES];
    const char *name = f->mask.name;
    int fd = identify(&f->mask);
    if (f->mask.size < HEADER_BYTES)
        die("%s: %lld bytes are too short for a loss mask, whose header has %d|write it again, or "
            "use --loss-mask off",
            name, (long long)f->mask.size, HEADER_BYTES);
    read_exactly(fd, name, header, HEADER_BYTES, 0, 0);
    if (number_at(header, 4) != MAGIC_MASK || number_at(header + 4, 4) != 1)
        die("%s: not a loss mask: magic %lld version %lld, expected %u version 1|write it again, "
            "or use --loss-mask off",
            name, (long long)number_at(header, 4), (long long)number_at(header + 4, 4), MAGIC_MASK);
    int64_t stated = number_at(header + 8, 4);
    if (stated != f->tokens || f->mask.size != HEADER_BYTES + stated)
        die("%s: states %lld tokens and has %lld bytes for them, but %s has %lld tokens|a mask has "
            "one byte for each token: write it again, or use --loss-mask off",
            name, (long long)stated, (long long)(f->mask.size - HEADER_BYTES), f->id.name,
            (long long)f->tokens);
    int64_t counted = 0;
    int64_t others = 0;
    read_mask(fd, f, 0, 1, 0, &others, 0);
    read_mask(fd, f, 1, n_targets, 0, &counted, 0);
    read_mask(fd, f, 1 + n_targets, f->tokens - 1 - n_targets, 0, &others, 0);
    close(fd);
    return counted;
}

int shard_read(const Shard *f, int64_t first, int64_t T, uint32_t vocab, int *inputs, int *targets,
               Fault *fault) {
    int64_t counted = 0;
    int fd = open_same(&f->id, fault);
    if (fd < 0) return 0;
    int good = read_ids(fd, f, first, T, vocab, inputs, fault) &&
               read_ids(fd, f, first + T, 1, vocab, targets + T - 1, fault);
    close(fd);
    if (!good) return 0;
    memmove(targets, inputs + 1, (T - 1) * sizeof *targets);
    if (!f->mask.name) return 1;
    fd = open_same(&f->mask, fault);
    if (fd < 0) return 0;
    good = read_mask(fd, f, first + 1, T, targets, &counted, fault);
    close(fd);
    return good;
}
