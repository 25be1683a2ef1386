"""Attention over a paged KV cache: a sequence's keys and values lie in blocks listed by a table.

Caches are [num_blocks, block_size, Hkv, D]. Token t of sequence b is at
`cache[block_tables[b, t // block_size], t % block_size]`, so sequences of any length share one
pool without fragmentation, and two sequences with a common beginning can list the same blocks.
`paged_attention` is decoding (one new token each); `paged_prefill` lets several new tokens of a
sequence attend to all that is cached of it, themselves included.

Decoding does GROUP operations for each byte of the cache (bf16), 7 for Qwen2.5-7B, where an H200
could do 180. So memory is the limit, and all is arranged to read the cache once, from all
processors, without gaps. The GROUP query heads of one key head are the rows of one tile (padded to
16, what a tensor core takes), so a key is loaded once for all of them. Sequences are cut in splits
of SPLIT = 512 tokens, each a work item, so that one sequence of 128k tokens fills the machine as
well as 512 short ones do:

        sequence 0   |----512----|----512----|--300--|          items 0 1 2
        sequence 1   |-90-|                                     item  3
        sequence 2   |----512----|-7-|                          items 4 5

        program 0: items 0, 4    program 1: items 1, 5    program 2: item 2   program 3: item 3

    a split leaves (out, lse) of its tokens in fp32; `combine_kernel` weighs them together:
        out = sum_i 2^(lse_i - L) out_i,   2^L = sum_i 2^lse_i

Where a split begins depends on the sequence alone: it gives the same bits in any company. Programs
find their items from `seq_lens` on the device; the grid depends on shapes only, so a launch can be
captured in a CUDA graph. The workspace is B * splits * Hq * (D + 1) floats, splits = ceil(M *
block_size / 512): hand in tables no wider than the longest sequence may become.
"""

import torch
import torch.nn.functional as F

from kernels import attention_tiles
from kernels.attention_tiles import attend, constants, find_tile, load_tile
from kernels.dispatch import both_ways, choose, dense
from kernels.flash_attention import pad, pad_index, unpad
from kernels.tiles import tile
from kernels.triton_compat import jit, tl, triton

SPLIT = 512  # tokens of a work item; part of the result's definition, so not in the tile table


def gather(cache, block_tables):
    """[num_blocks, block_size, Hkv, D], [B, M] -> [B, Hkv, M * block_size, D]."""
    B, M = block_tables.shape
    rows = cache.index_select(0, block_tables.flatten())
    return rows.view(B, M * cache.shape[1], *cache.shape[2:]).transpose(1, 2)


def attend_gathered(q, k_cache, v_cache, block_tables, last, scale):
    """Gather each sequence's blocks; query [B, Hq, L, D] sees the positions up to last [B, L]."""
    k, v = gather(k_cache, block_tables), gather(v_cache, block_tables)
    mask = torch.arange(k.shape[2], device=q.device) <= last[..., None]  # [B, L, S]
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask[:, None], scale=scale, enable_gqa=grouped)


def reference_decode(q, k_cache, v_cache, block_tables, seq_lens, scale=None):
    """The one query of each sequence sits at its end."""
    last = seq_lens[:, None] - 1
    return attend_gathered(q[:, :, None], k_cache, v_cache, block_tables, last, scale)[:, :, 0]


def reference_prefill(q, k_cache, v_cache, block_tables, cu_seqlens, seq_lens, scale=None):
    """The new tokens are the last ones of each sequence: query i sits at seq_len - new + i."""
    index, L = pad_index(cu_seqlens)
    q = pad(q, index, len(seq_lens), L)
    last = (seq_lens - cu_seqlens.diff())[:, None] + torch.arange(L, device=q.device)
    return unpad(attend_gathered(q, k_cache, v_cache, block_tables, last, scale), index)


