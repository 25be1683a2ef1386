"""Who answers a judge: the engine here, a server (endpoint.py), or answers recorded before.

A backend is anything with
    name                                       which model answers: part of a journal's keys
    prompt(query, a, b, template, think)       what is sent for one comparison, a shown first (JSON)
    refusal(prompt, params)                    why it can't be served, if known before asking
    ask(requests, params, heard, progress=None)
    sleep()                                    give memory back until it is asked again
and `ask` calls heard(request, Answer | Refusal) once for every request, as the answers come.
"""

import hashlib
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace

from nanorrm.config import UserError
from nanorrm.engine.engine import Engine
from nanorrm.judge import journal, prompts, verdict
from nanorrm.records import Pair, flip


@dataclass(eq=False)
class Request:
    """One vote to ask for."""

    prompt: list  # token ids or chat messages
    sample: int  # which of the votes for this prompt
    pair: Pair
    swapped: bool  # whether b is shown first


@dataclass
class Answer:
    """One generation and what it cost."""

    text: str  # thinking, </think>, verdict
    finish_reason: str  # "stop", "length", or another word of the server's
    tokens: int  # generated
    think_tokens: int  # of these, the thinking
    prompt_tokens: int  # read; an engine reads a prompt once for all its votes
    seconds: float  # engine: since the answer before it, so that they add up; endpoint: its own
    errors: dict = field(default_factory=dict)  # kind -> failed tries before it


@dataclass
class Refusal:
    """Why a request got no answer."""

    reason: str
    too_long: bool = False  # the prompt does not fit the model
    errors: dict = field(default_factory=dict)


class EngineBackend:
    """An Engine, or what has its `tokenizer`, `refusal` and `generate`; all else is its own."""

    def __init__(self, engine):
        self.engine = engine

    def __getattr__(self, name):
        return getattr(self.engine, name)

    @property
    def name(self):
        """A hash of the weights: the first numbers of every parameter."""
        content = hashlib.blake2b(digest_size=16)
        for name, p in self.engine.model.named_parameters():
            content.update(f"{name}{tuple(p.shape)}".encode())
            content.update(p.detach().reshape(-1)[:64].float().cpu().numpy().tobytes())
        return content.hexdigest()

    def prompt(self, query, a, b, template, think):
        """Prompt ids."""
        return prompts.judge_prompt(self.engine.tokenizer, query, a, b, template, think)

    def ask(self, requests, params, heard, progress=None):
        """Generate; where a prompt lacks one of its votes, those before it are made again."""
        groups = defaultdict(lambda: defaultdict(list))  # prompt -> sample -> requests
        for request in requests:
            groups[tuple(request.prompt)][request.sample].append(request)
        wanted = list(groups.values())
        each = [replace(params, n=1 + max(samples)) for samples in wanted]
        if all(p == params for p in each):
            each = params
        clock = time.perf_counter()

        def done(i, sample, completion, seconds=None):
            nonlocal clock
            if seconds is None:
                seconds, clock = time.perf_counter() - clock, time.perf_counter()
            for request in wanted[i][sample]:
                read = len(request.prompt) if sample == 0 else 0
                text, reason, new = completion.text, completion.finish_reason, len(completion.ids)
                heard(request, Answer(text, reason, new, completion.think_tokens, read, seconds))

        asked = [list(prompt) for prompt in groups]
        if isinstance(self.engine, Engine):
            self.engine.generate(asked, each, progress, done)
            return
        answers = self.engine.generate(asked, each, progress)  # all at once, as from several ranks
        seconds = (time.perf_counter() - clock) / max(1, sum(map(len, answers)))
        for i, group in enumerate(answers):
            for sample, completion in enumerate(group):
                done(i, sample, completion, seconds)


class ReplayBackend:
    """Answers recorded before, in a table or a journal: no model is asked.

    table: {pair id: votes} with votes as in Verdict.votes (1: for a, 2: for b, None: unreadable), a
    list for the given order alone, or two lists, {"given": [...], "swapped": [...]}.
    """

    name = "replay"

    def __init__(self, table):
        self.recorded = {}  # (pair id, swapped, sample) or (content, sample) -> Answer
        for pair, votes in table.items():
            orders = votes if isinstance(votes, dict) else {"given": votes}
            for order, listed in orders.items():
                swapped = ("given", "swapped").index(order)
                for sample, vote in enumerate(listed):
                    slot = flip(vote) if swapped else vote
                    text = f"</think>{verdict.verdict_text(slot)}" if slot else "</think>"
                    answer = Answer(text, "stop", 0, 0, 0, 0.0)
                    self.recorded[str(pair), bool(swapped), sample] = answer
        self.source, self.place = "the table", lambda r: (r.pair.id, r.swapped, r.sample)

    @classmethod
    def from_journal(cls, path):
        """Play what a Judge(journal=path) wrote. Pairs are known by content, whatever their id."""
        self = cls({})
        self.source, self.place = str(path), lambda r: (content_of(r), r.sample)
        for record in journal.parse(path)[0]:
            place = record["content"], record["sample"]
            if place in self.recorded:
                raise UserError(
                    f"{path}: pair {record['pair']!r} was answered more than once, by several "
                    "models or under several settings; a replay needs a journal of one"
                )
            self.recorded[place] = answer_of(record)
        return self

    def prompt(self, query, a, b, template, think):
        """What stands in the place of a prompt."""
        return [query, a, b]

    def refusal(self, prompt, params):
        """Nothing is too long to be replayed."""

    def sleep(self):
        """There is no memory here to give back."""

    def ask(self, requests, params, heard, progress=None):
        """Look every request up; raises UserError at the first that was not recorded."""
        for request in requests:
            place = self.place(request)
            if place not in self.recorded:
                order = "b, a" if request.swapped else "a, b"
                raise UserError(
                    f"{self.source} holds no vote {request.sample + 1} of pair "
                    f"{request.pair.id!r} shown as {order}"
                )
            heard(request, self.recorded[place])


def content_of(request):
    """A hash of the texts in the order they are shown, whatever the template and the model."""
    pair, swapped = request.pair, request.swapped
    text = repr((pair.query, *((pair.b, pair.a) if swapped else (pair.a, pair.b))))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


FIELDS = ("text", "finish_reason", "tokens", "think_tokens", "prompt_tokens", "seconds")


def record_of(request, answer, key, model):
    """A line of the journal: the answer, under its key, with what it answers."""
    about = {"key": key, "pair": request.pair.id, "content": content_of(request)}
    about |= {"swapped": request.swapped, "sample": request.sample, "model": model}
    about |= {name: getattr(answer, name) for name in FIELDS}
    return {**about, "errors": answer.errors} if answer.errors else about


def answer_of(record):
    """The answer in a line of the journal."""
    return Answer(*(record[name] for name in FIELDS), record.get("errors", {}))
