"""Counts add up, intervals equal published ones, and every share means what its name says."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, permutation_test
from scipy.stats import bootstrap as scipy_bootstrap
from sklearn.metrics import precision_recall_fscore_support, roc_auc_score

from nanorrm.engine.engine import Completion
from nanorrm.judge.verdict import Verdict
from nanorrm.measure import metrics, statistics
from nanorrm.measure.statistics import difference
from nanorrm.records import Pair
from nanorrm.train import curves
from nanorrm.train.rewards import verdict_reward


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
    assert statistics.wilson(k, n) == pytest.approx((low, high), abs=6e-5)


@given(st.integers(1, 500), st.floats(0, 1))
def test_wilson_holds_the_share(n, share):
    low, high = statistics.wilson(share * n, n)
    assert 0 <= low <= share + 1e-9 and share - 1e-9 <= high <= 1


def test_wilson_of_nothing_is_everything():
    assert statistics.wilson(0, 0) == (0.0, 1.0)


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
    assert s["voted"] == pytest.approx((1 + 0 + 0.5 + 0 + 1 + 0) / 6)
    assert s["accuracy_interval"] == statistics.bootstrap([1, 0, 0.5, 0, 0.5, 0])
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


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=40))
@settings(max_examples=40, deadline=None)
def test_auc_equals_sklearn(drawn):
    scores, truth = zip(*drawn)
    if len(set(truth)) == 1:
        assert statistics.roc_auc(scores, truth) is None
    else:
        assert statistics.roc_auc(scores, truth) == pytest.approx(roc_auc_score(truth, scores))


label = st.sampled_from([1, 2])


@given(st.lists(st.tuples(label, st.sampled_from([1, 2, None])), min_size=1, max_size=40))
@settings(max_examples=40, deadline=None)
def test_classification_equals_sklearn(drawn):
    truth, named = zip(*drawn)
    wanted = precision_recall_fscore_support(
        truth, [n or 0 for n in named], labels=[1, 2], average="macro", zero_division=0
    )
    got = statistics.classification(truth, named)
    assert [got[k] for k in ("precision", "recall", "f1")] == pytest.approx(wanted[:3])


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60))
@settings(max_examples=40, deadline=None)
def test_mcnemar_equals_the_exact_binomial_test(drawn):
    gained, lost = sum(a and not b for a, b in drawn), sum(b and not a for a, b in drawn)
    wanted = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    got = statistics.mcnemar([a for a, _ in drawn], [b for _, b in drawn])
    assert got == pytest.approx(wanted)


def test_mcnemar_of_thousands_does_not_overflow():
    assert statistics.mcnemar([1] * 5000, [0] * 5000) == 0.0
    n = 3000
    p = statistics.mcnemar([1] * n + [0] * n, [0] * n + [1] * n)
    assert p == 1.0


def test_sign_flips_agree_with_scipy():
    """scipy's permutation test on the same differences; both draw, so the tolerance is theirs."""
    differences = np.random.default_rng(1).normal(0.2, 1, 60)
    wanted = permutation_test(
        (differences, np.zeros(60)), lambda x, y: np.mean(x - y), permutation_type="samples",
        n_resamples=9999, rng=np.random.default_rng(0),
    ).pvalue  # fmt: skip
    assert statistics.sign_flip(differences) == pytest.approx(wanted, abs=0.015)
    # one query asked sixty times is one observation, not sixty
    assert statistics.sign_flip(differences, ["q"] * 60) == 1.0


def test_bootstrap_equals_scipy():
    values = np.random.default_rng(2).random(80)
    wanted = scipy_bootstrap(
        (values,), np.mean, method="percentile", n_resamples=5000, rng=np.random.default_rng(0)
    ).confidence_interval
    assert statistics.bootstrap(values) == pytest.approx((wanted.low, wanted.high), abs=0.01)
    assert statistics.bootstrap(values) == statistics.bootstrap(values)
    assert statistics.bootstrap(values, seed=1) != statistics.bootstrap(values)


def test_bootstrap_knows_that_copies_of_a_query_are_no_news():
    values, queries = [0, 1] * 50, list(range(100))
    once = statistics.bootstrap(values, queries)
    again = statistics.bootstrap(values * 9, queries * 9)
    apart = statistics.bootstrap(values * 9)
    assert again == pytest.approx(once, abs=1e-9)
    assert apart[1] - apart[0] < 0.4 * (once[1] - once[0])


