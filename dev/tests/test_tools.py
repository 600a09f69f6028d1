#!/usr/bin/env python3
"""Numbered checks of what draws, exports and compares: python3 dev/tests/test_tools.py

dev/plot.py needs matplotlib, dev/export.py tensorboard, dev/hf/compare.py safetensors,
dev/parity/confirm.py transformers, dev/watch.html a Chromium; what is missing is left out, and
said. The page is drawn by a headless browser and then asked what it has drawn.
"""

import fcntl
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request

DEV = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
passed = failed = 0


def check(good, what):
    global passed, failed
    passed, failed = passed + bool(good), failed + (not good)
    print("ok" if good else "FAILED", passed + failed, what)


def has(module):
    found = (
        subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True).returncode
        == 0
    )
    if not found:
        print(f"skipped: {module} is not installed")
    return found


def line(step, **more):
    return (
        json.dumps(
            {
                "step": step,
                "loss": 1.5 + 4 * math.exp(-step / 20),
                "lr": 1e-3,
                "grad_norm": 1.0,
                "tok_s": 5000,
                "ms": 100,
                "expert_load_max": 2.0,
                "expert_dead": 1,
                **more,
            }
        )
        + "\n"
    )


def make_run(folder):
    """60 updates, one of them without a loss, expert load every tenth; the last line is half
    written."""
    os.makedirs(folder)
    with open(f"{folder}/log.jsonl", "w") as f:
        f.write('{"step":0,"val_loss":5.5,"val_loss.web":5.4,"val_loss.code":5.6}\n')
        for step in range(1, 61):
            load = {"expert_load": [[0.0, 0.5, 0.25, 0.25], [0.25] * 4]} if step % 10 == 0 else {}
            if step > 56:
                f.write(
                    json.dumps({"step": step, "sample": f"once <b>upon\na \"time\": {step}"}) + "\n"
                )
            f.write(
                line(step, **load)
                if step != 30
                else line(step, **load).replace(
                    re.search(r'"loss": [^,]*', line(step))[0], '"loss": null'
                )
            )
        f.write('{"step":60,"val_loss":1.9,"val_loss.web":1.8,"val_loss.code":2.0}\n{"step":61,"lo')
    with open(f"{folder}/run.json", "w") as f:
        json.dump(
            {
                "device": "cpu",
                "world": 2,
                "precision": "fp32",
                "options": {"steps": 100, "out": "runs/<b>x"},
            },
            f,
        )


def python(*arguments):
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_plot(folder):
    script = f"{DEV}/plot.py"
    check(
        python(script, f"{folder}/run")[0] == 0
        and os.path.getsize(f"{folder}/run/plot.png") > 10000,
        "plot.py draws the folder of a live run",
    )
    for text, word in (
        ("[1]\n", "line 1 has no step"),
        ('{"loss":1}\n', "line 1 has no step"),
        ("x\n" + line(1), "line 1 is not JSON"),
        ('{"step":1,"loss":"a"}\n', "loss is no number"),
        ("", "no update in it"),
        ('{"step":0,"val_loss":1}\n', "no update in it"),
        (line(1, expert_load=[[1, 2]]) + line(2, expert_load=[[1], [2]]), "several shapes"),
    ):
        with open(f"{folder}/foreign.jsonl", "w") as f:
            f.write(text)
        status, said = python(script, f"{folder}/foreign.jsonl", "--out", f"{folder}/x.png")
        check(
            status == 1 and word in said and said.count("\n") == 1,
            f"plot.py, error: {said.strip()[-90:]}",
        )


