"""`make gpu`: stages under their limits, driven by an interpreter that fakes them."""

import os
import subprocess
import sys

import pytest

FAKE = """#!/bin/sh
case "$*" in
    *is_available*) echo True ;;
    *pytest*test_rms_norm.py*) echo one failed; exit 3 ;;
    *kernels.bench*) echo begun; sleep 60 ;;
    *) echo "$@" ;;
esac
"""


@pytest.fixture
def gpu(root, tmp_path):
    """gpu(stages, PYTHON=...) -> exit status, lines of the summary by stage, what it printed."""

    def call(*stages, **settings):
        script = root / "nanorrm" / "bench" / "gpu.sh"
        env = {**os.environ, "OUT": str(tmp_path / "out"), **settings}
        done = subprocess.run([script, *stages], env=env, capture_output=True, text=True)
        summary = tmp_path / "out" / "summary.txt"
        lines = summary.read_text().splitlines() if summary.exists() else []
        return done.returncode, {line.split()[0]: line.split()[2:] for line in lines}, done

    return call


def test_a_failure_or_a_stage_out_of_time_does_not_stop_the_next(gpu, tmp_path):
    python = tmp_path / "python"
    python.write_text(FAKE)
    python.chmod(0o755)
    fine = dict.fromkeys(("engine", "step", "whole"), "0")
    code, rows, _ = gpu(PYTHON=str(python), LIMIT_KERNELS="1")
    assert code == 1
    status = {name: row[0] for name, row in rows.items()}
    assert status == {"environment": "0", "tests": "3", "kernels": "124", **fine}
    assert rows["kernels"][3:] == ["out", "of", "time"]
    assert (tmp_path / "out" / "kernels.txt").read_text() == "begun\n"
    said = (tmp_path / "out" / "whole.txt").read_text()
    assert said.startswith("-m nanorrm.bench train") and said.endswith("out/whole.json\n")
    assert gpu("engine", "check", PYTHON=str(python))[0] == 0


def test_without_a_gpu_every_stage_says_so(gpu, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, rows, done = gpu("environment", "step", PYTHON=sys.executable)
    assert code == 1 and rows["step"][0] == "1"
    assert "torch" in done.stdout and "no CUDA device: not run" in done.stdout


def test_an_unknown_stage_is_named(gpu):
    code, rows, done = gpu("kernel")
    assert code == 2 and not rows and "no such stage: kernel" in done.stderr
