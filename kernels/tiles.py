"""Which tile each kernel uses: a plain table by operation, architecture and shape.

    TILES[op] = [(architectures, limits, values), ...]      the first row that fits is taken

architectures: names separated by blanks. limits: upper bounds on what the shape is called at the
call (`{"D": 64}` fits D <= 64); `bytes` is the size of an element, filled in from the tensor, so a
row with {"bytes": 2} is for fp16 and bf16. values: the kernel's constexprs, num_warps and
num_stages, given to the launch as they stand.

A table and not `@triton.autotune`, because a choice that a reader can see is compiled ahead of time
by `kernels/check.py` for each architecture, is the same in every run and process (so sums keep
their order), and costs no first-call minutes. No choice has been timed yet: they come from register
counts and shared memory (docs/KERNELS.md); `python -m kernels.bench --tune` is to replace them.
"""

# ruff: noqa: C408 (dict(BM=64) reads better in a table than {"BM": 64})

import torch

# Shared memory one program may ask for, bytes. More compiles, and then can't launch.
SHARED = {
    "sm_80": 166_912,  # A100
    "sm_89": 101_376,  # L4, RTX 40
    "sm_90": 232_448,  # H100, H200
    "sm_100": 232_448,  # B200
    "sm_120": 101_376,  # RTX 50
}
ARCHITECTURES = tuple(SHARED)
ALL = " ".join(SHARED)
HOPPER, CONSUMER = "sm_90 sm_100", "sm_89 sm_120"
MMA = "sm_80 sm_89 sm_120"  # one kind of tensor core instruction, operands through registers


def head(BM, BN, BK, warps, stages, GROUP=8, **more):
    """A row's values for a head: BM rows x BN words, BK of H a step."""
    return dict(BM=BM, BN=BN, BK=BK, GROUP=GROUP, **more, num_warps=warps, num_stages=stages)


