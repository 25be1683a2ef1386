"""Files written whole or not at all, and read with errors that say what and where."""

import json
from contextlib import contextmanager
from pathlib import Path

from nanorrm.config import UserError


def read_json(path):
    """Parse a JSON file that holds an object, or say which file is missing or broken."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: should hold a JSON object, not {type(value).__name__}")
    return value


@contextmanager
def replacing(path):
    """A text file to write beside `path`, which takes its place once all is written."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """Write a text file, whole or not at all."""
    with replacing(path) as file:
        file.write(text)


def write_json(path, value):
    """A JSON file as people read it, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_rows(path, rows):
    """Write records as lines of JSON: all of them or, if making them fails, nothing."""
    try:
        with replacing(path) as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except OSError as error:
        raise UserError(f"{path}: could not be written ({error.strerror})") from None


def read_lines(path):
    """The records of a jsonl log; a last line cut short by a crash is left out."""
    records = []
    for line in filter(None, path.read_text(encoding="utf-8").split("\n")):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
