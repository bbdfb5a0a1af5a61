"""Groups of numbers: the strongest of each, and their sums, without a loop over the groups."""

from __future__ import annotations

import torch
from torch import Tensor

_MERGED_AT = 1 << 21  # entries that wait to be summed up


def strongest(groups: Tensor, weights: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The entries of largest weight in each group; of equal ones, those that come first.

    Args:
        groups: (n,) int64 the group of each entry.
        weights: (n,) of each entry.
        most: entries to keep of a group, >= 1.

    Returns:
        which: (r,) places of the entries kept, group after group, the strongest first.
        ranks: (r,) their ranks in their groups, in [0, most).
    """
    order = weights.argsort(descending=True, stable=True)
    order = order[groups[order].argsort(stable=True)]
    in_order = groups[order]
    ranks = torch.arange(len(order)) - torch.searchsorted(in_order, in_order)
    kept = ranks < most
    return order[kept], ranks[kept]


def summed(keys: Tensor, *amounts: Tensor) -> tuple[Tensor, ...]:
    """The distinct keys (r,) in ascending order, and for each the sums of the amounts (n,) that stand at keys (n,)."""
    distinct, place = keys.unique(return_inverse=True)
    return distinct, *(torch.zeros(len(distinct), dtype=a.dtype).index_add_(0, place, a) for a in amounts)


class SumsByKey:
    """Weights added up by key, and how often each key came.

    Holds 16 bytes per distinct key, and several times that while it merges what is new.
    """

    def __init__(self) -> None:
        self._merged = (torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(0, dtype=torch.int32))
        self._waiting: list[tuple[Tensor, ...]] = []
        self._num_waiting = 0

    def add(self, keys: Tensor, weights: Tensor) -> None:
        """Adds weights (n,) at keys (n,) int64, each as one occurrence."""
        entry = summed(keys, weights, torch.ones(len(keys), dtype=torch.int32))
        self._waiting.append(entry)
        self._num_waiting += len(entry[0])
        if self._num_waiting > max(_MERGED_AT, len(self._merged[0]) // 2):
            self._merge()

    def totals(self) -> tuple[Tensor, Tensor, Tensor]:
        """Distinct keys in ascending order, their weights fp32 and their counts int32."""
        self._merge()
        return self._merged

    def _merge(self) -> None:
        if self._waiting:
            keys, weights, counts = (torch.cat(parts) for parts in zip(self._merged, *self._waiting, strict=True))
            distinct, weight, count = summed(keys, weights, counts)
            self._merged, self._waiting, self._num_waiting = (distinct, weight, count), [], 0
