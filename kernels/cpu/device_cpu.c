// The CPU as a device: its memory is the host's, its streams are program order, its copies are
// memcpy. Offers device.h and the scratch memory of math.h.
#define _GNU_SOURCE
#include "../device.h"
#include "../fail.h"
#include "gemm.h"
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

// ---- scratch --------------------------------------------------------------------------------
typedef struct {
    void *memory;
    size_t bytes;
} Scratch;
static _Thread_local Scratch scratch_slots[SCRATCH_SLOTS];

void *scratch(int slot, size_t bytes) {
    Scratch *s = &scratch_slots[slot];
    if (bytes > s->bytes || !s->memory) {
        free(s->memory);
        s->bytes = (bytes + 4096) / 4096 * 4096;
        s->memory = aligned_alloc(4096, s->bytes);
        if (!s->memory)
            die("cannot get %zu bytes of scratch memory for a CPU kernel|free memory, or use a "
                "smaller --micro-batch",
                s->bytes);
    }
    return s->memory;
}

// ---- waiting --------------------------------------------------------------------------------
// A thread that has nothing to do spins before it sleeps. GNU's runtime spins for milliseconds by
// default, LLVM's for 200: on a machine that does anything else the thread that is waited for does
// not run meanwhile, and a small step takes up to ten times as long. 1,000 rounds are some 10
// microseconds: enough for the barriers of a machine that is idle.
void device_prepare(char **argv) {
    static const char *settings[] = { "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME" };
    for (int i = 0; i < 3; i++)
        if (getenv(settings[i])) return;
#ifdef _OPENMP
    setenv("GOMP_SPINCOUNT", "1000", 1);
    setenv("KMP_BLOCKTIME", "0", 1);
    execv("/proc/self/exe",
          argv); // comes back only where there is no /proc: the run goes on as it is
#else
    (void)argv;
#endif
}

// ---- the device -----------------------------------------------------------------------------
static char description[512];

void device_init(int local_rank, int threads) {
    (void)local_rank;
#ifdef _OPENMP
    if (threads > 0) omp_set_num_threads(threads);
    // Kernels are parallel on one level: nested loops stay on their thread.
    omp_set_max_active_levels(1);
#else
    (void)threads;
#endif
    gemm_init();
}
// Frees the scratch of the team's threads; a kernel called later grows it again.
void device_finish(void) {
    OMP(parallel)
    for (int slot = 0; slot < SCRATCH_SLOTS; slot++) {
        free(scratch_slots[slot].memory);
        scratch_slots[slot] = (Scratch){ 0, 0 };
    }
}
const char *device_backend(void) { return "cpu"; }
int device_row_tile(void) { return 1; }
int kernel_check(int print) {
    (void)print;
    return 0;
}

