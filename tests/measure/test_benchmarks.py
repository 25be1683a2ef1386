"""Public benchmarks: real files load as they are, known judges get the scores they must get."""

import json
from collections import Counter

import pytest
from fakes import FakeJudge, biased, coin, first_slot, often_right, oracle, says_a, unreadable
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import precision_recall_fscore_support

from nanorrm.config import UserError
from nanorrm.measure import benchmarks, metrics, results
from nanorrm.measure.benchmarks import pairs_of, rankings_of


@pytest.fixture
def of(tmp_path):
    """of(name, rows): the benchmark of a file with these rows."""

    def benchmark(name, rows, columns=""):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return pairs_of(name, path, columns)

    return benchmark


def judged(benchmark, answer, votes=1, both_orders=True):
    verdicts = FakeJudge(answer).compare(benchmark.pairs, votes, both_orders)
    rows = {k: metrics.summarize(benchmark.pairs, verdicts, w) for k, w in benchmark.rows.items()}
    return verdicts, metrics.summarize(benchmark.pairs, verdicts), rows


@pytest.fixture(scope="module")
def pandalm(data):
    return pairs_of("pandalm", data / "pandalm_test.json")


@pytest.fixture(scope="module")
def llmbar(data):
    return pairs_of("llmbar", data / "llmbar.jsonl")


@pytest.fixture(params=["pandalm", "llmbar"])
def real(request):
    return request.getfixturevalue(request.param)


def test_the_real_files_count_up(pandalm, llmbar):
    assert (len(pandalm.pairs), pandalm.left_out) == (894, {"ties": 105})
    assert Counter(pair.label for pair in pandalm.pairs) == {1: 422, 2: 472}
    assert sum("\n\n" in pair.query for pair in pandalm.pairs) > 500  # instruction and input
    assert (len(llmbar.pairs), llmbar.left_out) == (419, {})
    assert sum(sum(w > 0 for w in row) for k, row in llmbar.rows.items() if "/" in k) == 319
    assert sum(w > 0 for w in llmbar.rows["Natural"]) == 100


def test_an_oracle_is_right_everywhere(real):
    _, total, rows = judged(real, oracle)
    assert total["accuracy"] == total["voted"] == total["consistency"] == 1
    assert all(row["accuracy"] == pytest.approx(1) for row in rows.values())
    assert total["accuracy_interval"][0] > 0.97 and total["accuracy_interval"][1] == 1
    assert not list(results.flags(total, True))


def test_a_constant_judge_is_right_at_the_share_of_its_class(real):
    _, total, _ = judged(real, says_a)
    share = sum(pair.label == 1 for pair in real.pairs) / len(real.pairs)
    assert total["accuracy"] == pytest.approx(share)
    low, high = total["accuracy_interval"]
    assert low < share < high and high - low < 0.12


def test_a_coin_is_right_half_the_time(real):
    """Fails by chance for one seed in 20 were the seed not fixed."""
    _, total, _ = judged(real, coin)
    low, high = total["accuracy_interval"]
    assert low < 0.5 < high and high - low < 0.1


def test_pandalm_scores_of_known_judges(pandalm):
    for answer, wanted in ((oracle, 1.0), (says_a, 422 / 894)):
        verdicts, _, _ = judged(pandalm, answer)
        scores = benchmarks.scores("pandalm", pandalm, verdicts)
        assert scores["agreement"] == pytest.approx(wanted)
    # the constant judge's F1 by hand: one class at precision 422/894 and recall 1, the other at 0
    assert scores["macro f1"] == pytest.approx(2 * 422 / (894 + 422) / 2)
    assert scores["macro recall"] == 0.5


def test_pandalm_f1_equals_sklearn(pandalm):
    verdicts, _, _ = judged(pandalm, unreadable(0.3))
    verdicts2, _, _ = judged(pandalm, often_right(0.7))
    for found in (verdicts, verdicts2):
        labels = [pair.label for pair in pandalm.pairs]
        named = [verdict.winner or 0 for verdict in found]
        wanted = precision_recall_fscore_support(
            labels, named, labels=[1, 2], average="macro", zero_division=0
        )
        scores = benchmarks.scores("pandalm", pandalm, found)
        got = [scores[f"macro {name}"] for name in ("precision", "recall", "f1")]
        assert got == pytest.approx(wanted[:3])


def test_a_planted_position_bias_is_found(real):
    _, total, _ = judged(real, biased(0.4))
    assert total["first_slot"] == pytest.approx(0.7, abs=0.04)  # 40% + half of the rest
    # both orders agree only where neither vote was blind, or one blind vote happened to be right
    assert total["consistency"] == pytest.approx(0.6, abs=0.06)
    assert any("position bias" in line and "slot 1" in line for line in results.flags(total, True))
    _, total, _ = judged(real, first_slot)
    assert total["first_slot"] == 1 and total["consistency"] == 0 and total["voted"] == 0.5


