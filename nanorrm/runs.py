"""What a run leaves behind: config.json, metrics.jsonl, samples.jsonl, plot.png, one line a step.

A run folder explains itself: settings, versions, device and commit stand in config.json.
"""

import fnmatch
import json
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from nanorrm import ranks
from nanorrm.config import UserError
from nanorrm.files import read_json, read_lines, write_json, write_rows


def git_commit():
    """The commit of the code, with a + where the tree differs from it; None outside git."""
    ask = ["git", "-C", Path(__file__).parent, "status", "--porcelain=v2", "--branch"]
    try:
        told = subprocess.run(ask, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    first, *others = told.splitlines()  # "# branch.oid COMMIT", more of the branch, then changes
    return first.split()[-1][:7] + "+" * any(not line.startswith("#") for line in others)


def surroundings():
    """Command, versions, device and time: what a result should say about where it comes from."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": sys.argv,
        "commit": git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": gpu or f"CPU, {torch.get_num_threads()} threads of {os.cpu_count()} cores",
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


class Run:
    """A run folder, its logs, and the way through its steps. A context manager; rank 0 writes.

    What ends the steps from outside becomes a UserError that says what was saved (see `explain`).
    """

    def __init__(self, stage, config):
        """Choose the folder; `start` makes it. Raises UserError if it is another run's."""
        self.main = ranks.rank() == 0  # the others keep silent
        self.folder = ranks.same(run_folder(stage, config) if self.main else None)
        self.stage, self.config = stage, config
        self.bar = self.asked = None  # asked: whether Ctrl-C was pressed since the steps began

    def start(self, first=0):
        """Make the folder and begin the progress bar; called when model and data have loaded.

        first: the step that a resumed run is at; log lines of later ones are dropped.
        """
        total = self.config.steps
        if first > total:
            raise UserError(f"{self.folder}: is at step {first} already, --steps {total} is less")
        if not self.main:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            about = {"stage": self.stage, "config": asdict(self.config), **surroundings()}
            write_json(self.folder / "config.json", about)
        except OSError as error:
            raise UserError(f"{self.folder}: can't write there ({error.strerror})") from None
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.folder / name
            if path.exists():
                kept = [line for line in read_lines(path) if line["step"] <= first and first]
                write_rows(path, kept)
        self.bar = tqdm(total=total, initial=first, unit="step", leave=False, disable=None)

    def steps(self, first=0):
        """The numbers of the steps to take, from first + 1 on, until `is_last` said so of one.

        Meanwhile the first Ctrl-C lets the step end; a second one interrupts at once.
        """
        self.asked = self.ending = False
        self.usual = signal.signal(signal.SIGINT, self._stop_softly)
        for step in range(first + 1, self.config.steps + 1):
            self.step = step
            yield step
            if self.ending:
                break
        self._stop_at_once()

    def _stop_softly(self, *_):
        self.asked = True
        self._stop_at_once()
        tqdm.write("stopping after this step (Ctrl-C again: at once)")

    def _stop_at_once(self):
        if signal.getsignal(signal.SIGINT) == self._stop_softly:
            signal.signal(signal.SIGINT, self.usual)

    def is_last(self, enough=False):
        """Whether this step ends the run: the last one, Ctrl-C, or enough; on any rank. To be asked
        once a step, by all ranks."""
        done = self.step == self.config.steps
        self.ending = done or ranks.any_rank(enough or self.asked)
        return self.ending

    def log(self, step, metrics, line, quiet=False):
        """Append metrics to metrics.jsonl and, unless quiet, print one line."""
        if not self.main:
            return
        self.append("metrics.jsonl", {"step": step, **metrics})
        if not quiet:
            tqdm.write(f"step {step:4d}  {line}")
        sys.stdout.flush()
        self.bar.update(step > 0)

    def append(self, name, record):
        """One JSON line at the end of a log file of the run."""
        if self.main:
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def metrics(self):
        """All that metrics.jsonl holds."""
        return read_lines(self.folder / "metrics.jsonl")

    def interrupted(self):
        """After the steps: what to say if Ctrl-C ended them, on any rank, else None."""
        if self.asked is not None and ranks.any_rank(self.asked):
            name = self.folder.name
            return f"interrupted: saved at step {self.step}; --resume --name {name} continues"

    def finish(self, model, tokenizer, panels=None):
        """Leave the trained model as a Hugging Face folder, and plot.png from metrics.jsonl.

        panels: which of its metrics are drawn where, see `curves_of`.
        """
        if self.main:
            model.save_pretrained(self.folder / "model", tokenizer)
            if panels:
                title = f"{self.folder.name}: {self.stage}"
                plot(self.folder / "plot.png", curves_of(self.metrics(), panels), title)

    def __enter__(self):
        return self

    def __exit__(self, _, error, __):
        if self.bar is not None:
            self.bar.close()
        self._stop_at_once()
        if self.asked is not None and (what := explain(error, self)):
            raise UserError(f"{what}; {what_is_saved(self.folder)}") from None


def run_folder(stage, config):
    """Which folder a run writes to."""
    runs = Path(config.runs)
    if config.resume and not config.name:
        found = list(filter(checkpoints, runs_of(runs, stage)))
        if not found:
            raise UserError(f"{runs}: no {stage} run with a checkpoint to resume")
        return found[-1]
    folder = runs / (config.name or f"{stage}-{time.strftime('%Y%m%d-%H%M%S')}")
    saved = checkpoints(folder)
    if config.resume and not saved:
        raise UserError(f"{folder}: nothing to resume, no checkpoint in it")
    if not config.resume and (saved or (folder / "model").exists()):
        raise UserError(f"{folder}: exists already; --resume continues it, --name makes another")
    return folder


def runs_of(runs, stage):
    """Run folders of a stage, the last started last."""
    found = []
    for path in Path(runs).glob("*/config.json"):
        try:
            about = read_json(path)
        except UserError:
            continue  # a broken run is no reason to hide the others
        if about.get("stage") == stage:
            found.append((about.get("started", ""), path.parent))
    return [folder for _, folder in sorted(found)]


def curves_of(rows, panels):
    """Rows of metrics.jsonl -> what `plot` draws: [(panel, {label: [(step, value), ...]}), ...].

    panels: [(panel, metric, label), ...]; a metric that ends in * stands for all that begin so.
    Curves without a point, and panels without a curve, are left out.

    >>> rows = [{"step": 1, "accuracy": 0.5}, {"step": 2, "accuracy": 0.75, "eval/accuracy": None}]
    >>> curves_of(rows, [("share", "accuracy", "right"), ("held out", "eval/accuracy", "")])
    [('share', {'right': [(1, 0.5), (2, 0.75)]})]
    """
    drawn, names = {}, sorted({name for row in rows for name in row})
    for panel, metric, label in panels:
        for name in fnmatch.filter(names, metric):
            curve = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            shown = label or name.removeprefix(metric.removesuffix("*")).replace("_", " ")
            if curve:
                drawn.setdefault(panel, {})[shown] = curve
    return list(drawn.items())


def plot(path, panels, title):
    """Draw curves under one another into a PNG.

    panels: [(y label, {curve name: [(step, value), ...]}), ...].
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.6 * len(panels)), layout="tight")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)
    for axis, (label, curves) in zip(axes[:, 0], panels):
        for name, points in curves.items():
            axis.plot(*zip(*points), label=name, linewidth=1.5)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        if len(curves) > 1:
            axis.legend(fontsize=8, ncols=2)
    axes[0, 0].set_title(title)
    axes[-1, 0].set_xlabel("step")
    figure.savefig(path, dpi=130)


def checkpoints(run):
    """The checkpoint folders of a run, oldest first."""
    found = (path for path in Path(run).glob("checkpoint-*") if path.name[11:].isdigit())
    return sorted(found, key=step_of)


def step_of(checkpoint):
    """The step a checkpoint folder is of."""
    return int(checkpoint.name.rpartition("-")[2])


def what_is_saved(run):
    """In words: the newest checkpoint of a run, and what can be done with it."""
    found = checkpoints(run)
    if not found:
        return "nothing was saved: start again"
    return f"the last checkpoint is of step {step_of(found[-1])}: continue with --resume"


def explain(error, run):
    """In words for a person: what ended a training from outside, and what to change. None for an
    error that is not of that kind: a bug, or none at all."""
    if isinstance(error, FloatingPointError):
        return f"{error}: stopped before that step; a lower --learning-rate may help"
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"out of GPU memory ({str(error).partition('. ')[0]}); --micro-tokens below "
            f"{run.config.micro_tokens or 16384}, a lower --engine.cache-gib, --recompute or "
            "--release-cache may help"
        )
    if isinstance(error, OSError):
        return f"{error.filename or run.folder}: {(error.strerror or str(error)).lower()}"
    if isinstance(error, UserError):  # such as a judge's endpoint that is gone
        return str(error)
