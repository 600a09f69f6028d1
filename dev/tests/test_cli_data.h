// What the data of a run may be, part of test_cli.c (which includes it): loss masks, mixtures,
// named parts of --val, bytes given to another vocabulary.

enum { DATA_TOKENS = 4000 };

// $T/NAME.bin with bytes as tokens, and $T/NAME.mask in which token i counts where i % period < on
// (period 0: no mask).
static void write_data(const char *name, unsigned seed, int period, int on) {
    static uint16_t tokens[DATA_TOKENS];
    static unsigned char mask[1024 + DATA_TOKENS];
    for (int i = 0; i < DATA_TOKENS; i++) {
        seed = seed * 1103515245u + 12345u;
        tokens[i] = (uint16_t)('a' + (seed >> 16) % 9);
        mask[1024 + i] = period && i % period < on;
    }
    char *shard = xasprintf("%s.bin", name);
    char *beside = xasprintf("%s.mask", name);
    write_shard(shard, 20240520, 1, DATA_TOKENS, tokens, DATA_TOKENS);
    const uint32_t head[3] = { 20260520, 1, DATA_TOKENS };
    for (int i = 0; i < 3; i++)
        for (int k = 0; k < 4; k++) mask[4 * i + k] = (unsigned char)(head[i] >> 8 * k);
    if (period) write_file(beside, mask, sizeof mask);
    free(shard);
    free(beside);
}

// The largest difference of the losses of updates 1 to n, INFINITY where targets differ.
static double loss_difference(const char *a, const char *b, int n) {
    Log x = log_of(a);
    Log y = log_of(b);
    double worst = 0;
    for (int u = 1; u <= n; u++) {
        double d = fabs(logged(&x, u, "loss") / logged(&y, u, "loss") - 1);
        if (!(d <= worst)) worst = d;
        if (logged(&x, u, "targets") != logged(&y, u, "targets")) worst = INFINITY;
    }
    log_free(&x);
    log_free(&y);
    return worst;
}

static void write_data_files(void) {
    write_data("plain", 1, 0, 0);
    write_data("masked", 2, 10, 3);
    write_data("silent", 3, 10, 0);
    setenv("D", "--init $T/config.json --seq-len 32 --batch 4 --threads 1 --lr 1e-3", 1);
    setenv("MIX",
           "--train w=$T/plain.bin@0.7 $T/masked.bin@0.3 --val x=$T/plain.bin y=$T/masked.bin", 1);
}

