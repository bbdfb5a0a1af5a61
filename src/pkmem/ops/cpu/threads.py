"""A kernel over a range of items, on as many threads as torch uses.

Plain Python threads: the kernels release the interpreter lock. Next to numba's own layers that is safe to call
from several threads, leaves torch's settings alone, survives a busy machine (OpenMP's barriers spin), and costs
about 30 us a launch. Every item is computed by one thread, so results do not depend on the number of threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch

_RANGES_PER_THREAD = 8  # a thread that is held up leaves its share to the others


def run_over(kernel: Callable[..., Any], arguments: tuple[Any, ...], size: int, grain: int) -> None:
    """Calls `kernel(*arguments, first, last)` on ranges that cover [0, size).

    Args:
        kernel: compiled, releases the interpreter lock, writes nothing that two ranges share.
        arguments: its leading arguments.
        size: number of items.
        grain: items that are worth a launch, some 50 us of work.
    """
    threads = min(torch.get_num_threads(), size // grain)
    if threads <= 1:
        kernel(*arguments, 0, size)
        return
    step = max(grain // 2, -(-size // (threads * _RANGES_PER_THREAD)))
    firsts = iter(range(0, size, step))

    def work() -> None:
        for first in firsts:
            kernel(*arguments, first, min(first + step, size))

    helpers = [_pool().submit(work) for _ in range(threads - 1)]
    work()
    for helper in helpers:
        if not helper.cancel():
            helper.result()


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="pkmem")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
