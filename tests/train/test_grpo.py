"""Advantages by hand, and the policy loss against autograd of the formula written out.

test_losses_trl.py has the same functions beside TRL's.
"""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorrm.config import LossConfig, UserError
from nanorrm.train.grpo import (
    AGGREGATIONS,
    advantages,
    importance_weights,
    informative,
    kl_penalty,
    policy_loss,
    token_weights,
)

# -- advantages


def test_half_of_eight_right_is_0_935():
    """ddof = 1: sqrt(7/8). With ddof = 0 it is 1."""
    rewards = torch.tensor([[1.0, -1, 1, -1, 1, -1, 1, -1]])
    wanted = rewards * (7 / 8) ** 0.5
    torch.testing.assert_close(advantages(rewards), wanted, atol=2e-6, rtol=0)
    torch.testing.assert_close(advantages(rewards, ddof=0), rewards, atol=2e-6, rtol=0)


def test_groups_are_rows():
    """Each group against its own mean: the second row's is 5, not the batch's."""
    rewards = torch.tensor([[1.0, -1, -1, -1], [6.0, 4, 6, 4]])
    out = advantages(rewards)
    torch.testing.assert_close(out[0], torch.tensor([1.5, -0.5, -0.5, -0.5]), atol=1e-5, rtol=0)
    torch.testing.assert_close(out[1], torch.tensor([1.0, -1, 1, -1]) * 0.75**0.5)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("reward", [1.0, -1.0])
def test_group_without_variance_gets_zeros(reward, scale):
    assert torch.equal(advantages(torch.full((2, 8), reward), scale), torch.zeros(2, 8))


def test_scale_none_only_centres():
    rewards = torch.tensor([[3.0, 1, -1, -7], [5, 5, 5, -3]])
    wanted = torch.tensor([[4.0, 2, 0, -6], [2, 2, 2, -6]])
    assert torch.equal(advantages(rewards, "none"), wanted)


def test_scale_batch_has_one_std_but_the_groups_own_means():
    """Std of the rewards 0, 2, 4, 6 around their mean 3, not around the groups' means."""
    rewards = torch.tensor([[0.0, 2], [4, 6]])
    wanted = torch.tensor([[-1.0, 1], [-1, 1]]) / (20 / 3) ** 0.5
    torch.testing.assert_close(advantages(rewards, "batch"), wanted, atol=1e-6, rtol=0)
    wanted = torch.tensor([[-1.0, 1], [-1, 1]]) / 5**0.5
    torch.testing.assert_close(advantages(rewards, "batch", ddof=0), wanted, atol=1e-6, rtol=0)


def test_informative_groups():
    rewards = torch.tensor([[1.0, 1, 1], [-1, -1, 1], [0.1, 0.1, 0.1], [1, -1, -1]])
    assert informative(rewards).tolist() == [False, True, False, True]
    assert (advantages(rewards)[~informative(rewards)].abs() < 1e-6).all()


