// Numbered checks of the loader and of the decode tables (loader.h, tokens.h). `make test` runs it;
// alone, with the script as argument where python3 is installed, it is
//     ./test_data [data/tokenize.py]
// The script's output is then read by the C code. Writes only to a fresh folder under $TMPDIR or
// /tmp, with one sparse file of 5 GB that takes a few blocks of disk, and removes the folder.
#define _XOPEN_SOURCE 700
#define _FILE_OFFSET_BITS 64
#include "loader.h"
#include "tokens.h"
#include "../kernels/fail.h"
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static int passed, failed;
static char folder[512];

static void check(int good, const char *what) {
    printf("%s %d %s\n", good ? "ok" : "FAILED", passed + failed + 1, what);
    fflush(stdout);
    if (good)
        passed++;
    else
        failed++;
}

// ---- writing files --------------------------------------------------------------------------
static const char *path_of(const char *name) { // valid for the next seven calls
    static char paths[8][600];
    static int next;
    char *p = paths[next++ & 7];
    snprintf(p, sizeof paths[0], "%s/%s", folder, name);
    return p;
}

static const char *write_bytes(const char *name, const void *data, size_t bytes) {
    const char *path = path_of(name);
    FILE *f = fopen(path, "wb");
    if (!f || (bytes && fwrite(data, 1, bytes, f) != bytes) || fclose(f)) {
        perror(path);
        exit(2);
    }
    return path;
}

static const char *write_text(const char *name, const char *text) {
    return write_bytes(name, text, strlen(text));
}

static void put32(unsigned char *p, uint32_t v) {
    for (int i = 0; i < 4; i++) p[i] = (unsigned char)(v >> 8 * i);
}

// A shard of `count` tokens first, first + step, ... whose header says `says` tokens (-1: count),
// with the fields [3] and [4].
static const char *write_shard(const char *name, int width, int64_t count, int64_t says,
                               uint32_t first, uint32_t step, uint32_t vocab, uint32_t largest) {
    size_t bytes = 1024 + (count * width);
    unsigned char *data = xcalloc(bytes, 1, "a test shard");
    put32(data, width == 2 ? 20240520 : 20240801);
    put32(data + 4, width == 2 ? 1 : 7);
    put32(data + 8, (uint32_t)(says < 0 ? count : says));
    put32(data + 12, vocab);
    put32(data + 16, largest);
    for (int64_t i = 0; i < count; i++)
        for (int b = 0; b < width; b++)
            data[1024 + i * width + b] = (unsigned char)((first + (uint32_t)i * step) >> 8 * b);
    const char *path = write_bytes(name, data, bytes);
    free(data);
    return path;
}

static Loader *open_one(const char *path, int T, uint64_t seed, int shuffle, int vocab) {
    LoaderOptions o = { T, seed, shuffle, vocab, LOSS_MASK_AUTO, 0 };
    return loader_open(&path, 1, o);
}

// ---- windows --------------------------------------------------------------------------------
static int is_window(const Loader *l, int64_t position, int T, int first, int step) {
    int inputs[256], targets[256];
    loader_read(l, position, inputs, targets, 0);
    for (int t = 0; t < T; t++)
        if (inputs[t] != first + t * step || targets[t] != first + (t + 1) * step) return 0;
    return 1;
}

