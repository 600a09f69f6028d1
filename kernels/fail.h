// How a run that cannot go on ends: one line on stderr that says what happened, where and what to
// do, and every rank stops. Also checked allocation, formatted text and the clock.
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
// Prints "error: <what, where>  hint: <what to do>" as one line of printable text and ends all
// ranks with exit status 1. The format's last bar separates the two: "what and where|hint"; bars in
// the arguments are text. A rank other than 0 waits 0.3 s before it prints, so that where all ranks
// fail alike, rank 0's line is the only one.
void die(const char *format, ...) MOE_PRINTF(1, 2) MOE_NORETURN;
// Prints "warning: <text>" as one line of printable text on stderr.
void warn(const char *format, ...) MOE_PRINTF(1, 2);
// Copies `text` (0: "") to `out` of `size` bytes so that a terminal shows it and obeys nothing in
// it: control characters and broken UTF-8 become \xNN, and what does not fit ends in "...". Returns
// `out`. Text from files and from the command line reaches the screen through this function.
char *printable(char *out, size_t size, const char *text);
// Sets the rank that die() sees, and what it calls after it printed to end all ranks (0: exit(1)).
void die_set(int rank, void (*abort_all)(void));
// Sets who decides which rank of a machine prints the run's last words (0: every rank may).
// `claim` returns 1 to the first rank that asks, and again to that one.
void die_claim_set(int (*claim)(void));
// Returns only where this rank may print the run's last words; another one waits to be ended.
void die_claim(void);
// Allocate host memory for small tables and staging. End the run with the name of what was asked
// for where there is none.
void *xmalloc(size_t bytes, const char *what);
void *xcalloc(size_t count, size_t size, const char *what);
// Changes the size of `old` (0: allocates), likewise.
void *xrealloc(void *old, size_t count, size_t size, const char *what);
// Prints into fresh memory, which the caller frees.
char *xasprintf(const char *format, ...) MOE_PRINTF(1, 2);
// Returns seconds of a clock that only goes forward.
double now_seconds(void);
MOE_END_C
#endif
