"""An idea beside the default: same seeds, one table, one figure. Used by all of experiments/."""

import io
import time
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean as mean

import tyro

from nanorrm.config import UserError
from nanorrm.runs import Run, plot


@dataclass
class Settings:
    """The command line of an experiment."""

    steps: int  # of each run
    seeds: tuple[int, ...] = (0, 1)  # every variant runs with each of them


class Comparison:
    """Runs variants of one training, each in a folder under runs/NAME-TIME/, and compares them.

    about: the experiment's help text; train(cfg, run): a stage of train.py; config: what all
    variants share, its steps the default of --steps.
    """

    def __init__(self, name, about, train, config):
        given = tyro.cli(Settings, default=Settings(config.steps), description=about)
        if not given.seeds:
            raise UserError("--seeds: give at least one")
        self.name, self.train, self.seeds, self.steps = name, train, given.seeds, given.steps
        self.folder = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.config = replace(config, runs=str(self.folder), steps=given.steps)
        self.results = {}  # variant -> [rows of metrics.jsonl, of each seed]

    def compare(self, variants, columns):
        """Train each of the variants {name: changes, see `run`} with each seed, then `report`."""
        for seed in self.seeds:
            for variant, changes in variants.items():
                self.run(variant, seed, **changes)
        self.report(columns)

    def run(self, variant, seed, **changes):
        """Train a variant with a seed. Ctrl-C ends it all.

        changes: of fields of the config; or functions, which the stage takes in place of its own.
        """
        began = time.perf_counter()
        functions = {name: change for name, change in changes.items() if callable(change)}
        settings = {name: change for name, change in changes.items() if name not in functions}
        name = f"{variant.replace(' ', '-')}-{seed}"
        cfg = replace(self.config, seed=seed, name=name, **settings)
        with Run(self.name, cfg) as run, redirect_stdout(io.StringIO()):  # it has a line a step
            self.train(cfg, run, **functions)
        rows = run.metrics()
        if rows[-1]["step"] < cfg.steps:
            raise KeyboardInterrupt
        self.results.setdefault(variant, []).append(rows)
        print(f"{variant}, seed {seed}: {time.perf_counter() - began:.0f} s", flush=True)

    def report(self, columns):
        """Print a line per variant, the seeds' numbers side by side, and draw the metrics' means.

        columns: {heading: (metric, "last" | "mean" | "max" | a number to be reached)}, see `show`.
        """
        lines = [["", *columns]]
        for variant, seeds in self.results.items():
            shown = [[show(curve([rows], m), how) for rows in seeds] for m, how in columns.values()]
            lines.append([variant, *map(" / ".join, shown)])
        widths = [max(map(len, column)) for column in zip(*lines)]
        print(f"\n{self.steps} steps, seeds {' / '.join(map(str, self.seeds))}")
        for line in lines:
            print("  ".join(map(str.ljust, line, widths)).rstrip())
        panels = {m: {v: curve(s, m) for v, s in self.results.items()} for m, _ in columns.values()}
        plot(self.folder / "comparison.png", list(panels.items()), f"{self.name}: mean of seeds")
        print(f"curves: {self.folder / 'comparison.png'}")


def curve(runs, metric):
    """Rows of metrics.jsonl of some runs -> [(step, the metric's mean over the runs), ...]."""
    points = {}
    for row in (row for rows in runs for row in rows if row.get(metric) is not None):
        points.setdefault(row["step"], []).append(row[metric])
    return [(step, mean(values)) for step, values in sorted(points.items())]


def show(points, how):
    """A curve in a word: a value (see Comparison.report), or the first step that reaches a number.

    >>> [show([(0, 0.5), (5, 0.9), (10, 0.7)], how) for how in ("last", "mean", "max", 0.8, 0.95)]
    ['0.7', '0.7', '0.9', '5', 'never']
    """
    if not isinstance(how, str):
        return next((str(step) for step, value in points if value >= how), "never")
    values = [value for _, value in points]
    numbers = {"last": lambda: values[-1], "mean": lambda: mean(values), "max": lambda: max(values)}
    return f"{numbers[how]():.3g}" if values else "-"
