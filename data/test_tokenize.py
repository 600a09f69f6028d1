#!/usr/bin/env python3
"""Numbered checks of tokenize.py: python3 data/test_tokenize.py

Packed files, arrays and tables give the tokens of the plain text; what is no text is refused by
name.

With --chat, 200 turns are rendered with a template as Qwen3's, which leaves out earlier thinking.
The shards must hold the tokens that transformers' apply_chat_template gives, where transformers is
installed, and the masks must equal those of a scan that knows only where `<|im_start|>assistant`
and `<|im_end|>` stand. That needs the packages tokenizers and jinja2, and is left out without them.
"""

import gzip
import importlib
import json
import os
import random
import struct
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path = [
    folder for folder in sys.path if os.path.abspath(folder) != HERE
]  # for packages that import the standard library's `tokenize`
passed = failed = 0

# As Qwen3's chat template: system text and tools in one turn, tool results as user turns, thinking
# only in the turns after the last question, the calls of tools as JSON.
TEMPLATE = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- "# Tools\n\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string
        and not(message.content.startswith('<tool_response>')
        and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\n')
                    .split('<think>')[-1].lstrip('\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n')
                    + '\n</think>\n\n' + content.lstrip('\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}
                    {{- '\n' }}
                {%- endif %}
                {%- if tool_call.function %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {{- '<tool_call>\n{"name": "' }}
                {{- tool_call.name }}
                {{- '", "arguments": ' }}
                {{- tool_call.arguments | tojson }}
                {{- '}\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\n<tool_response>\n' + content + '\n</tool_response><|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
ADDED = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "</think>",
]


def check(good, what):
    global passed, failed
    passed, failed = passed + bool(good), failed + (not good)
    print("ok" if good else "FAILED", passed + failed, what)


def make_tokenizer(folder):
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )

    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    t = Tokenizer(models.BPE())
    t.normalizer = normalizers.NFC()
    t.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    t.decoder = decoders.ByteLevel()
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as f:
        text = f.read().split("\n")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    )
    t.add_tokens(
        [AddedToken(name, special=name.startswith("<|"), normalized=False) for name in ADDED]
    )
    t.save(os.path.join(folder, "tokenizer.json"))
    with open(os.path.join(folder, "tokenizer_config.json"), "w") as f:
        json.dump(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": "<|im_end|>",
                "pad_token": "<|endoftext|>",
                "chat_template": TEMPLATE,
            },
            f,
        )
    return t


def make_conversations(rng):
    """Conversations with 200 assistant turns or more: thinking, tools, line ends at either end,
    Unicode."""
    words = [
        "alpha",
        "Beta",
        "42",
        "naïve",
        "日本語",
        "e\u0301",
        "😀",
        "\n",
        "\n\n",
        "  ",
        "it's",
        "x=1;",
        "<think",
        "</s>",
    ]
    text = lambda: " ".join(rng.choice(words) for _ in range(rng.randrange(1, 12)))
    conversations, turns = [], 0
    while turns < 200:
        messages = [{"role": "system", "content": text()}] if rng.random() < 0.4 else []
        line = {"messages": messages}
        if rng.random() < 0.2:
            line["tools"] = [
                {"type": "function", "function": {"name": "look", "parameters": {"q": "ä"}}}
            ]
        for _ in range(rng.randrange(1, 5)):
            messages.append({"role": "user", "content": text()})
            kind = rng.random()
            if kind < 0.15:
                call = {"function": {"name": "look", "arguments": {"q": text()}}}
                messages.append(
                    {"role": "assistant", "content": rng.choice(["", text()]), "tool_calls": [call]}
                )
                messages.append({"role": "tool", "content": text()})
                turns += 1
            answer = rng.choice(["", "\n", " "]) + text() + rng.choice(["", "\n", "\n\n", " "])
            if kind > 0.6:
                answer = f"<think>\n{text()}\n</think>\n\n{answer}"
            message = {"role": "assistant", "content": answer}
            if 0.4 < kind < 0.5:
                message["reasoning_content"] = text()
            messages.append(message)
            turns += 1
        conversations.append(line)
    return conversations, turns


def run_bytes(folder, *options, **environment):
    command = [
        sys.executable,
        os.path.join(HERE, "tokenize.py"),
        "--force",
        "--out",
        f"{folder}/out/b",
        *options,
    ]
    done = subprocess.run(command, capture_output=True, env=dict(os.environ, **environment))
    return done.returncode, (done.stdout + done.stderr).decode("utf-8", "replace")


def byte_shard(folder):
    with open(f"{folder}/out/b_train_000000.bin", "rb") as f:
        return f.read()


def test_files(folder):
    """Bytes as tokens, so nothing has to be installed but what reads a format."""
    text = "naïve 日本\n" * 2000
    with open(f"{folder}/plain.txt", "w", encoding="utf-8") as f:
        f.write(text)
    run_bytes(folder, f"{folder}/plain.txt")
    plain = byte_shard(folder)
    for module, end in (("gzip", "gz"), ("bz2", "bz2"), ("lzma", "xz"), ("zstandard", "zst")):
        try:
            library = importlib.import_module(module)
        except ImportError:
            print(f"skipped: {module} is not installed")
            continue
        with library.open(f"{folder}/t.txt.{end}", "wb") as f:
            f.write(text.encode())
        status, said = run_bytes(folder, f"{folder}/t.txt.{end}")
        check(
            status == 0 and byte_shard(folder) == plain,
            f"text packed with {module}: {said[-80:] if status else 'the same tokens'}",
        )
        status, _ = run_bytes(folder, f"{folder}/t.txt.{end}", "--val-fraction", "0.25")
        with open(f"{folder}/out/b_val_000000.bin", "rb") as f:
            held = f.read()[1024:]
        joined = byte_shard(folder)[1024:-2] + held  # without the end of text after the first part
        check(
            status == 0 and joined == plain[1024:] and len(held) * 4 > len(plain) * 0.95,
            f"{module}: the last quarter is held out",
        )
    records = [{"text": "one"}, {"text": "zwei ä"}, {"text": ""}, {"text": "3"}]
    write(folder, records, "r.jsonl")
    run_bytes(folder, f"{folder}/r.jsonl")
    lines = byte_shard(folder)
    with open(f"{folder}/r.json", "w") as f:
        json.dump(records, f, indent=1)
    check(
        run_bytes(folder, f"{folder}/r.json")[0] == 0 and byte_shard(folder) == lines,
        "a JSON array gives the tokens of its lines",
    )
    try:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), f"{folder}/r.parquet")
        check(
            run_bytes(folder, f"{folder}/r.parquet")[0] == 0 and byte_shard(folder) == lines,
            "a parquet file gives the tokens of its rows",
        )
        status, said = run_bytes(folder, f"{folder}/r.parquet", "--key", "body")
        check(
            status == 1 and "row 1" in said and "body" in said, "error: a column that is not there"
        )
    except ImportError:
        print("skipped: pyarrow is not installed")
    for head, word in (
        (plain[:600], "a token shard"),
        (b"%PDF-1.4", "a PDF"),
        (b"PK\x03\x04", "a zip archive"),
        (b"\x93NUMPY\1\0", "a numpy array"),
        (bytes(257) + b"ustar\0", "a tar archive"),
        (gzip.compress(b"x" * 999)[:-5], "damaged"),
        (b"PAR1", "parquet"),
        (gzip.compress(gzip.compress(b"x")), "packed file inside"),
        (gzip.compress(b"PK\x03\x04"), "a zip archive"),
    ):
        with open(f"{folder}/x.txt", "wb") as f:
            f.write(head)
        status, said = run_bytes(folder, f"{folder}/x.txt")
        check(
            status == 1 and word in said and "x.txt" in said and said.count("\n") == 1,
            f"refused: {word}",
        )
    check(byte_shard(folder)[:4] == plain[:4], "a refused file leaves the earlier shards")
    status, said = run_bytes(
        folder, f"{folder}/plain.txt", PYTHONIOENCODING="ascii", LC_ALL="C", PYTHONUTF8="0"
    )
    check(
        status == 0 and "\\xef" in said,
        "a terminal of ASCII does not end a run whose text it cannot show",
    )


