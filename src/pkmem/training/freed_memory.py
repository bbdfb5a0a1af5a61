"""What becomes of memory that a process has freed: it goes back to the system page by page, or waits for the next step."""

from __future__ import annotations

import ctypes
import os

_LARGEST_KEPT = 32 << 20  # bytes of one block, the most that glibc allows; tables are larger, and go back at once
_MOST_KEPT = (2 << 30) - 1
_SETTINGS = {-3: _LARGEST_KEPT, -1: _MOST_KEPT}  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of mallopt(3)


def keep_freed_memory() -> None:
    """Keeps what tensors of up to 32 MiB leave, 2 GiB at most, for those of the next step.

    By itself glibc's malloc gives much of it back, and each step of a training takes its pages from the system anew.
    What a user has told malloc stays (MALLOC_..., GLIBC_TUNABLES); another C library has no such setting.
    """
    told = [name for name in os.environ if name.startswith("MALLOC_")]
    mallopt = getattr(ctypes.CDLL(None) if os.name == "posix" else None, "mallopt", None)
    if mallopt is None or told or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    for setting, size in _SETTINGS.items():
        mallopt(setting, size)
