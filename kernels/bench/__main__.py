"""How fast the kernels are, beside what the hardware can do and what others do on it.

    python -m kernels.bench                         everything, under 10 minutes on one GPU
    python -m kernels.bench attention logprob       some operations
    python -m kernels.bench --json F --plot F       results as they come; a picture at the end
    python -m kernels.bench --quick                 Qwen2.5-7B only, fewer repetitions
    python -m kernels.bench --tune [op ...]         try tiles, rewrite the table in tiles.py

First the ceilings, in the same run: bytes a second of a large copy, operations a second of a large
bf16 product. Then each operation at shapes of Qwen2.5-0.5B to 32B: 20th, 50th and 80th percentile
of the time, the share of the ceiling that its least bytes or operations come to at the median, and
the peak of memory beyond the inputs. `ratio` is a peer's median over ours: 2.0 means that ours
takes half the time. The last line of stdout is all results as one JSON object.

Times are Triton's `do_bench`, which clears the L2 cache before each call. Calls below a millisecond
are captured in a CUDA graph where that is possible (`graph`), else launching from Python would be
measured. A kernel that crashes or hangs costs its own line and no other. Without a GPU the PyTorch
references are measured at small shapes, which says nothing about the kernels.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import torch

from kernels.bench.cases import OPS
from kernels.bench.measure import ceilings, plan, rows
from kernels.bench.peers import versions
from kernels.bench.plot import plot
from kernels.bench.tune import tune
from kernels.triton_compat import HAVE_TRITON, triton


def describe(device):
    """What a reader of the numbers must know about the machine."""
    name = platform.processor() or platform.machine()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else name,
        "torch": torch.__version__,
        "triton": triton.__version__ if HAVE_TRITON else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "peers": versions(),
        "date": time.strftime("%Y-%m-%d"),
    }


def line(row):
    """A row for people."""
    text = f"{row['op']:<16}{row['phase']:<17}{row['model']:<7}{row['shape']:<44}{row['impl']:<18}"
    if "us" not in row:
        return text + (row.get("error") or f"missing: {row['missing']}")
    us = row["us"]
    rate = f"{row['gbs']:>8.0f} GB/s" if row["bound"] == "copy" else f"{row['tflops']:>8.1f} TF/s"
    text += f"{us['p50']:>10.1f} us ({us['p20']:.1f} to {us['p80']:.1f}){rate}{row['share']:>7.1%}"
    text += "" if row["peak_mib"] is None else f"{row['peak_mib']:>9.0f} MiB"
    return text + (f"  x{row['ratio']:.2f}" if "ratio" in row else "")


def parse(argv):
    """The command line."""
    parser = argparse.ArgumentParser("python -m kernels.bench", description=__doc__.split("\n")[0])
    add = parser.add_argument
    every = [*OPS, "all"]
    add("ops", nargs="*", metavar="op", choices=every, default="all", help=", ".join(every))
    add("--json", type=Path, help="write all results to this file, again after each")
    add("--plot", type=Path, help="write a picture (png, svg or pdf)")
    add("--quick", action="store_true", help="Qwen2.5-7B only, 0.1 s a measurement")
    add("--tune", action="store_true", help="try tiles, rewrite the table in tiles.py")
    add("--minutes", type=float, default=9.0, help="start nothing new after these")
    add("--seconds", type=float, help="of a measurement (0.3; 0.1 with --quick)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    deadline = time.time() + 60 * args.minutes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seconds = args.seconds or (0.1 if args.quick or device == "cpu" else 0.3)
    ops = OPS if "all" in args.ops else args.ops
    if args.tune:
        if device == "cpu":
            sys.exit("kernels.bench --tune: measures on a GPU, and there is none here")
        return tune(ops, seconds, deadline)

    for path in filter(None, (args.json, args.plot)):
        path.parent.mkdir(parents=True, exist_ok=True)
    machine = describe(device)
    print(f"{machine['device']}, torch {machine['torch']}, triton {machine['triton']}")
    missing = ", ".join(name for name, version in machine["peers"].items() if version is None)
    print(f"peers missing: {missing or 'none'}")
    if device == "cpu":
        print("no GPU: measuring the PyTorch references in fp32 at small shapes, no kernel")
    ceiling = ceilings(device, seconds)
    torch.cuda.empty_cache()  # the memory is for the child
    copy, matmul = ceiling["copy"] / 1e9, ceiling["matmul"] / 1e12
    print(f"ceilings: copy {copy:,.0f} GB/s, product {matmul:,.2f} TFLOP/s\n", flush=True)
    results = {"machine": machine, "ceilings": ceiling, "rows": []}
    medians = {}  # of ours, by case
    for row in rows(plan(ops, device, args.quick), deadline, device, seconds, ceiling):
        case = row["op"], row["phase"], row["model"], row["shape"]
        if "us" in row and row["impl"] == "triton":
            medians[case] = row["us"]["p50"]
        elif "us" in row and case in medians:
            row["ratio"] = round(row["us"]["p50"] / medians[case], 3)
        results["rows"].append(row)
        print(line(row), flush=True)
        if args.json:  # beside it and then renamed: a reader never finds half a file
            beside = args.json.with_name(f".{args.json.name}.part")
            beside.write_text(json.dumps(results, indent=1))
            beside.replace(args.json)
    if args.plot:
        plot(results, args.plot)
    print(json.dumps(results))


if __name__ == "__main__":
    sys.exit(main())
