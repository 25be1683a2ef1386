"""From a folder with R1-Distill's files to a trained judge: tiny random weights, all else as is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from nanorrm import Engine, SamplingParams
from nanorrm.files import read_lines
from nanorrm.judge.prompts import judge_prompt

HERE = Path(__file__).parents[1]

# random weights never give a readable verdict, and equal rewards no gradient: reward odd lengths
SCRIPT = f"""
import sys
sys.path.insert(0, {str(HERE.parent)!r})
import train
train.verdict_reward = lambda text, label, closed: (1.0 if len(text) % 2 else -1.0, label)
if __name__ == "__main__":
    train.main()
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    """Three steps on LLMBar by 1 and by 2 processes -> (the starting folder, {ranks: run})."""
    folder = tmp_path_factory.mktemp("real")
    tiny.real_folder(folder / "start", max_position_embeddings=16384)
    (folder / "script.py").write_text(SCRIPT)
    small = ["judge", "--model", "start", "--data", str(data / "llmbar.jsonl"), "--steps", "3"]
    small += ["--prompts", "2", "--group", "4", "--max-tokens", "24", "--eval-pairs", "2"]
    small += ["--loss.kl", "1e-3", "--learning-rate", "1e-3", "--warmup-steps", "1"]
    small += ["--micro-tokens", "6000", "--threads", "1"]
    for ranks in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={ranks}", "script.py", *small, "--name", str(ranks)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
        done = subprocess.run(
            command if ranks > 1 else [sys.executable, *command[5:]],
            cwd=folder, capture_output=True, text=True, timeout=300, env=env,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert "419 pairs, none dropped" in done.stdout
    return folder / "start", {ranks: folder / "runs" / str(ranks) for ranks in (1, 2)}


def test_three_steps_on_llmbar_by_one_and_two_processes(trained):
    _, runs = trained
    one, two = (read_lines(runs[n] / "metrics.jsonl")[1:] for n in (1, 2))
    assert [row["step"] for row in one] == [1, 2, 3]
    for a, b in zip(one, two):
        assert a["reward"] == b["reward"] and a["grad_norm"] > 0.01
        for name in ("loss", "grad_norm", "entropy", "kl", "sampler/logp_diff_max"):
            assert a[name] == pytest.approx(b[name], abs=1e-4), name
    assert one[2]["kl"] > 1e-5  # away from the reference, which is the start
    weights = [tiny.Transformer.from_pretrained(runs[n] / "model") for n in (1, 2)]
    for (name, p), (_, q) in zip(*(model.named_parameters() for model in weights)):
        assert (p - q).abs().max() < 1e-5, name


def test_the_prompt_is_the_paper_s_in_the_model_s_own_template(trained, data):
    start, _ = trained
    tokenizer = Engine.from_pretrained(start).tokenizer
    text = tokenizer.decode(judge_prompt(tokenizer, "Q?", "one", "two", "rrm"))
    ours = json.loads((data / "rrm_prompt.json").read_text())
    assert ours["system"].strip()[:60] in text
    assert text.endswith("<think>\n")


def test_transformers_goes_on_from_what_was_trained(trained):
    """The saved folder opens there, and gives the same greedy text."""
    transformers = pytest.importorskip("transformers")
    _, runs = trained
    folder = runs[1] / "model"
    engine = Engine.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = judge_prompt(engine.tokenizer, "What is 2 + 3?", "5", "6", "rrm")
    ((ours,),) = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=40))
    out = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=40)[0]
    assert out[len(prompt) :].tolist() == ours.ids
    assert words.decode(prompt) == engine.tokenizer.decode(prompt)
