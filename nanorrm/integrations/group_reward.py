"""A batch of responses in, a reward for each out: matches inside every group of one query.

Trainers hand over flat lists, perhaps in another order, perhaps only this process's part. Here they
become whole groups again, compete as in `train.py policy`, and go back in the order they came.
"""

import time
import warnings

from nanorrm import ranks
from nanorrm.config import UserError, one_of
from nanorrm.judge.verdict import NO_ANSWER
from nanorrm.model.tokenizer import after_thinking
from nanorrm.rank.referee import Referee
from nanorrm.records import Query
from nanorrm.train.rewards import RATERS, judged_rewards


class GroupReward:
    """rewards(queries, answers) by a judge of pairs.

    judge: anything with `compare` (a Judge on an engine or an endpoint). rating, opponents: as in
    `train.py policy`: "elo" (0.42 to 0.58 with 4 opponents, so divide by the group's std),
    "win_rate", "bradley_terry" or "knockout". votes, both_orders: of each match. on_failure: when
    the judge can't judge (an endpoint that is down for good, or every pair skipped: a
    conversation needs Judge(multi_turn="render")), "raise" ends the training, "neutral" gives each
    response 0.5, which teaches nothing, and counts the groups as "judge/failures".
    """

    def __init__(
        self, judge, rating="elo", opponents=4, votes=1, both_orders=False, on_failure="raise",
        seed=0,
    ):  # fmt: skip
        one_of("rating", rating, RATERS)
        one_of("on_failure", on_failure, ("raise", "neutral"))
        self.referee = Referee(judge, votes, both_orders)
        self.rating, self.opponents, self.on_failure = rating, opponents, on_failure
        self.seed, self.calls = seed, 0

    def rewards(self, queries, answers):
        """N queries (text or messages, equal ones are a group) and N answers -> (N floats, costs).

        All ranks of torch.distributed call it together, and a group may be split between them; each
        judges its share of the groups. costs: {name: number} of this call on this rank. Raises
        UserError for a query with a single response.
        """
        self.calls += 1
        began = time.perf_counter()
        parts = ranks.gathered(list(zip(queries, answers)))
        everything = [item for part in parts for item in part]
        groups = {}  # a query as text -> (the query, the places of its responses)
        for place, (query, _) in enumerate(everything):
            groups.setdefault(str(query), (query, []))[1].append(place)
        for query, places in groups.values():
            if len(places) < 2:
                raise UserError(
                    f"one response to {str(query)[:80]!r}: a judge of pairs needs a group of at "
                    "least 2 in every batch (num_generations in TRL, rollout.n in verl)"
                )
        turn = list(groups.values())[ranks.rank() :: ranks.world_size()]
        found, failures = self.judged(turn, everything)
        found = ranks.merged(found)
        costs = self.referee.report() | {"judge/failures": failures}
        costs["judge/seconds"] = time.perf_counter() - began
        start = sum(map(len, parts[: ranks.rank()]))
        return [found[start + i] for i in range(len(queries))], costs

    def judged(self, groups, everything):
        """{place: reward} of some groups, and how many of them the judge failed on.

        Groups of one size share the judge's batches.
        """
        found, failures = {}, 0
        for size in sorted({len(places) for _, places in groups}):
            some = [group for group in groups if len(group[1]) == size]
            texts = [[everything[place][1] for place in places] for _, places in some]
            asked = [Query(query) for query, _ in some]
            opponents = min(self.opponents, size - 1)
            key = f"{self.seed}:{self.calls}:{size}:{some[0][0]}"
            try:
                rewards = judged_rewards(self.referee, asked, texts, self.rating, opponents, key)
            except UserError as error:
                if self.on_failure == "raise":
                    raise
                failures += len(some)
                warnings.warn(f"no rewards for {len(some)} groups: {error}", stacklevel=2)
                rewards = [[0.5] * size for _ in some]
            for (_, places), group in zip(some, rewards):
                found |= dict(zip(places, group))
        return found, failures


def answer_of(text, thinks=False):
    """What the judge sees of a response: the text after its thinking, "[NO ANSWER]" if that never
    ended. thinks: the prompt has opened the thinking already.

    >>> answer_of("<think>7+8=15</think> 15"), answer_of("<think>7+8"), answer_of("15")
    ('15', '[NO ANSWER]', '15')
    >>> answer_of("7+8", thinks=True)
    '[NO ANSWER]'
    """
    after = after_thinking(text, opened=thinks)
    return NO_ANSWER if after is None else after.strip()
