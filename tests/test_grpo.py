"""Advantages by hand, and the policy loss against autograd of the formula written out."""

from itertools import pairwise

import pytest
import torch

from nanorrm.grpo import LossConfig, advantages, policy_loss


def test_half_of_eight_right_is_0_935():
    """ddof = 1: sqrt(7/8). With ddof = 0 it would be 1."""
    rewards = torch.tensor([[1.0, -1, 1, -1, 1, -1, 1, -1]])
    wanted = rewards * (7 / 8) ** 0.5
    torch.testing.assert_close(advantages(rewards), wanted, atol=2e-6, rtol=0)


def test_groups_are_rows():
    """Each group against its own mean: the second row's is 5, not the batch's."""
    rewards = torch.tensor([[1.0, -1, -1, -1], [6.0, 4, 6, 4]])
    out = advantages(rewards)
    torch.testing.assert_close(out[0], torch.tensor([1.5, -0.5, -0.5, -0.5]), atol=1e-5, rtol=0)
    torch.testing.assert_close(out[1], torch.tensor([1.0, -1, 1, -1]) * 0.75**0.5)


@pytest.mark.parametrize("reward", [1.0, -1.0])
def test_group_without_variance_gets_zeros(reward):
    assert torch.equal(advantages(torch.full((2, 8), reward)), torch.zeros(2, 8))


def test_scale_none_only_centres():
    rewards = torch.tensor([[3.0, 1, -1, -7], [5, 5, 5, -3]])
    wanted = torch.tensor([[4.0, 2, 0, -6], [2, 2, 2, -6]])
    assert torch.equal(advantages(rewards, "none"), wanted)


def test_group_of_one_and_unknown_scale_are_refused():
    with pytest.raises(ValueError, match="at least 2"):
        advantages(torch.ones(4, 1))
    with pytest.raises(ValueError, match="batch"):
        advantages(torch.ones(4, 2), "batch")


def random_tokens(n=40, seed=0, spread=0.5):
    generator = torch.Generator().manual_seed(seed)

    def noise():
        return torch.randn(n, generator=generator, dtype=torch.float64)

    old = -noise().abs() - 0.1
    return {
        "logp": (old + spread * noise()).requires_grad_(),
        "old_logp": old,
        "rollout_logp": old + 0.01 * noise(),
        "adv": noise(),
        "mask": (noise() > -0.5).double(),
    }


def test_gradient_at_ratio_one_is_minus_advantage_over_total():
    t = random_tokens()
    t["logp"] = t["old_logp"].clone().requires_grad_()
    loss, _ = policy_loss(**t, cfg=LossConfig())
    loss.backward()
    total = t["mask"].sum()
    torch.testing.assert_close(t["logp"].grad, -t["adv"] * t["mask"] / total)
    torch.testing.assert_close(loss.detach(), -(t["adv"] * t["mask"]).sum() / total)


def test_loss_equals_the_formula_token_by_token():
    t = random_tokens(spread=0.4)
    cfg = LossConfig(clip=0.2, kl=0.3)
    ref = t["old_logp"] - 0.2
    loss, sums = policy_loss(**t, cfg=cfg, ref_logp=ref)
    wanted, clipped, kls = 0.0, 0, 0.0
    total = t["mask"].sum().item()
    columns = [t[name].tolist() for name in ("logp", "old_logp", "adv", "mask")]
    for lp, old, adv, keep, r in zip(*columns, ref.tolist()):
        ratio = torch.tensor(lp - old, dtype=torch.float64).exp().item()
        inside = min(max(ratio, 0.8), 1.2)
        k3 = torch.tensor(r - lp, dtype=torch.float64).exp().item() - (r - lp) - 1
        wanted += keep * (-min(ratio * adv, inside * adv) + 0.3 * k3) / total
        clipped += keep * (ratio != inside)
        kls += keep * k3
    assert loss.item() == pytest.approx(wanted, rel=1e-9)
    assert 0 < clipped < total and sums["clip_ratio"].item() == clipped
    assert sums["kl"].item() == pytest.approx(kls, rel=1e-9)


