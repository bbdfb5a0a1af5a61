"""What a memory reads on a text, slot by slot and token by token, in a size that the reads do not set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pkmem.inspecting.sums import SumsByKey, strongest, summed
from pkmem.layer.config import require
from pkmem.layer.memory import ProductKeyMemory, memories_in
from pkmem.layer.usage import MemoryUsage

MOST_CONTEXTS = 8
MOST_READS = 16
MOST_HEADS = 32  # a context names its heads by the bits of a 32-bit number


class SlotsOfTokens(NamedTuple):
    """The slots that tokens of the vocabulary read most, strongest first; -1 where a token reads fewer.

    Args:
        slots: (types, most) int64.
        weights: (types, most) the weight that it gave the slot, over all its occurrences.
        counts: (types, most) its occurrences that read the slot.
    """

    slots: Tensor
    weights: Tensor
    counts: Tensor


class MemoryReads:
    """Watches what a memory reads on a text that is known beforehand, until `close()`.

    A token reads a slot once here, though several of its heads may: with the sum of their weights, which is what the
    slot's value is multiplied with, where the slots are no experts. Holds 120 bytes per slot and 24 more for each head, 192
    per token, and 16 per pair of a token of the vocabulary and a slot that it reads, at most one pair a read.

    Args:
        memory: the memory to watch.
        tokens: (n,) the text's tokens, in the order in which the memory will see them, without padding.

    Attributes:
        heads: counts of each head, by the definitions of `MemoryUsage`.
        all_heads: counts of all heads together.
        context_weights: (m, 8) the largest weights with which each slot was read, 0 where there are fewer.
        context_positions: (m, 8) where in the text.
        context_heads: (m, 8) by which heads: bit h is head h.
        read_slots: (n, 16) the slots that each token gave most weight, -1 where it read fewer.
        read_weights: (n, 16) those weights.
        read_heads: (n, 16) by which heads.

    Raises:
        ValueError: the memory has more than 32 heads.
    """

    def __init__(self, memory: ProductKeyMemory, tokens: Tensor) -> None:
        config = memory.config
        require(config.heads <= MOST_HEADS, "heads", config.heads, f"at most {MOST_HEADS} for a page")
        self._memory, self._tokens, self._num_seen = memory, tokens, 0
        self.heads = [_counts(memory) for _ in range(config.heads)]
        self.all_heads = _counts(memory)
        slots, reads = (config.num_slots, MOST_CONTEXTS), (len(tokens), MOST_READS)
        self.context_weights = torch.zeros(slots)
        self.context_positions, self.context_heads = (torch.zeros(slots, dtype=torch.int32) for _ in range(2))
        self.read_slots = torch.full(reads, -1, dtype=torch.int32)
        self.read_weights = torch.zeros(reads)
        self.read_heads = torch.zeros(reads, dtype=torch.int32)
        self._of_token_and_slot = SumsByKey()
        memory.watchers = (*memory.watchers, self)

    def close(self) -> None:
        """Stops watching; what was seen stays."""
        self._memory.watchers = tuple(watcher for watcher in self._memory.watchers if watcher is not self)

    @torch.no_grad()
    def count(self, slots: Tensor, weights: Tensor, mask: Tensor | None) -> None:
        """Adds what a memory reads for its real tokens, by a mask (n,)."""
        if mask is not None:
            slots, weights = slots[mask], weights[mask]
        slots, weights = slots.cpu(), weights.cpu().float()
        for head, counts in enumerate(self.heads):
            counts.update(slots[:, head : head + 1], weights[:, head : head + 1])
        self.all_heads.update(slots, weights)
        first, self._num_seen = self._num_seen, self._num_seen + len(slots)
        assert self._num_seen <= len(self._tokens), "the memory reads more than the text"
        num_slots = self._memory.config.num_slots
        keys = torch.arange(first, self._num_seen)[:, None, None] * num_slots + slots
        bits = (1 << torch.arange(slots.shape[1]))[None, :, None].expand_as(slots)
        pairs, weight, heads = summed(keys.flatten(), weights.flatten(), bits.flatten())
        position, slot = pairs // num_slots, pairs % num_slots
        self._keep_reads(position, slot, weight, heads.int())
        self._keep_contexts(position, slot, weight, heads.int())
        self._of_token_and_slot.add(self._tokens[position] * num_slots + slot, weight)

    def slots_of_tokens(self, types: Tensor, most: int, by_count: bool) -> SlotsOfTokens:
        """The slots that tokens of the vocabulary read most.

        Args:
            types: (t,) distinct tokens, ascending, with all that occur in the text among them.
            most: slots of each.
            by_count: by occurrences that read the slot; else by the weight given to it.
        """
        keys, weights, counts = self._of_token_and_slot.totals()
        num_slots = self._memory.config.num_slots
        row = torch.searchsorted(types, keys // num_slots)
        which, ranks = strongest(row, counts if by_count else weights, most)
        found = SlotsOfTokens(
            torch.full((len(types), most), -1), torch.zeros(len(types), most), torch.zeros(len(types), most).int()
        )
        for target, source in zip(found, (keys % num_slots, weights, counts), strict=True):
            target[row[which], ranks] = source[which]
        return found

    def _keep_reads(self, position: Tensor, slot: Tensor, weight: Tensor, heads: Tensor) -> None:
        which, ranks = strongest(position, weight, MOST_READS)
        at = position[which], ranks
        self.read_slots[at], self.read_weights[at], self.read_heads[at] = slot[which].int(), weight[which], heads[which]

    def _keep_contexts(self, position: Tensor, slot: Tensor, weight: Tensor, heads: Tensor) -> None:
        """Merges reads into the strongest contexts of their slots; an earlier one stays before one as strong."""
        is_stronger = weight > self.context_weights[slot, -1]
        touched, row = slot[is_stronger].unique(return_inverse=True)
        rows = torch.cat([torch.arange(len(touched)).repeat_interleave(MOST_CONTEXTS), row])
        weights = torch.cat([self.context_weights[touched].flatten(), weight[is_stronger]])
        which, ranks = strongest(rows, weights, MOST_CONTEXTS)
        for table, new in (
            (self.context_weights, weight),
            (self.context_positions, position.int()),
            (self.context_heads, heads),
        ):
            kept = torch.zeros(len(touched), MOST_CONTEXTS, dtype=table.dtype)
            kept[rows[which], ranks] = torch.cat([table[touched].flatten(), new[is_stronger]])[which]
            table[touched] = kept


@contextlib.contextmanager
def watching_reads(model: nn.Module, tokens: Tensor) -> Iterator[list[MemoryReads]]:
    """Watches what each memory of a model reads inside the block, on a text whose tokens (n,) are known.

    Raises:
        ValueError: a memory has more heads than `MemoryReads` takes.
    """
    reads: list[MemoryReads] = []
    try:
        for memory in memories_in(model).values():
            reads.append(MemoryReads(memory, tokens))
        yield reads
    finally:
        for one in reads:
            one.close()


def _counts(memory: ProductKeyMemory) -> MemoryUsage:
    """Counts that are added to by hand."""
    made = MemoryUsage(memory)
    made.close()
    return made
