"""The counts behind the estimates: against the model itself, torch's FlopCounter, and by hand."""

import re
import subprocess
import sys

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from nanorrm import Engine, UserError
from nanorrm.bench import estimate as counts
from nanorrm.bench.tools import SHAPES, shape
from nanorrm.model.transformer import Transformer

# -- what a model takes


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_the_model(name):
    with torch.device("meta"):
        model = Transformer(shape(name))
    total = sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    matrices = sum(p.numel() for p in model.model.layers[0].parameters() if p.dim() == 2)
    rest = total - layer * len(model.model.layers)
    assert counts.parameters(shape(name)) == (total, layer, rest)
    assert counts.layer_matrices(shape(name)) == matrices


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("R1-Distill-Qwen-1.5B", 1_777_088_000),
        ("RRM-7B", 7_615_616_512),
        ("Llama-3.1-8B", 8_030_261_248),
        ("Qwen3-8B", 8_190_735_360),
        ("RRM-32B", 32_763_876_352),
    ],
)
def test_parameters_as_published(name, published):
    assert counts.parameters(shape(name))[0] == published


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
    rope = forward.get_total_flops() - counts.forward_flops(c, [n] * B, n * B) - hidden
    assert 0 <= rope <= c.head_dim * n * B  # they make the angles by a matrix product
    total = forward.get_total_flops() + backward.get_total_flops() - rope
    assert total == counts.training_flops(c, [n] * B, n * B) + 3 * hidden