static void test_windows(void) {
    int good = 1;
    for (int n = 2; n < 60; n++)
        for (int T = 1; T < n; T++) {
            Loader *l = open_one(write_shard("count.bin", 2, n, -1, 0, 1, 0, 0), T, 0, 0, 1000);
            good = good && loader_windows(l) == (n - 1) / T && loader_tokens(l) == n &&
                   is_window(l, loader_windows(l) - 1, T, (n - 1) / T * T - T, 1);
            loader_close(l);
        }
    check(good, "floor((n-1)/T) windows for all n < 60, T < n; the last one is the last that fits");

    Loader *l = open_one(write_shard("b16.bin", 2, 4 * 8 + 1, -1, 65500, 1, 0, 0), 8, 0, 0, 65536);
    good = loader_windows(l) == 4; // B*T+1 tokens = exactly B windows
    for (int w = 0; w < 4; w++) good = good && is_window(l, w, 8, 65500 + 8 * w, 1);
    check(good, "uint16: inputs at multiples of T, targets shifted by one, ids up to 65532");
    for (int w = 0; w < 12; w++) good = good && is_window(l, w, 8, 65500 + 8 * (w % 4), 1);
    check(good, "file order: the second and third epoch repeat the first");
    loader_close(l);

    l = open_one(write_shard("b32.bin", 4, 41, -1, 2, 3700, 0, 0), 8, 0, 0, 151936);
    for (int w = 0; w < 5; w++) good = good && is_window(l, w, 8, 2 + 3700 * 8 * w, 3700);
    check(good && loader_windows(l) == 5, "uint32: ids up to 148002");
    loader_close(l);

    unsigned char text[300];
    for (int i = 0; i < 300; i++) text[i] = (unsigned char)i;
    l = open_one(write_bytes("text.txt", text, 300), 30, 0, 0, 256);
    check(loader_windows(l) == 9 && is_window(l, 0, 30, 0, 1) && is_window(l, 7, 30, 210, 1),
          ".txt: the tokens are its bytes");
    loader_close(l);

    enum { LONG = 50000 }; // more than one chunk of the reader
    int *inputs = xmalloc(sizeof(int) * LONG, "inputs");
    int *targets = xmalloc(sizeof(int) * LONG, "targets");
    l = open_one(write_shard("long.bin", 4, LONG + 1, -1, 0, 1, 0, 0), LONG, 0, 1, LONG + 1);
    loader_read(l, 3, inputs, targets, 0);
    for (int t = 0; t < LONG; t++) good = good && inputs[t] == t && targets[t] == t + 1;
    check(good, "a window of 50,000 tokens");
    loader_close(l);
    free(inputs);
    free(targets);
}

static void test_files(void) {
    write_shard("part_2.bin", 2, 21, -1, 2000, 1, 0, 0);   // 2 windows of 10
    write_shard("part_10.bin", 4, 35, -1, 1000, 1, 0, 0);  // 3 windows; bytewise before part_2
    write_shard("part_3.bin", 2, 10, -1, 3000, 1, 0, 0);   // too short for a window
    write_shard("part_[4].bin", 2, 11, -1, 4000, 1, 0, 0); // 1 window; the name is a pattern, too
    const char *a[] = { path_of("part_[0-9]*.bin"), path_of("part_[4].bin"),
                        path_of("part_2.bin") };
    LoaderOptions o = { 10, 0, 0, 5000, LOSS_MASK_AUTO, 0 };
    Loader *l = loader_open(a, 3, o);
    static const int first[] = { 1000, 1010, 1020, 2000, 2010, 4000, 2000, 2010 };
    int good = loader_files(l) == 5 && loader_windows(l) == 8 &&
               loader_tokens(l) == 35 + 21 + 10 + 11 + 21;
    for (int w = 0; good && w < 24; w++) good = is_window(l, w, 10, first[w % 8], 1);
    check(good, "several files: globs sorted bytewise, files in the order given, no window across "
                "files, short files skipped");
    int64_t at;
    good = strstr(loader_file(l, 0), "part_10.bin") && strstr(loader_file(l, 3), "part_[4].bin");
    check(good && loader_where(l, 2, &at) == 0 && at == 20 && loader_where(l, 13, &at) == 3 &&
              at == 0 && loader_where(l, 15, &at) == 4 && at == 10,
          "loader_where names the file and the token");
    loader_close(l);
    write_shard("part_9.bin", 2, 3, -1, 0, 1, 0, 0); // the last file may be too short as well
    l = loader_open(a, 1, o);
    check(loader_windows(l) == 5 && is_window(l, 4, 10, 2010, 1),
          "the last of several files is too short for a window");
    const char *gone = path_of("part_10.bin");
    struct stat st;
    good = !stat(gone, &st) && !unlink(gone);
    check(good && loader_file_bytes(l, 0) == (int64_t)st.st_size,
          "the size of a file is that at its opening, also when the file is gone");
    loader_close(l);
}

// ---- order ----------------------------------------------------------------------------------
static int is_bijection(int64_t n, uint64_t seed, uint64_t epoch) {
    unsigned char *seen = xcalloc(n, 1, "marks");
    int good = 1;
    for (int64_t i = 0; good && i < n; i++) {
        int64_t j = loader_permute(i, n, seed, epoch);
        good = j >= 0 && j < n && !seen[j]++;
    }
    free(seen);
    return good;
}

