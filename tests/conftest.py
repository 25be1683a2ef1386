"""What the tests share: one thread, the shared data folder, and the shipped toy models.

The default run is the same everywhere: on the CPU, kernels in Triton's interpreter, which must be
on before triton loads. `pytest -m gpu` runs the gpu tests on the device, or skips them saying why.
"""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

ON_GPU = re.search(r"(?<!not )\bgpu\b", " ".join(sys.argv[1:]))
if not ON_GPU:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

from nanorrm.config import EngineConfig  # noqa: E402
from nanorrm.data import toy  # noqa: E402
from nanorrm.engine.engine import Engine  # noqa: E402


def pytest_collection_modifyitems(items):
    """`-m gpu` without a GPU skips and says so."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def data():
    """The folder of public data sets: NANORRM_DATA, else ../shared/data beside the repository."""
    folder = Path(os.environ.get("NANORRM_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder} (set NANORRM_DATA)")
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    return toy.make_tokenizer()


@pytest.fixture(scope="session")
def toy_base():
    return Engine.from_pretrained("toy", EngineConfig(num_blocks=2048))


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """cli("train.py", "judge", ...) runs a script in this process -> (exit code, stdout, stderr).

    The working folder is tmp_path. Anything but SystemExit that escapes fails the test, as it would
    be a traceback on the user's screen.
    """

    def call(script, *args):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as leave:
            code = leave.code or 0
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def shell():
    """shell(folder, "train.py", ...) runs a script as a user does, in a process of its own."""

    def call(folder, script, *args):
        command = [sys.executable, str(ROOT / script), *map(str, args)]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)

    return call
