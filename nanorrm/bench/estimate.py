"""What the hardware allows: a GRPO step's arithmetic and traffic, and the seconds at the roofline.

An estimate, not a measurement: every part takes as long as its arithmetic at the device's peak or
its traffic at the device's bandwidth, whichever is longer; real steps take longer.
"""

import math
from dataclasses import dataclass

from nanorrm.bench.tools import shape

GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """A device, by its data sheet: dense bf16 products with fp32 sums, and memory."""

    name: str
    flops: float  # operations per second
    bandwidth: float  # bytes per second
    memory: float  # bytes


DEVICES = (
    Hardware("RTX 4090", 165e12, 1.008e12, 24e9),
    Hardware("A100 80GB", 312e12, 2.039e12, 80e9),
    Hardware("H100 SXM", 989e12, 3.35e12, 80e9),
    Hardware("H200 SXM", 989e12, 4.8e12, 141e9),
)


def stop_chance(mean, longest):
    """The chance p of ending at each token that gives cut lengths their mean: (1 - q^limit) / p.

    >>> round(1 / stop_chance(60, 256), 1)  # a few are cut, so the uncut mean is longer
    60.9
    """
    low, high = 1e-9, 1.0
    for _ in range(100):
        p = (low + high) / 2
        long = -math.expm1(longest * math.log1p(-p)) / p > mean
        low, high = (p, high) if long else (low, p)
    return p


def quantiles(mean, longest, n):
    """n lengths that stand for all: geometric, cut at `longest`, with about the given mean.

    >>> quantiles(60, 256, 4)
    [9, 29, 60, 126]
    """
    rate = math.log1p(-stop_chance(mean, longest))
    return [max(1, min(longest, math.ceil(math.log(1 - (i + 0.5) / n) / rate))) for i in range(n)]


def layer_weights(c):
    """Weights of the matrices in one layer; c: ModelConfig."""
    attention = (2 * c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    return c.hidden_size * (attention + 3 * c.intermediate_size)


def parameters(c):
    """Weights of all matrices, about all there are."""
    tables = (1 if c.tie_word_embeddings else 2) * c.vocab_size * c.hidden_size
    return c.num_hidden_layers * layer_weights(c) + tables


def forward_flops(c, lengths, outputs):
    """Operations of a causal forward pass over sequences of these lengths, `outputs` of whose
    tokens go through the output layer. A multiplication and an addition are two; norms and the like
    are left out, and so is what a mask hides."""
    tokens, pairs = sum(lengths), sum(n * n / 2 for n in lengths)
    dense = c.num_hidden_layers * layer_weights(c) * tokens + c.vocab_size * c.hidden_size * outputs
    attention = c.num_hidden_layers * c.num_attention_heads * c.head_dim * pairs * 2
    return 2 * (dense + attention)


def training_flops(c, lengths, outputs):
    """Forward and backward: three times the forward pass. What is recomputed does not count."""
    return 3 * forward_flops(c, lengths, outputs)


def kv_bytes(c, width=2):
    """Bytes of keys and values per token in the cache."""
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * width


def rollout_seconds(c, prompt, lengths, hardware):
    """Seconds of generating completions of these lengths, all at once, after their prompts.

    Each decoding step reads the weights once and every live sequence's keys and values.
    """
    size = 2 * parameters(c)
    prefill = forward_flops(c, [prompt] * len(lengths), len(lengths)) / hardware.flops
    ordered, seconds, done = sorted(lengths), max(prefill, size / hardware.bandwidth), 0
    for i, n in enumerate(ordered):  # from `done` to `n` tokens, len - i sequences are alive
        live, steps, context = len(ordered) - i, n - done, prompt + (n + done) / 2
        traffic = size + live * context * kv_bytes(c)
        work = 2 * parameters(c) * live  # attention's own products are far below its traffic
        seconds += steps * max(traffic / hardware.bandwidth, work / hardware.flops)
        done = n
    return seconds


def update_seconds(c, prompt, lengths, hardware):
    """Seconds of one update on them: forward and backward, then AdamW's traffic.

    AdamW reads gradient, weight and two moments and writes three of them, fp32: 28 bytes a weight.
    """
    flops = training_flops(c, [prompt + n for n in lengths], sum(lengths))
    return flops / hardware.flops + 28 * parameters(c) / hardware.bandwidth


def memory_bytes(c, prompt, lengths, packed):
    """(training state, cache of the rollouts, kept by a pass over `packed` tokens) in bytes.

    State: fp32 weight, gradient and two moments, and the engine's bf16 copy: 18 bytes a weight. The
    pass recomputes its layers: it keeps two bf16 rows a layer and token, and one layer's insides.
    The cache can be smaller than this: sequences then wait.
    """
    heads = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    inside = 2 * (6 * c.hidden_size + 2 * heads + 4 * c.intermediate_size)
    kept = packed * (4 * c.hidden_size * c.num_hidden_layers + inside)
    return 18 * parameters(c), kv_bytes(c) * sum(prompt + n for n in lengths), kept


def estimate(prompts=16, group=8, prompt=512, mean=2000, longest=8192, packed=16384):
    """Print a table over shapes and devices, and return its rows."""
    print(
        "ESTIMATE from data sheets, nothing was measured: the least time a GRPO step can take\n"
        f"{prompts} prompts of {prompt} tokens x {group}, completions of {mean} tokens on average, "
        f"at most {longest}; one update, {packed} tokens a pass\n"
    )
    print(
        f"{'model':6s}{'device':11s}{'rollout':>9s}{'update':>9s}{'state':>12s}{'pass':>12s}  cache"
    )
    lengths, rows = quantiles(mean, longest, prompts * group), []
    for name in ("0.5B", "1.5B", "7B"):
        c = shape(name, prompt + longest)
        state, cache, kept = memory_bytes(c, prompt, lengths, packed)
        for hardware in DEVICES:
            row = {
                "model": name,
                "device": hardware.name,
                "rollout_seconds": rollout_seconds(c, prompt, lengths, hardware),
                "update_seconds": update_seconds(c, prompt, lengths, hardware),
                "fits": state + kept < hardware.memory,
            }
            rows.append(row)
            left = (hardware.memory - state - kept) / cache
            room = f"{min(1, left):.0%} of {cache / GIB:.1f} GiB" if row["fits"] else "too large"
            print(
                f"{name:6s}{hardware.name:11s}{row['rollout_seconds']:7.1f} s"
                f"{row['update_seconds']:7.1f} s{state / GIB:8.1f} GiB{kept / GIB:8.1f} GiB  {room}"
            )
    return rows
