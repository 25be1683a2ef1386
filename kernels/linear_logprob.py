"""Log-prob and entropy of the language-model head: hidden states in, one number per token out.

The logits of N tokens over V words are the largest tensor of RL training by far ([N, V] fp32 is
40 GB at N = 65k, V = 152k), and all that training wants of them is the log-probability of the
token that was sampled and the entropy of the distribution it was sampled from.

    logits = hidden @ weight.T / temperature              [N, V]
    logp   = logits[target] - logsumexp(logits)           [N]
    entropy= logsumexp(logits) - sum softmax * logits     [N]
"""

import torch

from kernels.dispatch import choose

IGNORE = -100  # a target that counts for nothing: log-prob 0, entropy 0, no gradient


def reference(hidden, weight, targets, temperature=1.0):
    """hidden [N, H], weight [V, H], targets [N] (or -100) -> logp [N], entropy [N], in fp32."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(wide) @ weight.to(wide).T / temperature  # [N, V]
    logp = logits.log_softmax(-1)
    keep = targets != IGNORE
    chosen = logp.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    zero = torch.zeros((), dtype=wide, device=hidden.device)
    return torch.where(keep, chosen, zero), torch.where(keep, entropy, zero)


def logprob(hidden, weight, targets, temperature=1.0, impl="auto"):
    """Log-probability (nats) of each target and entropy (nats) of each row's distribution.

    hidden [N, H]; weight [V, H]; targets [N] int64, -100 = ignored (0, 0 and no gradient);
    temperature > 0 divides the logits. Returns logp [N], entropy [N] (fp32, or fp64 for fp64
    inputs), both differentiable in hidden and weight.
    """
    choose(impl)
    return reference(hidden, weight, targets, temperature)
