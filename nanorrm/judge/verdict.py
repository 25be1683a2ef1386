r"""One vote from its request to its verdict; how a verdict is read stands here and nowhere else.

A judge is asked (Request) and generates (Answer), or can't (Refusal). What it generated names
Assistant 1 or 2 in a box behind its thinking; a vote that does not is invalid. All votes on a pair,
both orders together, are its Verdict.
"""

from collections import Counter
from dataclasses import dataclass, field, fields, replace

from nanorrm.model.tokenizer import END_THINK, THINK, after_thinking
from nanorrm.records import Pair, flip

NO_ANSWER = "[NO ANSWER]"


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


def verdict_text(winner):
    r"""1 | 2 -> the box a judge must end with: \boxed{Assistant 1}."""
    return rf"\boxed{{Assistant {winner}}}"


def parse_verdict(text, closed=False):
    r"""Completion text -> 1, 2 or None (invalid), by the rule of the released evaluation code.

    The thinking must be closed (closed=True: the prompt closed it); after it the last brace-matched
    \boxed{...} must hold exactly `Assistant 1` or `Assistant 2`.

    >>> parse_verdict(r"so 18</think>\boxed{Assistant 2}")
    2
    >>> parse_verdict(r"</think>\boxed{Assistant 2} or \boxed{both}") is None
    True
    """
    said = text if closed else after_thinking(text, opened=True)
    return None if said is None else {"Assistant 1": 1, "Assistant 2": 2}.get(last_boxed(said))


def last_boxed(text):
    r"""The content of the last \boxed{...} whose braces match, or None.

    >>> last_boxed(r"\boxed{a} \boxed{b{c}} \boxed{d")
    'b{c}'
    """
    start = text.rfind(r"\boxed{")
    while start >= 0:
        depth = 0
        for i in range(start + 6, len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[start + 7 : i]
        start = text.rfind(r"\boxed{", 0, start)
    return None


def thought_of(text, closed=False):
    """The thinking part of a completion, without its tags."""
    return "" if closed else text.split(END_THINK)[0].removeprefix(THINK).strip()


@dataclass
class Verdict:
    """What the votes say about one pair. The lists run parallel, one entry per generation."""

    votes: list[int | None] = field(default_factory=list)  # 1: for a, 2: for b, None: invalid
    swapped: list[bool] = field(default_factory=list)  # whether b was shown as Assistant 1
    thoughts: list[str] = field(default_factory=list)
    vote_tokens: list[int] = field(default_factory=list)  # generated
    finish_reasons: list[str] = field(default_factory=list)  # "stop", "length", ...
    tokens: int = 0  # generated for this pair
    think_tokens: int = 0  # of these, the thinking
    prompt_tokens: int = 0  # read for this pair
    seconds: float = 0.0  # an endpoint's by request; an engine's share of its batch
    truncated: int = 0  # generations that ran into the token limit
    cut: dict[str, int] = field(default_factory=dict)  # "a", "b" -> characters not shown
    errors: Counter = field(default_factory=Counter)  # failed tries at an endpoint, by kind
    skipped: str = ""  # why the pair was not judged at all (then there are no votes)

    @property
    def invalid(self):
        """How many votes name neither response."""
        return self.votes.count(None)

    @property
    def p_first(self):
        """Share of the valid votes for `a`; None if no vote is valid."""
        valid = len(self.votes) - self.invalid
        return self.votes.count(1) / valid if valid else None

    @property
    def winner(self):
        """1 (a) or 2 (b); None if the votes are tied or none is valid."""
        return majority(self.votes)

    @property
    def slots(self):
        """Which slot, Assistant 1 or 2, each vote named."""
        return [flip(vote) if s else vote for vote, s in zip(self.votes, self.swapped)]

    def by_order(self):
        """The winner by the votes in the given order and by those in the swapped order."""
        votes = list(zip(self.votes, self.swapped))
        return tuple(majority([vote for vote, s in votes if s == order]) for order in (False, True))

    def count(self, answer, swapped, closed=False):
        """Add an Answer, its vote and what it cost. closed: the prompt closed the thinking.

        Of a Refusal, failed tries are added; of an answer about a pair that is skipped, its cost.
        """
        self.errors.update(answer.errors)
        if isinstance(answer, Refusal):
            return
        self.tokens += answer.tokens
        self.think_tokens += answer.think_tokens
        self.prompt_tokens += answer.prompt_tokens
        self.seconds += answer.seconds
        if self.skipped:
            return
        slot = parse_verdict(answer.text, closed)
        self.votes.append(flip(slot) if swapped else slot)
        self.swapped.append(swapped)
        self.thoughts.append(thought_of(answer.text, closed))
        self.vote_tokens.append(answer.tokens)
        self.finish_reasons.append(answer.finish_reason)
        self.truncated += answer.finish_reason == "length"

    def __add__(self, more):
        """One Verdict of two on a pair: votes and costs add up, the rest is the first one's."""
        names = [f.name for f in fields(self) if f.name not in ("cut", "skipped")]
        return replace(self, **{name: getattr(self, name) + getattr(more, name) for name in names})

    def flipped(self):
        """The same votes as of the pair with its responses exchanged."""
        votes, swapped = [flip(vote) for vote in self.votes], [not s for s in self.swapped]
        return replace(self, votes=votes, swapped=swapped)


def majority(votes):
    """The more frequent of 1 and 2 among votes; None if neither is."""
    ones, twos = votes.count(1), votes.count(2)
    return None if ones == twos else 1 if ones > twos else 2
