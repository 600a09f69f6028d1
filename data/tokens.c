// Token ids <-> text: see tokens.h. The whole table is held in memory (Qwen3: 1.2 MB of text), with
// a hash from text to id for encoding.
#define _POSIX_C_SOURCE 200809L
#include "tokens.h"
#include "../kernels/fail.h"
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { HEADER_WORDS = 256, BYTE_EOT = 256, MAX_VOCAB = 1 << 24 };
static const uint32_t MAGIC = 20240328, NO_EOT = 0xffffffffu;

struct Tokens {
    unsigned char *text;   // all entries, one after the other
    size_t *start;         // (V + 1) entry id is text[start[id] .. start[id + 1])
    int *slot;             // (slots) open addressing: an id, or -1
    uint32_t slots;        // a power of two > 2V
    int vocab, added, eot; // added: first id of the added tokens
    int bytes;             // ids are bytes: no merges, no literals
};

// ---- opening --------------------------------------------------------------------------------
static uint32_t slot_of(const Tokens *t, const unsigned char *s,
                        size_t n) { // FNV-1a, then linear probing
    uint32_t h = 2166136261u;
    for (size_t i = 0; i < n; i++) h = (h ^ s[i]) * 16777619u;
    for (h ^= h >> 15;; h++) {
        int id = t->slot[h &= t->slots - 1];
        if (id < 0 ||
            (t->start[id + 1] - t->start[id] == n && !memcmp(t->text + t->start[id], s, n)))
            return h;
    }
}

static int find(const Tokens *t, const unsigned char *s, size_t n) {
    return t->slot[slot_of(t, s, n)];
}

static void index_entries(Tokens *t) {
    for (t->slots = 16; t->slots <= 2 * (uint32_t)t->vocab; t->slots *= 2) {}
    t->slot = (int *)xmalloc(t->slots * sizeof *t->slot, "the index of the decode table");
    for (uint32_t i = 0; i < t->slots; i++) t->slot[i] = -1;
    for (int id = 0; id < t->vocab;
         id++) { // two ids of one text: the lower one is used for encoding
        size_t n = t->start[id + 1] - t->start[id];
        uint32_t h = n ? slot_of(t, t->text + t->start[id], n) : 0;
        if (n && t->slot[h] < 0) t->slot[h] = id;
    }
}

static void open_bytes(Tokens *t) {
    static const char eot[] = "<|endoftext|>";
    t->vocab = t->added = BYTE_EOT + 1, t->eot = BYTE_EOT, t->bytes = 1;
    t->text = (unsigned char *)xmalloc(256 + sizeof eot, "the byte table");
    t->start = (size_t *)xmalloc(258 * sizeof *t->start, "the byte table");
    for (int id = 0; id <= 256; id++) t->start[id] = (size_t)id;
    for (int id = 0; id < 256; id++) t->text[id] = (unsigned char)id;
    memcpy(t->text + 256, eot, sizeof eot);
    t->start[257] = 256 + sizeof eot - 1;
}

static unsigned char *read_file(const char *path, size_t *bytes) {
    FILE *f = fopen(path, "rb");
    if (!f)
        die("%s: cannot open the decode table: %s|tokenize.py writes it beside the shards as PREFIX.vocab",
            path, strerror(errno));
    struct stat s;
    if (fstat(fileno(f), &s) || !S_ISREG(s.st_mode))
        die("%s: not a regular file|name the .vocab file that tokenize.py wrote", path);
    *bytes = (size_t)s.st_size;
    unsigned char *data = (unsigned char *)xmalloc(*bytes, path);
    if (fread(data, 1, *bytes, f) != *bytes)
        die("%s: cannot read its %zu bytes|check the disk or the mount", path, *bytes);
    fclose(f);
    return data;
}

