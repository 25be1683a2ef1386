"""Learning from mistakes alone, or from successes alone.

A group's advantages push right rollouts up and wrong ones down. Zhu et al. (arXiv 2506.01347) train
with either half and find that pushing down wrong ones goes a long way, while pushing up right ones
alone costs diversity.

Overridden: `advantages` of `train_judge`, whose positive or negative half becomes zero.

    python -m experiments.one_sided

Look at the steps to 90%, at the entropy, and at how much longer the thinking becomes.
"""

from experiments.lab import Comparison
from nanorrm.cli import run_script
from nanorrm.config import JudgeConfig
from nanorrm.train.grpo import advantages
from train import train_judge


def mistakes(rewards, scale):
    """The advantages [P, G] of GRPO, those above zero left out."""
    return advantages(rewards, scale).clamp(max=0)


def successes(rewards, scale):
    """The advantages [P, G] of GRPO, those below zero left out."""
    return advantages(rewards, scale).clamp(min=0)


def main():
    config = JudgeConfig(steps=40, prompts=32, eval_every=5)
    variants = {
        "default": {},
        "mistakes only": {"advantages": mistakes},
        "successes only": {"advantages": successes},
    }
    columns = {
        "held-out accuracy": ("eval/accuracy", "last"),
        "steps to 90%": ("eval/accuracy", 0.9),
        "entropy at the end": ("entropy", "last"),
        "unreadable at the end": ("completions/unreadable_ratio", "last"),
        "thinking, tokens": ("completions/mean_think_length", "last"),
    }
    Comparison("one_sided", __doc__, train_judge, config).compare(variants, columns)


if __name__ == "__main__":
    run_script(main)
