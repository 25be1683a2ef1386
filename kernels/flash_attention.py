r"""Causal attention over packed sequences of different lengths, with grouped heads (GQA).

Sequences lie one behind another in one tensor of T tokens; `cu_seqlens` [B+1] holds where each
begins. A token attends to itself and to what came before it in its own sequence, nothing else.

    out[t] = sum_{s <= t} exp(q[t] . k[s] * scale - lse[t]) v[s]
    lse[t] = log sum_{s <= t} exp(q[t] . k[s] * scale)

The [T, T] matrix of weights is never in memory. A program owns BM rows of q of one head and walks
over the keys in tiles of BN, from the sequence's first key to the diagonal, with the online softmax
of `attention_tiles.attend`. It writes its rows of out, and lse, from which the backward pass
(`flash_backward.py`) rebuilds any tile of weights.

    one sequence, one head         keys ->    BN
                                 rows of q  +----+----+----+----+
       full tiles (no mask):  #       BM    | \  |    |    |    |
       diagonal tiles:        \             +----+----+----+----+
       never touched:                       | #  | \  |    |    |    BM = BN here; with BM = 2 BN
                                            +----+----+----+----+    the diagonal takes two tiles
                                            | #  | #  | \  |    |
                                            +----+----+----+----+
                                            | #  | #  | #  | \  |  <- started first: the longest
                                            +----+----+----+----+

A sequence of L tokens takes 4 * Hq * D * L^2 / 2 operations on 2 * L * (2 Hq + 2 Hkv) * D bytes or
more (bf16): at 4,096 tokens over 1,000 a byte, where an H200 stops waiting for memory at 180. So
tensor cores are the limit, and beside them exp2, which takes half as many clocks as the products.
"""

import torch
import torch.nn.functional as F

from kernels import attention_tiles
from kernels.attention_tiles import attend, find_tile, load_tile
from kernels.dispatch import both_ways, choose, dense
from kernels.flash_backward import backward, delta_kernel, dkdv_kernel, dq_kernel
from kernels.tiles import tile
from kernels.triton_compat import jit, tl


def pad_index(cu_seqlens):
    """Where each packed token lies in a padded [B, L] batch: flat index [T] and L."""
    cu_seqlens = cu_seqlens.long()
    lengths = cu_seqlens.diff()
    sequence = torch.repeat_interleave(lengths)  # of each token
    offset = torch.arange(len(sequence), device=lengths.device) - cu_seqlens[sequence]
    L = int(lengths.max())
    return sequence * L + offset, L


def pad(x, index, B, L):
    """Packed [T, H, D] -> [B, H, L, D], zero where there is no token."""
    out = x.new_zeros(B * L, *x.shape[1:]).index_copy(0, index, x)
    return out.view(B, L, *x.shape[1:]).transpose(1, 2)


def unpad(x, index):
    """And back."""
    return x.transpose(1, 2).flatten(0, 1)[index]


