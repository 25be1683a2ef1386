"""Measure a judge: `python eval.py toy` on the embedded world, `python eval.py pairs --data FILE`.

Both orders of every pair are judged by default. Accuracy is the share of right votes, a vote that
can't be read counting as not right; `voted` counts what all votes of a pair say together, a tie as
half. Intervals are 95%, bootstrapped over queries. Each evaluation leaves a folder: its numbers,
every comparison in full, a page to read them in; `--compare A B` compares two such folders.
"""

import json
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from nanorrm.cli import parse_command, run_script
from nanorrm.config import JudgeSettings, UserError, at_least, one_of
from nanorrm.data.read import read_pairs, read_rankings
from nanorrm.data.sources import ToySource
from nanorrm.data.toy import TERMS
from nanorrm.judge.open import open_judge
from nanorrm.measure import benchmarks, metrics, results
from nanorrm.measure import scaling as scales
from nanorrm.measure.benchmarks import Benchmark, pairs_of, rankings_of, rewardbench2
from nanorrm.rank import bestof

LEAST = {"pairs": 1, "longer": 0, "limit": 0, "opponents": 0, "queries": 1, "size": 2}
CHOICES = {
    "version": ("1", "2"),
    "task": ("pairs", "best_of_k"),
    "strategy": bestof.STRATEGIES,
    "strategies": bestof.STRATEGIES,
}


@dataclass
class Evaluation(JudgeSettings):
    """What every evaluation has."""

    out: str | None = None  # folder for results, records, plot and report; None: under runs/
    json: str | None = None  # also write the numbers to this file

    def __post_init__(self):
        super().__post_init__()
        for name, least in LEAST.items():
            if hasattr(self, name):
                at_least(self, least, name)
        for name, known in CHOICES.items():
            value = vars(self).get(name, [])
            for one in value if isinstance(value, list) else [value]:
                one_of(name, str(one), known)
        if self.json and not Path(self.json).parent.is_dir():
            raise UserError(f"{self.json}: no such folder")


@dataclass
class ToyEvaluation(Evaluation):
    """Held-out pairs of the embedded world, by difficulty, beyond the lengths trained on too."""

    pairs: int = 200  # pairs per chain length
    longer: int = 2  # chain lengths beyond those trained on


@dataclass
class FileEvaluation(Evaluation):
    """What every evaluation of a file has."""

    data: str | None = None  # the file: jsonl, json or parquet
    columns: str = ""  # what the file calls them: wanted=given,wanted=given
    limit: int = 0  # judge only the first pairs; 0: all


def of_file(about):
    """FileEvaluation under a help text of its own, for a command that has no further settings."""
    return type("FileEvaluation", (FileEvaluation,), {"__doc__": about})


@dataclass
class RewardBench(FileEvaluation):
    """RewardBench: sections and their mean; version 2: four or more responses a query."""

    version: int = 1  # 1 or 2


@dataclass
class PPE(FileEvaluation):
    """PPE's verifiable benchmarks: pairs of right and wrong, or the best of K responses."""

    task: str = "pairs"  # pairs, or best_of_k
    strategy: str = "knockout"  # for best_of_k: knockout, elo, round_robin or bradley_terry
    opponents: int = 0  # for elo: random opponents that each response meets; 0: all others


@dataclass
class BestOfN(FileEvaluation):
    """N responses a query, with truth: what each strategy chooses, and what that costs."""

    strategies: list[str] = field(default_factory=lambda: list(bestof.STRATEGIES[:3]))  # to compare
    opponents: int = 4  # for elo: random opponents that each response meets; 0: all others


