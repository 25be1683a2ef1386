"""Every setting of the project, with its unit and its choices; presets in configs/ override them.

A field's comment is its help text: `python train.py judge --help` prints these.
"""

from dataclasses import dataclass, field


class UserError(Exception):
    """Something the user gave is wrong: the message says what, where, and what to do."""


def at_least(config, low, *names):
    """Raise UserError for the first of the settings that is below `low`; None is not set."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= low:  # NaN is not either
            raise UserError(f"{name} = {value} should be at least {low}")


def one_of(name, value, choices):
    """Raise UserError unless the value of the setting `name` is one of the choices."""
    if value not in choices:
        raise UserError(f"{name} = {value!r} is not one of {', '.join(choices)}")


def possible_dpo(beta, label_smoothing):
    """Raise UserError for settings of DPO's loss that make no sense."""
    if not beta > 0:
        raise UserError(f"beta = {beta} should be above 0")
    if not 0 <= label_smoothing < 0.5:
        should = "should be from 0 to below 0.5: it is the share of labels that are wrong"
        raise UserError(f"label_smoothing = {label_smoothing} {should}")


@dataclass
class EngineConfig:
    """The paged cache and the batch of the generation engine."""

    block_size: int = 16  # tokens per cache block
    num_blocks: int | None = None  # blocks in the pool; None: what cache_gib holds
    cache_gib: float | None = None  # for keys and values; None: 0.5, on a GPU 60% of what is free
    max_batch: int = 512  # sequences decoded at once
    max_step_tokens: int = 8192  # tokens computed in a step; prompts are cut into chunks to fit
    chunked_prefill: bool = True  # False: a prompt is computed whole, even beyond max_step_tokens
    prefix_cache: bool = True  # requests share what their prompts have in common
    cuda_graphs: bool = True  # on a GPU: record the decode step and replay it
    fused_head: bool | None = None  # draw without logits in memory; None: on a GPU
    read_every: int = 8  # with graphs: steps between looks at which sequences are done

    def __post_init__(self):
        at_least(self, 1, "block_size", "max_batch", "max_step_tokens", "read_every", "num_blocks")
        if self.cache_gib is not None and not self.cache_gib > 0:
            raise UserError(f"cache_gib = {self.cache_gib} should be above 0")


@dataclass
class RunConfig:
    """What every training stage has: where it writes and how it optimises."""

    name: str = ""  # run folder under runs/; empty: the stage and the time
    runs: str = "runs"  # where run folders are made
    resume: bool = False  # continue the named run (or the last of this stage) from its checkpoint
    seed: int = 0  # of data order, initial weights and sampling
    threads: int = 0  # CPU threads of torch; 0: its own choice
    steps: int = 1  # optimizer steps
    learning_rate: float = 0.0  # AdamW, after warm-up
    warmup_steps: int = 0  # learning rate rises linearly over these
    schedule: str = "constant"  # learning rate after warm-up: constant, linear or cosine (to zero)
    weight_decay: float = 0.0  # AdamW
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    micro_tokens: int = 0  # per forward and backward pass; never changes the result; 0: by device
    dtype: str = "auto"  # compute: float32 or bfloat16 (master weights are fp32); auto: by device
    recompute: bool = False  # keep only the layers' inputs for the backward pass: less memory
    save_every: int = 50  # steps between checkpoints; one is always saved at the end and on Ctrl-C
    keep: int = 2  # checkpoints that stay: the newest ones

    def __post_init__(self):
        at_least(self, 1, "save_every", "steps", "keep")
        one_of("schedule", self.schedule, ("constant", "linear", "cosine"))
        one_of("dtype", self.dtype, ("auto", "float32", "bfloat16"))
        at_least(self, 0, "warmup_steps", "threads", "learning_rate", "weight_decay")
        at_least(self, 0, "max_grad_norm", "micro_tokens")
        if abs(self.seed) > 2**32:
            raise UserError(f"seed = {self.seed} should be below 2**32")
        if "/" in self.name or self.name in (".", ".."):
            raise UserError(f"name = {self.name!r}: a name, not a path; --runs says where")


