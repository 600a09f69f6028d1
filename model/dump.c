// Writes one update's logits and gradients: see dump.h. Every rank computes the same layout of the
// file and fills in what it owns.
#define _POSIX_C_SOURCE 200809L
#include "dump.h"
#include "safetensors.h"
#include "../kernels/fail.h"
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct Dump {
    char *path;
    int fd, n;
    SafeTensor *tensor; // (n) sorted as laid out: logits, loss, aux, then gradients in table order
    int *by_name;       // (n) indices sorted by name
    char *staging;      // fp32 on its way to the file
    Arena arena;        // the same on the device
    size_t staged;      // elements that fit
    int writes_gradients; // data-parallel index 0: replicas hold the same
};
enum { DUMP_CHUNK = 1 << 20 }; // elements

static void add_tensor(void *context, const char *name, int is_vector, int64_t rows, int64_t cols) {
    Dump *d = (Dump *)context;
    if ((d->n & (d->n - 1)) == 0) {
        d->tensor =
            (SafeTensor *)realloc(d->tensor, (size_t)(d->n ? 2 * d->n : 8) * sizeof(SafeTensor));
        if (!d->tensor) die("out of host memory for the dump's table|free memory");
    }
    SafeTensor *t = &d->tensor[d->n++];
    memset(t, 0, sizeof *t);
    t->name = is_vector < 0 ? xasprintf("%s", name) : xasprintf("grad.%s", name);
    t->type = DTYPE_F32;
    if (is_vector == 1) {
        t->n_dims = 1;
        t->shape[0] = cols;
    } else {
        t->n_dims = 2;
        t->shape[0] = rows;
        t->shape[1] = cols;
    }
}

static const SafeTensor *sorting; // qsort has no context; set right before it runs, on one thread
static int by_name(const void *a, const void *b) {
    return strcmp(sorting[*(const int *)a].name, sorting[*(const int *)b].name);
}

static const SafeTensor *find(const Dump *d, const char *name) {
    int lo = 0, hi = d->n - 1;
    while (lo <= hi) {
        int mid = (lo + hi) / 2, c = strcmp(name, d->tensor[d->by_name[mid]].name);
        if (!c) return &d->tensor[d->by_name[mid]];
        if (c < 0)
            hi = mid - 1;
        else
            lo = mid + 1;
    }
    die("no tensor %s in the dump|this is a defect: report it", name);
}

static void write_at(Dump *d, int64_t at, const void *data, int64_t bytes) {
    int e = file_write_at(d->fd, at, data, bytes);
    if (e)
        die("cannot write %s: %s|free space or choose another --dump file", d->path, strerror(e));
}

Dump *dump_open(const char *path, const Trainer *t) {
    Dump *d = (Dump *)xcalloc(1, sizeof(Dump), "dump");
    const Config *c = &t->m->c;
    d->path = xasprintf("%s", path);
    add_tensor(d, "logits", -1, t->o.batch * t->o.T, c->V);
    d->tensor[0].n_dims = 3;
    d->tensor[0].shape[0] = t->o.batch;
    d->tensor[0].shape[1] = t->o.T;
    d->tensor[0].shape[2] = c->V;
    add_tensor(d, "loss", -1, 1, 1);
    d->tensor[1].n_dims = 0;
    add_tensor(d, "aux", -1, 1, 1);
    d->tensor[2].n_dims = 0;
    model_visit(c, add_tensor, d);
    size_t header_bytes;
    int64_t file_bytes;
    char *header = safetensors_layout(d->tensor, d->n, &header_bytes, &file_bytes);
    d->by_name = (int *)xcalloc((size_t)d->n, sizeof(int), "dump");
    for (int i = 0; i < d->n; i++) d->by_name[i] = i;
    sorting = d->tensor;
    qsort(d->by_name, (size_t)d->n, sizeof(int), by_name);
    if (t->g->rank == 0) {
        d->fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0644);
        if (d->fd < 0)
            die("cannot create the dump %s: %s|choose a --dump file in a folder that exists and can be written",
                path, strerror(errno));
        if (ftruncate(d->fd, file_bytes))
            die("cannot make room for the dump %s: %s|free space or choose another file", path,
                strerror(errno));
        write_at(d, 0, header, (int64_t)header_bytes);
    }
    comm_barrier(t->g->all);
    if (t->g->rank) {
        d->fd = open(path, O_RDWR);
        if (d->fd < 0)
            die("cannot open the dump %s: %s|ranks on several machines need a shared folder", path,
                strerror(errno));
    }
    free(header);
    d->staged = DUMP_CHUNK > (size_t)c->V ? DUMP_CHUNK : (size_t)c->V;
    d->staging = (char *)xmalloc(d->staged * sizeof(float), "dump staging");
    d->arena = arena_counting(
        "dump"); // a dump is a measurement, outside the plan; given back in dump_finish
    arena_take(&d->arena, d->staged * sizeof(float), "dump staging");
    arena_commit(&d->arena);
    d->writes_gradients = t->g->dp_rank == 0;
    return d;
}

// n elements of device memory as fp32 to file offset `at`.
static void write_device(Dump *d, int64_t at, const char *device, Dtype type, size_t n) {
    for (size_t i = 0; i < n; i += d->staged) {
        size_t k = n - i < d->staged ? n - i : d->staged;
        convert(d->arena.base, DTYPE_F32, device + i * dtype_size(type), type, k);
        device_download(d->staging, d->arena.base, k * sizeof(float));
        write_at(d, at + (int64_t)(i * sizeof(float)), d->staging, (int64_t)(k * sizeof(float)));
    }
}

void dump_logits(Dump *d, const Trainer *t, int64_t row, int rows) {
    int64_t V = t->m->c.V, first = t->g->data_rank * t->local_sequences * t->o.T + row;
    if (t->g->data_ranks < t->g->world && t->g->ep_rank)
        return; // replicated tokens: one of the group writes
    write_device(d, d->tensor[0].at + first * V * (int64_t)sizeof(float), (const char *)t->logits,
                 DTYPE_FLOATX, (size_t)rows * (size_t)V);
}

void dump_gradient(Dump *d, const Trainer *t, int block, const gradX *grad) {
    const Block *b = &t->m->block[block];
    char name[200] = "grad.";
    for (int i = 0; i < b->n_segments && d->writes_gradients; i++) {
        const Segment *s = &b->segment[i];
        param_hf_name(&t->m->param[b->segment_param[i]], b->segment_slice[i], name + 5);
        write_device(d, find(d, name)->at + s->first * (int64_t)sizeof(float),
                     (const char *)(grad + s->offset), DTYPE_REAL, (size_t)s->count);
    }
}

void dump_finish(Dump *d, Trainer *t, double loss, double aux) {
    float value[2] = { (float)loss, (float)aux };
    if (t->g->rank == 0) {
        write_at(d, d->tensor[1].at, &value[0], sizeof(float));
        write_at(d, d->tensor[2].at, &value[1], sizeof(float));
    }
    if (fsync(d->fd) || close(d->fd))
        die("cannot finish the dump %s: %s|free space or choose another --dump file", d->path,
            strerror(errno));
    comm_barrier(t->g->all);
    arena_free(&d->arena);
    for (int i = 0; i < d->n; i++) free(d->tensor[i].name);
    free(d->tensor);
    free(d->by_name);
    free(d->staging);
    free(d->path);
    free(d);
    t->dump = 0;
}
