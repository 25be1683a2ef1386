"""A judge that falls for length, and what it does to the policy that learns from it.

Of two different answers the longer one wins, whatever it says; or the one with the longer thinking,
which this judge can see. Where that is equal, the judge decides as it was trained to. Judges do
lean that way, and a good part of what RLHF gains is length (Singhal et al., arXiv 2310.03716).

Overridden: `open_referee` of `train_policy`; and `open_policy`, to be told how long the thinking
was.

    python -m experiments.length_bias

Look at the truth of held-out answers, which training never sees, beside their wins against the
policy's own start, as its judge sees them: where do the two part? And at the tokens per response,
which need no truth to be seen.
"""

from functools import partial

from experiments.lab import Comparison
from nanorrm.cli import run_script
from nanorrm.config import JudgeSettings, PolicyConfig
from nanorrm.judge.verdict import NO_ANSWER
from nanorrm.rank.referee import open_referee
from nanorrm.train.policy import Policy, open_policy
from nanorrm.train.policy_loop import train_policy


class Answer(str):
    """An answer, and the tokens that the whole response took."""

    tokens = 0


class TellingPolicy(Policy):
    """A policy whose answers say how long the thinking was."""

    def answer(self, question, completion):
        """Policy.answer as an Answer."""
        shown = Answer(super().answer(question, completion))
        shown.tokens = len(completion.ids)
        return shown


class LongerWins:
    """A judge whose votes go to what is longer by `length`, if the lengths differ."""

    def __init__(self, judge, length):
        self.judge, self.length = judge, length
        self.backend, self.seed = judge.backend, judge.seed

    def compare(self, pairs, **settings):
        """Judge.compare, with the votes of the longer."""
        verdicts = self.judge.compare(pairs, **settings)
        for pair, verdict in zip(pairs, verdicts):
            a, b = (0 if text == NO_ANSWER else self.length(text) for text in (pair.a, pair.b))
            if a != b:
                verdict.votes = [1 if a > b else 2] * len(verdict.votes)
        return verdicts


def biased(cfg, length):
    """A referee with such a judge."""
    referee = open_referee(cfg)
    referee.judge = LongerWins(referee.judge, length)
    return referee


def thinking(answer):
    """The length of an Answer with its thinking, in tokens."""
    return answer.tokens


def main():
    judge = JudgeSettings(model="toy-judge", both_orders=False)
    config = PolicyConfig(steps=40, prompts=16, judge=judge, eval_every=5, best_of=0)
    telling = partial(open_policy, kind=TellingPolicy)
    variants = {
        "default": {},
        "longer answer wins": {"open_referee": partial(biased, length=len)},
        "longer thinking wins": {
            "open_policy": telling,
            "open_referee": partial(biased, length=thinking),
        },
    }
    columns = {
        "truth, best": ("eval/accuracy", "max"),
        "truth, at the end": ("eval/accuracy", "last"),
        "wins, best": ("eval/win_rate", "max"),
        "wins, at the end": ("eval/win_rate", "last"),
        "tokens, at the end": ("completions/mean_length", "last"),
    }
    Comparison("length_bias", __doc__, train_policy, config).compare(variants, columns)


if __name__ == "__main__":
    run_script(main)
