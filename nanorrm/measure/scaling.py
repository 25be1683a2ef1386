"""What more test-time compute buys: curves over votes, comparisons and thinking tokens.

Votes are drawn from one set of verdicts: what v votes would have said is averaged over random
choices of v of the votes, half from each order, so all points of a curve share their generations.
"""

import random

from nanorrm.judge.verdict import majority
from nanorrm.measure import metrics, statistics
from nanorrm.rank import bestof


def drawn_votes(verdict, v, rng):
    """v of a verdict's votes, as evenly from both orders as v allows; fewer if there are fewer."""
    orders = [[], []]
    for vote, swapped in zip(verdict.votes, verdict.swapped):
        orders[swapped].append(vote)
    for votes in orders:
        rng.shuffle(votes)
    rng.shuffle(orders)
    long, short = orders
    paired = [vote for pair in zip(long, short) for vote in pair]
    return (paired + long[len(short) :] + short[len(long) :])[:v]


def voted_credit(pair, verdict, v, draws=16, seed=0):
    """Chance that v of a pair's votes decide rightly: a tie is half right, no readable vote wrong.

    By that many random draws, so it is near 0.75 here, where one vote of four is wrong:

    >>> from nanorrm.records import Pair
    >>> from nanorrm.judge.verdict import Verdict
    >>> verdict = Verdict([1, 1, 1, 2], [False, False, True, True])
    >>> [voted_credit(Pair("", "", "", 1), verdict, v, draws=4000) for v in (2, 4)]
    [0.746, 1.0]
    """
    rng, total = random.Random(f"{seed}|{pair.query}|{pair.a}|{pair.b}|{v}"), 0.0
    for _ in range(draws):
        votes = drawn_votes(verdict, v, rng)
        winner = majority(votes)
        total += 0.5 if winner is None and any(votes) else winner == pair.label
    return total / draws


def doubling(verdicts, most=7):
    """Budgets of thinking tokens, doubling up to the longest answer there was.

    >>> from nanorrm.judge.verdict import Verdict
    >>> doubling([Verdict(vote_tokens=[9, 30])])
    [1, 2, 4, 8, 16, 32]
    """
    longest = max((n for verdict in verdicts for n in verdict.vote_tokens), default=1)
    top = (longest - 1).bit_length()
    return [2**k for k in range(max(0, top - most + 1), top + 1)]


def difficulty(item):
    """What a pair or ranking says of its difficulty, else where it is from."""
    return item.meta.get("terms", item.meta.get("difficulty", item.source or "-"))


def panel(points, items, label, seed):
    """{x: a value per item} -> a panel of curves, one per difficulty and one over all."""
    kinds = [difficulty(item) for item in items]
    groups = {}
    for kind in sorted(set(kinds), key=lambda kind: (isinstance(kind, str), kind)):
        name = f"{kind} terms" if isinstance(kind, int) else kind
        groups[name] = [i for i, k in enumerate(kinds) if k == kind]
    groups = {**(groups if len(groups) > 1 else {}), "all": range(len(items))}
    curves = {}
    for name, members in groups.items():
        queries = [str(items[i].query) for i in members]
        curves[name] = [
            point(x, [values[i] for i in members], queries, seed) for x, values in points.items()
        ]
    return {"x": label, "log": True, "curves": curves}


def point(x, values, queries, seed):
    """(x, mean, low, high) of a curve."""
    return (x, statistics.mean(values), *statistics.bootstrap(values, queries, seed=seed))


def over_votes(pairs, verdicts, seed=0):
    """Accuracy of 1, 2, 4... votes and all of them."""
    most = max((len(verdict.votes) for verdict in verdicts), default=1)
    counts = sorted({2**k for k in range(most.bit_length())} | {most})
    points = {v: [voted_credit(*one, v, seed=seed) for one in zip(pairs, verdicts)] for v in counts}
    return panel(points, pairs, "votes per pair", seed)


def over_budgets(judge, pairs, budgets, seed=0, **how):
    """Accuracy of one vote per order under each budget of thinking tokens."""
    points = {}
    for budget in sorted(set(budgets)):
        verdicts = judge.compare(pairs, 1, max_think_tokens=budget, **how)
        points[budget] = [metrics.credit(*one) for one in zip(pairs, verdicts)]
    return panel(points, pairs, "thinking tokens at most", seed)


def over_strategies(judge, rankings, seed=0, **how):
    """Whether the right response is chosen against generations per query, by strategy.

    knockout with 1, 2 and 4 votes per order; elo against 1, 2, 4... random opponents; round robin.
    """
    size = max(len(ranking.responses) for ranking in rankings)
    elos = [2**k for k in range((size - 1).bit_length()) if 2**k < size - 1]
    runs = [("knockout", 0, votes) for votes in (1, 2, 4)]
    runs += [("elo", k, 1) for k in elos] + [("elo", 0, 1), ("round_robin", 0, 1)]
    queries, curves = [str(ranking.query) for ranking in rankings], {}
    for strategy, opponents, votes in runs:
        ranked, play = bestof.rank(judge, rankings, strategy, opponents, seed, votes=votes, **how)
        values = [bestof.choose(strategy, *one) for one in zip(rankings, ranked)]
        spent = round(play.counts["votes"] / len(rankings), 1)
        curves.setdefault(strategy, []).append(point(spent, values, queries, seed))
    return {"x": "generations per query", "log": True, "curves": curves}


def rows(panels):
    """The points of all curves as rows of a table: {name: {"x", "accuracy", interval}}."""
    return {
        f"{title}: {name}, {x}": {"accuracy": y, "accuracy_interval": (low, high)}
        for title, panel in panels.items()
        for name, points in panel["curves"].items()
        for x, y, low, high in points
    }


def grid(title, curves):
    """Lines of a table: for each curve, its points and below them the accuracies."""
    width = max(len(name) for name in [title, *curves])
    heads = None
    for name, points in curves.items():
        xs = [x for x, *_ in points]
        if xs != heads:
            yield f"{title if heads is None else '':{width}}" + "".join(f"{x:>22}" for x in xs)
            heads = xs
        cells = (f"{y:6.1%} [{low:4.0%}, {high:4.0%}]" for _, y, low, high in points)
        yield f"{name:{width}}" + "".join(f"{cell:>22s}" for cell in cells)