@dataclass
class BaseConfig(RunConfig):
    """Pre-train the toy base: it solves, checks, knows the format, and judges at chance."""

    steps: int = 3000  # optimizer steps
    learning_rate: float = 3e-3  # AdamW, after warm-up, then linearly down to zero
    warmup_steps: int = 100  # learning rate rises linearly over these
    schedule: str = "linear"  # learning rate after warm-up: constant, linear or cosine (to zero)
    weight_decay: float = 0.01  # AdamW
    save_every: int = 500  # steps between checkpoints; one is always saved at the end and on Ctrl-C
    documents: int = 64  # documents per step
    solve: float = 0.35  # share of documents that solve a query
    check: float = 0.35  # share that compare a given result with two responses; the rest is format
    careless: float = 0.0  # share of a careless solver's documents: makes the toy policy
    model: str = ""  # folder of a toy model to go on from; empty: new weights

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "documents")
        at_least(self, 0, "solve", "check", "careless")
        if self.solve + self.check + self.careless > 1:
            raise UserError("solve + check + careless should be at most 1: shares of the documents")


@dataclass(frozen=True)
class LossConfig:
    """Switches of the policy loss; the defaults are the paper's GRPO."""

    aggregation: str = "token"  # mean over tokens; sequence, constant: see grpo.token_weights
    clip_low: float = 0.2  # the ratio counts from 1 - clip_low ...
    clip_high: float = 0.2  # ... to 1 + clip_high; DAPO's "clip higher" is 0.28
    kl: float = 0.0  # weight of the penalty towards the starting model
    kl_estimator: str = "k3"  # k1 (its gradient has mean zero), k2 or k3
    importance: str = "none"  # trainer / sampler weights: none, truncate, mask
    importance_low: float = 0.0  # they count from here; outside: truncated to it, or masked
    importance_high: float = 2.0  # up to here
    skip_truncated: bool = False  # leave completions out that ran into max_tokens (DAPO)

    def __post_init__(self):
        at_least(self, 0, "clip_low", "clip_high", "kl", "importance_low")
        at_least(self, self.importance_low, "importance_high")
        one_of("aggregation", self.aggregation, ("token", "sequence", "constant"))
        one_of("kl_estimator", self.kl_estimator, ("k1", "k2", "k3"))
        one_of("importance", self.importance, ("none", "truncate", "mask"))


@dataclass
class RolloutConfig(RunConfig):
    """What every stage that trains on samples of its own has."""

    learning_rate: float = 1.5e-4  # AdamW, after warm-up
    warmup_steps: int = 5  # learning rate rises linearly over these
    temperature: float = 1.0  # of the rollouts
    max_tokens: int = 96  # new tokens per rollout at most
    max_think_tokens: int | None = None  # thinking tokens before the engine closes it; None: any
    release_cache: bool = False  # give caches' memory back after use (a GPU records graphs anew)
    eval_every: int = 10  # steps between evaluations on what is held out
    eval_share: float = 0.1  # of a data file, kept out of training for these evaluations
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "max_tokens", "eval_every")
        at_least(self, 0, "eval_share", "max_think_tokens")
        if self.temperature <= 0:
            raise UserError(f"temperature = {self.temperature}: rollouts need one above 0")
        if self.eval_share >= 1:
            raise UserError(f"eval_share = {self.eval_share} leaves nothing to train on")


@dataclass
class GroupConfig(RolloutConfig):
    """What GRPO has beside: prompts, a group of rollouts of each, their advantages, the loss."""

    prompts: int = 64  # P: prompts (a judge's pairs) per step
    group: int = 8  # G: rollouts per prompt
    scale: str = "group"  # advantages are divided by the std of: group, batch, or none
    mini_prompts: int = 0  # prompts per optimizer update, several to a batch; 0: all in one
    loss: LossConfig = field(default_factory=LossConfig)
    sample_every: int = 5  # steps between entries of samples.jsonl

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "prompts", "sample_every")
        at_least(self, 2, "group")
        at_least(self, 0, "mini_prompts")
        one_of("scale", self.scale, ("group", "batch", "none"))


@dataclass
class JudgeConfig(GroupConfig):
    """Train a judge by GRPO on +1 (right verdict) and -1 (wrong or unreadable)."""

    model: str = "toy"  # folder of the model to start from; "toy" is the shipped toy base
    # files of labelled pairs (jsonl, json, parquet; * in a name: its parts), FILE:RATIO to mix
    # several; "toy" draws pairs from the embedded world
    data: list[str] = field(default_factory=lambda: ["toy"])
    columns: str = ""  # of the files, if not known ones: query=...,a=...,b=...,label=...
    max_prompt_tokens: int = 0  # longer prompts are dropped and counted; 0: what the context holds
    template: str = "auto"  # prompt: rrm, toy, or auto (toy for a toy tokenizer)
    think: bool = True  # False: the prompt closes the thinking at once (DirectJudge)
    steps: int = 100  # GRPO steps
    max_minutes: float = 0.0  # stop after so many minutes of training; 0: no limit
    refills: int = 0  # times that groups of equal rewards are replaced by further pairs' (DAPO)
    eval_pairs: int = 200  # held-out pairs per evaluation

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 0, "eval_pairs", "max_minutes", "refills", "max_prompt_tokens")
        if not self.data:
            raise UserError("data: give a file of pairs, or toy")


