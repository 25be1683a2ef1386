"""The gated activation of the feed-forward layer: y = silu(gate) * up, silu(x) = x * sigmoid(x).

Backward, with g the gradient of y and sg = sigmoid(gate):

    dup = g * gate * sg            dgate = g * up * sg * (1 + gate * (1 - sg))

The latter because sigmoid' = sg * (1 - sg). Traffic only: 3 numbers a value forward (gate, up, y),
5 backward (gate, up, g, dgate, dup); nothing is saved but the inputs. A program takes BLOCK columns
of one row, so there are N * ceil(C / BLOCK); gate and up may be the halves of one tensor (rows have
strides), as the output of one fused projection has them.
"""

import torch
import torch.nn.functional as F

from kernels.dispatch import both_ways, choose, dense
from kernels.tiles import aot_case, choices, tile
from kernels.triton_compat import jit, tl, triton


def reference(gate, up):
    """silu(x) = x * sigmoid(x)."""
    return F.silu(gate) * up


@jit
def my_values(gate, up, C, gate_row, up_row, BLOCK: tl.constexpr):
    """This program's row, its columns, which of them exist, and their values of gate and up."""
    blocks = tl.cdiv(C, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = c < C
    a = tl.load(gate + row * gate_row + c, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(up + row * up_row + c, mask=inside, other=0.0).to(tl.float32)
    return row, c, inside, a, b


@jit
def forward_kernel(gate, up, y, C, gate_row, up_row, BLOCK: tl.constexpr):
    row, c, inside, a, b = my_values(gate, up, C, gate_row, up_row, BLOCK)
    tl.store(y + row * C + c, (a * tl.sigmoid(a) * b).to(y.dtype.element_ty), mask=inside)


@jit
def backward_kernel(gate, up, grad, dgate, dup, C, gate_row, up_row, BLOCK: tl.constexpr):
    row, c, inside, a, b = my_values(gate, up, C, gate_row, up_row, BLOCK)
    g = tl.load(grad + row * C + c, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(a)
    da = g * b * s * (1.0 + a * (1.0 - s))
    tl.store(dgate + row * C + c, da.to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + row * C + c, (g * a * s).to(dup.dtype.element_ty), mask=inside)


def launch(kernel, gate, up, *others):
    """Run a kernel over gate and up [N, C]: one program for each BLOCK columns of a row."""
    (N, C), choice = gate.shape, tile("swiglu", gate)
    grid = (N * triton.cdiv(C, choice["BLOCK"]),)
    kernel[grid](gate, up, *others, C, gate.stride(0), up.stride(0), **choice)


class SwiGLU(torch.autograd.Function):
    """The kernels as one differentiable operation on rows [N, C]."""

    @staticmethod
    def forward(ctx, gate, up):
        y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        launch(forward_kernel, gate, up, y)
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty(2, *gate.shape, dtype=gate.dtype, device=gate.device).unbind()
        launch(backward_kernel, gate, up, grad.contiguous(), dgate, dup)
        return dgate, dup


def swiglu(gate, up, impl="auto"):
    """gate and up [..., C] -> silu(gate) * up [..., C]. Differentiable in both."""
    impl = choose(impl, "swiglu", gate, up, probe=probe)
    if impl == "torch" or gate.numel() == 0:
        return reference(gate, up)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"swiglu: gate {gate.shape} {gate.dtype}, up {up.shape} {up.dtype}")
    rows = (dense(x.reshape(-1, x.shape[-1])) for x in (gate, up))
    return SwiGLU.apply(*rows).view(gate.shape)


def probe(device, dtype):
    """The trial launch, on the halves of one tensor."""
    both = torch.randn(50, 3000, device=device, dtype=dtype, requires_grad=True)
    return both_ways(lambda x, impl: swiglu(*x.chunk(2, -1), impl=impl), both)


def aot_cases(arch):
    """What `kernels/check.py` compiles."""
    for _, values in choices("swiglu", arch):
        yield aot_case("swiglu_forward", forward_kernel, values)
        yield aot_case("swiglu_backward", backward_kernel, values)
