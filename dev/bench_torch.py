#!/usr/bin/env python3
"""torch's own kernels at the shapes of dev/bench_cuda.cu, timed the same way. JSON lines on stdout:
{"kernel", "how", "tokens", "us"}; what torch does not have or refuses goes to stderr.

  dev/bench_torch.py [--tokens 4096 32768] [--seconds 0.15] [--device cuda|cpu] [--tiny]

A line computes what the kernel of that name computes, with the fewest calls torch offers (eager, no
torch.compile): gathers, SwiGLU and sums are timed with the product they belong to. Weight gradients
are bf16 here, fp32 there. 256 MiB are written before every call. The best of several ways counts
(dev/bench_report.py). experts_forward and experts_backward are the whole expert layer of
transformers, by each of its implementations that is installed here.
"""

import argparse
import json
import os
import sys
import time

import torch
import torch.nn.functional as F

p = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
p.add_argument("--tokens", type=int, nargs="+", default=[4096, 32768])
p.add_argument("--seconds", type=float, default=0.15)
p.add_argument("--device", default="cuda")
p.add_argument("--tiny", action="store_true")
a = p.parse_args()
if a.device == "cuda" and not torch.cuda.is_available():
    sys.exit("error: torch sees no GPU, hint: a CUDA build of torch, nvidia-smi")
cuda = a.device == "cuda"
C, H, KV, D, E, K, W, V, LENGTH = 2048, 32, 4, 128, 128, 8, 768, 151936, 4096
P = 3 * 128 * 2048 * 768
if a.tiny:
    C, H, KV, D, E, K, W, V, LENGTH, P = 64, 4, 2, 16, 8, 2, 16, 160, 32, 24576
    a.tokens, a.seconds = [LENGTH, 2 * LENGTH], 0
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # what is not here is not fetched
torch.manual_seed(1)
flush = torch.empty(1 << (10 if a.tiny else 28), dtype=torch.uint8, device=a.device)


def normal(*shape, std=1.0, dtype=torch.bfloat16):
    return torch.randn(*shape, device=a.device, dtype=dtype) * std


