"""Log-prob and entropy of the language-model head: hidden states in, two numbers per token out.

The logits of N tokens over V words are the largest tensor of RL training by far ([N, V] in fp32 is
40 GB at N = 65k, V = 152k), and all that training wants of them is the log-probability of the
token that was sampled and the entropy of the distribution it was sampled from:

    x       = hidden @ weight.T / temperature             [N, V]
    logp    = x[target] - lse          with  lse = log sum_j exp(x_j)                        [N]
    entropy = -sum_j p_j log p_j = lse - sum_j p_j x_j   with  p_j = exp(x_j - lse)          [N]

So make a tile of logits, take from it what those sums need, and forget it. Read `head_tiles.py`
first: the tile of logits, the softmax that streams, what Triton is.

Tiling of the forward pass, and who does what (TILES = 2):

                   words V ->   BN
                  +----+----+----+----+----+--       one program: BM rows of hidden against TILES
    rows N    BM  | program | program | ...          tiles of BN words. It leaves four numbers a
                  +----+----+----+----+----+--       row behind, and a small kernel merges those
                  | program | program | ...          of a row over all programs.

Cost: forward is one matrix product, 2 N H V operations on 2 (N + V) H bytes (bf16), read about once
thanks to the order of the programs (`my_tile`). At N = 8192, H = 4096, V = 151,936 that is 10.2
TFLOP against 1.3 GB: the matrix units are the limit. Backward is three such products: the logits
again (cheaper than having kept them), then dhidden and dweight, which are left to cuBLAS.
"""

import math

import torch

from kernels import head_tiles
from kernels.dispatch import both_ways, choose
from kernels.head_tiles import LN2, LOG2E, LOWEST, logits_tile, merge_sums, my_tile, online_step
from kernels.tiles import tile
from kernels.triton_compat import jit, tl, triton

IGNORE = -100  # a target that counts for nothing: log-prob 0, entropy 0, no gradient
CHUNK_BYTES = 2**28  # memory for d-logits in the backward pass


def reference(hidden, weight, targets, temperature=1.0):
    """hidden [N, H], weight [V, H], targets [N] (or -100) -> logp [N], entropy [N], in fp32."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(wide) @ weight.to(wide).T / temperature  # [N, V]
    logp = logits.log_softmax(-1)
    keep = targets != IGNORE
    chosen = logp.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    return torch.where(keep, chosen, 0.0), torch.where(keep, entropy, 0.0)


@jit
def forward_kernel(
    hidden, weight, targets, tops, totals, moments, chosen,
    N, V, H, hidden_stride, weight_stride, splits, scale,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr,
    GROUP: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Program: BM rows against TILES * BN words. Grid (row tiles * splits,).

    hidden [N, H], weight [V, H], targets [N] int64; scale = log2(e) / temperature. Leaves tops,
    totals, moments (see `online_step`) and chosen, the target's base-2 logit (from the one program
    that meets it, else LOWEST): each [splits, N] fp32.
    """
    row, split = my_tile(tl.program_id(0), tl.cdiv(N, BM), splits, GROUP)
    rows = row * BM + tl.arange(0, BM)
    target = tl.load(targets + rows, mask=rows < N, other=-1).to(tl.int32)
    top = tl.full([BM], LOWEST, tl.float32)
    total = tl.zeros([BM], tl.float32)
    moment = tl.zeros([BM], tl.float32)
    mine = tl.full([BM], LOWEST, tl.float32)
    for i in range(TILES):
        word = (split * TILES + i) * BN
        x = logits_tile(
            hidden, weight, row * BM, word, N, V, H, hidden_stride, weight_stride, BM, BN, BK, TMA
        )
        x *= scale
        words = word + tl.arange(0, BN)
        # Outside, x is 0, and a zero counts: exp(0) = 1, and it is the maximum of negative logits.
        x = tl.where((words < V)[None, :], x, LOWEST)
        is_target = words[None, :] == target[:, None]
        mine = tl.maximum(mine, tl.max(tl.where(is_target, x, LOWEST), 1))
        top, total, moment = online_step(x, top, total, moment)
    at = split.to(tl.int64) * N + rows
    tl.store(tops + at, top, mask=rows < N)
    tl.store(totals + at, total, mask=rows < N)
    tl.store(moments + at, moment, mask=rows < N)
    tl.store(chosen + at, mine, mask=rows < N)


