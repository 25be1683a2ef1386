"""What `kernels.bench` measures: a table of operations, and the cases that it makes.

Each operation has a function that describes it for one model and size, as a tuple: the shape in
words; for each phase the floating-point operations, and the bytes of bf16 that must move at least;
and what makes the inputs (given `randn`, on torch's current device).
"""

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch

import kernels
from kernels import flash_attention, linear_logprob, paged_decode, rope_cache, sampling_head
from kernels.bench.peers import PEERS, always, compiled
from kernels.rms_norm import reference as rms_norm_reference
from kernels.swiglu_act import reference as swiglu_reference

Model = namedtuple("Model", "hidden heads kv_heads D mlp vocab")  # what shapes come from
MODELS = {  # Qwen2.5
    "0.5B": Model(896, 14, 2, 64, 4864, 151_936),
    "1.5B": Model(1536, 12, 2, 128, 8960, 151_936),
    "7B": Model(3584, 28, 4, 128, 18_944, 152_064),
    "32B": Model(5120, 40, 8, 128, 27_648, 152_064),
}
QUOTED = {"H=4096": Model(4096, 0, 0, 0, 0, 151_936)}  # the shape that other heads are quoted at
SMALL = {"tiny": Model(64, 4, 2, 32, 128, 1000)}  # what a CPU measures


def logprob(m, N):
    H, V = m.hidden, m.vocab
    once, moved = 2 * N * H * V, 2 * (N + V) * H  # one product; both inputs
    work = {"forward": (once, moved), "backward": (3 * once, 2 * moved)}
    work["forward+backward"] = 4 * once, 2 * moved
    return (
        f"N={N} H={H} V={V}",
        work,
        lambda randn: (randn(N, H), randn(V, H) * H**-0.5, torch.randint(V, (N,))),
    )


def attention(m, *lengths):
    T, even = sum(lengths), len(set(lengths)) == 1
    label = f"{len(lengths)}x{lengths[0]}" if even else f"{len(lengths)} mixed, T={T}"
    once = m.heads * m.D * sum(n * (n + 1) for n in lengths)  # one product: half of the square
    moved = 4 * T * m.D * (m.heads + m.kv_heads)  # q, k, v, out once
    return (
        f"{label} Hq={m.heads} Hkv={m.kv_heads} D={m.D}",
        {"forward": (2 * once, moved), "backward": (5 * once, 2 * moved)},
        lambda randn: (*qkv(m, randn, T), bounds(lengths)),
    )


def paged_attention(m, B, context):
    moved = 4 * B * m.D * (context * m.kv_heads + m.heads)
    return (
        f"B={B} context={context} Hkv={m.kv_heads}",
        {"forward": (4 * B * m.heads * m.D * context, moved)},
        lambda randn: (randn(B, m.heads, m.D), *pages(m, randn, B, context)),
    )


def paged_prefill(m, B, cached, new):
    pairs = B * (new * cached + new * (new + 1) / 2)
    moved = 4 * B * m.D * ((cached + new) * m.kv_heads + new * m.heads)

    def make(randn):
        *caches, seq_lens = pages(m, randn, B, cached + new)
        return randn(B * new, m.heads, m.D), *caches, bounds([new] * B), seq_lens

    return f"B={B} cached={cached} new={new}", {"forward": (4 * m.heads * m.D * pairs, moved)}, make


def rms_norm(m, T):
    C = m.hidden
    return (
        f"T={T} C={C} with residual",
        # Backward reads both gradients and the sum, writes one: dx and dresidual are one tensor.
        {"forward": (0, 8 * T * C), "backward": (0, 8 * T * C)},
        lambda randn: (randn(T, C), randn(C), 1e-6, randn(T, C)),
    )


