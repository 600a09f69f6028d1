// Odd and bad inputs, second half of test_checkpoint.c (which includes it): every bad one must end
// the program with exit status 1 and one line that names the file, the tensor or key, and a hint.

// A safetensors file from a header and a number of zero bytes.
static void raw_file(const char *path, const char *header, size_t data) {
    size_t n = strlen(header);
    char *file = (char *)xcalloc(8 + n + data, 1, "test file");
    for (int i = 0; i < 8; i++) file[i] = (char)((uint64_t)n >> (8 * i) & 255);
    memcpy(file + 8, header, n);
    spill(path, file, 8 + n + data);
    free(file);
}

// First `from` in a file becomes `to`; in a safetensors file lengths must be equal.
static void edit(const char *path, const char *from, const char *to) {
    size_t n = 0;
    char *text = slurp(path, &n);
    char *at = text ? (char *)memmem(text, n, from, strlen(from)) : 0;
    if (!at) die("%s: the test does not find %s in it|adapt the test", path, from);
    char *out = (char *)xmalloc(n + strlen(to), "test file");
    size_t head = (size_t)(at - text);
    size_t tail = n - head - strlen(from);
    memcpy(out, text, head);
    memcpy(out + head, to, strlen(to));
    memcpy(out + head + strlen(to), at + strlen(from), tail);
    spill(path, out, head + strlen(to) + tail);
    free(out);
    free(text);
}

static void test_large_offsets(void) {
    char *path = in("sparse.safetensors");
    const int64_t n = 3000000000; // elements: beyond 2^31; bytes beyond 2^32
    char *header = xasprintf(
        "{\"a\":{\"dtype\":\"BF16\",\"shape\":[3,1000000000],\"data_offsets\":[0,%" PRId64
        "]},\"b\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[%" PRId64 ",%" PRId64 "]}}",
        2 * n, 2 * n, 2 * n + 4);
    raw_file(path, header, 0);
    int64_t start = 8 + (int64_t)strlen(header);
    int fd = open(path, O_RDWR);
    int ok = fd >= 0 && !ftruncate(fd, start + 2 * n + 4) &&
             !file_write_at(fd, start + 2 * n - 2, "\x34\x12\x78\x56", 4);
    if (!ok)
        printf("    (no sparse files here: large offsets not exercised)\n");
    else {
        SafeTensors s = safetensors_open(path);
        uint16_t last = 0;
        uint16_t scalar = 0;
        safetensors_read(&s, safetensors_find(&s, "a"), 2 * n - 2, &last, 2);
        safetensors_read(&s, safetensors_find(&s, "b"), 0, &scalar, 2);
        check(last == 0x1234 && scalar == 0x5678 &&
                  safetensors_elements(safetensors_find(&s, "a")) == n,
              "a sparse file of 6 GB: element 2,999,999,999 and what lies behind it");
        safetensors_close(&s);
    }
    if (fd >= 0) close(fd);
    unlink(path);
    free(path);
    free(header);
}

typedef struct {
    const char *config;
    char *dir;
    unsigned state;
} Bad; // dir: a copy of a good model folder, to be spoilt

static char *owned[64]; // folder names, freed at the end
static int n_owned;
static char *own(char *text) { return owned[n_owned++] = text; }

// Runs f in a child; *status = its exit status (128 + signal), the text of its stderr into `said`.
static void run_child(void (*f)(const Bad *), const Bad *b, int *status, char *said, size_t room) {
    int p[2], code;
    fflush(stdout);
    if (pipe(p)) die("pipe: %s|close some files", strerror(errno));
    pid_t child = fork();
    if (!child) {
        dup2(p[1], 2);
        close(p[0]);
        close(p[1]);
        die_set(0, leave);
        f(b);
        _exit(0);
    }
    close(p[1]);
    size_t n = 0;
    for (ssize_t got; n < room - 1 && (got = read(p[0], said + n, room - 1 - n)) > 0;)
        n += (size_t)got;
    said[n] = 0;
    close(p[0]);
    waitpid(child, &code, 0);
    *status = WIFEXITED(code) ? WEXITSTATUS(code) : 128 + WTERMSIG(code);
}

