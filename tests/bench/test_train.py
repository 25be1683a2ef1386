"""The benchmarks: what they count, what they estimate, and that both sides do the same work."""

import json
import math
import re
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanorrm import Engine, SamplingParams, UserError
from nanorrm.bench.estimate import (
    Hardware,
    estimate,
    forward_flops,
    kv_bytes,
    memory_bytes,
    parameters,
    quantiles,
    rollout_seconds,
    stop_chance,
    training_flops,
    update_seconds,
)
from nanorrm.bench.tools import SHAPES, Clock, PeakMemory, numbers, shape, write_json
from nanorrm.bench.train import TrainBench, cases, random_texts, rewards_of, save_model, whole_step
from nanorrm.model.transformer import Transformer

# -- what is counted


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_the_matrices(name):
    with torch.device("meta"):
        model = Transformer(shape(name))
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert parameters(shape(name)) == matrices


def test_flops_are_what_torch_counts_in_transformers():
    """PyTorch counts whatever a kernel computes, hidden pairs too: that is half of attention."""
    transformers = pytest.importorskip("transformers")
    c = shape("10M")
    c.num_hidden_layers = 2
    theirs = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_hidden_layers,
            num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.num_key_value_heads,
            attn_implementation="eager",
        )
    )
    n, B = 48, 2
    with FlopCounterMode(display=False) as forward:
        out = theirs(torch.zeros(B, n, dtype=torch.long)).logits
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    hidden = 2 * B * c.num_hidden_layers * c.num_attention_heads * c.head_dim * n * n
    rope = forward.get_total_flops() - forward_flops(c, [n] * B, n * B) - hidden
    assert 0 <= rope <= c.head_dim * n * B  # they make the angles by a matrix product
    total = forward.get_total_flops() + backward.get_total_flops() - rope
    assert total == training_flops(c, [n] * B, n * B) + 3 * hidden


def test_kv_bytes_are_the_engines(tokenizer):
    model = Transformer(shape("toy")).init_weights(0)
    engine = Engine(model, tokenizer)
    k, v = engine.cache
    slots = k.shape[1] * k.shape[2]
    assert (k.nbytes + v.nbytes) / slots == kv_bytes(shape("toy"), width=4)


# -- what is estimated


@pytest.mark.parametrize(("mean", "longest"), [(22, 48), (60, 256), (2000, 8192), (1.5, 3)])
def test_stop_chance_gives_the_mean(mean, longest):
    p = stop_chance(mean, longest)
    chances = [p * (1 - p) ** (n - 1) for n in range(1, longest)]
    total = sum(n * c for n, c in enumerate(chances, 1)) + longest * (1 - sum(chances))
    assert total == pytest.approx(mean, rel=1e-9)
    drawn = quantiles(mean, longest, 4000)
    assert sum(drawn) / 4000 == pytest.approx(mean, rel=0.01)
    assert 1 == drawn[0] <= drawn[-1] == longest


def test_rollout_estimate_is_the_sum_over_steps():
    """Beside a loop over every decoding step, on a device where traffic counts and on one where
    arithmetic does."""
    c, prompt, lengths = shape("0.5B"), 100, [3, 3, 10, 400]
    for hardware in (Hardware("slow", 1e18, 1e12, 1), Hardware("weak", 1e10, 1e18, 1)):
        prefill = forward_flops(c, [prompt] * 4, 4) / hardware.flops
        wanted = max(prefill, 2 * parameters(c) / hardware.bandwidth)
        for step in range(max(lengths)):
            live = sum(n > step for n in lengths)
            traffic = 2 * parameters(c) + live * (prompt + step + 0.5) * kv_bytes(c)
            work = 2 * parameters(c) * live
            wanted += max(traffic / hardware.bandwidth, work / hardware.flops)
        assert rollout_seconds(c, prompt, lengths, hardware) == pytest.approx(wanted, rel=1e-9)


def test_update_estimate_by_hand():
    """1.54e9 weights of 6 operations on 1e5 tokens take about 3 s at 300 TFLOP/s."""
    c = shape("1.5B")
    fast = Hardware("fast", 300e12, 1e30, 1)
    got = update_seconds(c, 10, [90] * 1000, fast)
    head = c.vocab_size * c.hidden_size
    dense = 6e5 * (parameters(c) - head) + 6 * 90_000 * head
    assert got == pytest.approx(dense / 300e12, rel=0.01)  # attention over 100 tokens is little
    slow = Hardware("slow", 1e30, 28.0 * parameters(c), 1)
    assert update_seconds(c, 10, [90], slow) == pytest.approx(1)


def test_estimate_marks_itself_and_knows_what_fits(capsys):
    rows = {(r["model"], r["device"]): r for r in estimate()}
    out = capsys.readouterr().out
    assert " s  " in out and not re.search(r"(s|GiB)\d", out)  # columns stay apart
    assert out.startswith("ESTIMATE") and "nothing was measured" in out
    assert rows["1.5B", "A100 80GB"]["fits"]
    assert not rows["7B", "A100 80GB"]["fits"]
    state, cache, kept = memory_bytes(shape("7B"), 10, [10], 100)
    assert state > 18 * 7e9 and cache == 20 * kv_bytes(shape("7B")) and kept > 0
    for row in rows.values():
        assert row["rollout_seconds"] > 0 and row["update_seconds"] > 0


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
    write_json(tmp_path / "a.json", {"x": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    with pytest.raises(UserError, match=r"missing/a\.json: no such file"):
        write_json(tmp_path / "missing" / "a.json", {})
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
    from nanorrm.bench import train as bench_train

    made = []
    trl = bench_train.TRLSteps

    class Kept(trl):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(bench_train, "TRLSteps", Kept)
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

    from nanorrm.bench import trl as bench_trl

    monkeypatch.setattr(bench_trl, "installed", lambda: False)
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
