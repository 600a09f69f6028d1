// The folder of a run, fourth part of test_cli.c (which includes it): one owner, looks that only
// read, nothing through links, errors that are not absences, signals and streams that end.

// Every number of `file` in the log of `out` is of a run that was left alone: lines 1..n ascend.
static int log_is_whole(const char *out, int updates) {
    Log l = log_of(out);
    int good_lines = 0;
    for (int i = 0; i < l.n; i++)
        good_lines += l.line[i] && number(l.line[i], "step") == i + 1 &&
                      cJSON_HasObjectItem(l.line[i], "loss");
    int whole = l.n == updates && good_lines == updates;
    log_free(&l);
    return whole;
}

static void test_owner(void) {
    pid_t child = begin("eval exec $B $S --steps 100000 --save-every 20 --keep 1000 --out $T/own");
    int seen = wait_lines("own", 45);
    char *expected = xasprintf("process %d)", (int)child);
    char host[100] = "";
    gethostname(host, sizeof host - 1);
    const char *again[] = { "", "--resume" };
    for (int i = 0; i < 2; i++) {
        int status =
            end(begin_as("second", "eval exec $B $S --steps 200000 --out $T/own %s", again[i]));
        check(seen && status == 1 &&
                  (i == 0 || (said("second.err", "is in use by another run (host ") &&
                              said("second.err", expected) && said("second.err", host))),
              "a second run into the folder of a live one%s is refused%s", i ? ", resuming," : "",
              i ? ", naming host and process" : "");
    }
    // looks: evaluate, generate, plan; run.json, links and checkpoints are not touched
    char *before = slurp(at("own/run.json"), 0);
    int looks = 0;
    for (int i = 0; i < 5; i++) {
        looks += end(begin_as("glance", "eval exec $B $S --steps 0 --resume --val $T/val.txt "
                                        "--eval-batches 1 --out $T/own --generate 3")) == 0;
        looks += end(begin_as("glance", "eval exec $B $S --plan --resume --out $T/own")) == 0;
    }
    char *after = slurp(at("own/run.json"), 0);
    kill(child, SIGTERM);
    int status = end(child);
    Log l = log_of("own");
    int last = l.n ? (int)number(l.line[l.n - 1], "step") : -1;
    log_free(&l);
    check(looks >= 9 && !strcmp(before, after) && status == 0 && last >= 45,
          "ten looks at a live run (%d answered) leave its run.json and log alone, and it goes on",
          looks);
    free(before);
    free(after);
    free(expected);
    // kill -9: the lock is free at once
    child = begin("eval exec $B $S --steps 100000 --save-every 5 --out $T/dies");
    wait_lines("dies", 12);
    kill(child, SIGKILL);
    end(child);
    check(run("eval exec $B $S --steps 15 --resume --out $T/dies") == 0 && log_is_whole("dies", 15),
          "the lock of a run that was killed is free at once, its log whole");
    // many at once: one trains
    run("for i in 1 2 3 4 5 6 7 8; do { eval $B $S --seed $i --steps 12 --out $T/race "
        "> /dev/null 2> $T/race.$i && echo $i >> $T/winners; } & done; wait");
    char *winners = slurp(at("winners"), 0);
    status = run("test $(cat $T/race.? | grep -c 'in use by another run\\|is not empty') = 7 && "
                 "grep -q '\"seed\":.*'$(cat $T/winners) "
                 "$T/race/checkpoints/step_12/trainer.json");
    check(strlen(winners) == 2 && status == 0 && log_is_whole("race", 12),
          "eight starts into one folder: one trains, seven say why they do not");
    free(winners);
}

