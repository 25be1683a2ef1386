"""Ratings equal evalica's and scipy's; priors keep them finite; errors are the curvature's."""

import json
import math
import random
from itertools import combinations

import evalica
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from nanorrm.config import UserError
from nanorrm.rank import rating

RATERS = {
    "elo": rating.elo,
    "win_rate": rating.win_rate,
    "bradley_terry": rating.bradley_terry,
}


@st.composite
def fields(draw, most=7, matches=25):
    """(n, matches with draws among n entrants)."""
    n = draw(st.integers(2, most))
    pairs = st.permutations(range(n)).map(lambda p: p[:2])
    drawn = draw(st.lists(st.tuples(pairs, st.integers(0, 2)), min_size=1, max_size=matches))
    return n, [(a, b, (a, b, None)[who]) for (a, b), who in drawn]


def random_matches(n, count, seed):
    rng = random.Random(seed)
    pairs = [rng.sample(range(n), 2) for _ in range(count)]
    return [(a, b, rng.choice([a, b, None])) for a, b in pairs]


def theirs(rater, n, matches, **how):
    """evalica's answer in the order of the entrants."""
    names = {None: evalica.Winner.Draw}
    xs, ys = [m[-3] for m in matches], [m[-2] for m in matches]
    winners = [
        names.get(w, evalica.Winner.X if w == a else evalica.Winner.Y) for *_, a, b, w in matches
    ]
    scores = rater(xs, ys, winners, **how).scores
    return [float(scores.get(i, math.nan)) for i in range(n)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("how", [{}, {"initial": 0.0, "base": math.e, "scale": 1.0, "k": 0.3}])
def test_elo_equals_evalica(seed, how):
    matches = random_matches(12, 400, seed)
    wanted = theirs(evalica.elo, 12, matches, **how)
    assert rating.elo(12, matches, **how) == pytest.approx(wanted, abs=1e-9, rel=0)


def test_elo_and_bradley_terry_of_real_matches_equal_evalica(data):
    """RRM-7B's own verdicts: per question for Elo; over all, with slots as players, for both."""
    questions = json.loads((data / "rrm_7b_knockout_mmlu_pro.json").read_text())["questions"]
    for matches in questions.values():
        wanted = theirs(evalica.elo, 32, matches)
        assert rating.elo(32, matches) == pytest.approx(wanted, abs=1e-9, rel=0)
    pooled = [match for matches in questions.values() for match in matches]
    assert rating.elo(32, pooled) == pytest.approx(theirs(evalica.elo, 32, pooled), abs=1e-9, rel=0)
    wanted = theirs(evalica.bradley_terry, 32, pooled, tolerance=1e-13, limit=100_000)
    assert np.exp(rating.bradley_terry(32, pooled, prior=0)) == pytest.approx(wanted, rel=1e-8)


def test_elo_can_not_overflow():
    assert rating.elo(2, [(0, 1, 0)] * 3, k=1e6, scale=1.0) == [501000.0, -499000.0]


def test_paper_reward_spans_a_sliver():
    """0.42 to 0.58 at K = 4, with every one of 8 responses beaten by all better ones."""
    matches = [(a, b, a) for a, b in combinations(range(8), 2)]
    rewards = list(map(rating.reward_from_elo, rating.elo(8, matches)))
    assert 0.42 < rewards[-1] < 0.5 < rewards[0] < 0.58
    assert rating.reward_from_elo(1000) == 0.5 and rating.reward_from_elo(1200) == 1.5


@pytest.mark.parametrize("seed", range(5))
def test_bradley_terry_without_prior_equals_evalica(seed):
    matches = random_matches(8, 200, seed)
    wanted = theirs(evalica.bradley_terry, 8, matches, tolerance=1e-13, limit=100_000)
    assert np.exp(rating.bradley_terry(8, matches, prior=0)) == pytest.approx(wanted, rel=1e-8)


def negative_log_posterior(s, matches, prior):
    """Written out match by match, apart from the code under test."""
    total = prior / 2 * sum(math.log1p(math.exp(x)) + math.log1p(math.exp(-x)) for x in s)
    for a, b, winner in matches:
        for side, other in ((a, b), (b, a)):
            share = 0.5 if winner is None else float(winner == side)
            total += share * math.log1p(math.exp(s[other] - s[side]))
    return total


@pytest.mark.parametrize("prior", [0.1, 1.0, 5.0])
def test_bradley_terry_and_its_errors_equal_scipy(prior):
    n, matches = 6, random_matches(6, 40, 7)
    ours = rating.bradley_terry(n, matches, prior)
    best = minimize(negative_log_posterior, np.zeros(n), (matches, prior), tol=1e-12)
    assert ours == pytest.approx(best.x, abs=1e-5)

    def at(*shifts):
        return negative_log_posterior(ours + sum(shifts), matches, prior)

    hessian = [
        [(at(x, y) - at(x, -y) - at(-x, y) + at(-x, -y)) / 4e-6 for y in 1e-3 * np.eye(n)]
        for x in 1e-3 * np.eye(n)
    ]
    wanted = np.sqrt(np.diag(np.linalg.inv(hessian)))
    assert rating.standard_errors(n, matches, ours, prior) == pytest.approx(wanted, rel=1e-3)


def test_errors_of_two_players_by_hand():
    """3 wins to 1: the log-odds ln 3 have variance 1/3 + 1, half of the difference to each side."""
    matches = [(0, 1, 0)] * 3 + [(0, 1, 1)]
    ours = rating.bradley_terry(2, matches, prior=0)
    assert ours[0] - ours[1] == pytest.approx(math.log(3))
    errors = rating.standard_errors(2, matches, ours, prior=0)
    assert errors == pytest.approx([math.sqrt(4 / 3) / 2] * 2)


def test_errors_are_the_spread_of_repeated_tournaments():
    """400 repeats know a spread to 3.5%: four standard deviations to the bound (chance 1e-4)."""
    rng, truth = np.random.default_rng(0), np.array([1.0, 0.3, -0.2, -1.1])
    found, errors = [], []
    for _ in range(400):
        matches = []
        for a, b in combinations(range(4), 2):
            wins = rng.binomial(40, 1 / (1 + math.exp(truth[b] - truth[a])))
            matches += [(a, b, a)] * wins + [(a, b, b)] * (40 - wins)
        found.append(rating.bradley_terry(4, matches, prior=0))
        errors.append(rating.standard_errors(4, matches, found[-1], prior=0))
    assert np.mean(errors, 0) == pytest.approx(np.std(found, 0), rel=0.15)
    assert np.mean(found, 0) == pytest.approx(truth, abs=0.05)


@pytest.mark.parametrize("prior", [1e-6, 0.1, 1.0])
def test_undefeated_winless_and_absent_entrants_are_finite_with_a_prior(prior):
    ours = rating.bradley_terry(4, [(0, 1, 0), (0, 2, 0), (1, 2, 1)] * 3, prior)
    assert all(map(math.isfinite, ours)) and ours[0] > ours[1] > ours[2]
    assert ours[3] == 0  # no match: the reference's strength
    assert all(map(math.isfinite, rating.standard_errors(4, [(0, 1, 0)], [0.0] * 4, prior)))


def test_real_knockouts_have_finite_bradley_terry_ratings_with_a_prior(data):
    questions = json.loads((data / "rrm_7b_knockout_mmlu_pro.json").read_text())["questions"]
    for matches in list(questions.values())[:50]:
        ours = rating.bradley_terry(32, matches)
        assert all(map(math.isfinite, ours)) and max(ours) == ours[matches[-1][-1]]


@pytest.mark.parametrize(
    "matches", [[(0, 1, 0)], [(0, 1, 0), (1, 2, 1), (2, 1, 2)], [(0, 1, None)]], ids=str
)
def test_no_prior_and_no_chain_of_wins_is_an_error(matches):
    with pytest.raises(UserError, match=r"no chain of wins leads from entrant \d to \d.*prior"):
        rating.bradley_terry(3, matches, prior=0)
    with pytest.raises(UserError, match="no chain"):
        rating.standard_errors(3, matches, [0.0] * 3, prior=0)


def test_a_long_chain_of_wins_is_a_chain():
    """Everyone beats the next and the last the first: connected, and all equal."""
    circle = [(i, (i + 1) % 20, i) for i in range(20)]
    assert rating.bradley_terry(20, circle, prior=0) == pytest.approx([0] * 20, abs=1e-9)


@pytest.mark.parametrize("prior", [-1, math.nan, math.inf])
def test_a_prior_is_a_number_of_matches(prior):
    with pytest.raises(UserError, match="prior"):
        rating.bradley_terry(2, [(0, 1, 0)], prior)


@pytest.mark.parametrize("match", [(0, 0, 0), (0, 2, 0), (-1, 0, 0), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("rater", RATERS)
def test_what_is_no_match_is_an_error(rater, match):
    with pytest.raises(UserError, match="no match between two of 2 entrants"):
        RATERS[rater](2, [match])


@pytest.mark.parametrize("rater", RATERS)
def test_matches_may_start_with_their_round(rater):
    matches = random_matches(5, 20, 1)
    rounds = [(1, *match) for match in matches]
    assert RATERS[rater](5, rounds) == RATERS[rater](5, matches)


@pytest.mark.parametrize("rater", RATERS)
@given(field=fields(), data=st.data())
def test_renaming_the_entrants_renames_the_ratings(rater, field, data):
    n, matches = field
    name = [*data.draw(st.permutations(range(n))), None]
    renamed = [(name[a], name[b], None if w is None else name[w]) for a, b, w in matches]
    before, after = RATERS[rater](n, matches), RATERS[rater](n, renamed)
    assert [after[name[i]] for i in range(n)] == pytest.approx(before, abs=1e-7)


@pytest.mark.parametrize("rater", RATERS)
@given(field=fields(), at=st.integers(0, 24))
def test_a_better_result_never_lowers_the_rating(rater, field, at):
    """A loss of a becomes a draw, a draw a win: a rises. For Elo, where later matches answer to
    earlier ones, the last match is the one that changes."""
    n, matches = field
    at = len(matches) - 1 if rater == "elo" else at % len(matches)
    a, b, winner = matches[at]
    assume(winner != a)
    better = [*matches[:at], (a, b, None if winner == b else a), *matches[at + 1 :]]
    before, after = RATERS[rater](n, matches), RATERS[rater](n, better)
    assert after[a] > before[a] and after[b] < before[b]


@settings(max_examples=50)
@given(field=fields())
def test_bradley_terry_wins_as_many_as_it_expects(field):
    """The certificate, from outside: wins had = wins expected, the prior's draw included."""
    n, matches = field
    s = rating.bradley_terry(n, matches, prior=1.0)
    for i in range(n):
        won = [0.5 if w is None else w == i for a, b, w in matches if i in (a, b)]
        others = [0.0] + [s[b if a == i else a] for a, b, _ in matches if i in (a, b)]
        assert 0.5 + sum(won) == pytest.approx(
            sum(1 / (1 + math.exp(o - s[i])) for o in others), abs=1e-7
        )


def test_survival_ranks_a_knockout_and_refuses_draws():
    assert rating.survival(1, []) == [1.0]
    assert rating.survival(3, [(1, 1, 2, 2), (2, 0, 2, 0)]) == [1.0, 0.0, 0.5]
    with pytest.raises(UserError, match="no draws"):
        rating.survival(2, [(1, 0, 1, None)])
