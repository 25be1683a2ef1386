"""Philox 4x32-10, the counter-based generator behind `tl.rand`, in plain PyTorch, bit for bit.

A counter-based generator is a keyed hash: random(key, counter) needs no state, so token t of a
stream draws the same number whatever else is in the batch, on whatever device, in whatever order.
Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

import torch

MASK = 0xFFFFFFFF
ROUND_A, ROUND_B = 0xD2511F53, 0xCD9E8D57
KEY_A, KEY_B = 0x9E3779B9, 0xBB67AE85


def philox(key, c0, c1=0, c2=0, c3=0):
    """Four 32-bit words per counter.

    key: int64 tensor (its 64 bits are the key); c0..c3: int64 tensors or ints, 32 bits each,
    broadcast against key. Returns four int64 tensors with values in [0, 2**32).
    """
    k0, k1 = key & MASK, (key >> 32) & MASK
    c0, c1, c2, c3 = (torch.as_tensor(c, device=key.device) & MASK for c in (c0, c1, c2, c3))
    for _ in range(10):
        # int64 products wrap modulo 2**64, which keeps exactly the bits that are wanted here
        a, b = c0 * ROUND_A, c2 * ROUND_B
        c0, c2 = ((b >> 32) & MASK) ^ c1 ^ k0, ((a >> 32) & MASK) ^ c3 ^ k1
        c1, c3 = b & MASK, a & MASK
        k0, k1 = (k0 + KEY_A) & MASK, (k1 + KEY_B) & MASK
    return c0, c1, c2, c3


def uniform(key, c0, c1=0):
    """One fp32 in [0, 1) per counter, as `tl.rand` makes it from the first word."""
    word = philox(key, c0, c1)[0]
    word = torch.where(word >= 2**31, MASK - word, word)  # fold the sign bit, as Triton does
    return word.float() * 4.6566127342e-10