static void test_links(void) {
    good("eval exec $B $S --steps 2 --save-every 1 --out $T/link");
    good(
        "mkdir $T/home $T/disk2; echo x > $T/home/thesis; ln -s $T/home "
        "$T/link/checkpoints/incomplete_step_7; "
        "mkdir -p $T/link/checkpoints/incomplete_step_8/left/behind; "
        "mv $T/link/checkpoints/step_1 $T/disk2; ln -s $T/disk2/step_1 $T/link/checkpoints/step_1");
    good("echo keep > $T/victim; ln -s $T/victim $T/link/profile-3.trace.json; eval exec $B $S "
         "--steps 3 --resume --keep 1 --profile 3 --out $T/link");
    check(run("test -f $T/link/profile-3.trace.json && ! test -L $T/link/profile-3.trace.json && "
              "exec grep -q keep $T/victim") == 0,
          "a profile takes the place of a link of its name, and is not written through it");
    good(
        "mkdir $T/pipes; cp $F/tied/* $T/pipes; mkfifo $T/pipes/tokenizer.json; exec timeout 20 $B "
        "--model $T/pipes --steps 0 --threads 1 --out $T/pipes.out");
    check(said("stderr", "tokenizer.json is not copied into checkpoints: not a file"),
          "a tokenizer that cannot be read is said");
    good("cp $T/text.txt $T/pipe.txt; exec mkfifo $T/pipe.txt.vocab");
    bad("a pipe in the place of a decode table", "cannot open the decode table",
        "$S --train $T/pipe.txt --steps 1");
    check(exists(at("home/thesis")) && exists(at("disk2/step_1/model.safetensors")) &&
              !exists(at("link/checkpoints/incomplete_step_7")) &&
              !exists(at("link/checkpoints/incomplete_step_8")) &&
              exists(at("link/checkpoints/step_3/model.safetensors")),
          "what links under --out lead to is neither emptied nor removed");
    good("mkdir $T/outside $T/linked $T/logged; "
         "ln -s $T/outside $T/linked/checkpoints; ln -s $T/victim $T/logged/log.jsonl");
    bad("checkpoints that lie elsewhere", "is a symbolic link",
        "$S --steps 1 --resume --out $T/linked");
    bad("a log that lies elsewhere", "symbolic link", "$S --steps 1 --resume --out $T/logged");
    char *victim = slurp(at("victim"), 0);
    check(!strcmp(victim, "keep\n") && run("rmdir $T/outside") == 0,
          "nothing was written through the links");
    free(victim);
    pid_t writer = begin_as("taken_log", "eval exec $B $S --steps 100000 --out $T/lost");
    int begun = wait_lines("lost", 3);
    run("rm $T/lost/log.jsonl");
    kill(writer, SIGTERM);
    check(begun && end(writer) == 0 && said("taken_log.err", "log.jsonl was removed or replaced"),
          "a log that is removed under its run is said");
    pid_t child = begin("eval exec $B $S --steps 100000 --out $T/moves");
    int seen = wait_lines("moves", 3);
    run("mv $T/moves $T/moved");
    int status = end(child);
    check(
        seen && status == 1 && !exists(at("moves")) &&
            exists(at("moved/checkpoints/latest/trainer.json")),
        "a folder that is renamed under its run: saved where it is, then an error, no new folder");
    // cp -rL makes a folder of `latest`
    good("cp -rL $T/link $T/copied; eval exec $B $S --steps 4 --resume --out $T/copied");
    char target[64] = "";
    ssize_t n = readlink(at("copied/checkpoints/latest"), target, sizeof target - 1);
    check(n > 0 && !strcmp(target, "step_4"), "`latest` that a copy made a folder is a link again");
}

// Runs a resume of $T/fault with the n-th call of one kind failing; n = 0: strace is missing.
static int faulty(const char *error, const char *call, const char *path, const char *more) {
    run("rm -rf $T/fault; cp -a $T/whole5 $T/fault; eval strace -f -y -qq -e trace=%s $B $S "
        "--steps 10 --save-every 5 --keep 1 --resume --out $T/fault 2> $T/calls > /dev/null",
        call);
    run("grep -a '%s(' $T/calls | grep -an '%s' | head -1 | cut -d: -f1 > $T/nth; rm -rf $T/fault; "
        "cp -a $T/whole5 $T/fault",
        call, path);
    char *nth = slurp(at("nth"), 0);
    int n = atoi(nth);
    free(nth);
    if (!n) return -1;
    return run(
        "eval exec strace -f -qq -o /dev/null -e trace=%s -e inject=%s:error=%s:when=%d%s $B $S "
        "--steps 10 --save-every 5 --keep 1 --resume --out $T/fault",
        call, call, error, n, more);
}

