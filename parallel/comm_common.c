// Parts of a transport that do not depend on it: see comm_common.h.
#include "comm_common.h"
#include "../kernels/fail.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

CommOptions comm_options;
size_t comm_message_bytes = (size_t)1 << 30, comm_stage_bytes = (size_t)32 << 20;
static struct {
    int64_t step;
    int layer;
    char phase[20];
} place = { 0, -1, "set-up" };

void comm_where(int64_t step, int layer, const char *phase) {
    if (step >= 0) place.step = step;
    place.layer = layer;
    snprintf(place.phase, sizeof place.phase, "%s", phase);
}

size_t stage_size(size_t bytes) {
    size_t least = (size_t)64 << 10;
    if (bytes < least) bytes = least;
    return bytes < comm_stage_bytes ? bytes : comm_stage_bytes;
}

// ---- records --------------------------------------------------------------------------------
CallRecord call_record(int64_t call, int kind, Dtype type, size_t count) {
    CallRecord r;
    memset(&r, 0, sizeof r); // padding too: records travel as bytes
    r.call = call;
    r.kind = kind;
    r.type = (int32_t)type;
    r.count = count;
    r.step = place.step;
    r.layer = place.layer;
    memcpy(r.phase, place.phase, sizeof r.phase);
    return r;
}

const char *comm_kind_name(int kind) {
    static const char *const names[] = { "all_gather", "reduce_scatter",  "all_reduce",
                                         "all_to_all", "host all_gather", "broadcast",
                                         "end of step" };
    return names[kind];
}

void call_text(const CallRecord *r, const char *group, char *text, size_t size) {
    static const char *const types[] = { "f32", "bf16", "f16", "f64", "i32", "i64", "bytes" };
    char layer[32] = "";
    if (r->layer >= 0) snprintf(layer, sizeof layer, "layer %d ", r->layer);
    snprintf(text, size, "step %lld, %s%s: call %lld in group %s, %s of %llu %s",
             (long long)r->step, layer, r->phase, (long long)r->call, group,
             comm_kind_name(r->kind), (unsigned long long)r->count,
             r->kind == COMM_ALL_TO_ALL ? "bytes a row" : types[r->type]);
}

int call_equal(const CallRecord *a, const CallRecord *b) {
    return a->call == b->call && a->step == b->step && a->layer == b->layer && a->kind == b->kind &&
           a->type == b->type && a->count == b->count &&
           !memcmp(a->phase, b->phase, sizeof a->phase);
}

void records_compare(const char *group, int rank, int other, const CallRecord *mine,
                     const CallRecord *theirs) {
    char here[256], there[256];
    call_text(mine, group, here, sizeof here);
    if (!call_equal(mine, theirs)) {
        call_text(theirs, group, there, sizeof there);
        // The lower rank speaks first, so that all ranks report the pair in one order.
        int swap = other < rank;
        die("ranks disagree: rank %d is at %s; rank %d is at %s|all ranks must issue the same calls in the same order (I2)",
            swap ? other : rank, swap ? there : here, swap ? rank : other, swap ? here : there);
    }
    if (theirs->sends != mine->expects || theirs->expects != mine->sends) {
        int back = theirs->sends != mine->expects; // the direction that disagrees
        die("%s: rank %d sends %llu bytes to rank %d, which expects %llu|send_rows and recv_rows of the two must agree",
            here, back ? other : rank, (unsigned long long)(back ? theirs->sends : mine->sends),
            back ? rank : other, (unsigned long long)(back ? mine->expects : theirs->expects));
    }
}

// ---- sums in rank order ---------------------------------------------------------------------
#define PLAIN(x) (x)
// A block of elements at a time: the inner loops run over elements, so they vectorise, while each
// element still takes the parts in rank order.
enum { SUM_BLOCK = 1024 };
#define SUM_BODY(T, A, LOAD, STORE)                                                         \
    for (int64_t i = 0; i < n_block; i++) acc[i] = LOAD(((const T *)part[0])[at + i]);      \
    for (int r = 1; r < n; r++)                                                             \
        for (int64_t i = 0; i < n_block; i++) acc[i] += LOAD(((const T *)part[r])[at + i]); \
    if (add)                                                                                \
        for (int64_t i = 0; i < n_block; i++) acc[i] = LOAD(((T *)out)[at + i]) + acc[i];   \
    for (int64_t i = 0; i < n_block; i++) ((T *)out)[at + i] = STORE(acc[i]);