static void expect(const char *name, void (*f)(const Bad *), const Bad *b, const char *fragment) {
    char said[4096];
    int status;
    run_child(f, b, &status, said, sizeof said);
    const char *error = strstr(said, "error: ");
    const char *hint = error ? strstr(error, "  hint: ") : 0;
    const char *newline = error ? strchr(error, '\n') : 0;
    int ok = status == 1 && error && hint && hint < newline && newline[1] == 0 &&
             strstr(error, fragment) && strstr(error, fragment) < hint;
    check(ok, "%s: %s", name, fragment);
    if (!ok) printf("    status %d, said: %s\n", status, said);
}

static void do_open(const Bad *b) { safetensors_open(b->dir); }
static void do_folder(const Bad *b) { safetensors_open_folder(b->dir); }
static void do_config(const Bad *b) { config_read(b->dir); }
static void do_load(const Bad *b) { load_grid(b->dir, 1, 1, 0, b->state, DTYPE_FLOATX, 0); }
static void do_resume(const Bad *b) { load_grid(b->dir, 1, 1, 0, b->state, DTYPE_FLOATX, 1); }
static void do_resume_split(const Bad *b) { load_grid(b->dir, 2, 1, 1, b->state, DTYPE_FLOATX, 1); }
static void do_save(const Bad *b) {
    save_grid(b->config, 1, 1, 0, b->state, DTYPE_FLOATX, b->dir, 7, options(SAVE_PRECISION, 0, 0),
              0);
}
static void do_trainer(const Bad *b) { trainer_number(checkpoint_trainer(b->dir), "seed"); }
static void do_verify(const Bad *b) { checkpoint_verify(b->dir, stdout); }
static void do_save_dtype(const Bad *b) { (void)save_dtype_parse(b->dir); }
static void do_make(const Bad *b) {
    if (!geteuid() && seteuid(65534)) die("root cannot become another user|run as another user");
    folder_make(b->dir);
}
static void do_save_limited(const Bad *b) {
    struct rlimit limit = { 100000, 100000 };
    setrlimit(RLIMIT_FSIZE, &limit);
    do_save(b);
}

static void bad_headers(void) {
#define T2(shape, begin, end) \
    "{\"dtype\":\"F32\",\"shape\":" shape ",\"data_offsets\":[" begin "," end "]}"
    static const struct {
        const char *name, *header;
        size_t data;
        const char *fragment;
    } cases[] = { { "header is no JSON", "{\"a\": {", 8, "the header is not valid: " },
                  { "garbage behind the JSON", "{} x", 0, "the header is not valid: " },
                  { "header is a list", "[1, 2]", 0, "the header is not valid: " },
                  { "offsets beyond the file", "{\"a\":" T2("[4]", "0", "16") "}", 12,
                    "tensor a: offsets [0, 16) out of range" },
                  { "offsets that run backwards", "{\"a\":" T2("[2]", "8", "0") "}", 8,
                    "tensor a: offsets [8, 0) out of range" },
                  { "negative offsets", "{\"a\":" T2("[2]", "-8", "0") "}", 8,
                    "tensor a: data_offsets is not a list of whole numbers" },
                  { "offsets near 2^64",
                    "{\"a\":" T2("[2]", "18446744073709551608", "18446744073709551616") "}", 8,
                    "tensor a: data_offsets is not" },
                  { "overlapping tensors",
                    "{\"a\":" T2("[2]", "0", "8") ",\"b\":" T2("[2]", "4", "12") "}", 12,
                    "tensors a and b overlap" },
                  { "one tensor inside another",
                    "{\"a\":" T2("[4]", "0", "16") ",\"b\":" T2("[1]", "4", "8") "}", 16,
                    "tensors a and b overlap" },
                  { "size is not the shape's", "{\"a\":" T2("[3]", "0", "8") "}", 8,
                    "tensor a: 8 bytes do not hold shape [3] of F32" },
                  { "negative shape", "{\"a\":" T2("[-2]", "0", "8") "}", 8,
                    "tensor a: shape is not a list of whole numbers" },
                  { "fractional shape", "{\"a\":" T2("[1.5]", "0", "8") "}", 8,
                    "tensor a: shape is not a list of whole numbers" },
                  { "shape that overflows 64 bits",
                    "{\"a\":" T2("[4294967296, 4294967296, 4294967296]", "0", "0") "}", 0,
                    "tensor a: shape of 1.84e+19 elements" },
                  { "nine dimensions", "{\"a\":" T2("[1,1,1,1,1,1,1,1,1]", "0", "4") "}", 4,
                    "tensor a has more than 8 dimensions" },
                  { "dtype missing", "{\"a\":{\"shape\":[2],\"data_offsets\":[0,8]}}", 8,
                    "tensor a: dtype, shape or data_offsets is missing" },
                  { "a name twice", "{\"a\":" T2("[1]", "0", "4") ",\"a\":" T2("[1]", "4", "8") "}",
                    8, "the header is not valid: the key \"a\" is there twice" } };
    Bad b = { 0, own(in("bad.safetensors")), 0 };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        raw_file(b.dir, cases[i].header, cases[i].data);
        expect(cases[i].name, do_open, &b, cases[i].fragment);
    }
    static const struct {
        const char *name, *bytes;
        size_t n;
        const char *fragment;
    } raw[] = { { "empty file", "", 0, "truncated: 0 bytes" },
                { "five bytes", "\1\0\0\0\0", 5, "truncated: 5 bytes" },
                { "header longer than the file", "\100\0\0\0\0\0\0\0{}", 10,
                  "truncated: the header has 64 bytes, the file 10" },
                { "header length beyond 100 MB", "\0\0\0\20\0\0\0\0{}", 10,
                  "header length 268435456 exceeds 100 MB" },
                { "header length 2^64 - 1", "\377\377\377\377\377\377\377\377{}", 10,
                  "header length 18446744073709551615 exceeds 100 MB" },
                { "git-lfs pointer", "version https://git-lfs.github.com/spec/v1\n", 43,
                  "a git-lfs pointer" } };
    for (size_t i = 0; i < sizeof raw / sizeof *raw; i++) {
        spill(b.dir, raw[i].bytes, raw[i].n);
        expect(raw[i].name, do_open, &b, raw[i].fragment);
    }
}

