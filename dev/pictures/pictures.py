#!/usr/bin/env python3
"""Draws the chapters' pictures as SVG, beside this script.

    python3 dev/pictures/pictures.py [--theme light|dark] [--out FOLDER]

Colours follow the reader's light or dark theme; --theme fixes one of them, for looking at the
pictures with a program that knows no themes. Needs nothing but Python.
"""

import argparse
import pathlib
from xml.sax.saxutils import escape

# name: light, dark. `ink` writes, `line` draws, the others fill boxes (with ink on them).
COLOURS = {
    "ink": ("#1f2328", "#e6edf3"),
    "soft": ("#57606a", "#9da7b3"),
    "line": ("#8c959f", "#6e7681"),
    "paper": ("#ffffff", "#0d1117"),
    "blue": ("#cfe4ff", "#1b4b8a"),
    "green": ("#cdeed5", "#1f5f35"),
    "orange": ("#ffe0c2", "#8a4b14"),
    "purple": ("#e6dbff", "#553a91"),
    "grey": ("#e7eaee", "#343b44"),
}


class Picture:
    def __init__(self, width, height, title):
        self.width, self.height, self.title, self.parts = width, height, title, []

    def box(self, x, y, w, h, fill="grey", text="", size=14, dashed=False, bold=False):
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="5" class="f-{fill} edge"{dash}/>'
        )
        lines = text.split("\n") if text else []
        top = y + h / 2 - (len(lines) - 1) * (size + 4) / 2 + size * 0.35
        for i, line in enumerate(lines):
            self.text(x + w / 2, top + i * (size + 4), line, size, "middle", bold=bold)

    def text(self, x, y, text, size=14, anchor="start", colour="ink", bold=False, mono=False):
        weight = ' font-weight="600"' if bold else ""
        family = ' font-family="ui-monospace, monospace"' if mono else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" '
            f'class="t-{colour}"{weight}{family}>{escape(text)}</text>'
        )

    def caption(self, y, text, size):
        self.text(24, y, text, size, colour="soft")

    def line(self, points, arrow=True, dashed=False):
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        end = ' marker-end="url(#arrow)"' if arrow else ""
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(f'<polyline points="{path}" class="stroke"{end}{dash}/>')

    def svg(self, theme):
        def rules(i):
            fills = "".join(
                f".f-{n}{{fill:{c[i]}}}.t-{n}{{fill:{c[i]}}}" for n, c in COLOURS.items()
            )
            line = COLOURS["line"][i]
            return (
                f"{fills}.edge{{stroke:{line}}}"
                f".stroke{{stroke:{line};fill:none;stroke-width:1.6}}.head{{fill:{line}}}"
            )

        style = rules(theme == "dark")
        if theme == "both":
            style += "@media (prefers-color-scheme: dark){" + rules(1) + "}"
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" '
            f'font-family="system-ui, sans-serif" role="img" aria-label="{escape(self.title)}">\n'
            f"<style>{style}</style>\n"
            '<defs><marker id="arrow" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
            'markerHeight="7" orient="auto-start-reverse">'
            '<path d="M0,0 L10,5 L0,10 z" class="head"/></marker></defs>\n'
            f'<rect width="{self.width}" height="{self.height}" rx="8" class="f-paper"/>\n'
            + "\n".join(self.parts)
            + "\n</svg>\n"
        )


def one_update():
    """Layers outside, micro-batches inside, down and up again."""
    p = Picture(960, 470, "One update: layers outside, micro-batches inside, in both directions")
    p.text(24, 34, "One update", 20, bold=True)
    p.caption(
        58,
        "Layers are the outer loop and micro-batches the inner one, in both directions.",
        14,
    )
    left, width = 60, 330
    rows = [("embedding", "grey"), ("layer 0", "blue"), ("layer 1", "blue"), ("layer 2", "blue")]
    for i, (name, fill) in enumerate(rows):
        y = 100 + i * 66
        p.box(left, y, width, 44, fill)
        p.text(left + 12, y + 27, name, 14, bold=True)
        for m in range(3):
            p.box(left + 110 + m * 72, y + 9, 62, 26, "paper", f"batch {m}", 12)
        if i:
            p.line([(left + width / 2, y - 22), (left + width / 2, y - 2)])
    p.box(
        left,
        372,
        840,
        48,
        "orange",
        "head: logits, loss and their gradient, in chunks of tokens;\nthe (tokens, vocabulary) "
        "matrix never exists",
        13,
    )
    p.line([(left + width / 2, 342), (left + width / 2, 370)])
    right = 570
    for i, (name, fill) in enumerate(rows):
        y = 100 + i * 66
        p.box(right, y, width, 44, "green" if fill == "blue" else "grey")
        p.text(right + 12, y + 27, name, 14, bold=True)
        for m in range(3):
            p.box(right + 110 + m * 72, y + 9, 62, 26, "paper", f"batch {m}", 12)
        if i:
            p.line([(right + width / 2, y - 2), (right + width / 2, y - 20)])
    p.line([(right + width / 2, 370), (right + width / 2, 344)])
    p.text(left + width / 2, 92, "forward", 14, "middle", "soft")
    p.text(right + width / 2, 92, "backward", 14, "middle", "soft")
    for i in range(1, 4):
        y = 122 + i * 66
        p.line([(left + width + 2, y), (right - 4, y)], dashed=True)
        p.text(480, y - 7, "layer input, routing", 12, "middle", "soft")
    p.caption(
        448,
        "Before a layer its weights are gathered, once in each direction. After its backward its "
        "gradient is complete for all",
        13,
    )
    p.caption(
        464,
        "micro-batches: it is reduced while the layer before it computes, and with --update layer "
        "stepped at once.",
        13,
    )
    p.height = 484
    return p