static void test_data_files(void) {
    write_data_files();
    good("eval exec $B $D --train $T/masked.bin --shuffle off --steps 2 --out $T/m");
    Log l = log_of("m");
    int expected[2] = { 0, 0 };
    for (int i = 1; i <= 256; i++) expected[(i - 1) / 128] += i % 10 < 3;
    check(logged(&l, 1, "targets") == expected[0] && logged(&l, 2, "targets") == expected[1],
          "targets in the log: %g and %g, counted from the mask %d and %d",
          logged(&l, 1, "targets"), logged(&l, 2, "targets"), expected[0], expected[1]);
    check(said("stdout", "loss masks: 30.0 % of the targets count"), "their share at the start");
    log_free(&l);

    good("eval exec $B $D --train $T/silent.bin --val $T/silent.bin --steps 2 --out $T/silent");
    l = log_of("silent");
    check(l.n == 4 && isnan(logged(&l, 2, "loss")) && isnan(logged(&l, 2, "val_loss")) &&
              logged(&l, 2, "targets") == 0 && isfinite(logged(&l, 2, "grad_norm")),
          "updates and evaluations without targets: losses null, the run goes on");
    check(said("stdout", "step 2/2 (100%) | no targets") && said("stdout", "val_loss null"),
          "  and the screen says so");
    log_free(&l);

    good("cp $T/masked.bin $T/bare.bin; eval exec $B $D --train $T/bare.bin --steps 3 --out $T/o1");
    good("eval exec $B $D --train $T/masked.bin --loss-mask off --steps 3 --out $T/o2");
    good("eval exec $B $D --train $T/masked.bin --steps 3 --out $T/o3");
    check(loss_difference("o1", "o2", 3) == 0 && loss_difference("o1", "o3", 3) > 0,
          "--loss-mask off: as a shard without a mask; with it other losses");

    good("mv $T/bare.bin $T/o3/masked.bin; eval exec $B $D --train $T/o3/masked.bin --steps 4 "
         "--resume --out $T/o3");
    check(said("stdout", "3968 targets of an epoch count, the checkpoint was "
                         "trained with 1190"),
          "a run resumed without its loss masks says so");
    good("exec mv $T/o3/masked.bin $T/bare.bin");

    good("eval exec $B $D $MIX --steps 8 --out $T/mix");
    good("eval exec $B $D $MIX --steps 3 --out $T/mix2");
    good("eval exec $B $D $MIX --steps 8 --resume --out $T/mix2");
    check(loss_difference("mix", "mix2", 8) == 0,
          "a mixture resumed in its fourth update: the same");
    l = log_of("mix");
    const cJSON *last = l.line[l.n - 1];
    const cJSON *val = l.line[0];
    double x = number(val, "val_loss.x");
    double y = number(val, "val_loss.y");
    double nx = 0;
    double ny = 0;
    for (int i = 1; i <= 80 * 32; i++) {
        nx++;
        ny += i % 10 < 3;
    }
    check(fabs(number(val, "val_loss") - (nx * x + ny * y) / (nx + ny)) < 1e-6,
          "val_loss is the mean over the targets of its parts, %.6f", number(val, "val_loss"));
    const cJSON *w =
        cJSON_GetObjectItemCaseSensitive(cJSON_GetObjectItemCaseSensitive(last, "sources"), "w");
    double windows = number(w, "windows");
    check(fabs(windows - 0.7 * 32) < 1, "the log's last line: %g of 32 windows from w", windows);
    log_free(&l);
    check(said("stdout", "plain.bin is given in --val, but also in --train"),
          "validation data inside the training data is said");

    good("sed s/257/1024/ $T/config.json > $T/large.json; exec $B --init $T/large.json --train "
         "$T/text.txt --seq-len 32 --batch 4 --steps 1");
    check(said("stdout", "text.txt is read as bytes, but the model's vocabulary has 1024 ids"),
          "bytes given to a model with another vocabulary are said");

    const char *one = "--init $T/config.json --seq-len 32 --steps 1 --train";
    setenv("ONE", one, 1);
    good("cp $T/plain.bin $T/set1.bin; cp $T/masked.bin $T/set2.bin; "
         "exec cp $T/masked.mask $T/set2.mask");
    bad("a mask for one shard of two", "set1.bin has none", "$ONE '$T/set*.bin'");
    bad("a mask that is required", "plain.bin: no loss mask",
        "$ONE $T/plain.bin --loss-mask require");
    bad("a mask for .txt", "text.txt: no loss mask", "$ONE $T/text.txt --loss-mask require");
    good("head -c 5000 $T/masked.mask > $T/set1.mask");
    bad("a mask too short", "set1.mask: states 4000 tokens and has 3976 bytes", "$ONE $T/set1.bin");
    good("{ head -c 5023 $T/masked.mask; printf '\\007'; } > $T/set1.mask");
    bad("a mask with a 7", "byte of token 3999 is 7", "$ONE $T/set1.bin");
    good("cp $T/masked.bin $T/set1.mask");
    bad("a shard as mask", "not a loss mask: magic 20240520", "$ONE $T/set1.bin");
    good("rm $T/set1.mask; exec mkfifo $T/set1.mask");
    bad("a FIFO as mask", "set1.mask: not a regular file", "$ONE $T/set1.bin");
    bad("a FIFO as data", "not a regular file", "$ONE $T/set1.mask");
    bad("a weight of 0", "0 is no weight", "$ONE $T/plain.bin@0");
    bad("a weight below 0", "-1 is no weight", "$ONE $T/plain.bin@-1");
    bad("weights without a common period", "more than 1000000 windows",
        "$ONE $T/plain.bin@1 $T/masked.bin@0.123456789");
    bad("a weight for a file that is not there", "no file matches", "$ONE $T/absent.bin@0.5");
    bad("a weight in --val", "--val has a weight", "$ONE $T/plain.bin --val $T/masked.bin@2");
    bad("a name for some of --val", "has no name",
        "$ONE $T/plain.bin --val a=$T/masked.bin $T/bare.bin");
    bad("names without weights", "names, but no weights", "$ONE a=$T/plain.bin b=$T/masked.bin");
    bad("two weights of a name", "two weights", "$ONE a=$T/plain.bin@1 a=$T/masked.bin@2");
    bad("a source twice", "plain.bin' is there twice", "$ONE $T/plain.bin@1 $T/plain.bin@1");
    good("eval exec $B $ONE a=$T/plain.bin a=$T/bare.bin@3 b=$T/masked.bin@1");
    check(said("stdout", "a: 75 % of the windows, 2 files"),
          "the weight of a name may stand at any of its patterns");
    good("exec ln -sf nowhere $T/bare.mask");
    bad("a mask that is a link to nothing", "bare.mask: cannot stat", "$ONE $T/bare.bin");
    good("exec rm $T/bare.mask");
    bad("a mixture resumed with other weights", "source 1 of --train is 0.5 of the windows",
        "$D --train w=$T/plain.bin $T/masked.bin@1 --steps 9 --resume --out $T/mix2");
    bad("a mixture resumed without weights", "source 1 of --train is 1 of the windows from 2",
        "$D --train $T/plain.bin $T/masked.bin --loss-mask off --steps 9 --resume --out $T/mix2");
}

