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
#ifndef MOE_LOADER_H
#define MOE_LOADER_H
#include "../kernels/types.h"
MOE_BEGIN_C
typedef struct Loader Loader;

// Opens the files that `patterns` (n_patterns names or globs) match, in this order; the matches of
// one glob are sorted bytewise. seq_len is T in tokens. shuffle 0 means file order in every epoch.
// Dies when a pattern matches nothing, when a file is unreadable, empty, of another size than its
// header says, of an unknown format or holds an id of at least `vocab`, and when no file has T + 1
// tokens. Keeps no file open and no token in memory.
Loader *loader_open(const char *const *patterns, int n_patterns, int seq_len, uint64_t seed,
                    int shuffle, int vocab);
// Frees the loader. Does nothing if it is 0.
void loader_close(Loader *loader);

int64_t loader_windows(const Loader *loader);         // W >= 1, all files
int64_t loader_tokens(const Loader *loader);          // all files, with tokens that no window reads
int loader_files(const Loader *loader);               // a file named twice counts twice
const char *loader_file(const Loader *loader, int i); // lives as long as the loader

// Reads sequence number position >= 0 into inputs (T) and targets (T); targets[t] follows inputs[t]
// in the file. Several threads may call it at once. Dies when the file cannot be read, is no longer
// the one that was opened, or holds an id outside the vocabulary.
void loader_read(const Loader *loader, int64_t position, int *inputs, int *targets);

// Returns the index of the file that sequence number `position` comes from, and in *first the place
// of its first token in that file.
int loader_where(const Loader *loader, int64_t position, int64_t *first);

// Returns the image of i under the bijection of [0, n) that belongs to (seed, epoch): a balanced
// Feistel network of 8 rounds on [0, 4^h) with the least h such that 4^h >= n, walked until the
// value is below n. data/README.md has the same in ten lines of Python. 0 <= i < n <= 2^62.
int64_t loader_permute(int64_t i, int64_t n, uint64_t seed, uint64_t epoch);
MOE_END_C
#endif