def dispatch():
    """Two ranks, three tokens each, four experts, two a token."""
    p = Picture(960, 560, "Dispatch and combine for two ranks")
    p.text(24, 34, "Dispatch and combine", 20, bold=True)
    p.caption(
        58,
        "Two ranks, three tokens each, four experts, two experts for each token. Below a token: "
        "the experts it chose.",
        14,
    )
    colours = {"a": "blue", "b": "blue", "c": "blue", "d": "green", "e": "green", "f": "green"}
    chosen = {"a": "0 1", "b": "1 3", "c": "2 3", "d": "0 2", "e": "2 3", "f": "0 1"}
    for rank, x in ((0, 140), (1, 600)):
        p.box(x - 20, 78, 330, 466, "paper", dashed=True)
        p.text(
            x + 145,
            98,
            f"rank {rank}: experts {2 * rank} and {2 * rank + 1}",
            14,
            "middle",
            bold=True,
        )

    def tokens(y, rank, names, suffix="", width=56):
        x0 = (140, 600)[rank] + 145 - len(names) * (width + 8) / 2
        at = {}
        for i, n in enumerate(names):
            x = x0 + i * (width + 8)
            p.box(x, y, width, 30, colours[n[0]], n + suffix, 14)
            at[n] = x + width / 2
        return at

    top = [tokens(110, 0, "abc"), tokens(110, 1, "def")]
    for r in (0, 1):
        for n, x in top[r].items():
            p.text(x, 156, chosen[n], 12, "middle", "soft", mono=True)
    pool = [tokens(226, 0, "abdf"), tokens(226, 1, "bcde")]
    home = {n: top[0].get(n) or top[1].get(n) for n in "abcdef"}
    for r in (0, 1):
        for n, x in pool[r].items():
            p.line([(home[n], 162), (x, 224)])
    p.text(24, 196, "dispatch", 14, bold=True)
    p.text(24, 246, "pool", 14, bold=True)
    rows = [("adf", "abf"), ("cde", "bce")]
    p.text(24, 322, "rows", 14, bold=True)
    for r in (0, 1):
        x0 = (140, 600)[r]
        for g in (0, 1):
            for i, n in enumerate(rows[r][g]):
                p.box(x0 + 4 + g * 152 + i * 44, 302, 40, 30, colours[n], n, 14)
            p.box(x0 + 4 + g * 152, 344, 128, 30, "orange", f"expert {2 * r + g}", 13)
        p.line([(x0 + 145, 260), (x0 + 145, 298)])
        p.text(x0 + 155, 284, "sorted by expert", 12, colour="soft")
        p.line([(x0 + 145, 376), (x0 + 145, 408)])
        p.text(x0 + 155, 398, "weighted sum", 12, colour="soft")
    parts = [tokens(412, 0, "abdf", "'"), tokens(412, 1, "bcde", "'")]
    p.text(24, 432, "partial", 14, bold=True)
    p.text(24, 449, "outputs", 14, bold=True)
    out = [tokens(500, 0, "abc"), tokens(500, 1, "def")]
    home = {n: out[0].get(n) or out[1].get(n) for n in "abcdef"}
    for r in (0, 1):
        for n, x in parts[r].items():
            p.line([(x, 444), (home[n], 498)])
    p.text(24, 478, "combine", 14, bold=True)
    p.text(24, 520, "outputs", 14, bold=True)
    return p


