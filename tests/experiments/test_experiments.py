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
from experiments.lab import Comparison, curve
from nanorrm.config import EngineConfig, JudgeConfig, UserError
from nanorrm.data.sources import ToySource
from nanorrm.judge.verdict import NO_ANSWER, Verdict
from nanorrm.records import Pair
from nanorrm.train import grpo

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path for path in (ROOT / "experiments").glob("*.py") if path.stem not in ("lab", "one_file")
)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Experiments of this test are a few prompts wide, and write under tmp_path."""
    original = Comparison.__init__

    def init(lab, name, about, train, config):
        few = {"prompts": 4, "eval_every": 1, "engine": EngineConfig(num_blocks=512)}
        few["eval_pairs" if isinstance(config, JudgeConfig) else "eval_prompts"] = 5
        original(lab, name, about, train, replace(config, **few))

    monkeypatch.setattr(Comparison, "__init__", init)
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
    source, take = ToySource(0), curriculum.ShortFirst(0, 500).take
    longest = [max(p.meta["terms"] for p in take(100 * i, 100)) for i in range(7)]
    assert longest == [2, 3, 4, 5, 6, 6, 6]
    assert take(400, 50) == source.take(400, 50)
    assert take(90, 20) == take(90, 10) + take(100, 10)
    halfway = curriculum.short_first(JudgeConfig(steps=20, prompts=50), None)
    assert halfway.take(0, 600) == take(0, 600)


def test_both_orders_follow_one_another():
    source = ToySource(0)
    both = consistency.BothOrders(source)
    pairs = both.take(4, 4)
    assert pairs[::2] == source.take(2, 2) and both.held_out(3) == source.held_out(3)
    for one, other in zip(pairs[::2], pairs[1::2]):
        assert (one.a, one.b, one.label) == (other.b, other.a, 3 - other.label)


def test_only_right_in_both_orders_is_rewarded(monkeypatch):
    """Four partners: right and right, right and wrong, wrong and right, wrong and wrong."""
    grades = [[(1.0, 1), (1.0, 1), (-1.0, 2), (-1.0, 2)], [(1.0, 2), (-1.0, 1)] * 2]
    monkeypatch.setattr(consistency, "graded", lambda *_: grades)
    strict = consistency.right_in_both(None, None)
    for group, graded in zip(strict, grades, strict=True):
        assert [reward for reward, _ in group] == [1, -1, -1, -1]
        assert [verdict for _, verdict in group] == [verdict for _, verdict in graded]


class SecondWins:
    """A judge that says the second, always."""

    backend = seed = None

    def compare(self, pairs, **settings):
        return [Verdict([2], [False]) for _ in pairs]


def test_the_biased_judge_looks_at_length_first():
    texts = [("12", "3"), ("3", "12"), ("12", "34"), ("3", NO_ANSWER), (NO_ANSWER, NO_ANSWER)]
    pairs = [Pair("1+2", a, b) for a, b in texts]
    verdicts = length_bias.LongerWins(SecondWins(), len).compare(pairs)
    assert [verdict.winner for verdict in verdicts] == [1, 2, 2, 1, 2]


def test_the_biased_judge_is_told_how_long_the_thinking_was(toy_base):
    policy = length_bias.TellingPolicy(toy_base)
    question = policy.prompt("6+6")
    said = [SimpleNamespace(ids=[0] * n, text="</think>12", finish_reason="stop") for n in (3, 30)]
    short, long = (policy.answer(question, completion) for completion in said)
    assert short == long == "12"
    judge = length_bias.LongerWins(SecondWins(), length_bias.thinking)
    assert judge.compare([Pair("6+6", long, short)])[0].winner == 1


def test_what_an_experiment_changes_stays_with_it(small, monkeypatch):
    """Functions go to the stage, settings to its config, and the next variant has its own again."""
    seen = []

    def train(cfg, run, advantages=None):
        seen.append((cfg.scale, advantages))
        fake_train(3)(cfg, run)

    lab(monkeypatch, "--seeds", "1", train=train).compare(
        {"one": {"advantages": max, "scale": "none"}, "default": {}}, {"end": ("acc", "last")}
    )
    assert seen == [("none", max), ("group", None)]


# -- the bench itself


def lab(monkeypatch, *arguments, train=None):
    monkeypatch.setattr(sys, "argv", ["x", *arguments])
    return Comparison("x", "about", train, JudgeConfig(steps=3))


def fake_train(last):
    def train(cfg, run, **functions):
        print("a line that nobody wants")
        run.start()
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
    points = curve(bench.results["default"], "acc")
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
