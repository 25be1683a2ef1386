"""Pairs from questions with known answers, and labels from a judge; on the embedded world."""

import json
import re
from types import SimpleNamespace

import pytest

from nanorrm import synth
from nanorrm.config import UserError
from nanorrm.data import toy
from nanorrm.data.read import read_pairs
from nanorrm.judge.backends import ReplayBackend
from nanorrm.judge.judge import Judge
from nanorrm.synth import Question, check, pair_of, question_prompt, read_questions, response_of


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def tally(out, what):
    """{name: n} of a line of counts, which must add up."""
    total, parts = re.search(rf"(\d+) {what} = (.*)", out).groups()
    counts = {name: int(n) for n, name in (part.split(" ", 1) for part in parts.split(" + "))}
    assert sum(counts.values()) == int(total)
    return counts


@pytest.fixture(scope="module")
def chains():
    rng = toy.stream_rng("test-synth")
    return [toy.draw_chain(rng, rng.choice((5, 6, 7))) for _ in range(40)]


@pytest.fixture
def questions(tmp_path, chains):
    records = [{"question": chain.query, "answer": chain.value} for chain in chains]
    records.append({"question": "9" * 8190, "answer": 9})  # does not fit the toy's context
    return jsonl(tmp_path / "questions.jsonl", records)


SAMPLE = ["--model", "toy", "--temperature", 1.5, "--max-tokens", 96, "--samples", 6]
SAMPLE += ["--threads", 1, "--engine.num-blocks", 2048]


def test_pairs_of_the_toy_world_are_right_and_wrong(cli, tmp_path, questions, chains):
    """Each pair against the world's own truth, by its label and by its provenance."""
    args = ["pairs", *SAMPLE, "--data", questions, "--out", "pairs.jsonl", "--seed", 3]
    code, out, err = cli("nanorrm/synth.py", *args)
    assert code == 0, err
    fates = tally(out, "questions")
    assert sum(fates.values()) == 41 and fates["too long"] == 1 and fates["kept"] >= 8
    assert fates["no wrong response"] + fates["no right response"] >= 3
    outcomes = tally(out, "responses")
    assert sum(outcomes.values()) == 40 * 6 and outcomes["right"] > 20 < outcomes["wrong"]
    pairs = read_pairs(tmp_path / "pairs.jsonl")
    assert len(pairs) == fates["kept"] and {pair.label for pair in pairs} == {1, 2}
    truth = {chain.query: str(chain.value) for chain in chains}
    for pair in pairs:
        right, wrong = (pair.a, pair.b) if pair.label == 1 else (pair.b, pair.a)
        assert int(right) == int(truth[pair.query]) != int(wrong)
        assert pair.query == chains[int(pair.id) - 1].query and pair.source == "synth"
        meta = pair.meta
        assert (meta["model"], meta["seed"], meta["rule"]) == ("toy", 3, "number")
        assert meta["known"] == [truth[pair.query]]
        assert meta["answers"] == {"right": right, "wrong": wrong}
        assert meta["samples"]["right"] != meta["samples"]["wrong"]
    again = [*args[:-3], "again.jsonl", "--seed", 3]
    assert cli("nanorrm/synth.py", *again)[0] == 0
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "pairs.jsonl").read_bytes()


def test_provenance_points_at_the_sample(cli, tmp_path, questions, toy_base):
    """The sample index and the seed of the provenance give the response again."""
    args = ["pairs", *SAMPLE, "--data", questions, "--out", "pairs.jsonl", "--limit", 20]
    assert cli("nanorrm/synth.py", *args)[0] == 0
    pair = read_pairs(tmp_path / "pairs.jsonl")[0]
    ids, opened = question_prompt(toy_base.tokenizer, Question(pair.query, [], "number", ""))
    params = synth.SamplingParams(n=6, temperature=1.5, max_tokens=96, seed=0)
    (group,) = toy_base.generate([ids], params)
    right, wrong = (pair.a, pair.b) if pair.label == 1 else (pair.b, pair.a)
    assert response_of(group[pair.meta["samples"]["right"]], opened) == right
    assert response_of(group[pair.meta["samples"]["wrong"]], opened) == wrong


