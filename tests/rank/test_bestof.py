"""Many responses a query: strategies find the best, scores are the benchmarks' own, curves hold."""

import json
import re
from collections import Counter
from itertools import combinations
from random import Random

import numpy as np
import pytest
from fakes import FakeJudge, coin, first_slot, larger, solver, unreadable
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, hypergeom

from nanorrm.config import UserError
from nanorrm.data.sources import ToySource
from nanorrm.judge.verdict import Verdict
from nanorrm.measure import results, scaling
from nanorrm.measure.benchmarks import rankings_of, rewardbench2
from nanorrm.rank import bestof
from nanorrm.rank.referee import Referee
from nanorrm.records import Pair, Ranking


def numbers(n, queries=20):
    """Rankings whose best response is the largest number."""
    rankings = []
    for q in range(queries):
        values = [(7 * i + q) % n for i in range(n)]
        truth = [value == n - 1 for value in values]
        rankings.append(Ranking(f"q{q}", [str(v) for v in values], truth, str(q)))
    return rankings


@pytest.mark.parametrize("strategy", bestof.STRATEGIES)
@pytest.mark.parametrize("n", [2, 5, 8])
def test_every_strategy_finds_what_a_sure_judge_sees(strategy, n):
    rankings = numbers(n)
    ranked, play = bestof.rank(FakeJudge(larger), rankings, strategy)
    assert all(bestof.choose(strategy, *one) == 1 for one in zip(rankings, ranked))
    each = n - 1 if strategy == "knockout" else n * (n - 1) // 2
    assert (
        play.counts["matches"]
        == each * len(rankings)
        == sum(len(at) for one in ranked for at in one.rounds)
    )
    assert all(len(one.ratings) == n for one in ranked)
    assert all(max(one.ratings) == one.ratings[one.champion] for one in ranked)


def test_elo_with_few_opponents_costs_less():
    rankings = numbers(8)
    judge = FakeJudge(larger)
    ranked, play = bestof.rank(judge, rankings, "elo", opponents=2)
    assert play.counts["matches"] == 8 * 2 * len(rankings) and judge.calls == 1
    # the best one never loses, but with two opponents each others may not lose either
    share = np.mean([bestof.choose("elo", *one) for one in zip(rankings, ranked)])
    assert 0.4 < share < 1


def test_a_judge_that_sees_nothing_chooses_by_lot():
    """Draws all round: every response is champion about as often; chance of failing 1e-4."""
    rankings = [Ranking(f"q{i}", list("abcd"), [1, 0, 0, 0]) for i in range(400)]
    for strategy in ("knockout", "round_robin"):
        ranked, play = bestof.rank(FakeJudge(first_slot), rankings, strategy)
        champions = Counter(one.champion for one in ranked)
        assert min(champions.values()) > 60 and set(champions) == {0, 1, 2, 3}
        wanted = "coins" if strategy == "knockout" else "draws"
        assert play.counts[wanted] == play.counts["matches"]


def test_one_sample_majority_and_the_best():
    ranking = Ranking("q", ["1", "2", "2", "3"], [True, False, False, True])
    got = [bestof.choose(name, ranking) for name in ("one sample", "majority", "best possible")]
    assert got == [0.5, 0, 1]
    even = Ranking("q", ["1", "2"], [1, 0])
    assert bestof.choose("majority", even) == 0.5


def test_majority_is_of_answers():
    assert bestof.majority(["[NO ANSWER]"] * 2) == [0, 1]
    silent = Ranking("q", ["[NO ANSWER]", "[NO ANSWER]", "2"], [0, 0, 1])
    assert bestof.choose("majority", silent) == 1


