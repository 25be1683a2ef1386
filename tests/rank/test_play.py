"""Matches through a judge: what is asked, what is not, what a draw becomes; the counts add up."""

import random
from collections import Counter

import pytest

from nanorrm.judge.verdict import Verdict
from nanorrm.rank import tournament as t
from nanorrm.rank.play import JudgedPlay, single_scores
from nanorrm.rank.stopping import AdaptiveJudge, Curtailed


class Opinion:
    """A judge that votes by `vote(query, a, b, seed) -> 1 | 2 | None`, whatever the order."""

    seed = 5

    def __init__(self, vote, skipped=None):
        self.vote, self.skipped = vote, skipped
        self.calls, self.asked = [], []

    def compare(self, pairs, votes=1, both_orders=True, seed=None, **how):
        self.calls.append((len(pairs), votes, both_orders, how))
        self.asked += [(pair.query, pair.a, pair.b) for pair in pairs]
        seed = self.seed if seed is None else seed
        verdicts = []
        for pair in pairs:
            if pair.a == self.skipped or pair.b == self.skipped:
                verdicts.append(Verdict(skipped="too long"))
                continue
            n = votes * (1 + both_orders)
            said = [self.vote(pair.query, pair.a, pair.b, seed) for _ in range(n)]
            verdicts.append(Verdict(said, [i >= votes for i in range(n)], tokens=3 * n))
        return verdicts


def longer(query, a, b, seed):
    return 1 if len(a) > len(b) else 2 if len(b) > len(a) else None


WORDS = ["a", "bb", "ccc", "dddd", "eeeee", "ffffff", "ggggggg", "hhhhhhhh"]


def add_up(play):
    c = play.counts
    assert c["matches"] == c["asked"] + c["repeated"] + c["identical"]
    assert c["matches"] == c["decided"] + c["coins"] + c["draws"]
    assert c["votes"] == sum(len(v.votes) for v in play.heard.values())
    assert c["tokens"] == sum(v.tokens for v in play.heard.values())
    return c


def test_the_judge_decides_a_batch_a_round():
    rng = random.Random(0)
    responses = [rng.sample(WORDS, 8) for _ in range(30)]
    judge = Opinion(longer)
    play = JudgedPlay(judge, [f"q{i}" for i in range(30)], responses, votes=2, max_think_tokens=9)
    results = t.run_tournaments([t.knockout(8, rng) for _ in responses], play)
    assert [group[r.champion] for r, group in zip(results, responses)] == [WORDS[-1]] * 30
    assert judge.calls == [(30 * n, 2, True, {"max_think_tokens": 9}) for n in (4, 2, 1)]
    c = add_up(play)
    assert c["asked"] == c["decided"] == 30 * 7 and c["votes"] == 4 * 30 * 7 and not c["invalid"]


def test_equal_questions_are_asked_once_in_a_tournament():
    """Paper-style random opponents meet twice now and then; the order does not matter."""
    rng, judge = random.Random(1), Opinion(longer)
    play = JudgedPlay(judge, ["q"], [WORDS], draws=True)
    [result] = t.run_tournaments([t.random_opponents(8, 4, rng)], play)
    pairs = {frozenset(match[1:3]) for match in result.matches}
    c = add_up(play)
    assert len(judge.asked) == c["asked"] == len(pairs) and c["repeated"] == 32 - len(pairs) > 0
    assert all(winner == max(a, b) for _, a, b, winner in result.matches)
    beaten = {min(match[1:3]) for match in result.matches}
    assert result.champion not in beaten


def test_in_one_order_each_way_is_its_own_question():
    play = JudgedPlay(Opinion(lambda *_: 1), ["q"], [["x", "y"]], both_orders=False)
    assert play([(0, 0, 1), (0, 1, 0), (0, 0, 1)]) == [0, 1, 0]  # always the first one shown
    assert add_up(play)["asked"] == 2 and play.counts["repeated"] == 1


def test_other_queries_are_other_questions():
    judge = Opinion(lambda query, a, b, seed: 1 if (query == "min") == (a < b) else 2)
    play = JudgedPlay(judge, ["min", "max", "min"], [["x", "y"]] * 3)
    assert play([(0, 0, 1), (1, 0, 1), (2, 1, 0)]) == [0, 1, 0]
    assert add_up(play)["asked"] == 2


@pytest.mark.parametrize("draws", [True, False])
def test_identical_responses_are_never_asked(draws):
    judge = Opinion(longer)
    play = JudgedPlay(judge, ["q"], [["same"] * 8], draws=draws)
    tournament = t.round_robin(8) if draws else t.knockout(8)
    [result] = t.run_tournaments([tournament], play)
    c = add_up(play)
    assert not judge.calls and c["identical"] == c["matches"] == (28 if draws else 7)
    assert c["draws" if draws else "coins"] == c["matches"]
    assert (result.champion is None) == draws


