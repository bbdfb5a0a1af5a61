"""A table on another device than the hidden states: slots and weights travel to it, some KB a token, and the sums back."""

from __future__ import annotations

from torch import Tensor


def sent_to(table: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors on the device of a table, differentiable.

    To a table without numbers, on the meta device, nothing is sent: the operators say what is wrong.
    """
    return tensors if table.is_meta else tuple([tensor.to(table.device) for tensor in tensors])
