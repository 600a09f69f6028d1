// Where numbers live and when they are ready: arenas (arena.c), and what each backend has its own
// of: memory, copies, streams (cpu/device_cpu.c, cuda/device.cu). Nothing else of the program knows
// which one is linked.
#ifndef MOE_DEVICE_H
#define MOE_DEVICE_H
#include "types.h"
MOE_BEGIN_C

// ---- the device -----------------------------------------------------------------------------
// Chooses how threads wait for one another: the first call of main. The OpenMP runtime reads its
// settings when the program is loaded, so this sets them in the environment and starts the program
// anew, unless OMP_WAIT_POLICY, GOMP_SPINCOUNT or KMP_BLOCKTIME is set already. GPUs: nothing.
void device_prepare(char **argv);
// local_rank picks the device (local_rank modulo the number of devices); threads: host threads of
// the CPU kernels (0 = as the OpenMP runtime says).
void device_init(int local_rank, int threads);
void device_finish(void);
const char *device_backend(void); // "cpu" or "cuda"
// One line for the startup report: device, BLAS or cuBLAS, its core type, threads.
const char *device_describe(void);
// Free memory in bytes that the arenas may take (CPU: available physical memory; GPU: free device
// memory).
size_t device_memory(void);
// `bytes` of zeroed device memory (CPU: every page is touched, so that a shortage shows now), or 0
// where there is not enough; device_give frees it. Only arenas call these.
void *device_take(size_t bytes);
void device_give(void *memory, size_t bytes);
// Peak FLOP/s of dense products in floatX, for MFU. CPU: measured by a short sgemm on all threads;
// GPU: table by device name, 0 = unknown.
double device_peak_flops(void);
// Rows of an expert are padded to a multiple of this in a RowIndex (1 on CPUs).
int device_row_tile(void);

// Runs every fast kernel once on small shapes beside a slow one that computes the same, before
// anything else is computed. Where the numbers differ, one warning names the kernel, the shape and
// the worst element, and the slow kernel computes from now on; a kernel that does not end within
// its deadline ends the program. Prints a table if `print`. Returns how many were wrong. CPUs:
// nothing.
int kernel_check(int print);

// ---- arenas (I10, no allocation after the first step) ---------------------------------------
// A bump allocator. With base 0 it only counts: the memory plan IS the allocation, run on counting
// arenas, so the two cannot disagree. Every piece is aligned to 256 bytes. In debug builds
// (MOE_DEBUG) new device pieces are filled with NaN (0xff bytes).
enum { ARENA_ROWS = 48 };
typedef struct {
    const char *what;
    size_t bytes;
} ArenaRow; // one line of the byte table: pieces of the same name add up
typedef struct {
    const char *name;
    char *base; // 0 = counting
    size_t used, capacity;
    int rows;
    ArenaRow row[ARENA_ROWS];
} Arena;
// A fresh counting arena.
Arena arena_counting(const char *name);
// Turns a counted arena into a real one of the counted size (device memory, zeroed); dies with the
// table's hint where it does not fit.
void arena_commit(Arena *a);
// bytes of memory, 256-byte aligned; a counting arena returns 0. `what` is a string literal naming
// the table's line.
void *arena_take(Arena *a, size_t bytes, const char *what);
void arena_free(Arena *a);
#define ARENA_TAKE(arena, type, count, what) \
    ((type *)arena_take((arena), (count) * sizeof(type), (what)))

// ---- streams, events, copies (no-ops or memcpy on CPUs) -------------------------------------
// Kernels run on COMPUTE. Weight gathers and gradient reductions run on GATHER, token exchange on
// EXCHANGE.
typedef enum { STREAM_COMPUTE, STREAM_GATHER, STREAM_EXCHANGE, STREAM_COUNT } Stream;
// Everything started so far on `first` happens before everything started later on `then`.
void stream_order(Stream first, Stream then);
// on: from now on communication runs beside COMPUTE, so kernels that would hold the whole device
// for milliseconds leave it room. CPUs: nothing.
void device_share(int on);
void device_sync(void); // the host waits for all streams: once a step, and in tests
void device_zero(void *dst, size_t bytes);                  // on COMPUTE
void device_copy(void *dst, const void *src, size_t bytes); // device to device, on COMPUTE
void device_upload(void *device, const void *host,
                   size_t bytes); // ordered before later COMPUTE work; host may be reused on return
void device_download(void *host, const void *device, size_t bytes); // waits for COMPUTE
// Starts a copy of at most 1 MiB to the host, after what COMPUTE was given so far, into memory that
// the device reaches by itself. One at a time.
void device_fetch_start(const void *device, size_t bytes);
// Waits for that copy alone, and not for what COMPUTE was given since; returns where it lies until
// the next one starts.
const void *device_fetch_wait(void);
// Debug builds: fill with NaN bytes (0xff). Elsewhere nothing.
void device_poison(void *dst, size_t bytes);

// ---- what runs now --------------------------------------------------------------------------
typedef struct {
    const char *name; // stays valid as long as the program
    Stream stream;
    double flops; // 0 where it has none to speak of
    double bytes; // of a collective: what this rank sends
} KernelReport;
typedef void (*KernelHook)(void *context, const KernelReport *report);
// Reports to `hook` from now on; to nobody if it is 0. The profile uses it.
void kernel_hook(KernelHook hook, void *context);
// Report that a kernel, or a collective or the wait for it, begins on the host, which also ends
// what was before it. Every function of kernels.h that computes calls the first at its entry. They
// cost a branch without a hook, and name the range for a profiler of the device.
void kernel_begin(const char *name, double flops);
void call_begin(const char *name, Stream stream, double bytes);
// Ends the range of such a profiler (NVTX) and begins one of this name. CPUs: nothing.
void device_range(const char *name);
MOE_END_C
#endif
