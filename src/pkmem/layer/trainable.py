"""Which value tables can be trained row by row."""

from __future__ import annotations

from torch import nn

from pkmem.layer.values import Table


def require_trainable(table: Table) -> None:
    """Says why the rows of a table cannot be updated in place, where they cannot.

    Args:
        table: to be trained by `pkmem.RowAdam`.

    Raises:
        ValueError: it is computed from other tensors, frozen, or on a device without float64.
    """
    if not isinstance(table.weight, nn.Parameter) or not table.weight.is_leaf:
        raise ValueError(
            "the rows of a table are computed from other tensors (a parametrization), so they cannot be updated in "
            "place: train these with torch.optim.Adam, or remove the parametrization"
        )
    if not table.weight.requires_grad:
        raise ValueError(
            "a table is frozen (its weight.requires_grad is False), so RowAdam would never train it: unfreeze it with "
            "table.requires_grad_(True), or give RowAdam the other tables alone"
        )
    if table.weight.device.type == "mps":
        raise ValueError(
            "a table is on Apple's GPU (mps), which computes no float64, in which RowAdam sums: train the model on the "
            "CPU, by model.to('cpu')"
        )
