#!/usr/bin/env python3
"""Adapter: transformers' model under PyTorch's FSDP2 (fully_shard a layer), on CPUs over gloo.

    torchrun --standalone --nproc-per-node N fsdp2.py FIXTURE [mean|global]

mean, global: see hf_ep.py. aux and z are those of each rank's own tokens, averaged over the ranks,
as a training loop has them.
"""

import sys

import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from parity import Fixture, forward, gather, judge, per_expert, report, total

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
fixture = Fixture(sys.argv[1])
loss_kind = sys.argv[2] if len(sys.argv) > 2 else "mean"
model = (
    transformers.AutoModelForCausalLM.from_pretrained(fixture.folder, attn_implementation="eager")
    .float()
    .train()
)
mesh = init_device_mesh("cpu", (ranks,))
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
inputs, targets, position = fixture.part(rank, ranks)
logits, router = forward(model, inputs, position)
divisor = int((fixture.targets != -100).sum()) / ranks if loss_kind == "global" else None
whole, loss, aux, _ = total(fixture, logits, router, targets, divisor)
whole.backward()
got = {}
for name, value in (("loss", loss), ("aux", aux)):
    mean = value.detach().clone()
    dist.all_reduce(mean)
    got[name] = mean / ranks
pieces = [torch.empty_like(logits) for _ in range(ranks)]
dist.all_gather(pieces, logits.detach().contiguous())
got["logits"] = torch.cat(pieces)
for name, p in model.named_parameters():
    got |= {f"grad.{n}": g for n, g in per_expert(name, gather(p, p.grad, 0))}
if rank == 0:
    report(
        judge(
            fixture,
            f"transformers {transformers.__version__} FSDP2 (torch "
            f"{torch.__version__.split('+')[0]}), {loss_kind} loss",
            ranks,
            got,
        ),
        got,
    )
dist.barrier()
dist.destroy_process_group()
