"""Ask a model and read its thinking as it comes.

    python sample.py judge --query 7+8-5+8 --a 12 --b 18      which of two responses is better
    python sample.py rank --query 7+8-5+8 --data lines.txt    the best of many, by tournament
    python sample.py generate --prompt 7+8-5+8                plain generation

Without `--model`, the last judge trained here answers, or the shipped one where none was trained;
it says which. `--json` prints one object a line for pipes, and nothing else on stdout.
"""

import json
import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from nanorrm.cli import parse_command, run_script
from nanorrm.config import JudgeSettings, UserError, at_least, one_of
from nanorrm.data.formats import as_text
from nanorrm.data.read import read_pairs, read_rankings
from nanorrm.engine.engine import Engine
from nanorrm.engine.sampling import SamplingParams
from nanorrm.engine.stream import printable, stream
from nanorrm.judge import prompts
from nanorrm.judge.open import open_judge
from nanorrm.measure import results
from nanorrm.measure.metrics import outcome
from nanorrm.rank import bestof
from nanorrm.records import Pair, Ranking


@dataclass
class Output:
    """How an answer is shown."""

    json: bool = False  # one JSON object a line in place of text, for pipes
    # thinking as it comes, on stderr; on where that is a terminal
    stream: bool = field(default_factory=sys.stderr.isatty)

    def check_text(self, *names):
        """Raise UserError for a setting that is not text, but bytes of another encoding."""
        for name in names:
            if (value := getattr(self, name)) is not None:
                as_text(value, f"--{name}")


@dataclass
class JudgeSample(JudgeSettings, Output):
    """Judge two responses to a query, thinking shown."""

    query: str | None = None  # what was asked
    a: str | None = None  # the first response
    b: str | None = None  # the second response
    data: str | None = None  # file of pairs, in place of query, a and b
    limit: int = 5  # pairs of the file to judge; 0: all

    def __post_init__(self):
        super().__post_init__()
        self.check_text("query", "a", "b")
        at_least(self, 0, "limit")


@dataclass
class RankSample(JudgeSettings, Output):
    """Find the best of N responses to a query by a tournament."""

    query: str | None = None  # what was asked; each line of the data is then a response
    data: str = "/dev/stdin"  # without a query: objects with query and responses, one a line
    strategy: str = "knockout"  # or elo, round_robin, bradley_terry
    opponents: int = 0  # elo: others that each response meets; 0: all

    def __post_init__(self):
        super().__post_init__()
        self.check_text("query")
        at_least(self, 0, "opponents")
        one_of("strategy", self.strategy, bestof.STRATEGIES)
        if self.opponents and self.strategy != "elo":
            raise UserError(f"opponents = {self.opponents}: {self.strategy} chooses none, elo does")


@dataclass
class Generation(Output):
    """Generate text from a prompt: a chat message, or raw text."""

    prompt: str | None = None  # what to say to the model
    system: str | None = None  # a system message before it
    raw: bool = False  # no chat template: the prompt as it stands, special tokens special
    model: str = "toy"  # folder, toy-judge or toy
    n: int = 1  # completions
    temperature: float = 0.6  # 0 is greedy
    top_p: float = 1.0  # keep the likeliest tokens that reach this probability together
    max_tokens: int = 1024  # new tokens at most
    max_think_tokens: int | None = None  # thinking tokens before the engine closes it
    seed: int = 0
    threads: int = 0  # CPU threads of torch; 0: its own choice

    def __post_init__(self):
        self.check_text("prompt", "system")
        at_least(self, 1, "n", "max_tokens")
        at_least(self, 0, "threads", "temperature")


# -- commands


def judge(cfg):
    """Print each vote's thinking and the verdict."""
    if cfg.data and (cfg.query, cfg.a, cfg.b) != (None, None, None):
        raise UserError("give --query, --a and --b, or --data FILE, not both")
    if cfg.data:
        pairs = read_pairs(cfg.data)[: cfg.limit or None]
    elif None in (cfg.query, cfg.a, cfg.b):
        raise UserError("give --query, --a and --b, or --data FILE")
    else:
        pairs = [Pair(cfg.query, cfg.a, cfg.b)]
    judge = open_judge(cfg)
    with stream(judge.backend) if cfg.stream else nullcontext():
        verdicts = judge.compare(pairs, cfg.votes, cfg.both_orders, cfg.max_think_tokens)
    for pair, verdict in zip(pairs, verdicts):
        if verdict.skipped and not cfg.data:
            raise UserError(verdict.skipped)
        if cfg.json:
            record = results.pair_record(pair, verdict)
            print(json.dumps(record if pair.label else {**record, "outcome": None}))
        else:
            print("\n".join(comparison(pair, verdict)))


