"""The bookkeeping of the paged cache: which blocks are free, who shares which. No tensors.

A block holds the keys and values of `block_size` tokens. A group's completions share the full
blocks of their prompt, so a block has a count of its owners and is free again when it drops to 0.
"""


class BlockPool:
    """Reference-counted blocks numbered 0 .. n-1.

    >>> pool = BlockPool(4)
    >>> a = pool.allocate(2)            # owners: 1 1 0 0
    >>> pool.share(a[:1])               # owners: 2 1 0 0
    >>> pool.release(a)                 # owners: 1 0 0 0
    >>> pool.free
    3
    """

    def __init__(self, num_blocks):
        self.owners = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def free(self):
        """How many blocks nobody owns."""
        return len(self._free)

    def allocate(self, n):
        """n free blocks, now owned once. Raises MemoryError (and takes none) if there are fewer."""
        if n > len(self._free):
            raise MemoryError(f"{n} blocks wanted, {len(self._free)} free")
        taken = [self._free.pop() for _ in range(n)]
        for block in taken:
            self.owners[block] = 1
        return taken

    def share(self, blocks):
        """One more owner for each block."""
        for block in blocks:
            assert self.owners[block] > 0, f"block {block} is free and can't be shared"
            self.owners[block] += 1

    def release(self, blocks):
        """One owner less for each block; those without owners are free again."""
        for block in blocks:
            assert self.owners[block] > 0, f"block {block} released twice"
            self.owners[block] -= 1
            if self.owners[block] == 0:
                self._free.append(block)
