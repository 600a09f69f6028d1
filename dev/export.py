#!/usr/bin/env python3
"""Copies the numbers of a run's log to TensorBoard, Weights & Biases or MLflow, offline, and
follows it.

    python3 dev/export.py RUN [--to tensorboard|wandb|mlflow] [--follow]

RUN is the --out folder of a run. Without --to, the first of the three that is installed is used.
Everything is written inside RUN (RUN/tensorboard, RUN/wandb, RUN/mlruns); W&B goes online where
WANDB_MODE says so, MLflow where MLFLOW_TRACKING_URI does. With --follow the script goes on until
the run has made its last update and ended, or until it is interrupted. The options of run.json
become the run's configuration. A run that was cut back and resumed repeats its updates bit for bit,
so what was exported once is not exported again.
"""

import argparse
import fcntl
import glob
import importlib
import json
import math
import os
import struct
import sys
import time

TARGETS = ["tensorboard", "wandb", "mlflow"]


def die(what, hint):
    print(f"error: {what}, hint: {hint}", file=sys.stderr)
    sys.exit(1)


def owned(run):
    """Whether a running train_moe owns the folder: it holds a lock on RUN/.lock, which is looked at
    and not taken."""
    try:
        with open(os.path.join(run, ".lock"), "rb") as f:
            asked = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            return struct.unpack("hhqqi", fcntl.fcntl(f, fcntl.F_GETLK, asked))[0] != fcntl.F_UNLCK
    except OSError:
        return False


