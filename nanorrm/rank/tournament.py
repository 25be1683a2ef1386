"""Who meets whom: knockout, round robin, k random opponents, anchors, Swiss.

A tournament is a generator: it yields the matches [(a, b), ...] of a round, is sent the winners (a
or b; None for a draw), and returns its champion. `run_tournaments` drives many in lockstep, so that
a thousand knockouts of 32 cost five calls of `play`. The authors' knockout is for powers of two;
here any number enters. Pure bookkeeping: what an entrant is, only `play` knows.
"""

from collections import Counter
from dataclasses import dataclass, field
from itertools import chain, combinations

from nanorrm.config import UserError


@dataclass
class Result:
    """What became of a tournament."""

    champion: int | None = None  # None: several lead, and there was no rng to draw lots
    matches: list[tuple] = field(default_factory=list)  # (round from 1, a, b, winner or None)
    rounds: int = 0

    def by_round(self):
        """The matches of each round: [[(a, b, winner or None), ...], ...]."""
        rounds = range(1, self.rounds + 1)
        return [[tuple(match) for at, *match in self.matches if at == n] for n in rounds]


def run_tournaments(tournaments, play):
    """Drive tournaments in lockstep -> list of Result.

    play(matches: list of (tournament index, a, b)) -> list of winners; called once a round with the
    matches of all tournaments that still run. Raises ValueError if its answer does not fit.

    >>> strong = lambda matches: [max(a, b) for _, a, b in matches]
    >>> result, _ = run_tournaments([knockout(3), round_robin(4)], strong)
    >>> result.champion, result.rounds, result.matches
    (2, 2, [(1, 1, 2, 2), (2, 0, 2, 2)])
    """
    results = [Result() for _ in tournaments]
    answers = dict.fromkeys(range(len(tournaments)))  # what each waits for; None starts it
    while answers:
        rounds = {}
        for index, winners in answers.items():
            try:
                rounds[index] = tournaments[index].send(winners)
            except StopIteration as end:
                results[index].champion = end.value
        if not rounds:
            break
        asked = [(index, a, b) for index, matches in rounds.items() for a, b in matches]
        winners = list(play(asked))
        if len(winners) != len(asked):
            raise ValueError(f"{len(asked)} matches were played, {len(winners)} winners came back")
        answers = {index: [] for index in rounds}
        for index in rounds:
            results[index].rounds += 1
        for (index, a, b), winner in zip(asked, winners):
            if winner not in (a, b, None):
                raise ValueError(f"{winner} can't win a match of {a} and {b}")
            answers[index].append(winner)
            results[index].matches.append((results[index].rounds, a, b, winner))
    return results


def knockout(n, rng=None, bracket=None):
    """Single elimination of n entrants: n - 1 matches, every one with a winner.

    bracket: the slots of the first round in order, a power of two of them, None for a bye; without
    it, seeded by a random order (rng, a random.Random) or by index (0 the strongest). Byes come in
    round one only, at most one to an entrant, and every part of the bracket gets its share of them.
    """
    enough(n, 1, "entrants")
    if bracket is None:
        bracket = seeded(rng.sample(range(n), n) if rng else range(n))
    bracket = list(bracket)
    size = len(bracket)
    if size & (size - 1) or not size:
        raise UserError(f"a bracket of {size} slots: should be a power of two (None is a bye)")
    if sorted(slot for slot in bracket if slot is not None) != list(range(n)):
        raise UserError(f"a bracket of {n} entrants should hold each of 0 to {n - 1} once")
    for slot in range(0, size - 1, 2):
        if bracket[slot] is None and bracket[slot + 1] is None:
            raise UserError(f"bracket slots {slot} and {slot + 1} are both a bye")
    return eliminate(bracket)


def eliminate(slots):
    """The rounds of a knockout: neighbours meet, and so do the winners."""
    while len(slots) > 1:
        pairs = list(zip(slots[::2], slots[1::2]))
        winners = yield [pair for pair in pairs if None not in pair]
        if None in winners:
            raise ValueError("a knockout needs a winner in every match")
        winners = iter(winners)
        slots = [  # a bye's neighbour goes on
            next(winners) if None not in (a, b) else b if a is None else a for a, b in pairs
        ]
    return slots[0]


def seeded(order):
    """Entrants, strongest first -> bracket where the best meet late and the best get the byes.

    >>> seeded("abcde")
    ['a', None, 'd', 'e', 'b', None, 'c', None]
    """
    order = list(order)
    seeds = [0]
    while len(seeds) < len(order):
        seeds = [seed for s in seeds for seed in (s, 2 * len(seeds) - 1 - s)]
    return [order[seed] if seed < len(order) else None for seed in seeds]


