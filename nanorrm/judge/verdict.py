"""What a judge's text says: the parser of a verdict, and the votes on one pair."""

from collections import Counter
from dataclasses import dataclass, field

from nanorrm.model.tokenizer import END_THINK, THINK, after_thinking
from nanorrm.records import flip


@dataclass
class Verdict:
    """What the votes say about one pair. The lists run parallel, one entry per generation."""

    votes: list[int | None] = field(default_factory=list)  # 1: for a, 2: for b, None: unreadable
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
        """How many votes could not be read."""
        return sum(vote is None for vote in self.votes)

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
        given = [vote for vote, s in zip(self.votes, self.swapped) if not s]
        return majority(given), majority([vote for vote, s in zip(self.votes, self.swapped) if s])


def majority(votes):
    """The more frequent of 1 and 2 among votes; None if neither is."""
    count = Counter(votes)
    return None if count[1] == count[2] else 1 if count[1] > count[2] else 2


NO_ANSWER = "[NO ANSWER]"


def verdict_text(winner):
    r"""1 | 2 -> the box a judge must end with: \boxed{Assistant 1}."""
    return rf"\boxed{{Assistant {winner}}}"


def parse_verdict(text, closed=False):
    r"""Completion text -> 1, 2 or None (unreadable), by the rule of the released evaluation code.

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
