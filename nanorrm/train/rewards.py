"""What a rollout earns: a judge's by its verdict, a policy's by its matches within its group.

A verdict earns +1 if it is right, -1 if it is wrong or unreadable. No reward for format or length:
that is the paper's rule, and it is enough.
"""

from random import Random

from nanorrm.config import one_of
from nanorrm.judge.verdict import parse_verdict
from nanorrm.rank.rating import bradley_terry, elo, reward_from_elo, survival, win_rate
from nanorrm.rank.tournament import knockout, random_opponents


def verdict_reward(text, label, closed=False):
    """Completion text and label (1 | 2) -> (reward, verdict 1 | 2 | None).

    closed: the prompt closed the thinking (DirectJudge).

    >>> verdict_reward(r"18 is right</think>\\boxed{Assistant 2}", 2)
    (1.0, 2)
    >>> verdict_reward("18 is right", 2)
    (-1.0, None)
    """
    verdict = parse_verdict(text, closed)
    return (1.0 if verdict == label else -1.0), verdict


RATERS = {"elo": elo, "bradley_terry": bradley_terry, "win_rate": win_rate, "knockout": survival}


def group_rewards(n, matches, rating="elo"):
    """The matches that n responses to one query have played against one another -> n rewards.

    matches: (round, a, b, winner), as tournaments record them. rating: "elo", in the order of the
    matches, as the paper's authors put it, (elo - 1000) / 200 + 0.5; "bradley_terry" log-strengths;
    "win_rate"; or "knockout": the share of the rounds survived. Elo's rewards lie close together
    (0.42 to 0.58 with four opponents): they need advantages that are scaled by their std.

    >>> group_rewards(3, [(1, 0, 1, 0), (1, 1, 2, 2), (1, 2, 0, None)], "win_rate")
    [0.75, 0.0, 0.75]
    >>> group_rewards(4, [(1, 0, 1, 0), (1, 2, 3, 3), (2, 0, 3, 0)], "knockout")
    [1.0, 0.0, 0.0, 0.5]
    """
    one_of("rating", rating, RATERS)
    ratings = RATERS[rating](n, matches)
    return [reward_from_elo(r) for r in ratings] if rating == "elo" else ratings


def judged_rewards(referee, queries, answers, rating, opponents, seed):
    """The rewards [P][G] of all responses to P queries; no label is looked at.

    answers [P][G] texts; rating: see `group_rewards`; opponents: how many of its group each
    response plays, drawn by lot, as is the order in which two are shown.
    """
    rng, n, out = Random(f"contest:{seed}"), len(answers[0]), rating == "knockout"
    tournaments = [
        knockout(n, rng) if out else random_opponents(n, opponents, rng) for _ in queries
    ]
    texts = [query.text for query in queries]
    results = referee.play(texts, answers, tournaments, draws=not out, seed=seed)
    return [group_rewards(n, result.matches, rating) for result in results]
