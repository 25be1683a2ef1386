"""The two device functions that all attention kernels share: finding one's tile, and one step of
online softmax.

Which tile is mine?  Sequences of different lengths are cut in tiles of BLOCK rows each, and no
tile crosses a sequence. How many there are is known only on the device, and asking would stall
the host. So each sequence gets slots enough by a rule that needs no sum over its forerunners:

    slots of sequence b begin at  cu_seqlens[b] // BLOCK + b

which leaves room for ceil(length / BLOCK) tiles always, and wastes at most one slot a sequence.
The grid is T // BLOCK + B slots, a number the host knows from shapes; a slot behind its
sequence's end returns at once.

    BLOCK = 4, lengths 6, 1, 5 (cu_seqlens 0 6 7 12): slots begin at 0, 2, 3

    slot       0      1      2      3      4      5
    sequence   0      0      1      2      2      (2)
    rows       0..3   4..5   0      0..3   4      none
"""

import math

from kernels.tiles import aot_case, tile
from kernels.triton_compat import jit, tl, triton


def slots(tokens, sequences, block):
    """How many slots `find_tile` may be asked for: the first dimension of the grid."""
    return tokens // block + sequences


def slots_chunk(sequences):
    """How many sequences `find_tile` looks at in one step (constexpr CHUNK): one compilation for
    small batches, one for large."""
    return 64 if sequences <= 64 else 256


@jit
def find_tile(cu_seqlens, B, slot, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """This slot's sequence, where that begins, its length, and the tile's first row in it.

    Counts the sequences whose slots begin at or before mine, CHUNK at a time: one round trip to
    memory where a binary search would make log2(B) of them one behind the other.
    """
    opened = 0
    for base in range(0, B, CHUNK):
        b = base + tl.arange(0, CHUNK)
        begins = tl.load(cu_seqlens + b, mask=b < B, other=0) // BLOCK + b
        opened += tl.sum(((begins <= slot) & (b < B)).to(tl.int32))
    sequence = opened - 1
    start = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - start
    return sequence, start, length, (slot - start // BLOCK - sequence) * BLOCK


@jit
def load_tile(pointers, rows_inside, columns_inside, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Load a tile with no more masking than it needs; what lies outside reads as zero.

    ROWS: rows may lie outside the sequence. COLUMNS: the head size was padded to a power of two.
    """
    if ROWS and COLUMNS:
        return tl.load(pointers, mask=rows_inside[:, None] & columns_inside[None, :], other=0.0)
    elif ROWS:
        return tl.load(pointers, mask=rows_inside[:, None], other=0.0)
    elif COLUMNS:
        return tl.load(pointers, mask=columns_inside[None, :], other=0.0)
    else:
        return tl.load(pointers)


@jit
def attend(q, k, v, seen, top, total, acc, SCALE: tl.constexpr, MASKED: tl.constexpr):
    """One step of online softmax: let the rows of q read one more tile of keys and values.

    State per row: `top` the largest logit so far, `total` the sum of exp2(logit - top), `acc` the
    sum of exp2(logit - top) * v. A larger logit shrinks both sums by exp2(old top - new top):

        logits 1, 3 | 2:   top 3, total 2^-2 + 1 = 1.25   ->   top 3, total 1.25 + 2^-1 = 1.75
        logits 1, 3 | 5:   top 3, total 1.25              ->   top 5, total 1.25 * 2^-2 + 1 = 1.3125

    SCALE is the softmax scale times log2(e), so that the hardware's exp2 serves: one multiply-add
    and one exp2 for each logit. Each row must see a key in the first tile it is given.
    """
    logits = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        logits = tl.where(seen, logits, -float("inf"))
    new_top = tl.maximum(top, tl.max(logits, 1) * SCALE)
    p = tl.exp2(logits * SCALE - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return new_top, total, acc


def constants(q, kv_heads, scale):
    """What all kernels know at compile time of q [T, Hq, D]: heads, head size, scale in base 2."""
    Hq, D = q.shape[1:]
    if Hq % kv_heads:
        raise ValueError(f"attention: {Hq} query heads over {kv_heads} key heads")
    sizes = {"HEADS": Hq, "GROUP": Hq // kv_heads, "D": D, "BD": triton.next_power_of_2(D)}
    return {**sizes, "SCALE": scale * math.log2(math.e)}


def aot_cases(arch, family, kernels, **more):
    """What `kernels/check.py` compiles of {name in the table, less its family: kernel}: each row at
    each head size that it serves, 28 heads over 4 (Qwen2.5-7B), 64 sequences, pages of 16."""
    for op, function in ((f"{family}_{name}", kernel) for name, kernel in kernels.items()):
        for kind, size, head_sizes in (("bf16", 2, (32, 64, 96, 128, 256)), ("fp32", 4, (64,))):
            for D in head_sizes:
                values = tile(op, arch, D=D, bytes=size)
                shape = {"HEADS": 28, "GROUP": 7, "BG": 16, "D": D, "BD": triton.next_power_of_2(D)}
                shape |= {"SCALE": D**-0.5 * 1.4427, "CHUNK": 64, "BB": 64, "PAGE": 16, **more}
                shape["TOKENS"] = values.get("BM", 0) // 7
                cores = kind == "bf16" and "BN" in values  # without keys a step, no product
                yield aot_case(f"{op} {kind}", function, values, kind, cores, **shape)
