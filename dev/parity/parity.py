"""What the adapters share: a fixture with its expected values, its total loss, and the verdict on
what a trainer computed.

Needs torch, numpy and safetensors. A fixture is a folder of dev/fixtures (in the kit: fixtures/),
described in README.md.
"""

import json
import math
import os
import sys

import numpy as np
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = next(
    (
        d
        for d in (os.path.join(HERE, "fixtures"), os.path.join(HERE, "..", "fixtures"))
        if os.path.isdir(d)
    ),
    "fixtures",
)


class Fixture:
    """inputs, targets (B, T), -100 where a target does not count; position (B, T) or None; expected
    {name: tensor}; options in meta.json."""

    def __init__(self, name):
        from safetensors.torch import load_file

        self.name, self.folder = name, os.path.join(ROOT, name)
        self.meta = json.load(open(os.path.join(self.folder, "meta.json")))
        self.config = json.load(open(os.path.join(self.folder, "config.json")))
        self.expected = load_file(os.path.join(self.folder, "expected.safetensors"))
        self.inputs, targets = self.expected["inputs"].long(), self.expected["targets"].long()
        counts = (
            self.expected["counts"].bool()
            if "counts" in self.expected
            else targets != self.meta["ignore_target"]
        )
        self.targets = targets.masked_fill(~counts, -100)
        self.position, end = None, self.meta.get("document_end")
        if end is not None:
            at = torch.arange(self.inputs.shape[1]).expand(self.inputs.shape)
            begins = torch.zeros_like(self.inputs, dtype=torch.bool)
            begins[:, 1:] = self.inputs[:, :-1] == end
            self.position = at - torch.where(begins, at, 0).cummax(1).values

    def part(self, rank, ranks):
        """Rank's consecutive rows of (inputs, targets, position); every rank has as many."""
        if len(self.inputs) % ranks:
            raise ValueError(f"{len(self.inputs)} windows are not shared equally by {ranks} ranks")
        rows = slice(len(self.inputs) * rank // ranks, len(self.inputs) * (rank + 1) // ranks)
        return (
            self.inputs[rows],
            self.targets[rows],
            None if self.position is None else self.position[rows],
        )


def forward(model, inputs, position):
    """logits and router logits of a transformers model; with `position`, attention within documents
    by an explicit mask. The model is entered by its own forward, as FSDP asks; the router logits
    come from hooks there, because transformers takes a mask of four dimensions for padding.
    """
    if position is None:
        out = model(input_ids=inputs, output_router_logits=True, use_cache=False)
        return out.logits, tuple(r for r in out.router_logits if r is not None)
    first = torch.arange(inputs.shape[1]) - position
    visible = (first[:, :, None] == first[:, None, :]).tril()
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    kept, gates = [], [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    hooks = [
        g.register_forward_hook(
            lambda _, __, out: kept.append(out[0] if isinstance(out, tuple) else out)
        )
        for g in gates
    ]
    logits = model(
        input_ids=inputs,
        attention_mask=mask[:, None].to(model.dtype),
        position_ids=position,
        use_cache=False,
    ).logits
    for hook in hooks:
        hook.remove()
    return logits, tuple(r.flatten(0, -2) for r in kept)


def total(fixture, logits, router, targets, divisor=None):
    """(total with its gradient, loss, aux, z). The loss is a mean over the targets that count, or
    their sum over `divisor`."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    nll = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="sum"
    )
    loss = nll / (divisor or max(1, int((targets != -100).sum())))
    config, meta = fixture.config, fixture.meta
    E, K = config.get("num_experts", config.get("num_local_experts")), config["num_experts_per_tok"]
    groups = [router] if meta["aux_pool"] == "layers" else [(r,) for r in router]
    aux = torch.stack([load_balancing_loss_func(g, E, K) for g in groups]).mean()
    z = torch.stack([r.logsumexp(-1).square().mean() for r in router]).mean()
    return loss + meta["aux_coef"] * aux + meta["z_coef"] * z, loss, aux, z


def per_expert(name, tensor):
    """(name, tensor) pairs under Hugging Face's names of files: fused (E, 2F, C) and (E, C, F)
    experts are taken apart."""
    if name.endswith("mlp.experts.gate_up_proj"):
        F, prefix = tensor.shape[1] // 2, name[: -len("gate_up_proj")]
        return [
            (f"{prefix}{e}.{kind}_proj.weight", t)
            for e, both in enumerate(tensor)
            for kind, t in (("gate", both[:F]), ("up", both[F:]))
        ]
    if name.endswith("mlp.experts.down_proj"):
        return [
            (f"{name[:-len('down_proj')]}{e}.down_proj.weight", t) for e, t in enumerate(tensor)
        ]
    return [(name, tensor)]


def judge(fixture, adapter, ranks, got, tol=2e-5):
    """One line of the table as a dict: deviations of `got` ({name: tensor}, gradients as
    grad.<name>) from what the fixture expects. A deviation is |a - b| / |b| of a whole tensor; |b|
    is at least 1e-7 of the norm of all gradients."""
    expected = {
        n: t.double()
        for n, t in fixture.expected.items()
        if n in ("logits", "loss", "aux") or n.startswith("grad.")
    }
    floor = 1e-7 * math.sqrt(
        sum(t.norm().item() ** 2 for n, t in expected.items() if n.startswith("grad."))
    )
    off = {}
    for n in (n for n in expected if n in got):
        e, g = expected[n], got[n].detach().double().reshape(expected[n].shape)
        off[n] = (g - e).norm().item() / max(
            e.norm().item(), floor if n.startswith("grad.") else 1e-300
        )
    grads = {n: d for n, d in off.items() if n.startswith("grad.")}
    beyond = [n for n, d in grads.items() if not d <= tol]
    worst = max(grads, key=grads.get) if grads else ""
    ratio = 0.0
    if worst:  # a factor common to a tensor is a scale, not noise
        e, g = expected[worst].flatten(), got[worst].detach().double().flatten()
        ratio = (g @ e).item() / max((e @ e).item(), 1e-300)
    kinds = sorted(
        {
            "experts" if ".experts." in n else "router" if "mlp.gate." in n else "dense"
            for n in beyond
        }
    )
    return {
        "adapter": adapter,
        "fixture": fixture.name,
        "ranks": ranks,
        "logits": off.get("logits"),
        "loss": off.get("loss"),
        "aux": off.get("aux"),
        "gradient": grads.get(worst),
        "worst": worst[5:],
        "scale": ratio,
        "beyond": len(beyond),
        "of": len(grads),
        "kinds": kinds,
        "missing": sum(n.startswith("grad.") and n not in got for n in expected),
    }


def report(line, got):
    """The adapter's last line, which peers.py reads; with PARITY_GOT=FILE what was computed goes
    there, which confirm.py reads."""
    if os.environ.get("PARITY_GOT"):
        from safetensors.torch import save_file

        save_file(
            {n: t.detach().contiguous().clone() for n, t in got.items()}, os.environ["PARITY_GOT"]
        )
    print("PARITY " + json.dumps(line), flush=True)


def gather(p, grad, full_rows):
    """A whole gradient from the pieces of all ranks: a sharded tensor, or an equal share of the
    first dimension a rank."""
    if grad is None:
        grad = torch.zeros_like(p)
    if hasattr(grad, "full_tensor"):
        grad = grad.full_tensor()
    if full_rows and grad.shape[0] != full_rows:
        parts = [torch.empty_like(grad) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, grad.contiguous())
        grad = torch.cat(parts)
    return grad
