// --profile: the reports of one update as a table of times and FLOP/s, and as a trace. Listens
// through kernel_hook (kernels/device.h); contracts in inspect.h.
#include "inspect.h"
#include "../kernels/device.h"
#include "../kernels/fail.h"
#include <stdlib.h>
#include <string.h>

typedef struct {
    KernelReport report;
    double begin, end; // seconds since the start
} Event;
struct Profile {
    Comm *all;
    Event *event;
    int64_t events, capacity;
    double start, seconds;
};

static double now(const Profile *p) {
    device_sync();
    return now_seconds() - p->start;
}

static void hear(void *context, const KernelReport *report) {
    Profile *p = (Profile *)context;
    double time = now(p);
    if (p->events) p->event[p->events - 1].end = time;
    if (p->events == p->capacity) {
        p->capacity = p->capacity ? 2 * p->capacity : 4096;
        p->event = (Event *)realloc(p->event, p->capacity * sizeof(Event));
        if (!p->event) die("out of host memory for the profile|profile a smaller model");
    }
    Event e = { *report, time, time };
    p->event[p->events++] = e;
}

Profile *profile_start(Comm *all) {
    Profile *p = (Profile *)xcalloc(1, sizeof(Profile), "profile");
    p->all = all;
    device_sync();
    comm_barrier(all);
    p->start = now_seconds();
    kernel_hook(hear, p);
    return p;
}

// ---- the table ------------------------------------------------------------------------------
typedef struct { // reports of one name and about one size: the same kernel on other shapes is apart
    const char *name;
    double size, flops, seconds, bytes; // size: FLOPs of the first
    int64_t times;
} Row;

static int by_time(const void *a, const void *b) {
    double x = ((const Row *)a)->seconds;
    double y = ((const Row *)b)->seconds;
    return (x < y) - (x > y);
}

// What the routing decides differs a little from layer to layer.
static int belongs(const Row *row, const KernelReport *r) {
    int near = row->size == r->flops || (r->flops < 2 * row->size && row->size < 2 * r->flops);
    return near && !strcmp(row->name, r->name);
}

static void add_to_rows(Row *row, int *rows, const Event *e) {
    int i = 0;
    while (i < *rows && !belongs(&row[i], &e->report)) i++;
    if (i == *rows) {
        Row fresh = { e->report.name, e->report.flops, 0, 0, 0, 0 };
        row[(*rows)++] = fresh;
    }
    row[i].flops += e->report.flops;
    row[i].seconds += e->end - e->begin;
    row[i].bytes += e->report.bytes;
    row[i].times++;
}

void profile_print(Profile *p, FILE *file) {
    kernel_hook(0, 0);
    p->seconds = now(p);
    if (p->events) p->event[p->events - 1].end = p->seconds;
    if (!file) return;
    Row *row = (Row *)xcalloc(p->events + 1, sizeof(Row), "profile");
    int rows = 0;
    for (int64_t i = 0; i < p->events; i++) add_to_rows(row, &rows, &p->event[i]);
    qsort(row, rows, sizeof(Row), by_time);
    fprintf(file, "profile: %.1f ms\n  %-42s %10s %7s %8s %10s %10s\n", 1e3 * p->seconds, "kernel",
            "ms", "share", "times", "MFLOP each", "GFLOP/s");
    for (int i = 0; i < rows; i++) {
        fprintf(file, "  %-42s %10.2f %6.1f%% %8lld", row[i].name, 1e3 * row[i].seconds,
                100 * row[i].seconds / p->seconds, (long long)row[i].times);
        if (row[i].flops > 0 && row[i].seconds > 0)
            fprintf(file, " %10.3f %10.1f", 1e-6 * row[i].flops / (double)row[i].times,
                    1e-9 * row[i].flops / row[i].seconds);
        if (row[i].bytes > 0) fprintf(file, " %10.3f MB sent", 1e-6 * row[i].bytes);
        fprintf(file, "\n");
    }
    fflush(file);
    free(row);
}

// ---- the trace ------------------------------------------------------------------------------
static const char *stream_name(Stream s) {
    switch (s) {
    case STREAM_COMPUTE: return "compute";
    case STREAM_GATHER: return "weights and gradients";
    case STREAM_EXCHANGE: return "tokens";
    case STREAM_COUNT: break;
    }
    return "?";
}

// The events of this rank as JSON, each followed by a comma. Times are microseconds.
static char *rank_events(const Profile *p, size_t *bytes) {
    enum { LINE = 320 };
    int rank = comm_rank(p->all);
    size_t lines = p->events + STREAM_COUNT + 1;
    char *text = (char *)xmalloc(lines * LINE, "profile");
    char *at = text;
    at += sprintf(at,
                  "{\"name\":\"process_name\",\"ph\":\"M\",\"pid\":%d,\"args\":"
                  "{\"name\":\"rank %d\"}},\n",
                  rank, rank);
    for (int s = 0; s < STREAM_COUNT; s++)
        at += sprintf(at,
                      "{\"name\":\"thread_name\",\"ph\":\"M\",\"pid\":%d,\"tid\":%d,\"args\":"
                      "{\"name\":\"%s\"}},\n",
                      rank, s, stream_name((Stream)s));
    for (int64_t i = 0; i < p->events; i++) {
        const Event *e = &p->event[i];
        at += sprintf(at,
                      "{\"name\":\"%.100s\",\"ph\":\"X\",\"pid\":%d,\"tid\":%d,\"ts\":%.3f,"
                      "\"dur\":%.3f,\"args\":{\"flops\":%.0f,\"bytes\":%.0f}},\n",
                      e->report.name, rank, (int)e->report.stream, 1e6 * e->begin,
                      1e6 * (e->end - e->begin), e->report.flops, e->report.bytes);
    }
    *bytes = at - text;
    return text;
}

void profile_trace(const Profile *p, const RunFolder *folder, int64_t step) {
    size_t bytes;
    char *mine = rank_events(p, &bytes);
    int ranks = comm_size(p->all);
    size_t most = comm_max(p->all, (int64_t)bytes) + 1;
    size_t used = 0;
    char *padded = (char *)xcalloc(most, 1, "profile");
    char *all = (char *)xmalloc(ranks * most, "profile");
    memcpy(padded, mine, bytes);
    comm_all_gather_host(p->all, all, padded, most);
    if (comm_rank(p->all) == 0) {
        for (int r = 0; r < ranks; r++) {
            size_t n = strlen(all + r * most);
            memmove(all + used, all + r * most, n);
            used += n;
        }
        all[used > 2 ? used - 2 : 0] = 0; // the last comma
        char *name = xasprintf("profile-%lld.trace.json", (long long)step);
        char *text = xasprintf("{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n%s\n]}\n", all);
        int error = file_replace(folder->fd, name, text, strlen(text));
        if (error) warn("cannot write %s/%s: %s", folder->path, name, file_why(error));
        free(name);
        free(text);
    }
    free(all);
    free(padded);
    free(mine);
}

void profile_free(Profile *p) {
    free(p->event);
    free(p);
}
