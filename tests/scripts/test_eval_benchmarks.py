"""eval.py on benchmark files with judges whose answers are known: tables, folders, comparisons."""

import json
import re
from collections import Counter

import pytest
from fakes import FakeJudge, biased, coin, first_slot, often_right, oracle, unreadable

from nanorrm.config import UserError
from nanorrm.judge.verdict import Verdict
from nanorrm.measure import results

LEFT = re.compile(r"(\d+) judged((?: \+ \d+ [a-zA-Z -]+?)+) = (\d+) in the file")


@pytest.fixture
def judge(monkeypatch):
    """judge(answer): eval.py's judge answers so from now on."""

    def answer(rule):
        fake = FakeJudge(rule)
        monkeypatch.setattr("nanorrm.judge.open.open_judge", lambda cfg: fake)
        return fake

    return answer


def saved(tmp_path, out="out"):
    numbers = json.loads((tmp_path / out / "results.json").read_text())
    lines = (tmp_path / out / "records.jsonl").read_text().splitlines()
    return numbers, [json.loads(line) for line in lines]


def test_pandalm_end_to_end(cli, data, judge, tmp_path):
    judge(oracle)
    code, out, err = cli(
        "eval.py", "pandalm", "--data", data / "pandalm_test.json", "--out", "out", "--json", "n"
    )
    assert code == 0, err
    judged, left, rows = LEFT.search(out).groups()
    assert (judged, left.strip(), rows) == ("894", "+ 105 ties", "999")
    assert "right 894 + wrong 0 + tied 0 + invalid 0 + skipped 0 = 894 pairs" in out
    assert "agreement: 100.0%" in out and "macro f1: 100.0%" in out and "!" not in out
    numbers, records = saved(tmp_path)
    assert numbers["all"]["accuracy"] == 1 and numbers["left_out"] == {"ties": 105}
    assert numbers["command"] == "pandalm" and numbers["settings"]["votes"] == 1
    assert {"commit", "torch", "device"} <= numbers["versions"].keys()
    assert json.loads((tmp_path / "n").read_text())["all"] == numbers["all"]
    assert (tmp_path / "out" / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert len(records) == 894
    first = records[0]
    assert first["kind"] == "pair" and first["outcome"] == "right" and first["winner"] == 2
    assert [vote["swapped"] for vote in first["votes"]] == [False, True]
    assert [vote["vote"] for vote in first["votes"]] == [2, 2]
    assert first["meta"]["annotators"] == [2, 2, 2]


def test_llmbar_end_to_end(cli, data, judge, tmp_path):
    judge(coin)
    code, _, err = cli("eval.py", "llmbar", "--data", data / "llmbar.jsonl", "--out", "out")
    assert code == 0, err
    numbers, records = saved(tmp_path)
    low, high = numbers["all"]["accuracy_interval"]
    assert low < 0.5 < high and numbers["all"]["pairs"] == len(records) == 419
    assert list(numbers["rows"])[-2:] == ["adversarial", "all"]
    # the table's numbers can be recomputed from the records
    votes = [(v["vote"], r["label"]) for r in records for v in r["votes"]]
    share = sum(vote == label for vote, label in votes) / len(votes)
    assert numbers["all"]["accuracy"] == pytest.approx(share)
    for kind in ("right", "wrong", "tied"):
        assert numbers["all"][kind] == sum(r["outcome"] == kind for r in records)


@pytest.mark.parametrize(
    ("answer", "flag"),
    [
        (biased(0.4), r"! position bias: (6[7-9]|7[0-3])\.\d% .* slot 1"),
        (unreadable(0.1), r"! (9|10)\.\d% of the votes can't be read"),
        (first_slot, r"! position bias: 100\.0%"),
    ],
)
def test_what_is_planted_is_flagged(cli, data, judge, answer, flag):
    judge(answer)
    code, out, _ = cli("eval.py", "llmbar", "--data", data / "llmbar.jsonl", "--votes", 2)
    assert code == 0 and re.search(flag, out)


def test_one_order_says_nothing_about_position(cli, data, judge):
    judge(first_slot)
    args = ["--data", data / "llmbar.jsonl", "--no-both-orders"]
    code, out, _ = cli("eval.py", "llmbar", *args)
    assert code == 0 and "position bias" not in out


def test_a_limit_adds_up(cli, data, judge):
    judge(oracle)
    code, out, _ = cli("eval.py", "pandalm", "--data", data / "pandalm_test.json", "--limit", 100)
    judged, left, rows = LEFT.search(out).groups()
    assert code == 0 and (judged, rows) == ("100", "999")
    assert sum(map(int, re.findall(r"\d+", left))) == 899


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("rewardbench", ["allenai/reward-bench", "chosen", "subset"]),
        ("pandalm", ["testset-v1.json", "annotator1"]),
        ("judgebench", ["ScalerLab/JudgeBench", "response_A"]),
        ("rmbench", ["THU-KEG/RM-Bench", "domain"]),
        ("llmbar", ["LLMBar", "output_1"]),
        ("ppe", ["PPE-MMLU-Pro", "sampled_conflict_pairs"]),
    ],
)
def test_without_a_file_the_command_says_which(cli, name, wanted):
    code, out, err = cli("eval.py", name)
    assert code == 2 and not out and len(err.splitlines()) == 1
    assert all(word in err for word in ["--data", *wanted])