def test_four_ways_to_end_with_one_response():
    """Of answers given equally often the first counts; a knockout is as good as its judge."""
    rankings = [
        Ranking("q0", ["1", "3", "3", "2"], [False, True, True, False]),
        Ranking("q1", ["2", "4", "1", "1"], [False, True, False, False]),
        Ranking("q2", ["1", "2", "1", "2"], [True, False, True, False]),
        Ranking("q3", ["[NO ANSWER]"] * 4, [False] * 4),
    ]
    referee = Referee(FakeJudge(larger))
    ways = bestof.best_of(referee, rankings[:3], seed=1)
    assert ways == {
        "one": [0.5, 0.25, 0.5],
        "majority": [1.0, 0.0, 1.0],
        "knockout": [1.0, 1.0, 0.0],
        "any": [1.0, 1.0, 1.0],
    }
    assert referee.report()["judge/comparisons"] > 0
    assert set(map(tuple, bestof.best_of(referee, rankings[3:]).values())) == {(0.0,)}


# -- RewardBench v2


def v2_row(number, subset, right, wrong):
    return {
        "id": number, "prompt": f"{subset} {number}", "subset": subset, "num_correct": len(right),
        "chosen": [str(r) for r in right], "rejected": [str(w) for w in wrong],
    }  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rewardbench2_of_known_judges(tmp_path):
    rows = [v2_row(str(i), "Math", [9], [1, 2, 3]) for i in range(30)]
    rows += [v2_row(str(i), "Focus", [0], [1, 2, 3]) for i in range(10)]  # a judge's blind spot
    rankings = rankings_of("rewardbench 2", write(tmp_path / "x.jsonl", rows))
    places = Counter(r.truth.index(1) for r in rankings)
    assert len(places) == 4  # the chosen response is not always the first
    for answer, wanted in ((larger, (1, 0, 0.5)), (first_slot, (0.25, 0.25, 0.25))):
        ranked, _ = bestof.rank(FakeJudge(answer), rankings, "bradley_terry")
        values, queries, weights = rewardbench2(rankings, [r.ratings for r in ranked])
        got = [
            results.over_queries(values, queries, None, weights[name])
            for name in ("Math", "Focus", "overall")
        ]
        assert [row["accuracy"] for row in got] == pytest.approx(wanted)
        assert [row["queries"] for row in got] == [30, 10, 40]


ratings = st.lists(st.integers(0, 6), min_size=3, max_size=6)


