"""A reward for verdicts that are right in BOTH orders, against position bias.

Half as many pairs, each shown in both orders; a rollout earns +1 only if it is right and so is its
partner, one rollout of the exchanged pair (after J1, arXiv 2505.10320), else -1. A partner is drawn
without looking at the rollout, so that within a group the expected reward rises with being right
and with nothing else: what changes is the noise, and how much a pair counts.

Overridden: `train.collect`. Without the reward, both orders are shown as well, to tell the two
apart; and `train.evaluate` asks in both orders, to see consistency.

    python -m experiments.consistency

Look at consistency, the share of held-out pairs whose verdict stays when the responses are
exchanged, and at the share of votes for the first slot; then at what the stricter reward costs.
"""

from dataclasses import replace
from unittest.mock import patch

import train
from experiments.lab import Comparison
from nanorrm.cli import run_script
from nanorrm.config import JudgeConfig
from nanorrm.measure import metrics

collect = train.collect


class BothOrders:
    """A source whose pairs 2i and 2i + 1 are the same one in both orders."""

    def __init__(self, source):
        self.source = source

    def take(self, start, n):
        """n pairs, start and n even."""
        pairs = self.source.take(start // 2, n // 2)
        swapped = [replace(pair, a=pair.b, b=pair.a, label=3 - pair.label) for pair in pairs]
        return [pair for both in zip(pairs, swapped) for pair in both]


def in_both_orders(judge, source, cursor, step, cfg):
    """train.collect, of half as many pairs in both orders."""
    return collect(judge, BothOrders(source), cursor, step, cfg)


def right_in_both(judge, source, cursor, step, cfg):
    """The same, with the stricter reward."""
    batch, cursor = in_both_orders(judge, source, cursor, step, cfg)
    strict = []
    for one, other in zip(batch[::2], batch[1::2]):
        rewards = [min(mine, partner) for (mine, _), (partner, _) in zip(one[-1], other[-1])]
        for pair, question, group, graded in (one, other):
            verdicts = [verdict for _, verdict in graded]
            strict.append((pair, question, group, list(zip(rewards, verdicts))))
    return strict, cursor


def evaluate(judge, pairs, budget):
    """Accuracy and position bias on held-out pairs, each shown in both orders."""
    summary = metrics.summarize(pairs, judge.compare(pairs, max_think_tokens=budget))
    return {f"eval/{name}": summary[name] for name in ("accuracy", "consistency", "first_slot")}


def main():
    config = JudgeConfig(steps=40, prompts=32, eval_every=5)
    lab = Comparison("consistency", __doc__, train.train_judge, config)
    for seed in lab.seeds:
        with patch.object(train, "evaluate", evaluate):
            lab.run("default", seed)
            with patch.object(train, "collect", in_both_orders):
                lab.run("both orders", seed)
            with patch.object(train, "collect", right_in_both):
                lab.run("right in both", seed)
    lab.report(
        {
            "held-out accuracy": ("eval/accuracy", "last"),
            "steps to 90%": ("eval/accuracy", 0.9),
            "consistency": ("eval/consistency", "last"),
            "first slot": ("eval/first_slot", "last"),
            "groups without a lesson": ("frac_reward_zero_std", "mean"),
        }
    )


if __name__ == "__main__":
    run_script(main)
