"""What the kernel tests share: random inputs, poisoned memory, and the rule for being right."""

import pytest
import torch

import kernels.dispatch
from kernels.tiles import TILES
from kernels.triton_compat import HAVE_TRITON

if not HAVE_TRITON:
    collect_ignore_glob = ["test_*.py"]


def assert_close(ours, torch_own, truth, floor=2e-6):
    """Right = error against the fp64 truth at most twice PyTorch's own at this dtype, or < floor.

    Errors are taken relative to the truth's largest value; floor is on that scale. A NaN fails.
    """
    assert ours.shape == truth.shape, (ours.shape, truth.shape)
    size = truth.abs().max().item() + 1e-30
    error = (ours.double() - truth).abs().max().item() / size
    own = (torch_own.double() - truth).abs().max().item() / size
    assert error <= max(2 * own, floor), f"error {error:.2e}, PyTorch's own {own:.2e}"


@pytest.fixture
def close():
    return assert_close


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory from torch.empty comes filled with NaN: what a kernel fails to write shows up."""

    def poisoned(make):
        def wrapper(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(-(2**30))

        return wrapper

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    kernels.dispatch.trials.clear()


@pytest.fixture
def pointers(monkeypatch):
    """Take the path of GPUs without TMA: tiles by pointers and masks instead of descriptors."""
    for op in ("logprob_forward", "logprob_backward", "sample"):
        rows = [(archs, limits, {**values, "TMA": False}) for archs, limits, values in TILES[op]]
        monkeypatch.setitem(TILES, op, rows)