def test_wrong_settings_are_named():
    with pytest.raises(UserError, match="at least 2"):
        advantages(torch.ones(4, 1))
    with pytest.raises(UserError, match="scale = 'std'"):
        advantages(torch.ones(4, 2), "std")
    with pytest.raises(UserError, match="aggregation = 'mean'"):
        token_weights(torch.ones(2), [2], "mean")
    with pytest.raises(UserError, match="max_tokens"):
        token_weights(torch.ones(2), [2], "constant")
    with pytest.raises(ValueError, match=r"3, .* 2 tokens"):
        token_weights(torch.ones(2), [2, 1])
    for wrong in ({"clip_low": -0.1}, {"kl_estimator": "k4"}, {"importance": "clip"}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            LossConfig(**wrong)
    with pytest.raises(UserError, match="importance_high"):
        LossConfig(importance_low=0.5, importance_high=0.4)


# -- weights


MASK = torch.tensor([1.0, 1, 1, 0, 1, 0, 0])
LENGTHS = [2, 3, 2]  # two tokens, two of three, none of two


def test_weights_by_hand():
    third, sixth = 1 / 3, 1 / 6
    for aggregation, wanted in {
        "token": [0.25, 0.25, 0.25, 0, 0.25, 0, 0],
        "sequence": [sixth, sixth, sixth, 0, sixth, 0, 0],
        "constant": [third / 5, third / 5, third / 5, 0, third / 5, 0, 0],
    }.items():
        got = token_weights(MASK, LENGTHS, aggregation, max_tokens=5)
        torch.testing.assert_close(got, torch.tensor(wanted))


def test_truncated_sequences_weigh_nothing():
    """They leave the token mean, but stay in the number of sequences."""
    truncated = [True, False, False]
    got = token_weights(MASK, LENGTHS, truncated=truncated)
    assert got.tolist() == [0, 0, 0.5, 0, 0.5, 0, 0]
    got = token_weights(MASK, LENGTHS, "sequence", truncated=truncated)
    torch.testing.assert_close(got, torch.tensor([0, 0, 1 / 6, 0, 1 / 6, 0, 0]))


def test_nothing_to_train_on_gives_zeros_and_no_nan():
    for aggregation in AGGREGATIONS:
        got = token_weights(torch.zeros(7), LENGTHS, aggregation, max_tokens=5)
        assert torch.equal(got, torch.zeros(7))
    nothing = torch.zeros(3, requires_grad=True)
    loss, sums = policy_loss(nothing, *[torch.zeros(3)] * 4, LossConfig())
    assert loss.item() == 0 and all(value.item() == 0 for value in sums.values())


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=6))
def test_weights_give_the_means_they_are_named_after(masks):
    """Python's own sums over lists of lists."""
    flat = torch.tensor([float(m) for row in masks for m in row])
    values = torch.randn(len(flat), generator=torch.Generator().manual_seed(0))
    rows = [part.tolist() for part in values.split([len(row) for row in masks])]
    kept = [[v for v, m in zip(row, mask) if m] for row, mask in zip(rows, masks)]
    every = [v for row in kept for v in row]
    wanted = {
        "token": sum(every) / max(1, len(every)),
        "sequence": sum(sum(row) / max(1, len(row)) for row in kept) / len(kept),
        "constant": sum(every) / (len(kept) * 9),
    }
    for aggregation, mean in wanted.items():
        weights = token_weights(flat, [len(row) for row in masks], aggregation, max_tokens=9)
        assert (values * weights).sum().item() == pytest.approx(mean, abs=1e-5)


# -- the loss


def random_tokens(n=40, seed=0, spread=0.5):
    generator = torch.Generator().manual_seed(seed)

    def noise():
        return torch.randn(n, generator=generator, dtype=torch.float64)

    old = -noise().abs() - 0.1
    tokens = {
        "logp": (old + spread * noise()).requires_grad_(),
        "old_logp": old,
        "rollout_logp": old + 0.3 * noise(),
        "adv": noise(),
    }
    mask = (noise() > -0.5).double()
    return tokens | {"weight": token_weights(mask, [n])}


def test_gradient_at_ratio_one_is_minus_weighted_advantage():
    t = random_tokens()
    t["logp"] = t["old_logp"].clone().requires_grad_()
    loss, _ = policy_loss(**t, cfg=LossConfig())
    loss.backward()
    torch.testing.assert_close(t["logp"].grad, -t["adv"] * t["weight"])
    torch.testing.assert_close(loss.detach(), -(t["adv"] * t["weight"]).sum())


