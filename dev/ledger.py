#!/usr/bin/env python3
"""Predicted time of each kernel on one H200, and of whole updates of Qwen3-30B-A3B, from one table of costs (dev/costs.h). Plain Python, nothing to install.

  dev/ledger.py             predictions: the tables of dev/results/ledger.md
  dev/ledger.py --floors    formula, FLOPs, bytes and the shortest possible time of each kernel: the table of kernels/README.md

The floor of a kernel is max(FLOPs / PRODUCTS, bytes / COPIES). The prediction replaces both ceilings by what kernels of the same build were seen to reach (RATES), adds the rows that pad
every expert to whole tiles, and LAUNCH for each call. What is measured stands beside it in dev/bench_report.py.
"""
import argparse
import os
import re

PRODUCTS, COPIES = 790e12, 4.3e12       # one H200: dense bf16 on random numbers, copies; nominal 989 TFLOP/s and 4.8 TB/s
LAUNCH = 2e-6                           # between two kernels on one stream, host ahead
MODEL = dict(C=2048, H=32, Q=4096, KVD=512, E=128, K=8, F=768, V=151936, P=3 * 128 * 2048 * 768, x=2)
LAYERS, PARAMETERS, LOGITS = 48, 30532122624, 1 << 30
# FLOP/s or bytes/s that the kernels of this build should reach, and why. What is not here: streams 0.90 of COPIES, products by cuBLASLt 700e12.
RATES = {
    "attention_forward": (600e12, "cuDNN, causal, heads of 128: published 609 beside FlashAttention-3's 638, which has 667 causal"),
    "attention_backward": (400e12, "FlashAttention-3 backward at 4,096 tokens, causal: 444; cuDNN's deterministic form writes and reads dS, 10 % assumed"),
    "experts_up": (480e12, "wgmma, 128 x 256 tiles: 85 FLOPs a byte from the L2 cache, which gives some 6 TB/s; SonicMoE and Liger near this shape: 460 to 510"),
    "experts_up_again": (480e12, "as experts_up"),
    "experts_down": (450e12, "as experts_up; the reduction is only 768 long, so filling the pipeline and the result weigh more"),
    "experts_down_backward": (350e12, "128 x 128 tiles, 64 FLOPs a byte: 384 at most; two inputs and three results beside the products"),
    "experts_up_backward": (480e12, "as experts_up"),
    "experts_wgrad": (470e12, "as experts_up; gathers along the rows, and 2.4 GB of fp32 gradients are written"),
    "rows_weighted_sum": (0.85 * COPIES, "gathered rows of 4 KB: SonicMoE's own takes 85 to 98 % of a copy"),
    "rows_sum": (0.85 * COPIES, "as rows_weighted_sum"),
    "cross_entropy": (0.60 * COPIES, "a row is read twice, and 264 rows of 304 KB in flight do not stay in the L2 cache: 3 passes, not 2"),
    "router_forward": (0.40 * COPIES, "a product of 128 columns, then some 800 instructions a token for softmax and 8 of 128"),
    "router_backward_add": (0.30 * COPIES, "the gradient of the logits is split into two bf16 numbers: both products are done twice"),
    "row_index_build": (0.02 * COPIES, "three small kernels of a counting sort, and a memset"),
    "embed_backward": (0.80 * COPIES, "mostly zeros written; before it, three sorting passes over the ids"),
    "optimizer_sgd": (0.75 * COPIES, "noise for stochastic rounding: about 350 instructions for 256 parameters, near the issue limit"),
    "optimizer_adamw8": (0.35 * COPIES, "instructions: about 1,450 a warp for 256 parameters, mostly exact divisions and roots (sm_90a code: 2,568 with the cases of cut blocks); 132 x 4 schedulers at "
                         "1.75 GHz issue 9.3e11 a second, three quarters of them assumed: 4.9 ms for 604 M parameters, where memory alone would take 1.7"),
    "init_segments": (0.12 * COPIES, "an inverse normal distribution in fp64 for each number"),
}
# Without cuDNN and wgmma: the kernels for sm_80 and newer, on the same card.
OLDER = {
    "attention_forward": (280e12, "mma.sync; FlashAttention-2 has 368 on this chip without a mask"),
    "attention_backward": (150e12, "mma.sync, and 7 products for the 5 that count"),
    "experts_up": (280e12, "mma.sync, 128 x 128 tiles through cp.async: 64 FLOPs a byte from the L2 cache, no asynchronous product; FlashAttention-2 is at 60 % of its successor"),
    **{name: (280e12, "as experts_up") for name in ("experts_up_again", "experts_down", "experts_up_backward", "experts_wgrad")},
    "experts_down_backward": (230e12, "as the others, and the epilogue"),
}
PADDED = ("experts_up", "experts_up_again", "experts_down", "experts_down_backward", "experts_up_backward", "experts_wgrad")