@dataclass
class JudgeSettings:
    """How sample.py and eval.py open and ask a judge."""

    model: str | None = None  # folder, toy-judge or toy; None: the last trained judge
    template: str = "auto"  # prompt: rrm, toy, or auto (toy for a toy tokenizer)
    think: bool | None = None  # False: a judge trained without thinking; None: as it was trained
    votes: int = 1  # generations per order
    both_orders: bool = True  # also show each pair with the responses exchanged
    temperature: float = 0.6  # 0 is greedy
    max_tokens: int | None = None  # new tokens at most; None: 128 for toy, 8192 for rrm
    max_think_tokens: int | None = None  # thinking tokens before the engine closes it
    seed: int = 0
    threads: int = 0  # CPU threads of torch; 0: its own choice
    overlong: str = "skip"  # a pair too long for the model: skip, or cut (responses keep their end)
    multi_turn: str = "refuse"  # a conversation as query: refuse, or render (as a transcript)
    journal: str | None = None  # jsonl: answers are kept as they come, and never asked for again
    endpoint: str | None = None  # ask a server, http://host:port/v1, in place of a model here
    api_model: str | None = None  # the model's name there; None: the only one it serves
    concurrency: int = 32  # requests that the server gets at once
    timeout: float = 600.0  # seconds until a request is given up and sent again
    patience: float = 600.0  # seconds of nothing but failures, until the whole is given up

    def __post_init__(self):
        at_least(self, 1, "votes", "concurrency", "max_tokens")
        at_least(self, 0, "threads", "temperature", "patience", "max_think_tokens")
        one_of("overlong", self.overlong, ("skip", "cut"))
        one_of("multi_turn", self.multi_turn, ("refuse", "render"))
        if not self.timeout > 0:
            raise UserError(f"timeout = {self.timeout} should be above 0 seconds")


@dataclass
class PolicyRunConfig(RolloutConfig):
    """What the training of a policy by a judge has, whatever the method."""

    model: str = "toy-policy"  # folder of the policy to start from; "toy-policy" is the shipped one
    judge: JudgeSettings = field(default_factory=JudgeSettings)
    data: str = "toy"  # jsonl with a prompt or query each; "toy" draws them from the embedded world
    keep_tokens: int = 1024  # the end of an answer that the judge is shown; 0: all of it
    steps: int = 60  # optimizer steps
    max_tokens: int = 64  # new tokens per response at most
    eval_prompts: int = 200  # held-out prompts per evaluation
    best_of: int = 8  # responses to each for majority and knockout, before and after; 0: neither

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 0, "eval_prompts", "keep_tokens", "best_of")


@dataclass
class PolicyConfig(PolicyRunConfig, GroupConfig):
    """Train a policy by GRPO on unlabelled prompts: a judge compares the responses of a group."""

    judge: JudgeSettings = field(default_factory=lambda: JudgeSettings(both_orders=False))
    rating: str = "elo"  # matches -> rewards: elo, bradley_terry, win_rate, knockout (its rounds)
    opponents: int = 4  # distinct random ones of its group for each response; not in a knockout
    prompts: int = 32  # P: prompts per step

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "opponents")
        one_of("rating", self.rating, ("elo", "bradley_terry", "win_rate", "knockout"))
        if self.rating != "knockout" and self.opponents >= self.group:
            has = f"has {self.group - 1} in a group of {self.group}"
            raise UserError(f"opponents = {self.opponents}: a response {has}")


@dataclass
class DpoConfig(PolicyRunConfig):
    """Train a policy by DPO on pairs of responses that a judge has labelled."""

    responses: str = "policy"  # whose are judged: the policy's (two per prompt), or the file's
    pairs: int = 3000  # pairs to label at most; from the policy: prompts to draw two responses for
    beta: float = 0.1  # how dear it is to leave the reference, the policy at the start
    label_smoothing: float = 0.0  # share of the labels taken to be wrong (conservative DPO)
    batch: int = 64  # labelled pairs per step; they are shuffled anew for each pass over them

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "pairs", "batch")
        one_of("responses", self.responses, ("policy", "file"))
        if self.responses == "file" and self.data == "toy":
            raise UserError("responses = 'file' needs a file of pairs: --data FILE")
        possible_dpo(self.beta, self.label_smoothing)