def reference(q, k, v, cu_seqlens, scale=None):
    """Pad to [B, H, L, D], attend, unpad: causal masking makes the padding at the end harmless."""
    index, L = pad_index(cu_seqlens)
    q, k, v = (pad(x, index, len(cu_seqlens) - 1, L) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    return unpad(out, index)


@jit
def forward_kernel(
    q, k, v, out, lse, cu_seqlens, B, T, q_token, q_head, k_token, k_head, v_token, v_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    SCALE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid (slots, Hq). q, k, v are read through their strides; out [T, Hq, D], lse [Hq, T].
    GROUP query heads to a key head; BD: D rounded up to a power of two; SCALE: scale * log2(e)."""
    slot = tl.num_programs(0) - 1 - tl.program_id(0)  # a sequence's last tile is its longest
    head = tl.program_id(1)
    _, start, length, first = find_tile(cu_seqlens, B, slot, BM, CHUNK)
    if first >= length:
        return

    rows = first + tl.arange(0, BM)  # positions in the sequence
    d = tl.arange(0, BD)
    in_row, in_d = rows < length, d < D
    tokens = (start + rows).to(tl.int64)
    q_at = q + tokens[:, None] * q_token + head * q_head + d[None, :]
    q_tile = load_tile(q_at, in_row, in_d, True, D < BD)
    # A walk that carried its pointers along would hold 64-bit tiles of them in registers.
    keys = tl.arange(0, BN)
    k += start.to(tl.int64) * k_token + head // GROUP * k_head
    v += start.to(tl.int64) * v_token + head // GROUP * v_head

    top = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    diagonal = first // BN * BN  # the keys before it are seen by all rows of the tile
    for MASKED in tl.static_range(2):  # two loops: the compiler writes one for each value
        end = tl.minimum(first + BM, length) if MASKED else diagonal
        for n in range(diagonal * MASKED, end, BN):
            columns = n + keys
            at = columns.to(tl.int64)[:, None]
            k_at, inside = k + at * k_token + d[None, :], columns < length
            k_tile = load_tile(k_at, inside, in_d, MASKED, D < BD)
            v_tile = load_tile(v + at * v_token + d[None, :], inside, in_d, MASKED, D < BD)
            seen = rows[:, None] >= columns[None, :]
            top, total, acc = attend(q_tile, k_tile, v_tile, seen, top, total, acc, SCALE, MASKED)

    acc = acc / total[:, None]
    out_at = out + (tokens * HEADS + head)[:, None] * D + d[None, :]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=in_row[:, None] & in_d[None, :])
    tl.store(lse + head.to(tl.int64) * T + tokens, top + tl.log2(total), mask=in_row)


def forward(q, k, v, cu_seqlens, scale):
    """Launch the forward kernel: out [T, Hq, D], and lse [Hq, T] in base 2, scale included."""
    (T, Hq, D), B = q.shape, len(cu_seqlens) - 1
    shape = attention_tiles.constants(q, k.shape[1], scale)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(Hq, T, dtype=torch.float32, device=q.device)
    choice = tile("attention_forward", q, D=D)
    forward_kernel[(attention_tiles.slots(T, B, choice["BM"]), Hq)](
        q, k, v, out, lse, cu_seqlens, B, T, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        CHUNK=attention_tiles.slots_chunk(B), **shape, **choice,
    )  # fmt: skip
    return out, lse


class Attention(torch.autograd.Function):
    """The Triton kernels as one differentiable operation."""

    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, scale):
        out, lse = forward(q, k, v, cu_seqlens, scale)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)
        ctx.scale = scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return *backward(*ctx.saved_tensors, grad, ctx.scale), None, None


def flash(q, k, v, cu_seqlens, scale):
    """The same through the flash-attn package. It wants the longest length: one host sync."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise RuntimeError("attention: impl='flash' needs the flash-attn package") from error
    cu_seqlens = cu_seqlens.to(torch.int32)
    longest = int(cu_seqlens.diff().max())
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, softmax_scale=scale, causal=True
    )


def attention(q, k, v, cu_seqlens, scale=None, impl="auto"):
    """Varlen causal attention. q [T, Hq, D], k and v [T, Hkv, D], cu_seqlens [B+1] -> [T, Hq, D].

    Hq must be a multiple of Hkv: query head h reads key head h // (Hq / Hkv). scale defaults to
    D**-0.5. Differentiable in q, k and v; impl="triton" sums each gradient in a fixed order, so a
    repeated run gives the same bits. impl="flash" is the flash-attn package.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    impl = choose(impl, "attention", q, k, v, probe=probe)
    if impl == "flash":
        return flash(q, k, v, cu_seqlens, scale)
    if impl == "torch":
        return reference(q, k, v, cu_seqlens, scale)
    if scale <= 0:
        raise ValueError(f"attention: scale must be positive, not {scale}")
    return Attention.apply(*map(dense, (q, k, v)), cu_seqlens.to(torch.int32), scale)


def probe(device, dtype):
    """The trial launch: three sequences, one of them a single token."""
    kind = {"device": device, "dtype": dtype, "requires_grad": True}
    cu_seqlens = torch.tensor([0, 150, 151, 230], dtype=torch.int32, device=device)
    return both_ways(attention, *(torch.randn(230, h, 64, **kind) for h in (4, 2, 2)), cu_seqlens)


def aot_cases(arch):
    """What `kernels/check.py` compiles, forward and backward."""
    kernels = {"forward": forward_kernel, "delta": delta_kernel, "dkdv": dkdv_kernel}
    return attention_tiles.aot_cases(arch, "attention", kernels | {"dq": dq_kernel})
