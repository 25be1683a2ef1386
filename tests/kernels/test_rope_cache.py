"""Rotation, alone and with the write into the cache, against its reference."""

import pytest
import torch

from kernels.rope_cache import reference_rope, reference_write, rope, rope_write


def tables(P, D, where="cpu"):
    frequency = 10_000.0 ** (-torch.arange(0, D, 2, device=where) / D)
    angles = torch.arange(P, device=where)[:, None] * frequency
    return angles.cos(), angles.sin()


def compare(T, Hq, Hkv, D, dtype, close, where="cpu"):
    """q and k are slices of one tensor, as a fused projection gives them."""
    packed = torch.randn(T, Hq + 2 * Hkv, D, device=where).to(dtype)
    mix = torch.randn(T, Hq + Hkv, D, device=where).to(dtype)
    cos, sin = tables(50, D, where)
    positions = torch.randint(0, 50, (T,), device=where)
    sides = []
    for impl, kind in (("triton", dtype), ("torch", dtype), ("torch", torch.double)):
        x = packed.to(kind, copy=True).requires_grad_()
        q, k = rope(x[:, :Hq], x[:, Hq : Hq + Hkv], cos, sin, positions, impl=impl)
        (torch.cat((q, k), 1) * mix.to(kind)).sum().backward()
        sides.append((q.detach(), k.detach(), x.grad))
    for ours, own, truth in zip(*sides):
        assert ours.dtype == dtype
        close(ours, own, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("T, Hq, Hkv, D", [(1, 1, 1, 32), (7, 6, 2, 64), (5, 3, 3, 80)])
def test_values_and_gradients(T, Hq, Hkv, D, dtype, close):
    compare(T, Hq, Hkv, D, dtype, close)


def write_case(T, dtype, where="cpu", Hq=6, Hkv=2, D=64, blocks=5, block=4):
    packed = torch.randn(T, Hq + 2 * Hkv, D, device=where).to(dtype)
    q, k, v = packed.split((Hq, Hkv, Hkv), 1)
    positions = torch.randint(0, 50, (T,), device=where)
    slots = torch.randperm(blocks * block, device=where)[:T]
    caches = torch.randn(2, blocks, block, Hkv, D, device=where).to(dtype)
    return (q, k, v, *tables(50, D, where), positions), caches, slots


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_write(dtype, close):
    """Also: a negative slot is not written, and no other row of the cache is touched."""
    given, caches, slots = write_case(9, dtype)
    slots[[2, 5]] = -1
    ours, theirs, truth = caches.clone(), caches.clone(), caches.double()
    q = rope_write(*given, *ours, slots, impl="triton")
    own_q = reference_write(*given, *theirs, slots)
    wide = [x.double() for x in given[:5]]
    true_q = reference_write(*wide, given[5], *truth, slots)
    close(q, own_q, true_q)
    close(ours, theirs, truth)
    written = torch.zeros(20, dtype=torch.bool)
    written[slots[slots >= 0]] = True
    untouched = ours.flatten(1, 2)[:, ~written]
    assert torch.equal(untouched, caches.flatten(1, 2)[:, ~written])
    assert torch.equal(ours[1], theirs[1])  # v is copied, not computed


def test_write_with_small_integers_and_another_cache_type():
    given, caches, slots = write_case(6, torch.float32)
    given = (*given[:5], given[5].int())
    ours, theirs = caches.half(), caches.half()
    q = rope_write(*given, *ours, slots.int(), impl="triton")
    torch.testing.assert_close(q, reference_write(*given[:5], given[5].long(), *theirs, slots))
    torch.testing.assert_close(ours, theirs)


def test_no_tokens():
    given, caches, slots = write_case(0, torch.float32)
    assert rope_write(*given, *caches, slots, impl="triton").shape == (0, 6, 64)


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    cos, sin = tables(50, 64)
    q, k = torch.randn(2, 1, 1, 64).expand(2, 2, 1, 64)
    near = rope(q, k, cos, sin, torch.tensor([3, 7]), impl="triton")
    far = rope(q, k, cos, sin, torch.tensor([33, 37]), impl="triton")
    torch.testing.assert_close(near[0].norm(dim=-1), q.norm(dim=-1))
    products = [(q[0] * k[1]).sum() for q, k in (near, far)]
    torch.testing.assert_close(*products, rtol=1e-4, atol=1e-4)


def test_gradcheck_of_the_reference():
    cos, sin = (t.double() for t in tables(9, 8))
    q = torch.randn(3, 2, 8, dtype=torch.double, requires_grad=True)
    k = torch.randn(3, 1, 8, dtype=torch.double, requires_grad=True)
    positions = torch.tensor([0, 8, 4])
    assert torch.autograd.gradcheck(lambda a, b: reference_rope(a, b, cos, sin, positions), (q, k))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("T, Hq, Hkv, D", [(70_001, 2, 1, 32), (900, 28, 4, 128), (33, 40, 8, 128)])
def test_on_a_gpu(T, Hq, Hkv, D, dtype, close):
    compare(T, Hq, Hkv, D, dtype, close, "cuda")


@pytest.mark.gpu
def test_write_on_a_gpu():
    given, caches, slots = write_case(300, torch.bfloat16, "cuda", 28, 4, 128, 40, 16)
    ours, theirs = caches.clone(), caches.clone()
    q = rope_write(*given, *ours, slots, impl="triton")
    own = reference_write(*given, *theirs, slots)
    torch.testing.assert_close(q, own, rtol=4e-2, atol=4e-2)
    torch.testing.assert_close(ours, theirs, rtol=4e-2, atol=4e-2)
