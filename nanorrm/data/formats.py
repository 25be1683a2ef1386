"""Rows of data files (jsonl, json, parquet) and what their columns mean.

Public sets name the same things differently. `LAYOUTS` lists the known ones; for a file that is
none of them, the error proposes a mapping by looking at its names and contents.
"""

import json
import re
from difflib import get_close_matches
from itertools import islice, permutations, zip_longest
from pathlib import Path

from nanorrm.config import UserError

# Column names of comparisons; chosen / rejected stand for a / b where the better one comes first.
# All may be text or messages; responses that are messages begin with the prompt.
LAYOUTS = [
    {"query": "query", "a": "a", "b": "b", "label": "label"},  # nanorrm's own
    {"query": "input", "a": "output_1", "b": "output_2", "label": "label"},  # LLMBar
    {"query": "question", "a": "response_A", "b": "response_B", "label": "label"},  # JudgeBench
    {"query": "prompt", "chosen": "chosen", "rejected": "rejected"},  # RewardBench, UltraFeedback
    {"chosen": "chosen", "rejected": "rejected"},  # Skywork-Reward-Preference
]
PANDALM = {"instruction", "input", "response1", "response2", "annotator1"}
ROLES = ("query", "a", "b", "label", "chosen", "rejected", "responses", "truth", "id", "source")
IDS = ("id", "question_id", "prompt_id", "pair_id")
LABELS = {"1": 1, "1.0": 1, "A": 1, "A>B": 1, "2": 2, "2.0": 2, "B": 2, "B>A": 2}
LABELS |= {"A=B": None, "tie": None}

HEAD = 50  # rows from which the columns of an unknown file are guessed
# what a mapping is guessed from: the words in the names of a role's columns, the likelier first
WORDS = {
    "query": ("query", "prompt", "question", "instruction", "problem", "input", "task", "user"),
    "chosen": ("chosen", "preferred", "better", "good", "positive", "pos", "winner", "win"),
    "rejected": ("rejected", "dispreferred", "worse", "bad", "negative", "neg", "loser", "lose"),
    "a": ("a", "1", "0", "first", "left", "one"),
    "b": ("b", "2", "1", "second", "right", "two"),
    "label": ("label", "winner", "preference", "preferred", "better", "choice", "gold", "verdict"),
    "source": ("source", "subset", "category", "domain", "section"),
}


# -- files -> rows


def read_rows(path):
    """Yield (where, number, record) of each row of a jsonl, json (a list) or parquet file.

    where names the file and the row for error messages; number counts lines or rows from 1, blank
    lines counted but not yielded. A `*` in the file's name takes all that fit, by name, as parts of
    one (number is then file:number). Raises UserError at a row that can't be read or is no object.
    """
    path = Path(path)
    if "*" in path.name:
        if not (files := sorted(path.parent.glob(path.name))):
            raise UserError(f"{path}: no file fits")
        for file in files:
            yield from ((where, f"{file.stem}:{n}", row) for where, n, row in read_rows(file))
        return
    read = parquet_rows if path.suffix == ".parquet" else json_rows
    try:
        for where, number, record in read(path):
            if not isinstance(record, dict):
                raise UserError(f"{where}: should be an object, not {type(record).__name__}")
            yield where, number, record
    except OSError as error:
        raise UserError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from None


def json_rows(path):
    """The rows of a list in a .json file, else of a file with one on each line."""
    if path.suffix == ".json" and (text := path.read_text("utf-8-sig")).lstrip()[:1] == "[":
        for n, record in enumerate(parse(text, path), 1):
            yield f"{path}, row {n}", n, record
        return
    # newline="\n": U+2028 and a lone \r inside a text are no line ends
    with open(path, encoding="utf-8-sig", newline="\n") as lines:
        for n, line in enumerate(lines, 1):
            if line.strip():
                where = f"{path}, line {n}"
                yield where, n, parse(line, where)


