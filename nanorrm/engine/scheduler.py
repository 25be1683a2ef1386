"""What runs next: who waits, who is in prefill, whose blocks go back. Plain numbers, no model.

A sequence waits without blocks. Admitted, it is the leader of a group: blocks for its prompt are
found in the cache or allocated, and samples of the same prompt right behind it follow, sharing what
can be shared. The group is in prefill until all of the leader's tokens are computed, in one step or
in chunks; then its members become rows of the DecodeBatch, which keep their blocks. When the pool
runs short, the newest gives its blocks back and waits again, in front.
"""

from collections import deque

from nanorrm.engine.cache import BlockPool, block_names, blocks_for


class Scheduler:
    """The queue, the groups in prefill and the block pool."""

    def __init__(self, config, num_blocks, stats):
        """config: EngineConfig; stats: a Counter for `cached_tokens` and `preemptions`."""
        self.config, self.stats = config, stats
        self.pool = BlockPool(num_blocks)
        self.waiting, self.prefilling = deque(), []  # sequences; groups [leader, follower, ...]

    @property
    def unfinished(self):
        """Whether anything waits or is in prefill."""
        return bool(self.waiting or self.prefilling)

    def remove(self, request):
        """Take a request's sequences out of the queue and the prefill -> these sequences."""
        for group in reversed(self.prefilling[:]):
            if any(s.request == request for s in group):
                self.prefilling.remove(group)
                self._wait_again(group)  # those of other requests stay there
        removed = [s for s in self.waiting if s.request == request]
        self.waiting = deque(s for s in self.waiting if s.request != request)
        return removed

    # -- when blocks are short

    def make_room(self, rows, turns):
        """Give every row the blocks its next `turns` tokens need; preempt the newest if short."""
        while (lacking := rows.lacking(turns)).sum() > self.pool.free:
            self._preempt(rows)
        for row in lacking.nonzero()[0].tolist():
            for block in self.pool.allocate(int(lacking[row])):
                rows.add_block(row, block)

    def _preempt(self, rows):
        """Send the newest group in prefill, or else the newest row, back to the queue."""
        self.stats["preemptions"] += 1
        self._wait_again(self.prefilling.pop() if self.prefilling else [rows.pop_newest()])

    def _wait_again(self, sequences):
        """Back to the front of the queue, in their order and without blocks."""
        for s in reversed(sequences):
            self.pool.release(s.blocks)
            s.blocks, s.computed = [], 0
            self.waiting.appendleft(s)

    # -- what is computed in a step

    def schedule(self, decoding):
        """Chunks of prompts to compute beside one token for each of so many decoding rows.

        Returns [(group, end), ...]: the leader's tokens from `computed` to end.
        """
        budget = self.config.max_step_tokens - decoding
        begun, chunks = deque(self.prefilling), []
        while budget > 0 and (begun or self.waiting):
            group = begun.popleft() if begun else self._admit(decoding, budget if chunks else None)
            if group is None:
                break
            leader = group[0]
            left = len(leader) - leader.computed
            if self.config.chunked_prefill:
                left = min(left, budget)
            chunks.append((group, leader.computed + left))
            budget -= left
        return chunks

    def _admit(self, decoding, budget):
        """The next group, out of the queue and with all blocks it needs now; None: no room.

        budget: tokens that this step can still compute, None if the group is its first.
        """
        config, pool, leader = self.config, self.pool, self.waiting[0]
        running = decoding + sum(map(len, self.prefilling))
        if running >= config.max_batch:
            return None
        # a prompt that may not be cut waits for a step that has room for it, or nothing else
        if not config.chunked_prefill and budget is not None and len(leader) > budget:
            return None
        # what is cached of its tokens (some may be its own, from before a preemption) is not
        # computed again, but for the last token: its hidden state draws the next one
        tokens = leader.tokens
        if config.prefix_cache:
            leader.names = block_names(tokens, config.block_size, pool.epoch)
        found = pool.find(leader.names[: (len(tokens) - 1) // config.block_size])
        # owned from here on, so that they no longer count as free, nor are allocated below
        pool.share(found)
        # leave what those running will soon ask for, or the newcomer would be preempted at once
        spare = running // config.block_size + 1 if running else 0
        need = blocks_for(len(tokens), config.block_size) - len(found)
        if need + spare > pool.free:
            pool.release(found)
            return None
        leader.blocks = found + pool.allocate(need)
        leader.computed = len(found) * config.block_size
        self.stats["cached_tokens"] += leader.computed
        self.waiting.popleft()
        group = [leader, *self._followers(leader, config.max_batch - running - 1, spare)]
        self.prefilling.append(group)
        return group

    def _followers(self, leader, most, spare):
        """Take those right behind a leader that can share its prompt out of the queue."""
        full, partial = divmod(len(leader.prompt), self.config.block_size)
        followers = []
        while self.waiting and len(followers) < most:
            s = self.waiting[0]
            # between requests prompts are shared only where prefixes are
            shares = s.request == leader.request or self.config.prefix_cache
            # what one has generated since its prompt it does not share
            if not shares or s.prompt != leader.prompt or s.generated.ids or leader.generated.ids:
                break
            # full blocks are never written again; a partial end becomes a copy, each writes its own
            if bool(partial) + spare > self.pool.free:
                break
            self.pool.share(leader.blocks[:full])
            s.blocks = leader.blocks[:full] + self.pool.allocate(bool(partial))
            followers.append(self.waiting.popleft())
        return followers

    def computed(self, group, end):
        """The leader's tokens up to end are in the cache now -> whether that is all of them.

        Its full blocks can be found from here on; a group that is through leaves the prefill.
        """
        leader = group[0]
        leader.computed = end
        for block, name in zip(leader.blocks, leader.names[: end // self.config.block_size]):
            self.pool.name(block, name)
        if end == len(leader):
            self.prefilling.remove(group)
        return end == len(leader)