@pytest.mark.parametrize("importance", ["none", "truncate", "mask"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_loss_equals_the_formula_token_by_token(importance, estimator):
    t = random_tokens(spread=0.4)
    cfg = LossConfig("token", 0.2, 0.28, 0.3, estimator, importance, 0.8, 1.2)
    ref = t["old_logp"] - 0.2
    loss, sums = policy_loss(**t, cfg=cfg, ref_logp=ref)
    wanted, clipped, kls, far, tokens = 0.0, 0, 0.0, 0, 0
    columns = [t[name].tolist() for name in ("logp", "old_logp", "rollout_logp", "adv", "weight")]
    e = torch.tensor(1.0, dtype=torch.float64).exp().item()
    for lp, old, rolled, adv, weight, r in zip(*columns, ref.tolist()):
        if weight == 0:
            continue
        ratio = e ** (lp - old)
        inside = min(max(ratio, 0.8), 1.28)
        trust = e ** (old - rolled)
        outside = not 0.8 <= trust <= 1.2
        if importance == "none":
            trust = 1.0
        elif outside:
            trust = 0.0 if importance == "mask" else (0.8 if trust < 0.8 else 1.2)
        x = r - lp
        kl = {"k1": -x, "k2": x * x / 2, "k3": e**x - x - 1}[estimator]
        wanted += weight * (-min(ratio * adv, inside * adv) * trust + 0.3 * kl)
        clipped += inside * adv < ratio * adv  # only there it stops the gradient
        kls, far, tokens = kls + kl, far + outside, tokens + 1
    assert loss.item() == pytest.approx(wanted, rel=1e-9)
    assert 0 < clipped < tokens and sums["clip_ratio"].item() == clipped
    assert sums["tokens"].item() == tokens
    assert sums["kl"].item() == pytest.approx(kls, rel=1e-9)
    assert 0 < far < tokens
    assert sums["sampler/out_of_bounds"].item() == (0 if importance == "none" else far)


@pytest.mark.parametrize(
    ("ratio", "adv", "flows"),
    [
        (1.3, 1.0, False),
        (1.3, -1.0, True),
        (0.7, 1.0, True),
        (0.7, -1.0, False),
        (1.1, 1.0, True),
        (1.25, 1.0, True),  # beyond clip_low, not beyond clip_high
        (0.75, -1.0, False),
    ],
)
def test_clipping_stops_the_gradient_in_the_rewarded_direction_only(ratio, adv, flows):
    old = torch.tensor([-2.0])
    logp = (old + torch.tensor(ratio).log()).requires_grad_()
    cfg = LossConfig(clip_low=0.2, clip_high=0.28)
    loss, _ = policy_loss(logp, old, old, torch.tensor([adv]), torch.ones(1), cfg)
    loss.backward()
    wanted = -adv * ratio if flows else 0.0
    assert logp.grad.item() == pytest.approx(wanted, abs=1e-6)


def test_tokens_of_weight_zero_count_nowhere():
    """Loss, gradient and every sum equal those of the batch without them, even where what stands in
    their place is infinite (a forced token that the sampler gave no chance)."""
    t = random_tokens()
    cfg = LossConfig(kl=0.1, importance="truncate")
    ref = t["old_logp"] + 0.3
    keep = t["weight"] > 0
    assert 0 < keep.sum() < len(keep)
    t["rollout_logp"][~keep] = -torch.inf
    t["old_logp"][~keep] = -1e6
    whole, sums = policy_loss(**t, cfg=cfg, ref_logp=ref)
    whole.backward()
    assert (t["logp"].grad[~keep] == 0).all() and (t["logp"].grad[keep] != 0).any()
    only = {name: value.detach()[keep] for name, value in t.items()}
    less, sums_less = policy_loss(**only, cfg=cfg, ref_logp=ref[keep])
    assert whole.item() == pytest.approx(less.item(), rel=1e-12)
    for name, value in sums.items():
        assert value.item() == pytest.approx(sums_less[name].item(), rel=1e-12), name


@pytest.mark.parametrize("cuts", [[20], [1, 2, 39], [13, 26]])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_parts_add_up_to_the_whole(cuts, aggregation):
    t = random_tokens()
    t["weight"] = token_weights((t["weight"] > 0).double(), [4, 26, 10], aggregation, 30)
    cfg = LossConfig(kl=0.1)
    ref = t["old_logp"] + 0.3
    whole, sums = policy_loss(**t, cfg=cfg, ref_logp=ref)
    whole.backward()
    wanted, t["logp"].grad = t["logp"].grad, None
    losses, parts = 0.0, []
    for low, high in pairwise([0, *cuts, 40]):
        part = {name: value[low:high] for name, value in t.items()}
        loss, some = policy_loss(**part, cfg=cfg, ref_logp=ref[low:high])
        loss.backward()
        losses += loss.item()
        parts.append(some)
    assert losses == pytest.approx(whole.item(), rel=1e-12)
    torch.testing.assert_close(t["logp"].grad, wanted)
    for name, value in sums.items():
        fold = max if name.endswith("_max") else sum
        assert fold(p[name].item() for p in parts) == pytest.approx(value.item()), name


# -- KL and importance


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


def test_kl_estimators_over_a_whole_distribution():
    """Expectations under the policy, summed over 50 tokens: k1 and k3 are the KL, k2 is near it;
    the gradient of k2 is the KL's, that of k1 is nothing."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, generator=generator, dtype=torch.float64, requires_grad=True)
    ref = (logits.detach() + 0.1 * torch.randn(50, generator=generator)).log_softmax(0)
    logp = logits.log_softmax(0)
    p = logp.exp()
    kl = (p * (logp - ref)).sum()
    (wanted,) = torch.autograd.grad(kl, logits, retain_graph=True)

    def expected(estimator):
        each = (
            kl_penalty(ref - logp, estimator) * p.detach()
        )  # tokens as sampled: p has no gradient
        return each.sum().item(), torch.autograd.grad(each.sum(), logits, retain_graph=True)[0]

    values, gradients = zip(*map(expected, ("k1", "k2", "k3")))
    assert values[0] == pytest.approx(kl.item()) and values[2] == pytest.approx(kl.item())
    assert values[1] == pytest.approx(kl.item(), rel=0.05) and values[1] != values[0]
    assert gradients[0].abs().max() < 1e-12 < wanted.abs().max()
    torch.testing.assert_close(gradients[1], wanted)


def test_importance_stays_within_bounds_and_scales_the_gradient():
    log_ratio = torch.tensor([0.1, -5.0, 5.0, 0.0]).log1p().nan_to_num(-9.0)
    cfg = LossConfig(importance="truncate", importance_low=0.5, importance_high=2.0)
    weights, outside = importance_weights(log_ratio, cfg)
    torch.testing.assert_close(weights, torch.tensor([1.1, 0.5, 2.0, 1.0]))
    assert outside.tolist() == [False, True, True, False]
    logp = torch.zeros(1, requires_grad=True)
    old, one = logp.detach(), torch.ones(1)
    loss, _ = policy_loss(logp, old, old - 0.5, one, one, cfg)
    loss.backward()
    assert logp.grad.item() == pytest.approx(-torch.tensor(0.5).exp().item())


def test_sampler_difference_is_measured():
    n = 6
    old = torch.full((n,), -1.0)
    rolled = old - torch.tensor([0.0, 0.1, -0.2, 0.3, 0.0, 9.0])
    weight = torch.tensor([1.0, 1, 1, 1, 1, 0])
    _, sums = policy_loss(old, old, rolled, torch.ones(n), weight, LossConfig())
    assert sums["sampler/logp_diff_max"].item() == pytest.approx(0.3)
    assert sums["sampler/logp_diff_squared"].item() == pytest.approx(0.01 + 0.04 + 0.09)
    gaps = torch.tensor([0.1, -0.2, 0.3])
    assert sums["sampler/logp_diff_k3"].item() == pytest.approx(
        (gaps.exp() - gaps - 1).sum().item()
    )
