"""Rotary position embedding, alone and together with the write into the paged cache.

Dimension i is paired with i + D/2 (the layout of Hugging Face checkpoints), and the pair is
rotated by the angle position * theta**(-2i/D), whose cosines and sines come in tables.
"""

import torch

from kernels.dispatch import choose


def rotate(x, cos, sin):
    """x [T, H, D], cos and sin [T, D/2] -> [T, H, D]."""
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def reference_rope(q, k, cos, sin, positions):
    """Look the angles up, turn q and k."""
    cos, sin = cos[positions], sin[positions]
    return rotate(q, cos, sin), rotate(k, cos, sin)


def reference_write(q, k, v, cos, sin, positions, k_cache, v_cache, slots):
    """Turn q and k; store k and v where the slots say."""
    q, k = reference_rope(q, k, cos, sin, positions)
    if (slots < 0).any():
        k, v, slots = k[slots >= 0], v[slots >= 0], slots[slots >= 0]
    k_cache.view(-1, *k_cache.shape[2:])[slots] = k.to(k_cache.dtype)
    v_cache.view(-1, *v_cache.shape[2:])[slots] = v.to(v_cache.dtype)
    return q


def rope(q, k, cos, sin, positions, impl="auto"):
    """q [T, Hq, D], k [T, Hkv, D] rotated to positions [T]; cos, sin [P, D/2] are the tables.

    Returns new q and k. Differentiable in q and k.
    """
    choose(impl)
    return reference_rope(q, k, cos, sin, positions)


def rope_write(q, k, v, cos, sin, positions, k_cache, v_cache, slots, impl="auto"):
    """Rotate q [T, Hq, D] and k [T, Hkv, D]; write k and v [T, Hkv, D] into the caches.

    Caches [num_blocks, block_size, Hkv, D] are written in place at slots [T] (block * block_size
    + offset; negative = not written). Returns the rotated q. No gradient.
    """
    choose(impl)
    return reference_write(q, k, v, cos, sin, positions, k_cache, v_cache, slots)
