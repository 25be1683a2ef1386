"""A reward for verdicts that are right in BOTH orders, against position bias.

Half as many pairs, each shown in both orders; a rollout earns +1 only if it is right and so is its
partner, one rollout of the exchanged pair (after J1, arXiv 2505.10320), else -1. A partner is drawn
without looking at the rollout, so that within a group the expected reward rises with being right
and with nothing else: what changes is the noise, and how much a pair counts.

Overridden: `open_source` and `grade` of `train_judge`. Without the reward, both orders are shown as
well, to tell the two apart; and `evaluate` asks in both orders, to see consistency.

    python -m experiments.consistency

Look at consistency, the share of held-out pairs whose verdict stays when the responses are
exchanged, and at the share of votes for the first slot; then at what the stricter reward costs.
"""

from experiments.lab import Comparison
from nanorrm.cli import run_script
from nanorrm.config import JudgeConfig
from nanorrm.data.sources import open_source
from nanorrm.measure import metrics
from train import graded, train_judge


class BothOrders:
    """A source whose pairs 2i and 2i + 1 are the same one in both orders."""

    def __init__(self, source):
        self.source, self.held_out = source, source.held_out

    def take(self, start, n):
        """n pairs, start and n even."""
        pairs = self.source.take(start // 2, n // 2)
        return [shown for pair in pairs for shown in (pair, pair.flipped())]


def in_both_orders(cfg, judge):
    """`open_source`, of half as many pairs in both orders."""
    return BothOrders(open_source(cfg, judge))


def right_in_both(pairs, groups, closed=False):
    """The grades [P][G] of `graded`, the reward only for those whose partner is right as well."""
    grades, strict = graded(pairs, groups, closed), []
    for one, other in zip(grades[::2], grades[1::2]):
        rewards = [min(mine, partner) for (mine, _), (partner, _) in zip(one, other)]
        for group in (one, other):
            strict.append([(reward, verdict) for reward, (_, verdict) in zip(rewards, group)])
    return strict


def evaluate(judge, pairs, budget):
    """Accuracy and position bias on held-out pairs, each shown in both orders."""
    summary = metrics.summarize(pairs, judge.compare(pairs, max_think_tokens=budget))
    return {f"eval/{name}": summary[name] for name in ("accuracy", "consistency", "first_slot")}


def main():
    config = JudgeConfig(steps=40, prompts=32, eval_every=5)
    both = {"evaluate": evaluate, "open_source": in_both_orders}
    variants = {
        "default": {"evaluate": evaluate},
        "both orders": both,
        "right in both": {**both, "grade": right_in_both},
    }
    columns = {
        "held-out accuracy": ("eval/accuracy", "last"),
        "steps to 90%": ("eval/accuracy", 0.9),
        "consistency": ("eval/consistency", "last"),
        "first slot": ("eval/first_slot", "last"),
        "groups without a lesson": ("frac_reward_zero_std", "mean"),
    }
    Comparison("consistency", __doc__, train_judge, config).compare(variants, columns)


if __name__ == "__main__":
    run_script(main)
