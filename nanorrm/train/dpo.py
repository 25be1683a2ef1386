"""DPO: a policy from pairs without sampling, as a pure function of four log-probs per pair.

Direct Preference Optimization (arXiv 2305.18290, eq. 7) reads a reward off the policy itself,
beta * log(policy / reference), and lets the chosen response's exceed the rejected one's.
"""

from itertools import chain, islice

import torch
import torch.nn.functional as F

from nanorrm import ranks
from nanorrm.config import possible_dpo
from nanorrm.train import packing


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, label_smoothing=0.0):
    """Losses of B pairs, to be averaged, and the rewards they compare: each [B], rewards detached.

    The four inputs [B] are log-probs of whole responses in nats, summed over their tokens, under
    the policy (with gradient) and under the frozen reference. With log-ratios policy - reference
    and h the chosen's less the rejected's, rewards are beta * log-ratio and the loss is
    -log sigmoid(beta h), or with label_smoothing e, the chance that a label is wrong,
    -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h) (conservative DPO). Raises UserError for
    settings that make no sense.

    >>> import torch
    >>> one = torch.tensor([-10.0])  # the policy has come to find the chosen response e^2 times
    >>> loss, chosen, rejected = dpo_loss(one + 2, one - 1, one, one, beta=0.5)  # as likely,
    >>> loss, chosen - rejected  # the rejected one 1/e times: -log sigmoid(0.5 * 3)
    (tensor([0.2014]), tensor([1.5000]))
    """
    possible_dpo(beta, label_smoothing)
    won, lost = chosen - ref_chosen, rejected - ref_rejected
    h = beta * (won - lost)
    loss = -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)
    return loss, beta * won.detach(), beta * lost.detach()


def reference_logprobs(trainer, preferences):
    """Give every sample of some Preferences the log-probs of its tokens under the current weights,
    as its values["ref_logp"]. All ranks call it with the same preferences and end alike."""
    dealt = packing.deal(preferences, trainer.micro_tokens, ranks.world_size())
    found = []  # log-probs of all target tokens of this rank
    for items in dealt[ranks.rank()]:
        batch = packing.join(items, trainer.model.device)
        with torch.no_grad():
            found += trainer.logprobs(batch)[0].tolist()
    numbers = chain(*ranks.gathered(found))  # of all ranks, in the order in which they were dealt
    for item in chain(*chain(*dealt)):
        for sample in item.samples():
            sample.values["ref_logp"] = list(islice(numbers, len(sample.target)))


def preference_update(trainer, step, preferences, cfg):
    """One optimizer step of DPO on Preferences with ref_logp. Returns metrics, names as in TRL."""
    for item in preferences:
        for sample in item.samples():  # adds up to the pair's share of the batch, 0 if idle
            share = 1 / len(preferences) / len(sample.target)
            sample.values["share"] = [share] * len(sample.target)
    for batch in trainer.batches(preferences):
        logp, _ = trainer.logprobs(batch)  # [N]
        trainer.backward(*batch_loss(logp, batch, cfg))
    return trainer.step(step)


def batch_loss(logp, batch, cfg):
    """A micro-batch's part of DPO's loss, logp [N], and of the metrics: means over the pairs."""
    own, of = batch.values["trained"], batch.sequences()  # own: 0 for what the engine wrote itself
    columns = (logp * own, batch.values["ref_logp"] * own, batch.values["share"])
    columns = torch.stack(columns, 1)  # [N, 3]
    sums = columns.new_zeros(len(batch.cu_seqlens) - 1, 3).index_add(0, of, columns)
    (chosen, ref_chosen, share), (rejected, ref_rejected, _) = sums[0::2].T, sums[1::2].T
    losses, won, lost = dpo_loss(
        chosen, rejected, ref_chosen, ref_rejected, cfg.beta, cfg.label_smoothing
    )
    shown = {
        "rewards/chosen": won,
        "rewards/rejected": lost,
        "rewards/margins": won - lost,
        "rewards/accuracies": won > lost,
        "logps/chosen": chosen.detach(),
        "logps/rejected": rejected.detach(),
    }
    means = {name: (value * share.detach()).sum() for name, value in shown.items()}
    return (losses * share).sum(), means
