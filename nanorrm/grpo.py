"""GRPO as pure functions of rewards and per-token log-probs (DeepSeekMath, arXiv 2402.03300).

Differences from the paper's text: advantages use the sample std (ddof = 1) plus 1e-6, and the loss
is averaged over all tokens of the batch, not first within each completion.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LossConfig:
    """Switches of the policy loss."""

    clip: float = 0.2  # the ratio counts between 1 - clip and 1 + clip
    kl: float = 0.0  # weight of the k3 penalty towards the reference


def advantages(rewards, scale="group"):
    """How much better than its group each rollout was. rewards [P, G] -> [P, G].

    scale: "group" divides by the group's std (ddof = 1) plus 1e-6, "none" only centres. A group of
    equal rewards gets zeros. Raises ValueError for another scale, or groups of one.

    >>> advantages(torch.tensor([[1.0, -1, -1, -1, 1, 1, 1, -1]]))[0, :2]  # half of 8 right
    tensor([ 0.9354, -0.9354])
    """
    if rewards.shape[1] < 2:
        raise ValueError("a group needs at least 2 rollouts: one alone has no baseline")
    centred = rewards - rewards.mean(1, keepdim=True)
    if scale == "none":
        return centred
    if scale != "group":
        raise ValueError(f"scale {scale!r} is not one of group, none")
    return centred / (rewards.std(1, keepdim=True, correction=1) + 1e-6)


def policy_loss(logp, old_logp, rollout_logp, adv, mask, cfg, total=None, ref_logp=None):
    """The clipped policy loss of some tokens, and what a debugger wants to know of them.

    All tensors are [N], one entry per completion token: logp of the current weights (with
    gradient), old_logp of the weights at the start of the update, rollout_logp as the sampler
    recorded it, adv the advantage of the token's completion, mask 0 for tokens the engine forced,
    ref_logp of the reference model (needed if cfg.kl > 0).
    total: number of masked-in tokens of the whole batch, when this is a part of it: the losses of
    the parts then add up to the loss of the whole.

    Returns (loss, sums): sums over the masked-in tokens (divide by their number), except "_max".
    """
    total = mask.sum() if total is None else total
    ratio = (logp - old_logp).exp()
    clipped = ratio.clamp(1 - cfg.clip, 1 + cfg.clip)
    loss = -torch.minimum(ratio * adv, clipped * adv)
    kl = torch.zeros_like(logp)
    if cfg.kl > 0:
        kl = (ref_logp - logp).exp() - (ref_logp - logp) - 1  # k3: unbiased, never negative
        loss = loss + cfg.kl * kl
    with torch.no_grad():
        gap = (old_logp - rollout_logp) * mask  # trainer against sampler
        outside = (ratio * adv > clipped * adv) | (ratio * adv < clipped * adv)
        sums = {
            "clip_ratio": (outside * mask).sum(),
            "kl": (kl * mask).sum(),
            "sampler/logp_diff_squared": gap.square().sum(),
            "sampler/logp_diff_k3": ((gap.exp() - gap - 1) * mask).sum(),
            "sampler/logp_diff_max": gap.abs().max(),
        }
    return (loss * mask).sum() / total, sums
