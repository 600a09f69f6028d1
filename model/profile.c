// The table of --profile: time and FLOP/s of every kernel and collective of one update. Listens
// through kernel_hook (kernels/device.h); offers profile_start and profile_print.
#include "profile.h"
#include "../kernels/device.h"
#include "../kernels/fail.h"
#include <stdlib.h>
#include <string.h>

enum { ROWS = 128 };
typedef struct { // calls of one name and size: the same kernel on other shapes is another row
    const char *name;
    double flops, seconds;
    int64_t calls;
} ProfileRow;
struct Profile {
    ProfileRow row[ROWS];
    int rows, current; // current: the row that runs now, -1 before the first report
    double begin, since;
};

static int row_of(Profile *p, const char *name, double flops) {
    for (int i = 0; i < p->rows; i++)
        if (p->row[i].flops == flops && !strcmp(p->row[i].name, name)) return i;
    if (p->rows == ROWS)
        die("more than %d kinds of calls to profile|raise ROWS in model/profile.c", ROWS);
    ProfileRow fresh = { name, flops, 0, 0 };
    p->row[p->rows] = fresh;
    return p->rows++;
}

static void stop_current(Profile *p) {
    device_sync();
    double now = now_seconds();
    if (p->current >= 0) p->row[p->current].seconds += now - p->since;
    p->since = now;
}

static void hear(void *context, const char *name, double flops) {
    Profile *p = (Profile *)context;
    stop_current(p);
    p->current = row_of(p, name, flops);
    p->row[p->current].calls++;
}

Profile *profile_start(void) {
    Profile *p = (Profile *)xcalloc(1, sizeof(Profile), "profile");
    device_sync();
    p->current = -1;
    p->begin = p->since = now_seconds();
    kernel_hook(hear, p);
    return p;
}

static int by_time(const void *a, const void *b) {
    double x = ((const ProfileRow *)a)->seconds, y = ((const ProfileRow *)b)->seconds;
    return (x < y) - (x > y);
}

void profile_print(Profile *p, FILE *file) {
    kernel_hook(0, 0);
    stop_current(p);
    double total = now_seconds() - p->begin;
    qsort(p->row, (size_t)p->rows, sizeof(ProfileRow), by_time);
    if (file)
        fprintf(file, "profile: %.1f ms\n  %-34s %10s %7s %8s %10s %10s\n", 1e3 * total, "kernel",
                "ms", "share", "times", "GFLOP each", "GFLOP/s");
    for (int i = 0; file && i < p->rows; i++) {
        const ProfileRow *r = &p->row[i];
        fprintf(file, "  %-34s %10.2f %6.1f%% %8lld", r->name, 1e3 * r->seconds,
                100 * r->seconds / total, (long long)r->calls);
        if (r->flops > 0 && r->seconds > 0)
            fprintf(file, " %10.3f %10.1f", 1e-9 * r->flops,
                    1e-9 * r->flops * (double)r->calls / r->seconds);
        fprintf(file, "\n");
    }
    if (file) fflush(file);
    free(p);
}
