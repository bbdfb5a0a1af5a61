"""What a test runs in a process of its own: some steps of a recipe, and the memory that they took at most.

PYTEST_DONT_REWRITE: run as a program, `python trained_alone.py RECIPE.yaml`; Linux only.
"""

import ctypes
import gc
import sys
from dataclasses import replace
from pathlib import Path

import torch

from pkmem.layer.optim import dense_parameters
from pkmem.lm.build import build_model
from pkmem.training.reading import read_recipe, read_yaml
from pkmem.training.recipe import Recipe
from pkmem.training.trainer import build_optimizer


def train(recipe: Recipe, steps: int) -> None:
    """Steps as the trainer does them."""
    model = build_model(recipe.model, recipe.memory, recipe.model.vocab_size, 0).train()
    optimizer = build_optimizer(model, recipe.training)
    ids = torch.randint(recipe.model.vocab_size, (recipe.micro_batch_sequences, recipe.model.context_tokens))
    for _ in range(steps):
        for _ in range(recipe.training.micro_batches):
            model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(dense_parameters(model), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def resident_bytes(line: str) -> int:
    """A line of the kernel's status of this process: VmRSS now, VmHWM at most."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.split(f"{line}:")[1].split()[0])


def main() -> None:
    """Prints the bytes."""
    torch.set_num_threads(1)
    recipe = read_recipe(read_yaml(Path(sys.argv[1])))
    train(replace(recipe, memory=replace(recipe.memory, num_sub_keys=recipe.memory.knn)), 1)  # libraries and kernels
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free is the system's again
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the most is from now on
    train(recipe, 3)
    print(resident_bytes("VmHWM") - before)


if __name__ == "__main__":
    main()
