"""What a recipe costs before it is run: parameters, floating-point operations, bytes, hours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pkmem.experiments.family import Machine
from pkmem.experiments.hashed_table import Hashed, HashedTable, put_hashed_tables
from pkmem.layer.config import MemoryConfig
from pkmem.layer.counting import count_parameters
from pkmem.layer.keys import FlatKeys
from pkmem.layer.memory import ProductKeyMemory, memories_in
from pkmem.layer.values import tables_in
from pkmem.lm.build import build_model
from pkmem.training.recipe import Recipe

_FP32_BYTES = 4


@dataclass(frozen=True)
class Costs:
    """What a recipe costs.

    Args:
        dense_params: parameters outside the value tables.
        memory_params: parameters in the value tables.
        forward_flops: operations of one token's forward pass, a multiplication and an addition counted as two.
        training_flops: operations of the whole training, forward and backward.
        table_bytes: of the value tables in fp32.
        moment_bytes: of the two Adam moments of the value tables, and of their gradient where it is dense.
    """

    dense_params: int
    memory_params: int
    forward_flops: int
    training_flops: int
    table_bytes: int
    moment_bytes: int

    def hours(self, machine: Machine) -> float:
        """Hours of one such processor or GPU, by the operations alone: a wait for memory is in its utilisation."""
        return self.training_flops / (machine.peak_tflops * 1e12 * machine.utilisation) / 3600


def costs(recipe: Recipe, hashed: Hashed | None = None) -> Costs:
    """The costs of a recipe, from its model built without memory for its weights.

    The backward pass counts twice the forward one. Attention counts the half of the scores that is causal.

    Args:
        recipe: a training run; its vocabulary is taken to be full.
        hashed: of which blocks the memory is a table read by a hash.

    Raises:
        ValueError: the model cannot be built.
    """
    with torch.device("meta"):
        model = build_model(recipe.model, recipe.memory, recipe.model.vocab_size, 0)
        put_hashed_tables(model, hashed or {})
    counts = count_parameters(model)
    forward = _forward_flops(model, recipe)
    table_bytes = _FP32_BYTES * sum(table.weight.numel() for table in tables_in(model))
    of_number, of_row = recipe.training.moment_bytes
    moments = sum(table.weight.numel() * of_number + len(table.weight) * of_row for table in tables_in(model))
    gradient = table_bytes if recipe.training.value_grad == "dense" else 0
    return Costs(
        **counts,
        forward_flops=forward,
        training_flops=3 * forward * recipe.training.num_steps * recipe.training.batch_tokens,
        table_bytes=table_bytes,
        moment_bytes=moments + gradient,
    )


def _forward_flops(model: nn.Module, recipe: Recipe) -> int:
    matrices = sum(
        2 * part.weight.numel() for part in model.modules() if isinstance(part, nn.Linear | Conv1D)
    )  # the head of the vocabulary too, which is a Linear where it shares the embedding's weights as well
    attention = recipe.model.num_layers * 2 * recipe.model.width * recipe.model.context_tokens
    hashed = sum(part.read_flops for part in model.modules() if isinstance(part, HashedTable))
    return matrices + attention + hashed + sum(_read_flops(memory) for memory in memories_in(model).values())


def _read_flops(memory: ProductKeyMemory) -> int:
    """Selection and weighted sum of one token: the products that `pkmem.ops.flops` counts."""
    config: MemoryConfig = memory.config
    if isinstance(memory.keys, FlatKeys):
        selection = 2 * (config.num_slots + config.knn) * config.query_dim  # the chosen once more, with a gradient
    else:
        selection = 2 * config.num_sub_keys * config.query_dim
    row = config.value_width + config.experts * config.bound_dim
    return config.heads * (selection + 2 * config.knn * row)