def test_kv_bytes_are_the_engines(tokenizer):
    k, v = Engine(Transformer(shape("toy")).init_weights(0), tokenizer).cache
    slots = k.shape[1] * k.shape[2]
    assert (k.nbytes + v.nbytes) / slots == counts.kv_bytes(shape("toy"), width=4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for CPUs")
def test_activations_are_what_the_kernels_keep(monkeypatch):
    """Distinct tensors in the graph of a forward pass through the Triton kernels, in fp16 (two
    bytes, as bf16, which the interpreter can't do). Weights and RoPE's tables are not counted."""
    monkeypatch.setenv("NANORRM_IMPL", "triton")
    model = tiny.model(head_dim=32, num_hidden_layers=4, tie_word_embeddings=False).half()
    known = {x.data_ptr() for x in (*model.parameters(), *model.buffers())}
    kept, held, T = {}, [], 48

    def keep(x):
        if x.is_floating_point() and x.data_ptr() not in known:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            held.append(x)  # or its address would be used again
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(torch.arange(T) % 90, torch.tensor([0, T]))
    counted = counts.activations(model.config, T, recompute=False)
    assert counted == pytest.approx(sum(kept.values()), rel=0.1)


def test_recomputation_keeps_two_inputs_a_layer():
    three, four = (tiny.model(num_hidden_layers=n).bfloat16() for n in (3, 4))
    inputs, T = [], 48
    four.model.layers[-1].register_forward_pre_hook(lambda _, args: inputs.extend(args[:2]))
    four(torch.arange(T) % 90, torch.tensor([0, T]))
    counted = [counts.activations(model.config, T, recompute=True) for model in (three, four)]
    assert counted[1] - counted[0] == sum(x.nbytes for x in inputs) > 0


# -- which model fits which GPUs


def test_more_gpus_share_the_masters_alone():
    c = shape("RRM-7B")
    one, four = (counts.training_bytes(c, n, 16384, 12288, 16) for n in (1, 4))
    assert one.pop("optimizer") == 4 * four.pop("optimizer") == 16 * 7_615_616_512
    assert one == four


def test_help_shows_the_command_that_works(root):
    command = [sys.executable, "-m", "nanorrm.bench", "memory", "--help"]
    said = subprocess.run(command, cwd=root, capture_output=True, text=True).stdout
    assert "usage: python -m nanorrm.bench memory [" in said


def test_the_table_is_the_documented_one(root, capsys):
    counts.show_memory(counts.MemoryTable())
    lines = capsys.readouterr().out.splitlines()
    documented = (root / "docs" / "TRAINING.md").read_text()
    assert len(lines) == 10 and all(line in documented for line in lines[2:])


def test_the_table_says_what_does_not_fit(capsys):
    counts.show_memory(counts.MemoryTable(gpu_gb=24))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("| RRM-32B | 32.76B | more than 16 |")
    assert last.endswith("does not fit |")
    with pytest.raises(UserError, match="gpus"):
        counts.MemoryTable(gpus="1,two")


# -- the least time of a step


@pytest.mark.parametrize(("mean", "longest"), [(22, 48), (60, 256), (2000, 8192), (1.5, 3)])
def test_stop_chance_gives_the_mean(mean, longest):
    p = counts.stop_chance(mean, longest)
    chances = [p * (1 - p) ** (n - 1) for n in range(1, longest)]
    total = sum(n * c for n, c in enumerate(chances, 1)) + longest * (1 - sum(chances))
    assert total == pytest.approx(mean, rel=1e-9)
    drawn = counts.quantiles(mean, longest, 4000)
    assert sum(drawn) / 4000 == pytest.approx(mean, rel=0.01)
    assert 1 == drawn[0] <= drawn[-1] == longest


@pytest.mark.parametrize(("flops", "bandwidth"), [(1e18, 1e12), (1e10, 1e18)])
def test_rollout_estimate_is_the_sum_over_steps(flops, bandwidth):
    """Beside a loop over every decoding step, on a device where traffic counts and on one where
    arithmetic does."""
    c, prompt, lengths = shape("0.5B"), 100, [3, 3, 10, 400]
    weights = counts.parameters(c)[0]
    prefill = counts.forward_flops(c, [prompt] * 4, 4) / flops
    wanted = max(prefill, 2 * weights / bandwidth)
    for step in range(max(lengths)):
        live = sum(n > step for n in lengths)
        traffic = 2 * weights + live * (prompt + step + 0.5) * counts.kv_bytes(c)
        wanted += max(traffic / bandwidth, 2 * weights * live / flops)
    found = counts.rollout_seconds(c, prompt, lengths, flops, bandwidth)
    assert found == pytest.approx(wanted, rel=1e-9)


def test_update_estimate_by_hand():
    """1.54e9 weights of 6 operations on 1e5 tokens take about 3 s at 300 TFLOP/s."""
    c = shape("1.5B")
    got = counts.update_seconds(c, 10, [90] * 1000, 300e12, 1e30)
    weights, head = counts.parameters(c)[0], c.vocab_size * c.hidden_size
    dense = 6e5 * (weights - head) + 6 * 90_000 * head
    assert got == pytest.approx(dense / 300e12, rel=0.01)  # attention over 100 tokens is little
    assert counts.update_seconds(c, 10, [90], 1e30, 28.0 * weights) == pytest.approx(1)


def test_estimate_marks_itself_and_knows_what_fits(capsys):
    counts.estimate()
    out = capsys.readouterr().out
    assert out.startswith("ESTIMATE") and "nothing was measured" in out
    assert " s  " in out and not re.search(r"(s|GiB)\d", out)  # columns stay apart
    row = r"^(\S+) +(.+?) +(\S+) s +(\S+) s +(\S+) GiB +(\S+) GiB  (.+)$"
    rows = {found[:2]: found[2:] for found in re.findall(row, out, re.MULTILINE)}
    assert len(rows) == 12 and all(float(x) > 0 for row in rows.values() for x in row[:4])
    assert rows["1.5B", "A100 80GB"][-1] == "100% of 8.6 GiB"
    assert rows["7B", "A100 80GB"][-1] == rows["1.5B", "RTX 4090"][-1] == "too large"
    state = 18 * counts.parameters(shape("7B"))[0]
    assert state > 18 * 7e9 and rows["7B", "H100 SXM"][2] == f"{state / 2**30:.1f}"
