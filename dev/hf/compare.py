#!/usr/bin/env python3
"""Compares training runs (log.jsonl) and first updates (--dump files), whatever program wrote them.

    python dev/hf/compare.py curves A/log.jsonl B/log.jsonl [more...] [--names NAME...] \\
        [--out plot.png] [--tol X] [--ranges 1-60 101-200]
    python dev/hf/compare.py dumps A.safetensors B.safetensors [--tol 2e-5] [--show 10]
    python dev/hf/compare.py bf16 OURS.safetensors THEIRS.safetensors TRUTH.safetensors [--factor 2]

curves: the first file is compared with each of the others, and the others among themselves (that
        is the noise to judge the first one by). Prints mean and largest absolute difference of the
        loss per range of steps; --out draws the curves and the differences below them.
dumps:  A is judged against B. Deviations are norm-wise: |a - b| / |b|, where |b| is at least 1e-7
        of the norm of all gradients (a gradient that is zero by algebra and rounding noise in one
        of the programs is no deviation). Names the first tensor in order of computation that is
        beyond the tolerance, then the largest deviations. A bug shows in the first tensor; the rest
        is its consequence. Where both hold the routing (topk), tells for each MoE layer how many
        tokens have other experts, and the margins of those tokens: the gap between the router
        logits of the last expert chosen and the first rejected, in B where it holds them. A flip
        with a margin above rounding is no near tie.
bf16:   OURS and THEIRS are first updates in bf16 with the routing of TRUTH, which is fp32. Every
        tensor's error against TRUTH is at most --factor times that of THEIRS (FlashAttention's
        rule), with a floor of 2^-9 of the norm of a tensor that THEIRS happens to hit.

Exit status: 0 within --tol (or none given for curves), 1 beyond it, 2 for input that cannot be
compared.
"""

import argparse
import itertools
import json
import math
import os
import re
import sys


def die(what, hint):
    print(f"error: {what}, hint: {hint}", file=sys.stderr)
    sys.exit(2)


try:
    import numpy as np
except ImportError:
    die("numpy is missing", "pip install numpy safetensors matplotlib")


# ---- dumps ---------------------------------------------------------------------------------------

# Backward order inside a decoder layer, as fragments of Hugging Face names.
LAYER_ORDER = [
    "down_proj",
    "up_proj",
    "gate_proj",
    "mlp.gate.",
    "post_attention_layernorm",
    "o_proj",
    "v_proj",
    "q_norm",
    "k_norm",
    "q_proj",
    "k_proj",
    "input_layernorm",
]


def order(name):
    """Sort key: logits, losses, then the gradients in the order in which backward computes them,
    head first and embedding last."""
    head = ["logits", "loss", "aux", "z", "grad.lm_head.weight", "grad.model.norm.weight"]
    if name in head:
        return (head.index(name),)
    layer = re.match(r"grad\.model\.layers\.(\d+)\.(.*)", name)
    if layer:
        kind = next((i for i, part in enumerate(LAYER_ORDER) if part in layer[2]), len(LAYER_ORDER))
        return (10, -int(layer[1]), kind, *map(int, re.findall(r"experts\.(\d+)", name)), name)
    return (11, name) if "embed" in name else (12, name)


def opener(*paths):
    try:
        from safetensors import safe_open
    except ImportError:
        die("safetensors is missing", "pip install safetensors")
    for path in paths:
        if not os.path.exists(path):
            die(f"{path}: no such file", "give files written by --dump")
    return safe_open


