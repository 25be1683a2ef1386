"""Two tables that are counted, not measured.

`python -m nanorrm.bench memory`: which model fits which GPUs. Training keeps, sharded over W GPUs,
fp32 master weights, gradients and the two moments of AdamW: 16 bytes a parameter. On every GPU: the
engine's own bf16 copy of all weights (2 bytes), the layers that FSDP has gathered, and the larger
of a micro-batch's activations and the rollouts' cache, which take turns with --release-cache. There
is no tensor parallelism: the engine's copy has to fit.

`python -m nanorrm.bench train --estimate`: the least time of a GRPO step. Every part takes as long
as its arithmetic at the device's peak or its traffic at the device's bandwidth, whichever is
longer; real steps take longer.
"""

import math
from dataclasses import dataclass

from nanorrm.bench.tools import MODELS, numbers, shape
from nanorrm.config import UserError, at_least

GB, GIB = 1e9, 2**30
DEVICES = {  # dense bf16 products with fp32 sums, FLOP/s; bytes/s; bytes: from the data sheets
    "RTX 4090": (165e12, 1.008e12, 24e9),
    "A100 80GB": (312e12, 2.039e12, 80e9),
    "H100 SXM": (989e12, 3.35e12, 80e9),
    "H200 SXM": (989e12, 4.8e12, 141e9),
}

# -- what a model takes; c: ModelConfig


