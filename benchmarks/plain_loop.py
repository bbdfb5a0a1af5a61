"""The training loop that `pkmem plan` is compared with: a recipe's model and optimizer in a plain loop, on any processes."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

from pkmem import undrawn_tables
from pkmem.layer.optim import dense_parameters
from pkmem.layer.sharding import shard_values
from pkmem.lm.build import build_model
from pkmem.training.parallel import split_dense_part, table_mesh
from pkmem.training.recipe import Recipe
from pkmem.training.trainer import build_optimizer


class PlainLoop:
    """One update of a recipe's model when called, on tokens drawn at random.

    Args:
        recipe: the run.
        processes: that train it, this one among them.
    """

    def __init__(self, recipe: Recipe, processes: int) -> None:
        mesh = table_mesh(recipe, processes, torch.device("cpu"))
        with contextlib.nullcontext() if mesh is None else undrawn_tables():
            self.model = build_model(recipe.model, recipe.memory, recipe.model.vocab_size, 0).train()
        if mesh is not None:
            shard_values(self.model, mesh)
        self.forward: Any = self.model
        if processes > 1 and recipe.training.parallel == "fsdp":
            split_dense_part(self.model)
        elif processes > 1:
            self.forward = nn.parallel.DistributedDataParallel(self.model)
        self.optimizer = build_optimizer(self.model, recipe.training)
        self.micro_batches = recipe.training.micro_batches
        sequences = recipe.micro_batch_sequences // processes
        self.ids = torch.randint(recipe.model.vocab_size, (sequences, recipe.model.context_tokens))

    def __call__(self) -> None:
        """Forward and backward passes, clipping, update."""
        for number in range(self.micro_batches):
            is_before_last = number < self.micro_batches - 1
            waits = is_before_last and isinstance(self.forward, nn.parallel.DistributedDataParallel)
            with self.forward.no_sync() if waits else contextlib.nullcontext():
                self.forward(input_ids=self.ids, labels=self.ids).loss.backward()
        nn.utils.clip_grad_norm_(dense_parameters(self.model), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
