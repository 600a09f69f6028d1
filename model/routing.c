// --routing-record and --routing-replay: the choices of the router of every update as files
// DIR/step_N.safetensors with one tensor topk (MoE layers, B, T, K), int32, in the order of the
// update's windows. A replay takes the choice and nothing else: scores, losses and gradients are
// computed from the present logits, so that two programs, or two precisions, can be compared
// without the experts that flipped between them. Contracts in step.h.
#define _POSIX_C_SOURCE 200809L
#include "file.h"
#include "checkpoint_parts.h"
#include "step.h"
#include "../kernels/fail.h"
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

struct RoutingFiles {
    const char *record, *replay; // folders, or 0; replay may be a file: the first update's
    int replay_is_file, replay_done;
    char *path; // of this update's record, while it is written as path.partial
    int fd;     // of that file
    int error;  // of this update's record, on this rank
    int warned;
    int64_t at;  // its first byte of topk
    int *choice; // (n_micro * R, K) of one layer on its way
    int open;    // a replay of this update is in `file`
    SafeTensors file;
};

static char *step_path(const char *folder, int64_t update) {
    return xasprintf("%s/step_%lld.safetensors", folder, (long long)update);
}

// The file with the routing of an update.
static char *replay_path(const RoutingFiles *f, int64_t update) {
    char *path = f->replay_is_file ? xasprintf("%s", f->replay) : step_path(f->replay, update);
    if (access(path, R_OK))
        die("%s: cannot read the routing of update %lld: %s|"
            "--routing-replay needs one file for each update",
            path, (long long)update, strerror(errno));
    return path;
}

RoutingFiles *routing_open(const Trainer *t, const char *record, const char *replay, int64_t first,
                           int64_t last) {
    if (!*record && !*replay) return 0;
    if (!t->m->c.n_moe)
        die("--routing-record and --routing-replay: the model has no experts|leave them out");
    RoutingFiles *f = (RoutingFiles *)xcalloc(1, sizeof *f, "routing");
    f->record = *record ? record : 0;
    f->replay = *replay ? replay : 0;
    f->choice = (int *)xmalloc(t->n_micro * t->R * t->m->c.K * sizeof(int), "routing");
    struct stat s;
    if (f->replay && stat(f->replay, &s))
        die("cannot read the routing %s: %s|give a folder or file of --routing-record", f->replay,
            strerror(errno));
    f->replay_is_file = f->replay && S_ISREG(s.st_mode);
    if (f->replay_is_file) last = first;
    for (int64_t u = first; f->replay && t->g->rank == 0 && u <= last; u++) free(replay_path(f, u));
    if (f->record && t->g->rank == 0) folder_make(f->record);
    return f;
}

void routing_close(RoutingFiles *f) {
    if (!f) return;
    free(f->choice);
    free(f);
}

// ---- record ---------------------------------------------------------------------------------
static SafeTensor topk_tensor(const Trainer *t) {
    const Config *c = &t->m->c;
    SafeTensor topk = {
        (char *)"topk", DTYPE_I32, 4, { c->n_moe, t->o.batch, t->o.T, c->K }, 0, 0, 0
    };
    return topk;
}

int64_t routing_token(const Trainer *t) {
    return t->g->data_rank * t->tokens.sequences * t->o.T + t->round * t->n_micro * t->R;
}

static int64_t layer_begin(const Trainer *t, int layer) { // in numbers of topk
    int64_t tokens = t->o.batch * t->o.T;
    return (t->m->moe_index[layer] * tokens + routing_token(t)) * t->m->c.K;
}

int routing_writer(const Trainer *t) { return t->g->data_ranks == t->g->world || !t->g->ep_rank; }

int routing_write(const Trainer *t, int fd, int64_t at) {
    if (!routing_writer(t)) return 0;
    int64_t n = t->R * t->m->c.K;
    size_t bytes = n * sizeof(int);
    int *choice = (int *)xmalloc(bytes, "routing");
    int error = 0;
    for (int l = 0; l < t->m->c.L; l++)
        for (int m = 0; m < t->n_micro && t->m->c.is_moe[l] && !error; m++) {
            device_download(choice, saved_of(t, l, m)->topk, bytes);
            int64_t first = (layer_begin(t, l) + m * n) * (int64_t)sizeof(int);
            error = file_write_at(fd, at + first, choice, (int64_t)bytes);
        }
    free(choice);
    return error;
}

