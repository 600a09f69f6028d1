// Models that are odd but whole, part of test_cli.c (which includes it): what transformers
// loads is loaded here with the same numbers, or refused for the true reason; what other programs
// cannot do with an export is said.

// Appends a tensor to the safetensors file $T/name.
static void add_tensor(const char *name, const char *tensor, const char *dtype, const char *shape,
                       const void *data, size_t bytes) {
    size_t n;
    size_t header = 0;
    char *text = slurp(at(name), &n);
    for (int i = 3; i >= 0; i--) header = header << 8 | (unsigned char)text[i];
    size_t end = header;
    size_t at_data = n - 8 - header;
    while (text[8 + end - 1] != '}') end--;
    char *longer =
        xasprintf("%.*s,\"%s\":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%zu,%zu]}}",
                  (int)(end - 1), text + 8, tensor, dtype, shape, at_data, at_data + bytes);
    size_t length = strlen(longer);
    char *file = (char *)xcalloc(8 + length + at_data + bytes, 1, "a file");
    for (int i = 0; i < 4; i++) file[i] = (char)(length >> (8 * i) & 255);
    memcpy(file + 8, longer, length);
    memcpy(file + 8 + length, text + 8 + header, at_data);
    memcpy(file + 8 + length + at_data, data, bytes);
    write_file(name, file, 8 + length + at_data + bytes);
    free(file);
    free(longer);
    free(text);
}

// Loads $T/name, saves it under $T/name.out and returns 1 where its loss of the first update is
// that of $T/like.out. Its messages are in $T/odd.err, their lines counted.
static int loads_like(const char *name, const char *like, int *warnings) {
    int status = end(
        begin_as("odd", "eval exec $B --model $T/%s $U --lr 0 --save-dtype source --out $T/%s.out",
                 name, name));
    char *text = slurp(at("odd.err"), 0);
    *warnings = 0;
    for (const char *p = text; *p; p++) *warnings += *p == '\n';
    free(text);
    return !status &&
           run("for r in %s %s; do grep -o '\"loss\":[^,]*' $T/$r.out/log.jsonl > $T/$r.loss; "
               "done; test -s $T/%s.loss && exec cmp $T/%s.loss $T/%s.loss",
               name, like, name, name, like) == 0;
}

// Returns 1 where a tensor of the model in `a` has the bytes of a tensor of the model in `b`.
static int same_tensor(const char *a, const char *in_a, const char *b, const char *in_b) {
    SafeTensors s[2] = { safetensors_open_folder(a), safetensors_open_folder(b) };
    const SafeTensor *t[2] = { safetensors_find(&s[0], in_a), safetensors_find(&s[1], in_b) };
    char *data[2] = { 0, 0 };
    for (int i = 0; i < 2 && t[0] && t[1]; i++) {
        data[i] = (char *)xmalloc((size_t)t[i]->bytes, "a tensor");
        safetensors_read(&s[i], t[i], 0, data[i], t[i]->bytes);
    }
    int same =
        data[0] && t[0]->bytes == t[1]->bytes && !memcmp(data[0], data[1], (size_t)t[0]->bytes);
    for (int i = 0; i < 2; i++) {
        free(data[i]);
        safetensors_close(&s[i]);
    }
    return same;
}

// A tied config beside a head in the file: another one is kept as transformers 5 does, an equal one
// is no news, and an index may name a head that no file has.
static void odd_heads(void) {
    int lines;
    good("for m in tied head_other head_same head_index; do cp -r $F/tied $T/$m; done; "
         "exec chmod -R u+w $T/tied $T/head_other $T/head_same $T/head_index");
    SafeTensors s = safetensors_open_folder(at("tied"));
    const SafeTensor *embed = safetensors_find(&s, "model.embed_tokens.weight");
    char shape[192];
    char *data = (char *)xmalloc((size_t)embed->bytes, "a head");
    safetensors_read(&s, embed, 0, data, embed->bytes);
    safetensors_shape(embed, shape);
    const char *dtype = safetensors_dtype(embed);
    add_tensor("head_same/model.safetensors", "lm_head.weight", dtype, shape, data,
               (size_t)embed->bytes);
    memcpy(data, data + embed->bytes / 2, (size_t)embed->bytes / 2);
    add_tensor("head_other/model.safetensors", "lm_head.weight", dtype, shape, data,
               (size_t)embed->bytes);
    free(data);
    FILE *f = fopen(at("head_index/model.safetensors.index.json"), "w");
    if (!f) die("cannot write the index|free space");
    fprintf(f, "{\"weight_map\":{\"lm_head.weight\":\"one.safetensors\"");
    for (int i = 0; i < s.n; i++) fprintf(f, ",\"%s\":\"one.safetensors\"", s.tensor[i].name);
    fprintf(f, "}}");
    fclose(f);
    safetensors_close(&s);
    good("exec mv $T/head_index/model.safetensors $T/head_index/one.safetensors");
    good("eval exec $B --model $T/tied $U --lr 0 --out $T/tied.out");
    int same = loads_like("head_same", "tied", &lines);
    check(same && !lines, "a tied config beside an equal head: loads, not a word");
    same = loads_like("head_index", "tied", &lines);
    check(same && !lines, "an index that names the head of a tied model: loads, not a word");
    same = loads_like("head_other", "tied", &lines);
    check(!same && lines == 1 && said("odd.err", "it is kept as a head of its own"),
          "a tied config beside another head: it is used, with one line");
    good("exec $B --model $T/head_other --plan > $T/own.plan");
    good("exec $B --model $T/tied --plan > $T/tied.plan");
    check(run("cmp -s $T/own.plan $T/tied.plan") == 1, "  --plan plans that head");
    const char *out = at("head_other.out/checkpoints/step_1");
    check(same_tensor(out, "lm_head.weight", at("head_other"), "lm_head.weight") &&
              same_tensor(out, "model.embed_tokens.weight", at("tied"),
                          "model.embed_tokens.weight") &&
              run("grep -q 'tie_word_embeddings.*false' "
                  "$T/head_other.out/checkpoints/step_1/config.json") == 0,
          "  the export has both, and a config that does not tie them");
    good("eval exec $B --model $T/head_other $U --steps 2 --resume --out $T/head_other.out");
    good("eval exec $B --init $T/tied/config.json $U --steps 3 --resume --out $T/head_other.out "
         "--allow-changed tie_word_embeddings");
    check(said("stderr", "are ignored: lm_head.weight ("),
          "  resumed as a tied model, by permission: one line says that the head is dropped");
}

