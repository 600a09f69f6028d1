#!/usr/bin/env python3
"""Text or conversations -> token shards for train_moe:

    python3 data/tokenize.py --out PREFIX FILE...

Writes PREFIX_train_000000.bin, ... (and PREFIX_val_*.bin with --val-fraction) in llm.c's shard
format, and PREFIX.vocab, the decode table that samples are printed with. data/README.md has both
formats byte by byte.

Without --tokenizer a token is a byte (0..255) and 256 is the end of text: vocabulary 257, nothing
to install. With --tokenizer it is any Hugging Face tokenizer.json, through the `tokenizers`
package. One file is one document, and so is one line of a .jsonl file, one element of a .json array
and one row of a .parquet file; any of them may be compressed (.gz, .bz2, .xz, .zst). The
end-of-text id follows every document. Files of any size: only a few MiB of text are held at a time.

With --chat every record is a conversation, {"messages": [{"role": ..., "content": ...}, ...]} or
{"prompt": ..., "completion": ...}, or a plain {"text": ...}. It is rendered with the chat template
that stands beside the tokenizer, and PREFIX_train_000000.mask, ... say which tokens count in
training: those that the assistant wrote, and the end-of-turn token after them. Needs Jinja2.
"""

import os
import sys

# A script's folder comes first in the search path, but the standard library has its own `tokenize`.
here = os.path.dirname(os.path.abspath(__file__))
if __name__ == "__main__" and sys.path and os.path.abspath(sys.path[0]) == here:
    sys.path.append(sys.path.pop(0))
import argparse
import array
import codecs
import glob
import json
import time

from text_files import MAGIC_MASK, MAGIC_TABLE, MAGIC_UINT16, MAGIC_UINT32, Input, fail

HEADER_WORDS = 256
VERSION_UINT16, VERSION_UINT32, VERSION_MASK, NO_EOT = 1, 7, 1, 0xFFFFFFFF
PIECE = 256 << 10  # bytes of text in one call of a tokenizer, about
# bytes of text in one batch of calls, which run in parallel
BATCH = PIECE * max(8, 2 * (os.cpu_count() or 1))
EOT_NAMES = ["<|endoftext|>", "<|end_of_text|>", "<|eot|>", "</s>", "<eos>"]


def little_endian(words):
    """Bytes of an array of integers as the files have them."""
    if sys.byteorder == "big":
        words = words[:]
        words.byteswap()
    return words.tobytes()


def header(*fields):
    return little_endian(array.array("I", list(fields) + [0] * (HEADER_WORDS - len(fields))))


# ---- tokenizers ----------------------------------------------------------------------------------
class Bytes:
    """A token is a byte."""

    vocab, eot, added, name = 257, 256, 257, "bytes"

    def entries(self):
        return [bytes([i]) for i in range(256)] + [b"<|endoftext|>"]

    def encode(self, pieces):
        for piece in pieces:
            ids = bytearray(2 * len(piece))
            ids[::2] = piece
            # ten times as fast as max(piece)
            yield bytes(ids), next((b for b in range(255, -1, -1) if b in piece), 0)