def rank(cfg):
    """Print the bracket, the ratings and the champion of each query, and what it cost."""
    rankings = read_candidates(cfg)
    for place, ranking in enumerate(rankings, 1):
        n = len(ranking.responses)
        where = f"{cfg.data}, line {place}" if cfg.query is None else cfg.data
        if n < 2:
            raise UserError(f"{where}: {n} response, 2 are needed")
        if cfg.opponents >= n:
            raise UserError(f"{where}: opponents = {cfg.opponents}, but a response has {n - 1}")
    judge = open_judge(cfg)
    how = {name: getattr(cfg, name) for name in ("votes", "both_orders", "max_think_tokens")}
    with stream(judge.backend) if cfg.stream else nullcontext():
        ranked, play = bestof.rank(judge, rankings, cfg.strategy, cfg.opponents, cfg.seed, **how)
    for index, (ranking, result) in enumerate(zip(rankings, ranked)):
        if cfg.json:
            said = partial(play.verdict, index)
            print(json.dumps(results.ranking_record(ranking, result, said, cfg.strategy)))
        else:
            print("\n".join(standings(ranking, result, cfg.strategy)))
    print(f"\n{cost(play.counts)}", file=sys.stderr if cfg.json else sys.stdout)


def generate(cfg):
    """Print completions, the first as it comes."""
    if cfg.prompt is None:
        raise UserError("give --prompt TEXT")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    engine = Engine.from_pretrained(cfg.model)
    prompt = prompt_ids(engine.tokenizer, cfg)
    names = ("n", "temperature", "top_p", "max_tokens", "max_think_tokens", "seed")
    params = SamplingParams(**{name: getattr(cfg, name) for name in names}, logprobs=False)
    shown = sys.stderr if cfg.json else sys.stdout
    with stream(engine, shown) if cfg.stream or not cfg.json else nullcontext():
        completions = engine.generate([prompt], params)[0]
    for number, completion in enumerate(completions, 1):
        if cfg.json:
            record = {"prompt": cfg.prompt, "text": completion.text}
            record |= {"finish_reason": completion.finish_reason}
            record |= {"think_tokens": completion.think_tokens, "tokens": len(completion.ids)}
            print(json.dumps(record))
        elif number > 1:
            print(f"\n-- {number} of {cfg.n}\n{printable(completion.text)}")


def prompt_ids(tokenizer, cfg):
    """The prompt in tokens: through the chat template, as the toy world asks, or raw."""
    toy = prompts.template_of(tokenizer) == "toy"
    if cfg.raw and cfg.system is not None:
        raise UserError("--system needs a chat template, --raw takes none")
    if cfg.raw:
        return tokenizer.encode_template(cfg.prompt)
    if tokenizer.chat_template is None and not toy:
        raise UserError(f"{cfg.model} has no chat template; --raw takes the prompt as it stands")
    if tokenizer.chat_template is None and cfg.system is not None:
        raise UserError("the toy model knows no system message")
    if tokenizer.chat_template is None:
        return prompts.query_prompt(tokenizer, cfg.prompt)
    system = [] if cfg.system is None else [{"role": "system", "content": cfg.system}]
    return tokenizer.chat([*system, {"role": "user", "content": cfg.prompt}])


def read_candidates(cfg):
    """What is to be ranked: objects of a file, or its lines as responses to --query."""
    if cfg.query is None:
        return read_rankings(cfg.data)
    try:
        lines = Path(cfg.data).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"{cfg.data}: {error.strerror.lower()}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{cfg.data}: not UTF-8 text ({error})") from None
    responses = [line for line in lines if line.strip()]
    if len(responses) < 2:
        raise UserError(f"{cfg.data}: {len(responses)} responses; each line is one, 2 are needed")
    return [Ranking(cfg.query, responses)]


# -- in words


