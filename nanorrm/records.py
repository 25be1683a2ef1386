"""The records that all wings pass around: Pair, Ranking, Query."""

import hashlib
from dataclasses import dataclass, field, replace


@dataclass
class Pair:
    """A query and two responses; label says which is better."""

    query: str | list  # text, or messages [{"role", "content"}] of a conversation
    a: str
    b: str
    label: int | None = None  # 1: a, 2: b, None: unknown
    id: str = ""
    source: str = ""
    meta: dict = field(default_factory=dict)

    def flipped(self):
        """The same pair with its responses exchanged."""
        return replace(self, a=self.b, b=self.a, label=flip(self.label))


def flip(side):
    """1 and 2 exchanged, None as it is: a label or vote when the responses change places."""
    return side and 3 - side


@dataclass
class Ranking:
    """A query and its responses, for best-of-N; truth says how good each is."""

    query: str | list  # text, or messages [{"role", "content"}] of a conversation
    responses: list[str]
    truth: list[float | bool] | None = None  # one per response, higher is better; None: unknown
    id: str = ""
    source: str = ""
    meta: dict = field(default_factory=dict)


def stable_coin(text):
    """0 or 1 from a text, the same in every process."""
    return hashlib.blake2b(text.encode(), digest_size=1).digest()[0] & 1


def shuffled(pair, *key):
    """The pair with its responses in an order that depends on its content and the key alone."""
    coin = stable_coin("\n".join(map(str, (*key, pair.query, pair.a, pair.b))))
    return pair.flipped() if coin else pair


@dataclass
class Query:
    """Something to answer."""

    text: str | list  # or messages [{"role", "content"}] of a conversation
    truth: str | None = None  # the right answer, never shown to training
    meta: dict = field(default_factory=dict)
