"""One optimizer step at any size: packed micro-batches, fp32 master weights, one rank or many.

A stage says what its loss is; this file says how the gradient comes about. Samples are packed into
micro-batches by a token budget and dealt to the ranks; the parts of the loss add up, so neither the
budget nor the number of ranks changes the result. The output layer never makes logits: its log-prob
kernel is fused.
"""

import math
from collections import Counter

import torch

from nanorrm import ranks
from nanorrm.train import packing
from nanorrm.train.checkpoint import load_state, save_state


class Trainer:
    """A model, its optimizer, and the number of steps taken.

    cfg: RunConfig (or one of its kinds).
    """

    def __init__(self, model, cfg):
        self.model, self.cfg = model, cfg
        on_cpu = model.device.type == "cpu"  # smaller passes stay in its caches
        self.micro_tokens = cfg.micro_tokens or (4096 if on_cpu else 16384)
        for block in model.model.layers:
            block.recompute = cfg.recompute
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=cfg.learning_rate, weight_decay=cfg.weight_decay, fused=True
        )

    def batches(self, samples):
        """This rank's micro-batches of some samples; all ranks get the same number of them."""
        dealt = packing.deal(samples, self.micro_tokens, ranks.world_size())
        return [packing.join(group, self.model.device) for group in dealt[ranks.rank()]]

    def logprobs(self, batch, temperature=1.0, model=None):
        """Log-probs and entropies of a batch's targets, each [N]."""
        model = model or self.model
        return model.logprobs(batch.ids, batch.cu_seqlens, batch.rows, batch.targets, temperature)

    def step(self, batches, part, rate, temperature=1.0):
        """One optimizer step. Returns {name: sum over all micro-batches of all ranks}.

        part(values, logp [N], entropy [N]) -> (this micro-batch's part of the loss, {name: sum}).
        A name that ends in "_max" is combined by the maximum. Raises
        FloatingPointError, with nothing stepped, if the gradient is not finite.
        """
        sums, largest = Counter(), {}
        for batch in batches:
            logp, entropy = self.logprobs(batch, temperature)
            loss, parts = part(batch.values, logp, entropy)
            (loss * ranks.world_size()).backward()  # gradients are averaged over the ranks
            for name, value in {"loss": loss.detach(), **parts}.items():
                if name.endswith("_max"):
                    largest[name] = max(largest.get(name, 0.0), float(value))
                else:
                    sums[name] += float(value)
        norm = ranks.whole(
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.max_grad_norm)
        ).item()
        if not math.isfinite(norm):  # stop before a step that would ruin the weights
            raise FloatingPointError(f"the gradient is {norm} at learning rate {rate:g}")
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        largest = {name: ranks.maximum(value) for name, value in largest.items()}
        return {**ranks.total(sums), **largest, "grad_norm": norm, "learning_rate": rate}

    def rate(self, step):
        """The learning rate of a step (the first is 1): linear warm-up, then the schedule."""
        cfg = self.cfg
        warm = min(1.0, step / max(1, cfg.warmup_steps))
        left = min(1.0, (cfg.steps - step + 1) / max(1, cfg.steps - cfg.warmup_steps))
        decay = {
            "constant": 1.0,
            "linear": left,
            "cosine": 0.5 - 0.5 * math.cos(math.pi * left),
        }
        return cfg.learning_rate * min(warm, decay[cfg.schedule])

    def save(self, run, step, extra):
        """A checkpoint in the run's folder, from which `load` continues."""
        save_state(run.folder, step, self.model, self.optimizer, extra, self.cfg.keep)

    def load(self, run):
        """Continue from the newest checkpoint of the run's folder; returns what `extra` held."""
        return load_state(run.folder, self.model, self.optimizer)
