"""How fast two processes of this machine exchange bytes: a file of its own, since each of them imports it."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

_BYTES = 8 << 20
_TIMES = 10


def link_bytes_per_s() -> float:
    """Bytes a second that one of two processes receives from the other while it sends as many, at best."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_exchange, (folder,), nprocs=2, start_method="spawn")
        return _BYTES / float(Path(folder, "seconds").read_text(encoding="utf-8"))


def _exchange(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    sent = torch.ones(2 * _BYTES // 4)
    received, taken = torch.empty_like(sent), []
    for _ in range(_TIMES):
        start = time.perf_counter()
        dist.all_to_all_single(received, sent)
        taken.append(time.perf_counter() - start)
    if rank == 0:
        Path(folder, "seconds").write_text(str(min(taken)), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()
