// die(), checked allocation and the clock: see fail.h.
#define _POSIX_C_SOURCE 200809L
#include "fail.h"
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static int fail_rank;
static void (*fail_abort)(void);

void die_set(int rank, void (*abort_all)(void)) {
    fail_rank = rank;
    fail_abort = abort_all;
}

static int (*fail_claim)(void);
void die_claim_set(int (*claim)(void)) { fail_claim = claim; }

void die_claim(void) {
    if (!fail_claim || fail_claim()) return;
    struct timespec wait = {
        20, 0
    }; // the one that spoke ends all ranks; should that fail, this one ends by itself
    while (nanosleep(&wait, &wait)) {}
    _exit(1);
}

void die(const char *format, ...) {
    char text[4096];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    for (char *p = text; *p; p++)
        if (*p == '\n') *p = ' ';
    char *hint = strrchr(text, '|');
    if (hint) *hint++ = 0;
    if (fail_rank > 0) {
        struct timespec wait = { 0, 300 * 1000 * 1000 };
        nanosleep(&wait, 0);
    }
    die_claim();
    fflush(stdout);
    if (fail_rank > 0)
        fprintf(stderr, "error: %s (rank %d)%s%s\n", text, fail_rank, hint ? "  hint: " : "",
                hint ? hint : "");
    else
        fprintf(stderr, "error: %s%s%s\n", text, hint ? "  hint: " : "", hint ? hint : "");
    fflush(stderr);
    if (fail_abort) fail_abort();
    exit(1);
}

void *xmalloc(size_t bytes, const char *what) {
    void *p = malloc(bytes ? bytes : 1);
    if (!p)
        die("out of host memory: %zu bytes for %s|free memory or use fewer ranks on this machine",
            bytes, what);
    return p;
}

void *xcalloc(size_t count, size_t size, const char *what) {
    void *p = calloc(count ? count : 1, size ? size : 1);
    if (!p)
        die("out of host memory: %zu x %zu bytes for %s|free memory or use fewer ranks on this machine",
            count, size, what);
    return p;
}

char *xasprintf(const char *format, ...) {
    va_list args, again;
    va_start(args, format);
    va_copy(again, args);
    int n = vsnprintf(0, 0, format, args);
    va_end(args);
    char *s = xmalloc((size_t)n + 1, "text");
    vsnprintf(s, (size_t)n + 1, format, again);
    va_end(again);
    return s;
}

double now_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
