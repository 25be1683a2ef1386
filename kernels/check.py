"""Compile every shipped tile choice ahead of time, without a GPU, and fail over budget.

    python -m kernels.check                  all architectures
    python -m kernels.check --arch sm_90     one
    python -m kernels.check --quick          two architectures, one tile of each kernel

What a kernel costs is decided when it is compiled: registers a thread, bytes spilled to the stack
(slow memory that looks like a variable), shared memory a program, and whether the products became
tensor-core instructions. All of it is in the compiled file, so a tile that can not launch, or that
spills, is found here and not on somebody's GPU. What it does not tell is speed.

The last column is the product's instruction: wgmma (sm_90), tcgen05 (sm_100), mma (the others).
Exits 1 if a tile spills, asks for more shared memory than its architecture has, or misses tensor
cores that it is meant to use.
"""

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from kernels.tiles import ARCHITECTURES, SHARED
from kernels.triton_compat import HAVE_TRITON, INTERPRET, triton

MODULES = (
    "linear_logprob", "sampling_head", "flash_attention", "flash_backward", "paged_decode",
    "rms_norm", "rope_cache", "swiglu_act",
)  # fmt: skip
HEADER = ("kernel", "tile", "arch", "registers", "stack", "shared", "product")


def cases(arch):
    """All kernels' (name, function, signature, constexprs, options, needs_tensor_cores)."""
    for name in MODULES:
        yield from importlib.import_module(f"kernels.{name}").aot_cases(arch)


def compile_case(arch, function, signature, constexprs, options):
    """The compiled kernel.

    signature: argument -> "*bf16", "fp32", "i32", or "i32:16" for an integer divisible by 16;
    it may name more arguments than the function has.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: signature.get(name, "constexpr") for name in function.arg_names}
    types |= dict.fromkeys(constexprs, "constexpr")
    # A real launch finds pointers and most strides divisible by 16, and compiles for that.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(types.values())
        if kind.startswith("*") or kind.endswith(":16")
    }
    types = {name: kind.removesuffix(":16") for name, kind in types.items()}
    source = ASTSource(function, types, constexprs, aligned)
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return triton.compile(source, target=target, options=options)


def resources(cubin):
    """Registers a thread and stack bytes, from the compiled file."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.check_output([tool, "--dump-resource-usage", file.name], text=True)
    return tuple(map(int, re.search(r"REG:(\d+)\s+STACK:(\d+)", text).groups()))


def product(ptx):
    """Which instruction does the matrix products."""
    patterns = {"tcgen05": r"tcgen05\.mma", "wgmma": r"wgmma\.mma_async", "mma": r"\bmma\.sync"}
    return next((name for name, pattern in patterns.items() if re.search(pattern, ptx)), "-")


def check(arch, name, function, signature, constexprs, options, needs_tensor_cores):
    """One row of the table, and what is wrong with it (list of words)."""
    shape = {k: v for k, v in constexprs.items() if k.isupper() and not isinstance(v, float)}
    tile = " ".join(f"{k}={v}" for k, v in shape.items())
    tile += f" w{options['num_warps']} s{options['num_stages']}"
    try:
        compiled = compile_case(arch, function, signature, constexprs, options)
    except Exception as error:
        said = (str(error).strip() or type(error).__name__).splitlines()
        return (name, tile, arch, *"----"), [f"does not compile: {said[-1]}"]
    registers, stack = resources(compiled.asm["cubin"])
    shared, kind = compiled.metadata.shared, product(compiled.asm["ptx"])
    problems = {
        f"spills: {stack} bytes of stack": stack,
        f"shared memory {shared} over {SHARED[arch]}": shared > SHARED[arch],
        "no tensor-core instruction": needs_tensor_cores and kind == "-",
    }
    row = name, tile, arch, registers, stack, shared, kind
    return row, [words for words, wrong in problems.items() if wrong]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=ARCHITECTURES, action="append", help="default: all")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--quick", action="store_true", help="sm_90 and sm_120, one tile a kernel")
    args = parser.parse_args()
    if not HAVE_TRITON:
        sys.exit("kernels.check: triton is not installed")
    if INTERPRET:
        sys.exit("kernels.check: unset TRITON_INTERPRET; interpreted kernels can't be compiled")
    archs = args.arch or (("sm_90", "sm_120") if args.quick else ARCHITECTURES)
    known = sorted({name for arch in archs for name, *_ in cases(arch)})
    if not any(args.only in name for name in known):
        sys.exit(f"kernels.check: --only {args.only}: no such kernel among {', '.join(known)}")
    failed = rows = 0
    print("| " + " | ".join(HEADER) + " |\n" + "|---" * len(HEADER) + "|")
    for arch in archs:
        seen = set()
        for name, function, *case in cases(arch):
            if args.only not in name or (args.quick and function in seen):
                continue
            seen.add(function)
            row, problems = check(arch, name, function, *case)
            rows += 1
            failed += bool(problems)
            print("| " + " | ".join(map(str, row)) + " |", *problems, sep="  ", flush=True)
    print(f"\n{rows} tiles, {failed} over budget", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
