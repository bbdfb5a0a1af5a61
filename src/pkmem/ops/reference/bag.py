"""Sums of weighted rows and inner products with rows, in plain torch (section 3.1, eq. 3)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from pkmem.ops.packing import unpack_rows
from pkmem.ops.precision import full_precision
from pkmem.ops.reference import chunks


def weighted_sum(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """See `Backend.weighted_sum`."""
    if slots.numel() == 0:  # embedding_bag refuses bags of nothing
        return values.new_zeros(slots.shape[0], values.shape[1])
    if values.dtype in (torch.float32, torch.float64):
        return F.embedding_bag(slots, values, mode="sum", per_sample_weights=weights.to(values.dtype))
    weights = weights.to(torch.float32).unsqueeze(1)
    sums = [_product(weight, part, values) for part, weight in _by_token(values, slots, weights)]
    return torch.cat(sums).squeeze(1).to(values.dtype)


def packed_sum(rows: Tensor, slots: Tensor, weights: Tensor, width: int, bits: int) -> Tensor:
    """See `Backend.packed_sum`."""
    parts = [weights.new_empty(0, width, dtype=torch.float32)]
    for unpacked, weight in _unpacked_by_token(rows, slots, weights.to(torch.float32).unsqueeze(1), width, bits):
        with full_precision(rows.device):
            parts.append(torch.bmm(weight, unpacked).squeeze(1))
    return torch.cat(parts)


def packed_products(rows: Tensor, slots: Tensor, x: Tensor, width: int, bits: int) -> Tensor:
    """The inner product (n, b), fp32, of each packed row read with its token x (n, width): no backend has a kernel."""
    parts = [x.new_empty(0, slots.shape[1], dtype=torch.float32)]
    for unpacked, wanted in _unpacked_by_token(rows, slots, x.to(torch.float32).unsqueeze(1), width, bits):
        with full_precision(rows.device):
            parts.append(torch.bmm(wanted, unpacked.mT).squeeze(1))
    return torch.cat(parts)


def _unpacked_by_token(
    rows: Tensor, slots: Tensor, given: Tensor, width: int, bits: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows (c, b, width), and what is `given` to their tokens, of a chunk of tokens whose rows are held at once."""
    size = chunks.chunk_size(slots.shape[1] * width * 8, slots.device, chunks.ROWS_BYTES)
    for part, of_part in zip(slots.split(size), given.split(size), strict=True):
        unpacked = unpack_rows(rows[part.flatten()], width, bits)
        yield unpacked.view(*part.shape, width), of_part


def row_products(table: Tensor, slots: Tensor, x: Tensor) -> Tensor:
    """See `Backend.row_products`."""
    x = x.to(torch.promote_types(table.dtype, torch.float32)).unsqueeze(1)
    products = [_product(wanted, part, table, transposed=True) for part, wanted in _by_token(table, slots, x)]
    return torch.cat(products).squeeze(1)


def _product(left: Tensor, slots: Tensor, table: Tensor, transposed: bool = False) -> Tensor:
    """The matrix products (c, 1, b or v) of `left` (c, 1, .) with the rows `slots` (c, b) of a table (m, v)."""
    rows = F.embedding(slots, table).to(left.dtype)
    with full_precision(table.device):
        return torch.bmm(left, rows.mT if transposed else rows)


def _by_token(table: Tensor, slots: Tensor, given: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Slots (c, b), and what is `given` to their tokens, of a chunk of tokens whose rows are held at once."""
    row_bytes = table.shape[1] * (table.element_size() + 4)
    size = chunks.chunk_size(slots.shape[1] * row_bytes, slots.device, chunks.ROWS_BYTES)
    return zip(slots.split(size), given.split(size), strict=True)
