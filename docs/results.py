"""Print the tables of RESULTS.md from what `make results` left under runs/."""

import json
import sys
from pathlib import Path

ROWS = ("all trained lengths", "harder half (4+)", "7 terms, never trained")
TERMS = [f"{n} terms" for n in range(2, 7)]
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t for the mean of so many seeds
GAIN = ("before: one", "after: one", "gain of one")
KNOCKOUT = ("before: one", "before: majority", "before: knockout", "before: knockout - one")
TAUGHT = {  # heading -> (kind of run, lines of its best_of.json)
    "policy": ("policy", GAIN),
    "dpo": ("dpo", GAIN),
    "best of 8": ("policy", (*KNOCKOUT, "before: knockout - majority")),
}


def found(runs, pattern):
    """[(run folder, what the file holds)] of the JSON files that fit, by name."""
    return [(path.parent, json.loads(path.read_text())) for path in sorted(runs.glob(pattern))]


def over_seeds(means):
    """`mean [low, high]` over seeds, by Student's t where there are enough."""
    n, mean = len(means), sum(means) / len(means)
    if n not in T95:
        return f"{mean:.1%}"
    spread = (sum((x - mean) ** 2 for x in means) / (n - 1) / n) ** 0.5 * T95[n]
    return f"{mean:.1%} [{mean - spread:.1%}, {mean + spread:.1%}]"


def accuracies(runs):
    """One row per evaluated run: steps, minutes, thinking, accuracies with intervals."""
    yield "run", "steps", "minutes", "tokens per rollout, first to last step", *ROWS
    for run, numbers in found(runs, "*/eval.json"):
        log, about = run / "metrics.jsonl", ("-", "-", "-")
        steps = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        if steps := [step for step in steps if "minutes" in step]:
            first, last = (steps[i]["completions/mean_length"] for i in (0, -1))
            about = len(steps), f"{steps[-1]['minutes']:.1f}", f"{first:.1f} to {last:.1f}"
        shown = [numbers["rows"][name] for name in ROWS]
        ends = [(row["accuracy"], *row["accuracy_interval"]) for row in shown]
        yield run.name, *about, *("{:.1%} [{:.1%}, {:.1%}]".format(*three) for three in ends)


def judges(runs):
    """Accuracy on all trained lengths, the mean over seeds of each kind of run."""
    yield "run", "mean over seeds [95%, t]"
    for kind in ("judge", "direct", "no-check"):
        if seeds := found(runs, f"{kind}-[0-9]*/eval.json"):
            yield kind, over_seeds([table["rows"][ROWS[0]]["accuracy"] for _, table in seeds])


def taught(runs):
    """Each line of the policies' best_of.json by seed, and the mean over seeds."""
    yield "", "", "seeds", "mean over seeds [95%, t]"
    for heading, (kind, lines) in TAUGHT.items():
        seeds = found(runs, f"{kind}-[0-9]*/best_of.json")
        for line in lines if seeds else ():
            means = [numbers[line][0] for _, numbers in seeds]
            yield heading, line, ", ".join(f"{mean:.1%}" for mean in means), over_seeds(means)


def thinking(runs):
    """Tokens per vote by chain length: does thinking grow with difficulty?"""
    yield "run", *TERMS
    for run, numbers in found(runs, "judge-[0-9]*/eval.json"):
        yield run.name, *(f"{numbers['rows'][name]['tokens_per_vote']:.1f}" for name in TERMS)


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs")
    for table in (accuracies, judges, taught, thinking):
        heads, *rows = table(folder)
        for row in (heads, ["---"] * len(heads), *rows):
            print(f"| {' | '.join(map(str, row))} |")
        print()
