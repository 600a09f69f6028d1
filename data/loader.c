// Which window of which file a sequence number means (loader.h): the files that patterns name, the
// sources of a mixture and their schedule, the order within a source. Reads windows through
// shard.h; uses mix64 of kernels/random.h for the order.
#define _POSIX_C_SOURCE 200809L
#define _FILE_OFFSET_BITS 64
#include "loader.h"
#include "../kernels/fail.h"
#include "../kernels/random.h"
#include "shard.h"
#include <glob.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { ROUNDS = 8 };
static const uint64_t GOLDEN = 0x9e3779b97f4a7c15u; // 2^64 / golden ratio, splitmix64's increment
// Read when files are opened, all of them together: a fraction of a second from the page cache.
static const int64_t SCAN_BYTES = (int64_t)256 << 20;

struct Loader {
    LoaderOptions o;
    uint32_t vocab;
    Shard *files; // (n_files)
    int n_files, n_sources;
    LoaderSource *source; // (n_sources)
    int64_t windows, tokens;
    // The schedule of a mixture, which repeats after `period` windows: turn k of a period is number
    // turn_number[k] of the quota[i] that source i = turn_source[k] has in it.
    int64_t *quota; // (n_sources)
    int64_t period; // the sum of the quotas
    uint16_t *turn_source;
    int32_t *turn_number;
};

