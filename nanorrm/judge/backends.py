"""Who answers a judge: the engine here, a server (endpoint.py), or answers recorded before."""

import hashlib
import time
from collections import defaultdict
from dataclasses import replace

from nanorrm.config import UserError
from nanorrm.judge import journal, prompts
from nanorrm.judge.verdict import Answer, verdict_text
from nanorrm.records import flip


class Backend:
    """What a Judge asks. `name` says which model answers: it is part of a journal's keys."""

    name: str

    def prompt(self, query, a, b, template, think):
        """What is sent for one comparison, a shown first (JSON)."""
        raise NotImplementedError

    def ask(self, requests, params, heard, progress=None):
        """Call heard(request, Answer | Refusal) once for every request, as the answers come."""
        raise NotImplementedError

    def refusal(self, prompt, params):
        """Why a prompt can't be served, if that is known before asking."""

    def sleep(self):
        """Give memory back until asked again."""


class EngineBackend(Backend):
    """An Engine, or what shares one among ranks, as a backend."""

    def __init__(self, engine):
        """engine: has tokenizer, model, refusal, generate and sleep, as an Engine has them."""
        self.engine, self.tokenizer = engine, engine.tokenizer

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
        return prompts.judge_prompt(self.tokenizer, query, a, b, template, think)

    def refusal(self, prompt, params):
        """As Engine.refusal."""
        return self.engine.refusal(prompt, params)

    def generate(self, prompts, params=None, progress=None):
        """As Engine.generate."""
        return self.engine.generate(prompts, params, progress)

    def sleep(self):
        """As Engine.sleep."""
        self.engine.sleep()

    def ask(self, requests, params, heard, progress=None):
        """Generate; where a prompt lacks one of its votes, those before it are made again."""
        groups = defaultdict(lambda: defaultdict(list))  # prompt -> sample -> requests
        for request in requests:
            groups[tuple(request.prompt)][request.sample].append(request)
        wanted = list(groups.values())
        clock = time.perf_counter()

        def done(i, sample, completion):
            nonlocal clock
            seconds, clock = time.perf_counter() - clock, time.perf_counter()
            for request in wanted[i][sample]:
                read = len(request.prompt) if sample == 0 else 0
                text, reason, new = completion.text, completion.finish_reason, len(completion.ids)
                heard(request, Answer(text, reason, new, completion.think_tokens, read, seconds))

        each = [replace(params, n=1 + max(samples)) for samples in wanted]
        self.engine.generate([list(prompt) for prompt in groups], each, progress, done)


class ReplayBackend(Backend):
    """Answers recorded before, in a table or a journal: no model is asked.

    table: {pair id: votes} with votes as in Verdict.votes (1: for a, 2: for b, None: invalid), a
    list for the given order alone, or two lists, {"given": [...], "swapped": [...]}.
    """

    name = "replay"

    def __init__(self, table):
        self.recorded = {}  # place of a request -> Answer
        for pair, votes in table.items():
            orders = votes if isinstance(votes, dict) else {"given": votes}
            for order, listed in orders.items():
                swapped = ("given", "swapped").index(order) == 1
                for sample, vote in enumerate(listed):
                    slot = flip(vote) if swapped else vote
                    text = f"</think>{verdict_text(slot)}" if slot else "</think>"
                    answer = Answer(text, "stop", 0, 0, 0, 0.0)
                    self.recorded[str(pair), swapped, sample] = answer
        self.source, self.place = "the table", lambda r: (r.pair.id, r.swapped, r.sample)

    @classmethod
    def from_journal(cls, path):
        """Play what a Judge(journal=path) wrote. Pairs are known by content, whatever their id."""
        self = cls({})
        self.source, self.place = str(path), lambda r: (journal.content_of(r), r.sample)
        for record in journal.parse(path)[0]:
            place = record["content"], record["sample"]
            if place in self.recorded:
                raise UserError(
                    f"{path}: pair {record['pair']!r} was answered more than once, by several "
                    "models or under several settings; a replay needs a journal of one"
                )
            self.recorded[place] = journal.answer_of(record)
        return self

    def prompt(self, query, a, b, template, think):
        """What stands in the place of a prompt."""
        return [query, a, b]

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
