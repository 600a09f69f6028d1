// Phase timers: see profile.h.
#include "profile.h"
#include "../kernels/device.h"
#include "../kernels/fail.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PHASES = 64 };
typedef struct {
    const char *name;
    double seconds, flops;
    int64_t marks;
} Phase;
static Phase phase[PHASES];
static int phases, current, active;
static double since, begin;

void profile_start(void) {
    device_sync();
    phases = 0;
    current = -1;
    active = 1;
    begin = since = now_seconds();
}

void profile_mark(const char *name, double flops) {
    if (!active) return;
    device_sync();
    double now = now_seconds();
    if (current >= 0) phase[current].seconds += now - since;
    since = now;
    for (current = 0; current < phases && strcmp(phase[current].name, name); current++) {}
    if (current == phases) {
        if (phases == PHASES)
            die("more than %d phases to profile|raise PHASES in model/profile.c", PHASES);
        phases++;
        phase[current].name = name;
        phase[current].seconds = phase[current].flops = 0;
        phase[current].marks = 0;
    }
    phase[current].flops += flops;
    phase[current].marks++;
}

static int by_time(const void *a, const void *b) {
    double x = ((const Phase *)a)->seconds, y = ((const Phase *)b)->seconds;
    return (x < y) - (x > y);
}

void profile_print(FILE *file) {
    profile_mark("end", 0);
    active = 0;
    if (!file) return;
    double total = now_seconds() - begin;
    qsort(phase, (size_t)phases, sizeof(Phase), by_time);
    fprintf(file, "profile: %.1f ms\n  %-34s %10s %7s %8s %10s\n", 1e3 * total, "phase", "ms",
            "share", "times", "GFLOP/s");
    for (int i = 0; i < phases; i++) {
        if (phase[i].seconds <= 0) continue;
        fprintf(file, "  %-34s %10.2f %6.1f%% %8lld", phase[i].name, 1e3 * phase[i].seconds,
                100 * phase[i].seconds / total, (long long)phase[i].marks);
        if (phase[i].flops > 0) fprintf(file, " %10.1f", 1e-9 * phase[i].flops / phase[i].seconds);
        fprintf(file, "\n");
    }
    fflush(file);
}
