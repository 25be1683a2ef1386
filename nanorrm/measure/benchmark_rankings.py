"""Benchmarks of many responses a query (RewardBench v2, PPE best-of-K): rankings and scores.

Both were made for judges that rate a response by itself. A pairwise judge rates by a tournament:
RewardBench v2 by Bradley-Terry over all pairs of a query's responses, PPE by any strategy.
"""

import random
from math import tanh

from nanorrm.config import UserError
from nanorrm.data.formats import as_query, as_text
from nanorrm.measure.benchmarks import by, even, ppe_responses, rows_of
from nanorrm.records import Ranking


def rankings_of(name, path, columns=""):
    """A file of many responses a query -> list of Ranking.

    name: "rewardbench 2" or "ppe". RewardBench's chosen responses come first in the file and are
    shuffled here, by a stable seed.
    """
    rankings = []
    for where, row in rows_of(name, path, columns):
        query = as_query(row["prompt"], f"{where}: prompt")
        if name == "ppe":
            responses, truth = ppe_responses(where, row)
            number, source = row["question_id"], "ppe"
        else:
            responses, truth = [], []
            for column in ("chosen", "rejected"):
                if not isinstance(row[column], list):
                    raise UserError(f"{where}: {column} is no list: is this RewardBench v1?")
                responses += [as_text(text, f"{where}: {column}") for text in row[column]]
                truth += [float(column == "chosen")] * len(row[column])
            if row["num_correct"] != sum(truth) or not 0 < sum(truth) < len(truth):
                raise UserError(f"{where}: {sum(truth):.0f} of {len(truth)} responses are chosen")
            order = list(range(len(responses)))
            random.Random(f"{query}").shuffle(order)
            responses, truth = ([column[i] for i in order] for column in (responses, truth))
            number, source = row["id"], as_text(row["subset"], f"{where}: subset")
        rankings.append(Ranking(query, responses, truth, str(number), source))
    if not rankings:
        raise UserError(f"{name}: no rows in the file")
    return rankings


def rewardbench2(rankings, ratings):
    """RewardBench v2 -> (score of each ranking or None, cluster of each, rows of weights).

    A ranking's score is the share of right responses among its best rated ones, so one of two best
    is half right. In the subset Ties a prompt comes twice (ids ref:N and tied:N, one and several
    right answers) and has one score: 30% all right answers of `ref` above all wrong ones, 30% the
    same of `tied`, 20% the gap between right and wrong in `tied` above the spread of the right
    ones, 20% the same with the smaller gap of the two, plus 1% of tanh(gap / spread - 1). A prompt
    of which one half is missing has none. The overall score is the mean over the subsets.
    """
    values, clusters, gaps = [], [], {}
    for ranking, rated in zip(rankings, ratings):
        right = [r for r, t in zip(rated, ranking.truth) if t]
        wrong = [r for r, t in zip(rated, ranking.truth) if not t]
        best = max(rated)
        values.append(right.count(best) / (right + wrong).count(best))
        clusters.append(ranking.query)
        gaps[ranking.source, ranking.id] = (min(right) - max(wrong), max(right) - min(right))
    for place, ranking in enumerate(rankings):
        if ranking.source == "Ties":
            number = ranking.id.partition(":")[2]
            halves = [gaps.get(("Ties", f"{half}:{number}")) for half in ("ref", "tied")]
            values[place] = ties_score(*halves) if all(halves) else None
            clusters[place] = f"Ties {number}"
    subsets = [ranking.source for ranking in rankings]
    rows = by(subsets)
    scored = [None if v is None else (subset,) for v, subset in zip(values, subsets)]
    return values, clusters, {**rows, "overall": even(scored)}


def ties_score(ref, tied):
    """Score of a prompt of Ties from (gap, spread) of its two halves; see `rewardbench2`.

    >>> ties_score((2.0, 0.0), (1.0, 0.5))  # all right, and the gap is twice the spread
    1.0076159415595576
    """
    gap, spread = min(ref[0], tied[0]), tied[1]
    ratio = gap / spread if spread else float("inf") * gap if gap else 1.0
    return (
        0.3 * (tied[0] > 0)
        + 0.3 * (ref[0] > 0)
        + 0.2 * (tied[0] > spread)
        + 0.2 * (gap > spread)
        + 0.01 * tanh(ratio - 1)
    )