static void bad_configs(void) {
    static const struct {
        const char *name, *from, *to, *fragment;
    } cases[] = {
        { "another model", "\"qwen3_moe\"", "\"llama\"", "model_type \"llama\" is not supported" },
        { "sliding window", "\"sliding_window\": null",
          "\"use_sliding_window\": true, \"sliding_window\": 64",
          "use_sliding_window with sliding_window = 64" },
        { "sliding window by the class's default", "\"sliding_window\": null",
          "\"use_sliding_window\": true", "use_sliding_window with sliding_window = 4096" },
        { "rope scaling, 4.x", "\"rope_scaling\": null",
          "\"rope_scaling\": {\"type\": \"yarn\", \"factor\": 4.0}",
          "rope_scaling.rope_type = \"yarn\" is not supported" },
        { "rope scaling, 5.x", "\"rope_theta\": 10000.0",
          "\"rope_parameters\": {\"rope_theta\": 1e4, \"rope_type\": \"linear\"}",
          "rope_parameters.rope_type = \"linear\" is not supported" },
        { "attention bias", "\"attention_bias\": false", "\"attention_bias\": true",
          "attention_bias = true is not supported" },
        { "attention dropout", "\"attention_bias\": false", "\"attention_dropout\": 0.1",
          "attention_dropout = 0.1 is not supported" },
        { "another activation", "\"silu\"", "\"gelu\"", "hidden_act = \"gelu\" is not supported" },
        { "quantized weights", "\"attention_bias\": false", "\"quantization_config\": {}",
          "quantization_config" },
        { "K > E", "\"num_experts_per_tok\": 2", "\"num_experts_per_tok\": 9",
          "num_experts_per_tok 9 exceeds num_experts 8" },
        { "heads over key/value heads", "\"num_key_value_heads\": 2", "\"num_key_value_heads\": 3",
          "num_attention_heads 4 is not a multiple of num_key_value_heads 3" },
        { "odd head size", "\"head_dim\": 16", "\"head_dim\": 15", "head_dim 15 is odd" },
        { "no experts", "\"num_experts\": 8", "\"num_experts\": 0",
          "num_experts = 0 must be an integer of at least 1" },
        { "fractional size", "\"vocab_size\": 300", "\"vocab_size\": 300.5",
          "vocab_size = 300.5 must be an integer" },
        { "a number as text", "\"hidden_size\": 64", "\"hidden_size\": \"64\"",
          "hidden_size is not a number" },
        { "padding token outside the vocabulary", "\"attention_bias\": false",
          "\"pad_token_id\": 300", "pad_token_id lies outside the vocabulary of 300" },
        { "not JSON", "\"hidden_size\": 64,", "\"hidden_size\": 64,,", "not valid JSON near" }
    };
    Bad b = { 0, own(in("bad.json")), 0 };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        spill(b.dir, SMALL, strlen(SMALL));
        edit(b.dir, cases[i].from, cases[i].to);
        expect(cases[i].name, do_config, &b, cases[i].fragment);
    }
    b.dir = own(in("nowhere/config.json"));
    expect("no config", do_config, &b, "config.json: cannot open: No such file or directory");
    b.dir = work;
    expect("a folder as config", do_config, &b, "not a file");
}