@given(st.lists(st.tuples(ratings, st.integers(1, 2), ratings), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_ties_score_equals_the_published_formula(drawn):
    """The formula of the benchmark's scoring code, over components rather than prompts."""
    rankings, rated = [], []
    for number, (ref, several, tied) in enumerate(drawn):
        for half, values, right in (("ref", ref, 1), ("tied", tied, several)):
            truth = [float(i < right) for i in range(len(values))]
            responses = [str(i) for i in range(len(values))]
            rankings.append(Ranking("q", responses, truth, f"{half}:{number}", "Ties"))
            rated.append(values)
    values, clusters, weights = rewardbench2(rankings, rated)
    gap = {"ref": [], "tied": []}
    for ranking, scores in zip(rankings, rated):
        right = [s for s, t in zip(scores, ranking.truth) if t]
        wrong = [s for s, t in zip(scores, ranking.truth) if not t]
        gap[ranking.id.split(":")[0]].append((min(right) - max(wrong), max(right) - min(right)))
    (ref, _), (tied, spread) = np.array(gap["ref"]).T, np.array(gap["tied"]).T
    least = np.minimum(ref, tied)
    with np.errstate(all="ignore"):
        margin = np.nan_to_num(np.tanh(least / spread - 1), nan=0.0)
    wanted = 0.3 * (tied > 0).mean() + 0.3 * (ref > 0).mean() + 0.2 * (tied > spread).mean()
    wanted += 0.2 * (least > spread).mean() + 0.01 * margin.mean()
    got = results.over_queries(values, clusters, None, weights["overall"])
    assert got["accuracy"] == pytest.approx(wanted)
    assert len(set(clusters)) == len(drawn)


def test_a_prompt_of_ties_without_its_other_half_is_not_scored():
    rankings = [Ranking("q", ["1", "2"], [1, 0], "ref:1", "Ties"),
                Ranking("q", ["1", "2"], [1, 0], "5", "Math")]  # fmt: skip
    values, _, weights = rewardbench2(rankings, [[1, 0], [1, 0]])
    assert values == [None, 1.0] and weights["overall"] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("name", "changes", "wanted"),
    [
        ("rewardbench 2", {"chosen": "x"}, "v1"),
        ("rewardbench 2", {"num_correct": 2}, "1 of 4"),
        ("rewardbench 2", {"rejected": []}, "1 of 1"),
        ("rewardbench 2", {"rejected": [None]}, "rejected should be text"),
    ],
)
def test_a_row_of_many_that_cannot_be_used_is_named(tmp_path, name, changes, wanted):
    row = {**v2_row("1", "Math", [9], [1, 2, 3]), **changes}
    with pytest.raises(UserError, match="line 1") as raised:
        rankings_of(name, write(tmp_path / "x.jsonl", [row]))
    assert wanted in str(raised.value)


# -- curves of test-time compute


def pooled(votes, swapped):
    return Verdict(list(votes), list(swapped))


@given(st.lists(st.sampled_from([1, 2, None]), min_size=1, max_size=6), st.integers(1, 14))
def test_votes_are_drawn_from_both_orders_evenly(half, v):
    votes = half + half
    verdict = pooled(votes, [i >= len(half) for i in range(len(votes))])
    verdict.votes = list(range(len(votes)))  # tell them apart
    drawn = scaling.drawn_votes(verdict, v, Random(v))
    assert len(drawn) == len(set(drawn)) == min(v, len(votes))
    assert abs(sum(i >= len(half) for i in drawn) - sum(i < len(half) for i in drawn)) <= 1


@pytest.mark.parametrize("v", [1, 3, 5])
def test_voted_credit_equals_counting(v):
    """Votes of one order, 4 of 6 right: the chance of a right majority is hypergeometric."""
    verdict = pooled([1, 1, 1, 1, 2, 2], [False] * 6)
    chance = hypergeom(6, 4, v).sf(v // 2)
    got = scaling.voted_credit(Pair("", "", "", 1), verdict, v, draws=20000)
    assert got == pytest.approx(chance, abs=0.015)


def test_votes_raise_accuracy_as_condorcet_says():
    pairs = ToySource(0).held_out(400, (4, 5))
    verdicts = FakeJudge(solver(0.7)).compare(pairs, votes=8)
    curves = scaling.over_votes(pairs, verdicts)["curves"]
    assert list(curves) == ["4 terms", "5 terms", "all"]
    for v, accuracy, low, high in curves["all"]:
        tie = binom(v, 0.7).pmf(v / 2) if v % 2 == 0 else 0
        wanted = binom(v, 0.7).sf(v / 2) + tie / 2
        assert low - 0.01 < wanted < high + 0.01 and low <= accuracy <= high
    assert [v for v, *_ in curves["all"]] == [1, 2, 4, 8, 16]


def test_more_comparisons_find_the_right_response_more_often():
    rankings = ToySource(0).rankings(60, 8, (4,))
    assert all(len(set(r.responses)) == 8 and sum(r.truth) == 1 for r in rankings)
    judge = FakeJudge(solver(0.8))
    curves = scaling.over_strategies(judge, rankings, both_orders=True)["curves"]
    knockouts = [accuracy for _, accuracy, *_ in curves["knockout"]]
    assert knockouts[0] < knockouts[-1] and knockouts[-1] > 0.8
    spent = [x for x, *_ in curves["elo"]]
    assert spent == sorted(spent) and curves["elo"][0][1] < curves["elo"][-1][1]


def test_budgets_double():
    assert scaling.doubling([Verdict(vote_tokens=[300, 5])], most=3) == [128, 256, 512]
    assert scaling.doubling([Verdict()]) == [1]


# -- the commands


@pytest.fixture
def judge(monkeypatch):
    def answer(rule):
        fake = FakeJudge(rule)
        monkeypatch.setattr("nanorrm.judge.open.open_judge", lambda cfg: fake)
        return fake

    return answer


def saved(tmp_path):
    lines = (tmp_path / "out" / "records.jsonl").read_text().splitlines()
    return json.loads((tmp_path / "out" / "results.json").read_text()), [*map(json.loads, lines)]


def ppe_row(number, right):
    values = list(range(4))
    row = {f"response_{i + 1}": str(v) for i, v in enumerate(values)}
    truth = [v >= 4 - right for v in values]
    return {"question_id": number, "prompt": f"q{number}", "scores": truth, **row,
            "sampled_conflict_pairs": [[0, 3]]}  # fmt: skip


def test_ppe_best_of_k(cli, judge, tmp_path):
    judge(larger)
    write(tmp_path / "x.jsonl", [ppe_row(i, 1 + i % 2) for i in range(12)])
    args = ["--data", "x.jsonl", "--task", "best_of_k", "--out", "out"]
    code, out, err = cli("eval.py", "ppe", *args)
    assert code == 0, err
    found, records = saved(tmp_path)
    assert found["scores"]["end_score"] == found["scores"]["max_score"] == 1
    assert 0 < found["scores"]["loss"] < 0.01  # a knockout says little of who lost early
    assert found["rows"]["one sample"]["accuracy"] == pytest.approx(1.5 / 4)
    assert found["rows"]["knockout"]["accuracy"] == 1
    assert "36 matches = 36 asked + 0 repeated + 0 identical = 36 decided" in out
    assert len(records) == 12 and records[0]["kind"] == "ranking"
    assert records[0]["champion"] == 3 and len(records[0]["rounds"]) == 2
    a, b, winner, votes = records[0]["rounds"][0][0]
    assert winner == max(a, b) and [v["vote"] for v in votes] == [1 if a > b else 2] * 2
    assert "report.html" in {path.name for path in (tmp_path / "out").iterdir()}
    code, out, err = cli("eval.py", "ppe", "--data", "x.jsonl", "--task", "best_of_k",
                         "--strategy", "round_robin", "--out", "all")  # fmt: skip
    assert code == 0 and "loss 0.0000" in out and "72 matches" in out, err
    code, out, err = cli("eval.py", "--compare", "out", "all")
    assert code == 0 and "12 in both" in out, err


def test_rewardbench2_end_to_end(cli, judge, tmp_path):
    judge(unreadable(1.0))
    rows = [v2_row(str(i), "Math", [9], [1, 2, 3]) for i in range(6)]
    write(tmp_path / "x.jsonl", rows)
    args = ["rewardbench", "--version", 2, "--data", "x.jsonl", "--out", "out"]
    code, out, err = cli("eval.py", *args)
    assert code == 0, err
    found, _ = saved(tmp_path)
    assert found["rows"]["overall"]["accuracy"] == 0.25  # nothing read: one of four
    assert "36 matches" in out and "36 drawn" in out and "! 100.0% of the votes" in out
    code, _, err = cli("eval.py", "rewardbench", "--data", "x.jsonl")
    assert code == 2 and "--version 2" in err
    code, _, err = cli("eval.py", "rewardbench", "--version", 3)
    assert code == 2 and "version" in err


def test_best_of_n_adds_up(cli, judge, tmp_path):
    judge(larger)
    rows = [
        {"query": f"q{i}", "responses": ["1", "1", "2", "5"], "truth": [0, 0, 0, 1]}
        for i in range(10)
    ]
    write(tmp_path / "x.jsonl", rows)
    code, out, err = cli("eval.py", "bon", "--data", "x.jsonl", "--out", "out")
    assert code == 0, err
    found, records = saved(tmp_path)
    accuracy = {name: row["accuracy"] for name, row in found["rows"].items()}
    assert accuracy == {
        "one sample": 0.25, "majority": 0, "knockout": 1, "elo": 1, "round_robin": 1,
        "best possible": 1,
    }  # fmt: skip
    assert found["rows"]["round_robin"]["matches"] == 6
    assert Counter(r["meta"]["strategy"] for r in records) == dict.fromkeys(
        ("knockout", "elo", "round_robin"), 10
    )
    assert records[0]["truth"] == [0, 0, 0, 1]
    for line in out.splitlines():
        if "matches =" in line:
            total, asked, repeated, same, *rest = map(int, re.findall(r"\d+", line))
            assert total == asked + repeated + same == sum(rest)


def test_a_limit_of_queries_adds_up(cli, judge, tmp_path):
    judge(larger)
    row = {"responses": ["1", "2"], "truth": [0, 1]}
    write(tmp_path / "x.jsonl", [{"query": f"q{i}", **row} for i in range(7)])
    code, out, _ = cli("eval.py", "bon", "--data", "x.jsonl", "--limit", 3)
    assert code == 0 and "3 judged + 4 beyond --limit = 7 queries" in out


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        (["bon"], ["--data", "responses", "truth"]),
        (["bon", "--data", "open.jsonl"], ["open.jsonl", "1 of 1", "truth"]),
        (["bon", "--strategies", "swiss"], ["swiss", "knockout"]),
        (["bon", "--opponents", "-1"], ["opponents"]),
        (["ppe", "--task", "best"], ["task", "best_of_k"]),
        (["ppe", "--data", "ppe.jsonl", "--task", "best_of_k"], ["ppe.jsonl", "2 to 4"]),
        (["scaling", "--budgets", "-1"], ["budgets"]),
        (["scaling", "--size", "1"], ["size"]),
        (["scaling", "--rankings", "open.jsonl"], ["open.jsonl", "truth"]),
    ],
)
def test_errors_are_one_line(cli, judge, tmp_path, args, wanted):
    fake = judge(coin)
    write(tmp_path / "open.jsonl", [{"query": "q", "responses": ["1", "2"]}])
    short = {**ppe_row(2, 1), "scores": [True, False]}
    del short["response_3"], short["response_4"]
    write(tmp_path / "ppe.jsonl", [ppe_row(1, 1), short])
    code, _, err = cli("eval.py", *args)
    assert code == 2 and len(err.splitlines()) == 1 and not fake.asked, err
    assert all(word in err for word in wanted)


