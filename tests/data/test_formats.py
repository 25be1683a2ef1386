"""The public sets' columns in jsonl, json and parquet; unknown columns; rankings."""

import json
import sys
from collections import Counter

import pytest

from nanorrm.config import UserError
from nanorrm.data.formats import as_query, parse_columns, propose, read_rows
from nanorrm.data.read import read_pairs, read_rankings
from nanorrm.files import write_rows
from nanorrm.records import Pair, Ranking


def user(text):
    return {"content": text, "role": "user"}


def assistant(text):
    return {"content": text, "role": "assistant"}


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def as_json(path, records):
    path.write_text(json.dumps(records, indent=2), encoding="utf-8")


def as_parquet(path, records):
    pyarrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=2)


WRITE = {"jsonl": jsonl, "json": as_json, "parquet": as_parquet}


@pytest.fixture(params=WRITE)
def written(request, tmp_path):
    """written(records) -> path of a file that holds them, in each format."""

    def write(records):
        path = tmp_path / f"rows.{request.param}"
        WRITE[request.param](path, records)
        return path

    return write


def parts(pair):
    """(query, better response, worse response)."""
    return pair.query, *[(pair.a, pair.b), (pair.b, pair.a)][pair.label - 1]


# -- the public sets, with the columns and types of their dataset cards


def test_skywork_reward_preference(written):
    """chosen and rejected as messages that begin with the prompt; no prompt column."""
    talk = [user("hi"), assistant("hello"), user("1+1?")]
    rows = [
        {"chosen": [user("q"), assistant("c")], "rejected": [user("q"), assistant("r")]},
        {"chosen": [*talk, assistant("2")], "rejected": [*talk, assistant("3")]},
    ]
    first, second = read_pairs(written([{**row, "source": "magpie"} for row in rows]))
    assert parts(first) == ("q", "c", "r") and first.source == "magpie"
    query, better, worse = parts(second)
    assert [m["content"] for m in query] == ["hi", "hello", "1+1?"] and (better, worse) == (
        "2",
        "3",
    )
    assert [m["role"] for m in query] == ["user", "assistant", "user"]


def test_tulu_3_preference_mixture(written):
    """A prompt column beside message lists: what the responses answer counts."""
    row = {"id": "t-1", "prompt": "q", "source": "wildchat"}
    talk = [user("before"), assistant("so"), user("q")]
    rows = [
        {**row, "chosen": [user("q"), assistant("c")], "rejected": [user("q"), assistant("r")]},
        {**row, "chosen": [*talk, assistant("c")], "rejected": [*talk, assistant("r")]},
    ]
    first, second = read_pairs(written(rows))
    assert parts(first) == ("q", "c", "r") and (first.id, first.source) == ("t-1", "wildchat")
    assert len(second.query) == 3


def test_rewardbench_v1(written):
    row = {"prompt": "q", "chosen": "c", "rejected": "r", "subset": "hep-cpp", "id": 7}
    (pair,) = read_pairs(written([row]))
    assert parts(pair) == ("q", "c", "r") and (pair.id, pair.source) == ("7", "hep-cpp")


def test_ultrafeedback_binarized(written):
    row = {"prompt": "q", "prompt_id": "u1", "score_chosen": 8.0, "score_rejected": 5.0}
    row |= {"chosen": [user("q"), assistant("c")], "rejected": [user("q"), assistant("r")]}
    (pair,) = read_pairs(written([row]))
    assert parts(pair) == ("q", "c", "r") and pair.id == "u1"


def test_prompt_as_messages_and_responses_alone(written):
    system = {"content": "Be brief.", "role": "system"}
    row = {"chosen": [assistant("c")], "rejected": [assistant("r")]}
    rows = [{**row, "prompt": [user("q")]}, {**row, "prompt": [system, user("q")]}]
    first, second = read_pairs(written(rows))
    assert parts(first) == ("q", "c", "r") and [m["role"] for m in second.query] == [
        "system",
        "user",
    ]


def test_judgebench(written):
    row = {"pair_id": "j", "question": "q", "response_A": "x", "response_B": "y", "source": "mmlu"}
    one, two = read_pairs(written([{**row, "label": "A>B"}, {**row, "label": "B>A"}]))
    assert one == Pair("q", "x", "y", 1, "j", "mmlu") and two.label == 2


def test_llmbar_and_own_columns(written):
    row = {"input": "q", "output_1": "x", "output_2": "y", "label": 2, "subset": "s", "id": "l"}
    assert read_pairs(written([row])) == [Pair("q", "x", "y", 2, "l", "s")]
    row = {"query": "q", "a": "x", "b": "y", "label": None, "id": "o", "meta": {"n": 1}}
    assert read_pairs(written([row])) == [Pair("q", "x", "y", None, "o", meta={"n": 1})]


