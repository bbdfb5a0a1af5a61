"""The whole layer for a few tokens: the reference has no kernel for it."""

from __future__ import annotations

from torch import Tensor

from pkmem.ops.arguments import LayerWeights


def decode(x: Tensor, layer: LayerWeights) -> None:
    """None, see `Backend.decode`: the parts of the layer are its meaning."""
