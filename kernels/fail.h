// One way to end a run that cannot go on: one line on stderr that says what, where and what to do,
// and every rank stops.
#ifndef MOE_FAIL_H
#define MOE_FAIL_H
#include "types.h"
MOE_BEGIN_C
#if defined(__GNUC__)
#define MOE_PRINTF(f, a) __attribute__((format(printf, f, a)))
#define MOE_NORETURN __attribute__((noreturn))
#else
#define MOE_PRINTF(f, a)
#define MOE_NORETURN
#endif
// Prints "error: <what, where>  hint: <what to do>" as ONE line and ends all ranks with exit
// status 1. The format's text is "what and where|hint"; the bar separates the two. A rank other
// than 0 waits 0.3 s before it prints: where all ranks fail alike, rank 0's line is the only one.
void die(const char *format, ...) MOE_PRINTF(1, 2) MOE_NORETURN;
// What die() calls after it printed; comm sets it to abort all ranks. Default: exit(1). rank: as
// die() should see it.
void die_set(int rank, void (*abort_all)(void));
// Asked before a rank prints the run's last words: 1 for the first rank of a machine that asks, and
// again for that one. A rank that gets 0 says nothing and waits to be ended. die_claim_set: who
// decides (memory that the machine's ranks share); 0 = everybody may speak.
void die_claim_set(int (*claim)(void));
void die_claim(void); // returns only where this rank may speak
// malloc and calloc that die with the name of what was asked for. Host memory, for small tables and
// staging.
void *xmalloc(size_t bytes, const char *what);
void *xcalloc(size_t count, size_t size, const char *what);
// sprintf into fresh memory (caller frees).
char *xasprintf(const char *format, ...) MOE_PRINTF(1, 2);
double now_seconds(void); // monotonic wall clock
MOE_END_C
#endif
