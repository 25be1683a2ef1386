"""The byte counts behind the table of what fits: against the model itself."""

import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from nanorrm.bench import memory
from nanorrm.bench.memory import MemoryTable
from nanorrm.config import UserError

ROOT = Path(__file__).parents[2]


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
    assert memory.parameters(memory.model_config(name))[0] == published


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
    counted = memory.activations(model.config, T, recompute=False)
    assert counted == pytest.approx(sum(kept.values()), rel=0.1)


def test_recomputation_keeps_two_inputs_a_layer():
    three, four = (tiny.model(num_hidden_layers=n).bfloat16() for n in (3, 4))
    inputs, T = [], 48
    four.model.layers[-1].register_forward_pre_hook(lambda _, args: inputs.extend(args[:2]))
    four(torch.arange(T) % 90, torch.tensor([0, T]))
    counted = [memory.activations(model.config, T, recompute=True) for model in (three, four)]
    assert counted[1] - counted[0] == sum(x.nbytes for x in inputs) > 0


def test_more_gpus_share_the_masters_alone():
    config = memory.model_config("RRM-7B")
    one, four = (memory.training(config, n, 16384, 12288, 16) for n in (1, 4))
    assert one.pop("optimizer") == 4 * four.pop("optimizer") == 16 * 7_615_616_512
    assert one == four


def test_help_shows_the_command_that_works():
    command = [sys.executable, "-m", "nanorrm.bench", "memory", "--help"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert "usage: python -m nanorrm.bench memory [" in said


def test_table_and_its_errors(capsys):
    rows = {row["model"]: row for row in memory.table(MemoryTable())}
    assert rows["R1-Distill-Qwen-1.5B"]["train_gpus"] == 1
    assert rows["RRM-32B"]["train_gpus"] is None and rows["RRM-32B"]["judged_at_once"] > 0
    memory.show(MemoryTable(gpu_gb=24))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("| RRM-32B | 32.76B | more than 16 |")
    assert lines[-1].endswith("does not fit |")
    with pytest.raises(UserError, match="gpus"):
        MemoryTable(gpus="1,two")
