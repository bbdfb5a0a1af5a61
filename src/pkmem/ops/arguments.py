"""Arguments of a backend that go together: a step of Adam, the weights of a whole layer."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AdamStep(NamedTuple):
    """One step of Adam (Kingma & Ba 2015).

    Args:
        lr, betas, eps: Adam's.
        step: updates made so far, this one included, >= 1; corrects the bias of every row alike.
        scale: factor on the gradients (clipping), > 0; one that is not finite leaves everything as it is.
        seed: bf16 is rounded up or down at random, by seed, step, row and column alone; fp16 to nearest.
    """

    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    step: int | Tensor
    scale: float | Tensor
    seed: int = 0


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
