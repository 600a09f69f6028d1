#!/usr/bin/env python3
"""Predicted and measured time of each kernel, from one table of costs (dev/costs.h). Plain Python, nothing to install.

  dev/ledger.py                             predictions for one H200: kernels, then whole updates of Qwen3-30B-A3B as model/step.c runs them (dev/results/ledger.md)
  dev/ledger.py --floors                    formula, FLOPs, bytes and the shortest possible time of each kernel (the table in kernels/README.md)
  dev/ledger.py --bench B.jsonl [--torch T.jsonl]    what dev/bench_cuda measured, beside the prediction and beside torch's own kernels
  dev/ledger.py --check B.jsonl             whether every kernel of dev/costs.h was timed: 'N passed, N failed'

The floor of a kernel is max(FLOPs / PRODUCTS, bytes / COPIES). The prediction replaces both ceilings by what kernels of the same build were seen to reach (RATES), adds the rows that pad
every expert to whole tiles, and LAUNCH for each call.
"""
import argparse
import json
import os
import re
import sys

PRODUCTS, COPIES = 790e12, 4.3e12       # one H200: dense bf16 on random numbers, copies; nominal 989 TFLOP/s and 4.8 TB/s
LAUNCH = 2e-6                           # between two kernels on one stream, host ahead
MODEL = dict(C=2048, H=32, Q=4096, KVD=512, E=128, K=8, F=768, V=151936, P=3 * 128 * 2048 * 768, x=2)
LAYERS, PARAMETERS, LOGITS = 48, 30532122624, 1 << 30
# FLOP/s or bytes/s that a kernel of this build should reach, and whose numbers say so. What is not here: streams 0.90 of COPIES, products by cuBLASLt 700e12.
RATES = {
    "attention_forward": (600e12, "cuDNN, causal head 128: FlashAttention-3's own table has cuDNN at 609 beside its 638, and itself at 667 causal"),
    "attention_backward": (440e12, "FlashAttention-3 backward, 4,096 tokens, causal: 444; cuDNN assumed equal"),
    "experts_up": (480e12, "wgmma with gathered rows, SonicMoE and Liger near this shape: 460 to 510"),
    "experts_up_again": (480e12, "as experts_up"),
    "experts_down": (480e12, "as experts_up"),
    "experts_down_backward": (440e12, "as experts_up, and a heavy epilogue: two more reads, three writes, an exponential an element"),
    "experts_up_backward": (490e12, "SonicMoE backward"),
    "experts_wgrad": (490e12, "SonicMoE backward, gathers along the rows"),
    "rows_combine": (0.85 * COPIES, "gathered rows of 4 KB: SonicMoE's own takes 85 to 98 % of a copy"),
    "rows_sum": (0.85 * COPIES, "as rows_combine"),
    "cross_entropy": (0.60 * COPIES, "a row is read twice: once for the sum, once for the gradient"),
    "router_forward": (0.40 * COPIES, "selection of 8 among 128 by shuffles, a warp a token"),
    "router_backward_add": (0.30 * COPIES, "the gradient of the logits is split into two bf16 numbers, which doubles its traffic"),
    "plan_build": (0.02 * COPIES, "three small kernels of a counting sort"),
    "embed_backward": (0.80 * COPIES, "mostly zeros written; before it, two or three sorting passes over the ids"),
    "optimizer_adamw8": (0.80 * COPIES, "a quantisation block needs its own maximum first"),
}
PADDED = ("experts_up", "experts_up_again", "experts_down", "experts_down_backward", "experts_up_backward", "experts_wgrad")

# Calls of one layer and one micro-batch in model/layer.c. What --recompute moe and layer add to them.
KEPT = {"rmsnorm_forward": 4, "rmsnorm_backward": 2, "add": 2, "linear_forward_q": 1, "linear_forward_kv": 2, "linear_forward_o": 1, "qk_norm_rope_forward": 2, "qk_norm_rope_backward": 1,
        "attention_forward": 1, "attention_backward": 1, "router_forward": 1, "router_backward_add": 1, "plan_build": 2, "experts_up": 1, "experts_down": 1, "rows_combine": 2,
        "experts_down_backward": 1, "experts_up_backward": 1, "experts_wgrad": 1, "linear_backward_input_q": 1, "linear_backward_input_add_kv": 2, "linear_backward_input_o": 1,
        "linear_backward_weight_q": 1, "linear_backward_weight_kv": 2, "linear_backward_weight_o": 1}