def test_labels_of_the_toy_judge(cli, tmp_path):
    """It is right about short chains; ties, and pairs it can't read or take, are counted."""
    rng, records = toy.stream_rng("test-label"), []
    for _ in range(20):
        chain, a, b, label = toy.draw_pair(rng, rng.choice((2, 3, 4)))
        records.append({"query": chain.query, "a": a, "b": b, "label": label})
    records.append({"query": "9" * 8200, "a": "1", "b": "2"})
    path = jsonl(tmp_path / "pairs.jsonl", records)
    args = ["label", "--model", "toy-judge", "--data", path, "--out", "labelled.jsonl"]
    code, out, err = cli("nanorrm/synth.py", *args, "--temperature", 0)
    assert code == 0, err
    fates = tally(out, "pairs")
    assert sum(fates.values()) == 21 and fates["skipped"] == 1 and fates["labelled"] >= 17
    assert "skipped, for example: " in out and "8192" in out
    pairs = read_pairs(tmp_path / "labelled.jsonl")
    assert len(pairs) == fates["labelled"]
    right = [pair.label == pair.meta["label_before"] for pair in pairs]
    assert sum(right) >= 0.9 * len(right)
    assert f"{sum(right)} of {len(right)} labels that were there agree" in out
    for pair in pairs:
        assert pair.meta["judge"] == "toy-judge" and pair.meta["votes"] == 2
        assert (pair.meta["p_first"] > 0.5) == (pair.label == 1)


def test_every_fate_of_a_labelled_pair_is_counted(tmp_path, monkeypatch, capsys):
    """Recorded votes: one for a, two for b, a tie, unreadable ones, a conversation."""
    table = {"1": [1, None], "2": [2, 2], "3": [2, 2], "4": [1, 2], "5": [None, None], "6": [1, 1]}
    judge = Judge(ReplayBackend(table))
    monkeypatch.setattr(synth, "open_judge", lambda cfg: judge)
    records = [{"query": "q", "a": "x", "b": "y", "label": 1} for _ in range(5)]
    talk = [{"role": r, "content": "c"} for r in ("user", "assistant", "user")]
    path = jsonl(tmp_path / "p.jsonl", [*records, {"query": talk, "a": "x", "b": "y"}])
    out = str(tmp_path / "o.jsonl")
    cfg = synth.LabelSettings(model="m", data=str(path), out=out, votes=2, both_orders=False)
    synth.label_pairs(cfg)
    said = capsys.readouterr().out
    assert tally(said, "pairs") == {"labelled": 3, "tied": 1, "unreadable": 1, "skipped": 1}
    assert "1 of 3 labels that were there agree" in said and "several turns" in said
    pairs = read_pairs(out)
    assert [(pair.id, pair.label) for pair in pairs] == [("1", 1), ("2", 2), ("3", 2)]
    assert [pair.meta["invalid"] for pair in pairs] == [1, 0, 0]


# -- errors


def refused(cli, tmp_path, args, words):
    before = sorted(path.name for path in tmp_path.iterdir())
    code, out, err = cli("nanorrm/synth.py", *args)
    assert code == 2 and "Traceback" not in out + err
    for word in words:
        assert word in err.splitlines()[-1], err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


