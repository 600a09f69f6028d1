#!/usr/bin/env python3
"""Draws training runs from their log.jsonl: loss and validation loss, learning rate, expert load,
and its heat map over training.

    python dev/plot.py RUN [more...] --out plot.png [--names NAME...] [--smooth N]

RUN is the --out folder of a run or its log.jsonl; the run may be going on. The load of an expert is
its rows divided by the mean over the experts of its layer: 1 is balanced, top-k times less than the
number of experts is the most. Lines with "expert_load": [[share per expert] per MoE layer] give the
heat map (of the first run that has them): time to the right, experts downwards, one band per layer,
red above the mean, blue below, black for an expert that saw no token. Without such lines only the
largest load (expert_load_max) and the experts without tokens (expert_dead) are drawn. Needs
matplotlib and nothing else.
"""

import argparse
import json
import math
import os
import sys


def die(what, hint):
    print(f"error: {what}, hint: {hint}", file=sys.stderr)
    sys.exit(1)


try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
except ImportError:
    die("plots need matplotlib", "pip install matplotlib (training itself needs no Python)")

NUMBERS = ["loss", "val_loss", "lr", "expert_load_max", "expert_dead"]
INK, GRID = "#222222", "#e4e4e0"
COLORS = ["#1b5e9b", "#d1572c", "#2e8b57", "#7d4fa8", "#b58900", "#c2407a", "#4a4a4a"]
LOAD = LinearSegmentedColormap.from_list(
    "load", ["#1f4e8c", "#7fa9d3", "#f7f5f0", "#e8956b", "#a3200f"]
)
LOAD.set_bad("#111111")


def read_log(path):
    """All lines of a log, each a dict; null becomes nan. The last line may be half written."""
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            text = f.read()
    except OSError as e:
        die(f"{path}: {e.strerror}", "give the --out folder of a run, or its log.jsonl")
    lines, parts = [], text.split("\n")
    for number, part in enumerate(parts, 1):
        try:
            line = json.loads(part) if part.strip() else None
        except ValueError:
            if number < len(parts):  # the line after the last line end may be half written
                die(f"{path}: line {number} is not JSON", "is it a log.jsonl?")
            continue
        if line is None:
            continue
        if (
            not isinstance(line, dict)
            or isinstance(line.get("step"), bool)
            or not isinstance(line.get("step"), int)
        ):
            die(f"{path}: line {number} has no step", "is it a log.jsonl of train_moe?")
        line = {k: math.nan if v is None else v for k, v in line.items()}
        bad = next(
            (k for k in NUMBERS if isinstance(line.get(k, 0), (str, list, dict, bool))), None
        )
        if bad:
            die(f"{path}: line {number}: {bad} is no number", "is it a log.jsonl of train_moe?")
        lines.append(line)
    if not any("loss" in line for line in lines):
        die(
            f"{path}: no update in it",
            "the run has not finished its first step, or it only evaluated",
        )
    return lines


def series(lines, key):
    """Steps and values of all lines that have this key."""
    found = [(line["step"], line[key]) for line in lines if key in line]
    return [s for s, _ in found], [v for _, v in found]


def smoothed(values, reach):
    """Mean over the updates at most `reach` before and after each (fewer at the ends, so that
    nothing lags); gaps (nan) are left out."""
    out = []
    for i in range(len(values)):
        r = min(reach, i, len(values) - 1 - i)
        near = [v for v in values[i - r : i + r + 1] if math.isfinite(v)]
        out.append(sum(near) / len(near) if near else math.nan)
    return out


def heat_rows(lines):
    """Steps and load[layer][expert] at each, as share times number of experts, or nothing when no
    line carries it."""
    steps, tables = series(lines, "expert_load")
    shapes = {
        (
            tuple(len(layer) if isinstance(layer, list) else 0 for layer in table)
            if isinstance(table, list)
            else ()
        )
        for table in tables
    }
    if len(shapes) > 1 or any(not shape or len(set(shape)) > 1 for shape in shapes):
        die("the lines with expert_load have several shapes", "is it the log of one run?")
    relative = lambda layer: [share * len(layer) / max(sum(layer), 1e-30) for share in layer]
    return steps, [[relative(layer) for layer in table] for table in tables]


