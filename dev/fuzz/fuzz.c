// Coverage-guided fuzzing of everything that reads a file (libFuzzer, clang). One program a parser:
// -DFUZZ_PARSER_<name> chooses which function below gets the bytes, written to a file in memory
// first.
//
// A parser may do two things with an input: accept it, or end with die(). die() is replaced here by
// a jump back to the harness. What the parser had allocated and opened by then is released by the
// harness, so that a million refused inputs need no more memory than one. Everything else (a
// signal, a sanitizer report, more than a second, more than the memory limit) is a finding.
#define _GNU_SOURCE
#include "../../data/loader.h"            // loader_open, loader_read
#include "../../data/tokens.h"            // tokens_open, tokens_encode
#include "../../kernels/fail.h"           // die
#include "../../model/checkpoint.h"       // checkpoint_find, checkpoint_trainer
#include "../../model/checkpoint_parts.h" // sums_sign, checkpoint_not_finite
#include "../../model/model.h"            // config_read, config_export
#include "../../model/report.h"      // report_open, report_sample, resume_check, resume_restore
#include "../../model/safetensors.h" // safetensors_open, safetensors_open_folder
#include <cjson/cJSON.h>
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <signal.h>
#include <sys/resource.h>
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

static FILE *watch(FILE *f) {
    for (int i = 0; f && recording && i < STREAMS; i++) {
        if (stream[i]) continue;
        stream[i] = f;
        break;
    }
    return f;
}

FILE *__real_fopen(const char *path, const char *mode);
FILE *__wrap_fopen(const char *path, const char *mode) { return watch(__real_fopen(path, mode)); }

FILE *__real_fdopen(int fd, const char *mode);
FILE *__wrap_fdopen(int fd, const char *mode) { return watch(__real_fdopen(fd, mode)); }

