"""The norm against its reference, with and without the residual."""

import pytest
import torch

from kernels.rms_norm import WIDEST, reference, rms_norm

SHAPES = [(1, 64), (13, 100), (2, 3, 40), (30, 7)]


def run(impl, x, weight, residual, mix, kind):
    x, weight = (t.to(kind, copy=True).requires_grad_() for t in (x, weight))
    if residual is None:
        y = rms_norm(x, weight, 1e-5, impl=impl)
        (y * mix[0]).sum().backward()
        return y.detach(), x.grad, weight.grad
    residual = residual.to(kind, copy=True).requires_grad_()
    y, summed = rms_norm(x, weight, 1e-5, residual, impl=impl)
    (y * mix[0] + summed * mix[1]).sum().backward()
    return y.detach(), summed.detach(), x.grad, weight.grad, residual.grad


def compare(shape, dtype, with_residual, close, where="cpu"):
    x, residual, *mix = torch.randn(4, *shape, device=where).to(dtype)
    weight = torch.randn(shape[-1], device=where).to(dtype)
    given = x, weight, residual if with_residual else None, mix
    kinds = ("triton", dtype), ("torch", dtype), ("torch", torch.double)
    for ours, own, truth in zip(*(run(impl, *given, kind) for impl, kind in kinds)):
        assert ours.dtype == dtype
        close(ours, own, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype, with_residual, close):
    compare(shape, dtype, with_residual, close)


def test_only_one_output_used():
    """The other output's gradient is then made of zeros by autograd."""
    x, residual = torch.randn(2, 5, 32)
    weight = torch.randn(32)
    for used in (0, 1):
        grads = []
        for impl in ("triton", "torch"):
            a = x.clone().requires_grad_()
            rms_norm(a, weight, 1e-6, residual, impl=impl)[used].sum().backward()
            grads.append(a.grad)
        torch.testing.assert_close(*grads)


def test_a_view_with_gaps_and_a_row_too_wide():
    x = torch.randn(4, 6, 50)[:, ::2, 5:45]
    weight = torch.randn(40)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6, impl="triton"), reference(x, weight, 1e-6))
    wide, weight = torch.randn(2, WIDEST + 1), torch.randn(WIDEST + 1)
    ours = rms_norm(wide, weight, 1e-6, impl="triton")
    assert torch.equal(ours, reference(wide, weight, 1e-6))
    assert rms_norm(torch.empty(0, 40), weight[:40], 1e-6, impl="triton").shape == (0, 40)


def test_large_fp16_values_do_not_overflow(close):
    x, weight = torch.full((2, 64), 300.0).half(), torch.ones(64).half()
    torch.testing.assert_close(rms_norm(x, weight, 1e-6, impl="triton"), torch.ones(2, 64).half())


def test_gradcheck_of_the_reference():
    x, residual = torch.randn(2, 3, 8, dtype=torch.double).unbind()
    weight = torch.randn(8, dtype=torch.double)
    given = [t.clone().requires_grad_() for t in (x, weight, residual)]
    assert torch.autograd.gradcheck(lambda a, w, r: reference(a, w, 1e-6, r), given)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(70_001, 128), (3001, 896), (1000, 3584), (77, 8192)], ids=str)
def test_on_a_gpu(shape, dtype, close):
    compare(shape, dtype, True, close, "cuda")