// A copy of the good checkpoint in `from` with one file of it edited (or removed: to = 0).
static Bad spoil(const char *from, const char *file, const char *what, const char *to,
                 unsigned state) {
    static int n;
    Bad b = { 0, own(xasprintf("%s/spoilt%d", work, n++)), state };
    copy_folder(from, b.dir);
    char *path = xasprintf("%s/%s", b.dir, file);
    if (!to)
        unlink(path);
    else
        edit(path, what, to);
    free(path);
    return b;
}

// Overwrites element 3 of a tensor with the bytes given.
static void poke(const char *dir, const char *tensor, const void *bytes, size_t n) {
    SafeTensors s = safetensors_open_folder(dir);
    const SafeTensor *t = safetensors_find(&s, tensor);
    int fd = open(s.path[t->file], O_WRONLY);
    if (fd < 0 || file_write_at(fd, t->at + 3 * (int64_t)dtype_size(t->type), bytes, (int64_t)n))
        die("%s: the test cannot write|give it a disk", dir);
    close(fd);
    safetensors_close(&s);
}

static void bad_folders(const char *config) {
    char *out = in("good");
    char *one = checkpoint_folder(out, 1);
    char *many = checkpoint_folder(out, 2);
    char *quant = checkpoint_folder(out, 3);
    save_grid(config, 1, 1, 0, STATE_M, DTYPE_FLOATX, out, 1, options(SAVE_BF16, 0, 0), 0);
    save_grid(config, 1, 1, 0, 0, DTYPE_FLOATX, out, 2, options(SAVE_F32, 1, 20000), 0);
    save_grid(config, 1, 1, 0, STATE_8BIT, DTYPE_FLOATX, out, 3, options(SAVE_F32, 0, 0), 0);
    Bad b;
    b = spoil(one, "model.safetensors", "layers.2.mlp.experts.5.up_proj.weight",
              "layers.2.mlp.experts.5.up_prox.weight", 0);
    expect("a missing tensor", do_load, &b,
           "tensor model.layers.2.mlp.experts.5.up_proj.weight is missing (1 of 80 are)");
    b = spoil(one, "model.safetensors", "\"model.norm.weight\":{\"dtype\":\"BF16\"",
              "\"model.norm.weight\":{\"dtype\":\"F8_X\"", 0);
    expect("a weight of another dtype", do_load, &b,
           "tensor model.norm.weight: weights of dtype F8_X are not supported");
    b = spoil(one, "config.json", "\"moe_intermediate_size\":\t32",
              "\"moe_intermediate_size\":\t16", 0);
    expect("a wrong shape", do_load, &b, "has shape [32, 64], config.json means [16, 64]");
    b = spoil(many, "config.json", "\"moe_intermediate_size\":\t32",
              "\"moe_intermediate_size\":\t16", 0);
    expect("a wrong fused shape", do_load, &b,
           "mlp.experts.gate_up_proj has shape [8, 64, 64], config.json means [8, 32, 64]");
    b = spoil(one, "model.safetensors", "{", "{", 0);
    poke(b.dir, "model.layers.1.mlp.down_proj.weight", "\xc0\x7f", 2);
    expect("NaN in bf16", do_load, &b,
           "tensor model.layers.1.mlp.down_proj.weight: element 3 is NaN or infinite");
    b = spoil(many, "config.json", "{", "{", 0);
    poke(b.dir, "model.norm.weight", "\0\0\x80\xff", 4);
    expect("infinity in F32", do_load, &b,
           "tensor model.norm.weight: element 3 is NaN or infinite");
    b = spoil(many, "model.safetensors.index.json", "\"model.norm.weight\"",
              "\"model.norm.wwight\"", 0);
    expect("the index names a tensor that is nowhere", do_folder, &b,
           "tensor model.norm.wwight is not in model-000");
    b = spoil(many, "model.safetensors.index.json", "model-00001-of", "../x-00001-of", 0);
    expect("the index leads out of the folder", do_folder, &b,
           "is not the name of a file beside it");
    b = spoil(many, "model.safetensors.index.json", "weight_map", "weight_mop", 0);
    expect("an index without weight_map", do_folder, &b, "no weight_map in it");
    b = spoil(one, "model.safetensors", "", 0, 0);
    expect("a file of the index is missing", do_folder, &b, "model.safetensors: cannot open");
    b = spoil(one, "model.safetensors", "", 0, 0);
    char *index = xasprintf("%s/model.safetensors.index.json", b.dir);
    unlink(index);
    expect("a folder without weights", do_folder, &b,
           "neither model.safetensors nor model.safetensors.index.json");
    b.dir = own(in("not_there"));
    expect("no folder", do_folder, &b, "no such model folder");
    b = spoil(one, "config.json", "{", "{", STATE_M | STATE_V);
    expect("resume with AdamW from SGD", do_resume, &b, "model.embed_tokens.weight.v is missing");
    b = spoil(one, "optimizer.safetensors", "model.norm.weight.m\"", "model.norm.weight.x\"",
              STATE_M);
    expect("a moment is missing", do_resume, &b, "model.norm.weight.m is missing");
    b = spoil(one, "optimizer.safetensors", "", 0, STATE_M);
    expect("no optimizer file", do_resume, &b,
           "optimizer.safetensors: model.embed_tokens.weight.m is missing");
    b = spoil(quant, "config.json", "{", "{", STATE_8BIT);
    expect("8-bit state in a layout that cuts its blocks", do_resume_split, &b,
           "this layout cuts blocks of 256 elements");
    b = spoil(one, "trainer.json", "{", "", STATE_M);
    expect("trainer.json damaged", do_trainer, &b, "trainer.json: not valid JSON");
    b = spoil(one, "trainer.json", "seed", "seeds", STATE_M);
    expect("trainer.json that was edited", do_trainer, &b, "trainer.json is damaged");
    char *edited = xasprintf("%s/trainer.json", b.dir);
    edit(edited, "\"checksums\"", "\"none\"");
    edit(edited, "\"trainer.json\"", "\"none\"");
    free(edited);
    expect("trainer.json without a value", do_trainer, &b, "no number seed");
    b.dir = own(xasprintf("fp7"));
    expect("--save-dtype", do_save_dtype, &b, "--save-dtype fp7");
    free(out);
    free(one);
    free(many);
    free(quant);
    free(index);
}

