"""Every format's shape by hypothesis, the lockstep driver, and RRM-7B's own knockouts replayed."""

import json
import random
import sys
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanorrm.config import UserError
from nanorrm.rank import rating
from nanorrm.rank import tournament as t


def strongest(matches):
    """The higher index wins."""
    return [max(a, b) for _, a, b in matches]


def noisy(rng, draws=False):
    return lambda matches: [rng.choice([a, b, None] if draws else [a, b]) for _, a, b in matches]


def only(tournament, play):
    return t.run_tournaments([tournament], play)[0]


def test_replayed_knockouts_reach_the_recorded_champion(data):
    """RRM-7B's votes on 512 questions of MMLU-Pro: 31 matches each, 512 of 512 champions."""
    recorded = json.loads((data / "rrm_7b_knockout_mmlu_pro.json").read_text())
    bracket = [slot for pair in recorded["bracket"] for slot in pair]
    questions = list(recorded["questions"].values())
    winners = [{(a, b): winner for _, a, b, winner in matches} for matches in questions]
    calls = []

    def play(matches):
        calls.append(len(matches))
        return [winners[i][a, b] for i, a, b in matches]

    results = t.run_tournaments([t.knockout(32, bracket=bracket) for _ in questions], play)
    champions = [max(matches)[-1] for matches in questions]  # the winner of the last round
    assert len(questions) == 512 and [r.champion for r in results] == champions
    for result, matches in zip(results, questions):
        assert sorted(result.matches) == sorted(map(tuple, matches))
        assert result.rounds == 5
    assert calls == [512 * n for n in (16, 8, 4, 2, 1)]


def test_a_thousand_knockouts_take_five_calls_and_little_bookkeeping():
    """Python calls made by the driver and the formats: fewer than 20 a match."""
    counts, calls = [], 0

    def play(matches):
        counts.append(len(matches))
        return [a for _, a, _ in matches]

    def count(frame, event, arg):
        nonlocal calls
        calls += event in ("call", "c_call")

    knockouts = [t.knockout(32, random.Random(i)) for i in range(1000)]
    sys.setprofile(count)
    try:
        results = t.run_tournaments(knockouts, play)
    finally:
        sys.setprofile(None)
    assert counts == [16000, 8000, 4000, 2000, 1000]
    assert all(len(result.matches) == 31 for result in results)
    assert calls < 20 * 31000


@given(st.integers(1, 70), st.integers(), st.booleans())
def test_knockout_of_any_size(n, seed, is_random):
    rng = random.Random(seed)
    result = only(t.knockout(n, rng if is_random else None), strongest)
    assert result.champion == n - 1
    assert len(result.matches) == n - 1
    assert result.rounds == (n - 1).bit_length()
    out = {min(a, b) for _, a, b, _ in result.matches}
    assert len(out) == n - 1  # each loses once
    first = Counter(i for at, a, b, _ in result.matches if at == 1 for i in (a, b))
    second = Counter(i for at, a, b, _ in result.matches if at == 2 for i in (a, b))
    assert set(first.values()) <= {1} and set(second.values()) <= {1}
    played = set(first) | set(second)
    assert played == set(range(n)) or n == 1  # a bye in round one at most, none later


@given(st.integers(1, 70))
def test_byes_are_spread_over_the_bracket_and_go_to_the_best(n):
    slots = t.seeded(range(n))
    byes = len(slots) - n
    lucky = [a if b is None else b for a, b in zip(slots[::2], slots[1::2]) if None in (a, b)]
    assert sorted(lucky) == list(range(byes))
    size = len(slots)
    while size > 1:  # halves, quarters, ...: byes differ by one at most
        parts = [slots[i : i + size].count(None) for i in range(0, len(slots), size)]
        assert max(parts) - min(parts) <= 1
        size //= 2


@pytest.mark.parametrize("n", [5, 8, 16])
def test_without_upsets_the_seeds_meet_late(n):
    """The two best meet in the final, the four best in the semifinals."""
    result = only(t.knockout(n), lambda matches: [min(a, b) for _, a, b in matches])
    last = result.rounds
    assert set(result.matches[-1][1:3]) == {0, 1} and result.matches[-1][0] == last
    semifinals = {i for r, a, b, _ in result.matches if r == last - 1 for i in (a, b)}
    assert semifinals == {0, 1, 2, 3}


