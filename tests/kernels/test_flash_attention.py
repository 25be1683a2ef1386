"""Packed causal attention: kernels against the reference, forward and each gradient."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import attention_tiles, tiles
from kernels.flash_attention import attention, forward, probe, reference

# One unit in the last place of the largest value: the kernels round p and ds before a product.
FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

# (query heads, key heads, head size, lengths)
CASES = {
    "group of 2, one token, many": (4, 2, 32, [5, 17, 1, 40]),
    "group of 3, an empty sequence": (3, 1, 16, [33, 0, 3]),
    "no group, head size 24": (2, 2, 24, [16, 32]),
    "head size 80": (2, 1, 80, [21, 34]),
    "one long": (1, 1, 16, [131]),
    "exact tiles": (2, 1, 32, [64, 32]),
    "many short": (2, 1, 16, [1, 2, 3, 1, 1, 7, 1, 2, 2, 1, 5]),
}


def case(Hq, Hkv, D, lengths, dtype, device="cpu"):
    """q, k, v, grad and cu_seqlens of random data."""
    T = sum(lengths)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    tensors = [torch.randn(T, h, D) for h in (Hq, Hkv, Hkv, Hq)]
    return *(x.to(device, dtype) for x in tensors), cu_seqlens.to(device)


def run(function, q, k, v, grad, cu_seqlens, **kwargs):
    """Output and the three gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = function(*leaves, cu_seqlens, **kwargs)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def compare(close, inputs, **kwargs):
    """Kernel, PyTorch at the same dtype, and PyTorch in fp64."""
    *tensors, cu_seqlens = inputs
    ours = run(attention, *inputs, impl="triton", **kwargs)
    own = run(reference, *inputs, **kwargs)
    truth = run(reference, *(x.double() for x in tensors), cu_seqlens, **kwargs)
    for a, b, c in zip(ours, own, truth):
        assert a.dtype == tensors[0].dtype
        close(a, b, c, floor=FLOOR[a.dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_matches_reference(close, name, dtype):
    compare(close, case(*CASES[name], dtype))


@pytest.mark.parametrize("BM, BN", [(16, 64), (64, 16), (32, 32)])
def test_any_tile_shape(close, monkeypatch, BM, BN):
    """Diagonals that take several tiles of one kind or a part of one."""
    for op in ("attention_forward", "attention_dkdv", "attention_dq"):
        monkeypatch.setitem(tiles.TILES, op, [("interpret", {}, {"BM": BM, "BN": BN})])
    compare(close, case(2, 1, 16, [70, 5, 129], torch.float32))


def test_large_logits(close):
    """Softmax that is nearly one-hot, and one whose every logit is far below zero."""
    q, k, v, grad, cu_seqlens = case(2, 1, 32, [50, 9], torch.float32)
    compare(close, (q * 30, k, v, grad, cu_seqlens))
    q = -q.abs() * 10
    compare(close, (q, k.abs(), v, grad, cu_seqlens))


@pytest.mark.parametrize("scale", [0.5, 1, 3e-3])
def test_scale_is_any_number(close, scale):
    compare(close, case(2, 1, 16, [20, 37], torch.float32), scale=scale)


def test_strided_inputs(close):
    """q, k and v as views of one projection, and a gradient that is broadcast."""
    T, D = 45, 16
    packed = torch.randn(T, 4, D)
    q, k, v = packed[:, :2], packed[:, 2:3], packed[:, 3:]
    grad = torch.randn(1, 1, D).expand(T, 2, D)
    cu_seqlens = torch.tensor([0, 45])
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, cu_seqlens, impl="triton")
    ours = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    own = run(reference, q, k, v, grad, cu_seqlens)
    truth = run(reference, q.double(), k.double(), v.double(), grad.double(), cu_seqlens)
    for a, b, c in zip(ours, own, truth):
        close(a, b, c)
    transposed = attention(q.mT.contiguous().mT, k, v, cu_seqlens, impl="triton")  # stride(-1) > 1
    close(transposed, own[0], truth[0])


def test_a_neighbour_that_is_nan_stays_outside():
    """Tiles reach past a sequence's end; nothing of what lies there may come in."""
    q, k, v, grad, cu_seqlens = case(2, 1, 16, [19, 21, 19], torch.float32)
    expected = run(attention, q, k, v, grad, cu_seqlens, impl="triton")
    for x in (q, k, v, grad):
        x[19:40] = float("nan")
    found = run(attention, q, k, v, grad, cu_seqlens, impl="triton")
    for a, b in zip(found, expected):
        assert a[19:40].isnan().all()
        assert torch.equal(a[:19], b[:19]) and torch.equal(a[40:], b[40:])


def test_same_bits_in_any_company():
    """A sequence's result and gradients do not depend on what it is packed with."""
    q, k, v, grad, cu_seqlens = case(2, 1, 16, [23, 40], torch.float32)
    packed = run(attention, q, k, v, grad, cu_seqlens, impl="triton")
    alone = run(attention, *(x[23:] for x in (q, k, v, grad)), torch.tensor([0, 40]), impl="triton")
    assert all(torch.equal(a[23:], b) for a, b in zip(packed, alone))


def test_lse():
    q, k, v, _, cu_seqlens = case(2, 1, 16, [20, 13], torch.float32)
    _, lse = forward(q, k, v, cu_seqlens, 0.25)
    logits = torch.einsum("thd,sd->hts", q[:20], k[:20, 0]) * 0.25
    logits = logits.masked_fill(torch.ones(20, 20).triu(1).bool(), -torch.inf)
    expected = logits.logsumexp(-1) / torch.log(torch.tensor(2.0))
    torch.testing.assert_close(lse[:, :20], expected, rtol=1e-5, atol=1e-5)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=12), st.sampled_from([1, 4, 16, 18]))
