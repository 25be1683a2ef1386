"""The engine's bookkeeping: in plain numbers, and at random under a model that means nothing.

Nothing leaks, nothing is owned twice, all finish.
"""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nanorrm.config import EngineConfig
from nanorrm.data import toy
from nanorrm.engine.cache import blocks_for
from nanorrm.engine.engine import Engine
from nanorrm.engine.sampling import SamplingParams
from nanorrm.engine.scheduler import Scheduler
from nanorrm.engine.sequence import Generated, Sequence

TOKENIZER = toy.make_tokenizer()


# -- plain numbers


class Rows:
    """Sequences that decode, as far as a scheduler knows them: each has its prompt's blocks."""

    def __init__(self, *sequences):
        self.sequences = list(sequences)

    def lacking(self, turns):
        """Each needs one more block."""
        return np.array([1] * len(self.sequences))

    def add_block(self, row, block):
        self.sequences[row].blocks.append(block)

    def pop_newest(self):
        newest = self.sequences.pop()
        newest.generated = Generated([7], [0.0], [0.0], [False])
        return newest


def scheduler(num_blocks=8, **changes):
    return Scheduler(EngineConfig(block_size=4, **changes), num_blocks, Counter())


def samples(request, prompt, n=1):
    return [Sequence(prompt, SamplingParams(n=n), request, j) for j in range(n)]


def computed(one, decoding=0):
    """One step: the groups whose prompts it completes."""
    return [group for group, end in one.schedule(decoding) if one.computed(group, end)]


def test_a_group_shares_full_blocks_and_owns_its_partial_ends():
    one = scheduler()
    one.waiting.extend(samples(0, list(range(6)), n=3))
    [(group, end)] = one.schedule(0)
    assert end == 6 and [s.blocks for s in group] == [[0, 1], [0, 2], [0, 3]]
    assert one.computed(group, end) and not one.unfinished
    assert one.pool.owners[:4] == [3, 1, 1, 1]


def test_a_prompt_wholly_cached_still_has_a_token_to_compute():
    """Zero new tokens would leave no hidden state to draw from; a group asked again is this."""
    one = scheduler()
    for request in range(2):
        one.waiting.extend(samples(request, list(range(8))))
        [(group, end)] = one.schedule(0)
        assert (group[0].computed, end) == (4 * request, 8)
        one.computed(group, end)
        one.pool.release(group[0].blocks)
    assert one.stats["cached_tokens"] == 4


def test_the_preempted_finds_its_own_blocks_and_computes_what_it_had_generated():
    one = scheduler(num_blocks=5)
    one.waiting.extend(samples(0, [1] * 5) + samples(1, [2] * 5))
    old, new = (s for group in computed(one) for s in group)
    rows = Rows(old, new)
    one.make_room(rows, turns=1)  # two blocks are asked for, one is free
    assert rows.sequences == [old] and len(old.blocks) == 3 and one.stats["preemptions"] == 1
    assert list(one.waiting) == [new] and (new.blocks, new.computed) == ([], 0)
    assert one.schedule(1) == []  # two are free, but one of them will soon be asked for
    one.pool.release(old.blocks)
    [(group, end)] = one.schedule(0)
    assert group == [new] and (new.computed, end) == (4, 6)  # one token of each is left


def test_prefill_is_preempted_before_what_decodes_and_in_order():
    one = scheduler(num_blocks=6, max_step_tokens=5)
    one.waiting.extend(samples(0, [1] * 4))
    [[old]] = computed(one)
    one.waiting.extend(samples(1, list(range(9)), n=2))
    assert [end for _, end in one.schedule(1)] == [4]  # the rest in the next step
    rows = Rows(old)
    one.pool.allocate(one.pool.free)
    one.make_room(rows, turns=1)
    assert rows.sequences == [old] and [s.sample for s in one.waiting] == [0, 1]


