"""Stopping rules against brute force and exact probabilities, and the judge that follows them."""

import random
from collections import Counter
from itertools import product
from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanorrm.config import UserError
from nanorrm.judge.verdict import Verdict, majority
from nanorrm.rank.play import fresh_seed
from nanorrm.rank.stopping import AdaptiveJudge, Curtailed, Sequential
from nanorrm.records import Pair


class Taped:
    """A judge that reads each pair's votes off tapes: {query: (given order, swapped)}."""

    seed = 0

    def __init__(self, tapes, skipped=()):
        self.tapes, self.skipped, self.read = tapes, skipped, Counter()
        self.calls = []

    def compare(self, pairs, votes=1, both_orders=True, seed=None, **how):
        self.calls.append((len(pairs), votes, seed, how))
        verdicts = []
        for pair in pairs:
            verdict = Verdict(tokens=10 * votes)
            if pair.query in self.skipped:
                verdict = Verdict(skipped="too long")
            else:
                at = self.read[pair.query]
                for swapped in (False, True)[: 1 + both_orders]:
                    verdict.votes += self.tapes[pair.query][swapped][at : at + votes]
                    verdict.swapped += [swapped] * votes
                self.read[pair.query] += votes
            verdicts.append(verdict)
        return verdicts


def coins(p, n, rng):
    return [1 if rng.random() < p else 2 for _ in range(n)]


VOTES = st.sampled_from([1, 2, None])


@given(st.lists(VOTES, max_size=8), st.integers(0, 6))
def test_curtailed_is_settled_when_no_completion_changes_the_winner(cast, left):
    """And `needed` is the shortest way there: brute force over all that could still be said."""

    def settled(cast, left):
        return (
            len({majority(cast + list(rest)) for rest in product((1, 2, None), repeat=left)}) == 1
        )

    needed = Curtailed().needed(cast.count(1), cast.count(2), left)
    assert (needed == 0) == settled(cast, left)
    shortest = next(
        n
        for n in range(left + 1)
        if any(settled(cast + list(more), left - n) for more in product((1, 2), repeat=n))
    )
    assert needed == shortest


@given(st.data(), st.integers(1, 6), st.booleans(), st.integers(1, 4))
def test_curtailed_judge_names_the_winner_of_the_full_vote(data, votes, both_orders, n):
    tape = st.lists(VOTES, min_size=votes, max_size=votes)
    tapes = {f"q{i}": data.draw(st.tuples(tape, tape)) for i in range(n)}
    pairs = [Pair(query, "x", "y") for query in tapes]
    judge = AdaptiveJudge(Taped(tapes), Curtailed())
    verdicts = judge.compare(pairs, votes, both_orders)
    full = [given + swapped * both_orders for given, swapped in tapes.values()]
    assert [v.winner for v in verdicts] == [majority(said) for said in full]
    assert judge.counts["cast"] == sum(len(v.votes) for v in verdicts)
    assert judge.counts["cast"] + judge.counts["saved"] == sum(map(len, full))


@given(st.lists(VOTES, min_size=1, max_size=9))
def test_one_pair_in_one_order_never_gets_a_vote_too_many(tape):
    [verdict] = AdaptiveJudge(Taped({"q": (tape, [])}), Curtailed()).compare(
        [Pair("q", "x", "y")], len(tape), both_orders=False
    )
    first = next(
        n
        for n in range(1, len(tape) + 1)
        if not Curtailed().needed(tape[:n].count(1), tape[:n].count(2), len(tape) - n)
    )
    assert len(verdict.votes) == first


def chance_of_stopping(rule, p_given, p_swapped, pairs_of_votes):
    """Exact chances that the lead ends the vote for the wrong and for the right response.

    The votes come two by two, one of each order, as the judge asks for them at the finest.
    """
    at, wrong, right = {0: 1.0}, 0.0, 0.0
    for _ in range(pairs_of_votes):
        moved = Counter()
        for lead, chance in at.items():
            for up, down in product((True, False), repeat=2):
                p = (p_given if up else 1 - p_given) * (p_swapped if down else 1 - p_swapped)
                moved[lead + (1 if up else -1) + (1 if down else -1)] += chance * p
        wrong += sum(chance for lead, chance in moved.items() if lead <= -rule.lead)
        right += sum(chance for lead, chance in moved.items() if lead >= rule.lead)
        at = {lead: chance for lead, chance in moved.items() if abs(lead) < rule.lead}
    return wrong, right


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("margin", [0.05, 0.2, 0.4])
def test_sequential_errs_at_most_alpha_exactly(alpha, margin):
    """Without position bias and with the most there can be, however long the vote."""
    rule = Sequential(alpha, margin)
    for bias in (0, (0.5 - margin) / 2, 0.5 - margin):
        p = 0.5 + margin
        wrong, right = chance_of_stopping(rule, p + bias, p - bias, 400)
        assert wrong <= alpha
        assert wrong + right > 0.99 or margin == 0.05  # 800 votes are enough for all but that
    if margin > 0.05:  # what the assumption leaves out
        assert chance_of_stopping(rule, 0.5, 0.5, 400)[0] > alpha