static uint32_t word(const unsigned char *p) {
    return p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static void open_table(Tokens *t, const char *path) {
    size_t bytes, at = HEADER_WORDS * 4, out = 0;
    unsigned char *data = read_file(path, &bytes);
    if (bytes < at || word(data) != MAGIC)
        die("%s: not a decode table (magic %u expected)|name the .vocab file that tokenize.py wrote",
            path, MAGIC);
    uint32_t version = word(data + 4), vocab = word(data + 8), eot = word(data + 12),
             added = word(data + 16);
    if (version < 1 || version > 3)
        die("%s: decode table of version %u, known are 1 to 3|run tokenize.py again", path,
            version);
    if (!vocab || vocab > MAX_VOCAB)
        die("%s: decode table of %u ids is not possible|run tokenize.py again", path, vocab);
    size_t prefix = version == 3 ? 4 : 1;
    t->vocab = (int)vocab;
    t->added = added && added < vocab ? (int)added : t->vocab;
    t->eot = version == 1 ? t->vocab - 1 : eot == NO_EOT ? -1 : (int)eot;
    if (t->eot >= t->vocab)
        die("%s: its end-of-text id %u is not below its %u ids|run tokenize.py again", path, eot,
            vocab);
    t->start = (size_t *)xmalloc(((size_t)vocab + 1) * sizeof *t->start, "the decode table");
    for (int id = 0; id < t->vocab;
         id++) { // entries move down over their lengths: the file's memory becomes the text
        size_t n = bytes - at < prefix ? 0 : version == 3 ? word(data + at) : data[at];
        if (bytes - at < prefix || bytes - at - prefix < n)
            die("%s: truncated in the entry of id %d of %d|run tokenize.py again", path, id,
                t->vocab);
        t->start[id] = out;
        memmove(data + out, data + at + prefix, n);
        out += n, at += prefix + n;
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
    free(t->text), free(t->start), free(t->slot), free(t);
}

int tokens_vocab(const Tokens *t) { return t->vocab; }
int tokens_eot(const Tokens *t) { return t->eot; }

static size_t without(const char *s, size_t n,
                      const char *ending) { // n less the ending, if s[0..n) ends in it
    size_t m = strlen(ending);
    return n >= m && !memcmp(s + n - m, ending, m) ? n - m : n;
}

char *tokens_beside(const char *shard) {
    size_t n = without(shard, strlen(shard), ".bin"), digits = n;
    while (digits && shard[digits - 1] >= '0' && shard[digits - 1] <= '9') digits--;
    if (digits < n) n = without(shard, digits, "_");
    n = without(shard, without(shard, n, "_train"), "_val");
    char *path = xasprintf("%.*s.vocab", (int)n, shard);
    struct stat s;
    if (!stat(path, &s) && S_ISREG(s.st_mode)) return path;
    free(path);
    return 0;
}

// ---- decoding -------------------------------------------------------------------------------
typedef struct {
    char *out;
    size_t size, n;
} Text; // n counts on when out is full

static void put(Text *text, const void *bytes, size_t n) {
    if (text->size && text->n < text->size - 1) {
        size_t room = text->size - 1 - text->n;
        memcpy(text->out + text->n, bytes, n < room ? n : room);
    }
    text->n += n;
}

static size_t put_end(Text *text) {
    if (text->size) text->out[text->n < text->size ? text->n : text->size - 1] = 0;
    return text->n;
}

static void put_number(Text *text, const char *format, int number) {
    char word[32];
    put(text, word, (size_t)snprintf(word, sizeof word, format, number));
}

const char *tokens_piece(const Tokens *t, int id, size_t *bytes) {
    *bytes = id < 0 || id >= t->vocab ? 0 : t->start[id + 1] - t->start[id];
    return *bytes ? (const char *)t->text + t->start[id] : 0;
}

static size_t utf8(
    const unsigned char *s,
    size_t n) { // bytes of the well-formed character above ASCII at s, 0 if there is none
    size_t length = s[0] >= 0xc2 && s[0] < 0xe0   ? 2
                    : s[0] >= 0xe0 && s[0] < 0xf0 ? 3
                    : s[0] >= 0xf0 && s[0] < 0xf5 ? 4
                                                  : 0;
    if (!length || length > n) return 0;
    for (size_t i = 1; i < length; i++)
        if ((s[i] & 0xc0) != 0x80) return 0;
    // the second byte also rules out overlong forms, surrogates and code points above U+10FFFF; C1
    // controls (U+0080 to U+009F) would reach the terminal
    int low = s[0] == 0xc2 || s[0] == 0xe0 ? 0xa0
              : s[0] == 0xf0               ? 0x90
                                           : 0x80,
        high = s[0] == 0xed   ? 0x9f
               : s[0] == 0xf4 ? 0x8f
                              : 0xbf;
    return s[1] >= low && s[1] <= high ? length : 0;
}

size_t tokens_show(const Tokens *t, char *out, size_t size, int id) {
    Text text = { out, size, 0 };
    size_t n;
    const unsigned char *s = (const unsigned char *)tokens_piece(t, id, &n);
    if (!s) put_number(&text, "<%d>", id);
    for (size_t i = 0; i < n;) {
        size_t wide = utf8(s + i, n - i);
        if (wide)
            put(&text, s + i, wide);
        else if (s[i] == '\n')
            put(&text, "\\n", 2);
        else if (s[i] == '\t')
            put(&text, "\\t", 2);
        else if (s[i] == '\r')
            put(&text, "\\r", 2);
        else if (s[i] == '"' || s[i] == '\\')
            put(&text, "\\", 1), put(&text, s + i, 1);
        else if (s[i] < 0x20 || s[i] >= 0x7f)
            put_number(&text, "\\x%02x", s[i]);
        else
            put(&text, s + i, 1);
        i += wide ? wide : 1;
    }
    return put_end(&text);
}

size_t tokens_print(FILE *out, const char *text, size_t n, int more) {
    const unsigned char *s = (const unsigned char *)text;
    size_t i = 0;
    for (size_t wide; i < n; i += wide ? wide : 1) {
        wide = utf8(s + i, n - i);
        if (wide) {
            fwrite(s + i, 1, wide, out);
            continue;
        }
        if (s[i] == '\n' || s[i] == '\t' || (s[i] >= 0x20 && s[i] < 0x7f)) {
            fputc(s[i], out);
            continue;
        }
        size_t left = 1; // bytes from here to the end if all of them continue a character
        while (i + left < n && (s[i + left] & 0xc0) == 0x80) left++;
        if (more && i + left == n && s[i] >= 0xc2 && s[i] < 0xf5 &&
            left < (s[i] < 0xe0   ? 2u
                    : s[i] < 0xf0 ? 3u
                                  : 4u))
            break;
        fputs("\xef\xbf\xbd", out); // U+FFFD
    }
    return i;
}

// ---- encoding -------------------------------------------------------------------------------
static int is_newline(int c) { return c == '\n' || c == '\r'; }
static int is_space(int c) { return c == ' ' || (c >= '\t' && c <= '\r'); }
static int is_digit(int c) { return c >= '0' && c <= '9'; }
static int is_letter(int c) { return c >= 0x80 || ((c | 32) >= 'a' && (c | 32) <= 'z'); }
static int is_mark(int c) { return !is_space(c) && !is_digit(c) && !is_letter(c); }

// Length of the word at s (n >= 1 bytes): the first of Qwen's alternatives that matches, in its
// order (tokenizer.json, "Split").
static size_t word_length(const unsigned char *s, size_t n) {
    static const char *const contractions[] = { "s", "t", "re", "ve", "m", "ll", "d" };
    if (s[0] == '\'') // (?i:'s|'t|'re|'ve|'m|'ll|'d)
        for (int c = 0; c < 7; c++) {
            size_t i = 0, length = strlen(contractions[c]);
            while (i < length && i + 1 < n && (s[i + 1] | 32) == contractions[c][i]) i++;
            if (i == length) return 1 + length;
        }
    size_t i = !is_letter(s[0]) && !is_digit(s[0]) && !is_newline(s[0]);
    if (i < n && is_letter(s[i])) { // [^\r\n\p{L}\p{N}]?\p{L}+
        while (i < n && is_letter(s[i])) i++;
        return i;
    }
    if (is_digit(s[0])) return 1; // \p{N}
    i = s[0] == ' ';
    if (i < n && is_mark(s[i])) { //  ?[^\s\p{L}\p{N}]+[\r\n]*
        while (i < n && is_mark(s[i])) i++;
        while (i < n && is_newline(s[i])) i++;
        return i;
    }
    size_t run = 0, newline = 0; // only white space is left
    for (; run < n && is_space(s[run]); run++)
        if (is_newline(s[run])) newline = run + 1;
    if (newline) return newline;               // \s*[\r\n]+
    return run < n && run > 1 ? run - 1 : run; // \s+(?!\S)|\s+
}

typedef struct {
    int *ids;
    int64_t max, n;
} Ids;

static void put_id(Ids *out, int id) {
    if (out->n < out->max) out->ids[out->n] = id;
    out->n++;
}

// Joins pairs of one word, lowest id of the union first, leftmost first among equals. part: its n +
// 1 byte boundaries; pair[i]: id of parts i and i + 1 joined, or -1. Only the two pairs beside a
// join change.
static void encode_word(const Tokens *t, Ids *out, const unsigned char *s, size_t n) {
    size_t *part = (size_t *)xmalloc((n + 1) * sizeof *part, "a word of the prompt"), parts = n;
    int *pair = (int *)xmalloc(n * sizeof *pair, "a word of the prompt");
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
            die("the decode table has no token for byte 0x%02x of the prompt|use a byte-level tokenizer, or another prompt",
                s[part[i]]);
        put_id(out, id);
    }
    free(part), free(pair);
}

static int added_at(const Tokens *t, const unsigned char *s,
                    size_t n) { // longest added token that stands at s, -1: none
    int found = -1;
    size_t longest = 0;
    for (int id = t->added; id < t->vocab; id++) {
        size_t bytes = t->start[id + 1] - t->start[id];
        if (bytes > longest && bytes <= n && !memcmp(s, t->text + t->start[id], bytes))
            longest = bytes, found = id;
    }
    return found;
}

int64_t tokens_encode(const Tokens *t, int *ids, int64_t max, const char *text, size_t bytes) {
    const unsigned char *s = (const unsigned char *)text;
    Ids out = { ids, max, 0 };
    for (size_t i = 0; t->bytes && i < bytes; i++) put_id(&out, s[i]);
    for (size_t i = 0; !t->bytes && i < bytes;) {
        int added = added_at(t, s + i, bytes - i);
        if (added >= 0) {
            put_id(&out, added), i += t->start[added + 1] - t->start[added];
            continue;
        }
        size_t end = i + 1; // plain text up to the next added token
        while (end < bytes && added_at(t, s + end, bytes - end) < 0) end++;
        while (i < end) {
            size_t n = word_length(s + i, end - i);
            encode_word(t, &out, s + i, n);
            i += n;
        }
    }
    return out.n;
}
