"""GRPO and its relatives as pure functions of rewards and per-token log-probs.

The defaults are DeepSeekMath's GRPO (arXiv 2402.03300) with a sample std (ddof = 1) plus 1e-6 and
the loss averaged over all tokens of the batch, not first within each completion. The switches are
what DAPO (2503.14476) and Dr. GRPO (2503.20783) change. How much a token counts is settled for the
whole batch by `token_weights`; losses of parts of it then simply add up.
"""

import torch

from nanorrm.config import UserError, one_of

AGGREGATIONS = ("token", "sequence", "constant")


def advantages(rewards, scale="group", ddof=1):
    """How much better than its group each rollout was. rewards [P, G] -> [P, G].

    scale: rewards less their group's mean are divided by the std of the "group" or of the whole
    "batch" (P*G rewards), plus 1e-6, or not at all ("none", Dr. GRPO). ddof: 1 sample, 0 population
    std. A group of equal rewards gets zeros. Raises UserError for another scale or groups of one.

    >>> advantages(torch.tensor([[1.0, -1, -1, -1, 1, 1, 1, -1]]))[0, :2]  # half of 8 right
    tensor([ 0.9354, -0.9354])
    >>> advantages(torch.tensor([[1.0, -1, -1, -1, 1, 1, 1, -1]]), ddof=0)[0, :2]
    tensor([ 1.0000, -1.0000])
    """
    one_of("scale", scale, ("group", "batch", "none"))
    if rewards.shape[1] < 2:
        raise UserError("a group needs at least 2 rollouts: one alone has no baseline")
    centred = rewards - rewards.mean(1, keepdim=True)
    if scale == "none":
        return centred
    of = rewards if scale == "group" else rewards.flatten()
    return centred / (of.std(-1, keepdim=True, correction=ddof) + 1e-6)


def informative(rewards):
    """Which groups have something to teach: rewards that differ. rewards [P, G] -> bool [P].

    The others have advantages of zero; DAPO's dynamic sampling replaces them by further prompts.

    >>> informative(torch.tensor([[1.0, 1, 1], [1, -1, 1]]))
    tensor([False,  True])
    """
    return (rewards != rewards[:, :1]).any(1)


def token_weights(mask, lengths, aggregation="token", max_tokens=None, truncated=None):
    """What each token counts in the loss. mask [N], of B sequences one behind another -> [N].

    mask: 1 for tokens to train on, 0 for those the engine forced; lengths [B]: tokens of each
    sequence, forced ones too; truncated [B] bool: sequences cut at the length limit, whose tokens
    are left out (DAPO's overlong filter; None: none). aggregation, over the WHOLE batch:
    "token": every token counts the same (DAPO; TRL's bnpo);
    "sequence": the mean over sequences of the mean over their tokens (GRPO as published), one
    without tokens counting as zero; "constant": divided by B * max_tokens (Dr. GRPO), so that a
    token counts the same whatever the lengths are.

    >>> token_weights(torch.tensor([1.0, 1, 0, 1]), [1, 3], "sequence")
    tensor([0.5000, 0.2500, 0.0000, 0.2500])
    """
    one_of("aggregation", aggregation, AGGREGATIONS)
    lengths = torch.as_tensor(lengths, device=mask.device)
    if lengths.sum() != len(mask):
        raise ValueError(f"lengths add up to {lengths.sum()}, the mask has {len(mask)} tokens")
    rows = torch.arange(len(lengths), device=mask.device).repeat_interleave(lengths)  # [N]
    if truncated is not None:
        mask = mask * ~torch.as_tensor(truncated, device=mask.device)[rows]
    if aggregation == "token":
        return mask / mask.sum().clamp(min=1)
    if aggregation == "sequence":
        counts = mask.new_zeros(len(lengths)).index_add(0, rows, mask).clamp(min=1)
        return mask / (counts[rows] * len(lengths))
    if not max_tokens or max_tokens < 1:
        raise UserError("aggregation = 'constant' needs max_tokens, the limit of a completion")
    return mask / (len(lengths) * max_tokens)


