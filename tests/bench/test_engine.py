"""The benchmark of the engine: the same requests for everyone, and peers that can't run named."""

import json

import pytest
import torch

from nanorrm.bench import engine as bench
from nanorrm.bench.engine import EngineBench


def test_the_workload_is_the_documented_one():
    asked = bench.workload(EngineBench())
    assert len(asked) == 48 * 8 and all(1 <= n <= 256 for _, n in asked)
    assert sum(n for _, n in asked) == 21585  # "useful tokens" in docs/RESULTS.md
    assert all(asked[i][0] == asked[i - i % 8][0] for i in range(len(asked)))


def test_rows_are_printed_and_written_and_peers_get_the_same_requests(
    monkeypatch, capsys, tmp_path
):
    got = []

    def peer(folder, asked, cfg):
        got.append(asked)
        return 1e6, "slow"

    def missing(*_):
        raise ImportError

    def broken(*_):
        raise RuntimeError("no result came")

    peers = {"transformers generate": peer, "vllm": missing, "nanovllm": broken}
    monkeypatch.setattr(bench, "PEERS", peers)
    monkeypatch.setattr(bench, "start", lambda _: ("cpu", "a CPU", {"copy": 1e9}))
    cfg = EngineBench(models="toy", prompts=2, mean=4, longest=8, decode="2", contexts="32")
    cfg.json = str(tmp_path / "rows.json")
    bench.bench_engine(cfg)
    assert got == [bench.workload(cfg)]
    out = capsys.readouterr().out
    assert "vllm: not installed" in out and "nanovllm: failed (RuntimeError: no result" in out
    assert "sampler against trainer: RMS" in out and "in a batch: 100%" in out
    rows = {row["how"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert list(rows) == ["nanorrm", "nanorrm, prompts not shared", "transformers generate",
                          "decode, batch 2, context 32"]  # fmt: skip
    assert all(row["tokens_per_s"] > 0 and row["device"] == "a CPU" for row in rows.values())
    useful = sum(n for _, n in got[0])
    ratio = 1e6 / (useful / rows["nanorrm"]["tokens_per_s"])
    assert f"nanorrm / best of transformers: {ratio:.1f}x" in out


@pytest.mark.parametrize("how", ["generate", "generate_batch"])
def test_transformers_answers_all_requests(how, monkeypatch, tmp_path):
    """The peers themselves, at a size that takes a second; what they are given is kept."""
    transformers = pytest.importorskip("transformers")
    bench.build("toy", "cpu").save_pretrained(tmp_path, bench.TOKENIZER)
    made = []
    generate = transformers.Qwen2ForCausalLM.generate

    def kept(self, ids, **kwargs):
        made.append((ids, kwargs))
        return generate(self, ids, **kwargs)

    monkeypatch.setattr(transformers.Qwen2ForCausalLM, "generate", kept)
    asked = [([1, 2, 3], 2), ([4], 3), ([5, 6], 1)]
    peer = getattr(bench, f"time_{how}")
    seconds, note = peer(str(tmp_path), asked, EngineBench(batches="2,8"))
    assert seconds > 0
    if how == "generate":
        assert "the best of 2,8" in note
        (first, its), (_, last), _ = made  # two batches of two, then one of all
        assert first.tolist() == [[0, 4], [5, 6]] and its["max_new_tokens"] == 3
        assert its["attention_mask"].tolist() == [[0, 1], [1, 1]] and last["max_new_tokens"] == 2
        assert torch.equal(made[2][0], torch.tensor([[0, 0, 4], [0, 5, 6], [1, 2, 3]]))
