"""Causal attention over packed sequences of different lengths, with grouped heads (GQA).

Sequences lie one behind another in one tensor of T tokens; `cu_seqlens` [B+1] holds where each
begins. A token attends to itself and to what came before it in its own sequence, nothing else.
"""

import torch
import torch.nn.functional as F

from kernels.dispatch import choose


def pad_index(cu_seqlens):
    """Where each packed token lies in a padded [B, L] batch: flat index [T] and L."""
    lengths = cu_seqlens.diff()
    longest = int(lengths.max())
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    total = int(cu_seqlens[-1])
    offset = torch.arange(total, device=lengths.device) - cu_seqlens[:-1][sequence]
    return sequence * longest + offset, longest


def reference(q, k, v, cu_seqlens, scale=None):
    """Pad to [B, H, L, D], attend, unpad: causal masking makes the padding at the end harmless."""
    B, Hq, Hkv, D = len(cu_seqlens) - 1, q.shape[1], k.shape[1], q.shape[2]
    cu_seqlens = cu_seqlens.long()
    index, L = pad_index(cu_seqlens)

    def pad(x):  # [T, H, D] -> [B, H, L, D]
        out = x.new_zeros(B * L, *x.shape[1:]).index_copy(0, index, x)
        return out.view(B, L, *x.shape[1:]).transpose(1, 2)

    out = F.scaled_dot_product_attention(
        pad(q), pad(k), pad(v), is_causal=True, scale=scale, enable_gqa=Hq != Hkv
    )  # [B, Hq, L, D]
    return out.transpose(1, 2).reshape(B * L, Hq, D)[index]


def attention(q, k, v, cu_seqlens, scale=None, impl="auto"):
    """Varlen causal attention. q [T, Hq, D], k and v [T, Hkv, D], cu_seqlens [B+1] -> [T, Hq, D].

    Hq must be a multiple of Hkv: query head h reads key head h // (Hq / Hkv). scale defaults to
    D**-0.5. Differentiable in q, k and v.
    """
    choose(impl)
    return reference(q, k, v, cu_seqlens, scale)
