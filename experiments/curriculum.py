"""A curriculum: short chains first (Bengio et al., ICML 2009).

Pairs about chains of 2 terms in the first steps, then up to 3, and so on: from the middle of the
run on all lengths are drawn, as they are all the time by default.

Overridden: `ToySource.take`, which draws the pairs of a step.

    python -m experiments.curriculum

Look at the steps to 90% over all lengths, and at the longest chains: does an early lesson about
short ones carry over, or does it only take time from the others?
"""

from unittest.mock import patch

import train
from experiments.lab import Comparison
from nanorrm.cli import run_script
from nanorrm.config import JudgeConfig
from nanorrm.data import toy
from nanorrm.data.sources import ToySource, toy_pair


def short_first(pairs):
    """A `ToySource.take` whose chains reach their full length after so many pairs."""

    def take(source, start, n):
        drawn = []
        for index in range(start, start + n):
            rng = toy.stream_rng("train", source.seed, index)
            lengths = 1 + min(len(toy.TERMS) - 1, len(toy.TERMS) * index // pairs)
            drawn.append(toy_pair(rng, rng.choice(toy.TERMS[:lengths])))
        return drawn

    return take


def main():
    config = JudgeConfig(steps=50, prompts=32, eval_every=5)
    lab = Comparison("curriculum", __doc__, train.train_judge, config)
    half = lab.config.prompts * lab.steps // 2
    for seed in lab.seeds:
        lab.run("default", seed)
        with patch.object(ToySource, "take", short_first(half)):
            lab.run("short first", seed)
    lab.report(
        {
            "held-out accuracy": ("eval/accuracy", "last"),
            "steps to 90%": ("eval/accuracy", 0.9),
            "2 terms": ("eval/accuracy_2_terms", "last"),
            "6 terms": ("eval/accuracy_6_terms", "last"),
            "thinking, tokens": ("completions/mean_think_length", "last"),
        }
    )


if __name__ == "__main__":
    run_script(main)
