"""The benchmark of knockouts: what it counts is what was played."""

import json

from nanorrm.bench.judge import JudgeBench, bench_judge


def test_knockouts_in_lockstep_are_a_batch_a_round(capsys, tmp_path):
    bench_judge(JudgeBench(knockouts=3, size=4, max_tokens=48, json=str(tmp_path / "out.json")))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["rounds"] == 2 and result["batches"][0] == 6
    counts = result["counts"]
    assert counts["matches"] == 9 == counts["decided"] + counts.get("coins", 0)
    assert sum(result["batches"]) == counts["asked"] + counts.get("again", 0)
    assert abs(sum(result["shares"].values()) - 1) < 1e-9 and set(result["shares"]) == {
        "engine", "judge", "strategy",
    }  # fmt: skip
    assert json.loads((tmp_path / "out.json").read_text()) == result
