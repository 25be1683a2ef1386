"""Make pairs to train on: `python -m nanorrm.synth pairs` and `python -m nanorrm.synth label`.

    pairs   questions with known answers -> sampled responses, checked by rule; one right and one
            wrong of each question, their thinking cut (the paper's synthetic data)
    label   pairs -> the same pairs with the label a judge gives them, ties left out

Every line tells where it comes from in `meta`. Which sampled response is taken is not defined by
the paper: here the first right and the first wrong one, samples being alike.
"""

import sys
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from tqdm import tqdm

from nanorrm.cli import parse_command, run_script
from nanorrm.config import EngineConfig, JudgeSettings, UserError, at_least, one_of
from nanorrm.data import answers
from nanorrm.data.formats import as_query, as_text, id_of, parse, parse_columns
from nanorrm.data.read import read_all, read_pairs
from nanorrm.engine.engine import Engine
from nanorrm.engine.sampling import SamplingParams
from nanorrm.files import write_rows
from nanorrm.judge import prompts
from nanorrm.judge.open import open_judge
from nanorrm.model.tokenizer import after_thinking
from nanorrm.records import Pair, shuffled

ANSWER = r"Think step by step, then give the final answer in \boxed{}."
CHOOSE = r"Think step by step, then give the letter of the right choice in \boxed{}."
COLUMNS = {  # of files of questions, the first that is there
    "question": ("question", "problem", "query", "prompt"),
    "answer": ("answer", "ground_truth", "expected_answer", "solution", "reward_model"),
}
BATCH = 256  # questions sampled from at once


@dataclass
class PairsSettings:
    """Sample responses to questions with known answers; keep one right and one wrong of each."""

    model: str = ""  # folder of the model to sample from, or toy
    data: str = ""  # jsonl, json or parquet of questions with answers
    out: str = ""  # jsonl of pairs to write
    columns: str = ""  # question=...,answer=... for a file with columns of its own
    rule: str = "auto"  # how answers are compared: number, choice, text; auto: as the answer looks
    samples: int = 8  # responses per question
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 4096  # new tokens per response at most; one that reaches it is not used
    limit: int = 0  # only the first questions; 0: all
    seed: int = 0
    threads: int = 0  # CPU threads of torch; 0: its own choice
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self):
        at_least(self, 2, "samples")
        at_least(self, 0, "limit", "threads")
        one_of("rule", self.rule, ("auto", "number", "choice", "text"))
        if self.temperature <= 0:
            raise UserError(f"temperature = {self.temperature}: responses that differ need one")


@dataclass
class LabelSettings(JudgeSettings):
    """Label pairs by a judge: by its votes, in both orders; ties are left out and counted."""

    data: str = ""  # jsonl, json or parquet of pairs; labels in it are not looked at
    out: str = ""  # jsonl to write
    columns: str = ""  # query=...,a=...,b=... for a file with columns of its own


@dataclass
class Question:
    """A question and the answers that are right."""

    query: str | list  # text or messages
    known: list[str]
    rule: str  # number, choice or text
    id: str


# -- questions


def read_questions(path, columns="", rule="auto"):
    r"""Read questions with known answers -> list of Question.

    The answer may be bare or worked (GSM8K's `#### 18`, \boxed{18}), or stand in verl's
    reward_model.ground_truth, there also as a JSON list of several. Raises UserError that names the
    line.
    """
    given = {role: (name,) for role, name in parse_columns(columns, COLUMNS).items()}
    return read_all(path, "questions", question_from, COLUMNS | given, rule)


def question_from(record, where, number, columns, rule):
    """One row -> Question. columns: of questions and of answers, the first that is there."""
    asked, answered = (next(filter(record.__contains__, n), None) for n in columns.values())
    if asked is None or answered is None:
        raise UserError(
            f"{where}: columns {', '.join(record)} hold no question and answer that are known "
            "by name; try --columns question=...,answer=..."
        )
    known = known_answers(record[answered], f"{where}: {answered}")
    query = as_query(record[asked], f"{where}: {asked}")
    kind = answers.kind_of(known[0]) if rule == "auto" else rule
    return Question(query, known, kind, id_of(record, number))


def known_answers(value, where):
    """A cell with an answer, bare or worked, or several -> the answers, not one of them empty."""
    if isinstance(value, dict):
        value = value.get("ground_truth")
    if isinstance(value, str) and value.strip().startswith('["'):
        value = parse(value, where)
    texts = [as_text(text, where) for text in (value if isinstance(value, list) else [value])]
    known = [answers.marked(text) or text.strip() for text in texts]
    if not known or not all(known):
        raise UserError(f"{where}: no answer in it")
    return known


# -- responses


def question_prompt(tokenizer, question):
    """Prompt ids that ask a model for a response, and whether they end inside opened thinking."""
    query = question.query
    if prompts.template_of(tokenizer) != "toy":
        talk = [{"role": "user", "content": query}] if isinstance(query, str) else query
        ask = CHOOSE if question.rule == "choice" else ANSWER
        query = [*talk[:-1], {**talk[-1], "content": f"{talk[-1]['content']}\n\n{ask}"}]
    ids = prompts.query_prompt(tokenizer, query)
    return ids, prompts.opens_thinking(tokenizer, ids)


def response_of(completion, opened):
    """A completion's text without the thinking, or None if it never came to an end."""
    response = after_thinking(completion.text, opened)
    return None if completion.finish_reason != "stop" else (response or "").strip() or None


