"""Learning from mistakes alone, or from successes alone.

A group's advantages push right rollouts up and wrong ones down. Zhu et al. (arXiv 2506.01347) train
with either half and find that pushing down wrong ones goes a long way, while pushing up right ones
alone costs diversity.

Overridden: `grpo.advantages`, whose positive or negative half becomes zero.

    python -m experiments.one_sided

Look at the steps to 90%, at the entropy, and at how much longer the thinking becomes.
"""

from unittest.mock import patch

import train
from experiments.lab import Comparison
from nanorrm.cli import run_script
from nanorrm.config import JudgeConfig
from nanorrm.train import grpo

advantages = grpo.advantages


def mistakes(rewards, scale):
    """The advantages [P, G] of GRPO, those above zero left out."""
    return advantages(rewards, scale).clamp(max=0)


def successes(rewards, scale):
    """The advantages [P, G] of GRPO, those below zero left out."""
    return advantages(rewards, scale).clamp(min=0)


def main():
    config = JudgeConfig(steps=40, prompts=32, eval_every=5)
    lab = Comparison("one_sided", __doc__, train.train_judge, config)
    for seed in lab.seeds:
        lab.run("default", seed)
        with patch.object(grpo, "advantages", mistakes):
            lab.run("mistakes only", seed)
        with patch.object(grpo, "advantages", successes):
            lab.run("successes only", seed)
    lab.report(
        {
            "held-out accuracy": ("eval/accuracy", "last"),
            "steps to 90%": ("eval/accuracy", 0.9),
            "entropy at the end": ("entropy", "last"),
            "unreadable at the end": ("completions/unreadable_ratio", "last"),
            "thinking, tokens": ("completions/mean_think_length", "last"),
        }
    )


if __name__ == "__main__":
    run_script(main)
