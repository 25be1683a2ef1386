"""Root-mean-square norm, with the residual addition that precedes it in every transformer block.

s = x + residual            y = s / sqrt(mean(s^2) + eps) * weight
"""

import torch

from kernels.dispatch import choose


def reference(x, weight, eps, residual=None):
    """Sum in the input's dtype (it is the residual stream), statistics in fp32."""
    if residual is not None:
        x = residual = x + residual
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    y = normed.to(x.dtype) * weight
    return y if residual is None else (y, residual)


def rms_norm(x, weight, eps, residual=None, impl="auto"):
    """x [..., C], weight [C] -> y [..., C]; with residual [..., C]: (y, x + residual).

    Differentiable in x, weight and residual.
    """
    choose(impl)
    return reference(x, weight, eps, residual)
