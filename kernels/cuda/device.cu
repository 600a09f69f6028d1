// One NVIDIA GPU as a device: memory by cudaMalloc, three streams, copies through pinned staging
// memory. The functions device_... of device.h are here, and the scratch memory of common.cuh.
#include "experts.cuh"
#include "common.cuh"
#include <stdio.h>
#include <stdlib.h>
#if !defined(CUEMU) && defined(__has_include)
#if __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>
#define HAVE_NVTX 1
#endif
#endif

void cuda_failed(cudaError_t error, const char *call, const char *file, int line) {
    const char *name = strrchr(file, '/');
    const char *hint = error == cudaErrorMemoryAllocation
                           ? "smaller --micro-batch, --recompute layer, or more ranks"
                           : "an error of an earlier kernel can show here: run once with "
                             "CUDA_LAUNCH_BLOCKING=1, or under compute-sanitizer";
    die("CUDA: %s (%s) in %s at %s:%d|%s", cudaGetErrorString(error), cudaGetErrorName(error), call,
        name ? name + 1 : file, line, hint);
}
void require_packs(const char *what, int width) {
    if (width % PACK)
        die("the CUDA kernels move rows 16 bytes at a time: %s is %d, not a multiple of %d|change "
            "the config, or BACKEND=cpu",
            what, width, PACK);
}

// ---- the device -----------------------------------------------------------------------------
// Uploads go through STAGES pinned buffers in turn, so that the host may reuse its memory at once
// and waits only for a copy STAGES back.
static const size_t STAGE_BYTES = 4 << 20;
enum { STAGES = 4 };
static cudaStream_t streams[STREAM_COUNT];
static cudaEvent_t stream_events[STREAM_COUNT], stage_events[STAGES];
static char *stage_memory;
static const size_t FETCH_BYTES = 1 << 20;
static void *fetch_memory; // pinned: of device_fetch_start
static cudaEvent_t fetch_event;
static int stage_next, device_ready;
static cudaDeviceProp properties;
static struct {
    void *memory;
    size_t bytes;
} scratch_slots[SCRATCH_SLOTS];

static __global__ void probe() {} // exists for the card's architecture or not at all

cudaStream_t device_stream(Stream stream) { return streams[stream]; }

