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
from itertools import chain

import torch

from nanorrm import ranks
from nanorrm.bench import trl
from nanorrm.bench.estimate import estimate, stop_chance, training_flops
from nanorrm.bench.tools import Clock, PeakMemory, numbers, shape, start, tidy, write_results
from nanorrm.config import EngineConfig, JudgeConfig, UserError, at_least, one_of
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
        for name in names(self.shapes or "-") + names(self.whole or "-"):
            shape(name)
        cases(self.cases or "2:3")
        numbers(self.micro)


def names(text):
    """ "toy,10M" -> its words; "-" -> none."""
    return [] if text == "-" else text.split(",")


def cases(text):
    """ "22:48,60:256" -> [(22, 48), (60, 256)]: mean and limit of the lengths, tokens."""
    found = [tuple(numbers(case.replace(":", ","))) for case in text.split(",")]
    if not all(len(case) == 2 and 1 < case[0] < case[1] for case in found):
        raise UserError(f"cases = {text!r} should be mean:limit,... with 1 < mean < limit")
    return found


def bench_train(cfg):
    """Print what was measured, and as the last line all of it as JSON."""
    if cfg.estimate:
        estimate()
        return
    device, about, ceilings = start(cfg.threads)
    small = device == "cpu"
    result = {
        "device": about,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "ceiling_flops": ceilings["matmul"],
        "training_step": [],
        "whole_step": [],
    }
    print(f"\n{'training step':14s}  params  tokens      tok/s    MFU      peak")
    for name in names(cfg.shapes or ("toy,10M" if small else "0.5B,1.5B")):
        result["training_step"].append(training_step(name, cfg, device, ceilings["matmul"]))
        write_results(cfg.json, result)
    for name in names(cfg.whole or ("toy" if small else "1.5B")):
        for case in cases(cfg.cases or ("22:48,60:256" if small else "2000:8192")):
            result["whole_step"].append(whole_step(name, *case, cfg, device))
            write_results(cfg.json, result)
    print(json.dumps(result))


# -- the training step


def training_step(name, cfg, device, ceiling):
    """One row: packed sequences through forward, backward and AdamW, as train.py has it."""
    tokens = cfg.tokens or (4096 if device == "cpu" else 16384)
    length = min(tokens, cfg.length or (256 if device == "cpu" else 8192))
    tidy(device)
    run = JudgeConfig(learning_rate=1e-6, micro_tokens=tokens, recompute=cfg.recompute)
    model = Transformer(shape(name)).init_weights(0).to(device)
    if device == "cuda":
        ranks.shard(model, torch.bfloat16)  # as open_weights: bf16 beside fp32 masters
    trainer, n, generator = Trainer(model, run), tokens // length, torch.Generator().manual_seed(0)
    asked = length // 8  # an eighth is prompt
    targets = length + 1 - asked
    ids = torch.randint(model.config.vocab_size, (n, length + 1), generator=generator).tolist()
    samples = [Sample(row[:asked], row[asked:], {}) for row in ids]

    clock, memory, seconds = Clock(device), PeakMemory(device), []
    for _ in range(cfg.repeats + 1):
        with clock.part("step"):
            for batch in trainer.batches(samples):
                logp, _ = trainer.logprobs(batch)
                old, ones = logp.detach(), torch.ones_like(logp)
                weight = ones / (n * targets)
                trainer.backward(*grpo.policy_loss(logp, old, old, ones, weight, run.loss))
            trainer.step(1)
        seconds.append(clock.read()["step"])
    median, peak = statistics.median(seconds[1:]), memory.read()
    row = {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": n * length,
        "length": length,
        "tokens_per_s": n * length / median,
        "mfu": training_flops(model.config, [length] * n, targets * n) / median / ceiling,
        "peak_bytes": peak,
    }
    size = "?" if peak is None else f"{peak / 2**30:.2f} GiB"
    print(
        f"  {name:12s}{row['parameters'] / 1e6:7.1f}M {row['tokens']:7d} "
        f"{row['tokens_per_s']:10.0f} {row['mfu']:6.1%} {size:>9s}  sequences of {length}",
        flush=True,
    )
    return row


# -- a whole GRPO step


