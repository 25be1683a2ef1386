"""The optimizer step at size: ranks, precision, recomputation, mini-batches, schedules."""

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import ranks
import tiny
import torch

from nanorrm.config import BaseConfig, JudgeConfig, UserError
from nanorrm.engine.sampling import SamplingParams
from nanorrm.runs import Run
from nanorrm.train import grpo
from nanorrm.train.trainer import Trainer

HERE = Path(__file__).parents[1]


def torchrun(n, *args, cwd=None):
    """Run a script on n processes -> the finished process, output as text."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n)]
    command += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    paths = {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, args)], cwd=cwd, env={**os.environ, **paths},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def recorded(tokenizer):
    """Five batches of rollouts of a random model, with advantages."""
    engine = tiny.engine(tokenizer, tiny.model(tie_word_embeddings=False))
    generator = torch.Generator().manual_seed(0)
    batches = []
    for step in range(5):
        questions = [[*prompt, 256] for prompt in tiny.prompts(5, seed=step)]
        params = SamplingParams(n=4, max_tokens=20, max_think_tokens=8, seed=step)
        groups = engine.generate(questions, params)
        advantages = grpo.advantages(torch.randn(5, 4, generator=generator))
        batches.append((questions, groups, advantages))
    return batches


@pytest.fixture(scope="module")
def on_ranks(recorded, tmp_path_factory):
    """on_ranks(n, changes, dtype) -> what ranks.run gives on n processes."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(recorded, folder / "recorded.pt")

    def call(n, changes, dtype="float32"):
        result = folder / "result.pt"
        done = torchrun(n, HERE / "ranks.py", folder / "recorded.pt", result, repr(changes), dtype)
        assert done.returncode == 0, done.stderr
        return torch.load(result)

    return call


@pytest.mark.parametrize(
    ("n", "changes"),
    [
        (2, {}),
        (2, {"kl": 0.1, "mini_prompts": 2, "aggregation": "sequence", "recompute": True}),
        (3, {"micro_tokens": 10**6}),  # one rank has less to do than the others
    ],
    ids=["plain", "mini-batches, reference, recomputation", "three"],
)
def test_ranks_give_the_losses_and_weights_of_one_process(recorded, on_ranks, n, changes):
    losses, weights, _ = ranks.run(recorded, ranks.settings(**changes))
    there, gathered, _ = on_ranks(n, changes)
    assert len(there) == 5
    torch.testing.assert_close(torch.tensor(there), torch.tensor(losses), atol=1e-5, rtol=1e-5)
    start = dict(tiny.model(tie_word_embeddings=False).named_parameters())
    for name, wanted in weights.items():
        assert (gathered[name] - wanted).abs().max() < 1e-5, name
        assert (start[name] - wanted).abs().max() > 1e-4  # it was trained at all


def test_bf16_compute_keeps_fp32_masters(recorded, on_ranks):
    """A learning rate below bf16's resolution (2^-8 of a weight) still moves every weight, and
    the gradient norms stay near those of fp32."""
    tiny_rate = {"learning_rate": 1e-5}
    there, gathered, dtypes = on_ranks(1, tiny_rate, "bfloat16")
    losses, *_ = ranks.run(recorded, ranks.settings(**tiny_rate))
    assert dtypes == {"torch.float32"}
    start = dict(tiny.model(tie_word_embeddings=False).named_parameters())
    moved = [(gathered[name] - p).abs() for name, p in start.items()]
    share = sum((m > 0).sum() for m in moved) / sum(m.numel() for m in moved)
    assert share > 0.6  # embeddings of tokens that never came up stay
    assert max(m.max() for m in moved) < 1e-4
    norm, fp32 = torch.tensor(there)[:, 1], torch.tensor(losses)[:, 1]
    assert 0 < (norm / fp32 - 1).abs().max() < 0.05


def grads(model, recorded, **changes):
    trainer = Trainer(copy.deepcopy(model), ranks.settings(**changes))
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.0)
    trainer.optimizer.zero_grad = lambda: None
    ranks.policy_update(trainer, 1, *recorded[0], trainer.cfg)
    return [p.grad for p in trainer.model.parameters()]


def test_recomputation_changes_memory_and_nothing_else(recorded):
    model = tiny.model(tie_word_embeddings=False)
    plain = grads(model, recorded)
    again = grads(model, recorded, recompute=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, again))

    def kept(recompute):
        """Bytes of activations that the graph of one forward pass holds."""
        trainer = Trainer(model, ranks.settings(recompute=recompute))
        seen = {}

        def pack(x):
            seen[x.data_ptr()] = x.numel() * x.element_size()
            return x

        ids = torch.arange(100) % 90
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            hidden = trainer.model(ids, torch.tensor([0, 100]))
        assert hidden.requires_grad
        return sum(seen.values())

    assert kept(True) < 0.5 * kept(False)