@dataclass
class Scaling(FileEvaluation):
    """Accuracy against votes, thinking tokens and comparisons, by difficulty (default: toy)."""

    rankings: str | None = None  # file of N responses a query, for the curve over comparisons
    pairs: int = 60  # of the embedded world, per chain length
    queries: int = 24  # of the embedded world with `size` responses each, per chain length
    size: int = 8  # responses per query of the embedded world, one of them right
    votes: int = 8  # generations per order
    budgets: list[int] = field(default_factory=list)  # thinking tokens; none: doubling to the most
    temperature: float | None = None  # None: 0.6; on the embedded world 1.5, for errors to be seen

    def __post_init__(self):
        given, self.temperature = self.temperature, self.temperature or 0.0
        super().__post_init__()
        self.temperature = given  # None is settled when all settings are known
        if any(budget < 0 for budget in self.budgets):
            raise UserError(f"budgets = {self.budgets} should be at least 0")


# -- commands


def toy(cfg):
    """Accuracy by chain length: all trained lengths, their harder half, and longer ones."""
    lengths = (*TERMS, *range(TERMS[-1] + 1, TERMS[-1] + 1 + cfg.longer))
    pairs = ToySource(cfg.seed).held_out(cfg.pairs * len(lengths), lengths)
    harder = sorted(TERMS)[len(TERMS) // 2 :]
    groups = [(f"{t} terms", {t}) for t in TERMS]
    groups += [("all trained lengths", set(TERMS)), (f"harder half ({harder[0]}+)", set(harder))]
    groups += [(f"{t} terms, never trained", {t}) for t in lengths if t not in TERMS]
    rows = {name: [float(pair.meta["terms"] in of) for pair in pairs] for name, of in groups}
    judge_pairs(cfg, "toy", Benchmark(pairs, rows))


def pairs(cfg):
    """Accuracy on a file, in all and by source; every pair is accounted for."""
    judge_pairs(cfg, "pairs", with_label(cfg))


def benchmark(name, cfg):
    """Accuracy on a public benchmark of pairs."""
    judge_pairs(cfg, name, pairs_of(name, cfg.data, cfg.columns).first(cfg.limit))


def rewardbench(cfg):
    """RewardBench v1 as pairs; v2 by Bradley-Terry ratings over all pairs of each query."""
    if cfg.version == 1:
        return benchmark("rewardbench", cfg)
    rankings = rankings_of("rewardbench 2", cfg.data, cfg.columns)

    def score(rankings, played):
        ((ranked, play),) = played.values()
        values, queries, weights = rewardbench2(rankings, [r.ratings for r in ranked])
        rows = {name: results.over_queries(values, queries, play, w) for name, w in weights.items()}
        lost = f"{values.count(None)} rows of Ties lack their other half: judged, not scored"
        return {"rows": rows}, lost if None in values else ""

    judge_rankings(cfg, "rewardbench", rankings, {"": "bradley_terry"}, score)


def ppe(cfg):
    """PPE's pairs, or its best-of-K curve and the numbers it reports."""
    if cfg.task == "pairs":
        return benchmark("ppe", cfg)
    rankings = rankings_of("ppe", cfg.data, cfg.columns)
    if len(sizes := {len(ranking.responses) for ranking in rankings[: cfg.limit or None]}) > 1:
        raise UserError(f"{cfg.data}: rows have {min(sizes)} to {max(sizes)} responses, not all K")

    def score(rankings, played):
        ratings = [one.ratings for one in played[cfg.strategy][0]]
        scores = metrics.best_of_k_scores(ratings, [r.truth for r in rankings], seed=cfg.seed)
        curves = {k: list(enumerate(scores.pop(k), 1)) for k in ("curve", "oracle")}
        curves = {"best of k": {"judge": curves["curve"], "oracle": curves["oracle"]}}
        said = ", ".join(f"{k} {'-' if x is None else f'{x:.4f}'}" for k, x in scores.items())
        rows = results.chosen(rankings, played)
        return {"rows": rows, "scores": scores, "curves": curves}, said

    judge_rankings(cfg, "ppe", rankings, {cfg.strategy: cfg.strategy}, score)


def bon(cfg):
    """What each strategy chooses among the responses of a file, and at what cost."""
    if cfg.data is None:
        raise UserError("give --data FILE: jsonl with query, responses and truth")
    rankings = with_truth(cfg.data, cfg.columns)
    judge_rankings(cfg, "bon", rankings, {name: name for name in cfg.strategies})


def scaling(cfg):
    """Curves over votes, thinking tokens and comparisons, on the embedded world or given files."""
    source, own = ToySource(cfg.seed), not (cfg.data or cfg.rankings)
    if cfg.temperature is None:
        cfg = replace(cfg, temperature=1.5 if own else 0.6)
    pairs = with_label(cfg).pairs if cfg.data else []
    rankings = with_truth(cfg.rankings) if cfg.rankings else []
    if own:
        pairs = source.held_out(cfg.pairs * len(TERMS), TERMS)
        rankings = source.rankings(cfg.queries * len(TERMS), cfg.size)
    how = {"both_orders": cfg.both_orders, "progress": "judging"}
    asked = {**how, "max_think_tokens": cfg.max_think_tokens}

    def ask(judge):
        panels = {}
        if pairs:
            verdicts = judge.compare(pairs, cfg.votes, **asked)
            panels["votes"] = scales.over_votes(pairs, verdicts, cfg.seed)
            if not cfg.endpoint:  # a server closes no thinking
                budgets = cfg.budgets or scales.doubling(verdicts)
                thinking = scales.over_budgets(judge, pairs, budgets, cfg.seed, **how)
                panels["thinking tokens"] = thinking
        if rankings:
            spent = scales.over_strategies(judge, rankings, cfg.seed, **asked)
            panels["generations per query"] = spent
        curves = {title: panel["curves"] for title, panel in panels.items()}
        lines = [line for one in curves.items() for line in (*scales.grid(*one), "")]
        total = metrics.shares([verdict for _, verdict in judge.asked])
        numbers = {"curves": curves, "all": total, "rows": scales.rows(panels)}
        records = [results.pair_record(*one) for one in judge.asked]
        return lines, numbers, records, partial(results.curves, panels)

    evaluate(cfg, "scaling", ask)


def compare(arguments):
    """`--compare A B`: two evaluations of the same pairs, with the chance of such a difference."""
    if len(arguments) != 2:
        raise UserError("--compare needs two evaluations: folders, or their results.json")
    print("\n".join(results.comparison(*results.compare(*arguments))))


# -- what is judged


def with_label(cfg):
    """The Benchmark of --data's labelled pairs, by source."""
    if cfg.data is None:
        raise UserError("give --data FILE")
    pairs = read_pairs(cfg.data, cfg.columns)
    labelled = [pair for pair in pairs if pair.label]
    unknown = len(pairs) - len(labelled)
    if not labelled:
        raise UserError(f"{cfg.data}: {unknown} of {len(pairs)} pairs have no label")
    sources = [pair.source or "-" for pair in labelled]
    rows = benchmarks.by(sources) if len(set(sources)) > 1 else {}
    left_out = {"without a label": unknown} if unknown else {}
    return Benchmark(labelled, rows, left_out).first(cfg.limit)


def with_truth(path, columns=""):
    """The rankings of a file, or a UserError if any has no truth."""
    rankings = read_rankings(path, columns)
    if unknown := sum(ranking.truth is None for ranking in rankings):
        raise UserError(f"{path}: {unknown} of {len(rankings)} queries have no truth")
    return rankings


# -- open, judge, print, write


def judge_pairs(cfg, command, benchmark):
    """Judge a Benchmark's pairs."""

    def ask(judge):
        pairs, how = benchmark.pairs, (cfg.votes, cfg.both_orders, cfg.max_think_tokens)
        verdicts = judge.compare(pairs, *how, progress="judging")
        weighed = benchmark.rows.items()
        rows = {name: metrics.summarize(pairs, verdicts, weights) for name, weights in weighed}
        total = metrics.summarize(pairs, verdicts)
        rows = rows if command == "toy" else {**rows, "all": total}
        scores = benchmarks.scores(command, benchmark, verdicts)
        account = results.account(total, benchmark, scores, judge.seconds)
        lines = [*results.table(rows), "", *account, *results.flags(total, cfg.both_orders)]
        numbers = {"rows": rows, "all": total, "scores": scores, "left_out": benchmark.left_out}
        records = [results.pair_record(*one) for one in judge.asked]
        return lines, numbers, records, partial(results.bars, rows)

    evaluate(cfg, command, ask)


def judge_rankings(cfg, command, rankings, strategies, score=None):
    """Rank each query's responses by each of strategies {name in the records: strategy}.

    score(rankings, {name: (list of Ranked, play)}) -> the numbers, and a line about them or "";
    default: how good the chosen responses are.
    """
    if 0 < cfg.limit < (n := len(rankings)):
        print(f"{cfg.limit} judged + {n - cfg.limit} beyond --limit = {n} queries")
        rankings = rankings[: cfg.limit]
    how = {"votes": cfg.votes, "both_orders": cfg.both_orders}
    how |= {"max_think_tokens": cfg.max_think_tokens, "opponents": getattr(cfg, "opponents", 0)}

    def ask(judge):
        played = {}
        for name, kind in strategies.items():
            played[name] = bestof.rank(judge, rankings, kind, seed=cfg.seed, progress=kind, **how)
        chosen = {"rows": results.chosen(rankings, played)}, ""
        numbers, line = score(rankings, played) if score else chosen
        counts = sum((play.counts for _, play in played.values()), Counter())
        total = metrics.shares([verdict for _, verdict in judge.asked])
        lines = [*results.table(numbers["rows"]), *(["", line] if line else []), ""]
        lines += results.cost(total, counts, judge.seconds)
        lines += results.flags(total, cfg.both_orders)
        records = [
            results.ranking_record(*one, partial(play.verdict, i), name)
            for name, (ranked, play) in played.items()
            for i, one in enumerate(zip(rankings, ranked))
        ]
        draw = partial(results.bars, numbers["rows"])
        if curves := numbers.get("curves"):
            panels = {title: {"x": "k", "curves": lines} for title, lines in curves.items()}
            draw = partial(results.curves, panels)
        return lines, {**numbers, "all": total, "matches": dict(counts)}, records, draw

    evaluate(cfg, command, ask)


def evaluate(cfg, command, ask):
    """Open a judge and a folder, judge, print; write the folder, and the numbers to --json.

    ask(judge) -> (lines to print, numbers, records, a function that draws the plot).
    """
    judge = results.Recorder(open_judge(cfg))  # first: where there is none, no folder is left
    folder = results.output_folder(command, cfg.out)
    lines, numbers, records, draw = ask(judge)
    print("\n".join(lines))
    numbers = {**numbers, "seconds": judge.seconds}
    results.write(folder, command, cfg, numbers, records, draw)
    if cfg.json:
        try:
            Path(cfg.json).write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{cfg.json}: {error.strerror.lower()}") from None
    print(f"\n{folder}")


COMMANDS = {
    "toy": (ToyEvaluation, toy),
    "pairs": (of_file("Any file of labelled pairs, by source."), pairs),
    "rewardbench": (RewardBench, rewardbench),
    "ppe": (PPE, ppe),
    "bon": (BestOfN, bon),
    "scaling": (Scaling, scaling),
}
ABOUT = {
    "pandalm": "PandaLM's test set against the majority of its three annotators.",
    "judgebench": "JudgeBench: knowledge, reasoning, math and coding.",
    "rmbench": "RM-Bench: right and wrong answers in three styles each, nine pairs a row.",
    "llmbar": "LLMBar: natural pairs, and pairs where the worse response looks better.",
}
COMMANDS |= {name: (of_file(about), partial(benchmark, name)) for name, about in ABOUT.items()}


def main():
    if sys.argv[1:2] == ["--compare"]:
        return compare(sys.argv[2:])
    name, cfg = parse_command(COMMANDS, __doc__, sys.argv[1:])
    COMMANDS[name][1](cfg)


if __name__ == "__main__":
    run_script(main)
