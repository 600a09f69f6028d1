// The graphs of kernels/cuda/attention_cudnn.c on machines without a GPU: cuDNN is told of one by
// its properties and says which engines it has for them (heuristics and support checks, everything
// but loading the kernel). That the results are right is tested on a GPU, by test_cuda.
//   make test-cudnn-graphs        (needs libcudnn; the driver's library is the toolkit's stub)
#define _GNU_SOURCE
#include "cuda/attention.h"
#include "test.h"
#include <cudnn.h>

typedef struct {
    const char *name;
    int version, processors, shared;
} Device; // version: compute capability times 100; shared: bytes a block may opt into
static const Device devices[] = { { "NVIDIA A100", 800, 108, 166912 },
                                  { "NVIDIA H200", 900, 132, 232448 },
                                  { "NVIDIA B200", 1000, 148, 232448 } };
static void describe(const Device *d, char *json, size_t size) {
    snprintf(json, size,
             "{\"cudaDeviceId\":0,\"deviceId\":0,\"deviceVer\":%d,\"driverVer\":13000,"
             "\"maxGridSize\":[2147483647,65535,65535],\"maxBlockSize\":[1024,1024,64],"
             "\"regsPerBlock\":65536,\"multiProcessorCount\":%d,\"smClockRateKHz\":1980000,"
             "\"memClockRateKHz\":3201000,\"l2CacheSize\":62914560,\"warpSize\":32,"
             "\"maxSharedMemoryPerBlock\":49152,\"maxSharedMemoryPerBlockOptin\":%d,"
             "\"reservedSharedMemoryPerBlock\":1024,\"maxRegistersPerSM\":65536,\"pciDeviceId\":0,"
             "\"maxCtasPerSM\":32,\"maxThreadsPerBlock\":1024,\"maxThreadsPerSM\":2048,"
             "\"isTccDriver\":0,\"supportCoopLaunch\":1,\"totalGlobalMem\":150000000000,"
             "\"deviceName\":\"%s\"}",
             d->version, d->processors, d->shared, d->name);
}

typedef struct {
    int B, T, H, KV, D;
} Case;
static int engines(const Device *d, int backward, const Case *c, int64_t *workspace,
                   const char **why) {
    char json[1024];
    describe(d, json, sizeof json);
    return cudnn_attention_check(json, d->version / 100, backward, c->B, c->T, c->H, c->KV, c->D,
                                 workspace, why);
}
enum { DEVICES = sizeof devices / sizeof devices[0] };
static void offered(const Case *c) {
    size_t bound = cudnn_attention_workspace(c->B, c->T, c->H, c->KV, c->D);
    for (int backward = 0; backward < 2; backward++) {
        char text[200] = "";
        int all = 1;
        for (int i = 0; i < DEVICES; i++) {
            int64_t workspace;
            const char *why;
            int n = engines(&devices[i], backward, c, &workspace, &why);
            size_t at = strlen(text);
            if (n)
                snprintf(text + at, sizeof text - at, "%ssm_%d %d", i ? ", " : "",
                         devices[i].version / 10, n);
            else
                snprintf(text + at, sizeof text - at, "%ssm_%d refused (%s)", i ? ", " : "",
                         devices[i].version / 10, why);
            if (backward && devices[i].version >= 1000)
                all &= n == 0; // not known to be deterministic on Blackwell
            else
                all &= n > 0 && (uint64_t)workspace <= bound;
        }
        check(all, "%-8s B %d T %d, %d heads on %d of %d, %.1f MiB reserved: engines on %s",
              backward ? "backward" : "forward", c->B, c->T, c->H, c->KV, c->D,
              (double)bound / (1 << 20), text);
    }
}
static void refused(const char *what, int backward, const Case *c) {
    for (int i = 0; i < DEVICES; i++) {
        int64_t workspace;
        const char *why = 0;
        int n = engines(&devices[i], backward, c, &workspace, &why);
        check(n == 0 && why, "sm_%d refuses %s: %s", devices[i].version / 10, what,
              why ? why : "it does not");
    }
}

int main(void) {
    static const Case shapes[] = {
        { 1, 4096, 32, 4, 128 },  { 8, 4096, 32, 4, 128 }, // Qwen3-30B-A3B
        { 3, 4096, 32, 4, 128 },  { 2, 8192, 8, 4, 128 },  // calls of some heads
        { 2, 1024, 16, 16, 128 }, { 1, 512, 64, 4, 128 },  // no groups; groups of 16
        { 2, 65, 4, 2, 128 },     { 1, 2, 2, 1, 128 },     { 2, 1000, 8, 2, 64 },
        { 4, 128, 2, 2, 64 },     { 3, 37, 6, 3, 32 },     { 2, 256, 4, 1, 16 }
    };
    static const Case wide = { 1, 256, 2, 1, 520 };
    static const Case single = { 2, 1, 4, 2, 128 };
    static const Case longest = { 1, 32768, 32, 4, 128 };
    static const Case uneven = { 1, 256, 5, 2, 128 };
    printf("cuDNN %zu\n", cudnnGetVersion());
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) offered(&shapes[i]);
    refused("backward with heads of 520", 1, &wide);
    refused("5 heads on 2", 0, &uneven);
    refused("backward of one token", 1, &single);
    refused("backward of 32,768 tokens", 1, &longest);
    check(cudnn_attention_workspace(1, 32768, 32, 4, 128) < 1 << 20,
          "what is refused reserves no memory");
    int grows = 1;
    for (int B = 1; B < 100; B++)
        grows &= cudnn_attention_workspace(B + 1, 1000, 32, 4, 128) >=
                 cudnn_attention_workspace(B, 1000, 32, 4, 128);
    check(grows, "a smaller micro-batch finds room in what is reserved for a larger one");
    return test_summary();
}