def test_pandalm_reads_whole(data):
    """Against the raw file: 422 and 472 with a majority for one side, 105 without."""
    raw = json.loads((data / "pandalm_test.json").read_text(encoding="utf-8"))
    pairs = read_pairs(data / "pandalm_test.json")
    assert len(pairs) == len(raw) == 999
    assert Counter(pair.label for pair in pairs) == {1: 422, 2: 472, None: 105}
    booleans = 0
    for pair, record in zip(pairs, raw):
        votes = [record[f"annotator{i}"] for i in (1, 2, 3)]
        assert pair.meta["annotators"] == votes and pair.id == str(record["idx"])
        ((vote, n),) = Counter(votes).most_common(1)
        assert pair.label == (vote if n > 1 and vote else None)
        assert pair.query.startswith(record["instruction"].rstrip())
        assert pair.query.rstrip().endswith((record["input"] or record["instruction"]).rstrip())
        booleans += (record["response1"], record["response2"]) != (pair.a, pair.b)
    assert booleans == 6  # answers `True` and `False`, which the public file holds as booleans


def test_parts_of_a_set_are_read_as_one_by_name(tmp_path):
    for part, rows in (("2", ["c"]), ("1", ["a", "b"]), ("10", ["d"])):
        named = [{"prompt": q, "chosen": "c", "rejected": "r"} for q in rows]
        jsonl(tmp_path / f"train-{part.zfill(2)}.jsonl", named)
    pairs = read_pairs(tmp_path / "train-*.jsonl")
    assert [pair.query for pair in pairs] == ["a", "b", "c", "d"]
    assert [pair.id for pair in pairs] == ["train-01:1", "train-01:2", "train-02:1", "train-10:1"]
    (tmp_path / "train-02.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"train-02.jsonl, line 1"):
        read_pairs(tmp_path / "train-*.jsonl")
    with pytest.raises(UserError, match="no file fits"):
        read_pairs(tmp_path / "test-*.jsonl")


@pytest.mark.parametrize(
    ("cell", "label"),
    [(1, 1), ("2", 2), (2.0, 2), ("A", 1), ("B>A", 2), ("A=B", None), ("tie", None), (None, None)],
)
def test_ways_to_write_a_label(written, cell, label):
    row = {"query": "q", "a": "x", "b": "y", "label": cell}
    assert read_pairs(written([row]))[0].label == label


# -- errors


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"chosen": [user("q"), assistant("c")], "rejected": [user("other"), assistant("r")]},
            ["chosen and rejected", "different prompts"],
        ),
        (
            {"prompt": "q", "chosen": [user("q"), assistant("c")], "rejected": "r"},
            ["different prompts"],
        ),
        ({"chosen": [user("q")], "rejected": [user("q")]}, ["end with the assistant's", "user"]),
        ({"chosen": [assistant("c")], "rejected": [assistant("r")]}, ["no prompt"]),
        ({"chosen": "c", "rejected": "r"}, ["no prompt"]),
        ({"prompt": [], "chosen": "c", "rejected": "r"}, ["messages"]),
        ({"prompt": "q", "chosen": [], "rejected": "r"}, ["chosen", "messages"]),
        ({"prompt": "q", "chosen": [["c"]], "rejected": "r"}, ["chosen", "messages"]),
        ({"prompt": "q", "chosen": None, "rejected": "r"}, ["chosen should be text"]),
        ({"prompt": "q\ud800", "chosen": "c", "rejected": "r"}, ["prompt", "surrogate"]),
        ({"prompt": [user("q\ud800")], "chosen": "c", "rejected": "r"}, ["prompt", "surrogate"]),
    ],
)
def test_row_that_can_not_be_used_is_named(tmp_path, row, words):
    good = {"prompt": "q", "chosen": "c", "rejected": "r"}
    for name, where in (("rows.jsonl", "line 3"), ("rows.json", "row 3")):
        WRITE[name.partition(".")[2]](tmp_path / name, [good, good, row, good])
        with pytest.raises(UserError) as caught:
            read_pairs(tmp_path / name)
        for word in (f"{tmp_path / name}, {where}", *words):
            assert word in str(caught.value)


def test_parquet_row_that_can_not_be_used_is_named(tmp_path):
    rows = [{"prompt": "q", "chosen": "c", "rejected": "r"}] * 3
    as_parquet(tmp_path / "rows.parquet", [*rows, {"prompt": "q", "chosen": None, "rejected": "r"}])
    with pytest.raises(UserError, match=r"rows.parquet, row 4: chosen should be text"):
        read_pairs(tmp_path / "rows.parquet")