def parse(text, where):
    """json.loads, or a UserError that says where."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None


def parquet_rows(path):
    """The rows of a parquet file."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow (pip install pyarrow)") from None
    try:
        with parquet.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=256)
            records = (record for batch in batches for record in batch.to_pylist())
            for n, record in enumerate(records, 1):
                yield f"{path}, row {n}", n, record
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not readable as parquet ({error})") from None


# -- cells -> text, messages


def as_text(value, where):
    """A cell given as text or number -> text."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{where} should be text")
    try:
        str(value).encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} holds half a character (a lone surrogate)") from None
    return str(value)


def as_messages(value, where):
    """A list of messages with nothing in them but role and content."""
    for message in value or [None]:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise UserError(f"{where}: messages should be objects with a text 'content'")
    return [
        {"role": str(m.get("role", "user")), "content": as_text(m["content"], where)} for m in value
    ]


def as_query(value, where):
    """A query given as text or messages; one user message (and an empty system) is its text."""
    if not isinstance(value, list):
        return as_text(value, where)
    messages = as_messages(value, where)
    told = [m for m in messages if m["role"] != "system" or m["content"].strip()]
    return told[0]["content"] if len(told) == 1 and told[0]["role"] == "user" else messages


def as_response(value, where):
    """A response given as text or as a conversation it ends -> (messages before it, its text)."""
    if not isinstance(value, list):
        return [], as_text(value, where)
    *before, last = as_messages(value, where)
    if last["role"] != "assistant":
        raise UserError(f"{where}: messages should end with the assistant's, not {last['role']!r}")
    return before, last["content"]


def as_label(value, where):
    """1 | 2 | None of a cell: see LABELS; an empty cell is None."""
    if value is not None and str(value) not in LABELS:
        raise UserError(f"{where} is {value!r}, should be 1 or 2")
    return None if value is None else LABELS[str(value)]


def id_of(record, number):
    """A row's own id, else its number."""
    return next((str(record[name]) for name in IDS if record.get(name) not in (None, "")), number)


def pandalm(record):
    """A row of PandaLM under nanorrm's own names; the label is the majority of the annotators.

    Answers that were `True` or `False` have become JSON booleans in the public file: text again.
    Instruction and input are joined by a blank line. No majority, or one for a tie, is no label.
    """
    votes = [record[name] for name in sorted(record) if re.fullmatch(r"annotator\d+", name)]
    often = max(votes, key=votes.count)
    given = str(record["instruction"]), str(record["input"])
    return {
        "query": "\n\n".join(filter(str.strip, given)),
        "a": str(record["response1"]),
        "b": str(record["response2"]),
        "label": LABELS.get(str(often)) if votes.count(often) * 2 > len(votes) else None,
        "id": record.get("idx"),
        "source": record.get("cmp_key"),
        "meta": {"annotators": votes},
    }


# -- which column is what


def parse_columns(columns, roles=ROLES):
    """`--columns` -> {role: column}; nothing given is {}, a dictionary is checked and returned.

    Raises UserError for a part that is no assignment or is to none of the roles.

    >>> parse_columns("query=prompt, a=left,b=right")
    {'query': 'prompt', 'a': 'left', 'b': 'right'}
    """
    named = columns or {}
    if isinstance(named, str):
        parts = [part.partition("=") for part in named.split(",") if part.strip()]
        named = {role.strip(): name.strip() for role, _, name in parts}
    for role, name in named.items():
        if not name:
            raise UserError(f"columns {columns!r}: write wanted=given,wanted=given")
        if role not in roles:
            raise UserError(f"columns {columns!r}: {role!r} is none of {', '.join(roles)}")
    return named


