"""Launches at sizes too large to run here: grid limits, and what Python numbers become."""

import importlib

import pytest
import torch
from triton.runtime.jit import mangle_type

OPS = "linear_logprob", "sampling_head", "rms_norm", "swiglu_act", "rope_cache"

N = 70_000  # more rows than a grid's second and third dimension may have (65,535)


class Recorder:
    """Stands in for a kernel and keeps the grids it was launched with."""

    def __init__(self, grids):
        self.grids = grids

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **kwargs: None


def run(name, op):
    x = torch.zeros(N, 8, requires_grad=True)
    rows = torch.zeros(N, dtype=torch.int64)
    if name == "linear_logprob":
        logp, entropy = op.logprob(x, torch.zeros(40, 8), rows, impl="triton")
        (logp + entropy).sum().backward()
    elif name == "sampling_head":
        op.sample(x.detach(), torch.zeros(40, 8), torch.ones(N), rows, rows, impl="triton")
    elif name == "rms_norm":
        op.rms_norm(x, torch.ones(8), 1e-6, impl="triton").sum().backward()
    elif name == "swiglu_act":
        op.swiglu(x, x, impl="triton").sum().backward()
    else:
        heads, table = x.view(N, 1, 8), torch.zeros(2, 4)
        op.rope(heads, heads, table, table, rows, impl="triton")[0].sum().backward()


@pytest.mark.parametrize("name", OPS)
def test_many_rows_fit_the_grid(name, monkeypatch):
    op = importlib.import_module(f"kernels.{name}")  # `kernels.rms_norm` itself is the function
    grids = []
    for kernel in vars(op).copy():
        if kernel.endswith("_kernel"):
            monkeypatch.setattr(op, kernel, Recorder(grids))
    run(name, op)
    assert grids
    for grid in grids:
        assert grid[0] < 2**31 and all(size <= 65_535 for size in grid[1:])


def test_python_floats_arrive_as_fp32():
    """In fp64 each logit would cost a double-precision product: 64 times slower on some GPUs."""
    assert mangle_type(0.7) == "fp32"
