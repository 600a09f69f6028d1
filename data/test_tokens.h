// Checks of tokens.h and of tokenize.py; a part of test_data.c, whose helpers it uses.

// ---- tokens ---------------------------------------------------------------------------------
typedef struct {
    unsigned char data[8192];
    size_t n;
    int version, vocab;
} Table;

static void table_add(Table *t, const char *text, size_t n) {
    if (t->version == 3) {
        put32(t->data + t->n, (uint32_t)n);
        t->n += 4;
    } else
        t->data[t->n++] = (unsigned char)n;
    memcpy(t->data + t->n, text, n);
    t->n += n;
    t->vocab++;
}

static const char *table_write(Table *t, const char *name, uint32_t eot, uint32_t added) {
    put32(t->data, 20240328);
    put32(t->data + 4, (uint32_t)t->version);
    put32(t->data + 8, (uint32_t)t->vocab);
    put32(t->data + 12, eot);
    put32(t->data + 16, added);
    return write_bytes(name, t->data, t->n);
}

// 256 bytes, then merges 256.., the last of them again "ll", an unused id, and two added tokens.
static Table table_make(int version) {
    static const char *const merges[] = { "he",   "ll", "hell",   "hello", " w", "or",
                                          " wor", "ld", " world", "lo",    "ll" };
    Table t = { { 0 }, 1024, version, 0 };
    for (int b = 0; b < 256; b++) {
        char c = (char)b;
        table_add(&t, &c, 1);
    }
    for (int i = 0; i < 11; i++) table_add(&t, merges[i], strlen(merges[i]));
    table_add(&t, "", 0);         // 267
    table_add(&t, "<|end|>!", 8); // 268
    table_add(&t, "<|end|>", 7);  // 269
    return t;
}

// The text of ids (n) into out (size bytes); -1 where an id has none or it does not fit.
static int64_t decode(const Tokens *t, char *out, size_t size, const int *ids, int64_t n) {
    size_t used = 0;
    size_t bytes;
    for (int64_t i = 0; i < n; i++) {
        const char *piece = tokens_piece(t, ids[i], &bytes);
        if (!piece || used + bytes > size) return -1;
        memcpy(out + used, piece, bytes);
        used += bytes;
    }
    return (int64_t)used;
}

static int round_trip(const Tokens *t, const char *text, size_t n) {
    int ids[4096];
    char back[4096];
    int64_t count = tokens_encode(t, ids, 4096, text, n);
    return count <= 4096 && decode(t, back, sizeof back, ids, count) == (int64_t)n &&
           !memcmp(back, text, n);
}

static int encodes(const Tokens *t, const char *text, const int *expected, int n) {
    int ids[64];
    return tokens_encode(t, ids, 64, text, strlen(text)) == n &&
           !memcmp(ids, expected, (size_t)n * sizeof *ids);
}

static int shows(const Tokens *t, int id, const char *expected) {
    char word[64];
    return tokens_show(t, word, sizeof word, id) == strlen(expected) && !strcmp(word, expected);
}

// What a text of n bytes prints as, in pieces of `step` bytes as tokens bring them.
static int prints(const char *text, size_t n, size_t step, const char *expected) {
    char held[64];
    char shown[64] = "";
    size_t used = 0;
    size_t bytes;
    FILE *f = tmpfile();
    if (!f) return 0;
    for (size_t i = 0; i < n; i += step) {
        size_t more = n - i < step ? n - i : step;
        memcpy(held + used, text + i, more);
        size_t done = tokens_print(f, held, used += more, i + more < n);
        memmove(held, held + done, used -= done);
    }
    rewind(f);
    bytes = fread(shown, 1, sizeof shown - 1, f);
    fclose(f);
    return !used && bytes == strlen(expected) && !strcmp(shown, expected);
}

#define BAD "\xef\xbf\xbd" // U+FFFD

