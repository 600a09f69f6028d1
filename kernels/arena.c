// What every backend shares of device.h: the arenas, whose bytes come from the backend's
// device_take and device_give, and the hook that kernels report to.
#include "device.h"
#include "fail.h"
#include <stdlib.h>
#include <string.h>

enum { ARENA_ALIGN = 256 };

Arena arena_counting(const char *name) {
    Arena a = { 0 };
    a.name = name;
    return a;
}
static void count_row(Arena *a, size_t bytes, const char *what) {
    for (int i = 0; i < a->rows; i++)
        if (!strcmp(a->row[i].what, what)) {
            a->row[i].bytes += bytes;
            return;
        }
    if (a->rows == ARENA_ROWS)
        die("arena %s has more than %d kinds of pieces|raise ARENA_ROWS in kernels/device.h",
            a->name, ARENA_ROWS);
    a->row[a->rows].what = what;
    a->row[a->rows++].bytes = bytes;
}
void *arena_take(Arena *a, size_t bytes, const char *what) {
    if (bytes > SIZE_MAX / 2 - a->used)
        die("arena %s: the size of %s overflows|a dimension is too large", a->name, what);
    size_t taken = (bytes + ARENA_ALIGN - 1) / ARENA_ALIGN * ARENA_ALIGN;
    size_t start = a->used;
    a->used += taken;
    if (!a->base) {
        count_row(a, taken, what);
        return 0;
    }
    if (a->used > a->capacity)
        die("arena %s: %s wants %zu bytes behind %zu of %zu|the counting pass and the taking "
            "pass differ: a defect of the program",
            a->name, what, bytes, start, a->capacity);
    device_poison(a->base + start, bytes);
    return a->base + start;
}
static int larger_first(const void *a, const void *b) {
    size_t x = ((const ArenaRow *)a)->bytes;
    size_t y = ((const ArenaRow *)b)->bytes;
    return (x < y) - (x > y);
}
// The table on one line, largest first: what die() can print.
static char *arena_table(Arena *a) {
    qsort(a->row, a->rows, sizeof a->row[0], larger_first);
    char *text = xasprintf("%s", "");
    for (int i = 0; i < a->rows; i++) {
        char *longer = xasprintf("%s%s%s %.3f GiB", text, i ? ", " : "", a->row[i].what,
                                 (double)a->row[i].bytes / (1 << 30));
        free(text);
        text = longer;
    }
    return text;
}
void arena_commit(Arena *a) {
    if (a->base) die("arena %s is committed twice|a defect of the program", a->name);
    a->capacity = a->used > 0 ? a->used : ARENA_ALIGN;
    a->base = (char *)device_take(a->capacity);
    if (!a->base)
        die("arena %s does not fit: %.3f GiB wanted, %.3f GiB available (%s)|smaller "
            "--micro-batch or --seq-len, --recompute layer, --optimizer adamw8bit, --update "
            "layer, or more ranks",
            a->name, (double)a->capacity / (1 << 30), (double)device_memory() / (1 << 30),
            arena_table(a));
    a->used = 0;
}
void arena_free(Arena *a) {
    if (a->base) device_give(a->base, a->capacity);
    *a = arena_counting(a->name);
}

// ---- what runs now --------------------------------------------------------------------------
static KernelHook current_hook; // the device's only observer
static void *hook_context;

void kernel_hook(KernelHook hook, void *context) {
    current_hook = hook;
    hook_context = context;
}
static void begin(KernelReport report) {
    device_range(report.name);
    if (current_hook) current_hook(hook_context, &report);
}
void kernel_begin(const char *name, double flops) {
    KernelReport report = { name, STREAM_COMPUTE, flops, 0 };
    begin(report);
}
void call_begin(const char *name, Stream stream, double bytes) {
    KernelReport report = { name, stream, 0, bytes };
    begin(report);
}
