"""The bookkeeping of the paged cache: which blocks are free, shared, or kept for reuse. No tensors.

A block holds the keys and values of `block_size` tokens. Completions of a group share the full
blocks of their prompt, so a block counts its owners. A full block can be given a name, the hash of
all tokens up to its end; when nobody owns it any more it stays findable under that name until its
place is needed (least recently used first). Names carry an epoch: new weights start a new one, and
nothing written under the old weights can be found again.
"""

import hashlib
import struct
from collections import OrderedDict


def blocks_for(tokens, block_size):
    """How many blocks hold so many tokens."""
    return -(-tokens // block_size)


def block_names(ids, block_size, epoch):
    """Names of the full blocks of a token sequence: each is a hash of everything up to its end."""
    names, name = [], struct.pack("<q", epoch)
    for start in range(0, len(ids) - block_size + 1, block_size):
        block = struct.pack(f"<{block_size}q", *ids[start : start + block_size])
        name = hashlib.blake2b(name + block, digest_size=16).digest()
        names.append(name)
    return names


class BlockPool:
    """Reference-counted blocks numbered 0 .. n-1, with a prefix cache.

    A block is owned (owners > 0), idle (no owner, but named, so it can be found again) or empty.
    `free` counts idle and empty ones: both can be allocated.

    >>> pool = BlockPool(4)
    >>> a = pool.allocate(2)            # owners: 1 1 0 0
    >>> pool.share(a[:1])               # owners: 2 1 0 0
    >>> pool.name(a[1], b"second")
    >>> pool.release(a)                 # owners: 1 0 0 0; the second is idle
    >>> pool.free, pool.find([b"second"]) == a[1:]
    (3, True)
    """

    def __init__(self, num_blocks):
        self.owners = [0] * num_blocks
        self.names = [None] * num_blocks  # name of each block, if it has one
        self.epoch = 0
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._idle = OrderedDict()  # block -> None, least recently released first
        self._found = {}  # name -> block

    def __len__(self):
        return len(self.owners)

    @property
    def free(self):
        """How many blocks can be allocated."""
        return len(self._empty) + len(self._idle)

    def allocate(self, n):
        """n blocks, now owned once and nameless: empty ones first, then idle ones, oldest first.

        Raises MemoryError (and takes none) if fewer are free.
        """
        if n > self.free:
            raise MemoryError(f"{n} blocks wanted, {self.free} free")
        taken = []
        for _ in range(n):
            if self._empty:
                block = self._empty.pop()
            else:
                block, _ = self._idle.popitem(last=False)
                del self._found[self.names[block]]
                self.names[block] = None
            self.owners[block] = 1
            taken.append(block)
        return taken

    def share(self, blocks):
        """One more owner for each block, which must be owned or idle."""
        for block in blocks:
            if self.owners[block] == 0:
                assert block in self._idle, f"block {block} is empty and can't be shared"
                del self._idle[block]
            self.owners[block] += 1

    def release(self, blocks):
        """One owner less for each block. The last block of a sequence goes idle first, so that
        eviction eats a prefix from its end."""
        for block in reversed(blocks):
            assert self.owners[block] > 0, f"block {block} released twice"
            self.owners[block] -= 1
            if self.owners[block] == 0:
                if self.names[block] is None:
                    self._empty.append(block)
                else:
                    self._idle[block] = None

    def name(self, block, name):
        """Name an owned, fully written block, unless another block has that name already."""
        assert self.owners[block] > 0, f"block {block} has no owner"
        if name not in self._found and self.names[block] is None:
            self._found[name] = block
            self.names[block] = name

    def find(self, names):
        """Blocks of the longest run of names, from the first, that are all known."""
        blocks = []
        for name in names:
            if name not in self._found:
                break
            blocks.append(self._found[name])
        return blocks

    def drop(self):
        """New weights: forget every name and begin a new epoch."""
        self._empty += self._idle
        self._idle.clear()
        self._found.clear()
        self.names = [None] * len(self.owners)
        self.epoch += 1