def comparison(pair, verdict):
    """Lines: the pair, each vote's thinking, the verdict."""
    yield f"\nquery  {printable(pair.query)}"
    yield f"a      {printable(pair.a)}\nb      {printable(pair.b)}"
    for vote, swapped, thought in zip(verdict.votes, verdict.swapped, verdict.thoughts):
        says = {1: "a", 2: "b", None: "nothing that can be read"}[vote]
        yield f"  shown {'b, a' if swapped else 'a, b'}, says {says}, thinks"
        yield from (f"    {line}" for line in printable(thought or "-").splitlines())
    yield f"verdict {describe(pair, verdict)}"


def describe(pair, verdict):
    """The verdict in words."""
    if verdict.skipped:
        return f"skipped: {verdict.skipped}"
    if verdict.p_first is None:
        return "none: no vote could be read"
    words = {1: "a is better", 2: "b is better", None: "tied"}[verdict.winner]
    words += f" ({verdict.p_first:.0%} of the readable votes for a, {verdict.tokens} tokens"
    words += f", {verdict.invalid} unreadable)" if verdict.invalid else ")"
    return words + (f": {outcome(pair, verdict)}" if pair.label else "")


def standings(ranking, ranked, strategy):
    """Lines: the query, a knockout's bracket, every response with its rating, the champion."""
    yield f"\nquery  {printable(ranking.query)}\n"
    if strategy == "knockout":
        yield from bracket(ranked.rounds)
        yield ""
    games = [match for games in ranked.rounds for match in games]
    heading = {"knockout": "rounds survived", "elo": "Elo", "round_robin": "win rate"}
    yield f"rating ({heading.get(strategy, 'log-strength')}), games won"
    for i in sorted(range(len(ranking.responses)), key=lambda i: -ranked.ratings[i]):
        played = sum(i in (a, b) for a, b, _ in games)
        won = sum(0.5 if w is None else w == i for a, b, w in games if i in (a, b))
        text = " ".join(printable(ranking.responses[i]).split())
        text = text if len(text) <= 64 else f"{text[:61]}..."
        yield f"{ranked.ratings[i]:9.3f}  {won:4g} of {played:<3d}  #{i + 1:<3d} {text}"
    champion = ranking.responses[ranked.champion]
    yield f"\nchampion  #{ranked.champion + 1}\n{printable(champion)}"


def bracket(rounds):
    """The lines of a knockout's tree; rounds: [[(a, b, winner), ...], ...]."""
    games = [match for games in rounds for match in games]
    names = [f"#{i + 1}" for i in range(1 + max((max(match) for match in games), default=0))]
    names = [name.ljust(len(names[-1])) for name in names]
    trees = {i: ([name], 0) for i, name in enumerate(names)}  # the lines that lead to an entrant,
    for a, b, winner in games:  # and which of them ends in its name
        (upper, high), (lower, low) = trees[a], trees[b]
        width = max(map(len, upper + lower)) + 1
        above = ["─┐" if i == high else " │" if i > high else "" for i in range(len(upper))]
        below = ["─┘" if i == low else " │" if i < low else "" for i in range(len(lower))]
        lines = [reach(line, width, end) for line, end in zip(upper, above)]
        lines.append(" " * width + f" ├─ {names[winner]}")
        lines += [reach(line, width, end) for line, end in zip(lower, below)]
        trees[winner] = lines, len(upper)
    return [line.rstrip() for line in trees[winner][0]] if games else []


def reach(line, width, end):
    """A line of a tree drawn out to a width, and on into what joins it there."""
    return f"{line.rstrip()} ".ljust(width, end[:1] or " ") + end


def cost(counts):
    """What a tournament's judge was asked, so that the counts add up."""
    words = f"{counts['matches']} games"
    parts = ("decided", "draws", "coins")
    words += f" = {' + '.join(f'{counts[part]} {part}' for part in parts if counts[part])}"
    words += f"; {counts['asked']} pairs asked, {counts['votes']} votes"
    words += f" ({counts['invalid']} unreadable)" if counts["invalid"] else ""
    for name, said in (("skipped", "could not be judged"), ("again", "asked once more")):
        words += f", {counts[name]} {said}" if counts[name] else ""
    return f"{words}, {counts['tokens']} tokens"


COMMANDS = {
    "judge": (JudgeSample, judge),
    "rank": (RankSample, rank),
    "generate": (Generation, generate),
}


def main():
    name, cfg = parse_command(COMMANDS, __doc__, sys.argv[1:])
    try:
        COMMANDS[name][1](cfg)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    run_script(main)
