"""sample.py: asks, ranks, generates; shows the thinking as it comes; JSON for pipes."""

import json
import os
import random
import re
import runpy
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorrm.measure.report import write_report
from nanorrm.model.hf_folder import SHIPPED
from nanorrm.rank.tournament import knockout, run_tournaments

ASK = ["judge", "--query", "7+8-5+8", "--a", "12", "--b", "18", "--model", "toy-judge"]
RANK = ["rank", "--query", "7+8-5+8", "--model", "toy-judge", "--data"]
ONE = ["--max-tokens", 16, "--votes", 1]


@pytest.fixture
def candidates(tmp_path):
    path = tmp_path / "candidates.txt"
    path.write_text("12\n18\n\n17\n10\n21\n")
    return path


def lines(out):
    return [json.loads(line) for line in out.splitlines()]


# -- judge


def test_judge_json_is_all_of_stdout(cli):
    code, out, err = cli("sample.py", *ASK, "--json", "--votes", 2)
    assert code == 0, err
    [record] = lines(out)
    assert (record["winner"], record["p_first"], record["outcome"]) == (2, 0.0, None)
    assert [(v["vote"], v["swapped"]) for v in record["votes"]] == [
        (2, False), (2, False), (2, True), (2, True),
    ]  # fmt: skip
    assert all(v["thought"].startswith("7+8=15") and v["tokens"] > 20 for v in record["votes"])


def test_judge_json_has_a_line_for_every_pair_and_a_report_reads_them(cli, root, tmp_path):
    path = root / "tests" / "data" / "pairs_ab.jsonl"
    code, out, err = cli("sample.py", "judge", "--data", path, "--model", "toy-judge", "--json")
    assert code == 0, err
    records = lines(out)
    assert len(records) == 4
    skipped = [r for r in records if r["outcome"] == "skipped"]
    assert len(skipped) == 1 and "several turns" in skipped[0]["meta"]["skipped"]
    (tmp_path / "records.jsonl").write_text(out)
    (tmp_path / "results.json").write_text("{}")
    assert records[0]["id"] in write_report(tmp_path).read_text()


def test_text_can_not_steer_the_terminal(cli):
    nasty = ["--query", "1\x1b[2J+2", "--a", "\x9b31m", "--b", "\x07"]
    code, out, err = cli("sample.py", "judge", *nasty, "--model", "toy-judge", *ONE)
    assert code == 0 and not set("\x1b\x9b\x07") & set(out + err)
    assert "1\ufffd[2J+2" in out


@pytest.mark.parametrize(
    "args",
    [
        ["judge", "--query", "caf\udce9", "--a", "1", "--b", "2"],
        ["rank", "--query", "caf\udce9"],
        ["generate", "--prompt", "caf\udce9"],
    ],
)
def test_an_argument_of_another_encoding_is_named(cli, args):
    code, out, err = cli("sample.py", *args)
    assert code == 2 and out == "" and f"error: {args[1]} holds half a character" in err


