"""Measure the training: the step over model shapes, then one whole GRPO step beside TRL's.

Both sides of the whole step start from the same folder of random weights, in which the end token
has the same chance everywhere, so that lengths are geometric and cut at a limit: a few completions
are many times longer than the mean, as in reasoning. Prompts, group size, reward, loss (the mean
over all tokens, one update) and precision are the same; steps take turns in one process.
"""

import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels.bench.measure import ceilings
from nanorrm import ranks
from nanorrm.bench.estimate import estimate, stop_chance, training_flops
from nanorrm.bench.tools import Clock, PeakMemory, numbers, shape, write_json
from nanorrm.bench.trl import TRLSteps, installed
from nanorrm.config import JudgeConfig, UserError, at_least, one_of
from nanorrm.data import toy
from nanorrm.engine.sampling import SamplingParams
from nanorrm.model.transformer import Transformer
from nanorrm.train import grpo
from nanorrm.train.open import open_engine, open_weights
from nanorrm.train.packing import Sample
from nanorrm.train.trainer import Trainer, policy_update

PARTS = ("rollout", "reward", "log-prob", "update", "other")  # of a whole step


@dataclass
class TrainBench:
    """The training step over model shapes, and one whole GRPO step beside TRL's, in one run."""

    shapes: str = ""  # of the training step; empty: toy,10M on a CPU, 0.5B,1.5B on a GPU; none: -
    tokens: int = 0  # packed tokens of it; 0: 4096 on a CPU, 16384 on a GPU
    length: int = 0  # tokens per sequence of it; 0: 256 on a CPU, 8192 on a GPU
    recompute: bool = False  # keep only the layers' inputs for the backward pass
    whole: str = ""  # shapes of the whole step; empty: toy on a CPU, 1.5B on a GPU; none: -
    cases: str = ""  # mean:limit of its completions; empty: 22:48,60:256, on a GPU 2000:8192
    prompts: int = 0  # prompts of a whole step; 0: 48 on a CPU, 16 on a GPU
    group: int = 8  # completions per prompt
    prompt_tokens: int = 32  # length of a prompt
    trl: str = "auto"  # run TRL's step as well: yes, no, auto (on a CPU, where it is installed)
    micro_tokens: int = 0  # tokens per pass of ours; 0: as train.py
    micro: str = "384,96,32"  # completions per pass TRL may choose from; its best counts
    repeats: int = 5  # measured steps, after one to warm up; the median counts
    estimate: bool = False  # no measurement: what the roofline allows on some GPUs
    threads: int = 0  # CPU threads of torch; 0: its own choice
    json: str | None = None  # also write the results to this file

    def __post_init__(self):
        at_least(self, 0, "tokens", "prompts", "threads", "micro_tokens")
        at_least(self, 1, "prompt_tokens", "repeats")
        at_least(self, 2, "group")
        one_of("trl", self.trl, ("auto", "yes", "no"))
        if self.length and self.length < 8:
            raise UserError(f"length = {self.length} should be at least 8")
        for chosen in (self.shapes, self.whole):
            for name in names(chosen) if chosen else ():
                shape(name)
        if self.cases:
            cases(self.cases)
        numbers(self.micro)


def bench_train(cfg):
    """Print what was measured, and as the last line all of it as JSON."""
    if cfg.estimate:
        estimate()
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    small = device == "cpu"
    about = f"{torch.get_num_threads()} threads" if small else torch.cuda.get_device_name()
    ceiling = ceilings(device, 1.0)["matmul"]
    precision = "fp32" if small else "bf16"
    print(
        f"{device}, {about}, torch {torch.__version__}, "
        f"{precision} product {ceiling / 1e12:.4g} TFLOP/s"
    )
    steps = []
    print(f"\n{'training step':14s}  params  tokens      tok/s    MFU      peak")
    for name in names(cfg.shapes or ("toy,10M" if small else "0.5B,1.5B")):
        steps.append(training_step(name, cfg, device, ceiling))
    wholes = []
    for name in names(cfg.whole or ("toy" if small else "1.5B")):
        for case in cases(cfg.cases or ("22:48,60:256" if small else "2000:8192")):
            wholes.append(whole_step(name, *case, cfg, device))
    result = {
        "device": about,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "ceiling_flops": ceiling,
        "training_step": steps,
        "whole_step": wholes,
    }
    if cfg.json:
        write_json(cfg.json, result)
    print(json.dumps(result))


def names(text):
    """ "toy,10M" -> its words; "-" -> none."""
    return [] if text == "-" else text.split(",")


def cases(text):
    """ "22:48,60:256" -> [(22, 48), (60, 256)]: mean and limit of the lengths, tokens."""
    found = [numbers(case.replace(":", ",")) for case in text.split(",")]
    if not all(len(case) == 2 and 1 < case[0] < case[1] for case in found):
        raise UserError(f"cases = {text!r} should be mean:limit,... with 1 < mean < limit")
    return [tuple(case) for case in found]


