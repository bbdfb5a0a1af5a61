"""How the kernels are launched: sizes of blocks and grids, from shapes alone and never from data."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
from torch import Tensor

_WIDEST_BLOCK = 1024
_PROGRAMS_PER_PROCESSOR = 16
_ENOUGH_PROGRAMS = 512


def power_of_two(size: int, least: int, most: int) -> int:
    """The smallest power of two that holds `size`, within [least, most]."""
    return min(max(triton.next_power_of_2(size), least), most)


def column_block(width: int) -> int:
    """Columns per program: one block if the width is small, else the largest that leaves no lane idle."""
    for block in (_WIDEST_BLOCK, _WIDEST_BLOCK // 2, _WIDEST_BLOCK // 4):
        if width % block == 0:
            return block
    return power_of_two(width, 16, _WIDEST_BLOCK)


def warps_for(block: int) -> int:
    """Warps for a block of columns: eight columns, 16 bytes of bf16, to a thread."""
    return min(max(block // 256, 1), 8)


def num_programs(work: int, device: torch.device) -> int:
    """Programs that share `work` items, each taking every so-many-th; enough to fill the device."""
    return max(1, min(work, _most_programs(device)))


def num_parts(programs: int, most: int) -> int:
    """Into how many parts to split a loop of `most` rounds so that there are enough programs."""
    return max(1, min(most, _ENOUGH_PROGRAMS // programs, 16))


@lru_cache(maxsize=16)
def _most_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return _PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=16)
def shared_bytes(device: torch.device) -> int:
    """Shared memory that one program may take."""
    if device.type != "cuda":
        return 1 << 62
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)  # type: ignore[attr-defined]


def on(tensor: Tensor) -> torch.cuda.device_of:
    """Makes the tensor's GPU the current one, which is where Triton launches."""
    return torch.cuda.device_of(tensor)