def layout_of(record, columns, where, path):
    """The mapping {role: column} of a comparison that fits a record of a file.

    columns: a mapping given by the user, which is then the only one that counts, or {}. Raises
    UserError if none fits: what the record has, what is known, what to try.
    """
    for layout in [columns] if columns else LAYOUTS:
        needed = [name for role, name in layout.items() if columns or role != "label"]
        whole = {"query", "a", "b"} <= layout.keys() or {"chosen", "rejected"} <= layout.keys()
        if whole and all(name in record for name in needed):
            return layout
    for role, name in columns.items():
        if name not in record:
            near = get_close_matches(name, record, 1)
            hint = f"; did you mean {near[0]}?" if near else f" (it has {', '.join(record)})"
            raise UserError(f"{where}: no column {name!r} for {role}{hint}")
    known = " or ".join("/".join(names.values()) for names in LAYOUTS) + " or PandaLM's"
    hint = propose([row for *_, row in islice(read_rows(path), HEAD)])
    hint = hint or "query=...,a=...,b=...,label=... or query=...,chosen=...,rejected=..."
    raise UserError(
        f"{where}: columns {', '.join(record)} are not known (known: {known}); try --columns {hint}"
    )


def propose(head, wanted=()):
    """A mapping to try for records in unknown columns, as --columns takes it; "" for no idea.

    wanted: the names to find columns for; none given: the roles of a comparison. Two text columns
    that differ in one word (a/b, 1/2, better/worse) are the responses, failing that the two
    longest; a column with nothing in it but labels is the label; others go by words and likeness.

    >>> propose([{"instruction": "2+2", "model_1": "4", "model_2": "5", "winner": 1}])
    'query=instruction,a=model_1,b=model_2,label=winner'
    >>> propose([{"good": "4", "bad": "5", "question": "2+2"}], ["prompt", "output_1", "output_2"])
    'prompt=question,output_1=good,output_2=bad'
    """
    names = dict.fromkeys(name for record in head for name in record)
    cells = {name: [r[name] for r in head if r.get(name) is not None] for name in names}
    labels = [n for n in names if cells[n] and all(str(v) in LABELS for v in cells[n])]
    plain = str | int | float | list
    texts = [n for n in names if cells[n] and all(isinstance(v, plain) for v in cells[n])]
    pair = response_columns(texts)
    if not pair and len(texts) > 2:
        rest = [n for n in texts if n not in labels and n not in named("query", texts)[:1]]
        longest = sorted(rest, key=lambda n: -len("".join(map(str, cells[n]))) / len(cells[n]))[:2]
        pair = dict(zip("ab", sorted(longest, key=texts.index)))
    guessing = wanted or ("query", *pair, *(["label"] if labels and "a" in pair else []))
    found = dict(zip(response_columns(guessing).values(), pair.values()))
    for name in guessing:
        role = next((role for role in WORDS if named(role, [name])), None)
        free = [n for n in texts if n not in found.values()]
        if role in ("query", "label"):
            free = [n for n in free if (n in labels) == (role == "label")]
        alike = named(role, free) + get_close_matches(name, free, 1, 0.5) + free
        found.setdefault(name, next(iter(alike), "..."))
    if not wanted and ("..." in found.values() or len(pair) < 2):
        return ""
    return ",".join(f"{name}={found[name]}" for name in guessing)


def words(name):
    """The words of a column's name, in lower case.

    >>> words("responseA"), words("model_output1"), words("text-B")
    (['response', 'a'], ['model', 'output', '1'], ['text', 'b'])
    """
    return [w.lower() for w in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]


def named(role, names):
    """Those of the names that have a word of a role in them, the likeliest first."""
    return [name for word in WORDS.get(role, ()) for name in names if word in words(name)]


def response_columns(names):
    """Two names that one word tells apart, the better or the first named first, or {}.

    >>> response_columns(["text_1", "text_2", "id"]), response_columns(["bad_one", "good_one"])
    ({'a': 'text_1', 'b': 'text_2'}, {'chosen': 'good_one', 'rejected': 'bad_one'})
    """
    for roles in (("chosen", "rejected"), ("a", "b")):
        for both in permutations(names, 2):
            apart = [(x, y) for x, y in zip_longest(*map(words, both)) if x != y]
            if len(apart) == 1 and all(w in WORDS[role] for w, role in zip(apart[0], roles)):
                return dict(zip(roles, both))
    return {}
