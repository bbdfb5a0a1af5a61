"""Counts what a network interface receives while processes read and train a sharded memory; trial 12 runs it.

torchrun --nproc-per-node=2 -m benchmarks.reliability.count_wire INTERFACE WIDTH TOKENS PASSES BITS
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import pkmem


def main() -> None:
    """Prints bytes received in all passes, by all processes."""
    interface, (width, tokens, passes, bits) = sys.argv[1], map(int, sys.argv[2:])
    dtype = {32: torch.float32, 16: torch.bfloat16}[bits]
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    memory = pkmem.ProductKeyMemory(pkmem.MemoryConfig(dim=width, num_sub_keys=64, heads=4, knn=32)).to(dtype)
    pkmem.shard_values(memory, init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("columns",)))
    values = pkmem.RowAdam(memory)  # the table has a log of its reads instead of a dense gradient
    x = torch.randn(tokens, width, dtype=dtype)

    def passes_over(count: int) -> None:
        for _ in range(count):
            memory(x).float().square().mean().backward()
            values.zero_grad()

    passes_over(1)
    dist.barrier()
    before = _received(interface)
    passes_over(passes)
    dist.barrier()
    after = _received(interface)
    dist.barrier()  # nobody speaks before all have counted
    if dist.get_rank() == 0:
        print("received", after - before)
    dist.barrier()
    dist.destroy_process_group()


def _received(interface: str) -> int:
    return int(Path(f"/sys/class/net/{interface}/statistics/rx_bytes").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