def routings(A, B, a, b):
    """Prints how the choices of experts differ, layer by layer; the number of tokens that differ,
    or None where a file holds none."""
    if "topk" not in A.keys() or "topk" not in B.keys():
        return None
    x, y = A.get_tensor("topk"), B.get_tensor("topk")
    x, y = (t.reshape(t.shape[0], -1, t.shape[-1]) for t in (x, y))
    if x.shape != y.shape:
        die(
            f"topk: {x.shape} in {a}, {y.shape} in {b}",
            "the runs differ in batch, sequence length or model",
        )
    differ = (np.sort(x, -1) != np.sort(y, -1)).any(-1)
    print(f"routing: {differ.sum()} of {differ.size} (layer, token) pairs have other experts")
    source = B if "router" in B.keys() else A if "router" in A.keys() else None
    for layer in np.flatnonzero(differ.any(1)):
        first = np.flatnonzero(differ[layer])[0]
        text = f"  layer {layer}: {differ[layer].sum()} of {differ.shape[1]} tokens, first {first}"
        if source is not None:
            logits = (
                source.get_tensor("router")[layer]
                .astype(np.float64)
                .reshape(differ.shape[1], -1)[differ[layer]]
            )
            logits = -np.sort(-logits, -1)
            gap = logits[:, x.shape[-1] - 1] - logits[:, x.shape[-1]]
            text += f"; margins {gap.min():.2e} (closest) to {gap.max():.2e}"
        print(text)
    return int(differ.sum())


def bf16(a):
    safe_open = opener(a.ours, a.theirs, a.truth)
    rows = []
    with safe_open(a.ours, "np") as O, safe_open(a.theirs, "np") as H, safe_open(
        a.truth, "np"
    ) as T:
        for name, file in ((a.ours, O), (a.theirs, H)):
            if routings(file, T, name, a.truth):
                die(f"{name} has another routing than {a.truth}", "replay it: --routing-replay")
        for n in sorted(
            (n for n in T.keys() if n in ("logits", "loss", "aux") or n.startswith("grad.")),
            key=order,
        ):
            if n not in O.keys() or n not in H.keys():
                die(f"{n} is not in all three files", "give dumps of the same model")
            o, h, t = (f.get_tensor(n).astype(np.float64).ravel() for f in (O, H, T))
            norm = max(np.linalg.norm(t), 1e-300)
            ours, theirs = np.linalg.norm(o - t) / norm, np.linalg.norm(h - t) / norm
            rows.append((ours / max(theirs, 2.0**-9), ours, theirs, n))
    bad = [r for r in rows if not r[0] <= a.factor]
    print(
        f"bf16 against fp32, {len(rows)} tensors: median error "
        f"{np.median([r[1] for r in rows]):.2e} here, {np.median([r[2] for r in rows]):.2e} in "
        f"transformers; {len(bad)} beyond {a.factor:g} times theirs"
    )
    for ratio, ours, theirs, n in sorted(rows, reverse=True)[: a.show]:
        print(f"  {ratio:5.2f} x  {ours:9.2e} here {theirs:9.2e} there  {n}")
    return 1 if bad else 0


