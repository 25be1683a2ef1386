"""`python -m kernels.bench --tune`: find better tiles by measuring, and write them to tiles.py.

For each kernel and each row of its table that the bench's shapes reach, start from the row's
values and change one of them at a time, keeping what is faster, until nothing is (coordinate
descent: some tens of trials where the full grid has thousands). A candidate must give the outputs
of the shipped tile, else it is not taken. What won by more than 2% is written to tiles.py as a row
for this architecture, ahead of the others, with the device's name above it.
"""

import json
import re
import time
from math import inf
from pathlib import Path

import torch

from kernels import tiles
from kernels.bench.cases import cases
from kernels.bench.measure import DTYPES, TIMERS, first_line, percentiles
from kernels.dispatch import TOLERANCE, difference

WORTH = 0.98  # a new tile must take less than this share of the old one's time


def neighbours(values):
    """All that differ from `values` in one place: halves and doubles, a stage more or less.

    >>> [n["BM"] for n in neighbours({"BM": 64, "num_stages": 2})]
    [32, 128, 64, 64]
    """
    for name, value in values.items():
        if isinstance(value, bool):
            yield values | {name: not value}
            continue
        most = 16 if name == "num_warps" else inf
        others = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
        yield from (values | {name: other} for other in others if 1 <= other <= most)


def descend(start, time_of, deadline=inf):
    """Coordinate descent: (best values, their time, number tried). time_of(values): inf if bad.

    >>> descend({"BM": 16}, lambda v: abs(v["BM"] - 128) + 1.0)
    ({'BM': 128}, 1.0, 6)
    """
    best, fastest, tried, todo = start, inf, [], [start]
    while todo and time.time() < deadline:
        values = todo.pop(0)
        if values not in tried:
            tried.append(values)
            spent = time_of(values)
            if spent < fastest:
                best, fastest, todo = values, spent, list(neighbours(values))
    return best, fastest, len(tried)


def rewrite(source, op, limits, arch, values, note):
    """tiles.py's text with this row first in op's list; a row tuned before for the same goes."""
    before, opening, rest = source.partition(f'    "{op}": [')
    if not opening:
        raise ValueError(f"tiles.py has no list for {op}")
    rows, closing, after = rest.partition("],\n")
    key = f'\n        ("{arch}", {json.dumps(limits)},\n'
    rows = re.sub(rf"\n        # .*{re.escape(key)}         dict\(.*\)\),", "", rows)
    inside = ", ".join(f"{name}={value!r}" for name, value in values.items())
    row = f"\n        # {note}{key}         dict({inside})),"
    return before + opening + row + rows + closing + after


def kernel_call(case, device):
    """Our kernel at a case, on the same inputs each time."""
    return case.calls["triton"](*case.inputs(device, DTYPES[device]))


def reached(op, device):
    """{(table entry, its row's limits as JSON): the largest case that takes this row}.

    A table entry that both directions take counts as the forward one's.
    """
    found = {}
    listed = [case for case in cases(op, small=device == "cpu") if "+" not in case.phase]
    for case in sorted(listed, key=lambda case: (case.phase == "forward", case.flops + case.bytes)):
        try:
            call = kernel_call(case, device)
            tiles.given.clear()  # of what the forward pass took, where the backward one is timed
            call()
        except Exception as error:
            print(f"{case.name}: {first_line(error)}")
            continue
        found |= {(entry, json.dumps(limits)): case for entry, limits in tiles.given.items()}
    return found


def tune_row(entry, limits, arch, case, seconds, deadline, device):
    """Tune one row at a case: (best values, microseconds before and after, number tried)."""
    shipped = tiles.TILES[entry]
    start = next(values for own, values in tiles.choices(entry, arch) if own == limits)
    call = kernel_call(case, device)

    def outputs():
        result = call()
        result = result if isinstance(result, tuple | list) else (result,)
        return [x.detach().clone() for x in result if x.is_floating_point()]

    def time_of(values):
        tiles.TILES[entry] = [(arch, limits, values), *shipped]
        try:
            if difference(outputs(), expected, TOLERANCE[DTYPES[device]]):
                return inf
            times, _, _ = TIMERS[device](call, seconds, case.phase == "forward")
        except Exception:  # too much shared memory, a shape the compiler refuses
            return inf
        finally:
            tiles.TILES[entry] = shipped
        spent = percentiles(times)["p50"]
        print(f"    {spent:>10.1f} us  {values}", flush=True)
        return spent

    expected = outputs()
    before = time_of(start)
    best, after, tried = descend(start, time_of, deadline)
    return best, before, after, tried


def tune(ops, seconds, deadline, device="cuda", path=tiles.__file__):
    """Tune each table entry that these operations reach; rewrites tiles.py after each row."""
    arch, path = tiles.arch_of(torch.empty(0, device=device)), Path(path)
    machine = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    for op in ops:
        for (entry, limits), case in reached(op, device).items():
            if time.time() > deadline:
                print(f"{entry}: out of time")
                return
            print(f"{entry} {limits} at {case.name}", flush=True)
            row = entry, json.loads(limits), arch
            best, before, after, tried = tune_row(*row, case, seconds, deadline, device)
            if not after < WORTH * before:
                print(f"  kept, {tried} tried")
                continue
            note = f"{machine}: {after:.0f} us, was {before:.0f}"
            path.write_text(rewrite(path.read_text(), *row, best, note))
            tiles.TILES[entry].insert(0, (arch, row[1], best))
            print(f"  {before:.1f} -> {after:.1f} us, {tried} tried: {best}")
    print("run python -m kernels.check and the tests: a faster tile may spill elsewhere")
