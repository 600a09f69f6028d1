#!/usr/bin/env python3
"""Predicted time of each kernel on one H200, and of whole updates of Qwen3-30B-A3B, from one table
of costs (dev/costs.h). Plain Python, nothing to install.

  dev/ledger.py             predictions: the tables of dev/results/ledger.md
  dev/ledger.py --cluster   whole updates on 1, 8 and 64 GPUs, with every exposed wait
  dev/ledger.py --floors    formula, FLOPs, bytes and the shortest possible time of each kernel: the
                            table of kernels/README.md

The floor of a kernel is max(FLOPs / PRODUCTS, bytes / COPIES). The prediction replaces both
ceilings by what kernels of the same build were seen to reach (RATES), adds the rows that pad every
expert to whole tiles, and LAUNCH for each call. What is measured stands beside it in
dev/bench_report.py.
"""

import argparse
import os
import re

# one H200: dense bf16 on random numbers, copies; nominal 989 TFLOP/s and 4.8 TB/s
PRODUCTS, COPIES = 790e12, 4.3e12
LAUNCH = 2e-6  # between two kernels on one stream, host ahead
MODEL = dict(
    C=2048, H=32, Q=4096, KVD=512, E=128, K=8, F=768, V=151936, P=3 * 128 * 2048 * 768, x=2
)
LAYERS, PARAMETERS, LOGITS = 48, 30532122624, 1 << 30
STREAM = 0.85  # of a copy, for kernels that only move
# FLOP/s or bytes/s that the kernels of this build should reach, and why. What is not here: streams
# STREAM of COPIES, products by cuBLASLt 700e12.
RATES = {
    "attention_forward": (
        600e12,
        "cuDNN, causal, heads of 128: published 609 beside FlashAttention-3's 638, which has 667 "
        "causal",
    ),
    "attention_backward": (
        300e12,
        "FlashAttention-3 backward at 4,096 tokens, causal: 444; cuDNN's deterministic form writes "
        "dS to memory and reads it again, 1 GB for 32 heads of 4,096 tokens",
    ),
    "head_backward_weight": (
        600e12,
        "the sum runs over 3,533 rows only, and 1.2 GB of fp32 gradients are read, added to and "
        "written by each chunk",
    ),
    "experts_up": (
        580e12,
        "wgmma, 128 x 256 tiles: 85 FLOPs a byte from the L2 cache, which gives 8 TB/s here (680 "
        "at most); the rows are gathered, SwiGLU between tiles",
    ),
    "experts_up_again": (580e12, "as experts_up"),
    "experts_down": (600e12, "as experts_up, with rows in place; the reduction is only 768 long"),
    "experts_down_backward": (
        420e12,
        "128 x 128 tiles, 64 FLOPs a byte: 512 at most; an input and three results beside the "
        "products",
    ),
    "experts_up_backward": (
        630e12,
        "as experts_up, with rows in place and nothing in the epilogue",
    ),
    "experts_wgrad": (
        600e12,
        "as experts_up; gathers along the rows, and 2.4 GB of fp32 gradients are written",
    ),
    "rows_weighted_sum": (
        0.85 * COPIES,
        "gathered rows of 4 KB: SonicMoE's own takes 85 to 98 % of a copy",
    ),
    "rows_sum": (0.85 * COPIES, "as rows_weighted_sum"),
    "cross_entropy": (
        0.60 * COPIES,
        "a row is read twice, and 264 rows of 304 KB in flight do not stay in the L2 cache: 3 "
        "passes, not 2",
    ),
    "router_forward": (
        0.40 * COPIES,
        "a product of 128 columns, then some 800 instructions a token for softmax and 8 of 128",
    ),
    "router_backward_add": (
        0.30 * COPIES,
        "the gradient of the logits is split into two bf16 numbers: both products are done twice",
    ),
    "row_index_build": (0.02 * COPIES, "three small kernels of a counting sort, and a memset"),
    "embed_backward": (
        0.80 * COPIES,
        "mostly zeros written; before it, three sorting passes over the ids",
    ),
    "optimizer_sgd": (
        0.75 * COPIES,
        "noise for stochastic rounding: about 350 instructions for 256 parameters, near the issue "
        "limit",
    ),
    "optimizer_adamw8": (
        0.46 * COPIES,
        "instructions: about 1,090 a warp for 256 parameters, at three quarters of the issue rate",
    ),
    "init_segments": (0.12 * COPIES, "an inverse normal distribution in fp64 for each number"),
}
# Without cuDNN and wgmma: the kernels for sm_80 and newer, on the same card.
OLDER = {
    "attention_forward": (280e12, "mma.sync; FlashAttention-2 has 368 on this chip without a mask"),
    "attention_backward": (150e12, "mma.sync, and 7 products for the 5 that count"),
    "experts_up": (
        280e12,
        "mma.sync, 128 x 128 tiles through cp.async: 64 FLOPs a byte from the L2 cache, no "
        "asynchronous product; FlashAttention-2 is at 60 % of its successor",
    ),
    **{
        name: (280e12, "as experts_up")
        for name in ("experts_up_again", "experts_down", "experts_up_backward", "experts_wgrad")
    },
    "experts_down_backward": (230e12, "as the others, and the epilogue"),
}
PADDED = (
    "experts_up",
    "experts_up_again",
    "experts_down",
    "experts_down_backward",
    "experts_up_backward",
    "experts_wgrad",
)

