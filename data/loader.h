// Token files as windows of T inputs and T targets, in an order that depends on (seed, epoch)
// alone.
//
// A file of n tokens has floor((n-1)/T) windows. Window w reads tokens wT to wT+T, the last of them
// only as a target:
//
//     tokens    t0 t1 t2 t3 t4 t5 t6 t7 t8 t9     n = 10, T = 4: floor(9/4) = 2 windows
//     window 0  [inputs   ]                       t0 t1 t2 t3 -> t1 t2 t3 t4
//     window 1              [inputs   ]           t4 t5 t6 t7 -> t5 t6 t7 t8; t9 is never read
//
// No window crosses from one file into the next. The windows of all files are numbered 0 to W-1 in
// the order of the files. Sequence number `position` counts without end: its epoch is position / W,
// and within the epoch a bijection of [0, W) says which window it is. So the loader has no state: a
// run is resumed, or cut over another number of ranks, by asking for other positions (I4,
// layout-free numbers).
//
// A file named *.txt is read as bytes, and a token is the value of a byte. Every other file is a
// token shard in the format of llm.c, little-endian:
//
//     1,024 bytes   256 int32: [0] magic, [1] version, [2] number of tokens (unsigned),
//                   [3] vocabulary and [4] largest id where the writer states them, else 0
//     magic 20240520, version 1: uint16 tokens      magic 20240801, version 7: uint32 tokens
//
// Every id of every window is compared with the vocabulary each time it is read. loader_open also
// compares the stated largest id and, where none is stated, the first 256 MiB / (number of such
// files) of each such file: a small data set is refused before the first update, and a data set of
// a terabyte does not delay it.
//
// Loss masks. A shard x.bin may have a file x.mask beside it that says which of its tokens count as
// targets: 256 int32 (magic 20260520, version 1, number of tokens), then one byte for each token of
// the shard, 1 = counts, 0 = does not. Masks are read completely by loader_open.
//
// Mixtures. A pattern may end in a weight, 'web/*.bin@0.7'. Each such pattern is then a source with
// a permutation and epochs of its own, and a pattern without a weight is one of weight 1. Which
// source gives window s depends on the weights and s alone: of the first n windows, source i has
// n w_i rounded down or up, for every n (README.md derives the schedule). Without weights all files
// are one source. A pattern may begin with a name, 'web=web/*.bin'. A pattern that names existing
// files as it stands is taken as it stands, @ and = included.
#ifndef MOE_LOADER_H
#define MOE_LOADER_H
#include "../kernels/types.h"
#include <stdio.h>
MOE_BEGIN_C
typedef struct Loader Loader;
typedef enum { LOSS_MASK_AUTO, LOSS_MASK_OFF, LOSS_MASK_REQUIRE } LossMask;

typedef struct {
    int seq_len; // T
    uint64_t seed;
    int shuffle; // 0: file order in every epoch
    int vocab;   // ids must be below it
    LossMask
        loss_mask;  // AUTO uses the masks of a source if it has any, and dies if a shard has none
    int validation; // names make the sources instead of weights, and weights are refused
} LoaderOptions;

typedef struct {
    const char
        *name;    // before the =, else the pattern without its weight; "" where it is the only one
    double share; // of the windows
    int first_file, files;   // its files are first_file to first_file + files - 1
    int64_t tokens, windows; // windows >= 1: one epoch
    int64_t targets;         // of one epoch, those that count; windows x T without masks
    int masked;
} LoaderSource;

// Opens the files that `patterns` (n_patterns names or globs) match, in this order; the matches of
// one glob are sorted bytewise. Dies when a pattern matches nothing, when a file is unreadable,
// empty, of another size than its header says, of an unknown format or holds an id of at least
// vocab, when a mask does not belong to its shard, and when a source has no file of T + 1 tokens.
// Keeps no file open and no token in memory.
Loader *loader_open(const char *const *patterns, int n_patterns, LoaderOptions options);
// Frees the loader. Does nothing if it is 0.
void loader_close(Loader *loader);

int64_t loader_windows(const Loader *loader); // W, all sources
int64_t loader_tokens(const Loader *loader);  // all files, with tokens that no window reads
int loader_files(const Loader *loader);       // a file named twice counts twice
// The pointers of loader_file and loader_source live as long as the loader.
const char *loader_file(const Loader *loader, int i);
// Returns how many bytes file i, 0 <= i < loader_files, had when the loader opened it. Asks the
// file system nothing, so it cannot fail, whatever became of the file since.
int64_t loader_file_bytes(const Loader *loader, int i);
const LoaderSource *loader_source(const Loader *loader, int i);
int loader_sources(const Loader *loader); // >= 1

// What is wrong with a file, and what to do about it. `what` is 0 where nothing is, else the
// caller's to free.
typedef struct {
    char *what;
    const char *hint;
} Fault;
// Reads sequence number position >= 0 into inputs (T) and targets (T). targets[t] follows inputs[t]
// in the file, or is -1 where the mask says that it does not count. Several threads may call it at
// once. Returns 1; 0 with *fault where the file cannot be read, is no longer the one that was
// opened, or holds an id outside the vocabulary. Ends the run then where fault is 0. A file whose
// time of change is new, but not its size nor samples of its contents, is still the same.
int loader_read(const Loader *loader, int64_t position, int *inputs, int *targets, Fault *fault);
// Reads window 0 <= window < source's windows of one source in file order, likewise.
int loader_read_source(const Loader *loader, int source, int64_t window, int *inputs, int *targets,
                       Fault *fault);

// Returns the index of the file that sequence number `position` comes from, and in *first the place
// of its first token in that file.
int loader_where(const Loader *loader, int64_t position, int64_t *first);
// Returns how many of the first n sequences come from the source.
int64_t loader_count(const Loader *loader, int source, int64_t n);

// Prints files, tokens, windows, the share of targets that count and the sources of a mixture, one
// line each, the first of them after the word `what`.
void loader_print(FILE *out, const char *what, const Loader *loader);

// Returns the name of a file in which a token is a byte (.txt, or tokenize.py without a tokenizer),
// or 0.
const char *loader_bytes(const Loader *loader);
// Returns the name of a file of b that a also has, under whatever name, or 0. With a = b: of a file
// that it has twice.
const char *loader_shared(const Loader *a, const Loader *b);

// Returns the image of i under the bijection of [0, n) that belongs to (seed, epoch): a balanced
// Feistel network of 8 rounds on [0, 4^h) with the least h such that 4^h >= n, walked until the
// value is below n. data/README.md has the same in ten lines of Python. 0 <= i < n <= 2^62.
int64_t loader_permute(int64_t i, int64_t n, uint64_t seed, uint64_t epoch);
MOE_END_C
#endif