def test_scaling_on_the_embedded_world(cli, judge, tmp_path):
    judge(solver(0.8))
    args = ["--pairs", 10, "--queries", 3, "--votes", 2, "--budgets", 4, 8, "--out", "out"]
    code, out, err = cli("eval.py", "scaling", *args)
    assert code == 0, err
    found, records = saved(tmp_path)
    assert list(found["curves"]) == ["votes", "thinking tokens", "generations per query"]
    votes = found["curves"]["votes"]
    assert list(votes) == [*(f"{n} terms" for n in range(2, 7)), "all"]
    assert [x for x, *_ in votes["all"]] == [1, 2, 4]
    assert [x for x, *_ in found["curves"]["thinking tokens"]["all"]] == [4, 8]
    assert found["settings"]["temperature"] == 1.5
    assert all(name in out for name in ("6 terms", "knockout", "round_robin"))
    assert len(records) > 150 and all(record["kind"] == "pair" for record in records)


def test_scaling_of_a_file(cli, judge, root, tmp_path):
    judge(coin)
    path = root / "tests" / "data" / "pairs_chosen.jsonl"
    code, _, err = cli("eval.py", "scaling", "--data", path, "--budgets", 2, "--out", "out")
    assert code == 0, err
    found, _ = saved(tmp_path)
    assert list(found["curves"]) == ["votes", "thinking tokens"]
    assert found["settings"]["temperature"] == 0.6


def test_all_pairs_are_met_once():
    """The cost of round robin, from its records."""
    ranked, _ = bestof.rank(FakeJudge(larger), numbers(6, 3), "round_robin")
    for one in ranked:
        met = sorted(tuple(sorted(match[:2])) for match in one.rounds[0])
        assert met == list(combinations(range(6), 2))
