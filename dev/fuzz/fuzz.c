// Coverage-guided fuzzing of everything that reads a file (libFuzzer, clang). One program a parser:
// -DFUZZ_PARSER_<name> chooses which function below gets the bytes, written to a file in memory
// first.
//
// A parser may do two things with an input: accept it, or end with die(). die() is replaced here by
// a jump back to the harness. What the parser had allocated and opened by then is released by the
// harness, so that a million refused inputs need no more memory than one. Everything else (a
// signal, a sanitizer report, more than a second, more than the memory limit) is a finding.
#define _GNU_SOURCE
#include "../../data/loader.h"       // loader_open, loader_read
#include "../../data/tokens.h"       // tokens_open, tokens_encode
#include "../../kernels/fail.h"      // die
#include "../../model/checkpoint.h"  // checkpoint_find, checkpoint_trainer
#include "../../model/model.h"       // config_read, config_export
#include "../../model/safetensors.h" // safetensors_open, safetensors_open_folder
#include <cjson/cJSON.h>
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <unistd.h>

// ---- what an input leaves when it is refused ----------------------------------------------------
// The sanitizer tells of every allocation and release of the process. Those of the present input
// are kept in a table of pointers (open addressing) and freed after a jump. Streams are closed
// first: the C library keeps them in a list.
extern int __sanitizer_install_malloc_and_free_hooks(void (*)(const volatile void *, size_t),
                                                     void (*)(const volatile void *));
enum { TABLE = 1 << 17, STREAMS = 64 };
static const volatile void *table[TABLE];
static int recording, n_live;
static FILE *stream[STREAMS];

#define UNWATCHED __attribute__((no_sanitize("address", "undefined", "coverage")))
UNWATCHED static size_t place_of(const volatile void *p) {
    size_t i = ((uintptr_t)p >> 4) * 0x9e3779b97f4a7c15ull >> 47;
    while (table[i] && table[i] != p) i = (i + 1) % TABLE;
    return i;
}

UNWATCHED static void on_malloc(const volatile void *p, size_t bytes) {
    (void)bytes;
    if (!recording || !p || n_live >= TABLE / 2) return;
    size_t i = place_of(p);
    if (!table[i]) n_live++;
    table[i] = p;
}

// Removes an entry and moves the ones after it up, so that a search still ends at the first gap.
UNWATCHED static void on_free(const volatile void *p) {
    if (!recording || !p) return;
    size_t hole = place_of(p);
    if (!table[hole]) return;
    table[hole] = 0;
    n_live--;
    for (size_t i = (hole + 1) % TABLE; table[i]; i = (i + 1) % TABLE) {
        const volatile void *q = table[i];
        table[i] = 0;
        table[place_of(q)] = q;
    }
}

FILE *__real_fopen(const char *path, const char *mode);
FILE *__wrap_fopen(const char *path, const char *mode) {
    FILE *f = __real_fopen(path, mode);
    for (int i = 0; f && recording && i < STREAMS; i++) {
        if (stream[i]) continue;
        stream[i] = f;
        break;
    }
    return f;
}

FILE *__real_fdopen(int fd, const char *mode);
FILE *__wrap_fdopen(int fd, const char *mode) {
    FILE *f = __real_fdopen(fd, mode);
    for (int i = 0; f && recording && i < STREAMS; i++) {
        if (stream[i]) continue;
        stream[i] = f;
        break;
    }
    return f;
}

int __real_fclose(FILE *f);
int __wrap_fclose(FILE *f) {
    for (int i = 0; i < STREAMS; i++)
        if (stream[i] == f) stream[i] = 0;
    return __real_fclose(f);
}

UNWATCHED static void release_all(int first_fd) {
    for (int i = 0; i < STREAMS; i++)
        if (stream[i]) __wrap_fclose(stream[i]);
    recording = 0;
    for (size_t i = 0; n_live && i < TABLE; i++) {
        if (!table[i]) continue;
        free((void *)(uintptr_t)table[i]);
        table[i] = 0;
        n_live--;
    }
    close_range((unsigned)first_fd, ~0u, 0);
}

// ---- die() jumps ------------------------------------------------------------------------------
static jmp_buf refused;
static int inside;
void __real_die(const char *format, ...);
void __wrap_die(const char *format, ...) {
    char text[256];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args); // formatting itself is under test, too
    va_end(args);
    if (getenv("FUZZ_SHOW")) fprintf(stderr, "refused: %s\n", text);
    if (!inside) {
        fprintf(stderr, "die outside of a parser: %s\n", text);
        abort();
    }
    longjmp(refused, 1);
}

// ---- files --------------------------------------------------------------------------------------
static char folder[64];

static char *path_of(const char *name) {
    static char path[192];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return path;
}

static void put_file(const char *name, const uint8_t *data, size_t size) {
    int fd = open(path_of(name), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (fd < 0 || (size && write(fd, data, size) != (ssize_t)size)) abort();
    close(fd);
}

static void remove_folder(void) {
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", folder);
    if (system(command)) perror(command);
}

// ---- the parsers --------------------------------------------------------------------------------
#if defined(FUZZ_PARSER_safetensors)
static void parse(const uint8_t *data, size_t size) {
    put_file("x.safetensors", data, size);
    SafeTensors s = safetensors_open(path_of("x.safetensors"));
    for (int i = 0; i < s.n; i++) {
        char shape[192];
        safetensors_shape(&s.tensor[i], shape);
        if (safetensors_elements(&s.tensor[i]) < 0) abort();
        if (!safetensors_find(&s, s.tensor[i].name)) abort();
        uint8_t bytes[64];
        int64_t n = s.tensor[i].bytes < 64 ? s.tensor[i].bytes : 64;
        safetensors_read(&s, &s.tensor[i], s.tensor[i].bytes - n, bytes, n);
    }
    safetensors_close(&s);
}

#elif defined(FUZZ_PARSER_index)
// Two small shards that are sound; the input is the index beside them.
static void parse(const uint8_t *data, size_t size) {
    static const char *header[2] = {
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}",
        "{\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}"
    };
    for (int i = 0; i < 2; i++) {
        uint8_t file[128] = { 0 };
        uint64_t n = strlen(header[i]);
        memcpy(file, &n, 8);
        memcpy(file + 8, header[i], n);
        put_file(i ? "2.safetensors" : "1.safetensors", file, 8 + n + 4);
    }
    put_file("model.safetensors.index.json", data, size);
    SafeTensors s = safetensors_open_folder(folder);
    safetensors_close(&s);
}