static void start_record(Trainer *t, int64_t update) {
    RoutingFiles *f = t->routing;
    SafeTensor topk = topk_tensor(t);
    OutFile file = { 0, 0, 0, 0 };
    file.header = safetensors_layout(&topk, 1, &file.header_bytes, &file.bytes);
    f->path = step_path(f->record, update);
    f->at = topk.at;
    char *partial = xasprintf("%s.partial", f->path);
    f->error = t->g->rank == 0 ? checkpoint_create_file(AT_FDCWD, partial, &file) : 0;
    comm_barrier(t->g->all);
    f->fd = open(partial, O_WRONLY | O_CLOEXEC | O_NONBLOCK);
    if (f->fd < 0 && !f->error) f->error = errno;
    free(partial);
    free(file.header);
}

// A record is not worth a run: an update that cannot be written has no file, which a replay says
// before its first update.
static void finish_record(Trainer *t) {
    RoutingFiles *f = t->routing;
    char *partial = xasprintf("%s.partial", f->path);
    if (f->fd >= 0 && fsync(f->fd) && !f->error) f->error = errno;
    if (f->fd >= 0 && close(f->fd) && !f->error) f->error = errno;
    int whole = comm_max(t->g->all, f->error != 0) == 0;
    if (whole && t->g->rank == 0 && rename(partial, f->path)) f->error = errno;
    if (!whole && t->g->rank == 0) {
        unlink(partial);
        unlink(f->path); // of a run before
    }
    if (f->error && !f->warned++)
        warn("cannot write the routing %s: %s: it is left out", f->path, file_why(f->error));
    free(partial);
    free(f->path);
}

// ---- replay ---------------------------------------------------------------------------------
static void start_replay(Trainer *t, int64_t update) {
    RoutingFiles *f = t->routing;
    if (f->replay_is_file && f->replay_done) return;
    char *path = replay_path(f, update);
    f->file = safetensors_open(path);
    f->open = f->replay_done = 1;
    SafeTensor wanted = topk_tensor(t);
    const SafeTensor *found = safetensors_find(&f->file, "topk");
    char want[192], have[192];
    if (!found || found->type != DTYPE_I32 ||
        strcmp(safetensors_shape(&wanted, want), safetensors_shape(found, have)))
        die("%s: the routing is not a tensor topk of int32 %s|"
            "replay what --routing-record wrote for the same model, --batch and --seq-len",
            path, safetensors_shape(&wanted, want));
    free(path);
}

static int ascending(const void *a, const void *b) {
    int x = *(const int *)a;
    int y = *(const int *)b;
    return (x > y) - (x < y);
}

// Sorts a token's ids, as the router would leave them (I7, the routing is decided once).
static void check_choice(const Trainer *t, int *id, int layer, int64_t token) {
    const Config *c = &t->m->c;
    qsort(id, c->K, sizeof *id, ascending);
    for (int k = 0; k < c->K; k++)
        if (id[k] < 0 || id[k] >= c->E || (k && id[k] == id[k - 1]))
            die("%s: layer %d, token %lld: expert %d is %s|each token needs %d different ids "
                "below %d",
                t->routing->file.path[0], layer, (long long)token, id[k],
                id[k] < 0 || id[k] >= c->E ? "not one of the model's" : "chosen twice", c->K, c->E);
}

// Puts the file's choices where forward finds them.
static void replay_round(Trainer *t) {
    RoutingFiles *f = t->routing;
    const SafeTensor *topk = safetensors_find(&f->file, "topk");
    int64_t K = t->m->c.K;
    int64_t tokens = t->n_micro * t->R;
    int64_t n = t->R * K;
    for (int l = 0; l < t->m->c.L; l++) {
        if (!t->m->c.is_moe[l]) continue;
        safetensors_read(&f->file, topk, layer_begin(t, l) * (int64_t)sizeof(int), f->choice,
                         tokens * K * (int64_t)sizeof(int));
        for (int64_t i = 0; i < tokens; i++)
            check_choice(t, f->choice + i * K, l, routing_token(t) + i);
        for (int m = 0; m < t->n_micro; m++)
            device_upload(saved_of(t, l, m)->topk, f->choice + m * n, n * sizeof(int));
    }
}

// ---- one update -----------------------------------------------------------------------------
void routing_start(Trainer *t, int64_t update) {
    if (!t->routing) return;
    if (t->routing->replay) start_replay(t, update);
    if (t->routing->record) start_record(t, update);
}

int routing_given(Trainer *t) {
    if (!t->routing || !t->routing->open) return 0;
    replay_round(t);
    return 1;
}

void routing_made(Trainer *t) {
    if (t->dump) dump_routing(t->dump, t);
    if (!t->routing || !t->routing->record) return;
    RoutingFiles *f = t->routing;
    if (!f->error) f->error = routing_write(t, f->fd, f->at);
}

void routing_finish(Trainer *t) {
    if (!t->routing) return;
    if (t->routing->record) finish_record(t);
    if (t->routing->open) safetensors_close(&t->routing->file);
    t->routing->open = 0;
}
