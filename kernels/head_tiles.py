"""What the two heads, log-prob and sampling, do with a tile of logits that is never stored.

Both ask of hidden [N, H] @ weight[V, H].T only what a running sum or maximum can tell, so both cut
the vocabulary in tiles, make a [BM, BN] tile of logits in registers (`logits_tile`), take it into
the sums of a softmax (`online_step`), and forget it. The sums of different parts of the vocabulary
meet in `merge_sums`. Sharing this file is why sampler and trainer agree on a token's log-prob.

Triton in eight lines, for a reader who knows PyTorch. A kernel is launched as kernel[grid](...) and
then runs as grid[0] programs, each of which asks `tl.program_id(0)` who it is. Within a program one
writes tensor code on small tiles, whose sizes are fixed at compile time (`tl.constexpr`); the
compiler spreads a tile over the registers of num_warps * 32 threads. A tensor arrives as a pointer,
to which one adds a tile of offsets to load a tile of values (`mask=` says which offsets exist and
`other=` what the rest reads as), or as a descriptor (`load_tile`). Programs run in no particular
order and can't talk to each other: so each writes what it found, and a second kernel reads that.
Offsets that may pass 2^31 are made in int64.
"""

import math

import torch

from kernels.tiles import aot_case, choices, tile
from kernels.triton_compat import HAVE_TRITON, jit, tl, triton

if HAVE_TRITON:
    from triton.tools.tensor_descriptor import TensorDescriptor

# Kernels work in base 2, because exp2 is what the hardware has: 2^(x * log2(e)) = e^x.
LOG2E = math.log2(math.e)
LN2 = tl.constexpr(math.log(2.0))
# Stands in for the logit of a word that does not exist. Like -inf it never wins a maximum and its
# exp2 is exactly 0; unlike -inf, 0 * LOWEST is 0 and not NaN.
LOWEST = tl.constexpr(-1e30)


@jit
def my_tile(program, row_tiles, columns, GROUP: tl.constexpr):
    """Which row tile and which column a program does, so that programs running together share.

    Programs start in the order of their numbers, a hundred or so at a time. Down GROUP row tiles,
    then one column to the right: 4 x 4 programs read 4 tiles of rows and 4 of words, where 16 in
    one row would read 1 + 16. With 3 row tiles, 4 columns and GROUP = 2 the numbers lie so:

        0  2  4  6
        1  3  5  7
        8  9 10 11
    """
    per_group = GROUP * columns
    first = program // per_group * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    inside = program % per_group
    return first + inside % height, inside // height


@jit
def load_tile(
    matrix, row, k, rows, H, stride, R: tl.constexpr, K: tl.constexpr, TMA: tl.constexpr
):  # fmt: skip
    """matrix[row : row + R, k : k + K], [R, K]; what lies outside reads as zero.

    TMA: matrix is a tensor descriptor, and one thread asks the hardware of Hopper and later for
    the tile. Else matrix is a pointer, and every thread works out its own addresses.
    """
    if TMA:
        return matrix.load([row, k])
    else:
        r, c = row + tl.arange(0, R), k + tl.arange(0, K)
        inside = (r < rows)[:, None] & (c < H)[None, :]
        at = matrix + r.to(tl.int64)[:, None] * stride + c[None, :]
        return tl.load(at, mask=inside, other=0.0)


@jit
def logits_tile(
    hidden, weight, row, word, N, V, H, hidden_stride, weight_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """hidden[row : row + BM] @ weight[word : word + BN].T, [BM, BN] in fp32, BK of H at a time.

    This loop is where all the time goes. The compiler runs it as a pipeline: while the matrix units
    work on one step, the tiles of the next num_stages - 1 steps are on their way from memory.
    """
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, H, BK):
        x = load_tile(hidden, row, k, N, H, hidden_stride, BM, BK, TMA)
        w = load_tile(weight, word, k, V, H, weight_stride, BN, BK, TMA)
        acc = tl.dot(x, w.T, acc, input_precision="ieee")  # "ieee": fp32 inputs stay fp32
    return acc