class HuggingFace:
    """A tokenizer.json. vocab counts ids up to the largest, added tokens included; ids between may
    be unused."""

    def __init__(self, path, eot):
        try:
            import tokenizers
        except ImportError:
            fail(
                f"--tokenizer {path} needs the Python package `tokenizers`",
                "python3 -m pip install tokenizers, or leave --tokenizer out for byte-level tokens",
            )
        try:
            with open(path, encoding="utf-8") as f:
                self.spec = json.load(f)
            self.tokenizer = tokenizers.Tokenizer.from_file(path)
        except Exception as e:  # the package raises bare Exception
            fail(
                f"{path}: not a readable tokenizer.json: {e}",
                "give the file of that name from a Hugging Face checkpoint",
            )
        self.tokenizer.no_truncation()  # a file may carry the settings it was last used with
        self.tokenizer.no_padding()
        self.name = path
        self.ids = self.tokenizer.get_vocab(with_added_tokens=True)
        self.vocab = max(self.ids.values()) + 1
        self.special = {t["id"] for t in self.spec.get("added_tokens") or []}
        self.added = max((i for i in self.ids.values() if i not in self.special), default=-1) + 1
        self.eot = (
            eot
            if eot is not None
            else next((self.ids[n] for n in EOT_NAMES if n in self.ids), None)
        )
        if self.eot is None:
            fail(
                f"{path}: none of {' '.join(EOT_NAMES)} is in its vocabulary",
                "name the id that ends a document: --eot ID",
            )
        # _fast: without offsets
        self.run = getattr(self.tokenizer, "encode_batch_fast", self.tokenizer.encode_batch)
        self.code = "H" if self.vocab <= 65536 else "I"

    def entries(self):
        """Bytes of every id, as in the middle of a text."""
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        hidden = [b for b in range(256) if b not in printable]
        byte_of = {chr(b): b for b in printable}  # GPT-2's map of bytes to printable characters
        byte_of.update({chr(256 + i): b for i, b in enumerate(hidden)})
        text = json.dumps([self.spec.get("pre_tokenizer"), self.spec.get("decoder")])
        byte_level, word_piece = '"ByteLevel"' in text, '"WordPiece"' in text
        entries = [b""] * self.vocab
        for token, i in self.ids.items():
            if i in self.special:
                entries[i] = token.encode()
            elif byte_level and all(c in byte_of for c in token):
                entries[i] = bytes(byte_of[c] for c in token)
            elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                # SentencePiece's byte fall-back
                entries[i] = bytes([int(token[3:5], 16)])
            elif word_piece:
                entries[i] = token[2:].encode() if token.startswith("##") else b" " + token.encode()
            else:
                entries[i] = token.replace("\u2581", " ").encode()
        return entries

    def encode(self, pieces):
        for encoding in self.run([p.decode() for p in pieces], add_special_tokens=False):
            ids = array.array(self.code, encoding.ids)
            yield little_endian(ids), max(ids, default=0)

    def encode_chats(self, chats):
        """Ids of each (text, spans) and one byte a token, 1 inside the spans; spans None:
        everything counts."""
        import chat_template

        for (_, spans), encoding in zip(
            chats,
            self.tokenizer.encode_batch([text for text, _ in chats], add_special_tokens=False),
        ):
            n = len(encoding.ids)
            yield array.array(self.code, encoding.ids), (
                bytes([1]) * n if spans is None else chat_template.mark(encoding.offsets, spans, n)
            )


# ---- input ---------------------------------------------------------------------------------------
class Reader:
    """Documents of the files as pieces: yields (split, piece in bytes or None at the end of a
    document)."""

    def __init__(self, args, as_text, progress, chat):
        self.args, self.as_text, self.progress, self.chat = args, as_text, progress, chat
        self.repaired, self.documents = set(), 0

    def documents_of(self, file):
        if file.kind != "text" or self.chat:
            yield from self.records(file)
        elif file.size:
            cut = self.cut(file, file.size)
            yield from self.text(file, "train", 0, cut)
            yield from self.text(file, "val", cut, file.size)

    def cut(self, file, size):
        """Where the held-out last part begins: after a line end, else at a character."""
        if not self.args.val_fraction:
            return size
        with file.open() as f:
            at = f.seek(int(size * (1 - self.args.val_fraction)))
            ahead = f.read(1 << 16)
        line = ahead.find(b"\n") + 1
        if line and at + line < size:
            return at + line
        character = next((i for i, b in enumerate(ahead) if b & 0xC0 != 0x80), 0)
        return at + character

    def text(self, file, split, begin, end):
        if begin == end:
            return
        decoder = codecs.getincrementaldecoder("utf-8")("replace") if self.as_text else None
        rest = ""
        path = file.path
        with file.open() as f:
            f.seek(begin)
            while begin < end:
                data = f.read(min(PIECE, end - begin))
                if not data:
                    fail(
                        f"{path}: became shorter while it was read",
                        "tokenize files that nobody writes to",
                    )
                begin += len(data)
                self.progress.add(len(data))
                if not decoder:
                    yield split, data
                    continue
                more = decoder.decode(data, begin == end)
                if "\ufffd" in more:
                    self.repaired.add(path)
                rest += more
                at = len(rest) if begin == end else self.boundary(rest)
                if at:
                    yield split, rest[:at].encode()
                rest = rest[at:]
        self.documents += 1
        yield split, None

    @staticmethod
    def boundary(text):
        """Where a long text may be cut: between a line end and a character that is no white space,
        which the patterns of GPT-2, Llama 3 and Qwen never join to one word, so the ids are those
        of the whole text. 0: read on; but at 64 pieces, anywhere.
        """
        at = len(text)
        while True:
            at = text.rfind("\n", 0, at)
            if at < 0:
                return 0 if len(text) < 64 * PIECE else len(text)
            if at + 1 < len(text) and not text[at + 1].isspace():
                return at + 1

    def numbered(self, file):
        """(where, split, record) of every record; a line that is no JSON is an error."""
        cut, at = file.size * (1 - self.args.val_fraction), 0
        if file.kind == "lines" or file.kind == "text":
            with file.open() as f:
                for number, line in enumerate(f, 1):
                    split = "val" if at >= cut else "train"
                    at += len(line)
                    self.progress.add(len(line))
                    if not line.strip():
                        continue
                    try:
                        record = json.loads(line)
                    except ValueError as e:
                        fail(
                            f"{file.path}: line {number}: not JSON: {e}",
                            "every line must be one JSON object",
                        )
                    yield f"line {number}", split, record
            return
        rows = (
            file.records
            if file.kind == "array"
            else (row for batch in file.table.iter_batches(1000) for row in batch.to_pylist())
        )
        for number, record in enumerate(rows, 1):
            self.progress.add(1)
            yield f"{'element' if file.kind == 'array' else 'row'} {number}", (
                "val" if number > cut else "train"
            ), record

    def records(self, file):
        key = self.args.key
        for where, split, record in self.numbered(file):
            if self.chat:
                yield split, self.chat.read(file.path, where, record)
                self.documents += 1
                yield split, None
                continue
            try:
                text = record if isinstance(record, str) else record[key]
                data = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace").encode()
            except (KeyError, TypeError, AttributeError) as e:
                fail(
                    f"{file.path}: {where}: no object with a text under \"{key}\": {e!r}",
                    "name the key with --key, or use --chat for conversations",
                )
            if data:
                self.documents += 1
                yield split, data
                yield split, None


