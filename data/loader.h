// Token files -> windows of T inputs and T targets, in an order that is a function of (seed, epoch)
// and nothing else.
//
// A file of n tokens has floor((n-1)/T) windows, window w reading tokens [wT, wT+T] (the last one
// only as a target):
//
//     tokens    t0 t1 t2 t3 t4 t5 t6 t7 t8 t9     n = 10, T = 4: floor(9/4) = 2 windows, t9 is
//     never read window 0  [inputs  ]                        t0 t1 t2 t3 -> t1 t2 t3 t4 window 1
//     [inputs  ]            t4 t5 t6 t7 -> t5 t6 t7 t8
//
// No window crosses from one file into the next; all windows of all files are numbered 0 .. W-1 in
// file order. Sequence number `position` counts without end: its epoch is position / W, and within
// the epoch a bijection of [0, W) says which window it is. The loader therefore has no state. A run
// is resumed, or cut over another number of ranks, by asking for other positions (I4).
//
// Files:  *.txt                       read as bytes, the token is the byte's value (0..255)
//         magic 20240520, version 1   llm.c shard, uint16 tokens      header: 256 little-endian
//         int32, [2] = number of tokens magic 20240801, version 7   llm.c shard, uint32 tokens
//         (read as unsigned: up to 4,294,967,295 tokens in a shard)
// tokenize.py also states [3] = vocabulary and [4] = largest id, zero in shards of other origin.
// The size of a file must be 1024 + tokens * width exactly.
//
// Which ids are checked against the vocabulary, and when: every id of every window each time it is
// read; at the start, the stated largest id, and where none is stated the leading 256 MiB / (number
// of such files) of each such file. So a small data set is refused completely before the first
// step, and a terabyte does not delay it.
#ifndef MOE_LOADER_H
#define MOE_LOADER_H
#include "../kernels/types.h"
MOE_BEGIN_C
typedef struct Loader Loader;

// patterns (n_patterns): file names or globs, in this order; the matches of one glob are sorted by
// name, bytewise. A file named twice counts twice. seq_len: T >= 1, tokens. shuffle 0: file order
// in every epoch. vocab: ids must be below it. Dies when a pattern matches nothing, a file is
// unreadable, empty, truncated, longer than it says, of unknown magic or version, holds an id >=
// vocab (see above), or when no file has T + 1 tokens. Keeps no file open and no token in memory.
Loader *loader_open(const char *const *patterns, int n_patterns, int seq_len, uint64_t seed,
                    int shuffle, int vocab);
void loader_close(Loader *loader); // 0 is allowed

int64_t loader_windows(const Loader *loader); // W >= 1: sequences in an epoch, over all files
int64_t loader_tokens(
    const Loader *loader); // tokens in all files, those that no window reads included
int loader_files(const Loader *loader);
const char *loader_file(const Loader *loader, int i); // name of file i; lives as long as the loader

// inputs (T), targets (T) of sequence number position >= 0: targets[t] follows inputs[t] in the
// file. Every id is in [0, vocab). Callable from several threads at once. Dies when the file cannot
// be read or is no longer the one that was opened.
void loader_read(const Loader *loader, int64_t position, int *inputs, int *targets);

// Where sequence number position comes from: index of the file, and in *first its first token's
// place in that file.
int loader_where(const Loader *loader, int64_t position, int64_t *first);

// The order itself: image of i under the bijection of [0, n) that belongs to (seed, epoch). A
// balanced Feistel network of 8 rounds on [0, 4^h), h the least with 4^h >= n, walked until the
// value is below n (fewer than 4 walks on average); README.md has the same in ten lines of Python.
// 0 <= i < n <= 2^62.
int64_t loader_permute(int64_t i, int64_t n, uint64_t seed, uint64_t epoch);
MOE_END_C
#endif
