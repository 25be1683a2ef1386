"""What an evaluation leaves behind: a table, results.json, records.jsonl, plot.png, report.html;
and the comparison of two such folders.

records.jsonl has one JSON object per comparison ("kind": "pair") or ranked query ("ranking"), in
full, so that every number of the table can be recomputed, and read beside the thinking behind it.
"""

import json
import os
import re
import time
from dataclasses import asdict
from itertools import count
from pathlib import Path

import numpy as np

from nanorrm.config import UserError
from nanorrm.files import read_json, write_text
from nanorrm.measure import metrics, statistics
from nanorrm.measure.report import read_records, write_report
from nanorrm.rank.bestof import choose
from nanorrm.runs import surroundings

COLUMNS = [  # of the table: heading, metric, format
    ("voted", "voted", "{:.1%}"),
    ("consistent", "consistency", "{:.1%}"),
    ("slot 1", "first_slot", "{:.1%}"),
    ("unreadable", "unreadable", "{:.1%}"),
    ("truncated", "truncated", "{:.1%}"),
    ("think", "think_tokens_per_pair", "{:.1f}"),
]


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


def ranking_record(ranking, ranked, verdict, strategy):
    """One ranked query as a line of records.jsonl; verdict(a, b): what decided a match, or None."""
    rounds = [
        [[a, b, winner, votes_of(said) if (said := verdict(a, b)) else None] for a, b, winner in at]
        for at in ranked.rounds
    ]
    return {
        "kind": "ranking",
        "id": ranking.id,
        "source": ranking.source,
        "query": ranking.query,
        "responses": ranking.responses,
        "truth": ranking.truth,
        "champion": ranked.champion,
        "ratings": ranked.ratings,
        "rounds": rounds,
        "meta": {**ranking.meta, "strategy": strategy},
    }


def percent(share, interval=None):
    """`71.2% [68.0%, 74.1%]`; `-` for None."""
    if share is None:
        return "-"
    text = f"{share:6.1%}"
    return text + (" [{:6.1%}, {:6.1%}]".format(*interval) if interval else "")


def cell(value, form):
    """A number of a table; `-` for None."""
    return "-" if value is None else form.format(value)


def table(rows):
    """Lines of the table: rows {name: summary}."""
    width = max(map(len, rows))
    heads = "  ".join(f"{head:>{max(6, len(head))}s}" for head, *_ in COLUMNS)
    yield f"{'':{width}}  pairs  {'accuracy [95%]':24s}  {heads}"
    for name, s in rows.items():
        cells = [f"{cell(s[key], form):>{max(6, len(head))}s}" for head, key, form in COLUMNS]
        accuracy = percent(s["accuracy"], s["accuracy_interval"])
        yield f"{name:{width}}  {s['pairs']:5d}  {accuracy}  {'  '.join(cells)}"


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


def ranking_table(rows):
    """Lines of a table over queries: rows {name: {"queries", "accuracy", "matches", ...}}."""
    width = max(map(len, rows))
    yield f"{'':{width}}  queries  {'accuracy [95%]':24s}  matches per query"
    for name, s in rows.items():
        accuracy = percent(s["accuracy"], s["accuracy_interval"])
        matches = cell(s["matches"], "{:.1f}")
        yield f"{name:{width}}  {s['queries']:7d}  {accuracy:24s}  {matches:>17s}"


