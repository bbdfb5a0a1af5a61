"""What the kernels need to know of a device: whether it can run them, how many processors it has, how much memory
a program may share."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton

_LEAST_CAPABILITY = (8, 0)


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
    if capability >= _LEAST_CAPABILITY:
        return None
    name = torch.cuda.get_device_name(index)
    found, least = (".".join(map(str, numbers)) for numbers in (capability, _LEAST_CAPABILITY))
    return f"{name} has compute capability {found}, below {least}: the kernels would spill registers by the kilobyte"
