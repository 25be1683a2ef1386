"""What the benches share: model shapes, the opening line, clocks, peak memory, results as JSON."""

import gc
import json
import re
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from kernels.bench.measure import ceilings
from nanorrm.config import UserError
from nanorrm.files import write_text
from nanorrm.model.architectures import ModelConfig
from nanorrm.model.transformer import Transformer

# C, width of the feed-forward layer, layers, Hq, Hkv, D, V, tied, architecture. The first five are
# run, the last of them as Qwen2.5 has them; of the rest, which people train, the memory is counted.
SHAPES = {
    "toy": (64, 160, 3, 2, 2, 32, 261, True, "qwen2"),
    "10M": (384, 1024, 6, 6, 2, 64, 261, True, "qwen2"),
    "0.5B": (896, 4864, 24, 14, 2, 64, 151936, True, "qwen2"),
    "1.5B": (1536, 8960, 28, 12, 2, 128, 151936, True, "qwen2"),
    "7B": (3584, 18944, 28, 28, 4, 128, 152064, False, "qwen2"),
    "R1-Distill-Qwen-1.5B": (1536, 8960, 28, 12, 2, 128, 151936, False, "qwen2"),
    "RRM-7B": (3584, 18944, 28, 28, 4, 128, 152064, False, "qwen2"),
    "Llama-3.1-8B": (4096, 14336, 32, 32, 8, 128, 128256, False, "llama"),
    "Qwen3-8B": (4096, 12288, 36, 32, 8, 128, 151936, False, "qwen3"),
    "R1-Distill-Qwen-14B": (5120, 13824, 48, 40, 8, 128, 152064, False, "qwen2"),
    "RRM-32B": (5120, 27648, 64, 40, 8, 128, 152064, False, "qwen2"),
}
MODELS = tuple(SHAPES)[5:]


def shape(name, context=8192):
    """The ModelConfig of a named shape, context in tokens. Raises UserError for another name."""
    if name not in SHAPES:
        raise UserError(f"{name!r} is not one of the shapes {', '.join(SHAPES)}")
    hidden, inter, layers, heads, kv, dim, vocab, tied, kind = SHAPES[name]
    return ModelConfig(
        vocab, hidden, inter, layers, heads, kv, dim, context,
        tie_word_embeddings=tied, attention_bias=kind == "qwen2", qk_norm=kind == "qwen3",
    )  # fmt: skip


def build(name, device):
    """A random-weight model of a named shape; its entropy is not trivial, nothing ever stops it."""
    model = Transformer(shape(name)).init_weights(0)
    for p in model.parameters():  # not model.to(dtype): the RoPE tables stay fp32
        p.data = p.data.to(torch.float32 if device == "cpu" else torch.bfloat16)
    return model.to(device)


def start(threads):
    """Open a bench: print where it runs and the ceilings, measured now.

    threads: of torch on a CPU, 0 for its own choice. Returns the device, its name, and the ceilings
    {"copy": bytes/s, "matmul": operations/s}.
    """
    if threads:
        torch.set_num_threads(threads)
    device, about, precision = "cpu", f"{torch.get_num_threads()} threads", "fp32"
    if torch.cuda.is_available():
        device, about, precision = "cuda", torch.cuda.get_device_name(), "bf16"
    measured = ceilings(device, 1.0)
    print(
        f"{device}, {about}, torch {torch.__version__}, copy {measured['copy'] / 1e9:.1f} GB/s, "
        f"{precision} product {measured['matmul'] / 1e12:.4g} TFLOP/s"
    )
    return device, about, measured


def tidy(device):
    """Give back the memory of what came before: cycles, and what torch keeps of a GPU."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


class Clock:
    """Seconds by name. Where parts are nested, a second counts for the innermost only."""

    def __init__(self, device):
        self.device, self.seconds = device, Counter()
        self.open, self.since = [], 0.0

    def turn(self, name=None):
        """From here on time counts for `name`; None: again for the part around this one."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.open:
            self.seconds[self.open[-1]] += now - self.since
        self.since = now
        if name:
            self.open.append(name)
        else:
            self.open.pop()

    @contextmanager
    def part(self, name):
        """Time within a block counts for `name`."""
        self.turn(name)
        try:
            yield
        finally:
            self.turn()

    def watch(self, owner, method, name):
        """Calls of owner.method count for `name` from now on."""
        setattr(owner, method, self.part(name)(getattr(owner, method)))

    def read(self):
        """{name: seconds} since the last reading."""
        seconds, self.seconds = dict(self.seconds), Counter()
        return seconds


class PeakMemory:
    """The most bytes in use since it was made: of the GPU's memory, or above what the process held.

    `read` gives None where the system does not tell (a CPU without Linux's /proc).
    """

    def __init__(self, device):
        self.device, self.before = device, None
        tidy(device)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
            self.before = self._resident("VmRSS")

    def read(self):
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        return None if self.before is None else self._resident("VmHWM") - self.before

    def _resident(self, field):
        status = Path("/proc/self/status").read_text()
        return int(re.search(rf"{field}:\s*(\d+) kB", status)[1]) * 1024


def numbers(text):
    """ "16,32" -> [16, 32]."""
    try:
        return [int(word) for word in text.split(",") if word]
    except ValueError:
        raise UserError(f"{text!r} should be whole numbers separated by commas") from None


def write_results(path, value):
    """What was found so far, as a whole file of JSON; path None: nowhere."""
    try:
        if path:
            write_text(Path(path), json.dumps(value, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror.lower()}") from None
