"""A stage's weights and engine, opened in the right dtype and sharded where it must be."""

import torch

from nanorrm import ranks
from nanorrm.engine.engine import Engine
from nanorrm.model.hf_folder import fill, resolve_model
from nanorrm.model.tokenizer import Tokenizer
from nanorrm.model.transformer import Transformer
from nanorrm.train.trainer import Trainer


def open_trainer(cfg):
    """(Trainer, the Engine that samples from its model) of a RolloutConfig, on the GPU if any."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trainer = Trainer(open_weights(cfg.model, cfg, device), cfg)
    engine = open_engine(cfg, trainer.model, device)
    if cfg.release_cache:
        engine.sleep()
    return trainer, engine


def open_weights(name, cfg, device, train=True):
    """A model folder -> the Transformer to be trained, or a frozen reference (train=False).

    Weights to be trained are fp32. They are sharded over the ranks where there are several, and
    where the compute dtype is another (a shard of one: the masters stay beside it); then no rank
    ever holds more than its parts and one whole tensor.
    """
    dtype = compute_dtype(cfg, device)
    folder = resolve_model(name)
    stored = torch.float32 if train else dtype
    if ranks.world_size() > 1 or stored != dtype:
        model = ranks.shard(Transformer.skeleton(folder, stored), dtype, device)
        fill(model.materialise(device), folder, ranks.put_part)
    else:
        model = Transformer.from_pretrained(folder, stored, device)
    return model.requires_grad_(train)


def compute_dtype(cfg, device):
    """The dtype of forward and backward passes, and of the engine."""
    auto = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    return auto if cfg.dtype == "auto" else getattr(torch, cfg.dtype)


def open_engine(cfg, model, device):
    """The engine that samples from `model`: its weights themselves, or a copy where the model is
    sharded (which `Engine.sync` brings up to date)."""
    folder = resolve_model(cfg.model)
    if ranks.is_sharded(model):
        dtype = compute_dtype(cfg, device)
        model = Transformer.from_pretrained(folder, dtype, device).requires_grad_(False)
    return Engine(model, Tokenizer.from_pretrained(folder), cfg.engine)
