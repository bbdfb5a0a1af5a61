"""What a test runs in processes of their own: training of one model by RowAdam under DistributedDataParallel.

PYTEST_DONT_REWRITE: the tests import it, and it asserts nothing.
"""

import multiprocessing
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pkmem import CombinedOptimizer, MemoryConfig, ProductKeyMemory, RowAdam
from pkmem.layer.optim import dense_parameters

CONFIG = MemoryConfig(dim=8, num_sub_keys=8, heads=2, knn=3, query_dim=4, query_norm="layer")


def trained(wrapped: Callable[[nn.Module], nn.Module], share: int | slice) -> dict[str, Tensor]:
    """The weights after three steps on one share, or on all, of the same batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), ProductKeyMemory(CONFIG)).double()
    parallel = wrapped(model)
    optimizer = CombinedOptimizer(torch.optim.Adam(dense_parameters(model), 1e-2), RowAdam(model, 1e-2))
    for x in torch.randn(3, 2, 5, 8, dtype=torch.float64)[:, share]:
        parallel(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def train_together(rank: int, folder: str) -> None:
    """Two processes, each with its share of every batch."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save(trained(nn.parallel.DistributedDataParallel, rank), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def _in_a_process(rank: int, world: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    torch.save(work(*arguments), f"{folder}/{rank}.pt")
    dist.barrier()  # or the first to leave takes the others' connections along
    dist.destroy_process_group()


def together(world: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(*arguments)` returns in each of several processes of one group."""
    multiprocessing.set_forkserver_preload(["torch", "pkmem.layer.sharding"])  # seconds, once
    with tempfile.TemporaryDirectory() as folder:
        given = (world, folder, work, arguments)
        torch.multiprocessing.start_processes(_in_a_process, given, world, start_method="forkserver")
        return [torch.load(f"{folder}/{rank}.pt") for rank in range(world)]