void device_prepare(char **argv) { (void)argv; }
void device_init(int local_rank, int threads) {
    (void)threads;
    int count = 0;
    int device;
    // Without a driver the count is left as it was: any error means none.
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count < 1) {
        const char *why = "the driver sees no device";
        if (error != cudaSuccess) why = cudaGetErrorString(error);
        if (error == cudaErrorInsufficientDriver)
            why = "there is no driver, or one older than this program's CUDA";
        die("no CUDA GPU: %s|check the driver with nvidia-smi and CUDA_VISIBLE_DEVICES, or build "
            "for the CPU: make BACKEND=cpu",
            why);
    }
    device = local_rank % count;
    CUDA_CHECK(cudaSetDevice(device));
    CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
    cudaFuncAttributes attributes;
    if (cudaFuncGetAttributes(&attributes, probe) != cudaSuccess)
        die("this program holds no kernels for %s (compute capability %d.%d)|rebuild on this "
            "machine, or with ARCH=%d%d",
            properties.name, properties.major, properties.minor, properties.major,
            properties.minor);
    // What others wait for goes first: gathers and the exchange before compute.
    int least, greatest;
    CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    for (int s = 0; s < STREAM_COUNT; s++) {
        CUDA_CHECK(cudaStreamCreateWithPriority(&streams[s], cudaStreamNonBlocking,
                                                s == STREAM_COMPUTE ? least : greatest));
        CUDA_CHECK(cudaEventCreateWithFlags(&stream_events[s], cudaEventDisableTiming));
    }
    CUDA_CHECK(cudaMallocHost((void **)&stage_memory, (size_t)STAGES * STAGE_BYTES));
    for (int s = 0; s < STAGES; s++)
        CUDA_CHECK(cudaEventCreateWithFlags(&stage_events[s], cudaEventDisableTiming));
    CUDA_CHECK(cudaMallocHost(&fetch_memory, FETCH_BYTES));
    CUDA_CHECK(cudaEventCreateWithFlags(&fetch_event, cudaEventDisableTiming));
    gemm_init();
    device_ready = 1;
}
void device_finish(void) {
    if (!device_ready) return;
    device_sync();
    attention_finish();
    gemm_finish();
    for (int i = 0; i < SCRATCH_SLOTS; i++) {
        CUDA_CHECK(cudaFree(scratch_slots[i].memory));
        scratch_slots[i].memory = 0;
        scratch_slots[i].bytes = 0;
    }
    for (int s = 0; s < STAGES; s++) CUDA_CHECK(cudaEventDestroy(stage_events[s]));
    CUDA_CHECK(cudaFreeHost(stage_memory));
    CUDA_CHECK(cudaEventDestroy(fetch_event));
    CUDA_CHECK(cudaFreeHost(fetch_memory));
    for (int s = 0; s < STREAM_COUNT; s++) {
        CUDA_CHECK(cudaEventDestroy(stream_events[s]));
        CUDA_CHECK(cudaStreamDestroy(streams[s]));
    }
    device_ready = 0;
}
const char *device_backend(void) { return "cuda"; }
const char *device_describe(void) {
    static char text[512];
    snprintf(text, sizeof text,
             "cuda, %s (sm_%d%d, %d multiprocessors, %.1f GiB), %s, experts by %s, %s",
             properties.name, properties.major, properties.minor, properties.multiProcessorCount,
             (double)properties.totalGlobalMem / (1 << 30), gemm_library(), experts_kernel(),
             PRECISION_NAME);
    return text;
}
// What is allocated after the arenas are laid out must find room: the kernels' scratch (largest
// users: sorted ids and split router gradients, below 900 bytes a token at 128 experts with what
// device_scratch adds: 256 MB serve micro-batches of 280 thousand tokens), and the code of library
// kernels, which CUDA loads at their first call.
size_t device_memory(void) {
    const size_t RESERVE = (size_t)512 << 20;
    size_t available, total;
    CUDA_CHECK(cudaMemGetInfo(&available, &total));
    return available > RESERVE ? available - RESERVE : 0;
}
// Dense tensor-core peak for bf16 (vendor data sheets, without sparsity), vector peak for fp32;
// TFLOP/s at the largest power limit.
double device_peak_flops(void) {
    static const struct {
        const char *name;
        double bf16, fp32;
    } table[] = {
        { "GB300", 2500, 80 },         { "GB200", 2500, 80 },   { "B300", 2250, 75 },
        { "B200", 2250, 75 },          { "GH200", 989, 67 },    { "H200", 989, 67 },
        { "H100 PCIe", 756, 51 },      { "H100 NVL", 835, 60 }, { "H100", 989, 67 },
        { "H800", 989, 67 },           { "H20", 148, 44 },      { "A100", 312, 19.5 },
        { "A800", 312, 19.5 },         { "L40S", 362, 91.6 },   { "L40", 181, 90.5 },
        { "RTX 6000 Ada", 182, 91.1 }, { "A40", 150, 37.4 },    { "RTX 5090", 209.5, 104.8 },
        { "RTX 4090", 165.2, 82.6 },   { "RTX 3090", 71, 35.6 }
    };
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++)
        if (strstr(properties.name, table[i].name))
            return (sizeof(floatX) == 2 ? table[i].bf16 : table[i].fp32) * 1e12;
    return 0;
}
// The row tile of the expert products: no tile has rows of two experts.
int device_row_tile(void) { return 128; }

void *device_scratch(int slot, size_t bytes) {
    if (bytes > scratch_slots[slot].bytes) {
        // Only while shapes are new. Half as much again is taken, because with ep > 1 the number of
        // rows differs from call to call (I10, no allocation after the first step).
        CUDA_CHECK(cudaStreamSynchronize(streams[STREAM_COMPUTE]));
        CUDA_CHECK(cudaFree(scratch_slots[slot].memory));
        scratch_slots[slot].bytes = (bytes + bytes / 2 + 0xffff) & ~(size_t)0xffff;
        CUDA_CHECK(cudaMalloc(&scratch_slots[slot].memory, scratch_slots[slot].bytes));
    }
    return scratch_slots[slot].memory;
}