def undecided(query, a, b, seed):
    return None


def test_a_match_without_a_winner_gets_one_more_round_then_a_coin():
    judge = Opinion(undecided)
    queries = [f"q{i}" for i in range(400)]
    play = JudgedPlay(judge, queries, [["x", "y"]] * 400)
    results = t.run_tournaments([t.knockout(2) for _ in queries], play)
    assert [call[0] for call in judge.calls] == [400, 400]
    c = add_up(play)
    assert c["again"] == c["coins"] == 400 and c["votes"] == c["invalid"] == 4 * 400
    heads = sum(result.champion for result in results)
    assert abs(heads - 200) < 50  # 5 sd


def test_the_second_round_of_votes_is_a_fresh_one_and_can_decide():
    judge = Opinion(lambda query, a, b, seed: None if seed == Opinion.seed else longer("", a, b, 0))
    play = JudgedPlay(judge, ["q"], [["x", "yy"]])
    assert play([(0, 0, 1)]) == [1]
    c = add_up(play)
    assert c["again"] == c["decided"] == 1 and c["coins"] == 0
    assert (c["votes"], c["invalid"]) == (4, 2)


def test_draws_stay_draws_where_the_format_has_them():
    judge = Opinion(undecided)
    play = JudgedPlay(judge, ["q"], [["x", "y"]], draws=True)
    assert play([(0, 0, 1)]) == [None]
    assert len(judge.calls) == 1 and add_up(play)["draws"] == 1


def test_coins_are_fixed_by_the_seed_not_by_order_or_batch():
    def coins(seed, swap=False, texts="xy"):
        queries = [f"q{i}" for i in range(60)]
        play = JudgedPlay(Opinion(undecided), queries, [list(texts)] * 60, seed=seed)
        return [texts[i] for i in play([(i, 1, 0) if swap else (i, 0, 1) for i in range(60)])]

    assert coins(0) == coins(0, swap=True) == coins(0, texts="yx") != coins(1)
    agree = sum(a == b for a, b in zip(coins(0), coins(1)))
    assert 10 < agree < 50  # unrelated: 30 +- 5 sd


def test_a_pair_that_can_not_be_judged_is_not_asked_again():
    judge = Opinion(longer, skipped="endless")
    play = JudgedPlay(judge, ["q"], [["x", "endless", "yy"]])
    winners = play([(0, 0, 1), (0, 0, 2)])
    assert winners[0] in (0, 1) and winners[1] == 2
    c = add_up(play)
    assert c["skipped"] == c["coins"] == 1 and c["again"] == 0 and len(judge.calls) == 1


def test_verdicts_can_be_read_from_either_side():
    judge = Opinion(lambda query, a, b, seed: 1 if a == "b" else 2)  # for "b"
    play = JudgedPlay(judge, ["q"], [["b", "a", "a"]])
    assert play([(0, 0, 1)]) == [0]
    assert play.verdict(0, 0, 1).winner == 1 and play.verdict(0, 1, 0).winner == 2
    one, other = play.verdict(0, 0, 1), play.verdict(0, 1, 0)
    assert one.slots == other.slots and one.swapped == [not s for s in other.swapped]
    assert play.verdict(0, 1, 2) is None


def test_an_adaptive_judge_plays_the_same_and_saves():
    responses = [random.Random(i).sample(WORDS, 8) for i in range(10)]
    champions = []
    for judge in (Opinion(longer), AdaptiveJudge(Opinion(longer), Curtailed())):
        play = JudgedPlay(judge, ["q"] * 10, responses, votes=4)
        results = t.run_tournaments([t.knockout(8) for _ in responses], play)
        champions.append([r.champion for r in results])
        add_up(play)
    assert champions[0] == champions[1]
    assert judge.counts["saved"] > 0
    assert judge.counts["cast"] + judge.counts["saved"] == 8 * play.counts["asked"]


def test_single_scores_are_win_rates_against_references():
    judge = Opinion(longer)
    scores = single_scores(
        judge, ["q0", "q1"], ["ccc", "zz"], [["a", "bb", "dddd"], ["same", "zz", "y", "xx"]]
    )
    # q1 loses, equals itself, wins, and ties with a text as long
    assert scores == pytest.approx([2 / 3, (0 + 0.5 + 1 + 0.5) / 4])
    assert len(judge.calls) == 1


def test_single_scores_in_one_order_are_shown_either_way():
    judge = Opinion(lambda *_: 1)  # always the first
    references = [[str(i) for i in range(100)]]
    [score] = single_scores(judge, ["q"], ["x"], references, both_orders=False)
    assert 0.25 < score < 0.75  # 5 sd
    assert Counter(a == "x" for _, a, _ in judge.asked)[True] == round(100 * score)
