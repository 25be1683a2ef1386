r"""The backward pass of `flash_attention`: three kernels, no atomics, no [T, T] matrix in memory.

With s = q k^T * scale, p = exp(s - lse), out = p v and the gradient g of out:

    dv = p^T g        dp = g v^T        ds = p * (dp - delta)        dk = scale * ds^T q
    delta[t] = sum_s p[t, s] dp[t, s] = out[t] . g[t]                dq = scale * ds k

p and dp are made again tile by tile from q, k, v, g and the saved lse; `delta`, one number a row,
comes first. dk and dv are sums over rows, dq is a sum over columns: one kernel for both would add
one of them up across programs, with atomics, in another order each run; so there are two, and p
and dp are computed in both.

    dkdv: a program owns BN keys      dq: a program owns BM rows
    of one key head, walks down       of one query head, walks right

         keys BN                            keys ->  BN
        +----+                             +----+----+----+----+
        | \  |  diagonal, masked           | #  | #  | #  | \  |  BM rows
        +----+                             +----+----+----+----+
        | #  |  BM rows a step               full tiles    diagonal, masked
        +----+
        | #  |
        +----+  then the same for the other query heads of the group: their sum stays in
        | /  |  registers, so GQA costs no memory and no atomics
        +----+
          the last rows, masked: a sequence need not end where a tile does

Of 7 products (p and dp twice) 5 are needed, 10 * Hq * D * L^2 / 2 operations for L tokens: that
count, which benchmarks quote, can reach 5/7 of the matrix rate at best. In dkdv the tiles are
transposed, p^T = exp(k q^T - lse), so that p^T and ds^T come out of one product in the registers
where the next one wants its left operand.
"""

import torch

from kernels import attention_tiles
from kernels.attention_tiles import find_tile, load_tile, slots
from kernels.tiles import tile
from kernels.triton_compat import jit, tl, triton


@jit
def delta_kernel(
    out, grad, delta, T, HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr
):
    """delta[h, t] = out[t, h] . grad[t, h] in fp32. Grid (T / BM, Hq)."""
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, BD)
    at = (rows * HEADS + head)[:, None] * D + d[None, :]
    inside = (rows < T)[:, None] & (d < D)[None, :]
    o = tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(delta + head.to(tl.int64) * T + rows, tl.sum(o * g, 1), mask=rows < T)


