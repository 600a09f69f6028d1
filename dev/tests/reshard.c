// A checkpoint with optimizer state, resumed in every layout of this world: each number of each
// shard is, bit for bit, the one that the file holds for that tensor and index, and the shards of a
// data-parallel copy together are the whole model.
//
//   mpirun -np 6 reshard CHECKPOINT TOKENS         a checkpoint of an AdamW run
#define _GNU_SOURCE
#pragma GCC diagnostic ignored \
    "-Wunused-function" // the headers of test_moe.c: a part of them is needed here
#include "layouts.h"

// Numbers of this rank's shards that differ from the files; *n: numbers compared. state: 0
// parameters, 1 and 2 first and second moment.
static int64_t differing(const Run *r, const SafeTensors *file, int state, int64_t *n) {
    static const char *const suffix[] = { "", ".m", ".v" };
    int64_t wrong = 0;
    char name[160], key[170];
    for (int b = 0; b < r->m.n_blocks; b++)
        for (int i = 0; i < r->m.block[b].n_segments; i++) {
            const Segment *s = &r->m.block[b].segment[i];
            const OptimizerState *o = &r->t->optimizer.state[b];
            param_hf_name(&r->m.param[r->m.block[b].segment_param[i]],
                          r->m.block[b].segment_slice[i], name);
            snprintf(key, sizeof key, "%s%s", name, suffix[state]);
            const SafeTensor *t = safetensors_find(file, key);
            size_t width = state ? sizeof(real) : sizeof(floatX);
            size_t bytes = s->count * width;
            *n += s->count;
            if (!t || dtype_size(t->type) != width) {
                wrong += s->count;
                continue;
            }
            char *here = (char *)xmalloc(bytes, "a shard");
            char *there = (char *)xmalloc(bytes, "a shard");
            const void *from = o->param + s->offset;
            if (state) from = (state == 1 ? o->m : o->v) + s->offset;
            device_download(here, from, bytes);
            safetensors_read(file, t, s->first * (int64_t)width, there, (int64_t)bytes);
            for (int64_t k = 0; k < s->count; k++)
                wrong += memcmp(here + k * width, there + k * width, width) != 0;
            free(here);
            free(there);
        }
    return wrong;
}

int main(int argc, char **argv) {
    comm_init(&argc, &argv);
    if (argc != 3) die("reshard needs two arguments|reshard CHECKPOINT TOKENS");
    CommOptions comm = { 120, 0, 1 };
    comm_start(comm);
    device_init(comm_local_rank(), 1);
    Fixture f;
    memset(&f, 0, sizeof f);
    f.dir = argv[1];
    f.tokens = argv[2];
    f.T = 16;
    f.ignore = -1;
    char *path = xasprintf("%s/config.json", f.dir);
    char *state_path = xasprintf("%s/optimizer.safetensors", f.dir);
    Config c = config_read(path);
    SafeTensors model = safetensors_open_folder(f.dir);
    SafeTensors state = safetensors_open(state_path);
    Shape shape[MAX_VALUES];
    int n = shapes_of(shape, comm_world_size(), &c);
    for (int i = 0; i < 2 * n; i++) {
        Layout l = { shape[i / 2].dp, shape[i / 2].fsdp, shape[i / 2].ep, DISPATCH_ALLTOALL,
                     i % 2 };
        if (l.heads && (l.ep == 1 || c.KV % l.ep)) continue;
        Setup s = fixture_setup(&f, OPT_ADAMW);
        s.step.batch = 2 * comm_world_size();
        Run *r = run_open(&f, &l, &s);
        checkpoint_resume(r->k, f.dir, r->t->optimizer.state);
        int64_t wrong = 0;
        int64_t numbers = 0;
        int64_t parameters = 0;
        for (int k = 0; k < 3; k++) wrong += differing(r, k ? &state : &model, k, &numbers);
        for (int k = 0; k < model.n; k++) parameters += safetensors_elements(&model.tensor[k]);
        double all_wrong = comm_sum(r->g.all, (double)wrong);
        double all = comm_sum(r->g.all, (double)numbers);
        check(all_wrong == 0 && all == 3.0 * (double)parameters * l.dp,
              "dp %d fsdp %d ep %d%s: parameters and both moments, %.0f numbers, %.0f differ", l.dp,
              l.fsdp, l.ep, l.heads ? ", heads split" : "", all, all_wrong);
        run_close(r);
    }
    safetensors_close(&model);
    safetensors_close(&state);
    config_free(&c);
    free(path);
    free(state_path);
    if (comm_world_rank() == 0)
        printf("reshard: %d rank%s: %d passed, %d failed\n", comm_world_size(),
               comm_world_size() > 1 ? "s" : "", passed, failed);
    device_finish();
    comm_finish();
    return failed > 0;
}
