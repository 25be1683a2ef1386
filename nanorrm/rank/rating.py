"""Matches -> numbers: Elo as the paper uses it, Bradley-Terry with errors, win rates.

A match is a tuple that ends in (a, b, winner), as tournaments record them: winner is a, b, or None
for a draw, which is half a win for each everywhere. A match that no verdict decided (votes tied, or
none valid) is a draw; `referee.Referee` counts those. All raters are rater(n, matches) -> list
of n numbers, more is better.
"""

import math

import numpy as np

from nanorrm.config import UserError


def scored(n, matches):
    """Matches as (a, b, share of the win that a gets); raises UserError for one that can't be."""
    for match in matches:
        *_, a, b, winner = match
        if not (0 <= a < n and 0 <= b < n) or a == b or winner not in (a, b, None):
            raise UserError(f"{tuple(match)} is no match between two of {n} entrants")
        yield a, b, 0.5 if winner is None else float(winner == a)


def elo(n, matches, initial=1000.0, base=10.0, scale=400.0, k=4.0):
    """Elo ratings, updated match by match in the given order (the paper's, by evalica's defaults).

    a is expected to win 1 / (1 + base ** ((b - a) / scale)); k times the surprise goes from the
    loser to the winner.

    >>> [round(rating, 3) for rating in elo(3, [(0, 1, 0), (1, 2, None)])]
    [1002.0, 998.012, 999.988]
    """
    ratings = [float(initial)] * n
    half = math.log(base) / (2 * scale)
    for a, b, won in scored(n, matches):
        # the logistic function as tanh, which can't overflow
        expected = 0.5 + 0.5 * math.tanh((ratings[a] - ratings[b]) * half)
        ratings[a] += k * (won - expected)
        ratings[b] -= k * (won - expected)
    return ratings


def reward_from_elo(rating):
    """Elo rating -> reward around 1/2, as in the authors' code: at k = 4 it spans 0.42 to 0.58.

    Harmless where advantages are divided by the group's std, far too flat where they are not.
    """
    return (rating - 1000) / 200 + 0.5


def win_rate(n, matches):
    """Share of its matches that each entrant won, draws half; 1/2 for one without a match.

    >>> win_rate(4, [(0, 1, 0), (0, 2, None)])
    [0.75, 0.0, 0.5, 0.5]
    """
    won, played = [0.0] * n, [0] * n
    for a, b, share in scored(n, matches):
        for side, part in ((a, share), (b, 1 - share)):
            won[side] += part
            played[side] += 1
    return [w / p if p else 0.5 for w, p in zip(won, played)]


def survival(n, matches):
    """Knockout rank: the share of the rounds that each survived; 1 for the champion.

    matches: (round, a, b, winner). In a knockout's result, losers of one round share a rank.

    >>> survival(4, [(1, 0, 1, 1), (1, 2, 3, 2), (2, 1, 2, 1)])
    [0.0, 1.0, 0.5, 0.0]
    """
    rounds = [0] * n
    for (at, *_), (a, b, won) in zip(matches, scored(n, matches)):
        if won == 0.5:
            raise UserError(f"entrants {a} and {b} drew: a knockout has no draws")
        winner, loser = (a, b) if won else (b, a)
        rounds[winner], rounds[loser] = at, at - 1
    last = max(rounds, default=0)
    return [r / last if last else 1.0 for r in rounds]


def bradley_terry(n, matches, prior=1.0):
    """Bradley-Terry log-strengths of most posterior weight: P(a beats b) = sigmoid(s_a - s_b).

    prior: in matches: as if each entrant had drawn so many against a reference of strength 0. That
    is a proper prior (a generalised logistic density), so an undefeated entrant stays finite and
    one without a match is 0. prior = 0 is maximum likelihood, centred on 0; it exists only where
    chains of wins lead from everyone to everyone, UserError else.

    Newton's method on a concave function, until the largest gradient entry (wins had minus wins
    expected) is below 1e-12 per match.

    >>> [round(s, 4) for s in bradley_terry(2, [(0, 1, 0)] * 3 + [(0, 1, 1)], prior=0)]
    [0.5493, -0.5493]
    """
    wins, s = win_matrix(n, matches, prior), np.zeros(n)
    free = 0.0 if prior else 1 / n  # without a prior nothing else pins their mean
    enough = 1e-12 * max(1.0, wins.sum())
    for _ in range(100):
        gradient, curvature = derivatives(wins, s, prior)
        if np.abs(gradient).max(initial=0) <= enough:
            return s.tolist()
        step = np.linalg.solve(curvature + free, gradient)
        now, rise, t = log_posterior(wins, s, prior), gradient @ step, 1.0
        while log_posterior(wins, s + t * step, prior) < now + 1e-4 * t * rise - 1e-12 * abs(now):
            t /= 2
        s = s + t * step  # without a prior the steps have mean zero: s stays centred
    raise FloatingPointError(f"Bradley-Terry: a gradient of {np.abs(gradient).max():g} remains")


def standard_errors(n, matches, ratings, prior=1.0):
    """Standard errors of `bradley_terry` ratings, from the curvature at them (Laplace).

    With prior = 0 they are of the centred log-strengths. They assume independent matches: votes on
    one pair by one judge are not quite.
    """
    wins = win_matrix(n, matches, prior)
    _, curvature = derivatives(wins, np.asarray(ratings, float), prior)
    free = 0.0 if prior else 1 / n
    return np.sqrt(np.diag(np.linalg.inv(curvature + free) - free)).tolist()


def win_matrix(n, matches, prior):
    """[n, n] wins of row over column; raises UserError if there is no finite optimum."""
    if not 0 <= prior < math.inf:
        raise UserError(f"prior = {prior} should be at least 0: a number of matches")
    wins = np.zeros((n, n))
    for a, b, won in scored(n, matches):
        wins[a, b] += won
        wins[b, a] += 1 - won
    if prior == 0:
        beats = (wins > 0) | np.eye(n, dtype=bool)
        for _ in range(n.bit_length()):  # chains of twice the length
            beats = beats @ beats
        if not beats.all():
            a, b = np.argwhere(~beats)[0].tolist()
            raise UserError(
                f"no chain of wins leads from entrant {a} to {b}: Bradley-Terry has no finite "
                "optimum, give a prior above 0"
            )
    return wins


def log_posterior(wins, s, prior):
    """Log-likelihood of the wins plus the log-density of the prior (up to a constant)."""
    lost = np.logaddexp(0, s[None, :] - s[:, None])  # -log P(row beats column)
    reference = np.logaddexp(0, s) + np.logaddexp(0, -s)
    return -(wins * lost).sum() - prior / 2 * reference.sum()


def derivatives(wins, s, prior):
    """Gradient [n] and negative Hessian [n, n] of `log_posterior`."""
    p = 0.5 + 0.5 * np.tanh((s[:, None] - s[None, :]) / 2)
    games = wins + wins.T
    level = 0.5 + 0.5 * np.tanh(s / 2)  # chance to beat the reference
    gradient = (wins - games * p).sum(1) + prior * (0.5 - level)
    weight = games * p * p.T
    curvature = np.diag(weight.sum(1) + prior * level * (1 - level)) - weight
    return gradient, curvature