FILE *__real_open_memstream(char **text, size_t *bytes);
FILE *__wrap_open_memstream(char **text, size_t *bytes) {
    return watch(__real_open_memstream(text, bytes));
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

// A million inputs would fill the disk with warnings.
void __real_warn(const char *format, ...);
void __wrap_warn(const char *format, ...) {
    char text[256];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
}

// ---- files --------------------------------------------------------------------------------------
static char folder[64];

static char *path_of(const char *name) {
    static char path[192];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return path;
}

static void put_file(const char *name, const void *data, size_t size) {
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
#elif defined(FUZZ_PARSER_log)
// A resumed run cuts the lines of later updates away, and a last line that is torn; everything
// before stays as it is, and what is logged next is a line of its own.
enum { KEPT_STEP = 5 };
static void parse(const uint8_t *data, size_t size) {
    put_file("log.jsonl", data, size);
    RunFolder run = run_folder_look(folder);
    Grid grid = { .world = 1 };
    Model model = { .n_params = 0 };
    Trainer t = { .m = &model, .g = &grid };
    Report r = report_open(&t, &run, KEPT_STEP, 9, 0, 0);
    int64_t kept = r.log_size;
    report_close(&r);
    r = report_open(&t, &run, KEPT_STEP, 9, 0, 0);
    if (r.log_size != kept || kept > (int64_t)size || (kept && data[kept - 1] != '\n')) abort();
    report_sample(&r, KEPT_STEP, "s");
    report_close(&r);
    char *text = 0;
    int64_t bytes = 0;
    if (file_load(run.fd, "log.jsonl", 0, 1 << 21, &text, &bytes)) abort();
    if (bytes <= kept || memcmp(text, data, kept) || strncmp(text + kept, "{\"step\":5", 9))
        abort();
    for (const char *line = text, *next; line < text + kept; line = next) {
        int64_t step = strncmp(line, "{\"step\":", 8) ? 0 : strtoll(line + 8, 0, 10);
        next = (const char *)memchr(line, '\n', text + kept - line) + 1;
        if (isdigit(line[8]) && step > KEPT_STEP) abort();
    }
    free(text);
    run_folder_close(&run);
}

#elif defined(FUZZ_PARSER_checkpoint)
// The input has five parts, with a line of four equal signs between them: config.json, the index
// (empty: none), the headers of the model's and the optimizer's file, and trainer.json. Behind each
// header lie zeros. What --resume does with such a folder follows, up to the first update.
enum { SIDES = 5, ZEROS = 1 << 16, SHARDS = 1 << 20, MOST_PARAMETERS = 20000 };
static Arena arena; // for the parsers of all inputs: device memory is no allocation of malloc
static FILE *screen;

static void prepare(void) {
    arena = arena_counting("shards");
    arena_take(&arena, CHECKPOINT_STAGING + SHARDS, "all of it");
    arena_commit(&arena);
    screen = fopen("/dev/null", "w");
    // Unbuffered: a buffer that an input allocates is released with that input.
    if (!screen || setvbuf(screen, 0, _IONBF, 0)) abort();
}

static void put_header(const char *name, const char *json, size_t size) {
    char *file = (char *)calloc(8 + size + ZEROS, 1);
    uint64_t n = size;
    memcpy(file, &n, 8);
    memcpy(file + 8, json, size);
    put_file(name, file, 8 + size + ZEROS);
    free(file);
}

// An input that has a place for its checksum gets the right one: no mutation would find it.
static char *signed_text(char *text) {
    static const char own[] = "\"trainer.json\":\t\"crc32c:";
    const char *place = strstr(text, own);
    return place && strlen(place) >= sizeof own - 1 + 8 ? sums_sign(text) : text;
}

static void put_checkpoint(const uint8_t *data, size_t size, const char *dir) {
    static const char *const file[SIDES] = { "config.json", "model.safetensors.index.json",
                                             "model.safetensors", "optimizer.safetensors",
                                             "trainer.json" };
    char name[96];
    int sharded = 0;
    unlink(path_of("checkpoints/latest"));
    for (int i = 0; i < SIDES; i++) {
        const uint8_t *end = size ? (const uint8_t *)memmem(data, size, "\n====\n", 6) : 0;
        size_t n = end ? (size_t)(end - data) : size;
        snprintf(name, sizeof name, "%s/%s", dir, file[i]);
        unlink(path_of(name));
        if (i == 1) sharded = n > 0;
        if (i == 2 && sharded) snprintf(name, sizeof name, "%s/1.safetensors", dir);
        char *text = (char *)calloc(n + 1, 1);
        memcpy(text, data, n);
        if (i == 2 || i == 3)
            put_header(name, text, n);
        else if (n)
            put_file(name, i == 4 ? signed_text(text) : text, n);
        free(text);
        data += n + (end ? 6 : 0);
        size -= n + (end ? 6 : 0);
    }
}

// Takes the shards of a model on one process, with both kinds of state: a checkpoint has one.
static OptimizerState *take_shards(const Model *m, int eight_bit) {
    OptimizerState *s = (OptimizerState *)calloc(m->n_blocks, sizeof *s);
    for (int b = 0; b < m->n_blocks; b++) {
        size_t n = m->block[b].shard;
        size_t q = m->block[b].n_qblocks + 1;
        s[b].param = ARENA_TAKE(&arena, floatX, n, "param");
        s[b].master = ARENA_TAKE(&arena, real, n, "master");
        if (!eight_bit) {
            s[b].m = ARENA_TAKE(&arena, real, n, "m");
            s[b].v = ARENA_TAKE(&arena, real, n, "v");
            continue;
        }
        s[b].m8 = ARENA_TAKE(&arena, uint8_t, n, "m8");
        s[b].v8 = ARENA_TAKE(&arena, uint8_t, n, "v8");
        s[b].m_scale = ARENA_TAKE(&arena, float, q, "scales");
        s[b].v_scale = ARENA_TAKE(&arena, float, q, "scales");
    }
    return s;
}

static void resume(Config c, Options *o, const Loader *data) {
    RunFolder run = run_folder_own(folder);
    int64_t found = checkpoint_find(0, &run);
    char *dir = checkpoint_folder(folder, found);
    if (found != 3) abort(); // there is no other, and a damaged one ends the run
    cJSON *trainer = checkpoint_trainer(dir);
    int eight_bit = !strcmp(trainer_text(trainer, "optimizer"), "adamw8bit");
    if (eight_bit) o->optimizer = 2;
    resume_check(trainer, o, &c, data, dir, found, screen);
    if (c.tied && checkpoint_has_own_head(dir)) c.tied = 0;
    ShardSpec alone = { 1, 0, 1, 0, 1, 0, 0 };
    Model m = model_build(c, alone);
    Trainer t = { .m = &m };
    arena.used = 0;
    Checkpoint *checkpoint = checkpoint_create(&m, 0, 1, &arena);
    router_totals_create(&t.router, &m, 1, &arena);
    router_totals_create_host(&t.router, &m);
    OptimizerState *shard = take_shards(&m, eight_bit);
    checkpoint_resume(checkpoint, dir, shard);
    resume_restore(&t, trainer, found);
    for (int b = 0; b < m.n_blocks; b++)
        if (checkpoint_not_finite(shard[b].param, DTYPE_FLOATX, m.block[b].shard) >= 0) abort();
    checkpoint_free(checkpoint);
    router_totals_free(&t.router);
    model_free(&m);
    cJSON_Delete(trainer);
    free(shard);
    free(dir);
    run_folder_close(&run);
}

static void parse(const uint8_t *data, size_t size) {
    static char *word[] = { "fuzz", "--init", "c",    "--seq-len", "4",    "--batch",
                            "1",    "--lr",   "1e-3", "--balance", "bias", "--resume" };
    int32_t header[256] = { 20240520, 1, 40 };
    uint8_t shard[sizeof header + 80] = { 0 };
    memcpy(shard, header, sizeof header);
    put_file("x.bin", shard, sizeof shard);
    mkdir(path_of("checkpoints"), 0700);
    mkdir(path_of("checkpoints/step_3"), 0700);
    put_checkpoint(data, size, "checkpoints/step_3");
    Config c = config_read(path_of("checkpoints/step_3/config.json"));
    Options o = options_parse(sizeof word / sizeof *word, word);
    LoaderOptions options = { 4, 1337, 1, 8, LOSS_MASK_AUTO, 0 };
    const char *name = path_of("x.bin");
    Loader *loader = loader_open(&name, 1, options);
    if (config_total_parameters(&c) <= MOST_PARAMETERS) resume(c, &o, loader);
    loader_close(loader);
    options_free(&o);
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

// libFuzzer would look at the memory from a thread of its own, in whose end the sanitizer sometimes
// sees a mistake. What the process needs at most is asked after each input instead.
static void check_memory(void) {
    enum { MOST_KILOBYTES = 256 << 10 };
    struct rusage usage;
    if (getrusage(RUSAGE_SELF, &usage) || usage.ru_maxrss <= MOST_KILOBYTES) return;
    fprintf(stderr, "more than 256 MB of memory: %ld kB\n", usage.ru_maxrss);
    abort();
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc;
    (void)argv;
    snprintf(folder, sizeof folder, "/dev/shm/moe_fuzz_%d", (int)getpid());
    mkdir(folder, 0700);
    atexit(remove_folder);
    __sanitizer_install_malloc_and_free_hooks(on_malloc, on_free);
    signal(SIGVTALRM, too_long);
#ifdef FUZZ_PARSER_checkpoint
    prepare();
#endif
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
    check_memory();
    return 0;
}