MOE = {"experts_up_again": 1}
LAYER = {**MOE, "rmsnorm_forward": 1, "linear_forward_q": 1, "linear_forward_kv": 2, "qk_norm_rope_forward": 1, "attention_forward": 1, "linear_forward_o": 1, "add": 1}
HEAD = {"rmsnorm_forward": 1, "head_forward": 1, "cross_entropy": 1, "head_backward_input": 1, "head_backward_weight": 1, "rmsnorm_backward": 1}     # of a chunk of N rows
ENDS = {"embed_forward": 1, "embed_backward": 1}


def costs():
    """{kernel: (FLOPs, bytes)} as the expressions of dev/costs.h."""
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "costs.h")) as f:
        return {m[1]: (m[2], m[3]) for m in re.finditer(r"^COST\((\w+), ([^,]+), (.+)\)$", f.read(), re.M)}


COSTS = costs()


def work(kernel, tokens, sequence=4096, **other):
    """FLOPs and bytes of one call on `tokens` tokens."""
    at = {**MODEL, "R": tokens, "T": min(tokens, sequence), "N": min(tokens, LOGITS // (MODEL["V"] * MODEL["x"])), "Z": tokens * MODEL["K"], **other}
    return tuple(float(eval(text, {"__builtins__": {}}, at)) for text in COSTS[kernel])


def floor(kernel, tokens, products=PRODUCTS, copies=COPIES, **other):
    flops, bytes = work(kernel, tokens, **other)
    return max(flops / products, bytes / copies)


def predicted(kernel, tokens, **other):
    """Seconds of one call. A rate below 10^13 is one of bytes: a kernel bound by what it moves."""
    flops, bytes = work(kernel, tokens, **other)
    rate = RATES.get(kernel, (700e12 if flops else 0.9 * COPIES, ""))[0]
    if rate < 1e13:
        return bytes / rate + LAUNCH
    padding = 1 + 64 * MODEL["E"] / (tokens * MODEL["K"]) if kernel in PADDED else 1     # half a tile of 128 rows an expert
    return max(flops * padding / rate, bytes / (0.9 * COPIES)) + LAUNCH


def update(sequences, micro, recompute, optimizer, length=4096):
    """{part: seconds} of one update of the whole model on one GPU."""
    tokens, n = micro * length, sequences // micro
    layer = lambda calls: n * LAYERS * sum(k * predicted(name, tokens) for name, k in calls.items())
    chunk = LOGITS // (MODEL["V"] * MODEL["x"])
    chunks = [chunk] * (tokens // chunk) + [tokens % chunk]
    return {
        "layers": layer(KEPT), "recompute": layer({"none": {}, "moe": MOE, "layer": LAYER}[recompute]),
        "head": n * sum(k * predicted(name, rows) for rows in chunks if rows for name, k in HEAD.items()),
        "embedding": n * sum(k * predicted(name, tokens) for name, k in ENDS.items()),
        "gradient norm": predicted("gradient_squares", 1, P=PARAMETERS), "optimizer": predicted("optimizer_" + optimizer, 1, P=PARAMETERS)}


def number(v):
    return f"{v:.0f}" if v >= 100 else f"{v:.1f}" if v >= 10 else f"{v:.2f}"


def rate(kernel, tokens, seconds):
    flops, bytes = work(kernel, tokens)
    by_products = flops / PRODUCTS > bytes / COPIES
    return f"{flops / seconds / 1e12:.0f} TFLOP/s" if by_products else f"{bytes / seconds / 1e9:.0f} GB/s"


def print_floors():
    print("| kernel | FLOPs | bytes | floor, 4,096 tokens | 32,768 tokens | bound |\n|---|---|---|---|---|---|")
    for name, (flops, bytes) in COSTS.items():
        f, b = work(name, 32768)
        plain = lambda s: s.replace("*", " ") if s != "0" else ""
        print(f"| `{name}` | {plain(flops)} | {plain(bytes)} | {number(1e6 * floor(name, 4096))} | {number(1e6 * floor(name, 32768))} | {'products' if f / PRODUCTS > b / COPIES else 'memory'} |")


def print_predictions():
    print("| kernel | calls a layer | floor, 4,096 tokens | predicted | floor, 32,768 tokens | predicted | that is |\n|---|---|---|---|---|---|---|")
    for name in COSTS:
        us = [number(1e6 * t) for n in (4096, 32768) for t in (floor(name, n), predicted(name, n))]
        again = LAYER.get(name, 0)
        calls = f"{KEPT.get(name, 0)}{f' + {again}' if again else ''}" if name in KEPT or again else ""
        print(f"| `{name}` | {calls} | {' | '.join(us)} | {rate(name, 32768, predicted(name, 32768))} |")
    print("\n| rate | of | because |\n|---|---|---|")
    for name, (r, why) in RATES.items():
        print(f"| {f'{r / 1e12:.0f} TFLOP/s' if r >= 1e13 else f'{r / COPIES:.2f} of a copy'} | `{name}` | {why} |")
    print("\n| one update of all 48 layers | " + " | ".join(update(8, 8, "none", "sgd")) + " | together | tokens/s |\n" + "|---" * 9 + "|")
    for title, arguments in {"`--optimizer sgd --recompute none`, 7 sequences in one micro-batch": (7, 7, "none", "sgd"),
                             "`--optimizer adamw8bit --recompute moe`, 4 in one": (4, 4, "moe", "adamw8"),
                             "`--optimizer adamw8bit --recompute layer`, 8 in two": (8, 4, "layer", "adamw8"),
                             "the same, 32 in eight": (32, 4, "layer", "adamw8")}.items():
        parts = update(*arguments)
        total = sum(parts.values())
        print(f"| {title} | " + " | ".join(f"{1e3 * v:.1f} ms" for v in parts.values()) + f" | {1e3 * total:.0f} ms | {arguments[0] * 4096 / total:.0f} |")


def print_measured(bench, torch):
    lines = [json.loads(line) for line in open(bench) if line.startswith("{")]
    ceilings, kernels = [x for x in lines if "ceiling" in x], [x for x in lines if "kernel" in x]
    for when, x in zip(("before", "after"), ceilings):
        print(f"ceilings {when}: {x['ceiling']}: copy {max(x['memcpy_gbs'], x['copy_kernel_gbs']):.0f} GB/s (memcpy {x['memcpy_gbs']:.0f}, kernel {x['copy_kernel_gbs']:.0f}), "
              f"product of {x['side']} cubed {x['product_tflops']:.0f} TFLOP/s\n")
    theirs = {}
    for x in (json.loads(line) for line in (open(torch) if torch else []) if line.startswith("{")):
        key = (x["kernel"], x["tokens"])
        if key not in theirs or x["us"] < theirs[key]["us"]:
            theirs[key] = x
    print("| kernel | tokens | us | rate | share of ceiling | predicted us | measured / predicted | torch us (its best) | torch / ours |\n|---|---|---|---|---|---|---|---|---|")
    for x in kernels:
        guess, t = 1e6 * predicted(x["kernel"], x["tokens"]), theirs.get((x["kernel"], x["tokens"]))
        speed = f"{x['tflops']:.0f} TFLOP/s" if x["bound"] == "products" else f"{x['gbs']:.0f} GB/s"
        beside = f"{number(t['us'])} ({t['how']}) | {t['us'] / x['us']:.2f}" if t else " | "
        print(f"| `{x['kernel']}` {x['variant']} | {x['tokens']} | {number(x['us'])} | {speed} | {100 * x['share']:.0f} % | {number(guess)} | {x['us'] / guess:.2f} | {beside} |")


def check(bench):
    """Exit status 1 unless each kernel has a line with a time and a share that are positive numbers."""
    with open(bench) as f:
        good = {x["kernel"] for x in map(json.loads, f) if "kernel" in x and 0 < x["us"] < float("inf") and 0 < x["share"] < float("inf")}
    for name in COSTS:
        print(f"{'ok    ' if name in good else 'FAILED'} {name}")
    print(f"{len(good & COSTS.keys())} passed, {len(COSTS.keys() - good)} failed")
    return 1 if COSTS.keys() - good else 0


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--floors", action="store_true")
    p.add_argument("--bench")
    p.add_argument("--torch")
    p.add_argument("--check")
    a = p.parse_args()
    if a.check:
        return check(a.check)
    print_measured(a.bench, a.torch) if a.bench else print_floors() if a.floors else print_predictions()


if __name__ == "__main__":
    sys.exit(main())
