"""Tournaments decided by a judge: matches become pairs, verdicts winners, and all is counted.

A match without a winner (votes tied, none valid, or the pair can't be judged) is a draw where
the format has draws; where it needs a winner it gets one more round of votes, then a seeded coin.
"""

import random
from collections import Counter

from nanorrm.rank.rating import win_rate
from nanorrm.rank.tournament import anchors, run_tournaments
from nanorrm.records import Pair


class JudgedPlay:
    """The `play` of run_tournaments that asks a judge, one batch a round.

    judge: a Judge (or AdaptiveJudge); queries [P] and responses [P][N]: tournament i is about query
    i, entrant a is responses[i][a]; votes, both_orders and further settings go to judge.compare;
    draws: leave matches without a winner drawn; seed: of the coin.

    The same two texts on the same query are asked once (in one order: once each way), and identical
    texts never. `counts` adds up: matches = asked + repeated + identical = decided + coins + draws;
    of the pairs asked, `again` got another round of votes and `skipped` could not be judged; votes,
    invalid and tokens are what the judge spent.
    """

    def __init__(
        self, judge, queries, responses, votes=1, both_orders=True, draws=False, seed=0, **how
    ):
        self.judge, self.queries, self.responses = judge, queries, responses
        self.how = {"votes": votes, "both_orders": both_orders, **how}
        self.draws, self.seed = draws, seed
        self.counts = Counter()
        self.heard = {}  # (query, first text, second text) -> Verdict

    def __call__(self, matches):
        """Matches [(tournament, a, b)] -> winners."""
        new = {}  # what to ask; of equal questions the first
        for match in matches:
            key = _, first, second = self._key(*match)
            if first == second:
                self.counts["identical"] += 1
            elif key in self.heard or key in new:
                self.counts["repeated"] += 1
            else:
                new[key] = Pair(self.queries[match[0]], first, second)
        self._ask(new)
        self.counts["matches"] += len(matches)
        self.counts["asked"] += len(new)
        return [self._winner(*match) for match in matches]

    def verdict(self, index, a, b):
        """What the judge said of a match, votes of 1 being for a; None if it was not asked."""
        key = self._key(index, a, b)
        heard = self.heard.get(key)
        return heard.flipped() if heard and key[1] != self.responses[index][a] else heard

    def _key(self, index, a, b):
        """What a match asks; in both orders it does not matter who is a."""
        texts = self.responses[index][a], self.responses[index][b]
        if self.how["both_orders"]:
            texts = sorted(texts)
        return str(self.queries[index]), *texts

    def _ask(self, new):
        """Hear the judge on new pairs, twice where a winner is needed and there is none."""
        if not new:
            return
        self.heard.update(zip(new, self.judge.compare(list(new.values()), **self.how)))
        said = {} if self.draws else {key: self.heard[key] for key in new}
        tied = [key for key, v in said.items() if v.winner is None and not v.skipped]
        if tied:
            seed, pairs = fresh_seed(self.judge.seed, "once more"), [new[key] for key in tied]
            for key, more in zip(tied, self.judge.compare(pairs, seed=seed, **self.how)):
                self.heard[key] += more
            self.counts["again"] += len(tied)
        for key in new:
            verdict = self.heard[key]
            self.counts["skipped"] += bool(verdict.skipped)
            self.counts["votes"] += len(verdict.votes)
            self.counts["invalid"] += verdict.invalid
            self.counts["tokens"] += verdict.tokens

    def _winner(self, index, a, b):
        verdict = self.verdict(index, a, b)
        if verdict and verdict.winner:
            self.counts["decided"] += 1
            return (a, b)[verdict.winner - 1]
        if self.draws:
            self.counts["draws"] += 1
            return None
        self.counts["coins"] += 1
        low, high = sorted((a, b), key=lambda i: (self.responses[index][i], i))
        key = self._key(index, low, high)
        return random.Random(f"{self.seed}:{key}").choice((low, high))


def single_scores(judge, queries, responses, references, votes=1, both_orders=True, seed=0, **how):
    """Score single responses: the win rate of each against other responses to its query.

    queries [P], responses [P], references [P][M >= 1]: given ones, or samples of a policy. In one
    batch; the order shown is by seeded coin, or both. Returns [P] shares from 0 to 1, a match
    without a winner counting half.
    """
    texts = [[response, *others] for response, others in zip(responses, references)]
    play = JudgedPlay(judge, queries, texts, votes, both_orders, draws=True, **how)
    rng = random.Random(seed)
    results = run_tournaments([anchors(1, len(others), rng) for others in references], play)
    return [win_rate(len(group), r.matches)[0] for group, r in zip(texts, results)]


def fresh_seed(seed, label):
    """A seed for further votes: the same for the same label, else unrelated, in 31 bits."""
    return random.Random(f"{seed}:{label}").getrandbits(31)