@pytest.mark.parametrize("name", ["rows.parquet", "rows.json", "rows.jsonl"])
def test_broken_empty_and_missing_files_are_named(tmp_path, name):
    pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    path = tmp_path / name
    for make, words in (
        (lambda: None, "no such file"),
        (path.mkdir, "directory"),
        (lambda: path.rmdir() or path.write_bytes(b'[{"prompt": "q"},'), "not "),
        (lambda: path.write_bytes(b""), "not readable|no comparisons"),
    ):
        make()
        with pytest.raises(UserError, match=words) as caught:
            read_pairs(path)
        assert str(path) in str(caught.value)


def test_missing_pyarrow_is_named_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        read_pairs(tmp_path / "rows.parquet")


def test_numbers_of_rows_count_blank_lines_and_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"n": 1}\r\n\r\n \n{"n": 2}')
    rows = list(read_rows(tmp_path / "rows.jsonl"))
    assert [(n, record) for _, n, record in rows] == [(1, {"n": 1}), (4, {"n": 2})]


def test_json_number_too_long_for_python_is_an_error_with_its_line(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"n": ' + "9" * 5000 + "}")
    with pytest.raises(UserError, match="line 1: not JSON"):
        list(read_rows(tmp_path / "rows.jsonl"))


def test_rows_are_written_whole_or_not_at_all(tmp_path):
    write_rows(tmp_path / "out.jsonl", [{"a": "é\u2028"}, {"a": 2}])
    assert [r for *_, r in read_rows(tmp_path / "out.jsonl")] == [{"a": "é\u2028"}, {"a": 2}]

    def failing():
        yield {"a": 1}
        raise ValueError

    with pytest.raises(ValueError):
        write_rows(tmp_path / "out.jsonl", failing())
    assert len(list(read_rows(tmp_path / "out.jsonl"))) == 2  # the former file
    with pytest.raises(UserError, match="could not be written"):
        write_rows(tmp_path / "nowhere" / "out.jsonl", [{"a": 1}])
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_system_message_with_nothing_in_it_is_none():
    empty = {"role": "system", "content": " "}
    assert as_query([empty, user("q")], "here") == "q"
    assert len(as_query([empty, user("q"), assistant("a"), user("r")], "here")) == 4


# -- unknown columns


UNKNOWN = [
    ({"instruction": "q", "model_1": "x", "model_2": "y", "winner": 1}, None),
    ({"question": "q", "answerA": "x", "answerB": "y", "preference": "A"}, None),
    ({"task": "q", "better_text": "x", "worse_text": "y", "score": 3}, "chosen=better_text"),
    ({"left": "x", "right": "y", "user_turn": "q", "gold": "2"}, None),
    ({"conversation": [user("q")], "resp0": "x", "resp1": "y", "label": 1}, None),
    ({"problem": "q", "gpt": "a long answer to it", "llama": "another one", "rank": 2}, "a=gpt"),
]


@pytest.mark.parametrize(("row", "part"), UNKNOWN, ids=lambda x: "")
def test_unknown_columns_get_a_mapping_that_works(tmp_path, row, part):
    """The proposal in the message, taken as it is, reads the file, with the right roles."""
    path = tmp_path / "rows.jsonl"
    jsonl(path, [row, row])
    with pytest.raises(UserError) as caught:
        read_pairs(path)
    message = str(caught.value)
    assert "line 1" in message and all(name in message for name in row) and "known: " in message
    mapping = message.partition("--columns ")[2].split()[0]
    assert part is None or part in mapping
    pairs = read_pairs(path, mapping)
    assert [pair.query for pair in pairs] == ["q", "q"] and pairs[0].label
    better = [v for v in row.values() if isinstance(v, str)]
    assert {pairs[0].a, pairs[0].b} <= set(better) and pairs[0].a != pairs[0].b


def test_no_idea_is_said_too(tmp_path):
    jsonl(tmp_path / "rows.jsonl", [{"text": "a", "n": {"x": 1}}])
    with pytest.raises(UserError, match=r"--columns query=\.\.\.,a="):
        read_pairs(tmp_path / "rows.jsonl")
    assert propose([]) == propose([{}]) == ""


def test_mapping_of_a_file_with_known_columns_wins(tmp_path):
    row = {"prompt": "q", "chosen": "c", "rejected": "r", "other": "o", "key": "k", "set": "s"}
    jsonl(tmp_path / "rows.jsonl", [row])
    columns = "query=prompt,chosen=other,rejected=rejected,id=key,source=set"
    (pair,) = read_pairs(tmp_path / "rows.jsonl", columns)
    assert parts(pair) == ("q", "o", "r") and (pair.id, pair.source) == ("k", "s")
    assert read_pairs(tmp_path / "rows.jsonl", parse_columns(columns)) == [pair]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ("query=prompt,a=chosen,b=rejcted", ["line 1", "rejcted", "did you mean rejected"]),
        ("query=prompt,a=chosen,b=zzz", ["line 1", "zzz", "it has prompt, chosen"]),
        ("query=prompt,best=chosen", ["'best' is none of", "rejected"]),
        ("prompt", ["prompt", "wanted=given"]),
        ("query=prompt,a=chosen", ["line 1", "not known"]),
    ],
)
def test_mapping_that_does_not_fit_is_named(tmp_path, columns, words):
    jsonl(tmp_path / "rows.jsonl", [{"prompt": "q", "chosen": "c", "rejected": "r"}])
    with pytest.raises(UserError) as caught:
        read_pairs(tmp_path / "rows.jsonl", columns)
    for word in words:
        assert word in str(caught.value)


