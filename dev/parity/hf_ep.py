#!/usr/bin/env python3
"""Adapter: transformers with its own expert parallelism, on CPUs over gloo.

    torchrun --standalone --nproc-per-node N hf_ep.py FIXTURE data|batch [mean|global]

data: DistributedConfig(fsdp_size=N, ep_size=N): every rank has its own windows. batch: tp_size=N,
ep_size=N: all ranks see all of them. mean: every rank's loss is the mean over its own targets, as a
training loop writes it; global: the sum over N times its share of all targets, so that the average
over ranks is the mean over all. What the ranks hold after backward is gathered, nothing is
rescaled.
"""

import sys

import torch
import torch.distributed as dist
import transformers
from transformers.distributed import DistributedConfig

from parity import Fixture, forward, gather, judge, per_expert, report, total

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
fixture, kind = Fixture(sys.argv[1]), sys.argv[2]
loss_kind = sys.argv[3] if len(sys.argv) > 3 else "mean"
layout = (
    DistributedConfig(fsdp_size=ranks, ep_size=ranks)
    if kind == "data"
    else DistributedConfig(tp_size=ranks, ep_size=ranks, tp_plan="auto")
)
model = transformers.AutoModelForCausalLM.from_pretrained(
    fixture.folder, attn_implementation="eager", dtype=torch.float32, distributed_config=layout
).train()
inputs, targets, position = (
    fixture.part(rank, ranks)
    if kind == "data"
    else (fixture.inputs, fixture.targets, fixture.position)
)
logits, router = forward(model, inputs, position)
divisor = (
    int((fixture.targets != -100).sum()) / ranks
    if kind == "data" and loss_kind == "global"
    else None
)
whole, loss, aux, _ = total(fixture, logits, router, targets, divisor)
whole.backward()
got = {}
for name, value in (("loss", loss), ("aux", aux)):
    mean = value.detach().clone()
    dist.all_reduce(mean)
    got[name] = mean / ranks
pieces = [torch.empty_like(logits) for _ in range(ranks)]
dist.all_gather(pieces, logits.detach().contiguous())
got["logits"] = torch.cat(pieces) if kind == "data" else logits
experts = fixture.config.get("num_experts", fixture.config.get("num_local_experts"))
for name, p in model.named_parameters():
    whole_grad = gather(p, p.grad, experts if ".mlp.experts." in name else 0)
    got |= {f"grad.{n}": g for n, g in per_expert(name, whole_grad)}
if rank == 0:
    report(
        judge(
            fixture,
            f"transformers {transformers.__version__} expert parallel, {kind}, {loss_kind} loss",
            ranks,
            got,
        ),
        got,
    )
dist.barrier()
dist.destroy_process_group()