static void odd_tensors(void) {
    int lines;
    static const char zeros[32];
    static const struct {
        const char *dtype;
        size_t bytes;
    } extra[] = { { "U16", 8 }, { "U32", 16 }, { "F8_E4M3", 4 }, { "BOOL", 4 }, { "I64", 32 } };
    good("cp -r $F/tied $T/extra; exec chmod -R u+w $T/extra");
    for (size_t i = 0; i < sizeof extra / sizeof *extra; i++) {
        char *name = xasprintf("model.extra_%s", extra[i].dtype);
        add_tensor("extra/model.safetensors", name, extra[i].dtype, "[4]", zeros, extra[i].bytes);
        free(name);
    }
    int same = loads_like("extra", "tied", &lines);
    check(same && lines == 1 && said("odd.err", "model.extra_U16 (U16)") &&
              said("odd.err", "model.extra_F8_E4M3 (F8_E4M3)") &&
              said("odd.err", "model.extra_BOOL (BOOL)") && said("odd.err", "(5 in all)"),
          "tensors of other dtypes that the model has no place for: one line names them");
}

// Entries with "./" before them, a tensor that two files have, no index.
static void odd_files(void) {
    int lines;
    setenv("U", "--train $F/parallel/tokens.bin --seq-len 16 --batch 4 --steps 1 --threads 1", 1);
    good("for m in whole dots twice unequal; do cp -r $F/parallel $T/$m; chmod -R u+w $T/$m; done; "
         "sed -i 's,\"model-0000\\([1-3]\\),\"./model-0000\\1,;s,\"model-00004,\"././model-00004,' "
         "$T/dots/*.index.json; eval exec $B --model $T/whole $U --lr 0 --out $T/whole.out");
    int same = loads_like("dots", "whole", &lines);
    check(same && !lines && run("grep -q '\"\\./model' $T/dots/*.index.json") == 0,
          "an index whose entries begin with ./: loads, not a word");
    SafeTensors s = safetensors_open_folder(at("whole"));
    const SafeTensor *norm = safetensors_find(&s, "model.norm.weight");
    const char *other = norm->file == 0 ? s.path[1] : s.path[0];
    char data[4096], shape[192];
    if (norm->bytes > (int64_t)sizeof data) die("the norm is too large|adapt the test");
    safetensors_read(&s, norm, 0, data, norm->bytes);
    for (int i = 0; i < 2; i++) {
        char *name = xasprintf("%s%s", i ? "unequal" : "twice", strrchr(other, '/'));
        add_tensor(name, norm->name, safetensors_dtype(norm), safetensors_shape(norm, shape), data,
                   (size_t)norm->bytes);
        data[norm->bytes - 1] ^= 1;
        free(name);
    }
    safetensors_close(&s);
    same = loads_like("twice", "whole", &lines);
    check(same && !lines, "a tensor that two files have, with equal numbers: loads, not a word");
    bad("  with other numbers", "model.norm.weight appears twice, with other numbers",
        "--model $T/unequal $U");
    good("exec rm $T/dots/model.safetensors.index.json");
    bad("several files without an index", "no model.safetensors.index.json", "--model $T/dots $U");
}

static void test_models(void) {
    // Folders of these names may be left of the parts before.
    good("exec rm -rf $T/tied $T/whole $T/dots $T/twice $T/unequal $T/extra $T/plain $T/usual");
    setenv("U", "--train $F/tied/tokens.bin --seq-len 16 --batch 4 --steps 1 --threads 1", 1);
    odd_heads();
    odd_tensors();
    odd_files();
    change_config("plain.json", "\"norm_topk_prob\":true", "\"norm_topk_prob\":false");
    good("eval exec $B $S --init $T/plain.json --steps 0 --save-layout fused --out $T/plain");
    check(said("stdout", "llama.cpp renormalises") &&
              said("stdout", "transformers 4.57 loads fused"),
          "exports: one line says what llama.cpp and transformers 4.57 do with them");
    good("eval exec $B $S --steps 0 --out $T/usual");
    check(!said("stdout", "not for every program"), "  none where they do all of it");
}
