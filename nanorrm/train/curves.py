"""What the log says of a step: numbers, one line for people, and the curves of plot.png."""

from nanorrm.judge.verdict import NO_ANSWER
from nanorrm.measure.statistics import correlation


def response_stats(queries, groups, answers, rewards):
    """Shape of P x G responses, and how their rewards go with what they should not go with.

    reward/length_correlation: of reward and length within a group, over groups where both differ;
    accuracy: against the truth where it is known, which training does not see.
    """
    responses = [response for group in groups for response in group]
    texts = [text for group in answers for text in group]
    n = len(responses)
    lengths = [[len(response.ids) for response in group] for group in groups]
    pulls = [correlation(*each) for each in zip(lengths, rewards)]
    pulls = [pull for pull in pulls if pull is not None]
    return {
        "frac_reward_zero_std": sum(len(set(group)) == 1 for group in rewards) / len(rewards),
        "reward/length_correlation": sum(pulls) / len(pulls) if pulls else None,
        "rollout/tokens": sum(map(sum, lengths)),  # beside judge/tokens: what each costs
        "completions/mean_length": sum(map(sum, lengths)) / n,
        "completions/mean_think_length": sum(r.think_tokens for r in responses) / n,
        "completions/clipped_ratio": sum(r.finish_reason == "length" for r in responses) / n,
        "completions/no_answer_ratio": texts.count(NO_ANSWER) / n,
        "completions/mean_answer_chars": sum(map(len, texts)) / n,
        **accuracy("accuracy", queries, answers),
    }


def sample_record(query, group, answers, rewards):
    """One query's G responses as a record of samples.jsonl."""
    texts = [response.text for response in group]
    return {"query": query.text, "responses": texts, "answers": answers, "rewards": rewards}


def accuracy(name, queries, answers):
    """{name: share of right answers, name_N_terms: by difficulty}; {} if no truth is known."""
    right = [
        (query.meta.get("terms"), [text == query.truth for text in group])
        for query, group in zip(queries, answers)
        if query.truth is not None
    ]
    stats = {}
    for terms in [None, *sorted({terms for terms, _ in right if terms})]:
        chosen = [x for t, group in right for x in group if terms in (None, t)]
        if chosen:
            stats[f"{name}_{terms}_terms" if terms else name] = sum(chosen) / len(chosen)
    return stats


def judge_line(stats):
    """One line of a step for people; before the first step there is only an evaluation."""
    if "reward" not in stats:
        return f"held-out {stats['eval/accuracy']:.3f} before training" if stats else "no held-out"
    line = (
        f"reward {stats['reward']:+.3f}  acc {stats['accuracy']:.3f}  "
        f"think {stats['completions/mean_think_length']:5.1f}  entropy {stats['entropy']:.3f}  "
        f"unread {stats['completions/unreadable_ratio']:.3f}  grad {stats['grad_norm']:.2f}  "
        f"{stats['rollout/seconds']:.1f}+{stats['train/seconds']:.1f} s"
    )
    return line + (f"  held-out {stats['eval/accuracy']:.3f}" if "eval/accuracy" in stats else "")


def judge_panels(rows):
    """The curves of plot.png over steps: accuracy, thinking length, how busy the engine was."""

    def curve(name):
        return [(row["step"], row[name]) for row in rows if row.get(name) is not None]

    accuracy = {"rollouts": curve("accuracy"), "held-out": curve("eval/accuracy")}
    names = sorted({n for row in rows for n in row if n.startswith("eval/accuracy_")})
    levels = {n.removeprefix("eval/accuracy_").replace("_", " "): curve(n) for n in names}
    panels = [("accuracy", accuracy)]
    if levels:
        panels.append(("held-out accuracy", levels))
    panels.append(("thinking, tokens", {"": curve("completions/mean_think_length")}))
    names = ("batch_occupancy", "cache_hit_rate", "kv_use_max", "host_share")
    shares = {name.replace("_", " "): curve(f"engine/{name}") for name in names}
    return [*panels, ("engine, shares", shares)]


def policy_line(stats):
    """One line of a step of a policy's training by a judge, or of the evaluation before it."""
    parts = []
    if "completions/mean_length" in stats:
        parts.append(f"length {stats['completions/mean_length']:5.1f}")
        parts.append(f"entropy {stats['entropy']:.3f}")
        parts.append(f"equal {stats['judge/identical_ratio']:.2f}")
        parts.append(f"undecided {stats['judge/undecided_ratio']:.3f}")
    if "rewards/margins" in stats:
        parts.append(f"loss {stats['loss']:.4f}")
        parts.append(f"prefers chosen {stats['rewards/accuracies']:.3f}")
    if "accuracy" in stats:
        parts.append(f"acc {stats['accuracy']:.3f}")
    if "grad_norm" in stats:
        parts.append(f"grad {stats['grad_norm']:.2f}")
    if "rollout/seconds" in stats:
        halves = ("rollout/seconds", "judge/seconds", "train/seconds")
        parts.append("+".join(f"{stats[name]:.1f}" for name in halves) + " s")
    if "eval/win_rate" in stats:
        parts.append(f"held-out: wins {stats['eval/win_rate']:.3f}")
        if "eval/accuracy" in stats:
            parts.append(f"acc {stats['eval/accuracy']:.3f}")
    return "  ".join(parts) or "no held-out"


def policy_panels(rows):
    """The curves of plot.png: what is wanted, what is rewarded, length, and what it costs."""

    def curve(name, part=None):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        return {part or name: points} if points else {}

    names = sorted({n for row in rows for n in row if n.startswith("eval/accuracy_")})
    panels = [
        ("share", {**curve("accuracy", "rollouts right"), **curve("eval/accuracy", "held-out right")
                   , **curve("eval/win_rate", "wins against the start"),
                   **curve("rewards/accuracies", "chosen preferred")}),
        ("held-out accuracy", {k: v for n in names for k, v in curve(
            n, n.removeprefix("eval/accuracy_").replace("_", " ")).items()}),
        ("length, tokens", {**curve("completions/mean_length", "rollouts"),
                            **curve("eval/mean_length", "held-out")}),
        ("seconds a step", {**curve("rollout/seconds", "policy"), **curve("judge/seconds", "judge"),
                            **curve("train/seconds", "update")}),
    ]  # fmt: skip
    return [(label, curves) for label, curves in panels if curves]


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