class Conversations:
    """Reads records as conversations: (text, spans of the assistant's turns; None where all of it
    counts)."""

    def __init__(self, args, tokenizer):
        import chat_template

        self.module, self.silent = chat_template, 0
        try:
            text, special = chat_template.load_template(
                os.path.dirname(os.path.abspath(args.tokenizer)), args.chat_template
            )
        except (OSError, ValueError, KeyError) as e:
            fail(
                f"the chat template cannot be read: {e}",
                "check chat_template.jinja or tokenizer_config.json beside the tokenizer",
            )
        if not isinstance(text, str):
            fail(
                f"no chat template beside {args.tokenizer}",
                "put chat_template.jinja or tokenizer_config.json there, or use --chat-template "
                "FILE",
            )
        try:
            self.chat = chat_template.Chat(
                text, special, [t["content"] for t in tokenizer.spec.get("added_tokens") or []]
            )
        except ImportError:
            fail("--chat needs the Python package jinja2", "python3 -m pip install jinja2")
        except Exception as e:  # a template that does not compile raises what it likes
            fail(f"the chat template does not work: {e}", "check it with transformers")
        if not self.chat.end:
            print(
                "warning: the chat template ends no assistant turn with an added token: the end of "
                "a turn is not learnt",
                file=sys.stderr,
            )

    def read(self, path, where, record):
        try:
            messages, counted, tools = self.module.conversation(record)
            if isinstance(messages, str):
                return messages, None
            text, spans = self.chat.turns(messages, counted, tools)
        except self.module.Refused as e:
            fail(f"{path}: {where}: {e}", "see data/README.md, \"Conversations\"")
        self.silent += not spans
        return text, spans


class Progress:
    def __init__(self, total):
        self.total, self.done, self.start, self.tokens = total, 0, time.time(), 0
        self.shown = self.start
        self.live = sys.stderr.isatty()

    def add(self, size):
        self.done += size
        now = time.time()
        if now - self.shown >= (0.25 if self.live else 30) and self.total:
            self.shown = now
            share, seconds = min(1.0, self.done / self.total), now - self.start
            bar = "#" * int(30 * share)
            left = seconds / share - seconds if share else 0
            print(
                f"{chr(13) if self.live else ''}[{bar:<30}] {100 * share:5.1f} %  "
                f"{self.done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB  "
                f"{self.tokens:,} tokens  {self.done / 1e6 / max(seconds, 1e-9):.1f} MB/s  "
                f"{left:,.0f} s left ",
                end="" if self.live else "\n",
                file=sys.stderr,
                flush=True,
            )

    def end(self):
        if self.live:
            print("\r" + " " * 120 + "\r", end="", file=sys.stderr, flush=True)


