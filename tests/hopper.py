"""Compiles what a call of the Triton backend would launch on a Hopper GPU; none is needed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

SHARED_BYTES = 227 << 10  # of shared memory that a program may have
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.int32: "i32",
}


@contextmanager
def launches(see: Callable[[Any, dict[str, Any], Callable[[], Any]], None]) -> Iterator[None]:
    """Every launch becomes a call of `see`, with the kernel, its constants, and what compiles it. Results are garbage."""
    from triton.runtime.jit import JITFunction

    from pkmem.ops.triton import selection

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        see(kernel, constants, lambda: compile_for_hopper(kernel, args, constants))

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(selection, "shared_bytes", return_value=SHARED_BYTES),
    ):
        yield


def compile_for_hopper(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> Any:
    """What Triton would compile for a launch with these arguments."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
    constants = {name: value for name, value in constants.items() if name not in options}
    signature, attributes = {}, {}
    for place, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        elif isinstance(value, int) and value == 1 and not name.startswith("seed"):
            signature[name], constants = "constexpr", {**constants, name: 1}
        else:
            signature[name] = "i32" if isinstance(value, int) else "fp32"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    signature |= {name: "constexpr" for name in kernel.arg_names if name not in signature}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
