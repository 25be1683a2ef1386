"""What `kernels.bench` measures: a table of operations, and the cases that it makes.

Each operation has a function that makes its inputs for a model and a size, on torch's current
device, and tells of the forward pass: the shape in words; floating-point operations; the bytes of
bf16 that must move at least; the inputs.
"""

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import product

import torch

import kernels
from kernels.bench.peers import PEERS, compiled

Model = namedtuple("Model", "hidden heads kv_heads D mlp vocab")  # what shapes come from
MODELS = {  # Qwen2.5
    "0.5B": Model(896, 14, 2, 64, 4864, 151_936),
    "1.5B": Model(1536, 12, 2, 128, 8960, 151_936),
    "7B": Model(3584, 28, 4, 128, 18_944, 152_064),
    "32B": Model(5120, 40, 8, 128, 27_648, 152_064),
}
QUOTED = {"H=4096": Model(4096, 0, 0, 0, 0, 151_936)}  # the shape that other heads are quoted at
PAGE = 16  # tokens
SMALL = {"tiny": Model(64, 4, 2, 32, 128, 1000)}  # what a CPU measures


def logprob(m, N, randn):
    H, V = m.hidden, m.vocab
    inputs = randn(N, H), randn(V, H) * H**-0.5, torch.randint(V, (N,))
    return f"N={N} H={H} V={V}", 2 * N * H * V, 2 * (N + V) * H, inputs


def sample(m, B, randn):
    H, V, rows = m.hidden, m.vocab, torch.arange(B)
    inputs = randn(B, H), randn(V, H) * H**-0.5, torch.ones(B), rows, rows + 100
    return f"B={B} H={H} V={V}", 2 * B * H * V, 2 * (V + B) * H, inputs


def attention(m, lengths, randn):
    T, even = sum(lengths), len(set(lengths)) == 1
    label = f"{len(lengths)}x{lengths[0]}" if even else f"{len(lengths)} mixed, T={T}"
    label += f" Hq={m.heads} Hkv={m.kv_heads} D={m.D}"
    flops = 2 * m.heads * m.D * sum(n * (n + 1) for n in lengths)  # 2 products, half of the square
    moved = 4 * T * m.D * (m.heads + m.kv_heads)  # q, k, v, out once
    return label, flops, moved, (*qkv(m, randn, T), bounds(lengths))


def paged_attention(m, B, context, randn):
    moved = 4 * B * m.D * (context * m.kv_heads + m.heads)
    inputs = randn(B, m.heads, m.D), *pages(m, randn, B, context)
    label = f"B={B} context={context} Hkv={m.kv_heads}"
    return label, 4 * B * m.heads * m.D * context, moved, inputs


def paged_prefill(m, B, cached, new, randn):
    pairs = B * (new * cached + new * (new + 1) / 2)
    moved = 4 * B * m.D * ((cached + new) * m.kv_heads + new * m.heads)
    *caches, seq_lens = pages(m, randn, B, cached + new)
    inputs = randn(B * new, m.heads, m.D), *caches, bounds([new] * B), seq_lens
    return f"B={B} cached={cached} new={new}", 4 * m.heads * m.D * pairs, moved, inputs


def rms_norm(m, T, randn):
    C = m.hidden
    inputs = randn(T, C), randn(C), 1e-6, randn(T, C)
    return f"T={T} C={C} with residual", 0, 8 * T * C, inputs


