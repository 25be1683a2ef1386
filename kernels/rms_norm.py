"""Root-mean-square norm, with the residual addition that precedes it in every transformer block.

    s = x + residual            y = s * r * weight        with  r = 1 / sqrt(mean(s^2) + eps)

Backward, with g the gradient of y, d the one of s from further up (the residual stream goes on),
and n = s * r the normed row:

    ds = r * (g * weight - n * mean(g * weight * n)) + d          dx = dresidual = ds
    dweight = sum over rows of g * n

Nothing here but memory traffic: 4 numbers a value forward (x, residual, s, y) and 4 backward (g, d,
s, ds), a third of what PyTorch's separate steps move: a row stays in registers for its mean.
Forward, a program takes BR rows. Backward, it takes each PROGRAMS-th such tile and adds up its
rows of dweight too; torch then adds the [PROGRAMS, C] sums in a fixed order, as atomics would not.
"""

import torch

from kernels.dispatch import both_ways, choose
from kernels.tiles import aot_case, choices, tile
from kernels.triton_compat import jit, tl, triton

WIDEST = 8192  # of a row that fits the registers; wider ones take the reference


def reference(x, weight, eps, residual=None):
    """Sum in the input's dtype (it is the residual stream), statistics in fp32."""
    if residual is not None:
        x = residual = x + residual
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    y = normed.to(x.dtype) * weight
    return y if residual is None else (y, residual)


@jit
def forward_kernel(
    x, residual, weight, y, summed, inverse, N,
    C: tl.constexpr, EPS: tl.constexpr, RESIDUAL: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles,). All [N, C] but weight [C] and inverse [N] fp32, which gets r."""
    rows = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    c = tl.arange(0, BC)
    at = rows[:, None] * C + c[None, :]
    inside = (rows < N)[:, None] & (c < C)[None, :]
    s = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        s += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        rounded = s.to(summed.dtype.element_ty)  # y is the norm of what the next block will read
        tl.store(summed + at, rounded, mask=inside)
        s = rounded.to(tl.float32)
    r = 1.0 / tl.sqrt_rn(tl.sum(s * s, 1) / C + EPS)
    tl.store(inverse + rows, r, mask=rows < N)
    w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(y + at, (s * r[:, None] * w[None, :]).to(y.dtype.element_ty), mask=inside)


@jit
def backward_kernel(
    s, weight, inverse, grad_y, grad_s, dx, dweight, N,
    C: tl.constexpr, RESIDUAL: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Grid (programs,). s, grad_y, grad_s, dx [N, C]; dweight [programs, C] fp32."""
    c = tl.arange(0, BC)
    w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    mine = tl.zeros([BC], tl.float32)
    for first in range(tl.program_id(0) * BR, N, tl.num_programs(0) * BR):
        rows = first + tl.arange(0, BR)
        at = rows.to(tl.int64)[:, None] * C + c[None, :]
        inside = (rows < N)[:, None] & (c < C)[None, :]
        r = tl.load(inverse + rows, mask=rows < N, other=0.0)[:, None]
        n = tl.load(s + at, mask=inside, other=0.0).to(tl.float32) * r
        g = tl.load(grad_y + at, mask=inside, other=0.0).to(tl.float32)
        mine += tl.sum(g * n, 0)
        g *= w[None, :]
        d = r * (g - n * (tl.sum(g * n, 1) / C)[:, None])
        if RESIDUAL:
            d += tl.load(grad_s + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, d.to(dx.dtype.element_ty), mask=inside)
    tl.store(dweight + tl.program_id(0) * C + c, mine, mask=c < C)


class RMSNorm(torch.autograd.Function):
    """The kernels as one differentiable operation on rows [N, C]. Saves s and one number a row."""

    @staticmethod
    def forward(ctx, x, weight, eps, residual):
        N, C = x.shape
        y, inverse = torch.empty_like(x), torch.empty(N, dtype=torch.float32, device=x.device)
        summed = x if residual is None else torch.empty_like(x)
        choice = tile("rms_norm_forward", x, C=C)
        forward_kernel[(triton.cdiv(N, choice["BR"]),)](
            x, residual, weight, y, summed, inverse, N, C=C, EPS=eps,
            RESIDUAL=residual is not None, BC=triton.next_power_of_2(C), **choice,
        )  # fmt: skip
        ctx.save_for_backward(summed, weight, inverse)
        ctx.residual = residual is not None
        return (y, summed) if ctx.residual else y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y, grad_s=None):
        s, weight, inverse = ctx.saved_tensors
        N, C = s.shape
        choice = tile("rms_norm_backward", s, C=C)
        programs = min(choice.pop("PROGRAMS"), triton.cdiv(N, choice["BR"]))
        dx = torch.empty_like(s)
        parts = torch.empty(programs, C, dtype=torch.float32, device=s.device)
        grad_s = grad_s.contiguous() if ctx.residual else None
        backward_kernel[(programs,)](
            s, weight, inverse, grad_y.contiguous(), grad_s, dx, parts, N, C=C,
            RESIDUAL=ctx.residual, BC=triton.next_power_of_2(C), **choice,
        )  # fmt: skip
        return dx, parts.sum(0).to(weight.dtype), None, dx if ctx.residual else None


def rms_norm(x, weight, eps, residual=None, impl="auto"):
    """x [..., C], weight [C] -> y [..., C]; with residual [..., C]: (y, x + residual).

    Differentiable in x, weight and residual.
    """
    impl = choose(impl, "rms_norm", x, weight, probe=probe)
    if impl == "torch" or x.numel() == 0 or x.shape[-1] > WIDEST:
        return reference(x, weight, eps, residual)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if residual is None:
        return RMSNorm.apply(rows, weight, float(eps), None).view(x.shape)
    added = residual.to(x.dtype).reshape(rows.shape).contiguous()
    y, summed = RMSNorm.apply(rows, weight, float(eps), added)
    return y.view(x.shape), summed.view(x.shape)


def probe(device, dtype):
    """The trial launch, with a residual."""
    kind = {"device": device, "dtype": dtype, "requires_grad": True}
    x, residual = torch.randn(300, 200, **kind), torch.randn(300, 200, **kind)
    return both_ways(rms_norm, x, torch.randn(200, **kind), 1e-6, residual)


def aot_cases(arch):
    """What `kernels/check.py` compiles: each tile at the widest row it serves."""
    for phase, function in (("forward", forward_kernel), ("backward", backward_kernel)):
        for limits, values in choices(f"rms_norm_{phase}", arch):
            C = limits.get("C", WIDEST)
            shape = {"C": C, "BC": triton.next_power_of_2(C), "EPS": 1e-6, "RESIDUAL": True}
            yield aot_case(f"rms_norm_{phase}", function, values, **shape)