def layer_matrices(c):
    """Weights of the matrices in one layer."""
    attention = (2 * c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    return c.hidden_size * (attention + 3 * c.intermediate_size)


def parameters(c):
    """(parameters of the whole model, of one layer, of all that is in no layer)."""
    biases = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim * c.attention_bias
    norms = 2 * c.hidden_size + 2 * c.head_dim * c.qk_norm
    layer = layer_matrices(c) + biases + norms
    rest = (2 - c.tie_word_embeddings) * c.vocab_size * c.hidden_size + c.hidden_size
    return c.num_hidden_layers * layer + rest, layer, rest


def forward_flops(c, lengths, outputs):
    """Operations of a causal forward pass over sequences of these lengths, `outputs` of whose
    tokens go through the output layer. A multiplication and an addition are two; norms and the like
    are left out, and so is what a mask hides."""
    tokens, pairs = sum(lengths), sum(n * n / 2 for n in lengths)
    dense = c.num_hidden_layers * layer_matrices(c) * tokens
    attention = c.num_hidden_layers * c.num_attention_heads * c.head_dim * pairs * 2
    return 2 * (dense + attention + c.vocab_size * c.hidden_size * outputs)


def training_flops(c, lengths, outputs):
    """Forward and backward: three times the forward pass. What is recomputed does not count."""
    return 3 * forward_flops(c, lengths, outputs)


def kv_bytes(c, width=2):
    """Bytes of keys and values per token in the cache; width: of a number (2: bf16)."""
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * width


def activations(c, tokens, recompute):
    """Bytes that the bf16 forward pass of the kernels keeps for the backward pass.

    A layer's: the sums that both norms took and what they gave, queries, keys, values and output of
    the attention, gate, up and their product. With recompute: each layer's two inputs, and all this
    for one layer at a time.
    """
    heads = (2 * c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    layer = 2 * (4 * c.hidden_size + heads + 3 * c.intermediate_size)  # bf16
    layer += 4 * (c.num_attention_heads + 2)  # fp32: the softmax's log-sums, the norms' scales
    layers = c.num_hidden_layers
    kept = layers * 4 * c.hidden_size + layer if recompute else layers * layer
    return tokens * (kept + 8 * c.hidden_size)  # both ends of the stack


def training_bytes(c, gpus, tokens, context, at_once):
    """{part: bytes on each GPU} of a GRPO step; the activations and the cache take turns."""
    total, layer, rest = parameters(c)
    # gathered in bf16: what is in no layer, and two layers (one runs, the next one arrives); their
    # gradients in fp32 on the way to the shards
    gathered = 2 * (rest + 2 * layer) + 4 * (rest + layer)
    working = activations(c, tokens, False) / c.num_hidden_layers  # gradients of a layer
    return {
        "optimizer": 16 * total / gpus,
        "engine": 2 * total,
        "gathered": gathered,
        "turns": max(activations(c, tokens, True) + working, kv_bytes(c) * context * at_once),
    }


# -- which model fits which GPUs


@dataclass
class MemoryTable:
    """What one GPU holds, in training and in judging, for the models people use."""

    gpu_gb: float = 80.0  # memory of one GPU, 10^9 bytes
    reserve_gb: float = 6.0  # kept free: CUDA itself, fragmentation, temporary buffers
    gpus: str = "1,2,4,8,16"  # numbers of GPUs to try
    micro_tokens: int = 16384  # of training, with --recompute and --release-cache
    context: int = 12288  # tokens of a prompt and its response
    at_once: int = 16  # sequences the rollout's cache should hold on each GPU

    def __post_init__(self):
        at_least(self, 1, "gpu_gb", "micro_tokens", "context", "at_once")
        at_least(self, 0, "reserve_gb")
        if not all(n.strip().isdigit() and int(n) for n in self.gpus.split(",")):
            raise UserError(f"gpus = {self.gpus!r} should be numbers like 1,2,4")


def show_memory(cfg):
    """Print one row a model, as Markdown: fewest GPUs that train it, bytes there, and what judging
    takes."""
    print(
        f"GPUs of {cfg.gpu_gb:g} GB, {cfg.reserve_gb:g} GB of them kept free; "
        f"{cfg.micro_tokens} tokens a micro-batch, recomputation; a cache for {cfg.at_once} "
        f"sequences of {cfg.context} tokens on each GPU while it samples.\n"
    )
    columns = ["model", "parameters", "GPUs to train", "masters and AdamW", "engine", "gathered"]
    columns += ["activations or cache", "in all, GB", "to judge: weights, GB", "sequences at once"]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    room, most = (cfg.gpu_gb - cfg.reserve_gb) * GB, cfg.gpus.split(",")[-1]
    for name in MODELS:
        c = shape(name)
        total = parameters(c)[0]
        for gpus in sorted(numbers(cfg.gpus)):
            parts = training_bytes(c, gpus, cfg.micro_tokens, cfg.context, cfg.at_once)
            fits = sum(parts.values()) <= room
            if fits:
                break
        cells = [name, f"{total / 1e9:.2f}B", gpus if fits else f"more than {most}"]
        sizes = (*parts.values(), sum(parts.values()), 2 * total)
        cells += [f"{size / GB:.1f}" for size in sizes]
        at_once = max(0, int((room - 2 * total) // (kv_bytes(c) * cfg.context)))
        print("| " + " | ".join(map(str, [*cells, at_once or "does not fit"])) + " |")


# -- the least time of a step


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


def rollout_seconds(c, prompt, lengths, flops, bandwidth):
    """Seconds of generating completions of these lengths, all at once, after their prompts.

    Each decoding step reads the weights once and every live sequence's keys and values.
    """
    weights, tokens = parameters(c)[0], sum(lengths)
    prefill = forward_flops(c, [prompt] * len(lengths), len(lengths)) / flops
    traffic = 2 * weights * max(lengths) + kv_bytes(c) * sum(n * (prompt + n / 2) for n in lengths)
    work = 2 * weights * tokens  # attention's own products are far below its traffic
    return max(prefill, 2 * weights / bandwidth) + max(traffic / bandwidth, work / flops)


def update_seconds(c, prompt, lengths, flops, bandwidth):
    """Seconds of one update on them: forward and backward, then AdamW's traffic.

    AdamW reads gradient, weight and two moments and writes three of them, fp32: 28 bytes a weight.
    """
    work = training_flops(c, [prompt + n for n in lengths], sum(lengths))
    return work / flops + 28 * parameters(c)[0] / bandwidth


def estimate(prompts=16, group=8, prompt=512, mean=2000, longest=8192, packed=16384):
    """Print a table over shapes and devices.

    State: fp32 weight, gradient and two moments, and the engine's bf16 copy. The pass recomputes
    its layers. The cache can be smaller than all rollouts: sequences then wait.
    """
    print(
        "ESTIMATE from data sheets, nothing was measured: the least time a GRPO step can take\n"
        f"{prompts} prompts of {prompt} tokens x {group}, completions of {mean} tokens on average, "
        f"at most {longest}; one update, {packed} tokens a pass\n\n"
        "model device       rollout   update       state        pass  cache"
    )
    lengths = quantiles(mean, longest, prompts * group)
    for name in ("0.5B", "1.5B", "7B"):
        c = shape(name, prompt + longest)
        state, kept = 18 * parameters(c)[0], activations(c, packed, recompute=True)
        cache = kv_bytes(c) * sum(prompt + n for n in lengths)
        for device, (flops, bandwidth, memory) in DEVICES.items():
            rollout = rollout_seconds(c, prompt, lengths, flops, bandwidth)
            update = update_seconds(c, prompt, lengths, flops, bandwidth)
            share = min(1, (memory - state - kept) / cache)
            room = f"{share:.0%} of {cache / GIB:.1f} GiB" if share > 0 else "too large"
            print(
                f"{name:6s}{device:11s}{rollout:7.1f} s{update:7.1f} s"
                f"{state / GIB:8.1f} GiB{kept / GIB:8.1f} GiB  {room}"
            )