// Each thread multiplies its own square matrices, as the kernels do; the best of a few rounds,
// since other programs can only slow it down.
static double last_peak; // what the report shows is what MFU was computed with
static int last_threads;
double device_peak_flops(void) {
    enum { SIDE = 512 };
    const double LIMIT_SECONDS = 0.2;
    const size_t size = (size_t)SIDE * SIDE;
    int threads = thread_count();
    real *all =
        (real *)xmalloc(3 * size * threads * sizeof(real), "matrices of the speed measurement");
    PARALLEL_FOR
    for (int t = 0; t < threads; t++)
        for (size_t i = 0; i < 3 * size; i++) all[3 * size * t + i] = (real)(i % 7) * (real)0.125;
    double start = now_seconds();
    double best = 0;
    double before;
    double now = start;
    do {
        before = now;
        PARALLEL_FOR
        for (int t = 0; t < threads; t++) {
            real *a = all + 3 * size * t;
            gemm(0, 1, SIDE, SIDE, SIDE, a, SIDE, a + size, SIDE, 0, a + 2 * size, SIDE);
        }
        now = now_seconds();
        double speed = 2.0 * size * SIDE * threads / (now - before);
        if (speed > best) best = speed;
    } while (now - start + (now - before) < LIMIT_SECONDS);
    free(all);
    last_threads = threads;
    return last_peak = best;
}
const char *device_describe(void) {
    static const char *variables[] = { "OPENBLAS_CORETYPE", "OPENBLAS_NUM_THREADS" };
    char inherited[192] = "";
    for (int i = 0; i < 2; i++) {
        const char *value = getenv(variables[i]);
        size_t at = strlen(inherited);
        if (value)
            snprintf(inherited + at, sizeof inherited - at, "%s %s=%.40s", at ? "," : "",
                     variables[i], value);
    }
    int n = thread_count();
    const char *bf16 = "";
#if defined(MOE_BF16)
    static const char *kinds[] = { ", bf16 widened", ", bf16 by vdpbf16ps", ", bf16 by AMX tiles" };
    bf16 = kinds[gemm_bf16_kind()];
#endif
    double peak = last_threads == n ? last_peak : device_peak_flops();
    snprintf(description, sizeof description,
             "cpu, %s%s, %d thread%s, %s product %.0f GFLOP/s%s%s%s", gemm_library(), bf16, n,
             n == 1 ? "" : "s", sizeof(real) == 8 ? "fp64" : "fp32", peak * 1e-9,
             *inherited ? "; inherited from the environment:" : "", inherited,
             *inherited ? ", which may halve the speed" : "");
    return description;
}
size_t device_memory(void) {
    FILE *f = fopen("/proc/meminfo", "r");
    char line[128];
    size_t kib = 0;
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "MemAvailable: %zu kB", &kib) == 1) break;
    if (f) fclose(f);
    if (kib) return kib * 1024;
    // Not Linux: all physical memory is the best known bound.
    long pages = sysconf(_SC_PHYS_PAGES);
    long page = sysconf(_SC_PAGESIZE);
    return pages > 0 && page > 0 ? pages * page : 0;
}

// ---- memory ---------------------------------------------------------------------------------
// Fresh pages are zero by mmap. Writing one byte of each from all threads spreads them over the
// memory controllers (first touch) and makes a machine that promised too much fail here, at the
// start, not in the middle of a step.
void *device_take(size_t bytes) {
    size_t available = device_memory();
    if (available && bytes > available) return 0;
    void *memory = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return 0;
    const int64_t PAGE = 4096;
    int64_t pages = (int64_t)(bytes / PAGE);
    PARALLEL_FOR
    for (int64_t i = 0; i < pages; i++) *((volatile char *)memory + i * PAGE) = 0;
    return memory;
}
void device_give(void *memory, size_t bytes) { munmap(memory, bytes); }

// ---- streams and copies ---------------------------------------------------------------------
void stream_order(Stream first, Stream then) {
    (void)first;
    (void)then;
}
void device_share(int on) { (void)on; }
void device_sync(void) {}
void device_range(const char *name) { (void)name; }
void device_upload(void *device, const void *host, size_t bytes) {
    device_copy(device, host, bytes);
}
void device_download(void *host, const void *device, size_t bytes) {
    device_copy(host, device, bytes);
}
static const void *fetched;
void device_fetch_start(const void *device, size_t bytes) {
    (void)bytes;
    fetched = device;
}
const void *device_fetch_wait(void) { return fetched; }
// Large blocks in pieces on all threads: one core does not saturate the memory.
enum { COPY_PIECE = 1 << 20 };
void device_zero(void *dst, size_t bytes) {
    int64_t pieces = div_up((int64_t)bytes, COPY_PIECE);
    PARALLEL_FOR_BYTES(bytes)
    for (int64_t i = 0; i < pieces; i++)
        memset((char *)dst + i * COPY_PIECE, 0,
               lesser(COPY_PIECE, (int64_t)bytes - i * COPY_PIECE));
}
void device_copy(void *dst, const void *src, size_t bytes) {
    int64_t pieces = div_up((int64_t)bytes, COPY_PIECE);
    PARALLEL_FOR_BYTES(bytes)
    for (int64_t i = 0; i < pieces; i++)
        memcpy((char *)dst + i * COPY_PIECE, (const char *)src + i * COPY_PIECE,
               lesser(COPY_PIECE, (int64_t)bytes - i * COPY_PIECE));
}
void device_poison(void *dst, size_t bytes) {
#ifdef MOE_DEBUG
    memset(dst, 0xff, bytes);
#else
    (void)dst;
    (void)bytes;
#endif
}