def test_a_planted_share_of_unreadable_votes_is_found(real):
    _, total, _ = judged(real, unreadable(0.1), votes=2)
    assert total["unreadable"] == pytest.approx(0.1, abs=0.02)
    assert total["accuracy"] == pytest.approx(0.9, abs=0.02)
    assert total["accuracy_readable"] == 1
    said = list(results.flags(total, True))
    assert len(said) == 1 and "can't be read" in said[0]


def v1(subset, n=1):
    return [
        {"prompt": f"q{i}", "chosen": "yes", "rejected": "no", "subset": subset} for i in range(n)
    ]


def test_rewardbench_sections_have_their_sizes():
    sizes = {section: sum(of.values()) for section, of in benchmarks.SECTIONS.items()}
    reasoning = sizes["reasoning"] - 984 + 447
    assert [sizes["chat"], sizes["chat hard"], sizes["safety"], reasoning] == [358, 456, 740, 1431]


def test_rewardbench_weighs_by_hand(of):
    rows = [*v1("math-prm", 4), *v1("hep-cpp", 2), *v1("alpacaeval-easy", 5)]
    benchmark = of("rewardbench", rows)

    def answer(pair, swapped, rng):  # right about the code only
        return oracle(pair, swapped, rng) if pair.source == "hep-cpp" else None

    verdicts, total, table = judged(benchmark, answer)
    assert table["reasoning"]["accuracy"] == pytest.approx(164 / (984 + 164))
    assert table["chat"]["accuracy"] == 0
    assert table["overall"]["accuracy"] == pytest.approx(164 / (984 + 164) / 2)
    assert table["reasoning: hep-cpp"]["accuracy"] == 1
    assert total["accuracy"] == pytest.approx(2 / 11)
    half = benchmarks.scores("rewardbench", benchmark, verdicts)
    wanted = (0.5 + (164 + 984 / 2) / (984 + 164)) / 2
    assert half["overall, unreadable votes as half right"] == pytest.approx(wanted)
    assert "chat, reasoning" in benchmark.note


def test_the_preferred_response_is_shown_first_half_the_time(of):
    labels = Counter(pair.label for pair in of("rewardbench", v1("math-prm", 400)).pairs)
    assert 160 < labels[1] < 240  # four standard deviations


def rm(domain, n=1):
    texts = {"chosen": ["c0", "c1", "c2"], "rejected": ["r0", "r1", "r2"]}
    return [{"prompt": f"{domain}{i}", **texts, "domain": domain} for i in range(n)]


def test_rmbench_by_style(of):
    """A judge that likes the fancier style, whatever is right."""
    rows = [*rm("chat", 3), *rm("math"), *rm("safety-refuse"), *rm("safety-response", 2)]
    benchmark = of("rmbench", rows)
    assert len(benchmark.pairs) == 9 * len(rows)

    def fancy(pair, swapped, rng):
        styles = [int(text[1]) for text in (pair.a, pair.b)]
        better = pair.label if styles[0] == styles[1] else 1 + (styles[1] > styles[0])
        if pair.query.startswith("chat"):
            better = pair.label
        return 3 - better if swapped else better

    _, _, table = judged(benchmark, fancy)
    assert table["easy"]["accuracy"] == table["normal"]["accuracy"] == pytest.approx(1)
    assert table["hard"]["accuracy"] == pytest.approx(1 / 3)  # of three domains one is right
    assert table["chat"]["accuracy"] == pytest.approx(1)
    assert table["math"]["accuracy"] == pytest.approx(6 / 9)
    assert table["overall"]["accuracy"] == pytest.approx((1 + 2 * 6 / 9) / 3)


def test_judgebench_sections_and_labels(of):
    def row(source, label):
        text = {"question": "q", "response_A": "x", "response_B": "y"}
        return {"pair_id": "p", "source": source, "label": label, **text}

    rows = [row("mmlu-pro-law", "A>B"), row("livecodebench", "B>A"), row("livebench-math", "B>A")]
    benchmark = of("judgebench", rows)
    assert [pair.label for pair in benchmark.pairs] == [1, 2, 2]
    assert list(benchmark.rows) == ["knowledge", "math", "coding"]
    verdicts, total, _ = judged(benchmark, first_slot)
    assert total["accuracy"] == 0.5  # but no pair is right in both orders
    assert benchmarks.scores("judgebench", benchmark, verdicts) == {"right in both orders": 0}


def ppe_row(**changes):
    row = {"question_id": "7", "prompt": "q", "scores": [True, False, False]}
    row |= {f"response_{i + 1}": f"r{i}" for i in range(3)}
    return {**row, "sampled_conflict_pairs": [[2, 0], [0, 1]], **changes}


def test_ppe_pairs_are_zero_based(of):
    benchmark = of("ppe", [ppe_row(sampled_conflict_pairs=[[2, 0], [1, 2]])])
    pair = benchmark.pairs[0]
    assert {pair.a, pair.b} == {"r0", "r2"} and (pair.a, pair.b)[pair.label - 1] == "r0"
    assert benchmark.left_out == {"pairs of equal score": 1}


