"""Which implementation runs: the caller's `impl=`, else NANORRM_IMPL, else the device decides.

So far every operation has its PyTorch reference only, so "auto" is "torch" on every device.
"""

import os

IMPLEMENTATIONS = ("auto", "torch")


def choose(impl):
    """The name of the implementation to run: "torch".

    impl: what the caller asked for; "auto" defers to the environment variable NANORRM_IMPL.
    Raises ValueError for a name that does not exist.
    """
    if impl == "auto":
        impl = os.environ.get("NANORRM_IMPL", "auto")
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    return "torch"
