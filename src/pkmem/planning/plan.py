"""What a training run needs of each device, and how long its steps take at least, before anything is launched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pkmem.planning.devices import Device
from pkmem.planning.trace import Operation, Trace, trace_step
from pkmem.planning.wire import Layout, TableReads, Wire, wire_bytes_per_token
from pkmem.training.parallel import shared_columns
from pkmem.training.recipe import Recipe, TrainingConfig
from pkmem.training.run import sequences_per_process

_READ_BYTES = 12  # of a read in the log: its slot (int64) and its weight (fp32)
_SORT_BYTES = 56  # of a read while it is sorted: what is sorted, and what comes of it, in 8 and 4 bytes each
_SORT_TRAFFIC_BYTES = 120  # that sorting moves for a read: two passes, and copies
_CROSSED_BYTES = 80  # that a read of another process moves here: into and out of buffers, both ways, and into the log
_ADAM_ACCESSES = 7  # to a dense weight: it and its moments are read and written, its gradient is read
_CLIP_ACCESSES = 3  # to a dense gradient: read for the norm, read and written for the factor


@dataclass(frozen=True)
class Plan:
    """What one process of a training run needs, and its time.

    Attributes:
        recipe, layout, device: what is planned.
        tokens: of one process in an update.
        table_params, dense_params: numbers of the whole model, in its tables and outside.
        memory: bytes by what takes them, at the moment when they are most.
        flops_per_token: of products, forward and backward.
        bytes_per_token: read from and written to memory, the update included.
        wire_per_token: bytes received, by what they are for: see `wire_bytes_per_token`.
        seconds: of an update by what bounds them, one after the other.
    """

    recipe: Recipe
    layout: Layout
    device: Device
    tokens: int
    table_params: int
    dense_params: int
    memory: dict[str, int]
    flops_per_token: float
    bytes_per_token: float
    wire_per_token: dict[str, Wire]
    seconds: dict[str, float]

    @property
    def memory_bytes(self) -> int:
        """Of one device, at most."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether the device has as much memory."""
        return self.memory_bytes <= self.device.memory_bytes

    @property
    def step_seconds(self) -> float:
        """Of an update."""
        return sum(self.seconds.values())

    @property
    def tokens_per_s(self) -> float:
        """Of all processes together."""
        return self.recipe.training.batch_tokens / self.step_seconds

    @property
    def bottleneck(self) -> str:
        """What takes most of the time."""
        return max(self.seconds, key=self.seconds.__getitem__)


def layout_of(recipe: Recipe, num_processes: int, per_host: int) -> Layout:
    """How so many processes share a recipe's model.

    Args:
        recipe: a training run; its `training.columns`, `training.parallel` and `training.value_grad` count.
        num_processes: >= 1.
        per_host: processes of one host, a divisor.

    Raises:
        ValueError: they cannot share it; the message says what could be.
    """
    columns = shared_columns(recipe, num_processes, per_host)
    return Layout(num_processes, per_host, columns, recipe.training.parallel)


def trace_of(recipe: Recipe, num_processes: int) -> Trace:
    """What a micro-batch of one of several processes does.

    Raises:
        ValueError: the model cannot be built, or the processes cannot share the batch.
    """
    return trace_step(recipe, sequences_per_process(recipe, num_processes))


def make_plan(recipe: Recipe, layout: Layout, device: Device, trace: Trace) -> Plan:
    """Plans a training run.

    Args:
        recipe: the run.
        layout: its processes.
        device: each has one of these.
        trace: of this recipe, by `trace_of`.
    """
    training = recipe.training
    tokens = training.batch_tokens // layout.num_processes
    wire = wire_bytes_per_token(trace.tables, trace.dense_bytes, layout, tokens, training.micro_batches)
    update = update_operations(trace, layout, tokens, training)
    update += crossing_operations(trace, layout, tokens)
    operations = [*trace.forward, *trace.backward] * training.micro_batches + update
    return Plan(
        recipe=recipe,
        layout=layout,
        device=device,
        tokens=tokens,
        table_params=sum(table.numel for table in trace.tables),
        dense_params=trace.dense_params,
        memory=memory_needs(trace, layout, tokens, training),
        flops_per_token=sum(operation.flops for operation in operations) / tokens,
        bytes_per_token=sum(operation.num_bytes + operation.row_bytes for operation in operations) / tokens,
        wire_per_token=wire,
        seconds=_seconds(trace, update, wire, tokens, training.micro_batches, device),
    )


