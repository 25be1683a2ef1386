"""The embedded world keeps its promises: honest documents, no leak of held-out queries.

Statistical bounds are four standard deviations of a fair coin: a right world fails each with chance
6e-5 (and never twice differently, since the seeds are fixed).
"""

import re

import pytest

from nanorrm.config import EngineConfig
from nanorrm.data import toy
from nanorrm.data.sources import ToySource
from nanorrm.engine.engine import Engine
from nanorrm.engine.sampling import SamplingParams
from nanorrm.judge import prompts
from nanorrm.judge.judge import Judge
from nanorrm.measure import metrics

DOCUMENTS = 20_000
JUDGE = re.compile(r"\?(.+)\n1:(\d+)\n2:(\d+)\n<think>(.*)")
VERDICT = re.compile(r"(.*)</think>\\boxed\{Assistant ([12])\}<\|im_end\|>")


def value_of(query):
    """A chain's value, by other means than the world's own."""
    assert re.fullmatch(r"[1-9]([+-][1-9])+", query)
    return sum(int(term) for term in re.findall(r"[+-]?\d", query))


def steps_of(query):
    """The worked chain of a query, and its running totals."""
    first, *rest = re.findall(r"[+-]?\d", query)
    totals, work = [int(first)], []
    for term in rest:
        totals.append(totals[-1] + int(term))
        work.append(f"{totals[-2]}{term}={totals[-1]}")
    return ",".join(work), totals


def fair(successes, n):
    """Within four standard deviations of one half (false alarm: 6e-5)."""
    return abs(successes - n / 2) <= 4 * (n / 4) ** 0.5


@pytest.fixture(scope="module")
def documents():
    """{kind: [(given, rest), ...]} of the documents that the base is trained on."""
    rng = toy.stream_rng("test", 0)
    kinds = {"solve": [], "check": [], "format": []}
    for _ in range(DOCUMENTS):
        given, rest = toy.draw_document(rng)
        kind = "solve" if given[0] == "!" else "format" if given.endswith("<think>") else "check"
        kinds[kind].append((given, rest))
    return kinds


@pytest.fixture(scope="module")
def judged(documents):
    """{kind: [{query, a, b, label, thought, verdict}, ...]} of the judge documents."""
    out = {}
    for kind in ("check", "format"):
        out[kind] = rows = []
        for given, rest in documents[kind]:
            query, a, b, other = JUDGE.fullmatch(given).groups()
            thought, verdict = VERDICT.fullmatch(rest).groups()
            right = str(value_of(query))
            assert (a == right) != (b == right)  # exactly one response is right
            row = {"query": query, "a": a, "b": b, "label": 1 if a == right else 2, "other": other}
            rows.append({**row, "thought": thought, "verdict": int(verdict)})
    return out


def test_shares_of_the_three_kinds(documents):
    for kind, share in (("solve", 0.35), ("check", 0.35), ("format", 0.30)):
        spread = 4 * (share * (1 - share) / DOCUMENTS) ** 0.5
        assert abs(len(documents[kind]) / DOCUMENTS - share) < spread


@pytest.mark.parametrize("kind", ["check", "format"])
def test_verdicts_agree_with_the_truth_half_the_time(judged, kind):
    rows = judged[kind]
    assert len(rows) > 5000
    assert fair(sum(row["verdict"] == row["label"] for row in rows), len(rows))


@pytest.mark.parametrize("kind", ["check", "format"])
@pytest.mark.parametrize("what", ["label", "verdict"])
def test_each_slot_is_right_and_is_named_half_the_time(judged, kind, what):
    rows = judged[kind]
    assert fair(sum(row[what] == 1 for row in rows), len(rows))


@pytest.mark.parametrize("terms", toy.TERMS)
def test_verdicts_tell_nothing_at_any_difficulty(judged, terms):
    rows = [row for kind in judged.values() for row in kind]
    rows = [row for row in rows if len(re.findall(r"\d", row["query"])) == terms]
    assert len(rows) > 1000
    assert fair(sum(row["verdict"] == row["label"] for row in rows), len(rows))


def test_solve_documents_are_right(documents):
    for given, rest in documents["solve"]:
        query = re.fullmatch(r"!(.+)\n<think>", given).group(1)
        work, totals = steps_of(query)
        assert min(totals) >= 0
        assert rest == f"{work}</think>{value_of(query)}<|im_end|>"
        assert totals[-1] == value_of(query)


def test_check_documents_follow_the_comparison_they_show(judged):
    for row in judged["check"]:
        sums = [re.fullmatch(r"(\d+)([+-])(\d)=(\d+)", s).groups() for s in row["other"].split(",")]
        for (left, sign, digit, result), following in zip(sums, [*sums[1:], None]):
            total = int(left) + int(digit) if sign == "+" else int(left) - int(digit)
            assert total == int(result) and (following is None or following[0] == result)
        shown = sums[-1][3]
        marks = ["y" if row[slot] == shown else "n" for slot in "ab"]
        assert sorted(marks) == ["n", "y"]
        assert row["thought"] == f"|{row['a']}:{shown}{marks[0]}|{row['b']}:{shown}{marks[1]}"
        assert row["verdict"] == 1 + marks.index("y")


def test_check_documents_work_another_query(judged):
    for row in judged["check"]:
        first, *rest = row["other"].split(",")
        other = first.split("=")[0] + "".join(re.match(r"\d+([+-]\d)=", s).group(1) for s in rest)
        assert other != row["query"] and not toy.held_out(other)