@pytest.mark.parametrize(
    ("ratio", "adv", "flows"),
    [(1.3, 1.0, False), (1.3, -1.0, True), (0.7, 1.0, True), (0.7, -1.0, False), (1.1, 1.0, True)],
)
def test_clipping_stops_the_gradient_in_the_rewarded_direction_only(ratio, adv, flows):
    old = torch.tensor([-2.0])
    logp = (old + torch.tensor(ratio).log()).requires_grad_()
    loss, _ = policy_loss(logp, old, old, torch.tensor([adv]), torch.ones(1), LossConfig(clip=0.2))
    loss.backward()
    wanted = -adv * ratio if flows else 0.0
    assert logp.grad.item() == pytest.approx(wanted, abs=1e-6)


def test_masked_tokens_count_nowhere():
    """Loss, gradient and every sum equal those of the batch without them."""
    t = random_tokens()
    cfg = LossConfig(kl=0.1)
    ref = t["old_logp"] + 0.3
    keep = t["mask"].bool()
    assert 0 < keep.sum() < len(keep)
    t["rollout_logp"][~keep] += 50  # what the engine forced may be anything
    whole, sums = policy_loss(**t, cfg=cfg, ref_logp=ref)
    whole.backward()
    assert (t["logp"].grad[~keep] == 0).all() and (t["logp"].grad[keep] != 0).any()
    only = {name: value.detach()[keep] for name, value in t.items()}
    less, sums_less = policy_loss(**only, cfg=cfg, ref_logp=ref[keep])
    assert whole.item() == pytest.approx(less.item(), rel=1e-12)
    for name, value in sums.items():
        assert value.item() == pytest.approx(sums_less[name].item(), rel=1e-12), name


@pytest.mark.parametrize("cuts", [[20], [1, 2, 39], [13, 26]])
def test_parts_add_up_to_the_whole(cuts):
    t = random_tokens()
    cfg = LossConfig(kl=0.1)
    ref = t["old_logp"] + 0.3
    whole, sums = policy_loss(**t, cfg=cfg, ref_logp=ref)
    whole.backward()
    wanted, t["logp"].grad = t["logp"].grad, None
    bounds = [0, *cuts, 40]
    losses, parts = 0.0, []
    for low, high in pairwise(bounds):
        part = {name: value[low:high] for name, value in t.items()}
        loss, some = policy_loss(**part, cfg=cfg, total=t["mask"].sum(), ref_logp=ref[low:high])
        loss.backward()
        losses += loss.item()
        parts.append(some)
    assert losses == pytest.approx(whole.item(), rel=1e-12)
    torch.testing.assert_close(t["logp"].grad, wanted)
    for name, value in sums.items():
        fold = max if name.endswith("_max") else sum
        assert fold(p[name].item() for p in parts) == pytest.approx(value.item()), name


def test_k3_is_never_negative_and_flat_at_equality():
    t = random_tokens()
    t["adv"] = torch.zeros(40, dtype=torch.float64)
    cfg = LossConfig(kl=1.0)
    loss, _ = policy_loss(**t, cfg=cfg, ref_logp=t["old_logp"])
    assert loss.item() > 0
    at = t["old_logp"].clone().requires_grad_()
    t["logp"] = at
    loss, _ = policy_loss(**t, cfg=cfg, ref_logp=t["old_logp"])
    loss.backward()
    assert loss.item() == 0 and at.grad.abs().max() < 1e-12


def test_sampler_difference_is_measured():
    n = 6
    old = torch.full((n,), -1.0)
    rolled = old - torch.tensor([0.0, 0.1, -0.2, 0.3, 0.0, 9.0])
    mask = torch.tensor([1.0, 1, 1, 1, 1, 0])
    _, sums = policy_loss(old, old, rolled, torch.ones(n), mask, LossConfig())
    assert sums["sampler/logp_diff_max"].item() == pytest.approx(0.3)
    assert sums["sampler/logp_diff_squared"].item() == pytest.approx(0.01 + 0.04 + 0.09)
    gaps = torch.tensor([0.1, -0.2, 0.3])
    assert sums["sampler/logp_diff_k3"].item() == pytest.approx(
        (gaps.exp() - gaps - 1).sum().item()
    )
