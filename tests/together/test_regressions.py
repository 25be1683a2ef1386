"""Bugs that were, one test each."""

import json

import pytest
import tiny
import torch
from safetensors import SafetensorError

from nanorrm import files
from nanorrm.cli import load_preset
from nanorrm.config import JudgeConfig, UserError
from nanorrm.data.sources import FileSource
from nanorrm.engine.sampling import SamplingParams
from nanorrm.measure import statistics
from nanorrm.model import hf_folder as checkpoint
from nanorrm.model.transformer import Transformer
from nanorrm.records import Pair
from tests.model.test_hf_folder import folder  # noqa: F401
from tests.scripts.test_errors import SMALL, TRAINING, inputs, one_clear_line, tree  # noqa: F401


@pytest.mark.parametrize("bytes_", [b"", b"not a checkpoint"])
@pytest.mark.parametrize("name", ["*.distcp", ".metadata", "state.json"])
def test_damaged_checkpoint_is_named(inputs, cli, name, bytes_):  # noqa: F811
    assert cli("train.py", "judge", *SMALL, "--name", "x")[0] == 0
    next(inputs.glob(f"runs/x/checkpoint-*/{name}")).write_bytes(bytes_)
    resumed = cli("train.py", "judge", "--resume", "--name", "x", "--steps", 2)
    one_clear_line(resumed, ["checkpoint-000001"])


@pytest.mark.parametrize(("template", "word"), [("rmm", "rrm, toy"), ("rrm", "chat template")])
def test_template_that_can_not_be_used_is_an_error_not_a_result(inputs, cli, template, word):  # noqa: F811
    args = ["eval.py", "pairs", "--data", "good.jsonl", "--model", "toy", "--template", template]
    one_clear_line(cli(*args), [word])


def test_no_pairs_is_an_error(inputs, cli):  # noqa: F811
    one_clear_line(cli("eval.py", "toy", "--pairs", 0, "--model", "toy"), ["pairs"])


@pytest.mark.parametrize("kind", [SafetensorError, RuntimeError, KeyboardInterrupt])
def test_failed_save_leaves_nothing_beside(folder, monkeypatch, kind):  # noqa: F811
    def full_disk(tensors, path, **_):
        raise kind("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(KeyboardInterrupt if kind is KeyboardInterrupt else UserError):
        tiny.model(seed=1).save_pretrained(folder)
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", "[]"),
        ("config.json", None),
        ("model.safetensors.index.json", "{}"),
        ("model.safetensors.index.json", "[]"),
    ],
)
def test_json_of_the_wrong_shape_is_named(folder, name, text):  # noqa: F811
    if text is None:
        raw = json.loads((folder / name).read_text())
        text = json.dumps({**raw, "hidden_size": "32"})
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=name):
        Transformer.from_pretrained(folder)


@pytest.mark.parametrize("n", [1, 12, 24, 200])
def test_wilson_of_all_reaches_one(n):
    assert statistics.wilson(n, n)[1] == 1.0 and statistics.wilson(0, n)[0] == 0.0


def test_first_batches_hold_each_pair_of_the_first_epoch():
    source = FileSource([Pair(str(i), "a", "b", 1, str(i)) for i in range(10)], 0, 0.0)
    seen = [pair.id for start in (0, 5) for pair in source.take(start, 5)]
    assert sorted(seen) == sorted(map(str, range(10)))


@pytest.mark.parametrize(
    ("text", "word"), [("[prompts]\nx = 1", "prompts"), ('max_think_tokens = "abc"', "int")]
)
def test_preset_that_does_not_fit_is_named(tmp_path, text, word):
    (tmp_path / "p.toml").write_text(text)
    with pytest.raises(UserError, match=word):
        load_preset(JudgeConfig(), tmp_path / "p.toml")


def test_no_block_leaks_when_prefill_raises(tokenizer, monkeypatch):
    engine = tiny.engine(tokenizer, tiny.model(), block_size=4)

    def fails(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine.model, "forward_cached", fails)
    with pytest.raises(RuntimeError):
        engine.generate(tiny.prompts(10), SamplingParams(max_tokens=8))
    assert engine.scheduler.pool.free == len(engine.scheduler.pool.owners)