def kl_penalty(log_ratio, estimator):
    """Estimates of KL(policy || reference) from the policy's tokens, log_ratio = ref - policy.

    k1 = -log_ratio: unbiased, but noisy, and its gradient averages to zero, so that as a penalty it
    does nothing on average; k2 = log_ratio^2 / 2: biased a little, its gradient is that of the KL;
    k3 = exp(log_ratio) - log_ratio - 1: unbiased and never negative. (J. Schulman,
    joschu.net/blog/kl-approx.html.)

    >>> kl_penalty(torch.tensor(-1.0), "k1"), kl_penalty(torch.tensor(-1.0), "k3")
    (tensor(1.), tensor(0.3679))
    """
    one_of("kl_estimator", estimator, ("k1", "k2", "k3"))
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    return log_ratio.exp() - log_ratio - 1


def importance_weights(log_ratio, cfg):
    """How much likelier the trainer finds a token than the sampler did, kept within bounds.

    log_ratio = trainer's old log-prob - sampler's, any shape -> (weights, bool: was out of bounds).
    "truncate" moves what is out of bounds to the bound, "mask" sets it to zero.

    >>> from nanorrm.config import LossConfig
    >>> importance_weights(torch.tensor([0.0, 2.0]), LossConfig(importance="truncate"))
    (tensor([1., 2.]), tensor([False,  True]))
    """
    ratio = log_ratio.exp()
    inside = ratio.clamp(cfg.importance_low, cfg.importance_high)
    outside = ratio != inside
    if cfg.importance == "truncate":
        return inside, outside
    if cfg.importance == "mask":
        return ratio.masked_fill(outside, 0.0), outside
    return torch.ones_like(ratio), torch.zeros_like(outside)


def batch_loss(logp, entropy, values, cfg):
    """`policy_loss` of a micro-batch, and its sums with the entropy's.

    logp, entropy [N] of the current weights; values: packing.Batch's, under the names of
    policy_loss's parameters. Without old_logp these are the weights that the update began with.
    """
    loss, sums = policy_loss(logp, cfg=cfg, **{"old_logp": logp.detach(), **values})
    return loss, {**sums, "entropy": entropy.detach()[values["weight"] != 0].sum()}


def policy_loss(logp, old_logp, rollout_logp, adv, weight, cfg, ref_logp=None):
    """The clipped policy loss of some tokens, and what a debugger wants to know of them.

    All tensors are [N], one entry per completion token: logp of the current weights (with
    gradient), old_logp of the weights at the start of the update, rollout_logp as the sampler
    recorded it, adv the advantage of the token's completion, weight from `token_weights` (0: not
    trained on), ref_logp of the reference model (needed if cfg.kl > 0). The tokens may be any part
    of a batch: losses and sums of the parts add up to those of the whole.

    Returns (loss, sums): sums over the tokens of weight above 0 (divide by sums["tokens"]), except
    "_max".
    """
    counted = weight != 0

    def difference(a, b):  # 0 where not trained on: what stands there may be anything
        return torch.where(counted, a - b, 0.0)

    ratio = difference(logp, old_logp).exp()
    clipped = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    loss = -torch.minimum(ratio * adv, clipped * adv)
    with torch.no_grad():
        gap = difference(old_logp, rollout_logp)  # trainer against sampler
        importance, outside = importance_weights(gap, cfg)
        sums = {
            "tokens": counted.sum(),
            # clipped is what has no gradient left, as TRL counts it
            "clip_ratio": ((clipped * adv < ratio * adv) & counted).sum(),
            "sampler/logp_diff_squared": gap.square().sum(),
            "sampler/logp_diff_k3": (gap.exp() - gap - 1).sum(),
            "sampler/logp_diff_max": gap.abs().max(),
            "sampler/out_of_bounds": outside.sum(),
            "kl": weight.new_zeros(()),
        }
    loss = loss * importance
    if cfg.kl > 0:
        kl = kl_penalty(difference(ref_logp, logp), cfg.kl_estimator)
        loss = loss + cfg.kl * kl
        sums["kl"] = kl.detach().sum()
    return (loss * weight).sum(), sums
