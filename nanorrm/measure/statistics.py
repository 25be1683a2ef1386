"""Intervals, tests and rates on plain numbers."""

from math import comb, sqrt

import numpy as np


def correlation(x, y):
    """Pearson's correlation of two lists, or None if one does not vary.

    >>> correlation([1, 2, 3], [2, 4, 6]), correlation([1, 1], [0, 1])
    (1.0, None)
    """
    mx, my = sum(x) / len(x), sum(y) / len(y)
    sxy = sum((a - mx) * (b - my) for a, b in zip(x, y))
    sxx, syy = sum((a - mx) ** 2 for a in x), sum((b - my) ** 2 for b in y)
    return sxy / (sxx * syy) ** 0.5 if sxx and syy else None


def difference(a, b):
    """Scores on the same queries -> [mean of a - b, low, high], the 95% interval a normal one.

    Where all differences are the same it is `unvaried`'s, as they show no spread.

    >>> [round(x, 3) for x in difference([1, 1, 0, 1], [0, 1, 0, 0])]
    [0.5, -0.066, 1.066]
    """
    gaps = [x - y for x, y in zip(a, b)]
    mean = sum(gaps) / len(gaps)
    if max(gaps) - min(gaps) < 1e-12:
        return [mean, *unvaried(mean, len(gaps), lowest=-1)]
    variance = sum((gap - mean) ** 2 for gap in gaps) / max(1, len(gaps) - 1)
    spread = 1.96 * (variance / len(gaps)) ** 0.5
    return [mean, mean - spread, mean + spread]


def wilson(successes, n, z=1.96):
    """95% interval of a proportion (Wilson 1927): (low, high); successes may be fractional.

    >>> [round(x, 3) for x in wilson(8, 10)]
    [0.49, 0.943]
    """
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = p + z * z / (2 * n)
    spread = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low = 0.0 if successes == 0 else max(0.0, (centre - spread) / scale)
    return low, 1.0 if successes == n else min(1.0, (centre + spread) / scale)


def unvaried(value, n, lowest=0):
    """95% interval of a mean of which n independent values, all the same, were seen: (low, high).

    Shares (lowest 0): Wilson's, as none varies more than right and wrong do. Differences (lowest
    -1): at 95%, at most 1 - 0.05**(1 / n), about 3 / n, of all values differ from those seen.

    >>> [round(x, 3) for x in unvaried(0, 100, lowest=-1)]  # 3 of a hundred, all up or all down
    [-0.03, 0.03]
    """
    if lowest == 0:
        return wilson(value * n, n)
    others = 1 - 0.05 ** (1 / n)
    return value - others * (value - lowest), value + others * (1 - value)


def bootstrap(values, clusters=None, weights=None, seed=0, samples=2000, lowest=0):
    """95% percentile interval of a (weighted) mean, by resampling clusters: (low, high).

    values [N], None left out; clusters [N]: what is drawn together, such as the query of a pair
    (default, and where all share one: each value alone); weights [N]; lowest: of shares 0, of
    differences -1. Where all clusters have the same mean, `unvaried` over them stands in.

    >>> low, high = bootstrap([0, 1] * 200)
    >>> 0.44 < low < 0.46 and 0.54 < high < 0.56  # 0.5 -+ 1.96 * 0.5 / sqrt(400)
    True
    >>> bootstrap([1, 1, 1]) == wilson(3, 3)
    True
    """
    values, clusters, weights = _weighted(values, clusters, weights)
    if not len(values):
        return float(lowest), 1.0
    n = int(clusters.max()) + 1
    if n == 1:
        clusters, n = np.arange(len(values)), len(values)
    sums, mass = np.bincount(clusters, weights * values), np.bincount(clusters, weights)
    if np.ptp(sums / mass) < 1e-12:
        return unvaried(float(values @ weights / weights.sum()), n, lowest)
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(0, samples, 100):  # a part at a time: samples x clusters may not fit
        drawn = rng.integers(n, size=(min(100, samples - len(means)), n))
        means.extend(sums[drawn].sum(1) / mass[drawn].sum(1))
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def _weighted(values, clusters, weights):
    """Values that count as an array, their clusters as 0, 1, 2..., and weights."""
    clusters = range(len(values)) if clusters is None else clusters
    weights = [1.0] * len(values) if weights is None else weights
    rows = [row for row in zip(values, clusters, weights) if row[0] is not None and row[2] > 0]
    numbers = {name: n for n, name in enumerate(dict.fromkeys(name for _, name, _ in rows))}
    return (
        np.array([value for value, _, _ in rows], float),
        np.array([numbers[name] for _, name, _ in rows], int),
        np.array([weight for _, _, weight in rows], float),
    )


