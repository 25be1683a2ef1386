"""The gated activation against its reference."""

import pytest
import torch

from kernels.swiglu_act import reference, swiglu


def compare(shape, dtype, close, where="cpu"):
    both = torch.randn(*shape[:-1], 2 * shape[-1], device=where).to(dtype) * 3
    mix = torch.randn(shape, device=where).to(dtype)
    sides = []
    for impl, kind in (("triton", dtype), ("torch", dtype), ("torch", torch.double)):
        x = both.to(kind, copy=True).requires_grad_()
        y = swiglu(*x.chunk(2, -1), impl=impl)  # halves of one tensor: rows with strides
        (y * mix.to(kind)).sum().backward()
        sides.append((y.detach(), x.grad))
    for ours, own, truth in zip(*sides):
        assert ours.dtype == dtype
        close(ours, own, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (5, 130), (2, 3, 33), (1, 1)], ids=str)
def test_values_and_gradients(shape, dtype, close):
    compare(shape, dtype, close)


def test_far_ends_are_finite():
    gate = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]], requires_grad=True)
    up = torch.ones(1, 5, requires_grad=True)
    y = swiglu(gate, up, impl="triton")
    y.sum().backward()
    torch.testing.assert_close(y, reference(gate, up))
    torch.testing.assert_close(gate.grad, torch.tensor([[0, 0, 0.5, 1, 1]]))


def test_shapes_that_differ_and_no_rows():
    with pytest.raises(ValueError, match="swiglu"):
        swiglu(torch.randn(2, 4), torch.randn(2, 5), impl="triton")
    assert swiglu(torch.empty(0, 4), torch.empty(0, 4), impl="triton").shape == (0, 4)


def test_gradcheck_of_the_reference():
    given = [torch.randn(3, 4, dtype=torch.double, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(reference, given)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(70_001, 100), (777, 18_944)], ids=str)
def test_on_a_gpu(shape, dtype, close):
    compare(shape, dtype, close, "cuda")
