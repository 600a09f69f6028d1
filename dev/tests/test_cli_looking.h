// Part of test_cli.c: options that look inside a run (dump, trace, profile, samples, heat map).

// Tokens of a dump whose topk is not that of its router logits; -1 where shapes are not as they
// should be.
static int other_choices(const SafeTensors *d) {
    const SafeTensor *topk = safetensors_find(d, "topk");
    const SafeTensor *router = safetensors_find(d, "router");
    if (!topk || !router || topk->n_dims != 4 || router->n_dims != 4) return -1;
    for (int i = 0; i < 3; i++)
        if (topk->shape[i] != router->shape[i]) return -1;
    int64_t K = topk->shape[3], E = router->shape[3];
    int64_t n = topk->bytes / (K * 4);
    int *id = (int *)xmalloc(topk->bytes, "choices");
    int differ = 0;
    float *logit = (float *)xmalloc(router->bytes, "router logits");
    safetensors_read(d, topk, 0, id, topk->bytes);
    safetensors_read(d, router, 0, logit, router->bytes);
    for (int64_t i = 0; i < n; i++) {
        float least = INFINITY; // of those chosen
        int above = 0;
        for (int k = 0; k < K; k++) least = fminf(least, logit[i * E + id[i * K + k]]);
        for (int e = 0; e < E; e++) above += logit[i * E + e] >= least;
        differ += above != K;
    }
    free(id);
    free(logit);
    return differ;
}