static void test_tokens(void) {
    char all[256], out[64];
    for (int b = 0; b < 256; b++) all[b] = (char)b;
    int good;
    int ids[4] = { 'h', 'i', 256, 300 };
    Tokens *t = tokens_open(0);
    good = tokens_vocab(t) == 257 && tokens_eot(t) == 256 && round_trip(t, all, 256);
    check(good && decode(t, out, 64, ids, 3) == 15 && !memcmp(out, "hi<|endoftext|>", 15) &&
              shows(t, 300, "<300>"),
          "bytes: every byte round-trips; 256 ends a text");
    check(tokens_show(t, out, 6, 256) == 13 && !strcmp(out, "<|end") &&
              tokens_show(t, 0, 0, 'h') == 1 && tokens_encode(t, ids, 2, "abcd", 4) == 4 &&
              ids[1] == 'b' && ids[2] == 256,
          "a full buffer is not overrun and the whole length is returned");
    check(shows(t, '\n', "\\n") && shows(t, '"', "\\\"") && shows(t, 0x1b, "\\x1b") &&
              shows(t, 0xe2, "\\xe2") && shows(t, 'a', "a") && shows(t, -1, "<-1>"),
          "a token as a printable word");
    static const char mixed[] =
        "a\n\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80|\x1b[\0\x7f\xff\xe2\x82(\xc2\x9b\xf0\x9f";
    int printed = 0;
    for (size_t step = 1; step <= sizeof mixed; step++)
        printed += prints(mixed, sizeof mixed - 1, step,
                          "a\n\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80|" BAD "[" BAD BAD BAD BAD BAD
                          "(" BAD BAD BAD BAD);
    check(printed == sizeof mixed, "text for a terminal: characters whole however they are cut, "
                                   "controls and broken bytes as U+FFFD");
    tokens_close(t);

    for (int version = 2; version <= 3; version++) {
        Table table = table_make(version);
        char longest[700];
        memset(longest, '=', sizeof longest);
        if (version == 3) table_add(&table, longest, sizeof longest);
        t = tokens_open(table_write(&table, "t.vocab", 269, 268));
        static const int hello[] = { 259, 264 };
        static const int added[] = { 259, 269, 259, 268 };
        static const int llo[] = { 257, 'o' };
        static const int run[] = { 'a', ' ', 264 };
        static const char spaced[] = "  \n\n hello,\r\n  world's 123 \xc3\xa4 ";
        // x | 'll | space | space he | 1
        static const int words[] = { 'x', '\'', 257, ' ', ' ', 256, '1' };
        good = tokens_vocab(t) == table.vocab && tokens_eot(t) == 269 &&
               encodes(t, "hello world", hello, 2);
        good = good && encodes(t, "hello<|end|>hello<|end|>!", added, 4) &&
               encodes(t, "llo", llo, 2) && encodes(t, "x'll  he1", words, 7) &&
               encodes(t, "a  world", run, 3);
        good = good && round_trip(t, all, 256) && round_trip(t, spaced, sizeof spaced - 1);
        int last = version == 3 ? 270 : 9999;
        char text[1000];
        good = good && shows(t, 267, "<267>");
        good = good && (version == 3 ? decode(t, text, sizeof text, &last, 1) == 700 &&
                                           !memcmp(text, longest, 700)
                                     : shows(t, last, "<9999>"));
        check(good, version == 2 ? "decode table version 2: merges by lowest id, words, added "
                                   "tokens, unused ids, round trip"
                                 : "decode table version 3: the same, and an entry of 700 bytes");
        tokens_close(t);
    }

    Table table = table_make(2);
    const char *path = table_write(&table, "bad.vocab", 267, 267);
    write_bytes("bad.vocab", table.data, table.n - 3);
    dies(try_table, path, "truncated", "id 269", "error: a truncated decode table");
    write_bytes("bad.vocab", table.data, table.n + 3);
    dies(try_table, path, "3 bytes after", "bad.vocab",
         "error: a decode table with more than its entries");
    dies(try_table, write_shard("shard.vocab", 2, 9, -1, 0, 0, 0, 0), "not a decode table",
         "20240328", "error: a shard given as decode table");
    dies(try_table, path_of("absent.vocab"), "cannot open", "absent.vocab",
         "error: no decode table");
    dies(try_table, table_write(&table, "eot.vocab", 5000, 0), "end-of-text id 5000", "270 ids",
         "error: an end-of-text id outside the table");
    Table few = { { 0 }, 1024, 2, 0 };
    table_add(&few, "a", 1);
    dies(try_encode, table_write(&few, "few.vocab", 0xffffffffu, 0), "byte 0x01", "decode table",
         "error: a prompt with a byte the table lacks");

    // U+0100 is byte 0, U+0120 a space, U+00E4 itself as one byte of Latin-1 (not as UTF-8).
    static const char json[] =
        "{\"added_tokens\": [{\"id\": 7, \"content\": \"<|endoftext|>\"}], \"decoder\": {\"type\": "
        "\"ByteLevel\"}, \"model\": {\"vocab\": {\"a\": 0, \"\\u0120a\": 1, \"\\u0100\": 2, "
        "\"\\u00e4\": 3, \"\\\"\": 5}}}";
    t = tokens_open(write_bytes("tokenizer.json", json, sizeof json - 1));
    static const int prompt[] = { 0, 1, 7, 0 };
    good = tokens_vocab(t) == 8 && tokens_eot(t) == 7 && shows(t, 1, " a") && shows(t, 2, "\\x00");
    check(good && shows(t, 3, "\\xe4") && shows(t, 4, "<4>") && shows(t, 5, "\\\"") &&
              encodes(t, "a a<|endoftext|>a", prompt, 4),
          "the tokens of a tokenizer.json: bytes, added tokens, unused ids");
    tokens_close(t);
    dies(try_table, write_text("bad.json", "{\"model\": {}}"), "no tokenizer.json", "bad.json",
         "error: JSON that is no tokenizer");
    dies(try_table, write_text("bad.json", "{\"model\": {\"vocab\": {\"a\": 0}}}"),
         "not a byte-level tokenizer", "bad.json", "error: a tokenizer that is not byte-level");
    dies(try_table,
         write_text("bad.json",
                    "{\"decoder\": \"ByteLevel\", \"model\": {\"vocab\": {\"a\": 1e99}}}"),
         "a token with id 1e+99", "bad.json", "error: a token id beyond all bounds");

    table_write(&table, "set.vocab", 267, 0);
    static const char *const names[] = { "set_train_000007.bin", "set_val_000000.bin", "set_12.bin",
                                         "set.bin", "other_train_000000.bin" };
    good = 1;
    for (int i = 0; i < 5; i++) {
        char *found = tokens_beside(path_of(names[i]));
        good = good && (i < 4 ? found && !strcmp(found, path_of("set.vocab")) : !found);
        free(found);
    }
    check(good, "the decode table is found beside its shards");
}

