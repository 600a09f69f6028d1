#!/usr/bin/env python3
"""The reference run: Hugging Face transformers trains a checkpoint on the same tokens, in the same
order, with the same options as train_moe.

    python dev/hf/reference.py --model DIR --train FILE... --seq-len 64 --batch 4 --steps 60 \\
        --optimizer sgd --lr 0.1 --out DIR

Options carry train_moe's names, defaults and meanings. Windows are taken in file order (train_moe
--shuffle off). --out receives log.jsonl and run.json; --dump FILE.safetensors receives the first
update's logits, loss, aux, z, routing (topk, router logits) and every gradient before clipping.

The loss comes from pre-shifted targets (Hugging Face's labels= shifts once more and drops the last
target). With N valid targets
    loss  = -1/N sum log softmax(logits)[target]
    aux   = Hugging Face's load-balancing loss of the raw router logits, before its coefficient (k
            at perfect balance); `layers`: one statistic pooled over the MoE layers, `layer`: the
            mean of the values of single layers
    z     = mean over tokens and MoE layers of logsumexp(router logits)^2
    total = loss + aux_coef * aux + z_coef * z        whose gradient is clipped, logged and dumped.

--loss-mask, --documents and --document-end are train_moe's: a target counts if its byte in
FILE.mask is 1 and it is not --ignore-target; with documents, attention sees a token's own document
only (an explicit block-diagonal mask), positions begin at 0 in each, and a target whose input ends
a document does not count. --routing-record DIR writes the choice of experts of every update;
--routing-replay takes it from there (torch.topk is answered with the given ids) and computes
scores, losses and gradients from the present logits.

fp64 is double precision throughout: transformers casts norms, softmaxes and rotary angles to fp32
by name, and those casts are turned into casts to fp64. The rotary frequencies keep their fp32 bits,
because they are constants of the model.
"""

import argparse
import contextlib
import glob
import json
import math
import os
import sys
import time

try:
    import numpy as np
    import torch
    import transformers
except ImportError as e:
    sys.exit(
        f"reference.py: {e}, hint: pip install -r "
        f"{os.path.join(os.path.dirname(os.path.abspath(__file__)), 'requirements.txt')}"
    )


MASK_MAGIC = 20260520


def die(what, hint):
    sys.exit(f"error: {what}, hint: {hint}")


# ---- tokens --------------------------------------------------------------------------------------


def read_tokens(path):
    """All token ids of one file, as a memory map: an llm.c shard (1,024-byte header, uint16 or
    uint32), or a .txt file read as bytes."""
    if path.endswith(".txt"):
        return np.memmap(path, np.uint8, "r")
    head = np.fromfile(path, np.int32, 256)
    kinds = {(20240520, 1): np.uint16, (20240801, 7): np.uint32}
    if len(head) < 256 or (head[0], head[1]) not in kinds:
        die(
            f"{path}: not a token shard",
            "expected magic 20240520 version 1 or 20240801 version 7, or a .txt file",
        )
    return np.memmap(path, kinds[head[0], head[1]], "r", offset=1024, shape=(int(head[2]),))


def read_mask(path, n):
    """The loss mask of n tokens: a header of 256 int32 (magic, version, count), then one byte a
    token, 1 where the token is a target."""
    head = np.fromfile(path, np.int32, 256)
    mask = np.fromfile(path, np.uint8, offset=1024)
    if (
        len(head) < 256
        or head[0] != MASK_MAGIC
        or head[1] != 1
        or head[2] != n
        or len(mask) != n
        or (n and mask.max() > 1)
    ):
        die(
            f"{path}: not a loss mask of {n} tokens",
            f"magic {MASK_MAGIC}, version 1, the count of tokens, then bytes 0 and 1",
        )
    return mask


