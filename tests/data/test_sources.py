"""Where training takes pairs from: epochs, order of responses, mixtures, presets."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorrm.cli import load_preset
from nanorrm.config import JudgeConfig, LossConfig, UserError
from nanorrm.data.sources import FileSource, Mixture, ToySource, interleave, mix, parse_source
from nanorrm.records import Pair, shuffled, stable_coin

CONFIGS = Path(__file__).parents[2] / "configs"


def pairs(name, n):
    return [Pair(f"{name} q{i}", f"{name} x{i}", "y", 1, f"{name}{i}") for i in range(n)]


def ids(source, start, n):
    return [pair.id for pair in source.take(start, n)]


class Counting:
    """A source whose pairs are numbered."""

    def __init__(self, name):
        self.name = name

    def take(self, start, n):
        return [(self.name, start + i) for i in range(n)]

    def held_out(self, n):
        return [(self.name, -i) for i in range(1, n + 1)]


# -- mixing


@settings(max_examples=30)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=4), st.integers(0, 300), st.integers(1, 4))
def test_ratios_are_exact_over_any_window_and_no_source_skips(ratios, start, cycles):
    mixture = Mixture([Counting(i) for i in range(len(ratios))], ratios)
    window = sum(mixture.ratios) * cycles
    taken = mixture.take(start, window)
    counts = Counter(name for name, _ in taken)
    assert [counts[i] for i in range(len(ratios))] == [r * cycles for r in mixture.ratios]
    total = mixture.take(0, start + window)
    assert total[start:] == taken
    for i in range(len(ratios)):
        numbers = [number for name, number in total if name == i]
        assert numbers == list(range(len(numbers)))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_interleaving_is_even(ratios):
    """At every slot each source is within one of its share."""
    counts = Counter()
    for slot, (i, before) in enumerate(interleave(ratios), 1):
        assert before == counts[i]
        counts[i] += 1
        for j, ratio in enumerate(ratios):
            assert abs(counts[j] - slot * ratio / sum(ratios)) < 1 + 1e-9


def test_mixture_of_the_paper():
    mixture = Mixture([Counting("a"), Counting("b"), Counting("c")], [10, 2, 2])
    assert Counter(name for name, _ in mixture.take(3, 7)) == {"a": 5, "b": 1, "c": 1}


@settings(max_examples=30)
@given(st.integers(0, 60), st.integers(0, 40), st.integers(0, 40), st.integers(0, 3))
def test_a_mixture_goes_on_anywhere(start, n, m, seed):
    """take(start, n + m) is take(start, n) and what a fresh mixture takes from start + n on."""
    parts = [("one", pairs("a", 7), 2), ("toy", None, 1), ("two", pairs("b", 3), 1)]
    whole = mix(parts, seed, 0.2).take(start, n + m)
    assert whole[:n] == mix(parts, seed, 0.2).take(start, n)
    assert whole[n:] == mix(parts, seed, 0.2).take(start + n, m)


def test_every_pair_is_seen_once_in_each_epoch_of_its_source():
    mixture = mix([("one", pairs("a", 8), 2), ("two", pairs("b", 5), 1)], 3, 0.0)
    seen = ids(mixture, 0, 3 * 20)
    first, second = ([i for i in seen if i[0] == name] for name in "ab")
    for of_one, n in ((first, 8), (second, 5)):
        epochs = [of_one[k : k + n] for k in range(0, len(of_one) - n + 1, n)]
        assert len(epochs) >= 4
        for epoch in epochs:
            assert len(set(epoch)) == n
        assert epochs[0] != epochs[1]


def test_order_depends_on_the_seed_and_the_place_of_a_source_and_on_no_path():
    def order(name, seed, before=()):
        return ids(mix([*before, (name, pairs("a", 30), 1)], seed, 0.0).sources[-1], 0, 30)

    assert order("here/a.jsonl", 1) == order("there/a.jsonl", 1) != order("here/a.jsonl", 2)
    assert order("a", 1, [("b", pairs("b", 3), 1)]) != order("a", 1)


def test_query_held_out_of_one_source_is_trained_on_in_none():
    """The second file would by itself hold out 4 of the 10 queries that the first one does."""
    one = [Pair(f"q{i}", "x", "y", 1, f"a{i}") for i in range(50)]
    queries = [pair.query for pair in FileSource(one, 0, 0.2).held_out(10)]
    queries += [f"other {i}" for i in range(10)]
    shared = [Pair(query, "x", "z", 1, f"b{i}") for i, query in enumerate(queries)]
    mixture = mix([("one", one, 1), ("two", shared, 1)], 0, 0.2)
    held = [pair for source in mixture.sources for pair in source.held_out(99)]
    trained = [pair for source in mixture.sources for pair in source.items]
    assert len(held) + len(trained) == 70 and {p.id[0] for p in held} == {"a", "b"}
    assert not {pair.query for pair in held} & {pair.query for pair in trained}
    assert len(held) >= 20


def test_held_out_pairs_come_by_the_ratios_until_a_source_is_dry():
    mixture = Mixture([Counting("a"), Counting("b")], [3, 1])
    assert Counter(name for name, _ in mixture.held_out(8)) == {"a": 6, "b": 2}
    mixture = mix([("one", pairs("a", 50), 1), ("two", pairs("b", 10), 1)], 0, 0.2)
    held = mixture.held_out(11)
    assert Counter(pair.id[0] for pair in held) == {"a": 9, "b": 2}
    assert len(mixture.held_out(99)) == 12 and mixture.held_out(11) == held
    assert mixture.held_out(0) == []


def test_toy_alone_is_the_toy_source():
    mixture, source = mix([("toy", None, 1)], 5, 0.1), ToySource(5)
    assert mixture.take(17, 9) == source.take(17, 9)
    assert mixture.held_out(20) == source.held_out(20)


def test_source_with_nothing_to_train_on_is_named():
    parts = [("good.jsonl", pairs("a", 5), 1), ("open.jsonl", [Pair("q", "x", "y")], 1)]
    with pytest.raises(UserError, match=r"no labelled pairs to train on in open.jsonl"):
        mix(parts, 0, 0.1)


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("a.jsonl:5", ("a.jsonl", 5)),
        ("a.jsonl", ("a.jsonl", 1)),
        ("d:/x/a.jsonl", ("d:/x/a.jsonl", 1)),
        ("a:b", ("a:b", 1)),
        ("toy:3", ("toy", 3)),
    ],
)
def test_source_with_a_ratio(text, source):
    assert parse_source(text) == source


@pytest.mark.parametrize("text", ["a.jsonl:0", "a.jsonl:-1", "a.jsonl:1.5", "a.jsonl:", ":3"])
def test_ratio_that_is_none_is_named(text):
    with pytest.raises(UserError, match="whole number above 0") as caught:
        parse_source(text)
    assert repr(text) in str(caught.value)


# -- the order of the two responses


def test_responses_are_shuffled_by_content_seed_and_epoch():
    """Each a coin of its own: half of 1,000 by five standard deviations (false alarm 6e-7 each)."""
    many = pairs("a", 1000)  # the right one is always a
    by_id = {}
    for seed in (1, 2):
        source = FileSource(many, seed, 0.0)
        for epoch in (0, 1):
            taken = source.take(1000 * epoch, 1000)
            by_id[seed, epoch] = {pair.id: pair.label for pair in taken}
            for pair in taken:
                assert (pair.a, pair.b)[pair.label - 1].startswith("a x")
    labels = list(by_id.values())
    for one in labels:
        assert abs(sum(label == 1 for label in one.values()) - 500) < 5 * 250**0.5
        for other in labels:
            if other is not one:
                agree = sum(one[i] == other[i] for i in one)
                assert abs(agree - 500) < 5 * 250**0.5
    again = FileSource(many, 2, 0.0).take(1000, 1000)
    assert {pair.id: pair.label for pair in again} == by_id[2, 1]


def test_held_out_pairs_of_a_file_with_one_label_have_both():
    held = FileSource(pairs("a", 200), 0, 0.5).held_out(100)
    assert {pair.label for pair in held} == {1, 2} and len(held) == 100
    assert held == FileSource(pairs("a", 200), 7, 0.5).held_out(100)


def test_shuffling_keeps_what_a_pair_says():
    pair = Pair("q", "x", "y", None, "i", "s", {"m": 1})
    turned = [shuffled(pair, key) for key in range(50)]
    swapped = Pair("q", "y", "x", None, "i", "s", {"m": 1})
    assert pair in turned and swapped in turned
    assert all(one in (pair, swapped) for one in turned)


def test_coin_is_the_same_in_every_process():
    """Known values: Python's own hash would differ from process to process."""
    assert [stable_coin(str(i)) for i in range(16)] == [
        1,
        0,
        1,
        1,
        1,
        0,
        0,
        1,
        1,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
    ]


