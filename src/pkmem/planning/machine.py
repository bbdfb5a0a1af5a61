"""This machine as a device, measured in a few seconds at the sizes of a run.

A processor has no one rate: that of a matrix product depends on its shape, that of a stream on the cache it fits into.
So every operator of the run is run here by itself on tensors of its own shapes, as far as it is small enough; those that
are not are reckoned with the rates of the largest that are. Beside its operators a step takes time for calling them, and
for the memory that it gives back after each backward pass and gets anew from the system.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from pkmem import ops
from pkmem.layer.optim import RowAdam
from pkmem.layer.values import ValueTable
from pkmem.planning.link import link_bytes_per_s
from pkmem.planning.trace import Blank, Operation
from pkmem.planning.wire import TableReads, Wire

_MOST_FLOPS = 4e9
_MOST_BYTES = 1 << 28
_MOST_READS = 1 << 18
_PATIENCE_SECONDS = 0.02  # of an operator


@dataclass(frozen=True)
class ThisMachine:
    """What `Device` says, by measurements.

    Attributes:
        name: of the machine.
        memory_bytes: of the machine.
        operators: seconds of each operator measured, by its call.
        flops_per_s: of larger products, by bytes of a number.
        bytes_per_s: of larger operators that multiply nothing.
        row_bytes_per_s: of rows read at random.
        update_bytes_per_s: of rows sorted, read and updated.
        call_seconds: that torch takes around an operator.
        new_bytes_per_s: of memory that the system hands out.
        link_bytes_per_s: between its processes.
    """

    name: str
    memory_bytes: float
    operators: dict[str, float]
    flops_per_s: dict[int, float]
    bytes_per_s: float
    row_bytes_per_s: float
    update_bytes_per_s: float
    call_seconds: float
    new_bytes_per_s: float
    link_bytes_per_s: float

    def compute_seconds(self, operation: Operation) -> float:
        """See `Device.compute_seconds`."""
        if not operation.flops or operation.row_bytes:
            return 0.0
        known = self.operators.get(repr(operation.call))
        return known or operation.flops / self.flops_per_s[min(4, operation.dtype.itemsize)]

    def memory_seconds(self, operation: Operation) -> float:
        """See `Device.memory_seconds`."""
        if operation.name == "update of the values":
            return (operation.num_bytes + operation.row_bytes) / self.update_bytes_per_s
        if operation.row_bytes:
            return operation.row_bytes / self.row_bytes_per_s
        known = self.operators.get(repr(operation.call)) if operation.call else None
        if known is not None:
            return 0.0 if operation.flops else known  # its products are all of it
        return operation.num_bytes / self.bytes_per_s

    def wait_seconds(self, operation: Operation) -> float:
        """See `Device.wait_seconds`: a processor calls its operators one after the other."""
        return self.call_seconds

    def new_seconds(self, num_bytes: float) -> float:
        """See `Device.new_seconds`."""
        return num_bytes / self.new_bytes_per_s

    def wire_seconds(self, wire: Wire) -> float:
        """See `Device.wire_seconds`; all processes are on this machine."""
        return (wire.inside + wire.between) / self.link_bytes_per_s


def measure(
    operations: Iterable[Operation], tables: Iterable[TableReads], memory_bytes: float, has_others: bool = False
) -> ThisMachine:
    """Measures this machine at the sizes of a run, on as many threads as torch has.

    Args:
        operations: of the run.
        tables: of the run.
        memory_bytes: of the machine, for one process.
        has_others: whether other processes of the run are on it, so that what they exchange is measured, too.
    """
    bare = _bare_call_seconds()
    operators: dict[str, float] = {}
    small = [o for o in operations if o.call and o.num_bytes <= _MOST_BYTES and o.flops <= _MOST_FLOPS]
    for operation in small:
        key = repr(operation.call)
        if key not in operators:
            with contextlib.suppress(RuntimeError):  # torch's account without numbers has a dtype wrong here and there
                operators[key] = max(0.0, _seconds_of(operation.call) - bare)
    streamed = torch.ones(_MOST_BYTES // 16)
    in_place = _seconds(lambda: streamed.mul_(1.0))
    anew = _seconds(lambda: torch.empty_like(streamed).fill_(0.0)) - _seconds(lambda: streamed.fill_(0.0))
    rates = [_row_rates(table) for table in tables] or [(1.0, 1.0)]
    return ThisMachine(
        name="this",
        memory_bytes=memory_bytes,
        operators=operators,
        flops_per_s={size: _product_rate(dtype) for size, dtype in ((4, torch.float32), (2, torch.bfloat16))},
        bytes_per_s=2 * streamed.nbytes / in_place,
        row_bytes_per_s=min(read for read, _ in rates),
        update_bytes_per_s=min(update for _, update in rates),
        call_seconds=_call_seconds(),
        new_bytes_per_s=streamed.nbytes / max(1e-9, anew),
        link_bytes_per_s=link_bytes_per_s() if has_others else math.inf,
    )


@torch.no_grad()
def _seconds_of(call: Any) -> float:
    func, *given = call
    args, kwargs = tree_map_only(Blank, _filled, given, is_leaf=lambda leaf: isinstance(leaf, Blank))
    return _seconds(lambda: func(*args, **kwargs))


def _filled(blank: Blank) -> Tensor:
    """Numbers of no meaning; those that point somewhere point to the first place."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(blank.shape, blank.stride, strict=True))
    memory = torch.zeros(max(0, extent), dtype=blank.dtype)
    return (memory.normal_() if blank.dtype.is_floating_point else memory).as_strided(blank.shape, blank.stride)


