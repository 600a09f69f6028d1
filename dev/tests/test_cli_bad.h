// Bad inputs, second part of test_cli.c (which includes it): each ends the program with exit status
// 1 and one line on stderr that says what, where and, behind "hint:", what to do.

static void bad(const char *what, const char *fragment, const char *command) {
    char *line = xasprintf("eval exec $B %s", command);
    pid_t child = begin(line);
    int status = end(child);
    int lines = 0;
    char *text = slurp(at("stderr"), 0);
    for (const char *p = text; *p; p++) lines += *p == '\n';
    int ok = status == 1 && lines == 1 && !strncmp(text, "error: ", 7) && strstr(text, "hint: ") &&
             strstr(text, fragment);
    check(ok, "%s: \"%s\"%s%.400s", what, fragment, ok ? "" : " EXPECTED, GOT ", ok ? "" : text);
    if (!ok) printf("          status %d, %d lines\n", status, lines);
    free(text);
    free(line);
}

// A safetensors file from a header, the length it states (0: the true one) and a number of zero
// bytes.
static void write_safetensors(const char *name, const char *header, uint64_t stated, size_t data) {
    size_t n = strlen(header);
    if (!stated) stated = n;
    char *file = (char *)xcalloc(8 + n + data, 1, "a file");
    for (int i = 0; i < 8; i++) file[i] = (char)(stated >> (8 * i) & 255);
    memcpy(file + 8, header, n);
    write_file(name, file, 8 + n + data);
    free(file);
}
// A copy of the gqa fixture under $T/name in which the first `from` of the weights' header reads
// `to` (of the same length; 0: nothing changed).
static void copy_model(const char *name, const char *from, const char *to) {
    char *path = xasprintf("%s/%s/model.safetensors", folder, name);
    size_t n;
    good("cp -r $F/gqa $T/%s && exec chmod -R u+w $T/%s", name, name);
    if (from) {
        char *text = slurp(path, &n);
        char *p = (char *)memmem(text, n, from, strlen(from));
        char *file = xasprintf("%s/model.safetensors", name);
        if (!p || strlen(from) != strlen(to))
            die("%s: the test does not find %s|adapt the test", path, from);
        memcpy(p, to, strlen(to));
        write_file(file, text, n);
        free(text);
        free(file);
    }
    free(path);
}
static void write_shard(const char *name, uint32_t magic, uint32_t version, uint32_t says,
                        const uint16_t *tokens, int n) {
    unsigned char *data = (unsigned char *)xcalloc(1024 + 2 * (size_t)n, 1, "a shard");
    const uint32_t head[3] = { magic, version, says };
    for (int i = 0; i < 3; i++)
        for (int k = 0; k < 4; k++) data[4 * i + k] = (unsigned char)(head[i] >> 8 * k);
    for (int i = 0; i < n; i++) {
        data[1024 + 2 * i] = (unsigned char)tokens[i];
        data[1025 + 2 * i] = (unsigned char)(tokens[i] >> 8);
    }
    write_file(name, data, 1024 + 2 * (size_t)n);
    free(data);
}
// $T/name: the config with `from` replaced by `to`.
static void change_config(const char *name, const char *from, const char *to) {
    char *text = slurp(at("config.json"), 0);
    char *p = strstr(text, from);
    if (!p) die("the test's config has no %s|adapt the test", from);
    char *changed = xasprintf("%.*s%s%s", (int)(p - text), text, to, p + strlen(from));
    write_file(name, changed, strlen(changed));
    free(text);
    free(changed);
}

