"""What the benchmarks share: model shapes, clocks, peak memory, and how results are written."""

import gc
import json
import os
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch

from nanorrm.config import UserError
from nanorrm.model.architectures import ModelConfig
from nanorrm.model.transformer import Transformer

# Shapes by name: hidden, intermediate, layers, query heads, key heads, head size, vocabulary, tied.
SHAPES = {
    "toy": (64, 160, 3, 2, 2, 32, 261, True),
    "10M": (384, 1024, 6, 6, 2, 64, 261, True),
    "0.5B": (896, 4864, 24, 14, 2, 64, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 128, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 128, 152064, False),
}


def shape(name, context=8192):
    """The ModelConfig of a named shape. Raises UserError for another name."""
    if name not in SHAPES:
        raise UserError(f"{name!r} is not one of the shapes {', '.join(SHAPES)}")
    hidden, inter, layers, heads, kv, dim, vocab, tied = SHAPES[name]
    return ModelConfig(
        vocab, hidden, inter, layers, heads, kv, dim, context, tie_word_embeddings=tied
    )  # fmt: skip


def build(name, device):
    """A random-weight model of a named shape; its entropy is not trivial, nothing ever stops it."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = Transformer(shape(name)).init_weights(0)
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model.to(device)


def wait(device):
    """Until the device is done with what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


class Clock:
    """Seconds by name. Where parts are nested, a second counts for the innermost only."""

    def __init__(self, device):
        self.device, self.seconds = device, Counter()
        self.open, self.since = [], 0.0

    def _settle(self):
        wait(self.device)
        now = time.perf_counter()
        if self.open:
            self.seconds[self.open[-1]] += now - self.since
        self.since = now

    def begin(self, name):
        """From here on time counts for `name`, until its `end`."""
        self._settle()
        self.open.append(name)

    def end(self):
        """Time counts for the part around this one again."""
        self._settle()
        self.open.pop()

    @contextmanager
    def part(self, name):
        """`begin` and `end` around a block."""
        self.begin(name)
        try:
            yield
        finally:
            self.end()

    def watch(self, owner, method, name):
        """Calls of owner.method count for `name` from now on."""
        inner = getattr(owner, method)

        def timed(*args, **kwargs):
            with self.part(name):
                return inner(*args, **kwargs)

        setattr(owner, method, timed)

    def read(self):
        """{name: seconds} since the last reading."""
        seconds, self.seconds = dict(self.seconds), Counter()
        return seconds


class PeakMemory:
    """The most bytes in use since it was made: of the GPU's memory, or above what the process held.

    `read` gives None where the system does not tell (a CPU without Linux's /proc).
    """

    def __init__(self, device):
        self.device, self.before = device, 0
        gc.collect()  # what an earlier model left in cycles
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
            self.before = self._resident("VmRSS")
        except OSError:
            self.before = None

    def read(self):
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        return None if self.before is None else self._resident("VmHWM") - self.before

    def _resident(self, field):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
        raise OSError(f"no {field} in /proc/self/status")


def numbers(text):
    """ "16,32" -> [16, 32]."""
    try:
        return [int(word) for word in text.split(",") if word]
    except ValueError:
        raise UserError(f"{text!r} should be whole numbers separated by commas") from None


def write_json(path, value):
    """Beside, then renamed: a reader never finds half a file."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.tmp")
    try:
        beside.write_text(json.dumps(value, indent=2) + "\n")
        os.replace(beside, path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror.lower()}") from None
