"""Measure the engine: rollouts as training has them, beside whatever peers are installed.

Groups of 8 per prompt whose lengths vary a lot (lognormal, mean 60, cut at 256, fixed in advance so
that everyone generates the same). Only useful tokens count: what a request asked for, not what a
batch computes beside it.
"""

import importlib
import math
import statistics
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch

from nanorrm.bench.estimate import kv_bytes
from nanorrm.bench.tools import build, numbers, shape, start, tidy, write_results
from nanorrm.config import EngineConfig, UserError
from nanorrm.data import toy
from nanorrm.engine.cache import blocks_for
from nanorrm.engine.engine import Engine
from nanorrm.engine.sampling import SamplingParams
from nanorrm.train.packing import Sample, join

TOKENIZER = toy.make_tokenizer()  # no text is read; the ids are any model's


@dataclass
class EngineBench:
    """Rollout throughput beside installed peers, in one run."""

    models: str = ""  # shapes, comma-separated; empty: toy,10M on a CPU, 0.5B,1.5B,7B on a GPU
    prompts: int = 48  # prompts, each with a group of 8
    prompt_tokens: int = 64  # length of a prompt, about
    mean: float = 60.0  # mean of the response lengths, tokens
    longest: int = 256  # responses are cut there
    batches: str = "32,64,128"  # batch sizes transformers may choose from; its best one counts
    decode: str = "64,256"  # batch sizes of the pure decode benchmark
    contexts: str = ""  # its context lengths, tokens; empty: 128,512 on a CPU, 1024,4096 on a GPU
    peers: bool = True  # also run transformers' generate and generate_batch
    repeats: int = 3  # runs of ours; the median counts
    threads: int = 0  # CPU threads of torch; 0: its own choice
    json: str | None = None  # also write the rows to this file

    def __post_init__(self):
        for name in self.models.split(",") if self.models else ():
            shape(name)
        for name in ("batches", "decode", "contexts"):
            if any(number < 1 for number in numbers(getattr(self, name))):
                raise UserError(f"{name} = {getattr(self, name)!r}: each should be at least 1")


def bench_engine(cfg):
    """Print one line per model and way of generating; ratios are to the best peer."""
    device, about, ceilings = start(cfg.threads)
    rows = []
    for name in (cfg.models or ("toy,10M" if device == "cpu" else "0.5B,1.5B,7B")).split(","):
        for how, speed, note in measured(cfg, name, device, ceilings["copy"]):
            if speed is None:
                print(f"  {how}: {note}", flush=True)
                continue
            rows.append({"model": name, "how": how, "tokens_per_s": speed, "note": note})
            print(f"  {how:34s} {speed:10.0f} tok/s  {note}", flush=True)
            write_results(cfg.json, [row | {"device": about} for row in rows])


def measured(cfg, name, device, bandwidth):
    """Yield (what, tokens per second, note), one after the other; no speed: the note tells."""
    tidy(device)
    model, asked = build(name, device), workload(cfg)
    useful, size = sum(n for _, n in asked), sum(p.numel() for p in model.parameters())
    print(f"\n{name}: {size / 1e6:.2f}M parameters, {useful} useful tokens")
    seconds, report = time_ours(model, asked, cfg.repeats)
    steps, host = report["engine/steps"], report["engine/host_share"]
    yield "nanorrm", useful / seconds, f"{steps} steps, {host:.0%} on the host"
    unshared, _ = time_ours(model, asked, cfg.repeats, prefix_cache=False)
    yield "nanorrm, prompts not shared", useful / unshared, ""
    theirs = []
    for how, spent, note in time_peers(cfg, model, asked) if cfg.peers else ():
        if spent and "transformers" in how:
            theirs.append(spent)
        yield how, spent and useful / spent, note
    if theirs:
        yield "nanorrm / best of transformers", None, f"{min(theirs) / seconds:.1f}x"
    prompts = [prompt for prompt, _ in asked[::8]]
    entropy, rms = agreement(model, prompts)
    yield "sampler against trainer", None, f"RMS {rms:.2g} nats at entropy {entropy:.2f}"
    alike = identical(model, prompts)
    yield "identical completions alone and in a batch", None, f"{alike:.0%}"
    width = model.head.element_size()
    contexts = numbers(cfg.contexts or ("128,512" if device == "cpu" else "1024,4096"))
    for batch, context in product(numbers(cfg.decode), contexts):
        tidy(device)
        how = f"decode, batch {batch}, context {context}"
        traffic = size * width + batch * context * kv_bytes(model.config, width)
        roof = batch * bandwidth / traffic
        try:
            speed = time_decode(model, batch, context)
            yield how, speed, f"{speed / roof:.1%} of the roofline, {roof:.0f}"
        except torch.OutOfMemoryError:
            yield how, None, "does not fit"


