"""The rows of a table that were read: one pass over the touched rows.

How many rows were touched stays on the GPU: sorted reads keep room for as many rows as there can be, programs take
row after row up to the number they load, and nothing is read back. A row's gradient is summed by one program in the
order of its reads; a row with many reads is first summed in pieces by several. No atomics: every run gives the same
bits.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from pkmem.ops import reference
from pkmem.ops.arguments import AdamStep, SortedReads, surely_finite
from pkmem.ops.reference.rows import adam_factors
from pkmem.ops.triton.arithmetic import mixed, narrow, narrow_at_random
from pkmem.ops.triton.bag import sum_of_rows
from pkmem.ops.triton.device import on
from pkmem.ops.triton.launch import column_block, num_programs, warps_for

_PIECE = tl.constexpr(256)  # reads that one program sums
_ROWS = 4  # rows in flight per program; most rows have few reads
_ROWS_AT_ONCE = tl.constexpr(256)  # whose second moments a program updates, where a row has one
_NEIGHBOURS = tl.constexpr(16)  # columns whose squares are summed in fp32


def weighted_sum_grad_values(reads: SortedReads, num_rows: int) -> Tensor:
    """See `Backend.weighted_sum_grad_values`; fp64 goes to the reference."""
    if reads.grad_output.dtype == torch.float64:
        return reference.weighted_sum_grad_values(reads, num_rows)
    dense = torch.zeros(num_rows, reads.grad_output.shape[1], dtype=reads.grad_output.dtype, device=reads.rows.device)
    _over_rows(_write_gradients, reads, dense, num_rows)
    return dense


def row_gradient_norm(reads: SortedReads) -> Tensor:
    """See `Backend.row_gradient_norm`; fp64 goes to the reference."""
    if reads.grad_output.dtype == torch.float64:
        return reference.row_gradient_norm(reads)
    return _norm_if(torch.ones((), dtype=torch.bool, device=reads.rows.device), reads)


def row_gradient_norm_bound(reads: SortedReads) -> float:
    """See `Backend.row_gradient_norm_bound`: there is none."""
    return math.inf


def gradient_is_finite(reads: SortedReads) -> Tensor:
    """See `Backend.gradient_is_finite`; seldom more than a look at the factors."""
    if reads.grad_output.dtype == torch.float64:
        return reference.gradient_is_finite(reads)
    return _norm_if(~surely_finite(reads), reads).isfinite()


def _norm_if(is_wanted: Tensor, reads: SortedReads) -> Tensor:
    """The norm, or 0 at once if it is not wanted, which only the GPU needs to know."""
    squares = torch.zeros(num_programs(_work(reads), reads.rows.device), dtype=torch.float64, device=reads.rows.device)
    _over_rows(_sum_squares, reads, squares, is_wanted.to(torch.int32))
    return squares.sum().sqrt()


def row_mean_squares(reads: SortedReads) -> Tensor:
    """See `Backend.row_mean_squares`; fp64 goes to the reference."""
    if reads.grad_output.dtype == torch.float64:
        return reference.row_mean_squares(reads)
    squares = torch.zeros(len(reads.rows), dtype=torch.float64, device=reads.rows.device)
    _over_rows(_mean_squares, reads, squares, by_blocks=False)
    return squares


def adam_rows(
    values: Tensor,
    first_moment: Tensor | None,
    second_moment: Tensor,
    reads: SortedReads,
    update: AdamStep,
    mean_squares: Tensor | None = None,
) -> None:
    """See `Backend.adam_rows`; waits for nothing where lr, step and scale are 0-d tensors on the GPU.

    fp64 goes to the reference, which does wait.
    """
    tables = (values, first_moment, second_moment)
    if torch.float64 in (reads.grad_output.dtype, *(table.dtype for table in tables if table is not None)):
        reference.adam_rows(*tables, reads, update, mean_squares)
        return
    first = None if first_moment is None else first_moment.contiguous()
    contiguous = values.contiguous(), first, second_moment.contiguous()
    seed = update.seed
    factors = adam_factors(update, values.device)
    divisors = None
    if second_moment.dim() == 1:
        squares = row_mean_squares(reads) if mean_squares is None else mean_squares
        divisors = torch.empty(len(reads.rows), device=values.device)
        _update_of_rows(contiguous[2], squares, divisors, reads, factors, update)
    keys = (_as_int32(seed), _as_int32(seed >> 32), update.first_column)
    rates = (*update.betas, *update.rates)
    _over_rows(_adam, reads, *contiguous, divisors, len(values), factors, *rates, update.eps, *keys)
    for table, updated in zip(tables, contiguous, strict=True):
        if table is not None and updated is not None and updated is not table:
            table.copy_(updated)


def _update_of_rows(
    second_moment: Tensor,
    squares: Tensor,
    divisors: Tensor,
    reads: SortedReads,
    factors: Tensor,
    update: AdamStep,
) -> None:
    """Updates one second moment a row, and writes what the row's update is divided by."""
    num_reads = len(reads.rows)
    if num_reads == 0:
        return
    with on(reads.rows):
        _second_of_rows[(triton.cdiv(num_reads, _ROWS_AT_ONCE.value),)](
            reads.rows, reads.offsets, squares, second_moment, divisors, num_reads, len(second_moment), factors,
            update.betas[1], update.rates[1], update.eps,
        )  # fmt: skip


