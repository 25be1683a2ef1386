"""Attention over a paged KV cache: a sequence's keys and values lie in blocks listed by a table.

Caches are [num_blocks, block_size, Hkv, D]. Token t of sequence b is at
`cache[block_tables[b, t // block_size], t % block_size]`, so sequences of any length share one
pool without fragmentation, and two sequences with a common beginning can list the same blocks.
`paged_attention` is decoding (one new token each); `paged_prefill` lets several new tokens of a
sequence attend to all that is cached of it, themselves included.
"""

import torch
import torch.nn.functional as F

from kernels.dispatch import choose
from kernels.flash_attention import pad_index


def gather(cache, block_tables):
    """[num_blocks, block_size, Hkv, D], [B, M] -> [B, Hkv, M * block_size, D]."""
    B, M = block_tables.shape
    rows = cache.index_select(0, block_tables.flatten())
    return rows.view(B, M * cache.shape[1], *cache.shape[2:]).transpose(1, 2)


def reference_decode(q, k_cache, v_cache, block_tables, seq_lens, scale=None):
    """Gather each sequence's blocks and attend with the positions past its end masked."""
    k, v = gather(k_cache, block_tables), gather(v_cache, block_tables)
    mask = torch.arange(k.shape[2], device=q.device) < seq_lens[:, None]  # [B, S]
    out = F.scaled_dot_product_attention(
        q[:, :, None], k, v, mask[:, None, None], scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )  # [B, Hq, 1, D]
    return out[:, :, 0]


def reference_prefill(q, k_cache, v_cache, block_tables, cu_seqlens, seq_lens, scale=None):
    """The new tokens are the last ones of each sequence: query i sits at seq_len - new + i."""
    Hq, D = q.shape[1:]
    B = len(seq_lens)
    cu_seqlens = cu_seqlens.long()
    index, L = pad_index(cu_seqlens)
    k, v = gather(k_cache, block_tables), gather(v_cache, block_tables)
    padded = q.new_zeros(B * L, Hq, D).index_copy(0, index, q).view(B, L, Hq, D).transpose(1, 2)
    first = (seq_lens - cu_seqlens.diff())[:, None]  # position of each sequence's first new token
    limit = first + torch.arange(L, device=q.device)  # [B, L] position of each query
    mask = torch.arange(k.shape[2], device=q.device) <= limit[..., None]  # [B, L, S]
    out = F.scaled_dot_product_attention(
        padded, k, v, mask[:, None], scale=scale, enable_gqa=Hq != k.shape[1]
    )  # [B, Hq, L, D]
    return out.transpose(1, 2).reshape(B * L, Hq, D)[index]


def paged_attention(q, k_cache, v_cache, block_tables, seq_lens, scale=None, impl="auto"):
    """One new token per sequence against its cache. q [B, Hq, D] -> [B, Hq, D].

    k_cache, v_cache [num_blocks, block_size, Hkv, D]; block_tables [B, M] (entries past a
    sequence's end may be any valid block); seq_lens [B] counts the new token, already written.
    """
    choose(impl)
    return reference_decode(q, k_cache, v_cache, block_tables, seq_lens, scale)


def paged_prefill(q, k_cache, v_cache, block_tables, cu_seqlens, seq_lens, scale=None, impl="auto"):
    """Several new tokens per sequence against its cache. q [T, Hq, D] packed -> [T, Hq, D].

    cu_seqlens [B+1] bounds each sequence's new tokens in q; seq_lens [B] is each sequence's whole
    length, new tokens (already written to the cache) included.
    """
    choose(impl)
    return reference_prefill(q, k_cache, v_cache, block_tables, cu_seqlens, seq_lens, scale)