def rope_write(m, T, randn):
    angles = torch.rand(T, m.D // 2)
    caches = [randn(T // PAGE, PAGE, m.kv_heads, m.D) for _ in "kv"]
    tables = angles.cos(), angles.sin(), torch.arange(T)
    inputs = *qkv(m, randn, T), *tables, *caches, torch.randperm(T)
    moved = 4 * T * m.D * (m.heads + 2 * m.kv_heads)
    return f"T={T} Hq={m.heads} Hkv={m.kv_heads} D={m.D}", 0, moved, inputs


def swiglu(m, T, randn):
    C = m.mlp
    return f"T={T} C={C}", 0, 6 * T * C, (randn(T, C), randn(T, C))


def qkv(m, randn, T):
    """q [T, Hq, D], k and v [T, Hkv, D]."""
    return [randn(T, heads, m.D) for heads in (m.heads, m.kv_heads, m.kv_heads)]


def bounds(lengths):
    """cu_seqlens [B+1] of sequences of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def pages(m, randn, B, length):
    """k and v caches in scattered pages, block tables, seq_lens, for B sequences of one length."""
    M = -(-length // PAGE)
    caches = [randn(B * M + 1, PAGE, m.kv_heads, m.D) for _ in "kv"]
    tables = torch.randperm(B * M).to(torch.int32).view(B, M)
    return *caches, tables, torch.full((B,), length, dtype=torch.int32)


# make: one of the above. small: the size for a CPU. wanted: numbers of the inputs that get a
# gradient. more: phases with their operations and bytes, of forward's.
Operation = namedtuple("Operation", "make sizes small wanted more", defaults=[(), {}])
DECODE = [(1, 4096), (64, 2048), (512, 512), (8, 32_768), (1, 131_072)]
PACKED = [([4096] * 4,), ([8192, 4000, 2000, 1500, 600, 92],)]
HEAD = {"backward": (3, 2), "forward+backward": (4, 2)}  # the logits again, and two products
OPS = {  # by their names in `kernels`
    "logprob": Operation(logprob, [(8192,)], (64,), (0, 1), HEAD),
    "attention": Operation(attention, PACKED, ([40, 24],), (0, 1, 2), {"backward": (2.5, 2)}),
    "paged_attention": Operation(paged_attention, DECODE, (2, 40)),
    "paged_prefill": Operation(paged_prefill, [(4, 4096, 1024), (8, 1024, 1)], (2, 16, 8)),
    # Backward reads both gradients and the sum, writes one: dx and dresidual are one tensor.
    "rms_norm": Operation(rms_norm, [(16_384,)], (64,), (0, 1, 3), {"backward": (1, 1)}),
    "rope_write": Operation(rope_write, [(16_384,)], (64,)),
    "swiglu": Operation(swiglu, [(8192,)], (64,), (0, 1), {"backward": (1, 5 / 3)}),
    "sample": Operation(sample, [(1,), (64,), (512,)], (4,)),
}


@dataclass(unsafe_hash=True)
class Case:
    """An operation at one shape in one phase, and all who are measured there. Can be pickled."""

    op: str
    phase: str  # "forward" | "backward" | "forward+backward"
    model: str
    shape: str
    flops: float
    bytes: float
    make: Callable = field(compare=False)  # randn -> what `OPS[op].make` returns
    # "triton", "torch", a peer -> function(*inputs) -> function() that is to be timed
    calls: dict = field(compare=False)

    @property
    def name(self):
        return f"{self.op} {self.phase} {self.model} {self.shape}"

    def row(self, impl):
        """What the row of an implementation begins with."""
        words = vars(self) | {"impl": impl}
        return {word: words[word] for word in ("op", "phase", "model", "shape", "impl")}

    def inputs(self, device, dtype):
        """New random inputs, the same each time."""
        torch.manual_seed(0)
        with torch.device(device):
            return self.make(partial(torch.randn, dtype=dtype))[-1]


def cases(op, models=MODELS, small=False):
    """All cases of an operation; `small` ones for a CPU."""
    entry, kernel, found = OPS[op], getattr(kernels, op), []
    models = SMALL if small else models | (QUOTED if op == "logprob" else {})
    ours = {
        "triton": partial(partial, kernel, impl="triton"),
        "torch": partial(partial, kernel, impl="torch"),
        "compiled": partial(compiled, kernel, impl="torch"),
    }
    for model, size in product(models, [entry.small] if small else entry.sizes):
        make = partial(entry.make, models[model], *size)
        with torch.device("meta"):  # shapes without memory
            shape, flops, moved, _ = make(torch.randn)
        for phase, (flops_of, bytes_of) in ({"forward": (1, 1)} | entry.more).items():
            plans = ours | PEERS.get(op, {}) | PEERS.get(f"{op} {phase}", {})
            if "mixed" in shape:
                del plans["sdpa"]  # it wants sequences of one length
            calls = {k: partial(prepare, phase, entry.wanted, plan) for k, plan in plans.items()}
            work = flops_of * flops, bytes_of * moved
            found.append(Case(op, phase, model, shape, *work, make, calls))
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