// ---- tokenize.py ----------------------------------------------------------------------------
static int run(const char *script, const char *options) {
    char *command =
        xasprintf("python3 '%s' --out '%s/made' %s '%s/one.dat' '%s/two.jsonl' >'%s/log' 2>&1",
                  script, folder, options, folder, folder, folder);
    int status = system(command);
    free(command);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

// Whether the shards hold these tokens; the last one of each shard is read as a target only.
static int same(const char *pattern, const int *expected, int n) {
    const char *p = path_of(pattern);
    Loader *l = open_one(p, 1, 0, 0, 257);
    int good = loader_tokens(l) == n;
    int at = 0;
    for (int64_t w = 0; good && w < loader_windows(l); w++) {
        int input, target;
        int64_t first;
        int file = loader_where(l, w, &first);
        loader_read(l, w, &input, &target, 0);
        if (w && !first) at++;
        good = file >= 0 && at + 1 < n && input == expected[at] && target == expected[at + 1];
        at++;
    }
    loader_close(l);
    return good && at == n - 1;
}

static void test_script(const char *script) {
    char text[612]; // every byte twice; the first line end after 70 % is that of the 512th
    for (int i = 0; i < 512; i++) text[i] = (char)i;
    memset(text + 512, 'y', 100);
    text[511] = text[611] = '\n';
    write_bytes("one.dat", text, 612);
    // The last line is held out.
    static const char lines[] = "{\"text\": \"a\\u00e4\"}\n\n{\"text\": \"\"}\n{\"text\": \"b\"}\n";
    write_bytes("two.jsonl", lines, sizeof lines - 1);
    int train[600], val[200];
    int n = 0;
    int m = 0;
    for (int i = 0; i < 512; i++) train[n++] = (unsigned char)text[i];
    static const int second[] = { 256, 'a', 0xc3, 0xa4, 256 };
    static const int last[] = { 256, 'b', 256 };
    for (int i = 0; i < 5; i++) train[n++] = second[i];
    for (int i = 512; i < 612; i++) val[m++] = (unsigned char)text[i];
    for (int i = 0; i < 3; i++) val[m++] = last[i];
    int good = run(script, "--val-fraction 0.3 --shard-tokens 100") == 0;
    check(good && same("made_train_*.bin", train, n) && same("made_val_*.bin", val, m),
          "tokenize.py: documents, shards of 100 tokens, held-out ends");
    char *table = tokens_beside(path_of("made_train_000000.bin"));
    Tokens *t = tokens_open(table);
    check(table && tokens_vocab(t) == 257 && tokens_eot(t) == 256 && round_trip(t, text, 612),
          "tokenize.py: its decode table");
    tokens_close(t);
    free(table);
    loader_dies(path_of("made_train_000005.bin"), 4, 256, -1, "largest id is 256", "257 ids",
                "tokenize.py: states the largest id of each shard");
    check(run(script, "") == 1 && same("made_train_*.bin", train, n),
          "tokenize.py: does not overwrite");
    check(run(script, "--force --key wrong") == 1 && same("made_train_*.bin", train, n),
          "tokenize.py: a run that fails leaves the earlier shards alone");
    check(run(script, "--force") == 0 && access(path_of("made_train_000001.bin"), F_OK) &&
              access(path_of("made_val_000000.bin"), F_OK),
          "tokenize.py: --force removes the shards of the earlier run");
}
