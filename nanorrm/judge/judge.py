"""The judge at work: pairs in, verdicts out, by votes in both orders.

A vote is one generation. Showing the same pair in both orders and pooling the votes cancels a
preference for the first or second slot, and shows it. Each pair is a Case: `_prepare` makes its
prompts, `_ask` collects its answers, `_conclude` makes them its verdict.
"""

from dataclasses import dataclass, field, replace
from functools import partial

from nanorrm.config import UserError, one_of
from nanorrm.engine.sampling import SamplingParams
from nanorrm.judge import prompts
from nanorrm.judge.backends import EngineBackend
from nanorrm.judge.journal import Journal
from nanorrm.judge.verdict import Refusal, Request, Verdict
from nanorrm.records import Pair


@dataclass(eq=False)
class Case:
    """A pair on its way to its verdict."""

    pair: Pair  # as it came
    shown: Pair  # its responses cut, if they had to be
    verdict: Verdict = field(default_factory=Verdict)
    prompts: dict = field(default_factory=dict)  # swapped -> prompt
    answers: dict = field(default_factory=dict)  # (swapped, sample) -> Answer | Refusal

    def refusal(self):
        """The first refusal among the answers, or None."""
        return next((x for x in self.answers.values() if isinstance(x, Refusal)), None)


class Judge:
    """A prompt, a parser and a backend that generates.

    backend: an Engine, or a backend as in backends.py; template: "rrm" or "toy"; think=False closes
    the thinking in the prompt (DirectJudge; with an endpoint: the model answers without tags).
    overlong: what becomes of a pair that does not fit the model: "skip" it, or "cut" its responses,
    the longer first, keeping their ends. multi_turn: "refuse" conversations, or "render" them as a
    transcript. journal: a jsonl file that answers go to as they come and are taken from again.
    Defaults of decoding are the paper's: temperature 0.6, 8,192 new tokens.
    """

    def __init__(
        self, backend, template="rrm", temperature=0.6, max_tokens=8192, think=True, seed=0,
        overlong="skip", multi_turn="refuse", journal=None,
    ):  # fmt: skip
        one_of("overlong", overlong, ("skip", "cut"))
        one_of("multi_turn", multi_turn, ("refuse", "render"))
        self.backend = backend if hasattr(backend, "ask") else EngineBackend(backend)
        self.template, self.think = template, think
        self.temperature, self.max_tokens, self.seed = temperature, max_tokens, seed
        self.overlong, self.multi_turn = overlong, multi_turn
        self.prompt(Pair("", "", ""))  # a template that can't be used fails here, not pair by pair
        self.journal = Journal(journal) if journal else None

    def prompt(self, pair, swap=False):
        """The prompt of a pair (ids, or messages for an endpoint), with b shown first if swap."""
        pair = pair.flipped() if swap else pair
        query = pair.query
        if not isinstance(query, str):
            if self.multi_turn == "refuse":
                raise UserError("a conversation of several turns (multi_turn = render shows it)")
            query = prompts.transcript(query)
        try:
            f"{query}{pair.a}{pair.b}".encode()
        except UnicodeEncodeError:
            raise UserError("a text that holds half a character (a lone surrogate)") from None
        return self.backend.prompt(query, pair.a, pair.b, self.template, self.think)

    def check_fits(self):
        """Raise UserError if not even an empty pair fits the model with these settings."""
        params = SamplingParams(max_tokens=self.max_tokens)
        if refusal := self.backend.refusal(self.prompt(Pair("", "", "")), params):
            raise UserError(f"even an empty pair does not fit: {refusal}")

    def compare(
        self, pairs, votes=1, both_orders=True, max_think_tokens=None, progress=None, seed=None
    ):
        """Judge pairs -> list of Verdict, in order.

        votes: generations per order; both_orders: also show each pair with a and b exchanged;
        max_think_tokens: budget after which the engine closes the thinking; progress: label of a
        progress bar; seed: in place of the judge's own, for further votes on the same pairs. A pair
        that is not judged has its verdict say why.
        """
        params = SamplingParams(
            n=votes,
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            max_think_tokens=max_think_tokens,
            seed=self.seed if seed is None else seed,
            logprobs=False,
        )
        orders = (False, True) if both_orders else (False,)
        cases = [Case(pair, pair) for pair in pairs]
        for case in cases:
            self._prepare(case, orders, params)
        waiting = [case for case in cases if not case.verdict.skipped]
        while waiting:
            self._ask(waiting, params, progress)
            waiting = [case for case in waiting if self._too_long(case)]
        return [self._conclude(case) for case in cases]

    def _prepare(self, case, orders, params):
        """Make a case's prompts, its responses cut if they must and may be; or say why it is
        skipped."""

        def refusal(shown):
            self._show(case, shown, orders)
            refusals = (self.backend.refusal(prompt, params) for prompt in case.prompts.values())
            return next(filter(None, refusals), None)

        try:
            reason = refusal(case.pair)
            if reason and self.overlong == "cut" and not refusal(cut(case.pair, 0)):
                fits, not_all = 0, len(case.pair.a) + len(case.pair.b)
                while not_all - fits > 16:  # characters: near enough
                    middle = (fits + not_all) // 2
                    if refusal(cut(case.pair, middle)):
                        not_all = middle
                    else:
                        fits = middle
                reason = refusal(cut(case.pair, fits))
            case.verdict.skipped = reason or ""
        except UserError as error:
            case.verdict.skipped = str(error)

    def _show(self, case, shown, orders):
        case.shown = shown
        case.prompts = {swapped: self.prompt(shown, swapped) for swapped in orders}

    def _ask(self, cases, params, progress):
        """Fill the answers of cases: n for each of their prompts."""
        case_of = {
            Request(prompt, sample, case.pair, swapped): case
            for case in cases
            for swapped, prompt in case.prompts.items()
            for sample in range(params.n)
        }

        def heard(request, answer):
            case_of[request].answers[request.swapped, request.sample] = answer

        ask = partial(self.journal.ask, self.backend) if self.journal else self.backend.ask
        ask(list(case_of), params, heard, progress)

    def _too_long(self, case):
        """Whether the server found a case too long and it is to be asked again, cut further.

        Under 200 characters it is not the responses that are too long.
        """
        refusal, left = case.refusal(), len(case.shown.a) + len(case.shown.b)
        if not (refusal and refusal.too_long and self.overlong == "cut" and left > 200):
            return False
        self._show(case, cut(case.pair, int(0.85 * left)), list(case.prompts))
        for answer in case.answers.values():
            case.verdict.errors.update(answer.errors)
        case.answers = {}
        return True

    def _conclude(self, case):
        """Answers -> verdict."""
        verdict, pair, shown = case.verdict, case.pair, case.shown
        if refusal := case.refusal():
            verdict.skipped = refusal.reason
        if not verdict.skipped:
            lost = {"a": len(pair.a) - len(shown.a), "b": len(pair.b) - len(shown.b)}
            verdict.cut = {name: n for name, n in lost.items() if n}
        for swapped, sample in sorted(case.answers):
            verdict.count(case.answers[swapped, sample], swapped, closed=not self.think)
        return verdict


def cut(pair, room):
    """The pair with the ends of its responses: `room` characters together at most, as evenly as
    can be, the longer cut first.

    >>> [(len(p.a), len(p.b)) for p in (cut(Pair("q", "a" * 10, "b" * n), 8) for n in (3, 30))]
    [(5, 3), (4, 4)]
    """
    a, b = len(pair.a), len(pair.b)
    keep_a = min(a, max(room - b, room // 2))
    keep_b = min(b, room - keep_a)
    return replace(pair, a=pair.a[a - keep_a :], b=pair.b[b - keep_b :])