static void test_looking(void) {
    if (!exists(at("learn"))) good("eval exec $B $S --batch 8 --steps 20 --out $T/learn");
    good("eval exec $B --model $T/learn/checkpoints/latest --steps 0 --seq-len 32 --batch 4 "
         "--generate 40 --temperature 0 --prompt \"'the router '\"");
    char *first = slurp(at("stdout"), 0);
    char *sample = strstr(first, "sample> the router ");
    good("eval exec $B --model $T/learn/checkpoints/latest --steps 0 --seq-len 32 --batch 4 "
         "--generate 40 --temperature 0 --prompt \"'the router '\"");
    char *second = slurp(at("stdout"), 0);
    char *again = strstr(second, "sample> the router ");
    check(sample && again && !strcmp(sample, again) &&
              strlen(sample) >= strlen("sample> the router ") + 40,
          "--generate 40 --temperature 0: the prompt and 40 bytes, the same every time");
    free(first);
    free(second);
    // The prompt has what JSON must escape and what a terminal must not get.
    setenv("SAY", "--sample-every 1 --save-every 1 --prompt \"'say \\\"x\\\" \001'\"", 1);
    good("eval exec $B $S $SAY --steps 2 --trace-token 37 --out $T/said");
    check(said("stdout", "token 37 of the update") && said("stdout", "layer   experts") &&
              said("stdout", "sample> "),
          "--trace-token and --sample-every print");
    char *screen = slurp(at("stdout"), 0);
    Log said_log = log_of("said");
    int samples = 0;
    for (int i = 0; i < said_log.n; i++) {
        const cJSON *text = cJSON_GetObjectItem(said_log.line[i], "sample");
        if (!text) continue;
        char *printed = xasprintf("sample> %s\n", text->valuestring);
        samples += strstr(printed, "say \"x\" \xef\xbf\xbd") && strstr(screen, printed);
        free(printed);
    }
    check(samples == 2, "the log has both samples as the screen shows them");
    log_free(&said_log);
    free(screen);
    good("eval exec $B $S $SAY --steps 1 --out $T/said_again");
    good("eval exec $B $S $SAY --steps 2 --resume --out $T/said_again");
    check(same_logs("said", "said_again"), "a resumed run has every sample once, and the same");
    // The table of a token does not depend on rounds (without aux, which is per round): token 37
    // lies in the first, 100 in the second
    for (int token = 37; token <= 100; token += 63) {
        good("eval exec $B $S --steps 1 --micro-batch 1 --aux-coef 0 --trace-token %d", token);
        first = slurp(at("stdout"), 0);
        good("eval exec $B $S --steps 1 --micro-batch 1 --aux-coef 0 --trace-token %d --rounds 2",
             token);
        second = slurp(at("stdout"), 0);
        const char *one = strstr(first, "  layer   experts");
        const char *two = strstr(second, "  layer   experts");
        check(one && two && !strcmp(one, two),
              "--trace-token %d --rounds 2: the experts, scores and norms of --rounds 1", token);
        free(first);
        free(second);
    }
    good("eval exec $B $S --steps 1 --dump $T/look.safetensors --out $T/look");
    SafeTensors d = safetensors_open(at("look.safetensors"));
    const SafeTensor *logits = safetensors_find(&d, "logits");
    const SafeTensor *loss = safetensors_find(&d, "loss");
    float value = 0;
    if (loss) safetensors_read(&d, loss, 0, &value, 4);
    Log l = log_of("look");
    check(
        logits && logits->n_dims == 3 && logits->shape[0] == 4 && logits->shape[1] == 32 &&
            logits->shape[2] == 257 && value == (float)logged(&l, 1, "loss") &&
            safetensors_find(&d, "grad.model.layers.1.mlp.experts.7.down_proj.weight"),
        "--dump: logits (B, T, V), the loss that is logged, gradients by their Hugging Face names");
    int differ = other_choices(&d);
    check(!differ, "--dump: the choices are those of the router logits beside them (%d differ)",
          differ);
    safetensors_close(&d);
    log_free(&l);
    check(run("exec $B --selftest") == 0 && said("stdout", "self-test"),
          "--selftest needs no model");
    // a look at a run reads: what it evaluates is on the screen, and no file changes
    char *before = slurp(at("learn/log.jsonl"), 0);
    good("exec $B --model $T/learn/checkpoints/latest --val $T/val.txt --seq-len 32 --batch 8 "
         "--steps 0 --out $T/learn --resume");
    char *after = slurp(at("learn/log.jsonl"), 0);
    check(
        !strcmp(before, after) && said("stdout", "| val_loss "),
        "--steps 0 --resume --val: the loss of the newest checkpoint on screen, the log untouched");
    free(before);
    free(after);
    // the planner is the allocator, counting
    good("eval exec $B $S --steps 1 --plan");
    char *plan = slurp(at("stdout"), 0);
    char *row = strstr(plan, "memory of a rank");
    char line[160] = "-";
    if (row) snprintf(line, sizeof line, "%.*s", (int)strcspn(row, "\n"), row);
    good("eval exec $B $S --steps 1");
    check(row && said("stdout", line), "--plan prints the table of the run: %s", line);
    free(plan);
    // a plan is of the planned machine: what --recompute auto fills is the 139 GiB of an h200,
    // whatever this machine has
    good("exec $B --init $F/../../model/configs/qwen3_30b_a3b.json --plan --world 8 --recompute "
         "auto --seq-len 4096 --batch 64 --micro-batch 1");
    plan = slurp(at("stdout"), 0);
    good("exec $B --init $F/../../model/configs/qwen3_30b_a3b.json --plan --world 8 --recompute "
         "auto --seq-len 4096 --batch 64 --micro-batch 1 --gpu-mem 139");
    check(strstr(plan, "fits: uses part of 139.0 GiB") && said("stdout", plan),
          "--plan --recompute auto: the planned machine's memory, not this one's");
    free(plan);
    good("cp $T/text.txt $T/part1.txt; cp $T/val.txt $T/part2.txt; eval exec $B --init "
         "$T/config.json --train \"'$T/part*.txt'\" --seq-len 32 --batch 4 --steps 1");
    check(said("stdout", "2 files"), "a quoted glob names several files");
}

// The newest child of a process, by /proc; 0 where there is none.
static pid_t child_of(pid_t parent) {
    DIR *d = opendir("/proc");
    pid_t found = 0;
    for (struct dirent *e; d && (e = readdir(d));) {
        char path[300], state;
        int pid = atoi(e->d_name);
        int of = 0;
        snprintf(path, sizeof path, "/proc/%d/stat", pid);
        FILE *f = pid > 0 ? fopen(path, "r") : 0;
        if (f && fscanf(f, "%*d (%*[^)]) %c %d", &state, &of) == 2 && of == parent && pid > found)
            found = pid;
        if (f) fclose(f);
    }
    if (d) closedir(d);
    return found;
}