def rope_write(m, T, page=16):
    def make(randn):
        angles = torch.rand(T, m.D // 2)
        caches = [randn(T // page, page, m.kv_heads, m.D) for _ in "kv"]
        tables = angles.cos(), angles.sin(), torch.arange(T)
        return *qkv(m, randn, T), *tables, *caches, torch.randperm(T)

    work = {"forward": (0, 4 * T * m.D * (m.heads + 2 * m.kv_heads))}
    return f"T={T} Hq={m.heads} Hkv={m.kv_heads} D={m.D}", work, make


def swiglu(m, T):
    C = m.mlp
    work = {"forward": (0, 6 * T * C), "backward": (0, 10 * T * C)}
    return f"T={T} C={C}", work, lambda randn: (randn(T, C), randn(T, C))


def sample(m, B):
    H, V = m.hidden, m.vocab

    def make(randn):
        rows = torch.arange(B)
        return randn(B, H), randn(V, H) * H**-0.5, torch.ones(B), rows, rows + 100

    return f"B={B} H={H} V={V}", {"forward": (2 * B * H * V, 2 * (V + B) * H)}, make


def qkv(m, randn, T):
    """q [T, Hq, D], k and v [T, Hkv, D]."""
    return [randn(T, heads, m.D) for heads in (m.heads, m.kv_heads, m.kv_heads)]


def bounds(lengths):
    """cu_seqlens [B+1] of sequences of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def pages(m, randn, B, length, page=16):
    """k and v caches in scattered pages, block tables, seq_lens, for B sequences of one length."""
    M = -(-length // page)
    caches = [randn(B * M + 1, page, m.kv_heads, m.D) for _ in "kv"]
    tables = torch.randperm(B * M).to(torch.int32).view(B, M)
    return *caches, tables, torch.full((B,), length, dtype=torch.int32)


# describe: one of the above, for a model and a size. small: the size for a CPU. wanted: numbers of
# the inputs that get a gradient.
Operation = namedtuple("Operation", "describe sizes small kernel reference wanted", defaults=[()])
DECODE = [(1, 4096), (64, 2048), (512, 512), (8, 32_768), (1, 131_072)]
PACKED = [(4096,) * 4, (8192, 4000, 2000, 1500, 600, 92)]
# fmt: off
OPS = {
    "logprob": Operation(
        logprob, [(8192,)], (64,), kernels.logprob, linear_logprob.reference, (0, 1)),
    "attention": Operation(
        attention, PACKED, (40, 24), kernels.attention, flash_attention.reference, (0, 1, 2)),
    "paged_attention": Operation(
        paged_attention, DECODE, (2, 40), kernels.paged_attention, paged_decode.reference_decode),
    "paged_prefill": Operation(
        paged_prefill, [(4, 4096, 1024), (8, 1024, 1)], (2, 16, 8),
        kernels.paged_prefill, paged_decode.reference_prefill),
    "rms_norm": Operation(
        rms_norm, [(16_384,)], (64,), kernels.rms_norm, rms_norm_reference, (0, 1, 3)),
    "rope_write": Operation(
        rope_write, [(16_384,)], (64,), kernels.rope_write, rope_cache.reference_write),
    "swiglu": Operation(swiglu, [(8192,)], (64,), kernels.swiglu, swiglu_reference, (0, 1)),
    "sample": Operation(
        sample, [(1,), (64,), (512,)], (4,), kernels.sample, sampling_head.reference),
}
# fmt: on


@dataclass(eq=False)
class Case:
    """An operation at one shape in one phase, and all who are measured there."""

    op: str
    phase: str  # "forward" | "backward" | "forward+backward"
    model: str
    shape: str
    make: Callable
    flops: float
    bytes: float
    calls: dict  # "triton", "torch", a peer -> function(*inputs) -> function() that is to be timed

    @property
    def name(self):
        return f"{self.op} {self.phase} {self.model} {self.shape}"

    def inputs(self, device, dtype):
        """New random inputs."""
        with torch.device(device):
            return self.make(partial(torch.randn, dtype=dtype))


def cases(op, models=MODELS, small=False):
    """All cases of an operation; `small` ones for a CPU."""
    row, found = OPS[op], []
    models = SMALL if small else models | (QUOTED if op == "logprob" else {})
    for model, size in product(models, [row.small] if small else row.sizes):
        shape, work, make = row.describe(models[model], *size)
        for phase, (flops, moved) in work.items():
            plans = {
                "triton": always(partial(row.kernel, impl="triton")),
                "torch": always(row.reference),
                "compiled": compiled(row.reference),
            }
            plans |= PEERS.get(op, {}) | PEERS.get(f"{op} {phase}", {})
            if "mixed" in shape:
                del plans["sdpa"]  # it wants sequences of one length
            calls = {k: partial(prepare, phase, row.wanted, plan) for k, plan in plans.items()}
            found.append(Case(op, phase, model, shape, make, flops, moved, calls))
    return found


def prepare(phase, wanted, plan, *inputs):
    """The function of nothing that is timed: forward without autograd, backward alone, or both."""
    if phase == "forward":
        return torch.no_grad()(plan(*inputs))
    inputs = [x.detach().requires_grad_() if i in wanted else x for i, x in enumerate(inputs)]
    leaves, function = [inputs[i] for i in wanted], plan(*inputs)

    def forward():
        out = function()
        return [x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad]

    if phase == "forward+backward":  # for peers that do not part them
        return lambda: torch.autograd.grad([x.sum() for x in forward()], leaves)
    outs = forward()
    grads = [torch.randn_like(x) for x in outs]
    return lambda: torch.autograd.grad(outs, leaves, grads, retain_graph=True)
