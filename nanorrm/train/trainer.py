"""One optimizer step at any size: packed micro-batches, fp32 master weights, one rank or many.

A loop makes the losses of its micro-batches and hands each to `backward`; `step` turns the sum of
their gradients into new weights. The parts of a loss add up, so neither the token budget of a
micro-batch nor the number of ranks changes the result. The output layer never makes logits: its
log-prob kernel is fused.
"""

import math
from itertools import chain

import torch

from nanorrm import ranks
from nanorrm.train import grpo, packing
from nanorrm.train.checkpoint import load_state, save_state


class Trainer:
    """A model, its optimizer, and the gradient gathered so far. cfg: a RunConfig."""

    def __init__(self, model, cfg):
        self.model, self.cfg = model, cfg
        on_cpu = model.device.type == "cpu"  # smaller passes stay in its caches
        self.micro_tokens = cfg.micro_tokens or (4096 if on_cpu else 16384)
        for block in model.model.layers:
            block.recompute = cfg.recompute
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=cfg.learning_rate, weight_decay=cfg.weight_decay, fused=True
        )
        self.told = []  # by the micro-batches since the last step: {name: number} each

    def batches(self, samples):
        """This rank's micro-batches of some samples; all ranks get the same number of them."""
        dealt = packing.deal(samples, self.micro_tokens, ranks.world_size())
        return [packing.join(group, self.model.device) for group in dealt[ranks.rank()]]

    def logprobs(self, batch, temperature=1.0, model=None):
        """Log-probs in nats and entropies of a batch's targets, each [N]."""
        model = model or self.model
        return model.logprobs(batch.ids, batch.cu_seqlens, batch.rows, batch.targets, temperature)

    def backward(self, loss, sums=None):
        """Add the gradient of a micro-batch's part of the loss.

        sums: {name: number} for the log, combined as `combined` says.
        """
        (loss * ranks.world_size()).backward()  # gradients are averaged over the ranks
        told = {"loss": loss.detach(), **(sums or {})}
        self.told.append({name: float(value) for name, value in told.items()})

    def step(self, step):
        """AdamW on the gradient gathered, at the learning rate of this step (the first is 1).

        Returns what `backward` was told, over all micro-batches of all ranks. Raises
        FloatingPointError, with nothing stepped, if the gradient is not finite.
        """
        parameters, rate = self.model.parameters(), self.rate(step)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.cfg.max_grad_norm)
        norm = ranks.whole(norm).item()
        if not math.isfinite(norm):  # stop before a step that would ruin the weights
            raise FloatingPointError(f"the gradient is {norm} at learning rate {rate:g}")
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        sums, self.told = combined(self.told), []
        largest = [name for name in sums if name.endswith("_max")]
        largest = {name: ranks.maximum(sums.pop(name)) for name in largest}
        return {**ranks.total(sums), **largest, "grad_norm": norm, "learning_rate": rate}

    def rate(self, step):
        """The learning rate of a step: linear warm-up, then the schedule."""
        cfg = self.cfg
        warm = min(1.0, step / max(1, cfg.warmup_steps))
        left = min(1.0, (cfg.steps - step + 1) / max(1, cfg.steps - cfg.warmup_steps))
        cosine = 0.5 - 0.5 * math.cos(math.pi * left)
        decay = {"constant": 1.0, "linear": left, "cosine": cosine}
        return cfg.learning_rate * min(warm, decay[cfg.schedule])

    def save(self, run, step, extra):
        """A checkpoint in the run's folder, from which `load` continues."""
        save_state(run.folder, step, self.model, self.optimizer, extra, self.cfg.keep)

    def load(self, run):
        """Continue a resumed run from its newest checkpoint -> its step and what `extra` held; {}
        for a run that begins."""
        return load_state(run.folder, self.model, self.optimizer) if self.cfg.resume else {}


def combined(parts):
    """{name: number} of each part of a batch -> of all: sums, and the largest of a name_max.

    >>> combined([{"loss": 0.5, "gap_max": 2.0}, {"loss": 0.25, "gap_max": 1.0}])
    {'loss': 0.75, 'gap_max': 2.0}
    """
    how = {name: max if name.endswith("_max") else sum for name in parts[0]}
    return {name: of(part[name] for part in parts) for name, of in how.items()}


# -- what GRPO's step is made of: all rollouts of a batch, in one optimizer step or several


def policy_update(trainer, step, questions, groups, advantages, cfg, reference=None):
    """The optimizer steps on all rollouts of a batch, as train.py shows them. Returns metrics.

    questions [P] and groups [P][G] as generated, advantages [P, G].
    """
    updates = []
    for batches in update_plan(trainer, questions, groups, advantages, cfg, reference):
        for batch in batches:
            logp, entropy = trainer.logprobs(batch, cfg.temperature)
            trainer.backward(*grpo.batch_loss(logp, entropy, batch.values, cfg.loss))
        updates.append(trainer.step(step))
    return update_metrics(updates)


def update_plan(trainer, questions, groups, advantages, cfg, reference=None):
    """Rollouts -> for each optimizer step its micro-batches, with all that the loss needs.

    One step on all of them, or with cfg.mini_prompts one on every so many prompts (PPO's
    mini-batches): there the ratio to the weights that the batch began with leaves one, and clipping
    begins to act. Log-probs of those weights, and of the reference, are computed here.
    """
    size, plan = cfg.mini_prompts or len(groups), []
    for first in range(0, len(groups), size):
        some = slice(first, first + size)
        samples = rollout_samples(questions[some], groups[some], advantages[some], cfg)
        plan.append(trainer.batches(samples))
    with torch.no_grad():
        for batch in chain(*plan):
            if len(plan) > 1:
                batch.values["old_logp"], _ = trainer.logprobs(batch, cfg.temperature)
            if reference is not None:
                batch.values["ref_logp"], _ = trainer.logprobs(batch, cfg.temperature, reference)
    return plan


def rollout_samples(questions, groups, advantages, cfg):
    """The rollouts of one optimizer step as samples, each token with its weight in the loss."""
    rollouts = list(chain(*groups))
    lengths = [len(rollout.ids) for rollout in rollouts]
    trained = torch.tensor([float(not forced) for r in rollouts for forced in r.forced])
    cut = [cfg.loss.skip_truncated and rollout.finish_reason == "length" for rollout in rollouts]
    weights = grpo.token_weights(trained, lengths, cfg.loss.aggregation, cfg.max_tokens, cut)
    asked = [question for question, group in zip(questions, groups) for _ in group]
    samples = []
    for i, (adv, weight) in enumerate(zip(advantages.flatten(), weights.split(lengths))):
        values = {"adv": adv.expand(len(weight)), "weight": weight}
        values["rollout_logp"] = torch.tensor(rollouts[i].logprobs)
        samples.append(packing.Sample(asked[i], rollouts[i].ids, values))
    return samples


def update_metrics(updates):
    """Sums over the tokens of each of a batch's optimizer steps -> means over all of them."""
    means = combined(updates)
    tokens = max(1.0, means.pop("tokens"))
    for name in means:
        if not name.endswith("_max"):
            per_step = name in ("loss", "grad_norm", "learning_rate")
            means[name] /= len(updates) if per_step else tokens
    means["sampler/logp_diff_rms"] = means.pop("sampler/logp_diff_squared") ** 0.5
    return means