@pytest.mark.parametrize(("chunked", "ends"), [(True, [6, 4]), (False, [6])])
def test_a_prompt_is_cut_to_the_budget_or_waits(chunked, ends):
    one = scheduler(max_step_tokens=10, chunked_prefill=chunked)
    one.waiting.extend(samples(0, [1] * 6) + samples(1, [2] * 6))
    assert [end for _, end in one.schedule(0)] == ends
    assert len(one.waiting) == 2 - len(ends)


def test_an_aborted_request_takes_no_other_s_samples_with_it():
    """Equal prompts of two requests make one group; each can be aborted alone."""
    for gone in (0, 1):
        one = scheduler(max_step_tokens=4)
        one.waiting.extend(samples(0, list(range(6)), n=2) + samples(1, list(range(6)), n=2))
        [(group, end)] = one.schedule(0)
        assert len(group) == 4 and not one.computed(group, end)
        assert [(s.request, s.sample) for s in one.remove(gone)] == [(gone, 0), (gone, 1)]
        assert not one.prefilling and [s.request for s in one.waiting] == [1 - gone] * 2
        assert one.pool.free == len(one.pool)


# -- under the engine, at random


class Dice:
    """A model of one layer that writes each token's id into the cache and reads nothing."""

    def __init__(self):
        self.config = SimpleNamespace(
            vocab_size=261, num_hidden_layers=1, num_key_value_heads=1, head_dim=1,
            max_position_embeddings=256, eos_token_id=[260, *range(8)],
        )  # fmt: skip
        self.device = torch.device("cpu")
        self.head = torch.randn(261, 2, generator=torch.Generator().manual_seed(0))
        self.writes = Counter()  # slot -> times written since last looked at

    def parameters(self):
        return [self.head]

    def forward_cached(self, ids, cache, positions, slots, decode=None, prefill=None):
        self.writes.update(slots.tolist())
        cache[0].view(-1)[slots] = ids.float()
        return torch.stack((ids.float().sin(), positions.float().cos()), 1)


