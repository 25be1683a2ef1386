"""What a rollout earns: +1 for the right verdict, -1 for a wrong or unreadable one, nothing else.

No reward for format or length: that is the paper's rule, and it is enough.
"""

from nanorrm.prompts import parse_verdict


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