BAD = {
    "no model": (["pairs", "--data", "q.jsonl", "--out", "o.jsonl"], ["give --model"]),
    "no data": (["pairs", "--model", "toy", "--out", "o.jsonl"], ["give --data"]),
    "no out": (["label", "--model", "toy", "--data", "q.jsonl"], ["give --out"]),
    "no judge": (
        ["label", "--data", "q.jsonl", "--out", "o.jsonl"],
        ["give --model or --endpoint"],
    ),
    "output exists": (
        ["pairs", "--model", "toy", "--data", "q.jsonl", "--out", "q.jsonl"],
        ["q.jsonl: exists already", "--out"],
    ),
    "output in no folder": (
        ["pairs", "--model", "toy", "--data", "q.jsonl", "--out", "no/o.jsonl"],
        ["no: no such folder"],
    ),
    "no file": (
        ["pairs", "--model", "toy", "--data", "none.jsonl", "--out", "o.jsonl"],
        ["none.jsonl: no such file"],
    ),
    "no model folder": (
        ["pairs", "--model", "nowhere", "--data", "q.jsonl", "--out", "o.jsonl"],
        ["nowhere: no such model folder"],
    ),
    "one sample": (
        ["pairs", "--model", "toy", "--data", "q.jsonl", "--out", "o.jsonl", "--samples", 1],
        ["samples = 1"],
    ),
    "greedy": (
        ["pairs", "--model", "toy", "--data", "q.jsonl", "--out", "o.jsonl", "--temperature", 0],
        ["temperature = 0"],
    ),
    "unknown rule": (
        ["pairs", "--model", "toy", "--data", "q.jsonl", "--out", "o.jsonl", "--rule", "vibes"],
        ["rule = 'vibes'", "number, choice, text"],
    ),
    "nothing kept": (
        ["pairs", *SAMPLE, "--data", "q.jsonl", "--out", "o.jsonl", "--max-tokens", 1],
        ["no question has both", "nothing written"],
    ),
    "nothing decided": (
        ["label", "--model", "toy", "--data", "p.jsonl", "--out", "o.jsonl", "--max-tokens", 1],
        ["decided no pair", "nothing written"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_can_not_be_done_is_one_line_and_writes_nothing(cli, tmp_path, case):
    jsonl(tmp_path / "q.jsonl", [{"question": "1+1", "answer": "2"}])
    jsonl(tmp_path / "p.jsonl", [{"query": "1+1", "a": "2", "b": "3"}])
    refused(cli, tmp_path, *BAD[case])


def test_interrupted_sampling_leaves_no_half_file(tmp_path, questions, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(synth, "pair_of", stop)
    cfg = synth.PairsSettings("toy", str(questions), str(tmp_path / "o.jsonl"), max_tokens=8)
    with pytest.raises(KeyboardInterrupt):
        synth.make_pairs(cfg)
    assert [path.name for path in tmp_path.iterdir()] == ["questions.jsonl"]


# -- questions


def test_gsm8k_questions(data):
    """All 1,319, each known answer the integer behind its ####."""
    questions = read_questions(data / "gsm8k_test.jsonl")
    lines = (data / "gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(questions) == len(lines) == 1319
    for question, line in zip(questions, lines):
        raw = json.loads(line)
        assert question.query == raw["question"] and question.rule == "number"
        assert question.known == [raw["answer"].rpartition("#### ")[2]]
        assert check(raw["answer"], question)[0] == "right"
        worked, _, number = raw["answer"].rpartition("#### ")
        off_by_one = f"{worked}#### {int(number.replace(',', '')) + 1:,}"
        assert check(off_by_one, question)[0] == "wrong"


def test_questions_of_the_public_columns(tmp_path):
    verl = {"prompt": [{"role": "user", "content": "q"}], "data_source": "math"}
    path = jsonl(
        tmp_path / "q.jsonl",
        [
            {"problem": "q", "solution": r"so \boxed{\frac{1}{2}}"},
            {"question": "q", "answer": "(B)", "id": "x"},
            {**verl, "reward_model": {"ground_truth": "34", "style": "rule"}},
            {**verl, "reward_model": {"ground_truth": '["7", "\\\\frac{14}{2}"]'}},
            {"query": "q", "expected_answer": "x+1"},
        ],
    )
    got = [(q.query, q.known, q.rule, q.id) for q in read_questions(path)]
    assert got == [
        ("q", [r"\frac{1}{2}"], "number", "1"),
        ("q", ["(B)"], "choice", "x"),
        ("q", ["34"], "number", "3"),
        ("q", ["7", r"\frac{14}{2}"], "number", "4"),
        ("q", ["x+1"], "text", "5"),
    ]
    assert {q.rule for q in read_questions(path, rule="text")} == {"text"}
    path = jsonl(tmp_path / "own.jsonl", [{"frage": "q", "antwort": 5}])
    assert read_questions(path, "question=frage,answer=antwort")[0].known == ["5"]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"question": "q", "reply": "5"}, ["question, reply", "--columns question=...,answer="]),
        ({"question": "q", "answer": None}, ["answer should be text"]),
        ({"question": "q", "answer": " "}, ["answer: no answer"]),
        ({"question": "q", "answer": []}, ["answer: no answer"]),
        ({"question": "q", "answer": '["1'}, ["answer: not JSON"]),
        ({"question": "q", "reward_model": {}}, ["reward_model should be text"]),
        ({"question": 5.5, "answer": {"ground_truth": ["1", ""]}}, ["no answer"]),
        (["q"], ["should be an object"]),
        ('{"q', ["not JSON"]),
    ],
)
def test_bad_question_is_named(tmp_path, record, words):
    lines = [json.dumps({"question": "q", "answer": "1"})]
    lines.append(record if isinstance(record, str) else json.dumps(record))
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError) as caught:
        read_questions(tmp_path / "q.jsonl")
    for word in ("q.jsonl, line 2", *words):
        assert word in str(caught.value)


