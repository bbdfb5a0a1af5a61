"""What a test runs in processes of their own: some steps of a recipe, and the memory that one of them takes at most.

PYTEST_DONT_REWRITE: run as a program, `python trained_apart.py RECIPE.yaml PROCESSES`; Linux only.
"""

import contextlib
import ctypes
import gc
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing import start_processes

from pkmem.layer.drawing import undrawn_tables
from pkmem.layer.optim import dense_parameters
from pkmem.layer.sharding import shard_values
from pkmem.lm.build import build_model
from pkmem.training.parallel import split_dense_part, table_mesh
from pkmem.training.reading import read_recipe, read_yaml
from pkmem.training.recipe import Recipe
from pkmem.training.trainer import build_optimizer


def train(recipe: Recipe, steps: int, processes: int) -> None:
    """Steps as the trainer does them."""
    mesh = table_mesh(recipe, processes, torch.device("cpu"))
    with contextlib.nullcontext() if mesh is None else undrawn_tables():
        model = build_model(recipe.model, recipe.memory, recipe.model.vocab_size, 0).train()
    if mesh is not None:
        shard_values(model, mesh)
    forward: Any = model
    if processes > 1 and recipe.training.parallel == "fsdp":
        split_dense_part(model)
    elif processes > 1:
        forward = nn.parallel.DistributedDataParallel(model)
    optimizer = build_optimizer(model, recipe.training)
    sequences, micro_batches = recipe.micro_batch_sequences // processes, recipe.training.micro_batches
    ids = torch.randint(recipe.model.vocab_size, (sequences, recipe.model.context_tokens))
    for _ in range(steps):
        for number in range(micro_batches):
            is_alone = number < micro_batches - 1 and isinstance(forward, nn.parallel.DistributedDataParallel)
            with forward.no_sync() if is_alone else contextlib.nullcontext():
                forward(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(dense_parameters(model), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def resident_bytes(line: str) -> int:
    """A line of the kernel's status of this process: VmRSS now, VmHWM at most."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.split(f"{line}:")[1].split()[0])


def train_and_tell(rank: int, recipe: Recipe, processes: int, folder: str) -> None:
    """Writes the bytes of this process."""
    torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=processes)
    few = replace(recipe, memory=replace(recipe.memory, num_sub_keys=recipe.memory.knn))
    train(few, 1, processes)  # libraries, kernels and connections
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free is the system's again
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the most is from now on
    train(recipe, 3, processes)
    Path(folder, f"{rank}").write_text(str(resident_bytes("VmHWM") - before), encoding="utf-8")
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()


def main() -> None:
    """Prints the bytes of each process."""
    recipe, processes = read_recipe(read_yaml(Path(sys.argv[1]))), int(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        start_processes(train_and_tell, (recipe, processes, folder), nprocs=processes, start_method="spawn")
        print(*(Path(folder, f"{rank}").read_text(encoding="utf-8") for rank in range(processes)))


if __name__ == "__main__":
    main()