def workload(cfg):
    """Requests (prompt ids, tokens to generate), 8 for each prompt; the same for everyone."""
    generator = torch.Generator().manual_seed(0)
    low, sigma = cfg.prompt_tokens // 2, 0.8
    sizes = torch.randint(low, 3 * low + 1, (cfg.prompts,), generator=generator).tolist()
    prompts = [torch.randint(256, (n,), generator=generator).tolist() for n in sizes]
    draws = torch.randn(cfg.prompts, 8, generator=generator) * sigma
    lengths = (draws + math.log(cfg.mean) - sigma**2 / 2).exp().round().clamp(1, cfg.longest)
    return [(p, n) for p, group in zip(prompts, lengths.long().tolist()) for n in group]


# -- ours


def time_ours(model, asked, repeats, **settings):
    """Seconds (median) for all requests, and the engine's report on the last run."""
    tidy(model.device.type)
    engine = Engine(model, TOKENIZER, EngineConfig(**settings))
    prompts = [prompt for prompt, _ in asked]
    params = [
        SamplingParams(max_tokens=n, stop_token_ids=(), seed=i % 8)
        for i, (_, n) in enumerate(asked)
    ]
    seconds = []
    for _ in range(repeats + 1):  # the first one warms up
        engine.sync()  # no prefix left over from the run before
        engine.report()
        began = time.perf_counter()
        out = engine.generate(prompts, params)
        seconds.append(time.perf_counter() - began)
    assert [len(c.ids) for (c,) in out] == [n for _, n in asked]
    return statistics.median(seconds[1:]), engine.report()


