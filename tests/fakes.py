"""Judges whose answers are known, for tests of what is computed from them."""

import random

from nanorrm.judge.verdict import Verdict
from nanorrm.records import flip


class FakeJudge:
    """A judge that asks answer(pair, swapped, rng) -> the slot named, 1 | 2, or None (invalid).

    Each vote's chance depends on the seed, the pair and the vote's index, as with the engine.
    """

    def __init__(self, answer, seed=0):
        self.answer, self.seed = answer, seed
        self.asked = []  # every pair, in order
        self.calls = 0

    def compare(
        self, pairs, votes=1, both_orders=True, max_think_tokens=None, progress=None, seed=0
    ):
        self.calls += 1
        self.asked += pairs
        verdicts = []
        for pair in pairs:
            verdict = Verdict()
            for swapped in (False, True)[: 1 + both_orders]:
                for index in range(votes):
                    key = f"{self.seed}|{seed}|{pair.query}|{pair.a}|{pair.b}|{swapped}|{index}"
                    slot = self.answer(pair, swapped, random.Random(key))
                    verdict.votes.append(flip(slot) if swapped else slot)
                    verdict.swapped.append(swapped)
                    verdict.thoughts.append("so")
                    verdict.finish_reasons.append("stop")
                    verdict.vote_tokens.append(3)
                    verdict.tokens += 3
                    verdict.think_tokens += 1
            verdicts.append(verdict)
        return verdicts


def slot_of(label, swapped):
    """The slot in which the response a label names (1: a, 2: b) is shown."""
    return flip(label) if swapped else label


def oracle(pair, swapped, rng):
    return slot_of(pair.label, swapped)


def says_a(pair, swapped, rng):
    """Constant in the file's terms: response a is better."""
    return slot_of(1, swapped)


def first_slot(pair, swapped, rng):
    """Constant in the prompt's terms: Assistant 1."""
    return 1


def coin(pair, swapped, rng):
    return rng.choice((1, 2))


def often_right(share):
    """Right with the given chance, each vote alone."""
    return lambda pair, swapped, rng: slot_of(
        pair.label if rng.random() < share else flip(pair.label), swapped
    )


def biased(share):
    """The oracle, but names slot 1 blindly in this share of votes."""
    return lambda pair, swapped, rng: 1 if rng.random() < share else slot_of(pair.label, swapped)


def unreadable(share):
    """The oracle, but this share of votes can't be read."""
    return lambda pair, swapped, rng: None if rng.random() < share else slot_of(pair.label, swapped)


def larger(pair, swapped, rng):
    """Responses are numbers: the larger one is better, equal ones are a coin."""
    a, b = float(pair.a), float(pair.b)
    return coin(pair, swapped, rng) if a == b else slot_of(1 if a > b else 2, swapped)


def solver(share):
    """The embedded world, solved: names a right response with this chance, each vote alone."""

    def answer(pair, swapped, rng):
        value = str(eval(pair.query))
        if value not in (pair.a, pair.b):
            return rng.choice((1, 2))
        label = 1 if pair.a == value else 2
        return slot_of(label if rng.random() < share else flip(label), swapped)

    return answer