# -- through train.py

SMALL = ["--threads", 1, "--prompts", 6, "--group", 2, "--eval-pairs", 4, "--max-tokens", 16]
SMALL += ["--engine.num-blocks", 600, "--sample-every", 1, "--eval-every", 9]


def sums(path, first, n):
    """A file of pairs whose queries start with `first`."""
    records = [
        {"prompt": f"{first}+{i}", "chosen": str(first + i), "rejected": "0"}
        for i in range(1, n + 1)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_training_mixes_files_and_counts_what_it_drops_of_each(tmp_path, cli, monkeypatch):
    one, two = sums(tmp_path / "one.jsonl", 1, 40), sums(tmp_path / "two.jsonl", 2, 9)
    with open(two, "a") as file:
        file.write(json.dumps({"prompt": "9" * 90, "chosen": "1", "rejected": "2"}) + "\n")
    args = ["--data", f"{one}:2", f"{two}:1", "--max-prompt-tokens", 60, "--steps", 2]
    seen = []
    take = Mixture.take
    monkeypatch.setattr(Mixture, "take", lambda *a: seen.extend(take(*a)) or take(*a))
    code, out, err = cli("train.py", "judge", *SMALL, *args, "--name", "m")
    assert code == 0, err
    assert f"{one}: 40 pairs, none dropped" in out
    assert f"{two}: 10 pairs, 1 dropped: too long" in out
    assert [pair.query[0] for pair in seen].count("1") == 8
    assert [pair.query[0] for pair in seen].count("2") == 4
    saved = json.loads((tmp_path / "runs/m/config.json").read_text())["config"]
    assert saved["data"] == [f"{one}:2", f"{two}:1"]


def test_resumed_mixture_goes_on_in_the_middle_of_an_epoch(tmp_path, cli):
    """The weights of one unbroken run and of a run in two halves are equal bytes."""
    one, two = sums(tmp_path / "one.jsonl", 1, 9), sums(tmp_path / "two.jsonl", 2, 4)
    args = [*SMALL, "--eval-share", 0, "--data", f"{one}:2", f"{two}:1"]
    for command in (
        [*args, "--steps", 3, "--name", "whole"],
        [*args, "--steps", 2, "--name", "halves"],
        ["--resume", "--name", "halves", "--steps", 3],
    ):
        code, _, err = cli("train.py", "judge", *command)
        assert code == 0, err
    weights = [
        (tmp_path / "runs" / name / "model" / "model.safetensors").read_bytes()
        for name in ("whole", "halves")
    ]
    assert weights[0] == weights[1]


def test_training_on_unknown_columns_takes_a_mapping(tmp_path, cli):
    path = tmp_path / "mine.jsonl"
    row = {"task": "1+1", "good": "2", "bad": "3"}
    path.write_text("".join(json.dumps({**row, "task": f"1+{i}"}) + "\n" for i in range(9)))
    args = ["judge", *SMALL, "--steps", 1, "--name", "c", "--data", path]
    code, _, err = cli("train.py", *args)
    assert code == 2 and "--columns query=task,chosen=good,rejected=bad" in err
    code, _, err = cli("train.py", *args, "--columns", "query=task,chosen=good,rejected=bad")
    assert code == 0, err


def test_toy_pairs_are_mixed_with_a_file_s(tmp_path, cli):
    """Held-out pairs of both are evaluated; only the toy's have a difficulty."""
    path = sums(tmp_path / "one.jsonl", 1, 20)
    args = ["judge", *SMALL, "--steps", 1, "--name", "t", "--data", f"{path}:2", "toy:1"]
    code, _, err = cli("train.py", *args, "--eval-share", 0.2)
    assert code == 0, err
    row = json.loads((tmp_path / "runs/t/metrics.jsonl").read_text().splitlines()[0])
    assert "eval/accuracy" in row and any(name.endswith("_terms") for name in row)


# -- presets

PAPER = {  # of PAPER.md: where released and recalled values disagree, the released one
    "rrm_7b": {"steps": 720, "prompts": 128, "mini_prompts": 64, "temperature": 0.6},
    "rrm_32b": {"steps": 440, "prompts": 128, "mini_prompts": 64, "temperature": 0.8, "group": 16},
    "r1_distill_1.5b": {},
}


@pytest.mark.parametrize("name", PAPER)
def test_presets_hold_the_paper_s_settings(name):
    cfg = load_preset(JudgeConfig(), CONFIGS / f"{name}.toml")
    for setting, value in PAPER[name].items():
        assert getattr(cfg, setting) == value
    assert cfg.learning_rate == 1e-6 and cfg.template == "rrm"
    assert cfg.loss == LossConfig(kl=1e-3, kl_estimator="k3") and cfg.scale == "group"
    ratios = [parse_source(source)[1] for source in cfg.data]
    assert ratios[:3] == [5, 1, 1]
    if name != "r1_distill_1.5b":
        assert (cfg.max_prompt_tokens, cfg.max_tokens) == (4096, 8192)


@pytest.mark.parametrize("name", PAPER)
def test_every_line_of_a_paper_preset_names_its_source(name):
    """By a mark behind the setting or in the comment above it."""
    lines = (CONFIGS / f"{name}.toml").read_text().splitlines()
    marks = ("[released", "[second", "[recalled", "[ours")
    for above, line in pairwise(lines):
        if "=" in line and not line.startswith("#") and "your" not in line:
            assert any(mark in f"{above} {line}" for mark in marks), line


def test_preset_with_a_wrong_kind_of_list_is_named(tmp_path):
    for text in ('data = "a.jsonl"', "data = [1]"):
        (tmp_path / "p.toml").write_text(text)
        with pytest.raises(UserError, match=r"data = .* should be of type list\[str\]"):
            load_preset(JudgeConfig(), tmp_path / "p.toml")


def test_no_data_at_all_is_named():
    with pytest.raises(UserError, match="data: give a file"):
        JudgeConfig(data=[])
