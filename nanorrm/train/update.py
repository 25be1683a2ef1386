"""From rollouts or preferences to optimizer steps: what one batch teaches the model.

`policy_update` is GRPO's (PPO's, with mini-batches), `preference_update` DPO's. Both only say what
the loss of a micro-batch is; `Trainer.step` does the rest.
"""

from collections import Counter
from itertools import chain

import torch

from nanorrm.train import grpo, packing


def policy_update(trainer, step, questions, groups, advantages, cfg, reference=None):
    """Optimizer steps on all rollouts of a batch. Returns metrics of the update.

    questions [P] and groups [P][G] as generated, advantages [P, G]. One step on all of them, or
    with cfg.mini_prompts one on every so many prompts (PPO's mini-batches): there the ratio to the
    weights that the batch began with leaves one, and clipping begins to act.
    """
    size = cfg.mini_prompts or len(groups)
    minis = []
    for first in range(0, len(groups), size):
        some = slice(first, first + size)
        minis.append(training_samples(questions[some], groups[some], advantages[some], cfg))
    plans = [trainer.batches(mini) for mini in minis]
    with torch.no_grad():
        for batch in chain(*plans):
            if len(plans) > 1:
                old, _ = trainer.logprobs(batch, cfg.temperature)
                batch.values["old_logp"] = old
            if reference is not None:
                ref, _ = trainer.logprobs(batch, cfg.temperature, reference)
                batch.values["ref_logp"] = ref

    def part(values, logp, entropy):
        old = values.get("old_logp", logp.detach())  # before the first step they are the same
        loss, sums = grpo.policy_loss(
            logp,
            old,
            values["rollout_logp"],
            values["advantage"],
            values["weight"],
            cfg.loss,
            values.get("ref_logp"),
        )
        trained = values["weight"] != 0
        return loss, {**sums, "entropy": entropy.detach()[trained].sum()}

    rate = trainer.rate(step)
    return update_metrics([trainer.step(plan, part, rate, cfg.temperature) for plan in plans])


def training_samples(questions, groups, advantages, cfg):
    """The rollouts of one update as samples, each token with its weight in the update's loss."""
    rollouts = list(chain(*groups))
    lengths = [len(rollout.ids) for rollout in rollouts]
    trained = torch.tensor([float(not forced) for r in rollouts for forced in r.forced])
    cut = None
    if cfg.loss.skip_truncated:
        cut = [rollout.finish_reason == "length" for rollout in rollouts]
    weights = grpo.token_weights(trained, lengths, cfg.loss.aggregation, cfg.max_tokens, cut)
    asked = [question for question, group in zip(questions, groups) for _ in group]
    return [
        packing.Sample(
            question,
            rollout.ids,
            {
                "advantage": [advantage] * len(rollout.ids),
                "rollout_logp": rollout.logprobs,
                "weight": weight.tolist(),
            },
        )
        for question, rollout, advantage, weight in zip(
            asked, rollouts, advantages.flatten().tolist(), weights.split(lengths)
        )
    ]


def update_metrics(updates):
    """Sums over the tokens of each of a batch's updates -> means over all of them."""
    sums = Counter()
    for update in updates:
        sums.update(update)
    tokens = max(1.0, sums.pop("tokens"))
    n = len(updates)
    means = {}
    for name, value in sums.items():
        if name.endswith("_max"):
            means[name] = max(update[name] for update in updates)
        else:
            means[name] = value / (n if name in ("loss", "grad_norm", "learning_rate") else tokens)
    means["sampler/logp_diff_rms"] = means.pop("sampler/logp_diff_squared") ** 0.5
    return means
