"""A run that is killed, or runs out of disk, loses at most what came after its last checkpoint."""

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from nanorrm.files import read_lines
from nanorrm.runs import checkpoints, step_of

HERE = Path(__file__).parents[1]
KILLS = 20


def without_times(run):
    """A run's metrics, less those that tell how fast the machine was."""
    times = ("second", "tokens_per_s", "minutes", "host_share", "engine/")
    return [
        {k: v for k, v in row.items() if not any(word in k for word in times)}
        for row in read_lines(run / "metrics.jsonl")
    ]


def test_kill_9_at_any_moment_loses_one_interval_and_changes_nothing(tmp_path):
    """20 kills, half of them inside the saving of a checkpoint; with --save-every 1 the loss is one
    step. The end is that of the unbroken run, to the bit."""
    command = [sys.executable, HERE / "killed.py", tmp_path, "7", str(KILLS)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    *lives, end = map(json.loads, done.stdout.splitlines())
    assert len(lives) == KILLS and all(life["killed"] for life in lives)
    assert any(life["hidden"] for life in lives)  # halves of saves, which nothing reads
    for life in lives:
        assert life["after"][-1:] >= life["before"][-1:]  # nothing that was saved is lost
        assert life["logged"] - max(life["after"], default=0) <= 1
    assert end["status"] == 0 and end["hidden"] == [] and len(end["after"]) == 2

    whole, killed = tmp_path / "runs/whole", tmp_path / "runs/killed"
    assert without_times(whole) == without_times(killed)
    assert read_lines(whole / "samples.jsonl") == read_lines(killed / "samples.jsonl")
    one, other = (load_file(run / "model" / "model.safetensors") for run in (whole, killed))
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


SMALL = ["--threads", 1, "--documents", 4, "--save-every", 1]


@pytest.fixture
def file_limit():
    """file_limit(bytes): no file of this process may grow beyond that; undone at the end."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, usual[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, usual)


def test_a_full_disk_leaves_the_older_checkpoint_and_says_what_to_do(tmp_path, cli, file_limit):
    run = tmp_path / "runs" / "full"
    assert cli("train.py", "base", *SMALL, "--steps", 2, "--name", "full")[0] == 0
    file_limit(100_000)
    code, _, err = cli("train.py", "base", "--resume", "--name", "full", "--steps", 4)
    assert code == 2 and err.count("error:") == 1, err
    assert "step 2" in err and "make room" in err and "--resume" in err
    assert [step_of(path) for path in checkpoints(run)] == [1, 2]
    assert not list(run.glob(".*.tmp"))
    file_limit(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    code, _, err = cli("train.py", "base", "--resume", "--name", "full", "--steps", 4)
    assert code == 0, err


def test_what_a_resumed_run_keeps(tmp_path, cli):
    run = tmp_path / "runs" / "kept"
    assert cli("train.py", "base", *SMALL, "--steps", 3, "--name", "kept")[0] == 0
    again = ["train.py", "base", "--resume", "--name", "kept"]
    code, _, err = cli(*again, "--seed", 7)
    assert code == 2 and "seed = 7: the run has 0" in err
    code, _, err = cli(*again, "--steps", 2)
    assert code == 2 and "is at step 3 already" in err
    (run / "checkpoint-copy").mkdir()  # somebody's own folder is no checkpoint
    (run / "checkpoint-000003" / "state.json").write_text('{"step": 3')
    code, _, err = cli(*again, "--steps", 4)
    assert code == 2 and "state.json" in err and "checkpoint-000002" in err


def test_a_log_that_can_not_be_written_says_so(tmp_path, cli, monkeypatch):
    from nanorrm.runs import Run

    def append(run, name, record):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(run.folder / name))

    monkeypatch.setattr(Run, "append", append)
    code, _, err = cli("train.py", "base", *SMALL, "--steps", 2, "--name", "full")
    assert code == 2 and "metrics.jsonl: no space left on device; nothing was saved" in err
