"""The fused head against its reference: values, gradients, and each trap it was written around."""

import math

import pytest
import torch

from kernels import linear_logprob
from kernels.head_tiles import LN2, LOWEST, my_tile, online_step
from kernels.linear_logprob import chunk_words, logprob, reference
from kernels.triton_compat import jit, tl

# N, H, V: V not a multiple of a tile, N of 1 and of several tiles, H that no descriptor takes as is
SHAPES = [(1, 64, 33), (37, 64, 101), (16, 24, 64), (50, 75, 130)]


def both(N, H, V, dtype, temperature=1.0, targets=None, scale=1.0, shift=0.0, cost=None):
    """Run kernel, PyTorch in this dtype and fp64 truth on one input: three lists of results."""
    hidden = (torch.randn(N, H) * scale).to(dtype)
    weight = (torch.randn(V, H) / math.sqrt(H)).to(dtype)
    if shift:  # the same number added to all logits of a row
        hidden[:, 0], weight[:, 0] = shift, 1.0
    if targets is None:
        targets = torch.randint(0, V, (N,))
    mix = torch.rand(2, N) + 0.5  # an upstream gradient for each output
    results = []
    for impl, kind in (("triton", dtype), ("torch", dtype), ("torch", torch.float64)):
        h, w = (x.clone().to(kind).requires_grad_() for x in (hidden, weight))
        logp, entropy = logprob(h, w, targets, temperature, impl=impl)
        cost_now = (logp * mix[0]).sum() + (entropy * mix[1]).sum() if cost is None else cost(logp)
        cost_now.backward()
        results.append([logp.detach(), entropy.detach(), h.grad, w.grad])
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("N, H, V", SHAPES)
def test_values_and_gradients(N, H, V, dtype, close):
    targets = torch.randint(0, V, (N,))
    targets[N // 2] = -100
    for ours, own, truth in zip(*both(N, H, V, dtype, 0.7, targets)):
        assert own.dtype == ours.dtype
        close(ours, own, truth)


@pytest.mark.parametrize("N, H, V", SHAPES[1:])
def test_the_same_by_pointers(N, H, V, pointers, close, monkeypatch):
    monkeypatch.setattr(linear_logprob, "chunk_words", lambda N, V, size: 48)  # ragged chunks too
    for ours, own, truth in zip(*both(N, H, V, torch.float32, 1.3)):
        close(ours, own, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_all_logits_negative_and_a_ragged_last_tile(dtype, close):
    """A word outside the vocabulary has logit 0: the maximum here, if it were let in."""
    for V in (33, 64, 65):
        ours, own, truth = both(20, 64, V, dtype, shift=-40.0)
        assert truth[0].max() < 0 and (ours[0] <= 0).all()
        for a, b, c in zip(ours[:2], own[:2], truth[:2]):
            close(a, b, c)


def test_p_near_one_keeps_its_gradient(close):
    """With p rounded to 16 bits p - 1 would be 0; here it is 1e-3 to 1e-5."""
    N, H, V = 16, 64, 40
    torch.manual_seed(1)
    hidden, weight = torch.randn(N, H).half(), torch.randn(V, H).half() / 8
    targets = (hidden.float() @ weight.float().T).argmax(-1)
    weight = torch.nn.functional.pad(weight, (0, 8))
    hidden = torch.nn.functional.pad(hidden, (0, 8))
    weight[:8, -8:] = torch.eye(8)  # eight words get a bonus of their own
    targets = torch.arange(N) % 8
    hidden[torch.arange(N), H + targets] = 12.0
    grads = []
    for impl, kind in (
        ("triton", torch.float16),
        ("torch", torch.float16),
        ("torch", torch.double),
    ):
        h, w = (x.clone().to(kind).requires_grad_() for x in (hidden, weight))
        logp, _ = logprob(h, w, targets, impl=impl)
        (1e3 * logp).sum().backward()  # as a loss scale would, so that fp16 can hold the result
        grads.append((logp.detach(), h.grad, w.grad))
    assert (grads[2][0].exp() > 0.99).all() and (grads[0][0] <= 0).all()
    assert (grads[0][1].abs().amax(1) > 0).all()
    for a, b, c in zip(*grads):
        close(a, b, c)


def test_ignored_targets_give_zero_and_no_gradient():
    hidden, weight = torch.randn(5, 64, requires_grad=True), torch.randn(40, 64, requires_grad=True)
    targets = torch.tensor([3, -100, 0, -100, 39])
    logp, entropy = logprob(hidden, weight, targets, impl="triton")
    (logp + entropy).sum().backward()
    assert logp[targets == -100].tolist() == entropy[targets == -100].tolist() == [0, 0]
    assert (hidden.grad[targets == -100] == 0).all() and (hidden.grad[0] != 0).any()
    hidden2, weight2 = hidden.detach()[::2].clone().requires_grad_(), weight.detach().clone()
    weight2.requires_grad_()
    logp, entropy = logprob(hidden2, weight2, targets[::2], impl="triton")
    (logp + entropy).sum().backward()
    torch.testing.assert_close(weight.grad, weight2.grad)


def test_all_targets_ignored_and_no_rows():
    weight = torch.randn(40, 64, requires_grad=True)
    for N in (3, 0):
        hidden = torch.randn(N, 64, requires_grad=True)
        targets = torch.full((N,), -100)
        logp, entropy = logprob(hidden, weight, targets, impl="triton")
        (logp + entropy).sum().backward()
        assert logp.shape == (N,) and (logp == 0).all() and (weight.grad == 0).all()


def test_chunks_of_the_vocabulary_change_nothing(monkeypatch):
    """dhidden is a sum over chunks; dweight's rows each belong to one."""
    torch.manual_seed(3)
    whole = both(20, 64, 700, torch.float32)
    monkeypatch.setattr(linear_logprob, "chunk_words", lambda N, V, size: 256)
    torch.manual_seed(3)
    parts = both(20, 64, 700, torch.float32)
    torch.testing.assert_close(whole[0][2], parts[0][2], rtol=1e-5, atol=1e-6)
    assert torch.equal(whole[0][3], parts[0][3])


def test_same_bits_in_every_run():
    first, second = [], []
    for results in (first, second):
        torch.manual_seed(5)
        results += both(40, 64, 130, torch.float16)[0]
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_only_the_gradient_that_is_asked_for():
    hidden, weight = torch.randn(4, 64), torch.randn(40, 64, requires_grad=True)
    logprob(hidden, weight, torch.arange(4), impl="triton")[0].sum().backward()
    assert weight.grad is not None
    hidden = torch.randn(4, 64, requires_grad=True)
    logprob(hidden, weight.detach(), torch.arange(4), impl="triton")[1].sum().backward()
    assert hidden.grad is not None


def test_large_logits_keep_a_small_entropy(close):
    """The entropy is a difference of large numbers unless the sums are kept relative to the top."""
    ours, own, truth = both(20, 64, 90, torch.float32, shift=900.0)
    close(ours[1], own[1], truth[1], floor=2e-5)


def test_views_that_no_descriptor_takes(close):
    wide, weight = torch.randn(30, 130), torch.randn(45, 64)
    hidden, targets = wide[:, 1:65], torch.randint(0, 45, (60,))[::2]
    for ours, theirs in zip(
        logprob(hidden, weight.T.contiguous().T, targets, impl="triton"),
        reference(hidden, weight, targets),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@jit
def walk(out, rows, columns, GROUP: tl.constexpr):
    row, column = my_tile(tl.program_id(0), rows, columns, GROUP)
    tl.store(out + tl.program_id(0), row * columns + column)


def test_every_tile_is_done_once():
    """The order of programs is a permutation of all (row tile, column) pairs."""
    for rows, columns, group in ((3, 4, 2), (1, 5, 8), (7, 1, 3), (8, 3, 4)):
        out = torch.full((rows * columns,), -1, dtype=torch.int32)
        walk[(rows * columns,)](out, rows, columns, GROUP=group)
        assert sorted(out.tolist()) == list(range(rows * columns))
        if (rows, columns, group) == (3, 4, 2):  # the picture in my_tile's docstring
            assert out.tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 9, 10, 11]


def test_chunk_words_bounds_memory():
    assert chunk_words(8192, 151_936, 2) * 8192 * 2 < 1.1 * linear_logprob.CHUNK_BYTES
    assert chunk_words(10, 500, 4) == 512
    for N in (1, 100, 8192, 10**6):
        words = chunk_words(N, 151_936, 2)
        assert words % 256 == 0 and words >= 1024


def test_gradcheck_of_the_reference():
    hidden = torch.randn(4, 6, dtype=torch.double, requires_grad=True)
    weight = torch.randn(9, 6, dtype=torch.double, requires_grad=True)
    targets = torch.tensor([0, 8, -100, 3])
    assert torch.autograd.gradcheck(lambda h, w: reference(h, w, targets, 0.8), (hidden, weight))


@jit
def two_steps(x, out, BN: tl.constexpr):
    c = tl.arange(0, BN)[None, :]
    top, total = tl.full([1], LOWEST, tl.float32), tl.zeros([1], tl.float32)
    moment = tl.zeros([1], tl.float32)
    for i in range(2):
        top, total, moment = online_step(tl.load(x + i * BN + c), top, total, moment)
        at = out + i * 3 + tl.arange(0, 1)
        tl.store(at, top)
        tl.store(at + 1, total)
        tl.store(at + 2, moment)


def test_worked_example_of_online_step():
    """Words 1, 3 and then 2, with a word that does not exist beside it, as its docstring has it."""
    out = torch.empty(2, 3)
    two_steps[(1,)](torch.tensor([1.0, 3.0, 2.0, LOWEST.value]), out, BN=2)
    assert out.tolist() == [[3, 1.25, -0.5], [3, 1.75, -1]]
    _, entropy = reference(torch.tensor([[1.0, 3, 2]]) * LN2.value, torch.eye(3), torch.tensor([0]))
    assert abs(entropy.item() / LN2.value - (math.log2(1.75) + 1 / 1.75)) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("N, H, V", [(1, 64, 151_936), (777, 896, 151_936), (3000, 1536, 32_003)])
def test_on_a_gpu(N, H, V, dtype, close):
    with torch.device("cuda"):
        targets = torch.randint(0, V, (N,))
        targets[::7] = -100 if N > 1 else targets[0]
        for ours, own, truth in zip(*both(N, H, V, dtype, 0.8, targets)):
            close(ours, own, truth, floor=1e-5)


@pytest.mark.gpu
def test_memory_on_a_gpu():
    """No [N, V] anywhere: at most 0.7 GiB beyond the gradients for 8192 x 4096 x 151,936."""
    N, H, V = 8192, 4096, 151_936
    hidden = torch.randn(N, H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(V, H, device="cuda", dtype=torch.bfloat16) / 64).requires_grad_()
    targets = torch.randint(0, V, (N,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logp, entropy = logprob(hidden, weight, targets, impl="triton")
    (logp.sum() + entropy.sum()).backward()
    extra = torch.cuda.max_memory_allocated() - before - 2 * (N + V) * H
    assert extra < 0.7 * 2**30, f"{extra / 2**30:.2f} GiB"
