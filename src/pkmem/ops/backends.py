"""The only place a backend is chosen, and imported."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import warnings
from types import ModuleType

import torch

_logger = logging.getLogger(__name__)

BACKENDS = ("reference", "cpu", "triton")
_HAS_NUMBA = importlib.util.find_spec("numba") is not None
if not _HAS_NUMBA:
    warnings.warn("numba is not installed, so the slow reference runs: pip install 'pkmem[cpu]'", stacklevel=2)


def choose_backend(device: torch.device, backend: str | None = None) -> str:
    """The backend for tensors on `device`: the one asked for, else the fastest that has been measured there.

    "triton" has to be asked for: its kernels are checked in triton's interpreter and compile, but have not yet run
    on a GPU.

    Raises:
        ValueError: `backend` is not in `BACKENDS`.
    """
    if backend is None:
        return _fastest(device.type)
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r} but must be one of {', '.join(BACKENDS)}")
    return backend


def _fastest(device_type: str) -> str:
    return "cpu" if device_type == "cpu" and _HAS_NUMBA else "reference"


@functools.cache
def backend_module(backend: str) -> ModuleType:
    """The module that implements `backend`; the first use on a machine says that it compiles."""
    module = importlib.import_module(f"pkmem.ops.{backend}")
    if backend == "cpu" and module.is_cold():
        _logger.warning("pkmem compiles its CPU kernels, once (about 15 s); `pkmem warmup` does it ahead")
    return module


def prepare(device: torch.device, dtype: torch.dtype) -> None:
    """Compiles what the first calls on `device` with a table of `dtype` would, so that nobody times a compiler."""
    if choose_backend(device) == "cpu" and dtype != torch.float64:
        backend_module("cpu").warmup((dtype,))
