"""Readers of public formats, and where training takes its batches from."""

import json

import pytest

from nanorrm.config import UserError
from nanorrm.data.read import read_pairs
from nanorrm.data.sources import FileSource
from nanorrm.records import Pair


def write(path, *records):
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_query_a_b_label(root):
    pairs = read_pairs(root / "tests" / "data" / "pairs_ab.jsonl")
    assert pairs[0] == Pair("7+8-5", "10", "11", 1, "first", "sums")  # a number became text
    assert pairs[1] == Pair("2+2", "5", "4", 2, "3", "sums")  # id: the line, blank ones counted
    assert pairs[2] == Pair("9-4", "5", "6", 1, "4", "chat")  # one message is its text
    assert [m["content"] for m in pairs[3].query] == ["hi", "hello", "1+1?"]


def test_llmbar_columns(root):
    pairs = read_pairs(root / "tests" / "data" / "pairs_llmbar.jsonl")
    assert pairs[0] == Pair("Name a colour.", "Red.", "Seven.", 1, "N-0", "Natural")
    assert pairs[1].label == 2 and pairs[1].a == "{answer2} naïve 😀"


def test_chosen_rejected(root):
    pairs = read_pairs(root / "tests" / "data" / "pairs_chosen.jsonl")
    assert [(p.query, {p.a, p.b}) for p in pairs] == [("3+4", {"7", "8"}), ("5-2", {"3", "4"})]
    assert [(p.a, p.b)[p.label - 1] for p in pairs] == ["7", "3"]


def test_order_of_chosen_is_stable_and_a_coin(tmp_path):
    """Half of 1,000 by five standard deviations (false alarm 6e-7), the same at each reading, and
    the pair's own: not its place in the file."""
    records = [{"prompt": f"q{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(1000)]
    pairs = read_pairs(write(tmp_path / "p.jsonl", *records))
    for i, pair in enumerate(pairs):
        assert pair.query == f"q{i}" and (pair.a, pair.b)[pair.label - 1] == f"c{i}"
        assert {pair.a, pair.b} == {f"c{i}", f"r{i}"}
    firsts = sum(pair.label == 1 for pair in pairs)
    assert abs(firsts - 500) < 5 * 250**0.5
    shuffled = read_pairs(write(tmp_path / "s.jsonl", *records[::-1]))
    key = [(p.query, p.a, p.b, p.label) for p in pairs]
    assert key == [(p.query, p.a, p.b, p.label) for p in shuffled[::-1]]


def test_llmbar_reads_whole(data):
    pairs = read_pairs(data / "llmbar.jsonl")
    raw = [json.loads(line) for line in (data / "llmbar.jsonl").read_text().splitlines()]
    assert len(pairs) == len(raw) == 419
    for pair, record in zip(pairs, raw):
        for ours, theirs in (("query", "input"), ("a", "output_1"), ("b", "output_2")):
            assert getattr(pair, ours) == record[theirs]
        assert str(pair.label) == str(record["label"]) and pair.source == record["subset"]


def test_no_label_is_no_error(tmp_path):
    pairs = read_pairs(write(tmp_path / "p.jsonl", {"query": "q", "a": "x", "b": "y"}))
    assert pairs[0].label is None


GOOD = {"query": "q", "a": "x", "b": "y", "label": 1}


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ('{"query": ', ["not JSON"]),
        ("[1, 2]", ["list"]),
        ({**GOOD, "label": 3}, ["label", "3", "1 or 2"]),
        ({**GOOD, "label": 0}, ["label", "0"]),
        ({**GOOD, "label": "a"}, ["label", "'a'"]),
        ({**GOOD, "label": True}, ["label", "True"]),
        ({**GOOD, "a": None}, ["a should be text"]),
        ({**GOOD, "b": {"text": "y"}}, ["b should be text"]),
        ({**GOOD, "b": True}, ["b should be text"]),
        ({**GOOD, "query": [{"role": "user"}]}, ["messages"]),
        ({"query": "q", "answer": "x"}, ["query, answer", "chosen"]),
    ],
)
def test_bad_line_is_named(tmp_path, bad, words):
    path = write(tmp_path / "p.jsonl", GOOD, "", GOOD, bad, GOOD)
    with pytest.raises(UserError) as caught:
        read_pairs(path)
    for word in [f"{path}, line 4", *words]:
        assert word in str(caught.value)


def test_empty_missing_and_binary_files_are_named(tmp_path):
    (tmp_path / "empty").write_text("\n\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, word in (("empty", "no comparisons"), ("none", "no such file"), ("binary", "UTF-8")):
        with pytest.raises(UserError, match=word) as caught:
            read_pairs(tmp_path / name)
        assert name in str(caught.value)
    with pytest.raises(UserError, match="directory"):
        read_pairs(tmp_path)


def test_line_separators_inside_text_are_no_line_ends(tmp_path):
    record = {**GOOD, "a": "one\u2028two\x85three"}
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_pairs(path)[0].a == record["a"]


def labelled(n):
    return [Pair(f"q{i}", "x", "y", 1 + i % 2, str(i)) for i in range(n)]


def test_file_source_holds_a_share_out_of_training():
    source = FileSource([*labelled(50), Pair("open", "x", "y")], seed=1, held_share=0.2)
    held = {pair.id for pair in source.held_out(99)}
    trained = {pair.id for start in range(0, 280, 7) for pair in source.take(start, 7)}
    assert len(held) == 10 and len(trained) == 40 and not held & trained
    assert len(source.held_out(3)) == 3
    other = FileSource(labelled(50), seed=2, held_share=0.2)
    assert {pair.id for pair in other.held_out(99)} == held  # whatever the seed


def test_file_source_gives_each_pair_once_an_epoch():
    source = FileSource(labelled(12), seed=1, held_share=0.0)
    orders = []
    for epoch in range(3):
        orders.append([source.item(12 * epoch + i).id for i in range(12)])
        assert sorted(orders[-1], key=int) == [str(i) for i in range(12)]
    assert orders[0] != orders[1] != orders[2]
    again = FileSource(labelled(12), seed=1, held_share=0.0)
    assert [again.item(i).id for i in range(30, 36)] == orders[2][6:]  # no cursor needed


def test_file_source_needs_labels():
    with pytest.raises(UserError, match="no labelled pairs"):
        FileSource([Pair("q", "a", "b")], 0, 0.1)