@jit
def dkdv_kernel(
    q, k, v, grad, lse, delta, dk, dv, cu_seqlens, B, T,
    q_token, q_head, k_token, k_head, v_token, v_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    SCALE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid (slots, Hkv). dk and dv [T, Hkv, D], summed over the GROUP query heads in order."""
    _, start, length, first = find_tile(cu_seqlens, B, tl.program_id(0), BN, CHUNK)
    kv_head = tl.program_id(1)
    if first >= length:
        return

    columns = first + tl.arange(0, BN)
    d = tl.arange(0, BD)
    in_column, in_d = columns < length, d < D
    keys = (start + columns).to(tl.int64)
    k_at = k + keys[:, None] * k_token + kv_head * k_head + d[None, :]
    k_tile = load_tile(k_at, in_column, in_d, True, D < BD)
    v_at = v + keys[:, None] * v_token + kv_head * v_head + d[None, :]
    v_tile = load_tile(v_at, in_column, in_d, True, D < BD)
    dk_acc = tl.zeros([BN, BD], tl.float32)
    dv_acc = tl.zeros([BN, BD], tl.float32)

    # Rows first .. length: DIAGONAL masked tiles, `full` tiles that see all keys, and a last one.
    # One loop over (head, tile) each, full ones first, so that loads run ahead across heads too.
    DIAGONAL: tl.constexpr = (BN + BM - 1) // BM
    below = tl.maximum(length - first - DIAGONAL * BM, 0)
    full = below // BM
    masked = DIAGONAL + (below % BM > 0).to(tl.int32)
    q += start.to(tl.int64) * q_token + kv_head * GROUP * q_head
    grad += (start.to(tl.int64) * HEADS + kv_head * GROUP) * D
    lse += (kv_head * GROUP).to(tl.int64) * T + start
    delta += (kv_head * GROUP).to(tl.int64) * T + start
    for MASKED in tl.static_range(2):
        count = masked if MASKED else full
        for step in tl.range(0, GROUP * count, num_stages=1 if MASKED else None):
            h, i = step // count, step % count
            tile_row = tl.where(i < DIAGONAL, i, full + i) if MASKED else DIAGONAL + i
            rows = first + tile_row * BM + tl.arange(0, BM)
            at = rows.to(tl.int64)[:, None]
            q_at = q + h * q_head + at * q_token + d[None, :]
            g_at = grad + h * D + at * (HEADS * D) + d[None, :]
            lse_at = lse + h * T + rows
            delta_at = delta + h * T + rows
            in_row = rows < length
            seen = rows[None, :] >= columns[:, None]
            q_tile = load_tile(q_at, in_row, in_d, MASKED, D < BD)
            g_tile = load_tile(g_at, in_row, in_d, MASKED, D < BD)
            # A row past the end weighs nothing: exp2(x - inf) = 0.
            lse_row = (
                tl.load(lse_at, mask=in_row, other=float("inf")) if MASKED else tl.load(lse_at)
            )
            logits = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee") * SCALE  # [BN, BM]
            p = tl.exp2(logits - lse_row[None, :])
            if MASKED:
                p = tl.where(seen, p, 0.0)
            dv_acc = tl.dot(p.to(g_tile.dtype), g_tile, dv_acc, input_precision="ieee")
            dp = tl.dot(v_tile, tl.trans(g_tile), input_precision="ieee")
            delta_row = tl.load(delta_at, mask=in_row, other=0.0) if MASKED else tl.load(delta_at)
            ds = p * (dp - delta_row[None, :])
            dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc, input_precision="ieee")
    LN2: tl.constexpr = 0.6931471805599453
    key_at = (keys * (HEADS // GROUP) + kv_head)[:, None] * D + d[None, :]
    inside = in_column[:, None] & in_d[None, :]
    tl.store(dk + key_at, (dk_acc * (SCALE * LN2)).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + key_at, dv_acc.to(dv.dtype.element_ty), mask=inside)


@jit
def dq_kernel(
    q, k, v, grad, lse, delta, dq, cu_seqlens, B, T,
    q_token, q_head, k_token, k_head, v_token, v_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    SCALE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid (slots, Hq). dq [T, Hq, D]. The walk is the forward kernel's."""
    slot = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    _, start, length, first = find_tile(cu_seqlens, B, slot, BM, CHUNK)
    if first >= length:
        return

    rows = first + tl.arange(0, BM)
    d = tl.arange(0, BD)
    in_row, in_d = rows < length, d < D
    tokens = (start + rows).to(tl.int64)
    at = (tokens * HEADS + head)[:, None] * D + d[None, :]
    q_at = q + tokens[:, None] * q_token + head * q_head + d[None, :]
    q_tile = load_tile(q_at, in_row, in_d, True, D < BD)
    g_tile = load_tile(grad + at, in_row, in_d, True, D < BD)
    row_at = head.to(tl.int64) * T + tokens
    lse_row = tl.load(lse + row_at, mask=in_row, other=float("inf"))
    delta_row = tl.load(delta + row_at, mask=in_row, other=0.0)
    keys = tl.arange(0, BN)
    k += start.to(tl.int64) * k_token + head // GROUP * k_head
    v += start.to(tl.int64) * v_token + head // GROUP * v_head

    acc = tl.zeros([BM, BD], tl.float32)
    diagonal = first // BN * BN
    for MASKED in tl.static_range(2):
        end = tl.minimum(first + BM, length) if MASKED else diagonal
        for n in range(diagonal * MASKED, end, BN):
            columns = n + keys
            key = columns.to(tl.int64)[:, None]
            k_at = k + key * k_token + d[None, :]
            v_at = v + key * v_token + d[None, :]
            in_column = columns < length
            seen = rows[:, None] >= columns[None, :]
            k_tile = load_tile(k_at, in_column, in_d, MASKED, D < BD)
            v_tile = load_tile(v_at, in_column, in_d, MASKED, D < BD)
            logits = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * SCALE  # [BM, BN]
            p = tl.exp2(logits - lse_row[:, None])
            if MASKED:
                p = tl.where(seen, p, 0.0)
            dp = tl.dot(g_tile, tl.trans(v_tile), input_precision="ieee")
            ds = p * (dp - delta_row[:, None])
            acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision="ieee")

    LN2: tl.constexpr = 0.6931471805599453
    inside = in_row[:, None] & in_d[None, :]
    tl.store(dq + at, (acc * (SCALE * LN2)).to(dq.dtype.element_ty), mask=inside)


def backward(q, k, v, out, lse, cu_seqlens, grad, scale):
    """Launch the three kernels: dq [T, Hq, D], dk and dv [T, Hkv, D] in the inputs' dtype."""
    (T, Hq, D), Hkv, B = q.shape, k.shape[1], len(cu_seqlens) - 1
    shape = attention_tiles.constants(q, Hkv, scale)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    delta, grad = torch.empty_like(lse), grad.contiguous()
    choice = tile("attention_delta", q, D=D)
    delta_kernel[(triton.cdiv(T, choice["BM"]), Hq)](
        out, grad, delta, T, HEADS=Hq, D=D, BD=shape["BD"], **choice
    )
    inputs = q, k, v, grad, lse, delta
    bounds = cu_seqlens, B, T, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2]
    shape["CHUNK"] = attention_tiles.slots_chunk(B)
    choice = tile("attention_dkdv", q, D=D)
    dkdv_kernel[(slots(T, B, choice["BN"]), Hkv)](*inputs, dk, dv, *bounds, **shape, **choice)
    choice = tile("attention_dq", q, D=D)
    dq_kernel[(slots(T, B, choice["BM"]), Hq)](*inputs, dq, *bounds, **shape, **choice)
    return dq, dk, dv
