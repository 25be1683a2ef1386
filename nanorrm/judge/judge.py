"""The judge at work: pairs in, verdicts out, by votes in both orders.

A vote is one generation. Showing the same pair in both orders and pooling the votes cancels a
preference for the first or second slot, and shows it.
"""

from dataclasses import dataclass, field, replace

from nanorrm.config import UserError, one_of
from nanorrm.engine.sampling import SamplingParams
from nanorrm.judge import prompts
from nanorrm.judge.backends import Answer, EngineBackend, Refusal, Request, answer_of, record_of
from nanorrm.judge.journal import Journal, key_of
from nanorrm.judge.verdict import Verdict, parse_verdict, thought_of
from nanorrm.records import Pair, flip


@dataclass(eq=False)
class Case:
    """A pair on its way to its verdict."""

    pair: Pair  # as it came
    shown: Pair  # responses cut, conversation rendered
    verdict: Verdict = field(default_factory=Verdict)
    prompts: list = field(default_factory=list)  # [(swapped, prompt), ...]
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
        self,
        backend,
        template="rrm",
        temperature=0.6,
        max_tokens=8192,
        think=True,
        seed=0,
        overlong="skip",
        multi_turn="refuse",
        journal=None,
    ):
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
        a, b = (pair.b, pair.a) if swap else (pair.a, pair.b)
        query = pair.query
        if not isinstance(query, str):
            if self.multi_turn == "refuse":
                raise UserError("a conversation of several turns (multi_turn = render shows it)")
            query = prompts.transcript(query)
        try:
            f"{query}{a}{b}".encode()
        except UnicodeEncodeError:
            raise UserError("a text that holds half a character (a lone surrogate)") from None
        return self.backend.prompt(query, a, b, self.template, self.think)

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
        orders = (False, True)[: 1 + both_orders]
        cases = [Case(pair, pair) for pair in pairs]
        for case in cases:
            self._prepare(case, orders, params)
        waiting = [case for case in cases if not case.verdict.skipped]
        while waiting:
            self._ask(waiting, params, progress)
            waiting = [case for case in waiting if self._again(case, orders)]
        for case in cases:
            self._conclude(case)
        return [case.verdict for case in cases]

    def _prepare(self, case, orders, params):
        """Make a case's prompts, cut if they must and may be; or say why it is skipped."""

        def refusal(shown):
            case.shown = shown
            case.prompts = [(swapped, self.prompt(shown, swapped)) for swapped in orders]
            refusals = (self.backend.refusal(prompt, params) for _, prompt in case.prompts)
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

    def _again(self, case, orders):
        """Whether a case that the server found too long is to be asked again, cut further.

        Under 200 characters it is not the responses that are too long.
        """
        refusal, left = case.refusal(), len(case.shown.a) + len(case.shown.b)
        if not (refusal and refusal.too_long and self.overlong == "cut" and left > 200):
            return False
        case.shown = cut(case.pair, int(0.85 * left))
        case.prompts = [(swapped, self.prompt(case.shown, swapped)) for swapped in orders]
        for answer in case.answers.values():
            case.verdict.errors.update(answer.errors)
        case.answers = {}
        return True

    def _ask(self, cases, params, progress):
        """Fill the answers of cases, from the journal and from the backend."""
        model = self.backend.name if self.journal else None
        asked = {}  # key -> [(case, request), ...]: under a journal, equal questions are asked once
        for case in cases:
            for swapped, prompt in case.prompts:
                for sample in range(params.n):
                    key = key_of(model, prompt, params, sample) if self.journal else len(asked)
                    request = Request(prompt, sample, case.pair, swapped)
                    asked.setdefault(key, []).append((case, request))
        keys = {}  # the request that is sent for all of its key -> key

        def deliver(key, answer):
            for case, request in asked[key]:
                case.answers[request.swapped, request.sample] = answer

        def heard(request, answer):
            if self.journal and isinstance(answer, Answer):
                self.journal.add(record_of(request, answer, keys[request], model))
            deliver(keys[request], answer)

        for key, places in asked.items():
            if self.journal and key in self.journal.answers:
                deliver(key, answer_of(self.journal.answers[key]))
            else:
                keys[places[0][1]] = key
        try:
            self.backend.ask(list(keys), params, heard, progress)
        except UserError as error:
            if not self.journal:
                raise
            n, path = len(self.journal.answers), self.journal.path
            saved = f"{n} answers are saved in {path}, the same command goes on from there"
            raise UserError(f"{error}; {saved}") from None

    def _conclude(self, case):
        """Answers -> verdict."""
        verdict, refusal = case.verdict, case.refusal()
        verdict.skipped = verdict.skipped or (refusal.reason if refusal else "")
        if not verdict.skipped:
            lost = {
                name: len(getattr(case.pair, name)) - len(getattr(case.shown, name))
                for name in "ab"
            }
            verdict.cut = {name: n for name, n in lost.items() if n}
        for (swapped, _), answer in sorted(case.answers.items()):
            verdict.errors.update(answer.errors)
            if isinstance(answer, Refusal):
                continue
            verdict.tokens += answer.tokens
            verdict.think_tokens += answer.think_tokens
            verdict.prompt_tokens += answer.prompt_tokens
            verdict.seconds += answer.seconds
            if verdict.skipped:  # it cost something, but the votes are not all there
                continue
            slot = parse_verdict(answer.text, closed=not self.think)
            verdict.votes.append(flip(slot) if swapped else slot)
            verdict.swapped.append(swapped)
            verdict.thoughts.append(thought_of(answer.text, not self.think))
            verdict.vote_tokens.append(answer.tokens)
            verdict.finish_reasons.append(answer.finish_reason)
            verdict.truncated += answer.finish_reason == "length"


def cut(pair, room):
    """A pair with the ends of its responses, at most `room` characters together, as evenly as can
    be: the longer is cut first."""
    keep_a, keep_b = prompts.shares(len(pair.a), len(pair.b), room)
    return replace(pair, a=pair.a[len(pair.a) - keep_a :], b=pair.b[len(pair.b) - keep_b :])
