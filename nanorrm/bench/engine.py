"""Measure the engine: `python -m nanorrm.bench engine`.

Rollouts as training has them: groups of 8 per prompt whose lengths vary a lot (lognormal, mean 60,
cut at 256, fixed in advance so that everyone generates the same). Only useful tokens count: what a
request asked for, not what a batch computes beside it. Everything runs in one process, one after
another on the same model, so that the ratios mean something on a noisy machine.
"""

import importlib
import itertools
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import kernels
from nanorrm.bench.tools import build, numbers, shape, wait, write_json
from nanorrm.config import EngineConfig, UserError
from nanorrm.data import toy
from nanorrm.engine.engine import Engine
from nanorrm.engine.sampling import SamplingParams
from nanorrm.train.packing import Sample, join


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


def workload(cfg, vocab):
    """(prompts, lengths of the 8 responses of each), the same for everyone."""
    generator = torch.Generator().manual_seed(0)
    sigma = 0.8
    mu = torch.tensor(cfg.mean).log() - sigma**2 / 2
    low = cfg.prompt_tokens // 2
    sizes = torch.randint(low, 3 * low + 1, (cfg.prompts,), generator=generator).tolist()
    words = min(vocab, 256)
    prompts = [torch.randint(words, (n,), generator=generator).tolist() for n in sizes]
    draws = torch.randn(cfg.prompts, 8, generator=generator) * sigma + mu
    return prompts, draws.exp().round().clamp(1, cfg.longest).long().tolist()


def time_ours(model, prompts, lengths, repeats, **settings):
    """Seconds (median) for all requests, and the engine's counters of the last run."""
    tokenizer = toy.make_tokenizer()
    engine = Engine(model, tokenizer, EngineConfig(**settings))
    seconds = []
    for repeat in range(repeats + 1):  # the first one warms up
        engine.sync()  # no prefix left over from the run before
        asked = [
            (prompt, SamplingParams(max_tokens=n, stop_token_ids=(), seed=8 * repeat + j))
            for prompt, group in zip(prompts, lengths)
            for j, n in enumerate(group)
        ]
        engine.report()
        began = time.perf_counter()
        out = engine.generate([p for p, _ in asked], [s for _, s in asked])
        seconds.append(time.perf_counter() - began)
        assert [len(c.ids) for (c,) in out] == [n for group in lengths for n in group]
    return sorted(seconds[1:])[repeats // 2], engine.stats


def to_transformers(model, folder):
    """The same weights as a transformers model."""
    from transformers import AutoModelForCausalLM

    model.save_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=model.head.dtype)
    theirs.generation_config.eos_token_id = None
    theirs.generation_config.pad_token_id = 0
    return theirs.to(model.device).eval()


@torch.inference_mode()
def time_generate(theirs, prompts, lengths, batch):
    """Seconds of transformers' generate in batches of requests sorted by prompt length."""
    asked = [(p, n) for p, group in zip(prompts, lengths) for n in group]
    asked.sort(key=lambda request: len(request[0]))
    began = time.perf_counter()
    for start in range(0, len(asked), batch):
        part = asked[start : start + batch]
        width = max(len(p) for p, _ in part)
        ids = torch.tensor([[0] * (width - len(p)) + p for p, _ in part])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p, _ in part])
        theirs.generate(
            ids.to(theirs.device),
            attention_mask=mask.to(theirs.device),
            do_sample=True,
            max_new_tokens=max(n for _, n in part),
        )
    return time.perf_counter() - began


def time_generate_batch(theirs, prompts, lengths):
    """Seconds of transformers' continuous batching, each request with its own length."""
    from transformers import GenerationConfig

    longest = max(map(max, lengths))
    config = GenerationConfig(
        max_new_tokens=longest, do_sample=True, eos_token_id=-1, pad_token_id=0
    )
    manager = theirs.init_continuous_batching(generation_config=config)
    asked = [(p, n) for p, group in zip(prompts, lengths) for n in group]
    began = time.perf_counter()
    manager.start()
    try:
        for prompt, n in asked:
            manager.add_request(prompt, max_new_tokens=n)
        for _ in asked:
            result = manager.get_result(timeout=600)
            if result is None:
                raise RuntimeError("no result came")
    finally:
        manager.stop(block=True)
    return time.perf_counter() - began