@pytest.mark.parametrize("p", [0.7, 0.8, 0.95])
def test_sequential_judge_errs_and_saves_as_promised(p):
    """2,000 pairs, a position-biased judge, at most 64 votes: error under alpha + 3 sigma."""
    rng, n, alpha = random.Random(f"{p}"), 2000, 0.05
    tapes = {f"q{i}": (coins(p + 0.04, 32, rng), coins(p - 0.04, 32, rng)) for i in range(n)}
    judge = AdaptiveJudge(Taped(tapes), Sequential(alpha, margin=0.2))
    verdicts = judge.compare([Pair(query, "x", "y") for query in tapes], votes=32)
    wrong = sum(v.winner != 1 for v in verdicts) / n
    assert wrong <= alpha + 3 * sqrt(alpha * (1 - alpha) / n)
    cast, saved = judge.counts["cast"], judge.counts["saved"]
    assert cast + saved == 64 * n and saved > 0.8 * 64 * n


def test_curtailed_saves_on_clear_pairs_and_errs_never():
    rng, n = random.Random(0), 1000
    tapes = {f"q{i}": (coins(0.9, 9, rng), []) for i in range(n)}
    judge = AdaptiveJudge(Taped(tapes), Curtailed())
    verdicts = judge.compare([Pair(q, "x", "y") for q in tapes], 9, both_orders=False)
    assert [v.winner for v in verdicts] == [majority(given) for given, _ in tapes.values()]
    # until 5 agree at p = 0.9: 5.55 of 9 votes on average, sd 0.76 a pair; within 5 sd
    assert abs(judge.counts["cast"] / n - 5.55) < 5 * 0.8 / sqrt(n)


def test_batches_ask_only_what_is_open_with_seeds_of_their_own():
    tapes = {"clear": ([1, 1, 1], []), "close": ([1, 2, 1], []), "split": ([1, None, 2], [])}
    taped = Taped(tapes)
    verdicts = AdaptiveJudge(taped, Curtailed()).compare(
        [Pair(q, "x", "y") for q in tapes], 3, both_orders=False, max_think_tokens=7
    )
    assert [len(v.votes) for v in verdicts] == [2, 3, 3]
    assert [v.tokens for v in verdicts] == [20, 30, 30]
    assert [call[:2] for call in taped.calls] == [(3, 2), (2, 1)]
    seeds = [seed for *_, seed, _ in taped.calls]
    assert seeds[0] == 0 and len(set(seeds)) == 2
    assert all(how == {"max_think_tokens": 7} for *_, how in taped.calls)


def test_a_skipped_pair_is_asked_once_and_saves_nothing():
    taped = Taped({"good": ([1] * 5, [])}, skipped=["long"])
    judge = AdaptiveJudge(taped, Curtailed())
    pairs = [Pair("long", "x", "y"), Pair("good", "x", "y")]
    skipped, good = judge.compare(pairs, 5, both_orders=False)
    assert skipped.skipped == "too long" and not skipped.votes
    assert len(good.votes) == 3 and judge.counts == {"cast": 3, "saved": 2}
    assert [call[:2] for call in taped.calls] == [(2, 3)]
    assert judge.compare([]) == []


def test_verdicts_add_up():
    one = Verdict([1, None], [False, True], ["a", "b"], tokens=5, truncated=1)
    two = Verdict([2], [False], ["c"], tokens=3)
    both = one + two
    assert both == Verdict([1, None, 2], [False, True, False], list("abc"), tokens=8, truncated=1)
    assert one.votes == [1, None]  # left as it was
    assert (one + Verdict(skipped="gone")).votes == [1, None]


def test_fresh_seeds_differ_and_repeat():
    seeds = {fresh_seed(seed, label) for seed in range(50) for label in range(50)}
    assert len(seeds) == 2500 and fresh_seed(0, 1) == fresh_seed(0, 1)
    assert all(0 <= seed < 2**31 for seed in seeds)


@pytest.mark.parametrize("alpha", [0, 1, float("nan")])
def test_alpha_is_an_error_rate(alpha):
    with pytest.raises(UserError, match="alpha"):
        Sequential(alpha)


@pytest.mark.parametrize("margin", [0, 0.5, -0.1])
def test_margin_is_a_share_above_half(margin):
    with pytest.raises(UserError, match="margin"):
        Sequential(margin=margin)
