"""What an evaluation leaves behind: a table, results.json, records.jsonl, plot.png, report.html;
and the comparison of two such folders.

records.jsonl has one JSON object per comparison ("kind": "pair") or ranked query ("ranking"), in
full, so that every number of the table can be recomputed, and read beside the thinking behind it.
"""

import json
import os
import re
import time
from collections import Counter
from dataclasses import asdict
from itertools import count
from pathlib import Path

import numpy as np

from nanorrm.config import UserError
from nanorrm.files import read_json, write_text
from nanorrm.measure import metrics, statistics
from nanorrm.measure.metrics import written
from nanorrm.measure.report import read_records, write_report
from nanorrm.rank.bestof import choose
from nanorrm.runs import surroundings

COLUMNS = {  # of the table over pairs: heading -> metric
    "voted": "voted", "consistent": "consistency", "slot 1": "first_slot",
    "unreadable": "unreadable", "truncated": "truncated", "think": "think_tokens_per_pair",
}  # fmt: skip


class Recorder:
    """A judge that keeps what it was asked, what it said, and how long that took."""

    def __init__(self, judge):
        self.judge, self.seed = judge, judge.seed
        self.asked = []  # (pair, verdict)
        self.seconds = 0.0

    def compare(self, pairs, *args, **settings):
        """As Judge.compare."""
        began = time.perf_counter()
        verdicts = self.judge.compare(pairs, *args, **settings)
        self.seconds += time.perf_counter() - began
        self.asked += zip(pairs, verdicts)
        return verdicts


def percent(share, interval=None):
    """`71.2% [68.0%, 74.1%]`; `-` for None."""
    if share is None:
        return "-"
    return f"{share:6.1%}" + (" [{:6.1%}, {:6.1%}]".format(*interval) if interval else "")


def table(rows):
    """Lines of the table of rows {name: numbers}, over pairs or over queries."""
    width = max(map(len, rows))
    unit = "pairs" if "pairs" in next(iter(rows.values())) else "queries"
    columns = COLUMNS if unit == "pairs" else {"matches per query": "matches"}
    heads = {f"{head:>6s}": metric for head, metric in columns.items()}
    yield f"{'':{width}}  {unit}  {'accuracy [95%]':24s}  {'  '.join(heads)}"
    for name, row in rows.items():
        cells = [f"{written(key, row[key]):>{len(head)}s}" for head, key in heads.items()]
        accuracy = percent(row["accuracy"], row["accuracy_interval"])
        yield f"{name:{width}}  {row[unit]:{len(unit)}d}  {accuracy:24s}  {'  '.join(cells)}"


def account(total, benchmark, scores, seconds):
    """Lines that say where every row of the file went, what it cost, and further scores."""
    if benchmark.note:
        yield f"{benchmark.note}\n"
    counts = " + ".join(f"{kind} {total[kind]}" for kind in metrics.OUTCOMES)
    each = seconds / max(1, total["pairs"])
    yield f"{counts} = {total['pairs']} pairs, in {seconds:.1f} s ({each:.3f} s each)"
    if benchmark.left_out:
        said = " + ".join(f"{n} {why}" for why, n in benchmark.left_out.items())
        rows = total["pairs"] + sum(benchmark.left_out.values())
        yield f"{total['pairs']} judged + {said} = {rows} in the file"
    for name, n in (("accuracy", total["pairs"]), ("accuracy_readable", total["readable_pairs"])):
        if n:
            over = "readable" if name.endswith("readable") else "all"
            yield f"accuracy over {over} {n}: {percent(total[name], total[f'{name}_interval'])}"
    for name, score in scores.items():
        yield f"{name}: {percent(score).strip()}"


def cost(total, counts, seconds):
    """Lines that say what became of every match, and what a comparison shows and costs."""
    yield (
        "{matches} matches = {asked} asked + {repeated} repeated + {identical} identical = "
        "{decided} decided + {coins} by coin + {draws} drawn".format_map(counts)
    )
    shown = [f"{head} {written(key, total[key])}" for head, key in COLUMNS.items() if key in total]
    each = seconds / max(1, counts["asked"])
    yield f"{', '.join(shown)}; {each:.3f} s per comparison, {seconds:.1f} s in all"


def flags(total, both_orders):
    """What a reader should be warned of, one line each; total: a summary."""
    slot, n = total["first_slot"], total["readable_pairs"]
    if both_orders and slot is not None:
        low, high = statistics.wilson(slot * n, n)
        if not low <= 0.5 <= high and abs(slot - 0.5) > 0.05:
            side = 1 if slot > 0.5 else 2
            share = max(slot, 1 - slot)
            yield f"! position bias: {share:.1%} of the votes name the response in slot {side}"
    for name, told in (
        ("unreadable", "votes can't be read (they count as not right)"),
        ("truncated", "votes ran into the token limit; a larger --max-tokens may help"),
    ):
        if total[name] is not None and total[name] > 0.02:
            yield f"! {total[name]:.1%} of the {told}"
    for reason, n in total["skips"].items():
        yield f"! {n} pairs were not judged (they count as not right): {reason}"
    if total["cut"]:
        yield f"! {total['cut']} pairs were judged with the beginning of a response cut off"
    if total["failed_tries"]:
        said = ", ".join(f"{n} {kind}" for kind, n in total["failed_tries"].items())
        yield f"! failed tries at the endpoint, made good since: {said}"


