#!/usr/bin/env python3
"""Asks the loss itself, by central differences, whose gradient is right where a trainer deviates
from a fixture.

    PARITY_GOT=got.safetensors torchrun ... hf_ep.py FIXTURE data mean      # or another adapter
    python confirm.py FIXTURE RANKS got.safetensors [--rank-losses mean|global]

For the worst tensor of each kind that deviates (dense, experts, router) the fixture's total is
evaluated by transformers in float64 a step before and a step after the weights, along d = (theirs -
expected) / |theirs - expected|. The slope lies at 0 where it is that of the expected gradient and
at 1 where it is theirs. With --rank-losses the same is asked of what the trainer says it minimises,
the mean over ranks of each rank's own total (its cross entropy by its own targets, or with `global`
by its share of all of them): there the slope should lie at 1, and the loss and aux reported be
those. One deviation is transformers' own: look-ups of pad_token_id get no gradient, but the slope
has them and lies at 1. The gradients of dev/naive, plain loops in C and in double, are compared as
well where the fixture has no documents. Exit status: 0 where all of this holds, 1 where it does
not.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile

import torch

from parity import HERE, Fixture, forward, per_expert, total

sys.path += [HERE, os.path.join(HERE, "..", "hf")]
from reference import Float64, load_model  # noqa: E402


def naive_gradients(fixture, weights):
    """{name: gradient} of the fixture's total by dev/naive; None where a fixture has documents,
    which it does not know, or there is no compiler."""
    c, meta = fixture.config, fixture.meta
    folders = os.path.join(HERE, "naive"), os.path.join(HERE, "..", "naive")
    source = next((d for d in folders if os.path.isdir(d)), None)
    if fixture.position is not None or source is None:
        return None
    L, E = c["num_hidden_layers"], c.get("num_experts", c.get("num_local_experts"))
    moe = bytes(
        i not in c["mlp_only_layers"] and (i + 1) % c["decoder_sparse_step"] == 0 for i in range(L)
    )
    I64, I32, F64, P = ctypes.c_int64, ctypes.c_int, ctypes.c_double, ctypes.c_void_p
    structure = lambda *fields: type("S", (ctypes.Structure,), {"_fields_": list(fields)})
    # fmt: off
    Config = structure(
        *((n, I64) for n in ("V", "C", "L", "H", "KV", "D", "E", "K", "F", "I")),
        ("is_moe", ctypes.c_char_p), ("norm_topk", I32), ("tied", I32), ("pad", I32),
        ("eps", F64), ("theta", F64),
    )
    Weight = structure(
        ("name", ctypes.c_char * 128), ("n", I64), ("w", ctypes.POINTER(F64)),
        ("g", ctypes.POINTER(F64)),
    )
    Weights = structure(("n", I32), ("weight", ctypes.POINTER(Weight)))
    Batch = structure(
        ("B", I64), ("T", I64), ("ids", P), ("targets", P), ("topk", P), ("aux_coef", F64),
        ("z_coef", F64), ("aux_per_layer", I32), ("logits", P), ("loss", F64), ("aux", F64),
        ("z", F64),
    )
    # fmt: on
    with tempfile.TemporaryDirectory() as folder:
        library = os.path.join(folder, "naive.so")
        code = (
            '#include "naive.h"\n'
            "Weights tensors(const NaiveConfig *c) { return naive_weights(c); }\n"
            "void run(NaiveBatch *b, const NaiveConfig *c, const Weights *all) "
            "{ naive_model(b, c, all); naive_release(); }\n"
        )
        compiler = [os.environ.get("CC", "cc"), "-std=c11", "-O2", "-shared", "-fPIC"]
        subprocess.run(
            [*compiler, "-I", source, "-x", "c", "-", "-o", library, "-lm"],
            input=code,
            text=True,
            check=True,
        )
        naive = ctypes.CDLL(library)
    naive.tensors.restype = Weights
    heads, pad = c["num_attention_heads"], c.get("pad_token_id")
    config = Config(
        c["vocab_size"],
        c["hidden_size"],
        L,
        heads,
        c.get("num_key_value_heads") or heads,
        c.get("head_dim") or c["hidden_size"] // heads,
        E,
        c["num_experts_per_tok"],
        c["moe_intermediate_size"],
        c["intermediate_size"],
        moe,
        c["norm_topk_prob"],
        c["tie_word_embeddings"],
        -1 if pad is None else pad,
        c["rms_norm_eps"],
        c.get("rope_theta") or c["rope_parameters"]["rope_theta"],
    )
    everything = naive.tensors(ctypes.byref(config))
    table = [everything.weight[i] for i in range(everything.n)]
    for t in table:
        flat = weights[t.name.decode()].double().flatten().contiguous()
        ctypes.memmove(t.w, flat.data_ptr(), 8 * t.n)
    ids, targets = fixture.inputs.int().contiguous(), fixture.targets.int().contiguous()
    batch = Batch(
        *ids.shape,
        ids.data_ptr(),
        targets.data_ptr(),
        None,
        meta["aux_coef"],
        meta["z_coef"],
        meta["aux_pool"] == "layer",
    )
    naive.run(ctypes.byref(batch), ctypes.byref(config), ctypes.byref(everything))
    return {t.name.decode(): torch.tensor(t.g[: t.n], dtype=torch.float64) for t in table}


class Loss:
    """The fixture's total in float64, and what a trainer of `ranks` ranks minimises, as functions
    of the weights."""

    def __init__(self, fixture, ranks, kind):
        self.fixture, self.ranks, self.kind = fixture, ranks, kind
        self.model = load_model(fixture.folder, "fp64")
        self.views = {
            n: v for name, p in self.model.named_parameters() for n, v in per_expert(name, p.data)
        }

    def value(self, own):
        """(total, loss, aux) over the whole batch, or with `own` the mean over ranks of what each
        computes from its own windows."""
        f, sums = self.fixture, torch.zeros(3, dtype=torch.float64)
        ranks = self.ranks if own else 1
        divisor = int((f.targets != -100).sum()) / ranks if own and self.kind == "global" else None
        with torch.no_grad(), Float64():
            for rank in range(ranks):
                inputs, targets, position = f.part(rank, ranks)
                logits, router = forward(self.model, inputs, position)
                sums += torch.stack(total(f, logits, router, targets, divisor)[:3])
        return sums / ranks

    def slope(self, name, d, own, step=1e-4):
        """The derivative along d of the tensor `name`: four points, so the error is of the order of
        step^4."""
        ends, kept = [], self.views[name].clone()
        for at in (1, -1, 2, -2):
            self.views[name].copy_(kept + at * step * d)
            ends.append(self.value(own)[0].item())
        self.views[name].copy_(kept)
        return (8 * (ends[0] - ends[1]) - (ends[2] - ends[3])) / (12 * step)


def confirm(name, ranks, got, rank_losses=None, tol=2e-5):
    """{"kinds": {kind: [tensor, deviation, the fixture's slope, the trainer's, is it the padding
    row]}, "values": worst of loss and aux, "naive": worst gradient, "holds": whether all of it is
    as it should be}."""
    fixture = Fixture(name)
    loss = Loss(fixture, ranks, rank_losses)
    worst = {}
    for key in (k for k in fixture.expected if k.startswith("grad.")):
        e, g = fixture.expected[key].double(), got[key].double().reshape(
            fixture.expected[key].shape
        )
        kind = "experts" if ".experts." in key else "router" if "mlp.gate." in key else "dense"
        off = ((g - e).norm() / e.norm().clamp_min(1e-30)).item() if e.norm() > 0 else 0
        if off > max(tol, worst.get(kind, ["", 0])[1]):
            worst[kind] = [key[5:], off]
    for row in worst.values():
        e = fixture.expected[f"grad.{row[0]}"].double()
        d = got[f"grad.{row[0]}"].double().reshape(e.shape) - e
        size, d = d.norm(), d / d.norm()
        pad = fixture.config.get("pad_token_id")
        looked_up = (
            row[0] == "model.embed_tokens.weight"
            and pad is not None
            and (d[pad].norm() > 0.999 * d.norm()).item()
        )
        at = lambda own: ((loss.slope(row[0], d, own) - (d * e).sum()) / size).item()
        row += [at(False), at(True) if rank_losses else None, looked_up]
    result = {"kinds": worst, "values": None, "naive": None}
    if rank_losses:
        own = loss.value(True)[1:]
        result["values"] = max(
            abs(got[n].item() / v.item() - 1) for n, v in zip(("loss", "aux"), own)
        )
    plain = naive_gradients(fixture, loss.views)
    if plain:
        floor = 1e-7 * sum(v.norm() ** 2 for v in plain.values()).sqrt()
        off = {
            n: (fixture.expected[f"grad.{n}"].double().flatten() - v).norm()
            / v.norm().clamp_min(floor)
            for n, v in plain.items()
        }
        result["naive"] = max(off.values()).item()
    result["holds"] = (
        all(
            abs(r[2] - r[4]) < 0.01 and (r[3] is None or abs(r[3] - 1) < 0.01)
            for r in worst.values()
        )
        and (result["values"] or 0) < 1e-5
        and (result["naive"] or 0) < tol
    )
    return result


def main():
    from safetensors.torch import load_file

    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("fixture")
    p.add_argument("ranks", type=int)
    p.add_argument("got")
    p.add_argument("--rank-losses", choices=["mean", "global"])
    a = p.parse_args()
    result = confirm(a.fixture, a.ranks, load_file(a.got), a.rank_losses)
    print(json.dumps(result, indent=1))
    return 0 if result["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
