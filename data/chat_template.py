"""Conversations as token ids, with a mark at every token that the assistant wrote.

The text is what transformers' apply_chat_template gives for the whole conversation, so a template
may rewrite earlier turns: Qwen3's leaves out earlier thinking. Each assistant turn is found in that
text by rendering the conversation once more with another content in that turn only, a word that
occurs nowhere else: what stands in front of the turn and what follows it must then be the same. The
turn begins after the generation prompt ("<|im_start|>assistant" and a line end in Qwen's template)
and ends with the end-of-turn token. Needs Jinja2.
"""

import datetime
import json
import os

MARK = "moeCassistantXturnXmarkQ7"


class Refused(Exception):
    """What is wrong with a conversation, and what to do about it."""


def load_template(folder, path):
    """Template text and special tokens of the tokenizer in this folder; path: the template's
    file."""
    config = {}
    name = os.path.join(folder, "tokenizer_config.json")
    if os.path.exists(name):
        with open(name, encoding="utf-8") as f:
            config = json.load(f)
    beside = os.path.join(folder, "chat_template.jinja")
    if path or os.path.exists(beside):
        with open(path or beside, encoding="utf-8") as f:
            text = f.read()
    else:
        text = config.get("chat_template")
        if isinstance(text, list):  # several by name
            text = {t["name"]: t["template"] for t in text}.get("default")
    special = {}
    for key in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"):
        token = config.get(key + "_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token:
            special[key + "_token"] = token
    return text, special


def compile_template(text):
    """The template in transformers' environment, with its filters, functions and tags."""
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %} renders as what is inside."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(text)


class Chat:
    def __init__(self, text, special, added):
        """text: of the template. added: contents of the tokenizer's added tokens."""
        self.template, self.special = compile_template(text), special
        self.added = sorted(added, key=len, reverse=True)
        asked = [{"role": "user", "content": "x"}]
        plain = self.render(asked)
        prompt = self.render(asked, add_generation_prompt=True)
        # "" where a template has no generation prompt: a turn then begins with its content
        self.prompt = prompt[len(plain) :] if prompt.startswith(plain) else ""
        answered = self.render(asked + [{"role": "assistant", "content": MARK}])
        after = answered[answered.find(MARK) + len(MARK) :] if MARK in answered else ""
        self.end = next((t for t in self.added if after.lstrip().startswith(t)), "")

    def render(self, messages, add_generation_prompt=False, tools=None):
        try:
            return self.template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special,
            )
        except Exception as e:  # a template raises whatever it likes
            raise Refused(f"the chat template refuses it: {e}") from e

    def turns(self, messages, marked, tools=None):
        """The text of a conversation and [begin, end) of each assistant turn in it that is
        marked."""
        text = self.render(messages, tools=tools)
        if MARK in text:
            raise Refused(f"it has the word {MARK}, which marks turns here")
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or i not in marked:
                continue
            other = self.render(
                messages[:i] + [dict(message, content=MARK)] + messages[i + 1 :], tools=tools
            )
            at = other.find(MARK)
            begin = other.rfind(self.prompt, 0, at) + len(self.prompt) if self.prompt else at
            end = other.find(self.end, at + len(MARK)) if self.end else at + len(MARK)
            shift = len(text) - len(other)
            found = at >= 0 and begin >= len(self.prompt) and end >= 0
            if not found or other[:begin] != text[:begin] or other[end:] != text[end + shift :]:
                raise Refused(
                    f"turn {i + 1}: the chat template writes this assistant turn in a way "
                    "that depends on its content beyond the turn itself"
                )
            spans.append((begin, end + shift + len(self.end)))
        return text, spans


def conversation(line):
    """Messages of a JSON object, the indices of those that may count, tools; or a text: (str, 0,
    0)."""
    if not isinstance(line, dict):
        raise Refused("it is no JSON object")
    if "messages" in line:
        messages, first = line["messages"], 0
    elif "prompt" in line and "completion" in line:
        prompt, completion = line["prompt"], line["completion"]
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        if not isinstance(prompt, list) or not isinstance(completion, list):
            raise Refused("prompt and completion must be texts or lists of messages")
        messages, first = prompt + completion, len(prompt)
    elif isinstance(line.get("text"), str):
        return line["text"], (), None
    else:
        raise Refused("it has neither messages, nor prompt and completion, nor text")
    if not isinstance(messages, list) or not messages:
        raise Refused("its messages are no list, or an empty one")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Refused(f"turn {i + 1} has no role")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and "tool_calls" in message):
            raise Refused(f"turn {i + 1} has a content that is no text")
    return messages, range(first, len(messages)), line.get("tools")


def mark(offsets, spans, size):
    """One byte a token, 1 where the token begins inside a span. offsets: (begin, end) of each."""
    marks = bytearray(size)
    k = 0
    for i, (begin, _) in enumerate(offsets):
        while k < len(spans) and begin >= spans[k][1]:
            k += 1
        if k < len(spans) and begin >= spans[k][0]:
            marks[i] = 1
    return bytes(marks)