def cost(total, counts, seconds):
    """Lines that say what became of every match, and what a comparison shows and costs."""
    yield (
        "{matches} matches = {asked} asked + {repeated} repeated + {identical} identical = "
        "{decided} decided + {coins} by coin + {draws} drawn".format_map(counts)
    )
    shown = [f"{head} {cell(total[key], form)}" for head, key, form in COLUMNS[1:]]
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
    return {
        "kind": "pair",
        "id": pair.id,
        "source": pair.source,
        "section": pair.meta.get("section", ""),
        "query": pair.query,
        "a": pair.a,
        "b": pair.b,
        "label": pair.label,
        "winner": verdict.winner,
        "p_first": verdict.p_first,
        "outcome": metrics.outcome(pair, verdict),
        "votes": votes_of(verdict),
        "meta": {**pair.meta, **{k: v for k in ("skipped", "cut") if (v := getattr(verdict, k))}},
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


def write(folder, command, settings, numbers, records, draw=None):
    """results.json (numbers, settings, versions), records.jsonl, plot.png, and report.html.

    draw: a function that draws on a matplotlib figure. results.json comes last, so that a folder
    that has one is whole.
    """
    try:
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        # a server can send half a character, which no UTF-8 file holds
        lines = re.sub("[\ud800-\udfff]", lambda m: rf"\u{ord(m[0]):04x}", lines)
        write_text(folder / "records.jsonl", lines)
        if draw is not None:
            figure(folder / "plot.png", draw)
        about = {"command": command, "settings": asdict(settings), **numbers}
        about["versions"] = surroundings()
        write_text(folder / "results.json", json.dumps(about, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{folder}: can't write there ({error.strerror})") from None
    write_report(folder)


def figure(path, draw):
    """Save what draw(figure) draws as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    canvas = pyplot.figure(figsize=(8, 5), layout="constrained")
    draw(canvas)
    canvas.savefig(path, dpi=120)
    pyplot.close(canvas)


def bars(rows):
    """A drawing of the accuracies of rows {name: summary} with their intervals."""

    def draw(canvas):
        names = [name for name in rows if rows[name]["accuracy"] is not None][::-1]
        canvas.set_size_inches(8, 1.2 + 0.28 * len(names))
        axis = canvas.add_subplot()
        for place, name in enumerate(names):
            axis.plot(rows[name]["accuracy_interval"], (place, place), color="C0", linewidth=2)
            axis.plot(rows[name]["accuracy"], place, "o", color="C0")
        axis.axvline(0.5, color="grey", linewidth=0.8, linestyle=":")
        axis.set(yticks=range(len(names)), yticklabels=names, xlim=(0, 1.02), xlabel="accuracy")
        axis.grid(axis="x", alpha=0.3)

    return draw


def curves(panels):
    """A drawing of panels {title: {"x": label, "log": bool, "curves": {name: points}}}.

    points: [(x, accuracy, low, high), ...], or [(x, accuracy), ...].
    """

    def draw(canvas):
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

    return draw


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
    several = len({record["meta"].get("strategy") for record in records}) > 1
    found = {}
    for record in records:
        ranked = kind == "ranking"
        known = record.get("truth") if ranked else record.get("label")
        if record["kind"] != kind or known is None:
            continue
        if ranked:
            shown, credit = record["responses"], float(known[record["champion"]])
            right = credit > 0.5
        else:
            votes = [vote["vote"] for vote in record["votes"]]
            shown, right = (record["a"], record["b"]), record["outcome"] == "right"
            credit = votes.count(known) / len(votes) if votes else 0.0
        query = json.dumps(record["query"])
        strategy = record["meta"].get("strategy") if several else None
        key, copy = (query, strategy, *sorted(shown)), 0
        while (key, copy) in found:
            copy += 1
        found[key, copy] = (credit, right, query, strategy or record.get("source", ""))
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
        a, b = [one[key] for key in keys], [other[key] for key in keys]
        queries = [query for _, _, query, _ in a]
        gained = [y[0] - x[0] for x, y in zip(a, b)]
        rows[name] = {
            "pairs": len(keys),
            "first": statistics.mean([x[0] for x in a]),
            "second": statistics.mean([y[0] for y in b]),
            "difference": statistics.mean(gained),
            "difference_interval": statistics.bootstrap(gained, queries, lowest=-1),
            "mcnemar": statistics.mcnemar([x[1] for x in a], [y[1] for y in b]),
            "sign_flip": statistics.sign_flip(gained, queries),
        }
    left = {"only in the first": len(one) - len(shared)}
    return rows, {**left, "only in the second": len(other) - len(shared)}


def comparison(rows, left):
    """Lines of a comparison: what `compare` returns."""
    width = max(map(len, rows))
    head = f"{'':{width}}  pairs   first  second  {'difference [95%]':26s}  McNemar p  sign-flip p"
    yield head
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
    n = sum(
        value is not None and (not weights or w > 0) for value, w in zip(values, weights or values)
    )
    return {
        "queries": n,
        "accuracy": statistics.mean(values, weights),
        "accuracy_interval": statistics.bootstrap(values, queries, weights),
        "matches": play.counts["matches"] / len(values) if play else None,
    }


def chosen(rankings, played):
    """Rows of what strategies {name: (ranked, play)} chose, among what needs no judge."""
    queries = [str(ranking.query) for ranking in rankings]
    rows = {
        name: over_queries([choose(name, ranking) for ranking in rankings], queries)
        for name in ("one sample", "majority", "best possible")
    }
    best = rows.pop("best possible")
    for name, (ranked, play) in played.items():
        truth = [choose(name, *one) for one in zip(rankings, ranked)]
        rows[name] = over_queries(truth, queries, play)
    return {**rows, "best possible": best}
