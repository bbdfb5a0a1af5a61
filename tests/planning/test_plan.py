"""Needs and time of a run, against what can be counted by hand; trial 3 of the reliability page has what processes take."""

from dataclasses import replace

import pytest

from pkmem.layer.config import MemoryConfig
from pkmem.lm.config import ModelConfig
from pkmem.planning.devices import read_devices
from pkmem.planning.plan import Plan, layout_of, make_plan, trace_of, update_operations
from pkmem.planning.wire import Layout
from pkmem.training.recipe import Recipe, TrainingConfig

SMALL = Recipe(
    model=ModelConfig("llama", 2, 256, 4, context_tokens=128, vocab_size=4096, memory_layers=[1]),
    memory=MemoryConfig(num_sub_keys=256, heads=2, knn=16, query_dim=64),
    training=TrainingConfig(batch_tokens=2048),
)


def planned(recipe: Recipe, processes: int = 1, per_host: int = 1, device: str = "H200") -> Plan:
    layout = layout_of(recipe, processes, per_host)
    return make_plan(recipe, layout, read_devices()[device], trace_of(recipe, processes))


def training(recipe: Recipe, **changes: object) -> Recipe:
    return replace(recipe, training=replace(recipe.training, **changes))


def test_columns_and_fsdp_divide_what_they_divide() -> None:
    alone, ddp, fsdp = (
        planned(training(SMALL, parallel=parallel), processes, processes)
        for processes, parallel in ((1, "ddp"), (4, "ddp"), (4, "fsdp"))
    )
    tables = ("values", "moments of the values")
    assert [ddp.memory[name] for name in tables] == [alone.memory[name] / 4 for name in tables]
    dense = "moments of the dense weights"
    assert ddp.memory[dense] == alone.memory[dense] == 4 * fsdp.memory[dense]
    assert ddp.layout == Layout(4, 4, 4)
    assert ddp.flops_per_token == pytest.approx(alone.flops_per_token, rel=0.001)


def test_the_reading_log_waits_for_the_update() -> None:
    plan = planned(training(SMALL, batch_tokens=8192, micro_batches=4))
    tokens, reads, width = 2048, 32, 256
    assert plan.memory["reading log"] == 3 * tokens * (reads * (8 + 4) + width * 4)
    many = planned(training(SMALL, batch_tokens=32 * 2048, micro_batches=32)).memory
    assert many["reading log"] == 32 * tokens * (reads * (8 + 4) + width * 4)
    assert many["reads in order"] > many["reading log"]  # the update takes more than a pass
    assert "activations" not in many


def test_the_gradient_of_a_dense_table_is_held_beside_its_moments() -> None:
    by_rows, dense = (planned(training(SMALL, value_grad=kind, micro_batches=2)) for kind in ("rows", "dense"))
    assert "gradients of the values" not in by_rows.memory
    assert dense.memory["gradients of the values"] == dense.memory["values"] == by_rows.memory["values"]
    assert planned(training(SMALL, value_grad="dense"), 2, 2).layout.columns == 1  # DDP holds it whole


@pytest.mark.parametrize(
    ("value_moments", "of_number", "of_row"),
    [("fp32", 8, 0), ("bf16", 4, 0), ("row", 4, 4), ("row_alone", 0, 4), ("row_adagrad", 0, 4)],
)
def test_less_state_takes_less_memory_and_fewer_bytes_of_an_update(value_moments, of_number, of_row) -> None:
    recipe = training(SMALL, value_moments=value_moments)
    plan, (slots, width) = planned(recipe), (256**2, 256)
    assert plan.memory["moments of the values"] == slots * (width * of_number + of_row)
    update = update_operations(trace_of(recipe, 1), Layout(), 2048, recipe.training)[1]
    full = update_operations(trace_of(SMALL, 1), Layout(), 2048, SMALL.training)[1]
    touched = slots * (1 - (1 - 1 / slots) ** (2048 * 32))
    saved = 2 * touched * (width * (8 - of_number) - of_row)
    assert full.row_bytes - update.row_bytes == pytest.approx(saved, rel=1e-3)


def test_an_update_touches_no_more_rows_than_there_are() -> None:
    few = replace(SMALL, memory=replace(SMALL.memory, num_sub_keys=16))
    reads, width = 2048 * 32, 256
    rows = {}
    for recipe in (few, SMALL):
        trace = trace_of(recipe, 1)
        update = update_operations(trace, Layout(), 2048, recipe.training)[1]
        rows[recipe.memory.num_sub_keys] = update.row_bytes / (width * 4) - reads
    assert rows[16] == pytest.approx(6 * 16**2)  # each read and written with its moments
    assert rows[256] == pytest.approx(6 * 65536 * (1 - (1 - 1 / 65536) ** reads), rel=1e-3)


def test_time_is_the_longer_of_products_and_bytes_operator_by_operator() -> None:
    trace = trace_of(SMALL, 1)
    h200 = read_devices()["H200"]
    plan = make_plan(SMALL, Layout(), h200, trace)
    operations = [*trace.forward, *trace.backward]
    flops, num_bytes = sum(op.flops for op in operations), sum(op.num_bytes + op.row_bytes for op in operations)
    assert plan.step_seconds > max(flops / 67e12, num_bytes / 4.8e12)
    assert set(plan.seconds) == {"products", "memory", "rows of the tables"}
    twice = replace(h200, memory_gb_per_s=9600, tflops={"fp32": 134, "bf16": 1978})
    assert make_plan(SMALL, Layout(), twice, trace).step_seconds == pytest.approx(plan.step_seconds / 2)


def test_dense_gradients_travel_while_the_last_backward_pass_runs() -> None:
    trace, layout = trace_of(SMALL, 2), layout_of(SMALL, 2, 1)
    slow, fast = (replace(read_devices()["H200"], network_gb_per_s=rate) for rate in (0.01, 1e6))
    gradients = trace.dense_bytes / 0.01e9
    made = make_plan(SMALL, layout, slow, trace)
    assert (
        0 < gradients - made.seconds["dense gradients on the wire"] < made.seconds["products"] + made.seconds["memory"]
    )
    assert "dense gradients on the wire" not in make_plan(SMALL, layout, fast, trace).seconds


def test_a_width_that_the_columns_do_not_divide_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"training.columns is 3 but must divide the tables' width 256 and the 3 processes: try 1"
    ):
        layout_of(training(SMALL, columns=3), 3, 3)