def memory_needs(trace: Trace, layout: Layout, tokens: int, training: TrainingConfig) -> dict[str, int]:
    """Bytes of one process by what takes them, at the end of the last forward pass or in the update, where they are most.

    Args:
        trace: of one micro-batch.
        layout: the processes.
        tokens: of one process in an update.
        training: how.
    """
    micro_batches, by_rows = training.micro_batches, training.value_grad == "rows"
    share, columns = layout.dense_share, layout.columns
    tables = sum(table.numel * table.element_bytes for table in trace.tables) / columns
    of_number, of_row = training.moment_bytes
    moments = sum(table.num_slots * (table.width / columns * of_number + of_row) for table in trace.tables)
    needs = {
        "values": tables,
        "moments of the values": moments,
        "dense weights": trace.dense_bytes * share + trace.buffer_bytes,
        "moments of the dense weights": 2 * trace.dense_bytes * share,
    }
    activations, dense_gradients, table_gradients = trace.peak(share, 1 / columns)
    if layout.num_processes > 1 and layout.parallel == "ddp":
        needs["buckets of DDP"] = trace.dense_bytes
    if layout.num_processes > 1 and layout.parallel == "fsdp":
        needs["weights gathered by FSDP"] = trace.outside_bytes + trace.block_bytes
    log = by_rows * tokens * sum(_log_bytes(table, columns) for table in trace.tables)
    in_passes: dict[str, float] = {
        "activations": activations,
        "dense gradients": dense_gradients,
        "gradients of the values": table_gradients,
        "gathered for the columns": _crossing_bytes(trace.tables, columns) * tokens / micro_batches,
        "reading log": log * (micro_batches - 1) / micro_batches,
    }
    everywhere = layout.replicas if by_rows else 1  # what replicas have read is here while a table is updated
    in_update: dict[str, float] = {
        "dense gradients": trace.dense_bytes * share,
        "gradients of the values": 0 if by_rows else tables,
        "reading log": log * everywhere,
        "reads in order": by_rows
        * max((_sorted_bytes(t, columns) * everywhere for t in trace.tables), default=0)
        * tokens,
    }
    needs |= in_update if sum(in_update.values()) > sum(in_passes.values()) else in_passes
    return {name: round(num_bytes) for name, num_bytes in needs.items() if num_bytes}


def _log_bytes(table: TableReads, columns: int) -> float:
    """Of one token of each of the processes that share the columns: slots, weights, and its columns of what came back."""
    return columns * table.reads_per_token * _READ_BYTES + table.num_memories * table.width * table.element_bytes


def _crossing_bytes(tables: Sequence[TableReads], columns: int) -> float:
    """Of one token of this process, and as many of each other one: slots and weights kept for the way back, and copies."""
    if columns == 1:
        return 0
    kept = sum(columns * table.reads_per_token * _READ_BYTES for table in tables)
    passing = (columns * t.reads_per_token // t.num_memories * 2 * 4 + 2 * t.width * t.element_bytes for t in tables)
    return kept + max(passing, default=0)


def _sorted_bytes(table: TableReads, columns: int) -> float:
    """Of one token of each of the processes that share the columns."""
    return columns * table.reads_per_token * _SORT_BYTES + table.num_memories * table.width * table.element_bytes


def update_operations(trace: Trace, layout: Layout, tokens: int, training: TrainingConfig) -> list[Operation]:
    """Clipping and Adam of one update; rows are taken to be read evenly, which touches the most."""
    dense = trace.dense_bytes * layout.dense_share * (_CLIP_ACCESSES + _ADAM_ACCESSES)
    work = [("update of the dense weights", dense, 0.0)]
    of_number, of_row = training.moment_bytes
    for table in trace.tables:
        row_bytes = table.width / layout.columns * table.element_bytes
        if training.value_grad == "rows":
            moment_bytes = table.width / layout.columns * of_number + of_row
            reads = table.reads_per_token * tokens * layout.num_processes
            touched = -table.num_slots * math.expm1(-reads / table.num_slots)
            rows = reads * row_bytes + 2 * touched * (row_bytes + moment_bytes)  # read and written
            work.append(("update of the values", reads * _SORT_TRAFFIC_BYTES, rows))
        else:
            work.append(("update of the values", table.num_slots * row_bytes * _ADAM_ACCESSES, 0.0))
    return [Operation(name, 0, round(in_order), round(rows)) for name, in_order, rows in work]


def crossing_operations(trace: Trace, layout: Layout, tokens: int) -> list[Operation]:
    """What it takes from memory to handle the reads of the other processes that share the columns, in one update.

    The rows that are read are as many bytes as without others: fewer columns of more tokens' reads.
    """
    reads = sum(table.reads_per_token for table in trace.tables) * tokens * (layout.columns - 1)
    return [Operation("reads of other processes", 0, reads * _CROSSED_BYTES, 0)] if reads else []


def _seconds(
    trace: Trace, update: list[Operation], wire: dict[str, Wire], tokens: int, micro_batches: int, device: Device
) -> dict[str, float]:
    """One operator after the other, each as long as its products or its bytes take, whichever is longer.

    Dense gradients travel while the last backward pass runs; what the tables exchange, everything waits for.
    """
    seconds: dict[str, float] = {}
    for operations, times in ((trace.forward, micro_batches), (trace.backward, micro_batches), (update, 1)):
        for operation in operations:
            compute, memory = device.compute_seconds(operation), device.memory_seconds(operation)
            bound = "products" if compute > memory else "rows of the tables" if operation.row_bytes else "memory"
            seconds[bound] = seconds.get(bound, 0.0) + max(compute, memory) * times
            wait = device.wait_seconds(operation) * times
            seconds["waiting for operators to start"] = seconds.get("waiting for operators to start", 0.0) + wait
    seconds["new memory from the system"] = device.new_seconds(sum(trace.peak())) * micro_batches
    backward = sum(max(device.compute_seconds(o), device.memory_seconds(o)) for o in trace.backward)
    seconds["columns on the wire"] = device.wire_seconds(wire["columns"].times(tokens))
    seconds["replicas on the wire"] = device.wire_seconds(wire["replicas"].times(tokens))
    seconds["dense gradients on the wire"] = max(0.0, device.wire_seconds(wire["dense"].times(tokens)) - backward)
    return {bound: time for bound, time in seconds.items() if time}
