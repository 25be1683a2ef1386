"""N responses to a query, put in order by a pairwise judge: the strategies and what they cost.

knockout (the paper's for 32 candidates) needs N - 1 comparisons; elo (the paper's for 8) lets each
response meet `opponents` random others, or all of them, in a random order; round_robin takes the
win rates over all pairs, bradley_terry the log-strengths behind them. All queries play their round
together, so the judge gets one batch a round.
"""

import random
from collections import Counter
from dataclasses import dataclass

from nanorrm.config import one_of
from nanorrm.rank import rating
from nanorrm.rank.play import JudgedPlay
from nanorrm.rank.tournament import knockout, random_opponents, round_robin, run_tournaments

STRATEGIES = ("knockout", "elo", "round_robin", "bradley_terry")


@dataclass
class Ranked:
    """What a tournament says about one query's responses."""

    champion: int
    ratings: list[float]  # one per response, more is better; equal ones are possible
    rounds: list[list]  # [[(a, b, winner or None), ...], ...]


def tournament(strategy, n, opponents, rng):
    """The tournament of n responses that a strategy plays; opponents = 0: everyone meets all."""
    if strategy == "knockout":
        return knockout(n, rng)
    if strategy == "elo" and 0 < opponents < n - 1:
        return random_opponents(n, opponents, rng)
    return round_robin(n, rng)


def ratings_of(strategy, n, matches):
    """Matches [(round, a, b, winner or None)] -> one rating per response."""
    if strategy == "knockout":
        return rating.survival(n, matches)
    if strategy == "elo":
        return rating.elo(n, matches)
    return (rating.win_rate if strategy == "round_robin" else rating.bradley_terry)(n, matches)


def rank(judge, rankings, strategy="knockout", opponents=0, seed=0, **how):
    """Rank the responses of each Ranking -> (list of Ranked, the JudgedPlay with its counts).

    how: votes, both_orders and further settings of judge.compare. Matches without a winner are
    draws but in a knockout. Of several best rated responses one is drawn by lot, from the seed and
    the place in the list.
    """
    one_of("strategy", strategy, STRATEGIES)
    queries, texts = [r.query for r in rankings], [r.responses for r in rankings]
    play = JudgedPlay(judge, queries, texts, draws=strategy != "knockout", seed=seed, **how)
    rngs = [random.Random(f"{seed}/{place}") for place in range(len(rankings))]
    sizes = [len(responses) for responses in texts]
    field = [tournament(strategy, n, opponents, rng) for n, rng in zip(sizes, rngs)]
    ranked = []
    for n, rng, result in zip(sizes, rngs, run_tournaments(field, play)):
        ratings = ratings_of(strategy, n, result.matches)
        best = [i for i, r in enumerate(ratings) if r == max(ratings)]
        rounds = [[] for _ in range(result.rounds)]
        for at, *match in result.matches:
            rounds[at - 1].append(tuple(match))
        champion = result.champion if strategy == "knockout" else rng.choice(best)
        ranked.append(Ranked(champion, ratings, rounds))
    return ranked, play


def choose(strategy, ranking, ranked=None):
    """What a strategy's choice is worth: the truth of its champion, or of a choice without a judge.

    one sample: the mean over the responses; best possible: the best of them; majority: the text
    given most often (of several, the mean), a choice for short answers.

    >>> from nanorrm.records import Ranking
    >>> three = Ranking("7-4", ["3", "3", "4"], [1, 1, 0])
    >>> [choose(name, three) for name in ("one sample", "majority", "best possible")]
    [0.6666666666666666, 1.0, 1.0]
    """
    truth = [float(t) for t in ranking.truth]
    if strategy == "one sample":
        return sum(truth) / len(truth)
    if strategy == "best possible":
        return max(truth)
    if strategy == "majority":
        often = Counter(ranking.responses)
        most = [t for t, r in zip(truth, ranking.responses) if often[r] == max(often.values())]
        return sum(most) / len(most)
    return truth[ranked.champion]