# Calls of one layer and one micro-batch in model/layer.c. What --recompute moe and layer add to them.
KEPT = {"rmsnorm_forward": 4, "rmsnorm_backward": 2, "add": 2, "linear_forward_q": 1, "linear_forward_kv": 2, "linear_forward_o": 1, "qk_norm_rope_forward": 2, "qk_norm_rope_backward": 1,
        "attention_forward": 1, "attention_backward": 1, "router_forward": 1, "router_backward_add": 1, "row_index_build": 2, "experts_up": 1, "experts_down": 1, "rows_weighted_sum": 2,
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


def predicted(kernel, tokens, rates=RATES, **other):
    """Seconds of one call; rates = 0: the floor. A rate below 10^13 is one of bytes: a kernel bound by what it moves, or slower than its bytes."""
    flops, bytes = work(kernel, tokens, **other)
    if not rates:
        return max(flops / PRODUCTS, bytes / COPIES)
    rate = rates.get(kernel, (700e12 if flops else 0.9 * COPIES, ""))[0]
    if rate < 1e13:
        return bytes / rate + LAUNCH
    padding = 1 + 64 * MODEL["E"] / (tokens * MODEL["K"]) if kernel in PADDED else 1     # half a tile of 128 rows an expert
    return max(flops * padding / rate, bytes / (0.9 * COPIES)) + LAUNCH


def floor(kernel, tokens):
    return predicted(kernel, tokens, 0)


def update(sequences, micro, recompute, optimizer, rates=RATES, length=4096):
    """{part: seconds} of one update of the whole model on one GPU."""
    tokens, n, chunk = micro * length, sequences // micro, LOGITS // (MODEL["V"] * MODEL["x"])
    calls = lambda table, rows: sum(k * predicted(name, rows, rates) for name, k in table.items())
    return {
        "layers": n * LAYERS * calls(KEPT, tokens), "recompute": n * LAYERS * calls({"none": {}, "moe": MOE, "layer": LAYER}[recompute], tokens),
        "head": n * sum(calls(HEAD, rows) for rows in [chunk] * (tokens // chunk) + [tokens % chunk] if rows), "embedding": n * calls(ENDS, tokens),
        "gradient norm": predicted("gradient_squares", 1, rates, P=PARAMETERS), "optimizer": predicted("optimizer_" + optimizer, 1, rates, P=PARAMETERS)}


# What fits into 139 GiB with --update layer --master off (./train_moe --plan), as arguments of update().
UPDATES = {
    "SGD": (7, 7, "none", "sgd"),
    "8-bit AdamW": (8, 4, "layer", "adamw8"),
    "8-bit AdamW, more tokens": (16, 4, "layer", "adamw8"),
    "the same without cuDNN and wgmma": (16, 4, "layer", "adamw8", {**RATES, **OLDER}),
}


def number(v):
    return f"{v:.0f}" if v >= 100 else f"{v:.1f}" if v >= 10 else f"{v:.2f}"


def rate(kernel, tokens, seconds):
    flops, bytes = work(kernel, tokens)
    return f"{flops / seconds / 1e12:.0f} TFLOP/s" if flops / PRODUCTS > bytes / COPIES else f"{bytes / seconds / 1e9:.0f} GB/s"


def print_floors():
    print("| kernel | FLOPs | bytes | floor at 4,096 tokens, us | at 32,768 | bound there |\n|---|---|---|---|---|---|")
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
    for title, rates in (("rate", RATES), ("without cuDNN and wgmma", OLDER)):
        print(f"\n| {title} | of | because |\n|---|---|---|")
        for name, (r, why) in rates.items():
            print(f"| {f'{r / 1e12:.0f} TFLOP/s' if r >= 1e13 else f'{r / COPIES:.2f} of a copy'} | `{name}` | {why} |")
    print("\n| one update of all 48 layers | " + " | ".join(update(8, 8, "none", "sgd")) + " | together | tokens/s | of the floor |\n" + "|---" * 10 + "|")
    for title, arguments in UPDATES.items():
        parts, shortest = update(*arguments), sum(update(*arguments[:4], 0).values())
        total, (sequences, micro, recompute, optimizer) = sum(parts.values()), arguments[:4]
        print(f"| {title}: {sequences} sequences of 4,096, {micro} a micro-batch, recompute {recompute} | " + " | ".join(f"{1e3 * v:.1f} ms" for v in parts.values()) +
              f" | {1e3 * total:.0f} ms | {sequences * 4096 / total:.0f} | {100 * shortest / total:.0f} % |")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--floors", action="store_true")
    print_floors() if p.parse_args().floors else print_predictions()