typedef struct {
    const Loader *l;
    int64_t from, to;
    int good;
} Job;

static void *read_backwards(void *p) {
    Job *job = p;
    for (int64_t i = job->to; i-- > job->from;) {
        int64_t w = loader_permute(i % 97, 97, 5, (uint64_t)(i / 97));
        job->good = job->good && is_window(job->l, i, 16, (int)(16 * w), 1);
    }
    return 0;
}

static void test_order(void) {
    int good = 1;
    for (int64_t n = 1; n <= 300; n++)
        for (uint64_t e = 0; e < 4; e++) good = good && is_bijection(n, 1337, e);
    static const int64_t sizes[] = { 1000, 4095, 4096, 4097, 65537, 1000003 };
    for (int i = 0; i < 6; i++)
        good = good && is_bijection(sizes[i], 0, 0) && is_bijection(sizes[i], ~(uint64_t)0, 9);
    check(good, "the order is a bijection of [0, n): every n up to 300 and six up to 1,000,003");

    // Computed by the Python of README.md. With another value, old runs could not be resumed.
    static const int64_t known[10] = { 3, 9, 8, 1, 2, 4, 0, 5, 6, 7 };
    for (int i = 0; i < 10; i++) good = good && loader_permute(i, 10, 0, 0) == known[i];
    good = good && loader_permute(5, 1000, 42, 3) == 535 &&
           loader_permute(123456789, 1000000000000, 1337, 7) == 204700186592;
    check(good &&
              loader_permute(((int64_t)1 << 62) - 1, (int64_t)1 << 62, 1, 0) == 3210474823150483238,
          "the order is the specified one (known values)");

    int same_epoch = 0;
    int same_seed = 0;
    int fixed = 0;
    int neighbours = 0;
    for (int i = 0; i < 10000; i++) {
        int64_t w = loader_permute(i, 10000, 1, 0);
        same_epoch += w == loader_permute(i, 10000, 1, 1);
        same_seed += w == loader_permute(i, 10000, 2, 0);
        fixed += w == i;
        neighbours += i && llabs(w - loader_permute(i - 1, 10000, 1, 0)) == 1;
    }
    // In random permutations these are Poisson with mean 1 (neighbours 2): above 12 once in 1e6.
    check(same_epoch <= 12 && same_seed <= 12 && fixed <= 12 && neighbours <= 12,
          "orders differ between epochs and seeds as random ones do");

    int counts[256] = { 0 };
    for (uint64_t e = 0; e < 24000; e++) {
        int code = 0;
        for (int i = 0; i < 4; i++) code = 4 * code + (int)loader_permute(i, 4, 7, e);
        counts[code]++;
    }
    int orders = 0;
    for (int c = 0; c < 256; c++)
        if (counts[c]) {
            orders++;
            good = good && counts[c] > 800 && counts[c] < 1200; // 1000 +- 6.3 sigma
        }
    check(good && orders == 24, "four windows: all 24 orders equally often over 24,000 epochs");

    Loader *l = open_one(write_shard("order.bin", 2, 16 * 97 + 1, -1, 0, 1, 0, 0), 16, 5, 1, 2000);
    Job jobs[4];
    pthread_t threads[4];
    for (int i = 0; i < 4; i++) {
        jobs[i] = (Job){ l, 97 * i / 2, 97 * i / 2 + 97, 1 };
        pthread_create(&threads[i], 0, read_backwards, &jobs[i]);
    }
    for (int i = 0; i < 4; i++) {
        pthread_join(threads[i], 0);
        good = good && jobs[i].good;
    }
    check(good, "no state: four threads read backwards what the order says");
    loader_close(l);
}

// ---- what ends a run -----------------------------------------------------------------------
typedef struct {
    const char *path;
    int T, vocab;
    int64_t read;
} Case;

static void try_loader(const void *p) {
    const Case *c = p;
    Loader *l = open_one(c->path, c->T, 0, 0, c->vocab);
    int inputs[256], targets[256];
    if (c->read >= 0) loader_read(l, c->read, inputs, targets, 0);
    loader_close(l);
}

