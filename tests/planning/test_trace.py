"""A step without numbers, against the same step with them."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from meter import Meter
from pkmem.layer.optim import RowAdam
from pkmem.layer.values import tables_in
from pkmem.lm.build import build_model
from pkmem.lm.config import ModelConfig
from pkmem.planning.trace import trace_step
from pkmem.planning.wire import TableReads
from pkmem.training.recipe import Recipe
from tiny import tiny

SEQUENCES = 2


def recipe_with(**changes: dict) -> Recipe:
    changes["model"] = {"dropout": 0.0} | changes.get("model", {})
    changes["memory"] = {"query_dropout": 0.0} | changes.get("memory", {})
    return tiny(Path("d"), Path("o"), **changes)


def real_step(recipe: Recipe) -> Iterator[None]:
    """Forward and backward with numbers; what is made before does not count."""
    model = build_model(recipe.model, recipe.memory, recipe.model.vocab_size, 0).train()
    optimizer = RowAdam(tables) if (tables := tables_in(model)) and recipe.training.value_grad == "rows" else None
    ids = torch.zeros(SEQUENCES, recipe.model.context_tokens, dtype=torch.int64)
    yield
    model(input_ids=ids, labels=ids).loss.backward()
    del optimizer
    yield


CHANGES = [
    {"model": {"memory_layers": []}},
    {},
    {"memory": {"gate": True, "query_norm": "layer"}, "model": {"family": "llama"}},
    {"memory": {"experts": True}, "model": {"memory_layers": [0, 1], "share_values": True}},
    {"training": {"value_grad": "dense"}},
    {"memory": {"keys": "flat"}, "model": {"placement": "parallel"}},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_products_are_those_that_torch_counts_and_half_of_attention(changes: dict) -> None:
    recipe = recipe_with(**changes)
    step = real_step(recipe)
    next(step)
    with FlopCounterMode(display=False) as counter:  # torch's has no count for attention on a CPU
        next(step)
    trace = trace_step(recipe, SEQUENCES)
    attention = sum(op.flops for op in [*trace.forward, *trace.backward] if "attention" in op.name)
    model, tokens = recipe.model, recipe.model.context_tokens
    scores = 2 * SEQUENCES * tokens**2 * model.width  # of all heads together, forward
    assert attention == model.num_layers * (2 + 5) * scores // 2
    counted = sum(op.flops for op in [*trace.forward, *trace.backward]) - attention
    assert counted == counter.get_total_flops()


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_peak_is_that_of_the_tensors_of_a_real_step(family: str, micro_batches: int) -> None:
    recipe = recipe_with(model={"memory_layers": [], "family": family}, training={"micro_batches": micro_batches})
    steps = real_step(recipe)
    next(steps)
    with Meter() as meter:
        next(steps)
    peak = sum(trace_step(recipe, SEQUENCES).peak())
    if micro_batches == 1:
        assert peak == pytest.approx(meter.peak_bytes, rel=0.01)
    else:  # the gradients of the first micro-batch are there in the second
        assert peak > meter.peak_bytes


def test_bf16_has_smaller_activations_and_products_of_bf16() -> None:
    whole, half = (trace_step(recipe_with(training={"precision": p}), SEQUENCES) for p in ("fp32", "bf16"))
    assert half.peak()[0] < whole.peak()[0]
    assert {op.dtype for op in half.forward if op.name == "aten.mm.default"} == {torch.bfloat16}


def test_gradients_count_by_the_share_that_is_kept() -> None:
    trace = trace_step(recipe_with(training={"micro_batches": 2, "value_grad": "dense"}), SEQUENCES)
    activations, dense, tables = trace.peak()
    assert dense == pytest.approx(trace.dense_bytes, rel=0.01)
    assert tables == sum(table.numel * 4 for table in trace.tables)
    assert trace.peak(0.5, 0.25) == (activations, round(dense / 2), round(tables / 4))


def test_tables_are_told_with_who_reads_them() -> None:
    shared = recipe_with(model={"memory_layers": [0, 1], "share_values": True}, memory={"experts": True})
    neurons = TableReads(num_slots=64, width=32, reads_per_token=8)
    assert trace_step(shared, SEQUENCES).tables == [TableReads(64, 32, 16, num_memories=2), neurons, neurons]


def test_a_table_larger_than_any_machine_is_traced_without_memory() -> None:
    recipe = recipe_with(memory={"num_sub_keys": 1_000_000}, model={"width": 64})
    trace = trace_step(recipe, SEQUENCES)
    assert trace.tables[0].numel == 64 * 10**12
    # What is read of it does not depend on its size.
    reads = SEQUENCES * recipe.model.context_tokens * 8
    assert {op.row_bytes for op in trace.forward if op.row_bytes} == {reads * 64 * 4}


def test_who_only_looks_at_a_tensor_moves_no_bytes() -> None:
    trace = trace_step(recipe_with(), SEQUENCES)
    views = [op for op in trace.forward if op.name in ("aten.view.default", "aten.transpose.int")]
    assert views
    assert not [op for op in views if op.num_bytes]
    lookup = next(op for op in trace.forward if op.name == "aten.embedding.default")
    assert lookup.num_bytes == SEQUENCES * 32 * (2 * 32 * 4 + 8)  # not the whole of what it looks up in


def test_activations_computed_again_take_less_memory_and_more_products() -> None:
    recipe = tiny(Path("d"), Path("o"), model={"num_layers": 6})
    again = replace(recipe, training=replace(recipe.training, gradient_checkpointing=True))
    kept, computed = trace_step(recipe, 2), trace_step(again, 2)
    assert computed.peak()[0] < kept.peak()[0] / 2
    assert computed.peak()[1:] == kept.peak()[1:]
    products = [sum(operation.flops for operation in trace.backward) for trace in (kept, computed)]
    forward = sum(operation.flops for operation in kept.forward)
    assert products[0] + forward / 2 < products[1] <= products[0] + forward


def test_what_is_frozen_or_pretrained_is_not_planned() -> None:
    recipe = tiny(Path("d"), Path("o"))
    pretrained = Recipe(model=ModelConfig(pretrained="x"))
    for other in (pretrained, replace(recipe, training=replace(recipe.training, train="values"))):
        with pytest.raises(ValueError, match=r"leave out model\.pretrained and training\.train"):
            trace_step(other, 2)
