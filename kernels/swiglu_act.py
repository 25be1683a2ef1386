"""The gated activation of the feed-forward layer: silu(gate) * up."""

import torch.nn.functional as F

from kernels.dispatch import choose


def reference(gate, up):
    """silu(x) = x * sigmoid(x)."""
    return F.silu(gate) * up


def swiglu(gate, up, impl="auto"):
    """gate and up [..., C] -> silu(gate) * up [..., C]. Differentiable in both."""
    choose(impl)
    return reference(gate, up)
