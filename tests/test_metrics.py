"""Counts add up, intervals equal published ones, and every share means what its name says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanorrm import metrics
from nanorrm.data import Pair
from nanorrm.engine import Completion
from nanorrm.judge import Verdict
from nanorrm.rewards import verdict_reward


def pair(label=1):
    return Pair("q", "x", "y", label)


def both(*votes, **more):
    """A verdict of votes in both orders: the first half in the given one."""
    half = len(votes) // 2
    return Verdict(list(votes), [i >= half for i in range(len(votes))], tokens=10, **more)


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),  # Wilson's score interval, values of R's binom.wilson
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_equals_published_values(k, n, low, high):
    assert metrics.wilson(k, n) == pytest.approx((low, high), abs=6e-5)


@given(st.integers(1, 500), st.floats(0, 1))
def test_wilson_holds_the_share(n, share):
    low, high = metrics.wilson(share * n, n)
    assert 0 <= low <= share + 1e-9 and share - 1e-9 <= high <= 1


def test_wilson_of_nothing_is_everything():
    assert metrics.wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("verdict", "label", "outcome"),
    [
        (both(1, 1), 1, "right"),
        (both(1, 1), 2, "wrong"),
        (both(1, 2), 1, "tied"),
        (both(None, None), 1, "invalid"),
        (both(None, 2), 2, "right"),
        (both(1, 1, 2, None), 1, "right"),
        (Verdict(skipped="too long"), 1, "skipped"),
    ],
)
def test_outcomes(verdict, label, outcome):
    assert metrics.outcome(pair(label), verdict) == outcome


def test_summary_by_hand():
    verdicts = [
        both(1, 1),  # right
        both(2, 2),  # wrong
        both(1, 2),  # tied: named slot 1 twice
        both(None, None),
        both(1, None, truncated=1),  # right
        Verdict(skipped="too long"),
    ]
    s = metrics.summarize([pair()] * 6, verdicts)
    assert [s[k] for k in ("right", "wrong", "tied", "invalid", "skipped")] == [2, 1, 1, 1, 1]
    assert s["pairs"] == 6
    assert s["accuracy"] == pytest.approx((1 + 0 + 0.5 + 0 + 0.5 + 0) / 6)
    assert s["accuracy_interval"] == metrics.wilson(2.0, 6)
    assert s["readable_pairs"] == 4
    assert s["accuracy_readable"] == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert s["consistency"] == pytest.approx(2 / 3)  # of the three with a verdict in each order
    assert s["first_slot"] == pytest.approx((1 + 1 + 2 + 1) / 7)  # of 7 readable votes
    assert s["unreadable"] == pytest.approx(3 / 10)
    assert s["truncated"] == pytest.approx(1 / 10)
    assert s["tokens_per_vote"] == pytest.approx(5 * 10 / 10)


vote = st.sampled_from([1, 2, None])
verdicts = st.one_of(
    st.just(Verdict(skipped="why")),
    st.lists(vote, min_size=2, max_size=6)
    .filter(lambda v: len(v) % 2 == 0)
    .map(lambda v: both(*v)),
)


@given(st.lists(st.tuples(st.sampled_from([1, 2]), verdicts), max_size=30))
def test_summary_adds_up(drawn):
    pairs, given_verdicts = [pair(label) for label, _ in drawn], [v for _, v in drawn]
    s = metrics.summarize(pairs, given_verdicts)
    assert s["right"] + s["wrong"] + s["tied"] + s["invalid"] + s["skipped"] == s["pairs"]
    assert s["readable_pairs"] == s["right"] + s["wrong"] + s["tied"]
    for name in ("accuracy", "accuracy_readable", "consistency", "first_slot", "unreadable"):
        assert s[name] is None or 0 <= s[name] <= 1
    # mirrored labels mirror what is right, and accuracies of readable votes add up to one
    mirrored = metrics.summarize([pair(3 - p.label) for p in pairs], given_verdicts)
    assert (mirrored["right"], mirrored["wrong"]) == (s["wrong"], s["right"])
    if s["readable_pairs"]:
        assert s["accuracy_readable"] + mirrored["accuracy_readable"] == pytest.approx(1)


def test_no_pairs_give_no_numbers():
    s = metrics.summarize([], [])
    assert s["pairs"] == 0 and s["accuracy"] is None and s["tokens_per_vote"] is None


def completion(n, think, reason):
    return Completion([1] * n, "", [], [], [False] * n, reason, think)


def test_rollout_stats_by_hand():
    graded = [[(1.0, 1), (-1.0, 2), (-1.0, None)], [(1.0, 1), (1.0, 1), (1.0, 1)]]
    groups = [
        [completion(4, 2, "stop"), completion(6, 3, "stop"), completion(10, 10, "length")],
        [completion(5, 1, "stop")] * 3,
    ]
    assert metrics.rollout_stats(graded, groups) == {
        "reward": pytest.approx(2 / 6),
        "accuracy": pytest.approx(4 / 6),
        "frac_reward_zero_std": 0.5,
        "completions/mean_length": pytest.approx(35 / 6),
        "completions/mean_think_length": pytest.approx(18 / 6),
        "completions/clipped_ratio": pytest.approx(1 / 6),
        "completions/unreadable_ratio": pytest.approx(1 / 6),
        "completions/first_slot_ratio": pytest.approx(4 / 5),
    }


def test_speeds_by_hand():
    groups = [[completion(4, 0, "stop"), completion(6, 0, "stop")]]
    speeds = metrics.speeds([[1, 2, 3]], groups, {"rollout": 2.0, "train": 4.0})
    assert speeds["rollout/tokens_per_s"] == 5.0
    assert speeds["train/tokens_per_s"] == (10 + 2 * 3) / 4


@pytest.mark.parametrize(
    ("text", "label", "closed", "wanted"),
    [
        (r"x</think>\boxed{Assistant 1}", 1, False, (1.0, 1)),
        (r"x</think>\boxed{Assistant 1}", 2, False, (-1.0, 1)),
        (r"x\boxed{Assistant 1}", 1, False, (-1.0, None)),
        (r"\boxed{Assistant 2}", 2, True, (1.0, 2)),
        ("", 1, True, (-1.0, None)),
    ],
)
def test_rewards(text, label, closed, wanted):
    assert verdict_reward(text, label, closed) == wanted