def test_end_token_inside_the_thinking_is_not_thinking(tokenizer, monkeypatch):
    def scripted(logits, params, stream, position, forced=None, allowed=None):
        return torch.tensor([[65, 260][int(position[0]) - 2]]), torch.zeros(1), torch.zeros(1)

    monkeypatch.setattr("nanorrm.engine.batch.draw", scripted)
    out = tiny.engine(tokenizer, tiny.model()).generate([[1, 256]], SamplingParams(max_tokens=5))
    assert out[0][0].ids == [65, 260] and out[0][0].think_tokens == 1


def test_sleep_then_sync_then_generate(tokenizer):
    """The order a training loop would use: the engine wakes by itself."""
    engine = tiny.engine(tokenizer, tiny.model())
    engine.sleep()
    engine.sync()
    assert not engine.unfinished
    assert len(engine.generate(tiny.prompts(3), SamplingParams(max_tokens=4))) == 3


def test_generate_beside_requests_in_flight_is_refused(tokenizer):
    engine = tiny.engine(tokenizer, tiny.model())
    engine.add([1, 2, 3], SamplingParams(max_tokens=4))
    with pytest.raises(UserError, match="in flight"):
        engine.generate([[4, 5]], SamplingParams(max_tokens=4))
    with pytest.raises(UserError, match="2 SamplingParams for 1"):
        tiny.engine(tokenizer, tiny.model()).generate([[4]], [SamplingParams()] * 2)


def test_settings_of_recorded_graphs_stay_alive(tokenizer):
    """A graph reads the stop ids of when it was recorded: the same tensor must serve again."""
    engine = tiny.engine(tokenizer, tiny.model())
    seen = []
    for stop in ((5,), (6,), (5,)):
        engine.generate([[1]], SamplingParams(max_tokens=2, stop_token_ids=stop))
        seen.append(engine.rows.stop_ids)
    assert seen[0] is seen[2] and seen[0] is not seen[1]


def test_lists_and_single_strings_are_fine_as_settings():
    params = SamplingParams(stop="###", stop_token_ids=[1], answer_slots=[[2, 3]])
    assert params.stop == ("###",) and hash(params.shared()) is not None


def test_log_lines_may_hold_unicode_line_separators(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "query": "a\u2028b\x85c"}\n{"step": 2}\n{"st', encoding="utf-8")
    assert [line["step"] for line in files.read_lines(path)] == [1, 2]


def test_equal_prompts_of_a_step_are_answered_apart(root):
    import runpy

    apart = runpy.run_path(str(root / "train.py"))["seeds_apart"]
    seeds = [p.seed for p in apart(SamplingParams(seed=7), [[1], [2], [1], [1]])]
    assert seeds[:2] == [7, 7] and len(set(seeds)) == 3


def test_the_last_judge_is_asked_as_it_was_trained(inputs, cli):  # noqa: F811
    assert cli("train.py", "judge", *SMALL, "--name", "direct", "--no-think")[0] == 0
    code, _, err = cli("sample.py", "judge", "--query", "1+2", "--a", "3", "--b", "4")
    assert code == 0 and "direct" in err and "without thinking" in err


def test_a_run_without_checkpoint_can_be_started_again(inputs, cli):  # noqa: F811
    (inputs / "runs" / "x").mkdir(parents=True)
    (inputs / "runs" / "x" / "config.json").write_text("{")
    (inputs / "runs" / "x" / "metrics.jsonl").write_text('{"step": 0}\n')
    assert cli("train.py", "judge", *SMALL, "--name", "x")[0] == 0
    steps = [line["step"] for line in files.read_lines(inputs / "runs" / "x" / "metrics.jsonl")]
    assert steps == [0, 1]


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["--learning-rate", "1e30", "--steps", 3], "gradient"),
        (["--learning-rate", "nan"], "learning_rate"),
        (["--name", "a/b"], "not a path"),
        (["--eval-share", 5], "eval_share"),
        (["--seed", 10**13], "seed"),
        (["--engine.cache-gib", 0, "--engine.num-blocks", "None"], "cache_gib"),
    ],
)
def test_settings_out_of_range_are_one_line(inputs, cli, args, word):  # noqa: F811
    one_clear_line(cli("train.py", "judge", *SMALL, *args), [word])
