// One token file and the loss mask beside it: what it is, whether it is still the same, its tokens.
// The formats are in loader.h.
#ifndef MOE_SHARD_H
#define MOE_SHARD_H
#include "loader.h" // Fault
#include <sys/types.h>
#include <time.h>
MOE_BEGIN_C
// A file as it was when it was opened first. Inode and device tell files apart at that time only:
// they may change under a file on a network mount.
typedef struct {
    char *name;
    off_t size;
    struct timespec modified;
    uint64_t samples; // hash of 16 pieces of its contents
    dev_t device;
    ino_t inode;
} Identity;

typedef struct {
    Identity id;
    Identity mask;        // its name is 0 where the file has no mask
    int64_t tokens;       // in the file
    int64_t start;        // bytes before the first token
    int64_t first_window; // the loader's: number of its first window among those of its source
    int width;            // bytes of a token: 1, 2 or 4
    int are_bytes;        // .txt, or the header states tokenize.py's vocabulary of bytes, 257 ids
    int states_largest; // no id is above the one that the header states, which fits the vocabulary
} Shard;

// Describes the file of this name. Dies when it is unreadable, empty, of an unknown format, of
// another size than its header says, or states an id of at least `vocab`.
Shard shard_describe(const char *name, uint32_t vocab);
// Looks for the mask beside the file and notes its name.
void shard_find_mask(Shard *shard);
// Reads the whole mask. Returns how many of tokens 1 to n_targets count as targets. Dies when it is
// no mask of this shard.
int64_t shard_check_mask(Shard *shard, int64_t n_targets);
void shard_free(Shard *shard); // its names

// Compares at most the first n tokens with the vocabulary.
void shard_check_ids(const Shard *shard, int64_t n, uint32_t vocab);
// Reads inputs (T) = tokens first to first + T - 1 and targets (T), the tokens after them, or -1
// where the mask says that they do not count. Returns 1; 0 with *fault where the file is no longer
// the one that was described, cannot be read, or holds an id that is not below `vocab`. Ends the
// run then where fault is 0.
int shard_read(const Shard *shard, int64_t first, int64_t T, uint32_t vocab, int *inputs,
               int *targets, Fault *fault);
MOE_END_C
#endif