def check(engine):
    """Every block is owned by exactly those sequences that list it; the rest is idle or empty."""
    pool, size = engine.scheduler.pool, engine.config.block_size
    prefilling = [s for group in engine.scheduler.prefilling for s in group]
    owners = Counter(b for s in (*prefilling, *engine.rows.sequences) for b in s.blocks)
    assert pool.owners == [owners[b] for b in range(len(pool))]
    assert sorted([*pool._empty, *pool._idle]) == [b for b, n in enumerate(pool.owners) if n == 0]
    assert all(pool.names[b] is not None for b in pool._idle)
    assert {n: b for b, n in enumerate(pool.names) if n is not None} == pool._found
    assert len(engine.rows.sequences) == engine.rows.n
    for row, s in enumerate(engine.rows.sequences):
        length = int(engine.rows.state.length[row])
        assert engine.rows.lengths[row] == length
        assert engine.rows.table[row, : len(s.blocks)].tolist() == s.blocks
        assert blocks_for(length - 1, size) <= len(s.blocks) == engine.rows.held[row]
        # what the cache holds of this sequence is what was written for it, by whoever wrote it
        tokens = (s.prompt + engine.rows.read(row).ids)[: length - 1]
        slots = [s.blocks[i // size] * size + i % size for i in range(length - 1)]
        assert engine.cache[0].view(-1)[slots].long().tolist() == tokens


class Scheduling(RuleBasedStateMachine):
    """Requests come, steps happen, requests are aborted, weights change, all at random."""

    def __init__(self):
        super().__init__()
        self.expected, self.finished = {}, Counter()

    @rule(chunked=st.booleans(), prefix=st.booleans(), budget=st.integers(1, 40))
    @precondition(lambda self: not hasattr(self, "engine"))
    def start(self, chunked, prefix, budget):
        config = EngineConfig(
            block_size=4, num_blocks=24, max_batch=6, max_step_tokens=budget,
            chunked_prefill=chunked, prefix_cache=prefix,
        )  # fmt: skip
        self.engine = Engine(Dice(), TOKENIZER, config)

    @precondition(lambda self: hasattr(self, "engine"))
    @rule(start=st.integers(0, 2), length=st.integers(1, 60), n=st.integers(1, 5),
          new=st.integers(1, 30), seed=st.integers(0, 3))  # fmt: skip
    def add(self, start, length, n, new, seed):
        prompt = [10 + (start * 50 + i) % 200 for i in range(length)]  # few beginnings: many hits
        number = self.engine.add(prompt, SamplingParams(n=n, max_tokens=new, seed=seed))
        self.expected[number] = n

    @precondition(lambda self: hasattr(self, "engine"))
    @rule(times=st.integers(1, 12))
    def step(self, times):
        for _ in range(times):
            self.take(self.engine.step())
            check(self.engine)

    @precondition(lambda self: self.expected)
    @rule(pick=st.integers(0, 10**6))
    def abort(self, pick):
        number = sorted(self.expected)[pick % len(self.expected)]
        self.take(self.engine.abort(number))
        assert self.finished[number] == self.expected[number]

    @precondition(lambda self: hasattr(self, "engine") and not self.engine.unfinished)
    @rule()
    def new_weights(self):
        self.engine.sync()
        assert self.engine.scheduler.pool._found == {}

    def take(self, completions):
        for request, _, completion in completions:
            self.finished[request] += 1
            assert completion.finish_reason in ("stop", "length", "abort")
            assert len(completion.ids) == len(completion.logprobs) == len(completion.forced)

    @invariant()
    def bookkeeping(self):
        if hasattr(self, "engine"):
            check(self.engine)

    def teardown(self):
        if hasattr(self, "engine"):
            for _ in range(3000):
                if not self.engine.unfinished:
                    break
                self.take(self.engine.step())
            assert self.finished == self.expected  # every sample of every request, once
            check(self.engine)
            assert self.engine.scheduler.pool.free == len(self.engine.scheduler.pool)


TestScheduling = Scheduling.TestCase
TestScheduling.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


@pytest.mark.parametrize("chunked", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_ten_thousand_requests_leak_nothing(chunked):
    """10,000 requests through 64 blocks, some aborted on the way."""
    config = EngineConfig(
        block_size=4, num_blocks=64, max_batch=32, max_step_tokens=64, chunked_prefill=chunked
    )
    engine = Engine(Dice(), TOKENIZER, config)
    rng = toy.stream_rng("ten thousand", chunked)
    done = Counter()
    for number in range(10_000):
        prompt = [10 + rng.randrange(4)] * rng.randint(1, 60)
        engine.add(prompt, SamplingParams(max_tokens=rng.randint(1, 60), seed=number))
        if rng.random() < 0.05:
            done.update(r for r, *_ in engine.abort(rng.randint(max(0, number - 20), number)))
        while len(engine.scheduler.waiting) > 40:
            done.update(request for request, *_ in engine.step())
    while engine.unfinished:
        done.update(request for request, *_ in engine.step())
    assert done == Counter(range(10_000))
    check(engine)
    assert engine.scheduler.pool.free == 64 and engine.stats["preemptions"] > 0


def test_requests_with_equal_prompts_are_aborted_one_by_one():
    """Samples of both are one group in prefill; the other request's must go on."""
    config = EngineConfig(block_size=4, num_blocks=64, max_step_tokens=4)
    for gone in (0, 1):
        engine = Engine(Dice(), TOKENIZER, config)
        params = SamplingParams(n=2, max_tokens=5, stop_token_ids=())
        for _ in range(2):
            engine.add(list(range(10, 20)), params)
        assert engine.step() == []
        assert [(r, c.finish_reason) for r, _, c in engine.abort(gone)] == [(gone, "abort")] * 2
        done = Counter()
        while engine.unfinished:
            done.update(request for request, *_ in engine.step())
        assert done == {1 - gone: 2}
        check(engine)