def test_mini_batches_take_several_steps_and_clip(recorded):
    """The first update of a batch has ratio one; later ones move away from it, and are clipped."""
    trainer = Trainer(
        tiny.model(tie_word_embeddings=False), ranks.settings(mini_prompts=1, learning_rate=0.02)
    )
    stats = ranks.policy_update(trainer, 1, *recorded[0], trainer.cfg)
    assert 0.01 < stats["clip_ratio"] < 1
    assert stats["sampler/logp_diff_max"] < 1e-4  # the sampler against the OLD weights
    steps = {int(s["step"]) for s in trainer.optimizer.state.values()}
    assert steps == {5}
    once = Trainer(tiny.model(tie_word_embeddings=False), ranks.settings())
    assert ranks.policy_update(once, 1, *recorded[0], once.cfg)["clip_ratio"] == 0


def test_schedules_by_hand():
    def rates(schedule):
        cfg = BaseConfig(steps=10, warmup_steps=2, learning_rate=1.0, schedule=schedule)
        trainer = Trainer(tiny.model(), cfg)
        return [round(trainer.rate(step), 4) for step in range(1, 11)]

    assert rates("constant") == [0.5, *[1.0] * 9]
    assert rates("linear") == [0.5, 1, *(1 - k / 8 for k in range(8))]
    cosine = rates("cosine")
    assert cosine[:2] == [0.5, 1.0] and cosine[6] == 0.5 and cosine[-1] == pytest.approx(0.0381)
    with pytest.raises(UserError, match="cosine"):
        BaseConfig(schedule="cosin")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), ["memory", "200", "recompute"]),
        (FloatingPointError("the gradient is nan at learning rate 1"), ["nan", "learning-rate"]),
    ],
)
def test_what_ends_a_training_says_what_was_saved_and_what_to_change(tmp_path, error, words):
    cfg = replace(ranks.settings(), runs=str(tmp_path), steps=2)
    with pytest.raises(UserError) as caught, Run("judge", cfg) as run:
        run.start()
        for _ in run.steps():
            raise error
    for word in [*words, "nothing was saved: start again"]:
        assert word in str(caught.value)


# -- the command on several processes

SMALL = ["--threads", 1, "--prompts", 4, "--group", 4, "--eval-pairs", 4, "--eval-every", 1]
SMALL += ["--max-tokens", 48, "--engine.num-blocks", 1024]


def test_two_processes_continue_what_one_began(tmp_path, cli):
    """And end where one process alone ends: checkpoints do not know how many wrote them."""
    assert cli("train.py", "judge", *SMALL, "--steps", 4, "--name", "whole")[0] == 0
    assert cli("train.py", "judge", *SMALL, "--steps", 2, "--name", "parts")[0] == 0
    resume = ["judge", "--resume", "--name", "parts", "--steps"]
    done = torchrun(2, HERE.parent / "train.py", *resume, 3, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step    3") == 1  # rank 0 alone speaks
    code, _, err = cli("train.py", *resume, 4)
    assert code == 0, err
    whole, parts = (
        ranks.tiny.Transformer.from_pretrained(tmp_path / "runs" / name / "model").state_dict()
        for name in ("whole", "parts")
    )
    for name in whole:
        assert (whole[name] - parts[name]).abs().max() < 1e-5


def test_a_failing_rank_stops_all_with_its_message(tmp_path):
    script = tmp_path / "fail.py"
    script.write_text(
        "import sys, runpy\n"
        "from nanorrm import ranks\n"
        "from nanorrm.train import trainer\n"
        "usual = trainer.Trainer.step\n"
        "def step(self, *args):\n"
        "    if ranks.rank() == 1: raise FloatingPointError('the gradient is inf, planted')\n"
        "    return usual(self, *args)\n"
        "trainer.Trainer.step = step\n"
        f"sys.argv[0] = {str(HERE.parent / 'train.py')!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    done = torchrun(2, script, "judge", *SMALL, "--steps", 4, cwd=tmp_path)
    assert done.returncode != 0
    assert "rank 1: error: the gradient is inf, planted" in done.stderr
    assert "step    1" not in done.stdout


def test_judge_config_refuses_what_can_not_be(tmp_path):
    for wrong in ({"dtype": "fp8"}, {"keep": 0}, {"mini_prompts": -1}, {"micro_tokens": -1}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            JudgeConfig(**wrong)