#elif defined(FUZZ_PARSER_config)
// A config that is accepted must be accepted again after its export, with the same model.
static void parse(const uint8_t *data, size_t size) {
    put_file("config.json", data, size);
    Config c = config_read(path_of("config.json"));
    char *text = config_export(&c, "float32");
    put_file("exported.json", (const uint8_t *)text, strlen(text));
    Config again = config_read(path_of("exported.json"));
    int same = c.C == again.C && c.L == again.L && c.H == again.H && c.KV == again.KV &&
               c.D == again.D && c.V == again.V && c.E == again.E && c.K == again.K &&
               c.F == again.F && c.I == again.I && c.tied == again.tied &&
               c.norm_topk == again.norm_topk && c.rope_theta == again.rope_theta &&
               c.rms_eps == again.rms_eps && !memcmp(c.is_moe, again.is_moe, (size_t)c.L);
    if (!same) {
        fprintf(stderr, "exported as %s\n", text);
        abort();
    }
    if (config_total_parameters(&c) <= 0) abort();
    free(text);
    config_free(&c);
    config_free(&again);
}

#elif defined(FUZZ_PARSER_shard) || defined(FUZZ_PARSER_mask)
static void read_windows(void) {
    const char *name = path_of("x.bin");
    LoaderOptions options = { 4, 1, 1, 300, LOSS_MASK_AUTO, 0 };
    Loader *loader = loader_open(&name, 1, options);
    int inputs[4], targets[4];
    for (int i = 0; i < 3; i++) {
        loader_read(loader, i, inputs, targets, 0);
        for (int t = 0; t < 4; t++)
            if (inputs[t] < 0 || inputs[t] >= 300 || targets[t] < -1 || targets[t] >= 300) abort();
    }
    loader_close(loader);
}
#if defined(FUZZ_PARSER_shard)
static void parse(const uint8_t *data, size_t size) {
    put_file("x.bin", data, size);
    read_windows();
}
#else
// A sound shard of 20 tokens; the input is the mask beside it.
static void parse(const uint8_t *data, size_t size) {
    int32_t header[256] = { 20240520, 1, 20 };
    uint8_t shard[sizeof header + 40] = { 0 };
    memcpy(shard, header, sizeof header);
    put_file("x.bin", shard, sizeof shard);
    put_file("x.mask", data, size);
    read_windows();
}
#endif

#elif defined(FUZZ_PARSER_vocabulary)
static void parse(const uint8_t *data, size_t size) {
    put_file("x.vocab", data, size);
    Tokens *tokens = tokens_open(path_of("x.vocab"));
    int ids[64];
    char word[16];
    size_t bytes;
    for (int id = -1; id <= tokens_vocab(tokens) && id < 300; id++) {
        tokens_piece(tokens, id, &bytes);
        tokens_show(tokens, word, sizeof word, id);
    }
    size_t tail = size < 24 ? size : 24;
    tokens_encode(tokens, ids, 64, (const char *)data + size - tail, tail);
    tokens_close(tokens);
}

#elif defined(FUZZ_PARSER_trainer)
static void parse(const uint8_t *data, size_t size) {
    mkdir(path_of("checkpoints"), 0700);
    mkdir(path_of("checkpoints/step_3"), 0700);
    put_file("checkpoints/step_3/trainer.json", data, size);
    cJSON *root = checkpoint_trainer(path_of("checkpoints/step_3"));
    trainer_number(root, "step");
    trainer_text(root, "precision");
    cJSON_Delete(root);
}
#else
#error "choose a parser: -DFUZZ_PARSER_safetensors, _index, ... as dev/mk/fuzz.mk does"
#endif

// More than a second of processor time for one input is a hang. (libFuzzer's own limit is wall
// time, which a busy machine exceeds by itself.)
static void too_long(int signal) {
    (void)signal;
    static const char text[] = "more than a second of processor time for one input\n";
    if (write(2, text, sizeof text - 1)) abort();
    abort();
}

static void set_limit(int seconds) {
    struct itimerval limit = { { 0, 0 }, { seconds, 0 } };
    setitimer(ITIMER_VIRTUAL, &limit, 0);
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc;
    (void)argv;
    snprintf(folder, sizeof folder, "/dev/shm/moe_fuzz_%d", (int)getpid());
    mkdir(folder, 0700);
    atexit(remove_folder);
    __sanitizer_install_malloc_and_free_hooks(on_malloc, on_free);
    signal(SIGVTALRM, too_long);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size > 1 << 20) return 0;
    int first_fd = dup(0); // the lowest number that is free: the parser's files lie above it
    close(first_fd);
    inside = 1;
    recording = 1;
    set_limit(1);
    if (!setjmp(refused)) parse(data, size);
    set_limit(0);
    inside = 0;
    release_all(first_fd);
    return 0;
}
