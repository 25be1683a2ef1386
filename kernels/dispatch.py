"""Which implementation runs: the caller's `impl=`, else NANORRM_IMPL, else the device decides.

"torch" is the reference, "triton" our kernels, "flash" the flash-attn package (attention only).
"auto" takes the reference on a CPU. On a GPU it takes Triton, but only after a trial: the first
time an operation meets a device and a dtype, its `probe` runs kernel and reference on a small
input, forward and backward. If they differ or the kernel does not launch, one warning says so and
the reference runs from then on. (One chosen because its import worked crashes later, or worse.)
"""

import os
import warnings

import torch

from kernels.triton_compat import HAVE_TRITON, INTERPRET

IMPLEMENTATIONS = ("auto", "torch", "triton", "flash")
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}

trials = {}  # (op, device, dtype) -> did kernel and reference agree?


def choose(impl, op=None, *tensors, probe=None):
    """The name of the implementation to run: "torch", "triton" or "flash".

    impl: what the caller asked for; "auto" defers to the environment variable NANORRM_IMPL.
    op: the operation's name, for messages; tensors: its inputs, of which the first decides.
    probe(device, dtype) runs the kernel at a small size and returns (ours, reference's): two
    sequences of tensors to compare.
    Raises ValueError for a name that does not exist and RuntimeError where it can not run.
    """
    if impl == "auto":
        impl = os.environ.get("NANORRM_IMPL", "auto")
        if impl == "flash" and op != "attention":
            impl = "auto"  # NANORRM_IMPL=flash means attention and leaves the others alone
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "flash" and op != "attention":
        raise ValueError("impl='flash' exists for attention only")
    if impl == "triton" and tensors:
        require_triton(op, tensors[0])
    if impl != "auto":
        return impl
    if not tensors or probe is None or not HAVE_TRITON:
        return "torch"
    x = tensors[0]
    if x.device.type != "cuda" or x.dtype not in TOLERANCE:
        return "torch"
    key = (op, x.device, x.dtype)
    if key not in trials:
        trials[key] = trial(op, x.device, x.dtype, probe)
    return "triton" if trials[key] else "torch"


def require_triton(op, x):
    """Say why impl="triton" can not run on x, and what to do."""
    on_gpu, problem = x.device.type == "cuda", None
    if not HAVE_TRITON:
        problem = "triton is not installed; use impl='torch'"
    elif not on_gpu and not INTERPRET:
        problem = (
            f"impl='triton' needs a CUDA tensor, got {x.device.type}; use impl='torch', or set "
            "TRITON_INTERPRET=1 before Python starts to run kernels slowly on a CPU"
        )
    elif not on_gpu and x.dtype == torch.bfloat16:
        problem = "Triton's interpreter gets bfloat16 wrong; use float16 or float32 there"
    elif x.dtype not in TOLERANCE:
        problem = f"no kernel for {x.dtype}; use impl='torch'"
    if problem:
        raise RuntimeError(f"{op}: {problem}")


def trial(op, device, dtype, probe):
    """Run the probe; True if kernel and reference agree, else warn and return False."""
    try:
        with torch.enable_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            ours, theirs = probe(device, dtype)
        problem = difference(ours, theirs, TOLERANCE[dtype])
    except Exception as error:  # whatever a compiler or driver may throw
        problem = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    if problem:
        warnings.warn(
            f"{op}: the Triton kernel failed its trial on {device} in {dtype} ({problem}); "
            "using PyTorch",
            stacklevel=4,
        )
    return not problem


def both_ways(function, *args):
    """What a probe returns: function(*args) by the kernel and by the reference, each as a list of
    its outputs, then the gradients of those args that require one, under a random gradient."""
    leaves = [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]
    sides, above = [], []
    for impl in ("triton", "torch"):
        given = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
        found = function(*given, impl=impl)
        found = found if isinstance(found, tuple) else (found,)
        above = above or [torch.randn_like(x) for x in found]
        grads = torch.autograd.grad(found, leaves, above) if leaves else ()
        sides.append([*(x.detach() for x in found), *grads])
    return sides


def difference(ours, theirs, tolerance):
    """None if all pairs agree within tolerance of the reference's largest value, else what not."""
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a.shape != b.shape:
            return f"output {i} has shape {tuple(a.shape)}, the reference {tuple(b.shape)}"
        error = (a.double() - b.double()).abs().max().item()
        allowed = tolerance * max(b.double().abs().max().item(), 1e-2)
        if not error <= allowed:  # NaN is no agreement either
            return f"output {i} is off by {error:.2g}, {allowed:.2g} allowed"
    return None


def dense(x):
    """Kernels walk the last dimension without a stride: copy x where it has one."""
    return x if x.stride(-1) == 1 else x.contiguous()
