"""The page one reads comparisons in: results.json and records.jsonl of a folder -> report.html.

One file that opens from a disk without a network: the numbers as static HTML, the records as JSON,
and a hand-written reader (assets/report/) that draws one comparison or bracket at a time. All that
is to be counted is counted here; the reader lists, searches and shows. Text of models is text:
escaped here, entered as text nodes there, and a content security policy that allows the reader's
own script by its hash and nothing else stands behind both.
"""

import base64
import hashlib
import html
import json
import re
from collections import Counter
from importlib import resources
from pathlib import Path

from nanorrm.config import UserError
from nanorrm.data.formats import read_rows
from nanorrm.files import read_json, write_text
from nanorrm.judge.verdict import Verdict
from nanorrm.measure.metrics import OUTCOMES, written
from nanorrm.measure.patterns import PHRASES, by, patterns

MARKS = {"right": "✓", "wrong": "✗", "tied": "=", "unreadable": "?", "skipped": "–", "judged": "•"}
FILTERS = ("all", "right", "wrong", "tied", "inconsistent", "unreadable", "skipped", "rankings")
MAX_BYTES = 48 * 2**20  # of records in the page: what a browser opens and searches without a wait


def write_report(folder, max_bytes=MAX_BYTES):
    """Write report.html beside a folder's results.json and records.jsonl; returns its path.

    Records that would take the page beyond max_bytes are left out, the last first, and the page
    says how many. Raises UserError for a file that is missing or broken, naming the line.
    """
    folder = Path(folder)
    results = read_json(folder / "results.json")
    records = read_records(folder / "records.jsonl")
    sections = sorted({section_of(record) for record in records} - {""})
    shown, size, counts = [], 0, Counter()
    for record in records:
        section = section_of(record)
        page = of_pair(record) if record["kind"] == "pair" else of_ranking(record)
        page["section"] = 1 + sections.index(section) if section else 0  # the place in the choice
        line = as_script({**record, "page": page})
        size += len(line.encode()) + 2
        if size > max_bytes:
            break
        shown.append(line)
        counts.update(page["filters"])
    summary = [*about(results), *table(results), *thinking(records), *figure(folder / "plot.png")]
    if left := len(records) - len(shown):
        note = (
            f"The first {len(shown):,} of {len(records):,} records are shown; {left:,} are left "
            f"out, because this page holds at most {max_bytes / 2**20:.3g} MiB of them. All are in "
            "records.jsonl, and the numbers here are over all."
        )
        summary.insert(0, f'<p class="note">{note}</p>')
    return fill_page(
        folder / "report.html",
        title=text(f"{results.get('command') or folder.name} — nanorrm"),
        summary="\n".join(summary),
        filters="".join(buttons(counts)),
        sections="".join(choice(sections)),
        records=f"[{','.join(shown)}]",
    )


def fill_page(path, **values):
    """Write the page with these values in its places; its policy names the script by its hash."""
    values["style"] = asset("style.css")
    values["script"] = asset("tournament.js") + asset("script.js")
    digest = base64.b64encode(hashlib.sha256(values["script"].encode()).digest()).decode()
    values["policy"] = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    page = re.sub(r"\{\{(\w+)\}\}", lambda place: values[place[1]], asset("page.html"))
    try:
        write_text(path, page)
    except OSError as error:
        raise UserError(f"{path}: can't write there ({error.strerror})") from None
    return path


def asset(name):
    """The text of a file of assets/report/."""
    return resources.files("nanorrm").joinpath("assets/report", name).read_text(encoding="utf-8")


def read_records(path):
    """The records of a records.jsonl. Raises UserError that names the line that can't be used."""
    records = []
    for where, _, record in read_rows(path):
        if not isinstance(record, dict) or record.get("kind") not in ("pair", "ranking"):
            raise UserError(f"{where}: neither a pair nor a ranking")
        records.append(record)
    return records


def as_script(value):
    r"""JSON that can stand inside a script element and in a UTF-8 file, whatever is in its texts.

    >>> as_script(["</script>\u2028\ud800", float("nan")])
    '["\\u003c/script\\u003e\\u2028\\ud800", null]'
    """
    try:
        said = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:  # a browser reads no NaN
        value = json.loads(json.dumps(value), parse_constant=lambda name: None)
        said = json.dumps(value, ensure_ascii=False)
    return re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda m: rf"\u{ord(m[0]):04x}", said)


