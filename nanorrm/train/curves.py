"""What the log says of a step: numbers, one line for people, and the curves of plot.png."""

from nanorrm.judge.verdict import NO_ANSWER
from nanorrm.measure.statistics import correlation

# -- numbers, under TRL's names where TRL has them


def mean(numbers):
    """The mean of some numbers or flags, None of none."""
    numbers = list(numbers)
    return sum(numbers) / len(numbers) if numbers else None


def completion_stats(groups, rewards):
    """Shape of P x G completions, and how many of the P groups have nothing to teach.

    groups [P][G]: Completions; rewards [P][G]. Lengths in tokens.
    """
    every = [completion for group in groups for completion in group]
    return {
        "frac_reward_zero_std": mean(len(set(group)) == 1 for group in rewards),
        "completions/mean_length": mean(len(c.ids) for c in every),
        "completions/mean_think_length": mean(c.think_tokens for c in every),
        "completions/clipped_ratio": mean(c.finish_reason == "length" for c in every),
    }


def rollout_stats(graded, groups):
    """Rewards and shape of a judge's rollouts. graded [P][G]: (reward, verdict 1 | 2 | None)."""
    rewards = [[reward for reward, _ in group] for group in graded]
    verdicts = [verdict for group in graded for _, verdict in group]
    readable = [verdict for verdict in verdicts if verdict is not None]
    return {
        "reward": sum(map(sum, rewards)) / len(verdicts),
        "accuracy": mean(reward > 0 for group in rewards for reward in group),
        **completion_stats(groups, rewards),
        "completions/unreadable_ratio": 1 - len(readable) / len(verdicts),
        "completions/first_slot_ratio": mean(verdict == 1 for verdict in readable),
    }


def response_stats(queries, groups, answers, rewards):
    """Shape of a policy's responses, and how their rewards go with what they should not go with.

    answers, rewards [P][G]. reward/length_correlation: of reward and length within a group, over
    groups where both differ; accuracy: against the truth where it is known, which training does not
    see.
    """
    texts = [text for group in answers for text in group]
    lengths = [[len(response.ids) for response in group] for group in groups]
    pulls = [correlation(*each) for each in zip(lengths, rewards)]
    return {
        **completion_stats(groups, rewards),
        "reward/length_correlation": mean(pull for pull in pulls if pull is not None),
        "rollout/tokens": sum(map(sum, lengths)),  # beside judge/tokens: what each costs
        "completions/no_answer_ratio": mean(text == NO_ANSWER for text in texts),
        "completions/mean_answer_chars": mean(map(len, texts)),
        **accuracy("accuracy", queries, answers),
    }


def accuracy(name, queries, answers):
    """{name: share of right answers, name_N_terms: by difficulty}; {} if no truth is known."""
    right = [
        (query.meta.get("terms"), text == query.truth)
        for query, group in zip(queries, answers)
        if query.truth is not None
        for text in group
    ]
    stats = {name: mean(x for _, x in right)} if right else {}
    for terms in sorted({terms for terms, _ in right if terms}):
        stats[f"{name}_{terms}_terms"] = mean(x for t, x in right if t == terms)
    return stats


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


# -- records of samples.jsonl


def judge_sample(step, pair, group, graded):
    """One pair's rollouts with their rewards."""
    rollouts = [
        {"text": rollout.text, "reward": reward, "verdict": verdict}
        for rollout, (reward, verdict) in zip(group, graded)
    ]
    shown = {name: getattr(pair, name) for name in ("query", "a", "b", "label")}
    return {"step": step, **shown, "rollouts": rollouts}


def policy_sample(step, query, group, answers, rewards):
    """One query's responses with what the judge saw of them and their rewards."""
    shown = {"step": step, "query": query.text, "responses": [r.text for r in group]}
    return {**shown, "answers": answers, "rewards": rewards}


# -- one line a step


def judge_line(stats):
    """One line of a judge's step; before the first step there is only an evaluation."""
    if "reward" not in stats:
        return f"held-out {stats['eval/accuracy']:.3f} before training" if stats else "no held-out"
    line = (
        f"reward {stats['reward']:+.3f}  acc {stats['accuracy']:.3f}  "
        f"think {stats['completions/mean_think_length']:5.1f}  entropy {stats['entropy']:.3f}  "
        f"unread {stats['completions/unreadable_ratio']:.3f}  grad {stats['grad_norm']:.2f}  "
        f"{stats['rollout/seconds']:.1f}+{stats['train/seconds']:.1f} s"
    )
    return line + (f"  held-out {stats['eval/accuracy']:.3f}" if "eval/accuracy" in stats else "")


POLICY_LINE = (  # metric, its form: each is shown where the step has it
    ("completions/mean_length", "length {:5.1f}"),
    ("entropy", "entropy {:.3f}"),
    ("judge/identical_ratio", "equal {:.2f}"),
    ("judge/undecided_ratio", "undecided {:.3f}"),
    ("rewards/margins", "loss {loss:.4f}"),
    ("rewards/accuracies", "prefers chosen {:.3f}"),
    ("accuracy", "acc {:.3f}"),
    ("grad_norm", "grad {:.2f}"),
    ("rollout/seconds", "{:.1f}+{judge/seconds:.1f}+{train/seconds:.1f} s"),
    ("eval/win_rate", "held-out: wins {:.3f}"),
    ("eval/accuracy", "acc {:.3f}"),
)


def policy_line(stats):
    """One line of a policy's step, or of the evaluation before it."""
    shown = [form.format(stats[name], **stats) for name, form in POLICY_LINE if name in stats]
    return "  ".join(shown) or "no held-out"


# -- plot.png: (panel, metric, label), see runs.curves_of

JUDGE_PANELS = (
    ("accuracy", "accuracy", "rollouts"),
    ("accuracy", "eval/accuracy", "held-out"),
    ("held-out accuracy", "eval/accuracy_*", ""),
    ("thinking, tokens", "completions/mean_think_length", ""),
    ("engine, shares", "engine/batch_occupancy", "batch occupancy"),
    ("engine, shares", "engine/cache_hit_rate", "cache hit rate"),
    ("engine, shares", "engine/kv_use_max", "kv use max"),
    ("engine, shares", "engine/host_share", "host share"),
)
POLICY_PANELS = (
    ("share", "accuracy", "rollouts right"),
    ("share", "eval/accuracy", "held-out right"),
    ("share", "eval/win_rate", "wins against the start"),
    ("share", "rewards/accuracies", "chosen preferred"),
    ("held-out accuracy", "eval/accuracy_*", ""),
    ("length, tokens", "completions/mean_length", "rollouts"),
    ("length, tokens", "eval/mean_length", "held-out"),
    ("seconds a step", "rollout/seconds", "policy"),
    ("seconds a step", "judge/seconds", "judge"),
    ("seconds a step", "train/seconds", "update"),
)
