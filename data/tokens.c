// Token ids and their text (tokens.h). The whole table is held in memory (Qwen3's has 1.2 MB of
// text), with a hash from text to id for encoding.
#define _POSIX_C_SOURCE 200809L
#include "tokens.h"
#include "../kernels/fail.h"
#include "../model/file.h"
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { HEADER_WORDS = 256, BYTE_EOT = 256, MAX_VOCAB = 1 << 24 };
static const uint32_t MAGIC = 20240328;
static const uint32_t NO_EOT = 0xffffffffu;

struct Tokens {
    unsigned char *text; // all entries, one after the other
    size_t *start;       // (V + 1) entry id is text[start[id]] to text[start[id + 1] - 1]
    int *slot;           // (slots) hash table with open addressing: an id, or -1
    uint32_t slots;      // a power of two above 2V
    int vocab, eot;
    int added;     // first id of the added tokens
    int are_bytes; // ids are bytes: there are no merges and no added tokens
};

// ---- opening --------------------------------------------------------------------------------
static size_t entry_bytes(const Tokens *t, int id) { return t->start[id + 1] - t->start[id]; }

// The slot that holds the entry s (n bytes) or, if there is none, the free slot where it belongs:
// FNV-1a, then linear probing.
static uint32_t slot_of(const Tokens *t, const unsigned char *s, size_t n) {
    uint32_t h = 2166136261u;
    for (size_t i = 0; i < n; i++) h = (h ^ s[i]) * 16777619u;
    for (h ^= h >> 15;; h++) {
        h &= t->slots - 1;
        int id = t->slot[h];
        if (id < 0) return h;
        if (entry_bytes(t, id) == n && !memcmp(t->text + t->start[id], s, n)) return h;
    }
}

static int find(const Tokens *t, const unsigned char *s, size_t n) {
    return t->slot[slot_of(t, s, n)];
}

// Of two ids with the same text, the lower one is used for encoding.
static void index_entries(Tokens *t) {
    for (t->slots = 16; t->slots <= 2 * (uint32_t)t->vocab; t->slots *= 2) {}
    t->slot = (int *)xmalloc(t->slots * sizeof *t->slot, "the index of the decode table");
    for (uint32_t i = 0; i < t->slots; i++) t->slot[i] = -1;
    for (int id = 0; id < t->vocab; id++) {
        size_t n = entry_bytes(t, id);
        if (!n) continue;
        uint32_t h = slot_of(t, t->text + t->start[id], n);
        if (t->slot[h] < 0) t->slot[h] = id;
    }
}

static void open_bytes(Tokens *t) {
    static const char eot[] = "<|endoftext|>";
    t->vocab = BYTE_EOT + 1;
    t->added = BYTE_EOT + 1;
    t->eot = BYTE_EOT;
    t->are_bytes = 1;
    t->text = (unsigned char *)xmalloc(256 + sizeof eot, "the byte table");
    t->start = (size_t *)xmalloc(258 * sizeof *t->start, "the byte table");
    for (int id = 0; id <= 256; id++) t->start[id] = id;
    for (int id = 0; id < 256; id++) t->text[id] = (unsigned char)id;
    memcpy(t->text + 256, eot, sizeof eot);
    t->start[257] = 256 + sizeof eot - 1;
}

enum { MAX_TABLE = 1 << 30 }; // bytes; the largest vocabularies have 300 thousand short texts

static unsigned char *read_file(const char *path, size_t *bytes) {
    char *data = 0;
    int64_t size = 0;
    int error = file_load(AT_FDCWD, path, 0, MAX_TABLE, &data, &size);
    if (error)
        die("%s: cannot open the decode table: %s|tokenize.py writes it beside the shards as "
            "PREFIX.vocab",
            path, file_why(error));
    *bytes = size;
    return (unsigned char *)data;
}