# -- what the reader shows of a record beside its texts: `page`


def section_of(record):
    """What the choice of sections goes by."""
    return str(record.get("section") or record["source"] or "")


def of_pair(record):
    """`page` of a pair: outcome, filters that it passes, words on its votes, remarks on a and b."""
    votes = record["votes"]
    said = Verdict([vote["vote"] for vote in votes], [vote["swapped"] for vote in votes])
    given, swapped = said.by_order()
    read, disagree = len(votes) - said.invalid, given and swapped and given != swapped
    outcome = {"invalid": "unreadable", None: "judged"}.get(record["outcome"], record["outcome"])
    words = [f"{said.p_first:.0%} of {plural(read, 'readable vote')} for a"] if read else []
    flaws, remarks = [], {1: [], 2: [], None: []}
    if said.invalid:
        words.append(f"{said.invalid} unreadable")
        flaws.append("unreadable")
    if disagree:
        words.append("the orders disagree")
        flaws.append("inconsistent")
    remarks[record["winner"]].append(["judge’s choice", ""])
    remarks[record["label"]].append(["better by the label", "right"])
    page = headline(outcome, section_of(record), words, flaws)
    return {**page, "remarks": [remarks[1], remarks[2]]}


def of_ranking(record):
    """`page` of a ranking: the same, which responses are good, and its tree or table of games."""
    truth, rounds, ratings = (record[name] for name in ("truth", "rounds", "ratings"))
    n, champion = len(ratings), record["champion"]
    games = [game for round_ in rounds for game in round_]
    page = {"order": sorted(range(n), key=lambda i: -ratings[i])}
    outcome, remarks = "judged", [[[f"rated {rating:.5g}", "soft"]] for rating in ratings]
    if truth is not None:
        good = page["good"] = [value > 0 and value == max(truth) for value in truth]
        outcome = "right" if good[champion] else "wrong"
        for mine, right in zip(remarks, good):
            mine.insert(0, ["✓ good", "right"] if right else ["✗ not good", "wrong"])
    remarks[champion].insert(0, ["champion", ""])
    if record["meta"].get("strategy") == "knockout" and games:
        page["tree"] = tree(rounds)
    else:
        page |= standings(n, games)
    words = [plural(n, "response"), plural(len(games), "game")]
    unreadable = any(vote["vote"] is None for *_, votes in games for vote in votes or ())
    flaws = ["rankings"] + ["unreadable"] * unreadable
    return {**page, **headline(outcome, f"ranking of {n}", words, flaws), "remarks": remarks}


def headline(outcome, kind, words, flaws):
    """What the list and the heading say of any record."""
    filters = list(dict.fromkeys(["all", outcome, *flaws]))  # once each
    about = {"badge": f"{MARKS[outcome]} {outcome}", "kind": kind, "words": ", ".join(words)}
    return {"outcome": outcome, "filters": filters, **about}


def tree(rounds):
    """The games of a knockout as its final and what led there: [round, place, game, game].

    >>> tree([[[0, 1, 1, None]], [[2, 1, 2, None]]])  # response 2 entered in the second round
    [1, 0, [0, 0]]
    """
    won = {}  # response -> the game it won last
    for round_, games in enumerate(rounds):
        for place, (a, b, winner, _) in enumerate(games):
            won[winner] = [round_, place, *filter(None, (won.get(a), won.get(b)))]
    return won[winner]


def standings(n, games):
    """Points of n responses, who leads, and [points, games] of each against each that it met.

    >>> standings(3, [[0, 1, 1, None], [1, 2, None, None]])["points"]  # a draw is half a point
    [0, 1.5, 0.5]
    """
    met = [[None] * n for _ in range(n)]
    for a, b, winner, _ in games:
        for me, other in ((a, b), (b, a)):
            won, played = met[me][other] or (0, 0)
            met[me][other] = [won + (0.5 if winner is None else int(winner == me)), played + 1]
    points = [sum(cell[0] for cell in row if cell) for row in met]
    return {"met": met, "points": points, "standing": sorted(range(n), key=lambda i: -points[i])}


def plural(n, word):
    """`1 vote`, `2,000 votes`."""
    return f"{n:,} {word}{'' if n == 1 else 's'}"


