"""Which cache block holds what. Imports no torch; knows nothing of tensors.

Blocks have reference counts; a full block that has been computed is known by the hash of all tokens
up to its end, chained from a seed that names the adapter, so that a prefix is shared by requests
with one adapter and never across adapters. A block nobody refers to stays findable until it is
taken for something else, least recently freed first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable

from server.engine.sequence import Sequence


class BlockManager:
    """Reference counts, hashes and the free list of `num_blocks` blocks of `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._references = [0] * num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that no sequence refers to."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` positions."""
        return -(-num_tokens // self.block_size)

    def _hash(self, seq: Sequence, index: int) -> bytes:
        """The hash of block `index` of `seq`, chained from its adapter's seed."""
        hashes = seq.block_hashes
        while len(hashes) <= index:
            i = len(hashes)
            previous = hashes[-1] if hashes else seq.cache_seed
            tokens = seq.token_ids[i * self.block_size : (i + 1) * self.block_size]
            hashes.append(hashlib.sha256(previous + array("q", tokens).tobytes()).digest())
        return hashes[index]

    def match(self, seq: Sequence) -> int:
        """Take the cached blocks of the longest known prefix of a sequence without blocks.

        At least one token is left to compute, since its logits are needed, and every prompt token
        whose logits are. Sets `block_table` and `num_cached`; returns the number of cached
        positions.
        """
        assert not seq.block_table
        first_needed = len(seq.token_ids) - 1 if seq.next_scored is None else seq.next_scored
        for i in range(first_needed // self.block_size):
            block = self._block_of.get(self._hash(seq, i))
            if block is None:
                break
            self._free.pop(block, None)
            self._references[block] += 1
            seq.block_table.append(block)
        seq.num_cached = len(seq.block_table) * self.block_size
        return seq.num_cached

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Give `seq` blocks for positions below `num_tokens`; False, and nothing, if too few."""
        need = self.blocks_for(num_tokens) - len(seq.block_table)
        if need > len(self._free):
            return False
        for _ in range(need):
            block, _ = self._free.popitem(last=False)
            known = self._hash_of.pop(block, None)
            if known is not None:
                del self._block_of[known]
            self._references[block] = 1
            seq.block_table.append(block)
        return True

    def commit(self, seq: Sequence, already: int) -> None:
        """Make the full blocks between `already` and `num_computed` positions findable."""
        for i in range(already // self.block_size, seq.num_computed // self.block_size):
            digest, block = self._hash(seq, i), seq.block_table[i]
            if digest not in self._block_of and block not in self._hash_of:
                self._block_of[digest] = block
                self._hash_of[block] = digest

    def release(self, seq: Sequence) -> None:
        """Drop the sequence's references. Later blocks are reused first."""
        for block in reversed(seq.block_table):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
        seq.block_table = []

    def check_integrity(self, live: Iterable[Sequence] = ()) -> None:
        """Raises AssertionError unless counts, free list and hashes agree with `live` sequences."""
        counts = [0] * self.num_blocks
        for seq in live:
            for block in seq.block_table:
                counts[block] += 1
        assert counts == self._references, "reference counts differ from the sequences' tables"
        assert set(self._free) == {b for b, n in enumerate(counts) if n == 0}, "free list is wrong"
        assert {b: h for h, b in self._block_of.items()} == self._hash_of, "hash maps disagree"