def test_a_random_bracket_gives_everyone_the_same_chance_of_a_bye():
    """6 entrants, 2 byes, 3,000 draws: 1,000 each, sd 26; within 5 sd (chance 4e-6)."""
    byes, rng = Counter(), random.Random(0)
    for _ in range(3000):
        result = only(t.knockout(6, rng), strongest)
        byes.update(
            set(range(6)) - {i for at, a, b, _ in result.matches if at == 1 for i in (a, b)}
        )
    assert sum(byes.values()) == 6000
    assert all(abs(byes[i] - 1000) < 130 for i in range(6))


def test_given_brackets_are_kept_in_order():
    result = only(t.knockout(3, bracket=[2, 0, None, 1]), lambda m: [a for _, a, _ in m])
    assert result.matches == [(1, 2, 0, 2), (2, 2, 1, 2)] and result.champion == 2


@pytest.mark.parametrize(
    ("n", "bracket", "message"),
    [
        (3, [0, 1, 2], "3 slots: should be a power of two"),
        (0, None, "0 entrants: should be at least 1"),
        (2, [], "0 slots"),
        (3, [0, 1, 2, 2], "each of 0 to 2 once"),
        (4, [0, 1, 2, None], "each of 0 to 3 once"),
        (2, [0, 1, None, None], "slots 2 and 3 are both a bye"),
    ],
)
def test_brackets_that_can_not_be_played(n, bracket, message):
    with pytest.raises(UserError, match=message):
        t.knockout(n, bracket=bracket)  # at once, not when the first round is asked for


@pytest.mark.parametrize("rng", [None, random.Random(1)])
@given(n=st.integers(1, 12))
def test_round_robin_is_all_pairs_in_one_round(rng, n):
    result = only(t.round_robin(n, rng), strongest)
    pairs = [(min(a, b), max(a, b)) for _, a, b, _ in result.matches]
    assert sorted(pairs) == list(combinations(range(n), 2))
    assert result.rounds == (n > 1) and result.champion == n - 1


@given(st.integers(1, 9), st.integers(0, 5), st.integers())
def test_random_opponents_are_distinct_and_others(k, more, seed):
    n = k + 1 + more
    seen = []
    rng = random.Random(seed)
    result = only(t.random_opponents(n, k, rng), lambda m: seen.extend(m) or strongest(m))
    assert len(seen) == n * k
    met = Counter(frozenset((a, b)) for _, a, b in seen)
    assert all(len(pair) == 2 for pair in met) and max(met.values()) <= 2
    met_often = Counter(i for _, a, b in seen for i in (a, b))
    won = Counter(strongest(seen))
    shares = [won[i] / met_often[i] for i in range(n)]
    assert shares[result.champion] == max(shares)  # not who played most
    assert all(k <= len({x for p in met if i in p for x in p} - {i}) for i in range(n))


@pytest.mark.parametrize(
    "make",
    [
        lambda rng: t.random_opponents(8, 4, rng),
        lambda rng: t.round_robin(9, rng),
        lambda rng: t.anchors(6, 6, rng),
        lambda rng: t.swiss(8, 4, rng),
    ],
    ids=["random", "robin", "anchors", "swiss"],
)
def test_order_is_a_coin_flip(make):
    """The lower index comes first in half of the matches: within 5 sd."""
    rng, first, count = random.Random(0), 0, 0
    for _ in range(200):
        matches = only(make(rng), noisy(rng)).matches
        first += sum(a < b for _, a, b, _ in matches)
        count += len(matches)
    assert abs(first - count / 2) < 5 * (count / 4) ** 0.5


def test_anchors_meet_every_entrant_and_have_no_points():
    result = only(t.anchors(2, 3), lambda m: [b if (a, b) == (0, 4) else a for _, a, b in m])
    assert [match[1:3] for match in result.matches] == [
        (0, 2),
        (0, 3),
        (0, 4),
        (1, 2),
        (1, 3),
        (1, 4),
    ]
    assert result.champion == 1
    assert rating.win_rate(5, result.matches)[:2] == pytest.approx([2 / 3, 1])