def test_every_tile_has_a_slot_of_its_own(lengths, block):
    """The rule in attention_tiles: slots of sequence b begin at cu_seqlens[b] // BLOCK + b."""
    starts = [sum(lengths[:b]) for b in range(len(lengths) + 1)]
    begins = [start // block + b for b, start in enumerate(starts[:-1])]
    taken = [begin + i for begin, n in zip(begins, lengths) for i in range(-(-n // block))]
    assert len(set(taken)) == len(taken)
    assert max(taken, default=0) < attention_tiles.slots(starts[-1], len(lengths), block)
    for slot in taken:  # what find_tile counts
        b = sum(begin <= slot for begin in begins) - 1
        assert 0 <= (slot - begins[b]) * block < lengths[b]


def test_more_sequences_than_one_step_of_the_search(close, monkeypatch):
    monkeypatch.setattr(attention_tiles, "slots_chunk", lambda sequences: 4)
    compare(close, case(1, 1, 16, [3, 1, 0, 9, 18, 2, 2, 0, 1, 4, 7], torch.float32))


def test_grid_limits():
    """Tiles lie on the grid's first dimension, which may exceed 65,535; heads on the second."""
    assert attention_tiles.slots(10_000_000, 4096, 128) > 65_535
    assert attention_tiles.slots(10_000_000, 4096, 128) < 2**31


def test_gradcheck_of_the_reference():
    q, k, v, _, cu_seqlens = case(2, 1, 3, [4, 1, 3], torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda q, k, v: reference(q, k, v, cu_seqlens), leaves)


def test_what_can_not_be_is_said():
    q, k, v, _, cu_seqlens = case(3, 2, 16, [4], torch.float32)
    with pytest.raises(ValueError, match="3 query heads over 2"):
        attention(q, k, v, cu_seqlens, impl="triton")
    with pytest.raises(ValueError, match="positive"):
        attention(q[:, :2], k, v, cu_seqlens, scale=-1.0, impl="triton")


def test_probe_agrees():
    """What `auto` runs before it trusts the kernels."""
    for ours, own in zip(*probe(torch.device("cpu"), torch.float32)):
        torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)


GPU_CASES = [
    (14, 2, 64, [1, 511, 4096, 130]),
    (28, 4, 128, [2048, 77, 1000]),
    (8, 8, 32, [300, 301]),
    (4, 2, 80, [129, 640]),
    (4, 1, 96, [257, 1]),
    (8, 2, 256, [700, 31]),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", GPU_CASES, ids=str)
def test_on_a_gpu(close, shape, dtype):
    compare(close, case(*shape, dtype, device="cuda"))


@pytest.mark.gpu
def test_a_repeated_run_gives_the_same_bits():
    inputs = case(28, 4, 128, [3000, 500, 1], torch.bfloat16, device="cuda")
    first = run(attention, *inputs, impl="triton")
    for _ in range(3):
        again = run(attention, *inputs, impl="triton")
        assert all(torch.equal(a, b) for a, b in zip(first, again))