static void bad_options(void) {
    bad("unknown option", "unknown option --sed", "$S --sed 3");
    bad("unknown option with a suggestion", "did you mean --seq-len", "$S --seqlen 3");
    bad("value missing at the end", "--batch needs a value", "$S --batch");
    bad("value missing before another option", "--lr needs a value", "$S --lr --batch 4");
    bad("not a whole number", "--batch 4x is not a whole number", "$S --batch 4x");
    bad("not a number", "--lr fast is not a number", "$S --lr fast");
    bad("infinite number", "--lr inf is not a number", "$S --lr inf");
    bad("bad choice", "choose one of sgd|adamw|adamw8bit", "$S --optimizer adam");
    bad("switch with a value", "--resume=maybe", "$S --resume=maybe");
    bad("stray word", "foo is not an option", "foo $S");
    bad("no model", "no model was given", "--train $T/text.txt");
    bad("two models", "both --model and --init", "--model $F/gqa $S");
    bad("no training data", "no training data was given", "--init $T/config.json --steps 2");
    bad("no batch", "--batch -2 is out of range", "$S --batch -2");
    bad("negative steps", "--steps -1 is out of range", "$S --steps -1");
    bad("beta2 of one", "--beta2 1 is out of range", "$S --beta2 1");
    bad("negative learning rate", "--lr -1 is out of range", "$S --lr -1");
    bad("negative coefficients", "--aux-coef -1 cannot be negative", "$S --aux-coef -1");
    bad("a seed that JSON rounds", "9007199254740993 is out of range",
        "$S --seed 9007199254740993");
    bad("negative temperature", "--temperature -1 is out of range", "$S --temperature -1");
    bad("negative intervals", "--sample-every -1 is out of range", "$S --sample-every -1");
    bad("a plan for no ranks", "--world -8 is out of range", "$S --plan --world -8");
    bad("a plan for 2^31 ranks", "give 0 to 1048576", "$S --plan --world 2147483647");
    bad("negative warmup", "--warmup -1 is negative", "$S --warmup -1");
    bad("final-lr above one", "--final-lr 2", "$S --final-lr 2");
    bad("no time at all", "--timeout 0", "$S --timeout 0");
    bad("resume of nothing", "--resume needs the folder", "$S --resume");
    bad("unknown dtype", "--save-dtype f64", "$S --save-dtype f64");
    bad("ratio above one", "--warmup 1.5", "$S --steps 100 --warmup 1.5 --out $T/none2");
    bad("sequences longer than the model's positions", "max_position_embeddings 128",
        "$S --seq-len 129");
    bad("batch not divisible by rounds", "not divisible by --rounds 3", "$S --rounds 3");
    bad("micro-batch that does not divide", "--micro-batch 3", "$S --micro-batch 3");
    bad("rounds with --update layer", "use --update end", "$S --rounds 2 --update layer");
    bad("skipping with --update layer", "--skip-nonfinite cannot undo",
        "$S --skip-nonfinite --update layer");
    bad("more ranks than there are", "--dp 2", "$S --dp 2");
    bad("ep that does not fit", "--ep 3", "$S --ep 3");
    setenv("MV2_COMM_WORLD_SIZE", "2", 1);
    bad("started as one of two by a launcher that it does not know",
        "a launcher started 2 processes", "$S --steps 1");
    unsetenv("MV2_COMM_WORLD_SIZE");
    setenv("WORLD_SIZE", "2", 1);
    setenv("RANK", "0", 1);
    setenv("LOCAL_RANK", "0", 1);
    bad("started as one of two by torchrun", "torchrun started 2 processes", "$S --steps 1");
    unsetenv("WORLD_SIZE");
    unsetenv("RANK");
    unsetenv("LOCAL_RANK");
    bad("a dump of no update", "--steps 0 makes none", "$S --steps 0 --dump $T/no.safetensors");
    good("eval exec $B $S --steps 1 --profile 2 --document-end 3");
    check(said("stderr", "--profile 2: --steps 1 ends the run before it") &&
              said("stderr", "--document-end 3 means nothing without --documents mask"),
          "options that do nothing in this run are said");
    bad("token that is not there", "an update has tokens 0 to 127",
        "$S --steps 1 --trace-token 128");
    bad("unknown attention kernel", "no attention kernel \"fast\"", "$S --attention-kernel fast");
    bad("gradients that are not finite", "not finite",
        "$S --steps 20 --optimizer sgd --lr 1e30 --grad-clip 0 --out $T/infinite");
    char *log = slurp(at("infinite/log.jsonl"), 0);
    check(strstr(log, "\"loss\":null") != 0,
          "the update that ended the run is in the log, its loss null");
    free(log);
    bad("a layout that cuts blocks of 8-bit moments",
        "of 4 ranks these fit: --dp 4 --fsdp 1 --ep 1, ",
        "--plan --model $F/tied --optimizer adamw8bit --seq-len 8 --batch 12 --world 4");
    good("exec $B --init $T/config.json --steps 0 --seed 1 --out $T/seeded");
    bad("another seed than that of the weights that were made", "--seed 1, now it is 2",
        "$S --seed 2 --resume --out $T/seeded");
}

