"""Processes of one group that a trial starts, each forked from one that has torch imported already."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pkmem.files.documents import load_json, save_json
from pkmem.training.together import Together


@contextmanager
def started(world: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """Processes that run `work(together, *arguments)`; those that are left at the end are killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "pkmem.training.run"])  # seconds, once
    with tempfile.TemporaryDirectory() as folder:
        given = [(rank, world, folder, work, arguments) for rank in range(world)]
        processes = [context.Process(target=_in_a_process, args=args, daemon=True) for args in given]
        for process in processes:
            process.start()
        try:
            yield processes, Path(folder)
        finally:
            for process in processes:
                process.kill()
                process.join()


def results(world: int, work: Callable[..., Any], *arguments: Any, seconds: float = 300) -> list[Any]:
    """What `work(together, *arguments)` returns in each process, fit for JSON.

    Raises:
        RuntimeError: one of them failed, or they took longer than this.
    """
    with started(world, work, *arguments) as (processes, folder):
        join(processes, seconds)
        codes = [process.exitcode for process in processes]
        if codes != [0] * world:
            raise RuntimeError(f"the processes ended with {codes}")
        return [load_json(folder / f"{rank}.json") for rank in range(world)]


def join(processes: Sequence[BaseProcess], seconds: float) -> None:
    """Waits for processes, so long in all at most."""
    for process in processes:
        process.join(seconds)


def _in_a_process(rank: int, world: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    together = Together()
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
        together = Together(dist.new_group(backend="gloo"))
    save_json(Path(folder) / f"{rank}.json", work(together, *arguments))
    if world > 1:
        dist.barrier()  # or the first to leave takes the others' connections along
        dist.destroy_process_group()
