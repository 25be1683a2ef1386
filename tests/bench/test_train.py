"""The benchmark of training and its tools: both sides do the same work, parts add up."""

import json
import math
import time

import pytest
import torch

from nanorrm import Engine, SamplingParams, UserError
from nanorrm.bench import trl
from nanorrm.bench.estimate import stop_chance
from nanorrm.bench.tools import Clock, PeakMemory, numbers, shape, write_results
from nanorrm.bench.train import TrainBench, cases, random_texts, rewards_of, save_model, whole_step

# -- the tools


def test_a_clock_counts_a_second_once():
    clock = Clock("cpu")
    began = time.perf_counter()
    with clock.part("outer"):
        time.sleep(0.02)
        with clock.part("inner"):
            time.sleep(0.05)
        time.sleep(0.02)
    took = time.perf_counter() - began
    seconds = clock.read()
    assert seconds["inner"] >= 0.05 and 0.04 <= seconds["outer"] < took - 0.05 + 1e-3
    assert sum(seconds.values()) == pytest.approx(took, abs=1e-3)
    assert clock.read() == {}


def test_a_watched_method_answers_as_before_and_closes_on_errors():
    class Owner:
        def double(self, x):
            return 2 * x

        def fail(self):
            raise KeyError

    clock, owner = Clock("cpu"), Owner()
    clock.watch(owner, "double", "a")
    clock.watch(owner, "fail", "b")
    assert owner.double(4) == 8
    with pytest.raises(KeyError):
        owner.fail()
    assert not clock.open and set(clock.read()) == {"a", "b"}


def test_peak_memory_sees_what_came_and_went():
    memory = PeakMemory("cpu")
    block = torch.ones(2**25)  # 128 MiB
    del block
    peak = memory.read()
    if peak is None:
        pytest.skip("this system does not tell the peak of a process's memory")
    assert 100 * 2**20 < peak < 400 * 2**20