static void bad_models(void) {
    bad("no such config", "cannot open", "--init $T/nothing.json --train $T/text.txt");
    write_file("broken.json", "{\"model_type\": ", 15);
    bad("broken config", "not valid JSON", "--init $T/broken.json --train $T/text.txt");
    change_config("k.json", "\"num_experts_per_tok\":2", "\"num_experts_per_tok\":9");
    bad("more experts chosen than there are", "num_experts_per_tok 9 exceeds num_experts 8",
        "--init $T/k.json --train $T/text.txt");
    change_config("type.json", "qwen3_moe", "mixtral");
    bad("another kind of model", "model_type \"mixtral\" is not supported",
        "--init $T/type.json --train $T/text.txt");
    change_config("heads.json", "\"num_key_value_heads\":2", "\"num_key_value_heads\":3");
    bad("heads that do not divide", "num_attention_heads 4 is not a multiple",
        "--init $T/heads.json --train $T/text.txt");
    change_config("scaled.json", "\"rope_theta\":10000",
                  "\"rope_theta\":10000,\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":4}");
    bad("scaled positions", "yarn", "--init $T/scaled.json --train $T/text.txt");

    const char *use = "--train $F/gqa/tokens.bin --seq-len 16 --batch 4 --steps 1 --threads 1";
    setenv("U", use, 1);
    bad("no such model folder", "nowhere/config.json: cannot open", "--model $T/nowhere $U");
    copy_model("m_missing", "lm_head.weight", "lm_haed.weight");
    bad("missing tensor", "lm_head.weight is missing", "--model $T/m_missing $U");
    copy_model("m_shape", "[257,32]", "[32,257]");
    bad("wrong shape", "config.json means", "--model $T/m_shape $U");
    copy_model("m_nan", 0, 0);
    SafeTensors s = safetensors_open_folder(at("m_nan"));
    const SafeTensor *t = safetensors_find(&s, "model.layers.1.mlp.experts.5.up_proj.weight");
    int fd = open(at("m_nan/model.safetensors"), O_WRONLY);
    float nan = NAN;
    if (!t || fd < 0 || pwrite(fd, &nan, 4, t->at + 4 * 17) != 4)
        die("%s: cannot write a NaN|adapt the test", at("m_nan"));
    close(fd);
    safetensors_close(&s);
    bad("weights that are not numbers", "experts.5.up_proj.weight: element 17 is NaN",
        "--model $T/m_nan $U");
    copy_model("m_cut", 0, 0);
    good("truncate -s 20 $T/m_cut/model.safetensors");
    bad("header cut short", "truncated", "--model $T/m_cut $U");
    copy_model("m_tail", 0, 0);
    good("truncate -s -100 $T/m_tail/model.safetensors");
    bad("data cut short", "out of range", "--model $T/m_tail $U");
    copy_model("m_craft", 0, 0);
    write_safetensors("m_craft/model.safetensors", "{}", (uint64_t)1 << 40, 64);
    bad("oversized header", "exceeds 100 MB", "--model $T/m_craft $U");
    write_safetensors(
        "m_craft/model.safetensors",
        "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},\"b\":{\"dtype\":\"F32\""
        ",\"shape\":[2],\"data_offsets\":[4,12]}}",
        0, 12);
    bad("overlapping tensors", "overlap", "--model $T/m_craft $U");
    write_safetensors("m_craft/model.safetensors",
                      "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,16]}}", 0, 8);
    bad("offsets out of range", "out of range", "--model $T/m_craft $U");
    write_safetensors("m_craft/model.safetensors",
                      "{\"a\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[0,8]}}", 0, 8);
    bad("size that is not shape x dtype", "do not hold shape", "--model $T/m_craft $U");
    good("cp -r $F/parallel $T/m_part && chmod -R u+w $T/m_part && exec rm "
         "$T/m_part/model-00003-of-00007.safetensors");
    bad("one of several files missing", "model-00003-of-00007.safetensors",
        "--model $T/m_part --train $F/parallel/tokens.bin --seq-len 16 --batch 4 --steps 1");
}

