"""Every experiment runs and prints its table, and changes what it says it changes."""

import importlib
import json
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from experiments import consistency, curriculum, length_bias, one_sided
from nanorrm import experiment, grpo
from nanorrm.config import EngineConfig, JudgeConfig, UserError
from nanorrm.data import Pair, ToySource
from nanorrm.judge import Verdict
from nanorrm.prompts import NO_ANSWER

ROOT = Path(__file__).parents[1]
FILES = sorted(set((ROOT / "experiments").glob("*.py")) - {ROOT / "experiments" / "one_file.py"})


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Experiments of this test are a few prompts wide, and write under tmp_path."""
    original = experiment.Lab.__init__

    def init(lab, name, about, train, config):
        few = {"prompts": 4, "eval_every": 1, "engine": EngineConfig(num_blocks=512)}
        few["eval_pairs" if isinstance(config, JudgeConfig) else "eval_prompts"] = 5
        original(lab, name, about, train, replace(config, **few))

    monkeypatch.setattr(experiment.Lab, "__init__", init)
    monkeypatch.chdir(tmp_path)


def test_at_most_six_short_files():
    assert 1 <= len(FILES) <= 6
    for path in FILES:
        text = path.read_text()
        assert text.count("\n") < 120
        assert f"python -m experiments.{path.stem}\n" in text


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_runs_and_compares(path, small, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [path.stem, "--steps", "1", "--seeds", "3"])
    importlib.import_module(f"experiments.{path.stem}").main()
    out = capsys.readouterr().out
    (folder,) = Path("runs").glob(f"{path.stem}-*")
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "1 steps, seeds 3" in out and "\ndefault " in out
    runs = sorted(folder.glob("*/metrics.jsonl"))
    assert len(runs) == out.count(", seed 3:") >= 2
    for run in runs:
        rows = [json.loads(line) for line in run.read_text().splitlines()]
        assert [row["step"] for row in rows] == [0, 1]
        variant = run.parent.name.removesuffix("-3").replace("-", " ")
        line = next(line for line in out.splitlines() if line.startswith(variant + "  "))
        assert f"{rows[-1]['eval/accuracy']:.3g}" in line.split()


# -- what they change


def test_one_sided_halves_add_up():
    rewards = torch.tensor([[1.0, -1, -1, -1], [1, 1, 1, 1]])
    down, up = one_sided.mistakes(rewards, "group"), one_sided.successes(rewards, "group")
    assert (down <= 0).all() and (up >= 0).all() and down.any() and up.any()
    assert torch.equal(down + up, grpo.advantages(rewards))


def test_the_curriculum_grows_to_what_the_default_draws():
    source, take = ToySource(0), curriculum.short_first(500)
    longest = [max(p.meta["terms"] for p in take(source, 100 * i, 100)) for i in range(7)]
    assert longest == [2, 3, 4, 5, 6, 6, 6]
    assert take(source, 400, 50) == source.take(400, 50)
    assert take(source, 90, 20) == take(source, 90, 10) + take(source, 100, 10)


def test_both_orders_follow_one_another():
    source = ToySource(0)
    pairs = consistency.BothOrders(source).take(4, 4)
    assert pairs[::2] == source.take(2, 2)
    for one, other in zip(pairs[::2], pairs[1::2]):
        assert (one.a, one.b, one.label) == (other.b, other.a, 3 - other.label)


def test_only_right_in_both_orders_is_rewarded(monkeypatch):
    """Four partners: right and right, right and wrong, wrong and right, wrong and wrong."""
    grades = [[(1.0, 1), (1.0, 1), (-1.0, 2), (-1.0, 2)], [(1.0, 2), (-1.0, 1)] * 2]
    batch = [(f"pair {i}", [i], ["rollouts"], graded) for i, graded in enumerate(grades)]
    monkeypatch.setattr(consistency, "collect", lambda *_: (batch, 2))
    strict, cursor = consistency.right_in_both(None, None, 0, 1, None)
    assert cursor == 2 and [row[:3] for row in strict] == [row[:3] for row in batch]
    for row, graded in zip(strict, grades):
        assert [reward for reward, _ in row[-1]] == [1, -1, -1, -1]
        assert [verdict for _, verdict in row[-1]] == [verdict for _, verdict in graded]


def says_the_second(judge, pairs, **how):
    return [Verdict([2], [False]) for _ in pairs]


def test_the_biased_judge_looks_at_length_first(monkeypatch):
    monkeypatch.setattr(length_bias, "compare", says_the_second)
    texts = [("12", "3"), ("3", "12"), ("12", "34"), ("3", NO_ANSWER), (NO_ANSWER, NO_ANSWER)]
    pairs = [Pair("1+2", a, b) for a, b in texts]
    verdicts = length_bias.longer_wins(len)(None, pairs)
    assert [verdict.winner for verdict in verdicts] == [1, 2, 2, 1, 2]


def test_the_biased_judge_is_told_how_long_the_thinking_was(monkeypatch):
    monkeypatch.setattr(length_bias, "answer", lambda policy, question, completion: "12")
    short, long = (length_bias.with_tokens(None, [], SimpleNamespace(ids=[0] * n)) for n in (3, 30))
    assert short == long == "12"
    monkeypatch.setattr(length_bias, "compare", says_the_second)
    judged = length_bias.longer_wins(lambda text: text.tokens)(None, [Pair("6+6", long, short)])
    assert judged[0].winner == 1


# -- the bench itself


def lab(monkeypatch, *arguments, train=None):
    monkeypatch.setattr(sys, "argv", ["x", *arguments])
    return experiment.Lab("x", "about", train, JudgeConfig(steps=3))


def fake_train(last):
    def train(cfg, run):
        print("a line that nobody wants")
        run.start(0, cfg.steps)
        for step in range(last + 1):
            run.log(step, {"acc": step / 10 + cfg.seed}, "")

    return train


def test_seeds_stand_side_by_side(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    bench = lab(monkeypatch, "--seeds", "0", "7", train=fake_train(3))
    with redirect_stdout(StringIO()) as out:
        for seed in bench.seeds:
            bench.run("default", seed)
        bench.report({"end": ("acc", "last"), "mean": ("acc", "mean"), "0.2 at": ("acc", 0.2)})
    lines = out.getvalue().splitlines()
    assert lines[-2].split("  ") == ["default", "0.3 / 7.3", "0.15 / 7.15", "2 / 0"]
    assert "nobody" not in out.getvalue()
    points = experiment.curve(bench.results["default"], "acc")
    assert points == [(0, 3.5), (1, pytest.approx(3.6)), (2, pytest.approx(3.7)), (3, 3.8)]


def test_a_run_that_was_interrupted_ends_the_experiment(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    bench = lab(monkeypatch, train=fake_train(1))
    with pytest.raises(KeyboardInterrupt):
        bench.run("default", 0)
    assert not bench.results


def test_errors(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--seeds: give at least one"):
        lab(monkeypatch, "--seeds")
    with pytest.raises(UserError, match="steps = 0 should be at least 1"):
        lab(monkeypatch, "--steps", "0")
    bench = lab(monkeypatch, train=fake_train(3))
    bench.run("default", 0)
    with pytest.raises(UserError, match="default-0: exists already"):
        (tmp_path / bench.folder / "default-0" / "model").mkdir()
        bench.run("default", 0)