static void try_table(const void *p) { tokens_close(tokens_open(p)); }

static void try_encode(const void *p) {
    Tokens *t = tokens_open(p);
    tokens_encode(t, 0, 0, "\x01", 1);
    tokens_close(t);
}

// Runs f in a child: it must end with status 1 and one line on stderr that begins with "error: "
// and has both fragments and a hint.
static void dies(void (*f)(const void *), const void *argument, const char *a, const char *b,
                 const char *what) {
    int ends[2];
    char text[4096];
    size_t n = 0;
    fflush(stdout);
    if (pipe(ends)) {
        perror("pipe");
        exit(2);
    }
    pid_t child = fork();
    if (!child) {
        dup2(ends[1], 2);
        close(ends[0]);
        close(ends[1]);
        f(argument);
        _exit(0);
    }
    close(ends[1]);
    for (ssize_t got;
         n < sizeof text - 1 && (got = read(ends[0], text + n, sizeof text - 1 - n)) > 0;)
        n += got;
    text[n] = 0;
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    int good = WIFEXITED(status) && WEXITSTATUS(status) == 1 && !strncmp(text, "error: ", 7) &&
               strstr(text, a) && strstr(text, b) && strstr(text, "hint: ") &&
               strchr(text, '\n') == text + n - 1;
    check(good, what);
    if (!good) printf("    status %d, stderr: %s\n", WEXITSTATUS(status), text);
}

static void loader_dies(const char *path, int T, int vocab, int64_t read, const char *a,
                        const char *b, const char *what) {
    Case c = { path, T, vocab, read };
    dies(try_loader, &c, a, b, what);
}

// ---- loss masks -----------------------------------------------------------------------------
// The mask of `count` tokens in which token i has the byte bytes[i % n]; its header says `says`.
static const char *write_mask(const char *name, int64_t count, int64_t says, const char *bytes,
                              int n) {
    unsigned char *data = xcalloc(1024 + count, 1, "a test mask");
    put32(data, 20260520);
    put32(data + 4, 1);
    put32(data + 8, (uint32_t)says);
    for (int64_t i = 0; i < count; i++) data[1024 + i] = (unsigned char)bytes[i % n];
    const char *path = write_bytes(name, data, 1024 + count);
    free(data);
    return path;
}

typedef struct {
    const char *pattern[4];
    int n;
    LoaderOptions o;
} Opening;

static void try_open(const void *p) {
    const Opening *c = p;
    loader_close(loader_open(c->pattern, c->n, c->o));
}

// Whether the targets of a window are first + 1, first + 2, ..., where the byte of the token is 1.
static int is_masked_window(const Loader *l, int64_t position, int T, int first, const char *bytes,
                            int n) {
    int inputs[256], targets[256];
    loader_read(l, position, inputs, targets, 0);
    for (int t = 0; t < T; t++) {
        int target = bytes[(first + t + 1) % n] ? first + t + 1 : -1;
        if (inputs[t] != first + t || targets[t] != target) return 0;
    }
    return 1;
}