// Files that are not files, text that is not text, sizes that nothing has: refused at once, by
// name.
static void bad_files(void) {
    good("mkfifo $T/fifo; mkdir $T/m_fifo $T/m_index $T/m_bin $T/m_lost; cp $F/gqa/config.json "
         "$T/m_fifo; cp $F/gqa/config.json $T/m_index; cp $F/gqa/config.json $T/m_bin; "
         "cp $F/gqa/config.json $T/m_lost; mkfifo $T/m_fifo/model.safetensors; "
         "mkfifo $T/m_index/model.safetensors.index.json; echo x > $T/m_bin/pytorch_model.bin; "
         "exec ln -s ../../blobs/gone $T/m_lost/model.safetensors");
    setenv("U", "--train $F/gqa/tokens.bin --seq-len 16 --batch 4 --steps 1 --threads 1", 1);
    bad("a pipe as a shard", "not a regular file", "$S --train $T/fifo");
    bad("a pipe as a config", "a pipe or a device", "--init $T/fifo $U");
    bad("a pipe as a decode table", "a pipe or a device", "--model $F/gqa $U --tokens $T/fifo");
    bad("a pipe as weights", "a pipe or a device", "--model $T/m_fifo $U");
    bad("a pipe as an index", "a pipe or a device", "--model $T/m_index $U");
    bad("pickles instead of weights", "its .bin files are pickles", "--model $T/m_bin $U");
    bad("a link of a hub cache that leads nowhere", "hint: the download is incomplete",
        "--model $T/m_lost $U");
    good("mkdir $T/m_lost2; cp $F/gqa/config.json $T/m_lost2; "
         "exec ln -s ../../blobs/gone $T/m_lost2/model.safetensors.index.json");
    bad("  an index that is such a link", "index.json: a link to a file that is not there",
        "--model $T/m_lost2 $U");
    good("exec ln -sf ../../blobs/gone $T/m_lost2/config.json");
    bad("  a config that is such a link", "config.json: a link to a file that is not there",
        "--model $T/m_lost2 $U");
    bad("a name on the hub", "hf download Qwen/Qwen3", "--model Qwen/Qwen3 $U");
    bad("a config.json as --model", "give the folder that it lies in",
        "--model $F/gqa/config.json $U");
    change_config("red.json", "\"hidden_act\":\"silu\"",
                  "\"hidden_act\":\"\\u001b[31mRED\\u0007|hint\"");
    bad("control characters of a file", "hidden_act = \"\\x1b[31mRED\\x07|hint\" is not",
        "--init $T/red.json $U");
    char *text = slurp(at("stderr"), 0);
    check(!strchr(text, 27) && strstr(text, "hint: only silu is"),
          "  none of them reaches the terminal, and the hint is the program's");
    free(text);
    char *many = xasprintf("\"hidden_act\":\"%05000d\"", 0);
    change_config("long.json", "\"hidden_act\":\"silu\"", many);
    bad("a text of 5,000 characters", "hint: only silu is", "--init $T/long.json $U");
    free(many);
    change_config("twice.json", "\"rope_theta\":10000", "\"rope_theta\":10000,\"rope_theta\":500");
    bad("a key twice", "the key \"rope_theta\" is there twice", "--init $T/twice.json $U");
    change_config("tail.json", "\"decoder_sparse_step\":1}", "\"decoder_sparse_step\":1} {}");
    bad("text after the document", "not valid JSON near", "--init $T/tail.json $U");
    change_config("layers.json", "\"num_hidden_layers\":2", "\"num_hidden_layers\":1000000");
    bad("a million layers", "tensors", "--init $T/layers.json $U");
    change_config("experts.json", "\"num_experts\":8", "\"num_experts\":2147483647");
    bad("two thousand million experts, planned", "tensors", "--init $T/experts.json --plan");
    change_config("wide.json", "\"head_dim\":16", "\"head_dim\":2147483646");
    bad("a model beyond 64 bits", "parameters", "--init $T/wide.json $U");
    bad("memory beyond 64 bits", "--gpu-mem 1e300 is out of range", "$S --gpu-mem 1e300");
    enum { NUMBERS = 5000000 };
    char *header = (char *)xmalloc(2 * NUMBERS + 40, "a header");
    strcpy(header, "{\"__metadata__\":[");
    size_t n = strlen(header);
    for (int i = 0; i < NUMBERS; i++) {
        header[n++] = '1';
        header[n++] = ',';
    }
    strcpy(header + n, "1]}");
    copy_model("m_header", 0, 0);
    write_safetensors("m_header/model.safetensors", header, 0, 8);
    free(header);
    bad("a header of five million numbers", "values are more than", "--model $T/m_header $U");
}

