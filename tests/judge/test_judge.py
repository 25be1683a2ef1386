"""Votes, orders and what becomes of them, on backends that answer by script."""

import pytest
import tiny

from nanorrm.data import toy
from nanorrm.engine.engine import Completion
from nanorrm.judge.judge import Judge
from nanorrm.judge.verdict import Verdict
from nanorrm.measure import metrics
from nanorrm.records import Pair

TOY = toy.make_tokenizer()


class Scripted:
    """Answers judge prompts by `answer(query, first, second, sample) -> text`."""

    def __init__(self, answer, context=10_000):
        self.tokenizer, self.answer, self.context = TOY, answer, context
        self.calls = []

    def refusal(self, prompt, params):
        return f"{len(prompt)} is too long" if len(prompt) > self.context else None

    def generate(self, prompts, each, progress, on_done):
        self.calls.append((len(prompts), each[0] if each else None))
        for i, (prompt, params) in enumerate(zip(prompts, each)):
            query, first, second, _ = TOY.decode(prompt).split("\n")
            for j in range(params.n):
                t = self.answer(query[1:], first[2:], second[2:], j)
                reason = "stop" if t else "length"
                on_done(i, j, Completion(TOY.encode(t), t, [], [], [], reason, 0))


def box(slot):
    return rf"because</think>\boxed{{Assistant {slot}}}"


def oracle(query, first, second, sample):
    return box(1 if first == "good" else 2)


PAIRS = [
    Pair(f"q{i}", "good", "bad", 1) if i % 3 else Pair(f"q{i}", "bad", "good", 2) for i in range(30)
]


def test_oracle_is_right_in_both_orders():
    backend = Scripted(oracle)
    verdicts = Judge(backend, "toy").compare(PAIRS, votes=3)
    assert [v.winner for v in verdicts] == [p.label for p in PAIRS]
    for pair, verdict in zip(PAIRS, verdicts):
        assert verdict.votes == [pair.label] * 6
        assert verdict.swapped == [False] * 3 + [True] * 3
        assert verdict.p_first == (1.0 if pair.label == 1 else 0.0)
        assert verdict.thoughts == ["because"] * 6
        assert verdict.tokens == 6 * len(TOY.encode(box(1)))
    s = metrics.summarize(PAIRS, verdicts)
    assert s["accuracy"] == s["consistency"] == 1 and s["first_slot"] == 0.5
    assert [calls for calls, _ in backend.calls] == [60]  # one batch for all


@pytest.mark.parametrize("slot", [1, 2])
def test_position_bias_is_seen_and_cancelled(slot):
    """Always the same slot: never consistent, half right, all ties."""
    s = metrics.summarize(PAIRS, Judge(Scripted(lambda *_: box(slot)), "toy").compare(PAIRS))
    assert s["consistency"] == 0 and s["accuracy"] == 0.5
    assert s["first_slot"] == (1 if slot == 1 else 0) and s["tied"] == 30


def test_one_order_shows_the_pair_as_given():
    verdicts = Judge(Scripted(lambda *_: box(1)), "toy").compare(PAIRS, both_orders=False)
    assert all(v.votes == [1] and v.swapped == [False] for v in verdicts)
    s = metrics.summarize(PAIRS, verdicts)
    assert s["consistency"] is None and s["accuracy"] == pytest.approx(20 / 30)


def test_invalid_votes_are_counted_and_not_scored():
    def answer(query, first, second, sample):
        return (oracle(query, first, second, sample), "no idea", r"</think>\boxed{both}", "")[
            sample
        ]

    verdicts = Judge(Scripted(answer), "toy").compare(PAIRS, votes=4)
    for pair, verdict in zip(PAIRS, verdicts):
        assert verdict.votes == [pair.label, None, None, None] * 2
        assert verdict.invalid == 6 and verdict.winner == pair.label and verdict.truncated == 2
        assert verdict.p_first == (1.0 if pair.label == 1 else 0.0)  # share of VALID votes
    s = metrics.summarize(PAIRS, verdicts)
    assert s["unreadable"] == 0.75 and s["accuracy"] == 0.25 and s["accuracy_readable"] == 1


def test_verdict_arithmetic():
    v = Verdict([1, 1, 2, None], [False, False, True, True])
    assert v.p_first == pytest.approx(2 / 3) and v.winner == 1 and v.invalid == 1
    assert v.slots == [1, 1, 1, None]  # the swapped vote for b named Assistant 1
    assert v.by_order() == (1, 2)
    assert Verdict([1, 2], [False, True]).winner is None
    assert Verdict([1, 2], [False, True]).p_first == 0.5
    none = Verdict([None], [False])
    assert none.winner is None and none.p_first is None and none.by_order() == (None, None)


def test_pairs_that_do_not_fit_are_skipped_with_the_reason():
    turns = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    pairs = [PAIRS[0], Pair("x" * 500, "good", "bad", 1), Pair(turns, "good", "bad", 1), PAIRS[1]]
    backend = Scripted(oracle, context=100)
    verdicts = Judge(backend, "toy").compare(pairs)
    assert [bool(v.skipped) for v in verdicts] == [False, True, True, False]
    assert "too long" in verdicts[1].skipped and "turns" in verdicts[2].skipped
    assert [v.winner for v in verdicts] == [2, None, None, 1]
    assert backend.calls[0][0] == 4


def test_settings_reach_the_backend():
    backend = Scripted(oracle)
    judge = Judge(backend, "toy", temperature=0.3, max_tokens=77, seed=9)
    judge.compare(PAIRS[:1], votes=2, max_think_tokens=5)
    params = backend.calls[0][1]
    assert (params.n, params.temperature, params.max_tokens) == (2, 0.3, 77)
    assert (params.max_think_tokens, params.seed) == (5, 9)


def test_direct_judge_reads_verdicts_without_thinking():
    judge = Judge(Scripted(lambda *_: r"\boxed{Assistant 1}"), "toy", think=False)
    assert judge.prompt(PAIRS[0])[-2:] == list(TOY.think_ids)
    verdict = judge.compare(PAIRS[:1])[0]
    assert verdict.votes == [1, 2] and verdict.thoughts == ["", ""]
    unread = Judge(Scripted(lambda *_: r"\boxed{Assistant 1}"), "toy").compare(PAIRS[:1])[0]
    assert unread.votes == [None, None]  # a thinking judge has to close its thinking first


def test_swapped_prompt_exchanges_the_responses():
    judge = Judge(Scripted(oracle), "toy")
    pair = Pair("q", "left", "right")
    assert TOY.decode(judge.prompt(pair)) == "?q\n1:left\n2:right\n<think>"
    assert TOY.decode(judge.prompt(pair, swap=True)) == "?q\n1:right\n2:left\n<think>"


def test_no_pairs_no_verdicts():
    assert Judge(Scripted(oracle), "toy").compare([]) == []


def test_an_engine_is_a_backend():
    """Random verdicts of a random model: unreadable, counted, with the tokens they took."""
    judge = Judge(tiny.engine(TOY, tiny.model()), "toy", max_tokens=8)
    verdicts = judge.compare(PAIRS[:5], votes=2)
    assert all(v.votes == [None] * 4 and 4 <= v.tokens <= 32 for v in verdicts)