@jit
def online_step(x, top, total, moment):
    """Take one more tile of base-2 logits x [BM, BN] into the three running sums of each row.

        top    = max_j x_j                            so far
        total  = sum_j 2^(x_j - top)                  between 1 and V: can't overflow
        moment = sum_j 2^(x_j - top) * (x_j - top)    never positive; what the entropy needs

    When a larger top comes, what was summed relative to the old one moves over: with s = old - new,
    2^(x - new) = 2^(x - old) * 2^s, so total *= 2^s and moment = 2^s * (moment + total * s).
    At the end lse = top + log2(total) and entropy = log2(total) - moment / total, in bits.

        words 1, 3 | 2:   top 3, total 2^-2 + 2^0 = 1.25, moment 2^-2 * -2 = -0.5
                    then  top 3, total 1.25 + 2^-1 = 1.75, moment -0.5 + 2^-1 * -1 = -1
        p = 1/7, 4/7, 2/7: entropy = log2(1.75) + 1 / 1.75 = 1.379 bits

    A word that does not exist has x = LOWEST: it adds 0 to both sums.
    """
    new = tl.maximum(top, tl.max(x, 1))
    shift = top - new
    shrink = tl.exp2(shift)
    x = x - new[:, None]
    p = tl.exp2(x)
    moment = shrink * (moment + total * shift) + tl.sum(p * x, 1)
    total = shrink * total + tl.sum(p, 1)
    return new, total, moment


@jit
def merge_sums(tops, totals, moments, rows, N, splits, BS: tl.constexpr, BR: tl.constexpr):
    """The sums of all splits, for BR rows: top, total, moment [BR], as `online_step` defines them.

    BS splits a step; first the maximum over all, then the sums moved over to it.
    """
    top = tl.full([BR], LOWEST, tl.float32)
    for s in range(0, splits, BS):
        split = s + tl.arange(0, BS)[:, None]
        at, inside = split.to(tl.int64) * N + rows, (split < splits) & (rows < N)
        top = tl.maximum(top, tl.max(tl.load(tops + at, mask=inside, other=LOWEST), 0))
    total = tl.zeros([BR], tl.float32)
    moment = tl.zeros([BR], tl.float32)
    for s in range(0, splits, BS):
        split = s + tl.arange(0, BS)[:, None]
        at, inside = split.to(tl.int64) * N + rows, (split < splits) & (rows < N)
        shift = tl.load(tops + at, mask=inside, other=LOWEST) - top[None, :]  # [BS, BR]
        part = tl.load(totals + at, mask=inside, other=0.0)
        part_moment = tl.load(moments + at, mask=inside, other=0.0)
        shrink = tl.exp2(shift)
        moment += tl.sum(shrink * (part_moment + part * shift), 0)
        total += tl.sum(shrink * part, 0)
    return top, total, moment


def padded(x):
    """x, with rows that begin at multiples of 16 bytes, as tensor descriptors want them.

    Copies only where H is not a multiple of 8 (16-bit) or 4 (fp32), or x is an odd view.
    """
    step = 16 // x.element_size()
    if x.stride(1) == 1 and x.stride(0) % step == 0 and x.data_ptr() % 16 == 0:
        return x
    return torch.nn.functional.pad(x, (0, -x.shape[1] % step)).contiguous()


def handle(x, rows, columns, tma):
    """What a kernel gets for a matrix: a descriptor for tiles of this size, or the pointer."""
    return TensorDescriptor.from_tensor(x, [rows, columns]) if tma else x


def operands(hidden, weight, choice):
    """What a kernel gets of its two matrices: both of them, and H with the strides of both."""
    hidden, weight = padded(hidden), padded(weight)
    BM, BN, BK, TMA = (choice[name] for name in ("BM", "BN", "BK", "TMA"))
    strides = hidden.shape[1], hidden.stride(0), weight.stride(0)
    return (handle(hidden, BM, BK, TMA), handle(weight, BN, BK, TMA)), strides


def grid_of(N, V, choice):
    """Row tiles times splits of the vocabulary, and how many splits that is."""
    splits = triton.cdiv(V, choice["TILES"] * choice["BN"])
    return (triton.cdiv(N, choice["BM"]) * splits,), splits


def merge(kernel, tensors, N, splits):
    """Launch the small kernel that makes each row's results of what its splits left behind."""
    choice = tile("logprob_merge", tensors[0])
    kernel[(triton.cdiv(N, choice["BR"]),)](*tensors, N, splits, **choice)


def aot_cases(arch, merge_name, merge_kernel, **kernels):
    """What `kernels/check.py` compiles of a head: each tile of each kernel, by the table's name."""
    for op, function in kernels.items():
        for limits, values in choices(op, arch):
            kind = "bf16" if limits.get("bytes") == 2 else "fp32"
            tiles = {"hidden": ("BM", "BK"), "weight": ("BN", "BK"), "dlogits": ("BM", "BN")}
            types = {
                name: f"tensordesc<{kind}[{values[rows]},{values[columns]}]>"
                for name, (rows, columns) in tiles.items()
                if values["TMA"] and name in function.arg_names
            }
            yield aot_case(f"{op} {kind}", function, values, kind, kind == "bf16", types)
    for _, values in choices("logprob_merge", arch):
        yield aot_case(merge_name, merge_kernel, values)
