"""This machine as a device: every operator of a run is measured, and none takes no time."""

from pathlib import Path

import pytest
import torch

from pkmem.planning.machine import measure
from pkmem.planning.plan import make_plan, trace_of
from pkmem.planning.trace import Operation
from pkmem.planning.wire import Layout, Wire
from tiny import tiny


@pytest.mark.parametrize("changes", [{}, {"memory": {"experts": True}, "training": {"precision": "bf16"}}], ids=str)
def test_all_operators_of_a_run_are_measured(changes: dict) -> None:
    recipe = tiny(Path("d"), Path("o"), **changes)
    trace = trace_of(recipe, 1)
    operations = [*trace.forward, *trace.backward]
    machine = measure(operations, trace.tables, memory_bytes=1e9)
    called = [operation for operation in operations if operation.call]
    assert len(machine.operators) >= len({repr(operation.call) for operation in called}) - 1 > 50  # batch norm in bf16
    for operation in operations:
        times = [machine.compute_seconds(operation), machine.memory_seconds(operation), machine.wait_seconds(operation)]
        assert min(times) >= 0
        assert times[2] > 0
    plan = make_plan(recipe, Layout(), machine, trace)
    assert {"products", "memory", "rows of the tables", "waiting for operators to start"} <= set(plan.seconds)
    assert machine.wire_seconds(Wire(1, 1)) == 0  # no other processes


def test_what_is_too_large_to_measure_has_the_rate_of_a_smaller_one() -> None:
    call = (torch.ops.aten.mm.default, (), {})
    huge = Operation("aten.mm.default", 10**15, 10**12, 0, torch.float32, call)
    stream = Operation("aten.exp.default", 0, 10**12, 0, torch.float32, call)
    machine = measure([huge, stream], [], memory_bytes=1e9)
    assert not machine.operators
    assert machine.compute_seconds(huge) == 10**15 / machine.flops_per_s[4] > 1
    assert machine.memory_seconds(stream) == 10**12 / machine.bytes_per_s > 1


def test_two_processes_measure_what_they_can_exchange() -> None:
    machine = measure([], [], memory_bytes=1e9, has_others=True)
    assert 1e6 < machine.link_bytes_per_s < 1e12
