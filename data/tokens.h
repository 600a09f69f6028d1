// Token ids and their text, for samples, prompts and --trace-token. Training itself never needs it.
//
// A decode table is the file PREFIX.vocab that tokenize.py writes beside its shards, in the format
// of llm.c's tokenizer files, little-endian:
//
//     256 uint32   [0] magic 20240328   [1] version   [2] V, the number of ids
//                  [3] end-of-text id, 0xffffffff: none (version 1: the last id)
//                  [4] first id of the added tokens, such as <|endoftext|>; 0: not stated
//     V entries    version 1, 2: one byte with the length of the text, then the text
//                  version 3: the same with a uint32 length, for entries of more than 255 bytes
//                  length 0: an id that the tokenizer does not use
//
// Without a table, ids 0 to 255 are bytes and 256 is the end of text.
#ifndef MOE_TOKENS_H
#define MOE_TOKENS_H
#include "../kernels/types.h"
#include <stdio.h>
MOE_BEGIN_C
typedef struct Tokens Tokens;

// Reads the decode table at `path`, or makes one from a tokenizer.json there; 0 means that tokens
// are bytes. Dies when the file is unreadable, damaged, or neither of them.
Tokens *tokens_open(const char *path);
void tokens_close(Tokens *tokens);      // does nothing if tokens is 0
int tokens_vocab(const Tokens *tokens); // V: ids from here on have no text
int tokens_eot(const Tokens *tokens);   // end-of-text id, -1: none

// Returns the name of the decode table that belongs to a shard of tokenize.py, PREFIX.vocab for
// PREFIX_train_000000.bin (the caller frees it), or 0 if there is no such file.
char *tokens_beside(const char *shard);

// Returns a decode table (*bytes of it, version 3) with the tokens of a tokenizer.json, whose text
// is `data` (*bytes) and is freed. Dies naming `path` when it is damaged or not byte-level.
unsigned char *tokens_from_json(const char *path, unsigned char *data, size_t *bytes);

// Returns the *bytes bytes of a token's text, not terminated, which live as long as `tokens`; 0 if
// the id has none: unused, negative or at least V. A token may hold part of a UTF-8 character, so
// join the tokens of a text before printing it.
const char *tokens_piece(const Tokens *tokens, int id, size_t *bytes);

// Writes a token as a printable word for tables into out (size bytes, always terminated if size is
// not 0): a newline as \n, other control bytes and broken UTF-8 as \xNN, quote and backslash
// escaped, an id without text as <id>. Returns the length of the whole word, as snprintf does.
size_t tokens_show(const Tokens *tokens, char *out, size_t size, int id);

// Prints text (n bytes) for a terminal: well-formed UTF-8 as it is, broken bytes and control
// characters other than newline and tab as U+FFFD. Returns the number of bytes printed. That is n,
// or up to 3 fewer if `more` says that text follows and a character begins at the end.
size_t tokens_print(FILE *out, const char *text, size_t n, int more);

// Encodes a prompt of `bytes` bytes into ids (max) and returns the number of ids of the whole
// prompt, of which it writes at most `max`. Decoding them gives the prompt exactly. With a table,
// added tokens are found where they stand literally. The rest is cut into words by Qwen's pattern,
// and in each word the adjacent pair whose union has the lowest id is joined until none is left.
// That is byte-pair encoding where ids follow the order of merges (GPT-2, Llama 3, Qwen), but
// classes of characters are those of ASCII (other bytes count as letters) and nothing is
// normalised, so the ids may differ from those of Hugging Face's tokenizer. Dies when the table has
// no token for a byte of the prompt.
int64_t tokens_encode(const Tokens *tokens, int *ids, int64_t max, const char *text, size_t bytes);
MOE_END_C
#endif
