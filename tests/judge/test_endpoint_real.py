"""A long evaluation against real software, `transformers serve`, killed in the middle.

Needs `pip install transformers[serving]` (fastapi, uvicorn); half an hour on two busy cores.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

PAIRS, CONCURRENCY = 10_000, 16

CLIENT = """
import json, sys, time
from nanorrm.records import Pair
from nanorrm.judge.endpoint import EndpointBackend
from nanorrm.judge.judge import Judge
url, model, journal, n, concurrency = sys.argv[1:]
pairs = [Pair(f"{i}+{i}", f"{i + i}", f"{i + i + 1}", id=str(i)) for i in range(int(n))]
backend = EndpointBackend(url, model, int(concurrency), timeout=60, patience=300)
began = time.time()
verdicts = Judge(backend, max_tokens=1, journal=journal).compare(pairs)
print(json.dumps({"votes": sum(len(v.votes) for v in verdicts),
                  "whole": sum(len(v.votes) == 2 for v in verdicts),
                  "skipped": sum(bool(v.skipped) for v in verdicts),
                  "errors": backend.errors, "seconds": time.time() - began}))
"""


def write_model(folder):
    """A random model that a server answers with at once; one token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    spec = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*letters, "<end>"])}, merges=[]))
    spec.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spec.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=spec, eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 8192}
    ends = {"vocab_size": 257, "eos_token_id": 256, "pad_token_id": 256}
    Qwen2ForCausalLM(Qwen2Config(**shape, **ends)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Served:
    """`transformers serve` in a process that is killed and started again."""

    def __init__(self, folder, tmp_path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.log = folder, tmp_path / "server.log"
        self.env = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.env |= {"HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def start(self):
        command = [str(Path(sys.executable).with_name("transformers")), "serve", str(self.folder)]
        command += ["--port", str(self.port), "--host", "127.0.0.1", "--device", "cpu"]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, env=self.env, stdout=log, stderr=log)

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def answered(self):
        """Requests that its access log says were answered."""
        return self.log.read_bytes().count(b'/v1/chat/completions HTTP/1.1" 200')


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(condition, process, seconds=1800):
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.time() < end
        time.sleep(0.2)


@pytest.mark.slow
def test_long_evaluation_survives_killed_servers_and_a_killed_client(tmp_path, root):
    pytest.importorskip("httpx")
    pytest.importorskip("fastapi", reason="needs pip install transformers[serving]")
    pytest.importorskip("uvicorn", reason="needs pip install transformers[serving]")
    write_model(tmp_path / "model")
    server = Served(tmp_path / "model", tmp_path)
    journal = tmp_path / "journal.jsonl"
    url = f"http://127.0.0.1:{server.port}/v1"
    command = [sys.executable, "-c", CLIENT, url, str(server.folder), str(journal)]
    command += [str(PAIRS), str(CONCURRENCY)]

    def client():
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=root, **pipes)

    began, votes = time.time(), 2 * PAIRS
    server.start()
    asking = client()  # it comes before the server can answer
    try:
        wait_for(lambda: lines(journal) > 0.2 * votes, asking)
        asking.kill()  # the evaluation itself dies
        asking.communicate()
        asking = client()
        for share in (0.5, 0.75):
            wait_for(lambda: lines(journal) > share * votes, asking)  # noqa: B023
            server.kill()
            time.sleep(2)
            server.start()
        out, err = asking.communicate(timeout=3600)
    finally:
        for process in (asking, server.process):
            with contextlib.suppress(OSError):
                process.kill()
    assert asking.returncode == 0, err
    told, records = json.loads(out), [json.loads(line) for line in open(journal)]  # noqa: SIM115
    print(told, "server answered", server.answered(), f"{time.time() - began:.0f} s", err)
    assert told["whole"] == PAIRS and told["votes"] == votes and not told["skipped"]
    assert len({r["key"] for r in records}) == len(records) == votes
    shown = {(r["pair"], r["swapped"]) for r in records}
    assert shown == {(str(i), swapped) for i in range(PAIRS) for swapped in (False, True)}
    assert told["errors"]["no connection"] > 0
    # an answer under way when either side dies is lost: three deaths, at most so many each
    assert votes <= server.answered() <= votes + 3 * CONCURRENCY
