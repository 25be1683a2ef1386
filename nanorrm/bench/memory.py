"""Which model fits which GPUs: `python -m nanorrm.bench memory`, a table from byte counts.

Training keeps, sharded over W GPUs, fp32 master weights, gradients and the two moments of AdamW:
16 bytes a parameter. On every GPU: the engine's own bf16 copy of all weights (2 bytes), the layers
that FSDP has gathered, and the larger of a micro-batch's activations and the rollouts' cache, which
take turns with --release-cache. There is no tensor parallelism: the engine's copy has to fit.
"""

from dataclasses import dataclass

import torch

from nanorrm.config import UserError, at_least
from nanorrm.model.architectures import ModelConfig
from nanorrm.model.transformer import Transformer

GB = 1e9

# (C, width of the feed-forward layer, layers, Hq, Hkv, V, tied, biases on q k v), head size 128; as
# in each model's config.json
MODELS = {
    "R1-Distill-Qwen-1.5B": (1536, 8960, 28, 12, 2, 151936, False, True),
    "RRM-7B": (3584, 18944, 28, 28, 4, 152064, False, True),
    "Llama-3.1-8B": (4096, 14336, 32, 32, 8, 128256, False, False),
    "Qwen3-8B": (4096, 12288, 36, 32, 8, 151936, False, False),
    "R1-Distill-Qwen-14B": (5120, 13824, 48, 40, 8, 152064, False, True),
    "RRM-32B": (5120, 27648, 64, 40, 8, 152064, False, True),
}


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


def model_config(name):
    """The ModelConfig of one of MODELS."""
    hidden, inter, layers, heads, kv, vocab, tied, bias = MODELS[name]
    return ModelConfig(
        vocab, hidden, inter, layers, heads, kv, 128, 16,
        tie_word_embeddings=tied, attention_bias=bias, qk_norm=name.startswith("Qwen3"),
    )  # fmt: skip


def parameters(config):
    """(parameters of the whole model, of one layer, of all that is in no layer)."""
    with torch.device("meta"):
        model = Transformer(config)
    total = sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    return total, layer, total - layer * config.num_hidden_layers


def activations(config, tokens, recompute):
    """Bytes that the bf16 forward pass of the kernels keeps for the backward pass.

    A layer's: the sums that both norms took and what they gave, queries, keys, values and output of
    the attention, gate, up and their product. With recompute: each layer's two inputs, and all this
    for one layer at a time.
    """
    c = config
    heads = (2 * c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    layer = 2 * (4 * c.hidden_size + heads + 3 * c.intermediate_size)  # bf16
    layer += 4 * (c.num_attention_heads + 2)  # fp32: the softmax's log-sums, the norms' scales
    ends = 4 * c.hidden_size * 2
    if recompute:
        return tokens * (c.num_hidden_layers * 2 * c.hidden_size * 2 + layer + ends)
    return tokens * (c.num_hidden_layers * layer + ends)


def cache_bytes(config, tokens):
    """Bytes of bf16 keys and values of so many tokens."""
    return tokens * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


def training(config, gpus, tokens, context, at_once, recompute=True):
    """{part: bytes on each GPU} of a GRPO step; the activations and the cache take turns."""
    total, layer, rest = parameters(config)
    # gathered in bf16: what is in no layer, and two layers (one runs, the next one arrives); their
    # gradients in fp32 on the way to the shards
    gathered = 2 * (rest + 2 * layer) + 4 * (rest + layer)
    passes = activations(config, tokens, recompute)
    working = activations(config, tokens, False) / config.num_hidden_layers  # gradients of a layer
    return {
        "optimizer": 16 * total / gpus,
        "engine": 2 * total,
        "gathered": gathered,
        "turns": max(passes + working, cache_bytes(config, context * at_once)),
    }


def table(cfg):
    """One row a model: fewest GPUs that train it, bytes there, and what judging takes."""
    rows = []
    room = (cfg.gpu_gb - cfg.reserve_gb) * GB
    for name in MODELS:
        config = model_config(name)
        total = parameters(config)[0]
        row = {"model": name, "parameters": total, "train_gpus": None}
        for gpus in sorted(map(int, cfg.gpus.split(","))):
            parts = training(config, gpus, cfg.micro_tokens, cfg.context, cfg.at_once)
            row |= {"parts": parts, "train_bytes": sum(parts.values())}
            if row["train_bytes"] <= room:
                row["train_gpus"] = gpus
                break
        per_sequence = cache_bytes(config, cfg.context)
        row |= {"weights_bytes": 2 * total, "cache_bytes_per_sequence": per_sequence}
        row["judged_at_once"] = max(0, int((room - 2 * total) // per_sequence))
        rows.append(row)
    return rows


def show(cfg):
    """Print the table as Markdown."""
    print(
        f"GPUs of {cfg.gpu_gb:g} GB, {cfg.reserve_gb:g} GB of them kept free; "
        f"{cfg.micro_tokens} tokens a micro-batch, recomputation; a cache for {cfg.at_once} "
        f"sequences of {cfg.context} tokens on each GPU while it samples.\n"
    )
    columns = ["model", "parameters", "GPUs to train", "masters and AdamW", "engine", "gathered"]
    columns += ["activations or cache", "in all, GB", "to judge: weights, GB", "sequences at once"]
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in table(cfg):
        cells = [row["model"], f"{row['parameters'] / 1e9:.2f}B", row["train_gpus"]]
        cells[2] = cells[2] or f"more than {cfg.gpus.split(',')[-1]}"
        cells += [f"{x / GB:.1f}" for x in (*row["parts"].values(), row["train_bytes"])]
        cells += [f"{row['weights_bytes'] / GB:.1f}", row["judged_at_once"] or "does not fit"]
        print("| " + " | ".join(map(str, cells)) + " |")
