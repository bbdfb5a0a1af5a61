"""GPUs made up for Triton: kernels compile for them as they would for real ones, load, and do nothing when launched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock


@dataclass(frozen=True)
class GPU:
    """A GPU for which Triton can compile.

    Args:
        backend, arch, warp_size: what Triton calls its target.
        shared_bytes: shared memory that one program may have.
        models: some that are of the kind.
    """

    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int
    models: str


GPUS = {
    "sm_80": GPU("cuda", 80, 32, 163 << 10, "A100"),
    "sm_86": GPU("cuda", 86, 32, 99 << 10, "RTX 30, A10, A40"),
    "sm_89": GPU("cuda", 89, 32, 99 << 10, "RTX 40, L4, L40"),
    "sm_90": GPU("cuda", 90, 32, 227 << 10, "H100, H200"),
    "sm_100": GPU("cuda", 100, 32, 227 << 10, "B200"),
    "sm_120": GPU("cuda", 120, 32, 99 << 10, "RTX 50"),
    "gfx942": GPU("hip", "gfx942", 64, 64 << 10, "MI300"),
}


@contextmanager
def made_up(name: str, **changes: Any) -> Iterator[GPU]:
    """CPU tensors lie on this GPU, changed as said, for Triton and for the launch rules. Results are garbage."""
    from triton.runtime import driver

    from pkmem.ops.triton import launch, selection, selection_backward
    from pkmem.ops.triton.kernels import functions

    gpu = replace(GPUS[name], **changes)
    shapes = (selection._shape_of_bounding, selection._shape_of_sorting, selection_backward._shape_of_sum)
    _forget(functions(), shapes)
    driver.set_active(_driver_of(name, gpu))
    try:
        with mock.patch.object(launch, "shared_bytes", return_value=gpu.shared_bytes):
            yield gpu
    finally:
        driver.set_active(None)
        _forget(functions(), shapes)


def _forget(functions: list[Any], shapes: tuple[Any, ...]) -> None:
    for function in functions:
        function.device_caches.clear()
    for cached in shapes:
        cached.cache_clear()


def _driver_of(name: str, gpu: GPU) -> Any:
    """A driver as Triton asks for one, of a device whose number is its name."""
    from triton.backends.compiler import GPUTarget

    target = GPUTarget(gpu.backend, gpu.arch, gpu.warp_size)
    utils = SimpleNamespace(
        get_device_properties=lambda _: {"max_shared_mem": gpu.shared_bytes},
        load_binary=lambda *_: (1, 1, None, None, 1024),  # what it spills has to be read from the code
    )
    return SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: name,
        get_current_stream=lambda _: 0,
        launcher_cls=lambda *_: lambda *_: None,
        utils=utils,
    )