static void bad_data(void) {
    const uint16_t ids[] = { 1, 2, 3, 4, 5, 6, 7, 257, 9, 10 };
    write_shard("range.bin", 20240520, 1, 10, ids, 10);
    write_shard("empty.bin", 20240520, 1, 0, ids, 0);
    write_shard("magic.bin", 20240521, 1, 10, ids, 10);
    write_shard("version.bin", 20240520, 3, 10, ids, 10);
    write_shard("cut.bin", 20240520, 1, 20, ids, 10);
    const char *use = "--init $T/config.json --seq-len 4 --batch 2 --steps 1 --threads 1";
    setenv("U", use, 1);
    bad("token id outside the vocabulary", "token 7 is id 257", "$U --train $T/range.bin");
    bad("empty shard", "empty shard", "$U --train $T/empty.bin");
    bad("not a shard", "not a token shard", "$U --train $T/magic.bin");
    bad("shard of another version", "shard version 3", "$U --train $T/version.bin");
    bad("shard cut short", "truncated", "$U --train $T/cut.bin");
    bad("no such file", "no file matches", "$U --train $T/absent*.bin");
    bad("text shorter than a sequence", "needs 65", "$U --train $T/short.txt --seq-len 64");
    bad("validation data as bad", "empty shard", "$U --train $T/text.txt --val $T/empty.bin");
    bad("no decode table", "cannot open the decode table",
        "$U --train $T/text.txt --tokens $T/none.vocab");
}

static void bad_places(void) {
    good("eval exec $B $S --steps 2 --out $T/taken");
    bad("folder in use", "is not empty", "$S --out $T/taken");
    bad("resumed with another seed", "--seed 1337",
        "$S --steps 4 --resume --out $T/taken --seed 5");
    bad("resumed with another batch", "--batch 4",
        "$S --steps 4 --resume --out $T/taken --batch 8");
    bad("resumed with another length", "--seq-len 32",
        "$S --steps 4 --resume --out $T/taken --seq-len 16");
    bad("resumed in another order", "--shuffle on",
        "$S --steps 4 --resume --out $T/taken --shuffle off");
    bad("resumed with another optimizer", "--optimizer adamw, now it is sgd",
        "$S --steps 4 --resume --out $T/taken --optimizer sgd");
    good("cp -r $T/taken $T/tampered; exec sed -i 's/\"batch\"/\"BATCH\"/' "
         "$T/tampered/checkpoints/step_2/trainer.json");
    bad("resumed from a damaged trainer.json", "trainer.json",
        "$S --steps 4 --resume --out $T/tampered");
    bad("a file where the folder should be", "cannot read the folder",
        "$S --steps 1 --out $T/text.txt/run");
    good("exec ln -s loop $T/loop");
    bad("a folder that cannot be read", "cannot read the folder", "$S --steps 1 --out $T/loop");
    bad("a folder that cannot be made", "cannot create the folder",
        "$S --steps 1 --out /proc/nowhere/run");
    bad("a dump that cannot be made", "cannot write the dump",
        "$S --steps 1 --dump $T/nowhere/dump.safetensors");
    bad("a dump onto a full device", "cannot write the dump", "$S --steps 1 --dump /dev/full");
    // a disk that fills up while a checkpoint is written: a limit on the size of files says so in
    // the same place. 24 MB, which the weights (15 MB) keep and the optimizer's state breaks; a
    // launcher's own files stay below it.
    change_config("large.json", "\"vocab_size\":257", "\"vocab_size\":60000");
    int status =
        run("trap '' XFSZ; ulimit -f 48000; eval exec $B --init $T/large.json --train $T/text.txt "
            "--seq-len 8 --batch 1 --steps 1 --out $T/full");
    check(status == 1 && said("stderr", "cannot write") && said("stderr", "hint: ") &&
              !exists(at("full/checkpoints/step_1")),
          "a disk that fills up during a save: status 1, a hint, no half checkpoint");
    run("rm -rf $T/full");
    if (run("mkdir $T/disk && mount -t tmpfs -o size=400k none $T/disk") ==
        0) { // only where mounting is allowed
        status = run("eval exec $B $S --steps 2 --out $T/disk/run");
        check(status == 1 && said("stderr", "free") && said("stderr", "hint: ") &&
                  !exists(at("disk/run/checkpoints/step_2")),
              "a disk without room for a checkpoint: refused before anything is written");
        run("umount $T/disk");
    }
}

