#!/usr/bin/env python3
"""Writes dev/fixtures/: small Qwen3-MoE checkpoints with everything that transformers computes from
them in fp32.

    python dev/hf/fixtures.py --out dev/fixtures [--only NAME...]

Each folder holds
    config.json, model*.safetensors   the checkpoint, fp32, in one of the layouts that exist in the
                                      wild
    tokens.bin                        an llm.c shard of exactly STEPS batches of B windows (read it
                                      in file order)
    expected.safetensors              inputs, targets (B, T); logits (B, T, V); loss, aux, z;
                                      grad.<name> of the total for every parameter;
                                      topk (L_moe, B*T, k) ascending; losses_sgd, losses_adamw,
                                      grad_norms_sgd, grad_norms_adamw (STEPS);
                                      final_sgd, final_adamw: the L2 norm of every parameter after
                                      the last update, sorted by name;
                                      counts (B, T): 1 where a target counts, in fixtures with a
                                      loss mask or documents
    tokens.mask                       the loss mask of some: one byte a token
    meta.json                         the options of these runs, versions, and the rounding noise of
                                      transformers itself

A tie in the routing would make a comparison meaningless, so weights are large (routing margins >
1e-3 in the first batch, > 5e-5 in all of them) and everything is computed a second time in fp64: a
fixture is refused if its routing differs anywhere, a gradient differs by more than 5e-6
(norm-wise), or a loss of the ten updates by more than 2e-6 (relative).
"""

import argparse
import json
import math
import os
import shutil
import sys
import tempfile

sys.dont_write_bytecode = True  # `reference` is imported from this folder: leave no cache in it

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from reference import (
    MASK_MAGIC,
    Routing,
    Windows,
    backward,
    counting,
    die,
    expert_load,
    forward,
    gradients,
    load_model,
    losses,
    per_expert,
    positions,
    precision,
    routing,
    train,
)

STEPS, MARGIN, MARGIN_RUNS, GRADIENT_NOISE, LOSS_NOISE = 10, 1e-3, 5e-5, 5e-6, 2e-6

# The released configuration's keys, which transformers 4.x writes; a fixture names what differs.
# KEYS5 is the spelling of transformers 5.x.
# fmt: off
BASE = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
    "attention_bias": False, "attention_dropout": 0.0, "decoder_sparse_step": 1, "head_dim": 16,
    "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 48,
    "max_position_embeddings": 512, "mlp_only_layers": [], "moe_intermediate_size": 16,
    "norm_topk_prob": True, "num_attention_heads": 4, "num_experts": 8, "num_experts_per_tok": 2,
    "num_hidden_layers": 2, "num_key_value_heads": 2, "output_router_logits": False,
    "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "float32", "use_cache": True, "use_sliding_window": False, "vocab_size": 257,
}

RUN = {
    "B": 4, "T": 16, "aux_coef": 0.01, "z_coef": 0.0, "aux_pool": "layers",
    "ignore_target": -1,  # -1: every target counts
    "sgd": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.0, "grad_clip": 1.0},
    "adamw": {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01,
              "grad_clip": 1.0},
}

