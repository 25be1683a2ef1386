"""Draw the next token straight from hidden states: the head's product and the draw in one pass.

Gumbel-max: adding -log(-log(u)) to each logit and taking the largest draws exactly from the
softmax, and a maximum can be kept while streaming over the vocabulary, so no logits are stored.
The noise is Philox, keyed by the request's stream and counted by (vocabulary index, position).
"""

import torch

from kernels.dispatch import choose
from kernels.philox import uniform

TINY = 1.1754944e-38  # the smallest normal fp32: keeps log(0) out


def gumbel(u):
    """Uniform in [0, 1) -> standard Gumbel noise."""
    return -torch.log(-torch.log(u.clamp(min=TINY)))


def reference(hidden, weight, temperature, stream, position):
    """Logits, noise, argmax; log-prob and entropy of the distribution that was drawn from."""
    logits = hidden.float() @ weight.float().T  # [B, V]
    greedy = (temperature == 0)[:, None]
    logits = logits / torch.where(greedy, 1.0, temperature[:, None])
    words = torch.arange(weight.shape[0], device=hidden.device)
    noise = gumbel(uniform(stream[:, None], words[None], position[:, None]))
    ids = torch.where(greedy, logits, logits + noise).argmax(-1)
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return ids, logp.gather(1, ids[:, None])[:, 0], entropy


def sample(hidden, weight, temperature, stream, position, impl="auto"):
    """hidden [B, H], weight [V, H]; temperature, stream, position [B] -> ids, logp, entropy [B].

    temperature 0 is greedy, with log-prob and entropy of the distribution at temperature 1;
    stream: int64 random stream of each request; position: index of the token being drawn.
    ids [B] int64; logp and entropy [B] fp32, nats, of the distribution drawn from.
    """
    choose(impl)
    return reference(hidden, weight, temperature, stream, position)
