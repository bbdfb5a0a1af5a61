"""Costs, against models that are really built and operations that are really counted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pkmem.experiments.costs import costs
from pkmem.experiments.family import Machine
from pkmem.layer.counting import count_parameters
from pkmem.lm.build import build_model
from pkmem.training.recipe import Recipe
from tiny import tiny

CHANGES = [
    {"model": {"memory_layers": []}},
    {},
    {"memory": {"gate": True, "query_norm": "layer"}},
    {"model": {"memory_layers": [0, 1], "share_values": True}},
    {"model": {"placement": "parallel"}},
    {"model": {"family": "llama"}},
    {"memory": {"keys": "flat"}},
]


def recipe_with(changes: dict) -> Recipe:
    return tiny(Path("d"), Path("o"), **changes)


def built(recipe: Recipe) -> torch.nn.Module:
    return build_model(recipe.model, recipe.memory, recipe.model.vocab_size, 0)


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_parameters_and_bytes_are_those_of_the_built_model(changes: dict) -> None:
    recipe = recipe_with(changes)
    cost, model = costs(recipe), built(recipe)
    assert {"dense_params": cost.dense_params, "memory_params": cost.memory_params} == count_parameters(model)
    values = {p.data_ptr(): p for name, p in model.named_parameters() if "values" in name}.values()
    assert cost.table_bytes == sum(p.numel() * p.element_size() for p in values)
    assert cost.moment_bytes == 2 * cost.table_bytes


def test_a_dense_gradient_is_counted_with_the_moments() -> None:
    cost = costs(recipe_with({"training": {"value_grad": "dense"}}))
    assert cost.moment_bytes == 3 * cost.table_bytes > 0


def test_less_state_is_counted() -> None:
    sizes = {kind: costs(recipe_with({"training": {"value_moments": kind}})) for kind in ("bf16", "row", "row_alone")}
    table, rows = sizes["bf16"].table_bytes, 64  # in fp32, of 32 numbers a row
    assert table == 4 * 32 * rows
    assert {kind: cost.moment_bytes for kind, cost in sizes.items()} == {
        "bf16": table,
        "row": table + 4 * rows,
        "row_alone": 4 * rows,
    }


@pytest.mark.parametrize("memory", [None, {}, {"gate": True}, {"experts": True}, {"keys": "flat"}], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_has_the_operations_torch_counts(family: str, memory: dict[str, Any] | None) -> None:
    layers = [] if memory is None else [0, 1]
    recipe = recipe_with({"model": {"memory_layers": layers, "family": family}, "memory": memory or {}})
    model, tokens = built(recipe).eval(), recipe.model.context_tokens
    model.set_attn_implementation("eager")  # as matrix products, which are counted on every device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, tokens, dtype=torch.int64))
    counts = counter.get_flop_counts()["Global"]
    attention = counts[torch.ops.aten.bmm]
    assert attention > 0
    unmasked = counter.get_total_flops() - attention / 2
    assert costs(recipe).forward_flops * tokens == pytest.approx(unmasked, rel=0.001)


def test_a_memory_adds_its_projection_selection_and_sum() -> None:
    recipe = recipe_with({"model": {"placement": "parallel"}})
    added = costs(recipe).forward_flops - costs(recipe_with({"model": {"memory_layers": []}})).forward_flops
    heads, knn, width, query, sub_keys = 2, 4, 32, 8, 8
    projection = 2 * width * heads * query
    scores = heads * 2 * 2 * sub_keys * query // 2
    assert added == projection + scores + 2 * heads * knn * width
    flat = costs(recipe_with({"model": {"placement": "parallel"}, "memory": {"keys": "flat"}})).forward_flops
    assert flat - costs(recipe).forward_flops == heads * 2 * query * (sub_keys**2 + knn - sub_keys)


def test_an_expert_reads_a_row_of_the_second_table_too() -> None:
    experts = costs(recipe_with({"memory": {"experts": True}}))
    plain = costs(recipe_with({}))
    heads, knn, width = 2, 4, 32
    assert experts.forward_flops - plain.forward_flops == 2 * heads * knn * width
    assert experts.table_bytes == 2 * plain.table_bytes


def test_a_hashed_table_reads_few_rows_and_compares_nothing() -> None:
    cost = costs(recipe_with({"model": {"memory_layers": [1]}}), {"1": "instead"})
    dense = costs(recipe_with({"model": {"memory_layers": []}}))
    width = 32
    mlp = 2 * 2 * width * 4 * width
    assert cost.forward_flops - dense.forward_flops == 2 * 8 * width + 2 * 2 * width * width - mlp
    assert cost.memory_params == 8**2 * width


def test_training_is_three_forward_passes_over_all_tokens() -> None:
    recipe = recipe_with({"training": {"num_tokens": 1300}})
    cost = costs(recipe)
    assert cost.training_flops == 3 * 1280 * cost.forward_flops
    assert cost.hours(Machine("m", 1e-12, 0.5)) == pytest.approx(2 * cost.training_flops / 3600)
