"""Which implementation is taken, and what is said when it can not be."""

import os
import subprocess
import sys

import pytest
import torch

from kernels import dispatch
from kernels.tiles import ARCHITECTURES, SHARED, TILES, arch_of, choices, tile

X = torch.randn(2, 2)


def test_cpu_is_torch():
    assert dispatch.choose("auto") == dispatch.choose("auto", "op", X, probe=None) == "torch"


def test_environment_decides_for_auto_only(monkeypatch):
    monkeypatch.setenv("NANORRM_IMPL", "triton")
    assert dispatch.choose("auto", "op", X) == "triton"
    assert dispatch.choose("torch", "op", X) == "torch"
    monkeypatch.setenv("NANORRM_IMPL", "flash")
    assert dispatch.choose("auto", "attention", X) == "flash"
    assert dispatch.choose("auto", "rms_norm", X) == "torch"


def test_unknown_names_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="is not one of"):
        dispatch.choose("cuda")
    with pytest.raises(ValueError, match="attention only"):
        dispatch.choose("flash", "rms_norm", X)
    monkeypatch.setenv("NANORRM_IMPL", "fast")
    with pytest.raises(ValueError, match="fast"):
        dispatch.choose("auto")


def test_triton_on_a_cpu_without_the_interpreter_says_what_to_do(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRET", False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        dispatch.choose("triton", "op", X)
    monkeypatch.setattr(dispatch, "HAVE_TRITON", False)
    with pytest.raises(RuntimeError, match="not installed"):
        dispatch.choose("triton", "op", X)


def test_the_interpreter_is_kept_from_bfloat16():
    """It computes tl.dot and sums of bfloat16 wrongly, and says nothing."""
    with pytest.raises(RuntimeError, match="bfloat16"):
        dispatch.choose("triton", "op", X.bfloat16())


def test_no_kernel_for_doubles():
    with pytest.raises(RuntimeError, match="float64"):
        dispatch.choose("triton", "op", X.double())


@pytest.mark.parametrize("broken", ["differs", "nan", "shape", "raises"])
def test_a_failed_trial_warns_once_and_takes_torch(broken):
    def probe(device, dtype):
        wrong = {"differs": X + 1, "nan": X * float("nan"), "shape": X[:1]}
        if broken == "raises":
            raise RuntimeError("no such instruction\nand more")
        return [X, wrong[broken]], [X, X]

    with pytest.warns(UserWarning, match="failed its trial"):
        assert not dispatch.trial("op", torch.device("cpu"), torch.float32, probe)


def test_a_trial_that_agrees_is_silent_and_leaves_the_random_state_alone(recwarn):
    before = torch.random.get_rng_state()

    def probe(device, dtype):
        x = torch.randn(3, device=device, dtype=dtype, requires_grad=True)
        (x * x).sum().backward()
        return [x.detach(), x.grad], [x.detach(), 2 * x.detach()]

    with torch.no_grad():
        assert dispatch.trial("op", torch.device("cpu"), torch.float32, probe)
    assert not recwarn.list
    assert torch.equal(before, torch.random.get_rng_state())


def test_everything_imports_and_runs_without_triton():
    """A Mac has no triton: hide it, import everything, run an operation."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import kernels, torch\n"
        "x = torch.randn(2, 4)\n"
        "print(kernels.rms_norm(x, torch.ones(4), 1e-6).shape)\n"
        "try: kernels.rms_norm(x, torch.ones(4), 1e-6, impl='triton')\n"
        "except RuntimeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch.Size([2, 4])" in done.stdout and "not installed" in done.stdout


def test_triton_without_a_gpu_or_interpreter_gives_one_clear_error():
    code = (
        "import kernels, torch\n"
        "try: kernels.rms_norm(torch.randn(2, 4), torch.ones(4), 1e-6, impl='triton')\n"
        "except RuntimeError as error: print(error)\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    )
    assert "needs a CUDA tensor" in done.stdout and "\n" not in done.stdout.strip()


def test_every_operation_has_a_tile_everywhere():
    """The last row of each architecture must have no limits, or some shape finds nothing."""
    for op in TILES:
        for arch in (*ARCHITECTURES, "interpret"):
            rows = choices(op, arch)
            assert rows, (op, arch)
            assert not rows[-1][0], (op, arch)
            for _, values in rows:
                assert {"num_warps", "num_stages"} <= set(values), (op, arch)


def test_tiles_of_a_tensor_and_of_a_name():
    assert arch_of(X) == "interpret"
    assert set(SHARED) == set(ARCHITECTURES)
    with pytest.raises(ValueError, match="no tile"):
        tile("logprob_forward", "sm_70")