@jit
def merge_kernel(
    tops, totals, moments, chosen, targets, logp, entropy, lse, N, splits,
    BS: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Program: BR rows, all splits. Grid (row blocks,). Writes logp and entropy in nats and lse in
    bits (for the backward pass), [N] fp32."""
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    inside = rows < N
    top, total, moment = merge_sums(tops, totals, moments, rows[None, :], N, splits, BS, BR)
    mine = tl.full([BR], LOWEST, tl.float32)
    for s in range(0, splits, BS):
        split = s + tl.arange(0, BS)[:, None]
        at, here = split.to(tl.int64) * N + rows[None, :], (split < splits) & inside[None, :]
        mine = tl.maximum(mine, tl.max(tl.load(chosen + at, mask=here, other=LOWEST), 0))
    keep = tl.load(targets + rows, mask=inside, other=0) != -100
    bits = tl.log2(total)
    # mine - top first: near p = 1 both are large and nearly equal, and bits is tiny
    tl.store(logp + rows, tl.where(keep, (mine - top - bits) * LN2, 0.0), mask=inside)
    tl.store(entropy + rows, tl.where(keep, (bits - moment / total) * LN2, 0.0), mask=inside)
    tl.store(lse + rows, top + bits, mask=inside)


@jit
def dlogits_kernel(
    hidden, weight, dlogits, targets, lse, entropy, grad_logp, grad_entropy,
    first, width, N, H, hidden_stride, weight_stride, dlogits_stride, scale,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Program: one tile of dlogits [N, width], the gradient of hidden @ weight[first:].T.

    With g and e the gradients of logp and entropy, and log p_j = x_j - lse:

        d logp / d x_j    = [j is target] - p_j
        d entropy / d x_j = -p_j * (log p_j + entropy)
        d x_j             = [j is target] * g - p_j * (g + e * (log p_j + entropy))

    and the product is x * temperature, so its gradient is d x_j / temperature. All of it in fp32,
    rounded once at the end: p rounded to bf16 is exactly 1 above 0.998, and p - 1 then 0.
    """
    row, column = my_tile(tl.program_id(0), tl.cdiv(N, BM), tl.cdiv(width, BN), GROUP)
    word = first + column * BN
    x = logits_tile(
        hidden, weight, row * BM, word, N, first + width, H, hidden_stride, weight_stride,
        BM, BN, BK, TMA,
    )  # fmt: skip
    x *= scale

    rows = row * BM + tl.arange(0, BM)
    inside = rows < N
    target = tl.load(targets + rows, mask=inside, other=-100).to(tl.int32)
    keep = inside & (target != -100)
    # 1 / temperature = scale * ln(2)
    g = tl.load(grad_logp + rows, mask=keep, other=0.0) * (scale * LN2)
    e = tl.load(grad_entropy + rows, mask=keep, other=0.0) * (scale * LN2)
    h = tl.load(entropy + rows, mask=keep, other=0.0)
    log_p = x - tl.load(lse + rows, mask=keep, other=0.0)[:, None]  # bits
    # A row to ignore has g = e = 0, and its p must be finite for 0 * p to be 0.
    p = tl.exp2(tl.where(keep[:, None], log_p, 0.0))
    d = -p * (g[:, None] + e[:, None] * (log_p * LN2 + h[:, None]))
    words = word + tl.arange(0, BN)
    d += tl.where(words[None, :] == target[:, None], g[:, None], 0.0)
    if TMA:
        dlogits.store([row * BM, column * BN], d.to(dlogits.dtype))
    else:
        c = column * BN + tl.arange(0, BN)
        at = dlogits + rows.to(tl.int64)[:, None] * dlogits_stride + c[None, :]
        tl.store(at, d.to(dlogits.dtype.element_ty), mask=inside[:, None] & (c < width)[None, :])


def product_fp32(a, b):
    """a @ b with the result in fp32, not rounded to the inputs' type."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def chunk_words(N, V, element_size):
    """Words per chunk: equal chunks, multiples of 256, of about CHUNK_BYTES but 1,024 words at
    least, so that the products stay large."""
    chunks = math.ceil(V / max(1024, CHUNK_BYTES // (N * element_size)))
    return math.ceil(V / chunks / 256) * 256


class LogProb(torch.autograd.Function):
    """The kernels as one differentiable operation. Saves its inputs and two numbers per row."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        N, V = len(hidden), len(weight)
        choice = tile("logprob_forward", hidden, N=N)
        matrices, strides = head_tiles.operands(hidden, weight, choice)
        grid, splits = head_tiles.grid_of(N, V, choice)
        parts = torch.empty(4, splits, N, dtype=torch.float32, device=hidden.device).unbind()
        sizes = N, V, *strides, splits
        ctx.scale = LOG2E / temperature
        forward_kernel[grid](*matrices, targets, *parts, *sizes, ctx.scale, **choice)
        results = torch.empty(3, N, dtype=torch.float32, device=hidden.device).unbind()
        head_tiles.merge(merge_kernel, (*parts, targets, *results), N, splits)
        logp, entropy, lse = results
        ctx.save_for_backward(hidden, weight, targets, lse, entropy)
        return logp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        """A chunk of words at a time, because dlogits [N, V] would not fit. Of words and not of
        tokens: each row of dweight is then finished by one product, and only dhidden, the small
        one, is a sum over chunks. No atomics, a fixed order: the same bits in every run."""
        hidden, weight, *rows = ctx.saved_tensors
        rows += [grad.contiguous() for grad in grads]
        (N, H), V = hidden.shape, len(weight)
        choice = tile("logprob_backward", hidden)
        BM, BN, TMA = choice["BM"], choice["BN"], choice["TMA"]
        matrices, strides = head_tiles.operands(hidden, weight, choice)
        chunk = chunk_words(N, V, hidden.element_size())
        dlogits = torch.empty(N, chunk, dtype=hidden.dtype, device=hidden.device)
        needs, device = ctx.needs_input_grad, hidden.device
        dhidden = torch.zeros(N, H, dtype=torch.float32, device=device) if needs[0] else None
        dweight = torch.empty(V, H, dtype=weight.dtype, device=device) if needs[1] else None
        for first in range(0, V, chunk):
            part = dlogits[:, : min(chunk, V - first)]  # [N, width]
            width = part.shape[1]
            dlogits_kernel[(triton.cdiv(N, BM) * triton.cdiv(width, BN),)](
                *matrices, head_tiles.handle(part, BM, BN, TMA), *rows, first, width, N,
                *strides, chunk, ctx.scale, **choice,
            )  # fmt: skip
            words = slice(first, first + width)
            if needs[0]:
                dhidden += product_fp32(part, weight[words])  # [N, width] @ [width, H]
            if needs[1]:
                torch.mm(part.T, hidden, out=dweight[words])  # [width, N] @ [N, H]
        return dhidden.to(hidden.dtype) if needs[0] else None, dweight, None, None


def logprob(hidden, weight, targets, temperature=1.0, impl="auto"):
    """Log-probability (nats) of each target and entropy (nats) of each row's distribution.

    hidden [N, H]; weight [V, H]; targets [N] int64, -100 = ignored (0, 0 and no gradient), other
    values outside 0..V-1 are undefined; temperature > 0 divides the logits. Returns logp [N],
    entropy [N] (fp32, or fp64 for fp64 inputs), both differentiable in hidden and weight.
    """
    impl = choose(impl, "logprob", hidden, weight, probe=probe)
    if impl == "torch" or hidden.shape[0] == 0:
        return reference(hidden, weight, targets, temperature)
    return LogProb.apply(hidden, weight.to(hidden.dtype), targets.contiguous(), float(temperature))


def probe(device, dtype):
    """The trial launch, at odd sizes and with a target to ignore."""
    hidden = torch.randn(70, 128, device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(1000, 128, device=device, dtype=dtype) / 4).requires_grad_()
    targets = torch.randint(0, 1000, (70,), device=device)
    targets[3] = IGNORE
    return both_ways(logprob, hidden, weight, targets, 0.7)


def aot_cases(arch):
    """What `kernels/check.py` compiles: each shipped tile of each kernel."""
    kernels = {"logprob_forward": forward_kernel, "logprob_backward": dlogits_kernel}
    return head_tiles.aot_cases(arch, "logprob_merge", merge_kernel, **kernels)
