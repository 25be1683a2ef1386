"""The block pool as a state machine: whatever is allocated and shared, the counts are right."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nanorrm.engine.cache import BlockPool


class Pool(RuleBasedStateMachine):
    """Holders each own a list of blocks; a block is owned by as many as list it."""

    @initialize(size=st.integers(0, 12))
    def make(self, size):
        self.size, self.pool, self.holders = size, BlockPool(size), []

    @rule(n=st.integers(0, 6))
    def allocate(self, n):
        before = self.pool.free
        owned = {block for holder in self.holders for block in holder}
        if n > before:
            with pytest.raises(MemoryError, match=f"{n} .*{before}"):
                self.pool.allocate(n)
            assert self.pool.free == before  # refused whole: none taken
            return
        taken = self.pool.allocate(n)
        assert len(set(taken)) == len(taken) == n and not owned & set(taken)
        self.holders.append(list(taken))

    @precondition(lambda self: self.holders)
    @rule(pick=st.randoms(use_true_random=False), share=st.floats(0, 1))
    def fork(self, pick, share):
        """A new holder that shares the beginning of another's blocks."""
        blocks = pick.choice(self.holders)
        prefix = blocks[: round(share * len(blocks))]
        self.pool.share(prefix)
        self.holders.append(list(prefix))

    @precondition(lambda self: self.holders)
    @rule(pick=st.randoms(use_true_random=False))
    def release(self, pick):
        self.pool.release(self.holders.pop(pick.randrange(len(self.holders))))

    @rule()
    def misuse(self):
        """Blocks nobody owns can't be shared or released."""
        owned = {block for holder in self.holders for block in holder}
        for block in set(range(self.size)) - owned:
            for act in (self.pool.share, self.pool.release):
                with pytest.raises(AssertionError):
                    act([block])

    @invariant()
    def counts_are_right(self):
        if not hasattr(self, "pool"):
            return
        owners = Counter(block for holder in self.holders for block in holder)
        assert self.pool.owners == [owners[block] for block in range(self.size)]
        assert self.pool.free == self.size - len(owners)  # no block leaked, none free and owned


Pool.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_pool = Pool.TestCase
