"""The journal of a judge: every answer in a jsonl as it comes, so that nothing is asked twice.

One line per generation, under a key made of all that the answer depends on: the model, the prompt,
the sampling settings and which vote it is. A changed prompt is a new question, a renamed file or a
moved server is not. Two writers at once would tear each other's lines: the file is locked.
"""

import errno
import hashlib
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

from nanorrm.config import UserError
from nanorrm.judge.verdict import Answer

FIELDS = ("text", "finish_reason", "tokens", "think_tokens", "prompt_tokens", "seconds")


def digest(text):
    """A name for a text: 32 hexadecimal digits."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def key_of(model, prompt, params, sample):
    """The name of one question: a hash of what its answer depends on.

    model: what answers; prompt: token ids or chat messages; params: SamplingParams (how many votes
    are asked for does not matter); sample: which of them.
    """
    return digest(json.dumps([model, prompt, asdict(replace(params, n=1)), sample]))


def content_of(request):
    """A hash of the texts in the order they are shown, whatever the template and the model."""
    pair = request.pair.flipped() if request.swapped else request.pair
    return digest(repr((pair.query, pair.a, pair.b)))


def record_of(request, answer, key, model):
    """A line of the journal: the answer, under its key, with what it answers."""
    about = {"key": key, "pair": request.pair.id, "content": content_of(request)}
    about |= {"swapped": request.swapped, "sample": request.sample, "model": model}
    about |= {name: getattr(answer, name) for name in FIELDS}
    return {**about, "errors": answer.errors} if answer.errors else about


def answer_of(record):
    """The answer in a line of the journal."""
    return Answer(*(record[name] for name in FIELDS), record.get("errors", {}))


def parse(path):
    """Records of a journal -> ([record, ...], length in bytes of its whole lines).

    The last line may be torn (its writer was killed): it is left out of both. Raises UserError for
    any other line that is not a record, by number.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror.lower()}") from None
    whole = data.rfind(b"\n") + 1
    records = []
    for number, line in enumerate(data[:whole].split(b"\n")[:-1], 1):
        try:
            records.append(json.loads(line))
            if not all(isinstance(records[-1][name], str) for name in ("key", "text")):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            why = "not a line of a journal (is it another file?)"
            raise UserError(f"{path}, line {number}: {why}") from None
    return records, whole


class Journal:
    """An open journal: `answers` by key, `add` for new ones. `close` unlocks it."""

    def __init__(self, path):
        """path: a file that exists already or a new one."""
        self.path = Path(path)
        try:
            self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (open until close)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror.lower()}") from None
        try:
            self._lock()
            records, self.size = parse(path)
            if torn := self.path.stat().st_size - self.size:
                self.file.truncate(self.size)
                print(f"{path}: {torn} bytes of a torn last line dropped", file=sys.stderr)
        except BaseException:
            self.close()
            raise
        self.answers = {record["key"]: record for record in records}

    def _lock(self):
        import fcntl  # not on Windows

        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.path}: another process or judge is writing to it") from None

    def ask(self, backend, requests, params, heard, progress=None):
        """As backend.ask, of which only what is not known is asked, and equal questions once."""
        model = backend.name
        same = {}  # key -> its requests; the first is the one that is sent
        for request in requests:
            key = key_of(model, request.prompt, params, request.sample)
            same.setdefault(key, []).append(request)
        keys = {first: key for key, (first, *_) in same.items() if key not in self.answers}

        def heard_first(request, answer):
            if isinstance(answer, Answer):
                self.add(record_of(request, answer, keys[request], model))
            for waiting in same[keys[request]]:
                heard(waiting, answer)

        for key, waiting in same.items():
            for request in waiting if key in self.answers else ():
                heard(request, answer_of(self.answers[key]))
        try:
            backend.ask(list(keys), params, heard_first, progress)
        except UserError as error:
            saved = f"{len(self.answers)} answers are saved in {self.path}"
            raise UserError(f"{error}; {saved}, the same command goes on from there") from None

    def add(self, record):
        """Write one answer, a dictionary with at least "key" and "text"."""
        line = (json.dumps(record) + "\n").encode()
        try:
            if self.file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self.file.truncate(self.size)  # no torn line stays
            raise UserError(f"{self.path}: {error.strerror.lower()}") from None
        self.size += len(line)
        self.answers[record["key"]] = record

    def close(self):
        """Unlock and close the file."""
        self.file.close()
