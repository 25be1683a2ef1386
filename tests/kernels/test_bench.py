"""The bench: its numbers add up, it survives what it measures, and says what is missing."""

import doctest
import json
import math
import os
import pickle
import re
import shutil
import time
from pathlib import Path

import children
import pytest
import torch

from kernels import tiles
from kernels.bench import __main__ as bench
from kernels.bench import measure, peers, tune
from kernels.bench.cases import MODELS, OPS, SMALL, Model, cases

TINY = [case for op in OPS for case in cases(op, small=True)]
CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="tests what happens without a GPU")


@CPU
def test_on_a_cpu_references_are_measured_and_it_is_said(capsys, tmp_path):
    results = tmp_path / "out" / "results.json"
    picture = tmp_path / "out" / "picture.png"
    bench.main(["rms_norm", "--json", str(results), "--plot", str(picture), "--seconds", "0.001"])
    lines = capsys.readouterr().out.strip().splitlines()
    last = json.loads(lines[-1])
    assert last == json.loads(results.read_text())
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(x.name for x in results.parent.iterdir()) == ["picture.png", "results.json"]
    assert "no GPU" in "\n".join(lines) and "peers missing" in "\n".join(lines)
    assert [row["impl"] for row in last["rows"]] == ["torch", "torch"]
    for row, case in zip(last["rows"], cases("rms_norm", small=True), strict=True):
        assert 0 < row["us"]["p20"] <= row["us"]["p50"] <= row["us"]["p80"]
        rate = case.bytes / row["us"]["p50"] * 1e6
        assert row["gbs"] == pytest.approx(rate / 1e9, abs=0.0051)
        assert row["share"] == pytest.approx(rate / last["ceilings"]["copy"], abs=1e-4)


def test_a_peer_that_takes_twice_as_long_has_ratio_two(capsys, tmp_path, monkeypatch):
    def rows(*args):
        case = cases("swiglu", small=True)[0]
        for name, us in ("triton", 50.0), ("torch", 100.0):
            spent = {"us": {"p20": us, "p50": us, "p80": us}, "tflops": 0.0, "gbs": 2000 / us}
            yield case.row(name) | spent | {
                "bound": "copy", "share": 0.5, "peak_mib": 3.0, "graph": True
            }  # fmt: skip
        yield case.row("liger") | {"missing": "liger_kernel"}

    monkeypatch.setattr(bench, "rows", rows)
    bench.main(["swiglu", "--seconds", "0.001", "--plot", str(tmp_path / "picture.svg")])
    *lines, last = capsys.readouterr().out.strip().splitlines()
    assert [row.get("ratio") for row in json.loads(last)["rows"]] == [None, 2.0, None]
    ours, torch_own, liger = lines[-3:]
    assert (
        "50.0 us (50.0 to 50.0)      40 GB/s  50.0%        3 MiB" in ours and "x" not in ours[90:]
    )
    assert torch_own.endswith("  x2.00") and liger.endswith("missing: liger_kernel")
    assert "<svg" in (tmp_path / "picture.svg").read_text()


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_every_call_is_built_right(case):
    """Ours and the reference are given the same inputs and asked for the same thing."""
    inputs = case.inputs("cpu", torch.float32)
    results = []
    for name in ("triton", "torch"):
        torch.manual_seed(5)  # gradients are drawn when the call is built
        copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
        result = case.calls[name](*copies)()
        results.append(result if isinstance(result, tuple | list) else (result,))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_even_sdpa_is_the_same_operation():
    inputs = *(torch.randn(24, h, 8) for h in (4, 2, 2)), torch.tensor([0, 8, 16, 24])
    out = peers.sdpa(*inputs)()  # [B, H, L, D]
    expected = cases("attention", small=True)[0].calls["torch"](*inputs)()
    torch.testing.assert_close(out.transpose(1, 2).flatten(0, 1), expected)


