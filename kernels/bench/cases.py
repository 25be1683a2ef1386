"""What `kernels.bench` measures: operations, shapes, and who is measured beside us.

A `Case` is one operation at one shape in one phase. `inputs` makes its tensors; `calls` maps a name
("triton", "torch", a peer) to a function that takes the inputs and returns what is to be timed, a
function of nothing. A peer's import lies inside its function: where the package is missing that
raises ImportError, and the table says so.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

import kernels
from kernels import (
    flash_attention,
    linear_logprob,
    paged_decode,
    rope_cache,
    sampling_head,
    swiglu_act,
)
from kernels.bench import peers
from kernels.rms_norm import reference as rms_norm_reference


@dataclass
class Model:
    """The numbers of a Qwen2.5 that shapes come from."""

    hidden: int
    heads: int
    kv_heads: int
    D: int
    mlp: int
    vocab: int


MODELS = {
    "0.5B": Model(896, 14, 2, 64, 4864, 151_936),
    "1.5B": Model(1536, 12, 2, 128, 8960, 151_936),
    "7B": Model(3584, 28, 4, 128, 18_944, 152_064),
    "32B": Model(5120, 40, 8, 128, 27_648, 152_064),
}
SMALL = {"tiny": Model(64, 4, 2, 32, 128, 1000)}  # what a CPU measures


@dataclass
class Case:
    op: str
    phase: str  # "forward" | "backward" | "forward+backward"
    model: str
    shape: str  # for people
    inputs: Callable  # (device, dtype) -> tuple
    flops: float
    bytes: float  # that must move at least
    bound: str  # "matmul" | "copy": the ceiling it is measured against
    calls: dict = field(default_factory=dict)  # name -> function(*inputs) -> function()

    @property
    def name(self):
        return f"{self.op} {self.phase} {self.model} {self.shape}"


def plain(function, **kwargs):
    """Time a call, without autograd."""

    def build(*inputs):
        def call():
            with torch.no_grad():
                return function(*inputs, **kwargs)

        return call

    return build


def gradients(function, *wanted, **kwargs):
    """Time the backward pass alone: inputs numbered in `wanted` get a gradient."""

    def build(*inputs):
        inputs = [x.detach().requires_grad_() if i in wanted else x for i, x in enumerate(inputs)]
        out = function(*inputs, **kwargs)
        outs = [x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad]
        grads = [torch.randn_like(x) for x in outs]
        leaves = [inputs[i] for i in wanted]
        return lambda: torch.autograd.grad(outs, leaves, grads, retain_graph=True)

    return build


def both(function, *wanted, **kwargs):
    """Time forward and backward together, for peers that do not part them."""

    def build(*inputs):
        inputs = [x.detach().requires_grad_() if i in wanted else x for i, x in enumerate(inputs)]
        leaves = [inputs[i] for i in wanted]

        def call():
            out = function(*inputs, **kwargs)
            outs = [x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad]
            return torch.autograd.grad([x.sum() for x in outs], leaves)

        return call

    return build


def compiled(build, function, *wanted, **kwargs):
    """The same, of torch.compile(function), which forgets earlier shapes first: after eight of
    one function it would fall back to eager without a word."""

    def start(*inputs):
        torch._dynamo.reset()
        return build(torch.compile(function, dynamic=False), *wanted, **kwargs)(*inputs)

    return start


def ours(build, public, reference, *wanted, **kwargs):
    """The three that every operation has."""
    return {
        "triton": build(public, *wanted, impl="triton", **kwargs),
        "torch": build(reference, *wanted, **kwargs),
        "compiled": compiled(build, reference, *wanted, **kwargs),
    }


def randn(device, dtype, *shape):
    return torch.randn(shape, device=device, dtype=dtype)


def logprob_cases(models, small):
    models = dict(models)
    if not small:  # the shape that other heads are quoted at
        models["H=4096"] = Model(4096, 0, 0, 0, 0, 151_936)
    for name, m in models.items():
        N, H, V = (64 if small else 8192), m.hidden, m.vocab

        def inputs(device, dtype, N=N, H=H, V=V):
            hidden, weight = randn(device, dtype, N, H), randn(device, dtype, V, H) * H**-0.5
            return hidden, weight, torch.randint(V, (N,), device=device)

        public, reference = kernels.logprob, linear_logprob.reference
        for phase, products in (("forward", 1), ("backward", 3), ("forward+backward", 4)):
            build = {"forward": plain, "backward": gradients, "forward+backward": both}[phase]
            wanted = () if products == 1 else (0, 1)
            calls = ours(build, public, reference, *wanted)
            calls["bf16 logits"] = build(peers.bf16_logits, *wanted)
            calls["compiled"] = compiled(build, peers.bf16_logits, *wanted)
            if products != 3:
                calls["cut-cross-entropy"] = build(peers.cut_cross_entropy, *wanted)
                calls["liger"] = build(peers.liger_linear_cross_entropy, *wanted)
            moved = 2.0 * (N + V) * H * (1 if products == 1 else 2)
            yield Case(
                "logprob", phase, name, f"N={N} H={H} V={V}", inputs,
                2.0 * products * N * H * V, moved, "matmul", calls,
            )  # fmt: skip


def attention_cases(models, small):
    for name, m in models.items():
        for lengths in [[40, 24]] if small else [[4096] * 4, [8192, 4000, 2000, 1500, 600, 92]]:
            T, pairs = sum(lengths), sum(n * (n + 1) / 2 for n in lengths)

            def inputs(device, dtype, T=T, m=m, lengths=lengths):
                heads = (m.heads, m.kv_heads, m.kv_heads)
                bounds = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
                return *(randn(device, dtype, T, h, m.D) for h in heads), bounds

            even = len(set(lengths)) == 1
            label = f"{len(lengths)}x{lengths[0]}" if even else f"{len(lengths)} mixed, T={T}"
            rows = 4.0 * T * m.D * (m.heads + m.kv_heads)  # q, k, v, out once, in bf16
            for phase, build, wanted, products in (
                ("forward", plain, (), 2),
                ("backward", gradients, (0, 1, 2), 5),
            ):
                calls = ours(build, kernels.attention, flash_attention.reference, *wanted)
                calls["varlen"] = build(peers.torch_varlen(max(lengths)), *wanted)
                calls["flash-attn"] = build(peers.flash_attn(max(lengths)), *wanted)
                if even:
                    calls["sdpa"] = build(peers.sdpa_even(len(lengths)), *wanted)
                if phase == "forward":
                    calls["flashinfer"] = peers.flashinfer_ragged
                yield Case(
                    "attention", phase, name, f"{label} Hq={m.heads} Hkv={m.kv_heads} D={m.D}",
                    inputs, 2.0 * products * m.heads * m.D * pairs,
                    rows * (1 if phase == "forward" else 2), "matmul", calls,
                )  # fmt: skip


def paged_inputs(m, lengths, page=16):
    """q of one token each, caches with scattered pages, tables, seq_lens."""

    def inputs(device, dtype):
        M = -(-max(lengths) // page)
        counts = [-(-n // page) for n in lengths]
        caches = [randn(device, dtype, sum(counts) + 1, page, m.kv_heads, m.D) for _ in "kv"]
        pages = torch.randperm(sum(counts)).to(torch.int32).split(counts)
        tables = torch.zeros(len(lengths), M, dtype=torch.int32)
        for b, own in enumerate(pages):
            tables[b, : len(own)] = own
        seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
        return (
            randn(device, dtype, len(lengths), m.heads, m.D),
            *caches,
            tables.to(device),
            seq_lens,
        )

    return inputs


def decode_cases(models, small):
    sizes = [(2, 40)] if small else [(1, 4096), (64, 2048), (512, 512), (8, 32_768), (1, 131_072)]
    for name, m in models.items():
        for B, context in sizes:
            moved = 4.0 * B * m.D * (context * m.kv_heads + m.heads)
            calls = ours(plain, kernels.paged_attention, paged_decode.reference_decode)
            calls["varlen"] = plain(peers.torch_varlen_decode)
            calls["flashinfer"] = peers.flashinfer_decode
            calls["flash-attn"] = plain(peers.flash_attn_decode)
            yield Case(
                "paged_attention", "forward", name, f"B={B} context={context} Hkv={m.kv_heads}",
                paged_inputs(m, [context] * B), 4.0 * B * m.heads * m.D * context, moved, "copy",
                calls,
            )  # fmt: skip


def prefill_cases(models, small):
    for name, m in models.items():
        for B, cached, new in [(2, 16, 8)] if small else [(4, 4096, 1024), (8, 1024, 1)]:
            decode_inputs = paged_inputs(m, [cached + new] * B)

            def inputs(device, dtype, m=m, B=B, new=new, decode_inputs=decode_inputs):
                _, *caches, tables, seq_lens = decode_inputs(device, dtype)
                bounds = torch.arange(B + 1, device=device, dtype=torch.int32) * new
                return (
                    randn(device, dtype, B * new, m.heads, m.D),
                    *caches,
                    tables,
                    bounds,
                    seq_lens,
                )

            pairs = B * (new * cached + new * (new + 1) / 2)
            moved = 4.0 * B * m.D * ((cached + new) * m.kv_heads + new * m.heads)
            yield Case(
                "paged_prefill", "forward", name, f"B={B} cached={cached} new={new}", inputs,
                4.0 * m.heads * m.D * pairs, moved, "matmul" if new > 64 else "copy",
                ours(plain, kernels.paged_prefill, paged_decode.reference_prefill),
            )  # fmt: skip


def norm_cases(models, small):
    for name, m in models.items():
        T, C = 64 if small else 16_384, m.hidden

        def inputs(device, dtype, T=T, C=C):
            x, residual = randn(device, dtype, T, C), randn(device, dtype, T, C)
            return x, randn(device, dtype, C), 1e-6, residual

        public, reference = kernels.rms_norm, rms_norm_reference
        calls = ours(plain, public, reference)
        calls["liger"] = plain(peers.liger_rms_norm)
        calls["flashinfer"] = plain(peers.flashinfer_rms_norm)
        shape = f"T={T} C={C} with residual"
        yield Case("rms_norm", "forward", name, shape, inputs, 0, 8.0 * T * C, "copy", calls)
        calls = ours(gradients, public, reference, 0, 1, 3)
        calls["liger"] = gradients(peers.liger_rms_norm, 0, 1, 3)
        # Reads both gradients and the sum, writes one: dx and dresidual are the same tensor.
        yield Case("rms_norm", "backward", name, shape, inputs, 0, 8.0 * T * C, "copy", calls)


def rope_cases(models, small):
    for name, m in models.items():
        T, page = (64 if small else 16_384), 16

        def inputs(device, dtype, T=T, page=page, m=m):
            q, k, v = (randn(device, dtype, T, h, m.D) for h in (m.heads, m.kv_heads, m.kv_heads))
            angles = torch.rand(T, m.D // 2, device=device)
            caches = [randn(device, dtype, T // page, page, m.kv_heads, m.D) for _ in "kv"]
            places = torch.randperm(T, device=device)
            positions = torch.arange(T, device=device)
            return q, k, v, angles.cos(), angles.sin(), positions, *caches, places

        yield Case(
            "rope_write", "forward", name, f"T={T} Hq={m.heads} Hkv={m.kv_heads} D={m.D}", inputs,
            0, 4.0 * T * m.D * (m.heads + 2 * m.kv_heads), "copy",
            ours(plain, kernels.rope_write, rope_cache.reference_write),
        )  # fmt: skip


def swiglu_cases(models, small):
    for name, m in models.items():
        T, C = 64 if small else 8192, m.mlp

        def inputs(device, dtype, T=T, C=C):
            return randn(device, dtype, T, C), randn(device, dtype, T, C)

        shape = f"T={T} C={C}"
        calls = ours(plain, kernels.swiglu, swiglu_act.reference)
        calls["liger"] = plain(peers.liger_swiglu)
        yield Case("swiglu", "forward", name, shape, inputs, 0, 6.0 * T * C, "copy", calls)
        calls = ours(gradients, kernels.swiglu, swiglu_act.reference, 0, 1)
        calls["liger"] = gradients(peers.liger_swiglu, 0, 1)
        yield Case("swiglu", "backward", name, shape, inputs, 0, 10.0 * T * C, "copy", calls)


def sample_cases(models, small):
    for name, m in models.items():
        for B in [4] if small else [1, 64, 512]:

            def inputs(device, dtype, B=B, m=m):
                hidden = randn(device, dtype, B, m.hidden)
                weight = randn(device, dtype, m.vocab, m.hidden) * m.hidden**-0.5
                rows = torch.arange(B, device=device)
                return hidden, weight, torch.ones(B, device=device), rows, rows + 100

            yield Case(
                "sample", "forward", name, f"B={B} H={m.hidden} V={m.vocab}", inputs,
                2.0 * B * m.hidden * m.vocab, 2.0 * (m.vocab + B) * m.hidden,
                "matmul" if B > 256 else "copy",
                ours(plain, kernels.sample, sampling_head.reference),
            )  # fmt: skip


OPS = {
    "logprob": logprob_cases,
    "attention": attention_cases,
    "paged_attention": decode_cases,
    "paged_prefill": prefill_cases,
    "rms_norm": norm_cases,
    "rope_write": rope_cases,
    "swiglu": swiglu_cases,
    "sample": sample_cases,
}


def cases(op, models=MODELS, small=False):
    """All cases of an operation; `small` ones for a CPU."""
    return list(OPS[op](SMALL if small else models, small))
