"""States to save whose numbers say of which step they are."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from pkmem.training.checkpoint import open_shards

WIDTH = 64


def state_of(step: int, world: int, rows: int = 4096) -> dict[str, Tensor]:
    """A table in columns, its moments and what all processes hold alike: every number is the step."""
    tensors: dict[str, Tensor] = {"step": torch.tensor(float(step)), "bias": torch.full((WIDTH,), float(step))}
    for name in ("table", "exp_avg", "exp_avg_sq"):
        local = torch.full((rows, WIDTH // world), float(step))
        tensors[name] = local
        if world > 1:
            mesh = DeviceMesh("cpu", torch.arange(world), mesh_dim_names=("columns",))
            tensors[name] = DTensor.from_local(local, mesh, [Shard(1)], run_check=False)
    return tensors


def steps_in(path: Path) -> set[float]:
    """The numbers that stand in a checkpoint."""
    shards = open_shards(path)
    read = {name: torch.empty(shape) for name, shape in shards.shapes.items()}
    shards.read_into(read)
    return {number for tensor in read.values() for number in (tensor.min().item(), tensor.max().item())}
