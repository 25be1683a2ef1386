"""Training states on disk: what a stopped run continues from, on any number of processes.

A state is a folder `checkpoint-<step>` in the run folder: model and optimizer, written by all ranks
through torch.distributed.checkpoint (each its own shards, under the parameters' names, so that any
other number of ranks can read them), and state.json with everything small. The folder is written
under a hidden name and renamed, so that a crash at any moment leaves the older ones whole.
"""

import json
import logging
import random
import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from nanorrm import ranks
from nanorrm.config import UserError
from nanorrm.files import read_json
from nanorrm.runs import checkpoints, what_is_saved


def save_state(run, step, model, optimizer, extra, keep=2):
    """Write run/checkpoint-<step>, then drop all but the newest `keep`. All ranks call it.

    extra: what else a resumed run needs, as JSON can hold it. Raises UserError if the disk does not
    take it; the older checkpoints are then untouched.
    """
    run, target = Path(run), Path(run) / f"checkpoint-{step:06d}"
    temporary = run / f".{target.name}.tmp"
    if ranks.rank() == 0:
        for left in run.glob(".checkpoint-*.tmp"):  # of a run that was killed while saving
            shutil.rmtree(left, ignore_errors=True)
    ranks.barrier()
    try:
        arrays = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
        with quiet():
            dcp.save(arrays, checkpoint_id=temporary)
        if ranks.rank() == 0:
            state = {"step": step, **extra, "random": random_state()}
            text = json.dumps(state, default=lambda array: array.tolist())
            (temporary / "state.json").write_text(text, encoding="utf-8")
            temporary.rename(target)
    except (Exception, dcp.CheckpointException) as error:  # the latter: what failed on any rank
        shutil.rmtree(temporary, ignore_errors=True)
        what = f"the checkpoint could not be written ({reason(error)}); make room"
        raise UserError(f"{target}: {what}; {what_is_saved(run)}") from None
    if ranks.rank() == 0:
        for old in checkpoints(run)[:-keep]:
            shutil.rmtree(old.rename(run / f".{old.name}.tmp"), ignore_errors=True)
    ranks.barrier()


def load_state(run, model, optimizer):
    """Put the newest checkpoint of a run into model and optimizer; returns `extra` and the step.

    There is one: `runs.run_folder` has seen to that.
    """
    *olds, path = checkpoints(run)
    try:
        state = read_json(path / "state.json")
        weights, moments = get_state_dict(model, optimizer)
        with quiet():
            dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=path)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
        set_random_state(state["random"])
    except (Exception, dcp.CheckpointException) as error:
        older = f"; remove it to continue from {olds[-1].name}" if olds else ""
        raise UserError(f"{path}: not a readable checkpoint ({reason(error)}){older}") from None
    return state


def random_state():
    """State of the global generators. nanorrm draws nothing from them; an experiment may."""
    return {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }


def set_random_state(state):
    """The inverse of `random_state`, whose tuples and arrays have come back from JSON as lists."""
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    np.random.set_state(state["numpy"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))


def reason(error):
    """The innermost cause of an error, in one line."""
    failures = getattr(error, "failures", None)  # of dcp: {rank: (error, traceback)}
    if failures:
        rank, (inner, _) = next(iter(failures.items()))
        return (f"rank {rank}: " if len(failures) < ranks.world_size() else "") + reason(inner)
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def quiet():
    """dcp warns that a lone process is alone, and logs errors that it raises as well."""
    with warnings.catch_warnings(action="ignore"):
        logging.disable()
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
