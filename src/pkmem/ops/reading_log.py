"""The gradient of a value table is its reading log: who read what, with which weight, what came back.

A table of a billion parameters is read at a few rows per token. Its gradient is kept as those reads,
never as a tensor of the table's size, and summed row by row when the table is updated.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

_handles = itertools.count()
_logs: weakref.WeakValueDictionary[int, ReadLog] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class SortedReads:
    """The reads of one table, grouped by row: a segment for each row that was read, ascending.

    A backend that does not wait for its device leaves room for as many rows as there can be: then further segments
    follow that are empty, whose `rows` hold no meaning.

    Args:
        rows: (u,) int64 row of each segment.
        offsets: (u + 1,) int64; the reads of segment i are offsets[i] up to offsets[i + 1].
        tokens: (r,) int64 row of `grad_output` each read belongs to; in order of reading within a row.
        weights: (r,) weight of each read.
        grad_output: (n, v) what came back to each token.
    """

    rows: Tensor
    offsets: Tensor
    tokens: Tensor
    weights: Tensor
    grad_output: Tensor

    def without_empty(self) -> SortedReads:
        """The same reads, a segment for each row that was read and no other; waits for the device."""
        is_read = self.offsets.diff() > 0
        offsets = torch.cat((self.offsets[:-1][is_read], self.offsets[-1:]))
        return replace(self, rows=self.rows[is_read], offsets=offsets)


def surely_finite(reads: SortedReads) -> Tensor:
    """Whether a bound shows, without summing anything, that a table's gradient is finite; a bool scalar."""
    largest = [torch.linalg.vector_norm(part, math.inf).double() for part in (reads.weights, reads.grad_output)]
    return len(reads.tokens) * largest[0] * largest[1] < torch.finfo(torch.float32).max / 2


class ReadLog:
    """The reads of one table since its last update, over all micro-batches and sharing layers.

    Custom operators take tensors and numbers only, so they find the log through `handle`; they count in
    `counter`, a tensor they declare to change, so that a compiler keeps them.
    """

    def __init__(self) -> None:
        self.counter = torch.zeros((), dtype=torch.int64)
        self.entries: list[tuple[Tensor, Tensor, Tensor]] = []
        self.handle = next(_handles)
        _logs[self.handle] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> ReadLog:
        return ReadLog()

    def __reduce__(self) -> tuple[type[ReadLog], tuple[()]]:
        return ReadLog, ()

    @staticmethod
    def of(handle: int) -> ReadLog:
        """The living log with this handle."""
        return _logs[handle]

    def append(self, slots: Tensor, weights: Tensor, grad_output: Tensor) -> None:
        """Keeps one backward pass: slots and weights (n, b), grad_output (n, v)."""
        self.entries.append((slots, weights, grad_output))

    def clear(self) -> None:
        """Forgets all reads."""
        self.entries.clear()

    def sorted(self, sort: Callable[..., SortedReads], num_rows: int) -> SortedReads | None:
        """All reads since the last update grouped by row, by a backend's `sort_reads`; None if there were none."""
        entries = [entry for entry in self.entries if entry[0].numel()]
        if not entries:
            return None
        return sort(*(list(part) for part in zip(*entries, strict=True)), num_rows)
