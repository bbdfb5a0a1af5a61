"""Trial 4: a run goes on with another number of processes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks.reliability.outcome import Outcome
from benchmarks.reliability.workers import results
from pkmem import CombinedOptimizer, MemoryConfig, ProductKeyMemory, RowAdam, dense_parameters, shard_values, tables_in
from pkmem.training.checkpoint import open_shards, save_checkpoint
from pkmem.training.named_state import load_model, load_optimizer, model_tensors, optimizer_state
from pkmem.training.shards import plan_shard
from pkmem.training.state import load_state, save_state
from pkmem.training.together import Together

WIDTH, SEQUENCES, STEPS = 16, 8, 10
MEMORY = MemoryConfig(dim=WIDTH, num_sub_keys=16, heads=2, knn=4, query_dim=8)
MESHES = {1: None, 2: (1, 2), 4: (2, 2)}  # replicas x columns


def model_and_optimizer(world: int, parallel: str) -> tuple[nn.Module, nn.Module, CombinedOptimizer]:
    """Two memories with batch norm that share a table, one of experts; in fp64, on these processes.

    Args:
        world: how many.
        parallel: `ddp` or `fsdp`, for all but the tables.
    """
    torch.manual_seed(0)
    first = ProductKeyMemory(MEMORY)
    experts = MemoryConfig(**{**MEMORY.to_dict(), "experts": True})
    model = nn.Sequential(
        nn.Linear(WIDTH, WIDTH),
        first,
        nn.Tanh(),
        ProductKeyMemory(MEMORY, values=first.values),
        ProductKeyMemory(experts),
    ).double()
    wrapped = model
    if world > 1:
        shard_values(model, init_device_mesh("cpu", MESHES[world], mesh_dim_names=("replicate", "columns")))
    if world > 1 and parallel == "fsdp":
        wrapped = fully_shard(model, ignored_params={table.weight for table in tables_in(model)})
    optimizer = CombinedOptimizer(torch.optim.AdamW(dense_parameters(model), 1e-2), RowAdam(model, 1e-2))
    if world > 1 and parallel == "ddp":
        # As `pkmem train` does: or gradients are ordered anew after the first update, and summed in another order.
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    return model, wrapped, optimizer


def train(together: Together, wrapped: nn.Module, optimizer: CombinedOptimizer, steps: range) -> None:
    """Steps on a process's share of batches that depend on the step alone."""
    share = SEQUENCES // together.size
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(SEQUENCES, 4, WIDTH, generator=generator, dtype=torch.float64)
        x = x[share * together.rank : share * (together.rank + 1)]
        (wrapped(x) - x.roll(1, -1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def save(together: Together, run: str, step: int, model: nn.Module, optimizer: CombinedOptimizer) -> None:
    tensors, others = optimizer_state(model, optimizer)
    named = {f"model.{name}": tensor for name, tensor in model_tensors(model).items()}
    named |= {f"optimizer.{name}": tensor for name, tensor in tensors.items()}
    save_checkpoint(
        Path(run),
        step,
        lambda folder: save_state(folder / "optimizer.json", others),
        plan_shard(named, together),
        keep=9,
        together=together,
    )


def start(together: Together, run: str, parallel: str) -> None:
    """Ten steps, a save; ten more, another save."""
    model, wrapped, optimizer = model_and_optimizer(together.size, parallel)
    for first in (0, STEPS):
        train(together, wrapped, optimizer, range(first, first + STEPS))
        save(together, run, first + STEPS, model, optimizer)


def go_on(together: Together, run: str, saved: str, parallel: str) -> None:
    """Loads the first save, saves it again at once, and after ten more steps."""
    checkpoint = Path(saved) / "checkpoints" / f"step-{STEPS}"
    model, wrapped, optimizer = model_and_optimizer(together.size, parallel)
    load_model(model, open_shards(checkpoint))
    load_optimizer(model, optimizer, open_shards(checkpoint), load_state(checkpoint / "optimizer.json"))
    save(together, run, STEPS, model, optimizer)
    train(together, wrapped, optimizer, range(STEPS, 2 * STEPS))
    save(together, run, 2 * STEPS, model, optimizer)


def tensors_in(run: Path, step: int) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whole."""
    shards = open_shards(run / "checkpoints" / f"step-{step}")
    read = {name: torch.empty(shape, dtype=shards.dtype(name)) for name, shape in shards.shapes.items()}
    shards.read_into(read)
    return read


def other_numbers_of_processes(short: bool) -> Iterator[Outcome]:
    """Each kind of change, once."""
    with tempfile.TemporaryDirectory() as place:
        changes = [(1, 2, "ddp"), (2, 2, "fsdp"), (2, 1, "fsdp")]
        if not short:
            changes = [(1, 1, "ddp"), (2, 2, "ddp"), (4, 4, "ddp"), (2, 1, "ddp"), (1, 4, "ddp"), (4, 2, "ddp")]
            changes += [(2, 2, "fsdp"), (2, 1, "fsdp"), (4, 2, "fsdp")]
        for before, after, parallel in changes:
            run, saved = Path(place) / f"{before}-to-{after}-{parallel}", Path(place) / f"of-{before}-{parallel}"
            if not saved.exists():
                results(before, start, str(saved), parallel)
            results(after, go_on, str(run), str(saved), parallel)
            loaded, was = tensors_in(run, STEPS), tensors_in(saved, STEPS)
            same = loaded.keys() == was.keys() and all(torch.equal(loaded[name], was[name]) for name in was)
            end, straight = tensors_in(run, 2 * STEPS), tensors_in(saved, 2 * STEPS)
            apart = max(
                (end[name] - straight[name]).abs().max().item() for name in straight if name.startswith("model.")
            )
            yield Outcome(
                4,
                f"a run of {before} goes on with {after} processes ({'FSDP2' if parallel == 'fsdp' else 'DDP'})",
                "the state loaded is bit-exact; ten steps later "
                + ("so are the weights" if before == after else "weights are within 1e-6 of the undisturbed run's"),
                f"{'bit-exact' if same else 'ANOTHER STATE'}; ten steps later {'bit-exact' if apart == 0 else f'{apart:.0e} apart'}",
                same and (apart == 0 if before == after else apart <= 1e-6),
            )