def votes_of(verdict):
    """The votes of a verdict for records.jsonl."""
    names = ("vote", "swapped", "thought", "finish_reason", "tokens")
    lists = (verdict.votes, verdict.swapped, verdict.thoughts, verdict.finish_reasons)
    return [dict(zip(names, vote)) for vote in zip(*lists, verdict.vote_tokens)]


def pair_record(pair, verdict):
    """One comparison as a line of records.jsonl."""
    odd = {name: value for name in ("skipped", "cut") if (value := getattr(verdict, name))}
    return {
        "kind": "pair",
        "id": pair.id,
        **vars(pair),
        "section": pair.meta.get("section", ""),
        "winner": verdict.winner,
        "p_first": verdict.p_first,
        "outcome": metrics.outcome(pair, verdict),
        "votes": votes_of(verdict),
        "meta": {**pair.meta, **odd},
    }


def ranking_record(ranking, ranked, verdict, strategy):
    """One ranked query as a line of records.jsonl; verdict(a, b): what decided a match, or None."""
    rounds = [
        [[a, b, winner, (heard := verdict(a, b)) and votes_of(heard)] for a, b, winner in games]
        for games in ranked.rounds
    ]
    return {
        "kind": "ranking",
        "id": ranking.id,
        **vars(ranking),
        "champion": ranked.champion,
        "ratings": ranked.ratings,
        "rounds": rounds,
        "meta": {**ranking.meta, "strategy": strategy},
    }


def output_folder(command, out):
    """Where an evaluation will write, made before the judging begins."""
    name = f"runs/eval-{command}-{time.strftime('%Y%m%d-%H%M%S')}"
    copies = (Path(name if n == 1 else f"{name}-{n}") for n in count(1))
    folder = Path(out) if out else next(path for path in copies if not path.exists())
    try:
        if (folder / "results.json").exists():
            raise UserError(f"{folder}: holds results already; --out names another folder")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: can't write there ({error.strerror})") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder}: can't write there")
    return folder