def time_us(call):
    """Median of at least 5 and at most 101 calls, after three that do not count."""
    us = []
    while len(us) < 8 or (len(us) < 104 and sum(us[3:]) < a.seconds * 1e6):
        flush.zero_()
        if cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            end.synchronize()
            us.append(1e3 * begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            call()
            us.append(1e6 * (time.perf_counter() - start))
    us = sorted(us[3:])
    return us[len(us) // 2]


def bench(kernel, how, tokens, make):
    """make() prepares the operands and returns the call to time."""
    try:
        us = round(time_us(make()), 2)
        print(json.dumps({"kernel": kernel, "how": how, "tokens": tokens, "us": us}), flush=True)
    except Exception as e:  # a missing or unsupported function is an answer too
        print(
            f"{kernel} by {how}, {tokens} tokens: {type(e).__name__}: "
            f"{str(e).splitlines()[0][:150] if str(e) else ''}",
            file=sys.stderr,
            flush=True,
        )
    if cuda:
        torch.cuda.empty_cache()


def backward(out, inputs):
    """The call that differentiates out with respect to inputs, the forward pass outside of it."""
    d = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, inputs, d, retain_graph=True)


def leaf(t):
    return t.detach().requires_grad_()


def dense(R):
    Q, G, T = H * D, KV * D, min(R, LENGTH)
    x, dy, w = normal(R, C), normal(R, C), normal(C)
    bench("rmsnorm_forward", "rms_norm", R, lambda: lambda: F.rms_norm(x, (C,), w, 1e-6))

    def norm_backward():
        xs, ws = leaf(x), leaf(w)
        return backward(F.rms_norm(xs, (C,), ws, 1e-6), (xs, ws))

    bench("rmsnorm_backward", "rms_norm, no residual", R, norm_backward)
    bench("add", "add", R, lambda: lambda: x + dy)
    index = torch.randint(R, (R,), device=a.device)
    bench("rows_gather", "index_select", R, lambda: lambda: x.index_select(0, index))
    for name, O, N in (("q", Q, C), ("kv", G, C), ("o", C, Q)):
        inp, weight, dout = normal(R, N), normal(O, N, std=N**-0.5), normal(R, O)
        bench("linear_forward_" + name, "linear", R, lambda: lambda: F.linear(inp, weight))
        bench(
            "linear_backward_input_" + ("add_kv" if name == "kv" else name),
            "addmm_" if name == "kv" else "matmul",
            R,
            lambda: (lambda: inp.addmm_(dout, weight)) if name == "kv" else (lambda: dout @ weight),
        )
        bench("linear_backward_weight_" + name, "matmul", R, lambda: lambda: dout.t() @ inp)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (normal(R // T, n, T, D) for n in (H, KV, KV))
    ways = [("math", SDPBackend.MATH)]
    if cuda:
        ways = [("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)]
    for how, backend in ways:

        def sdpa(q, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        def attention_backward():
            leaves = leaf(q), leaf(k), leaf(v)
            return backward(sdpa(*leaves), leaves)

        bench("attention_forward", "sdpa " + how, R, lambda: lambda: sdpa(q, k, v))
        bench("attention_backward", "sdpa " + how, R, attention_backward)


def experts(R):
    x, dy, Wr = normal(R, C), normal(R, C), normal(E, C, std=C**-0.5)
    W1, W2 = normal(E, 2 * W, C, std=C**-0.5), normal(E, C, W, std=W**-0.5)

    def router():
        logits = F.linear(x, Wr)
        score, ids = logits.float().softmax(-1).topk(K)
        return score / score.sum(-1, keepdim=True), ids

    bench("router_forward", "linear, softmax, topk", R, lambda: router)
    ids = torch.rand(R, E, device=a.device).topk(K).indices  # even routing
    score = torch.rand(R, K, device=a.device)

    def plan():
        order = ids.flatten().argsort(stable=True)
        return (
            order,
            order // K,
            torch.bincount(ids.flatten(), minlength=E).cumsum(0).int(),
            order.argsort(),
        )

    bench("row_index_build", "argsort, bincount", R, lambda: plan)
    order, token, ends, inverse = plan()
    row_score = score.flatten()[order][:, None].bfloat16()
    hidden, act, out = normal(R * K, 2 * W), normal(R * K, W), normal(R * K, C)
    swiglu = lambda h: F.silu(h[:, :W]) * h[:, W:]
    grouped = getattr(torch, "_grouped_mm", None)
    cuts = [0] + ends.tolist()

    def loop(rows, weight):  # (M,N) x (E,N,O), one product an expert
        return torch.cat([rows[cuts[e] : cuts[e + 1]] @ weight[e] for e in range(E)])

    def loop_k(left, right):  # (M,N), (M,O): an (N,O) product an expert
        return torch.stack(
            [left[cuts[e] : cuts[e + 1]].t() @ right[cuts[e] : cuts[e + 1]] for e in range(E)]
        )

    def down_backward(product):
        g, h = product(dy[token], W2), hidden
        gate, up = h[:, :W].float(), h[:, W:].float()
        s = torch.sigmoid(gate)
        dscore, dA = (g * (gate * s * up)).sum(-1), g * row_score
        return (
            dscore,
            torch.cat((dA * up * s * (1 + gate * (1 - s)), dA * gate * s), -1).bfloat16(),
            (gate * s * up * row_score).bfloat16(),
        )

    ways = {"loop": (loop, loop_k)}
    if grouped:
        ways["_grouped_mm"] = (
            lambda rows, weight: grouped(rows, weight, ends),
            lambda left, right: grouped(left.t(), right, ends),
        )
    for how, (product, product_k) in ways.items():
        bench("experts_up", how, R, lambda: lambda: swiglu(product(x[token], W1.transpose(1, 2))))
        bench("experts_up_again", how, R, lambda: lambda: product(x[token], W1.transpose(1, 2)))
        bench("experts_down", how, R, lambda: lambda: product(act, W2.transpose(1, 2)))
        bench("experts_down_backward", how, R, lambda: lambda: down_backward(product))
        bench("experts_up_backward", how, R, lambda: lambda: product(hidden, W1))
        bench(
            "experts_wgrad",
            how,
            R,
            lambda: lambda: (product_k(hidden, x[token]), product_k(dy[token], act)),
        )
    bench(
        "rows_weighted_sum",
        "index, multiply, sum",
        R,
        lambda: lambda: (out[inverse].view(R, K, C) * score[..., None].bfloat16()).sum(1),
    )


def expert_layers(R):
    def layer(how):
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        config = Qwen3MoeConfig(
            hidden_size=C, moe_intermediate_size=W, num_experts=E, num_experts_per_tok=K
        )
        config._experts_implementation = how
        with torch.device(a.device):
            module = Qwen3MoeExperts(config).bfloat16()
        for weight in module.parameters():
            torch.nn.init.normal_(weight, std=0.02)
        ids = torch.rand(R, E, device=a.device).topk(K).indices.sort().values  # even routing
        score = torch.rand(R, K, device=a.device).bfloat16().requires_grad_()
        return module, (leaf(normal(R, C)), ids, score)

    def forward(how):
        module, inputs = layer(how)
        return lambda: module(*inputs)

    def both(how):
        module, inputs = layer(how)
        return backward(module(*inputs), (inputs[0], inputs[2], *module.parameters()))

    for how in "grouped_mm", "sonicmoe", "deepgemm":
        bench("experts_forward", "transformers " + how, R, lambda: forward(how))
        bench("experts_backward", "transformers " + how, R, lambda: both(how))


def ends(R):
    N = min(R, (1 << 30) // (V * 2))
    ids, weight, x, y = (
        torch.randint(V, (R,), device=a.device),
        normal(V, C, std=C**-0.5),
        normal(R, C),
        normal(N, C),
    )
    bench("embed_forward", "embedding", R, lambda: lambda: F.embedding(ids, weight))

    def embedding_backward():
        w = leaf(weight)
        return backward(F.embedding(ids, w), (w,))

    bench("embed_backward", "embedding", R, embedding_backward)
    logits = normal(N, V)
    bench("head_forward", "linear", R, lambda: lambda: F.linear(y, weight))
    bench("head_backward_input", "matmul", R, lambda: lambda: logits @ weight)
    bench("head_backward_weight", "matmul", R, lambda: lambda: logits.t() @ y)

    def cross_entropy():
        z = leaf(logits)
        return lambda: torch.autograd.grad(F.cross_entropy(z.float(), ids[:N]), z)

    bench("cross_entropy", "float, cross_entropy, backward", R, cross_entropy)


def optimizer(n, tokens):
    def make(kind, dtype, **options):
        w = normal(n, dtype=dtype, std=0.02).requires_grad_()
        w.grad = normal(n, dtype=dtype)
        return kind([w], lr=1e-4, fused=True, **options).step

    bench(
        "optimizer_adamw",
        "AdamW fused, fp32 without a bf16 copy",
        tokens,
        lambda: make(torch.optim.AdamW, torch.float32),
    )
    bench("optimizer_sgd", "SGD fused, bf16", tokens, lambda: make(torch.optim.SGD, torch.bfloat16))
    g = normal(n, dtype=torch.float32)
    bench("gradient_squares", "vector_norm", tokens, lambda: lambda: torch.linalg.vector_norm(g))


print(
    f"torch {torch.__version__}, {torch.cuda.get_device_name() if cuda else 'cpu'}", file=sys.stderr
)
for R in a.tokens:
    dense(R)
    experts(R)
    expert_layers(R)
    ends(R)
optimizer(P, LENGTH)