FIXTURES = {
    # the released model in small: GQA, heads wider than hidden / heads, renormalised top-2
    "gqa": {
        "config": {},
        "run": {"sgd": {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "grad_clip": 0.0}},
    },
    # tied head, MHA without a head_dim key, top-3 of 6 not renormalised, no aux; fused experts
    "tied": {
        "config": {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3,
                   "head_dim": None, "norm_topk_prob": False, "num_experts": 6,
                   "num_experts_per_tok": 3, "moe_intermediate_size": 24,
                   "tie_word_embeddings": True, "rope_theta": 1000000.0, "rms_norm_eps": 1e-5,
                   "vocab_size": 131, "pad_token_id": 5},
        "run": {"T": 12, "aux_coef": 0.0,
                "sgd": {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "grad_clip": 1.0}},
        "layout": "fused",
    },
    # layers 0, 2, 3, 4 dense, 1 and 5 MoE; MQA; top-1; per-layer aux; z; ignored targets; new keys
    "dense": {
        "config": {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3],
                   "num_key_value_heads": 1, "norm_topk_prob": False, "num_experts": 5,
                   "num_experts_per_tok": 1, "vocab_size": 97, "pad_token_id": 3,
                   "intermediate_size": 40, "rope_theta": 5000.0},
        "run": {"B": 3, "T": 20, "aux_coef": 0.02, "z_coef": 0.01, "aux_pool": "layer",
                "ignore_target": 7,
                "adamw": {"lr": 2e-3, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6,
                          "weight_decay": 0.1, "grad_clip": 0.5}},
        "keys": "new",
    },
    # many small experts: top-5 of 24, some without a token; heads of 32; per-layer aux
    "wide": {
        "config": {"num_experts": 24, "num_experts_per_tok": 5, "moe_intermediate_size": 8,
                   "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
                   "vocab_size": 67, "hidden_size": 40},
        "run": {"B": 2, "T": 8, "aux_pool": "layer"},
    },
    # for grids: 3 MoE layers and 1 dense, 8 experts, 2 KV heads, 8 windows, uneven valid targets
    "parallel": {
        "config": {"num_hidden_layers": 4, "mlp_only_layers": [1], "vocab_size": 128,
                   "num_attention_heads": 8},
        "run": {"B": 8, "aux_coef": 0.01, "z_coef": 0.001, "ignore_target": 2,
                "sgd": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "grad_clip": 0.5}},
        "layout": "sharded",
    },
    # trained for a while without a balancing loss: a few experts do most of the work
    "skewed": {
        "config": {"num_hidden_layers": 3, "num_experts": 16, "num_experts_per_tok": 2,
                   "vocab_size": 64},
        "run": {"B": 4, "T": 24, "z_coef": 0.001},
        "trained": 150,
    },
    # three documents in every window, one of them of one token; attention and positions end with
    # each
    "documents": {
        "config": {"num_experts": 6, "vocab_size": 61, "eos_token_id": 9, "head_dim": 8},
        "run": {"T": 20, "documents": "mask", "document_end": 9},
    },
    # a loss mask; one sequence of every batch has no target at all; z-loss and ignored targets
    # beside it
    "masks": {
        "config": {"num_experts": 6, "vocab_size": 61, "num_key_value_heads": 1, "head_dim": 8},
        "run": {"z_coef": 0.001, "ignore_target": 4, "aux_pool": "layer"},
        "masked": True,
    },
    # documents and masks together, the head tied to the embedding
    "chat": {
        "config": {"num_experts": 6, "num_experts_per_tok": 3, "vocab_size": 61, "head_dim": 8,
                   "tie_word_embeddings": True, "norm_topk_prob": False},
        "run": {"T": 18, "documents": "mask", "document_end": 11, "z_coef": 0.001},
        "masked": True,
    },
}
# fmt: on


def write_shard(path, ids):
    head = np.zeros(256, np.int32)
    head[:3] = 20240520, 1, len(ids)
    with open(path, "wb") as f:
        f.write(head.tobytes() + np.asarray(ids, np.uint16).tobytes())


def write_mask(path, mask):
    head = np.zeros(256, np.int32)
    head[:3] = MASK_MAGIC, 1, len(mask)
    with open(path, "wb") as f:
        f.write(head.tobytes() + np.asarray(mask, np.uint8).tobytes())