# -- the training step


def training_step(name, cfg, device, ceiling):
    """One row: packed sequences through forward, backward and AdamW, as `Trainer.step` has it."""
    small = device == "cpu"
    tokens = cfg.tokens or (4096 if small else 16384)
    length = min(tokens, cfg.length or (256 if small else 8192))
    run = JudgeConfig(learning_rate=1e-6, micro_tokens=tokens, recompute=cfg.recompute)
    model = Transformer(shape(name)).init_weights(0).to(device)
    if not small:
        ranks.shard(model, torch.bfloat16)  # as open_weights: bf16 beside fp32 masters
    trainer = Trainer(model, run)
    generator = torch.Generator().manual_seed(0)
    asked = length // 8  # an eighth is prompt
    targets, samples = length - asked + 1, []
    weight = {"weight": [1 / (tokens // length * targets)] * targets}
    for _ in range(tokens // length):
        ids = torch.randint(model.config.vocab_size, (length + 1,), generator=generator).tolist()
        samples.append(Sample(ids[:asked], ids[asked:], weight))

    clock, memory, seconds = Clock(device), PeakMemory(device), []
    for _ in range(cfg.repeats + 1):
        with clock.part("step"):
            for batch in trainer.batches(samples):
                logp, _ = trainer.logprobs(batch)
                old, adv, weight = logp.detach(), torch.ones_like(logp), batch.values["weight"]
                trainer.backward(*grpo.policy_loss(logp, old, old, adv, weight, run.loss))
            trainer.step(1)
        seconds.append(clock.read()["step"])
    median, peak = statistics.median(seconds[1:]), memory.read()
    used = sum(map(len, samples))
    flops = training_flops(model.config, [length] * len(samples), targets * len(samples))
    row = {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": used,
        "length": length,
        "tokens_per_s": used / median,
        "mfu": flops / median / ceiling,
        "peak_bytes": peak,
    }
    size = "?" if peak is None else f"{peak / 2**30:.2f} GiB"
    print(
        f"  {name:12s}{row['parameters'] / 1e6:7.1f}M {used:7d} {row['tokens_per_s']:10.0f} "
        f"{row['mfu']:6.1%} {size:>9s}  sequences of {length}",
        flush=True,
    )
    return row


# -- a whole GRPO step


def whole_step(name, mean, longest, cfg, device):
    """One table: our step split into its parts, beside TRL's where that is installed."""
    prompts = cfg.prompts or (48 if device == "cpu" else 16)
    beside = cfg.trl == "yes" or (cfg.trl == "auto" and device == "cpu" and installed())
    texts = random_texts(prompts, cfg.prompt_tokens)
    with tempfile.TemporaryDirectory() as folder:
        context = max(8192, cfg.prompt_tokens + longest)
        save_model(Path(folder), shape(name, context), stop_chance(mean, longest), device)
        run = JudgeConfig(
            model=folder,
            prompts=prompts,
            group=cfg.group,
            max_tokens=longest,
            learning_rate=1e-6,
            warmup_steps=0,
            micro_tokens=cfg.micro_tokens,
            recompute=cfg.recompute,
        )
        ours = OurSteps(run, texts, device)
        print(
            f"\nwhole GRPO step, {name}: {prompts} prompts x {cfg.group}, "
            f"completions of {mean} tokens on average, at most {longest}"
        )
        trl = None
        if beside:
            micro = [m for m in numbers(cfg.micro) if (prompts * cfg.group) % m == 0]
            if not micro:
                raise UserError(
                    f"micro = {cfg.micro!r}: none divides the {prompts * cfg.group} completions"
                )
            trl = best_trl(run, texts, micro, device, cfg.repeats, ours)
        else:
            for _ in range(cfg.repeats + 1):
                ours.step()
    row = {"model": name, "prompts": prompts, "group": cfg.group, "limit": longest}
    row["nanorrm"] = report("nanorrm", ours.steps[1:])
    if trl:
        row["trl"] = report(f"TRL, {trl.micro} a pass", trl.steps[1:])
        row["ratio"] = row["trl"]["seconds"] / row["nanorrm"]["seconds"]
        apart = row["trl"]["mean_length"] / row["nanorrm"]["mean_length"] - 1
        row["lengths_apart"] = apart
        print(f"  TRL / nanorrm: {row['ratio']:.2f}x in time; TRL's completions {apart:+.1%} long")
        if abs(apart) > 0.05:
            print("  the lengths differ by more than 5%: take more --repeats")
    return row


def best_trl(run, texts, micro, device, repeats, ours):
    """TRL's steps at its best number of completions per pass, in turns with ours."""
    tried = {}
    for m in micro if len(micro) > 1 else ():
        tries = TRLSteps(run, texts, rewards_of, m, device, 2)
        tries.run()
        tried[m] = tries.steps[-1]["seconds"]
    best = min(tried, key=tried.get, default=micro[0])
    trl = TRLSteps(run, texts, rewards_of, best, device, repeats + 1)
    trl.run(ours.step)
    return trl


def report(who, steps):
    """Print and return the median step: its seconds in all and by part, and its lengths."""
    row = {"seconds": statistics.median(s["seconds"] for s in steps)}
    row["all_seconds"] = [s["seconds"] for s in steps]
    row["parts"] = {p: statistics.median(s["parts"].get(p, 0.0) for s in steps) for p in PARTS}
    row["mean_length"] = statistics.fmean(n for s in steps for n in s["lengths"])
    row["longest"] = max(n for s in steps for n in s["lengths"])
    tokens = sum(n for s in steps for n in s["lengths"])
    row["tokens_per_s"] = tokens / sum(row["all_seconds"])
    parts = "  ".join(f"{name} {seconds:.3f}" for name, seconds in row["parts"].items())
    print(
        f"  {who:18s}{row['seconds']:8.3f} s  {parts}  "
        f"lengths {row['mean_length']:.1f}, at most {row['longest']}",
        flush=True,
    )
    return row


def random_texts(n, length):
    """Prompts of letters: one token each for the toy tokenizer, and for transformers' reading."""
    letters = torch.randint(97, 123, (n, length), generator=torch.Generator().manual_seed(0))
    return [bytes(row).decode() for row in letters.tolist()]


def rewards_of(completion_ids):
    """+1 or -1 by the first token: a reward that costs nothing. Lists of ids -> floats."""
    return [1.0 if ids[0] % 2 else -1.0 for ids in completion_ids]


def save_model(folder, config, chance, device):
    """Write random weights whose completions end at each token with the same chance.

    Its output matrix is its own, as that of R1-Distill-Qwen-1.5B and larger: bf16 could not hold a
    small difference beside the large channel of the embeddings.
    """
    config.tie_word_embeddings = False
    config.eos_token_id = toy.model_config().eos_token_id
    model = Transformer(config).init_weights(0)
    set_stop_chance(model, chance)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model.save_pretrained(folder, toy.make_tokenizer(), dtype)


def set_stop_chance(model, chance):
    """Give the end token about this probability after any text.

    Channel 0 of all embeddings is large and equal, so it is in the last hidden state, too; the end
    token's row of the output matrix makes of it whatever logit is needed.
    """
    (end,) = model.config.eos_token_id
    embed = model.model.embed_tokens.weight.data
    embed[:, 0] = model.config.hidden_size**0.5
    words = torch.randint(256, (512,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = model(words, torch.tensor([0, 256, 512]))
        logits = (hidden @ model.head.T).double()
        others = logits.index_fill(1, torch.tensor([end]), -torch.inf).logsumexp(1)
        low, high = -100.0, 100.0  # bisection: the mean chance grows with the shift
        for _ in range(60):
            shift = (low + high) / 2
            mean = torch.sigmoid(logits[:, end] + shift * hidden[:, 0] - others).mean()
            low, high = (low, shift) if mean > chance else (shift, high)
    model.head.data[end, 0] += shift


class OurSteps:
    """Whole steps of ours, as the judge's loop has them, and what each took."""

    def __init__(self, run, texts, device):
        self.run, self.steps, self.clock = run, [], Clock(device)
        self.trainer = Trainer(open_weights(run.model, run, device), run)
        self.engine = open_engine(run, self.trainer.model, device)
        self.engine.sync(self.trainer.model)
        self.questions = [self.engine.tokenizer.encode(text) for text in texts]
        self.clock.watch(self.engine, "generate", "rollout")
        self.clock.watch(self.trainer, "logprobs", "log-prob")
        self.clock.watch(self.trainer, "backward", "update")
        self.clock.watch(self.trainer, "step", "update")

    def step(self):
        """Roll out, reward, update; the parts add up to the whole."""
        run, clock, number = self.run, self.clock, len(self.steps) + 1
        params = SamplingParams(n=run.group, max_tokens=run.max_tokens, seed=number)
        clock.begin("other")  # packing, and what the engine does about new weights
        groups = self.engine.generate(self.questions, params)
        with clock.part("reward"):
            rewards = [rewards_of([c.ids for c in group]) for group in groups]
        advantages = grpo.advantages(torch.tensor(rewards))
        policy_update(self.trainer, number, self.questions, groups, advantages, run)
        self.engine.sync(self.trainer.model)
        clock.end()
        parts = clock.read()
        lengths = [len(c.ids) for group in groups for c in group]
        self.steps.append({"seconds": sum(parts.values()), "parts": parts, "lengths": lengths})
