"""The gated activation of the feed-forward layer: y = silu(gate) * up, silu(x) = x * sigmoid(x).

Backward, with g the gradient of y and sg = sigmoid(gate):

    dup = g * gate * sg            dgate = g * up * sg * (1 + gate * (1 - sg))

The latter because sigmoid' = sg * (1 - sg). Traffic only: 3 numbers a value forward (gate, up, y),
5 backward (gate, up, g, dgate, dup); nothing is saved but the inputs. A program takes BLOCK columns
of one row; gate and up may be the halves of one tensor (rows have strides), as the output of one
fused projection has them.

            C ->  BLOCK
        +-------+-------+----
    N   |program|program|         one-dimensional grid: N * ceil(C / BLOCK) programs
        +-------+-------+----
"""

import torch
import torch.nn.functional as F

from kernels.dispatch import choose
from kernels.tiles import choices, compile_time, tile
from kernels.triton_compat import jit, tl, triton


def reference(gate, up):
    """silu(x) = x * sigmoid(x)."""
    return F.silu(gate) * up


@jit
def my_columns(C, BLOCK: tl.constexpr):
    """This program's row, its columns, and which of them exist."""
    blocks = tl.cdiv(C, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return row, c, c < C


@jit
def forward_kernel(gate, up, y, C, gate_row, up_row, BLOCK: tl.constexpr):
    row, c, inside = my_columns(C, BLOCK)
    a = tl.load(gate + row * gate_row + c, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(up + row * up_row + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * C + c, (a * tl.sigmoid(a) * b).to(y.dtype.element_ty), mask=inside)


@jit
def backward_kernel(gate, up, grad, dgate, dup, C, gate_row, up_row, BLOCK: tl.constexpr):
    row, c, inside = my_columns(C, BLOCK)
    a = tl.load(gate + row * gate_row + c, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(up + row * up_row + c, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + row * C + c, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(a)
    da = g * b * s * (1.0 + a * (1.0 - s))
    tl.store(dgate + row * C + c, da.to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + row * C + c, (g * a * s).to(dup.dtype.element_ty), mask=inside)


def rows_of(x):
    """x as [N, C] without a copy where its last dimension is dense."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def grid_of(x, choice):
    return (x.shape[0] * triton.cdiv(x.shape[1], choice["BLOCK"]),)


class SwiGLU(torch.autograd.Function):
    """The kernels as one differentiable operation on rows [N, C]."""

    @staticmethod
    def forward(ctx, gate, up):
        y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        choice = tile("swiglu", gate)
        strides = gate.stride(0), up.stride(0)
        forward_kernel[grid_of(gate, choice)](gate, up, y, gate.shape[1], *strides, **choice)
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty(2, *gate.shape, dtype=gate.dtype, device=gate.device).unbind()
        choice = tile("swiglu", gate)
        strides = gate.stride(0), up.stride(0)
        backward_kernel[grid_of(gate, choice)](
            gate, up, grad.contiguous(), dgate, dup, gate.shape[1], *strides, **choice
        )
        return dgate, dup


def swiglu(gate, up, impl="auto"):
    """gate and up [..., C] -> silu(gate) * up [..., C]. Differentiable in both."""
    impl = choose(impl, "swiglu", gate, up, probe=probe)
    if impl == "torch" or gate.numel() == 0:
        return reference(gate, up)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"swiglu: gate {gate.shape} {gate.dtype}, up {up.shape} {up.dtype}")
    return SwiGLU.apply(rows_of(gate), rows_of(up)).view(gate.shape)


def probe(device, dtype):
    """The trial launch: output and gradients of kernel and reference."""
    both = torch.randn(50, 3000, device=device, dtype=dtype)
    sides = []
    for impl in ("triton", "torch"):
        x = both.clone().requires_grad_()
        y = swiglu(*x.chunk(2, -1), impl=impl)
        (y * both[:, :1500]).sum().backward()
        sides.append((y.detach(), x.grad))
    return sides


def aot_cases(arch):
    """What `kernels/check.py` compiles."""
    types = dict.fromkeys(("gate", "up", "y", "grad", "dgate", "dup"), "*bf16")
    types |= dict.fromkeys(("C", "gate_row", "up_row"), "i32:16")
    for _, values in choices("swiglu", arch):
        for name, function in (("forward", forward_kernel), ("backward", backward_kernel)):
            yield f"swiglu_{name}", function, types, *compile_time(values), False
