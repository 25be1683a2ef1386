"""Dr. GRPO: no division by the group's std, and a token counts the same whatever the lengths are.

GRPO divides a group's advantages by their std, which makes much of groups in which nearly all
rollouts agree, and averages over the tokens that there are, so that one among few counts more.
Dr. GRPO (arXiv 2503.20783) does neither. Two steps towards it: first the std alone.

Overridden: two settings, `scale` of `grpo.advantages` and `aggregation` of `grpo.token_weights`.

    python -m experiments.dr_grpo

Look at the steps to 90%, and at the gradient's norm: its scale is what changes most, and AdamW
does not mind.
"""

from experiments.lab import Comparison
from nanorrm.cli import run_script
from nanorrm.config import JudgeConfig, LossConfig
from train import train_judge


def main():
    config = JudgeConfig(steps=40, prompts=32, eval_every=5)
    variants = {
        "default": {},
        "no std": {"scale": "none"},
        "Dr. GRPO": {"scale": "none", "loss": LossConfig(aggregation="constant")},
    }
    columns = {
        "held-out accuracy": ("eval/accuracy", "last"),
        "steps to 90%": ("eval/accuracy", 0.9),
        "thinking, tokens": ("completions/mean_think_length", "last"),
        "gradient norm, mean": ("grad_norm", "mean"),
    }
    Comparison("dr_grpo", __doc__, train_judge, config).compare(variants, columns)


if __name__ == "__main__":
    run_script(main)
