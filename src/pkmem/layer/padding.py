"""Padded tokens read nothing: what that takes in shapes that depend on no mask, for the sake of compilers and GPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from pkmem.ops.registered import nobody_watches


def flat_mask(mask: Tensor, x: Tensor) -> Tensor:
    """The mask (n,) of hidden states (..., d), one token after the other.

    Raises:
        ValueError: it is not of a token each, not bool, or on another device.
    """
    if mask.shape != x.shape[:-1] or mask.dtype != torch.bool or mask.device != x.device:
        raise ValueError(
            f"mask is {tuple(mask.shape)} {mask.dtype} on {mask.device} but must be {tuple(x.shape[:-1])} torch.bool "
            f"on {x.device}, True where a token is real"
        )
    return mask.flatten()


def without_padding(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Rows (n, c) with zeros where the mask (n,) has padding: NaN there, or coming back there, goes no further."""
    return rows if mask is None else rows.where(mask.unsqueeze(-1), 0)


def reads_of_real_tokens(slots: Tensor, weights: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Slots and weights (n, h, knn) in which padding reads, with weight 0, what real tokens read.

    A row that padding alone had read would move by its moments. Padded tokens repeat the real ones in turn, so that no
    row gets all their reads.
    """
    if mask is None:
        return slots, weights
    if mask.is_cpu and may_look_at(mask) and not mask.any():
        return slots[..., :0], weights[..., :0]  # nobody's reads to repeat
    real_first = mask.to(torch.uint8).argsort(descending=True, stable=True)
    repeated = real_first[torch.arange(len(mask), device=mask.device) % mask.sum().clamp_min(1)]
    is_real = mask[:, None, None]
    return slots.where(is_real, slots[repeated]), weights.where(is_real, 0)


def may_look_at(mask: Tensor) -> bool:
    """Whether a mask's numbers are there to decide by, and not to be seen by a compiler, tracer or transform."""
    with torch.no_grad():
        return nobody_watches(mask) and not mask.is_meta