def run(folder, *options):
    command = [
        sys.executable,
        os.path.join(HERE, "tokenize.py"),
        "--tokenizer",
        f"{folder}/tok/tokenizer.json",
        "--chat",
        "--force",
        "--out",
        f"{folder}/out/c",
        *options,
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env=dict(os.environ, PYTHONIOENCODING="utf-8")
    )
    return done.returncode, done.stdout + done.stderr


def shard(folder, name="c_train_000000"):
    with open(f"{folder}/out/{name}.bin", "rb") as f:
        head = struct.unpack("<256I", f.read(1024))
        ids = list(struct.unpack(f"<{head[2]}H", f.read()))
    with open(f"{folder}/out/{name}.mask", "rb") as f:
        mask_head, mask = struct.unpack("<256I", f.read(1024)), list(f.read())
    check(
        mask_head[:3] == (20260520, 1, head[2]) and len(mask) == head[2],
        f"{name}: the mask has its shard's length",
    )
    return ids, mask


def write(folder, lines, name="c.jsonl"):
    path = f"{folder}/{name}"
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(
            (line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)) + "\n"
            for line in lines
        )
    return path


def scan(ids, t):
    """The mask by another way: everything between `<|im_start|>assistant\\n` and `<|im_end|>`, that
    token included."""
    start, end = t.token_to_id("<|im_start|>"), t.token_to_id("<|im_end|>")
    mask, i = [0] * len(ids), 0
    while i < len(ids):
        n = i + 1
        if ids[i] == start:
            while "\n" not in t.decode(ids[i + 1 : n], skip_special_tokens=False):
                n += 1
            stop = ids.index(end, n)
            if t.decode(ids[i + 1 : n], skip_special_tokens=False).startswith("assistant\n"):
                mask[n : stop + 1] = [1] * (stop + 1 - n)
            n = stop + 1
        i = n
    return mask


