"""A judge from its settings: a model here, the last one trained, or one behind an endpoint."""

import sys

import torch

from nanorrm import ranks
from nanorrm.config import JudgeSettings, UserError
from nanorrm.engine.engine import Engine
from nanorrm.files import read_json
from nanorrm.judge import prompts
from nanorrm.judge.endpoint import EndpointBackend
from nanorrm.judge.judge import Judge
from nanorrm.runs import runs_of


def open_judge(cfg: JudgeSettings, shared=False):
    """A Judge from JudgeSettings, on an endpoint if there is one.

    Without a model, the judge trained last under runs/ answers, asked the way it was trained (with
    thinking or without), else the shipped one; a line on stderr says which. shared: all ranks ask
    it alike, and share the work of its engine.
    """
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if cfg.endpoint:
        backend, template, think = at_endpoint(cfg), "rrm", cfg.think
    elif cfg.api_model:
        raise UserError("--api-model names a model at an --endpoint, which is missing")
    else:
        name, template, think = cfg.model, cfg.template, cfg.think
        if name is None:
            name, template, think = last_trained(template, think)
        engine = Engine.from_pretrained(name)
        template = prompts.template_of(engine.tokenizer) if template == "auto" else template
        backend = ranks.RankSharedEngine(engine) if shared else engine
    max_tokens = {"toy": 128}.get(template, 8192) if cfg.max_tokens is None else cfg.max_tokens
    return Judge(
        backend, template, cfg.temperature, max_tokens, think in (None, True), cfg.seed,
        cfg.overlong, cfg.multi_turn, cfg.journal,
    )  # fmt: skip


def last_trained(template, think):
    """(model, template, think) of the judge trained last here, else of the shipped one; what was
    given ("auto" and None are not) stays."""
    name = "toy-judge"
    trained = [run for run in runs_of("runs", "judge") if (run / "model").exists()]
    if trained:
        name, how = str(trained[-1] / "model"), read_json(trained[-1] / "config.json")["config"]
        think = how.get("think", True) if think is None else think
        template = how.get("template", "auto") if template == "auto" else template
    print(f"judge: {name}{'' if think in (None, True) else ', without thinking'}", file=sys.stderr)
    return name, template, think


def at_endpoint(cfg):
    """The EndpointBackend that JudgeSettings name."""
    if cfg.model:
        raise UserError("--model and --endpoint: give one (--api-model names the server's model)")
    if cfg.max_think_tokens is not None:
        raise UserError("--max-think-tokens needs a model here: an endpoint can't close thinking")
    if cfg.template not in ("auto", "rrm"):
        raise UserError(f"--template {cfg.template}: an endpoint is asked by the rrm prompt")
    return EndpointBackend(cfg.endpoint, cfg.api_model, cfg.concurrency, cfg.timeout, cfg.patience)