static void test_faults(void) {
    good("eval exec $B $S --steps 5 --save-every 5 --keep 1 --out $T/whole5");
    good("cp -a $T/whole5 $T/unusable; exec rm "
         "$T/unusable/checkpoints/step_5/optimizer.safetensors");
    bad("checkpoints of which none is usable",
        "none of its 1 step_N is a complete checkpoint: "
        "step_5 (optimizer.safetensors is missing",
        "$S --steps 9 --resume --out $T/unusable");
    if (run("strace -qq -o /dev/null true")) {
        printf("          (no strace here: errors of the disk are not injected)\n");
        return;
    }
    static const struct {
        const char *error, *call, *path;
    } cases[] = { { "ESTALE", "openat", "trainer.json" }, { "EIO", "openat", "checkpoints" },
                  { "EACCES", "openat", "step_5" },       { "EMFILE", "openat", "trainer.json" },
                  { "EIO", "getdents64", "checkpoints" }, { "EIO", "pread64", "trainer.json" },
                  { "EIO", "pread64", "log.jsonl" },      { "EIO", "openat", "log.jsonl" },
                  { "EIO", "newfstatat", "safetensors" } };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int status = faulty(cases[i].error, cases[i].call, cases[i].path, "");
        int kept = exists(at("fault/checkpoints/step_5/model.safetensors"));
        check(status == 1 && said("stderr", "hint: ") && kept && log_is_whole("fault", 5),
              "%s of %s %s at a resume: status %d, checkpoint and log untouched", cases[i].error,
              cases[i].call, cases[i].path, status);
    }
    static const char *const calls[] = { "openat", "pwrite64", "fsync", "pread64" };
    for (int i = 0; i < 4; i++) {
        int status = faulty("EINTR", calls[i], "/fault", "+2");
        check(status == 0 && log_is_whole("fault", 10) &&
                  exists(at("fault/checkpoints/step_10/model.safetensors")),
              "every second %s interrupted by a signal: status %d, nothing lost", calls[i], status);
    }
    int status = faulty("ENOSPC", "pwrite64", "log.jsonl", "");
    check(status == 0 && log_is_whole("fault", 10),
          "a log line that finds a full disk waits for the next one: status %d", status);
}

static void test_streams(void) {
    pid_t child = begin("eval exec $B $S --steps 100000 --out $T/hup");
    int seen = wait_lines("hup", 5);
    kill(child, SIGHUP);
    int status = end(child);
    check(seen && status == 0 && exists(at("hup/checkpoints/latest/trainer.json")),
          "SIGHUP, a terminal that closes: saves and ends with status 0 (%d)", status);
    run("{ eval $B $S --steps 60 --out $T/pipe; echo $? > $T/pipe.status; } | head -3");
    char *ended = slurp(at("pipe.status"), 0);
    check(!strcmp(ended, "0\n") && log_is_whole("pipe", 60),
          "a reader of the screen that goes away (| head) does not end a run");
    free(ended);
    status = run("eval exec $B $S --steps 3 --out $T/mute >&-");
    check(status == 0 && log_is_whole("mute", 3), "nor does a closed stdout");
}

// A resumed run is the same run: what defines its mathematics is compared.
static void test_differences(void) {
    static const struct {
        const char *from, *to, *name;
    } fields[] = {
        { "\"rope_theta\":10000", "\"rope_theta\":500", "rope_theta" },
        { "\"norm_topk_prob\":true", "\"norm_topk_prob\":false", "norm_topk_prob" },
        { "\"num_experts_per_tok\":2", "\"num_experts_per_tok\":1", "num_experts_per_tok" },
        { "\"rms_norm_eps\":1e-6", "\"rms_norm_eps\":0.1", "rms_norm_eps" },
        { "\"router_aux_loss_coef\":0.01", "\"router_aux_loss_coef\":0.5", "router_aux_loss_coef" }
    };
    const char *rest = "--train $T/text.txt --seq-len 32 --batch 4 --threads 1 --steps 3 --resume";
    good("eval exec $B $S --steps 2 --out $T/base");
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        change_config("other.json", fields[i].from, fields[i].to);
        char *command = xasprintf("--init $T/other.json %s --out $T/base", rest);
        bad("resumed with another field of config.json", fields[i].name, command);
        free(command);
        good("rm -rf $T/base2; cp -r $T/base $T/base2; eval exec $B --init $T/other.json %s "
             "--out $T/base2 --allow-changed %s",
             rest, fields[i].name);
    }
    bad("another training file", "was trained on other data: file 1 of --train is val.txt",
        "--init $T/config.json --train $T/val.txt --seq-len 32 --batch 4 --steps 3 --resume "
        "--out $T/base");
    good("cp -r $T/base $T/base3; eval exec $B $S --train $T/val.txt --steps 3 --resume "
         "--out $T/base3 --allow-changed data");
    bad("a permission that means nothing", "--allow-changed rate",
        "$S --steps 3 --resume --out $T/base --allow-changed rate");
    good("cp -r $T/base $T/base4; eval exec $B $S --steps 3 --lr 1e-5 --schedule cosine "
         "--rounds 2 --resume "
         "--out $T/base4");
    check(said("stdout", "--lr is 1e-05, the checkpoint was trained with 0.0003") &&
              said("stdout", "--schedule is \"cosine\"") && said("stdout", "--rounds is 2"),
          "a changed rate and schedule are said, and accepted");
    good("exec $B --verify $T/base/checkpoints/latest");
    check(said("stdout", "every byte as it was written"), "--verify needs no model");
    good("cp -r $T/base $T/base5; printf X | dd of=$T/base5/checkpoints/step_2/model.safetensors "
         "bs=1 seek=20000 conv=notrunc 2> /dev/null");
    bad("verified after a byte changed", "step_2/model.safetensors is damaged",
        "--verify $T/base5/checkpoints/latest");
    bad("resumed after a byte changed", "step_2/model.safetensors is damaged",
        "$S --steps 3 --resume --out $T/base5");
}