def test_export(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = f"{folder}/live"
    make_run(run)
    with open(f"{run}/run.json", "w") as f:
        json.dump({"options": {"steps": 70}}, f)
    lock = open(f"{run}/.lock", "w")
    fcntl.lockf(lock, fcntl.LOCK_EX)  # as the owner of the folder does
    follower = subprocess.Popen(
        [
            sys.executable,
            f"{DEV}/export.py",
            run,
            "--to",
            "tensorboard",
            "--follow",
            "--every",
            "0.3",
        ]
    )
    events = f"{run}/tensorboard"
    for _ in range(300):  # until the first updates are exported
        if os.path.isdir(events) and any(
            os.path.getsize(f"{events}/{name}") > 9000 for name in os.listdir(events)
        ):
            break
        time.sleep(0.1)
    with open(f"{run}/log.jsonl") as f:
        kept = [
            part
            for part in f.read().split("\n")
            if part.startswith("{") and part.endswith("}") and json.loads(part)["step"] <= 55
        ]
    with open(f"{run}/log.jsonl", "w") as f:  # cut back by a resume, then more updates
        f.write("\n".join(kept) + "\n")
    time.sleep(1)
    with open(f"{run}/log.jsonl", "a") as f:
        f.writelines(line(step) for step in range(56, 71))
        f.write('{"step":70,"val_loss":1.7}\n')
        f.flush()
        time.sleep(1.5)
        f.write('{"step":70,"sources":{"web":{"windows":5,"epochs":0.5}}}\n')
    lock.close()
    check(follower.wait(30) == 0, "export.py follows a run to its last update")
    events = EventAccumulator(f"{run}/tensorboard", size_guidance={"scalars": 0})
    events.Reload()
    loss = {e.step: e.value for e in events.Scalars("loss")}
    check(
        len(events.Scalars("loss")) == 69 and set(loss) == set(range(1, 71)) - {30},
        "every update once, in spite of a log that was cut back",
    )
    check(
        abs(loss[7] - json.loads(line(7))["loss"]) < 1e-6
        and events.Scalars("val_loss")[-1].step == 70,
        "values and the last evaluation",
    )
    check(
        "sources.web.windows" in events.Tags()["scalars"], "what the run still says before it ends"
    )
    check(
        abs(events.Scalars("expert_load_max.layer_0")[0].value - 2) < 1e-6
        and "run.json" in events.Tags()["tensors"],
        "expert load a layer, run.json",
    )
    python(f"{DEV}/export.py", run, "--to", "tensorboard")
    check(
        len([n for n in os.listdir(f"{run}/tensorboard") if n.startswith("events")]) == 1,
        "a second export replaces the first",
    )
    status, said = python(f"{DEV}/export.py", f"{folder}/absent")
    check(
        status == 1 and "no such folder" in said and said.count("\n") == 1,
        f"export.py, error: {said.strip()[-70:]}",
    )


def test_compare(folder):
    """Two first updates of 2 MoE layers, 6 tokens, 4 experts, 2 chosen: in layer 1 tokens 1 and 4
    choose otherwise."""
    import numpy as np
    from safetensors.numpy import save_file

    logits = np.tile(np.float32([3, 2, 1, 0]), (2, 1, 6, 1))
    logits[1, 0, 1] = [3, 2, 1.75, 0]
    logits[1, 0, 4] = [2, 3, 0, 1.5]
    ours = np.ascontiguousarray(np.argsort(-logits, -1)[..., :2], np.int32)
    theirs = ours.copy()
    theirs[1, 0, 1] = [2, 0]  # the third of its logits in place of the second
    theirs[1, 0, 4] = [3, 1]
    theirs[0, 0, 2] = ours[0, 0, 2][::-1]  # another order is no other choice
    common = {"logits": np.ones((1, 6, 3), np.float32), "loss": np.ones((), np.float32)}
    save_file({**common, "topk": theirs}, f"{folder}/a.safetensors")
    for name, more in (("b", {"router": logits}), ("c", {})):
        save_file({**common, "topk": ours, **more}, f"{folder}/{name}.safetensors")
        said = python(
            f"{DEV}/hf/compare.py",
            "dumps",
            f"{folder}/a.safetensors",
            f"{folder}/{name}.safetensors",
        )[1]
        check(
            "routing: 2 of 12 (layer, token) pairs have other experts" in said
            and "layer 0" not in said
            and "  layer 1: 2 of 6 tokens, first 1"
            + ("; margins 2.50e-01 (closest) to 5.00e-01\n" if more else "\n")
            in said,
            f"compare.py dumps: routings that differ, by layer, {'with' if more else 'without'} "
            "margins",
        )


def test_confirm(folder):
    """A trainer whose gradient of one tensor is off, and a fixture whose expected gradient is: the
    slope of the loss tells them apart."""
    from safetensors.numpy import load_file, save_file

    kit, name = f"{folder}/kit", "model.layers.1.self_attn.q_proj.weight"
    shutil.copytree(f"{DEV}/parity", kit)
    for part in (f"{DEV}/fixtures/gqa", f"{DEV}/naive"):
        shutil.copytree(part, f"{kit}/fixtures/gqa" if part.endswith("gqa") else f"{kit}/naive")
    shutil.copy(f"{DEV}/hf/reference.py", kit)
    expected = load_file(f"{kit}/fixtures/gqa/expected.safetensors")
    got = {n: t for n, t in expected.items() if n.startswith("grad.")}
    for wrong, status, slope in (("theirs", 0, 0), ("expected", 1, 1)):
        tensors = dict(got if wrong == "theirs" else expected)
        tensors[f"grad.{name}"] = tensors[f"grad.{name}"] * 1.01
        save_file(
            tensors,
            (
                f"{folder}/got.safetensors"
                if wrong == "theirs"
                else f"{kit}/fixtures/gqa/expected.safetensors"
            ),
        )
        if wrong == "expected":
            save_file(got, f"{folder}/got.safetensors")
        ended = subprocess.run(
            [sys.executable, f"{kit}/confirm.py", "gqa", "1", f"{folder}/got.safetensors"],
            capture_output=True,
            text=True,
        )
        said = (
            json.loads(ended.stdout)
            if ended.stdout
            else {"kinds": {"dense": [ended.stderr[-200:], 0, 9]}, "naive": 0}
        )
        row = said["kinds"]["dense"]
        check(
            ended.returncode == status
            and row[0] == name
            and abs(row[2] - slope) < 0.01
            and (said["naive"] > 1e-3) == slope,
            f"confirm.py, {wrong} off by 1 %: {row[0]}, slope {row[2]:.4f}, naive "
            f"{said['naive']:.0e}",
        )


def browser(chromium, url, *options):
    return subprocess.run(
        [
            chromium,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--virtual-time-budget=3000",
            "--timeout=10000",
            *options,
            url,
        ],
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout


def test_watch(folder, chromium):
    port = 20000 + os.getpid() % 20000
    server = subprocess.Popen(
        ["sh", f"{DEV}/watch.sh", f"{folder}/run", str(port)], stdout=subprocess.PIPE, text=True
    )
    try:
        url = server.stdout.readline().split()[0]
        for _ in range(50):
            try:
                urllib.request.urlopen(url).read()
                break
            except OSError:
                time.sleep(0.1)
        for name, size, scheme in (
            ("light", "1200,1500", 1),
            ("dark", "1200,1500", 0),
            ("phone", "390,1500", 1),
        ):
            page = browser(
                chromium,
                url,
                "--dump-dom",
                f"--window-size={size}",
                f"--blink-settings=preferredColorScheme={scheme}",
            )
            drawn = {
                key: int(n)
                for key, n in re.findall(r'data-key="([^"]*)" data-points="(\d+)"', page)
            }
            paths = {
                key: d for d, key in re.findall(r'<path d="([^"]*)"[^>]*data-key="([^"]*)"', page)
            }
            check(
                'data-updates="60"' in page
                and drawn.get("loss") == 60
                and drawn.get("val_loss.web") == 2,
                f"{name}: 60 updates, 2 evaluations of each source",
            )
            check(
                {
                    "loss",
                    "loss~",
                    "val_loss",
                    "lr",
                    "tok_s",
                    "grad_norm",
                    "expert_load_max",
                    "expert_dead",
                }
                <= set(drawn)
                and all(len(d) > 10 and "NaN" not in d for d in paths.values()),
                f"{name}: every panel has its lines",
            )
            check(paths["loss"].count("M") == 2, f"{name}: the update without a loss is a gap")
            check(
                'data-cells="48"' in page and page.count("<canvas") == 2,
                f"{name}: 6 columns of 4 experts in 2 layers",
            )
            check(
                "runs/&lt;b&gt;x" in page and "60 / 100" in page,
                f"{name}: the head has the run's name as text, and its updates",
            )
            texts = "".join(
                f'<p>after update {n}</p><pre>once &lt;b&gt;upon\na "time": {n}</pre>'
                for n in (60, 59, 58)
            )
            check(
                texts in page,
                f"{name}: the last three samples of the log, the newest first, as text",
            )
        shot = f"{folder}/watch.png"
        browser(chromium, url, f"--screenshot={shot}", "--window-size=390,1500")
        check(os.path.getsize(shot) > 20000, "a picture at phone width")
    finally:
        server.terminate()


# A part that fails must fail the suite: once its count of failures was read from the wrong word.
def test_sum(folder):
    def total(*texts):
        names = [f"{folder}/part{i}.log" for i in range(len(texts))]
        for name, text in zip(names, texts):
            with open(name, "w") as f:
                f.write(text)
        command = ["awk", "-f", f"{DEV}/tests/sum.awk", *names]
        p = subprocess.run(command, capture_output=True, text=True)
        return p.returncode, p.stdout.splitlines()[-1]

    good, bad = "1 passed, 1 failed\nx: 5 passed, 0 failed\n", "3 passed, 2 failed\nmake: *** 1\n"
    check(total(good) == (0, "5 passed, 0 failed"), "sum.awk: the last closing line counts")
    check(total(good, bad) == (1, "8 passed, 2 failed"), "sum.awk: failures of a part are counted")
    check(total(good, "") == (1, "5 passed, 1 failed"), "sum.awk: no closing line is a failure")


def main():
    with tempfile.TemporaryDirectory() as folder:
        test_sum(folder)
        make_run(f"{folder}/run")
        if has("matplotlib"):
            test_plot(folder)
        if has("numpy") and has("safetensors"):
            test_compare(folder)
        if has("transformers"):
            test_confirm(folder)
        if has("tensorboard"):
            test_export(folder)
        chromium = (
            shutil.which("chromium")
            or shutil.which("chromium-browser")
            or shutil.which("google-chrome")
        )
        if chromium:
            test_watch(folder, chromium)
        else:
            print("skipped: no Chromium is installed")
    print(f"{passed} passed, {failed} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