@pytest.mark.parametrize(
    ("name", "row", "wanted"),
    [
        ("ppe", ppe_row(scores=[True]), ["scores", "3"]),
        ("ppe", ppe_row(sampled_conflict_pairs=[[0, 3]]), ["sampled_conflict_pairs", "[0, 3]"]),
        ("ppe", ppe_row(sampled_conflict_pairs=[[0, 1.0]]), ["sampled_conflict_pairs", "1.0"]),
        ("ppe", ppe_row(scores=["a", "b", "c"]), ["scores", "3 numbers"]),
        ("rewardbench", v1("mmlu")[0], ["mmlu", "RewardBench"]),
        ("rewardbench", {**v1("math-prm")[0], "chosen": ["x"]}, ["--version 2"]),
        ("rmbench", {**rm("chat")[0], "chosen": ["x"]}, ["chosen", "three"]),
        ("llmbar", {"input": "q", "output_1": "x", "output_2": "y", "label": 3, "subset": "s"},
         ["label", "3"]),
        ("llmbar", {"input": 5, "output_1": None, "output_2": "y", "label": 1, "subset": "s"},
         ["output_1", "text"]),
        ("llmbar", ["x"], ["object", "list"]),
        ("llmbar", {"question": "q", "good": "x"}, ["question, good", "output_1", "--columns"]),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used_is_named(of, name, row, wanted):
    with pytest.raises(UserError) as raised:
        of(name, [row])
    assert all(word in str(raised.value) for word in ["rows.jsonl, line 1", *wanted])


def test_columns_can_be_mapped(of):
    row = {"q": "2+2", "good": "4", "bad": "5", "kind": "math-prm"}
    with pytest.raises(UserError, match="--columns") as raised:
        of("rewardbench", [row])
    tried = str(raised.value).split("--columns ")[1]
    names = {part.partition("=")[0] for part in tried.split(",")}
    assert names == {"prompt", "chosen", "rejected", "subset"}
    given = "prompt=q,chosen=good,rejected=bad,subset=kind"
    pair = of("rewardbench", [row], given).pairs[0]
    assert (pair.query, (pair.a, pair.b)[pair.label - 1]) == ("2+2", "4")
    with pytest.raises(UserError, match="'better' is none of"):
        of("rewardbench", [row], "better=good")
    with pytest.raises(UserError, match="wanted=given"):
        of("rewardbench", [row], "prompt")


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xyz")), min_size=1))
def test_even_weights_give_each_group_the_same_mass(keys):
    weights = benchmarks.even(keys)
    outer = {k for k, _ in keys}
    assert sum(weights) == pytest.approx(1)
    for name in outer:
        inner = {k for k in keys if k[0] == name}
        for key in inner:
            mass = sum(w for w, k in zip(weights, keys) if k == key)
            assert mass == pytest.approx(1 / len(outer) / len(inner))


def test_a_limit_counts_what_it_leaves_out(llmbar):
    cut = llmbar.first(30)
    assert len(cut.pairs) == 30 and cut.left_out == {"beyond --limit": 389}
    assert all(len(row) == 30 and any(row) for row in cut.rows.values())
    assert llmbar.first(0) is llmbar and llmbar.first(500) is llmbar


ROWS = {
    "rewardbench": v1("math-prm")[0],
    "rmbench": rm("chat")[0],
    "ppe": ppe_row(),
    "llmbar": {"input": "q", "output_1": "x", "output_2": "y", "label": 1, "subset": "s"},
    "judgebench": {"pair_id": "p", "source": "mmlu-pro-law", "label": "A>B", "question": "q",
                   "response_A": "x", "response_B": "y"},
    "pandalm": {"instruction": "q", "input": "", "response1": "x", "response2": "y",
                "annotator1": 1, "annotator2": 1, "annotator3": 2},
    "rewardbench 2": {"id": "1", "prompt": "q", "chosen": ["x"], "rejected": ["y", "z"],
                      "subset": "Math", "num_correct": 1},
}  # fmt: skip
scalars = st.none() | st.booleans() | st.integers(-2, 5) | st.text(max_size=3) | st.floats()
odd = st.recursive(scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(), x))


def load(name, path):
    return (rankings_of if name == "rewardbench 2" else pairs_of)(name, path)


@pytest.mark.parametrize("name", ROWS)
@given(pick=st.integers(0, 20), value=odd)
@settings(max_examples=40, deadline=None)
def test_a_cell_of_any_kind_is_read_or_named(tmp_path_factory, name, pick, value):
    """Whatever JSON stands in a cell: the row is read, left out by count, or a UserError."""
    row = dict(ROWS[name])
    row[list(row)[pick % len(row)]] = value
    path = tmp_path_factory.getbasetemp() / f"{name}.jsonl"
    path.write_text(json.dumps(ROWS[name]) + "\n" + json.dumps(row) + "\n")
    try:
        load(name, path)
    except UserError as error:
        assert f"{name}.jsonl" in str(error)


@pytest.mark.parametrize("name", ROWS)
def test_the_rows_above_are_good(tmp_path, name):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(ROWS[name]) + "\n")
    load(name, path)