@pytest.mark.parametrize("command", [[*ASK, "--json"], ["generate", "--prompt", "1+1"]])
def test_a_reader_that_leaves_is_no_error(cli, monkeypatch, command):
    """`| head`: what can't be written any more is no traceback."""
    ours, theirs = os.pipe()
    os.close(ours)
    with os.fdopen(theirs, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert cli("sample.py", *command) == (0, "", "")


# -- rank


def test_rank_shows_bracket_ratings_champion_and_cost(cli, candidates):
    code, out, err = cli("sample.py", *RANK, candidates)
    assert code == 0, err
    assert "champion  #2\n18" in out and "├─ #2" in out and "rounds survived" in out
    table = re.findall(r"^ +([\d.]+) +(\d) of (\d) +#(\d)", out, re.MULTILINE)
    assert sorted(row[3] for row in table) == list("12345") and table[0][0] == "1.000"
    assert sum(int(row[1]) for row in table) == 4 and sum(int(row[2]) for row in table) == 8
    asked = re.search(r"4 games = (\d) decided(?: \+ (\d) coins)?; 4 pairs asked, (\d+) votes", out)
    assert int(asked[1]) + int(asked[2] or 0) == 4 and int(asked[3]) >= 8


@pytest.mark.parametrize("strategy", ["elo", "round_robin", "bradley_terry"])
def test_rank_by_other_strategies(cli, candidates, strategy):
    code, out, err = cli("sample.py", *RANK, candidates, "--strategy", strategy)
    assert code == 0, err
    assert "champion  #2\n18" in out and "10 games" in out and "├─" not in out


def test_rank_several_queries_as_json(cli, tmp_path):
    queries = [
        {"query": "7+8-5+8", "responses": ["12", "18", "17"], "truth": [0, 1, 0], "id": "x"},
        {"query": "2+2", "responses": ["4", "5"]},
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in queries))
    code, out, err = cli("sample.py", "rank", "--data", "q.jsonl", "--model", "toy-judge", "--json")
    assert code == 0, err
    first, second = lines(out)
    assert (first["id"], first["champion"], second["champion"]) == ("x", 1, 0)
    assert [len(games) for games in first["rounds"]] == [1, 1]
    a, b, winner, votes = second["rounds"][0][0]
    assert winner in (a, b) and len(votes) == 2 and "2+2=4" in votes[0]["thought"]
    assert "3 games" in err  # the cost, beside the output
    (tmp_path / "records.jsonl").write_text(out)
    (tmp_path / "results.json").write_text("{}")
    write_report(tmp_path)


def test_rank_reads_a_pipe(cli):
    """The descriptor of standard input is a pipe meanwhile."""
    ours, theirs = os.pipe()
    os.write(theirs, b"12\n18\n")
    os.close(theirs)
    kept = os.dup(0)
    os.dup2(ours, 0)
    try:
        code, out, err = cli("sample.py", *RANK[:-1], "--json")
    finally:
        os.dup2(kept, 0)
        os.close(kept)
        os.close(ours)
    assert code == 0, err
    assert json.loads(out)["champion"] == 1


@pytest.mark.parametrize(
    ("text", "args", "words"),
    [
        ("12\n", ["--query", "1"], ["f.txt", "1 responses", "2 are needed"]),
        ("12\n18\n", [], ["f.txt, line 1"]),
        ('{"query": "1", "responses": ["1"]}\n', [], ["f.txt, line 1", "1 response", "2"]),
        ("1\n2\n", ["--query", "1", "--opponents", 1], ["opponents = 1", "knockout"]),
        ("1\n2\n", ["--query", "1", "--strategy", "elo", "--opponents", 2], ["opponents = 2"]),
        ("", [], ["f.txt", "no rankings"]),
        ('{"query": "1"}\n', [], ["f.txt, line 1", "responses"]),
        ("1\n2\n", ["--query", "1", "--strategy", "elimination"], ["strategy", "knockout"]),
        ("1\n2\n", ["--query", "1", "--opponents", -1], ["opponents"]),
        ("1\n2\n", ["--query", "1", "--data", "none.txt"], ["none.txt", "no such file"]),
    ],
)
def test_rank_errors_are_one_line(cli, tmp_path, text, args, words):
    (tmp_path / "f.txt").write_text(text)
    code, out, err = cli("sample.py", "rank", "--data", "f.txt", "--model", "toy-judge", *args)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert all(word in err for word in words), err


def games_in(tree):
    """Read a drawn bracket: [(upper, lower, winner), ...], by following its lines from each ├."""
    grid = {(y, x): c for y, line in enumerate(tree) for x, c in enumerate(line)}

    def end(y, x, step, corner):
        while grid.get((y, x)) != corner:
            y += step
            assert grid.get((y, x), " ") in ("│", corner), (y, x)
        return re.search(r"#(\d+) ─*$", tree[y][:x])[1]

    return [
        (end(y, x, -1, "┐"), end(y, x, 1, "┘"), re.match(r"├─ #(\d+)", tree[y][x:])[1])
        for (y, x), c in grid.items()
        if c == "├"
    ]


