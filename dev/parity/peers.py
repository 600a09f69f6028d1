#!/usr/bin/env python3
"""Runs every adapter on every fixture and rank count and writes the table of what was found.

    python peers.py [--out FILE.md] [--fixtures NAME...] [--ranks 1 2 4] [--keep ROWS.jsonl]

With --keep a result is written to the file when it is there, and what the file has is not run
again.
"""

import argparse
import datetime
import json
import math
import os
import re
import runpy
import signal
import socket
import sys
import tempfile
import time
import traceback

HERE = os.path.dirname(os.path.abspath(__file__))
FIXTURES = ["gqa", "tied", "dense", "wide", "parallel", "skewed", "documents", "masks", "chat"]
# (adapter, its arguments, needs several ranks)
ADAPTERS = [
    ("hf.py", [], False),
    ("hf_ep.py", ["data", "mean"], True),
    ("hf_ep.py", ["data", "global"], True),
    ("hf_ep.py", ["batch", "mean"], True),
    ("fsdp2.py", ["mean"], True),
    ("fsdp2.py", ["global"], True),
    ("torchtitan_ep.py", [], True),
]


def launch(script, words, ranks, environment, timeout):
    """(stdout, stderr) of a script of this folder, or None after `timeout` seconds. A process a
    rank, forked from this one, so that torch and transformers are imported once; the ranks find
    each other as under torchrun."""
    import torch, transformers  # noqa: F401

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        children = []
        for rank in range(ranks):
            child = os.fork()
            if child:
                children.append(child)
                continue
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                **environment,
            }
            sys.argv = [script, *words]
            status = 1
            try:
                runpy.run_path(os.path.join(HERE, script), run_name="__main__")
                status = 0
            except SystemExit as e:
                status = e.code or 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        end, late = time.monotonic() + timeout, False
        while children:
            pid, status = os.waitpid(children[0], os.WNOHANG)
            if pid:
                children.pop(0)
            elif time.monotonic() > end:
                late = True
                for child in children:
                    os.kill(child, signal.SIGKILL)
                end = math.inf
            else:
                time.sleep(0.05)
        out.seek(0)
        err.seek(0)
        return None if late else (out.read(), err.read())


def run(adapter, fixture, arguments, ranks, timeout):
    """The adapter's result, with what confirm.py says where gradients deviate; or {"error": of the
    first rank that failed by itself}."""
    name = f"{adapter[:-3]} {' '.join(arguments)}".strip()
    with tempfile.TemporaryDirectory() as folder:
        got = os.path.join(folder, "got.safetensors")
        said = launch(adapter, [fixture, *arguments], ranks, {"PARITY_GOT": got}, timeout)
        if not said:
            return {
                "adapter": name,
                "fixture": fixture,
                "ranks": ranks,
                "error": f"no result within {timeout} s",
            }
        for line in said[0].splitlines():
            if line.startswith("PARITY "):
                row = json.loads(line[7:])
                if row["beyond"]:
                    kind = (
                        ["--rank-losses", arguments[-1]]
                        if arguments and arguments[0] != "batch"
                        else []
                    )
                    answer = launch("confirm.py", [fixture, str(ranks), got, *kind], 1, {}, timeout)
                    row["confirm"] = json.loads(answer[0]) if answer and answer[0] else None
                return row
    errors = [line for line in said[1].splitlines() if re.match(r"[\w.]*Error: ", line)]
    errors.sort(
        key=lambda line: "gloo" in line
    )  # a rank that lost another one says so, but not why
    return {
        "adapter": name,
        "fixture": fixture,
        "ranks": ranks,
        "error": (errors or ["no result"])[0][:110],
    }


def verdict(row):
    """The last three columns: where the slopes lie (the worst of the kinds), the naive model's
    difference, and whether all of it holds."""
    c = row.get("confirm")
    if not c:
        return "| | not confirmed" if row["beyond"] else "| |"
    far = lambda column, at: max(
        (k[column] for k in c["kinds"].values()), key=lambda v: abs(v - at)
    )
    own = "" if c["values"] is None else f", {far(3, 1):.4f}"
    pads = (
        ": look-ups of pad_token_id, by definition"
        if any(k[4] for k in c["kinds"].values())
        else ""
    )
    naive = "-" if c["naive"] is None else format(c["naive"], ".1e")
    return f"{abs(far(2, 0)):.4f}{own} | {naive} | {'yes' if c['holds'] else 'no'}{pads}"


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--out", default="parity-peers.md")
    p.add_argument("--fixtures", nargs="+", default=FIXTURES)
    p.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
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
                row = kept.get(key) or run(adapter, fixture, arguments, ranks, a.timeout)
                if a.keep and key not in kept:
                    with open(a.keep, "a") as f:
                        f.write(json.dumps([key, row]) + "\n")
                rows.append(row)
                print(
                    row["adapter"],
                    fixture,
                    ranks,
                    row.get("error") or f"gradient {row['gradient']:.1e}, {row['beyond']} beyond",
                    flush=True,
                )
    number = lambda v: "-" if v is None else f"{v:.1e}"
    with open(a.out, "w") as f:
        f.write(
            f"# make parity-peers, {datetime.date.today()}\n\n"
            "Relative deviations (norm-wise) from the values that transformers computes in one "
            "process in fp32; gradients unclipped, of the total.\n"
            "`beyond`: gradients off by more than 2e-5, and what they belong to; `scale`: the "
            "factor that fits the worst gradient best. `slopes`: of the\n"
            "worst of each of these, by central differences in float64 (confirm.py), along the "
            "deviation: 0 is the expected gradient and 1 the trainer's; first\n"
            "of the fixture's total, then of the mean over ranks of each rank's own. `naive`: "
            "worst difference of the expected gradients from dev/naive.\n\n"
            "| trainer | fixture | ranks | logits | loss | aux | worst gradient | scale | beyond | "
            "which | slopes | naive | confirmed |\n"
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|\n"
        )
        for r in rows:
            if "error" in r:
                f.write(
                    f"| {r['adapter']} | {r['fixture']} | {r['ranks']} | {r['error']} | | | | | | "
                    "| | | |\n"
                )
            else:
                missing = f", {r['missing']} missing" if r["missing"] else ""
                f.write(
                    f"| {r['adapter']} | {r['fixture']} | {r['ranks']} | {number(r['logits'])} | "
                    f"{number(r['loss'])} | {number(r['aux'])} | "
                    f"{number(r['gradient'])} {r['worst']} | {r['scale']:.4f} | {r['beyond']} of "
                    f"{r['of']}{missing} | {', '.join(r['kinds'])} | {verdict(r)} |\n"
                )
    print(f"written: {a.out}")


if __name__ == "__main__":
    main()
