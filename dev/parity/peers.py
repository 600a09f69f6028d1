#!/usr/bin/env python3
"""Runs every adapter on every fixture and rank count and writes the table of what was found.

    python peers.py [--out FILE.md] [--fixtures NAME...] [--ranks 1 2 4] [--keep ROWS.jsonl]

With --keep a result is written to the file when it is there, and what the file has is not run again.
"""
import argparse, datetime, json, os, subprocess, sys

HERE = os.path.dirname(os.path.abspath(__file__))
FIXTURES = ["gqa", "tied", "dense", "wide", "parallel", "skewed", "documents", "masks", "chat"]
# (adapter, its arguments, needs several ranks)
ADAPTERS = [("hf.py", [], False), ("hf_ep.py", ["data", "mean"], True), ("hf_ep.py", ["data", "global"], True), ("hf_ep.py", ["batch", "mean"], True),
            ("fsdp2.py", ["mean"], True), ("fsdp2.py", ["global"], True), ("torchtitan_ep.py", [], True)]


def run(adapter, fixture, arguments, several, ranks, timeout):
    """The adapter's result, or {"error": its last line}."""
    launch = [sys.executable] if not several else [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    name = f"{adapter[:-3]} {' '.join(arguments)}".strip()
    try:
        out = subprocess.run([*launch, os.path.join(HERE, adapter), fixture, *arguments], capture_output=True, text=True, timeout=timeout, env=env)
    except subprocess.TimeoutExpired:
        return {"adapter": name, "fixture": fixture, "ranks": ranks, "error": f"no result within {timeout} s"}
    for line in out.stdout.splitlines():
        if line.startswith("PARITY "):
            return json.loads(line[7:])
    errors = [line.split("]: ")[-1] for line in out.stderr.splitlines() if "Error: " in line]
    return {"adapter": name, "fixture": fixture, "ranks": ranks, "error": (errors or ["no result"])[0][:110]}


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--out", default="parity-peers.md")
    p.add_argument("--fixtures", nargs="+", default=FIXTURES)
    p.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    p.add_argument("--timeout", type=int, default=180)
    p.add_argument("--keep", metavar="ROWS.jsonl")
    a = p.parse_args()
    rows, kept = [], {}
    if a.keep and os.path.exists(a.keep):
        kept = {key: row for key, row in map(json.loads, open(a.keep))}
    for adapter, arguments, several in ADAPTERS:
        for fixture in a.fixtures:
            for ranks in a.ranks if several else [1]:
                key = " ".join([adapter, *arguments, fixture, str(ranks)])
                row = kept.get(key) or run(adapter, fixture, arguments, several, ranks, a.timeout)
                if a.keep and key not in kept:
                    with open(a.keep, "a") as f:
                        f.write(json.dumps([key, row]) + "\n")
                rows.append(row)
                print(row["adapter"], fixture, ranks, row.get("error") or f"gradient {row['gradient']:.1e}, {row['beyond']} beyond", flush=True)
    number = lambda v: "-" if v is None else f"{v:.1e}"
    with open(a.out, "w") as f:
        f.write(f"# make parity-peers, {datetime.date.today()}\n\n"
                "Relative deviations (norm-wise) from the values that transformers computes in one process in fp32; gradients unclipped, of the total.\n"
                "`beyond`: gradients off by more than 2e-5, and what they belong to; `scale`: the factor that fits the worst gradient best.\n\n"
                "| trainer | fixture | ranks | logits | loss | aux | worst gradient | scale | beyond | which |\n|---|---|---|---|---|---|---|---|---|---|\n")
        for r in rows:
            if "error" in r:
                f.write(f"| {r['adapter']} | {r['fixture']} | {r['ranks']} | {r['error']} | | | | | | |\n")
            else:
                missing = f", {r['missing']} missing" if r["missing"] else ""
                f.write(f"| {r['adapter']} | {r['fixture']} | {r['ranks']} | {number(r['logits'])} | {number(r['loss'])} | {number(r['aux'])} | "
                        f"{number(r['gradient'])} {r['worst']} | {r['scale']:.4f} | {r['beyond']} of {r['of']}{missing} | {', '.join(r['kinds'])} |\n")
    print(f"written: {a.out}")


if __name__ == "__main__":
    main()
