"""The trial launches that `impl="auto"` rests on: they agree where all is well."""

import importlib
import warnings

import pytest
import torch

from kernels import dispatch

PROBES = [
    ("linear_logprob", "probe"),
    ("sampling_head", "probe"),
    ("rms_norm", "probe"),
    ("swiglu_act", "probe"),
    ("rope_cache", "probe"),
    ("rope_cache", "probe_write"),
]
ALL = [*PROBES, *(("flash_attention", "probe"), ("paged_decode", "probe_decode"))]
ALL += [("paged_decode", "probe_prefill")]


def agree(module, name, device, dtype):
    """A failed trial warns; make that an error, so that its reason is seen."""
    probe = getattr(importlib.import_module(f"kernels.{module}"), name)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*failed its trial")
        return dispatch.trial(module, torch.device(device), dtype, probe)


@pytest.mark.parametrize("module, name", PROBES)
def test_in_the_interpreter(module, name):
    assert agree(module, name, "cpu", torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("module, name", ALL)
def test_on_a_gpu(module, name, dtype):
    assert agree(module, name, "cuda", dtype)
