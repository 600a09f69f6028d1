// The host's part in the routing of one layer and micro-batch: counting and sorting everybody's
// choices, as it did before the device did it (the CPU's route_table and route_lists are those
// loops), and what is left to it: reading the table that the device has made.
//
//   cc -std=c11 -O3 -march=native -fopenmp dev/bench_routing.c
//   kernels/cpu/{route,row_index,device_cpu,gemm}.c ... bench_routing      on one thread; the
//   median of 21 repetitions of each, at two sizes
#include "../kernels/kernels.h"
#include "../kernels/fail.h"
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

// Processor time: what else the machine does shall not count.
static double cpu_seconds(void) { return (double)clock() / CLOCKS_PER_SEC; }

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a;
    double y = *(const double *)b;
    return (x > y) - (x < y);
}

// What dispatch.c computes from the table.
static int64_t read_table(const int *table, RouteShape s, int64_t *send, int64_t *receive) {
    int64_t n = s.ranks;
    int64_t most = 0;
    for (int64_t j = 0; j < n; j++) {
        int64_t pool = 0;
        for (int64_t i = 0; i < n; i++) pool += table[i * n + j];
        if (pool > most) most = pool;
        send[j] = table[j];
        receive[j] = table[j * n];
    }
    return most;
}

static void measure(RouteShape s) {
    enum { REPEAT = 21 };
    int64_t tokens = s.sources * s.R;
    int64_t J = s.ranks < s.K ? s.ranks : s.K;
    int64_t sum = 0;
    int *ids = (int *)xmalloc(tokens * s.K * sizeof(int), "choices");
    int *choice = (int *)xmalloc(tokens * s.K * sizeof(int), "choices");
    int *send = (int *)xmalloc(2 * s.R * J * sizeof(int), "lists");
    int *table = (int *)xmalloc(route_table_size(s) * sizeof(int), "table");
    int64_t *rows = (int64_t *)xmalloc(2 * s.ranks * sizeof(int64_t), "rows");
    uint64_t x = 1;
    for (int64_t t = 0; t < tokens; t++) // K ascending ids, each from its own range
        for (int64_t k = 0; k < s.K; k++) {
            x = x * 6364136223846793005u + 1442695040888963407u;
            ids[t * s.K + k] = (int)(k * s.E / s.K + (int64_t)(x >> 40) % (s.E / s.K));
        }
    double before[REPEAT], after[REPEAT];
    for (int i = 0; i < REPEAT; i++) {
        double since = cpu_seconds();
        route_table(table, ids, s);
        route_lists(send, send + s.R * J, choice, ids, 0, s);
        before[i] = cpu_seconds() - since;
        since = cpu_seconds();
        for (int j = 0; j < 1000; j++) sum += read_table(table, s, rows, rows + s.ranks);
        after[i] = (cpu_seconds() - since) / 1000;
    }
    qsort(before, REPEAT, sizeof *before, by_value);
    qsort(after, REPEAT, sizeof *after, by_value);
    printf("%3lld ranks, %6lld tokens, top-%lld of %lld: on the host %8.3f ms; the table alone "
           "%8.5f ms (%lld bytes read; %lld)\n",
           (long long)s.ranks, (long long)s.R, (long long)s.K, (long long)s.E,
           1e3 * before[REPEAT / 2], 1e3 * after[REPEAT / 2],
           (long long)route_table_size(s) * (long long)sizeof(int), (long long)sum % 10);
    free(ids);
    free(choice);
    free(send);
    free(table);
    free(rows);
}

int main(void) {
    RouteShape eight = { 8, 8, 16384, 8, 128 };
    RouteShape many = { 64, 64, 4096, 8, 128 };
    measure(eight);
    measure(many);
    return 0;
}