static void test_masks(void) {
    static const char bytes[] = { 0, 1, 1, 0, 0, 1, 0 };
    const char *path = write_shard("m/one.bin", 2, 60, -1, 0, 1, 0, 0);
    write_mask("m/one.mask", 60, 60, bytes, 7);
    Opening c = { { path }, 1, { 8, 0, 0, 1000, LOSS_MASK_AUTO, 0 } };
    Loader *l = loader_open(c.pattern, 1, c.o);
    int good = loader_source(l, 0)->masked;
    int64_t counted = 0;
    for (int w = 0; w < 7; w++) good = good && is_masked_window(l, w, 8, 8 * w, bytes, 7);
    for (int i = 1; i <= 56; i++) counted += bytes[i % 7];
    check(good && loader_source(l, 0)->targets == counted,
          "loss mask: targets whose own token has a 0 are -1, the others stay; their number");
    int inputs[8], targets[8];
    loader_read_source(l, 0, 3, inputs, targets, 0);
    check(inputs[0] == 24 && targets[0] == (bytes[25 % 7] ? 25 : -1) && inputs[7] == 31,
          "loader_read_source reads one window of one source, masked");
    loader_close(l);
    c.o.loss_mask = LOSS_MASK_OFF;
    l = loader_open(c.pattern, 1, c.o);
    check(is_window(l, 3, 8, 24, 1) && !loader_source(l, 0)->masked &&
              loader_source(l, 0)->targets == 56,
          "--loss-mask off: every target counts");
    loader_close(l);

    c.o.loss_mask = LOSS_MASK_AUTO;
    c.pattern[0] = path_of("m/*.bin");
    write_shard("m/two.bin", 2, 60, -1, 0, 1, 0, 0);
    dies(try_open, &c, "m/one.bin has a loss mask", "m/two.bin has none",
         "error: a mask for one shard of two");
    c.o.loss_mask = LOSS_MASK_REQUIRE;
    dies(try_open, &c, "m/two.bin: no loss mask", "require", "error: a required mask is missing");
    c.o.loss_mask = LOSS_MASK_AUTO;
    write_mask("m/two.mask", 59, 59, bytes, 7);
    dies(try_open, &c, "m/two.mask: states 59 tokens", "60 tokens",
         "error: a mask one token short");
    write_mask("m/two.mask", 61, 60, bytes, 7);
    dies(try_open, &c, "has 61 bytes", "60 tokens", "error: a mask longer than it says");
    static const char bad[] = { 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                                1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                                1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2 };
    write_mask("m/two.mask", 60, 60, bad, 60);
    dies(try_open, &c, "byte of token 59 is 2", "not 0 or 1",
         "error: a byte that is 2, after the last window");
    write_bytes("m/two.mask", bad, 40);
    dies(try_open, &c, "40 bytes", "too short for a loss mask", "error: a mask without its header");
    write_shard("m/two.mask", 2, 60, -1, 0, 1, 0, 0);
    dies(try_open, &c, "not a loss mask", "20260520", "error: a shard given as a mask");
    unlink(path_of("m/two.mask"));
    if (mkdir(path_of("m/two.mask"), 0700)) exit(2);
    dies(try_open, &c, "m/two.mask: not a regular file", "", "error: a mask that is a folder");
    rmdir(path_of("m/two.mask"));
}

// ---- mixtures -------------------------------------------------------------------------------
// Whether the sources are within one window of their shares after every n, each reads its own
// windows in order of its own (seed, epoch), and loader_count agrees.
static int follows_shares(const Opening *c, const double *weight, int sources, int T, int n) {
    Loader *l = loader_open(c->pattern, c->n, c->o);
    int64_t count[4] = { 0 };
    double total = 0;
    int good = loader_sources(l) == sources;
    for (int i = 0; i < sources; i++) total += weight[i];
    for (int s = 0; good && s < n; s++) {
        int64_t first;
        int file = loader_where(l, s, &first);
        int i = 0;
        while (i + 1 < sources && file >= loader_source(l, i + 1)->first_file) i++;
        const LoaderSource *source = loader_source(l, i);
        int64_t W = source->windows;
        int64_t window = count[i] % W;
        if (c->o.shuffle) window = loader_permute(window, W, c->o.seed, (uint64_t)(count[i] / W));
        good = first == window * T && source->files == 1; // one file each here
        count[i]++;
        for (int k = 0; k < sources; k++) {
            double share = (s + 1) * weight[k] / total;
            good = good && (double)count[k] > share - 1 && (double)count[k] < share + 1;
            if (s % 7 == 0) good = good && loader_count(l, k, s + 1) == count[k];
        }
    }
    loader_close(l);
    return good;
}