static void bad_documents(void) {
    bad("an end-of-text token outside the vocabulary", "no end-of-text token 100000",
        "$S --documents mask --document-end 100000");
    change_config("endless.json", "\"vocab_size\"", "\"eos_token_id\":null,\"vocab_size\"");
    bad("no end-of-text token", "no end-of-text token -1",
        "$S --init $T/endless.json --documents mask");
    bad("neither join nor mask", "choose one of join|mask", "$S --documents on");
}

// Routings: a record of $S, and files that are none.
static void bad_routing(void) {
    good("eval exec $B $S --steps 2 --routing-record $T/routing");
    good("mkdir $T/gap; cp $T/routing/step_1.safetensors $T/gap; "
         "cp $T/routing/step_1.safetensors $T/gap/step_3.safetensors");
    bad("no such routing", "cannot read the routing", "$S --routing-replay $T/none");
    bad("a routing for fewer updates", "the routing of update 3",
        "$S --steps 3 --routing-replay $T/routing");
    check(!said("stdout", "step 1/3"), "  before the first update");
    bad("a routing with a gap", "the routing of update 2", "$S --steps 3 --routing-replay $T/gap");
    check(!said("stdout", "step 1/3"), "  before the first update");
    bad("a routing of another shape", "not a tensor topk of int32",
        "$S --steps 1 --batch 8 --routing-replay $T/routing");
    bad("a routing that is something else", "not a tensor topk of int32",
        "$S --steps 1 --routing-replay $F/gqa/model.safetensors");
    good("mkdir -p $T/holes/step_2.safetensors.partial; touch $T/holes/step_2.safetensors; eval "
         "exec $B $S --steps 3 --routing-record $T/holes");
    check(said("stderr", "cannot write the routing") && exists(at("holes/step_1.safetensors")) &&
              exists(at("holes/step_3.safetensors")) && !exists(at("holes/step_2.safetensors")),
          "a routing that cannot be written is said and left out; the run goes on");
    bad("a record that cannot be made", "cannot", "$S --steps 1 --routing-record /dev/null/x");
    size_t n;
    char *text = slurp(at("routing/step_1.safetensors"), &n);
    int *last = (int *)(void *)(text + n - 2 * sizeof(int));
    int keep = last[1];
    last[1] = last[0];
    write_file("twice.safetensors", text, n);
    bad("an expert chosen twice", "is chosen twice",
        "$S --steps 1 --routing-replay $T/twice.safetensors");
    last[1] = 1000;
    write_file("range.safetensors", text, n);
    bad("an expert that does not exist", "expert 1000 is not one of the model's",
        "$S --steps 1 --routing-replay $T/range.safetensors");
    last[1] = keep;
    free(text);
}

static void test_bad(void) {
    bad_options();
    bad_models();
    bad_files();
    bad_data();
    bad_places();
    bad_documents();
    bad_routing();
}
