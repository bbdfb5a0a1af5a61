"""What the kernels have to know of a device: whether it runs them, how many processors it has, what a program may take."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from pkmem.ops.verdict import LEAST_CAPABILITY

_USUAL_PROCESSORS = 64
_USUAL_SHARED_BYTES = 48 << 10  # less than any GPU has on which the kernels run


def why_not(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device, in words; None where they can.

    Asked of torch alone, once per device: nothing is compiled.
    """
    if device.type == "cpu":
        return None if triton.knobs.runtime.interpret else "Triton runs on a CPU only under TRITON_INTERPRET=1"
    if device.type not in ("cuda", "xpu"):
        return f"Triton runs on CUDA, ROCm and XPU, not on {device.type}"
    kind = getattr(torch, device.type)
    if not kind.is_available():
        return f"torch finds no device of the kind {device.type}"
    if device.type == "xpu" or torch.version.hip:
        return None
    return _why_too_old(kind.current_device() if device.index is None else device.index)


@lru_cache(maxsize=64)
def _why_too_old(index: int) -> str | None:
    """Why an NVIDIA GPU cannot run the kernels: before 8.0 it has no bf16, and the kernels spill kilobytes."""
    capability = torch.cuda.get_device_capability(index)
    if capability >= LEAST_CAPABILITY:
        return None
    name = torch.cuda.get_device_name(index)
    found, least = (".".join(map(str, numbers)) for numbers in (capability, LEAST_CAPABILITY))
    return f"{name} has compute capability {found}, below {least}: the kernels would spill registers by the kilobyte"


@lru_cache(maxsize=64)
def num_processors(device: torch.device) -> int:
    """Multiprocessors, compute units or sub-slices."""
    names = ("multi_processor_count", "gpu_subslice_count", "max_compute_units")
    return _property(device, names, "multiprocessor_count", _USUAL_PROCESSORS)


@lru_cache(maxsize=64)
def shared_bytes(device: torch.device) -> int:
    """Shared memory that one program may take."""
    names = ("shared_memory_per_block_optin", "shared_memory_per_block")
    return _property(device, names, "max_shared_mem", _USUAL_SHARED_BYTES)


def _property(device: torch.device, names: tuple[str, ...], of_triton: str, usual: int) -> int:
    """The first of a device's properties that torch names, else what Triton knows of it, else what is usual."""
    if device.type == "cpu":
        return usual
    properties = getattr(torch, device.type).get_device_properties(device)
    for name in names:
        if number := getattr(properties, name, 0):
            return int(number)
    try:
        known: dict[str, Any] = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
    except (AttributeError, RuntimeError):  # another backend's driver, or none
        return usual
    return int(known.get(of_triton) or usual)


def on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's device the current one of its kind, which is where Triton launches."""
    kind = torch.xpu if tensor.device.type == "xpu" else torch.cuda
    return kind.device_of(tensor)
