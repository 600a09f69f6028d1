"""What a file given to tokenize.py holds, by its first bytes: text, lines, a JSON array or parquet,
plain or packed. Anything else is refused by name.
"""

import importlib
import json
import os
import sys

MAGIC_UINT16, MAGIC_UINT32, MAGIC_TABLE, MAGIC_MASK = 20240520, 20240801, 20240328, 20260520
SIGNATURES = [
    (b"PK\x03\x04", "a zip archive"),
    (b"%PDF", "a PDF"),
    (b"\x93NUMPY", "a numpy array"),
    (b"ARROW1", "an arrow file"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"GGUF", "a GGUF model"),
    (b"\x7fELF", "a program"),
    (b"\x89PNG", "a picture"),
    (b"SQLite", "a database"),
    (MAGIC_UINT16.to_bytes(4, "little"), "a token shard"),
    (MAGIC_UINT32.to_bytes(4, "little"), "a token shard"),
    (MAGIC_MASK.to_bytes(4, "little"), "a loss mask"),
    (MAGIC_TABLE.to_bytes(4, "little"), "a decode table"),
]
PACKED = [
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bz2"),
    (b"\xfd7zXZ\0", "lzma"),
    (b"\x28\xb5\x2f\xfd", "zstandard"),
]


def fail(what, hint):
    sys.exit(f"error: {what}  hint: {hint}")


class Input:
    """A file by what is in it: kind text, lines, array or parquet, `size` in bytes (unpacked) or
    records."""

    def __init__(self, path, lines):
        self.path, self.packed = path, None
        with open(path, "rb") as f:
            head = f.read(512)
        name = path
        for signature, module in PACKED:
            if head.startswith(signature):
                self.packed = needs(module, path)
                name = os.path.splitext(path)[0]
                try:
                    with self.open() as f:
                        head = f.read(512)
                    self.bytes = self.count()
                except Exception as e:  # each library has errors of its own
                    fail(
                        f"{path}: cannot be unpacked, it may be damaged: {e}",
                        "copy or pack it again",
                    )
        for signature, what in SIGNATURES + [
            (s, "a packed file inside a packed file") for s, _ in PACKED
        ]:
            if head.startswith(signature):
                fail(
                    f"{path}: is {what}, not text",
                    "give text, .jsonl, .json or .parquet, plain or packed with gzip, bz2, xz or "
                    "zstd",
                )
        if head[257:262] == b"ustar":
            fail(f"{path}: is a tar archive, not text", "unpack it first")
        if head.startswith(b"PAR1"):
            if self.packed:
                fail(f"{path}: is a packed parquet file", "unpack it first")
            self.kind = "parquet"
            parquet = needs("pyarrow.parquet", path)
            try:
                self.table = parquet.ParquetFile(path)
            except Exception as e:
                fail(f"{path}: not a readable parquet file: {e}", "copy or write it again")
            self.size = self.table.metadata.num_rows
        elif name.endswith(".json") and head.lstrip().startswith(b"["):
            self.kind = "array"
            with self.open() as f:
                try:
                    self.records = json.load(f)
                except ValueError as e:
                    fail(
                        f"{path}: no JSON array: {e}",
                        "give valid JSON, or name it .txt to read it as text",
                    )
            self.size = len(self.records)
        else:
            self.kind = (
                "lines" if lines or name.endswith((".jsonl", ".json", ".ndjson")) else "text"
            )
            self.size = self.bytes if self.packed else os.path.getsize(path)

    def open(self):
        return self.packed.open(self.path, "rb") if self.packed else open(self.path, "rb")

    def count(self):
        with self.open() as f:
            return sum(map(len, iter(lambda: f.read(1 << 20), b"")))


def needs(module, path):
    try:
        return importlib.import_module(module)
    except ImportError:
        fail(
            f"{path}: reading a file of this kind ({module}) needs the Python package "
            f"{module.split('.')[0]}",
            f"python3 -m pip install {module.split('.')[0]}, or unpack it first",
        )
