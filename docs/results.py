"""Print the first table of RESULTS.md from what `make results` left under runs/."""

import json
import sys
from pathlib import Path

ROWS = ("all trained lengths", "harder half (4+)", "7 terms, never trained")


def lines(runs):
    """One Markdown row per evaluated run: accuracies with intervals, steps, minutes, thinking."""
    yield (
        "| run | steps | minutes | tokens per rollout, first to last step | "
        + " | ".join(ROWS)
        + " |"
    )
    yield "|---|---|---|---|" + "---|" * len(ROWS)
    for path in sorted(runs.glob("*/eval.json")):
        table = json.loads(path.read_text())["rows"]
        cells = []
        for row in ROWS:
            low, high = table[row]["accuracy_interval"]
            cells.append(f"{table[row]['accuracy']:.1%} [{low:.1%}, {high:.1%}]")
        log = path.parent / "metrics.jsonl"
        steps = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        steps = [step for step in steps if "minutes" in step]
        about = "| - | - | - |"
        if steps:
            first, last = (step["completions/mean_length"] for step in (steps[0], steps[-1]))
            about = f"| {len(steps)} | {steps[-1]['minutes']:.1f} | {first:.1f} to {last:.1f} |"
        yield f"| {path.parent.name} {about} " + " | ".join(cells) + " |"


if __name__ == "__main__":
    print("\n".join(lines(Path(sys.argv[1] if len(sys.argv) > 1 else "runs"))))