def test_turns(folder, t):
    conversations, turns = make_conversations(random.Random(7))
    status, said = run(folder, write(folder, conversations))
    check(
        status == 0,
        f"{turns} turns in {len(conversations)} conversations: "
        f"{said[-200:] if status else 'tokenized'}",
    )
    ids, mask = shard(folder)
    check(mask == scan(ids, t), "the mask equals that of a scan for the borders of turns")
    check(
        0 < sum(mask) < len(mask) and f"{sum(mask):,} tokens count" in said,
        "the number of tokens that count is said",
    )
    try:
        import transformers
    except ImportError:
        print("skipped: the comparison with apply_chat_template needs transformers")
        return
    reference = transformers.AutoTokenizer.from_pretrained(f"{folder}/tok")
    expected = []
    for line in conversations:
        expected += reference.apply_chat_template(
            line["messages"], tools=line.get("tools"), tokenize=True, return_dict=False
        )
        expected.append(t.token_to_id("<|endoftext|>"))
    check(
        ids == expected,
        f"{len(ids):,} tokens equal apply_chat_template's of transformers "
        f"{transformers.__version__}",
    )


def test_kinds(folder, t):
    lines = [
        {"prompt": "one", "completion": "two"},
        {"text": "three"},
        {
            "prompt": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"},
            ],
            "completion": [{"role": "assistant", "content": "d"}],
        },
        {"messages": [{"role": "user", "content": "only asked"}]},
    ]
    status, said = run(folder, write(folder, lines))
    ids, mask = shard(folder)
    counted = t.decode([i for i, m in zip(ids, mask) if m], skip_special_tokens=False)
    thought = "<think>\n\n</think>\n\n"
    check(
        counted == f"{thought}two<|im_end|>three<|endoftext|>{thought}d<|im_end|>",
        f"prompt and completion, text, lists of messages: {counted!r}",
    )
    check("1 without a turn that counts" in said, "a conversation without an answer is said")
    with gzip.open(f"{folder}/c.jsonl.gz", "wb") as f, open(f"{folder}/c.jsonl", "rb") as plain:
        f.write(plain.read())
    run(folder, f"{folder}/c.jsonl.gz")
    check(shard(folder) == (ids, mask), "a packed file gives the same")
    with open(f"{folder}/c.json", "w") as f:
        json.dump(lines, f)
    run(folder, f"{folder}/c.json")
    check(shard(folder) == (ids, mask), "a JSON array gives the same")
    run(folder, f"{folder}/c.jsonl", "--shard-tokens", "7")
    parts = sorted(
        name[:-4]
        for name in os.listdir(f"{folder}/out")
        if name.startswith("c_") and name.endswith(".bin")
    )
    joined = [shard(folder, name) for name in parts]
    check(
        len(parts) > 3 and [sum((p[k] for p in joined), []) for k in (0, 1)] == [ids, mask],
        "shards of 7 tokens hold the same",
    )

    # the first conversation has 12 or more tokens, the text has few
    status, said = run(folder, f"{folder}/c.jsonl", "--max-len", "8")
    kept = shard(folder)
    check(
        t.decode(kept[0], skip_special_tokens=False) == "three<|endoftext|>"
        and "3 conversations of more than 8 tokens dropped" in said,
        "--max-len drops long conversations and counts them",
    )
    status, said = run(folder, f"{folder}/c.jsonl", "--max-len", "8", "--too-long", "cut")
    cut = shard(folder)
    check(
        cut[0][:9] == ids[:8] + [t.token_to_id("<|endoftext|>")]
        and cut[1][:9] == mask[:8] + [0]
        and "3 cut" in said,
        "--too-long cut keeps the first tokens and counts what was cut",
    )