def time_decode(model, batch, context, steps=48):
    """Decoded tokens per second of `batch` sequences behind prompts of `context` tokens.

    The prompts lie in the prefix cache, and what one token after them takes does not count.
    """
    blocks = batch * (-(-(context + steps + 1) // 16) + 1)
    engine = Engine(model, TOKENIZER, EngineConfig(max_batch=batch, num_blocks=blocks))
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(256, (batch, context), generator=generator).tolist()
    seconds = {}
    for tokens in (1, steps + 1) * 2:  # the first round fills the cache and records the graph
        params = SamplingParams(max_tokens=tokens, stop_token_ids=())
        began = time.perf_counter()
        engine.generate(prompts, params)
        seconds[tokens] = time.perf_counter() - began
    return batch * steps / (seconds[steps + 1] - seconds[1])


def agreement(model, prompts):
    """(entropy, RMS difference) in nats of sampler and trainer log-probs on the same tokens, at a
    temperature where random weights are about as sure as a trained model is."""
    engine, temperature, mean = Engine(model, TOKENIZER), 1.0, math.inf
    while mean > 1:
        temperature *= 0.7
        params = SamplingParams(temperature=temperature, max_tokens=48, stop_token_ids=())
        pairs = zip(prompts, engine.generate(prompts[:16], params))
        b = join([Sample(p, c.ids, {"logp": c.logprobs}) for p, (c,) in pairs], model.device)
        with torch.no_grad():
            logp, entropy = model.logprobs(b.ids, b.cu_seqlens, b.rows, b.targets, temperature)
        mean = entropy.mean().item()
    return mean, (logp - b.values["logp"]).square().mean().sqrt().item()


def identical(model, prompts):
    """Share of completions that are the same, id for id, alone and in a batch."""
    engine, params = Engine(model, TOKENIZER), SamplingParams(max_tokens=48, stop_token_ids=())
    together = engine.generate(prompts, params)[:8]
    engine.sync()  # the prompts are computed again
    alone = [engine.generate([prompt], params)[0] for prompt in prompts[:8]]
    return statistics.fmean(a.ids == b.ids for (a,), (b,) in zip(alone, together))


# -- peers: (folder of the model, requests, cfg) -> seconds, note


def to_transformers(folder):
    """The same weights as a transformers model that no token stops."""
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@torch.inference_mode()
def time_generate(folder, asked, cfg):
    """transformers' generate, in batches of requests sorted by prompt length; the best size."""
    model, times = to_transformers(folder), {}
    asked = sorted(asked, key=lambda request: len(request[0]))
    for batch in numbers(cfg.batches):
        began = time.perf_counter()
        for first in range(0, len(asked), batch):
            part = asked[first : first + batch]
            width = max(len(p) for p, _ in part)
            ids = torch.tensor([[0] * (width - len(p)) + p for p, _ in part])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p, _ in part])
            model.generate(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                do_sample=True,
                max_new_tokens=max(n for _, n in part),
            )
        times[batch] = time.perf_counter() - began
    best = min(times, key=times.get)
    return times[best], f"batch {best}, the best of {cfg.batches}"


def time_generate_batch(folder, asked, cfg):
    """transformers' continuous batching, each request with its own length."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model, longest = to_transformers(folder), max(n for _, n in asked)
    settings = {"do_sample": True, "eos_token_id": -1, "pad_token_id": 0}
    config = GenerationConfig(max_new_tokens=longest, **settings)
    # a cache for all requests at once: by itself it takes what memory there is
    blocks = sum(blocks_for(len(prompt) + n, 256) for prompt, n in asked)
    cache = ContinuousBatchingConfig(page_size=256, num_blocks=blocks)
    manager = model.init_continuous_batching(
        generation_config=config, continuous_batching_config=cache
    )
    began = time.perf_counter()
    manager.start()
    try:
        for prompt, n in asked:
            manager.add_request(prompt, max_new_tokens=n)
        for _ in asked:
            if manager.get_result(timeout=600) is None:
                raise RuntimeError("no result came")
    finally:
        manager.stop(block=True)
    return time.perf_counter() - began, ""


def time_vllm(name, folder, asked, cfg):
    """vLLM, or nano-vllm, which shares its interface."""
    package = importlib.import_module(name)
    llm = package.LLM(folder, gpu_memory_utilization=0.7)  # our weights lie there, too
    prompts, more = [prompt for prompt, _ in asked], {}
    if name == "vllm":
        prompts, more = [{"prompt_token_ids": p} for p in prompts], {"detokenize": False}
    params = [package.SamplingParams(max_tokens=n, ignore_eos=True, **more) for _, n in asked]
    began = time.perf_counter()
    llm.generate(prompts, params)
    return time.perf_counter() - began, ""


PEERS = {
    "transformers generate": time_generate,
    "transformers generate_batch": time_generate_batch,
    "vllm": partial(time_vllm, "vllm"),
    "nanovllm": partial(time_vllm, "nanovllm"),
}


def time_peers(cfg, model, asked):
    """Yield (name, seconds, note) of each peer; of one that is missing or fails, None and why."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, TOKENIZER)
        for name, peer in PEERS.items():
            tidy(model.device.type)
            seconds = None
            try:
                seconds, note = peer(folder, asked, cfg)
            except ImportError:
                note = "not installed"
            except Exception as error:
                note = f"failed ({type(error).__name__}: {error})"
            yield name, seconds, note
