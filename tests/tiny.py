"""Tiny random models and prompts for the tests."""

import torch

from nanorrm.config import EngineConfig, ModelConfig
from nanorrm.engine import Engine
from nanorrm.model import Transformer

END_IDS = [260, 11, 33, 55, 77, 99, 121, 143]  # many, so that random models stop now and then


def config(**changes):
    """A grouped-head model of two layers that the toy tokenizer fits."""
    shape = {
        "vocab_size": 261,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "eos_token_id": END_IDS,
    }
    return ModelConfig(**{**shape, **changes})


def randomise(model, seed=0):
    """Random numbers in every parameter, norms and biases too, so that each of them matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if "norm" in name:
            p.data = 1 + 0.3 * noise
        elif p.dim() == 1 or "embed" in name:
            p.data = 0.5 * noise
        else:
            p.data = noise * p.shape[1] ** -0.5
    return model


def model(seed=0, **changes):
    return randomise(Transformer(config(**changes)), seed).eval()


def engine(tokenizer, model, **changes):
    changes = {"num_blocks": 1024, **changes}
    return Engine(model, tokenizer, EngineConfig(**changes))


def prompts(n, low=1, high=40, seed=0):
    """n random prompts of bytes, of mixed lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, size):
        return torch.randint(low, high, (size,), generator=generator).tolist()

    return [draw(0, 256, draw(low, high + 1, 1)[0]) for _ in range(n)]


def pack(sequences):
    """Lists of ids -> ids [T], cu_seqlens [B+1]."""
    bounds = torch.tensor([0] + [len(s) for s in sequences]).cumsum(0)
    return torch.tensor([token for s in sequences for token in s]), bounds
