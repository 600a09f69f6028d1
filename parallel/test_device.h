// Collectives of test programs whose buffers are host memory. On CPUs these are the calls of
// comm.h. On a GPU a call works on device copies of the buffers, which go there at the start and
// come back at the wait; what the program wrote to them between the two does not count. Include it
// last.
#ifndef MOE_TEST_DEVICE_H
#define MOE_TEST_DEVICE_H
#include "comm.h"
#include "../kernels/fail.h"
#include <string.h>

enum { STAGED_CALLS = 64 };
typedef struct {
    int used;
    Request request;
    char *host, *device;
    size_t bytes;
    Arena to, from;
} StagedCall; // host: what comes back
static StagedCall staged_call[STAGED_CALLS];

static inline int on_device(void) { return strcmp(device_backend(), "cpu") != 0; }

static inline char *staged_copy(Arena *a, const void *host, size_t bytes) {
    *a = arena_counting("test buffers");
    arena_take(a, bytes + 1, "test buffers");
    arena_commit(a);
    char *device = (char *)arena_take(a, bytes + 1, "test buffers");
    if (bytes) device_upload(device, host, bytes);
    return device;
}

// Device copies of dst and src (0: none). Where they overlap, src lies in dst or dst in src, and
// one copy holds both.
static inline StagedCall *stage(void *dst, size_t dst_bytes, const void *src, size_t src_bytes,
                                char **device_dst, const char **device_src) {
    int i = 0;
    while (i < STAGED_CALLS && staged_call[i].used) i++;
    if (i == STAGED_CALLS) die("more than %d staged calls in flight|comm_wait", STAGED_CALLS);
    StagedCall *c = &staged_call[i];
    char *d = (char *)dst;
    const char *s = (const char *)src;
    memset(c, 0, sizeof *c);
    c->used = 1;
    c->host = d;
    c->bytes = dst_bytes;
    if (s && s >= d && s + src_bytes <= d + dst_bytes) {
        *device_dst = staged_copy(&c->to, d, dst_bytes);
        *device_src = *device_dst + (s - d);
    } else if (s && d >= s && d + dst_bytes <= s + src_bytes) {
        *device_src = staged_copy(&c->to, s, src_bytes);
        *device_dst = (char *)*device_src + (d - s);
    } else {
        *device_dst = staged_copy(&c->to, d, dst_bytes);
        if (s) *device_src = staged_copy(&c->from, s, src_bytes);
    }
    c->device = *device_dst;
    return c;
}

static inline Request staged_start(StagedCall *c, Request r) {
    c->request = r;
    Request mine = { (int)(c - staged_call) };
    return mine;
}

static inline Request test_all_gather_start(Comm *g, void *recv, const void *send, size_t count,
                                            Dtype type, Stream stream) {
    char *to = 0;
    const char *from = 0;
    size_t bytes = count * dtype_size(type);
    if (!on_device()) return all_gather_start(g, recv, send, count, type, stream);
    StagedCall *c = stage(recv, (size_t)comm_size(g) * bytes, send, bytes, &to, &from);
    return staged_start(c, all_gather_start(g, to, from, count, type, stream));
}

static inline Request test_reduce_scatter_start(Comm *g, void *recv, const void *send, size_t count,
                                                Dtype type, int accumulate, Stream stream) {
    char *to = 0;
    const char *from = 0;
    size_t bytes = count * dtype_size(type);
    if (!on_device()) return reduce_scatter_start(g, recv, send, count, type, accumulate, stream);
    StagedCall *c = stage(recv, bytes, send, (size_t)comm_size(g) * bytes, &to, &from);
    return staged_start(c, reduce_scatter_start(g, to, from, count, type, accumulate, stream));
}

static inline Request test_all_reduce_start(Comm *g, void *buffer, size_t count, Dtype type,
                                            Stream stream) {
    char *to = 0;
    if (!on_device()) return all_reduce_start(g, buffer, count, type, stream);
    StagedCall *c = stage(buffer, count * dtype_size(type), 0, 0, &to, 0);
    return staged_start(c, all_reduce_start(g, to, count, type, stream));
}

static inline Request test_all_to_all_start(Comm *g, void *recv, const int64_t *recv_rows,
                                            const void *send, const int64_t *send_rows,
                                            size_t row_bytes, Stream stream) {
    char *to = 0;
    const char *from = 0;
    size_t bytes[2] = { 0, 0 };
    if (!on_device())
        return all_to_all_start(g, recv, recv_rows, send, send_rows, row_bytes, stream);
    for (int j = 0; j < comm_size(g); j++) {
        bytes[0] += (size_t)recv_rows[j] * row_bytes;
        bytes[1] += (size_t)send_rows[j] * row_bytes;
    }
    StagedCall *c = stage(recv, bytes[0], send, bytes[1], &to, &from);
    return staged_start(c, all_to_all_start(g, to, recv_rows, from, send_rows, row_bytes, stream));
}

static inline void test_comm_wait(Request r) {
    if (!on_device()) {
        comm_wait(r);
        return;
    }
    StagedCall *c = &staged_call[r.id];
    if (!c->used) die("comm_wait for a call that was waited for already|a bug of the caller");
    comm_wait(c->request);
    if (c->bytes) device_download(c->host, c->device, c->bytes);
    arena_free(&c->to);
    if (c->from.base) arena_free(&c->from);
    c->used = 0;
}
#define all_gather_start test_all_gather_start
#define reduce_scatter_start test_reduce_scatter_start
#define all_reduce_start test_all_reduce_start
#define all_to_all_start test_all_to_all_start
#define comm_wait test_comm_wait
#endif