# ---- output --------------------------------------------------------------------------------------
class Shards:
    """One split's shards, and with `masked` their loss masks, under temporary names; each header is
    written when its counts are known."""

    def __init__(self, prefix, split, width, vocab, limit, masked):
        self.prefix, self.split, self.width, self.vocab, self.limit, self.masked = (
            prefix,
            split,
            width,
            vocab,
            limit,
            masked,
        )
        self.file, self.mask, self.names, self.counts, self.largest, self.targets = (
            None,
            None,
            [],
            [],
            [],
            0,
        )

    def write(self, data, largest, marks=None):
        at = 0
        while at < len(data):
            if not self.file:
                self.names.append(f"{self.prefix}_{self.split}_{len(self.names):06d}.bin")
                self.counts.append(0)
                self.largest.append(0)
                self.file = open(self.names[-1] + ".tmp", "wb")
                self.file.write(bytes(4 * HEADER_WORDS))
                if self.masked:
                    self.mask = open(mask_name(self.names[-1]) + ".tmp", "wb")
                    self.mask.write(bytes(4 * HEADER_WORDS))
            room = (self.limit - self.counts[-1]) * self.width
            part = data[at : at + room]
            self.file.write(part)
            if self.masked:
                piece = marks[at // self.width : (at + len(part)) // self.width]
                self.mask.write(piece)
                self.targets += sum(piece)
            self.counts[-1] += len(part) // self.width
            # a piece that is cut between two shards states its own largest id in both: an upper
            # bound would refuse a good shard
            whole = len(part) == len(data)
            self.largest[-1] = max(
                self.largest[-1], largest if whole else max(numbers(part, self.width))
            )
            at += len(part)
            if self.counts[-1] == self.limit:
                self.close()

    def close(self):
        if self.file:
            magic, version = (
                (MAGIC_UINT16, VERSION_UINT16)
                if self.width == 2
                else (MAGIC_UINT32, VERSION_UINT32)
            )
            self.finish(
                self.file, header(magic, version, self.counts[-1], self.vocab, self.largest[-1])
            )
            if self.mask:
                self.finish(self.mask, header(MAGIC_MASK, VERSION_MASK, self.counts[-1]))
            self.file = self.mask = None

    @staticmethod
    def finish(file, start):
        file.seek(0)
        file.write(start)
        file.flush()
        os.fsync(file.fileno())
        file.close()

    def all_names(self):
        return self.names + [mask_name(name) for name in self.names if self.masked]


def mask_name(shard):
    return shard[: -len(".bin")] + ".mask"


def numbers(data, width):
    words = array.array("H" if width == 2 else "I")
    words.frombytes(data)
    if sys.byteorder == "big":
        words.byteswap()
    return words


def verify(name, count, largest, width, entries):
    """Reads a finished shard back: the header, the size, the largest id; returns its first text."""
    with open(name, "rb") as f:
        words = numbers(f.read(4 * HEADER_WORDS), 4)
        expected = [MAGIC_UINT16, VERSION_UINT16] if width == 2 else [MAGIC_UINT32, VERSION_UINT32]
        good = list(words[:5]) == expected + [count, len(entries), largest]
        good = good and os.path.getsize(name) == 4 * HEADER_WORDS + count * width
        seen, first = -1, b""
        while good:
            data = f.read(1 << 22)
            if not data:
                break
            ids = numbers(data, width)
            first = first or b"".join(entries[i] for i in ids[:64] if i < len(entries))
            seen = max(seen, max(ids))
    if not good or seen != largest:
        fail(
            f"{name}: reading it back gave something else than was written",
            "check the disk, then run again with --force",
        )
    return first.decode("utf-8", "replace")


def write_table(name, entries, eot, added):
    longest = max(map(len, entries))
    version, prefix = (2, 1) if longest <= 255 else (3, 4)
    with open(name, "wb") as f:
        f.write(header(MAGIC_TABLE, version, len(entries), NO_EOT if eot is None else eot, added))
        for entry in entries:
            f.write(len(entry).to_bytes(prefix, "little") + entry)


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "files",
        nargs="*",
        metavar="FILE",
        help="text (UTF-8), .jsonl, .json or .parquet, also packed; "
        "none: write the decode table only",
    )
    p.add_argument(
        "--out",
        required=True,
        metavar="PREFIX",
        help="what the names of all written files begin with",
    )
    p.add_argument(
        "--tokenizer", metavar="FILE", help="a Hugging Face tokenizer.json (default: bytes)"
    )
    p.add_argument(
        "--shard-tokens",
        type=int,
        default=100_000_000,
        metavar="N",
        help="tokens in a shard (default 100,000,000)",
    )
    p.add_argument(
        "--val-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="hold out the last part of every file, F of its bytes, cut at a line "
        "(default 0: no validation shards)",
    )
    p.add_argument(
        "--eot",
        type=int,
        metavar="ID",
        help="end-of-text id (default: the tokenizer's <|endoftext|>, ...; bytes: 256)",
    )
    p.add_argument(
        "--jsonl", action="store_true", help="every FILE is JSON lines, whatever its name"
    )
    p.add_argument(
        "--key", default="text", help="where a line of .jsonl has its text (default: text)"
    )
    p.add_argument(
        "--chat",
        action="store_true",
        help="records are conversations; the assistant's tokens are what counts in training",
    )
    p.add_argument(
        "--chat-template",
        metavar="FILE",
        help="with --chat: the Jinja template (default: the one beside the tokenizer)",
    )
    p.add_argument(
        "--max-len",
        type=int,
        metavar="N",
        help="with --chat: conversations of more than N tokens are too long",
    )
    p.add_argument(
        "--too-long",
        choices=["drop", "cut"],
        default="drop",
        help="what happens to them (default: drop)",
    )
    p.add_argument(
        "--force", action="store_true", help="replace the files of an earlier run with this PREFIX"
    )
    args = p.parse_args()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(
            stream, "reconfigure"
        ):  # text that the terminal cannot show must not end the run
            stream.reconfigure(errors="backslashreplace")

    if not 0 <= args.val_fraction < 1:
        fail(f"--val-fraction {args.val_fraction} is not in [0, 1)", "0.1 holds out a tenth")
    if not 1 <= args.shard_tokens < 1 << 31:
        fail(
            f"--shard-tokens {args.shard_tokens} is not in [1, 2^31)",
            "the header's count is an int32; the default is 100000000",
        )
    if args.chat and not args.tokenizer:
        fail(
            "--chat without --tokenizer",
            "conversations need the tokenizer.json whose chat template renders them",
        )
    if (args.max_len is not None or args.chat_template) and not args.chat:
        fail("--max-len and --chat-template belong to --chat", "add --chat, or leave them out")
    if args.max_len is not None and args.max_len < 2:
        fail(
            f"--max-len {args.max_len} is below 2",
            "give the longest conversation in tokens, such as --seq-len's value",
        )
    for path in args.files:
        if not os.path.isfile(path):
            fail(f"{path}: no such file", "name text files or .jsonl files")
    prefix = glob.escape(args.out)
    old = [
        name
        for end in (
            "_train_[0-9]*.bin",
            "_val_[0-9]*.bin",
            "_train_[0-9]*.mask",
            "_val_[0-9]*.mask",
            ".vocab",
        )
        for name in sorted(glob.glob(prefix + end))
    ]
    if not args.files:
        old = [name for name in old if name.endswith(".vocab")]
    if old and not args.force:
        more = f" (and {len(old) - 1} more)" if len(old) > 1 else ""
        fail(f"{old[0]} exists already{more}", "another --out, or --force to replace them")
    folder = os.path.dirname(args.out)
    if folder:
        os.makedirs(folder, exist_ok=True)

    tokenizer = HuggingFace(args.tokenizer, args.eot) if args.tokenizer else Bytes()
    if not args.tokenizer and args.eot is not None:
        if not 0 <= args.eot <= 256:
            fail(f"--eot {args.eot} is not in 0..256", "byte-level tokens end a text with 256")
        tokenizer.eot = args.eot
    if not 0 <= tokenizer.eot < tokenizer.vocab:
        fail(
            f"--eot {tokenizer.eot} is not in the vocabulary of {tokenizer.vocab} ids",
            "name the id that ends a document",
        )
    chat = Conversations(args, tokenizer) if args.chat else None
    width = 2 if tokenizer.vocab <= 65536 else 4
    entries = tokenizer.entries()
    eot = tokenizer.eot.to_bytes(width, "little")
    shards = {
        split: Shards(args.out, split, width, tokenizer.vocab, args.shard_tokens, args.chat)
        for split in ("train", "val")
    }
    inputs = [Input(path, args.jsonl) for path in args.files]
    progress = Progress(sum(file.size for file in inputs))
    reader = Reader(args, as_text=bool(args.tokenizer), progress=progress, chat=chat)
    pending, held, dropped, shortened = [], 0, 0, 0

    def flush_chats():
        nonlocal dropped, shortened
        chats = [(split, piece) for split, piece in pending if piece is not None]
        for (split, (_, spans)), (ids, marks) in zip(
            chats, tokenizer.encode_chats([piece for _, piece in chats])
        ):
            if args.max_len and len(ids) > args.max_len:
                if args.too_long == "drop":
                    dropped += 1
                    continue
                shortened += 1
                ids, marks = ids[: args.max_len], marks[: args.max_len]
            shards[split].write(little_endian(ids), max(ids, default=0), marks)
            # the end of a text is to be learnt; after a conversation it only divides it from the
            # next one
            shards[split].write(eot, tokenizer.eot, bytes([spans is None]))
            progress.tokens += len(ids) + 1

    def flush():
        nonlocal pending, held
        if chat:
            flush_chats()
            pending, held = [], 0
            return
        encoded = tokenizer.encode([piece for _, piece in pending if piece is not None])
        for split, piece in pending:
            data, largest = next(encoded) if piece is not None else (eot, tokenizer.eot)
            shards[split].write(data, largest)
            progress.tokens += len(data) // width
        pending, held = [], 0

    written = [args.out + ".vocab"]
    try:
        for file in inputs:
            for split, piece in reader.documents_of(file):
                pending.append((split, piece))
                held += len(piece[0] if chat else piece) if piece else 0
                if held >= BATCH or len(pending) >= 20_000:
                    flush()
        flush()
        for s in shards.values():
            s.close()
        progress.end()
        if args.files:
            for split in ["train"] + (["val"] if args.val_fraction else []):
                if not shards[split].names:
                    fail(
                        f"no text for {split}: {len(args.files)} files, {reader.documents} "
                        f"documents, {dropped} of them too long",
                        (
                            "give more text"
                            if split == "train"
                            else "a larger --val-fraction or more text"
                        ),
                    )
        write_table(written[0] + ".tmp", entries, tokenizer.eot, tokenizer.added)
        written += shards["train"].all_names() + shards["val"].all_names()
        for name in old:  # only now: a run that fails leaves the earlier files alone
            os.remove(name)
        for name in written:
            os.replace(name + ".tmp", name)
    except OSError as e:
        fail(
            f"cannot read or write {e.filename or args.out}: {e.strerror}",
            "check the folder, its permissions and the free space",
        )
    finally:
        for s in shards.values():
            for file in (s.file, s.mask):
                if file:
                    file.close()
        for name in set(written + shards["train"].all_names() + shards["val"].all_names()):
            if os.path.exists(name + ".tmp"):
                os.remove(name + ".tmp")

    for path in sorted(reader.repaired):
        print(
            f"warning: {path} has U+FFFD or bytes that are not UTF-8 (read as U+FFFD)",
            file=sys.stderr,
        )
    for split, s in shards.items():
        for i, name in enumerate(s.names):
            text = verify(name, s.counts[i], s.largest[i], width, entries)
            mask = "  and its mask" if s.masked else ""
            print(
                f"{name}{mask}  {s.counts[i]:,} tokens  uint{8 * width}  largest id {s.largest[i]} "
                f" {json.dumps(text[:60], ensure_ascii=False)}"
            )
    print(
        f"{written[0]}  decode table of {tokenizer.vocab:,} ids, end of text {tokenizer.eot}, "
        f"tokenizer {tokenizer.name}"
    )
    if args.files:
        total = sum(sum(s.counts) for s in shards.values())
        if chat:
            targets = sum(s.targets for s in shards.values())
            long = (
                f"{dropped:,} conversations of more than {args.max_len} tokens dropped, "
                f"{shortened:,} cut; "
                if args.max_len
                else ""
            )
            print(
                f"{targets:,} tokens count ({100 * targets / total:.1f} %); {long}{chat.silent:,} "
                "without a turn that counts"
            )
        print(
            f"{reader.documents:,} documents, {total:,} tokens in "
            f"{time.time() - progress.start:.1f} s; "
            f"the model's vocab_size must be at least {tokenizer.vocab:,}"
        )
        val = f" --val '{args.out}_val_*.bin'" if shards["val"].names else ""
        print(f"use: --train '{args.out}_train_*.bin'{val}")


if __name__ == "__main__":
    main()