// A run whose data changed has ended by itself, names the file and has saved.
static void check_saved_before_end(pid_t child, const char *out, const char *file,
                                   const char *what) {
    int status = end(child);
    char *latest = xasprintf("%s/checkpoints/latest/trainer.json", out);
    check(status == 1 && said("stderr", file) && said("stderr", "is saved") &&
              said("stderr", "is not the file that this run began with") && exists(at(latest)),
          "%s ends the run, after saving (status %d)", what, status);
    free(latest);
}

// What ends a run later is found before its first update, and what changes under it is survived.
static void test_foreseen(void) {
    const uint16_t ids[] = { 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 };
    write_shard("v50.bin", 20240520, 1, 10, ids, 10);
    change_config("v50.json", "\"vocab_size\":257", "\"vocab_size\":50");
    bad("a prompt without tokens", "--prompt has token 97",
        "--init $T/v50.json --train $T/v50.bin --seq-len 4 --batch 2 --steps 30 --sample-every 10 "
        "--prompt abc");
    double began = now_seconds();
    bad("a warmup that is no number", "--warmup 5x",
        "--init $T/nowhere --train $T/text.txt --warmup 5x");
    check(now_seconds() - began < 5, "  before any model is looked at");
    good("eval exec $B $S --steps 20 --warmup 10%% --lr 1e-3 --out $T/percent");
    Log l = log_of("percent");
    check(fabs(logged(&l, 2, "lr") - 5e-4) < 1e-12, "--warmup 10%% is a tenth of the run");
    log_free(&l);
    // A shard that is only touched is the same; one that changed ends the run after saving.
    const char *live =
        "--init $T/config.json --train $T/live.txt --seq-len 32 --batch 4 --threads 1";
    char *command = xasprintf("eval exec $B %s --steps 100000 --out $T/changes", live);
    good("exec cp $T/text.txt $T/live.txt");
    pid_t child = begin(command);
    int seen = wait_lines("changes", 5);
    run("touch $T/live.txt");
    seen = wait_lines("changes", 60) && seen;
    check(seen && kill(child, 0) == 0 && waitpid(child, 0, WNOHANG) == 0,
          "a shard that was touched is the same shard");
    run("tr a-z A-Z < $T/text.txt > $T/new.txt; mv $T/new.txt $T/live.txt");
    check_saved_before_end(child, "changes", "live.txt", "one that changed");
    free(command);
    command = xasprintf("eval exec $B %s --val $T/live.txt --eval-every 1 --steps 100000 "
                        "--out $T/val_changes",
                        "--init $T/config.json --train $T/text.txt --seq-len 32 --batch 4 "
                        "--threads 1");
    child = begin(command);
    wait_lines("val_changes", 5);
    run("exec truncate -s 999 $T/live.txt");
    check_saved_before_end(child, "val_changes", "live.txt", "a validation file that was cut");
    free(command);
}

static void test_folder(void) {
    test_owner();
    test_links();
    test_faults();
    test_streams();
    test_differences();
    test_foreseen();
}