# Calls of one layer and one micro-batch in model/layer.c. What --recompute moe and layer add to
# them.
KEPT = {
    "rmsnorm_forward": 4,
    "rmsnorm_backward": 2,
    "add": 2,
    "linear_forward_q": 1,
    "linear_forward_kv": 2,
    "linear_forward_o": 1,
    "qk_norm_rope_forward": 2,
    "qk_norm_rope_backward": 1,
    "attention_forward": 1,
    "attention_backward": 1,
    "router_forward": 1,
    "router_backward_add": 1,
    "row_index_build": 2,
    "experts_up": 1,
    "experts_down": 1,
    "rows_weighted_sum": 2,
    "experts_down_backward": 1,
    "experts_up_backward": 1,
    "experts_wgrad": 1,
    "linear_backward_input_q": 1,
    "linear_backward_input_add_kv": 2,
    "linear_backward_input_o": 1,
    "linear_backward_weight_q": 1,
    "linear_backward_weight_kv": 2,
    "linear_backward_weight_o": 1,
}
MOE = {"experts_up_again": 1}
LAYER = {
    **MOE,
    "rmsnorm_forward": 1,
    "linear_forward_q": 1,
    "linear_forward_kv": 2,
    "qk_norm_rope_forward": 1,
    "attention_forward": 1,
    "linear_forward_o": 1,
    "add": 1,
}
HEAD = {
    "rmsnorm_forward": 1,
    "head_forward": 1,
    "cross_entropy": 1,
    "head_backward_input": 1,
    "head_backward_weight": 1,
    "rmsnorm_backward": 1,
}  # of a chunk of N rows
ENDS = {"embed_forward": 1, "embed_backward": 1}


def costs():
    """{kernel: (FLOPs, bytes)} as the expressions of dev/costs.h."""
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "costs.h")) as f:
        return {
            m[1]: (m[2], m[3])
            for m in re.finditer(r"^COST\((\w+), ([^,]+), (.+)\)$", f.read(), re.M)
        }


COSTS = costs()