def _product_rate(dtype: torch.dtype, width: int = 768) -> float:
    x = torch.randn(width, width, dtype=dtype)
    return 2 * width**3 / _seconds(lambda: x @ x)


def _row_rates(reads: TableReads) -> tuple[float, float]:
    """Bytes a second of a table's rows while they are read, and while they are updated."""
    num_slots = max(1, min(reads.num_slots, _MOST_BYTES // (4 * reads.width)))
    read_per_token = reads.reads_per_token // reads.num_memories
    table = ValueTable(num_slots, reads.width)
    slots = torch.randint(num_slots, (_MOST_READS // read_per_token, 1, read_per_token))
    weights = torch.rand(slots.shape)
    row_bytes = 4 * reads.width
    with torch.no_grad():
        seconds = _seconds(lambda: ops.weighted_sum(table.weight, slots.flatten(1), weights.flatten(1)))
    optimizer = RowAdam(table)
    taken = []
    for _ in range(4):
        table(slots, weights).sum().backward()
        taken.append(_seconds_once(optimizer.step))
    touched = len(slots.unique())
    work = slots.numel() * (120 + row_bytes) + 6 * touched * row_bytes
    return slots.numel() * row_bytes / seconds, work / min(taken)


def _bare_call_seconds() -> float:
    """Of an operator with nothing to do, when it is called as those above are."""
    x = torch.ones(1)
    return _seconds(lambda: torch.ops.aten.mul.Tensor(x, x))


def _call_seconds(length: int = 200) -> float:
    """Of an operator with nothing to do, when a gradient is wanted: the mean of forward and backward."""
    x = torch.ones(1, requires_grad=True)

    def chain() -> None:
        y = x
        for _ in range(length):
            y = y * 1.5
        y.backward()

    return _seconds(chain) / (2 * length)


def _seconds(run: Callable[[], Any]) -> float:
    """The shortest of at least four runs, and more of what is short: others on the machine can only make one longer."""
    taken = [_seconds_once(run)]
    while len(taken) < 4 or (sum(taken) < _PATIENCE_SECONDS and len(taken) < 50):
        taken.append(_seconds_once(run))
    return min(taken)


def _seconds_once(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
