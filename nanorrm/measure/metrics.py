"""Numbers about verdicts: accuracy with intervals, how pairs came out, best-of-k curves, tests.

Pure functions of pairs, verdicts and numbers; nothing here runs a model.
"""

from collections import Counter

import numpy as np

from nanorrm.measure.patterns import PHRASES
from nanorrm.measure.statistics import bootstrap, mean, roc_auc, standardise

OUTCOMES = ("right", "wrong", "tied", "invalid", "skipped")  # invalid: no vote could be read
SHARES = ("accuracy", "accuracy_readable", "voted", "consistency", "first_slot", "unreadable")
FORMATS = {  # metric -> how the terminal and report.html write it
    **dict.fromkeys((*SHARES, "truncated", *PHRASES), "{:.1%}"),
    **dict.fromkeys(("tokens_per_vote", "think_tokens_per_pair", "matches"), "{:.1f}"),
}


def written(metric, value):
    """A metric's value as people read it, `-` for None; by FORMATS, never by a guess.

    >>> written("accuracy", 0.8231), written("matches", 1.0), written("pairs", 2985)
    ('82.3%', '1.0', '2,985')
    """
    if value is None or isinstance(value, bool | str):
        return "-" if value is None else str(value)
    plain = "{:,}" if isinstance(value, int) else "{:,.2f}"
    return FORMATS.get(metric, plain).format(value)


def outcome(pair, verdict):
    """How one pair came out: right, wrong, tied, invalid or skipped; None without a label.

    tied: as many valid votes for one response as for the other (with one vote per order: the two
    orders disagree). invalid: no vote could be read. skipped: the pair was never judged.
    """
    if verdict.skipped:
        return "skipped"
    if verdict.p_first is None:
        return "invalid"
    if verdict.winner is None:
        return "tied"
    if pair.label is None:
        return None
    return "right" if verdict.winner == pair.label else "wrong"


def credit(pair, verdict):
    """Share of right votes; one that can't be read, or a skipped pair, is not right."""
    return verdict.votes.count(pair.label) / len(verdict.votes) if verdict.votes else 0.0


def credit_readable(pair, verdict):
    """Share of right votes among those that can be read; None if there are none."""
    if verdict.p_first is None:
        return None
    return verdict.p_first if pair.label == 1 else 1 - verdict.p_first


def summarize(pairs, verdicts, weights=None):
    """Counts and shares over labelled pairs.

    accuracy: share of right votes, unreadable ones and skipped pairs counting as not right,
    averaged over all pairs; accuracy_readable: among the votes that could be read, averaged over
    the pairs that have any; voted: share of pairs whose votes together are right, a tie counting
    half. These three are weighted by `weights`, where given, and a pair of weight 0 is left out of
    everything. Intervals: bootstrap over queries (votes of a pair and pairs of a query are not
    independent).
    """
    weights = [1.0] * len(pairs) if weights is None else weights
    judged = [one for *one, weight in zip(pairs, verdicts, weights) if weight]
    weights = [weight for weight in weights if weight]
    outcomes = [outcome(pair, verdict) for pair, verdict in judged]
    queries = [str(pair.query) for pair, _ in judged]
    summary = {"pairs": len(judged), **{name: outcomes.count(name) for name in OUTCOMES}}
    for name, values in (
        ("accuracy", [credit(*one) for one in judged]),
        ("accuracy_readable", [credit_readable(*one) for one in judged]),
        ("voted", [{"right": 1, "tied": 0.5}.get(one, 0) for one in outcomes]),
    ):
        summary[name] = mean(values, weights)
        summary[f"{name}_interval"] = bootstrap(values, queries, weights)
    return {**summary, **shares([verdict for _, verdict in judged])}


def shares(verdicts):
    """What verdicts show without any label.

    consistency: share of pairs judged in both orders whose orders agree; first_slot: share of the
    readable votes that name Assistant 1; unreadable and truncated: shares of the votes. skips: the
    most frequent reasons why pairs were not judged; failed_tries: at an endpoint, by kind.
    """
    votes = sum(len(verdict.votes) for verdict in verdicts)
    orders = [verdict.by_order() for verdict in verdicts]

    def per_vote(name):
        return sum(getattr(verdict, name) for verdict in verdicts) / votes if votes else None

    return {
        "readable_pairs": sum(any(verdict.votes) for verdict in verdicts),
        "consistency": mean([a == b if a and b else None for a, b in orders]),
        "first_slot": mean([slot == 1 for v in verdicts for slot in v.slots if slot]),
        "unreadable": per_vote("invalid"),
        "truncated": per_vote("truncated"),
        "tokens_per_vote": per_vote("tokens"),
        "think_tokens_per_pair": mean([v.think_tokens for v in verdicts if v.votes]),
        "skips": dict(Counter(v.skipped for v in verdicts if v.skipped).most_common(3)),
        "cut": sum(bool(v.cut) for v in verdicts),
        "failed_tries": dict(sum((v.errors for v in verdicts), Counter())),
    }


def best_of_k_curve(ratings, truth, permutations=100, seed=0):
    """Truth of the best rated of the first k responses, k = 1..K, and what an oracle would get.

    ratings, truth [Q][K] -> (curve [K], oracle [K]), means over the prompts and over random orders
    of each prompt's responses, as in PPE. Among equal ratings the first in that order is taken.

    >>> curve, oracle = best_of_k_curve([[1, 2]] * 2, [[0, 1], [1, 0]])
    >>> float(curve[1]), float(oracle[1])  # the judge is right about one of two prompts
    (0.5, 1.0)
    """
    rng = np.random.default_rng(seed)
    curves = []
    for scores, values in zip(np.asarray(ratings, float), np.asarray(truth, float)):
        orders = rng.permuted(np.tile(np.arange(len(scores)), (permutations, 1)), axis=1)
        shown, gained = scores[orders], values[orders]  # [permutations, K]
        leader = np.stack([shown[:, : k + 1].argmax(1) for k in range(len(scores))], 1)
        taken = np.take_along_axis(gained, leader, 1)
        curves.append((taken.mean(0), np.maximum.accumulate(gained, axis=1).mean(0)))
    return tuple(np.mean(curves, axis=0))


def best_of_k_scores(ratings, truth, permutations=100, seed=0):
    """PPE's numbers of a best-of-K benchmark: curve, oracle, loss, max_score, end_score, auc.

    loss: mean over k of the squared gap between the two curves; max_score: the curve's maximum;
    end_score: its value at k = K; auc: over all responses, ratings standardised per prompt.
    """
    curve, oracle = best_of_k_curve(ratings, truth, permutations, seed)
    flat = np.concatenate([standardise(row) for row in ratings])
    return {
        "curve": curve.tolist(),
        "oracle": oracle.tolist(),
        "loss": float(((oracle - curve) ** 2).mean()),
        "max_score": float(curve.max()),
        "end_score": float(curve[-1]),
        "auc": roc_auc(flat, np.concatenate([np.asarray(row) > 0.5 for row in truth])),
    }
