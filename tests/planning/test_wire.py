"""Bytes on the wire, against an account of every message between every two processes."""

import pytest

from pkmem.planning.wire import (
    Layout,
    TableReads,
    Wire,
    column_bytes_per_token,
    dense_bytes_per_step,
    replica_bytes_per_step,
    wire_bytes_per_token,
)

LAYOUTS = [(1, 1, 1), (2, 2, 2), (4, 4, 2), (4, 2, 2), (4, 2, 4), (8, 4, 2), (8, 4, 4), (8, 2, 4), (8, 8, 1)]
TABLE = TableReads(num_slots=100_000, width=16, reads_per_token=6, num_memories=2, element_bytes=2)


def received(layout: Layout, table: TableReads, tokens: int) -> dict[str, list[float]]:
    """Bytes that the first process gets in an update, inside its host and from others, message by message."""
    counts = {"columns": [0.0, 0.0], "replicas": [0.0, 0.0]}
    part = table.width // layout.columns
    for other in range(1, layout.num_processes):
        away = other // layout.per_host != 0
        if other // layout.columns == 0:  # mesh ("replicate", "columns"): neighbours share columns
            for _ in range(tokens):
                slots = weights = gradients_of_weights = 4 * table.reads_per_token
                outputs = gradients_back = table.num_memories * part * table.element_bytes
                counts["columns"][away] += slots + weights + outputs + gradients_back + gradients_of_weights
        if other % layout.columns == 0:
            for _ in range(tokens * layout.columns):
                back = table.num_memories * part * table.element_bytes
                counts["replicas"][away] += 8 * table.reads_per_token + back
    return counts


@pytest.mark.parametrize("shape", LAYOUTS, ids=str)
def test_what_tables_exchange_is_what_every_message_takes(shape: tuple[int, int, int]) -> None:
    layout, tokens = Layout(*shape), 5
    wire = wire_bytes_per_token([TABLE], 0, layout, tokens)
    for what, (inside, between) in received(layout, TABLE, tokens).items():
        assert wire[what].inside * tokens == pytest.approx(inside), what
        assert wire[what].between * tokens == pytest.approx(between), what


def test_two_tables_take_what_each_takes() -> None:
    layout = Layout(4, 2, 2)
    both = wire_bytes_per_token([TABLE, TABLE], 0, layout, 5)
    once = wire_bytes_per_token([TABLE], 0, layout, 5)
    assert both["columns"] == once["columns"].times(2)
    assert both["replicas"] == once["replicas"].times(2)


def test_replicas_add_up_dense_gradients_where_a_table_is_small() -> None:
    layout = Layout(4, 4, 1)
    small = TableReads(num_slots=4, width=16, reads_per_token=6)
    assert replica_bytes_per_step(small, layout, tokens=1000) == 2 * 3 / 4 * 4 * 16 * 4


def test_one_process_receives_nothing() -> None:
    assert set(wire_bytes_per_token([TABLE], 1000, Layout(), 5).values()) == {Wire(0, 0)}
    assert column_bytes_per_token(TABLE, 1) == 0


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_an_all_reduce_on_one_host_is_a_rings(processes: int) -> None:
    ring = sum(2 * 1200 / processes for _ in range(processes - 1))  # a part in each turn, there and back
    wire = dense_bytes_per_step(1200, Layout(processes, processes), micro_batches=3)
    assert wire == pytest.approx((ring, 0))


def test_fsdp_gathers_twice_and_scatters_once_in_each_micro_batch() -> None:
    layout = Layout(4, 4, 1, "fsdp")
    once = 1200 * 3 / 4
    assert dense_bytes_per_step(1200, layout, micro_batches=2).inside == pytest.approx(2 * 3 * once)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_processes": 0}, "num_processes is 0"),
        ({"num_processes": 6, "per_host": 4}, "processes of a host is 4 but must be a divisor of the 6 processes"),
        ({"num_processes": 6, "columns": 4}, r"training.columns is 4 but must be a divisor of the 6"),
    ],
)
def test_processes_that_do_not_divide_are_refused(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(**given)
