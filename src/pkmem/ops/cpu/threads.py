"""A kernel over a range of items, on torch's own threads.

After each of its operators torch's OpenMP workers wait for the next one spinning, for milliseconds: threads of our own
would have to share the cores with them. So work is handed to the very same workers, through the library that torch has
loaded. Where there is none, plain Python threads do; the kernels release the interpreter lock. Every item is computed
by one thread, so results do not depend on the number of threads.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from threading import Event
from typing import Any

import torch

_RANGES_PER_THREAD = 8  # a thread that is held up leaves its share to the others
_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_FORKED = Event()  # threads do not survive a fork, and OpenMP would wait for its own for ever


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

    parallel = None if _FORKED.is_set() else _openmp()
    if parallel is None:
        _on_python_threads(work, threads)
    else:
        _on_openmp_threads(parallel, work, threads)


def _on_openmp_threads(parallel: Any, work: Callable[[], None], threads: int) -> None:
    errors: list[BaseException] = []

    def body(_: Any) -> None:
        try:
            work()
        except BaseException as error:  # cannot cross a C function
            errors.append(error)

    parallel(_BODY(body), None, threads, 0)
    if errors:
        raise errors[0]


def _on_python_threads(work: Callable[[], None], threads: int) -> None:
    helpers = [_pool().submit(work) for _ in range(threads - 1)]
    work()
    for helper in helpers:
        if not helper.cancel():
            helper.result()


@lru_cache(maxsize=1)
def _openmp() -> Any:
    """GOMP_parallel of the OpenMP library that torch has loaded; None if it has none, or where we cannot tell."""
    maps = Path("/proc/self/maps")
    if "OpenMP" not in torch.__config__.parallel_info() or not maps.exists():
        return None
    for path in dict.fromkeys(re.findall(r"/.*/lib[gi]?omp\S*\.so\S*", maps.read_text())):
        if hasattr(library := ctypes.CDLL(path), "GOMP_parallel"):  # LLVM's and Intel's have it as well
            library.GOMP_parallel.argtypes = [_BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            library.GOMP_parallel.restype = None
            return library.GOMP_parallel
    return None


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="pkmem")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
    os.register_at_fork(after_in_child=_FORKED.set)