static void test_mixtures(void) {
    write_shard("a.bin", 2, 10 * 8 + 1, -1, 0, 1, 0, 0);
    write_shard("b.bin", 2, 3 * 8 + 1, -1, 1000, 1, 0, 0);
    write_shard("c@0.5", 2, 7 * 8 + 1, -1, 2000, 1, 0, 0); // a name that ends like a weight
    char *a = xasprintf("%s@0.7", path_of("[a].bin"));
    char *b = xasprintf("b=%s@.2", path_of("b.bin"));
    char *third = xasprintf("%s@0.1", path_of("c@0.5"));
    Opening c = { { a, b, third }, 3, { 8, 42, 1, 4000, LOSS_MASK_AUTO, 0 } };
    static const double weights[] = { 0.7, 0.2, 0.1 };
    check(follows_shares(&c, weights, 3, 8, 1000),
          "mixture: after every n windows each source is within one of its share; own epochs");
    Loader *l = loader_open(c.pattern, 3, c.o);
    check(strstr(loader_source(l, 0)->name, "[a].bin") && !strcmp(loader_source(l, 1)->name, "b") &&
              loader_source(l, 2)->share == 0.1 && loader_windows(l) == 20,
          "mixture: names, shares, windows");
    loader_close(l);
    c.o.shuffle = 0;
    int good = 1;
    uint64_t random = 1;
    for (int trial = 0; trial < 60; trial++) {
        double w[3];
        char *p[3];
        for (int i = 0; i < 3; i++) {
            random = random * 6364136223846793005u + 1442695040888963407u;
            int weight = 1 + (int)(random >> 33) % (trial < 30 ? 9 : 5000);
            static const char *const files[] = { "[a].bin", "b.bin", "c@0.5" };
            w[i] = weight;
            p[i] = xasprintf("%s@%d", path_of(files[i]), weight);
            c.pattern[i] = p[i];
        }
        good = good && follows_shares(&c, w, 3, 8, trial < 30 ? 200 : 12000);
        for (int i = 0; i < 3; i++) free(p[i]);
    }
    check(good, "mixture: the same for 60 random triples of weights, over whole periods");
    c.pattern[0] = path_of("a.bin");
    c.pattern[1] = b;
    static const double bare[] = { 1, 0.2 };
    c.n = 2;
    check(follows_shares(&c, bare, 2, 8, 300), "mixture: a pattern without a weight weighs 1");
    c.pattern[1] = path_of("c@0.5");
    l = loader_open(c.pattern, 2, c.o);
    check(loader_sources(l) == 1 && loader_files(l) == 2 && loader_windows(l) == 17,
          "a file whose name ends in @0.5 opens as it stands, and is no mixture");
    const char *twice[] = { path_of("b.bin"), path_of("a.bin"), path_of("m/../a.bin") };
    Loader *again = loader_open(twice, 3, c.o);
    check(!loader_shared(l, l) && !strcmp(loader_shared(l, again), twice[1]) &&
              !strcmp(loader_shared(again, again), twice[1]),
          "loader_shared: the same file under another name");
    loader_close(again);
    loader_close(l);

    const char *bad[] = { "@0", "@-1", "@1e-3", "@0.0000000001", "@nan" };
    for (int i = 0; i < 5; i++) {
        char *p = xasprintf("%s%s", path_of("[a].bin"), bad[i]);
        c.pattern[0] = p;
        c.n = 1;
        dies(try_open, &c, "is no weight", bad[i] + 1, "error: a weight that is none");
        free(p);
    }
    char *first = xasprintf("%s@1", path_of("[a].bin"));
    char *second = xasprintf("%s@1000000.000000001", path_of("[b].bin"));
    c.pattern[0] = first;
    c.pattern[1] = second;
    c.n = 2;
    dies(try_open, &c, "more than 1000000 windows", "fewer digits",
         "error: weights that never come out exactly");
    c.o.validation = 1;
    dies(try_open, &c, "--val has a weight", "", "error: a weight in --val");
    free(first);
    free(second);
    first = xasprintf("web=%s", path_of("[a].bin"));
    second = xasprintf("code=%s", path_of("b.bin"));
    c.pattern[0] = first;
    c.pattern[1] = second;
    l = loader_open(c.pattern, 2, c.o);
    check(loader_sources(l) == 2 && !strcmp(loader_source(l, 0)->name, "web") &&
              !strcmp(loader_source(l, 1)->name, "code"),
          "--val: names make sources");
    int inputs[8], targets[8];
    loader_read_source(l, 1, 2, inputs, targets, 0);
    check(inputs[0] == 1016 && targets[7] == 1024, "--val: a window of the second source");
    loader_close(l);
    c.pattern[2] = path_of("c@0.5");
    c.n = 3;
    dies(try_open, &c, "has no name", "c@0.5", "error: a name for some of --val");
    c.o.validation = 0;
    c.n = 2;
    dies(try_open, &c, "--train has names, but no weights", "", "error: names without weights");
    free(first);
    free(second);
    free(a);
    free(b);
    free(third);
}