// Masks, mixtures and parts of --val on two ranks as on one.
static void test_data_ranks(void) {
    write_data_files();
    good("eval exec $B $D $MIX --steps 4 --out $T/mix1");
    good("eval exec $M -np 2 $B $D $MIX --steps 4 --ep 2 --out $T/mix2");
    double worst = loss_difference("mix1", "mix2", 4);
    Log a = log_of("mix1");
    Log b = log_of("mix2");
    double val = fabs(number(a.line[0], "val_loss.y") / number(b.line[0], "val_loss.y") - 1);
    check(worst < same_losses && val < same_losses,
          "masks, mixtures, parts of --val on two ranks as on one: losses %.1e, parts %.1e", worst,
          val);
    log_free(&a);
    log_free(&b);
    good("eval exec $M -np 2 $B $D --train $T/silent.bin --steps 2 --fsdp 2 --out $T/silent2");
    a = log_of("silent2");
    check(a.n == 2 && isnan(logged(&a, 2, "loss")), "two ranks without targets go on");
    log_free(&a);
    // Targets end in the second window of update 6: two of its four ranks have none, and later
    // updates have none at all.
    write_data("half", 4, 2000, 700);
    setenv("HALF", "--train $T/half.bin --shuffle off --documents mask --document-end 97", 1);
    good("eval exec $B $D $HALF --steps 8 --out $T/half1");
    good("eval exec $M -np 4 $B $D $HALF --steps 8 --ep 2 --fsdp 2 --out $T/half4");
    worst = loss_difference("half1", "half4", 6);
    a = log_of("half4");
    check(worst < same_losses && logged(&a, 6, "targets") < 64 && logged(&a, 7, "targets") == 0 &&
              isnan(logged(&a, 7, "loss")) && logged(&a, 7, "grad_norm") == 0,
          "masks and documents on four ranks as on one, some without targets: losses %.1e", worst);
    log_free(&a);
}