def dumps(a):
    safe_open = opener(a.a, a.b)
    with safe_open(a.a, "np") as A, safe_open(a.b, "np") as B:
        routings(A, B, a.a, a.b)
        names_a, names_b = set(A.keys()), set(B.keys())
        known = lambda n: n in ("logits", "loss", "aux", "z") or n.startswith("grad.")
        for path, missing in ((a.b, names_a - names_b), (a.a, names_b - names_a)):
            missing = sorted(filter(known, missing))
            if missing:
                print(f"not in {path}: {len(missing)} tensors, first {missing[0]}")
        absent = any(n.startswith("grad.") for n in names_a ^ names_b)
        names = sorted(filter(known, names_a & names_b), key=order)
        if not names:
            die("the files have no tensor in common", "give two files written by --dump")
        rows, squares = [], 0.0
        for n in names:
            x, y = A.get_tensor(n).astype(np.float64), B.get_tensor(n).astype(np.float64)
            if x.shape != y.shape and x.size == y.size:
                x = x.reshape(y.shape)  # a scalar may be () or (1)
            if x.shape != y.shape:
                die(
                    f"{n}: {x.shape} in {a.a}, {y.shape} in {a.b}",
                    "the runs differ in batch, sequence length or model",
                )
            d = np.abs(x - y)
            at = np.unravel_index(np.argmax(d), d.shape) if d.size and d.ndim else ()
            rows.append(
                (
                    n,
                    np.linalg.norm(x - y),
                    np.linalg.norm(y),
                    d.max(initial=0.0),
                    at,
                    np.isfinite(x).all() and np.isfinite(y).all(),
                )
            )
            squares += np.linalg.norm(y) ** 2 if n.startswith("grad.") else 0.0
    floor = 1e-7 * math.sqrt(squares)
    scored = [
        (
            d / max(norm, floor if n.startswith("grad.") else 0.0, 1e-300) if finite else math.inf,
            n,
            norm,
            most,
            at,
        )
        for n, d, norm, most, at, finite in rows
    ]

    def line(e, n, norm, most, at):
        place = tuple(map(int, at))
        return f"  {e:9.2e}  |b| {norm:9.2e}  largest {most:9.2e} at {place!s:16}  {n}"

    first = next((row for row in scored if not row[0] <= a.tol), None)
    for row in scored[:4]:
        if not row[1].startswith("grad."):
            print(line(*row))
    if first:
        print(f"first tensor in order of computation beyond {a.tol:g}:\n{line(*first)}")
        print(
            f"{sum(not row[0] <= a.tol for row in scored)} of {len(scored)} tensors are beyond the "
            "tolerance"
        )
    else:
        print(
            f"all {len(scored)} tensors agree within {a.tol:g}; median "
            f"{np.median([row[0] for row in scored]):.2e}"
        )
    print("largest deviations:")
    for row in sorted(scored, key=lambda row: -row[0])[: a.show]:
        print(line(*row))
    return 1 if first or absent else 0


# ---- curves --------------------------------------------------------------------------------------


