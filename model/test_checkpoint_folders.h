// Folders of checkpoints: latest, keep, interruptions; a part of test_checkpoint.c.

// ---- 4. folders: latest, keep, interruptions ------------------------------------------------
static void test_folders(const char *config) {
    char *out = in("folders");
    char *dir = xasprintf("%s/checkpoints", out);
    char target[64] = "";
    check(find_newest(out) == -1, "nothing to find in a folder that is not there");
    SaveOptions o = options(SAVE_PRECISION, 0, 0);
    for (int64_t step = 5; step <= 20; step += 5)
        save_grid(config, 1, 1, 0, STATE_M, DTYPE_FLOATX, out, step, o, 0);
    char *latest = xasprintf("%s/latest", dir);
    check(readlink(latest, target, sizeof target - 1) > 0 && !strcmp(target, "step_20") &&
              find_newest(out) == 20,
          "four saves: latest -> step_20");
    o.keep = 2;
    save_grid(config, 1, 1, 0, STATE_M, DTYPE_FLOATX, out, 25, o, 0);
    check(exists(dir, "step_25") && exists(dir, "step_20") && !exists(dir, "step_15") &&
              !exists(dir, "step_5"),
          "--keep 2 leaves the two newest");
    char *left = xasprintf("%s/incomplete_step_30", dir);
    char *file = xasprintf("%s/model.safetensors", left);
    char *gone = xasprintf("%s/removing_step_3", dir);
    folder_make(left);
    spill(file, "half", 4);
    folder_make(gone);
    unlink(latest);
    spill(latest, "nonsense", 8);
    check(find_newest(out) == 25 && !exists(dir, "incomplete_step_30") &&
              !exists(dir, "removing_step_3"),
          "leftovers of interrupted saves are removed and never resumed from");
    memset(target, 0, sizeof target);
    check(readlink(latest, target, sizeof target - 1) > 0 && !strcmp(target, "step_25"),
          "a damaged latest is repaired");
    char *newest = checkpoint_folder(out, 25);
    char *older = checkpoint_folder(out, 20);
    char *model = xasprintf("%s/model.safetensors", newest);
    char *replaced = xasprintf("%s/replaced_step_25", dir);
    fflush(stdout);
    int saved = dup(2);
    int null = open("/dev/null", O_WRONLY);
    dup2(null, 2);
    rename(newest, replaced);
    check(find_newest(out) == 25 && !exists(dir, "replaced_step_25"),
          "killed while step 25 was being replaced: the old step 25 is back");
    char *index = xasprintf("%s/model.safetensors.index.json", newest);
    char *aside = xasprintf("%s/aside", newest);
    rename(index, aside);
    check(find_newest(out) == 20, "a checkpoint without its index is not complete, either");
    rename(aside, index);
    free(index);
    free(aside);
    check(find_newest(out) == 25, "  and complete again with it");
    if (truncate(model, 1000)) check(0, "truncate");
    check(find_newest(out) == 20,
          "a checkpoint with a file cut short is not complete: the one before is found");
    char *trainer = xasprintf("%s/trainer.json", older);
    spill(trainer, "{\"step\": 20, ", 13);
    check(dies_finding(out),
          "a damaged trainer.json is not complete, and where none is, that is said");
    dup2(saved, 2);
    close(saved);
    close(null);
    save_grid(config, 1, 1, 0, STATE_M, DTYPE_FLOATX, out, 25, o, 0);
    save_grid(config, 1, 1, 0, STATE_M, DTYPE_FLOATX, out, 22, options(SAVE_PRECISION, 0, 0), 0);
    o.keep = 1;
    save_grid(config, 1, 1, 0, STATE_M, DTYPE_FLOATX, out, 23, o, 0);
    check(exists(dir, "step_25") && exists(dir, "step_23") && !exists(dir, "step_22"),
          "--keep 1 at step 23 removes step 22, and no step above it");
    o.keep = 2;
    check(find_newest(out) == 25 && !load_grid(newest, 1, 1, 0, STATE_M, DTYPE_FLOATX, 1),
          "a save over a damaged folder of the same step replaces it");
    cJSON *t = checkpoint_trainer(newest);
    check(trainer_number(t, "step") == 25 && trainer_number(t, "seed") == 7 &&
              !strcmp(trainer_text(t, "optimizer"), "adamw"),
          "trainer.json: the caller's values, our step");
    cJSON_Delete(t);
    free(out);
    free(dir);
    free(latest);
    free(left);
    free(file);
    free(gone);
    free(newest);
    free(older);
    free(model);
    free(trainer);
    free(replaced);
}

// kill -9 at any moment: the newest complete checkpoint always loads, bit-equal.
static void test_kills(const char *config) {
    char *out = in("kills");
    enum { KILLS = 80 };
    int64_t wrong = 0;
    int64_t last = 0;
    int lost = 0;
    double began = now_seconds();
    save_grid(config, 2, 1, 0, STATE_M | STATE_V, DTYPE_FLOATX, out, 0,
              options(SAVE_PRECISION, 0, 0), 0);
    double seconds = now_seconds() - began;
    for (int i = 0; i < KILLS; i++) {
        int ready[2];
        char byte;
        fflush(stdout);
        if (pipe(ready)) die("pipe|no more files");
        pid_t child = fork();
        if (!child) {
            SaveOptions o =
                options(i % 2 ? SAVE_BF16 : SAVE_PRECISION, i % 3 == 0, i % 5 ? 0 : 20000);
            o.keep = 1 + i % 2;
            for (int64_t step = last; step < last + 50; step++) {
                save_grid(config, 2, 1, 0, STATE_M | STATE_V, DTYPE_FLOATX, out, step, o, 0);
                if (step == last && write(ready[1], "x", 1) != 1) _exit(3);
            }
            _exit(0);
        }
        // The first save replaces the newest checkpoint itself, the following ones add: kills fall
        // into both, at random moments of two saves.
        if (i % 2 && read(ready[0], &byte, 1) != 1) lost++;
        double wait = 2 * seconds * (double)(mix64((uint64_t)i) >> 11) / 9007199254740992.0;
        struct timespec pause = { (time_t)wait, (long)((wait - (double)(time_t)wait) * 1e9) };
        nanosleep(&pause, 0);
        kill(child, SIGKILL);
        waitpid(child, 0, 0);
        close(ready[0]);
        close(ready[1]);
        int64_t found = find_newest(out);
        if (found < last) {
            lost++;
            continue;
        }
        char *dir = checkpoint_folder(out, found);
        wrong += load_grid(dir, 1, 1, 0, STATE_M | STATE_V, DTYPE_FLOATX, 1);
        free(dir);
        last = found;
    }
    check(!lost && !wrong,
          "%d x kill -9 during saves, with --keep: the newest complete checkpoint loads bit-equal "
          "every time (%" PRId64 " saves finished)",
          KILLS, last);
    free(out);
}