def work(kernel, tokens, sequence=4096, **other):
    """FLOPs and bytes of one call on `tokens` tokens."""
    at = {
        **MODEL,
        "R": tokens,
        "T": min(tokens, sequence),
        "N": min(tokens, LOGITS // (MODEL["V"] * MODEL["x"])),
        "Z": tokens * MODEL["K"],
        **other,
    }
    return tuple(float(eval(text, {"__builtins__": {}}, at)) for text in COSTS[kernel])


def predicted(kernel, tokens, rates=RATES, **other):
    """Seconds of one call; rates = 0: the floor. A rate below 10^13 is one of bytes: a kernel bound
    by what it moves, or slower than its bytes."""
    flops, bytes = work(kernel, tokens, **other)
    if not rates:
        return max(flops / PRODUCTS, bytes / COPIES)
    rate = rates.get(kernel, (700e12 if flops else STREAM * COPIES, ""))[0]
    if rate < 1e13:
        return bytes / rate + LAUNCH
    padding = (
        1 + 64 * other.get("E", MODEL["E"]) / (tokens * MODEL["K"]) if kernel in PADDED else 1
    )  # half a tile of 128 rows an expert
    return max(flops * padding / rate, bytes / (STREAM * COPIES)) + LAUNCH


def floor(kernel, tokens):
    return predicted(kernel, tokens, 0)


def update(sequences, micro, recompute, optimizer, rates=RATES, length=4096):
    """{part: seconds} of one update of the whole model on one GPU."""
    tokens, n, chunk = micro * length, sequences // micro, LOGITS // (MODEL["V"] * MODEL["x"])
    calls = lambda table, rows: sum(k * predicted(name, rows, rates) for name, k in table.items())
    return {
        "layers": n * LAYERS * calls(KEPT, tokens),
        "recompute": n
        * LAYERS
        * calls({"none": {}, "moe": MOE, "layer": LAYER}[recompute], tokens),
        "head": n
        * sum(calls(HEAD, rows) for rows in [chunk] * (tokens // chunk) + [tokens % chunk] if rows),
        "embedding": n * calls(ENDS, tokens),
        "gradient norm": predicted("gradient_squares", 1, rates, P=PARAMETERS),
        "optimizer": predicted("optimizer_" + optimizer, 1, rates, P=PARAMETERS),
    }


# What fits into 139 GiB with --update layer --master off (./train_moe --plan), as arguments of
# update().
UPDATES = {
    "SGD": (7, 7, "none", "sgd"),
    "8-bit AdamW": (8, 4, "layer", "adamw8"),
    "8-bit AdamW, more tokens": (16, 4, "layer", "adamw8"),
    "the same without cuDNN and wgmma": (16, 4, "layer", "adamw8", {**RATES, **OLDER}),
}


# ---- several GPUs ----
# Bytes a second that a GPU sends while it receives as much. NVLink of an 8-GPU H200 machine: 450
# GB/s nominal, 360 reached by NCCL's rings and 330 by its sends and receives; one 400 Gb/s adapter
# a GPU between machines: 50 nominal, 45 reached. A read of the table of rows by the host, with
# nothing else queued.
NVLINK, PEERS, NETWORK, HOST_READ = 360e9, 330e9, 45e9, 30e-6
FREED = 116 / 132  # of the multiprocessors: persistent kernels leave 16 to NCCL
DENSE = 2048 * 4096 * 2 + 2 * 2048 * 512 + 2048 * 128  # parameters of a layer that are not experts'
BEST = 13012  # tokens/s a GPU: the best published, 16 H100, forced balance


def cluster(sequences, micro, recompute, fsdp, ep):
    """{part: seconds} of one update on fsdp x ep GPUs, `sequences` of 4,096 tokens on each, 8-bit
    AdamW. ep within a machine of 8, fsdp over the rest of it or between machines.

    Compute is that of one GPU with its experts' share: the same routed rows, 128 / ep experts.
    Exposed are: where ep > 1, in each layer and each direction, the first dispatch and the last
    combine, which no other micro-batch covers, and one host read a micro-batch in forward; where
    fsdp > 1, what gathers and reductions of a layer take longer than its compute, and the first
    gather and last reduction in full."""
    tokens, n = micro * 4096, sequences // micro
    rates = (
        {k: (r * FREED if k in PADDED else r, w) for k, (r, w) in RATES.items()}
        if fsdp * ep > 1
        else RATES
    )
    here = MODEL["E"] // ep
    calls = lambda table: sum(
        k * predicted(name, tokens, rates, E=here if name in PADDED else MODEL["E"])
        for name, k in table.items()
    )
    parts = update(sequences, micro, recompute, "adamw8", rates)
    again = {"none": {}, "moe": MOE, "layer": LAYER}[recompute]
    parts["layers"], parts["recompute"] = n * LAYERS * calls(KEPT), n * LAYERS * calls(again)
    shards = fsdp * ep
    parts["gradient norm"] /= shards
    parts["optimizer"] /= shards
    parts["exchange, exposed"] = parts["host reads"] = parts["weights and gradients, exposed"] = 0
    if ep > 1:
        # other ranks that a token goes to
        ranks = ep * (1 - (1 - 1 / ep) ** MODEL["K"]) * (ep - 1) / ep
        once = tokens * ranks * MODEL["C"] * MODEL["x"] / PEERS
        parts["exchange, exposed"] = 4 * LAYERS * once
        parts["host reads"] = n * LAYERS * HOST_READ
    if fsdp > 1:
        bytes = (MODEL["P"] / ep + DENSE) * MODEL["x"] * (fsdp - 1) / fsdp
        link = NETWORK if ep > 1 else NVLINK
        gather, reduce = bytes / link, 2 * bytes / link  # gradients are fp32
        forward = n * sum(
            k * predicted(name, tokens, rates)
            for name, k in KEPT.items()
            if "backward" not in name and "wgrad" not in name
        )
        backward = (parts["layers"] + parts["recompute"]) / LAYERS - forward
        parts["weights and gradients, exposed"] = (
            gather
            + reduce
            + LAYERS * (max(0, gather - forward) + max(0, gather + reduce - backward))
        )
    return parts


CLUSTERS = {
    "1 GPU": (16, 4, "layer", 1, 1),
    "8 GPUs, ep 8": (16, 4, "layer", 1, 8),
    "8 GPUs, ep 8, less recomputed": (16, 4, "moe", 1, 8),
    "8 GPUs, fsdp 8": (16, 4, "layer", 8, 1),
    "64 GPUs, fsdp 8 x ep 8": (16, 4, "moe", 8, 8),
}


def print_clusters():
    names = list(cluster(*CLUSTERS["1 GPU"]))
    print(
        "| one update, 16 sequences of 4,096 a GPU | recompute | "
        + " | ".join(names)
        + f" | together | tokens/s a GPU | waits that {BEST:,} would leave |\n"
        + "|---" * (len(names) + 5)
        + "|"
    )
    for title, arguments in CLUSTERS.items():
        parts = cluster(*arguments)
        total, tokens = sum(parts.values()), arguments[0] * 4096
        waits = sum(v for k, v in parts.items() if "exposed" in k or "host" in k)
        print(
            f"| {title} | {arguments[2]} | "
            + " | ".join(f"{1e3 * v:.0f} ms" for v in parts.values())
            + f" | {1e3 * total:.0f} ms | {tokens / total:.0f} | "
            f"{1e3 * (tokens / BEST - total + waits):.0f} ms |"
        )


def number(v):
    return f"{v:.0f}" if v >= 100 else f"{v:.1f}" if v >= 10 else f"{v:.2f}"


def rate(kernel, tokens, seconds):
    flops, bytes = work(kernel, tokens)
    return (
        f"{flops / seconds / 1e12:.0f} TFLOP/s"
        if flops / PRODUCTS > bytes / COPIES
        else f"{bytes / seconds / 1e9:.0f} GB/s"
    )


def print_floors():
    print(
        "| kernel | FLOPs | bytes | floor at 4,096 tokens, us | at 32,768 | bound there |\n"
        "|---|---|---|---|---|---|"
    )
    for name, (flops, bytes) in COSTS.items():
        f, b = work(name, 32768)
        plain = lambda s: s.replace("*", " ") if s != "0" else ""
        print(
            f"| `{name}` | {plain(flops)} | {plain(bytes)} | {number(1e6 * floor(name, 4096))} | "
            f"{number(1e6 * floor(name, 32768))} | "
            f"{'products' if f / PRODUCTS > b / COPIES else 'memory'} |"
        )


def print_predictions():
    print(
        "| kernel | calls a layer | floor, 4,096 tokens | predicted | floor, 32,768 tokens | "
        "predicted | that is |\n|---|---|---|---|---|---|---|"
    )
    for name in COSTS:
        us = [number(1e6 * t) for n in (4096, 32768) for t in (floor(name, n), predicted(name, n))]
        again = LAYER.get(name, 0)
        calls = (
            f"{KEPT.get(name, 0)}{f' + {again}' if again else ''}" if name in KEPT or again else ""
        )
        print(
            f"| `{name}` | {calls} | {' | '.join(us)} | "
            f"{rate(name, 32768, predicted(name, 32768))} |"
        )
    for title, rates in (("rate", RATES), ("without cuDNN and wgmma", OLDER)):
        print(f"\n| {title} | of | because |\n|---|---|---|")
        for name, (r, why) in rates.items():
            print(
                f"| {f'{r / 1e12:.0f} TFLOP/s' if r >= 1e13 else f'{r / COPIES:.2f} of a copy'} | "
                f"`{name}` | {why} |"
            )
    print(
        "\n| one update of all 48 layers | "
        + " | ".join(update(8, 8, "none", "sgd"))
        + " | together | tokens/s | of the floor |\n"
        + "|---" * 10
        + "|"
    )
    for title, arguments in UPDATES.items():
        parts, shortest = update(*arguments), sum(update(*arguments[:4], 0).values())
        total, (sequences, micro, recompute, optimizer) = sum(parts.values()), arguments[:4]
        print(
            f"| {title}: {sequences} sequences of 4,096, {micro} a micro-batch, recompute "
            f"{recompute} | "
            + " | ".join(f"{1e3 * v:.1f} ms" for v in parts.values())
            + f" | {1e3 * total:.0f} ms | {sequences * 4096 / total:.0f} | "
            f"{100 * shortest / total:.0f} % |"
        )


if __name__ == "__main__":
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--floors", action="store_true")
    p.add_argument("--cluster", action="store_true")
    a = p.parse_args()
    print_floors() if a.floors else print_clusters() if a.cluster else print_predictions()
