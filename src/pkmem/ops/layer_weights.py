"""A whole memory layer as one kernel reads it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

NORM_TENSORS = {  # of each query norm, in the order in which `Backend.decode` takes them
    "batch": ("weight", "bias", "running_mean", "running_var"),
    "layer": ("weight", "bias"),
    "rms": ("weight",),
    "none": (),
}


class LayerWeights(NamedTuple):
    """A whole memory layer (Lample et al. 2019, section 3), as `Backend.decode` reads it; fp32 but for the values.

    Args:
        project, bias: (h * q, d) and (h * q,) the linear query network.
        norm: a key of `NORM_TENSORS`, the query's norm in evaluation mode.
        norm_tensors: as `NORM_TENSORS` names them, (h * q,) each for "batch", else (q,).
        eps: what the norm adds to the variance.
        sub_keys: (h, 2, s, q / 2).
        values: (s ** 2, v) fp32, bf16 or fp16.
        gate: None, or W1 (v, d) and W2 (d', v) of Memory+'s output `W2(m(x) * silu(W1 x))`.
        knn: slots per head, in [1, s].
    """

    project: Tensor
    bias: Tensor
    norm: str
    norm_tensors: tuple[Tensor, ...]
    eps: float
    sub_keys: Tensor
    values: Tensor
    gate: tuple[Tensor, Tensor] | None
    knn: int
