"""Compile every shipped tile choice ahead of time, without a GPU, and fail over budget.

    python -m kernels.check                  all architectures
    python -m kernels.check --arch sm_90     one
    python -m kernels.check --quick          two architectures, one tile of each kernel

What a kernel costs is decided when it is compiled: registers a thread, bytes spilled to the stack
(slow memory that looks like a variable), shared memory a program, and whether the products became
tensor-core instructions: wgmma (sm_90), tcgen05 (sm_100), mma (the others). So a tile that can not
launch, or that spills, is found here and not on somebody's GPU. What it does not tell is speed.

Exits 1 if a tile spills, asks for more shared memory than there is, or misses tensor cores.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

from kernels.tiles import ARCHITECTURES, SHARED
from kernels.triton_compat import HAVE_TRITON, INTERPRET, triton

MODULES = (
    "linear_logprob", "sampling_head", "flash_attention", "paged_decode", "rms_norm", "rope_cache",
    "swiglu_act",
)  # fmt: skip
HEADER = ("kernel", "tile", "arch", "registers", "stack", "shared", "product")
PRODUCTS = {"tcgen05": r"tcgen05\.mma", "wgmma": r"wgmma\.mma_async", "mma": r"\bmma\.sync"}


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
    shared, ptx = compiled.metadata.shared, compiled.asm["ptx"]
    kind = next((kind for kind, pattern in PRODUCTS.items() if re.search(pattern, ptx)), "-")
    problems = {
        f"spills: {stack} bytes of stack": stack,
        f"shared memory {shared} over {SHARED[arch]}": shared > SHARED[arch],
        "no tensor-core instruction": needs_tensor_cores and kind == "-",
    }
    wrong = [words for words, found in problems.items() if found]
    return (name, tile, arch, registers, stack, shared, kind), wrong


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
    sources = [import_module(f"kernels.{name}").aot_cases for name in MODULES]
    every = [(arch, *case) for arch in archs for source in sources for case in source(arch)]
    chosen = [case for case in every if args.only in case[1]]
    if not chosen:
        known = ", ".join(sorted({name for _, name, *_ in every}))
        sys.exit(f"kernels.check: --only {args.only}: no such kernel among {known}")
    if args.quick:  # a dict keeps the last it is given, so the first of each kernel
        chosen = {(case[0], case[2]): case for case in reversed(chosen)}.values()
    print("| " + " | ".join(HEADER) + " |\n" + "|---" * len(HEADER) + "|")
    failed = 0
    for case in chosen:
        row, problems = check(*case)
        failed += bool(problems)
        print("| " + " | ".join(map(str, row)) + " |", *problems, sep="  ", flush=True)
    print(f"\n{len(chosen)} tiles, {failed} over budget", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
