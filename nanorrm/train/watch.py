"""How a run is watched: a judge by held-out pairs, a policy by held-out queries and the best of N.

What is held out never changes within a run, nor do its seeds: a curve shows training alone.
"""

import textwrap

from nanorrm.judge.verdict import NO_ANSWER
from nanorrm.measure import metrics
from nanorrm.measure.patterns import patterns
from nanorrm.measure.statistics import difference, wilson
from nanorrm.rank.bestof import best_of
from nanorrm.records import Ranking
from nanorrm.train.curves import accuracy, mean

# -- a judge


def evaluate(judge, pairs, budget=None):
    """Accuracy on held-out pairs, in all and by difficulty, and the patterns of their thinking."""
    if not pairs:
        return {}
    verdicts = judge.compare(pairs, both_orders=False, max_think_tokens=budget)
    stats = {"eval/accuracy": metrics.summarize(pairs, verdicts)["accuracy"]}
    for terms in sorted({pair.meta["terms"] for pair in pairs if "terms" in pair.meta}):
        chosen = [(p, v) for p, v in zip(pairs, verdicts) if p.meta.get("terms") == terms]
        stats[f"eval/accuracy_{terms}_terms"] = metrics.summarize(*zip(*chosen))["accuracy"]
    shares = patterns([thought for verdict in verdicts for thought in verdict.thoughts])
    return stats | {f"eval/patterns_{group}": share for group, share in shares.items()}


def show(judge, pairs, budget=None):
    """[(thought, verdict), ...] of pairs, by one vote each in the given order: the examples."""
    verdicts = judge.compare(pairs, both_orders=False, max_think_tokens=budget)
    return [(v.thoughts[0] if v.thoughts else "", v.winner) for v in verdicts]


def examples(pairs, before, after):
    """Held-out pairs with the thinking before and after training, as lines of text."""
    for pair, *answers in zip(pairs, before, after):
        query, a, b = (textwrap.shorten(str(text), 200) for text in (pair.query, pair.a, pair.b))
        yield f"\n{query!r}  1: {a!r}  2: {b!r}  (right: {pair.label})"
        for when, (thought, winner) in zip(("before", "after"), answers):
            mark = "right" if winner == pair.label else "wrong"
            yield f"  {when:6s} thinks {textwrap.shorten(thought, 400)!r}, says {winner} ({mark})"


# -- a policy

ANCHOR_SEED, EVAL_SEED = 2**32, 2**32 + 1  # of held-out responses, always the same; apart


class HeldOut:
    """Held-out queries, by which a policy in training is watched from its start on.

    cfg: PolicyRunConfig; start: what `start` held when a resumed run began, else the policy is now
    at its start: one answer to each query, the anchors, and its `best_of`.
    """

    def __init__(self, policy, referee, source, cfg, start=None):
        self.policy, self.referee, self.cfg = policy, referee, cfg
        self.queries = source.held_out(cfg.eval_prompts)
        self.start = start or {"anchors": self._answers(ANCHOR_SEED)[1], "before": self._best_of()}

    def evaluate(self):
        """One response to each query, against its anchor: metrics.

        A win rate that rises while the accuracy does not, or while responses grow and grow, says
        that the policy has learnt to please the judge.
        """
        if not self.queries:
            return {}
        responses, answers = self._answers(EVAL_SEED)
        pairs = list(zip(answers, self.start["anchors"]))
        better = self.referee.prefer([query.text for query in self.queries], pairs)
        return {
            **accuracy("eval/accuracy", self.queries, [[answer] for answer in answers]),
            "eval/win_rate": (better.count(0) + 0.5 * better.count(None)) / len(better),
            "eval/mean_length": mean(len(response.ids) for response in responses),
            "eval/no_answer_ratio": mean(answer == NO_ANSWER for answer in answers),
        }

    def compare_with_start(self):
        """`compared` with the start; {} if no truth is known."""
        return compared(self.start["before"], self._best_of())

    def _answers(self, seed):
        groups, answers = respond(self.policy, self.queries, seed=seed)
        return [group[0] for group in groups], [group[0] for group in answers]

    def _best_of(self):
        cfg = self.cfg
        return best_of_n(self.policy, self.referee, self.queries, cfg.best_of, cfg.seed)


def respond(policy, queries, n=1, seed=0):
    """n responses to each of P queries -> Completions [P][n], answers [P][n]; not for training."""
    questions, groups = policy.respond(queries, n, seed, logprobs=False)
    return groups, policy.answers(questions, groups)


def best_of_n(policy, referee, queries, n, seed=0):
    """`bestof.best_of` among n responses to each query whose truth is known; {} without any."""
    queries = [query for query in queries if query.truth is not None]
    if not queries or not n:
        return {}
    _, answers = respond(policy, queries, n, seed)
    rankings = [
        Ranking(query.text, group, [text == query.truth for text in group])
        for query, group in zip(queries, answers)
    ]
    return best_of(referee, rankings, seed)


def compared(before, after):
    """Two results of `best_of` -> {line: [mean, low, high]}, with 95% intervals.

    Means with Wilson's interval; then differences, paired by query, with the normal one: what
    training gained for one sample, and a knockout over one sample and over the majority.
    """
    if not before:
        return {}
    lines = {}
    for when, ways in (("before", before), ("after", after)):
        for way, scores in ways.items():
            low, high = wilson(sum(scores), len(scores))
            lines[f"{when}: {way}"] = [sum(scores) / len(scores), low, high]
    lines["gain of one"] = difference(after["one"], before["one"])
    for way in ("one", "majority"):
        lines[f"before: knockout - {way}"] = difference(before["knockout"], before[way])
    return lines


def comparison_text(lines):
    """What `compared` says, as a table."""
    rows = [
        f"{name:28s} {mean:6.1%} [{low:6.1%}, {high:6.1%}]"
        for name, (mean, low, high) in lines.items()
    ]
    return "\n".join(["right answers to held-out queries [95%]", *rows] if rows else [])
