"""`python -m kernels.bench --tune`: find better tiles by measuring, and write them to tiles.py.

For each kernel and each row of its table that the bench's shapes reach, start from the row's
values and change one of them at a time, keeping what is faster, until nothing is (coordinate
descent: some tens of trials where the full grid has thousands). A candidate must give the outputs
of the shipped tile, else it is not taken. What won by more than 2% is written to tiles.py as a row
for this architecture, ahead of the others, with the device's name above it.
"""

import time
from pathlib import Path

import torch

from kernels import tiles
from kernels.bench.cases import cases
from kernels.bench.measure import percentiles, time_cuda

# Table entry -> the operation and phase that runs its kernel.
MEASURED_BY = {
    "attention_forward": ("attention", "forward"),
    "attention_dkdv": ("attention", "backward"),
    "attention_dq": ("attention", "backward"),
    "paged_decode": ("paged_attention", "forward"),
    "paged_combine": ("paged_attention", "forward"),
    "paged_prefill": ("paged_prefill", "forward"),
    "logprob_forward": ("logprob", "forward"),
    "logprob_backward": ("logprob", "backward"),
    "sample": ("sample", "forward"),
    "rms_norm_forward": ("rms_norm", "forward"),
    "rms_norm_backward": ("rms_norm", "backward"),
    "rope": ("rope_write", "forward"),
    "swiglu": ("swiglu", "forward"),
}
WORTH = 0.98  # a new tile must take at most this share of the old one's time


def neighbours(values):
    """All that differ from `values` in one place: halves and doubles, a stage more or less.

    >>> [n["BM"] for n in neighbours({"BM": 64, "num_stages": 2})]
    [32, 128, 64, 64]
    """
    for name, value in values.items():
        if isinstance(value, bool):
            others = [not value]
        elif name == "num_stages":
            others = [value - 1, value + 1]
        elif name == "num_warps":
            others = [n for n in (value // 2, value * 2) if 1 <= n <= 16]
        else:
            others = [value // 2, value * 2]
        for other in others:
            if other is False or other >= 1:
                yield {**values, name: other}


def descend(start, time_of, deadline=float("inf")):
    """Coordinate descent: (best values, its time, number tried). time_of(values) -> None if bad.

    >>> best, t, tried = descend({"BM": 16}, lambda v: abs(v["BM"] - 128) + 1.0)
    >>> best, t
    ({'BM': 128}, 1.0)
    """
    best, fastest = start, time_of(start)
    seen = [start]
    if fastest is None:
        return start, None, 1
    moved = True
    while moved:
        moved = False
        for candidate in neighbours(best):
            if candidate in seen or time.time() > deadline:
                continue
            seen.append(candidate)
            spent = time_of(candidate)
            if spent is not None and spent < fastest:
                best, fastest, moved = candidate, spent, True
                break
    return best, fastest, len(seen)


def rewrite(source, op, arch, limits, values, note):
    """tiles.py's text with this row first in op's list; an older row for the same is dropped."""
    opening = f'    "{op}": [\n'
    if opening not in source:
        raise ValueError(f"tiles.py has no list for {op}")
    begin = source.index(opening) + len(opening)
    end = source.index("    ],\n", begin)
    bounds = ", ".join(f'"{name}": {value!r}' for name, value in limits.items())
    key = f'        ("{arch}", {{{bounds}}},'
    inside = ", ".join(f"{name}={value!r}" for name, value in values.items())
    kept, entry = [], []
    for line in source[begin:end].splitlines(keepends=True):
        entry.append(line)
        if line.lstrip().startswith("#") or not line.rstrip().endswith("),"):
            continue  # an entry goes on, or has not begun
        if not any(text.startswith(key) for text in entry):
            kept += entry
        entry = []
    row = f"        # {note}\n{key}\n         dict({inside})),\n"
    return source[:begin] + row + "".join(kept + entry) + source[end:]


def outputs(result):
    """The tensors of a call's result, in fp32."""
    result = result if isinstance(result, tuple | list) else (result,)
    return [x.detach().float().clone() for x in result if x.is_floating_point()]


def same(found, expected):
    """Do two tiles' outputs agree, but for the order of sums?"""
    return all(
        torch.allclose(a, b, rtol=5e-2, atol=2e-2 * b.abs().max().item())
        for a, b in zip(found, expected, strict=True)
    )


def tune_row(op, arch, limits, case, seconds, deadline):
    """Best values for one row at one case, the shipped ones, and their times."""
    shipped = list(tiles.TILES[op])
    start = next(
        values for names, own, values in shipped if own == limits and arch in names.split()
    )
    torch.manual_seed(0)
    inputs = case.inputs("cuda", torch.bfloat16)
    torch.manual_seed(1)
    call = case.calls["triton"](*inputs)
    expected = outputs(call())

    def time_of(values):
        tiles.TILES[op] = [(arch, limits, values), *shipped]
        try:
            if not same(outputs(call()), expected):
                return None
            times, _ = time_cuda(call, seconds, graph=case.phase == "forward")
        except Exception:  # too much shared memory, a shape the compiler refuses
            return None
        spent = percentiles(times)["p50"]
        print(f"    {spent:>10.1f} us  {values}", flush=True)
        return spent

    try:
        first = time_of(dict(start))
        best, fastest, tried = descend(dict(start), time_of, deadline)
    finally:
        tiles.TILES[op] = shipped
    return best, first, fastest, tried


def tune(ops, seconds, deadline):
    """Tune every table entry of these operations; rewrites tiles.py after each."""
    path = Path(tiles.__file__)
    arch, device = tiles.arch_of(torch.empty(0, device="cuda")), torch.cuda.get_device_name()
    for op, (public, phase) in MEASURED_BY.items():
        if public not in ops or op not in tiles.TILES:
            continue
        largest = {}  # a row's limits -> the largest case that takes the row
        for case in cases(public):
            if case.phase != phase:
                continue
            try:
                torch.manual_seed(0)
                case.calls["triton"](*case.inputs("cuda", torch.bfloat16))()
            except Exception as error:
                print(f"{op}: {case.name}: {error}".splitlines()[0])
                continue
            limits = tiles.given.get(op)
            if limits is None:
                continue
            key = tuple(limits.items())
            size = case.flops + case.bytes
            if key not in largest or size > largest[key].flops + largest[key].bytes:
                largest[key] = case
        for key, case in largest.items():
            if time.time() > deadline:
                print(f"{op}: out of time")
                return 0
            print(f"{op} {dict(key)} at {case.name}", flush=True)
            best, first, fastest, tried = tune_row(op, arch, dict(key), case, seconds, deadline)
            if first is None or fastest > WORTH * first:
                print(f"  kept, {tried} tried")
                continue
            note = f"{device}: {fastest:.0f} us, was {first:.0f}"
            path.write_text(rewrite(path.read_text(), op, arch, dict(key), best, note))
            tiles.TILES[op].insert(0, (arch, dict(key), best))
            print(f"  {first:.1f} -> {fastest:.1f} us, {tried} tried: {best}")
    print("run python -m kernels.check and the tests: a faster tile may spill elsewhere")
    return 0