// ---- errors ---------------------------------------------------------------------------------
static void test_errors(void) {
    unsigned char junk[2000] = { 0 };
    loader_dies(path_of("nothing_*.bin"), 4, 9, -1, "no file matches", "nothing_*.bin",
                "error: a glob without matches");
    loader_dies(folder, 4, 9, -1, "not a regular file", folder, "error: a folder");
    loader_dies(write_bytes("empty.bin", "", 0), 4, 9, -1, "0 bytes", "header",
                "error: an empty file");
    loader_dies(write_bytes("empty.txt", "", 0), 4, 256, -1, "empty file", "empty.txt",
                "error: an empty .txt");
    loader_dies(write_bytes("short.bin", junk, 1000), 4, 9, -1, "1000 bytes", "too short",
                "error: less than a header");
    loader_dies(write_bytes("magic.bin", junk, 2000), 4, 9, -1, "magic 0", "20240520",
                "error: wrong magic");
    put32(junk, 20240520);
    put32(junk + 4, 7);
    put32(junk + 8, 488);
    loader_dies(write_bytes("version.bin", junk, 2000), 4, 9, -1, "version 7", "expected 1",
                "error: wrong version");
    loader_dies(write_shard("none.bin", 2, 0, -1, 0, 1, 0, 0), 4, 9, -1, "empty shard", "none.bin",
                "error: a shard of no tokens");
    loader_dies(write_shard("cut.bin", 2, 99, 100, 0, 0, 0, 0), 4, 9, -1, "truncated", "1222 bytes",
                "error: a truncated shard");
    loader_dies(write_shard("more.bin", 4, 101, 100, 0, 0, 0, 0), 4, 9, -1, "longer than it says",
                "1428 bytes", "error: a shard longer than its header says");
    loader_dies(write_shard("huge.bin", 4, 10, 4294967295, 0, 0, 0, 0), 4, 9, -1,
                "4294967295 tokens", "truncated", "error: a count of 2^32 - 1");
    loader_dies(write_shard("one.bin", 2, 1, -1, 0, 0, 0, 0), 4, 9, -1, "1 token", "too little",
                "error: one token");
    loader_dies(write_shard("few.bin", 2, 16, -1, 0, 0, 0, 0), 16, 9, -1, "--seq-len 16 needs 17",
                "use --seq-len 15", "error: one token short of a window");
    loader_dies(write_shard("ids.bin", 2, 50, -1, 0, 1, 0, 0), 4, 40, -1, "token 40 is id 40",
                "40 ids (0 to 39)", "error: an id >= vocabulary, at the start");
    loader_dies(write_shard("high.bin", 4, 50, -1, 0xfffffff0u, 1, 0, 0), 4, 40, -1,
                "id 4294967280", "high.bin", "error: an id that is negative as int32");
    loader_dies(write_shard("states.bin", 2, 50, -1, 0, 0, 500, 499), 4, 400, -1,
                "largest id is 499", "500 ids", "error: the header states an id >= vocabulary");
    loader_dies(write_shard("lies.bin", 2, 50, -1, 0, 1, 40, 39), 4, 40, 10, "token 40 is id 40",
                "lies.bin", "error: an id above the stated largest, when read");
    loader_dies(write_bytes("high.txt", "abc\xff", 4), 1, 128, -1, "token 3 is id 255", "high.txt",
                "error: a byte >= vocabulary");
    loader_dies(path_of("ids.bin"), 0, 9, -1, "sequence length 0", "--seq-len",
                "error: sequence length 0");
    loader_dies(path_of("few.bin"), 4, 0, -1, "vocabulary of 0", "vocab_size",
                "error: vocabulary 0");
    if (geteuid()) { // root reads everything
        chmod(write_shard("secret.bin", 2, 50, -1, 0, 0, 0, 0), 0);
        loader_dies(path_of("secret.bin"), 4, 9, -1, "cannot open", "Permission denied",
                    "error: an unreadable file");
    }
}

static void cut_under(const void *p) {
    Loader *l = open_one(p, 4, 0, 0, 2000);
    int inputs[4], targets[4];
    loader_read(l, 0, inputs, targets, 0);
    if (truncate(p, 1024 + 10)) exit(2);
    loader_read(l, 1, inputs, targets, 0);
}

