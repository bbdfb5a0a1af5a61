"""How a kernel is compiled, and how it sees a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numba import carray, config, njit, types
from numba.extending import intrinsic
from torch import Tensor

from pkmem.ops.cpu.cache import KernelCache

if config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set")

_HALF_VIEWS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}  # numba knows neither half float

_MAY_BE_ONE_OF_SEVERAL = dist.is_available()  # asked once: a decoded token looks at a dozen arrays

# Sums may be reordered into vectors, the same way in every run; NaN and infinities keep their meaning.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "reassoc"}}
part_of_kernel = njit(**_OPTIONS)
inlined = njit(forceinline=True, **_OPTIONS)  # where a call would pass many arrays, each seven numbers, by memory


def kernel(function: Callable[..., Any]) -> Any:
    """Compiles a function on its first call and keeps the code on disk."""
    compiled = njit(**_OPTIONS)(function)
    compiled._cache = KernelCache(function)  # where `cache=True` puts numba's own
    return compiled


@intrinsic
def _fp32_pointer(_: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.intp), codegen


@part_of_kernel
def fp32_at(address, shape):  # type: ignore[no-untyped-def]
    """The contiguous fp32 array of a shape that lies at an address (in kernels)."""
    return carray(_fp32_pointer(address), shape)


def array(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as numpy sees it: bf16 as uint16 and fp16 as int16, which kernels tell apart by type."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype in _HALF_VIEWS:
        tensor = tensor.view(_HALF_VIEWS[tensor.dtype])
    if _MAY_BE_ONE_OF_SEVERAL and dist.is_initialized() and tensor.numel():
        return np.asarray(_Memory(tensor))
    return tensor.numpy()


class _Memory:
    """A tensor's memory for numpy, to which `Tensor.numpy` would bind it for good: FSDP frees it between uses."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor  # lives as long as the array
        self.__array_interface__ = {
            "version": 3,
            "data": (tensor.data_ptr(), False),
            "shape": tuple(tensor.shape),
            "typestr": np.dtype(str(tensor.dtype).removeprefix("torch.")).str,
        }