def test_empty_file_and_wrong_mapping_are_named(tmp_path):
    path = jsonl(tmp_path / "q.jsonl", [])
    with pytest.raises(UserError, match="no questions"):
        read_questions(path)
    with pytest.raises(UserError, match="'b' is none of question, answer"):
        read_questions(path, "question=q,b=c")


# -- responses


def completion(text, reason="stop"):
    return SimpleNamespace(text=text, finish_reason=reason)


@pytest.mark.parametrize(
    ("text", "reason", "opened", "response"),
    [
        ("a thought</think>\n\n7 ", "stop", True, "7"),
        ("one</think>two</think>7", "stop", True, "7"),
        ("<think>a thought</think>7", "stop", False, "7"),
        ("7", "stop", False, "7"),
        ("7", "stop", True, None),  # never came out of its thinking
        ("<think>7", "stop", False, None),
        ("a thought</think>7", "length", True, None),
        ("a thought</think> ", "stop", True, None),
    ],
)
def test_thinking_is_cut(text, reason, opened, response):
    assert response_of(completion(text, reason), opened) == response


def test_what_a_response_counts_as():
    question = Question("q", ["7", "8"], "number", "1")
    for response, outcome in (
        (r"\boxed{8}", "right"),
        (r"\boxed{9}", "wrong"),
        (r"\boxed{7 or 8}", "undecided"),
        ("It is 7 I think", "undecided"),
        (None, "unfinished"),
    ):
        assert check(response, question)[0] == outcome
    choice = Question("q", ["B"], "choice", "1")
    assert check("Answer: (B)", choice) == ("right", "B")
    assert check("Answer: C", choice) == ("wrong", "C")
    assert check("Answer: maybe", choice) == ("undecided", None)


def test_first_right_and_first_wrong_make_the_pair():
    question = Question("q", ["7"], "number", "1")
    checked = [("?", "undecided", None), ("w", "wrong", "8"), ("r", "right", "7")]
    checked += [("w2", "wrong", "9"), ("r2", "right", "7")]
    pair, fate = pair_of(question, checked, {"model": "m"})
    assert fate == "kept" and {pair.a, pair.b} == {"r", "w"}
    assert (pair.a, pair.b)[pair.label - 1] == "r"
    assert pair.meta["samples"] == {"right": 2, "wrong": 1} and pair.meta["right_of"] == [2, 5]
    assert pair_of(question, checked[:2], {}) == (None, "no right response")
    assert pair_of(question, checked[2:3], {}) == (None, "no wrong response")
    assert pair_of(question, checked[:1], {}) == (None, "no right and no wrong response")


class Chat:
    """A tokenizer whose chat opens the thinking, as R1-Distill's does, or does not."""

    think_ids = (1, 2)

    def __init__(self, opens):
        self.opens = opens

    def token_id(self, token):
        return None

    def chat(self, messages):
        self.messages = messages
        return [1, 5, 2, 7, 1] if self.opens else [1, 5, 2, 7]


@pytest.mark.parametrize("opens", [True, False])
def test_question_goes_through_the_chat_template(opens):
    tokenizer = Chat(opens)
    ids, opened = question_prompt(tokenizer, Question("2+2?", ["4"], "number", "1"))
    assert opened is opens and ids[:4] == [1, 5, 2, 7]
    (message,) = tokenizer.messages
    assert message["role"] == "user" and message["content"].startswith("2+2?\n\n")
    assert r"\boxed{}" in message["content"]
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    question_prompt(tokenizer, Question(talk, ["B"], "choice", "1"))
    assert tokenizer.messages[0] == talk[0] and "letter" in tokenizer.messages[1]["content"]
    assert talk[1]["content"] == "u"
