#!/usr/bin/env python3
"""Adapter: torchtitan's Qwen3 with its FSDP2 and expert parallelism (all-to-all), on CPUs over
gloo.

    torchrun --standalone --nproc-per-node N torchtitan_ep.py FIXTURE

Every rank has its own windows; the loss is torchtitan's: the sum over its targets, divided by the
number of all targets. Nothing of the package is edited. Three things are set from here: the
experts' products are in fp32 (the package casts their operands to bf16), attention is its
ScaledDotProductAttention (its masked ones need a GPU, so there are no fixtures with documents),
and, as torchtitan has no auxiliary loss, aux and z are added here over the router logits of all
ranks.
"""

import glob
import importlib.metadata
import os
import sys

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
from torch.distributed.fsdp import FSDPModule

from parity import Fixture, judge, per_expert, report, total

torch._utils._get_available_device_type = (
    lambda: "cpu"
)  # the package takes CUDA where there is no device
torch.Tensor.bfloat16 = lambda t: t
import torchtitan.models.qwen3 as qwen3  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torchtitan.components.loss import cross_entropy_loss  # noqa: E402
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig  # noqa: E402
from torchtitan.distributed import ParallelDims  # noqa: E402
from torchtitan.distributed.utils import set_spmd_backend  # noqa: E402
from torchtitan.models.common.attention import ScaledDotProductAttention  # noqa: E402
from torchtitan.models.qwen3.sharding import set_qwen3_sharding_config  # noqa: E402


def model_config(c):
    """torchtitan's configuration of a Hugging Face config."""
    qwen3._EPS = c["rms_norm_eps"]
    head = c.get("head_dim", c["hidden_size"] // c["num_attention_heads"])
    theta = c.get("rope_theta") or c["rope_parameters"]["rope_theta"]
    experts = c.get("num_experts", c.get("num_local_experts"))
    common = dict(
        n_layers=1,
        dim=c["hidden_size"],
        n_heads=c["num_attention_heads"],
        n_kv_heads=c["num_key_value_heads"],
        head_dim=head,
        fuse_qkv=False,
        attn_backend="varlen",
        rope=qwen3.CosSinRoPE.Config(
            dim=head, max_seq_len=c["max_position_embeddings"], theta=theta
        ),
    )
    layers = []
    for i in range(c["num_hidden_layers"]):
        if i in c["mlp_only_layers"] or (i + 1) % c["decoder_sparse_step"]:
            layers += qwen3._build_qwen3_layers(hidden_dim=c["intermediate_size"], **common)
        else:
            layers += qwen3._build_qwen3_moe_layers(
                moe_hidden_dim=c["moe_intermediate_size"],
                num_experts=experts,
                top_k=c["num_experts_per_tok"],
                moe_comm_backend="standard",
                **common,
            )
            layers[-1].moe.router.route_norm = c["norm_topk_prob"]
            layers[-1].moe.load_balance_coeff = None
        layers[-1].attention.inner_attention = ScaledDotProductAttention.Config()
    V, C = c["vocab_size"], c["hidden_size"]
    return qwen3.Qwen3Model.Config(
        vocab_size=V,
        dim=C,
        norm=qwen3._qwen3_norm(C),
        layers=layers,
        enable_weight_tying=c["tie_word_embeddings"],
        tok_embeddings=qwen3.Embedding.Config(
            num_embeddings=V, embedding_dim=C, param_init=qwen3._EMBEDDING_INIT
        ),
        lm_head=qwen3.Linear.Config(in_features=C, out_features=V, param_init=qwen3._LINEAR_INIT),
    )


torch.set_num_threads(1)
set_spmd_backend("partial_dtensor")
dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
fixture = Fixture(sys.argv[1])
if fixture.position is not None:
    raise ValueError("documents: the masked attention of torchtitan needs a GPU")
config = model_config(fixture.config)
set_qwen3_sharding_config(config, enable_sp=False, enable_ep=ranks > 1)
model = config.build()
weights = {}
for path in glob.glob(os.path.join(fixture.folder, "model*.safetensors")):
    for name, tensor in load_file(path).items():
        weights |= per_expert(name, tensor)  # the package reads no fused experts
adapter = qwen3.Qwen3StateDictAdapter(config, None)
model.load_state_dict(adapter.from_hf(weights), strict=False)
dims = ParallelDims(
    dp_replicate=1,
    dp_shard=ranks,
    cp=1,
    tp=1,
    pp=1,
    ep=ranks,
    world_size=ranks,
    spmd_backend="partial_dtensor",
)
dims.build_mesh()
qwen3.parallelize_qwen3(
    model,
    parallel_dims=dims,
    training=TrainingConfig(mixed_precision_param="float32", mixed_precision_reduce="float32"),
    parallelism=ParallelismConfig(spmd_backend="partial_dtensor", expert_parallel_degree=ranks),
    compile_config=CompileConfig(),
    ac_config=None,
    dump_folder="",
)
for module in model.modules():
    if isinstance(module, FSDPModule):
        module.set_force_sum_reduction_for_comms(
            True
        )  # the same sum, by an operation that gloo has
inputs, targets, _ = fixture.part(rank, ranks)
kept = []
for layer in model.layers.values():
    if layer.moe_enabled:
        layer.moe.router.gate.register_forward_hook(
            lambda _, __, out: kept.append(out.flatten(0, -2))
        )
model.train()
logits = model(inputs)
count = int((fixture.targets != -100).sum())
loss = cross_entropy_loss(logits, targets) / count
router = tuple(torch.cat(dist_nn.all_gather(r.contiguous())) for r in kept)
whole, _, aux, _ = total(fixture, logits, router, targets, count)
regular = whole - total(fixture, logits, tuple(r.detach() for r in router), targets, count)[1]
(loss + regular / ranks).backward()
got = {"loss": loss.detach().clone(), "aux": aux.detach()}
dist.all_reduce(got["loss"])
pieces = [torch.empty_like(logits) for _ in range(ranks)]
dist.all_gather(pieces, logits.detach().contiguous())
got["logits"] = torch.cat(pieces)
grads = {
    n: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
    for n, p in model.named_parameters()
}
got |= {f"grad.{n}": g for n, g in adapter.to_hf(grads).items()}
if rank == 0:
    report(
        judge(
            fixture,
            f"torchtitan {importlib.metadata.version('torchtitan')} expert parallel",
            ranks,
            got,
        ),
        got,
    )
dist.barrier()
dist.destroy_process_group()
