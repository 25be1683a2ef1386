"""Packing: every target exactly once, at the row before it, within the budget."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanorrm.train.packing import Sample, deal, join, pack

lengths = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20)), min_size=1, max_size=25)


def make(lengths):
    """Samples whose every token is another number, so that each can be found again."""
    count, samples = 0, []
    for context, target in lengths:
        ids = list(range(count, count + context + target))
        count += len(ids)
        values = {"v": [float(i) for i in ids[context:]], "w": [float(-i) for i in ids[context:]]}
        samples.append(Sample(ids[:context], ids[context:], values))
    return samples


@settings(max_examples=150, deadline=None)
@given(lengths, st.integers(1, 200))
def test_every_target_once_within_the_budget(lengths, budget):
    samples = make(lengths)
    batches = [join(group) for group in pack(samples, budget)]
    seen = []
    for batch in batches:
        assert len(batch.ids) <= budget or len(batch.cu_seqlens) == 2  # one long sample alone
        assert batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == len(batch.ids)
        assert (batch.cu_seqlens.diff() >= 1).all()
        assert (batch.ids[batch.rows] == batch.targets - 1).all()  # the token before the target
        assert (batch.values["v"] == batch.targets).all()
        assert (batch.values["w"] == -batch.targets).all()
        for low, high in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:]):
            assert (batch.ids[low:high].diff() == 1).all()  # a sequence lies together
        seen += batch.targets.tolist()
    wanted = [token for sample in samples for token in sample.target]
    assert sorted(seen) == wanted


def test_join_by_hand():
    samples = [Sample([1, 2], [3, 4], {"x": [0.5, 0.25]}), Sample([5], [6], {"x": [2.0]})]
    batch = join(samples, "cpu")
    assert batch.ids.tolist() == [1, 2, 3, 5] and batch.cu_seqlens.tolist() == [0, 3, 4]
    assert batch.rows.tolist() == [1, 2, 3] and batch.targets.tolist() == [3, 4, 6]
    assert batch.values["x"].tolist() == [0.5, 0.25, 2.0]
    assert batch.values["x"].dtype == torch.float32


@settings(max_examples=150, deadline=None)
@given(lengths, st.integers(1, 200), st.integers(1, 5))
def test_every_rank_gets_as_many_batches_and_every_sample_is_dealt_once(lengths, budget, ranks):
    samples = make(lengths)
    shares = deal(samples, budget, ranks)
    assert len(shares) == ranks and len({len(share) for share in shares}) == 1
    groups = [group for share in shares for group in share]
    assert all(groups)
    assert all(sum(map(len, g)) <= budget or len(g) == 1 for g in groups)
    values = [v for group in groups for sample in group for v in sample.values["v"] if v]
    assert sorted(values) == [v for sample in samples for v in sample.values["v"] if v]


@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_number_of_batches_follows_the_budget(budget):
    n = len(pack(make([(10, 11)] * 8), budget))
    assert n == {1: 8, 40: 4, 10_000: 1}[budget]
