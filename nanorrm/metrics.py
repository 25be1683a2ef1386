"""Numbers about verdicts: accuracy with intervals, and how pairs came out.

Pure functions of pairs and verdicts; nothing here runs a model.
"""

from math import sqrt


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


def outcome(pair, verdict):
    """How one labelled pair came out: right, wrong, tied, invalid or skipped.

    tied: as many valid votes for one response as for the other (with one vote per order: the two
    orders disagree). invalid: no vote could be read. skipped: the pair was never judged.
    """
    if verdict.skipped:
        return "skipped"
    if verdict.p_first is None:
        return "invalid"
    if verdict.winner is None:
        return "tied"
    return "right" if verdict.winner == pair.label else "wrong"


def summarize(pairs, verdicts):
    """Counts and shares over labelled pairs.

    accuracy: share of right votes, unreadable ones and skipped pairs counting as not right,
    averaged over all pairs; accuracy_readable: among the votes that could be read, averaged over
    the pairs that have any. Intervals are Wilson's over pairs (votes of one pair are not
    independent). consistency: share of pairs judged in both orders whose orders agree.
    """
    counts = dict.fromkeys(("right", "wrong", "tied", "invalid", "skipped"), 0)
    score = readable = 0.0
    votes = invalid = first = truncated = tokens = agree = both = 0
    for pair, verdict in zip(pairs, verdicts):
        counts[outcome(pair, verdict)] += 1
        valid = [vote for vote in verdict.votes if vote]
        right = sum(vote == pair.label for vote in valid)
        if verdict.votes:
            score += right / len(verdict.votes)
        if valid:
            readable += right / len(valid)
        votes += len(verdict.votes)
        invalid += verdict.invalid
        first += sum(slot == 1 for slot in verdict.slots)
        truncated += verdict.truncated
        tokens += verdict.tokens
        straight, swapped = verdict.by_order()
        if straight and swapped:
            both += 1
            agree += straight == swapped
    n, n_readable = len(pairs), sum(any(verdict.votes) for verdict in verdicts)
    return {
        "pairs": n,
        **counts,
        "accuracy": score / n if n else None,
        "accuracy_interval": wilson(score, n),
        "accuracy_readable": readable / n_readable if n_readable else None,
        "accuracy_readable_interval": wilson(readable, n_readable),
        "readable_pairs": n_readable,
        "consistency": agree / both if both else None,
        "first_slot": first / (votes - invalid) if votes > invalid else None,
        "unreadable": invalid / votes if votes else None,
        "truncated": truncated / votes if votes else None,
        "tokens_per_vote": tokens / votes if votes else None,
    }


def rollout_stats(graded, groups):
    """Rewards and shape of the rollouts of a step; names as in TRL where TRL has them.

    graded [P][G]: (reward, verdict 1 | 2 | None); groups [P][G]: Completions.
    """
    rollouts = [rollout for group in groups for rollout in group]
    rewards = [[reward for reward, _ in group] for group in graded]
    verdicts = [verdict for group in graded for _, verdict in group]
    n, readable = len(rollouts), sum(verdict is not None for verdict in verdicts)
    return {
        "reward": sum(map(sum, rewards)) / n,
        "accuracy": sum(reward > 0 for group in rewards for reward in group) / n,
        "frac_reward_zero_std": sum(len(set(group)) == 1 for group in rewards) / len(rewards),
        "completions/mean_length": sum(len(r.ids) for r in rollouts) / n,
        "completions/mean_think_length": sum(r.think_tokens for r in rollouts) / n,
        "completions/clipped_ratio": sum(r.finish_reason == "length" for r in rollouts) / n,
        "completions/unreadable_ratio": 1 - readable / n,
        "completions/first_slot_ratio": verdicts.count(1) / readable if readable else None,
    }


def speeds(questions, groups, times):
    """Seconds of the step's two halves and their tokens per second."""
    new = sum(len(rollout.ids) for group in groups for rollout in group)
    read = sum(len(question) * len(group) for question, group in zip(questions, groups))
    return {
        "rollout/tokens_per_s": new / times["rollout"],
        "train/tokens_per_s": (new + read) / times["train"],
        "rollout/seconds": times["rollout"],
        "train/seconds": times["train"],
    }
