"""Run by test_resume: a training killed again and again, each life forked from this warm process.

killed.py FOLDER SEED KILLS: trains FOLDER/runs/whole unbroken, then FOLDER/runs/killed in many
lives. Every other life is killed at a random line of Python inside the saving of a checkpoint, the
rest at a random moment. Prints what each left, a JSON line per life; the last one ends by itself.
"""

import json
import os
import random
import runpy
import signal
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

from nanorrm import runs  # noqa: E402
from nanorrm.files import read_lines  # noqa: E402
from nanorrm.train import checkpoint, trainer  # noqa: E402

SETTINGS = ["--prompts", "2", "--group", "4", "--max-tokens", "16", "--eval-pairs", "0"]
SETTINGS += ["--save-every", "1", "--learning-rate", "1e-3", "--threads", "1"]
SETTINGS += ["--engine.num-blocks", "256", "--sample-every", "1"]


def train(*args, before=None):
    """train.py in a child of this process, which calls `before` first; returns its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if before:
            before()
        sys.argv = ["train.py", "judge", *map(str, args)]
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        code = 0
    except SystemExit as leave:
        code = leave.code
    finally:
        os._exit(code)


def killer(fatal):
    """To be called in a child: kills it at line `fatal` of a save, or earlier in a later one."""
    usual = checkpoint.save_state

    def save_state(*args):
        nonlocal fatal
        count = 0

        def trace(*_):
            nonlocal count
            count += 1
            if count > fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        usual(*args)
        sys.settrace(None)
        fatal = fatal * 2 // 3  # not reached: this save was shorter

    def install():
        trainer.save_state = save_state

    return install


def lines(log):
    """Whole lines of a log so far."""
    return log.read_text().count("\n") if log.exists() else 0


def main(folder, seed, kills):
    os.chdir(folder)
    rng, run = random.Random(seed), Path("runs/killed")
    log = run / "metrics.jsonl"
    began = time.monotonic()
    steps = 3 * kills  # more than the lives get through
    assert os.waitpid(train(*SETTINGS, "--steps", steps, "--name", "whole"), 0)[1] == 0
    step_time = (time.monotonic() - began) / steps
    for life in range(kills + 1):
        saved = [runs.step_of(path) for path in runs.checkpoints(run)]
        start = ["--resume"] if saved else [*SETTINGS, "--steps", steps]
        last, inside = life == kills, life % 2 == 0
        before = killer(rng.randrange(20_000)) if inside and not last else None
        seen = lines(log)
        child = train(*start, "--name", "killed", before=before)
        if not inside and not last:
            wanted = seen + rng.randrange(3)
            while lines(log) < wanted:
                time.sleep(0.002)
            time.sleep(rng.random() * 2 * step_time)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        report = {
            "inside": inside,
            "killed": os.WIFSIGNALED(status),
            "status": status,
            "before": saved,
            "after": [runs.step_of(path) for path in runs.checkpoints(run)],
            "logged": read_lines(log)[-1]["step"] if lines(log) else 0,
            "hidden": [path.name for path in run.glob(".*.tmp")],
        }
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
