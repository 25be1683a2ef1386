"""DAPO's clip: the probability of a token may rise further in a batch than it may fall.

A symmetric clip holds rare tokens down: from 0.01 to 0.012 is all that a good one gains before its
gradient is cut, so that exploration dies. DAPO (arXiv 2503.14476) clips at 0.8 and 1.28. With one
update a batch the ratio is always 1 and nothing is clipped, hence mini-batches: four updates.

Overridden: a setting, `clip_high` of `grpo.policy_loss`.

    python -m experiments.dapo

Look at the share of clipped tokens: too few of them, and a clip can not matter; at the entropy,
which is to be kept up; and at what the four updates do by themselves, beside one of the default.
"""

from experiments.lab import Comparison
from nanorrm.cli import run_script
from nanorrm.config import JudgeConfig, LossConfig
from train import train_judge


def main():
    config = JudgeConfig(steps=40, prompts=32, eval_every=5)
    variants = {
        "default": {},
        "four updates": {"mini_prompts": 8},
        "clip higher": {"mini_prompts": 8, "loss": LossConfig(clip_high=0.28)},
    }
    columns = {
        "held-out accuracy": ("eval/accuracy", "last"),
        "steps to 90%": ("eval/accuracy", 0.9),
        "clipped, mean": ("clip_ratio", "mean"),
        "entropy at the end": ("entropy", "last"),
        "thinking, tokens": ("completions/mean_think_length", "last"),
    }
    Comparison("dapo", __doc__, train_judge, config).compare(variants, columns)


if __name__ == "__main__":
    run_script(main)
