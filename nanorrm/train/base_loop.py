"""Pre-training of the toy base on documents of the embedded world."""

import time

import torch

from nanorrm import ranks
from nanorrm.config import UserError
from nanorrm.data import toy
from nanorrm.model.hf_folder import resolve_model
from nanorrm.model.transformer import Transformer
from nanorrm.train.packing import Sample
from nanorrm.train.trainer import Trainer


def train_base(cfg, run):
    """Pre-train the toy base on documents of the embedded world, loss on the completions only."""
    if ranks.world_size() > 1 or cfg.dtype == "bfloat16":
        raise UserError("the toy base is small: it trains in one process, in fp32")
    tokenizer = toy.make_tokenizer()
    encode = tokenizer.encode_template
    if cfg.model:
        model = Transformer.from_pretrained(resolve_model(cfg.model))
    else:
        model = Transformer(toy.model_config()).init_weights(cfg.seed)
    trainer = Trainer(model.to("cuda" if torch.cuda.is_available() else "cpu"), cfg)
    start = trainer.load(run).get("step", 0)
    run.start(start)
    for step in run.steps(start):
        began = time.perf_counter()
        rng = toy.stream_rng("base", cfg.seed, step)
        shares = cfg.solve, cfg.check, cfg.careless
        documents = [map(encode, toy.draw_document(rng, *shares)) for _ in range(cfg.documents)]
        samples = [Sample(given, rest, {"weight": [1.0] * len(rest)}) for given, rest in documents]
        tokens = sum(len(sample.target) for sample in samples)
        for batch in trainer.batches(samples):
            logp, _ = trainer.logprobs(batch)  # [N]
            trainer.backward(-(logp * batch.values["weight"]).sum() / tokens)
        stats = trainer.step(step)
        last = run.is_last()
        stats["step/seconds"] = seconds = time.perf_counter() - began
        stats["train/tokens_per_s"] = sum(map(len, samples)) / seconds
        line = f"loss {stats['loss']:.4f}  grad {stats['grad_norm']:.2f}  {seconds:.2f} s"
        run.log(step, stats, line, quiet=step % 50 and not last)
        if step % cfg.save_every == 0 or last:
            trainer.save(run, step, {})
    if said := run.interrupted():
        return said
    run.finish(model, tokenizer)
    return f"try it: python eval.py toy --model {run.folder / 'model'}"