// One byte of every file changes, at several places: verifying and resuming name the file.
static void flipped_bytes(const char *config) {
    char *out = in("flipped");
    char *dir = checkpoint_folder(out, 4);
    char said[4096];
    save_grid(config, 2, 2, 0, STATE_M | STATE_V, DTYPE_FLOATX, out, 3, options(SAVE_F32, 0, 0), 0);
    save_grid(config, 2, 2, 0, STATE_M | STATE_V, DTYPE_FLOATX, out, 4, options(SAVE_F32, 0, 0), 0);
    Bad b = { config, dir, STATE_M | STATE_V };
    int status;
    int tried = 0;
    int missed = 0;
    int unnamed = 0;
    int unseen = 0;
    run_child(do_verify, &b, &status, said, sizeof said);
    check(status == 0 && !load_grid(dir, 1, 3, 0, b.state, DTYPE_FLOATX, 1),
          "a checkpoint that is as it was written: verified, and resumed on another grid");
    static const char *const files[] = { "model.safetensors", "optimizer.safetensors",
                                         "model.safetensors.index.json", "config.json",
                                         "trainer.json" };
    for (int f = 0; f < 5; f++) {
        char *path = xasprintf("%s/%s", dir, files[f]);
        size_t n = 0;
        char *text = slurp(path, &n);
        for (uint64_t i = 0; i < 24; i++) {
            size_t at = (size_t)(mix64(i + 100 * (uint64_t)f) % n);
            if (i == 0) at = n - 1;
            if (i == 1) at = 8;
            if (i == 2) at = 0;
            char was = text[at];
            text[at] = (char)(was ^ (1 << i % 8));
            spill(path, text, n);
            for (int verb = 0; verb < 2; verb++) {
                run_child(verb ? do_resume : do_verify, &b, &status, said, sizeof said);
                tried++;
                missed += status != 1;
                unnamed += status == 1 && !strstr(said, files[f]);
            }
            text[at] = was;
        }
        spill(path, text, n);
        for (size_t i = 0; f == 4 && i < 8 * n; i++) {
            text[i / 8] = (char)(text[i / 8] ^ (1 << i % 8));
            unseen += sums_signed(text, (int64_t)n);
            text[i / 8] = (char)(text[i / 8] ^ (1 << i % 8));
        }
        free(text);
        free(path);
    }
    check(!unseen, "every bit of trainer.json, its own checksum too: %d flips are not seen",
          unseen);
    check(!missed && unnamed == 0,
          "%d x one flipped bit, verified and resumed: %d not refused, %d refused without the name",
          tried, missed, unnamed);
    char *model = xasprintf("%s/model.safetensors", dir);
    size_t n = 0;
    char *text = slurp(model, &n);
    text[n / 2] ^= 1;
    spill(model, text, n);
    expect("a damaged checkpoint names the one that would work", do_verify, &b,
           "model.safetensors is damaged");
    run_child(do_resume, &b, &status, said, sizeof said);
    check(strstr(said, "step_3 is complete") != 0, "  and says that step_3 is complete");
    free(text);
    free(model);
    free(out);
    free(dir);
}