def _as_int32(number: int) -> int:
    return ((number & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


class _Pieces(NamedTuple):
    """Rows with more than _PIECE reads, cut into pieces.

    Args:
        first: (u + 1,) the pieces of row i are first[i] up to first[i + 1]; rows with few reads have none.
        rows: (p,) the row of each piece there can be.
        sums: (p, v) fp32 sum of each piece.
    """

    first: Tensor
    rows: Tensor
    sums: Tensor


def _over_rows(kernel: Any, reads: SortedReads, *arguments: Any, by_blocks: bool = True) -> None:
    """Runs a kernel over (touched row, block of columns), or over touched rows: gradient, then `arguments`."""
    width = reads.grad_output.shape[1]
    if len(reads.tokens) == 0 or width == 0:
        return
    block = column_block(width)
    device = reads.rows.device
    gradient = (reads.offsets, reads.tokens, reads.weights.contiguous(), reads.grad_output.contiguous())
    num_rows = (reads.offsets[1:] > reads.offsets[:-1]).sum()
    pieces = _pieces(reads)
    shape = {"ROWS": _ROWS, "BLOCK_V": block, "num_warps": warps_for(block)}
    with on(reads.rows):
        if len(pieces.rows):
            work = len(pieces.rows) * triton.cdiv(width, block)
            _sum_pieces[num_programs(work, device),](*gradient, *pieces, len(reads.rows), width, **shape)
        kernel[num_programs(_work(reads) if by_blocks else len(reads.rows), device),](
            *gradient, pieces.first, pieces.sums, reads.rows, num_rows, width, *arguments, **shape
        )  # fmt: skip


def _work(reads: SortedReads) -> int:
    width = reads.grad_output.shape[1]
    return len(reads.rows) * triton.cdiv(width, column_block(width))


def _pieces(reads: SortedReads) -> _Pieces:
    device = reads.rows.device
    counts = reads.offsets.diff()
    longest = _PIECE.value
    per_row = torch.where(counts > longest, (counts + (longest - 1)) // longest, 0)
    first = F.pad(per_row.cumsum(0), (1, 0))
    most = 2 * len(reads.tokens) // longest if len(reads.tokens) > longest else 0
    rows = torch.searchsorted(first, torch.arange(most, device=device), right=True) - 1
    return _Pieces(first, rows, torch.empty(most, reads.grad_output.shape[1], device=device))


@triton.jit(do_not_specialize=["num_rows"])
def _sum_pieces(  # type: ignore[no-untyped-def]
    offsets, tokens, weights, grad_output, first_piece, piece_rows, sums, num_rows, width,
    ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Writes the sum of every piece."""
    blocks = tl.cdiv(width, BLOCK_V)
    work = tl.load(first_piece + num_rows) * blocks
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        piece = (item // blocks).to(tl.int64)
        columns = item % blocks * BLOCK_V + tl.arange(0, BLOCK_V)
        row = tl.load(piece_rows + piece)
        begin = tl.load(offsets + row) + (piece - tl.load(first_piece + row)) * _PIECE
        end = tl.minimum(begin + _PIECE, tl.load(offsets + row + 1))
        total = sum_of_rows(grad_output, width, None, tokens, weights, begin, end, columns, width, ROWS, BLOCK_V)
        tl.store(sums + piece * width + columns, total, mask=columns < width)


@triton.jit
def _row_gradient(  # type: ignore[no-untyped-def]
    touched, offsets, tokens, weights, grad_output, first_piece, sums,
    columns, width, ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Part (BLOCK_V,) of the gradient of a touched row, fp32."""
    begin = tl.load(offsets + touched)
    end = tl.load(offsets + touched + 1)
    if end - begin > _PIECE:
        gradient = tl.zeros((BLOCK_V,), tl.float32)
        for piece in range(tl.load(first_piece + touched), tl.load(first_piece + touched + 1)):
            gradient += tl.load(sums + piece * width + columns, mask=columns < width, other=0)
    else:
        gradient = sum_of_rows(grad_output, width, None, tokens, weights, begin, end, columns, width, ROWS, BLOCK_V)
    return gradient


@triton.jit(do_not_specialize=["table_size"])
def _write_gradients(  # type: ignore[no-untyped-def]
    offsets, tokens, weights, grad_output, first_piece, sums, rows, num_rows, width, dense, table_size,
    ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Writes the touched rows of `dense`, which has `table_size`."""
    blocks = tl.cdiv(width, BLOCK_V)
    for item in range(tl.program_id(0), tl.load(num_rows) * blocks, tl.num_programs(0)):
        touched = (item // blocks).to(tl.int64)
        columns = item % blocks * BLOCK_V + tl.arange(0, BLOCK_V)
        gradient = _row_gradient(
            touched, offsets, tokens, weights, grad_output, first_piece, sums, columns, width, ROWS, BLOCK_V
        )
        row = tl.load(rows + touched)
        inside = (columns < width) & (row >= 0) & (row < table_size)
        tl.store(dense + (row * width + columns), narrow(gradient, dense.dtype.element_ty), mask=inside)


@triton.jit
def _squares(gradient, BLOCK_V: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sums (BLOCK_V / _NEIGHBOURS,) fp64 of neighbours' squares.

    fp64 is slow on most GPUs: neighbours are scaled to at most 4 and squared and summed in fp32.
    """
    neighbours = tl.reshape(gradient, (BLOCK_V // _NEIGHBOURS, _NEIGHBOURS))
    bits = tl.max(tl.abs(neighbours), 1).to(tl.int32, bitcast=True)
    exponent = tl.minimum(tl.maximum((bits >> 23) - 127, -126), 126)
    scaled = neighbours * ((127 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
    unit = ((2 * exponent + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)  # 2 ** exponent, squared
    return tl.sum(scaled * scaled, 1).to(tl.float64) * unit


@triton.jit
def _sum_squares(  # type: ignore[no-untyped-def]
    offsets, tokens, weights, grad_output, first_piece, sums, rows, num_rows, width, squares, is_wanted,
    ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Each program writes the sum of squares over its rows."""
    blocks = tl.cdiv(width, BLOCK_V)
    total = tl.zeros((BLOCK_V // _NEIGHBOURS,), tl.float64)
    for item in range(tl.program_id(0), tl.load(num_rows) * blocks * tl.load(is_wanted), tl.num_programs(0)):
        touched = (item // blocks).to(tl.int64)
        columns = item % blocks * BLOCK_V + tl.arange(0, BLOCK_V)
        gradient = _row_gradient(
            touched, offsets, tokens, weights, grad_output, first_piece, sums, columns, width, ROWS, BLOCK_V
        )
        total += _squares(gradient, BLOCK_V)
    tl.store(squares + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def _mean_squares(  # type: ignore[no-untyped-def]
    offsets, tokens, weights, grad_output, first_piece, sums, rows, num_rows, width, squares,
    ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Writes the mean square of the gradient of every touched row."""
    for touched in range(tl.program_id(0), tl.load(num_rows), tl.num_programs(0)):
        total = tl.zeros((BLOCK_V // _NEIGHBOURS,), tl.float64)
        for start in range(0, width, BLOCK_V):
            columns = start + tl.arange(0, BLOCK_V)
            gradient = _row_gradient(
                touched, offsets, tokens, weights, grad_output, first_piece, sums, columns, width, ROWS, BLOCK_V
            )
            total += _squares(gradient, BLOCK_V)
        tl.store(squares + touched, tl.sum(total, 0) / width)


@triton.jit(do_not_specialize=["num_segments", "table_size"])
def _second_of_rows(  # type: ignore[no-untyped-def]
    rows, offsets, squares, moments2, divisors, num_segments, table_size, factors, beta2, rate2, eps,
):  # fmt: skip
    """Updates the second moments of the rows of segments that are not empty, and writes what their updates are divided by."""
    scale = tl.load(factors)
    correction2 = tl.load(factors + 2).to(tl.float32)
    segment = tl.program_id(0).to(tl.int64) * _ROWS_AT_ONCE + tl.arange(0, _ROWS_AT_ONCE)
    is_segment = segment < tl.where(scale - scale == 0.0, num_segments, 0)  # none if scale is not finite
    begin = tl.load(offsets + segment, mask=is_segment, other=0)
    end = tl.load(offsets + segment + 1, mask=is_segment, other=0)
    row = tl.load(rows + segment, mask=is_segment, other=-1)
    inside = is_segment & (end > begin) & (row >= 0) & (row < table_size)
    moment = tl.load(moments2 + row, mask=inside, other=0)
    square = scale * scale * tl.load(squares + segment, mask=inside, other=0)
    moment = (beta2 * moment.to(tl.float64) + rate2 * square).to(tl.float32)
    tl.store(moments2 + row, moment, mask=inside)
    tl.store(divisors + segment, tl.sqrt(moment * correction2) + eps, mask=inside)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "first_column", "table_size"])
def _adam(  # type: ignore[no-untyped-def]
    offsets, tokens, weights, grad_output, first_piece, sums, rows, num_rows, width,
    values, moments1, moments2, divisors, table_size, factors, beta1, beta2, rate1, rate2, eps, seed_low, seed_high,
    first_column,
    ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Updates the touched rows of values and moments, which have `table_size`; one outside is left out.

    With `divisors` a row has one second moment, which is updated already; without `moments1` there is no first.
    """
    scale = tl.load(factors).to(tl.float32)
    step_size = tl.load(factors + 1).to(tl.float32)
    correction2 = tl.load(factors + 2).to(tl.float32)
    step = tl.load(factors + 3).to(tl.int64).to(tl.uint32)
    key = mixed(mixed(mixed(seed_low.to(tl.uint32)) ^ seed_high.to(tl.uint32)) ^ step)
    blocks = tl.cdiv(width, BLOCK_V)
    work = tl.where(scale - scale == 0.0, tl.load(num_rows) * blocks, 0)  # nothing if scale is not finite
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        touched = (item // blocks).to(tl.int64)
        columns = item % blocks * BLOCK_V + tl.arange(0, BLOCK_V)
        row = tl.load(rows + touched)
        inside = (columns < width) & (row >= 0) & (row < table_size)
        places = row * width + columns
        # Loaded first: they are on their way while the gradient is summed.
        value = tl.load(values + places, mask=inside, other=0).to(tl.float32)
        if moments1 is not None:
            moment1 = tl.load(moments1 + places, mask=inside, other=0).to(tl.float32)
        if divisors is None:
            moment2 = tl.load(moments2 + places, mask=inside, other=0).to(tl.float32)
        slope = scale * _row_gradient(
            touched, offsets, tokens, weights, grad_output, first_piece, sums, columns, width, ROWS, BLOCK_V
        )
        random = mixed(mixed(key ^ row.to(tl.uint32)) ^ (columns + first_column).to(tl.uint32))
        if moments1 is not None:
            first = moment1 + rate1 * (slope - moment1)
            kept1 = narrow_at_random(first, random >> 16, moments1.dtype.element_ty)
            tl.store(moments1 + places, kept1, mask=inside)
        else:
            first = slope
        if divisors is None:
            moment2 = beta2 * moment2 + rate2 * (slope * slope)
            divisor = tl.sqrt(moment2 * correction2) + eps
            kept2 = narrow_at_random(moment2, random >> 16, moments2.dtype.element_ty)
            tl.store(moments2 + places, kept2, mask=inside)
        else:
            divisor = tl.load(divisors + touched)
        value -= step_size * first / divisor
        tl.store(values + places, narrow_at_random(value, random, values.dtype.element_ty), mask=inside)
