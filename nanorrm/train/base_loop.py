"""Pre-training of the toy base on documents of the embedded world."""

import time

import torch

from nanorrm import ranks
from nanorrm.config import UserError
from nanorrm.data import toy
from nanorrm.model.hf_folder import resolve_model
from nanorrm.model.transformer import Transformer
from nanorrm.runs import Interrupt, explain, interrupted
from nanorrm.train import packing
from nanorrm.train.trainer import Trainer


def train_base(cfg, run):
    """Pre-train the toy base on documents of the embedded world, loss on the completions only."""
    if ranks.world_size() > 1:
        raise UserError("the toy base is small: train it in one process")
    if cfg.dtype == "bfloat16":
        raise UserError("the toy base is small: it trains in fp32")
    tokenizer = toy.make_tokenizer()
    if cfg.model:
        model = Transformer.from_pretrained(resolve_model(cfg.model))
    else:
        model = Transformer(toy.model_config()).init_weights(cfg.seed)
    trainer = Trainer(model.to("cuda" if torch.cuda.is_available() else "cpu"), cfg)
    start = trainer.load(run)["step"] if cfg.resume else 0
    run.start(start, cfg.steps)
    with Interrupt() as interrupt, explain(run, cfg):
        for step in range(start + 1, cfg.steps + 1):
            began = time.perf_counter()
            rng = toy.stream_rng("base", cfg.seed, step)
            shares = cfg.solve, cfg.check, cfg.careless
            drawn = [toy.draw_document(rng, *shares) for _ in range(cfg.documents)]
            encode = tokenizer.encode_template
            samples = [packing.Sample(encode(given), encode(rest), {}) for given, rest in drawn]
            tokens = sum(len(sample.target) for sample in samples)

            def part(values, logp, entropy, tokens=tokens):
                return -(logp * values["weight"]).sum() / tokens, {}

            for sample in samples:
                sample.values["weight"] = [1.0] * len(sample.target)
            stats = trainer.step(trainer.batches(samples), part, trainer.rate(step))
            last = step == cfg.steps or ranks.any_rank(interrupt.asked)
            stats["step/seconds"] = seconds = time.perf_counter() - began
            stats["train/tokens_per_s"] = sum(map(len, samples)) / seconds
            line = f"loss {stats['loss']:.4f}  grad {stats['grad_norm']:.2f}  {seconds:.2f} s"
            run.log(step, stats, line, quiet=step % 50 and not last)
            if step % cfg.save_every == 0 or last:
                trainer.save(run, step, {})
            if last:
                break
    if ranks.any_rank(interrupt.asked):
        return interrupted(run, step)
    run.save_model(model, tokenizer)
    return "try it: python eval.py toy --model " + str(run.folder / "model")