def test_written_results_are_whole_or_not_there(tmp_path):
    write_results(tmp_path / "a.json", {"x": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    write_results(None, {})
    with pytest.raises(UserError, match=r"missing/a\.json: no such file"):
        write_results(tmp_path / "missing" / "a.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


# -- the workload of a whole step


@pytest.fixture(scope="module")
def stopping(tmp_path_factory):
    """A folder whose completions should have 22 tokens on average, at most 48."""
    folder = tmp_path_factory.mktemp("stopping")
    save_model(folder, shape("toy"), stop_chance(22, 48), "cpu")
    return folder


def test_lengths_are_geometric_and_cut(stopping):
    """1000 of them: their mean within 5 standard errors (0.5), the share that is cut as well."""
    engine = Engine.from_pretrained(stopping)
    prompt = engine.tokenizer.encode(random_texts(1, 32)[0])
    (group,) = engine.generate([prompt], SamplingParams(n=1000, max_tokens=48))
    lengths = [len(c.ids) for c in group]
    assert sum(lengths) / 1000 == pytest.approx(22, abs=5 * 0.5)
    cut = sum(c.finish_reason == "length" for c in group) / 1000
    wanted = (1 - stop_chance(22, 48)) ** 48
    assert cut == pytest.approx(wanted, abs=5 * math.sqrt(wanted / 1000))
    assert max(lengths) == 48


def test_texts_are_one_token_a_letter_for_both(stopping):
    tokenizers = pytest.importorskip("transformers")
    theirs = tokenizers.PreTrainedTokenizerFast.from_pretrained(stopping)
    ours = Engine.from_pretrained(stopping).tokenizer
    for text in random_texts(3, 32):
        assert len(ours.encode(text)) == 32
        assert theirs(text)["input_ids"] == ours.encode(text)


def test_rewards_are_by_the_first_token():
    assert rewards_of([[3, 2], [2, 3]]) == [1.0, -1.0]


def test_cases_and_numbers():
    assert cases("22:48,60:256") == [(22, 48), (60, 256)]
    for wrong in ("22", "48:22", "1:5", "22:48:60"):
        with pytest.raises(UserError, match=f"cases = '{wrong}' should be mean:limit"):
            cases(wrong)
    with pytest.raises(UserError, match="whole numbers"):
        cases("a:b")
    assert numbers("16,32") == [16, 32]


TINY = TrainBench(whole="toy", prompts=3, group=2, prompt_tokens=8, repeats=1, micro="6,3")


def test_a_whole_step_is_the_same_work_on_both_sides(monkeypatch, capsys):
    """Beside the real TRL: one update a step on the same prompts, parts that add up."""
    pytest.importorskip("trl")
    made = []

    class Kept(trl.TRLSteps):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(trl, "TRLSteps", Kept)
    row = whole_step("toy", 4, 8, TINY, "cpu")
    assert [steps.trainer.state.global_step for steps in made] == [2, 2, 2]  # two tries, the bench
    config = made[-1].trainer.args
    assert not config.gradient_checkpointing and not config.bf16 and not config.use_vllm
    assert made[-1].trainer.model.dtype == torch.float32
    for side in ("nanorrm", "trl"):
        parts = row[side]["parts"]
        assert all(parts[name] > 0 for name in ("rollout", "reward", "log-prob", "update", "other"))
        assert sum(parts.values()) == pytest.approx(row[side]["seconds"], rel=1e-6)
        assert 1 <= row[side]["mean_length"] <= row[side]["longest"] <= 8
    assert row["ratio"] == row["trl"]["seconds"] / row["nanorrm"]["seconds"]
    out = capsys.readouterr().out
    assert "3 prompts x 2" in out and "TRL / nanorrm" in out
    assert "differ by more than 5%" in out or abs(row["lengths_apart"]) <= 0.05


def test_settings_of_a_whole_step_that_cannot_be_are_named(monkeypatch):
    pytest.importorskip("trl")
    wrong = TrainBench(prompts=3, group=2, micro="4,5")
    with pytest.raises(UserError, match="micro = '4,5': none divides the 6 completions"):
        whole_step("toy", 4, 8, wrong, "cpu")

    monkeypatch.setattr(trl, "installed", lambda: False)
    wrong = TrainBench(prompts=3, group=2, micro="6", trl="yes")
    with pytest.raises(UserError, match="TRL is not installed: pip install trl"):
        whole_step("toy", 4, 8, wrong, "cpu")


# -- the command


def test_the_command_prints_and_writes_json(cli, tmp_path):
    code, out, err = cli(
        "nanorrm/bench/__main__.py", "train", "--shapes", "toy", "--tokens", 256, "--length", 64,
        "--cases", "3:6", "--prompts", 2, "--group", 2, "--trl", "no", "--repeats", 1,
        "--json", "bench.json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    result = json.loads(out.splitlines()[-1])
    assert result == json.loads((tmp_path / "bench.json").read_text())
    (step,), (whole,) = result["training_step"], result["whole_step"]
    assert step["tokens"] == 256 and step["model"] == "toy" and 0 < step["mfu"] < 2
    assert whole["nanorrm"]["longest"] <= 6 and "trl" not in whole


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--shapes", "3B"], "'3B' is not one of the shapes toy, 10M"),
        (["--shapes", "-", "--whole", "3B"], "'3B' is not one of the shapes"),
        (["--shapes", "-", "--cases", "9:5"], "cases = '9:5'"),
        (["--repeats", "0"], "repeats = 0 should be at least 1"),
        (["--trl", "maybe"], "trl = 'maybe' is not one of auto, yes, no"),
        (["--group", "1"], "group = 1 should be at least 2"),
        (["--length", "4"], "length = 4 should be at least 8"),
    ],
)
def test_wrong_settings_are_one_line(cli, wrong, message):
    code, _, err = cli("nanorrm/bench/__main__.py", "train", *wrong)
    assert code == 2 and len(err.splitlines()) == 1 and message in err


@pytest.mark.parametrize(
    "args",
    [["engine", "--batches", "x"], ["engine", "--models", "zzz"], ["train", "--shapes", "zzz"]],
)
def test_wrong_settings_are_found_before_anything_is_measured(cli, args):
    code, out, err = cli("nanorrm/bench/__main__.py", *args)
    assert code == 2 and out == "" and repr(args[-1]) in err


def test_a_benchmark_needs_a_name(cli):
    code, out, err = cli("nanorrm/bench/__main__.py", "trian")
    assert code == 2 and "did you mean train?" in err and "engine" in out
