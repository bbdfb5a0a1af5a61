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
from pkmem.layer.quantised import QuantisedValues
from pkmem.layer.query import MaskedBatchNorm, QueryNetwork
from pkmem.layer.untouched import is_untouched
from pkmem.layer.values import ValueTable
from pkmem.ops.arguments import NORM_TENSORS, LayerWeights
from pkmem.ops.backends import backend_module, choose_backend
from pkmem.ops.packing import row_bytes
from pkmem.ops.registered import is_plain, nobody_watches

MOST_TOKENS = 8  # for more, matrix products pay
_NORMS: dict[type[nn.Module], str] = {
    MaskedBatchNorm: "batch",
    nn.LayerNorm: "layer",
    nn.RMSNorm: "rms",
    nn.Identity: "none",
}
_PARTS: tuple[type[nn.Module], ...] = (
    *_NORMS,
    QueryNetwork,
    nn.Linear,
    ProductKeys,
    ValueTable,
    QuantisedValues,
    OutputGate,
    nn.Dropout,
)
_FORWARD = {part: part.forward for part in _PARTS}  # as built: a class's may be replaced, too
_VALUES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def in_one_kernel_if_few(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wraps a memory's `forward`: the kernel's output where it may stand for the parts, else that of the parts."""

    @functools.wraps(forward)
    def read(memory: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
        # In this order: who compiles or exports for any number of tokens must not see that it matters.
        if (
            memory.training
            or memory.watchers
            or mask is not None
            or not nobody_watches(x)
            or not x.is_cpu
            or not x.dim()
        ):
            return forward(memory, x, mask)
        out = _decode(memory, x.reshape(-1, x.shape[-1]))
        if out is None:
            return forward(memory, x, mask)
        out = out if out.dtype is x.dtype else out.to(x.dtype)
        return out.view(*x.shape[:-1], out.shape[-1])

    return read


def _decode(memory: Any, x: Tensor) -> Tensor | None:
    """The output (n, d') for hidden states (n, d), from one kernel; None where the parts have to run."""
    if x.shape[0] > MOST_TOKENS:
        return None
    layer = _weights_of(memory)
    if layer is None or not _fit(x, layer) or torch.is_autocast_enabled("cpu"):
        return None
    return backend_module(choose_backend(layer.values, memory._modules["values"].backend)).decode(x, layer)


def _weights_of(memory: Any) -> LayerWeights | None:
    """The layer's weights; None where a part is not what it was built as, or is watched.

    Read from the modules' own dictionaries: half the time of asking for attributes, and a weight that something else
    computes, as a parametrization does, is not there.
    """
    parts = memory._modules
    query, keys, values, gate = parts.get("query"), parts.get("keys"), parts.get("values"), parts.get("gate")
    if parts.get("neurons") is not None or _has_any_global_hook() or not _is_as_built(query, QueryNetwork):
        return None
    project, norm = query._modules.get("project"), query._modules.get("norm")
    if not (
        _is_as_built(project, nn.Linear)
        and type(norm) in _NORMS
        and _is_as_built(norm, type(norm))
        and _is_as_built(query._modules.get("dropout"), nn.Dropout)
        and _is_as_built(keys, ProductKeys)
        and (_is_as_built(values, ValueTable) or _is_as_built(values, QuantisedValues))
        and _is_as_built(parts.get("dropout"), nn.Dropout)
        and keys.backend == values.backend
    ):
        return None
    gates = None
    if gate is not None:
        gates = _weights_of_gate(gate)
        if gates is None:
            return None
    weight, is_packed = values._parameters.get("weight"), type(values) is QuantisedValues
    if weight is None or weight.dim() != 2:
        return None
    kind = _NORMS[type(norm)]
    statistics = norm._parameters | norm._buffers
    eps = norm.__dict__.get("eps")
    return LayerWeights(
        project._parameters.get("weight"),
        project._parameters.get("bias"),
        kind,
        tuple([statistics.get(name) for name in NORM_TENSORS[kind]]),
        torch.finfo(torch.float32).eps if eps is None else eps,
        keys._parameters.get("sub_keys"),
        weight,
        gates,
        keys.knn,
        values.width if is_packed else weight.shape[1],
        values.bits if is_packed else None,
        None if values.mapped is None else values.ask_ahead,
    )


def _weights_of_gate(gate: Any) -> tuple[Any, Any] | None:
    if not _is_as_built(gate, OutputGate):
        return None
    opening, project = gate._modules.get("gate"), gate._modules.get("project")
    if not (_is_as_built(opening, nn.Linear) and _is_as_built(project, nn.Linear)):
        return None
    if opening.bias is not None or project.bias is not None:
        return None
    return opening._parameters.get("weight"), project._parameters.get("weight")


def _is_as_built(part: Any, built_as: type[nn.Module]) -> bool:
    """Whether a part is of this very class, in evaluation mode, runs the class's first `forward`, and has no hook."""
    if type(part) is not built_as or built_as.forward is not _FORWARD[built_as]:
        return False
    return not part.__dict__["training"] and is_untouched(part)  # dropout that samples in evaluation is in training


def _fit(x: Tensor, layer: LayerWeights) -> bool:
    """Whether all weights are plain, fp32 (the values: or half as wide), on the CPU, and of shapes that agree.

    Packed values are bytes. Where weights are not so, the parts say what is wrong.
    """
    if x.dtype is not torch.float32:  # all else of x has been looked at
        return False
    for tensor in (layer.project, layer.bias, *layer.norm_tensors, layer.sub_keys, *(layer.gate or ())):
        if not is_plain(tensor) or tensor.dtype is not torch.float32 or not tensor.is_cpu:
            return False
    if not is_plain(layer.values) or not layer.values.is_cpu:
        return False
    row = (torch.uint8, row_bytes(layer.width, layer.bits)) if layer.bits else (layer.values.dtype, layer.width)
    if (layer.values.dtype, layer.values.shape[1]) != row or not (layer.bits or layer.values.dtype in _VALUES):
        return False
    heads, _, num_sub_keys, half = layer.sub_keys.shape
    num_slots, value_width = len(layer.values), layer.width
    width, channels = x.shape[1], 2 * half * heads
    norm_shape = (channels,) if layer.norm == "batch" else (2 * half,)
    return (
        layer.project.shape == (channels, width)
        and layer.bias.shape == (channels,)
        and all(tensor.shape == norm_shape for tensor in layer.norm_tensors)
        and 1 <= layer.knn <= num_sub_keys
        and num_sub_keys**2 <= min(num_slots, 1 << 32)
        and (
            layer.gate is None
            or (layer.gate[0].shape == (value_width, width) and layer.gate[1].shape[1] == value_width)
        )
    )
