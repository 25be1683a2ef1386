"""Files of comparisons, rankings and queries -> the records Pair, Ranking and Query."""

import sys
from dataclasses import replace
from itertools import count

from nanorrm.config import UserError
from nanorrm.data import formats
from nanorrm.data.formats import as_label, as_query, as_response, as_text, parse_columns
from nanorrm.records import Pair, Query, Ranking, shuffled

LARGEST = sys.float_info.max  # what is above it, infinite or no number at all is no truth
QUERIES = ("query", "prompt", "question", "instruction", "messages")  # columns, the first there is


def read_all(path, what, make, *more):
    """[make(row, where, number, *more), ...] of a file's rows; UserError if it has none."""
    made = [make(row, where, str(n), *more) for where, n, row in formats.read_rows(path)]
    if not made:
        raise UserError(f"{path}: no {what} in it")
    return made


def read_pairs(path, columns=None):
    """Read a file of comparisons (jsonl, json, parquet) -> list of Pair.

    columns: "query=...,a=...,b=...,label=..." (or chosen=, rejected=) for a file whose columns are
    not known (see formats.LAYOUTS). Where the responses are conversations, the messages before the
    last are the query, whatever a prompt column says. Of chosen and rejected, a coin by content
    decides who comes first. Raises UserError naming the file and line that can't be used.
    """
    return read_all(path, "comparisons", pair_from, parse_columns(columns), path)


def pair_from(record, where, number, columns, path):
    """One row -> Pair. Raises UserError that names what is wrong."""
    if not columns and record.keys() >= formats.PANDALM:
        record = formats.pandalm(record)
    layout = formats.layout_of(record, columns, where, path)
    first, second = ("chosen", "rejected") if "chosen" in layout else ("a", "b")
    names = layout[first], layout[second]
    (before, a), (other, b) = (as_response(record[n], f"{where}: {n}") for n in names)
    if before != other:
        raise UserError(f"{where}: {names[0]} and {names[1]} begin with different prompts")
    if not before and "query" not in layout:
        raise UserError(f"{where}: no prompt: no column for it, none in {names[0]}'s messages")
    column = "" if before else layout["query"]
    query = as_query(before or record[column], f"{where}: {column or names[0]}")
    pair = Pair(query, a, b, **about(record, layout, number))
    if first == "chosen":
        return shuffled(replace(pair, label=1))
    label = layout.get("label", "label")
    return replace(pair, label=as_label(record.get(label), f"{where}: {label}"))


def read_rankings(path, columns=None):
    """Read a file of queries with several responses each -> list of Ranking.

    Columns are query, responses (a list of texts) and, if known, truth (a number or bool for each);
    or those of PPE's best-of-K: prompt, response_1 to response_K, scores. columns and errors: as
    read_pairs, with responses= and truth=.
    """
    return read_all(path, "rankings", ranking_from, parse_columns(columns))


def ranking_from(record, where, number, columns):
    """One row -> Ranking. Raises UserError that names what is wrong."""
    layout = columns or {"query": "query", "responses": "responses"}
    if not columns and {"prompt", "response_1"} <= record.keys():  # PPE
        n = next(k for k in count(1) if f"response_{k}" not in record)
        meta = {k: record[k] for k in ("sampled_conflict_pairs",) if k in record}
        texts = [record[f"response_{k}"] for k in range(1, n)]
        record = {**record, "responses": texts, "meta": meta}
        layout = {"query": "prompt", "responses": "responses", "truth": "scores"}
    if not {layout.get("query"), layout.get("responses")} <= record.keys():
        raise UserError(
            f"{where}: columns {', '.join(record)} are not known (known: query/responses/truth "
            "or PPE's); try --columns query=...,responses=...,truth=..."
        )
    responses = record[layout["responses"]]
    if not isinstance(responses, list) or not responses:
        raise UserError(f"{where}: {layout['responses']} should be a list of texts")
    texts = [as_text(text, f"{where}: response {i}") for i, text in enumerate(responses, 1)]
    name = layout.get("truth", "truth")
    truth = record.get(name)
    if truth is not None and (not isinstance(truth, list) or len(truth) != len(texts)):
        raise UserError(f"{where}: {name} should be a list of {len(texts)}, one per response")
    if not all(isinstance(x, bool | int | float) and abs(x) <= LARGEST for x in truth or ()):
        raise UserError(f"{where}: {name} should hold numbers or true and false")
    query = as_query(record[layout["query"]], f"{where}: {layout['query']}")
    return Ranking(query, texts, truth, **about(record, layout, number))


def read_queries(path):
    """Read a file with one query (text or messages, see QUERIES) a row -> list of Query.

    Other columns, responses and labels too, are ignored. Raises UserError as read_pairs.
    """
    return read_all(path, "queries", query_from)


def query_from(record, where, _):
    """One row -> Query."""
    for column in filter(record.__contains__, QUERIES):
        return Query(as_query(record[column], f"{where}: {column}"))
    found = ", ".join(record) or "none"
    raise UserError(f"{where}: columns {found}; one of {', '.join(QUERIES)} is wanted")


def about(record, layout, number):
    """id, source and meta of a row."""
    own = record[layout["id"]] if "id" in layout else formats.id_of(record, number)
    source = record.get(layout.get("source", "source")) or record.get("subset") or ""
    meta = record["meta"] if isinstance(record.get("meta"), dict) else {}
    return {"id": str(own), "source": str(source), "meta": meta}
