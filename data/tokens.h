// Token ids <-> text, for samples, prompts and --trace-token. Training itself never needs it.
//
// A decode table is the file PREFIX.vocab that tokenize.py writes beside its shards, in llm.c's
// tokenizer format. Little-endian:
//
//     256 uint32    [0] magic 20240328   [1] version   [2] V, number of ids   [3] end-of-text id
//     (0xffffffff: none)
//                   [4] ids from here on are added tokens (<|endoftext|> and the like); 0: not
//                   stated (llm.c's own files)
//     V entries     version 1, 2:  one length byte, then so many bytes of text; length 0 = an id
//     the tokenizer does not use
//                   version 3:     the same with a uint32 length; written only when some entry is
//                   longer than 255 bytes (version 1 has no field [3]; llm.c wrote it for GPT-2
//                   only, whose end of text is its last id, 50256)
//
// Without a table, ids are bytes: 0..255 the byte, 256 end of text.
#ifndef MOE_TOKENS_H
#define MOE_TOKENS_H
#include "../kernels/types.h"
#include <stdio.h>
MOE_BEGIN_C
typedef struct Tokens Tokens;

Tokens *tokens_open(
    const char *path); // path 0: bytes. Dies when the file is unreadable, damaged, or no such table
void tokens_close(Tokens *tokens);      // 0 is allowed
int tokens_vocab(const Tokens *tokens); // V; ids at and above it have no text
int tokens_eot(const Tokens *tokens);   // end-of-text id, -1: none

// Name of the decode table that belongs to a shard of tokenize.py (PREFIX_train_000000.bin ->
// PREFIX.vocab) if there is such a file, else 0. The caller frees it.
char *tokens_beside(const char *shard);

// The bytes of one token (*bytes of them, not terminated); 0 when the id has none: unused, negative
// or >= V. Lives as long as tokens. A token may hold part of a UTF-8 character: join tokens before
// printing them.
const char *tokens_piece(const Tokens *tokens, int id, size_t *bytes);

// One token as a printable word for tables and traces, into out (size bytes), always terminated if
// size > 0: "\n" as \n, other control bytes and broken UTF-8 as \xNN, quote and backslash escaped;
// an id without text as <id>. Returns the bytes that the whole word has without its terminator, as
// snprintf does.
size_t tokens_show(const Tokens *tokens, char *out, size_t size, int id);

// Prints text (n bytes) for a terminal: well-formed UTF-8 as it is, control characters but \n and
// \t and broken bytes as U+FFFD. more: text goes on, so the beginning of a character at its end is
// left for the next call. Returns the bytes dealt with: n, or up to 3 fewer.
size_t tokens_print(FILE *out, const char *text, size_t n, int more);

// Text (bytes long) -> ids (max); returns the number of ids of the whole text, writing at most max.
// Decoding gives back the text exactly. Bytes: each byte its value. With a table: added tokens
// where they stand literally; the rest is cut into words by Qwen's pattern and in each word the
// adjacent pair whose union has the lowest id is joined until none is left. Where ids were given in
// merge order (GPT-2, Llama 3, Qwen) that is their byte-pair encoding; but classes of characters
// are known for ASCII only (any other byte counts as a letter), nothing is normalised (NFC), and
// tables of other kinds have other rules: the segmentation may then differ from Hugging Face's.
// Good for prompts; training text goes through tokenize.py. Dies when the table lacks a byte of the
// text.
int64_t tokens_encode(const Tokens *tokens, int *ids, int64_t max, const char *text, size_t bytes);
MOE_END_C
#endif
