// Runs that must end with one line naming the fault (test_comm.sh); a part of test_comm.c.

// ---- faults ---------------------------------------------------------------------------------
static void fault(const char *name) {
    Comm *all = group[0].g;
    float *x = calloc(1 << 20, 4);
    float *y = calloc(1 << 20, 4);
    int culprit = world - 1;
    comm_where(7, 3, "backward");
    comm_wait(all_reduce_start(all, x, 100, DTYPE_F32, STREAM_GATHER));
    if (!strcmp(name, "skip")) { // a rank that skips one backward collective
        if (rank != culprit) comm_wait(all_reduce_start(all, x, 100, DTYPE_F32, STREAM_GATHER));
        comm_where(7, 2, "backward");
        comm_wait(all_gather_start(all, y, x, 100, DTYPE_F32, STREAM_GATHER));
    } else if (!strcmp(name, "layer")) { // same sizes, another layer: only the records can see it
        comm_where(7, rank == culprit ? 1 : 2, "backward");
        comm_wait(all_reduce_start(all, x, 100, DTYPE_F32, STREAM_GATHER));
    } else if (!strcmp(name, "last")) { // the last call of a step: the end of the step sees it
        if (rank != culprit) comm_wait(all_reduce_start(all, x, 100, DTYPE_F32, STREAM_GATHER));
        comm_step_end();
    } else if (!strcmp(name, "rows") ||
               !strcmp(name, "rows-few")) { // the culprit sends rank 0 one row more, or one less,
                                            // than it expects
        int64_t to[64] = { 0 };
        int64_t from[64] = { 0 };
        for (int j = 0; j < world; j++) to[j] = from[j] = 5;
        if (rank == culprit) to[0] += strcmp(name, "rows") ? -1 : 1;
        comm_wait(all_to_all_start(all, y, from, x, to, 16, STREAM_EXCHANGE));
    } else if (!strcmp(name, "stuck")) {
        if (rank == culprit)
            for (;;) pause();
        comm_wait(reduce_scatter_start(all, y, x, 1000, DTYPE_F32, 0, STREAM_GATHER));
    } else if (!strcmp(name, "die")) {
        if (rank == culprit) die("something is wrong on one rank|nothing to do");
        comm_wait(all_reduce_start(all, x, 1000, DTYPE_F32, STREAM_GATHER));
    } else if (!strcmp(name, "kill")) {
        if (rank == culprit) raise(SIGKILL);
        comm_wait(all_reduce_start(all, x, 1000, DTYPE_F32, STREAM_GATHER));
    } else if (!strcmp(name, "source")) {
        Request r = all_gather_start(all, y, x, 100, DTYPE_F32, STREAM_GATHER);
        x[50] = 1;
        comm_wait(r);
    } else if (!strcmp(name, "destination")) { // what is read before the wait is poison
        Request r = all_gather_start(all, y, x, 100, DTYPE_F32, STREAM_GATHER);
        int poisoned = y[0] != y[0] && y[99] != y[99];
        comm_wait(r);
        if (poisoned && y[0] == 0)
            die("destination was poison until the wait|this line is the expected one");
    } else if (!strcmp(name, "twice")) {
        Request r = all_gather_start(all, y, x, 100, DTYPE_F32, STREAM_GATHER);
        comm_wait(r);
        comm_wait(r);
    } else if (!strncmp(name, "layout-", 7)) {
        Config c = small_config(0);
        if (!strcmp(name, "layout-product"))
            grid_build(&c, 1, world, world + 1, DISPATCH_ALLTOALL, 0);
        if (!strcmp(name, "layout-divide")) grid_build(&c, 1, world + 1, 1, DISPATCH_ALLTOALL, 0);
        if (!strcmp(name, "layout-rest")) grid_build(&c, 1, 1, 1, DISPATCH_ALLTOALL, 0);
        c.E = 25;
        if (!strcmp(name, "layout-experts")) grid_build(&c, 1, 0, world, DISPATCH_ALLTOALL, 0);
        c.E = 24;
        c.KV = 3;
        if (!strcmp(name, "layout-heads")) grid_build(&c, 1, 0, world, DISPATCH_ALLTOALL, 1);
    } else if (!strncmp(name, "slots-", 6)) { // misuse of blocks
        Config c = small_config(0);
        Grid g = grid_build(&c, 1, 0, 1, DISPATCH_ALLTOALL, 0);
        Model m = model_build(c, grid_shard_spec(&g));
        Arena arena = arena_counting("blocks");
        fsdp_free(fsdp_create(&m, &g, 0, &arena));
        arena_commit(&arena);
        Fsdp *f = fsdp_create(&m, &g, 0, &arena);
        if (!strcmp(name, "slots-third"))
            for (int l = 0; l < 3; l++) fsdp_get(f, m.dense_block[l]);
        if (!strcmp(name, "slots-release")) {
            fsdp_get(f, m.dense_block[0]);
            fsdp_release(f, m.dense_block[0]);
            fsdp_release(f, m.dense_block[0]);
        }
        if (!strcmp(name, "slots-reduce")) fsdp_reduce(f, m.dense_block[0], 0);
        if (!strcmp(name, "slots-grad"))
            for (int l = 0; l < 3; l++) fsdp_grad(f, m.dense_block[l]);
        if (!strcmp(name, "slots-done"))
            for (int l = 0; l < 3; l++) {
                fsdp_grad(f, m.dense_block[l]);
                fsdp_reduce(f, m.dense_block[l], 0);
                fsdp_grad_shard(f, m.dense_block[l]);
            }
    } else
        die("no fault %s|see test_comm.c", name);
    free(x);
    free(y);
    printf("rank %d: nothing noticed\n", rank);
}
