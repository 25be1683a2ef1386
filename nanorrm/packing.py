"""Samples (a context without loss, a target with it) -> packed batches for the training forward.

Sequences lie one behind another, no padding; only the positions that predict a target token go
through the output layer. Samples are sorted by length, so that a batch is of even lengths.
"""

from dataclasses import dataclass

import torch


@dataclass
class Sample:
    """One sequence; `values` hold one number per target token for each name."""

    context: list[int]
    target: list[int]
    values: dict[str, list[float]]

    def __len__(self):
        return len(self.context) + len(self.target) - 1  # the last token predicts nothing


@dataclass
class Batch:
    """T input tokens of B sequences, N target tokens."""

    ids: torch.Tensor  # [T]
    cu_seqlens: torch.Tensor  # [B+1]
    rows: torch.Tensor  # [N] positions in ids whose next token is a target
    targets: torch.Tensor  # [N]
    values: dict[str, torch.Tensor]  # each [N], fp32


def pack(samples, max_tokens, device="cpu"):
    """Samples -> list of Batch, each of at most max_tokens (a longer sample is a batch alone)."""
    groups, width = [], 0
    for sample in sorted(samples, key=len):
        width = len(sample)  # the longest so far: what a padded batch would need
        if not groups or (len(groups[-1]) + 1) * width > max_tokens:
            groups.append([])
        groups[-1].append(sample)
    return [join(group, device) for group in groups]


def join(samples, device):
    """One batch of all the given samples."""
    ids, rows, targets, bounds = [], [], [], [0]
    values = {name: [] for name in samples[0].values}
    for sample in samples:
        first = len(ids) + len(sample.context) - 1
        rows.extend(range(first, first + len(sample.target)))
        ids += sample.context + sample.target[:-1]
        targets += sample.target
        bounds.append(len(ids))
        for name, numbers in sample.values.items():
            values[name] += numbers

    def tensor(numbers, dtype=torch.long):
        return torch.tensor(numbers, dtype=dtype, device=device)

    return Batch(
        ids=tensor(ids),
        cu_seqlens=tensor(bounds),
        rows=tensor(rows),
        targets=tensor(targets),
        values={name: tensor(numbers, torch.float32) for name, numbers in values.items()},
    )