def mean(values, weights=None):
    """(Weighted) mean of the values that are not None; None if there are none."""
    values, _, weights = _weighted(values, None, weights)
    return float(values @ weights / weights.sum()) if len(values) else None


def classification(truth, predicted, classes=(1, 2)):
    """Macro precision, recall and F1: each the plain mean over the classes.

    A prediction outside the classes (None: no verdict) is a miss of its true class. Precision of a
    class nobody predicted is 0, as in scikit-learn with zero_division=0.

    >>> classification([1, 1, 2, 2], [1, 1, 1, 2])["recall"]
    0.75
    """
    scores = []
    for c in classes:
        hit = sum(t == p == c for t, p in zip(truth, predicted))
        named, there = list(predicted).count(c), list(truth).count(c)
        precision, recall = hit / (named or 1), hit / (there or 1)
        f1 = 2 * precision * recall / (precision + recall or 1)
        scores.append((precision, recall, f1))
    means = [sum(column) / len(classes) for column in zip(*scores)]
    return dict(zip(("precision", "recall", "f1"), means))


def roc_auc(scores, truth):
    """Chance that a right one scores above a wrong one, a tie counting half; None if undefined.

    >>> roc_auc([1, 2, 2, 3], [0, 0, 1, 1])
    0.875
    """
    scores, truth = np.asarray(scores, float), np.asarray(truth, bool)
    right, wrong = truth.sum(), (~truth).sum()
    if not right or not wrong:
        return None
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (count.cumsum() - (count - 1) / 2)[place]  # ties share the mean of their ranks
    return float((ranks[truth].sum() - right * (right + 1) / 2) / (right * wrong))


def standardise(ratings):
    """Ratings of one prompt -> mean 0 and standard deviation 1 (all 0 if they are all equal)."""
    ratings = np.asarray(ratings, float)
    spread = ratings.std()
    return (ratings - ratings.mean()) / spread if spread > 0 else np.zeros_like(ratings)


def mcnemar(first, second):
    """Exact two-sided p-value that two judges are right equally often on the same pairs.

    first, second [N]: right or not. Only the pairs on which they differ speak (McNemar 1947).

    >>> mcnemar([1] * 10, [0] * 10)  # ten differences, all on one side: 2 / 2**10
    0.001953125
    """
    gained = sum(bool(a) and not b for a, b in zip(first, second))
    lost = sum(bool(b) and not a for a, b in zip(first, second))
    n = gained + lost
    tail = sum(comb(n, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**n)


def sign_flip(differences, clusters=None, seed=0, samples=10000):
    """Two-sided p-value of a mean paired difference: the signs of whole clusters are flipped.

    >>> sign_flip([0.0] * 5)
    1.0
    """
    values, clusters, _ = _weighted(differences, clusters, None)
    if not len(values):
        return 1.0
    sums = np.bincount(clusters, values)
    rng, extreme = np.random.default_rng(seed), 0
    for done in range(0, samples, 100):
        signs = rng.choice((-1, 1), size=(min(100, samples - done), len(sums)))
        extreme += (abs(signs @ sums) >= abs(sums.sum()) - 1e-12).sum()
    return float((extreme + 1) / (samples + 1))
