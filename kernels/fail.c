// The end of a run that cannot go on, warnings, checked allocation and the clock: the contracts are
// in fail.h. Everything printed here passes printable(), because names of files, tensors and keys
// come from files that anybody may have written.
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
static int (*fail_claim)(void);

void die_set(int rank, void (*abort_all)(void)) {
    fail_rank = rank;
    fail_abort = abort_all;
}

void die_claim_set(int (*claim)(void)) { fail_claim = claim; }

void die_claim(void) {
    if (!fail_claim || fail_claim()) return;
    // The rank that spoke ends all others; should that fail, this one ends by itself.
    struct timespec wait = { 20, 0 };
    while (nanosleep(&wait, &wait)) {}
    _exit(1);
}

// Bytes of the well-formed UTF-8 character at p that a terminal shows as text; 0 where there is
// none: control characters (C0, DEL, C1), surrogates, overlong forms, and the characters that
// reorder a line (U+202A to U+202E, U+2066 to U+2069) or end it (U+2028, U+2029).
static int shown_bytes(const unsigned char *p) {
    if (p[0] < 0x80) return p[0] >= 0x20 && p[0] != 0x7f;
    int n = 2 + (p[0] >= 0xe0) + (p[0] >= 0xf0); // bytes, as the first one says
    if (p[0] < 0xc2 || p[0] > 0xf4) return 0;
    uint32_t c = p[0] & (0x7fu >> n);
    for (int i = 1; i < n; i++) {
        if ((p[i] & 0xc0) != 0x80) return 0;
        c = c << 6 | (p[i] & 0x3fu);
    }
    static const uint32_t least[] = { 0, 0, 0x80, 0x800, 0x10000 };
    int bad = c < least[n] || c > 0x10ffff || (c >= 0xd800 && c < 0xe000) || c < 0xa0 ||
              (c >= 0x2028 && c <= 0x202e) || (c >= 0x2066 && c <= 0x2069);
    return bad ? 0 : n;
}

char *printable(char *out, size_t size, const char *text) {
    size_t used = 0;
    const unsigned char *p = (const unsigned char *)(text ? text : "");
    while (*p) {
        int n = shown_bytes(p);
        size_t wanted = n ? (size_t)n : 4;
        if (used + wanted + 4 > size) { // room for "..." stays
            if (used + 4 <= size) memcpy(out + used, "...", 4);
            return out;
        }
        if (n)
            memcpy(out + used, p, n);
        else if (*p == '\n')
            memcpy(out + used, " ", wanted = 1);
        else
            snprintf(out + used, 5, "\\x%02x", *p);
        used += wanted;
        p += n ? n : 1;
    }
    out[used] = 0;
    return out;
}

// Formats into fresh memory; a program without memory sees the format itself.
static char *format_text(const char *format, va_list args, int *length) {
    va_list again;
    va_copy(again, args);
    *length = vsnprintf(0, 0, format, again);
    va_end(again);
    char *text = *length < 0 ? 0 : (char *)malloc(*length + 1);
    if (text) vsnprintf(text, *length + 1, format, args);
    return text;
}

void die(const char *format, ...) {
    // The bar of the format, not one of an argument, separates the hint: the text before it alone
    // says how long that part is.
    const char *bar = strrchr(format, '|');
    char before[1024], what[3072];
    char hint[1024] = "";
    snprintf(before, sizeof before, "%.*s", bar ? (int)(bar - format) : 1000, format);
    va_list args;
    int length, whole;
    va_start(args, format);
    char *first = format_text(before, args, &length);
    va_end(args);
    va_start(args, format);
    char *text = format_text(format, args, &whole);
    va_end(args);
    printable(what, sizeof what, first ? first : before);
    if (bar) printable(hint, sizeof hint, text ? text + length + 1 : bar + 1);
    if (fail_rank > 0) {
        struct timespec wait = { 0, 300 * 1000 * 1000 };
        nanosleep(&wait, 0);
    }
    die_claim();
    fflush(stdout);
    fprintf(stderr, "error: %s", what);
    if (fail_rank > 0) fprintf(stderr, " (rank %d)", fail_rank);
    fprintf(stderr, "%s%s\n", bar ? "  hint: " : "", hint);
    fflush(stderr);
    if (fail_abort) fail_abort();
    exit(1);
}

void warn(const char *format, ...) {
    char shown[4096];
    va_list args;
    int length;
    va_start(args, format);
    char *text = format_text(format, args, &length);
    va_end(args);
    fflush(stdout);
    fprintf(stderr, "warning: %s\n", printable(shown, sizeof shown, text ? text : format));
    free(text);
}

void *xmalloc(size_t bytes, const char *what) { return xrealloc(0, 1, bytes, what); }

void *xcalloc(size_t count, size_t size, const char *what) {
    int nothing = !count || !size; // of which calloc may return 0
    void *p = nothing ? calloc(1, 1) : calloc(count, size);
    if (!p)
        die("out of host memory: %zu x %zu bytes for %s|free memory or use fewer ranks here", count,
            size, what);
    return p;
}

void *xrealloc(void *old, size_t count, size_t size, const char *what) {
    size_t bytes = count * size;
    int fits = !size || count <= SIZE_MAX / size;
    if (!bytes) bytes = 1;
    void *p = fits ? realloc(old, bytes) : 0;
    if (!p)
        die("out of host memory: %zu x %zu bytes for %s|free memory or use fewer ranks here", count,
            size, what);
    return p;
}

char *xasprintf(const char *format, ...) {
    va_list args;
    int length;
    va_start(args, format);
    char *text = format_text(format, args, &length);
    va_end(args);
    if (!text) die("out of host memory for a line of text|free memory");
    return text;
}

double now_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