def check(response, question):
    """("right" | "wrong" | "undecided" | "unfinished", the answer in it or None)."""
    if response is None:
        return "unfinished", None
    answer = answers.extract(response, question.rule)
    outcomes = {answer and answers.same(answer, known) for known in question.known}
    if True in outcomes:
        return "right", answer
    return ("wrong" if outcomes == {False} else "undecided"), answer


def pair_of(question, checked, about):
    """The Pair of a question and why there is none: (Pair | None, what the question counts as).

    checked: [(response, outcome, answer), ...] of its samples; about: what goes into meta.
    """
    responses, outcomes, found = zip(*checked)
    if missing := [f"no {side}" for side in ("right", "wrong") if side not in outcomes]:
        return None, " and ".join(missing) + " response"
    right, wrong = outcomes.index("right"), outcomes.index("wrong")
    meta = {
        **about,
        "rule": question.rule,
        "known": question.known,
        "answers": {"right": found[right], "wrong": found[wrong]},
        "samples": {"right": right, "wrong": wrong},
        "right_of": [outcomes.count("right"), len(outcomes)],
    }
    pair = Pair(question.query, responses[right], responses[wrong], 1, question.id, "synth", meta)
    return shuffled(pair), "kept"


def make_pairs(cfg):
    """Questions -> responses -> pairs, with every question and every response accounted for."""
    check_paths(cfg, ("model", "data", "out"))
    questions = read_questions(cfg.data, cfg.columns, cfg.rule)[: cfg.limit or None]
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    engine = Engine.from_pretrained(cfg.model, cfg.engine)
    decoding = {k: getattr(cfg, k) for k in ("seed", "temperature", "top_p", "max_tokens")}
    params = SamplingParams(n=cfg.samples, logprobs=False, **decoding)
    about = {"model": cfg.model, "data": cfg.data, **decoding}
    fates, outcomes = Counter(), Counter()

    def rows():
        for start in tqdm(range(0, len(questions), BATCH), desc="questions", disable=None):
            some = questions[start : start + BATCH]
            asked = [(q, *question_prompt(engine.tokenizer, q)) for q in some]
            fitting = [one for one in asked if not engine.refusal(one[1], params)]
            fates["too long"] += len(asked) - len(fitting)
            groups = engine.generate([ids for _, ids, _ in fitting], params)
            for (question, _, opened), group in zip(fitting, groups):
                responses = [response_of(completion, opened) for completion in group]
                checked = [(r, *check(r, question)) for r in responses]
                outcomes.update(outcome for _, outcome, _ in checked)
                pair, fate = pair_of(question, checked, about)
                fates[fate] += 1
                if pair:
                    yield asdict(pair)
        print(f"{cfg.data}: {tally(fates, 'questions')}\n{tally(outcomes, 'responses')}")
        if not fates["kept"]:
            raise UserError("no question has both a right and a wrong response: nothing written")

    write_rows(cfg.out, rows())
    print(f"{cfg.out}: {fates['kept']} pairs")


# -- labels


def label_pairs(cfg):
    """Pairs -> the same pairs with the judge's label, with every pair accounted for."""
    if not cfg.model and not cfg.endpoint:
        raise UserError("give --model or --endpoint")
    check_paths(cfg, ("data", "out"))
    pairs = read_pairs(cfg.data, cfg.columns)
    judge = open_judge(cfg)
    settings = cfg.votes, cfg.both_orders, cfg.max_think_tokens
    verdicts = judge.compare(pairs, *settings, progress="labelling")
    name = cfg.model or f"{judge.backend.name} at {cfg.endpoint}"
    about = {"judge": name, "judge_temperature": cfg.temperature, "judge_seed": cfg.seed}
    rows, agree = [], []
    for pair, v in zip(pairs, verdicts):
        if v.winner:
            votes = {"p_first": v.p_first, "votes": len(v.votes), "invalid": v.invalid}
            meta = {**pair.meta, **about, **votes, "label_before": pair.label}
            rows.append(asdict(replace(pair, label=v.winner, meta=meta)))
            agree += [pair.label == v.winner] if pair.label else []
    print(f"{cfg.data}: {tally(Counter(map(fate_of, verdicts)), 'pairs')}")
    for reason in sorted({v.skipped for v in verdicts if v.skipped})[:3]:
        print(f"skipped, for example: {reason}")
    if not rows:
        raise UserError("the judge decided no pair: nothing written")
    write_rows(cfg.out, rows)
    print(f"{cfg.out}: {len(rows)} pairs")
    if agree:
        print(f"{sum(agree)} of {len(agree)} labels that were there agree")


def fate_of(verdict):
    """What becomes of a judged pair."""
    if verdict.skipped or verdict.winner:
        return "skipped" if verdict.skipped else "labelled"
    return "unreadable" if verdict.p_first is None else "tied"


# -- shared


def check_paths(cfg, names):
    """Raise UserError if a path is not given or the output can't be written, before the work."""
    for name in names:
        if not getattr(cfg, name):
            raise UserError(f"give --{name}")
    out = Path(cfg.out)
    if out.exists():
        raise UserError(f"{out}: exists already; remove it or give another --out")
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: no such folder")


def tally(counts, what):
    """Counts in words that add up: `5 questions = 3 kept + 2 too long`."""
    parts = " + ".join(f"{n} {name}" for name, n in counts.most_common() if n)
    return f"{counts.total()} {what} = {parts}"


COMMANDS = {"pairs": (PairsSettings, make_pairs), "label": (LabelSettings, label_pairs)}


def main():
    name, cfg = parse_command(COMMANDS, __doc__, sys.argv[1:])
    COMMANDS[name][1](cfg)


if __name__ == "__main__":
    run_script(main)
