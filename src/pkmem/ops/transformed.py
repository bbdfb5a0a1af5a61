"""The operators where `torch.func` transforms them (vmap, grad, jacrev, jvp ...) or forward mode differentiates them.

Slots are chosen by the operators as ever, a batch of memories folded into heads and a batch of tokens into tokens. What
follows the choice is the lines of the docstrings in `pkmem.ops`, in plain torch: torch knows every derivative of them,
at the price of holding the rows read, (n, b, v).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pkmem.ops.packing import unpack_rows
from pkmem.ops.reference.selection import scores_of_slots
from pkmem.ops.registered import flat, topk


def product_key_topk(query: Tensor, sub_keys: Tensor, knn: int, backend: str) -> tuple[Tensor, Tensor]:
    """See `pkmem.ops.product_key_topk`."""
    slots = topk(query.detach(), sub_keys.detach(), knn, backend)[1]
    return scores_of_slots(query, sub_keys, slots), slots


def weighted_sum(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """See `pkmem.ops.weighted_sum`; torch itself refuses slots outside the table, by an IndexError."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    return (F.embedding(slots, values).to(dtype) * weights.to(dtype).unsqueeze(-1)).sum(1).to(values.dtype)


def packed_sum(rows: Tensor, slots: Tensor, weights: Tensor, width: int, bits: int) -> Tensor:
    """See `pkmem.ops.packed_sum`; torch itself refuses slots outside the table, by an IndexError."""
    read = F.embedding(slots, rows)
    unpacked = unpack_rows(read.flatten(0, -2), width, bits).view(*read.shape[:-1], width)
    return (unpacked * weights.to(torch.float32).unsqueeze(-1)).sum(-2)


def row_products(table: Tensor, slots: Tensor, x: Tensor) -> Tensor:
    """See `pkmem.ops.row_products`; torch itself refuses slots outside the table, by an IndexError."""
    dtype = torch.promote_types(table.dtype, torch.float32)
    return (F.embedding(slots, table).to(dtype) * x.to(dtype).unsqueeze(1)).sum(-1)


def _batched(
    operator: Callable[..., Any], batch_size: int, in_dims: tuple[Any, ...], query: Tensor, keys: Tensor, *options: Any
) -> tuple[Any, Any]:
    """A selection of batched queries (n, h, q), keys (h, ...) or both, in one call, and where its batch is."""
    query_dim, keys_dim = in_dims[:2]
    if keys_dim is None:
        queries = query.movedim(query_dim, 0)
        place, sizes = 0, queries.shape[:2]
        chosen = operator(queries.flatten(0, 1), keys, *options)
    else:
        keys = keys.movedim(keys_dim, 0)
        queries = query.unsqueeze(1) if query_dim is None else query.movedim(query_dim, 1)
        queries = queries.expand(-1, batch_size, -1, -1)
        place, sizes = 1, queries.shape[1:3]
        chosen = operator(queries.flatten(1, 2), keys.flatten(0, 1), *options)
    if isinstance(chosen, Tensor):
        return chosen.unflatten(place, sizes), place
    return tuple(part.unflatten(place, sizes) for part in chosen), (place,) * len(chosen)


@topk.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *given: Any) -> tuple[Any, Any]:
    return _batched(topk, info.batch_size, in_dims, *given)


@flat.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *given: Any) -> tuple[Any, Any]:
    return _batched(flat, info.batch_size, in_dims, *given)
