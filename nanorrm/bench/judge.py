"""Measure what surrounds generation at test time: many knockouts of a judge in lockstep.

Time counts for the innermost of: the engine (generation), the judge (prompts, fitting, verdicts),
and the strategy (tournaments, who was asked what). The strategy's share is what it costs to play
tournaments in place of generating as many votes.
"""

import json
from dataclasses import dataclass

import torch

from nanorrm.bench.tools import Clock, write_results
from nanorrm.config import JudgeSettings, at_least
from nanorrm.data.sources import ToySource
from nanorrm.judge.open import open_judge
from nanorrm.rank import bestof


@dataclass
class JudgeBench:
    """Many knockouts through the engine: batches, and where the time goes."""

    model: str = "toy-judge"  # folder or shipped judge
    knockouts: int = 1000  # queries of the embedded world
    size: int = 32  # responses to each
    max_tokens: int = 64  # new tokens per vote at most
    threads: int = 0  # CPU threads of torch; 0: its own choice
    json: str | None = None  # also write the results to this file

    def __post_init__(self):
        at_least(self, 1, "knockouts", "max_tokens")
        at_least(self, 2, "size")


def bench_judge(cfg):
    """Print batches and shares of the time, and as the last line all of it as JSON."""
    judge = open_judge(JudgeSettings(cfg.model, max_tokens=cfg.max_tokens, threads=cfg.threads))
    engine = judge.backend.engine
    rankings = ToySource(0).rankings(cfg.knockouts, cfg.size)
    bestof.rank(judge, rankings[:2], both_orders=False)  # warm up
    clock, sizes, generate = Clock(engine.model.device.type), [], engine.generate

    def counted(prompts, *args):
        sizes.append(len(prompts))
        return generate(prompts, *args)

    engine.generate = counted
    clock.watch(engine, "generate", "engine")
    clock.watch(judge, "compare", "judge")
    with clock.part("strategy"):
        ranked, play = bestof.rank(judge, rankings, both_orders=False)
    seconds = clock.read()
    whole = sum(seconds.values())
    right = sum(ranking.truth[r.champion] for ranking, r in zip(rankings, ranked))
    result = {
        "knockouts": cfg.knockouts,
        "size": cfg.size,
        "threads": torch.get_num_threads(),
        "device": str(engine.model.device),
        "rounds": max(len(r.rounds) for r in ranked),
        "batches": sizes,
        "counts": dict(play.counts),
        "seconds": seconds,
        "shares": {name: part / whole for name, part in seconds.items()},
        "champion_right": right / len(rankings),
    }
    print(f"{cfg.knockouts} knockouts of {cfg.size}: {result['rounds']} rounds in {whole:.1f} s")
    print(f"batches of the engine: {', '.join(map(str, sizes))} (small ones: a second vote)")
    for name, part in seconds.items():
        print(f"  {name:10s} {part:8.2f} s  {part / whole:6.1%}")
    print(f"the champion is the right one in {result['champion_right']:.1%}")
    write_results(cfg.json, result)
    print(json.dumps(result))