@jit
def paged_tile(
    k_cache, v_cache, table, n, length, d, in_d,
    k_page, k_token, v_page, v_token,
    PAGE: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Keys and values of tokens n .. n + BN of one sequence and head: two tiles [BN, BD].

    Past `length` the table is not read and the tiles are zero: 0 * v must not meet a NaN that an
    unused page may hold.
    """
    tokens = n + tl.arange(0, BN)
    inside = tokens < length
    page_at = table + tokens // PAGE
    page = (tl.load(page_at, mask=inside, other=0) if MASKED else tl.load(page_at)).to(tl.int64)
    row = tokens % PAGE
    k_at = k_cache + (page * k_page + row * k_token)[:, None] + d[None, :]
    v_at = v_cache + (page * v_page + row * v_token)[:, None] + d[None, :]
    k = load_tile(k_at, inside, in_d, MASKED, PADDED)
    return k, load_tile(v_at, inside, in_d, MASKED, PADDED)


@jit
def decode_kernel(
    q, k_cache, v_cache, part, part_lse, block_tables, seq_lens, B, splits, capacity, table_row,
    q_row, q_head, k_page, k_token, k_head, v_page, v_token, v_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, BG: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    SCALE: tl.constexpr, PAGE: tl.constexpr, SPLIT: tl.constexpr, BB: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Grid (programs, Hkv). part [B, splits, Hq, D] and part_lse [B, splits, Hq], fp32."""
    kv_head = tl.program_id(1)
    b = tl.arange(0, BB)
    lengths = tl.minimum(tl.load(seq_lens + b, mask=b < B, other=0), capacity)
    ends = tl.cumsum((lengths + SPLIT - 1) // SPLIT, 0)  # sequence b: items ends[b-1] .. ends[b]
    g, d = tl.arange(0, BG), tl.arange(0, BD)
    in_g, in_d = g < GROUP, d < D
    head = kv_head * GROUP + g
    for item in range(tl.program_id(0), tl.max(ends, 0), tl.num_programs(0)):
        before = ends <= item
        sequence = tl.sum(before.to(tl.int32), 0).to(tl.int64)
        split = item - tl.max(tl.where(before, ends, 0), 0)
        length = tl.minimum(tl.load(seq_lens + sequence), capacity)
        q_at = q + sequence * q_row + head[:, None] * q_head + d[None, :]
        q_tile = load_tile(q_at, in_g, in_d, True, D < BD)
        top = tl.full([BG], -float("inf"), tl.float32)
        total = tl.zeros([BG], tl.float32)
        acc = tl.zeros([BG, BD], tl.float32)
        for n in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, length), BN):
            k, v = paged_tile(
                k_cache + kv_head * k_head, v_cache + kv_head * v_head,
                block_tables + sequence * table_row, n, length, d, in_d,
                k_page, k_token, v_page, v_token, PAGE, BN, True, D < BD,
            )  # fmt: skip
            seen = (n + tl.arange(0, BN) < length)[None, :]
            top, total, acc = attend(q_tile, k, v, seen, top, total, acc, SCALE, True)
        at = (sequence * splits + split) * HEADS + head
        inside = in_g[:, None] & in_d[None, :]
        tl.store(part + at[:, None] * D + d[None, :], acc / total[:, None], mask=inside)
        tl.store(part_lse + at, top + tl.log2(total), mask=in_g)


