// A decode table (tokens.h) from the tokenizer.json of a Hugging Face checkpoint. Reads the
// vocabulary and the added tokens of byte-level tokenizers (GPT-2, Llama 3, Qwen), in which each
// character of an entry stands for a byte.
#include "tokens.h"
#include "../kernels/fail.h"
#include <cjson/cJSON.h>
#include <stdlib.h>
#include <string.h>

enum { HEADER_WORDS = 256, MOST_IDS = 1 << 24 };

static void put32(unsigned char *p, uint32_t v) {
    for (int i = 0; i < 4; i++) p[i] = (unsigned char)(v >> (8 * i));
}

// The byte that a character stands for in GPT-2's map: printable characters of Latin-1 stand for
// themselves, the 68 other bytes in their order for U+0100 and on. Moves *text past the character;
// returns -1 for a character that stands for none.
static int byte_of(const unsigned char **text) {
    int c = *(*text)++;
    if (c >= 0xc0 && (**text & 0xc0) == 0x80) c = (c & 0x1f) << 6 | (*(*text)++ & 0x3f);
    int other = 0x100;
    for (int b = 0; b < 256; b++) {
        int printable = (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b != 0xad);
        if (c == (printable ? b : other)) return b;
        other += !printable;
    }
    return -1;
}

// Writes the bytes of an entry over its text and returns their number. An entry with a character
// that stands for no byte keeps its text.
static uint32_t decode_entry(char *text) {
    size_t n = 0;
    size_t length = strlen(text);
    char *bytes = (char *)xmalloc(length + 1, "a token");
    for (const unsigned char *p = (const unsigned char *)text; *p;) {
        int b = byte_of(&p);
        if (b < 0) {
            free(bytes);
            return (uint32_t)length;
        }
        bytes[n++] = (char)b;
    }
    memcpy(text, bytes, n);
    free(bytes);
    return (uint32_t)n;
}

typedef struct {
    const char *text; // 0: unused
    uint32_t bytes;
} Entry;

static void set_entry(Entry *entry, const char *path, double id, const char *text, uint32_t bytes) {
    if (!(id >= 0 && id < MOST_IDS))
        die("%s: a token with id %g|it is damaged: copy the checkpoint again", path, id);
    entry[(int)id].text = text;
    entry[(int)id].bytes = bytes;
}

unsigned char *tokens_from_json(const char *path, unsigned char *data, size_t *bytes) {
    cJSON *root = cJSON_ParseWithLength((const char *)data, *bytes);
    const cJSON *model = cJSON_GetObjectItemCaseSensitive(root, "model");
    const cJSON *vocab = cJSON_GetObjectItemCaseSensitive(model, "vocab");
    const cJSON *added = cJSON_GetObjectItemCaseSensitive(root, "added_tokens");
    if (!cJSON_IsObject(vocab))
        die("%s: no tokenizer.json with a model.vocab|make a table with data/tokenize.py "
            "--tokenizer and give it with --tokens",
            path);
    char *decoder = cJSON_PrintUnformatted(cJSON_GetObjectItemCaseSensitive(root, "decoder"));
    if (!decoder || !strstr(decoder, "\"ByteLevel\""))
        die("%s: not a byte-level tokenizer|make a table with data/tokenize.py --tokenizer and "
            "give it with --tokens",
            path);
    free(decoder);

    Entry *entry = (Entry *)xcalloc(MOST_IDS, sizeof *entry, "the tokens of tokenizer.json");
    int ids = 0;
    int first_added = 0;
    uint32_t eot = 0xffffffffu;
    for (const cJSON *t = vocab->child; t; t = t->next) {
        set_entry(entry, path, cJSON_IsNumber(t) ? t->valuedouble : -1, t->string,
                  decode_entry(t->string));
        if (t->valueint >= ids) ids = t->valueint + 1;
    }
    first_added = ids;
    for (const cJSON *t = added ? added->child : 0; t; t = t->next) {
        const cJSON *id = cJSON_GetObjectItemCaseSensitive(t, "id");
        const char *text = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(t, "content"));
        if (!text) text = "";
        set_entry(entry, path, cJSON_IsNumber(id) ? id->valuedouble : -1, text,
                  (uint32_t)strlen(text));
        if (id->valueint >= ids) ids = id->valueint + 1;
        if (!strcmp(text, "<|endoftext|>") || !strcmp(text, "<|end_of_text|>"))
            eot = (uint32_t)id->valueint;
    }

    *bytes = HEADER_WORDS * 4;
    for (int i = 0; i < ids; i++) *bytes += 4 + entry[i].bytes;
    unsigned char *table = (unsigned char *)xcalloc(*bytes, 1, "the decode table");
    const uint32_t header[] = { 20240328, 3, (uint32_t)ids, eot, (uint32_t)first_added };
    for (int i = 0; i < 5; i++) put32(table + 4 * i, header[i]);
    unsigned char *p = table + HEADER_WORDS * 4;
    for (int i = 0; i < ids; i++) {
        put32(p, entry[i].bytes);
        if (entry[i].bytes) memcpy(p + 4, entry[i].text, entry[i].bytes);
        p += 4 + entry[i].bytes;
    }
    free(entry);
    free(data);
    cJSON_Delete(root);
    return table;
}