def test_format_documents_think_nothing_or_their_own_chain(judged):
    rows = judged["format"]
    empty = sum(row["thought"] == "" for row in rows)
    assert abs(empty / len(rows) - 0.6) < 4 * (0.24 / len(rows)) ** 0.5
    for row in rows:
        assert row["other"] == "" and row["thought"] in ("", steps_of(row["query"])[0])


def test_verdict_of_format_documents_is_independent_of_the_thought(judged):
    rows = [row for row in judged["format"] if row["thought"]]
    assert fair(sum(row["verdict"] == row["label"] for row in rows), len(rows))


@pytest.fixture(scope="module")
def held():
    """Queries of the evaluations, longer chains included."""
    return {pair.query for pair in ToySource(0).held_out(3000, (*toy.TERMS, 7, 8))}


def test_no_training_document_holds_a_held_out_query(documents, judged, held):
    given = [given for kind in documents.values() for given, _ in kind]
    queries = [re.match(r"[!?](.+)\n", text).group(1) for text in given]
    assert len(queries) == DOCUMENTS
    assert not held & set(queries)
    assert not any(toy.held_out(query) for query in queries)


def test_no_training_pair_holds_a_held_out_query(held):
    batches = [ToySource(seed).take(64 * step, 64) for seed in (0, 1) for step in range(40)]
    trained = {pair.query for batch in batches for pair in batch}
    assert len(trained) > 2000 and not held & trained
    assert not any(toy.held_out(query) for query in trained)


def test_held_out_queries_are_an_eighth_and_of_every_length():
    """All 2-term and 3-term chains, counted: held out are not none, not all."""
    for terms in (2, 3):
        chains = {toy.draw_chain(toy.stream_rng("all", i), terms, held).query
                  for i in range(3000) for held in (True, False)}  # fmt: skip
        share = sum(map(toy.held_out, chains)) / len(chains)
        assert 0.05 < share < 0.25


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("terms", [*toy.TERMS, 8])
def test_pairs_are_what_they_say(terms, held):
    """Difficulty is the number of terms; one response is right, the other near and not negative."""
    rng = toy.stream_rng("pairs", terms, held)
    firsts, n = 0, 600
    for _ in range(n):
        chain, a, b, label = toy.draw_pair(rng, terms, held)
        assert len(re.findall(r"\d", chain.query)) == terms
        work, totals = steps_of(chain.query)
        assert (chain.work, chain.value) == (work, totals[-1]) and min(totals) >= 0
        right, wrong = (a, b) if label == 1 else (b, a)
        assert int(right) == value_of(chain.query) and wrong != right and int(wrong) >= 0
        assert abs(int(wrong) - int(right)) in toy.OFFSETS
        assert toy.held_out(chain.query) is held
        firsts += label == 1
    assert fair(firsts, n)


def test_source_grades_and_repeats():
    """Batches depend on seed and step alone; held-out pairs not even on the seed."""
    source = ToySource(3)
    assert source.take(40, 8) == ToySource(3).take(40, 8)
    assert source.take(40, 8) != source.take(48, 8) != ToySource(4).take(48, 8)
    pairs = source.held_out(20)
    assert pairs == ToySource(9).held_out(20)
    for pair in pairs:
        assert pair.meta["terms"] == len(re.findall(r"\d", pair.query))
    assert [sum(p.meta["terms"] == t for p in pairs) for t in toy.TERMS] == [4] * 5


def test_shipped_base_judges_at_chance_and_solves(toy_base):
    """300 held-out pairs: at most 60% right, nearly all readable; over 90% of chains solved."""
    pairs = ToySource(0).held_out(300)
    judge = Judge(toy_base, "toy", temperature=1.0, max_tokens=96)
    numbers = metrics.summarize(pairs, judge.compare(pairs, both_orders=False))
    assert numbers["accuracy_readable"] <= 0.6 and numbers["unreadable"] < 0.1
    asked = [toy_base.tokenizer.encode_template(prompts.toy_solve(p.query)) for p in pairs[:200]]
    solved = toy_base.generate(asked, SamplingParams(temperature=0, max_tokens=64))
    right = sum(c.text.split("</think>")[-1] == str(value_of(p.query))
                for p, (c,) in zip(pairs, solved))  # fmt: skip
    assert right > 180


def test_shipped_judge_judges():
    engine = Engine.from_pretrained("toy-judge", EngineConfig(num_blocks=2048))
    pairs = ToySource(0).held_out(100)
    verdicts = Judge(engine, "toy", max_tokens=128).compare(pairs)
    assert metrics.summarize(pairs, verdicts)["accuracy"] >= 0.95


@pytest.mark.parametrize("name", ["toy_base", "toy_judge"])
def test_shipped_models_are_under_a_megabyte_and_of_the_world_s_shape(root, name, tokenizer):
    folder = root / "nanorrm" / "assets" / name
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1_000_000
    engine = Engine.from_pretrained(folder, EngineConfig(num_blocks=4))
    assert engine.model.config == toy.model_config()
    text = "?7+8\n1:15\n2:14\n<think>7+8=15</think>\\boxed{Assistant 1}<|im_end|>"
    assert engine.tokenizer.encode_template(text) == tokenizer.encode_template(text)