# fmt: off
TILES = {
    # logprob: TILES of words per program; GROUP row tiles that run together (L2).
    "logprob_forward": [
        (HOPPER, {"bytes": 2, "N": 2048}, head(256, 128, 64, TILES=1, TMA=True, warps=8, stages=4)),
        (HOPPER, {"bytes": 2}, head(256, 128, 64, TILES=4, TMA=True, warps=8, stages=4)),
        (MMA, {"bytes": 2}, head(128, 128, 32, TILES=4, TMA=False, warps=8, stages=4)),
        (ALL, {}, head(64, 64, 16, TILES=8, TMA=False, warps=4, stages=2)),
        ("interpret", {}, head(16, 32, 32, TILES=2, TMA=True, GROUP=2, warps=4, stages=1)),
    ],
    "logprob_backward": [
        (HOPPER, {"bytes": 2}, head(256, 128, 64, TMA=True, warps=8, stages=4)),
        (MMA, {"bytes": 2}, head(128, 128, 32, TMA=False, warps=8, stages=4)),
        (ALL, {}, head(64, 64, 16, TMA=False, warps=4, stages=2)),
        ("interpret", {}, head(16, 32, 32, TMA=True, GROUP=2, warps=4, stages=1)),
    ],
    "logprob_merge": [
        (ALL, {}, dict(BS=64, BR=16, num_warps=4, num_stages=2)),
        ("interpret", {}, dict(BS=4, BR=16, num_warps=4, num_stages=1)),
    ],
    # sample: as logprob, for the few rows of a decode step.
    "sample": [
        (HOPPER, {"bytes": 2, "N": 16}, head(16, 64, 128, TILES=1, TMA=True, warps=4, stages=4)),
        (HOPPER, {"bytes": 2, "N": 64}, head(64, 64, 64, TILES=1, TMA=True, warps=4, stages=4)),
        (HOPPER, {"bytes": 2}, head(128, 64, 64, TILES=1, TMA=True, warps=8, stages=4)),
        (MMA, {"bytes": 2, "N": 16}, head(16, 64, 64, TILES=1, TMA=False, warps=4, stages=4)),
        (MMA, {"bytes": 2}, head(64, 64, 64, TILES=1, TMA=False, warps=4, stages=3)),
        (ALL, {}, head(32, 64, 16, TILES=1, TMA=False, warps=4, stages=2)),
        ("interpret", {}, head(16, 32, 32, TILES=2, TMA=True, GROUP=2, warps=4, stages=1)),
    ],
    # rms_norm: BR rows of C values; PROGRAMS that share the rows of the backward pass.
    "rms_norm_forward": [
        (ALL, {"C": 128}, dict(BR=16, num_warps=4, num_stages=1)),
        (ALL, {"C": 1024}, dict(BR=4, num_warps=4, num_stages=1)),
        (ALL, {"C": 4096}, dict(BR=1, num_warps=4, num_stages=1)),
        (ALL, {}, dict(BR=1, num_warps=8, num_stages=1)),
        ("interpret", {}, dict(BR=4, num_warps=4, num_stages=1)),
    ],
    "rms_norm_backward": [
        (ALL, {"C": 128}, dict(BR=16, PROGRAMS=512, num_warps=4, num_stages=1)),
        (ALL, {"C": 1024}, dict(BR=4, PROGRAMS=512, num_warps=4, num_stages=1)),
        (ALL, {"C": 4096}, dict(BR=1, PROGRAMS=512, num_warps=8, num_stages=1)),
        (ALL, {}, dict(BR=1, PROGRAMS=256, num_warps=16, num_stages=1)),
        ("interpret", {}, dict(BR=4, PROGRAMS=3, num_warps=4, num_stages=1)),
    ],
    "swiglu": [
        (ALL, {}, dict(BLOCK=1024, num_warps=4, num_stages=1)),
        ("interpret", {}, dict(BLOCK=64, num_warps=4, num_stages=1)),
    ],
    "rope": [
        (ALL, {}, dict(num_warps=4, num_stages=1)),
        ("interpret", {}, dict(num_warps=4, num_stages=1)),
    ],
    # attention: BM rows of queries, BN keys.
    "attention_forward": [
        (HOPPER, {"bytes": 2, "D": 64}, dict(BM=128, BN=128, num_warps=8, num_stages=2)),
        (HOPPER, {"bytes": 2, "D": 128}, dict(BM=128, BN=128, num_warps=8, num_stages=2)),
        (HOPPER, {"bytes": 2, "D": 256}, dict(BM=128, BN=64, num_warps=8, num_stages=2)),
        (MMA, {"bytes": 2, "D": 64}, dict(BM=128, BN=64, num_warps=8, num_stages=2)),
        (MMA, {"bytes": 2, "D": 128}, dict(BM=128, BN=32, num_warps=8, num_stages=2)),
        (MMA, {"bytes": 2, "D": 256}, dict(BM=64, BN=32, num_warps=8, num_stages=2)),
        (ALL, {}, dict(BM=32, BN=32, num_warps=8, num_stages=1)),
        ("interpret", {}, dict(BM=32, BN=16, num_warps=4, num_stages=1)),
    ],
    "attention_dkdv": [
        (HOPPER, {"bytes": 2, "D": 128}, dict(BM=64, BN=128, num_warps=8, num_stages=2)),
        (HOPPER, {"bytes": 2, "D": 256}, dict(BM=32, BN=32, num_warps=8, num_stages=2)),
        (MMA, {"bytes": 2, "D": 64}, dict(BM=32, BN=128, num_warps=8, num_stages=2)),
        (MMA, {"bytes": 2, "D": 128}, dict(BM=64, BN=64, num_warps=8, num_stages=2)),
        (MMA, {"bytes": 2, "D": 256}, dict(BM=32, BN=32, num_warps=8, num_stages=2)),
        (ALL, {}, dict(BM=32, BN=32, num_warps=8, num_stages=1)),
        ("interpret", {}, dict(BM=16, BN=32, num_warps=4, num_stages=1)),
    ],
    "attention_dq": [
        (HOPPER, {"bytes": 2, "D": 64}, dict(BM=128, BN=64, num_warps=8, num_stages=3)),
        (HOPPER, {"bytes": 2, "D": 128}, dict(BM=128, BN=64, num_warps=8, num_stages=2)),
        (HOPPER, {"bytes": 2, "D": 256}, dict(BM=64, BN=32, num_warps=8, num_stages=2)),
        (MMA, {"bytes": 2, "D": 32}, dict(BM=64, BN=32, num_warps=4, num_stages=2)),
        (MMA, {"bytes": 2, "D": 128}, dict(BM=64, BN=64, num_warps=8, num_stages=2)),
        (MMA, {"bytes": 2, "D": 256}, dict(BM=32, BN=32, num_warps=8, num_stages=2)),
        (ALL, {}, dict(BM=32, BN=32, num_warps=8, num_stages=1)),
        ("interpret", {}, dict(BM=32, BN=16, num_warps=4, num_stages=1)),
    ],
    "paged_prefill": [
        ("sm_100", {"bytes": 2, "D": 64}, dict(BM=128, BN=128, num_warps=8, num_stages=2)),
        (HOPPER, {"bytes": 2, "D": 128}, dict(BM=128, BN=64, num_warps=8, num_stages=3)),
        (HOPPER, {"bytes": 2, "D": 256}, dict(BM=64, BN=64, num_warps=8, num_stages=2)),
        (MMA, {"bytes": 2, "D": 64}, dict(BM=128, BN=64, num_warps=8, num_stages=2)),
        (MMA, {"bytes": 2, "D": 128}, dict(BM=128, BN=32, num_warps=8, num_stages=2)),
        (MMA, {"bytes": 2, "D": 256}, dict(BM=64, BN=32, num_warps=8, num_stages=1)),
        (ALL, {}, dict(BM=32, BN=32, num_warps=8, num_stages=1)),
        ("interpret", {}, dict(BM=32, BN=16, num_warps=4, num_stages=1)),
    ],
    "attention_delta": [(f"{ALL} interpret", {}, dict(BM=32, num_warps=4, num_stages=1))],
    # decode: BN tokens a step; PROGRAMS over all key heads share the splits between them.
    "paged_decode": [
        (HOPPER, {"bytes": 2, "D": 128}, dict(BN=64, PROGRAMS=1024, num_warps=4, num_stages=3)),
        ("sm_80", {"bytes": 2, "D": 128}, dict(BN=64, PROGRAMS=1024, num_warps=4, num_stages=3)),
        (CONSUMER, {"bytes": 2, "D": 128}, dict(BN=64, PROGRAMS=1024, num_warps=4, num_stages=2)),
        (HOPPER, {"bytes": 2}, dict(BN=64, PROGRAMS=1024, num_warps=4, num_stages=2)),
        (ALL, {}, dict(BN=32, PROGRAMS=1024, num_warps=4, num_stages=2)),
        ("interpret", {}, dict(BN=16, PROGRAMS=8, num_warps=4, num_stages=1)),
    ],
    "paged_combine": [
        (ALL, {}, dict(BS=16, num_warps=4, num_stages=1)),
        ("interpret", {}, dict(BS=2, num_warps=4, num_stages=1)),
    ],
}
# fmt: on