static void do_save_nan(const Bad *b) {
    Rank r = rank_new(b->config, cut_of(1, 1, 0, 0), STATE_M);
    rank_open(&r);
    sweep(&r, 1, DTYPE_FLOATX);
    float nan = NAN;
    convert(r.shard[1].m + 5, DTYPE_REAL, &nan, DTYPE_F32, 1);
    RunFolder run = run_folder_own(b->dir);
    checkpoint_save(r.k, &run, 9, options(SAVE_PRECISION, 0, 0), r.shard, 0);
}

static void never_not_finite(const char *config) {
    char *out = in("finite");
    char *dir = xasprintf("%s/checkpoints", out);
    save_grid(config, 1, 1, 0, STATE_M, DTYPE_FLOATX, out, 8, options(SAVE_PRECISION, 0, 0), 0);
    Bad b = { config, out, STATE_M };
    expect("a moment that is not finite is not saved", do_save_nan, &b,
           "step 9 is not saved: tensor");
    check(find_newest(out) == 8 && !exists(dir, "incomplete_step_9"),
          "  the last good checkpoint stays, nothing is left behind");
    free(out);
    free(dir);
}

static void bad_disks(const char *config) {
    Bad b = { config, own(in("small.json/out")), STATE_M };
    expect("--out under a file", do_save, &b,
           "small.json: cannot create the folder: a file of this name is in the way");
    char *closed = in("closed");
    char *within = xasprintf("%s/within", closed);
    b.dir = within;
    if (chmod(work, 0711) || mkdir(closed, 0555))
        die("%s: the test cannot make it|free it", closed);
    expect("a folder that another user may not write to", do_make, &b, "Permission denied");
    free(closed);
    free(within);
    b.dir = own(xasprintf("/proc/moe_out"));
    expect("--out where nobody may write", do_save, &b, "/proc/moe_out: cannot create the folder");
    b.dir = own(in("limited"));
    save_grid(config, 1, 1, 0, STATE_M, DTYPE_FLOATX, b.dir, 6, options(SAVE_PRECISION, 0, 0), 0);
    expect("a file-size limit while saving", do_save_limited, &b, "cannot write: File too large");
    char *six = checkpoint_folder(b.dir, 6);
    char *dir = xasprintf("%s/checkpoints", b.dir);
    check(!exists(dir, "incomplete_step_7") && find_newest(b.dir) == 6 &&
              !load_grid(six, 1, 1, 0, STATE_M, DTYPE_FLOATX, 1),
          "after it: the incomplete folder is gone, step 6 intact");
    char *mount_at = in("disk");
    folder_make(mount_at);
    b.dir = mount_at;
    if (mount("tmpfs", mount_at, "tmpfs", 0, "size=900k"))
        printf("    (cannot mount a small disk here: %s; full disk not exercised)\n",
               strerror(errno));
    else {
        expect("a disk with too little room", do_save, &b, "a checkpoint needs 0.00");
        char *dir2 = xasprintf("%s/checkpoints", mount_at);
        check(!exists(dir2, "incomplete_step_7"), "nothing was written to it");
        free(dir2);
        if (umount(mount_at)) printf("    (%s stays mounted)\n", mount_at);
    }
    free(six);
    free(dir);
    free(mount_at);
}

static void test_bad_inputs(const char *config) {
    bad_headers();
    bad_configs();
    bad_folders(config);
    flipped_bytes(config);
    never_not_finite(config);
    bad_disks(config);
    for (int i = 0; i < n_owned; i++) free(owned[i]);
}