def test_unknown_columns_get_a_mapping_that_works(cli, judge, tmp_path):
    judge(oracle)
    rows = [{"question": f"q{i}", "good": "x", "bad": "y", "kind": "math-prm"} for i in range(3)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = cli("eval.py", "rewardbench", "--data", "x.jsonl")
    assert code == 2 and "x.jsonl, line 1: columns question, good, bad, kind" in err
    assert "--columns prompt=question,chosen=good,rejected=bad,subset=kind" in err
    columns = err.split("--columns ")[1].strip()
    code, out, err = cli("eval.py", "rewardbench", "--data", "x.jsonl", "--columns", columns)
    assert code == 0 and "= 3 pairs" in out, err


def test_a_broken_line_is_named_and_nothing_is_judged(cli, judge, tmp_path):
    fake = judge(oracle)
    row = {"prompt": "q", "chosen": "x", "rejected": "y", "subset": "math-prm"}
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row)[:20])
    code, _, err = cli("eval.py", "rewardbench", "--data", "x.jsonl", "--out", "out")
    assert code == 2 and "x.jsonl, line 2: not JSON" in err
    assert not fake.asked and not (tmp_path / "out").exists()


def test_results_are_not_overwritten(cli, data, judge, tmp_path):
    args = ["eval.py", "llmbar", "--data", data / "llmbar.jsonl", "--limit", 2]
    fake = judge(oracle)
    assert cli(*args, "--out", "out")[0] == 0
    asked = len(fake.asked)
    code, _, err = cli(*args, "--out", "out")
    assert code == 2 and "holds results already" in err and len(fake.asked) == asked
    (tmp_path / "file").write_text("")
    code, _, err = cli(*args, "--out", "file/out")
    assert code == 2 and "can't write" in err and len(fake.asked) == asked
    assert cli(*args)[0] == cli(*args)[0] == 0  # in one second: two folders
    assert len(list((tmp_path / "runs").glob("eval-llmbar-*"))) == 2


