"""Text as it comes: what one of the running sequences has gained, printed step by step."""

import re
import sys
from contextlib import contextmanager

from nanorrm.engine.engine import Engine


def printable(text):
    r"""Text that can't steer a terminal: control and half characters are replaced.

    >>> printable("a\tb\n\x1b[2J\ud800")
    'a\tb\n�[2J�'
    """
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", str(text))


@contextmanager
def stream(engine, to=None):
    """Meanwhile, print one generation of every batch to a file (stderr) as it is written.

    engine: an Engine or an EngineBackend; of a server's answers nothing can be seen.
    """
    engine = getattr(engine, "engine", engine)
    if not isinstance(engine, Engine):
        yield
        return
    before, engine.on_step = engine.on_step, Watcher(engine, to or sys.stderr)
    try:
        yield
    finally:
        engine.on_step = before


class Watcher:
    """Called after every step, looks at the first sequence of the batch."""

    def __init__(self, engine, to):
        self.engine, self.to = engine, to
        self.follows = None  # (request, sample)
        self.shown = 0  # how many of its tokens are printed
        self.fresh = 0  # requests from this one on have not had their turn

    def __call__(self, finished):
        """finished: what Engine.step returns."""
        rows = self.engine.rows
        running = {(s.request, s.sample): row for row, s in enumerate(rows.sequences)}
        done = {(request, sample): completion for request, sample, completion in finished}
        if self.follows is None:
            new = [place for place in (*running, *done) if place[0] >= self.fresh]
            self.follows, self.shown = min(new, default=None), 0
        if self.follows in done:
            completion = done[self.follows]
            ended = completion.finish_reason == "stop"
            self.print(completion.ids[:-1] if ended else completion.ids, last=True)
            self.follows, self.fresh = None, self.engine.requests
        elif self.follows in running:
            self.print(rows.read(running[self.follows]).ids)

    def print(self, ids, last=False):
        """Print the tokens that are new; a character that is still half is waited for."""
        text = self.engine.tokenizer.decode(ids[self.shown :])
        if last or not text.endswith("\ufffd"):
            self.shown = len(ids)
            self.to.write(printable(text) + "\n" * last)
            self.to.flush()