def end_documents(ids, T, end, seed):
    """The same tokens with two ends of documents in every window of T, so that it holds three
    documents, one of them of one token: the middle one in most windows, the first in every fourth,
    the last in every fourth."""
    rng = np.random.default_rng(seed)
    ids = [end - 1 if i == end else i for i in ids]
    for window in range(len(ids) // T):
        at = int(rng.integers(3, T - 5))
        for place in {2: (0, at), 3: (at, T - 2)}.get(window % 4, (at, at + 1)):
            ids[window * T + place] = end
    return ids


def loss_mask(n, B, T, seed):
    """Runs of targets and of tokens that are none, as conversations have them; the second sequence
    of every batch has no target."""
    rng = np.random.default_rng(seed)
    mask, on = [], 1
    while len(mask) < n:
        mask += [on] * int(rng.integers(1, 8))
        on = 1 - on
    mask = mask[:n]
    for window in range(1, (n - 1) // T, B):
        mask[window * T + 1 : window * T + T + 1] = [0] * T
    return mask


def text(V, n, seed, common=()):
    """n tokens that can be learnt: each id has a few likely successors, drawn from a skewed
    distribution; `common` ids are sprinkled in."""
    rng = np.random.default_rng(seed)
    rank = rng.permutation(V)
    frequency = 1.0 / (1 + rank) ** 0.8
    follow = rng.choice(V, (V, 4), p=frequency / frequency.sum())
    ids = [int(rng.integers(V))]
    while len(ids) < n:
        u = rng.random()
        if common and u < 0.12:
            ids.append(int(rng.choice(common)))
        elif u < 0.8:
            ids.append(int(follow[ids[-1], rng.integers(4)]))
        else:
            ids.append(int(rng.choice(V, p=frequency / frequency.sum())))
    return ids


def randomize(model, seed):
    """Weights in which nothing is hidden: N(0, 1) embeddings, N(0, 0.1^2) matrices (5 x
    initializer_range), routers twice that, and norm weights away from 1. Large weights keep routing
    margins far above rounding."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            x = torch.randn(p.shape, generator=g)
            scale = (
                1.0 if "embed_tokens" in name else 0.2 if name.endswith("mlp.gate.weight") else 0.1
            )
            p.copy_(1 + 0.2 * x if "norm" in name else scale * x)


def write_checkpoint(model, config, folder, layout):
    """model.safetensors with per-expert or fused names, or several files with an index; config.json
    as given."""
    options = {"fused": {"save_original_format": False}, "sharded": {"max_shard_size": "64KB"}}.get(
        layout, {}
    )
    with tempfile.TemporaryDirectory() as tmp:
        model.save_pretrained(tmp, **options)
        for name in os.listdir(tmp):
            if name.startswith("model"):
                shutil.copy(os.path.join(tmp, name), folder)
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(config, f, indent=2)
        f.write("\n")


def config_of(fixture):
    config = {**BASE, **fixture["config"]}
    if config["head_dim"] is None:
        del config["head_dim"]
    if fixture.get("keys") == "new":
        config["num_local_experts"] = config.pop("num_experts")
        config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), "rope_type": "default"}
        config["dtype"] = config.pop("torch_dtype")
        del config["rope_scaling"], config["use_sliding_window"]
    return dict(sorted(config.items()))


def skew(model, V, seed, steps):
    """A short training run without aux loss on other text of the same kind."""
    with tempfile.TemporaryDirectory() as tmp:
        path = os.path.join(tmp, "other.bin")
        write_shard(path, text(V, steps * 4 * 24 + 1, seed))
        for out in train(model, Windows([path], 24), 4, steps, optimizer="adamw", lr=3e-3):
            pass


def compute(folder, run, dtype):
    """Everything in expected.safetensors, computed from the files of the folder; margins and loads
    beside it."""
    windows, B = Windows([os.path.join(folder, "tokens.bin")], run["T"]), run["B"]
    ignore = None if run["ignore_target"] < 0 else run["ignore_target"]
    end = run.get("document_end")
    common = (run["aux_coef"], run["z_coef"], run["aux_pool"])
    model = load_model(folder, dtype)
    K = model.config.num_experts_per_tok
    inputs, targets, counts = windows.batch(0, B)
    counted = counting(inputs, targets, counts, ignore, end)
    position = None if end is None else positions(inputs, end)
    assert (
        ignore is None or (targets == ignore).sum(1).unique().numel() > 1
    )  # windows differ in their number of valid targets
    assert model.config.pad_token_id is None or (inputs == model.config.pad_token_id).any()
    with precision(dtype), Routing(model.config, inputs.numel()) as choice:
        logits, router = forward(model, inputs, position)
        total, loss, aux, z = losses(model.config, logits, router, counted, *common)
        if run["aux_pool"] == "layers" and end is None:  # our aux is the one transformers reports
            assert torch.equal(aux, model(input_ids=inputs, output_router_logits=True).aux_loss)
        backward(model, total)
    topk, margin = routing(router, K)
    assert torch.equal(topk, choice.topk(len(router)))
    result = {
        "inputs": inputs,
        "targets": targets,
        "logits": logits.detach(),
        "loss": loss.detach(),
        "aux": aux.detach(),
        "z": z.detach(),
        "topk": topk,
        **{f"grad.{n}": g.clone() for n, g in gradients(model).items()},
    }
    if end is not None or windows.masks:
        result["counts"] = (counted != -100).long()
    trace, load, margin_run = [], expert_load(router, K), math.inf
    for kind in ("sgd", "adamw"):
        model, seen = load_model(folder, dtype), []
        for out in train(
            model,
            windows,
            B,
            STEPS,
            dtype,
            *common,
            ignore,
            optimizer=kind,
            **run[kind],
            document_end=end,
        ):
            sets, gap = routing(out["router"], K)
            seen.append((out["loss"], out["grad_norm"]))
            trace.append(sets)
            margin_run = min(margin_run, gap)
        result[f"losses_{kind}"], result[f"grad_norms_{kind}"] = (
            torch.tensor(column, dtype=torch.float64) for column in zip(*seen)
        )
        weights = {
            n: t.detach() for name, p in model.named_parameters() for n, t in per_expert(name, p)
        }
        result[f"final_{kind}"] = torch.stack([weights[n].double().norm() for n in sorted(weights)])
    return result, margin, margin_run, load, torch.stack(trace)


def distance(a, b):
    """|a - b| / |b|, zero where both are zero."""
    a, b = a.double(), b.double()
    d, n = (a - b).norm().item(), b.norm().item()
    return d / n if n else (0.0 if d == 0 else float("inf"))


def write_fixture(name, fixture, out, attempts=40):
    """Tries seeds until margins and noise are as promised, then writes the folder."""
    folder, config = os.path.join(out, name), config_of(fixture)
    run = {**RUN, **fixture["run"]}
    V = config["vocab_size"]
    for seed in range(1, attempts + 1):
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        with open(os.path.join(folder, "config.json"), "w") as f:
            json.dump(config, f)
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(folder),
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
        )
        randomize(model, seed)
        sprinkled = [i for i in (run["ignore_target"], config.get("pad_token_id", -1)) if i >= 0]
        ids = text(V, STEPS * run["B"] * run["T"] + 1, seed, sprinkled)
        if "documents" in run:
            ids = end_documents(ids, run["T"], run["document_end"], seed)
        write_shard(os.path.join(folder, "tokens.bin"), ids)
        if "masked" in fixture:
            write_mask(
                os.path.join(folder, "tokens.mask"), loss_mask(len(ids), run["B"], run["T"], seed)
            )
        if "trained" in fixture:
            skew(model, V, seed, fixture["trained"])
        write_checkpoint(model, config, folder, fixture.get("layout"))
        low, margin, margin_run, load, trace = compute(folder, run, "fp32")
        if margin < MARGIN or margin_run < MARGIN_RUNS:
            continue
        high, *_, trace64 = compute(folder, run, "fp64")
        noise = {n: distance(low[n], high[n]) for n in low if n.startswith("grad.")}
        series = {
            n: ((low[n] - high[n]).abs() / high[n].abs()).max().item()
            for n in low
            if n.startswith(("losses_", "grad_norms_"))
        }
        worst = max(noise, key=noise.get)
        same = torch.equal(trace, trace64)
        print(
            f"{name:9s} seed {seed}: margin {margin:.1e} (runs {margin_run:.1e}), routing "
            f"{'equal' if same else 'differs'}, logits "
            f"{distance(low['logits'], high['logits']):.1e}, gradients median "
            f"{np.median(list(noise.values())):.1e} worst {noise[worst]:.1e} "
            f"({worst[5:]}), losses sgd {series['losses_sgd']:.1e} adamw "
            f"{series['losses_adamw']:.1e}, load {load[0]:.2f}, dead {load[1]}"
        )
        skewed = "trained" not in fixture or load[0] > 2
        if (
            same
            and skewed
            and noise[worst] <= GRADIENT_NOISE
            and max(series["losses_sgd"], series["losses_adamw"]) <= LOSS_NOISE
        ):
            break
    else:
        die(f"{name}: no seed of {attempts} gave clean margins", "change its configuration")
    store = {
        n: t.to(torch.int32 if t.dtype == torch.int64 else torch.float32).contiguous()
        for n, t in low.items()
    }
    save_file(store, os.path.join(folder, "expected.safetensors"))
    meta = {
        **run,
        "steps": STEPS,
        "seed": seed,
        "moe_layers": low["topk"].shape[0],
        "expert_load_max": load[0],
        "expert_dead": load[1],
        "routing_margin": margin,
        "routing_margin_runs": margin_run,
        "fp32_against_fp64": {
            "logits": distance(low["logits"], high["logits"]),
            "gradient_median": float(np.median(list(noise.values()))),
            "gradient_worst": noise[worst],
            "gradient_worst_name": worst[5:],
            **series,
        },
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
    }
    with open(os.path.join(folder, "meta.json"), "w") as f:
        json.dump(meta, f, indent=2)
        f.write("\n")
    for n in os.listdir(folder):
        os.chmod(os.path.join(folder, n), 0o644)  # safetensors writes private files
    return sum(os.path.getsize(os.path.join(folder, n)) for n in os.listdir(folder))


def main():
    p = argparse.ArgumentParser(description="Writes the parity fixtures.")
    p.add_argument(
        "--out", default=os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "fixtures")
    )
    p.add_argument("--only", nargs="+", choices=list(FIXTURES), default=list(FIXTURES))
    a = p.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    sizes = {name: write_fixture(name, FIXTURES[name], a.out) for name in a.only}
    print(
        "  ".join(f"{n} {s / 1024:.0f} KiB" for n, s in sizes.items()),
        f" together {sum(sizes.values()) / 2**20:.2f} MiB",
    )


if __name__ == "__main__":
    main()