// ---- memory ---------------------------------------------------------------------------------
void *device_take(size_t bytes) {
    void *memory = 0;
    if (bytes > device_memory()) return 0;
    if (cudaMalloc(&memory, bytes) != cudaSuccess) {
        cudaGetLastError(); // the caller reports it: it is not left for the next call to find
        return 0;
    }
    device_zero(memory, bytes);
    return memory;
}
void device_give(void *memory, size_t bytes) {
    (void)bytes;
    device_sync();
    CUDA_CHECK(cudaFree(memory));
}

// ---- streams and copies ---------------------------------------------------------------------
// cudaStreamWaitEvent looks at the event when it is called: one event a stream can be recorded
// again at once.
void stream_order(Stream first, Stream then) {
    if (first == then) return;
    CUDA_CHECK(cudaEventRecord(stream_events[first], streams[first]));
    CUDA_CHECK(cudaStreamWaitEvent(streams[then], stream_events[first], 0));
}
void device_share(int on) {
    const char *leave = getenv("MOE_EXPERT_LEAVE");
    int multiprocessors = on ? COMMUNICATION_CTAS : 0;
    experts_leave(leave && *leave ? atoi(leave) : multiprocessors);
}
void device_sync(void) {
    for (int s = 0; s < STREAM_COUNT; s++) CUDA_CHECK(cudaStreamSynchronize(streams[s]));
}
// Without a profiler attached both calls return at once.
void device_range(const char *name) {
#ifdef HAVE_NVTX
    static int open;
    if (open) nvtxRangePop();
    nvtxRangePushA(name);
    open = 1;
#else
    (void)name;
#endif
}
void device_zero(void *dst, size_t bytes) {
    if (bytes) CUDA_CHECK(cudaMemsetAsync(dst, 0, bytes, streams[STREAM_COMPUTE]));
}
void device_copy(void *dst, const void *src, size_t bytes) {
    if (bytes)
        CUDA_CHECK(
            cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToDevice, streams[STREAM_COMPUTE]));
}
void device_upload(void *device, const void *host, size_t bytes) {
    for (size_t at = 0; at < bytes; at += STAGE_BYTES) {
        size_t n = bytes - at < STAGE_BYTES ? bytes - at : STAGE_BYTES;
        char *stage = stage_memory + (size_t)stage_next * STAGE_BYTES;
        // Waits for the copy that used this stage last.
        CUDA_CHECK(cudaEventSynchronize(stage_events[stage_next]));
        memcpy(stage, (const char *)host + at, n);
        CUDA_CHECK(cudaMemcpyAsync((char *)device + at, stage, n, cudaMemcpyHostToDevice,
                                   streams[STREAM_COMPUTE]));
        CUDA_CHECK(cudaEventRecord(stage_events[stage_next], streams[STREAM_COMPUTE]));
        stage_next = (stage_next + 1) % STAGES;
    }
}
void device_download(void *host, const void *device, size_t bytes) {
    if (bytes)
        CUDA_CHECK(
            cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, streams[STREAM_COMPUTE]));
    CUDA_CHECK(cudaStreamSynchronize(streams[STREAM_COMPUTE]));
}
void device_fetch_start(const void *device, size_t bytes) {
    if (bytes > FETCH_BYTES) die("a fetch of %zu bytes|a bug of the caller", bytes);
    cudaStream_t s = streams[STREAM_COMPUTE];
    CUDA_CHECK(cudaMemcpyAsync(fetch_memory, device, bytes, cudaMemcpyDeviceToHost, s));
    CUDA_CHECK(cudaEventRecord(fetch_event, s));
}
const void *device_fetch_wait(void) {
    CUDA_CHECK(cudaEventSynchronize(fetch_event));
    return fetch_memory;
}
void device_poison(void *dst, size_t bytes) {
#ifdef MOE_DEBUG
    if (bytes) CUDA_CHECK(cudaMemsetAsync(dst, 0xff, bytes, streams[STREAM_COMPUTE]));
#else
    (void)dst;
    (void)bytes;
#endif
}