// A new time of change alone is no change of the data; new contents of the same size are.
static void test_touched(void) {
    const char *path = write_shard("touched.bin", 2, 50, -1, 0, 1, 0, 0);
    static const struct timespec then[2] = { { 1000000000, 0 }, { 1000000000, 0 } };
    Loader *l = open_one(path, 4, 0, 0, 2000);
    int inputs[4], targets[4];
    Fault fault = { 0, 0 };
    if (utimensat(AT_FDCWD, path, then, 0)) exit(2);
    check(is_window(l, 2, 4, 8, 1), "a file that was only touched is read on");
    write_shard("touched.bin", 2, 50, -1, 1, 1, 0, 0);
    check(!loader_read(l, 3, inputs, targets, &fault) && strstr(fault.what, path),
          "new contents of the same size are noticed");
    free(fault.what);
    unlink(path);
    check(!loader_read_source(l, 0, 3, inputs, targets, &fault) &&
              strstr(fault.what, "cannot open"),
          "a file that is gone is noticed");
    free(fault.what);
    loader_close(l);
}

static void remove_under(const void *p) {
    Loader *l = open_one(p, 4, 0, 0, 2000);
    int inputs[4], targets[4];
    if (unlink(p)) exit(2);
    loader_read(l, 1, inputs, targets, 0);
}

static void test_changes(void) {
    test_touched();
    dies(cut_under, write_shard("under.bin", 2, 50, -1, 0, 1, 0, 0), "is not the file", "under.bin",
         "error: a file truncated under the run");
    dies(remove_under, write_shard("gone.bin", 2, 50, -1, 0, 1, 0, 0), "cannot open", "gone.bin",
         "error: a file removed under the run");
}

// 2.5e9 uint16 tokens, all 0 except ten beyond 4 GiB: the token index exceeds int32, the byte
// offset uint32.
static void test_large(void) {
    const int64_t tokens = 2500000000;
    const int64_t at = 2400000000;
    unsigned char head[1024] = { 0 };
    unsigned char ids[20];
    put32(head, 20240520);
    put32(head + 4, 1);
    put32(head + 8, (uint32_t)tokens);
    for (int i = 0; i < 10; i++) {
        ids[2 * i] = (unsigned char)(i + 1);
        ids[2 * i + 1] = 0;
    }
    const char *path = path_of("large.bin");
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    int made =
        fd >= 0 && !ftruncate(fd, (off_t)(1024 + 2 * tokens)) && pwrite(fd, head, 1024, 0) == 1024;
    if (!made || pwrite(fd, ids, 20, (off_t)(1024 + 2 * at)) != 20) {
        perror(path);
        exit(2);
    }
    close(fd);
    Loader *l = open_one(path, 100, 0, 0, 11);
    int inputs[100], targets[100];
    loader_read(l, at / 100, inputs, targets, 0);
    check(loader_tokens(l) == tokens && loader_windows(l) == 24999999 && inputs[0] == 1 &&
              inputs[9] == 10 && inputs[10] == 0 && targets[8] == 10,
          "a shard of 2.5e9 tokens (5 GB, sparse): counted unsigned, read beyond 4 GiB");
    loader_close(l);
    loader_dies(path, 100, 10, at / 100, "token 2400000009 is id 10", "10 ids",
                "error: a bad id beyond 2^31 tokens, when its window is read");
    unlink(path);
}

#include "test_tokens.h"

int main(int argc, char **argv) {
    const char *tmp = getenv("TMPDIR");
    snprintf(folder, sizeof folder, "%s/test_data_XXXXXX", tmp && *tmp ? tmp : "/tmp");
    if (!mkdtemp(folder)) {
        perror(folder);
        return 2;
    }
    test_windows();
    test_files();
    test_order();
    if (mkdir(path_of("m"), 0700)) return 2;
    test_masks();
    test_mixtures();
    test_errors();
    test_changes();
    test_large();
    test_tokens();
    if (argc > 1) test_script(argv[1]);
    char *command = xasprintf("rm -r '%s'", folder);
    if (system(command)) printf("could not remove %s\n", folder);
    free(command);
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
