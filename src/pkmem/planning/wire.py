"""How processes share a training run, and the bytes that each receives from the others, inside its host and from hosts.

Every collective is counted as what has to arrive: an all-to-all brings each process its part from every other one. An
all-reduce is counted as NCCL's hierarchical one, first inside a host and then between hosts with a share per process,
which crosses the network least.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pkmem.layer.config import require

_SLOT_BYTES = 4
_WEIGHT_BYTES = 4


@dataclass(frozen=True)
class Layout:
    """How the processes of a run share its model.

    Args:
        num_processes: in all, one per device, >= 1.
        per_host: of one host, a divisor of num_processes.
        columns: processes that share the columns of each table, a divisor of num_processes; 1 where each holds all.
        parallel: "ddp" or "fsdp", as `TrainingConfig.parallel`.

    Raises:
        ValueError: a number does not divide the other.
    """

    num_processes: int = 1
    per_host: int = 1
    columns: int = 1
    parallel: Literal["ddp", "fsdp"] = "ddp"

    def __post_init__(self) -> None:
        for name in ("num_processes", "per_host", "columns"):
            require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        for name, what in (("per_host", "processes of a host"), ("columns", "training.columns")):
            divides = self.num_processes % getattr(self, name) == 0
            require(divides, what, getattr(self, name), f"a divisor of the {self.num_processes} processes")

    @property
    def hosts(self) -> int:
        """Hosts that the processes are on."""
        return self.num_processes // self.per_host

    @property
    def replicas(self) -> int:
        """Processes that hold the same columns."""
        return self.num_processes // self.columns

    @property
    def dense_share(self) -> float:
        """Of all that is not a table, what one process keeps."""
        return 1 / self.num_processes if self.parallel == "fsdp" else 1.0


@dataclass(frozen=True)
class TableReads:
    """A table and how it is read.

    Args:
        num_slots: m, its rows.
        width: v, of a row.
        reads_per_token: rows that one token reads, by all memories that share the table.
        num_memories: that share it.
        element_bytes: of a number of the table, and of what comes back to it.
    """

    num_slots: int
    width: int
    reads_per_token: int
    num_memories: int = 1
    element_bytes: int = 4

    @property
    def numel(self) -> int:
        """Numbers of the table."""
        return self.num_slots * self.width


class Wire(NamedTuple):
    """Bytes that one process receives: from processes of its own host, and from other hosts."""

    inside: float
    between: float

    def plus(self, other: Wire) -> Wire:
        """Both together."""
        return Wire(self.inside + other.inside, self.between + other.between)

    def times(self, factor: float) -> Wire:
        """As often."""
        return Wire(self.inside * factor, self.between * factor)


def column_bytes_per_token(table: TableReads, columns: int) -> float:
    """Bytes that a process receives for each of its tokens so that all columns of a table meet it, forward and backward.

    Slots (int32) and weights come from all others, (C - 1) b (4 + w); outputs and their gradients are 1 / C of a row
    from each, v e (C - 1) / C, twice; the gradients of the weights are a sum over columns, (C - 1) b w. A table of
    neurons takes as much, the other way round.

    Args:
        table: read by a token.
        columns: C, processes that share the columns, >= 1.
    """
    others = columns - 1
    reads = others * table.reads_per_token * (_SLOT_BYTES + 2 * _WEIGHT_BYTES)
    rows = 2 * table.num_memories * table.width * table.element_bytes * others / columns
    return reads + rows


def replica_bytes_per_step(table: TableReads, layout: Layout, tokens: int) -> float:
    """Bytes that a process receives in an update so that all replicas of its columns see all reads.

    A read has slot and weight, a token its part of a row of gradient; where that is more than a dense gradient and its
    all-reduce, 2 m v e / C (R - 1) / R, it is the latter.

    Args:
        table: read since the last update.
        layout: R replicas of C columns.
        tokens: of one process since then.
    """
    group_tokens = tokens * layout.columns
    others, row_bytes = layout.replicas - 1, table.width / layout.columns * table.element_bytes
    read_bytes = table.reads_per_token * (_SLOT_BYTES + _WEIGHT_BYTES) + table.num_memories * row_bytes
    dense = 2 * others / layout.replicas * table.num_slots * row_bytes
    return min(others * group_tokens * read_bytes, dense)


def all_reduce(num_bytes: float, layout: Layout) -> Wire:
    """A sum over all processes of a tensor that each has."""
    hosts, per_host = layout.hosts, layout.per_host
    return Wire(2 * num_bytes * (per_host - 1) / per_host, 2 * num_bytes / per_host * (hosts - 1) / hosts)


def dense_bytes_per_step(num_bytes: int, layout: Layout, micro_batches: int) -> Wire:
    """What the weights outside the tables cost an update: under DDP a sum of gradients, after the last micro-batch.

    Under FSDP each micro-batch gathers the weights twice and scatters the gradients' sum once, three halves as much.

    Args:
        num_bytes: of these weights.
        layout: the processes.
        micro_batches: backward passes of an update.
    """
    once = all_reduce(num_bytes, layout)
    return once.times(1.5 * micro_batches) if layout.parallel == "fsdp" else once


def wire_bytes_per_token(
    tables: Iterable[TableReads], dense_bytes: int, layout: Layout, tokens: int, micro_batches: int = 1
) -> dict[str, Wire]:
    """All that a process receives in an update, per token of its own batch, by what it is.

    Args:
        tables: as they are read.
        dense_bytes: of the weights outside the tables.
        layout: the processes.
        tokens: of one process in an update.
        micro_batches: that they are split into.

    Returns:
        by "columns" of the tables, "replicas" of the tables and "dense" weights.
    """
    columns, replicas = Wire(0, 0), Wire(0, 0)
    for table in tables:
        crossing = column_bytes_per_token(table, layout.columns)
        columns = columns.plus(_split(crossing, layout.columns, min(layout.columns, layout.per_host)))
        exchanged = replica_bytes_per_step(table, layout, tokens) / tokens
        replicas = replicas.plus(_split(exchanged, layout.replicas, max(1, layout.per_host // layout.columns)))
    dense = dense_bytes_per_step(dense_bytes, layout, micro_batches).times(1 / tokens)
    return {"columns": columns, "replicas": replicas, "dense": dense}


def _split(num_bytes: float, group: int, together: int) -> Wire:
    """Bytes from all others of a group, of which so many are on one host."""
    inside = num_bytes * (together - 1) / max(1, group - 1)
    return Wire(inside, num_bytes - inside)