def flat(value, prefix=""):
    """Nested objects as {"a.b": value}."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        k: v
        for key in value
        for k, v in flat(value[key], f"{prefix}.{key}" if prefix else key).items()
    }


class TensorBoard:
    def __init__(self, run, name, config):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.event, self.summary = event_pb2.Event, summary_pb2.Summary
        self.where = os.path.join(run, "tensorboard")
        for old in glob.glob(os.path.join(glob.escape(self.where), "events.out.tfevents.*.moe")):
            os.remove(old)  # of an earlier export: the log is copied from its beginning
        self.writer = EventFileWriter(self.where, filename_suffix=".moe")
        from tensorboard.plugins.text import metadata

        text = self.summary()
        value = text.value.add(
            tag="run.json", metadata=metadata.create_summary_metadata("run.json", "")
        )
        value.tensor.dtype = 7  # a string, shown as Markdown
        value.tensor.string_val.append(("```\n" + json.dumps(config, indent=1) + "\n```").encode())
        self.writer.add_event(self.event(wall_time=time.time(), step=0, summary=text))

    def log(self, step, values):
        summary = self.summary()
        for key, value in values.items():
            summary.value.add(tag=key, simple_value=value)
        self.writer.add_event(self.event(wall_time=time.time(), step=step, summary=summary))

    def flush(self):
        self.writer.flush()

    def close(self):
        self.writer.close()


class Wandb:
    def __init__(self, run, name, config):
        import wandb

        os.environ.setdefault("WANDB_MODE", "offline")
        self.run = wandb.init(project="train_moe", name=name, dir=run, config=config)
        self.where = self.run.dir
        self.run.define_metric("update")
        self.run.define_metric("*", step_metric="update")

    def log(self, step, values):
        self.run.log({"update": step, **values})

    def flush(self):
        pass

    def close(self):
        self.run.finish()


class MLflow:
    def __init__(self, run, name, config):
        import mlflow

        self.mlflow, self.where = mlflow, os.environ.get(
            "MLFLOW_TRACKING_URI"
        ) or "file:" + os.path.abspath(os.path.join(run, "mlruns"))
        os.environ.setdefault(
            "MLFLOW_ALLOW_FILE_STORE", "true"
        )  # recent versions want a database for anything that is not a local try
        mlflow.set_tracking_uri(self.where)
        mlflow.set_experiment("train_moe")
        mlflow.start_run(run_name=name)
        items = [(key, str(value)[:500]) for key, value in flat(config).items()]
        for i in range(0, len(items), 100):  # MLflow takes 100 at once
            mlflow.log_params(dict(items[i : i + 100]))

    def log(self, step, values):
        self.mlflow.log_metrics(
            {key.replace("@", "_at_"): value for key, value in values.items()}, step=step
        )

    def flush(self):
        pass

    def close(self):
        self.mlflow.end_run()


class Log:
    """Complete lines of a log.jsonl that grows, and that a resumed run may cut back."""

    def __init__(self, path):
        self.path, self.at, self.seen = path, 0, {}

    def read(self):
        """(step, values) of every new line; what is no line of a log is passed over."""
        try:
            with open(self.path, "rb") as f:
                if os.fstat(f.fileno()).st_size < self.at:
                    self.at = 0
                f.seek(self.at)
                data = f.read()
        except FileNotFoundError:
            return
        data = data[: data.rfind(b"\n") + 1]  # the last line may be half written
        self.at += len(data)
        for part in data.splitlines():
            try:
                line = json.loads(part)
                step = line["step"]
            except (ValueError, TypeError, KeyError):
                continue
            kind = next((k for k in ("loss", "val_loss") if k in line), "other")
            if not isinstance(step, int) or "sample" in line or step <= self.seen.get(kind, -1):
                continue
            self.seen[kind] = step
            yield step, self.values(line)

    @staticmethod
    def values(line):
        values = {
            k: float(v)
            for k, v in flat(line).items()
            if k != "step"
            and isinstance(v, (int, float))
            and not isinstance(v, bool)
            and math.isfinite(v)
        }
        for layer, share in enumerate(line.get("expert_load") or []):
            mean = sum(share) / len(share) if share else 0
            if mean > 0:
                values[f"expert_load_max.layer_{layer}"] = max(share) / mean
        return values


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("run", metavar="RUN", help="the --out folder of a run")
    p.add_argument("--to", choices=TARGETS, help="default: the first of them that is installed")
    p.add_argument(
        "--follow", action="store_true", help="go on until the run has made its last update"
    )
    p.add_argument("--name", help="default: the folder's name")
    p.add_argument(
        "--every",
        type=float,
        default=2,
        metavar="SECONDS",
        help="between looks at the log with --follow (default 2)",
    )
    a = p.parse_args()
    if not os.path.isdir(a.run):
        die(f"{a.run}: no such folder", "give the --out folder of a run")
    path = os.path.join(a.run, "log.jsonl")
    if not os.path.exists(path) and not a.follow:
        die(
            f"{path}: no such file",
            "give the --out folder of a run; --follow waits for one that begins",
        )
    config = {}
    try:
        with open(os.path.join(a.run, "run.json"), encoding="utf-8") as f:
            config = json.load(f)
    except (OSError, ValueError) as e:
        print(f"warning: run.json cannot be read: {e}", file=sys.stderr)
    name = a.name or os.path.basename(os.path.abspath(a.run))
    target = None
    for chosen in [a.to] if a.to else TARGETS:
        try:
            importlib.import_module(chosen)
            target = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": MLflow}[chosen](
                a.run, name, config
            )
            break
        except ImportError:
            continue
    if not target:
        die(
            (
                f"{a.to or 'none of ' + ', '.join(TARGETS)} is not installed"
                if a.to
                else f"none of {', '.join(TARGETS)} is installed"
            ),
            f"python3 -m pip install {a.to or 'tensorboard'}",
        )
    log, count = Log(path), 0
    steps = (config.get("options") or {}).get("steps")
    try:
        while True:
            for step, values in log.read():
                target.log(step, values)
                count += 1
            target.flush()
            if not a.follow or (steps and log.seen.get("loss", -1) >= steps):
                break
            time.sleep(a.every)
        if a.follow:  # the last evaluation, sample and line of sources come after the last update
            time.sleep(a.every)
            while owned(a.run):
                time.sleep(a.every)
            for step, values in log.read():
                target.log(step, values)
                count += 1
    except KeyboardInterrupt:
        pass
    target.close()
    print(f"exported {count} lines of {path} to {target.where}")


if __name__ == "__main__":
    main()
