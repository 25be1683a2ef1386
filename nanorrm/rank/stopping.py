"""When votes on a pair suffice: rules over plain counts, and a judge that stops by them.

A rule answers `needed(ones, twos, left)`: how many more votes it takes at the least until the
outcome could be settled; 0 when it is. So one can ask for that many at once and never for one too
many. The paper always takes all votes.
"""

from collections import Counter
from math import ceil, log

from nanorrm.config import UserError
from nanorrm.rank.play import fresh_seed


class Curtailed:
    """Stop once the votes that are left can't change the winner: exactly the full vote's outcome.

    Invalid votes count as cast. Of 9 votes 5 come first, and they suffice if they all agree:

    >>> [Curtailed().needed(*votes) for votes in [(0, 0, 9), (5, 0, 4), (4, 1, 4), (2, 2, 5)]]
    [5, 0, 1, 3]
    """

    def needed(self, ones, twos, left):
        """Votes until the leader can no longer be caught, if all of them are for the leader."""
        lead = abs(ones - twos)
        return (left - lead) // 2 + 1 if 0 < left >= lead else 0


class Sequential(Curtailed):
    """Wald's sequential test: stop as well once one side is ahead by `lead` votes.

    Assumes independent votes of which the better response gets a share of 1/2 + margin or more,
    averaged over the orders it is shown in. Then stopping on the wrong side has at most the
    probability alpha, whenever one looks and however few votes are left (Ville's inequality for
    the likelihood ratio r ** -lead, r = (1/2 + margin) / (1/2 - margin)). Closer pairs, which the
    assumption leaves out, go on for longer and can end either way.

    >>> Sequential(alpha=0.05, margin=0.2).lead
    4
    """

    def __init__(self, alpha=0.05, margin=0.2):
        if not 0 < alpha < 1:
            raise UserError(f"alpha = {alpha} should be between 0 and 1: an error rate")
        if not 0 < margin < 0.5:
            raise UserError(f"margin = {margin} should be between 0 and 0.5: a share above half")
        self.lead = ceil(log(1 / alpha) / log((0.5 + margin) / (0.5 - margin)))

    def needed(self, ones, twos, left):
        """As Curtailed, or fewer where the lead comes sooner."""
        return min(super().needed(ones, twos, left), max(0, self.lead - abs(ones - twos)))


class AdaptiveJudge:
    """A judge that asks in batches and leaves out the pairs that are settled.

    judge: anything with `seed` and compare(pairs, votes, both_orders, seed=, ...) -> Verdicts. Use
    it in the place of that judge. `counts` holds the votes cast and those saved. The winners are
    what the rule promises; p_first of a pair that stopped early leans away from 1/2.
    """

    def __init__(self, judge, rule):
        self.judge, self.rule, self.seed = judge, rule, judge.seed
        self.counts = Counter()

    def compare(self, pairs, votes=1, both_orders=True, seed=None, **how):
        """As the judge's own; votes is the most there can be per order.

        Each batch asks every pair that is open for as many votes as could settle the first of them.
        """
        seed = self.seed if seed is None else seed
        orders, cast = 1 + both_orders, 0  # cast: on each open pair, per order
        verdicts = [None] * len(pairs)
        needed = dict.fromkeys(range(len(pairs)), self.rule.needed(0, 0, votes * orders))
        while needed:  # index of an open pair -> votes that could settle it
            more = min(ceil(n / orders) for n in needed.values())
            batch = [pairs[i] for i in needed]
            fresh = fresh_seed(seed, f"after {cast}") if cast else seed
            answers = self.judge.compare(batch, more, both_orders, seed=fresh, **how)
            cast += more
            left = (votes - cast) * orders
            for i, answer in zip(list(needed), answers):
                verdicts[i] = verdicts[i] + answer if verdicts[i] else answer
                said = verdicts[i].votes
                needed[i] = self.rule.needed(said.count(1), said.count(2), left)
                if not needed[i] or not answer.votes:  # settled, or it can't be judged
                    del needed[i]
                if said:
                    self.counts["cast"] += len(answer.votes)
                    self.counts["saved"] += 0 if i in needed else left
        return verdicts