@given(st.integers(2, 24), st.data(), st.integers())
def test_swiss_never_repeats_a_match_or_a_bye(n, data, seed):
    rounds = data.draw(st.integers(1, (n + 1) // 2))
    rng = random.Random(seed)
    result = only(t.swiss(n, rounds, rng), noisy(rng, draws=True))
    assert result.rounds == rounds and len(result.matches) == rounds * (n // 2)
    assert len({frozenset(match[1:3]) for match in result.matches}) == len(result.matches)
    played = Counter(i for _, a, b, _ in result.matches for i in (a, b))
    assert all(rounds - n % 2 <= played[i] <= rounds for i in range(n))
    for at in range(1, rounds + 1):
        of_round = [i for r, a, b, _ in result.matches if r == at for i in (a, b)]
        assert len(set(of_round)) == len(of_round) == n - n % 2


def test_swiss_pairs_equals_and_finds_the_best():
    """Without noise the winner of 16 has met equals only: unbeaten after four rounds."""
    for seed in range(20):
        result = only(t.swiss(16, 4, random.Random(seed)), strongest)
        assert result.champion == 15
        points = Counter()
        for at, a, b, winner in result.matches:
            if at <= 2:  # later rounds may have to pair unequals
                assert points[a] == points[b]
            points[winner] += 1
        assert sorted(points.values())[-1] == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: t.round_robin(0), "0 entrants"),
        (lambda: t.random_opponents(4, 4, random.Random()), "4 entrants: should be at least 5"),
        (lambda: t.random_opponents(4, 0, random.Random()), "0 opponents"),
        (lambda: t.anchors(0, 1), "0 entrants"),
        (lambda: t.anchors(1, 0), "0 anchors"),
        (lambda: t.swiss(1, 1, random.Random()), "1 entrants"),
        (lambda: t.swiss(8, 5, random.Random()), "a Swiss of 8 takes 1 to 4 rounds, not 5"),
        (lambda: t.swiss(8, 0, random.Random()), "not 0"),
    ],
)
def test_formats_refuse_what_they_can_not_play(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_different_formats_share_their_rounds():
    rng, calls = random.Random(0), []

    def play(matches):
        calls.append(Counter(i for i, *_ in matches))
        return strongest(matches)

    mixed = [t.knockout(1), t.knockout(4), t.round_robin(4), t.swiss(6, 3, rng), t.round_robin(1)]
    results = t.run_tournaments(mixed, play)
    assert calls == [{1: 2, 2: 6, 3: 3}, {1: 1, 3: 3}, {3: 3}]
    assert [r.rounds for r in results] == [0, 2, 1, 3, 0]
    assert [r.champion for r in results][:3] == [0, 3, 3]
    assert t.run_tournaments([], play) == []


def test_a_shared_lead_goes_by_lot_or_to_no_one():
    def draw(matches):
        return [None] * len(matches)

    assert only(t.round_robin(3), draw).champion is None
    champions = Counter(only(t.round_robin(3, random.Random(i)), draw).champion for i in range(90))
    assert set(champions) == {0, 1, 2}


def test_draws_count_half():
    winners = [None, None, 0, 1, 3, None]  # of 01 02 03 12 13 23
    result = only(t.round_robin(4), lambda matches: winners)
    assert result.champion == 0 and [match[-1] for match in result.matches] == winners
    assert rating.win_rate(4, result.matches) == pytest.approx([2 / 3, 1 / 2, 1 / 3, 1 / 2])


def test_a_bye_in_a_swiss_is_a_win():
    """The best of three wins alone, whether it meets both others or has the first bye."""
    champions = [only(t.swiss(3, 2, random.Random(i)), strongest).champion for i in range(30)]
    assert champions == [2] * 30


@pytest.mark.parametrize(
    ("play", "message"),
    [
        (lambda m: [None] * len(m), "needs a winner"),
        (lambda m: [9] * len(m), "9 can't win a match of 0 and"),
        (lambda m: [], "2 matches were played, 0 winners came back"),
    ],
)
def test_answers_that_do_not_fit(play, message):
    with pytest.raises(ValueError, match=message):
        only(t.knockout(4), play)


def test_a_seed_fixes_the_tournament():
    def run(seed):
        rng = random.Random(seed)
        formats = [t.knockout(13, rng), t.random_opponents(8, 4, rng), t.swiss(9, 4, rng)]
        return t.run_tournaments(formats, strongest)

    assert run(3) == run(3) != run(4)
