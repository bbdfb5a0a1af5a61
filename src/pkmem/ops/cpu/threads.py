"""A kernel over a range of items, on torch's own threads.

After each of its operators torch's OpenMP workers wait for the next one spinning, for milliseconds: threads of our own
would have to share the cores with them. So work is handed to the very same workers, through the library that torch has
loaded. Where there is none, plain Python threads do; the kernels release the interpreter lock. Every item is computed
by one thread, so results do not depend on the number of threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
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
    firsts = deque(range(0, size, step))  # several threads may pop from it, in a Python without the lock too

    def work() -> None:
        while True:
            try:
                first = firsts.popleft()
            except IndexError:
                return
            kernel(*arguments, first, min(first + step, size))

    if shares_torchs_threads():
        _on_openmp_threads(_openmp(), work, threads)
    else:
        _on_python_threads(work, threads)


def shares_torchs_threads() -> bool:
    """Whether kernels run on the OpenMP threads that torch uses; else on Python's."""
    return not _FORKED.is_set() and _openmp() is not None


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
    helpers: list[Future[None]] = []
    with contextlib.suppress(RuntimeError):  # the interpreter shuts down, and starts no thread: this one does it all
        helpers += (_pool().submit(work) for _ in range(threads - 1))
    work()
    for helper in helpers:
        if not helper.cancel():
            helper.result()


@lru_cache(maxsize=1)
def _openmp() -> Any:
    """GOMP_parallel of the OpenMP library that torch itself uses; None if it uses none, or where we cannot tell.

    A process may hold several: scikit-learn and others bring their own, and one may be loaded ahead of all.
    """
    for name in (None, torch._C.__file__):  # what all libraries see, then what torch was linked with
        try:
            library = ctypes.CDLL(name)
            parallel = library.GOMP_parallel  # LLVM's and Intel's have it as well
            if not _is_torchs(library):
                continue
        except (OSError, AttributeError, TypeError):
            continue
        parallel.argtypes = [_BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        parallel.restype = None
        return parallel
    return None


def _is_torchs(library: Any) -> bool:
    """Whether torch sees it when this thread's number of threads is changed in this OpenMP library."""
    wanted = torch.get_num_threads() + 1
    before = library.omp_get_max_threads()
    library.omp_set_num_threads(wanted)
    seen = torch.get_num_threads()
    library.omp_set_num_threads(before)
    return seen == wanted


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="pkmem")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
    os.register_at_fork(after_in_child=_FORKED.set)
