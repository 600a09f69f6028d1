// --dump FILE: one update's logits, losses and gradients for other programs to check. The contract
// is in checkpoint.h; layout, placing and writing are the checkpoint's own (checkpoint_parts.h), so
// every rank fills in what it owns and no tensor is ever whole outside the file.
#define _POSIX_C_SOURCE 200809L
#include "checkpoint_parts.h"
#include "step.h"
#include "../kernels/fail.h"
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

// The file's tensors: these, then the gradients in the order of checkpoint->weight.
enum { LOGITS, LOSS, AUX, GRADIENTS };

struct Dump {
    char *path;
    int fd;
    Checkpoint *checkpoint; // the list of tensors, and staging
    Arena staging;          // outside the plan: a dump is a measurement
    int64_t *at; // (GRADIENTS + weights + 2) first byte of each tensor; the last: topk, router
};

static void die_dump(const Dump *d, int error) MOE_NORETURN;
static void die_dump(const Dump *d, int error) {
    die("cannot write the dump %s: %s|"
        "choose a --dump file in a folder with room that all ranks see",
        d->path, file_why(error));
}

// Creates the file on rank 0 and remembers where each tensor begins.
static void lay_out(Dump *d, const Trainer *t) {
    const Checkpoint *list = d->checkpoint;
    int topk = GRADIENTS + list->n;
    int n = t->m->c.n_moe ? topk + 2 : topk;
    SafeTensor *tensor = (SafeTensor *)xcalloc(n, sizeof *tensor, "dump");
    SafeTensor logits = { "logits", DTYPE_F32, 3, { t->o.batch, t->o.T, t->m->c.V }, 0, 0, 0 };
    tensor[LOGITS] = logits;
    tensor[LOSS].name = "loss";
    tensor[AUX].name = "aux";
    for (int i = 0; i < list->n; i++) {
        const Weight *w = &list->weight[i];
        SafeTensor *g = &tensor[GRADIENTS + i];
        g->name = xasprintf("grad.%s", w->name);
        g->n_dims = w->vector ? 1 : 2;
        g->shape[0] = w->vector ? w->cols : w->rows;
        g->shape[1] = w->vector ? 0 : w->cols;
    }
    SafeTensor choice = { "topk", DTYPE_I32, 4, { t->m->c.n_moe, t->o.batch, t->o.T, t->m->c.K },
                          0,      0,         0 };
    SafeTensor router = choice; // margins of the choice
    router.name = "router";
    router.type = DTYPE_F32;
    router.shape[3] = t->m->c.E;
    if (n > topk) {
        tensor[topk] = choice;
        tensor[topk + 1] = router;
    }
    OutFile file = { 0, 0, 0, 0 };
    file.header = safetensors_layout(tensor, n, &file.header_bytes, &file.bytes);
    int error = t->g->rank == 0 ? checkpoint_create_file(AT_FDCWD, d->path, &file) : 0;
    if (error) die_dump(d, error);
    d->at = (int64_t *)xmalloc(n * sizeof *d->at, "dump");
    for (int i = 0; i < n; i++) {
        d->at[i] = tensor[i].at;
        if (i >= GRADIENTS && i < topk) free(tensor[i].name);
    }
    free(file.header);
    free(tensor);
}

Dump *dump_open(const char *path, const Trainer *t) {
    Dump *d = (Dump *)xcalloc(1, sizeof(Dump), "dump");
    d->path = xasprintf("%s", path);
    d->staging = arena_counting("dump");
    arena_take(&d->staging, CHECKPOINT_STAGING, "dump staging");
    arena_commit(&d->staging);
    d->checkpoint = checkpoint_create(t->m, t->g->all, t->g->dp_rank == 0, &d->staging);
    d->checkpoint->host = (char *)xmalloc(CHECKPOINT_STAGING, "dump staging");
    lay_out(d, t);
    comm_barrier(t->g->all);
    d->fd = open(path, O_WRONLY | O_CLOEXEC);
    if (d->fd < 0) die_dump(d, errno);
    return d;
}

// Writes n numbers of device memory to tensor i, from its element `first` on.
static void write_numbers(Dump *d, int i, int64_t first, const void *data, Dtype type, int64_t n) {
    Place place = { 0, DTYPE_F32, d->at[i] };
    Piece piece = { (char *)data, type, first, n };
    int error = checkpoint_write_piece(d->checkpoint, d->fd, place, piece);
    if (error) die_dump(d, error);
}

void dump_logits(Dump *d, const Trainer *t, int64_t row, int rows) {
    if (!routing_writer(t)) return;
    int64_t V = t->m->c.V;
    int64_t first = t->g->data_rank * t->tokens.sequences * t->o.T + row;
    write_numbers(d, LOGITS, first * V, t->head.logits, DTYPE_FLOATX, rows * V);
}

void dump_gradient(Dump *d, const Trainer *t, int block, const gradX *grad) {
    const Block *b = &t->m->block[block];
    for (int i = 0; i < b->n_segments && d->checkpoint->writer; i++) {
        const Segment *s = &b->segment[i];
        write_numbers(d, GRADIENTS + checkpoint_weight(d->checkpoint, s), s->first,
                      grad + s->offset, DTYPE_REAL, s->count);
    }
}

void dump_routing(Dump *d, const Trainer *t) {
    if (!t->m->c.n_moe) return;
    int topk = GRADIENTS + d->checkpoint->n;
    int64_t E = t->m->c.E;
    int64_t first = routing_token(t);
    int error = routing_write(t, d->fd, d->at[topk]);
    if (error) die_dump(d, error);
    for (int l = 0; l < t->m->c.L && routing_writer(t); l++)
        for (int m = 0; m < t->n_micro && t->m->c.is_moe[l]; m++)
            write_numbers(d, topk + 1,
                          (first + t->m->moe_index[l] * t->o.batch * t->o.T + m * t->R) * E,
                          saved_of(t, l, m)->logits, DTYPE_REAL, t->R * E);
}

void dump_finish(Dump *d, Trainer *t, double loss, double aux) {
    float value[2] = { (float)loss, (float)aux };
    int error = 0;
    for (int i = 0; i < 2 && !error && t->g->rank == 0; i++)
        error = file_write_at(d->fd, d->at[LOSS + i], &value[i], sizeof(float));
    if (!error && fsync(d->fd)) error = errno;
    if (close(d->fd) && !error) error = errno;
    if (error) die_dump(d, error);
    comm_barrier(t->g->all);
    checkpoint_free(d->checkpoint);
    arena_free(&d->staging);
    free(d->at);
    free(d->path);
    free(d);
    t->dump = 0;
}
