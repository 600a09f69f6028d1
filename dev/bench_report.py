#!/usr/bin/env python3
"""What dev/bench_cuda measured as a table, beside the predictions of dev/ledger.py and torch's own
kernels (dev/bench_torch.py).

dev/bench_report.py B.jsonl [--torch T.jsonl]
dev/bench_report.py B.jsonl --beside C.jsonl   two runs, kernel by kernel; the last line says which
                                               is faster
dev/bench_report.py B.jsonl --check            whether every kernel of dev/costs.h was timed:
                                               'N passed, N failed'
"""

import argparse
import json
import sys

from ledger import COSTS, OLDER, RATES, number, predicted


def check(kernels):
    good = {
        x["kernel"] for x in kernels if 0 < x["us"] < float("inf") and 0 < x["share"] < float("inf")
    }
    for name in COSTS:
        print(f"{'ok    ' if name in good else 'FAILED'} {name}")
    print(f"{len(good & COSTS.keys())} passed, {len(COSTS.keys() - good)} failed")
    return 1 if COSTS.keys() - good else 0


def table(ceilings, kernels, torch):
    for when, x in zip(("before", "after"), ceilings):
        print(
            f"{when}: {x['ceiling']}: copy {max(x['memcpy_gbs'], x['copy_kernel_gbs']):.0f} GB/s "
            f"(memcpy {x['memcpy_gbs']:.0f}, kernel {x['copy_kernel_gbs']:.0f}), "
            f"product of {x['side']} cubed {x['product_tflops']:.0f} TFLOP/s\n"
        )
    best = {}
    for x in torch:
        key = x["kernel"], x["tokens"]
        if key not in best or x["us"] < best[key]["us"]:
            best[key] = x
    print(
        "| kernel | tokens | us | rate | share of the ceiling | predicted us | measured / "
        "predicted | torch's best us | torch / ours |\n" + "|---" * 9 + "|"
    )
    for x in kernels:
        older = x["variant"].split(" ")[-1] in ("flash", "mma")
        rates = {**RATES, **OLDER} if older else RATES
        guess = 1e6 * predicted(x["kernel"], x["tokens"], rates)
        speed = f"{x['tflops']:.0f} TFLOP/s" if x["bound"] == "products" else f"{x['gbs']:.0f} GB/s"
        t = None
        if not x["variant"].startswith("skewed"):  # torch's routing is even
            t = best.get((x["kernel"], x["tokens"]))
        beside = f"{number(t['us'])} ({t['how']}) | {t['us'] / x['us']:.2f}" if t else " | "
        load = f" (load {x['load']:.1f})" if "load" in x else ""
        print(
            f"| `{x['kernel']}` {x['variant']}{load} | {x['tokens']} | {number(x['us'])} | {speed} "
            f"| {100 * x['share']:.0f} % | {number(guess)} | {x['us'] / guess:.2f} | {beside} |"
        )


# The whole expert layer: the kernels of its forward and backward.
LAYER = {
    "experts_forward": ("experts_up", "experts_down", "rows_weighted_sum"),
    "experts_backward": (
        "experts_down_backward",
        "experts_up_backward",
        "experts_wgrad",
        "rows_sum",
    ),
}


def layers(kernels, torch):
    ours = {}
    for x in kernels:
        if not x["variant"].startswith("skewed"):
            key = x["kernel"], x["tokens"]
            ours[key] = min(x["us"], ours.get(key, x["us"]))
    print(
        "\n| the whole expert layer | tokens | by | us | ours, the sum of its kernels, us "
        "| theirs / ours |\n" + "|---" * 6 + "|"
    )
    for x in torch:
        parts = [ours.get((name, x["tokens"])) for name in LAYER.get(x["kernel"], ())]
        if parts and all(parts):
            print(
                f"| `{x['kernel']}` | {x['tokens']} | {x['how']} | {number(x['us'])} "
                f"| {number(sum(parts))} | {x['us'] / sum(parts):.2f} |"
            )


def beside(kernels, others):
    times = {(x["kernel"], x["variant"], x["tokens"]): x["us"] for x in others}
    pairs = [
        (x, times[x["kernel"], x["variant"], x["tokens"]])
        for x in kernels
        if (x["kernel"], x["variant"], x["tokens"]) in times
    ]
    print("| kernel | tokens | first, us | second, us | second / first |\n|---|---|---|---|---|")
    for x, us in pairs:
        print(
            f"| `{x['kernel']}` {x['variant']} | {x['tokens']} | {number(x['us'])} | {number(us)} "
            f"| {us / x['us']:.3f} |"
        )
    first, second = sum(x["us"] for x, us in pairs), sum(us for x, us in pairs)
    print(
        f"together {number(first)} and {number(second)} us: the "
        f"{'first' if first <= second else 'second'} should be the default"
    )


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("bench")
    p.add_argument("--torch")
    p.add_argument("--beside")
    p.add_argument("--check", action="store_true")
    a = p.parse_args()
    read = lambda path: (
        [json.loads(line) for line in open(path) if line.startswith("{")] if path else []
    )
    lines = read(a.bench)
    kernels = [x for x in lines if "kernel" in x]
    if a.beside:
        return beside(kernels, [x for x in read(a.beside) if "kernel" in x])
    if a.check:
        return check(kernels)
    torch = read(a.torch)
    table([x for x in lines if "ceiling" in x], kernels, torch)
    if any(x["kernel"] in LAYER for x in torch):
        layers(kernels, torch)


if __name__ == "__main__":
    sys.exit(main())