def test_compare_finds_the_better_judge(cli, data, judge, tmp_path):
    for name, answer in (("weak", often_right(0.6)), ("strong", often_right(0.75))):
        judge(answer)
        args = ["--data", data / "llmbar.jsonl", "--out", name, "--votes", 4]
        assert cli("eval.py", "llmbar", *args)[0] == 0
    code, out, err = cli("eval.py", "--compare", "weak", "strong/results.json")
    assert code == 0, err
    assert "419 in both; 0 only in the first, 0 only in the second" in out
    rows, _ = results.compare(tmp_path / "weak", tmp_path / "strong")
    total = rows["all"]
    assert total["difference"] == pytest.approx(0.15, abs=0.05)
    assert total["difference_interval"][0] > 0
    assert total["mcnemar"] < 0.001 and total["sign_flip"] < 0.001
    assert sum(row["pairs"] for name, row in rows.items() if name != "all") == 419
    same, _ = results.compare(tmp_path / "weak", tmp_path / "weak")
    assert same["all"]["difference"] == 0 and same["all"]["mcnemar"] == 1
    low, high = same["all"]["difference_interval"]
    assert 0 < high == -low < 3 / 400
    # other ids and another order of the file change nothing
    lines = (tmp_path / "weak" / "records.jsonl").read_text().splitlines()
    moved = [json.dumps({**json.loads(line), "id": "?"}) for line in lines[::-1]]
    (tmp_path / "weak" / "records.jsonl").write_text("\n".join(moved[:400]) + "\n")
    again, left = results.compare(tmp_path / "weak", tmp_path / "strong")
    assert again["all"]["pairs"] == 400 and left == {
        "only in the first": 0,
        "only in the second": 19,
    }


def test_compare_says_what_is_wrong(cli, data, judge, tmp_path):
    judge(oracle)
    cli("eval.py", "llmbar", "--data", data / "llmbar.jsonl", "--out", "one", "--limit", 5)
    cli("eval.py", "pandalm", "--data", data / "pandalm_test.json", "--out", "two", "--limit", 5)
    for args, wanted in (
        (["one"], "two evaluations"),
        (["one", "two"], "share no judged pair"),
        (["one", "none"], "none/results.json"),
    ):
        code, _, err = cli("eval.py", "--compare", *args)
        assert code == 2 and wanted in err and len(err.splitlines()) == 1
    with open(tmp_path / "one" / "records.jsonl", "a") as file:
        file.write('{"kind"')
    with pytest.raises(UserError, match="line 6: not JSON"):
        results.compare(tmp_path / "one", tmp_path / "one")


def test_unlabelled_pairs_are_counted(cli, judge, tmp_path):
    judge(oracle)
    rows = [{"query": f"q{i}", "a": "1", "b": "2", "label": (1, None)[i % 2]} for i in range(5)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = cli("eval.py", "pairs", "--data", "x.jsonl")
    assert code == 0 and "3 judged + 2 without a label = 5 in the file" in out, err


def test_what_went_wrong_on_the_way_is_told(cli, judge, tmp_path, data):
    """Skipped and cut pairs, an endpoint's failures, and half a character from a server."""
    fake = judge(oracle)
    usual = fake.compare

    def compare(*args, **settings):
        verdicts = usual(*args, **settings)
        verdicts[0] = Verdict(skipped="too long")
        verdicts[1].cut = {"a": 100}
        verdicts[1].thoughts[0] = "half \ud83d"
        verdicts[2].errors = Counter({"timeout": 2})
        return verdicts

    fake.compare = compare
    args = ["--data", data / "llmbar.jsonl", "--limit", 5, "--out", "out"]
    code, out, err = cli("eval.py", "llmbar", *args)
    assert code == 0, err
    assert "right 4 + wrong 0 + tied 0 + invalid 0 + skipped 1 = 5 pairs" in out
    assert "! 1 pairs were not judged (they count as not right): too long" in out
    assert "! 1 pairs were judged with the beginning of a response cut off" in out
    assert "! failed tries at the endpoint, made good since: 2 timeout" in out
    _, records = saved(tmp_path)
    assert records[0]["meta"]["skipped"] == "too long" and records[0]["votes"] == []
    assert records[1]["meta"]["cut"] == {"a": 100}
    assert records[1]["votes"][0]["thought"] == "half \ud83d"
