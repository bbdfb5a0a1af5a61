"""How much of a memory is used: the paper's usage and KL, and what they hide."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pkmem.layer.memory import ProductKeyMemory, memories_in
from pkmem.layer.recomputation import is_recomputation


class MemoryUsage:
    """Counts what a memory reads from now on, until `close()` or the end of a `with` block.

    Args:
        memory: the memory to watch.

    Attributes:
        weight_sum: (m,) fp64 softmax weight given to each slot, z' of the paper (section 4.1).
        num_reads: (m,) int64 reads of each slot.
        num_top1: (m,) int64 reads in which it was a head's best.

    Example:
        >>> with MemoryUsage(memory) as usage:
        ...     memory(x)
        >>> usage.usage, usage.kl
    """

    def __init__(self, memory: ProductKeyMemory) -> None:
        self._num_slots = memory.config.num_slots
        self.reset()
        self._memory = memory
        memory.watchers = (*memory.watchers, self)

    def reset(self) -> None:
        """Starts counting anew."""
        self.weight_sum = torch.zeros(self._num_slots, dtype=torch.float64)
        self.num_reads = torch.zeros(self._num_slots, dtype=torch.int64)
        self.num_top1 = torch.zeros(self._num_slots, dtype=torch.int64)

    def update(self, slots: Tensor, weights: Tensor) -> None:
        """Adds one reading: slots and weights (n, h, knn), the best of each head first."""
        self.count(slots, weights, None)

    @torch.no_grad()
    def count(self, slots: Tensor, weights: Tensor, mask: Tensor | None) -> None:
        """Adds what a memory reads for its real tokens, by a mask (n,)."""
        self.counts(slots.device)
        add = _compiled_add if torch.compiler.is_compiling() else _add
        add(self.weight_sum, self.num_reads, self.num_top1, slots, weights.detach(), mask)

    def counts(self, device: torch.device) -> list[Tensor]:
        """weight_sum, num_reads and num_top1, on a device from now on; several processes may add theirs up in place."""
        names = ("weight_sum", "num_reads", "num_top1")
        if self.weight_sum.device != device:
            for name in names:
                setattr(self, name, getattr(self, name).to(device))
        return [getattr(self, name) for name in names]

    @property
    def usage(self) -> float:
        """Share of slots with weight not zero, in [0, 1] (section 4.1)."""
        return (self.weight_sum != 0).double().mean().item()

    @property
    def top1_usage(self) -> float:
        """Share of slots that were some head's best, in [0, 1]; low where near-ties pad the usage."""
        return (self.num_top1 != 0).double().mean().item()

    @property
    def dead_slots(self) -> int:
        """Slots never read."""
        return int((self.num_reads == 0).sum())

    @property
    def kl(self) -> float:
        """KL divergence of the reads from uniform, log m + sum z log z, in nats; 0 is even use (section 4.1)."""
        total = self.weight_sum.sum()
        if total == 0:
            return math.nan
        z = self.weight_sum / total
        return math.log(len(z)) + torch.special.xlogy(z, z).sum().item()

    @property
    def hottest_share(self) -> float:
        """Share of all reads taken by the hottest 1 % of slots (at least one slot), in [0, 1]."""
        total = int(self.num_reads.sum())
        if total == 0:
            return math.nan
        num_hot = max(1, self._num_slots // 100)
        return self.num_reads.topk(num_hot).values.sum().item() / total

    def summary(self) -> dict[str, float]:
        """usage, top1_usage, kl, dead_slots and hottest_share."""
        names = ("usage", "top1_usage", "kl", "dead_slots", "hottest_share")
        return {name: getattr(self, name) for name in names}

    def close(self) -> None:
        """Stops counting; the counts stay."""
        self._memory.watchers = tuple(watcher for watcher in self._memory.watchers if watcher is not self)

    def __enter__(self) -> MemoryUsage:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _add(
    weight_sum: Tensor, num_reads: Tensor, num_top1: Tensor, slots: Tensor, weights: Tensor, mask: Tensor | None
) -> None:
    """Adds what real tokens read, the first time that activation checkpointing has them read it."""
    if is_recomputation():
        return
    if mask is not None:
        slots, weights = slots[mask], weights[mask]
    read, num_slots = slots.flatten(), len(num_reads)
    weight_sum += torch.bincount(read, weights.flatten().double(), num_slots)
    num_reads += torch.bincount(read, minlength=num_slots)
    num_top1 += torch.bincount(slots[..., :1].flatten(), minlength=num_slots)


# An operator of its own, so that compiled code asks each time it runs, and its shapes depend on no mask.
_compiled_add = torch.library.custom_op("pkmem::add_reads", _add, mutates_args=("weight_sum", "num_reads", "num_top1"))


def usage_figures(usages: dict[str, MemoryUsage]) -> dict[str, float]:
    """The figures of watched memories under flat names: `<memory>/usage` and so on."""
    return {f"{name}/{key}": figure for name, usage in usages.items() for key, figure in usage.summary().items()}


@contextlib.contextmanager
def watching(model: nn.Module) -> Iterator[dict[str, MemoryUsage]]:
    """Counts what each memory of a model reads inside the block, by short names: memory_0, memory_1, ..."""
    usages = {f"memory_{i}": MemoryUsage(memory) for i, memory in enumerate(memories_in(model).values())}
    try:
        yield usages
    finally:
        for usage in usages.values():
            usage.close()
