"""Processes that start, train a sharded memory for three steps and end; trial 11 runs it under torchrun."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import pkmem
from pkmem.training.processes import ending_together

CONFIG = pkmem.MemoryConfig(dim=32, num_sub_keys=16, heads=2, knn=4, query_dim=16)


def main() -> None:
    """Starts, trains, ends."""
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    with ending_together():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("columns",))
        memory = pkmem.ProductKeyMemory(CONFIG)
        pkmem.shard_values(memory, mesh)
        dense = torch.optim.Adam(pkmem.dense_parameters(memory), 1e-3)
        optimizer = pkmem.CombinedOptimizer(dense, pkmem.RowAdam(memory, 1e-3))
        for _ in range(3):
            memory(torch.randn(64, 32)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        dist.barrier()  # or the first to leave takes the others' connections along
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
