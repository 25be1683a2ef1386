"""The best of N responses to a query: by tournament before a pairwise judge, and without a judge.

knockout (the paper's for 32 candidates) needs N - 1 comparisons; elo (the paper's for 8) lets each
response meet `opponents` random others, or all of them, in a random order; round_robin takes the
win rates over all pairs, bradley_terry the log-strengths behind them. All queries play their round
together, so the judge gets one batch a round.
"""

from collections import Counter
from dataclasses import dataclass
from random import Random

from nanorrm.config import one_of
from nanorrm.judge.verdict import NO_ANSWER
from nanorrm.rank import rating
from nanorrm.rank.play import JudgedPlay
from nanorrm.rank.tournament import knockout, random_opponents, round_robin, run_tournaments

RATERS = {
    "knockout": rating.survival,
    "elo": rating.elo,
    "round_robin": rating.win_rate,
    "bradley_terry": rating.bradley_terry,
}
STRATEGIES = tuple(RATERS)


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


def rank(judge, rankings, strategy="knockout", opponents=0, seed=0, **how):
    """Rank the responses of each Ranking -> (list of Ranked, the JudgedPlay with its counts).

    how: votes, both_orders and further settings of judge.compare. Matches without a winner are
    draws but in a knockout. Of several best rated responses one is drawn by lot, from the seed and
    the place in the list.
    """
    one_of("strategy", strategy, STRATEGIES)
    queries, texts = [r.query for r in rankings], [r.responses for r in rankings]
    play = JudgedPlay(judge, queries, texts, draws=strategy != "knockout", seed=seed, **how)
    rngs = [Random(f"{seed}/{place}") for place in range(len(rankings))]
    field = [tournament(strategy, len(t), opponents, rng) for t, rng in zip(texts, rngs)]
    ranked = []
    for group, rng, result in zip(texts, rngs, run_tournaments(field, play)):
        ratings = RATERS[strategy](len(group), result.matches)
        best = [i for i, r in enumerate(ratings) if r == max(ratings)]
        champion = result.champion if strategy == "knockout" else rng.choice(best)
        ranked.append(Ranked(champion, ratings, result.by_round()))
    return ranked, play


def majority(texts):
    """Where the texts stand that were given most often; "[NO ANSWER]" only if all are that.

    >>> majority(["7", "[NO ANSWER]", "[NO ANSWER]", "8", "8"]), majority(["7", "8"])
    ([3, 4], [0, 1])
    """
    count = Counter(text for text in texts if text != NO_ANSWER) or Counter(texts)
    return [i for i, text in enumerate(texts) if count[text] == max(count.values())]


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
    if strategy == "best possible":
        return max(truth)
    if strategy in ("one sample", "majority"):
        taken = range(len(truth)) if strategy == "one sample" else majority(ranking.responses)
        return sum(truth[i] for i in taken) / len(taken)
    return truth[ranked.champion]


def best_of(referee, rankings, seed=0):
    """What four ways to end with one response of each Ranking are worth -> {way: [P] numbers}.

    "one" sample (the mean over all), "majority" (the first of texts given equally often), the
    Referee's "knockout", and "any": the best of them, the limit.
    """
    rng = Random(f"best of:{seed}")
    brackets = [knockout(len(r.responses), rng) for r in rankings]
    queries, texts = [r.query for r in rankings], [r.responses for r in rankings]
    champions = [r.champion for r in referee.play(queries, texts, brackets, False, seed)]
    first = [majority(group)[0] for group in texts]
    return {
        "one": [choose("one sample", r) for r in rankings],
        "majority": [float(r.truth[i]) for r, i in zip(rankings, first)],
        "knockout": [float(r.truth[i]) for r, i in zip(rankings, champions)],
        "any": [choose("best possible", r) for r in rankings],
    }