@jit
def combine_kernel(
    part, part_lse, out, seq_lens, splits, capacity,
    HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, SPLIT: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Grid (B, Hq). BS splits a step, all columns at once. A sequence of no tokens gives zero."""
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.minimum(tl.load(seq_lens + sequence), capacity)
    used = (length + SPLIT - 1) // SPLIT
    d = tl.arange(0, BD)
    top = tl.full([1], -float("inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([BD], tl.float32)
    for base in range(0, used, BS):
        split = base + tl.arange(0, BS)
        at = (sequence * splits + split) * HEADS + head
        lse = tl.load(part_lse + at, mask=split < used, other=-float("inf"))
        values_at = part + at[:, None] * D + d[None, :]
        values = load_tile(values_at, split < used, d < D, True, D < BD)  # [BS, BD]
        new_top = tl.maximum(top, tl.max(lse, 0))
        weight = tl.exp2(lse - new_top)
        shrink = tl.exp2(top - new_top)
        acc = acc * shrink + tl.sum(values * weight[:, None], 0)
        total = total * shrink + tl.sum(weight, 0)
        top = new_top
    result = tl.where(total > 0, acc / tl.where(total > 0, total, 1.0), 0.0)
    at = (sequence * HEADS + head) * D + d
    tl.store(out + at, result.to(out.dtype.element_ty), mask=d < D)


@jit
def prefill_kernel(
    q, k_cache, v_cache, out, block_tables, cu_seqlens, seq_lens, B, table_row,
    q_token, q_head, k_page, k_token, k_head, v_page, v_token, v_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    SCALE: tl.constexpr, PAGE: tl.constexpr, TOKENS: tl.constexpr, CHUNK: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid (slots, Hkv). A tile's rows are TOKENS tokens times the GROUP heads of one key head, so
    that even a single new token fills rows; BM - TOKENS * GROUP rows are left idle."""
    slot = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence, start, new, first = find_tile(cu_seqlens, B, slot, TOKENS, CHUNK)
    if first >= new:
        return

    r, d = tl.arange(0, BM), tl.arange(0, BD)
    token, head = first + r // GROUP, kv_head * GROUP + r % GROUP
    in_row, in_d = (r < TOKENS * GROUP) & (token < new), d < D
    length = tl.load(seq_lens + sequence)
    before = length - new  # tokens that were cached already
    position = before + token
    rows = (start + token).to(tl.int64)
    q_at = q + (rows * q_token + head * q_head)[:, None] + d[None, :]
    q_tile = load_tile(q_at, in_row, in_d, True, D < BD)
    k_cache += kv_head * k_head
    v_cache += kv_head * v_head
    table = block_tables + sequence.to(tl.int64) * table_row

    top = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    diagonal = (before + first + 1) // BN * BN  # the keys before it are seen by all rows
    for MASKED in tl.static_range(2):
        end = tl.minimum(before + first + TOKENS, length) if MASKED else diagonal
        for n in range(diagonal * MASKED, end, BN):
            k, v = paged_tile(
                k_cache, v_cache, table, n, length, d, in_d,
                k_page, k_token, v_page, v_token, PAGE, BN, MASKED, D < BD,
            )  # fmt: skip
            seen = position[:, None] >= (n + tl.arange(0, BN))[None, :]
            top, total, acc = attend(q_tile, k, v, seen, top, total, acc, SCALE, MASKED)

    out_at = out + ((rows * HEADS + head) * D)[:, None] + d[None, :]
    inside = in_row[:, None] & in_d[None, :]
    tl.store(out_at, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)


def paged_attention(q, k_cache, v_cache, block_tables, seq_lens, scale=None, impl="auto"):
    """One new token per sequence against its cache. q [B, Hq, D] -> [B, Hq, D].

    k_cache, v_cache [num_blocks, block_size, Hkv, D]; block_tables [B, M] (entries past a
    sequence's end may be any valid block); seq_lens [B] counts the new token, already written.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    impl = choose(impl, "paged_attention", q, k_cache, v_cache, probe=probe_decode)
    if impl == "torch":
        run = decode_on_cpu if q.device.type == "cpu" else reference_decode
        return run(q, k_cache, v_cache, block_tables, seq_lens, scale)
    q, k_cache, v_cache, block_tables = map(dense, (q, k_cache, v_cache, block_tables))
    (B, Hq, D), (page, Hkv) = q.shape, k_cache.shape[1:3]
    shape = constants(q, Hkv, scale)
    capacity = block_tables.shape[1] * page
    splits = triton.cdiv(capacity, SPLIT)
    part = torch.empty(B, splits, Hq, D, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(B, splits, Hq, dtype=torch.float32, device=q.device)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    choice = tile("paged_decode", q, D=D)
    programs = min(B * splits, max(1, choice.pop("PROGRAMS") // Hkv))
    decode_kernel[(programs, Hkv)](
        q, k_cache, v_cache, part, part_lse, block_tables, seq_lens, B, splits, capacity,
        block_tables.stride(0), *q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
        BG=max(16, triton.next_power_of_2(Hq // Hkv)), BB=max(64, triton.next_power_of_2(B)),
        SPLIT=SPLIT, PAGE=page, **shape, **choice,
    )  # fmt: skip
    combine_kernel[(B, Hq)](
        part, part_lse, out, seq_lens, splits, capacity,
        HEADS=Hq, D=D, BD=shape["BD"], SPLIT=SPLIT, **tile("paged_combine", q, D=D),
    )  # fmt: skip
    return out


def paged_prefill(q, k_cache, v_cache, block_tables, cu_seqlens, seq_lens, scale=None, impl="auto"):
    """Several new tokens per sequence against its cache. q [T, Hq, D] packed -> [T, Hq, D].

    cu_seqlens [B+1] bounds each sequence's new tokens in q; seq_lens [B] is each sequence's whole
    length, new tokens (already written to the cache) included.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    impl = choose(impl, "paged_prefill", q, k_cache, v_cache, probe=probe_prefill)
    if impl == "torch":
        run = prefill_on_cpu if q.device.type == "cpu" else reference_prefill
        return run(q, k_cache, v_cache, block_tables, cu_seqlens, seq_lens, scale)
    q, k_cache, v_cache, block_tables = map(dense, (q, k_cache, v_cache, block_tables))
    (T, Hq, D), (page, Hkv), B = q.shape, k_cache.shape[1:3], len(seq_lens)
    shape = constants(q, Hkv, scale)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    choice = tile("paged_prefill", q, D=D)
    choice["BM"] = max(choice["BM"], triton.next_power_of_2(Hq // Hkv))  # a token's group fits
    tokens = choice["BM"] // (Hq // Hkv)
    prefill_kernel[(attention_tiles.slots(T, B, tokens), Hkv)](
        q, k_cache, v_cache, out, block_tables, cu_seqlens.to(torch.int32), seq_lens, B,
        block_tables.stride(0), *q.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
        TOKENS=tokens, CHUNK=attention_tiles.slots_chunk(B), PAGE=page, **shape, **choice,
    )  # fmt: skip
    return out


def decode_on_cpu(q, k_cache, v_cache, block_tables, seq_lens, scale):
    """The reference in slices of sequences of like length: what one gathers stays in a core's cache
    (2 MiB), and no table is wider than it needs. One gather of them all is mostly page faults."""
    size, heads, dim = k_cache.shape[1:]
    order = seq_lens.argsort()
    row = int(seq_lens.max()) * heads * dim * k_cache.element_size()
    out = torch.empty_like(q)
    for part in order.split(max(1, 2**21 // row)):
        width = -(-int(seq_lens[part[-1]]) // size)
        tables = block_tables[part, :width]
        out[part] = reference_decode(q[part], k_cache, v_cache, tables, seq_lens[part], scale)
    return out


def prefill_on_cpu(q, k_cache, v_cache, block_tables, cu_seqlens, seq_lens, scale):
    """The reference in slices of sequences whose masks stay small."""
    pairs = int(cu_seqlens.diff().max()) * int(seq_lens.max())  # of a sequence's mask
    rows, parts = max(1, 2**21 // pairs), []
    for first in range(0, len(seq_lens), rows):
        ends, cu = seq_lens[first : first + rows], cu_seqlens[first : first + rows + 1]
        tables = block_tables[first : first + rows, : -(-int(ends.max()) // k_cache.shape[1])]
        part, cu = q[cu[0] : cu[-1]], cu - cu[0]
        parts.append(reference_prefill(part, k_cache, v_cache, tables, cu, ends, scale))
    return torch.cat(parts)


def probe_case(device, dtype, tokens):
    """A small cache with scattered pages: q, k_cache, v_cache, block_tables, seq_lens."""
    q = torch.randn(tokens, 8, 64, device=device, dtype=dtype)
    caches = torch.randn(2, 99, 16, 2, 64, device=device, dtype=dtype)
    tables = torch.randperm(99, device=device)[:90].view(2, 45).to(torch.int32)
    return q, *caches, tables, torch.tensor([700, 90], dtype=torch.int32, device=device)


def probe_decode(device, dtype):
    """The trial launch of `paged_attention`."""
    return both_ways(paged_attention, *probe_case(device, dtype, tokens=2))


def probe_prefill(device, dtype):
    """The trial launch of `paged_prefill`: 20 and 3 new tokens."""
    *case, seq_lens = probe_case(device, dtype, tokens=23)
    return both_ways(paged_prefill, *case, torch.tensor([0, 20, 23], device=device), seq_lens)


def aot_cases(arch):
    """What `kernels/check.py` compiles here."""
    kernels = {"decode": decode_kernel, "combine": combine_kernel, "prefill": prefill_kernel}
    return attention_tiles.aot_cases(arch, "paged", kernels, SPLIT=SPLIT)
