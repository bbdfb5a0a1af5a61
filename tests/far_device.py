"""A second device on a machine that has one: its tensors compute on the CPU, and mix with no others, as those of a GPU.

To import this registers the device with torch for the whole process.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("far")
FAR = torch.device("far", 0)


class FarTensor(torch.Tensor):
    """A tensor that says it is on the far device.

    Attributes:
        numbers: what it holds, on the CPU.
    """

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "FarTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), dtype=held.dtype, device=FAR, storage_offset=0
        )
        made.numbers = held
        return made

    def __repr__(self) -> str:
        return f"far({self.numbers})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Far(TorchDispatchMode):
    """Inside, tensors can be made on the far device and moved there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Runs an operator where its tensors are."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    far = [tensor for tensor in tensors if isinstance(tensor, FarTensor)]
    moves = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    if far and not moves and any(tensor.dim() and not isinstance(tensor, FarTensor) for tensor in tensors):
        raise RuntimeError(f"{func}: tensors on {FAR} and on the CPU")
    device = kwargs.get("device")
    goes_far = bool(far) if device is None else torch.device(device).type == FAR.type
    if func is torch.ops.aten.copy_.default:
        goes_far = isinstance(args[0], FarTensor)
    if goes_far and device is not None:
        kwargs = kwargs | {"device": "cpu"}
    wrappers = {id(tensor.numbers): tensor for tensor in far}
    found = func(*tree_map(_numbers, args), **tree_map(_numbers, kwargs))
    if not goes_far:
        return found
    return tree_map(lambda x: wrappers.get(id(x), FarTensor(x)) if isinstance(x, torch.Tensor) else x, found)


def _numbers(x: Any) -> Any:
    return x.numbers if isinstance(x, FarTensor) else x


def send(module: torch.nn.Module, *but: torch.nn.Module) -> None:
    """Moves the parameters and buffers of a module to the far device, those of some parts excepted."""
    for part in module.modules():
        for held in () if part in but else (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    moved = FarTensor(tensor.detach())
                    is_weight = isinstance(tensor, torch.nn.Parameter)
                    held[name] = torch.nn.Parameter(moved, tensor.requires_grad) if is_weight else moved