given = {}  # op -> limits of the row that was taken last; `bench --tune` asks which row it tunes


def arch_of(x):
    """The table's name for a tensor's device: "sm_90", or "interpret" for a CPU tensor."""
    if x.device.type != "cuda":
        return "interpret"
    major, minor = torch.cuda.get_device_capability(x.device)
    name = f"sm_{major}{minor}"
    if name in SHARED:
        return name
    if major == 10:  # B300 is B200's kin; everything else unknown gets the frugal tiles
        return "sm_100"
    return "sm_120" if major >= 12 else "sm_89"


def choices(op, arch):
    """All rows of an operation on an architecture: list of (limits, values)."""
    return [(limits, values) for archs, limits, values in TILES[op] if arch in archs.split()]


def tile(op, where, **shape):
    """The values for this shape. where: a tensor (its device and dtype decide) or "sm_90" etc.

    >>> TILES["example"] = [("sm_90", {"D": 64}, {"BM": 128}), ("sm_90", {}, {"BM": 64})]
    >>> tile("example", "sm_90", D=64), tile("example", "sm_90", D=128)
    ({'BM': 128}, {'BM': 64})
    >>> del TILES["example"]
    """
    if isinstance(where, torch.Tensor):
        shape.setdefault("bytes", where.element_size())
        where = arch_of(where)
    for limits, values in choices(op, where):
        if all(shape.get(name, 0) <= limit for name, limit in limits.items()):
            given[op] = limits
            return dict(values)
    raise ValueError(f"no tile for {op} on {where} with {shape}")


# What a kernel's argument is, by its name. What is not named here is a stride, if its name has an
# underscore (divisible by 16, as in real launches), else a tensor of the inputs' type.
TYPES = {
    "i32": "B T N V splits capacity first width",
    "i32:16": "H C",
    "fp32": "scale",
    "*i32": "cu_seqlens seq_lens block_tables words",
    "*i64": "targets stream position positions slots ids",
    "*fp32": "tops totals moments chosen scores logits logp entropy grad_logp grad_entropy "
    "temperature lse delta part part_lse inverse dweight cos sin",
    "*": "k_cache v_cache q_out k_out v_out grad_y grad_s",
}
TYPE_OF = {name: kind for kind, names in TYPES.items() for name in names.split()}


def aot_case(name, function, values, kind="bf16", cores=False, types=(), **shape):
    """A kernel for `kernels/check.py` to compile: name, function, signature, constexprs, options,
    and whether it must use tensor cores.

    values: a row of the table; kind: the inputs' type; types: arguments that `TYPES` has wrong;
    shape: the constexprs that are no choice (more than the kernel has may be given).
    """
    names, given = function.arg_names, {**shape, **values}
    signature = {name: TYPE_OF.get(name, "i32:16" if "_" in name else "*") for name in names}
    signature = {name: f"*{kind}" if of == "*" else of for name, of in signature.items()}
    constexprs = {name: given[name] for name in names if name in given}
    options = {option: values[option] for option in ("num_warps", "num_stages")}
    return name, function, signature | dict(types), constexprs, options, cores