def round_robin(n, rng=None):
    """All n(n - 1)/2 pairs in one round; with an rng, shuffled, each in an order by coin flip."""
    enough(n, 1, "entrants")
    return one_round(n, list(combinations(range(n), 2)), rng)


def random_opponents(n, k, rng):
    """Each of n plays k distinct random others: n * k matches in one round, shuffled and flipped.

    A pair can meet twice, once by each side's draw (so the paper's authors).
    """
    enough(k, 1, "opponents")
    enough(n, k + 1, "entrants")
    others = [[b for b in range(n) if b != a] for a in range(n)]
    return one_round(n, [(a, b) for a in range(n) for b in rng.sample(others[a], k)], rng)


def anchors(n, m, rng=None):
    """Each of n entrants against each of m anchors, whose indices are n to n + m - 1; one round."""
    enough(n, 1, "entrants")
    enough(m, 1, "anchors")
    return one_round(n, [(a, n + b) for a in range(n) for b in range(m)], rng)


def one_round(n, matches, rng):
    """Play these matches at once; champion of entrants 0 to n - 1 is the highest share of wins."""
    if rng:
        matches = [pair if rng.random() < 0.5 else pair[::-1] for pair in matches]
        rng.shuffle(matches)
    points = [0.0] * n
    if matches:
        award(points, matches, (yield matches))
        played = Counter(chain.from_iterable(matches))
        points = [won / played[i] for i, won in enumerate(points)]
    return leader(points, rng)


def swiss(n, rounds, rng):
    """Each round pairs entrants of about equal points that have not met; ties by lot.

    An odd one out has a bye, worth a win for the pairing, at most once each. There is always such
    a pairing for up to (n + 1) // 2 rounds, and no more are allowed (see `pair_up`).
    """
    enough(n, 2, "entrants")
    if not 1 <= rounds <= (n + 1) // 2:
        raise UserError(f"a Swiss of {n} takes 1 to {(n + 1) // 2} rounds, not {rounds}")
    return swiss_rounds(n, rounds, rng)


def swiss_rounds(n, rounds, rng):
    """The rounds of a Swiss; the bye is an entrant n, last in every ranking."""
    points, met = [0.0] * n, set()
    for _ in range(rounds):
        ranking = sorted(rng.sample(range(n), n), key=lambda i: -points[i]) + [n] * (n % 2)
        pairs = pair_up(ranking, met)
        met.update(map(frozenset, pairs))
        for pair in pairs:
            if n in pair:
                points[min(pair)] += 1
        matches = [pair if rng.random() < 0.5 else pair[::-1] for pair in pairs if n not in pair]
        award(points, matches, (yield matches))
    return leader(points, rng)


def pair_up(ranking, met):
    """Pairs of near neighbours in the ranking that have not met; met holds frozensets.

    Greedy from the top; then two who are left over break up a pair: u, v and (x, y) become (u, x)
    and (v, y). While everyone has at least half of the field still to meet, such a pair exists: the
    options of u and v together outnumber the players paired, so some pair has three of its four.

    >>> pair_up([0, 1, 2, 3], {frozenset((0, 1)), frozenset((2, 3))})
    [(0, 2), (1, 3)]
    >>> pair_up([0, 1, 2, 3], {frozenset((2, 3))})
    [(0, 3), (1, 2)]
    """

    def free(a, b):
        return frozenset((a, b)) not in met

    pairs, left = [], []
    waiting = list(ranking)
    while waiting:
        a = waiting.pop(0)
        b = next((b for b in waiting if free(a, b)), None)
        if b is None:
            left.append(a)
        else:
            waiting.remove(b)
            pairs.append((a, b))
    while left:
        u, v = left.pop(), left.pop()
        at, x, y = next(  # from the bottom, where the leftovers come from
            (i, x, y)
            for i in range(len(pairs) - 1, -1, -1)
            for x, y in (pairs[i], pairs[i][::-1])
            if free(u, x) and free(v, y)
        )
        pairs[at : at + 1] = [(x, u), (y, v)]
    return pairs


def award(points, matches, winners):
    """Add a round's results to the entrants' points: 1 for a win, 1/2 for a draw."""
    for (a, b), winner in zip(matches, winners):
        for side in (a, b):
            if side < len(points):  # an anchor has no points
                points[side] += 0.5 if winner is None else winner == side


def leader(points, rng):
    """Index of the most points; several have them: one by lot, None without an rng."""
    best = [i for i, p in enumerate(points) if p == max(points)]
    return best[0] if len(best) == 1 else rng.choice(best) if rng else None


def enough(number, low, what):
    """Raise UserError for too few of something."""
    if number < low:
        raise UserError(f"{number} {what}: should be at least {low}")