def read_losses(path):
    """{step: loss} of a log; evaluation lines have no loss. A non-finite loss is nan."""
    if not os.path.exists(path):
        die(f"{path}: no such file", "give the log.jsonl of each run")
    out = {}
    for i, text in enumerate(open(path), 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            die(f"{path}:{i}: not a JSON object", "is it a log.jsonl?")
        if "loss" in line:
            out[line["step"]] = math.nan if line["loss"] is None else line["loss"]
    return out or die(f"{path}: no update in it", "the run has not finished its first step")


def difference(a, b):
    """Common steps and |loss a - loss b| at them."""
    steps = np.array(sorted(a.keys() & b.keys()))
    return steps, np.array([abs(a[s] - b[s]) for s in steps])


def draw(path, runs, names):
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        die("matplotlib is missing", "pip install matplotlib, or leave --out away")
    plt.rcParams.update(
        {
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "legend.frameon": False,
        }
    )
    fig, (top, bottom) = plt.subplots(
        2, 1, figsize=(9, 7.4), sharex=True, height_ratios=[3, 2.3], layout="constrained"
    )
    colors = ["#111111", "#1f77b4", "#d95f02", "#2a9d5c", "#8e5bb5", "#b8860b", "#cc4477"]
    color = lambda i: colors[i % len(colors)]
    for i, (run, name) in enumerate(
        zip(runs, names)
    ):  # equal curves stay visible: thick below, dashed above
        top.plot(
            list(run),
            list(run.values()),
            color=color(i),
            lw=4.5 if i == 0 else 1.4,
            alpha=0.3 if i == 0 else 1,
            ls=["-", "--", ":", "-."][i % 4],
            label=name,
        )
    top.set_ylabel("training loss")
    top.legend()
    floor = 1e-9  # a logarithm has no place for exact agreement
    among = {}
    for x, y in itertools.combinations(runs[1:], 2):
        for step, d in zip(*difference(x, y)):
            among[step] = max(among.get(step, floor), d)
    if among:
        bottom.fill_between(
            sorted(among),
            floor,
            [among[s] for s in sorted(among)],
            color="#999999",
            alpha=0.35,
            lw=0,
            label="the others among themselves, largest",
        )
    for i in range(1, len(runs)):
        steps, d = difference(runs[0], runs[i])
        bottom.plot(
            steps,
            np.maximum(d, floor),
            color=color(i),
            lw=1.3,
            alpha=0.9,
            label=f"{names[0]} − {names[i]}",
        )
    bottom.set_yscale("log")
    bottom.set_ylim(bottom=floor)
    bottom.set_xlabel("update")
    bottom.set_ylabel("|difference of the loss|")
    bottom.legend(fontsize=9, ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    fig.savefig(path, dpi=150)


def curves(a):
    runs, names = [read_losses(p) for p in a.logs], a.names or [
        os.path.basename(os.path.dirname(os.path.abspath(p))) for p in a.logs
    ]
    if len(names) != len(runs):
        die(
            f"{len(names)} names for {len(runs)} logs",
            "one --names entry per log, in the same order",
        )
    last = max(max(run) for run in runs)
    try:
        ranges = [tuple(map(int, r.split("-"))) for r in a.ranges or []]
        usual = ((1, 10), (11, 60), (61, 100), (101, 200), (201, last))
        ranges = [(lo, hi) for lo, hi in ranges or usual if lo <= last]
    except ValueError:
        die(f"--ranges {' '.join(a.ranges)}", "write them as 1-60 101-200")
    width, worst = max(len(f"{x} - {y}") for x, y in itertools.combinations(names, 2)), 0.0
    print(
        f"{'|loss difference|':{width}}  "
        + "  ".join(f"{f'steps {lo}-{hi}':>21}" for lo, hi in ranges)
    )
    print(f"{'':{width}}  " + "  ".join(f"{'mean':>10} {'largest':>10}" for _ in ranges))
    for i, j in itertools.combinations(range(len(runs)), 2):
        steps, d = difference(runs[i], runs[j])
        if not len(steps):
            die(
                f"{names[i]} and {names[j]} have no step in common",
                "compare runs of the same length",
            )
        cells = []
        for lo, hi in ranges:
            part = d[(steps >= lo) & (steps <= hi)]
            cells.append(
                f"{part.mean():10.2e} {part.max():10.2e}" if len(part) else f"{'-':>10} {'-':>10}"
            )
            if i == 0 and len(part):
                worst = max(worst, part.max() if np.isfinite(part).all() else math.inf)
        print(f"{f'{names[i]} - {names[j]}':{width}}  " + "  ".join(cells))
    if a.out:
        draw(a.out, runs, names)
        print(f"drawn: {a.out}")
    if a.tol is not None and not worst <= a.tol:
        print(f"beyond --tol {a.tol:g}: {names[0]} differs by up to {worst:.2e}")
        return 1
    return 0


def main():
    p = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="\n".join(__doc__.split("\n")[2:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = p.add_subparsers(dest="command", required=True)
    c = commands.add_parser("curves", help="loss curves and their differences")
    c.add_argument("logs", nargs="+", help="log.jsonl of each run, or the folder that holds it")
    c.add_argument("--names", nargs="+", help="labels, default: the folders of the logs")
    c.add_argument("--out", help="PNG to draw")
    c.add_argument("--tol", type=float, help="largest |difference| of the first run to any other")
    c.add_argument("--ranges", nargs="+", help="ranges of steps for the table, e.g. 1-60 101-200")
    d = commands.add_parser("dumps", help="logits, losses and gradients of the first update")
    d.add_argument("a")
    d.add_argument("b")
    d.add_argument("--tol", type=float, default=2e-5)
    d.add_argument("--show", type=int, default=10, help="how many of the largest deviations")
    h = commands.add_parser("bf16", help="errors of two bf16 first updates against fp32")
    h.add_argument("ours")
    h.add_argument("theirs")
    h.add_argument("truth")
    h.add_argument("--factor", type=float, default=2)
    h.add_argument("--show", type=int, default=5, help="how many of the largest ratios")
    a = p.parse_args()
    if a.command == "curves":
        a.logs = [
            os.path.join(path, "log.jsonl") if os.path.isdir(path) else path for path in a.logs
        ]
        if len(a.logs) < 2:
            die("one log", "give at least two")
    sys.exit({"curves": curves, "dumps": dumps, "bf16": bf16}[a.command](a))


if __name__ == "__main__":
    main()