def test_operations_and_bytes_of_a_known_shape():
    """8192 x 4096 x 151,936 is 10.2 TFLOP a product; 64 sequences of 2,048 at 7B read 268 MB."""
    head = {case.phase: case for case in cases("logprob") if case.model == "H=4096"}
    assert head["forward"].flops == pytest.approx(10.196e12, rel=1e-3)
    assert head["forward+backward"].flops == pytest.approx(4 * 10.196e12, rel=1e-3)
    decode = next(c for c in cases("paged_attention") if c.model == "7B" and "B=64 " in c.shape)
    assert decode.bytes == pytest.approx(64 * 2048 * 4 * 128 * 2 * 2, rel=0.01)
    even = next(c for c in cases("attention") if c.model == "7B" and c.shape.startswith("4x4096"))
    assert even.flops == pytest.approx(4 * 28 * 128 * 4 * 4096**2 / 2, rel=1e-3)


def test_each_operation_meets_each_model():
    for op in OPS:
        assert {case.model for case in cases(op)} >= set(MODELS)


def test_peers_are_asked_for_what_they_do():
    """sdpa: sequences of one length. FlashInfer: no gradients. Two heads: no backward alone."""
    asked = {(c.op, c.phase, c.shape): set(c.calls) for op in OPS for c in cases(op)}
    assert all({"triton", "torch", "compiled"} <= names for names in asked.values())
    for (op, phase, shape), names in asked.items():
        assert ("sdpa" in names) == (op == "attention" and "mixed" not in shape)
        assert phase == "forward" or "flashinfer" not in names
        assert ("cut-cross-entropy" in names) == (op == "logprob" and phase != "backward")


def test_ours_is_measured_first_and_what_compiles_long_last():
    jobs = measure.plan(OPS, "cuda", quick=False)
    names = [name for _, name in pickle.loads(pickle.dumps(jobs))]  # a child is given them
    assert len({case for case, _ in jobs}) == sum(len(cases(op)) for op in OPS)  # by their words
    assert names.index("torch") > max(i for i, n in enumerate(names) if n == "triton")
    assert names.index("compiled") > max(i for i, n in enumerate(names) if n == "torch")


CEILING = {"copy": 1e9, "matmul": 1e12}


def failing(error):
    def build(*inputs):
        raise error

    return build


def test_a_failing_call_is_a_row():
    case = cases("swiglu", small=True)[0]
    case.calls = {
        "broken": failing(RuntimeError("boom\nand a long story")),
        "absent": failing(ModuleNotFoundError("no module", name="some_peer")),
    }
    found = {n: measure.measure(case, n, "cpu", 0, CEILING) for n in case.calls}
    assert found["broken"]["error"] == "RuntimeError: boom"
    assert found["absent"]["missing"] == "some_peer"
    measure.inputs.cache_clear()
    case.make = failing(RuntimeError("out of memory"))
    assert "out of memory" in measure.measure(case, "broken", "cpu", 0, CEILING)["error"]
    assert all(bench.line(row) for row in found.values())


def test_the_bound_is_the_ceiling_that_takes_longer():
    """At 60 operations a byte and a TFLOP/s: bytes, if they come at 1 GB/s, but not at 1 TB/s."""
    case = cases("logprob", small=True)[0]
    found = [
        measure.measure(case, "torch", "cpu", 0, CEILING | {"copy": copy}) for copy in (1e9, 1e12)
    ]
    assert [row["bound"] for row in found] == ["copy", "matmul"]
    for row, ceiling in zip(found, (case.bytes / 1e9, case.flops / 1e12)):
        assert row["share"] == pytest.approx(ceiling / row["us"]["p50"] * 1e6, abs=1e-4)


def test_missing_peers_are_named():
    assert set(peers.versions()) == {"flash-attn", "liger", "cut-cross-entropy", "flashinfer"}


def test_a_crash_a_hang_and_a_lost_gpu_cost_one_row_each():
    """Numbers 1, 2 and 3; each is the end of its process."""
    jobs = [(children.Numbered(i), "torch") for i in range(5)]
    found = list(measure.rows(jobs, math.inf, measure=children.misbehaving, silence=5))
    names = [case.row(name) for case, name in jobs]
    assert found[0]["number"] == 0 and found[4]["number"] == 4 and len(found) == 5
    assert found[0]["process"] != found[4]["process"] != os.getpid()
    assert found[1].pop("error").startswith("BrokenProcessPool: A process")
    assert found[2].pop("error") == "timed out"
    assert found[3].pop("error") == "RuntimeError: an illegal memory access was encountered"
    assert found[1:4] == names[1:4]


