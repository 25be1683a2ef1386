"""From logits to tokens: the settings of a request and the draw itself.

A draw depends on the request's stream and the token's position only: noise is a counter-based
generator (kernels/philox.py), one uniform per token, turned into a token by the inverse of the
cumulative distribution in vocabulary order.
"""

import hashlib
import struct
from collections import Counter
from dataclasses import dataclass, replace

import torch

from kernels.philox import uniform
from nanorrm.config import UserError


@dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn; names as in vLLM."""

    n: int = 1  # completions per prompt
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # keep the likeliest tokens that reach this probability together
    top_k: int = 0  # keep the k likeliest tokens; 0 keeps all
    min_p: float = 0.0  # keep tokens at least this fraction as likely as the likeliest
    max_tokens: int = 256  # new tokens at most
    max_think_tokens: int | None = None  # then the engine writes </think> itself
    stop: tuple[str, ...] = ()  # strings that end a completion; not part of its text
    stop_token_ids: tuple[int, ...] | None = None  # None: the model's own end tokens
    # token ids allowed at each place after </think>: a forced answer, before which nothing ends
    answer_slots: tuple[tuple[int, ...], ...] = ()
    seed: int = 0
    logprobs: bool = True  # record log-probs of the drawn tokens

    def __post_init__(self):
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        if self.stop_token_ids is not None:
            object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "answer_slots", tuple(tuple(ids) for ids in self.answer_slots))
        checks = {
            "n": self.n >= 1,
            "temperature": self.temperature == 0 or self.temperature >= 1e-3,
            "seed": -(2**63) <= self.seed < 2**63,
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k >= 0,
            "min_p": 0 <= self.min_p <= 1,
            "max_tokens": self.max_tokens >= 1,
            "max_think_tokens": self.max_think_tokens is None or self.max_think_tokens >= 0,
            "answer_slots": all(self.answer_slots),
        }
        for name, fine in checks.items():
            if not fine:
                raise UserError(f"SamplingParams: {name}={getattr(self, name)} is out of range")

    def shared(self):
        """What all requests in flight together must agree on: all but n, lengths and seed."""
        return replace(self, n=1, max_tokens=1, max_think_tokens=None, seed=0)


def seeds_apart(params, questions):
    """One SamplingParams per prompt: equal prompts of a batch get seeds of their own, or they would
    be answered alike."""
    seen, each = Counter(), []
    for question in map(tuple, questions):
        each.append(replace(params, seed=params.seed + seen[question] * 2**48))
        seen[question] += 1
    return each


def stream_id(seed, prompt, index):
    """The 64-bit random stream of sample `index` of a prompt (ids): a hash, as signed int64."""
    data = struct.pack(f"<qq{len(prompt)}q", seed, index, *prompt)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def truncate(probs, params):
    """Zero the tokens that top-k, min-p and top-p cut off, each on what the one before left."""
    if params.top_k:
        kth = probs.topk(min(params.top_k, probs.shape[-1])).values[:, -1:]
        probs = probs.where(probs >= kth, 0.0)
    if params.min_p > 0:
        probs = probs.where(probs >= params.min_p * probs.amax(-1, keepdim=True), 0.0)
    if params.top_p < 1:
        ordered, index = (probs / probs.sum(-1, keepdim=True)).sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        cut = (before >= params.top_p).scatter(-1, index, before >= params.top_p)
        probs = probs.masked_fill(cut, 0.0)
    return probs


class AnswerSlots:
    """A forced answer: which ids may stand at each place after </think>; before it nothing ends."""

    def __init__(self, slots, stop_ids, vocab_size):
        """slots: as SamplingParams.answer_slots; stop_ids: tensor of the ids that end."""
        allowed = torch.zeros(1 + len(slots), vocab_size, dtype=torch.bool, device=stop_ids.device)
        self.ends, self.allowed = allowed[0], allowed[1:]  # [V], [S, V]
        self.ends[stop_ids] = True
        for place, ids in enumerate(slots):
            self.allowed[place, list(ids)] = True
        only = [ids[0] if len(ids) == 1 else -1 for ids in slots]  # where there is no choice
        self.only = torch.tensor(only, device=stop_ids.device)

    def constrain(self, answered, forced):
        """Rows that are `answered` tokens [B] past </think> (-1: before it), and ids that are
        forced already [B] (-1: none) -> forced, allowed as in `draw`."""
        place = answered.clamp(0, len(self.only) - 1)
        inside = (answered >= 0) & (answered < len(self.only))
        # before the answer nothing may end the completion, after it anything may stand
        outside = ~self.ends | (answered >= 0)[:, None]
        allowed = torch.where(inside[:, None], self.allowed[place], outside)
        return torch.where(inside, self.only[place], forced), allowed


def draw(logits, params, stream, position, forced=None, allowed=None):
    """Draw one token per row.

    logits [B, V]; stream, position [B] int64; forced [B] int64 or None: a token id to take instead
    of a draw, -1 for none; allowed [B, V] bool or None: tokens that may be drawn.
    Returns ids [B], logp [B] and raw_logp [B] in nats, fp32: logp is of the distribution drawn from
    (temperature and truncation applied; greedy: temperature 1; a forced token: 0), raw_logp of the
    model's own at temperature 1.
    """
    logits = own = logits.float()
    if allowed is not None:
        logits = logits.masked_fill(~allowed, float("-inf"))
    if params.temperature == 0:
        ids, probs = logits.argmax(-1), None
    else:
        probs = truncate((logits / params.temperature).softmax(-1), params)
        total = probs.cumsum(-1)
        u = uniform(stream, position)[:, None] * total[:, -1:]
        # rounding may leave u at the very end: the last token that has a probability takes it
        ids = torch.searchsorted(total, u, right=True)[:, 0]
        ids = torch.minimum(ids, (probs > 0).cumsum(-1).argmax(-1))
    if forced is not None:
        ids = torch.where(forced >= 0, forced, ids)
    if not params.logprobs:
        return ids, None, None
    raw = own.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    if probs is None:
        logp = raw if allowed is None else logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    else:
        logp = (probs.gather(1, ids[:, None]) / total[:, -1:])[:, 0].log()
    if forced is not None:
        logp = torch.where(forced >= 0, 0.0, logp)
    return ids, logp, raw
