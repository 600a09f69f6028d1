#!/usr/bin/env python3
"""The same update in transformers, timed; and the report that sets it beside moe.c
(dev/bench_cpu.sh runs both in turns).

    python dev/hf/bench.py step --model DIR --train FILE --seq-len 512 --batch 8 \\
        --experts grouped_mm --steps 3                             one line of JSON
    python dev/hf/bench.py report LINES.jsonl --kernels TABLE.txt --phases PHASES.txt \\
        --out REPORT.md --note TEXT...

An update is what train_moe does: forward, cross entropy and load-balancing loss, backward,
clipping, AdamW. What transformers offers to be fast is on: sdpa attention, fused AdamW, the expert
kernels asked for. --dtype bf16: weights, gradients and both moments are bf16, as transformers
trains a model loaded so. The matrix-product peak is that of torch's own fp32 product, measured
between updates.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))


def step(a):
    import torch
    import transformers
    from reference import Windows, forward, load_model, losses, matmul_peak, step_flops, expert_load

    torch.set_num_threads(a.threads)
    model = load_model(a.model, a.dtype, a.attn, a.experts)
    config = model.config
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(a.embed)
        for layer in model.model.layers:
            layer.mlp.gate.weight[: config.num_experts // 8].mul_(a.skew)
    windows = Windows(a.train, a.seq_len, config.vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    flops = step_flops(model, config, a.batch, a.seq_len)
    seconds, peaks, load, first = [], [], 0.0, 0.0
    for s in range(-a.warmup, a.steps):
        inputs, targets, _ = windows.batch((s + a.warmup) * a.batch, a.batch)
        if s == 0:
            peaks.append(matmul_peak(torch.float32))
        start = time.perf_counter()
        logits, router = forward(model, inputs)
        total, loss, _, _ = losses(
            config, logits, router, targets, config.router_aux_loss_coef, 0.0, "layers"
        )
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        value = loss.item()
        first = value if s == -a.warmup else first
        if s >= 0:
            seconds.append(time.perf_counter() - start)
            peaks.append(matmul_peak(torch.float32))
            load += expert_load(router, config.num_experts_per_tok)[0] / a.steps
        del logits, router, total, loss
    middle, tokens = statistics.median(seconds), a.batch * a.seq_len
    share = statistics.median(
        flops / t / (0.5 * (x + y)) for t, x, y in zip(seconds, peaks, peaks[1:])
    )
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(
        json.dumps(
            {
                "who": f"transformers, {a.experts}",
                "dtype": a.dtype,
                "skew": a.skew,
                "tokens": tokens,
                "steps": a.steps,
                "seconds": middle,
                "tok_s": tokens / middle,
                "gflops": flops / middle / 1e9,
                "peak_gflops": statistics.median(peaks) / 1e9,
                "share": share,
                "fastest": min(seconds),
                "load": load,
                "first_loss": first,
                "memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                "flops_per_token": flops / tokens,
                "device": f"{versions}, {a.threads} threads, {a.attn}",
            }
        ),
        flush=True,
    )


COLUMNS = ("tok_s", "gflops", "share", "peak_gflops", "seconds", "load", "memory_mib")


def report(a):
    rows = [json.loads(line) for line in open(a.lines) if line.startswith("{")]
    if not rows:
        sys.exit(f"error: {a.lines} has no line, hint: the runs did not finish")
    out = ["# make bench-cpu", "", *(f"- {note}" for note in a.note), ""]
    for skew in sorted({r["skew"] for r in rows}):
        here = [r for r in rows if r["skew"] == skew]
        title = "Near-balanced routing"
        if skew != 1:
            title = f"Skewed routing (router rows of an eighth of the experts x {skew:g})"
        out += [
            f"## {title}",
            "",
            "| | tokens/s | GFLOP/s | of the sgemm peak | sgemm peak, GFLOP/s | s/update (median "
            "of rounds) | all rounds, tokens/s | max/mean load | loss of the first update | peak "
            "memory, MiB |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        middle = {}
        for who in dict.fromkeys(r["who"] for r in here):
            mine = [r for r in here if r["who"] == who]
            m = {k: statistics.median(r[k] for r in mine) for k in COLUMNS}
            middle[who] = m
            out.append(
                f"| {who} | {m['tok_s']:.0f} | {m['gflops']:.1f} | {100 * m['share']:.1f} % | "
                f"{m['peak_gflops']:.0f} | {m['seconds']:.3f} | "
                f"{' '.join(format(r['tok_s'], '.0f') for r in mine)} | {m['load']:.2f} | "
                f"{mine[-1]['first_loss']:.6f} | {m['memory_mib']:.0f} |"
            )
        others = {w: m for w, m in middle.items() if not w.startswith("moe.c")}
        if others and "moe.c" in middle:
            best = max(others, key=lambda w: others[w]["tok_s"])
            ours = (r for r in here if r["who"] == "moe.c")
            theirs = (r for r in here if r["who"] == best)
            ratio = [x["tok_s"] / y["tok_s"] for x, y in zip(ours, theirs)]
            out += [
                "",
                f"moe.c is {statistics.median(ratio):.2f} x the fastest of transformers ({best}); "
                f"round by round {' '.join(f'{r:.2f}' for r in ratio)}. "
                f"Memory {middle['moe.c']['memory_mib'] / others[best]['memory_mib']:.2f} x.",
            ]
        out.append("")
    one = rows[0]
    out += [
        f"Model FLOPs: {one['flops_per_token']:.6g} a token = 6 x parameters that a token meets in "
        "matrix products + 12 x layers x heads x head_dim x T / 2 "
        "(forward and backward, causal half of attention, nothing for recomputation, embedding "
        "look-ups, norms or the optimizer).",
        "The sgemm peak is measured before and after every update in the same process; the share "
        "is the median over updates against the mean of the two.",
        "",
    ]
    out += [
        f"- {d}"
        for d in dict.fromkeys(
            f"{r['who']}: {r['device']}".split(", fp32 product")[0] for r in rows
        )
    ]
    for title, path in (("Kernels", a.kernels), ("Phases of one update", a.phases)):
        if path and os.path.getsize(path):
            text = open(path).read().rstrip()
            out += ["", f"## {title}", "", text if title == "Kernels" else f"```\n{text}\n```"]
    with open(a.out, "w") as f:
        f.write("\n".join(out) + "\n")
    print("\n".join(out[:40]))


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = p.add_subparsers(dest="command", required=True)
    s = commands.add_parser("step")
    s.add_argument("--model", required=True)
    s.add_argument("--train", nargs="+", required=True)
    for name, default in (
        ("seq-len", 512),
        ("batch", 8),
        ("steps", 3),
        ("warmup", 2),
        ("threads", os.cpu_count()),
    ):
        s.add_argument(f"--{name}", type=int, default=default)
    s.add_argument("--embed", type=float, default=1.0)
    s.add_argument("--skew", type=float, default=1.0)
    s.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    s.add_argument("--attn", default="sdpa")
    s.add_argument("--experts", default="grouped_mm")
    r = commands.add_parser("report")
    r.add_argument("lines")
    r.add_argument("--kernels")
    r.add_argument("--phases")
    r.add_argument("--out", required=True)
    r.add_argument("--note", nargs="*", default=[])
    a = p.parse_args()
    step(a) if a.command == "step" else report(a)


if __name__ == "__main__":
    main()