#define SUM_FUNCTION(name, T, A, LOAD, STORE)                                                \
    static void name(void *out, const void *const *part, int n, int64_t at, int64_t n_block, \
                     int add) {                                                              \
        A acc[SUM_BLOCK];                                                                    \
        SUM_BODY(T, A, LOAD, STORE)                                                          \
    }
SUM_FUNCTION(sum_f32, float, float, PLAIN, PLAIN)
SUM_FUNCTION(sum_f64, double, double, PLAIN, PLAIN)
SUM_FUNCTION(sum_bf16, uint16_t, float, bf16_to_float, float_to_bf16)
SUM_FUNCTION(sum_i32, int32_t, int32_t, PLAIN, PLAIN)
SUM_FUNCTION(sum_i64, int64_t, int64_t, PLAIN, PLAIN)

void sum_parts(void *out, const void *const *part, int n, size_t count, Dtype type, int add) {
    void (*sum)(void *, const void *const *, int, int64_t, int64_t, int) =
        type == DTYPE_F32    ? sum_f32
        : type == DTYPE_F64  ? sum_f64
        : type == DTYPE_BF16 ? sum_bf16
        : type == DTYPE_I32  ? sum_i32
        : type == DTYPE_I64  ? sum_i64
                             : 0;
    if (!sum)
        die("no sums over ranks for element type %d|use f32, f64, bf16, i32 or i64", (int)type);
    int64_t blocks = ((int64_t)count + SUM_BLOCK - 1) / SUM_BLOCK;
#ifdef _OPENMP
#pragma omp parallel for schedule(static) if (blocks > 64)
#endif
    for (int64_t b = 0; b < blocks; b++) {
        int64_t at = b * SUM_BLOCK, left = (int64_t)count - at;
        sum(out, part, n, at, left < SUM_BLOCK ? left : SUM_BLOCK, add);
    }
}

void check_alone(const char *hint) {
    static const char *const variables[] = { "OMPI_COMM_WORLD_SIZE", "PMI_SIZE",
                                             "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS" };
    for (int i = 0; i < 4; i++) {
        const char *n = getenv(variables[i]);
        if (n && atoi(n) > 1)
            die("a launcher started %s processes (%s), but this one finds no other|%s", n,
                variables[i], hint);
        if (n)
            return; // what is nearest to the program decides: a launcher inside a Slurm step
                    // inherits the step's variables
    }
}

// ---- groups of one --------------------------------------------------------------------------
void local_all_gather(void *recv, const void *send, size_t count, Dtype type) {
    if (recv != send && count) device_copy(recv, send, count * dtype_size(type));
}

void local_reduce_scatter(void *recv, const void *send, size_t count, Dtype type, int accumulate) {
    size_t bytes = count * dtype_size(type);
    if (!accumulate) {
        local_all_gather(recv, send, count, type);
        return;
    }
    if (!strcmp(device_backend(), "cpu")) {
        sum_parts(recv, &send, 1, count, type, 1);
        return;
    }
    char *host = (char *)xmalloc(2 * bytes, "communication staging");
    const void *part = host + bytes;
    device_download(host, recv, bytes);
    device_download(host + bytes, send, bytes);
    sum_parts(host, &part, 1, count, type, 1);
    device_upload(recv, host, bytes);
    free(host);
}

void local_all_to_all(const char *group, void *recv, int64_t recv_rows, const void *send,
                      int64_t send_rows, size_t row_bytes) {
    if (recv_rows != send_rows)
        die("all_to_all in group %s of one rank: sends itself %lld rows and expects %lld|a bug of the caller",
            group, (long long)send_rows, (long long)recv_rows);
    if (recv != send && send_rows && row_bytes)
        device_copy(recv, send, (size_t)send_rows * row_bytes);
}
