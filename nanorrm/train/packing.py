"""Samples (a context without loss, a target with it) -> packed batches for the training forward.

Sequences lie one behind another, no padding; only the positions that predict a target token go
through the output layer. Samples are sorted by length, so that a batch is of even lengths, which
the CPU's attention, padded inside, is glad of.
"""

from copy import deepcopy
from dataclasses import dataclass

import torch


@dataclass
class Sample:
    """One sequence; `values` hold a number per target token for each name, as lists or tensors."""

    context: list[int]
    target: list[int]
    values: dict

    def __len__(self):
        return len(self.context) + len(self.target) - 1  # the last token predicts nothing

    def samples(self):
        """The samples it consists of: itself."""
        return [self]


@dataclass
class Preference:
    """Two samples of one context that a loss compares: packed like one, they stay side by side."""

    chosen: Sample
    rejected: Sample

    def __len__(self):
        return len(self.chosen) + len(self.rejected)

    def samples(self):
        """Both samples."""
        return [self.chosen, self.rejected]


@dataclass
class Batch:
    """T input tokens of B sequences, N target tokens."""

    ids: torch.Tensor  # [T]
    cu_seqlens: torch.Tensor  # [B+1]
    rows: torch.Tensor  # [N] positions in ids whose next token is a target
    targets: torch.Tensor  # [N]
    values: dict[str, torch.Tensor]  # each [N], fp32

    def sequences(self):
        """Which of the B sequences each target belongs to, [N]."""
        return torch.searchsorted(self.cu_seqlens, self.rows, right=True) - 1


def pack(samples, max_tokens):
    """Samples -> lists of samples of like lengths, each of at most max_tokens (or one sample)."""
    groups, size = [], 0
    for sample in sorted(samples, key=len):
        if not groups or size + len(sample) > max_tokens:
            groups.append([])
            size = 0
        groups[-1].append(sample)
        size += len(sample)
    return groups


def deal(samples, max_tokens, ranks=1):
    """Samples -> for each rank as many lists of samples, of at most max_tokens each.

    A rank without work of its own gets a sample whose values are all zero: no part of any sum.
    """
    total = sum(map(len, samples))
    groups = pack(samples, min(max_tokens, -(-total // ranks)) if ranks > 1 else max_tokens)
    while len(groups) % ranks:
        largest = max(groups, key=lambda group: (len(group) > 1, sum(map(len, group))))
        half = len(largest) // 2
        if half:
            groups.insert(groups.index(largest) + 1, largest[half:])
            del largest[half:]
        else:
            idle = deepcopy(min(samples, key=len))
            for sample in idle.samples():
                sample.values = {name: [0.0] * len(sample.target) for name in sample.values}
            groups.append([idle])
    return [groups[rank::ranks] for rank in range(ranks)]


def join(items, device="cpu"):
    """One batch of all the given samples (or preferences)."""
    samples = [sample for item in items for sample in item.samples()]
    ids, rows, targets, bounds = [], [], [], [0]
    values = {name: [] for name in samples[0].values}
    for sample in samples:
        first = len(ids) + len(sample.context) - 1
        rows.extend(range(first, first + len(sample.target)))
        ids += sample.context + sample.target[:-1]
        targets += sample.target
        bounds.append(len(ids))
        for name, numbers in sample.values.items():
            values[name].append(torch.as_tensor(numbers, dtype=torch.float32))
    places = (torch.tensor(x, dtype=torch.long) for x in (ids, bounds, rows, targets))
    values = {name: torch.cat(parts).to(device) for name, parts in values.items()}
    return Batch(*(x.to(device) for x in places), values)