static uint32_t word_at(const unsigned char *p) {
    return p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static void open_table(Tokens *t, const char *path) {
    size_t bytes;
    size_t at = HEADER_WORDS * 4;
    unsigned char *data = read_file(path, &bytes);
    size_t n = strlen(path);
    if (n > 5 && !strcmp(path + n - 5, ".json")) data = tokens_from_json(path, data, &bytes);
    if (bytes < at || word_at(data) != MAGIC)
        die("%s: not a decode table (magic %u expected)|name the .vocab file that tokenize.py "
            "wrote",
            path, MAGIC);
    uint32_t version = word_at(data + 4);
    uint32_t vocab = word_at(data + 8);
    uint32_t eot = word_at(data + 12);
    uint32_t added = word_at(data + 16);
    if (version < 1 || version > 3)
        die("%s: decode table of version %u, known are 1 to 3|run tokenize.py again", path,
            version);
    if (!vocab || vocab > MAX_VOCAB)
        die("%s: decode table of %u ids is not possible|run tokenize.py again", path, vocab);
    t->vocab = (int)vocab;
    t->added = added && added < vocab ? (int)added : t->vocab;
    if (version == 1)
        t->eot = t->vocab - 1;
    else
        t->eot = eot == NO_EOT ? -1 : (int)eot;
    if (t->eot >= t->vocab)
        die("%s: its end-of-text id %u is not below its %u ids|run tokenize.py again", path, eot,
            vocab);

    // The texts move down over their lengths, so the memory of the file becomes that of the texts.
    size_t prefix = version == 3 ? 4 : 1;
    size_t out = 0;
    t->start = (size_t *)xmalloc((vocab + 1) * sizeof *t->start, "the decode table");
    for (int id = 0; id < t->vocab; id++) {
        int whole = bytes - at >= prefix;
        size_t n = 0;
        if (whole) n = version == 3 ? word_at(data + at) : data[at];
        if (!whole || bytes - at - prefix < n)
            die("%s: truncated in the entry of id %d of %d|run tokenize.py again", path, id,
                t->vocab);
        t->start[id] = out;
        memmove(data + out, data + at + prefix, n);
        out += n;
        at += prefix + n;
    }
    t->start[vocab] = out;
    if (at != bytes)
        die("%s: %zu bytes after the last entry|run tokenize.py again", path, bytes - at);
    t->text = data;
}

Tokens *tokens_open(const char *path) {
    Tokens *t = (Tokens *)xcalloc(1, sizeof *t, "the decode table");
    if (path)
        open_table(t, path);
    else
        open_bytes(t);
    index_entries(t);
    return t;
}

void tokens_close(Tokens *t) {
    if (!t) return;
    free(t->text);
    free(t->start);
    free(t->slot);
    free(t);
}

int tokens_vocab(const Tokens *t) { return t->vocab; }
int tokens_eot(const Tokens *t) { return t->eot; }

// The length of s (n bytes) without the given ending, n if it does not end so.
static size_t without(const char *s, size_t n, const char *ending) {
    size_t m = strlen(ending);
    return n >= m && !memcmp(s + n - m, ending, m) ? n - m : n;
}

char *tokens_beside(const char *shard) {
    size_t n = without(shard, strlen(shard), ".bin");
    size_t digits = n;
    while (digits && shard[digits - 1] >= '0' && shard[digits - 1] <= '9') digits--;
    if (digits < n) n = without(shard, digits, "_");
    n = without(shard, without(shard, n, "_train"), "_val");
    char *path = xasprintf("%.*s.vocab", (int)n, shard);
    struct stat s;
    if (!stat(path, &s) || errno != ENOENT) return path; // an error is not an absence
    free(path);
    return 0;
}

// ---- decoding -------------------------------------------------------------------------------
const char *tokens_piece(const Tokens *t, int id, size_t *bytes) {
    *bytes = id < 0 || id >= t->vocab ? 0 : entry_bytes(t, id);
    return *bytes ? (const char *)t->text + t->start[id] : 0;
}

// The bytes that a character above ASCII with this first byte has, 0 if no character begins so.
static size_t utf8_length(int lead) {
    if (lead < 0xc2 || lead > 0xf4) return 0;
    if (lead < 0xe0) return 2;
    return lead < 0xf0 ? 3 : 4;
}

// The bytes of the well-formed character above ASCII at s (n bytes), 0 if there is none. The range
// of the second byte rules out overlong forms, surrogates, code points above U+10FFFF and the
// control characters U+0080 to U+009F, which a terminal would obey.
static size_t utf8(const unsigned char *s, size_t n) {
    size_t length = utf8_length(s[0]);
    if (!length || length > n) return 0;
    for (size_t i = 1; i < length; i++)
        if ((s[i] & 0xc0) != 0x80) return 0;
    int low = 0x80;
    int high = 0xbf;
    switch (s[0]) {
    case 0xc2:
    case 0xe0: low = 0xa0; break;
    case 0xf0: low = 0x90; break;
    case 0xed: high = 0x9f; break;
    case 0xf4: high = 0x8f; break;
    }
    return s[1] >= low && s[1] <= high ? length : 0;
}

typedef struct {
    char *out;
    size_t size, n; // n counts on when out is full
} Word;

static void append(Word *word, const void *bytes, size_t n) {
    if (word->size && word->n < word->size - 1) {
        size_t room = word->size - 1 - word->n;
        memcpy(word->out + word->n, bytes, n < room ? n : room);
    }
    word->n += n;
}

static void append_number(Word *word, const char *format, int number) {
    char text[32];
    append(word, text, snprintf(text, sizeof text, format, number));
}

static void append_byte(Word *word, unsigned char c) {
    switch (c) {
    case '\n': append(word, "\\n", 2); return;
    case '\t': append(word, "\\t", 2); return;
    case '\r': append(word, "\\r", 2); return;
    case '"': append(word, "\\\"", 2); return;
    case '\\': append(word, "\\\\", 2); return;
    }
    if (c < 0x20 || c >= 0x7f)
        append_number(word, "\\x%02x", c);
    else
        append(word, &c, 1);
}

size_t tokens_show(const Tokens *t, char *out, size_t size, int id) {
    Word word = { out, size, 0 };
    size_t n;
    const unsigned char *s = (const unsigned char *)tokens_piece(t, id, &n);
    if (!s) append_number(&word, "<%d>", id);
    for (size_t i = 0; i < n;) {
        size_t wide = utf8(s + i, n - i);
        if (wide)
            append(&word, s + i, wide);
        else
            append_byte(&word, s[i]);
        i += wide ? wide : 1;
    }
    if (size) out[word.n < size ? word.n : size - 1] = 0;
    return word.n;
}

// Whether s (n bytes) is the beginning of a character whose other bytes are still to come.
static int is_cut_character(const unsigned char *s, size_t n) {
    for (size_t i = 1; i < n; i++)
        if ((s[i] & 0xc0) != 0x80) return 0;
    return n < utf8_length(s[0]);
}

size_t tokens_print(FILE *out, const char *text, size_t n, int more) {
    const unsigned char *s = (const unsigned char *)text;
    for (size_t i = 0; i < n;) {
        size_t wide = utf8(s + i, n - i);
        int plain = s[i] == '\n' || s[i] == '\t' || (s[i] >= 0x20 && s[i] < 0x7f);
        if (wide || plain)
            fwrite(s + i, 1, wide ? wide : 1, out);
        else if (more && is_cut_character(s + i, n - i))
            return i;
        else
            fputs("\xef\xbf\xbd", out); // U+FFFD
        i += wide ? wide : 1;
    }
    return n;
}

// ---- encoding -------------------------------------------------------------------------------
static int is_newline(int c) { return c == '\n' || c == '\r'; }
static int is_space(int c) { return c == ' ' || (c >= '\t' && c <= '\r'); }
static int is_digit(int c) { return c >= '0' && c <= '9'; }
static int is_letter(int c) { return c >= 0x80 || ((c | 32) >= 'a' && (c | 32) <= 'z'); }
static int is_mark(int c) { return !is_space(c) && !is_digit(c) && !is_letter(c); }

// The length of a contraction at s (n bytes), 0 if there is none: (?i:'s|'t|'re|'ve|'m|'ll|'d).
static size_t contraction_length(const unsigned char *s, size_t n) {
    static const char *const endings[] = { "s", "t", "re", "ve", "m", "ll", "d" };
    if (s[0] != '\'') return 0;
    for (size_t e = 0; e < sizeof endings / sizeof *endings; e++) {
        size_t length = strlen(endings[e]);
        size_t i = 0;
        while (i < length && i + 1 < n && (s[i + 1] | 32) == endings[e][i]) i++;
        if (i == length) return 1 + length;
    }
    return 0;
}

// The length of the word at s (n >= 1 bytes): the first alternative of Qwen's pattern (the "Split"
// of its tokenizer.json) that matches. The alternative is written above each case.
static size_t word_length(const unsigned char *s, size_t n) {
    size_t contraction = contraction_length(s, n);
    if (contraction) return contraction;
    // [^\r\n\p{L}\p{N}]?\p{L}+
    size_t i = !is_letter(s[0]) && !is_digit(s[0]) && !is_newline(s[0]);
    if (i < n && is_letter(s[i])) {
        while (i < n && is_letter(s[i])) i++;
        return i;
    }
    // \p{N}
    if (is_digit(s[0])) return 1;
    // [ ]?[^\s\p{L}\p{N}]+[\r\n]*
    i = s[0] == ' ';
    if (i < n && is_mark(s[i])) {
        while (i < n && is_mark(s[i])) i++;
        while (i < n && is_newline(s[i])) i++;
        return i;
    }
    // \s*[\r\n]+, then \s+(?!\S), then \s+: only white space is left.
    size_t run = 0;
    size_t newline = 0;
    for (; run < n && is_space(s[run]); run++)
        if (is_newline(s[run])) newline = run + 1;
    if (newline) return newline;
    return run < n && run > 1 ? run - 1 : run;
}

typedef struct {
    int *ids;
    int64_t max, n;
} Ids;

static void append_id(Ids *out, int id) {
    if (out->n < out->max) out->ids[out->n] = id;
    out->n++;
}

// Joins pairs of one word, the lowest id of the union first and of equal ids the leftmost. part
// holds the parts + 1 borders of the parts, pair[i] the id of parts i and i + 1 together, or -1.
// After a join only the two pairs beside it change.
static void encode_word(const Tokens *t, Ids *out, const unsigned char *s, size_t n) {
    size_t *part = (size_t *)xmalloc((n + 1) * sizeof *part, "a word of the prompt");
    int *pair = (int *)xmalloc(n * sizeof *pair, "a word of the prompt");
    size_t parts = n;
    for (size_t i = 0; i <= n; i++) part[i] = i;
    for (size_t i = 0; i + 1 < n; i++) pair[i] = find(t, s + i, 2);
    for (;;) {
        size_t best = parts;
        for (size_t i = 0; i + 1 < parts; i++)
            if (pair[i] >= 0 && (best == parts || pair[i] < pair[best])) best = i;
        if (best == parts) break;
        memmove(part + best + 1, part + best + 2, (parts - best - 1) * sizeof *part);
        memmove(pair + best, pair + best + 1, (parts - best - 1) * sizeof *pair);
        parts--;
        for (size_t i = best ? best - 1 : 0; i <= best && i + 1 < parts; i++)
            pair[i] = find(t, s + part[i], part[i + 2] - part[i]);
    }
    for (size_t i = 0; i < parts; i++) {
        int id = find(t, s + part[i], part[i + 1] - part[i]);
        if (id < 0)
            die("the decode table has no token for byte 0x%02x of the prompt|use a byte-level "
                "tokenizer, or another prompt",
                s[part[i]]);
        append_id(out, id);
    }
    free(part);
    free(pair);
}

// The longest added token that stands at s (n bytes), -1 if none does.
static int added_at(const Tokens *t, const unsigned char *s, size_t n) {
    int found = -1;
    size_t longest = 0;
    for (int id = t->added; id < t->vocab; id++) {
        size_t bytes = entry_bytes(t, id);
        if (bytes > longest && bytes <= n && !memcmp(s, t->text + t->start[id], bytes)) {
            longest = bytes;
            found = id;
        }
    }
    return found;
}

int64_t tokens_encode(const Tokens *t, int *ids, int64_t max, const char *text, size_t bytes) {
    const unsigned char *s = (const unsigned char *)text;
    Ids out = { ids, max, 0 };
    for (size_t i = 0; t->are_bytes && i < bytes; i++) append_id(&out, s[i]);
    for (size_t i = 0; !t->are_bytes && i < bytes;) {
        int added = added_at(t, s + i, bytes - i);
        if (added >= 0) {
            append_id(&out, added);
            i += entry_bytes(t, added);
            continue;
        }
        size_t end = i + 1; // plain text reaches up to the next added token
        while (end < bytes && added_at(t, s + end, bytes - end) < 0) end++;
        while (i < end) {
            size_t n = word_length(s + i, end - i);
            encode_word(t, &out, s + i, n);
            i += n;
        }
    }
    return out.n;
}
