"""Draw the next token straight from hidden states: the head's product and the draw in one pass.

Gumbel-max: add g = -log(-log(u)), u uniform, to each logit; the word with the largest sum is an
exact draw from the softmax. Why: exp(-x_j) * -log(u_j) is an exponential waiting time of rate
exp(x_j), and the first of such clocks to ring is j with probability exp(x_j) / sum exp(x). A
maximum can be kept while streaming over the vocabulary, so no logits are stored; log-prob and
entropy come from the sums that `logprob` uses too (`head_tiles.py`).

The noise is Philox 4x32-10 with the request's 64-bit stream as key and (word, position, 0, 0) as
counter: a number for each word, position and request, that nothing else in the batch can change.

Tiles and programs are those of `linear_logprob.py`: one leaves for each request the three sums and
its best word with score and logit, and a second kernel merges.

Cost: a decode batch is small, so this is the time to read the weight once, 2 V H bytes in bf16:
1.09 GB for V = 151,936, H = 3584, a quarter of a millisecond at 4.3 TB/s. Noise, 150 instructions a
logit (10 rounds of Philox, two logarithms), is 0.01 ms of an H200 at B = 16, 0.4 ms at B = 512.
"""

import torch

from kernels import head_tiles
from kernels.dispatch import choose
from kernels.head_tiles import LN2, LOWEST, logits_tile, merge_sums, my_tile, online_step
from kernels.philox import uniform
from kernels.tiles import tile
from kernels.triton_compat import jit, tl

TINY = tl.constexpr(1.1754944e-38)  # the smallest normal fp32: keeps log(0) out


def gumbel(u):
    """Uniform in [0, 1) -> standard Gumbel noise."""
    return -torch.log(-torch.log(u.clamp(min=1.1754944e-38)))


def reference(hidden, weight, temperature, stream, position):
    """Logits, noise, argmax; log-prob and entropy of the distribution that was drawn from."""
    logits = hidden.float() @ weight.float().T  # [B, V]
    greedy = (temperature == 0)[:, None]
    logits = logits / torch.where(greedy, 1.0, temperature[:, None])
    words = torch.arange(weight.shape[0], device=hidden.device)
    noise = gumbel(uniform(stream[:, None], words[None], position[:, None]))
    ids = torch.where(greedy, logits, logits + noise).argmax(-1)
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return ids, logp.gather(1, ids[:, None])[:, 0], entropy


@jit
def noise(stream, word, position):
    """Gumbel noise in bits, up to a constant that no maximum notices: -log2(-log2(u))."""
    first, _, _, _ = tl.philox(stream, word, position, 0, 0)
    u = tl.maximum(tl.uint_to_uniform_float(first), TINY)
    return -tl.log2(-tl.log2(u))