def test_errors(folder):
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    cases = [
        ([{"messages": [user, answer]}, {"conversations": []}], "line 2", "neither messages"),
        ([{"messages": []}], "line 1", "empty"),
        ([{"messages": [user, {"content": "b"}]}], "turn 2", "no role"),
        ([{"messages": [user, {"role": "assistant", "content": [1]}]}], "turn 2", "no text"),
        (["{"], "line 1", "not JSON"),
        ([[1]], "line 1", "no JSON object"),
    ]
    for lines, *words in cases:
        status, said = run(folder, write(folder, lines))
        check(
            status == 1
            and said.startswith("error: ")
            and said.count("\n") == 1
            and all(w in said for w in words)
            and "hint: " in said,
            f"error: {said.strip()[-120:]}",
        )
    # this template writes the number of letters of the answer in front of the question
    with open(f"{folder}/odd.jinja", "w") as f:
        f.write(
            "{% for m in messages %}{{ messages[-1].content|length }}<|im_start|>{{ m.role }}\n{{ "
            "m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
    lines = write(folder, [{"messages": [user, answer]}])
    status, said = run(folder, lines, "--chat-template", f"{folder}/odd.jinja")
    check(
        status == 1 and "line 1: turn 2" in said and "beyond the turn itself" in said,
        "a template that rewrites other turns is refused by line and turn",
    )
    with open(f"{folder}/raise.jinja", "w") as f:
        f.write(
            "{% if messages|length > 2 %}{{ raise_exception('too many') }}{% endif %}" + TEMPLATE
        )
    lines = write(
        folder, [{"messages": [user, answer]}, {"messages": [user, answer, user, answer]}]
    )
    status, said = run(folder, lines, "--chat-template", f"{folder}/raise.jinja")
    check(
        status == 1 and "line 2" in said and "too many" in said,
        "what a template refuses is said with the line",
    )
    for options, word in (
        (["--chat-template", f"{folder}/absent"], "cannot be read"),
        (["--max-len", "1"], "below 2"),
    ):
        status, said = run(folder, lines, *options)
        check(status == 1 and word in said, f"error: {said.strip()[-100:]}")


def main():
    with tempfile.TemporaryDirectory() as folder:
        os.mkdir(f"{folder}/out")
        test_files(folder)
        try:
            os.mkdir(f"{folder}/tok")
            importlib.import_module("jinja2")
            t = make_tokenizer(f"{folder}/tok")
            test_turns(folder, t)
            test_kinds(folder, t)
            test_errors(folder)
        except ImportError as e:
            print(f"skipped: conversations, {e.name} is not installed")
    print(f"{passed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
