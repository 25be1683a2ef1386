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
HOPPER, AMPERE, CONSUMER = "sm_90 sm_100", "sm_80", "sm_89 sm_120"

TILES = {}


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
            return dict(values)
    raise ValueError(f"no tile for {op} on {where} with {shape}")