def test_one_parser_for_the_names_of_every_command():
    """Blanks and empty parts are nothing; the first = divides; a dictionary is as good."""
    wanted = {"prompt": "question", "chosen": "x=y"}
    for columns in ("prompt=question,chosen=x=y", " prompt = question ,, chosen=x=y,", wanted):
        assert parse_columns(columns, ("prompt", "chosen")) == wanted
    assert parse_columns("") == parse_columns(None) == parse_columns(" ,") == {}
    with pytest.raises(UserError, match="'question' is none of prompt, chosen"):
        parse_columns("question=q", ("prompt", "chosen"))


@pytest.mark.parametrize(
    ("row", "wanted", "mapping"),
    [
        ({"q": "2+2", "good": "4", "bad": "5"}, "prompt chosen", "prompt=q,chosen=good"),
        ({"bad": "5", "id": 1}, "rejected", "rejected=bad"),
        ({"resp_b": "x", "resp_a": "y", "kind": "s"}, "chosen rejected subset",
         "chosen=resp_a,rejected=resp_b,subset=kind"),
        ({"category": "s", "winner": "2"}, "label source", "label=winner,source=category"),
        ({}, "prompt", "prompt=..."),
    ],
)  # fmt: skip
def test_names_that_are_wanted_get_the_likeliest_column(row, wanted, mapping):
    assert propose([row], wanted.split()) == mapping


# -- rankings


def test_rankings_of_own_columns(written):
    rows = [
        {"query": "q", "responses": ["x", "y", "z"], "truth": [0.5, 1.0, 0.0], "id": "r"},
        {"query": "p", "responses": ["x"], "truth": None, "id": "s"},
    ]
    assert read_rankings(written(rows)) == [
        Ranking("q", ["x", "y", "z"], [0.5, 1.0, 0.0], "r"),
        Ranking("p", ["x"], None, "s"),
    ]


def test_ppe_best_of_k(written):
    row = {"question_id": 7, "prompt": "q", **{f"response_{i}": f"r{i}" for i in range(1, 33)}}
    row |= {"scores": [i % 3 == 0 for i in range(32)], "sampled_conflict_pairs": [[0, 1], [4, 3]]}
    (ranking,) = read_rankings(written([row]))
    assert ranking.responses == [f"r{i}" for i in range(1, 33)] and ranking.id == "7"
    assert ranking.truth == row["scores"] and ranking.query == "q"
    assert ranking.meta == {"sampled_conflict_pairs": [[0, 1], [4, 3]]}


def test_rankings_with_a_mapping(tmp_path):
    jsonl(tmp_path / "rows.jsonl", [{"q": "1+1", "outs": ["2", 3], "ok": [True, False]}])
    (ranking,) = read_rankings(tmp_path / "rows.jsonl", "query=q,responses=outs,truth=ok")
    assert ranking == Ranking("1+1", ["2", "3"], [True, False], "1")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"query": "q", "outs": ["x"]}, ["query, outs", "--columns query=...,responses=..."]),
        ({"query": "q", "responses": "x"}, ["responses should be a list"]),
        ({"query": "q", "responses": []}, ["responses should be a list"]),
        ({"query": "q", "responses": ["x", None]}, ["response 2 should be text"]),
        ({"query": "q", "responses": ["x"], "truth": [1, 2]}, ["truth", "a list of 1"]),
        ({"query": "q", "responses": ["x"], "truth": ["good"]}, ["truth", "numbers"]),
        ({"query": "q", "responses": ["x"], "truth": [float("nan")]}, ["truth", "numbers"]),
        ({"query": "q", "responses": ["x"], "truth": [10**400]}, ["truth", "numbers"]),
        ({"prompt": "q", "response_1": "x", "scores": [1, 0]}, ["scores", "a list of 1"]),
        (["q"], ["should be an object, not list"]),
    ],
)
def test_bad_ranking_is_named(tmp_path, row, words):
    jsonl(tmp_path / "rows.jsonl", [{"query": "q", "responses": ["x", "y"]}, row])
    with pytest.raises(UserError) as caught:
        read_rankings(tmp_path / "rows.jsonl")
    for word in ("line 2", *words):
        assert word in str(caught.value)


def test_file_without_rankings_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no rankings"):
        read_rankings(tmp_path / "rows.jsonl")