def heat_map(fig, ax, steps, tables, name):
    """One column per logged step, one row per expert, layers as bands. Colour is log2 of the load,
    cut at a factor of 8. Where experts would be thinner than a line of pixels, each band is sorted
    by load: the more colour in it, the less balanced the layer."""
    layers, experts = len(tables[0]), len(tables[0][0])
    dense = layers * experts > 512
    tables = (
        [[sorted(layer, reverse=True) for layer in table] for table in tables] if dense else tables
    )
    image = [
        [math.log2(t[l][e]) if t[l][e] > 0 else math.nan for t in tables]
        for l in range(layers)
        for e in range(experts)
    ]
    half = (steps[-1] - steps[0]) / max(1, len(steps) - 1) / 2 or 0.5
    shown = ax.imshow(
        image,
        aspect="auto",
        interpolation="nearest",
        cmap=LOAD,
        norm=TwoSlopeNorm(0, -3, 3),
        extent=(steps[0] - half, steps[-1] + half, layers * experts, 0),
    )
    for l in range(1, layers):
        ax.axhline(l * experts, color="white", lw=3 if layers <= 12 else 0.8)
    every = math.ceil(layers / 12)
    ax.set_yticks(
        [(l + 0.5) * experts for l in range(0, layers, every)],
        [f"{l}" for l in range(0, layers, every)],
    )
    ax.tick_params(axis="y", length=0)
    ax.set_ylabel("MoE layer")
    ax.grid(False)
    ax.set_title(
        f"load of every expert{name and ', ' + name}: {experts} rows a layer, "
        + ("sorted by load" if dense else "in the order of their ids"),
        loc="left",
        fontsize=10,
    )
    bar = fig.colorbar(shown, ax=ax, location="bottom", pad=0.01, fraction=0.04, aspect=60)
    bar.set_ticks([-3, -2, -1, 0, 1, 2, 3], labels=["≤ ⅛", "¼", "½", "1", "2", "4", "≥ 8"])
    bar.set_label("tokens relative to the mean of the layer (black: none)", fontsize=9)
    bar.outline.set_visible(False)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("logs", nargs="+", help="log.jsonl of each run, or the folder that holds it")
    p.add_argument("--out", help="PNG, PDF or SVG (default: plot.png beside the first log)")
    p.add_argument("--names", nargs="+", help="labels, default: the folders of the logs")
    p.add_argument(
        "--smooth",
        type=int,
        help="the bold loss is the mean over this many updates before and after, "
        "default: 1 %% of the run",
    )
    a = p.parse_args()
    a.out = a.out or os.path.join(
        a.logs[0] if os.path.isdir(a.logs[0]) else os.path.dirname(a.logs[0]), "plot.png"
    )
    a.logs = [os.path.join(path, "log.jsonl") if os.path.isdir(path) else path for path in a.logs]
    runs = [read_log(path) for path in a.logs]
    names = a.names or [os.path.basename(os.path.dirname(os.path.abspath(path))) for path in a.logs]
    if len(names) != len(runs):
        die(
            f"{len(names)} names for {len(runs)} logs",
            "one --names entry per log, in the same order",
        )
    if a.smooth is not None and a.smooth < 0:
        die(f"--smooth {a.smooth}", "0 or more updates")
    heat = next(
        (
            (*heat_rows(lines), name)
            for lines, name in zip(runs, names)
            if series(lines, "expert_load")[0]
        ),
        None,
    )

    plt.rcParams.update(
        {
            "font.size": 10,
            "text.color": INK,
            "axes.labelcolor": INK,
            "axes.edgecolor": "#999999",
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": GRID,
            "axes.axisbelow": True,
            "legend.frameon": False,
            "font.family": "DejaVu Sans",
        }
    )
    ratios = [4, 1.2, 1.5] + (
        [min(7, 2.5 + 0.045 * len(heat[1][0]) * len(heat[1][0][0]))] if heat else []
    )
    fig, axes = plt.subplots(
        len(ratios),
        1,
        figsize=(9.5, 1.05 * sum(ratios)),
        sharex=True,
        height_ratios=ratios,
        layout="constrained",
    )
    loss, lr, load = axes[:3]
    one, right = len(runs) == 1, None
    for i, (lines, name) in enumerate(zip(runs, names)):
        color = COLORS[i % len(COLORS)]
        steps, values = series(lines, "loss")
        loss.plot(steps, values, color=color, lw=0.7, alpha=0.35)
        loss.plot(
            steps,
            smoothed(values, len(values) // 100 if a.smooth is None else a.smooth),
            color=color,
            lw=1.8,
            label="training" if one else name,
        )
        at, val = series(lines, "val_loss")
        if at:
            loss.plot(
                at,
                val,
                color=COLORS[1] if one else color,
                lw=1.2,
                ls="--",
                marker="o",
                ms=4,
                mfc="white",
                label="validation" if one else f"{name}, validation",
            )
            if one:
                loss.annotate(
                    f"{val[-1]:.3f}",
                    (at[-1], val[-1]),
                    xytext=(6, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=9,
                )
        lr.plot(*series(lines, "lr"), color=color, lw=1.4)
        load.plot(*series(lines, "expert_load_max"), color=color, lw=1.2)
        steps, dead = series(lines, "expert_dead")
        if any(d > 0 for d in dead):
            if right is None:
                right = load.twinx()
                right.set_ylabel("without tokens", fontsize=9)
                right.yaxis.get_major_locator().set_params(integer=True)
                right.grid(False)
                right.spines["right"].set_visible(True)
            right.fill_between(
                steps, 0, dead, step="mid", color="#777777" if one else color, alpha=0.22, lw=0
            )
            right.set_ylim(0, max(5, right.get_ylim()[1]))
    loss.set_ylabel("loss (nats per token)")
    loss.legend(loc="upper right")
    lr.set_ylabel("learning rate")
    lr.set_ylim(bottom=0)
    lr.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    load.axhline(1, color="#999999", lw=0.8, ls=":")
    load.set_ylim(bottom=0.9)
    load.set_ylabel("max / mean load")
    load.set_title(
        "most loaded expert of the worst layer"
        + ("; area: (layer, expert) pairs without tokens" if right else ""),
        loc="left",
        fontsize=10,
    )
    if heat:
        heat_map(fig, axes[3], *heat[:2], "" if one else heat[2])
    axes[-1].set_xlabel("update")
    axes[0].margins(x=0.01)
    try:
        fig.savefig(a.out, dpi=160)
    except (OSError, ValueError) as e:
        die(f"{a.out}: {e}", "give --out a PNG, PDF or SVG file that can be written")
    print(f"drawn: {a.out}")


if __name__ == "__main__":
    main()