def write(folder, command, settings, numbers, records, draw):
    """results.json (numbers, settings, versions), records.jsonl, plot.png, and report.html.

    draw: a function that draws on a matplotlib figure. results.json comes last, so that a folder
    that has one is whole.
    """
    from matplotlib.figure import Figure  # the slowest import of all

    canvas = Figure(figsize=(8, 5), layout="constrained")
    draw(canvas)
    try:
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        # a server can send half a character, which no UTF-8 file holds
        lines = re.sub("[\ud800-\udfff]", lambda m: rf"\u{ord(m[0]):04x}", lines)
        write_text(folder / "records.jsonl", lines)
        canvas.savefig(folder / "plot.png", dpi=120)
        about = {"command": command, "settings": asdict(settings), **numbers}
        about["versions"] = surroundings()
        write_text(folder / "results.json", json.dumps(about, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{folder}: can't write there ({error.strerror})") from None
    write_report(folder)


def bars(rows, canvas):
    """Draw the accuracies of rows {name: summary} with their intervals."""
    names = [name for name in rows if rows[name]["accuracy"] is not None][::-1]
    canvas.set_size_inches(8, 1.2 + 0.28 * len(names))
    axis = canvas.add_subplot()
    for place, name in enumerate(names):
        axis.plot(rows[name]["accuracy_interval"], (place, place), color="C0", linewidth=2)
        axis.plot(rows[name]["accuracy"], place, "o", color="C0")
    axis.axvline(0.5, color="grey", linewidth=0.8, linestyle=":")
    axis.set(yticks=range(len(names)), yticklabels=names, xlim=(0, 1.02), xlabel="accuracy")
    axis.grid(axis="x", alpha=0.3)


def curves(panels, canvas):
    """Draw panels {title: {"x": label, "log": bool, "curves": {name: points}}}.

    points: [(x, accuracy, low, high), ...], or [(x, accuracy), ...].
    """
    canvas.set_size_inches(8, 3.2 * len(panels))
    for place, (title, panel) in enumerate(panels.items(), 1):
        axis = canvas.add_subplot(len(panels), 1, place)
        for name, points in panel["curves"].items():
            x, y, *ends = (np.array(column, float) for column in zip(*points))
            spread = (y - ends[0], ends[1] - y) if ends else None
            axis.errorbar(x, y, spread, label=name, marker="o", markersize=4, capsize=2)
        if panel.get("log"):
            axis.set_xscale("log", base=2)
        axis.set(title=title, xlabel=panel["x"], ylabel="accuracy")
        axis.grid(alpha=0.3)
        if len(panel["curves"]) > 1:
            axis.legend(fontsize=8, ncols=2)


def records_of(path):
    """The records of an evaluation, given its folder or its results.json."""
    folder = Path(path)
    folder = folder.parent if folder.is_file() else folder
    read_json(folder / "results.json")  # a folder without one is no evaluation, or half of one
    return read_records(folder / "records.jsonl")


def graded(records):
    """{content: (credit, right, query, group)} of an evaluation's rankings, else of its pairs.

    The key is the content, so that files in another order, or with other ids, still match; a pair
    that occurs twice has two keys. Rankings by several strategies match by strategy too.
    """
    kind = "ranking" if any(record["kind"] == "ranking" for record in records) else "pair"
    truth = {"ranking": "truth", "pair": "label"}[kind]
    records = [r for r in records if r["kind"] == kind and r.get(truth) is not None]
    several = len({record["meta"].get("strategy") for record in records}) > 1
    found, copies = {}, Counter()
    for record in records:
        known = record[truth]
        if kind == "ranking":
            texts, credit = record["responses"], float(known[record["champion"]])
            right = credit > 0.5
        else:
            votes = [vote["vote"] for vote in record["votes"]]
            texts, right = (record["a"], record["b"]), record["outcome"] == "right"
            credit = votes.count(known) / len(votes) if votes else 0.0
        query = json.dumps(record["query"])
        strategy = record["meta"].get("strategy") if several else None
        key = (query, strategy, *sorted(texts))
        copies[key] += 1
        found[key, copies[key]] = (credit, right, query, strategy or record.get("source", ""))
    return found


def compare(first, second):
    """Two evaluations of the same pairs or rankings -> {row: numbers}, counts of what matched.

    difference: second minus first, in accuracy, with a bootstrap interval over queries; mcnemar:
    exact p-value on right and not right; sign_flip: permutation p-value of the difference.
    """
    one, other = graded(records_of(first)), graded(records_of(second))
    shared = [key for key in one if key in other]
    if not shared:
        raise UserError(f"{first} and {second} share no judged pair")
    sources = sorted({one[key][3] for key in shared})
    groups = {source or "-": {source} for source in sources} if len(sources) > 1 else {}
    rows = {}
    for name, members in {**groups, "all": set(sources)}.items():
        keys = [key for key in shared if one[key][3] in members]
        sides = ([side[key] for key in keys] for side in (one, other))
        (a, a_right, queries, _), (b, b_right, *_) = (zip(*side) for side in sides)
        gained = [y - x for x, y in zip(a, b)]
        rows[name] = {
            "pairs": len(keys),
            "first": statistics.mean(a),
            "second": statistics.mean(b),
            "difference": statistics.mean(gained),
            "difference_interval": statistics.bootstrap(gained, queries, lowest=-1),
            "mcnemar": statistics.mcnemar(a_right, b_right),
            "sign_flip": statistics.sign_flip(gained, queries),
        }
    left = {"only in the first": len(one) - len(shared)}
    return rows, {**left, "only in the second": len(other) - len(shared)}


def comparison(rows, left):
    """Lines of a comparison: what `compare` returns."""
    width = max(map(len, rows))
    yield f"{'':{width}}  pairs   first  second  {'difference [95%]':26s}  McNemar p  sign-flip p"
    for name, r in rows.items():
        low, high = r["difference_interval"]
        difference = f"{r['difference']:+7.1%} [{low:+7.1%}, {high:+7.1%}]"
        yield (
            f"{name:{width}}  {r['pairs']:5d}  {r['first']:6.1%}  {r['second']:6.1%}  "
            f"{difference:26s}  {r['mcnemar']:9.2g}  {r['sign_flip']:11.2g}"
        )
    yield f"\n{rows['all']['pairs']} in both; " + ", ".join(f"{n} {why}" for why, n in left.items())


def over_queries(values, queries, play=None, weights=None):
    """A row of a table over queries: mean and interval of the values that are not None."""
    weighed = zip(values, weights or [1.0] * len(values))
    return {
        "queries": sum(value is not None and weight > 0 for value, weight in weighed),
        "accuracy": statistics.mean(values, weights),
        "accuracy_interval": statistics.bootstrap(values, queries, weights),
        "matches": play.counts["matches"] / len(values) if play else None,
    }


def chosen(rankings, played):
    """Rows of what strategies {name: (ranked, play)} chose, among what needs no judge."""
    nobody = [None] * len(rankings), None
    ways = {"one sample": nobody, "majority": nobody, **played, "best possible": nobody}
    queries, rows = [str(ranking.query) for ranking in rankings], {}
    for name, (ranked, play) in ways.items():
        truth = [choose(name, *one) for one in zip(rankings, ranked)]
        rows[name] = over_queries(truth, queries, play)
    return rows
