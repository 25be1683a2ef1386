"""The path a GPU takes, CUDA graphs aside, end to end in Triton's interpreter on a tiny model."""

from itertools import chain

import pytest
import tiny
import torch

import kernels
from nanorrm.config import LossConfig
from nanorrm.engine.sampling import SamplingParams
from nanorrm.train import grpo, packing

triton_only = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for CPUs")


@pytest.fixture
def triton(monkeypatch):
    """Call this to send every operation through its Triton kernel."""
    return lambda: monkeypatch.setenv("NANORRM_IMPL", "triton")


@triton_only
def test_engine_on_triton_kernels_equals_engine_on_torch(tokenizer, triton):
    """Chunked prefill, prefix hits, paged decode, the fused head, groups, a thinking budget."""
    model = tiny.model(head_dim=32)
    asked = [*tiny.prompts(2, low=9, high=20), [256, 5, 6, 7]]  # the last one opens its thinking
    asked.append([*asked[0][:8], 1, 2])
    params = SamplingParams(n=2, max_tokens=5, max_think_tokens=2, seed=3)

    def run():
        engine = tiny.engine(
            tokenizer, model, block_size=4, num_blocks=64, max_step_tokens=12, fused_head=True
        )
        return engine.generate(asked, params), engine.report()

    wanted, _ = run()
    triton()
    got, work = run()
    assert work["engine/cache_hit_rate"] > 0
    for ours, theirs in zip(chain(*got), chain(*wanted)):
        assert (ours.ids, ours.forced, ours.think_tokens) == (
            theirs.ids, theirs.forced, theirs.think_tokens,
        )  # fmt: skip
        assert torch.tensor(ours.logprobs) == pytest.approx(torch.tensor(theirs.logprobs), abs=1e-4)
    assert any(any(c.forced) for c in got[2])


@triton_only
def test_a_training_step_on_triton_kernels_equals_one_on_torch(triton):
    """Loss and every gradient, through attention, norms, RoPE, SwiGLU and the fused log-prob."""
    model = tiny.model(head_dim=32)
    samples = [
        packing.Sample(p[:6], p[6:], {"adv": [(-1.0) ** i] * len(p[6:])})
        for i, p in enumerate(tiny.prompts(3, low=9, high=17))
    ]
    batch = packing.join(samples, "cpu")

    def step():
        model.zero_grad()
        hidden = model(batch.ids, batch.cu_seqlens)[batch.rows]
        logp, entropy = kernels.logprob(hidden, model.head, batch.targets, 0.7)
        old, adv = logp.detach(), batch.values["adv"]
        weight = torch.full_like(old, 1 / len(old))
        loss, _ = grpo.policy_loss(logp, old, old, adv, weight, LossConfig())
        (loss + 0.01 * entropy.mean()).backward()
        return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}

    loss, wanted = step()
    triton()
    ours, got = step()
    assert ours == pytest.approx(loss, abs=1e-5)
    for name, gradient in wanted.items():
        gap = (got[name] - gradient).abs().max() / gradient.abs().max()
        assert gap < 1e-4, name
