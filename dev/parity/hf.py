#!/usr/bin/env python3
"""Adapter: transformers in one process.     python hf.py FIXTURE"""

import sys

import torch
import transformers

from parity import Fixture, forward, judge, per_expert, report, total

torch.set_num_threads(1)
fixture = Fixture(sys.argv[1])
model = (
    transformers.AutoModelForCausalLM.from_pretrained(fixture.folder, attn_implementation="eager")
    .float()
    .train()
)
logits, router = forward(model, fixture.inputs, fixture.position)
whole, loss, aux, _ = total(fixture, logits, router, fixture.targets)
whole.backward()
got = {"logits": logits, "loss": loss, "aux": aux}
for name, p in model.named_parameters():
    got |= {
        f"grad.{n}": g
        for n, g in per_expert(name, torch.zeros_like(p) if p.grad is None else p.grad)
    }
report(judge(fixture, f"transformers {transformers.__version__}", 1, got), got)
