"""Has a judge decide matches between texts, and keeps count of what that takes."""

import time
from collections import Counter
from random import Random

from nanorrm import ranks
from nanorrm.config import UserError
from nanorrm.judge.open import open_judge
from nanorrm.rank.play import JudgedPlay
from nanorrm.rank.tournament import round_robin, run_tournaments


class Referee:
    """Has a judge decide matches between texts, and keeps count of what that takes.

    judge: a Judge; votes: per order; release: have it give its memory back after each use;
    everywhere: every rank asks for itself (False: rank 0 asks, for all, who play the same).
    """

    def __init__(
        self, judge, votes=1, both_orders=False, max_think_tokens=None, release=False,
        everywhere=True,
    ):  # fmt: skip
        self.judge, self.release, self.everywhere = judge, release, everywhere
        self.how = {"votes": votes, "both_orders": both_orders}
        self.how["max_think_tokens"] = max_think_tokens
        self.counts = Counter()

    def play(self, queries, texts, tournaments, draws=True, seed=0):
        """Run tournament i among texts[i], about queries[i] -> Results; see play.JudgedPlay.

        Raises UserError, with the first reason, if the judge could judge none of the pairs.
        """
        began = time.perf_counter()
        judged = JudgedPlay(self.judge, queries, texts, draws=draws, seed=seed, **self.how)

        def asked_once(matches):  # a server is asked by one rank, for all
            return ranks.same(judged(matches) if ranks.rank() == 0 else None)

        results = run_tournaments(tournaments, judged if self.everywhere else asked_once)
        if self.release:
            self.judge.backend.sleep()
        self.counts.update(judged.counts)
        self.counts["seconds"] += time.perf_counter() - began
        asked = judged.counts["asked"]
        if asked and judged.counts["skipped"] == asked:  # to go on would teach nothing, in silence
            reason = next(iter(judged.heard.values())).skipped
            raise UserError(f"the judge could judge none of {asked} pairs: {reason}")
        return results

    def prefer(self, queries, pairs, seed=0):
        """Which text of each pair (two texts about queries[i]) is better: 0, 1 or None."""
        rng = Random(f"prefer:{seed}")  # who is shown first
        results = self.play(queries, pairs, [round_robin(2, rng) for _ in pairs])
        return [result.matches[0][-1] for result in results]

    def report(self):
        """What the judge did since the last report, and what it cost.

        comparisons: pairs it was asked about; identical_ratio: matches of equal texts, which are
        drawn without asking; undecided_ratio: of the others, those without a winner (votes tied or
        invalid, pairs skipped); invalid_ratio: of the votes.
        """
        c, self.counts = self.counts, Counter()
        different = max(1, c["matches"] - c["identical"])
        return {
            "judge/comparisons": c["asked"],
            "judge/skipped": c["skipped"],
            "judge/identical_ratio": c["identical"] / max(1, c["matches"]),
            "judge/undecided_ratio": (c["draws"] + c["coins"] - c["identical"]) / different,
            "judge/invalid_ratio": c["invalid"] / max(1, c["votes"]),
            "judge/tokens": c["tokens"],
            "judge/seconds": c["seconds"],
        }


def open_referee(cfg):
    """The Referee of a PolicyRunConfig's judge, an engine's work shared by all ranks."""
    judge = open_judge(cfg.judge, shared=True)
    if cfg.release_cache:
        judge.backend.sleep()
    votes, both_orders, budget = cfg.judge.votes, cfg.judge.both_orders, cfg.judge.max_think_tokens
    return Referee(
        judge, votes, both_orders, budget, cfg.release_cache, everywhere=not cfg.judge.endpoint
    )
