"""Who reads which rows of a model's value tables, and which of them to teach."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pkmem import ops
from pkmem.layer.memory import memories_in
from pkmem.layer.quantised import QuantisedValues
from pkmem.layer.values import ValueTable

_RAREST = 1e-4  # reads per token: what is read less than once in ten thousand tokens counts as never read


class Reads(NamedTuple):
    """What one memory read for n tokens.

    Args:
        slots: (n, b) int64.
        weights: (n, b).
    """

    slots: Tensor
    weights: Tensor


class RowsInTraining(nn.Module):
    """Stands where memories have their table: the table as it is, plus a change of some rows, which alone trains.

    Args:
        table: the table; nothing of it changes.
        rows: (t,) int64, the rows that may change.

    Attributes:
        change: (t, v) fp32, what is added to the rows; zero at first.
    """

    def __init__(self, table: ValueTable, rows: Tensor) -> None:
        super().__init__()
        num_slots, width = table.weight.shape
        self.rows = rows
        self.backend = table.backend
        self.table = table
        self.place = torch.zeros(num_slots, dtype=torch.int64, device=rows.device)
        self.place[rows] = torch.arange(len(rows), device=rows.device)
        self.trains = torch.zeros(num_slots, dtype=torch.bool, device=rows.device)
        self.trains[rows] = True
        self.change = nn.Parameter(torch.zeros(len(rows), width, dtype=torch.float32, device=rows.device))

    def forward(self, slots: Tensor, weights: Tensor) -> Tensor:
        """As a table's: slots and weights (n, h, knn) -> sums over heads and neighbours (n, v)."""
        return self.table(slots, weights) + self.changed(slots.flatten(1), weights.flatten(1)).to(weights.dtype)

    def changed(self, slots: Tensor, weights: Tensor) -> Tensor:
        """What the change adds for slots and weights (n, b): (n, v)."""
        weights = weights.float() * self.trains[slots]
        return ops.weighted_sum(self.change, self.place[slots], weights, backend=self.backend)


def tables_of(model: nn.Module) -> dict[str, ValueTable]:
    """The value tables of a model's memories by the names of their weights, a shared one once.

    Raises:
        ValueError: the model has no memories, or its tables are sharded.
    """
    tables: dict[str, ValueTable] = {}
    for name, memory in memories_in(model).items():
        if not any(memory.values is table for table in tables.values()):
            tables[f"{name}.values.weight"] = memory.values
    if not tables:
        raise ValueError("the model has no memories to teach: put some beside its MLPs with `pkmem retrofit`")
    if any(isinstance(table, QuantisedValues) for table in tables.values()):
        raise ValueError("the model's values are quantised: teach the model as it was before `pkmem convert`")
    if any(table.others is not None for table in tables.values()):
        raise ValueError("the model's tables are sharded over processes: learn on one process, with whole tables")
    return tables


@contextlib.contextmanager
def reading(model: nn.Module, found: Callable[[int, Reads], None]) -> Iterator[None]:
    """Within the block `found` gets what each memory, by its place in the model, reads for real tokens."""
    watchers = [_Watcher(place, found) for place in range(len(memories_in(model)))]
    memories = list(memories_in(model).values())
    for memory, watcher in zip(memories, watchers, strict=True):
        memory.watchers = (*memory.watchers, watcher)
    try:
        yield
    finally:
        for memory, watcher in zip(memories, watchers, strict=True):
            memory.watchers = tuple(other for other in memory.watchers if other is not watcher)


class _Watcher:
    def __init__(self, place: int, found: Callable[[int, Reads], None]) -> None:
        self._place, self._found = place, found

    def count(self, slots: Tensor, weights: Tensor, mask: Tensor | None) -> None:
        slots, weights = slots.flatten(1), weights.detach().flatten(1)
        if mask is not None:
            slots, weights = slots[mask], weights[mask]
        self._found(self._place, Reads(slots, weights))


@contextlib.contextmanager
def in_place_of_tables(model: nn.Module, rows: dict[str, RowsInTraining]) -> Iterator[None]:
    """Within the block memories read through these instead of their tables, by the names of `tables_of`."""
    tables = tables_of(model)
    by_table = {id(tables[name]): part for name, part in rows.items()}
    before = {memory: memory.values for memory in memories_in(model).values()}
    try:
        for memory, table in before.items():
            memory.values = by_table.get(id(table), table)  # type: ignore[assignment]
        yield
    finally:
        for memory, table in before.items():
            memory.values = table


def weight_of_rows(reads: Reads, num_rows: int) -> Tensor:
    """The weight with which each row is read in all, (m,) fp64."""
    return torch.bincount(reads.slots.flatten(), reads.weights.flatten().double(), num_rows)


def rows_to_teach(
    matter: Sequence[Tensor],
    elsewhere: Sequence[Tensor],
    names: Sequence[str],
    taken: Iterable[dict[str, Tensor]],
    most: int,
    sharpness: float = 1.0,
) -> dict[str, Tensor]:
    """The rows that matter most for some answers and that other text reads least, as TF-IDF ranks words.

    Args:
        matter: of each memory (m,), how much each row matters for the answers, >= 0.
        elsewhere: of each memory (m,), the weight with which a token of other text reads each row, >= 0.
        names: of each memory, its table.
        taken: rows by table that must not be taught.
        most: how many rows to take in all, >= 1.
        sharpness: the power of a row's rarity, >= 1; the higher, the less a row that matters may be read elsewhere.

    Returns:
        by table its rows, sorted; no table without any.
    """
    rank: dict[str, Tensor] = {}
    for amount, background, name in zip(matter, elsewhere, names, strict=True):
        rarity = background.clamp(_RAREST, 1.0).log() / math.log(_RAREST)
        rank[name] = rank.get(name, 0.0) + amount * rarity**sharpness
    for rows in taken:
        for name in rows.keys() & rank.keys():
            rank[name][rows[name].to(rank[name].device)] = 0.0
    every = torch.cat(list(rank.values()))
    best = every.topk(min(most, int((every > 0).sum()))).indices
    chosen = torch.zeros_like(every, dtype=torch.bool)
    chosen[best] = True
    of_tables = chosen.split([len(ranks) for ranks in rank.values()])
    return {name: here.nonzero().flatten() for name, here in zip(rank, of_tables, strict=True) if here.any()}