def whole_step(name, mean, longest, cfg, device):
    """One table: our step split into its parts, beside TRL's where that is installed."""
    prompts = cfg.prompts or (48 if device == "cpu" else 16)
    rollouts = prompts * cfg.group
    usual, tokens = cfg.prompt_tokens + mean, cfg.prompt_tokens + longest
    micro = [m for m in numbers(cfg.micro) if rollouts % m == 0]
    beside = cfg.trl == "yes" or (cfg.trl == "auto" and device == "cpu" and trl.installed())
    if beside and not trl.installed():
        raise UserError("TRL is not installed: pip install trl, or take --trl no")
    if beside and not micro:
        raise UserError(f"micro = {cfg.micro!r}: none divides the {rollouts} completions")
    tidy(device)
    texts = random_texts(prompts, cfg.prompt_tokens)
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, shape(name, max(8192, tokens)), stop_chance(mean, longest), device)
        run = JudgeConfig(
            model=folder,
            prompts=prompts,
            group=cfg.group,
            max_tokens=longest,
            learning_rate=1e-6,
            warmup_steps=0,
            micro_tokens=cfg.micro_tokens,
            recompute=cfg.recompute,
            # a cache for all rollouts at their mean length: the rest of a GPU is for training
            engine=EngineConfig(num_blocks=2 * rollouts + (rollouts * usual + tokens) // 16),
        )
        ours = OurSteps(run, texts, device)
        print(
            f"\nwhole GRPO step, {name}: {prompts} prompts x {cfg.group}, "
            f"completions of {mean} tokens on average, at most {longest}"
        )
        theirs = best_trl(run, texts, micro, device, cfg.repeats, ours) if beside else None
        for _ in range(0 if beside else cfg.repeats + 1):
            ours.step()
    row = {"model": name, "prompts": prompts, "group": cfg.group, "limit": longest}
    row["nanorrm"] = report("nanorrm", ours.steps[1:])
    if theirs:
        row["trl"] = report(f"TRL, {theirs.micro} a pass", theirs.steps[1:])
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
        tries = trl.TRLSteps(run, texts, rewards_of, m, device, 2)
        tries.run()
        tried[m] = sum(tries.steps[-1]["parts"].values())
    best = min(tried, key=tried.get, default=micro[0])
    steps = trl.TRLSteps(run, texts, rewards_of, best, device, repeats + 1)
    steps.run(ours.step)
    return steps


def report(who, steps):
    """Print and return the median step: its seconds in all and by part, and its lengths."""
    seconds = [sum(step["parts"].values()) for step in steps]
    lengths = list(chain.from_iterable(step["lengths"] for step in steps))
    row = {
        "seconds": statistics.median(seconds),
        "all_seconds": seconds,
        "parts": {p: statistics.median(s["parts"].get(p, 0.0) for s in steps) for p in PARTS},
        "mean_length": statistics.fmean(lengths),
        "longest": max(lengths),
        "tokens_per_s": sum(lengths) / sum(seconds),
    }
    parts = "  ".join(f"{name} {spent:.3f}" for name, spent in row["parts"].items())
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
    """Write random weights whose completions end after any token with about this chance.

    Channel 0 of all embeddings is large and equal, so it is in the last hidden state, too; the end
    token's row of the output matrix makes of it whatever logit is needed. That matrix is its own,
    as that of R1-Distill-Qwen-1.5B and larger: bf16 could not hold a small difference beside the
    large channel of the embeddings.
    """
    end = toy.model_config().eos_token_id
    config.tie_word_embeddings, config.eos_token_id = False, end
    model = Transformer(config).init_weights(0)
    model.model.embed_tokens.weight.data[:, 0] = config.hidden_size**0.5
    model.head.data[end] = 0
    words = torch.randint(256, (512,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = model(words, torch.tensor([0, 256, 512]))
        others = (hidden @ model.head.T).index_fill(1, torch.tensor(end), -torch.inf).logsumexp(1)
        logit = torch.logit(torch.tensor(chance)) + others
        model.head[end, 0] = (logit / hidden[:, 0]).mean()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model.save_pretrained(folder, toy.make_tokenizer(), dtype)


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
        run, number = self.run, len(self.steps) + 1
        params = SamplingParams(n=run.group, max_tokens=run.max_tokens, seed=number)
        with self.clock.part("other"):  # packing, and what the engine does about new weights
            groups = self.engine.generate(self.questions, params)
            with self.clock.part("reward"):
                rewards = [rewards_of([c.ids for c in group]) for group in groups]
            advantages = grpo.advantages(torch.tensor(rewards))
            policy_update(self.trainer, number, self.questions, groups, advantages, run)
            self.engine.sync(self.trainer.model)
        lengths = [len(c.ids) for group in groups for c in group]
        self.steps.append({"parts": self.clock.read(), "lengths": lengths})
