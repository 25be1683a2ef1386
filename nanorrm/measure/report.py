"""The page one reads comparisons in: results.json and records.jsonl of a folder -> report.html.

One file that opens from a disk without a network: the numbers as static HTML, the records as JSON,
and a hand-written reader (assets/report/) that draws one comparison or bracket at a time. Text of
models is text: escaped here, entered as text nodes there, and a content security policy that allows
the reader's own script by its hash and nothing else stands behind both.
"""

import base64
import hashlib
import html
import json
import re
from importlib import resources
from pathlib import Path

from nanorrm.config import UserError
from nanorrm.files import read_json, write_text
from nanorrm.measure.patterns import by, patterns

OUTCOMES = ("right", "wrong", "tied", "invalid")  # of the pairs that were judged
MAX_BYTES = 48 * 2**20  # of records in the page: what a browser opens and searches without a wait


def write_report(folder, max_bytes=MAX_BYTES):
    """Write report.html beside a folder's results.json and records.jsonl; returns its path.

    Records that would take the page beyond max_bytes are left out, the last first, and the page
    says how many. Raises UserError for a file that is missing or broken, naming the line.
    """
    folder = Path(folder)
    results = read_json(folder / "results.json")
    records = read_records(folder / "records.jsonl")
    shown, size = [], 0
    for record in records:
        line = as_script(record)
        size += len(line.encode()) + 2
        if size > max_bytes:
            break
        shown.append(line)
    title = f"{results.get('command') or folder.name} — nanorrm"
    summary = [*about(results), *table(results), *thinking(records), *figure(folder / "plot.png")]
    if len(shown) < len(records):
        left, limit = len(records) - len(shown), f"{max_bytes / 2**20:.3g} MiB"
        summary.insert(
            0,
            f'<p class="note">The first {len(shown):,} of {len(records):,} records are shown; '
            f"{left:,} are left out, because this page holds at most {limit} of them. All are in "
            "records.jsonl, and the numbers here are over all.</p>",
        )
    values = {
        "title": text(title),
        "summary": "\n".join(summary),
        "style": asset("style.css"),
        "script": asset("tournament.js") + asset("script.js"),
        "records": f"[{','.join(shown)}]",
    }
    digest = base64.b64encode(hashlib.sha256(values["script"].encode()).digest()).decode()
    values["policy"] = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    page = re.sub(r"\{\{(\w+)\}\}", lambda place: values[place[1]], asset("page.html"))
    path = folder / "report.html"
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
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable ({error})") from None
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, parse_constant=lambda name: None)  # a browser reads no NaN
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(record, dict) or record.get("kind") not in ("pair", "ranking"):
            raise UserError(f"{path}, line {number}: neither a pair nor a ranking")
        records.append(record)
    return records


def as_script(value):
    r"""JSON that can stand inside a script element and in a UTF-8 file, whatever is in its texts.

    >>> as_script("</script>\u2028\ud800")
    '"\\u003c/script\\u003e\\u2028\\ud800"'
    """
    said = json.dumps(value, ensure_ascii=False)
    return re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda m: rf"\u{ord(m[0]):04x}", said)


def text(value):
    """Any value as HTML text; half a character becomes the replacement character."""
    return html.escape(str(value).encode("utf-8", "replace").decode())


def number(value, share=False):
    """A metric in a cell of the table; share: shown in percent.

    >>> number(0.8231, share=True), number(0.5), number(2985)
    ('82.3%', '0.50', '2,985')
    """
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return text(value)
    if isinstance(value, int):
        return f"{value:,}"
    if share:
        return f"{value:.1%}"
    return f"{value:.2f}" if abs(value) < 100 else f"{value:,.0f}"


def column(key, rows):
    """The cells of one metric over the rows, with intervals where there are any."""
    values = [row.get(key) for row in rows]
    known = [value for value in values if value is not None]
    share = not re.search("token|second", key) and all(
        isinstance(value, float) and 0 <= value <= 1 for value in known
    )
    for row, value in zip(rows, values):
        shown, interval = number(value, share), row.get(f"{key}_interval")
        if value is not None and isinstance(interval, list) and len(interval) == 2:
            low, high = (number(end, share).removesuffix("%") for end in interval)
            shown += f" <small>{low} to {high}</small>"
        yield shown


def table(results):
    """The tables of results.json, whatever its rows and metrics are.

    The row over all stands below the others if it has a metric of theirs, else apart.
    """
    rows, every = results.get("rows") or {}, results.get("all")
    rows = {name: row for name, row in rows.items() if isinstance(row, dict)}
    apart = {}
    if isinstance(every, dict):
        (rows if set(metrics_of(rows)) & set(metrics_of({"all": every})) else apart)["all"] = every
    for part in filter(None, (rows, apart)):
        keys = metrics_of(part)
        cells = zip(*(column(key, list(part.values())) for key in keys))
        yield from grid(keys, dict(zip(part, cells)))


def metrics_of(rows):
    """The names of what can stand in a cell, those with an interval first."""
    keys = dict.fromkeys(key for row in rows.values() for key in row)
    said = [k for k in keys if any(isinstance(r.get(k), int | float | str) for r in rows.values())]
    return sorted(said, key=lambda key: f"{key}_interval" not in keys)


def thinking(records):
    """The table of reasoning patterns, by outcome where there are several."""
    groups = by(records, "outcome")
    if not groups:
        return
    rows = {outcome: groups[outcome] for outcome in OUTCOMES if outcome in groups}
    said = [v.get("thought") or "" for r in records for v in r.get("votes") or ()]
    rows = {**rows, "all": {"thoughts": len(said), **patterns(said)}}
    if not any(rows["all"][group] for group in rows["all"] if group != "thoughts"):
        return  # no words at all, as with the toy judge
    yield "<h3>Share of thoughts with words of</h3>"
    cells = zip(*(column(key, list(rows.values())) for key in rows["all"]))
    yield from grid(list(rows["all"]), dict(zip(rows, cells)))


def grid(keys, rows):
    """Rows {name: cells, escaped already} under headings as a table that scrolls if wide."""
    if not rows:
        return
    heads = "".join(f'<th scope="col">{text(key.replace("_", " "))}</th>' for key in keys)
    yield '<div class="scroll" tabindex="0" role="group" aria-label="Table"><table>'
    yield f"<thead><tr><td></td>{heads}</tr></thead><tbody>"
    for name, cells in rows.items():
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
    listed = {**settings, **versions}
    if listed:
        said = {key: json.dumps(value, ensure_ascii=False) for key, value in listed.items()}
        lines = "".join(
            f"<dt>{text(key)}</dt><dd><code>{text(value)}</code></dd>"
            for key, value in said.items()
        )
        yield f"<details><summary>Settings</summary><dl>{lines}</dl></details>"


def figure(path):
    """The plot beside the results, inside the page."""
    if path.exists():
        data = base64.b64encode(path.read_bytes()).decode()
        yield "<details><summary>Plot</summary>"
        yield f'<img alt="Plot of the results" src="data:image/png;base64,{data}"></details>'
