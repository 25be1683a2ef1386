"""A custom reward function for verl: responses to a prompt compete, and a judge decides.

    custom_reward_function.path=.../nanorrm/integrations/verl.py
    custom_reward_function.name=compute_score
    reward_model.reward_manager=batch
    +custom_reward_function.reward_kwargs.model=FOLDER

The contract is that of verl's batch reward manager: called once a step with lists of data_sources,
solution_strs, ground_truths and extra_infos, and one score (or a dict with "score") for each. The
naive manager hands over one response at a time, which no judge of pairs can do anything with.
"""

from dataclasses import dataclass
from functools import cache

from nanorrm.cli import override
from nanorrm.config import JudgeSettings, UserError
from nanorrm.integrations.group_reward import GroupReward, answer_of
from nanorrm.judge.open import open_judge

QUERY_KEYS = ("question", "query", "prompt", "problem")  # of extra_info, the first that is there


def compute_score(
    data_sources, solution_strs, ground_truths, extra_infos, thinks=False, **settings
):
    """[{"score": reward}, ...], one for each of N responses.

    The query is extra_info["question"] (see QUERY_KEYS); responses with the same query are a group,
    in whatever order they come. ground_truths are not looked at. settings: fields of JudgeSettings
    (model, endpoint, votes, ...), and GroupReward's rating, opponents and on_failure. Validation
    calls it too: sample n > 1 there, or give it a function of its own. verl takes an
    exception for a reward of zero in some versions: see its log.
    """
    if isinstance(solution_strs, str):
        raise UserError(
            "one response at a time: set reward_model.reward_manager=batch, and rollout.n above 1"
        )
    queries = [query_of(info, i) for i, info in enumerate(extra_infos)]
    answers = [answer_of(text, thinks) for text in solution_strs]
    rewards, _ = reward_of(tuple(sorted(settings.items()))).rewards(queries, answers)
    return [{"score": reward} for reward in rewards]


def query_of(info, place):
    """The query in an extra_info, or a UserError that says what is there."""
    for key in QUERY_KEYS:
        if info and key in info:
            return info[key]
    there = ", ".join(info) if info else "nothing"
    raise UserError(
        f"extra_info of response {place} holds {there}: the judge needs the query there, under "
        f"{' or '.join(QUERY_KEYS)}"
    )


@dataclass
class RewardSettings(JudgeSettings):
    """A judge, and what GroupReward makes of its verdicts."""

    both_orders: bool = False
    rating: str = "elo"
    opponents: int = 4
    on_failure: str = "raise"


@cache
def reward_of(settings):
    """The GroupReward of some settings; opened at the first step, then kept."""
    cfg = override(RewardSettings(), dict(settings), "reward_kwargs")
    judge = open_judge(cfg)
    how = {"votes": cfg.votes, "both_orders": cfg.both_orders, "on_failure": cfg.on_failure}
    return GroupReward(judge, cfg.rating, cfg.opponents, **how)
