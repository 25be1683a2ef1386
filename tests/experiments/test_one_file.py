"""experiments/one_file.py stands alone, and its parts do what the library's do."""

import ast
import doctest
import importlib.util
import signal
import sys
from pathlib import Path
from random import Random

import pytest
import torch

from nanorrm.config import EngineConfig, LossConfig
from nanorrm.data.sources import ToySource
from nanorrm.data.toy import TERMS, stream_rng
from nanorrm.engine.engine import Engine
from nanorrm.engine.sampling import SamplingParams
from nanorrm.judge.prompts import judge_prompt
from nanorrm.train.grpo import advantages, policy_loss, token_weights
from nanorrm.train.rewards import verdict_reward

PATH = Path(__file__).parents[2] / "experiments" / "one_file.py"


def load():
    spec = importlib.util.spec_from_file_location("one_file", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


one = load()


@pytest.fixture(scope="module", params=["toy_base", "toy_judge"])
def opened(request):
    """(this file's Model, the library's Engine) of a shipped folder."""
    folder = one.BASE.parent / request.param
    return one.Model(folder), Engine.from_pretrained(folder, EngineConfig(num_blocks=1024))


@pytest.fixture(scope="module")
def exam():
    """Pairs of all lengths."""
    rng = Random(7)
    return [one.draw_pair(rng, 2 + i % 5, held_out=True) for i in range(20)]


@pytest.fixture(scope="module")
def rollouts(opened, exam):
    """Four of each pair: more than `learn` takes at once."""
    torch.manual_seed(0)
    return one.roll_out(opened[0], [pair for pair in exam for _ in range(4)])


def packed(rollouts):
    """Rollouts without padding: ids [T], cu_seqlens [B+1], rows and targets [N], as the library
    has them."""
    lengths = [int(row.nonzero().max()) + 1 for row in rollouts.drawn]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.cat([row[:n] for row, n in zip(rollouts.ids, lengths)])
    drawn = torch.cat([row[:n] for row, n in zip(rollouts.drawn, lengths)])
    return ids, bounds, drawn.nonzero()[:, 0] - 1, ids[drawn]


# -- it stands alone


def test_imports_and_length():
    allowed = {"torch", "safetensors", "tokenizers"} | set(sys.stdlib_module_names)
    text = PATH.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module.split(".")[0] in allowed
    assert text.count("\n") <= 300


def test_its_own_examples():
    assert doctest.testmod(one) == (0, 2)


# -- its parts are the library's


def test_pairs():
    assert one.TERMS == TERMS
    held = stream_rng("held-out")
    for pair in ToySource(0).held_out(50):
        assert one.draw_pair(held, pair.meta["terms"], held_out=True) == plain(pair)
    for number, pair in enumerate(ToySource(3).take(0, 50)):
        rng = stream_rng("train", 3, number)
        assert one.draw_pair(rng, rng.choice(TERMS)) == plain(pair)


def plain(pair):
    return (pair.query, pair.a, pair.b, pair.label)


def test_prompts(exam, opened):
    model, engine = opened
    for pair in exam:
        wanted = judge_prompt(engine.tokenizer, pair.query, pair.a, pair.b, "toy")
        assert model.tokenizer.encode(one.prompt(pair)).ids == wanted


@pytest.mark.parametrize(
    "text",
    [
        r"</think>\boxed{Assistant 1}",
        r"7+4=11|2:4n</think>\boxed{Assistant 2}<|im_end|>",
        r"\boxed{Assistant 1}",
        r"\boxed{Assistant 1}</think>",
        r"\boxed{Assistant 2}</think>\boxed{Assistant 1}",
        r"</think>\boxed{Assistant 2}</think>",
        r"</think>\boxed{Assistant 2} or \boxed{both}",
        r"</think>\boxed{Assistant 2} or \boxed{b{c}}",
        r"</think>\boxed{Assistant 1} or \boxed{d",
        r"</think>\boxed{ Assistant 1}",
        r"</think>Assistant 1}",
        "</think>",
        "",
    ],
)
def test_rewards(text):
    for label in (1, 2):
        assert one.reward(text, label) == verdict_reward(text, label)[0]


def test_advantages():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(0, 2, (40, 8), generator=generator) * 2.0 - 1
    rewards[3] = 1.0
    assert torch.equal(one.advantages(rewards), advantages(rewards))
    assert not one.advantages(rewards)[3].any()


def test_policy_loss():
    """Value and gradient, tokens that aren't trained on and ratios beyond the clip among them."""
    generator = torch.Generator().manual_seed(1)
    old, noise, adv = torch.randn(3, 200, generator=generator)
    mask = torch.rand(200, generator=generator) < 0.7
    logp = (old + 0.3 * noise).requires_grad_()
    weight = token_weights(mask.float(), [150, 50])
    wanted, sums = policy_loss(logp, old, old, adv, weight, LossConfig())
    (wanted_gradient,) = torch.autograd.grad(wanted, logp)
    losses = one.policy_loss(logp[mask], old[mask], adv[mask])
    loss = losses.sum() / mask.sum()
    (gradient,) = torch.autograd.grad(loss, logp)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(gradient, wanted_gradient)
    clipped = (gradient == 0) & mask
    assert clipped.sum() == sums["clip_ratio"] > 20
    assert not gradient[~mask].any()


@torch.no_grad()
def test_logits_and_logprobs(opened, rollouts):
    """Of padded rows, against packed ones; and as they were when the tokens were drawn."""
    model, engine = opened
    ids, bounds, rows, targets = packed(rollouts)
    hidden = model.hidden(rollouts.ids)
    found = (hidden @ model.embedding.T)[:, :-1][rollouts.drawn[:, 1:]]
    wanted = (engine.model(ids, bounds) @ engine.model.head.T)[rows]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    logp = one.logprobs(model, rollouts.ids, rollouts.drawn)
    wanted, _ = engine.model.logprobs(ids, bounds, rows, targets)
    torch.testing.assert_close(logp, wanted, atol=1e-4, rtol=1e-4)
    drawn_with = rollouts.logp[rollouts.drawn]
    torch.testing.assert_close(drawn_with, wanted, atol=1e-4, rtol=1e-4)
    assert len(set(rollouts.drawn.sum(1).tolist())) > 3  # rows left at different times


def test_greedy_text(opened, exam):
    model, engine = opened
    rollouts = one.roll_out(model, exam, greedy=True)
    prompts = [model.tokenizer.encode(one.prompt(pair)).ids for pair in exam]
    groups = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=one.MAX_TOKENS))
    for pair, text, own, row, reward, (wanted,) in zip(
        exam, rollouts.texts, rollouts.drawn, rollouts.ids, rollouts.rewards, groups
    ):
        assert text.removesuffix("<|im_end|>") == wanted.text
        assert row[own].tolist() == list(wanted.ids)
        assert reward == verdict_reward(wanted.text, pair.label)[0]