def test_out_of_time_is_said():
    jobs = measure.plan(["swiglu", "rms_norm", "rope_write"], "cpu", quick=True)
    found = list(measure.rows(jobs, time.time() - 1))
    assert len(found) == 5 and all("out of time" in row["error"] for row in found)


def test_unknown_operation(capsys):
    with pytest.raises(SystemExit):
        bench.main(["attentoin"])
    assert "attentoin" in capsys.readouterr().err


@CPU
def test_tuning_needs_a_gpu():
    with pytest.raises(SystemExit, match="measures on a GPU"):
        bench.main(["--tune"])


@pytest.fixture
def little(monkeypatch):
    """Cases that Triton's interpreter runs in no time, and a table to change."""
    monkeypatch.setitem(SMALL, "tiny", Model(32, 2, 1, 16, 64, 40))
    for op, size in {
        "swiglu": (2,),
        "logprob": (8,),
        "rms_norm": (8,),
        "rope_write": (16,),
    }.items():
        monkeypatch.setitem(OPS, op, OPS[op]._replace(small=size))
    monkeypatch.setitem(tiles.TILES, "swiglu", list(tiles.TILES["swiglu"]))


@CPU
def test_the_cases_reach_every_table_entry(little):
    """So that --tune, which takes its rows from the cases, leaves none out."""
    assert {entry for op in OPS for entry, _ in tune.reached(op, "cpu")} == set(tiles.TILES)


@CPU
def test_tuning_rewrites_the_table(little, tmp_path, capsys, monkeypatch):
    """In the interpreter, by a clock that likes blocks of 128."""
    path = shutil.copy(tiles.__file__, tmp_path / "tiles.py")

    def clock(call, seconds, graph):
        return [abs(tiles.tile("swiglu", "interpret")["BLOCK"] - 128) + 1.0] * 3, False, None

    monkeypatch.setitem(tune.TIMERS, "cpu", clock)
    tune.tune(["swiglu"], 0, time.time() + 60, device="cpu", path=path)
    assert "-> 1000000.0 us" in capsys.readouterr().out
    assert tiles.tile("swiglu", "interpret")["BLOCK"] == 128
    scope = {}
    exec(compile(Path(path).read_text(), "tiles.py", "exec"), scope)
    assert scope["TILES"] == tiles.TILES


@pytest.mark.parametrize("op", ["attention_dq", "attention_delta"])  # a list of lines, of one line
def test_rewriting_the_table(op):
    """A tuned row comes first, replaces the one tuned before, and the file still loads."""
    source = Path(tiles.__file__).read_text()
    limits = {"bytes": 2, "D": 128}
    for BM in (32, 256):
        values = {"BM": BM, "BN": 64, "num_warps": 4, "num_stages": 2}
        source = tune.rewrite(source, op, limits, "sm_90", values, "measured")
    scope = {}
    exec(compile(source, "tiles.py", "exec"), scope)
    assert scope["tile"](op, "sm_90", **limits)["BM"] == 256
    before = tiles.tile(op, "sm_100", **limits)
    assert scope["tile"](op, "sm_100", **limits) == before
    assert len(scope["TILES"][op]) == len(tiles.TILES[op]) + 1
    assert {*scope["TILES"]} == {*tiles.TILES}
    assert len(re.findall("measured\n", source)) == 1
    with pytest.raises(ValueError, match="no list for nothing"):
        tune.rewrite(source, "nothing", {}, "sm_90", {}, "")


def test_descent_skips_what_does_not_run():
    def time_of(values):
        return math.inf if values["BM"] > 64 else 1 / values["BM"]

    best, spent, _ = tune.descend({"BM": 16, "num_warps": 4}, time_of)
    assert best["BM"] == 64 and spent == 1 / 64


@pytest.mark.parametrize("module", [measure, tune])
def test_worked_examples(module):
    failed, tried = doctest.testmod(module)
    assert tried and not failed


@pytest.mark.gpu
def test_on_a_gpu(capsys):
    bench.main(["rms_norm", "--quick", "--seconds", "0.02"])
    results = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    ours = [row for row in results["rows"] if row["impl"] == "triton"]
    assert len(ours) == 2 and all(0 < row["share"] < 1.2 for row in ours)
