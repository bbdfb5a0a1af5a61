"""A few tokens without gradient, as a decoder reads them: one kernel for the whole layer, where it may stand for the parts.

The parts are the meaning. The kernel stands for them only while each part is what it was built as, nobody watches it or
has replaced what it does, and its weights are there and fit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from pkmem.layer.gate import OutputGate
from pkmem.layer.keys import ProductKeys
from pkmem.layer.query import MaskedBatchNorm, QueryNetwork
from pkmem.layer.values import ValueTable
from pkmem.ops.arguments import NORM_TENSORS, LayerWeights
from pkmem.ops.backends import backend_module, choose_backend
from pkmem.ops.registered import nobody_watches

MOST_TOKENS = 8  # for more, matrix products pay
_NORMS: dict[type, str] = {MaskedBatchNorm: "batch", nn.LayerNorm: "layer", nn.RMSNorm: "rms", nn.Identity: "none"}


def in_one_kernel_if_few(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wraps a memory's `forward`: the kernel's output where it may stand for the parts, else that of the parts."""

    @functools.wraps(forward)
    def read(memory: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
        out = _decode(memory, x.reshape(-1, x.shape[-1])) if mask is None and x.dim() else None
        if out is None:
            return forward(memory, x, mask)
        return out.to(x.dtype).view(*x.shape[:-1], out.shape[-1])

    return read


def _decode(memory: Any, x: Tensor) -> Tensor | None:
    """The output (n, d') for hidden states (n, d), from one kernel; None where the parts have to run."""
    if memory.training or not nobody_watches(x) or x.shape[0] > MOST_TOKENS:
        return None
    layer = _weights_of(memory)
    if layer is None or not _fit(x, layer) or torch.is_autocast_enabled(x.device.type):
        return None
    return backend_module(choose_backend(x.device, memory.values.backend)).decode(x, layer)


def _weights_of(memory: Any) -> LayerWeights | None:
    """The layer's weights; None where a part is not what it was built as, or is watched."""
    query, keys, values, gate = memory.query, memory.keys, memory.values, memory.gate
    if type(query) is not QueryNetwork or memory.neurons is not None or _has_any_global_hook():
        return None
    project: Any = query.project
    norm = query.norm
    kind = _NORMS.get(type(norm))
    parts = [(query, QueryNetwork), (project, nn.Linear), (norm, type(norm)), (query.dropout, nn.Dropout)]
    parts += [(keys, ProductKeys), (values, ValueTable), (memory.dropout, nn.Dropout)]
    if gate is not None:
        if type(gate) is not OutputGate or gate.gate.bias is not None or gate.project.bias is not None:
            return None
        parts += [(gate, OutputGate), (gate.gate, nn.Linear), (gate.project, nn.Linear)]
    for part, built_as in parts:
        if not _is_untouched(part, built_as):
            return None
    if kind is None or keys.backend != values.backend:
        return None
    eps = getattr(norm, "eps", None)
    return LayerWeights(
        project.weight,
        project.bias,
        kind,
        tuple([getattr(norm, name) for name in NORM_TENSORS[kind]]),
        torch.finfo(torch.float32).eps if eps is None else eps,
        keys.sub_keys,
        values.weight,
        None if gate is None else (gate.gate.weight, gate.project.weight),
        keys.knn,
    )


def _is_untouched(part: nn.Module, built_as: type[nn.Module]) -> bool:
    """Whether a part is of this very class, runs the class's own `forward`, and has no hook of any kind."""
    state = part.__dict__
    return type(part) is built_as and not (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state  # replaced on the instance, as libraries do that offload weights
    )


def _fit(x: Tensor, layer: LayerWeights) -> bool:
    """Whether all weights are plain, fp32 (the values: or half as wide), where x is, and of shapes that agree.

    Where they are not, the parts say what is wrong.
    """
    read = (x, layer.project, layer.bias, *layer.norm_tensors, layer.sub_keys, *(layer.gate or ()))
    for tensor in read:
        if tensor is None or tensor.dtype is not torch.float32 or tensor.device != x.device:
            return False
    if (
        layer.values.dtype is torch.float64
        or layer.values.device != x.device
        or not nobody_watches(*read, layer.values)
    ):
        return False
    heads, _, num_sub_keys, half = layer.sub_keys.shape
    num_slots, value_width = layer.values.shape
    width, channels = x.shape[1], 2 * half * heads
    norm_shape = (channels,) if layer.norm == "batch" else (2 * half,)
    return (
        layer.project.shape == (channels, width)
        and layer.bias.shape == (channels,)
        and all(tensor.shape == norm_shape for tensor in layer.norm_tensors)
        and num_sub_keys**2 <= min(num_slots, 1 << 32)
        and (
            layer.gate is None
            or (layer.gate[0].shape == (value_width, width) and layer.gate[1].shape[1] == value_width)
        )
    )
