"""Reads of a table: who read what, with which weight, what came back. Sorted by row, they are its gradient."""

from __future__ import annotations

import math
import warnings
from typing import Protocol

import torch
from torch import Tensor

from pkmem.ops.arguments import SortedReads
from pkmem.ops.backends import backend_module

_MANY_PASSES = 1000  # more than anybody accumulates: some 60 micro-batches of 16 layers that share a table


class OtherProcesses(Protocol):
    """Those that hold the other columns of a table, or the same ones; methods are collective unless they say otherwise.

    Attributes:
        first_column: of those held here, in the whole table.
    """

    first_column: int

    def reads_of_replicas(self, reads: Reads) -> list[tuple[Tensor, Tensor, Tensor]] | None:
        """The entries of all processes that hold the same columns, these ones included; None if there are no others."""

    def norm(self, norm: Tensor) -> Tensor:
        """The norm of a gradient, from that of the columns held here, an fp64 scalar."""

    def is_finite(self, here: Tensor) -> Tensor:
        """Whether all columns are finite, from whether those held here are, a bool scalar."""

    def means(self, here: Tensor) -> Tensor:
        """Means over whole rows (u,), from those over the columns held here."""

    def as_distributed(self, part: Tensor) -> Tensor:
        """The columns held here as a DTensor, which knows of the others. Not collective."""

    def part_of(self, whole: Tensor) -> Tensor:
        """The columns held here of a whole tensor, or of a DTensor. Not collective."""


class Reads:
    """Reads of one table of `num_rows` rows in the order in which they came, times a factor.

    Attributes:
        entries: of each backward pass: slots and weights (n, b), grad_output (n, v).
        factor: 1, or a scalar tensor (fp64) by which the gradient was scaled.
        others: None, or the processes that hold other columns of the table, or the same ones.
    """

    def __init__(
        self,
        num_rows: int,
        backend: str,
        entries: list[tuple[Tensor, Tensor, Tensor]],
        others: OtherProcesses | None = None,
    ) -> None:
        self.num_rows, self.backend, self.entries, self.others = num_rows, backend, entries, others
        self.factor: float | Tensor = 1.0
        self._sorted: tuple[int, SortedReads | None] = (0, None)
        self._is_complete = False

    def add(self, other: Reads) -> None:
        """Appends the reads of another pass."""
        if self._is_complete:
            raise RuntimeError(
                "the gradient of a table was clipped, unscaled or measured, for which its replicas exchanged their reads, "
                "and now another backward pass adds to it: do that after the last backward pass before the step"
            )
        for reads in (self, other):
            reads._apply_factor()
        few = len(self.entries) < _MANY_PASSES
        self.entries = self.entries + other.entries
        if few and len(self.entries) >= _MANY_PASSES:
            warnings.warn(
                f"the reads of {_MANY_PASSES} backward passes wait for RowAdam.step(), and take memory: call it, or "
                "zero_grad() to forget them, or delete the RowAdam to train the table with another optimizer",
                stacklevel=2,
            )

    def complete(self) -> None:
        """Takes in what the table's replicas have read, once; collective."""
        if self.others is not None and not self._is_complete:
            self._apply_factor()
            entries = self.others.reads_of_replicas(self)
            if entries is not None:
                self.entries, self._sorted, self._is_complete = entries, (0, None), True

    def _apply_factor(self) -> None:
        if isinstance(self.factor, Tensor) or self.factor != 1.0:
            self.entries = [(slots, weights, self.factor * back) for slots, weights, back in self.entries]
            self.factor, self._sorted = 1.0, (0, None)

    def sorted(self) -> SortedReads | None:
        """All reads grouped by row, before the factor; None if there are none."""
        if self._sorted[0] != len(self.entries):
            entries = [entry for entry in self.entries if entry[0].numel()]
            grouped = None
            if entries:
                slots, weights, backs = (list(part) for part in zip(*entries, strict=True))
                grouped = backend_module(self.backend).sort_reads(slots, weights, backs, self.num_rows)
            self._sorted = len(self.entries), grouped
        return self._sorted[1]

    def scale(self, factor: float | Tensor) -> None:
        """Multiplies the gradient by a number or a scalar tensor."""
        self.factor = self.factor * (factor.double() if isinstance(factor, Tensor) else factor)

    def norm(self) -> Tensor:
        """Euclidean norm of the whole table's gradient, an fp64 scalar; not finite if any entry is not."""
        self.complete()
        grouped = self.sorted()
        if grouped is None:
            return torch.zeros((), dtype=torch.float64, device="cpu")
        norm = (backend_module(self.backend).row_gradient_norm(grouped) * self.factor).abs()
        return norm if self.others is None else self.others.norm(norm)

    def norm_bound(self) -> float:
        """At least the norm, found without summing a row; infinite where that would have to wait for others or a GPU."""
        self.complete()
        grouped = self.sorted()
        if grouped is None:
            return 0.0
        if self.others is not None:
            return math.inf
        bound = backend_module(self.backend).row_gradient_norm_bound(grouped)
        return abs(bound * float(self.factor)) if math.isfinite(bound) else bound

    def is_finite(self) -> Tensor:
        """Whether every entry of the whole table's gradient is finite, a bool scalar."""
        self.complete()
        grouped = self.sorted()
        if grouped is None:
            return torch.ones((), dtype=torch.bool, device="cpu")
        finite = backend_module(self.backend).gradient_is_finite(grouped)
        finite = finite & self.factor.isfinite() if isinstance(self.factor, Tensor) else finite
        return finite if self.others is None else self.others.is_finite(finite)

    def copy(self) -> Reads:
        """The same reads, to be scaled or added to on their own."""
        twin = Reads(self.num_rows, self.backend, [], self.others)
        twin.replace(self)
        return twin

    def replace(self, other: Reads) -> None:
        """Forgets all reads and takes another's."""
        self.entries, self.factor, self._sorted = list(other.entries), other.factor, other._sorted
        self._is_complete = other._is_complete