def test_bootstrap_by_weight():
    """A value of weight 3 counts as three copies of it that are drawn together."""
    by_weight = statistics.bootstrap([0, 1, 0.5], weights=[1, 3, 1])
    by_copy = statistics.bootstrap([0, 1, 1, 1, 0.5], clusters=[0, 1, 1, 1, 2])
    assert by_weight == pytest.approx(by_copy)
    assert statistics.mean([0, 1, 0.5], [1, 3, 1]) == pytest.approx(0.7)
    assert statistics.mean([None, 1], [5, 1]) == 1 and statistics.mean([]) is None
    assert statistics.bootstrap([]) == (0.0, 1.0)


def test_bootstrap_of_one_query_is_not_a_point():
    low, high = statistics.bootstrap([0, 1] * 20, ["q"] * 40)
    assert low < 0.4 and high > 0.6


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_values_that_do_not_vary_are_not_a_point(value):
    """Five pairs that all tied say little; neither do five queries with one right and one wrong."""
    low, high = statistics.bootstrap([value] * 5)
    assert low <= value <= high and 0.4 < high - low < 0.7
    assert statistics.bootstrap([0, 1] * 5, [i // 2 for i in range(10)]) == statistics.wilson(
        2.5, 5
    )


def test_differences_that_do_not_vary_have_an_interval_of_differences():
    """None of 40 queries differ: the share that might is Clopper and Pearson's, at 95%."""
    low, high = statistics.bootstrap([0.0] * 40, lowest=-1)
    share = binomtest(0, 40).proportion_ci(0.9, method="exact").high  # the upper end alone: 95%
    assert -low == pytest.approx(share) and high == pytest.approx(share)
    low, high = statistics.bootstrap([1.0] * 40, lowest=-1)
    assert high == 1 and low == pytest.approx(1 - 2 * share)
    assert difference([1, 0, 1], [1, 0, 1]) == [0, *statistics.bootstrap([0, 0, 0], lowest=-1)]


def test_best_of_k_by_enumeration():
    """Every order of four responses, with a tie between the best rated ones."""
    ratings, truth = [3, 1, 3, 2], [1, 0, 0, 1]
    wanted, reach = np.zeros(4), np.zeros(4)
    orders = list(permutations(range(4)))
    for order in orders:
        for k in range(4):
            first = order[: k + 1]
            wanted[k] += truth[max(first, key=lambda i: ratings[i])] / len(orders)
            reach[k] += max(truth[i] for i in first) / len(orders)
    curve, oracle = metrics.best_of_k_curve([ratings], [truth], permutations=20000)
    assert curve == pytest.approx(wanted, abs=0.02)
    assert oracle == pytest.approx(reach, abs=0.02)
    assert curve[0] == oracle[0]


def test_best_of_k_scores_of_an_oracle_and_its_opposite():
    truth = [[1, 0, 0, 0], [0, 0, 1, 1]]
    good = metrics.best_of_k_scores(truth, truth)
    assert good["loss"] == 0 and good["end_score"] == good["max_score"] == good["auc"] == 1
    bad = metrics.best_of_k_scores(1 - np.array(truth), truth)
    assert bad["end_score"] == bad["auc"] == 0 and bad["max_score"] == bad["curve"][0]
    assert bad["loss"] == pytest.approx(np.mean((np.subtract(bad["oracle"], bad["curve"])) ** 2))


def test_ratings_of_prompts_on_other_scales_share_an_auc():
    """Each prompt is ordered perfectly; only standardised ratings show it."""
    ratings, truth = [[1000, 1001], [0, 5]], [[0, 1], [0, 1]]
    assert statistics.roc_auc(np.ravel(ratings), np.ravel(truth)) == 0.75
    assert metrics.best_of_k_scores(ratings, truth)["auc"] == 1
    assert list(statistics.standardise([2, 2])) == [0, 0]


def completion(n, think, reason):
    return Completion([1] * n, "", [], [], [False] * n, reason, think)


def test_rollout_stats_by_hand():
    graded = [[(1.0, 1), (-1.0, 2), (-1.0, None)], [(1.0, 1), (1.0, 1), (1.0, 1)]]
    groups = [
        [completion(4, 2, "stop"), completion(6, 3, "stop"), completion(10, 10, "length")],
        [completion(5, 1, "stop")] * 3,
    ]
    assert curves.rollout_stats(graded, groups) == {
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
    speeds = curves.speeds([[1, 2, 3]], groups, {"rollout": 2.0, "train": 4.0})
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
