"""Whether a memory fits where it is to be made: asked before anything is drawn, since the allocator says so late."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

from pkmem.layer.config import MemoryConfig


def num_weights(config: MemoryConfig, shares_values: bool = False, without_tables: bool = False) -> int:
    """Elements of all that grows with a memory's config; norms and biases are small.

    Args:
        config: the memory's shape, bound to a width.
        shares_values: the table of values is there already.
        without_tables: the tables are not made yet.
    """
    dim, queries = config.bound_dim, config.heads * config.query_dim
    has_values, has_neurons = not (shares_values or without_tables), config.experts and not without_tables
    hidden = config.query_hidden_dim
    return (
        (dim * queries if hidden is None else (dim + queries) * hidden)
        + queries * (config.num_sub_keys if config.keys == "product" else config.num_slots)
        + has_values * config.num_slots * config.value_width
        + has_neurons * config.num_slots * dim
        + (2 * dim * config.value_width if config.gate else 0)
    )


def require_room(
    what: str, num_elements: int, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> None:
    """Refuses what all memory of a device, the default one if None, could not hold, where the system says how much it is.

    For the CPU that is the memory of the machine or, where less, of the container; swap does not count. What others
    hold of it is not known to last, so it does not count either. The meta device holds what int64 can address.

    Raises:
        ValueError: the bytes needed are more than the bytes there.
    """
    made = torch.empty(0)  # by the defaults
    device, dtype = device or made.device, dtype or made.dtype
    needed, there = num_elements * dtype.itemsize, bytes_of(device)
    if needed > there:
        raise ValueError(
            f"{what} of {num_elements:,} {str(dtype).removeprefix('torch.')} numbers needs {needed:,} bytes but "
            f"{device} has {there:,}: lower num_sub_keys, value_dim or the number of memories"
        )


def bytes_of(device: torch.device) -> int:
    """Bytes of all memory of a device, as far as the system says: see `require_room`."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu":
        return sys.maxsize
    try:
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        physical = sys.maxsize
    return min([physical, *_limits_of_container()])


def _limits_of_container(root: Path = Path("/")) -> Iterator[int]:
    """Limits that Linux sets for this process's control group and those around it, of either version."""
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in groups):
        if "memory" in controllers.split(","):
            mounted, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        elif not controllers:
            mounted, name = root / "sys/fs/cgroup", "memory.max"
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        for place in (group, *group.parents):  # a container may see its own group at the root
            try:
                limit = (mounted / place / name).read_text(encoding="utf-8").strip()
            except OSError:
                continue
            if limit.isdecimal():  # not "max"
                yield int(limit)
