"""The weighted sum of rows, and the inner products with rows that are its gradient in the weights.

Rows of a large table come from memory at random: what bounds the speed is how many are on their way at once, so
a program loads several rows together and many programs share a processor. Row numbers are int64 throughout: the
offset of an element passes 2 ** 31 in a table of two billion. A slot outside the table, which nobody could tell without
waiting for the GPU, is never read: what it would have been part of is NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pkmem.ops import reference
from pkmem.ops.triton.arithmetic import narrow
from pkmem.ops.triton.device import on
from pkmem.ops.triton.launch import column_block, power_of_two, warps_for

_ROWS = 8  # rows in flight per program
_ROWS_ALONE = 32  # where few programs run, as in decoding
_FEW_PROGRAMS = 256
_READS = 16  # inner products per program


def weighted_sum(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """See `Backend.weighted_sum`; fp64 goes to the reference."""
    if values.dtype == torch.float64:
        return reference.weighted_sum(values, slots, weights)
    return sum_rows(values, slots, weights, values.dtype)


def sum_rows(values: Tensor, slots: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums (n, v), in `dtype`, of rows `slots` (n, b) of values (m, v), weighted."""
    num_tokens, num_reads = slots.shape
    values = _with_dense_rows(values)
    width = values.shape[1]
    summed = torch.empty(num_tokens, width, dtype=dtype, device=values.device)
    if summed.numel() == 0:
        return summed
    block, rows, warps = _shape_of_sum(num_tokens, num_reads, width)
    grid = (num_tokens, triton.cdiv(width, block))
    given = (values, slots.contiguous(), weights.contiguous(), summed)
    with on(values):
        _sum_rows[grid](
            *given, values.stride(0), width, num_reads, len(values), BLOCK_V=block, ROWS=rows, num_warps=warps
        )
    return summed


def _shape_of_sum(num_tokens: int, num_reads: int, width: int) -> tuple[int, int, int]:
    """Columns per program, rows in flight and warps: with few tokens, narrow programs with many rows each."""
    block = column_block(width)
    if num_tokens * triton.cdiv(width, block) >= _FEW_PROGRAMS:
        return block, power_of_two(num_reads, 1, _ROWS), warps_for(block)
    return min(block, 128), power_of_two(num_reads, 1, _ROWS_ALONE), 4


def row_products(table: Tensor, slots: Tensor, x: Tensor) -> Tensor:
    """See `Backend.row_products`; fp64 goes to the reference."""
    if table.dtype == torch.float64:
        return reference.row_products(table, slots, x)
    num_tokens, num_reads = slots.shape
    products = torch.empty(slots.shape, dtype=torch.float32, device=slots.device)
    if products.numel() == 0:
        return products
    table = _with_dense_rows(table)
    width = table.shape[1]
    reads = power_of_two(num_reads, 1, _READS)
    grid = (num_tokens, triton.cdiv(num_reads, reads))
    given = (table, slots.contiguous(), x.contiguous(), products)
    block = min(column_block(width), 512)
    with on(table):
        _dot_rows[grid](*given, table.stride(0), width, num_reads, len(table), READS=reads, BLOCK_V=block, num_warps=4)
    return products


def _with_dense_rows(values: Tensor) -> Tensor:
    return values if values.stride(1) == 1 else values.contiguous()


@triton.jit
def sum_of_rows(  # type: ignore[no-untyped-def]
    table, stride, num_rows, row_numbers, weights, begin, end, columns, width,
    ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Part (BLOCK_V,) of the fp32 sum of weights[r] * table[row_numbers[r]] over r in [begin, end).

    NaN if one of them is no row of the table; with `num_rows` None all are.
    """
    total = tl.zeros((ROWS, BLOCK_V), tl.float32)  # summed over ROWS once, at the end
    for first in range(begin, end, ROWS):
        reads = first + tl.arange(0, ROWS)
        real = reads < end
        row = tl.load(row_numbers + reads, mask=real, other=0).to(tl.int64)
        weight = tl.load(weights + reads, mask=real, other=0).to(tl.float32)
        if num_rows is not None:
            is_row = row.to(tl.uint64, bitcast=True) < num_rows  # below 0 is far above
            weight = tl.where(is_row, weight, float("nan"))
            real = real & is_row
        offsets = row[:, None] * stride + columns[None, :]
        part = tl.load(table + offsets, mask=real[:, None] & (columns < width)[None, :], other=0)
        total += weight[:, None] * part.to(tl.float32)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["num_rows"])
def _sum_rows(  # type: ignore[no-untyped-def]
    values, slots, weights, summed, stride, width, num_reads, num_rows, ROWS: tl.constexpr, BLOCK_V: tl.constexpr
):
    """Program (token, block of columns) writes that block of summed[token]."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    begin = token * num_reads
    end = begin + num_reads
    total = sum_of_rows(values, stride, num_rows, slots, weights, begin, end, columns, width, ROWS, BLOCK_V)
    tl.store(summed + token * width + columns, narrow(total, summed.dtype.element_ty), mask=columns < width)


@triton.jit(do_not_specialize=["num_rows"])
def _dot_rows(  # type: ignore[no-untyped-def]
    table, slots, x, products, stride, width, num_reads, num_rows, READS: tl.constexpr, BLOCK_V: tl.constexpr
):
    """Program (token, block of reads) writes that block of products[token]."""
    token = tl.program_id(0).to(tl.int64)
    reads = tl.program_id(1) * READS + tl.arange(0, READS)
    real = reads < num_reads
    row = tl.load(slots + token * num_reads + reads, mask=real, other=-1).to(tl.int64)
    is_row = (row >= 0) & (row < num_rows)
    total = tl.zeros((READS, BLOCK_V), tl.float32)
    for first in range(0, width, BLOCK_V):
        columns = first + tl.arange(0, BLOCK_V)
        inside = columns < width
        wanted = tl.load(x + token * width + columns, mask=inside, other=0).to(tl.float32)
        offsets = row[:, None] * stride + columns[None, :]
        part = tl.load(table + offsets, mask=is_row[:, None] & inside[None, :], other=0)
        total += part.to(tl.float32) * wanted[None, :]
    product = tl.where(is_row, tl.sum(total, 1), float("nan"))
    tl.store(products + token * num_reads + reads, product, mask=real)