def time_vllm(package, model, prompts, lengths):
    """Seconds of vLLM or nano-vllm, which shares its interface."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "model", toy.make_tokenizer())
        llm = package.LLM(str(Path(folder) / "model"))
        asked = [(p, n) for p, group in zip(prompts, lengths) for n in group]
        params = [package.SamplingParams(max_tokens=n, ignore_eos=True) for _, n in asked]
        began = time.perf_counter()
        llm.generate([p for p, _ in asked], params)
        return time.perf_counter() - began


def copy_bandwidth(device):
    """Bytes per second of a large copy, read and written bytes both counted."""
    x = torch.empty(2**30 if device == "cuda" else 2**27, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    times = []
    for _ in range(8):
        began = time.perf_counter()
        y.copy_(x)
        wait(device)
        times.append(time.perf_counter() - began)
    return 2 * x.numel() / sorted(times)[3]


def time_decode(model, batch, context, steps=48):
    """Decoded tokens per second of `batch` sequences of about `context` tokens, prompts done."""
    device = model.device.type
    config = EngineConfig(max_batch=batch, num_blocks=batch * (-(-(context + 128) // 16)))
    engine = Engine(model, toy.make_tokenizer(), config)
    generator = torch.Generator().manual_seed(0)
    for seed in range(batch):
        prompt = torch.randint(256, (context,), generator=generator).tolist()
        engine.add(prompt, SamplingParams(max_tokens=120, stop_token_ids=(), seed=seed))
    while engine.scheduler.unfinished:
        engine.step()
    engine.step()  # on a GPU: records the graph
    wait(device)
    first, began = int(engine.rows.lengths[0]), time.perf_counter()
    while engine.rows.lengths[0] < first + steps:
        engine.step()
    wait(device)
    return batch * int(engine.rows.lengths[0] - first) / (time.perf_counter() - began)


def agreement(model, prompts):
    """(entropy, RMS difference) in nats of sampler and trainer log-probs on the same tokens, at a
    temperature where random weights are about as sure as a trained model is."""
    engine, low, high = Engine(model, toy.make_tokenizer()), 0.001, 1.0
    for _ in range(12):
        temperature = (low * high) ** 0.5
        params = SamplingParams(temperature=temperature, max_tokens=48, stop_token_ids=())
        out = engine.generate(prompts[:16], params)
        pairs = zip(prompts, out)
        batch = join([Sample(p, c.ids, {"logp": c.logprobs}) for p, (c,) in pairs], model.device)
        with torch.no_grad():
            hidden = model(batch.ids, batch.cu_seqlens)[batch.rows]
            logp, entropy = kernels.logprob(hidden, model.head, batch.targets, temperature)
        mean = entropy.mean().item()
        if 0.3 <= mean <= 1:
            break
        low, high = (temperature, high) if mean < 0.3 else (low, temperature)
    gap = logp - batch.values["logp"]
    return mean, gap.square().mean().sqrt().item()


def identical(model, prompts):
    """Share of completions that are the same, id for id, alone and in a batch."""
    params = SamplingParams(max_tokens=48, stop_token_ids=())
    together = Engine(model, toy.make_tokenizer()).generate(prompts, params)
    alone = Engine(model, toy.make_tokenizer(), EngineConfig(max_batch=1))
    few = alone.generate(prompts[:8], params)
    return sum(a[0].ids == b[0].ids for a, b in zip(few, together)) / len(few)


def bench_engine(cfg):
    """Print one line per model and way of generating; ratios are to the best peer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    names = cfg.models or ("0.5B,1.5B,7B" if device == "cuda" else "toy,10M")
    contexts = cfg.contexts or ("1024,4096" if device == "cuda" else "128,512")
    rows = []
    about = (
        torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    )
    bandwidth = copy_bandwidth(device)
    print(f"{device}, {about}, torch {torch.__version__}, copy {bandwidth / 1e9:.1f} GB/s")
    for name in names.split(","):
        model = build(name, device)
        prompts, lengths = workload(cfg, model.config.vocab_size)
        useful = sum(map(sum, lengths))
        size = sum(p.numel() for p in model.parameters())
        print(f"\n{name}: {size / 1e6:.2f}M parameters, {useful} useful tokens")

        def line(how, seconds, note="", model=name, useful=useful):
            rows.append(
                {"model": model, "how": how, "tokens_per_s": useful / seconds, "note": note}
            )
            print(f"  {how:34s} {useful / seconds:10.0f} tok/s  {note}", flush=True)

        seconds, stats = time_ours(model, prompts, lengths, cfg.repeats)
        line(
            "nanorrm",
            seconds,
            f"{stats['steps']} steps, {stats['host_seconds'] / stats['seconds']:.0%} on the host",
        )
        unshared, _ = time_ours(model, prompts, lengths, cfg.repeats, prefix_cache=False)
        line("nanorrm, prompts not shared", unshared)
        if cfg.peers:
            peers(cfg, model, prompts, lengths, line)
            theirs = [r for r in rows if r["model"] == name and "transformers" in r["how"]]
            if theirs:
                best = max(r["tokens_per_s"] for r in theirs)
                print(f"  nanorrm / best of transformers: {useful / seconds / best:.1f}x")
        entropy, rms = agreement(model, prompts)
        print(f"  sampler against trainer: RMS {rms:.2g} nats at entropy {entropy:.2f}")
        print(f"  identical completions alone and in a batch: {identical(model, prompts):.0%}")
        kv = 2 * model.config.num_hidden_layers * model.config.num_key_value_heads
        kv *= model.config.head_dim * model.head.element_size()  # bytes per token
        weights = size * model.head.element_size()
        for batch, context in itertools.product(numbers(cfg.decode), numbers(contexts)):
            speed = time_decode(model, batch, context)
            roof = batch / ((weights + batch * context * kv) / bandwidth)
            note = f"{speed / roof:.1%} of the roofline, {roof:.0f}"
            line(f"decode, batch {batch}, context {context}", useful / speed, note)
    if cfg.json:
        write_json(cfg.json, rows)


def peers(cfg, model, prompts, lengths, line):
    """Run what is installed of the peers; name what is not."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            theirs = to_transformers(model, Path(folder) / "model")
    except ImportError:
        print("  transformers: not installed")
        return
    times = {b: time_generate(theirs, prompts, lengths, b) for b in numbers(cfg.batches)}
    best = min(times, key=times.get)
    line("transformers generate", times[best], f"batch {best}, the best of {cfg.batches}")
    try:
        line("transformers generate_batch", time_generate_batch(theirs, prompts, lengths))
    except Exception as error:
        print(f"  transformers generate_batch: failed ({type(error).__name__}: {error})")
    for package in ("vllm", "nanovllm"):
        try:
            seconds = time_vllm(importlib.import_module(package), model, prompts, lengths)
            line(package, seconds)
        except ImportError:
            print(f"  {package}: not installed")
        except Exception as error:
            print(f"  {package}: failed ({type(error).__name__}: {error})")
