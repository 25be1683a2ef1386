"""A judge from its settings: a model here, the last one trained, or one behind an endpoint."""

import sys

import torch

from nanorrm.config import JudgeSettings, UserError
from nanorrm.engine.engine import Engine
from nanorrm.files import read_json
from nanorrm.judge import prompts
from nanorrm.judge.endpoint import EndpointBackend
from nanorrm.judge.judge import Judge
from nanorrm.runs import runs_of


def open_judge(cfg: JudgeSettings):
    """A Judge from JudgeSettings, on an endpoint if there is one.

    Without a model, the judge trained last under runs/ answers, asked the way it was trained (with
    thinking or without), else the shipped one; a line on stderr says which.
    """
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if cfg.endpoint:
        return at_endpoint(cfg)
    if cfg.api_model:
        raise UserError("--api-model names a model at an --endpoint, which is missing")
    name, think, template = cfg.model, cfg.think, cfg.template
    if name is None:
        trained = [run for run in runs_of("runs", "judge") if (run / "model").exists()]
        name = "toy-judge"
        if trained:
            name, how = str(trained[-1] / "model"), read_json(trained[-1] / "config.json")["config"]
            think = how.get("think", True) if think is None else think
            template = how.get("template", "auto") if template == "auto" else template
        print(
            f"judge: {name}{'' if think in (None, True) else ', without thinking'}", file=sys.stderr
        )
    engine = Engine.from_pretrained(name)
    if template == "auto":
        template = prompts.template_of(engine.tokenizer)
    return judge_on(engine, template, cfg, think)


def at_endpoint(cfg):
    """A Judge on the server that JudgeSettings name."""
    if cfg.model:
        raise UserError("--model and --endpoint: give one (--api-model names the server's model)")
    if cfg.max_think_tokens is not None:
        raise UserError("--max-think-tokens needs a model here: an endpoint can't close thinking")
    template = "rrm" if cfg.template == "auto" else cfg.template
    if template != "rrm":
        raise UserError(f"--template {template}: an endpoint is asked by the rrm prompt")
    backend = EndpointBackend(
        cfg.endpoint, cfg.api_model, cfg.concurrency, cfg.timeout, cfg.patience
    )
    return judge_on(backend, template, cfg, cfg.think)


def judge_on(backend, template, cfg, think):
    """A Judge on a backend with the rest of the settings."""
    max_tokens = {"toy": 128}.get(template, 8192) if cfg.max_tokens is None else cfg.max_tokens
    return Judge(
        backend,
        template,
        cfg.temperature,
        max_tokens,
        think in (None, True),
        cfg.seed,
        cfg.overlong,
        cfg.multi_turn,
        cfg.journal,
    )
