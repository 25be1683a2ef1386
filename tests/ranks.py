"""Run by torchrun: training steps on recorded rollouts, as one of several ranks.

ranks.py RECORDED RESULT [SETTING=VALUE ...]: rank 0 writes the losses and the gathered weights.
"""

import sys

import tiny
import torch

from nanorrm import ranks
from nanorrm.config import JudgeConfig, LossConfig
from nanorrm.train.trainer import Trainer, policy_update


def run(recorded, cfg, dtype=torch.float32, shard=False):
    """Losses of a step for each recorded batch, and the final weights {name: fp32 tensor}."""
    model = tiny.model(tie_word_embeddings=False)
    reference = tiny.model(seed=1, tie_word_embeddings=False) if cfg.loss.kl else None
    if shard:
        ranks.shard(model, dtype)
        reference = reference and ranks.shard(reference, dtype)
    trainer = Trainer(model, cfg)
    losses = []
    for step, (questions, groups, advantages) in enumerate(recorded, 1):
        stats = policy_update(trainer, step, questions, groups, advantages, cfg, reference)
        losses.append((stats["loss"], stats["grad_norm"], stats["sampler/logp_diff_max"]))
    weights = {name: ranks.whole(p).detach() for name, p in model.named_parameters()}
    return losses, weights, {str(p.dtype) for p in model.parameters()}


def settings(**changes):
    """A JudgeConfig of few tokens a micro-batch, so that there are several on every rank."""
    loss = LossConfig(**{k: changes.pop(k) for k in ("kl", "aggregation") if k in changes})
    usual = {"learning_rate": 1e-3, "warmup_steps": 0, "micro_tokens": 200, "max_tokens": 20}
    return JudgeConfig(**{**usual, **changes}, loss=loss)


if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks.init()
    path, result, changes, dtype = sys.argv[1:5]
    recorded = torch.load(path, weights_only=False)
    done = run(recorded, settings(**eval(changes)), getattr(torch, dtype), shard=True)
    if ranks.rank() == 0:
        torch.save(done, result)
    ranks.finish()
