"""Triton where there is one, else stand-ins, so that every file here imports on any machine.

`triton` and `tl` are the modules, or an object whose every attribute is that object again: enough
for `x: tl.constexpr` in a signature, useless for anything else. With TRITON_INTERPRET=1 (set before
Python starts) kernels run on CPU tensors, one program after another in numpy: slow, and all that
is needed to test them. (The interpreter of triton 3.6 wants numpy below 2.4.)
"""

try:
    import triton
    import triton.language as tl

    HAVE_TRITON = True
    jit = triton.jit
    INTERPRET = bool(triton.knobs.runtime.interpret)
except ImportError:  # a Mac, or a torch without triton

    class Absent:
        """Anything may be asked of it, and nothing comes of it."""

        constexpr = staticmethod(lambda value: value)

        def __getattr__(self, name):
            if name.startswith("__"):  # copy, inspect and doctest ask for these: be plain there
                raise AttributeError(name)
            return self

    HAVE_TRITON = INTERPRET = False
    triton = tl = Absent()
    jit = tl.constexpr  # leaves the function as it is; nobody calls it

__all__ = ["HAVE_TRITON", "INTERPRET", "jit", "tl", "triton"]