# -- the page's static parts


def buttons(counts):
    """A button for each filter that lets any record through."""
    for name in FILTERS:
        if counts[name] or name in ("all", "wrong"):
            words = f"{name}<span>{counts[name]:,}</span>"
            yield f'<button type="button" data-name="{name}">{words}</button>'


def choice(sections):
    """The choice of a section, where there are several."""
    if len(sections) > 1:
        options = "".join(f"<option>{text(name)}</option>" for name in ("all sections", *sections))
        yield f'<select id="section" aria-label="Section">{options}</select>'


def text(value):
    """Any value as HTML text; half a character becomes the replacement character."""
    return html.escape(str(value).encode("utf-8", "replace").decode())


def column(key, rows):
    """The cells of one metric over the rows, with intervals where there are any."""
    for row in rows:
        shown, interval = text(written(key, row.get(key))), row.get(f"{key}_interval")
        if row.get(key) is not None and isinstance(interval, list):
            low, high = (written(key, end).removesuffix("%") for end in interval)
            shown += f" <small>{low} to {high}</small>"
        yield shown


def table(results):
    """The tables of results.json, whatever its rows and metrics are.

    The row over all stands below the others if it has a metric of theirs, else apart.
    """
    rows, every = dict(results.get("rows") or {}), results.get("all")
    apart = {}
    if every:
        (rows if set(metrics_of(rows)) & set(metrics_of({"all": every})) else apart)["all"] = every
    for part in filter(None, (rows, apart)):
        yield from grid(metrics_of(part), part)


def metrics_of(rows):
    """The names of what can stand in a cell, those with an interval first."""
    keys = dict.fromkeys(key for row in rows.values() for key in row)
    said = [k for k in keys if any(isinstance(r.get(k), int | float | str) for r in rows.values())]
    return sorted(said, key=lambda key: f"{key}_interval" not in keys)


def thinking(records):
    """The table of reasoning patterns, by outcome where there are several."""
    groups = by(records, "outcome")
    rows = {outcome: groups[outcome] for outcome in OUTCOMES if outcome in groups}
    said = [v["thought"] or "" for r in records for v in r.get("votes", ())]
    rows["all"] = {"thoughts": len(said), **patterns(said)}
    if any(rows["all"][group] for group in PHRASES):  # the toy judge has no words
        yield "<h3>Share of thoughts with words of</h3>"
        yield from grid(list(rows["all"]), rows)


def grid(keys, rows):
    """The metrics of these keys of rows {name: numbers} as a table that scrolls if wide."""
    heads = "".join(f'<th scope="col">{text(key.replace("_", " "))}</th>' for key in keys)
    yield '<div class="scroll" tabindex="0" role="group" aria-label="Table"><table>'
    yield f"<thead><tr><td></td>{heads}</tr></thead><tbody>"
    for name, cells in zip(rows, zip(*(column(key, rows.values()) for key in keys))):
        last = ' class="all"' if name == "all" else ""
        cells = "".join(f"<td>{cell}</td>" for cell in cells)
        yield f'<tr{last}><th scope="row">{text(name)}</th>{cells}</tr>'
    yield "</tbody></table></div>"


def about(results):
    """What was run, in a line, and all settings behind a fold."""
    settings, versions = results.get("settings") or {}, results.get("versions") or {}
    said = [f"{key} {settings[key]}" for key in ("model", "data", "votes") if settings.get(key)]
    if isinstance(results.get("seconds"), int | float):
        said.append(f"{results['seconds']:,.1f} s")
    said += [str(versions[key]) for key in ("device", "started") if versions.get(key)]
    yield f"<p>{' · '.join(map(text, said))}</p>"
    if listed := {**settings, **versions}:
        said = ((key, json.dumps(value, ensure_ascii=False)) for key, value in listed.items())
        lines = (f"<dt>{text(k)}</dt><dd><code>{text(value)}</code></dd>" for k, value in said)
        yield f"<details><summary>Settings</summary><dl>{''.join(lines)}</dl></details>"


def figure(path):
    """The plot beside the results, inside the page."""
    if path.exists():
        data = base64.b64encode(path.read_bytes()).decode()
        yield "<details><summary>Plot</summary>"
        yield f'<img alt="Plot of the results" src="data:image/png;base64,{data}"></details>'