@given(st.integers(1, 40), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_a_bracket_in_text_says_who_met_whom(root, n, seed):
    bracket = runpy.run_path(str(root / "sample.py"))["bracket"]
    rng = random.Random(seed)

    def play(matches):
        return [rng.choice([a, b]) for _, a, b in matches]

    [result] = run_tournaments([knockout(n, rng)], play)
    rounds = [[] for _ in range(result.rounds)]
    for at, *match in result.matches:
        rounds[at - 1].append(tuple(match))
    tree = bracket(rounds)
    assert len(tree) == (2 * n - 1 if n > 1 else 0)
    wanted = [tuple(str(i + 1) for i in match) for _, *match in result.matches]
    assert sorted(games_in(tree)) == sorted(wanted)
    assert all(line == line.rstrip() for line in tree)


# -- generate


def test_generate_solves(cli):
    code, out, err = cli("sample.py", "generate", "--prompt", "7+8-5", "--temperature", 0)
    assert (code, out) == (0, "7+8=15,15-5=10</think>10\n"), err


def test_generate_several_and_json(cli):
    args = ["generate", "--prompt", "7+8-5", "--n", 3, "--temperature", 1]
    code, out, _ = cli("sample.py", *args)
    _, told, _ = cli("sample.py", *args, "--json")
    records = lines(told)
    assert code == 0 and len(records) == 3
    texts = [record["text"] for record in records]
    assert out == f"{texts[0]}\n\n-- 2 of 3\n{texts[1]}\n\n-- 3 of 3\n{texts[2]}\n"
    assert all(r["prompt"] == "7+8-5" and r["tokens"] > r["think_tokens"] > 0 for r in records)


def test_generate_raw_takes_the_prompt_as_it_stands(cli):
    raw = ["generate", "--raw", "--prompt", "!7+8-5\n<think>", "--temperature", 0]
    assert cli("sample.py", *raw)[1] == "7+8=15,15-5=10</think>10\n"


@pytest.fixture
def chat_model(tmp_path):
    """The toy base with a chat template."""
    folder = tmp_path / "chat"
    folder.mkdir()
    for path in SHIPPED["toy"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}!{{ m.content }}\n{% endfor %}<think>"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


def test_generate_goes_through_the_chat_template(cli, chat_model):
    args = ["generate", "--model", chat_model, "--prompt", "7+8-5", "--temperature", 0]
    assert cli("sample.py", *args)[1] == "7+8=15,15-5=10</think>10\n"
    code, out, err = cli("sample.py", *args, "--system", "be brief")
    assert code == 2 and out == "" and "no system" in err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], ["--prompt"]),
        (["--prompt", "1", "--system", "x"], ["system"]),
        (["--prompt", "1", "--system", "x", "--raw"], ["--raw"]),
        (["--prompt", "1", "--n", 0], ["n = 0"]),
        (["--prompt", "1", "--top-p", 2], ["top_p"]),
        (["--prompt", "1", "--max-tokens", 9000], ["8192"]),
        (["--prompt", "1", "--model", "nowhere"], ["nowhere", "no such model"]),
    ],
)
def test_generate_errors_are_one_line(cli, args, words):
    code, out, err = cli("sample.py", "generate", *args)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert all(word in err for word in words), err


def test_a_model_without_a_chat_template_is_told_of_raw(cli, chat_model):
    (chat_model / "tokenizer_config.json").unlink()
    spec = json.loads((chat_model / "tokenizer.json").read_text())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if "boxed" not in t["content"]]
    (chat_model / "tokenizer.json").write_text(json.dumps(spec))
    code, _, err = cli("sample.py", "generate", "--prompt", "1", "--model", chat_model)
    assert code == 2 and "no chat template; --raw" in err


# -- as it comes


def test_thinking_is_streamed_to_stderr_only(cli):
    code, out, err = cli("sample.py", *ASK, "--stream", "--json")
    assert code == 0 and len(lines(out)) == 1
    assert err.count("Assistant 2") == 1 and lines(out)[0]["votes"][0]["thought"] in err
    assert cli("sample.py", *ASK, "--no-stream")[2] == cli("sample.py", *ASK)[2] == ""


def test_a_terminal_gets_the_thinking_as_it_comes(cli, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    code, out, err = cli("sample.py", *ASK, "--json")
    assert code == 0 and lines(out)[0]["votes"][0]["thought"] in err
