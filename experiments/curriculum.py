"""A curriculum: short chains first (Bengio et al., ICML 2009).

Pairs about chains of 2 terms in the first steps, then up to 3, and so on: from the middle of the
run on all lengths are drawn, as they are all the time by default.

Overridden: `open_source` of `train_judge`, by one whose pairs of a step are drawn otherwise.

    python -m experiments.curriculum

Look at the steps to 90% over all lengths, and at the longest chains: does an early lesson about
short ones carry over, or does it only take time from the others?
"""

from experiments.lab import Comparison
from nanorrm.cli import run_script
from nanorrm.config import JudgeConfig
from nanorrm.data import toy
from nanorrm.data.sources import ToySource, toy_pair
from train import train_judge


class ShortFirst(ToySource):
    """The embedded world's pairs, whose chains reach their full length after so many pairs."""

    def __init__(self, seed, pairs):
        super().__init__(seed)
        self.pairs = pairs

    def take(self, start, n):
        """The training pairs start to start + n."""
        drawn = []
        for index in range(start, start + n):
            rng = toy.stream_rng("train", self.seed, index)
            lengths = 1 + min(len(toy.TERMS) - 1, len(toy.TERMS) * index // self.pairs)
            drawn.append(toy_pair(rng, rng.choice(toy.TERMS[:lengths])))
        return drawn


def short_first(cfg, judge):
    """A curriculum over the first half of a run."""
    return ShortFirst(cfg.seed, cfg.prompts * cfg.steps // 2)


def main():
    config = JudgeConfig(steps=50, prompts=32, eval_every=5)
    columns = {
        "held-out accuracy": ("eval/accuracy", "last"),
        "steps to 90%": ("eval/accuracy", 0.9),
        "2 terms": ("eval/accuracy_2_terms", "last"),
        "6 terms": ("eval/accuracy_6_terms", "last"),
        "thinking, tokens": ("completions/mean_think_length", "last"),
    }
    variants = {"default": {}, "short first": {"open_source": short_first}}
    Comparison("curriculum", __doc__, train_judge, config).compare(variants, columns)


if __name__ == "__main__":
    run_script(main)