def test_a_rollout_ends_at_its_limit(exam, monkeypatch):
    model = one.Model(one.BASE.parent / "toy_judge")  # it thinks longer than that
    monkeypatch.setattr(one, "MAX_TOKENS", 7)
    rollouts = one.roll_out(model, exam, greedy=True)
    assert (rollouts.drawn.sum(1) == 7).all() and (rollouts.rewards == -1).all()


class Caught:
    """An optimizer that steps nowhere, and keeps the gradients that it is given."""

    def __init__(self, weights):
        self.weights = weights

    def step(self):
        self.gradients = {name: weight.grad for name, weight in self.weights.items()}

    def zero_grad(self):
        for weight in self.weights.values():
            weight.grad = None


def test_the_gradient_of_a_step(opened, rollouts, monkeypatch):
    """From rollouts to every weight's gradient, in parts here, and there by the library's model,
    weights and loss at once. Old log-probs are moved, so that some ratios are clipped."""
    model, engine = opened
    generator = torch.Generator().manual_seed(1)
    moved = rollouts.logp + 0.3 * torch.randn(rollouts.logp.shape, generator=generator)
    adv = torch.randn(len(rollouts.ids), generator=generator)
    monkeypatch.setattr(one.torch.nn.utils, "clip_grad_norm_", lambda weights, norm: None)
    caught = Caught(model.weights)
    one.learn(model, caught, rollouts._replace(logp=moved), adv)

    ids, bounds, rows, targets = packed(rollouts)
    logp, _ = engine.model.logprobs(ids, bounds, rows, targets)
    lengths = rollouts.drawn.sum(1)
    old, each = moved[rollouts.drawn], adv.repeat_interleave(lengths)
    weight = token_weights(torch.ones(len(targets)), lengths)
    loss, sums = policy_loss(logp, old, old, each, weight, LossConfig())
    named = dict(engine.model.named_parameters())
    wanted = torch.autograd.grad(loss, list(named.values()))
    assert sums["clip_ratio"] > 10 and named.keys() == caught.gradients.keys()
    for name, gradient in zip(named, wanted):
        torch.testing.assert_close(caught.gradients[name], gradient, atol=2e-5, rtol=1e-3)


# -- the command


@pytest.fixture
def small(monkeypatch):
    for name, value in {"P": 2, "G": 2, "EXAM": 4, "MAX_TOKENS": 12}.items():
        monkeypatch.setattr(one, name, value)


def test_a_run(small, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["one_file.py", "--steps", "2", "--seed", "3"])
    shown = []
    for _ in range(2):
        one.main()
        shown.append([line.split() for line in capsys.readouterr().out.splitlines()])
    first, again = ([line[:1] + line[2:] for line in lines] for lines in shown)
    assert first == again  # but for the minutes
    assert [line[0] for line in first if line] == ["step", "0", "2", "7+4+1-8", "before", "after"]


def test_one_clear_line(small, monkeypatch, capsys, tmp_path):
    def complaint(*arguments):
        monkeypatch.setattr(sys, "argv", ["one_file.py", *arguments])
        with pytest.raises(SystemExit, match="2"):
            one.main()
        return capsys.readouterr().err.splitlines()[-1]

    assert "--steps and --threads should be at least 1" in complaint("--steps", "0")
    assert "--seed: invalid int value: 'x'" in complaint("--seed", "x")
    monkeypatch.setattr(one, "BASE", tmp_path / "gone")
    assert "gone: run the file inside its repository" in complaint()


def test_it_runs_from_anywhere(cli, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process keeps its Ctrl-C
    code, out, _ = cli("experiments/one_file.py", "--help")
    assert code == 0 and out.startswith("usage: one_file.py")