@jit
def sample_kernel(
    hidden, weight, temperature, stream, position, tops, totals, moments, scores, logits, words,
    N, V, H, hidden_stride, weight_stride, splits,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr,
    GROUP: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Program: BM requests against TILES * BN words. Grid (row tiles * splits,).

    hidden [N, H], weight [V, H]; temperature fp32, stream and position int64, [N]. Leaves tops,
    totals, moments (see `online_step`), and of the best word its score, base-2 logit and index:
    each [splits, N].
    """
    row, split = my_tile(tl.program_id(0), tl.cdiv(N, BM), splits, GROUP)
    rows = row * BM + tl.arange(0, BM)
    inside = rows < N
    heat = tl.load(temperature + rows, mask=inside, other=1.0)
    key = tl.load(stream + rows, mask=inside, other=0)
    place = tl.load(position + rows, mask=inside, other=0).to(tl.int32)
    greedy = heat == 0.0
    scale = 1.0 / (tl.where(greedy, 1.0, heat) * LN2)  # base 2: log2(e) = 1 / ln(2)

    top = tl.full([BM], LOWEST, tl.float32)
    total = tl.zeros([BM], tl.float32)
    moment = tl.zeros([BM], tl.float32)
    best = tl.full([BM], LOWEST, tl.float32)
    best_logit = tl.full([BM], LOWEST, tl.float32)
    best_word = tl.zeros([BM], tl.int32)
    for i in range(TILES):
        word = (split * TILES + i) * BN
        x = logits_tile(
            hidden, weight, row * BM, word, N, V, H, hidden_stride, weight_stride, BM, BN, BK, TMA
        )
        index = word + tl.arange(0, BN)[None, :]
        x = tl.where(index < V, x * scale[:, None], LOWEST)  # [BM, BN]
        top, total, moment = online_step(x, top, total, moment)
        gumbel_bits = noise(key[:, None], index, place[:, None])
        score = tl.where(greedy[:, None], x, x + gumbel_bits)
        tile_best = tl.max(score, 1)
        # Equal scores: the lowest word, as argmax has it.
        tile_word = tl.min(tl.where(score == tile_best[:, None], index, word + BN), 1)
        tile_logit = tl.max(tl.where(index == tile_word[:, None], x, LOWEST), 1)
        better = tile_best > best
        best = tl.where(better, tile_best, best)
        best_logit = tl.where(better, tile_logit, best_logit)
        best_word = tl.where(better, tile_word, best_word)
    at = split.to(tl.int64) * N + rows
    tl.store(tops + at, top, mask=inside)
    tl.store(totals + at, total, mask=inside)
    tl.store(moments + at, moment, mask=inside)
    tl.store(scores + at, best, mask=inside)
    tl.store(logits + at, best_logit, mask=inside)
    tl.store(words + at, best_word, mask=inside)


@jit
def sample_merge_kernel(
    tops, totals, moments, scores, logits, words, ids, logp, entropy, N, splits,
    BS: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Program: BR requests, all splits. Grid (row blocks,). Writes ids int64, logp, entropy [N]."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = rows < N
    top, total, moment = merge_sums(tops, totals, moments, rows[None, :], N, splits, BS, BR)
    best = tl.full([BR], LOWEST, tl.float32)
    winner = tl.zeros([BR], tl.int32)
    for s in range(0, splits, BS):
        split = s + tl.arange(0, BS)[:, None]
        at, here = split.to(tl.int64) * N + rows[None, :], (split < splits) & inside[None, :]
        score = tl.load(scores + at, mask=here, other=LOWEST)  # [BS, BR]
        step_best = tl.max(score, 0)
        first = tl.min(tl.where(score == step_best[None, :], split, s + BS), 0)
        winner = tl.where(step_best > best, first, winner)
        best = tl.maximum(best, step_best)
    at = winner.to(tl.int64) * N + rows
    logit = tl.load(logits + at, mask=inside, other=0.0)
    bits = tl.log2(total)
    tl.store(ids + rows, tl.load(words + at, mask=inside, other=0).to(tl.int64), mask=inside)
    tl.store(logp + rows, (logit - top - bits) * LN2, mask=inside)
    tl.store(entropy + rows, (bits - moment / total) * LN2, mask=inside)


def sample(hidden, weight, temperature, stream, position, impl="auto"):
    """hidden [B, H], weight [V, H]; temperature, stream, position [B] -> ids, logp, entropy [B].

    temperature 0 is greedy, with log-prob and entropy of the distribution at temperature 1;
    stream: int64 random stream of each request; position: index of the token being drawn.
    ids [B] int64; logp and entropy [B] fp32, nats, of the distribution drawn from.
    """
    impl = choose(impl, "sample", hidden, weight, probe=probe)
    if impl == "torch" or hidden.shape[0] == 0:
        return reference(hidden, weight, temperature, stream, position)
    N, V, device = len(hidden), len(weight), hidden.device
    choice = tile("sample", hidden, N=N)
    matrices, strides = head_tiles.operands(hidden, weight.to(hidden.dtype), choice)
    rows = temperature.float().contiguous(), stream.contiguous(), position.contiguous()
    grid, splits = head_tiles.grid_of(N, V, choice)
    parts = torch.empty(5, splits, N, dtype=torch.float32, device=device).unbind()
    words = torch.empty(splits, N, dtype=torch.int32, device=device)
    sample_kernel[grid](*matrices, *rows, *parts, words, N, V, *strides, splits, **choice)
    ids = torch.empty(N, dtype=torch.int64, device=device)
    logp, entropy = torch.empty(2, N, dtype=torch.float32, device=device).unbind()
    head_tiles.merge(sample_merge_kernel, (*parts, words, ids, logp, entropy), N, splits)
    return ids, logp, entropy


def probe(device, dtype):
    """The trial launch. Two scores may be equal but for rounding, so words may differ: log-prob
    where they don't, entropy, and whether half are the same (of other noise, hardly one were)."""
    hidden = torch.randn(9, 128, device=device, dtype=dtype)
    weight = torch.randn(1000, 128, device=device, dtype=dtype) / 4
    rows = torch.arange(9, device=device)
    case = hidden, weight, rows / 8, rows * 2**40 + 7, rows
    ids, logp, entropy = sample(*case, impl="triton")
    own_ids, own_logp, own_entropy = sample(*case, impl="torch")
    same = (ids == own_ids).float()
    agree = (same.mean() >= 0.5).float()
    return (logp * same, entropy, agree), (own_logp * same, own_entropy, torch.ones_like(agree))


def aot_cases(arch):
    """What `kernels/check.py` compiles: each shipped tile of each kernel."""
    return head_tiles.aot_cases(arch, "sample_merge", sample_merge_kernel, sample=sample_kernel)