class Windows:
    """Windows of T inputs and T targets (shifted by one): a file of n tokens has (n-1)/T of them;
    files follow one another, epochs wrap."""

    def __init__(self, patterns, T, vocab=1 << 32, loss_mask="auto"):
        paths = []
        for pattern in patterns:
            paths += sorted(glob.glob(pattern)) or die(f"{pattern}: no such file", "check --train")
        self.T, self.vocab, self.files = T, vocab, [read_tokens(p) for p in paths]
        masks = [os.path.splitext(p)[0] + ".mask" for p in paths]
        found = [] if loss_mask == "off" else [m for m in masks if os.path.exists(m)]
        if len(found) not in (0, len(masks)) or loss_mask == "require" and not found:
            die(
                f"{len(found)} of {len(masks)} token files have a .mask beside them",
                "give all of them one, or --loss-mask off",
            )
        self.masks = [read_mask(m, len(f)) for m, f in zip(masks, self.files)] if found else None
        self.ends = np.cumsum([max(len(f) - 1, 0) // T for f in self.files])
        if self.ends[-1] == 0:
            die(
                "no file has a whole window",
                f"--seq-len {T} needs files of at least {T + 1} tokens",
            )

    def batch(self, first, B):
        """Windows first .. first+B-1 in file order: inputs, targets, and which targets the mask
        lets count, (B, T) each."""
        rows, counts = [], []
        for w in range(first, first + B):
            w %= self.ends[-1]
            i = int(np.searchsorted(self.ends, w, side="right"))
            at = int(w - (self.ends[i - 1] if i else 0)) * self.T
            rows.append(self.files[i][at : at + self.T + 1].astype(np.int64))
            if rows[-1].max() >= self.vocab:
                die(
                    f"token id {rows[-1].max()} in a vocabulary of {self.vocab}",
                    "these shards were written with another tokenizer",
                )
            counts.append(
                self.masks[i][at + 1 : at + self.T + 1] == 1
                if self.masks
                else np.ones(self.T, bool)
            )
        rows = torch.from_numpy(np.stack(rows))
        return (
            rows[:, :-1].contiguous(),
            rows[:, 1:].contiguous(),
            torch.from_numpy(np.stack(counts)),
        )


def counting(inputs, targets, counts, ignore=None, document_end=None):
    """The targets, with -100 in place of those that do not count."""
    if ignore is not None:
        counts = counts & (targets != ignore)
    if document_end is not None:
        counts = counts & (inputs != document_end)
    return targets.masked_fill(~counts.to(targets.device), -100)


def positions(inputs, document_end):
    """(B, T): the position of each token in its document; a document begins with the window and
    after each `document_end`."""
    at = torch.arange(inputs.shape[1], device=inputs.device).expand(inputs.shape)
    after_end = torch.zeros_like(inputs, dtype=torch.bool)
    after_end[:, 1:] = inputs[:, :-1] == document_end
    return at - torch.where(after_end, at, 0).cummax(1).values


# ---- model ---------------------------------------------------------------------------------------


class Float64(torch.overrides.TorchFunctionMode):
    """Turns every cast to fp32 that the model's source spells out into a cast to fp64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        swap = lambda x: torch.float64 if x is torch.float32 else x
        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(swap, args), **{k: swap(v) for k, v in (kwargs or {}).items()})


def precision(dtype):
    return Float64() if dtype == "fp64" else contextlib.nullcontext()


def load_model(path, dtype="fp32", attn="eager", experts="eager"):
    """A Qwen3-MoE checkpoint as a transformers model on the CPU, ready to train."""
    transformers.utils.logging.disable_progress_bar()
    options = {"attn_implementation": attn}
    if int(transformers.__version__.split(".")[0]) >= 5:
        options |= {
            "experts_implementation": experts,
            "dtype": torch.bfloat16 if dtype == "bf16" else torch.float32,
        }
    else:
        if experts != "eager":
            die(
                f"transformers {transformers.__version__} has no --experts {experts}",
                "use --experts eager, or transformers >= 5",
            )
        options["torch_dtype"] = torch.bfloat16 if dtype == "bf16" else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, local_files_only=True, **options
    )
    if model.config.model_type != "qwen3_moe":
        die(f"{path}: model_type is {model.config.model_type}", "only qwen3_moe is compared")
    model.config.use_cache = False
    return (model.double() if dtype == "fp64" else model).train()


class Routing(torch.overrides.TorchFunctionMode):
    """Keeps the experts that every router chooses, or gives it those of `replay` (L_moe, B*T, k):
    torch.topk returns the ids given and the scores found there. Transformers chooses by torch.topk
    once a layer, and once more where the auxiliary loss counts."""

    def __init__(self, config, tokens, replay=None):
        super().__init__()
        self.E, self.K = config.num_experts, config.num_experts_per_tok
        self.tokens, self.replay, self.chosen = tokens, replay, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in (torch.topk, torch.Tensor.topk) or args[0].shape[-1] != self.E:
            return func(*args, **kwargs)
        scores = args[0]
        layer, whole = len(self.chosen), scores.shape[0] != self.tokens
        if self.replay is None:
            out = func(*args, **kwargs)
        else:
            ids = self.replay.flatten(0, 1) if whole else self.replay[layer % len(self.replay)]
            out = torch.return_types.topk(
                (scores.gather(-1, ids.to(scores.device)), ids.to(scores.device))
            )
        if not whole:
            self.chosen.append(out[1].detach().sort(dim=-1).values)
        return out

    def topk(self, layers):
        """(L_moe, B*T, k), ascending: the choice of the forward pass."""
        return (
            torch.stack(self.chosen[:layers])
            if layers
            else torch.zeros(0, 0, self.K, dtype=torch.int64)
        )


def forward(model, inputs, position=None):
    """logits (B, T, V) and the raw router logits, one (B*T, E) per MoE layer. With `position` (B,
    T) attention sees the own document only."""
    if position is None:
        out = model(input_ids=inputs, output_router_logits=True, use_cache=False)
        logits = out.logits
    else:
        # the parts of the same forward pass: its own auxiliary loss does not know masks of four
        # dimensions
        first = torch.arange(inputs.shape[1], device=inputs.device) - position
        visible = (first[:, :, None] == first[:, None, :]).tril()
        mask = torch.zeros(visible.shape, dtype=model.dtype, device=inputs.device).masked_fill(
            ~visible, torch.finfo(model.dtype).min
        )
        out = model.model(
            input_ids=inputs,
            attention_mask=mask[:, None],
            position_ids=position,
            output_router_logits=True,
            use_cache=False,
        )
        logits = model.lm_head(out.last_hidden_state)
    router = tuple(r for r in (out.router_logits or ()) if r is not None)
    for r in router:
        if (r.detach() >= 0).all() and (r.detach().float().sum(-1) - 1).abs().max() < 1e-2:
            die(
                f"transformers {transformers.__version__} returns probabilities as router logits: "
                "its auxiliary loss applies softmax twice",
                "use transformers >= 5.6, or 4.51 to 4.57",
            )
    return logits, router


def routing(router, top_k):
    """The experts of every token, (L_moe, B*T, k) in ascending order, and the smallest gap between
    the logits of rank k and k+1."""
    sets, gap = [], math.inf
    for r in (r.detach().double() for r in router):
        order = r.sort(dim=-1, descending=True)
        sets.append(order.indices[:, :top_k].sort(dim=-1).values)
        if top_k < r.shape[-1]:
            gap = min(gap, (order.values[:, top_k - 1] - order.values[:, top_k]).min().item())
    return torch.stack(sets) if sets else torch.zeros(0, 0, top_k, dtype=torch.int64), gap


def losses(config, logits, router, targets, aux_coef, z_coef, aux_pool):
    """total, loss, aux, z as scalars; total carries the gradient; targets of -100 do not count.
    Without any target that counts the loss is zero here, and null in the log. The formulas are at
    the top of this file."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    wide = logits if logits.dtype == torch.float64 else logits.float()
    loss = torch.nn.functional.cross_entropy(
        wide.flatten(0, 1),
        targets.flatten(),
        reduction="mean" if (targets != -100).any() else "sum",
    )
    aux = z = torch.zeros((), dtype=wide.dtype)
    if router:
        E, K = router[0].shape[-1], config.num_experts_per_tok
        groups = [router] if aux_pool == "layers" else [(r,) for r in router]
        aux = torch.stack([load_balancing_loss_func(g, E, K) for g in groups]).mean()
        z = torch.stack([r.to(wide.dtype).logsumexp(-1).square().mean() for r in router]).mean()
    return loss + aux_coef * aux + z_coef * z, loss, aux, z


def backward(model, total):
    """Gradients of total. An expert without tokens has a zero gradient (transformers 4.5x leaves it
    absent, and its optimizer skips it)."""
    model.zero_grad(set_to_none=True)
    total.backward()
    for p in model.parameters():
        if p.grad is None:
            p.grad = torch.zeros_like(p)


def per_expert(name, tensor):
    """(name, tensor) pairs with the names of Hugging Face files: fused (E, 2F, C) and (E, C, F)
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


def gradients(model):
    """{Hugging Face name: gradient}; a tied embedding appears once, as
    model.embed_tokens.weight."""
    return {n: g for name, p in model.named_parameters() for n, g in per_expert(name, p.grad)}


# ---- optimizer -----------------------------------------------------------------------------------


def make_optimizer(model, kind, lr, weight_decay, momentum=0.0, beta1=0.9, beta2=0.999, eps=1e-8):
    """torch's SGD or AdamW, with Hugging Face's two groups: norm weights do not decay."""
    norms = [p for n, p in model.named_parameters() if "norm" in n]
    others = [p for n, p in model.named_parameters() if "norm" not in n]
    groups = [
        {"params": others, "weight_decay": weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, foreach=False)
    return torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), eps=eps, foreach=False)


def grad_norm(model):
    """L2 norm over all unique gradients, summed in fp64."""
    return math.sqrt(
        sum(
            torch.linalg.vector_norm(p.grad, dtype=torch.float64).item() ** 2
            for p in model.parameters()
        )
    )


def clip(model, norm, limit):
    """Scales all gradients by min(1, limit / (norm + 1e-6)); limit 0 is off."""
    if limit > 0:
        scale = min(1.0, limit / (norm + 1e-6))
        for p in model.parameters():
            p.grad.mul_(scale)


def lr_factor(s, schedule, steps, warmup, decay, final):
    """The factor on the learning rate at scheduler step s = 0, 1, ...; warmup and decay in steps,
    final a fraction of lr."""
    if s < warmup:
        return s / warmup
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        f = max(0.0, (steps - s) / max(1, steps - warmup))
    elif schedule == "cosine":
        f = max(0.0, 0.5 * (1 + math.cos(math.pi * (s - warmup) / max(1, steps - warmup))))
    else:  # wsd: flat, then linear over the last `decay` steps
        f = min(1.0, max(0.0, (steps - s) / max(1, decay)))
    return f * (1 - final) + final


def steps_or_ratio(text, steps):
    """`20` is a number of steps, `0.1` (a number with a point) a fraction of all steps, rounded
    up."""
    return math.ceil(float(text) * steps) if "." in text else int(text)


def train(
    model,
    windows,
    B,
    steps,
    dtype="fp32",
    aux_coef=0.0,
    z_coef=0.0,
    aux_pool="layers",
    ignore=None,
    optimizer="sgd",
    lr=1e-3,
    momentum=0.0,
    beta1=0.9,
    beta2=0.999,
    eps=1e-8,
    weight_decay=0.0,
    grad_clip=1.0,
    factor=lambda s: 1.0,
    inspect=lambda out: None,
    document_end=None,
    replay=lambda s: None,
):
    """Yields one dict per finished update, its values from before it; inspect(dict) is called while
    the gradients are still unclipped. document_end: the id that ends a document, or None;
    replay(s): the routing of update s (L_moe, B*T, k), or None."""
    opt = make_optimizer(model, optimizer, lr, weight_decay, momentum, beta1, beta2, eps)
    for s in range(steps):
        start = time.perf_counter()
        inputs, targets, counts = (x.to(model.device) for x in windows.batch(s * B, B))
        targets = counting(inputs, targets, counts, ignore, document_end)
        position = None if document_end is None else positions(inputs, document_end)
        with precision(dtype), Routing(model.config, inputs.numel(), replay(s)) as choice:
            logits, router = forward(model, inputs, position)
            total, loss, aux, z = losses(
                model.config, logits, router, targets, aux_coef, z_coef, aux_pool
            )
            backward(model, total)
        norm = grad_norm(model)
        out = {
            "step": s + 1,
            "loss": loss.item(),
            "aux": aux.item(),
            "z": z.item(),
            "grad_norm": norm,
            "lr": lr * factor(s),
            "inputs": inputs,
            "targets": targets,
            "logits": logits.detach(),
            "router": tuple(r.detach() for r in router),
            "topk": choice.topk(len(router)),
        }
        inspect(out)
        clip(model, norm, grad_clip)
        for group in opt.param_groups:
            group["lr"] = out["lr"]
        opt.step()
        out["seconds"] = time.perf_counter() - start
        yield out


# ---- report --------------------------------------------------------------------------------------


def step_flops(model, config, B, T):
    """Model FLOPs of one update: 6 per active matrix weight and token (embedding look-ups are
    free), and attention's causal half: q.k and p.v are 2*2*T*H*D per token and layer, half of it
    causal, three times that with the backward."""
    D = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    active = config.vocab_size * config.hidden_size  # the head, tied or not
    for name, p in model.named_parameters():
        if ".layers." in name and "norm" not in name:
            active += p.numel() * (
                config.num_experts_per_tok / config.num_experts if ".experts." in name else 1
            )
    return B * T * (6 * active + 6 * T * config.num_attention_heads * D * config.num_hidden_layers)


def matmul_peak(dtype):
    """FLOP/s of a 1024^3 product in this dtype with the threads given, best of five (bf16 runs are
    measured against fp32)."""
    a, best = torch.ones(1024, 1024, dtype=dtype), math.inf
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best


def expert_load(router, top_k):
    """Largest ratio of max to mean rows per expert over the MoE layers, and the number of (layer,
    expert) pairs without rows."""
    sets, _ = routing(router, top_k)
    worst, dead = 0.0, 0
    for layer, logits in zip(sets, router):
        count = torch.bincount(layer.flatten(), minlength=logits.shape[-1])
        worst = max(worst, (count.max() / count.double().mean()).item())
        dead += int((count == 0).sum())
    return worst, dead


def log_line(values):
    number = lambda v: str(v) if isinstance(v, int) else f"{v:.9g}" if math.isfinite(v) else "null"
    return "{" + ", ".join(f'"{k}": {number(v)}' for k, v in values.items()) + "}\n"


def write_safetensors(path, tensors):
    """{name: tensor} as fp32 or int32, one tensor at a time: gradients as large as the model are
    not copied once more."""
    origin = f"transformers {transformers.__version__}"
    header, at = {"__metadata__": {"format": "pt", "origin": origin}}, 0
    for n, t in tensors.items():
        header[n] = {
            "dtype": "F32" if t.is_floating_point() else "I32",
            "shape": list(t.shape),
            "data_offsets": [at, at + 4 * t.numel()],
        }
        at += 4 * t.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():
            f.write((t.float() if t.is_floating_point() else t.int()).contiguous().cpu().numpy())


def dump(path, out, model):
    """The values of the first update, gradients unclipped."""
    tensors = {
        "logits": out["logits"],
        **{k: torch.tensor(out[k], dtype=torch.float64) for k in ("loss", "aux", "z")},
    }
    if out["router"]:
        tensors |= {
            "topk": out["topk"].unflatten(1, out["inputs"].shape),
            "router": torch.stack(out["router"]).unflatten(1, out["inputs"].shape),
        }
    write_safetensors(path, tensors | {f"grad.{n}": g for n, g in gradients(model).items()})


def replayed(source, config):
    """The function (s) -> routing of update s, or None, from a folder of step_N.safetensors or from
    one file, which is the first update's."""
    from safetensors.torch import load_file

    if not source:
        return lambda s: None
    if not os.path.exists(source):
        die(
            f"{source}: no such file or folder",
            "--routing-replay takes what --routing-record or --dump wrote",
        )

    def routing_of(s):
        path = (
            os.path.join(source, f"step_{s + 1}.safetensors") if os.path.isdir(source) else source
        )
        if not os.path.isdir(source) and s > 0:
            return None
        if not os.path.exists(path):
            die(f"{path}: no such file", "record as many updates as are replayed")
        ids = load_file(path)["topk"].long().flatten(1, 2)
        if (
            ids.shape[-1] != config.num_experts_per_tok
            or ids.min() < 0
            or ids.max() >= config.num_experts
            or (ids.diff(dim=-1) <= 0).any()
        ):
            die(
                f"{path}: topk {tuple(ids.shape)} is no routing of this model",
                "ids ascend and are below the number of experts",
            )
        return ids

    return routing_of


def main():
    p = argparse.ArgumentParser(
        description="Trains a checkpoint with Hugging Face transformers as train_moe would.",
        allow_abbrev=False,
    )
    add = p.add_argument
    add("--model", required=True, help="folder of a Hugging Face checkpoint")
    add("--train", nargs="+", required=True, help="token shards or .txt files (bytes)")
    add("--seq-len", type=int, required=True)
    add("--batch", type=int, required=True, help="windows per update")
    add("--steps", type=int, required=True)
    add("--out", help="folder for log.jsonl and run.json")
    add("--dump", help="file for the first update's logits, losses and gradients")
    add(
        "--shuffle",
        choices=["off"],
        default="off",
        help="only file order exists here: run train_moe with --shuffle off",
    )
    add("--optimizer", choices=["sgd", "adamw"], default="adamw")
    for name, default in (
        ("lr", 3e-4),
        ("momentum", 0.0),
        ("beta1", 0.9),
        ("beta2", 0.999),
        ("eps", 1e-8),
        ("weight-decay", 0.0),
        ("grad-clip", 1.0),
        ("final-lr", 0.0),
        ("z-coef", 0.0),
    ):
        add(f"--{name}", type=float, default=default)
    add("--aux-coef", type=float, help="default: the config's router_aux_loss_coef")
    add("--aux-pool", choices=["layers", "layer"], default="layers")
    add("--ignore-target", type=int, help="targets equal to this id do not count")
    add(
        "--loss-mask",
        choices=["auto", "off", "require"],
        default="auto",
        help="FILE.mask beside a token file: which tokens are targets",
    )
    add(
        "--documents",
        choices=["join", "mask"],
        default="join",
        help="mask: attention within documents only",
    )
    add(
        "--document-end",
        type=int,
        help="the id that ends a document; default: the config's eos_token_id",
    )
    add("--routing-record", help="folder for step_N.safetensors with the experts of every token")
    add(
        "--routing-replay",
        help="such a folder, or a file for the first update: the experts are taken from there",
    )
    add("--schedule", choices=["constant", "linear", "cosine", "wsd"], default="constant")
    add("--warmup", default="0", help="steps, or a ratio with a point in it")
    add("--decay", default="0", help="the last part of wsd: steps, or a ratio with a point in it")
    add("--dtype", choices=["fp32", "fp64", "bf16"], default="fp32")
    add("--threads", type=int, default=1)
    add("--device", default="cpu", help="cpu or cuda (mfu is then 0: no peak is measured there)")
    add("--attn", choices=["eager", "sdpa"], default="eager")
    add("--experts", choices=["eager", "grouped_mm"], default="eager")
    a = p.parse_args()

    if a.out and os.path.exists(os.path.join(a.out, "log.jsonl")):
        die(f"{a.out} already holds a run", "give another --out, or remove it")
    torch.set_num_threads(a.threads)
    torch.use_deterministic_algorithms(True, warn_only=a.device != "cpu")
    model = load_model(a.model, a.dtype, a.attn, a.experts).to(a.device)
    config = model.config
    windows = Windows(a.train, a.seq_len, config.vocab_size, a.loss_mask)
    document_end = None
    if a.documents == "mask":
        document_end = config.eos_token_id if a.document_end is None else a.document_end
        document_end = document_end[0] if isinstance(document_end, list) else document_end
        if document_end is None:
            die("--documents mask, and the config has no eos_token_id", "give --document-end ID")
    if a.routing_record:
        os.makedirs(a.routing_record, exist_ok=True)
    aux_coef = config.router_aux_loss_coef if a.aux_coef is None else a.aux_coef
    warmup, decay = steps_or_ratio(a.warmup, a.steps), steps_or_ratio(a.decay, a.steps)
    flops, peak = step_flops(model, config, a.batch, a.seq_len), math.inf
    if a.device == "cpu":
        peak = matmul_peak(torch.float64 if a.dtype == "fp64" else torch.float32)
    print(
        f"transformers {transformers.__version__}, torch {torch.__version__}, {a.dtype}, "
        f"{a.threads} threads, attention {a.attn}, "
        f"experts {a.experts}, aux coefficient {aux_coef:g} ({a.aux_pool}), {windows.ends[-1]} "
        f"windows, peak {peak / 1e9:.0f} GFLOP/s"
    )
    log = None
    if a.out:
        os.makedirs(a.out, exist_ok=True)
        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        with open(os.path.join(a.out, "run.json"), "w") as f:
            json.dump({**vars(a), "aux_coef": aux_coef, **versions}, f, indent=2)
        log = open(os.path.join(a.out, "log.jsonl"), "w")
    factor = lambda s: lr_factor(s, a.schedule, a.steps, warmup, decay, a.final_lr)

    def inspect(out):
        if a.dump and out["step"] == 1:
            dump(a.dump, out, model)
        if a.routing_record:
            path = os.path.join(a.routing_record, f"step_{out['step']}.safetensors")
            write_safetensors(path, {"topk": out["topk"].unflatten(1, out["inputs"].shape)})

    for out in train(
        model,
        windows,
        a.batch,
        a.steps,
        a.dtype,
        aux_coef,
        a.z_coef,
        a.aux_pool,
        a.ignore_target,
        a.optimizer,
        a.lr,
        a.momentum,
        a.beta1,
        a.beta2,
        a.eps,
        a.weight_decay,
        a.grad_clip,
        factor,
        inspect,
        document_end,
        replayed(a.routing_replay, config),
    ):
        seconds, tokens = out["seconds"], a.batch * a.seq_len
        load, dead = expert_load(out["router"], config.num_experts_per_tok)
        line = {k: out[k] for k in ("step", "loss", "aux", "z", "grad_norm", "lr")}
        targets = int((out["targets"] != -100).sum())
        line["loss"] = line["loss"] if targets else math.nan
        line |= {
            "tokens": tokens,
            "targets": targets,
            "ms": seconds * 1e3,
            "tok_s": tokens / seconds,
            "mfu": flops / seconds / peak,
            "expert_load_max": load,
            "expert_dead": dead,
        }
        if log:
            log.write(log_line(line))
            log.flush()
        print(
            f"step {line['step']:4d}/{a.steps}  loss {line['loss']:.6f}  grad_norm "
            f"{line['grad_norm']:.4f}  lr {line['lr']:.3g}  "
            f"{line['ms']:.0f} ms  {line['tok_s']:.0f} tok/s",
            flush=True,
        )


if __name__ == "__main__":
    main()
