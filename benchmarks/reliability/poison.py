"""Training in which a number becomes NaN in one process alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from pkmem.layer.memory import ProductKeyMemory
from pkmem.layer.values import tables_in
from pkmem.training.reading import read_recipe, read_yaml
from pkmem.training.recipe import Recipe
from pkmem.training.run import train
from pkmem.training.together import Together
from pkmem.training.trainer import MemoryTrainer, NonFiniteLossError

STEP = 4  # counted from 1


def poison_loss(model: nn.Module) -> None:
    """The loss of the next forward pass is NaN."""

    def poisoned(module: nn.Module, arguments: Any, output: Any) -> Any:
        output.loss = output.loss * float("nan")
        return output

    model.register_forward_hook(poisoned)


def poison_weight(model: nn.Module) -> None:
    """One element of the gradient of one weight outside the memories is NaN; the loss is not."""
    module = next(module for name, module in model.named_modules() if "mlp" in name and hasattr(module, "weight"))

    def poisoned(module: nn.Module, arguments: Any) -> None:
        module.weight.register_hook(_with_a_nan)  # here it is whole, under FSDP2 too

    module.register_forward_pre_hook(poisoned)


def poison_memory(model: nn.Module) -> None:
    """One element of the gradient that reaches a memory is NaN, as its table will read in the reads of one token."""
    memory = next(module for module in model.modules() if isinstance(module, ProductKeyMemory))
    memory.register_forward_hook(lambda module, arguments, output: _poisoned_on_the_way_back(output))


def _poisoned_on_the_way_back(output: Tensor) -> Tensor:
    output.register_hook(_with_a_nan)
    return output


def _with_a_nan(grad: Tensor) -> Tensor:
    grad = grad.clone()
    grad.view(-1)[0] = float("nan")
    return grad


KINDS: dict[str, Callable[[nn.Module], None]] = {
    "the loss": poison_loss,
    "the gradient of one weight": poison_weight,
    "the gradient that reaches a memory": poison_memory,
}


def poisoned_runs(together: Together, recipe_file: str, folder: str, parallel: str) -> list[dict[str, Any]]:
    """Trains once for each kind of poison, in the last process alone; what each process saw of it.

    Returns:
        one for each kind: `raised` (the error, or what else happened) and `changed` (tensors that are not the bits they
        were before the poisoned step: tables, other weights, moments).
    """
    os.environ |= {"RANK": str(together.rank), "LOCAL_RANK": str(together.rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(together.size), "LOCAL_WORLD_SIZE": str(together.size)}
    recipe = read_recipe(read_yaml(Path(recipe_file)), {"training.parallel": parallel})
    poisoned_here = together.rank == together.size - 1
    return [
        {"kind": kind}
        | _poisoned_run(replace(recipe, out=Path(folder) / f"{parallel}-{number}"), poison, poisoned_here)
        for number, (kind, poison) in enumerate(KINDS.items())
    ]


def _poisoned_run(recipe: Recipe, poison: Callable[[nn.Module], None], poisoned_here: bool) -> dict[str, Any]:
    before: dict[str, Tensor] = {}
    trainers: list[MemoryTrainer] = []
    step = MemoryTrainer.training_step

    def poisoned(self: MemoryTrainer, *arguments: Any) -> Tensor:
        if self.state.global_step == STEP - 1:
            trainers.append(self)
            before.update({name: tensor.clone() for name, tensor in _tensors(self).items()})
            if poisoned_here:
                poison(self.model)
        return step(self, *arguments)

    raised = "nothing"
    with mock.patch.object(MemoryTrainer, "training_step", poisoned):
        try:
            train(recipe, progress=False)
        except NonFiniteLossError as error:
            raised = str(error)
    after = _tensors(trainers[0])
    assert tables_in(trainers[0].model)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    return {"raised": raised, "changed": changed, "tensors": len(before)}


def _tensors(trainer: MemoryTrainer) -> dict[str, Tensor]:
    """This process's part of all weights and moments."""
    tensors = {f"model.{name}": _local(p.data) for name, p in trainer.model.named_parameters()}
    for i, part in enumerate(trainer._plain_optimizer().optimizers):
        for key, state in part.state.items():
            named = {f"moments.{i}.{id(key)}.{name}": _local(x) for name, x in state.items() if isinstance(x, Tensor)}
            tensors |= named
    return tensors


def _local(tensor: Tensor) -> Tensor:
    local = getattr(tensor, "to_local", None)
    return tensor if local is None else local()
