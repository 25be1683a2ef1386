"""A judge that falls for length, and what it does to the policy that learns from it.

Of two different answers the longer one wins, whatever it says; or the one with the longer thinking,
which this judge can see. Where that is equal, the judge decides as it was trained to. Judges do
lean that way, and a good part of what RLHF gains is length (Singhal et al., arXiv 2310.03716).

Overridden: `Judge.compare`; and `Policy.answer` tells it how long the thinking was.

    python -m experiments.length_bias

Look at the truth of held-out answers, which training never sees, beside their wins against the
policy's own start, as its judge sees them: where do the two part? And at the tokens per response,
which need no truth to be seen.
"""

from unittest.mock import patch

import train
from experiments.lab import Comparison
from nanorrm.cli import run_script
from nanorrm.config import JudgeSettings, PolicyConfig
from nanorrm.judge.judge import Judge
from nanorrm.judge.verdict import NO_ANSWER
from nanorrm.train.policy import Policy

compare, answer = Judge.compare, Policy.answer


class Answer(str):
    """An answer, and the tokens that the whole response took."""

    tokens = 0


def with_tokens(policy, question, completion):
    """Policy.answer as an Answer."""
    shown = Answer(answer(policy, question, completion))
    shown.tokens = len(completion.ids)
    return shown


def longer_wins(length):
    """A `Judge.compare` whose votes go to what is longer, if the lengths differ."""

    def biased(judge, pairs, **how):
        verdicts = compare(judge, pairs, **how)
        for pair, verdict in zip(pairs, verdicts):
            a, b = (0 if text == NO_ANSWER else length(text) for text in (pair.a, pair.b))
            if a != b:
                verdict.votes = [1 if a > b else 2] * len(verdict.votes)
        return verdicts

    return biased


def main():
    judge = JudgeSettings(model="toy-judge", both_orders=False)
    config = PolicyConfig(steps=40, prompts=16, judge=judge, eval_every=5, best_of=0)
    lab = Comparison("length_bias", __doc__, train.train_policy, config)
    for seed in lab.seeds:
        lab.run("default", seed)
        with patch.object(Judge, "compare", longer_wins(len)):
            lab.run("longer answer wins", seed)
        with (
            patch.object(Policy, "answer", with_tokens),
            patch.object(Judge, "compare", longer_wins(lambda text: text.tokens)),
        ):
            lab.run("longer thinking wins", seed)
    lab.report(
        {
            "truth, best": ("eval/accuracy", "max"),
            "truth, at the end": ("eval/accuracy", "last"),
            "wins, best": ("eval/win_rate", "max"),
            "wins, at the end": ("eval/win_rate", "last"),
            "tokens, at the end": ("completions/mean_length", "last"),
        }
    )


if __name__ == "__main__":
    run_script(main)
