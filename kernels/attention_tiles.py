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

from kernels.tiles import compile_time, tile
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


INTEGERS = ["B", "T", "splits", "capacity"]
LISTS = ["cu_seqlens", "seq_lens", "block_tables"]
SUMS = ["lse", "delta", "part", "part_lse"]


def aot_signature(function, kind):
    """Types of a kernel's arguments by their names, for `kernels/check.py`; kind: "bf16", "fp32".

    What is left over are strides, divisible by 16 as they are in real launches.
    """
    types = {name: "i32:16" if "_" in name else f"*{kind}" for name in function.arg_names}
    types |= dict.fromkeys(("k_cache", "v_cache"), f"*{kind}")
    types |= dict.fromkeys(INTEGERS, "i32") | dict.fromkeys(LISTS, "*i32")
    return types | dict.fromkeys(SUMS, "*fp32")


def aot_rows(op, arch, head_sizes=(32, 64, 96, 128, 256)):
    """Each table row of an operation with each head size it serves: kind, constexprs, options.

    The heads are those of Qwen2.5-7B: 28 query heads over 4.
    """
    for kind, size in (("bf16", 2), ("fp32", 4)):
        for D in head_sizes if kind == "bf16" else (64,):
            values, options = compile_time(tile(op, arch, D=D, bytes=size))
            shape = {"HEADS": 28, "GROUP": 7, "D": D, "BD": triton.next_power_of_2(D), "CHUNK": 64}
            yield kind, {**shape, "SCALE": D**-0.5 * 1.4427, **values}, options
