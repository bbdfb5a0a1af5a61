"""How the kernels are launched: sizes of blocks and grids, from shapes and the device and never from data."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from pkmem.ops.triton.code import complaints, facts_of
from pkmem.ops.triton.device import num_processors, shared_bytes

_WIDEST_BLOCK = 1024
_PROGRAMS_PER_PROCESSOR = 16
_PROGRAMS_INTERPRETED = 4
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
    most = _PROGRAMS_INTERPRETED if device.type == "cpu" else _PROGRAMS_PER_PROCESSOR * num_processors(device)
    return max(1, min(work, most))


def num_parts(programs: int, most: int) -> int:
    """Into how many parts to split a loop of `most` rounds so that there are enough programs."""
    return max(1, min(most, _ENOUGH_PROGRAMS // programs, 16))


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy whose memory begins where vector loads can: kernels are compiled for that alone."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def of_type(dtype: torch.dtype) -> Tensor:
    """A tensor without memory, for a launch that only compiles."""
    return torch.empty(1, dtype=dtype, device="meta")


def first_that_fits(
    kernel: Any, device: torch.device, arguments: tuple[Any, ...], shapes: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """The first launch shape whose compiled kernel a device has room for, in shared memory and in registers.

    Compiles, on the current device, until one fits. The interpreter has nothing compiled to look at: the first.

    Args:
        arguments: as of a launch; tensors need types alone.
        shapes: constants and options of launches.
    """
    if triton.knobs.runtime.interpret:
        return shapes[0]
    most = shared_bytes(device)
    for shape in shapes:
        compiled = kernel.warmup(*arguments, grid=(1,), **shape)
        if compiled.metadata.shared <= most and _is_loaded(compiled) and not complaints(facts_of(compiled), most):
            return shape
        _forget(kernel, compiled)
    return None


def _is_loaded(compiled: Any) -> bool:
    """Loads a kernel, upon which the driver says what it spills; not if it takes more of anything than there is."""
    try:
        return compiled.run is not None
    except triton.OutOfResources:
        return False


def _forget(kernel: Any, compiled: Any) -> None:
    """Nobody shall take a kernel for one that is launched."""
    for compiled_ones, *_ in kernel.device_caches.values():
        for key in [key for key, one in compiled_ones.items() if one is compiled]:
            del compiled_ones[key]