def grid():
    """dp 2, fsdp 2, ep 2."""
    p = Picture(960, 400, "The grid: dp 2, fsdp 2, ep 2, and its groups")
    p.text(24, 34, "The grid: --dp 2 --fsdp 2 --ep 2", 20, bold=True)
    p.caption(
        58,
        "rank = (dp * FSDP + fsdp) * EP + ep. Each rank reads its own tokens; ep neighbours hold "
        "different experts.",
        14,
    )
    experts = ("experts 0-63", "experts 64-127")
    for d in (0, 1):
        x = 56 + d * 270
        p.text(x + 125, 92, f"dp {d}: a copy of the model", 14, "middle", bold=True)
        for f in (0, 1):
            for e in (0, 1):
                rank = (d * 2 + f) * 2 + e
                p.box(x + e * 128, 104 + f * 104, 120, 92, ("blue", "purple")[e])
                p.text(x + e * 128 + 60, 128 + f * 104, f"rank {rank}", 15, "middle", bold=True)
                p.text(x + e * 128 + 60, 150 + f * 104, f"half {f} of", 12, "middle")
                p.text(x + e * 128 + 60, 166 + f * 104, experts[e], 12, "middle")
                p.text(
                    x + e * 128 + 60, 184 + f * 104, f"dense part {2 * f + e} of 4", 12, "middle"
                )
    for f in (0, 1):
        p.text(30, 156 + f * 104, f"fsdp {f}", 12, "middle", "soft")
    for d in (0, 1):
        for e in (0, 1):
            p.text(116 + d * 270 + e * 128, 328, f"ep {e}", 12, "middle", "soft")
    x = 616
    groups = [
        ("ep", "0 1 | 2 3 | 4 5 | 6 7", "tokens travel to experts and back"),
        ("fsdp", "0 2 | 1 3 | 4 6 | 5 7", "shards of the same experts"),
        ("dense", "0 1 2 3 | 4 5 6 7", "shards of everything else"),
        ("dp", "0 4 | 1 5 | 2 6 | 3 7", "gradients of copies are summed"),
    ]
    p.text(x, 92, "groups", 14, bold=True)
    for i, (name, ranks, what) in enumerate(groups):
        y = 118 + i * 54
        p.text(x, y, name, 14, bold=True)
        p.text(x + 60, y, ranks, 14, mono=True)
        p.text(x + 60, y + 19, what, 13, colour="soft")
    p.text(
        24,
        362,
        "Gradient of an expert: summed over fsdp and dp, never over ep, because every token that "
        "chose it came to it.",
        13,
    )
    p.text(
        24,
        382,
        "Gradient of anything else: summed over fsdp, ep and dp, because every rank has read other "
        "tokens.",
        13,
    )
    return p


def memory():
    """The whole 30B model on one GPU, by ./train_moe --plan."""
    p = Picture(960, 330, "Memory of one GPU training all of Qwen3-30B-A3B")
    p.text(
        24,
        34,
        "Memory of one GPU of 141 GB, training every parameter of Qwen3-30B-A3B",
        20,
        bold=True,
    )
    p.caption(
        58,
        "--update layer --optimizer adamw8bit --master off --recompute layer --batch 16 --seq-len "
        "4096, by --plan: 133.0 of 139 GiB",
        13,
    )
    items = [
        ("weights, bf16", 56.9, "blue"),
        ("optimizer state, 8 bit", 57.8, "purple"),
        ("layer inputs of 65,536 tokens, routing", 14.2, "green"),
        ("gradients alive at once", 3.5, "orange"),
        ("buffers", 0.7, "grey"),
    ]
    x, scale = 24, 910 / 139.0
    for name, size, fill in items:
        p.box(
            round(x, 1),
            80,
            round(size * scale, 1),
            70,
            fill,
            f"{size:.1f} GiB" if size > 10 else "",
            15,
        )
        x += size * scale
    p.box(round(x, 1), 80, round(934 - x, 1), 70, "paper", dashed=True)
    for i, (name, size, fill) in enumerate(items):
        col, row = i % 2, i // 2
        p.box(24 + col * 460, 168 + row * 28, 18, 18, fill)
        p.text(50 + col * 460, 182 + row * 28, f"{size:.1f} GiB   {name}", 14)
    p.box(24 + 460, 224, 18, 18, "paper", dashed=True)
    p.text(510, 238, "6.0 GiB   free", 14)
    p.caption(
        278,
        "The usual recipe needs 16 bytes a parameter for weights, gradients, fp32 masters and "
        "moments: 455 GiB before any token.",
        13,
    )
    p.caption(
        298,
        "Here: 2 bytes of weight and 2 of state a parameter, gradients of one layer at a time, and "
        "layer inputs in place of activations.",
        13,
    )
    return p


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--theme", choices=("both", "light", "dark"), default="both")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    args = parser.parse_args()
    for draw in (one_update, dispatch, grid, memory):
        (args.out / (draw.__name__ + ".svg")).write_text(draw().svg(args.theme))


if __name__ == "__main__":
    main()