// ---- the files ------------------------------------------------------------------------------
static int by_name(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static void add_file(Loader *loader, const char *name) {
    loader->files = (Shard *)realloc(loader->files, (loader->n_files + 1) * sizeof(Shard));
    if (!loader->files)
        die("out of host memory for the list of %d token files|name fewer files",
            loader->n_files + 1);
    loader->files[loader->n_files++] = shard_describe(name, loader->vocab);
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

static void die_too_short(const Loader *loader, const LoaderSource *s) {
    int64_t longest = 0;
    for (int i = s->first_file; i < s->first_file + s->files; i++)
        if (loader->files[i].tokens > longest) longest = loader->files[i].tokens;
    const char *name = loader->files[s->first_file].id.name;
    if (longest < 2)
        die("%s: 1 token is too little for an input and its target|give a longer text", name);
    die("%s%s: %lld tokens, at most %lld in one file; a window of --seq-len %d needs %lld (the "
        "inputs and one more target)|use --seq-len %lld or less, or more text",
        name, s->files > 1 ? " and the other files" : "", (long long)s->tokens, (long long)longest,
        loader->o.seq_len, (long long)loader->o.seq_len + 1, (long long)longest - 1);
}

// Compares the first ids of every file that does not state its largest one with the vocabulary.
static void scan_ids(const Loader *loader) {
    int64_t unstated = 0;
    for (int i = 0; i < loader->n_files; i++) unstated += !loader->files[i].states_largest;
    for (int i = 0; i < loader->n_files; i++) {
        const Shard *f = &loader->files[i];
        if (!f->states_largest) shard_check_ids(f, SCAN_BYTES / unstated / f->width, loader->vocab);
    }
}

static void find_masks(Loader *loader, LoaderSource *s) {
    if (loader->o.loss_mask == LOSS_MASK_OFF) return;
    const Shard *with = 0;
    const Shard *without = 0;
    for (int i = s->first_file; i < s->first_file + s->files; i++) {
        Shard *f = &loader->files[i];
        shard_find_mask(f);
        if (f->mask.name)
            with = f;
        else
            without = f;
    }
    if (without && loader->o.loss_mask == LOSS_MASK_REQUIRE)
        die("%s: no loss mask, which --loss-mask require asks for|name shards x.bin with x.mask "
            "beside each",
            without->id.name);
    if (with && without)
        die("%s has a loss mask, but %s has none|give every shard its mask, or use --loss-mask off",
            with->id.name, without->id.name);
    s->masked = with != 0;
}

static void measure(Loader *loader, LoaderSource *s) {
    int64_t T = loader->o.seq_len;
    for (int i = s->first_file; i < s->first_file + s->files; i++) {
        Shard *f = &loader->files[i];
        f->first_window = s->windows;
        s->windows += (f->tokens - 1) / T;
        s->tokens += f->tokens;
    }
    if (!s->windows) die_too_short(loader, s);
    find_masks(loader, s);
    for (int i = s->first_file; i < s->first_file + s->files; i++) {
        Shard *f = &loader->files[i];
        int64_t n_targets = (f->tokens - 1) / T * T;
        s->targets += s->masked ? shard_check_mask(f, n_targets) : n_targets;
    }
    loader->windows += s->windows;
    loader->tokens += s->tokens;
}

// ---- sources --------------------------------------------------------------------------------
typedef struct {
    char *name;     // before the =, else 0
    char *files;    // name or glob
    int64_t weight; // in billionths, 0: none given
    int source;
} Pattern;

enum { BILLION = 1000000000, MOST_PERIOD = 1000000, MOST_SOURCES = 1000 };

static int matches_a_file(const char *pattern) {
    struct stat s;
    if (!stat(pattern, &s)) return 1;
    glob_t found;
    int some = !glob(pattern, GLOB_NOSORT, 0, &found) && found.gl_pathc;
    globfree(&found);
    return some;
}

// A weight in billionths. Weights are decimal numbers, so that shares are exact fractions.
static int64_t parse_weight(const char *pattern, const char *text) {
    int64_t value = 0;
    int64_t unit = BILLION;
    const char *p = text;
    for (; *p >= '0' && *p <= '9' && value < (int64_t)BILLION * 1000000; p++)
        value = 10 * value + (*p - '0') * unit;
    if (*p == '.')
        for (p++; *p >= '0' && *p <= '9' && unit > 1; p++) {
            unit /= 10;
            value += (*p - '0') * unit;
        }
    if (*p || !value)
        die("'%s': %s is no weight|write a decimal number above 0 after the @, such as 0.25",
            pattern, text);
    return value;
}

static Pattern parse_pattern(const char *text) {
    Pattern p = { 0, 0, 0, 0 };
    p.files = xasprintf("%s", text);
    if (matches_a_file(text)) return p;
    char *at = strrchr(p.files, '@');
    char *end = 0;
    if (at && at[1]) strtod(at + 1, &end);
    if (end && !*end) {
        p.weight = parse_weight(text, at + 1);
        *at = 0;
        if (matches_a_file(p.files)) return p;
    }
    size_t n = strspn(p.files, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-");
    if (n && p.files[n] == '=' && p.files[n + 1]) {
        p.name = xasprintf("%.*s", (int)n, p.files);
        memmove(p.files, p.files + n + 1, strlen(p.files + n));
    }
    return p;
}

static const char *label(const Pattern *p) { return p->name ? p->name : p->files; }

// Says which patterns make a source together: those of one name, else each pattern for itself, and
// all of them where nothing sets them apart. Returns the number of sources.
static int group(Pattern *p, int n, int validation) {
    int named = 0;
    int weighted = 0;
    const char *nameless = 0;
    for (int i = 0; i < n; i++) {
        named += p[i].name != 0;
        weighted += p[i].weight != 0;
        if (!p[i].name) nameless = p[i].files;
    }
    if (validation && weighted)
        die("--val has a weight|only --train mixes sources; name those of --val: web='web/*.bin'");
    if (validation && named && named < n)
        die("--val '%s' has no name, but others have one|write name=FILES for all or for none",
            nameless);
    if (!validation && named && !weighted)
        die("--train has names, but no weights|write web='web/*.bin@0.7' to mix sources by weight");
    int sources = 0;
    for (int i = 0; i < n; i++) {
        int k = 0; // an earlier pattern of the same source
        while (k < i && (named || weighted) && strcmp(label(&p[i]), label(&p[k]))) k++;
        if (k < i && weighted && !(p[i].name && p[k].name))
            die("'%s' is there twice as a source of --train|give it once, with its whole weight",
                label(&p[i]));
        p[i].source = k < i ? p[k].source : sources++;
        if (k == i || !p[i].weight) continue;
        if (p[k].weight && p[i].weight != p[k].weight)
            die("'%s' has two weights|give the weight of a name once, or alike", p[i].name);
        p[k].weight = p[i].weight;
    }
    if (sources > MOST_SOURCES)
        die("%d sources|mix at most %d; a glob is one source", sources, MOST_SOURCES);
    return sources;
}

static int64_t greatest_divisor(int64_t a, int64_t b) { return b ? greatest_divisor(b, a % b) : a; }

// The schedule of a mixture. With quotas u_i of a period of P windows, window number j = 0, 1, ...
// of source i may be given from floor(j P / u_i) on and is due before ceil((j + 1) P / u_i). Giving
// each place to the window that is due first meets all these dates, because the quotas fill the
// period exactly (earliest deadline first is optimal for jobs of one unit on one machine: Liu and
// Layland 1973; with these dates: Baruah et al. 1996). So source i has floor(n u_i / P) or
// ceil(n u_i / P) of the first n windows.
static void make_schedule(Loader *loader, const int64_t *weight) {
    int n = loader->n_sources;
    int64_t unit = 0;
    loader->quota = (int64_t *)xcalloc(n, 2 * sizeof(int64_t), "the mixture");
    int64_t *given = loader->quota + n;
    for (int i = 0; i < n; i++) unit = greatest_divisor(weight[i], unit);
    for (int i = 0; i < n; i++) {
        loader->quota[i] = weight[i] / unit;
        loader->period += loader->quota[i];
        if (loader->period > MOST_PERIOD)
            die("the weights of --train need more than %d windows to come out exactly|use fewer "
                "digits, such as 0.333 and 0.667",
                MOST_PERIOD);
    }
    int64_t P = loader->period;
    loader->turn_source = (uint16_t *)xmalloc(P * sizeof(uint16_t), "the mixture");
    loader->turn_number = (int32_t *)xmalloc(P * sizeof(int32_t), "the mixture");
    for (int64_t turn = 0; turn < P; turn++) {
        int next = -1;
        int64_t first_due = 0;
        for (int i = 0; i < n; i++) {
            int64_t u = loader->quota[i];
            int64_t due = ((given[i] + 1) * P + u - 1) / u;
            if (given[i] * P / u <= turn && (next < 0 || due < first_due)) {
                next = i;
                first_due = due;
            }
        }
        loader->turn_source[turn] = (uint16_t)next;
        loader->turn_number[turn] = (int32_t)given[next]++;
    }
    for (int i = 0; i < n; i++) loader->source[i].share = (double)loader->quota[i] / (double)P;
}

static void add_sources(Loader *loader, Pattern *pattern, int n_patterns) {
    int n = group(pattern, n_patterns, loader->o.validation);
    int64_t *weight = (int64_t *)xcalloc(n, sizeof *weight, "the mixture");
    loader->source = (LoaderSource *)xcalloc(n, sizeof(LoaderSource), "the mixture");
    loader->n_sources = n;
    for (int i = 0; i < n; i++) {
        LoaderSource *s = &loader->source[i];
        s->first_file = loader->n_files;
        for (int k = 0; k < n_patterns; k++) {
            const Pattern *p = &pattern[k];
            if (p->source != i) continue;
            if (!s->name) s->name = xasprintf("%s", n > 1 || p->name ? label(p) : "");
            if (!weight[i]) weight[i] = p->weight;
            add_files(loader, p->files);
        }
        if (!weight[i]) weight[i] = BILLION;
        s->files = loader->n_files - s->first_file;
        measure(loader, s);
    }
    make_schedule(loader, weight);
    free(weight);
}

// ---- opening and closing --------------------------------------------------------------------
Loader *loader_open(const char *const *patterns, int n_patterns, LoaderOptions options) {
    if (n_patterns < 1) die("no token file given|name shards or .txt files after --train");
    if (options.seq_len < 1)
        die("sequence length %d is not positive|set --seq-len to the window length in tokens",
            options.seq_len);
    if (options.vocab < 1)
        die("vocabulary of %d ids is not positive|check vocab_size in the model's config",
            options.vocab);
    Loader *loader = (Loader *)xcalloc(1, sizeof *loader, "the data loader");
    loader->o = options;
    loader->vocab = (uint32_t)options.vocab;
    Pattern *pattern = (Pattern *)xcalloc(n_patterns, sizeof *pattern, "the patterns");
    for (int i = 0; i < n_patterns; i++) pattern[i] = parse_pattern(patterns[i]);
    add_sources(loader, pattern, n_patterns);
    for (int i = 0; i < n_patterns; i++) {
        free(pattern[i].name);
        free(pattern[i].files);
    }
    free(pattern);
    scan_ids(loader);
    return loader;
}

void loader_close(Loader *loader) {
    if (!loader) return;
    for (int i = 0; i < loader->n_files; i++) {
        shard_free(&loader->files[i]);
    }
    for (int i = 0; i < loader->n_sources; i++) free((char *)loader->source[i].name);
    free(loader->source);
    free(loader->quota);
    free(loader->turn_source);
    free(loader->turn_number);
    free(loader->files);
    free(loader);
}

int64_t loader_windows(const Loader *loader) { return loader->windows; }
int64_t loader_tokens(const Loader *loader) { return loader->tokens; }
int loader_files(const Loader *loader) { return loader->n_files; }
const char *loader_file(const Loader *loader, int i) { return loader->files[i].id.name; }
int64_t loader_file_bytes(const Loader *loader, int i) { return (int64_t)loader->files[i].id.size; }
int loader_sources(const Loader *loader) { return loader->n_sources; }
const LoaderSource *loader_source(const Loader *loader, int i) { return &loader->source[i]; }

// ---- the order ------------------------------------------------------------------------------
// A Feistel round (L, R) -> (R, L ^ f(R)) can be undone whatever f is, so the network is a
// bijection of [0, 4^h). Walking on while the value is n or more follows its cycle to the next
// member of [0, n). This is still one-to-one, because walking back along the cycle undoes it.
int64_t loader_permute(int64_t i, int64_t n, uint64_t seed, uint64_t epoch) {
    int h = 0;
    while (h < 31 && (int64_t)1 << (2 * h) < n) h++;
    uint64_t mask = ((uint64_t)1 << h) - 1;
    uint64_t key = mix64(mix64(seed + GOLDEN) + epoch + GOLDEN);
    uint64_t x = (uint64_t)i;
    do {
        uint64_t left = x >> h;
        uint64_t right = x & mask;
        for (uint64_t r = 1; r <= ROUNDS; r++) {
            uint64_t next = left ^ (mix64(key + r * GOLDEN + right) & mask);
            left = right;
            right = next;
        }
        x = left << h | right;
    } while (x >= (uint64_t)n);
    return (int64_t)x;
}

// The file of a source that holds its `window`: the last one whose first window is not above it. A
// file without windows shares its first_window with the next file, so it is never that last one.
static int file_of(const Loader *loader, const LoaderSource *s, int64_t window) {
    int low = s->first_file;
    int high = s->first_file + s->files - 1;
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
    int64_t turn = position % loader->period;
    int i = loader->turn_source[turn];
    const LoaderSource *s = &loader->source[i];
    int64_t number = position / loader->period * loader->quota[i] + loader->turn_number[turn];
    int64_t window = number % s->windows;
    if (loader->o.shuffle)
        window =
            loader_permute(window, s->windows, loader->o.seed, (uint64_t)(number / s->windows));
    int file = file_of(loader, s, window);
    *first = (window - loader->files[file].first_window) * loader->o.seq_len;
    return file;
}

int64_t loader_count(const Loader *loader, int source, int64_t n) {
    int64_t count = n / loader->period * loader->quota[source];
    for (int64_t turn = 0; turn < n % loader->period; turn++)
        count += loader->turn_source[turn] == source;
    return count;
}

// ---- windows --------------------------------------------------------------------------------
int loader_read(const Loader *loader, int64_t position, int *inputs, int *targets, Fault *fault) {
    int64_t first;
    int file = loader_where(loader, position, &first);
    return shard_read(&loader->files[file], first, loader->o.seq_len, loader->vocab, inputs,
                      targets, fault);
}

int loader_read_source(const Loader *loader, int source, int64_t window, int *inputs, int *targets,
                       Fault *fault) {
    const Shard *f = &loader->files[file_of(loader, &loader->source[source], window)];
    int64_t T = loader->o.seq_len;
    return shard_read(f, (window - f->first_window) * T, T, loader->vocab, inputs, targets, fault);
}

static void print_source(FILE *out, const char *what, const Loader *loader, int first, int files,
                         int64_t tokens, int64_t windows) {
    fprintf(out, "%s%d file%s (%s%s), %lld tokens, %lld windows of %d", what, files,
            files == 1 ? "" : "s", loader_file(loader, first), files > 1 ? ", ..." : "",
            (long long)tokens, (long long)windows, loader->o.seq_len);
}

void loader_print(FILE *out, const char *what, const Loader *loader) {
    char text[16];
    int n = loader->n_sources;
    double targets = 0;
    int masked = 0;
    for (int i = 0; i < n; i++) {
        targets += (double)loader->source[i].targets;
        masked |= loader->source[i].masked;
    }
    snprintf(text, sizeof text, "%-11s", what);
    print_source(out, text, loader, 0, loader->n_files, loader->tokens, loader->windows);
    double all = (double)loader->windows * loader->o.seq_len;
    if (masked) fprintf(out, "; loss masks: %.1f %% of the targets count", 100 * targets / all);
    fprintf(out, "\n");
    for (int i = 0; i < n && n > 1; i++) {
        const LoaderSource *s = &loader->source[i];
        fprintf(out, "           %s: ", s->name);
        if (!loader->o.validation) fprintf(out, "%.4g %% of the windows, ", 100 * s->share);
        print_source(out, "", loader, s->first_file, s->files, s->tokens, s->windows);
        double epoch = (double)s->windows * loader->o.seq_len;
        if (s->masked)
            fprintf(out, "; %.1f %% of its targets count", 100 * (double)s->targets / epoch);
        fprintf(out, "\n");
    }
}

const char *loader_bytes(const Loader *loader) {
    for (int i = 0; i < loader->n_files; i++)
        if (loader->files[i].are_bytes) return loader->files[i].id.name;
    return 0;
}

const char *loader_shared(const Loader *a, const Loader *b) {
    for (int i = 0; i < b->n_files; i++)
        for (int k = a == b ? i + 1 : 0; k < a->n_files; k++) {
            const Identity *x = &a->files[k].id;
            const Identity *y = &b->files[i].id;
            if (x->device == y->device && x->inode == y->inode) return y->name;
        }
    return 0;
}
