"""Kernels run in Triton's interpreter, which must be on before triton loads; not with `-m gpu`."""

import os
import re
import sys

import pytest
import torch

ON_GPU = torch.cuda.is_available() and re.search(r"(?<!not )\bgpu\b", " ".join(sys.argv[1:]))
if not ON_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    """`-m gpu` without a GPU skips and says so."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
