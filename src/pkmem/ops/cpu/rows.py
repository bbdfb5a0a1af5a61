"""The rows of a table that were read: sorting the reads, then one pass over the touched rows.

The gradient of a row is summed in the order of its reads, by one thread, and used while it is in cache.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pkmem.ops import reference
from pkmem.ops.arguments import AdamStep, SortedReads, surely_finite, token_norms
from pkmem.ops.cpu.halves import mixed, narrow, narrow_at_random, widen
from pkmem.ops.cpu.kernels import array, inlined, kernel
from pkmem.ops.cpu.threads import run_over
from pkmem.ops.cpu.vectors import prefetch_row

_GRAIN_ELEMENTS = 1 << 17  # of a gradient, summed in about 50 us
_GRAIN_ROWS = 1 << 14  # whose norms are bounded, in about 50 us
_DIGIT_BITS = 11  # sorting: a table of counts that stays in the first cache
_LARGEST_INDEX = 1 << 31
_ASKED_BYTES = 512  # of a row and of each of its moments, ahead; more than 1 KiB fills the queue, and costs time
_READS_PER_SUM = 256  # a hot row is summed in pieces, which keeps the rounding error of long sums low


def sort_reads(slots: list[Tensor], weights: list[Tensor], grad_outputs: list[Tensor], num_rows: int) -> SortedReads:
    """See `Backend.sort_reads`; no segment is empty."""
    flat_slots = torch.cat([part.reshape(-1) for part in slots])
    num_reads = len(flat_slots)
    in_fp64 = torch.float64 in {part.dtype for part in (*weights, *grad_outputs)}
    if in_fp64 or max(num_rows, num_reads) > _LARGEST_INDEX:
        return reference.sort_reads(slots, weights, grad_outputs, num_rows)
    flat_weights = torch.cat([part.reshape(-1) for part in weights]).to(torch.float32)
    passes = np.array([part.shape for part in slots], dtype=np.int64).reshape(-1, 2)
    packed = np.empty((2, num_reads), np.int64)
    rows, offsets, tokens = (flat_slots.new_empty(size) for size in (num_reads, num_reads + 1, num_reads))
    sorted_weights = torch.empty_like(flat_weights)
    touched = sort(
        array(flat_slots), array(flat_weights), passes, (num_rows - 1).bit_length(), packed,
        array(rows), array(offsets), array(tokens), array(sorted_weights),
    )  # fmt: skip
    return SortedReads(
        rows=rows[:touched],
        offsets=offsets[: touched + 1],
        tokens=tokens,
        weights=sorted_weights,
        grad_output=torch.cat(grad_outputs),
    )


def weighted_sum_grad_values(reads: SortedReads, num_rows: int) -> Tensor:
    """See `Backend.weighted_sum_grad_values`."""
    if reads.grad_output.dtype == torch.float64:
        return reference.weighted_sum_grad_values(reads, num_rows)
    dense = reads.grad_output.new_zeros(num_rows, reads.grad_output.shape[1])
    _over_rows(write_gradients, reads, array(dense))
    return dense


def row_gradient_norm(reads: SortedReads) -> Tensor:
    """See `Backend.row_gradient_norm`."""
    if reads.grad_output.dtype == torch.float64:
        return reference.row_gradient_norm(reads)
    squares = reads.grad_output.new_empty(len(reads.rows), dtype=torch.float64)
    _over_rows(sum_squares, reads, array(squares))
    return torch.from_numpy(np.sqrt(array(squares).sum(keepdims=True))).squeeze(0)  # numpy's order never changes


def row_gradient_norm_bound(reads: SortedReads) -> float:
    """See `Backend.row_gradient_norm_bound`."""
    bounds = reads.weights.new_empty(len(reads.rows), dtype=torch.float64)
    weights = reads.weights.to(torch.float32)
    arguments = tuple(array(part) for part in (reads.offsets, reads.tokens, weights, token_norms(reads), bounds))
    run_over(bound_squares, arguments, len(reads.rows), _GRAIN_ROWS)
    return bounds.sum().sqrt().item()


def gradient_is_finite(reads: SortedReads) -> Tensor:
    """See `Backend.gradient_is_finite`; seldom more than a look at the factors."""
    found = surely_finite(reads)
    return found if found else row_gradient_norm(reads).isfinite()


def row_mean_squares(reads: SortedReads) -> Tensor:
    """See `Backend.row_mean_squares`; fp64 goes to the reference."""
    if reads.grad_output.dtype == torch.float64:
        return reference.row_mean_squares(reads)
    squares = reads.grad_output.new_empty(len(reads.rows), dtype=torch.float64)
    _over_rows(sum_squares, reads, array(squares))
    return squares.div_(reads.grad_output.shape[1])


def adam_rows(
    values: Tensor,
    first_moment: Tensor | None,
    second_moment: Tensor,
    reads: SortedReads,
    update: AdamStep,
    mean_squares: Tensor | None = None,
) -> None:
    """See `Backend.adam_rows`; fp64 goes to the reference."""
    tables = (values, first_moment, second_moment)
    if torch.float64 in (reads.grad_output.dtype, *(table.dtype for table in tables if table is not None)):
        reference.adam_rows(*tables, reads, update, mean_squares)
        return
    lr, step, scale, seed = float(update.lr), int(update.step), float(update.scale), update.seed
    if not math.isfinite(scale):
        return
    (beta1, beta2), (rate1, rate2) = update.betas, update.rates
    correction2 = 1.0 if beta2 == 1 else 1 / (1 - beta2**step)
    factors = (scale, rate1, beta2, rate2, correction2, update.eps, lr / (1 - beta1**step))
    key = np.array([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF, step, update.first_column], np.uint32)
    contiguous = tuple(None if table is None else table.contiguous() for table in tables)
    arrays = [None if table is None else array(table) for table in contiguous]
    arguments = (*arrays, np.array(factors, np.float32), key)
    if second_moment.dim() == 2:
        _over_rows(adam, reads, *arguments)
    else:
        _over_rows(adam_by_row, reads, *arguments, None if mean_squares is None else array(mean_squares))
    for table, updated in zip(tables, contiguous, strict=True):
        if table is not None and updated is not None and updated is not table:
            table.copy_(updated)


def _over_rows(row_kernel, reads: SortedReads, *arguments) -> None:  # type: ignore[no-untyped-def]
    """Calls a kernel over the touched rows: (rows, offsets, tokens, weights, grad_output, *arguments)."""
    gradient = (
        array(reads.rows),
        array(reads.offsets),
        array(reads.tokens),
        array(reads.weights.to(torch.float32)),
        array(reads.grad_output.to(torch.float32)),
    )
    run_over(row_kernel, (*gradient, *arguments), len(reads.rows), 1 + _GRAIN_ELEMENTS // reads.grad_output.shape[1])


@kernel
def sort(slots, weights, passes, bits, packed, rows, offsets, tokens, sorted_weights):  # type: ignore[no-untyped-def]
    """Sorts reads by slot, stably, a digit at a time, and returns the number of rows.

    Args:
        slots, weights: (r,) the reads.
        passes: (p, 2) tokens and reads per token of each backward pass.
        bits: how many a slot has at most.
        packed: (2, r) scratch: a slot and the number of its read in one integer.
        rows, offsets, tokens, sorted_weights: results, see `SortedReads`.
    """
    num_reads = len(slots)
    source, target = packed[0], packed[1]
    for read in range(num_reads):
        source[read] = (slots[read] << 32) | read
    num_digits = max(1, (bits + _DIGIT_BITS - 1) // _DIGIT_BITS)
    digit_bits = (bits + num_digits - 1) // num_digits
    mask = (1 << digit_bits) - 1
    for digit in range(num_digits):
        shift = 32 + digit * digit_bits
        begin = np.zeros(mask + 2, np.int64)
        for read in range(num_reads):
            begin[1 + ((source[read] >> shift) & mask)] += 1
        for bucket in range(mask):
            begin[bucket + 1] += begin[bucket]
        for read in range(num_reads):
            bucket = (source[read] >> shift) & mask
            target[begin[bucket]] = source[read]
            begin[bucket] += 1
        source, target = target, source
    # `target` is free now: the token of each read, in the order of reading.
    read = 0
    token = 0
    for number in range(len(passes)):
        for _ in range(passes[number, 0]):
            for _ in range(passes[number, 1]):
                target[read] = token
                read += 1
            token += 1
    num_rows = 0
    previous = np.int64(-1)
    for place in range(num_reads):
        slot, read = source[place] >> 32, source[place] & 0xFFFFFFFF
        tokens[place] = target[read]
        sorted_weights[place] = weights[read]
        if slot != previous:
            rows[num_rows] = slot
            offsets[num_rows] = place
            num_rows += 1
            previous = slot
    offsets[num_rows] = num_reads
    return num_rows


@inlined
def _row_gradient(begin, end, tokens, weights, grad_output, piece, gradient):  # type: ignore[no-untyped-def]
    """Sums weights * grad_output over the reads [begin, end) of a row into `gradient`; `piece` is scratch."""
    _sum_reads(begin, min(begin + _READS_PER_SUM, end), tokens, weights, grad_output, gradient)
    for start in range(begin + _READS_PER_SUM, end, _READS_PER_SUM):
        _sum_reads(start, min(start + _READS_PER_SUM, end), tokens, weights, grad_output, piece)
        for column in range(len(gradient)):
            gradient[column] += piece[column]


@inlined
def _sum_reads(begin, end, tokens, weights, grad_output, total):  # type: ignore[no-untyped-def]
    """Writes the sum of one read or more."""
    weight0, back0 = weights[begin], grad_output[tokens[begin]]
    if (end - begin) % 2:
        for column in range(len(total)):
            total[column] = weight0 * back0[column]
    else:
        weight1, back1 = weights[begin + 1], grad_output[tokens[begin + 1]]
        for column in range(len(total)):
            total[column] = weight0 * back0[column] + weight1 * back1[column]
    for read in range(begin + 2 - (end - begin) % 2, end, 2):
        weight0, back0 = weights[read], grad_output[tokens[read]]
        weight1, back1 = weights[read + 1], grad_output[tokens[read + 1]]
        for column in range(len(total)):
            total[column] += weight0 * back0[column] + weight1 * back1[column]


@kernel
def write_gradients(rows, offsets, tokens, weights, grad_output, dense, first, last):  # type: ignore[no-untyped-def]
    """Writes dense[rows[first:last]]."""
    width = grad_output.shape[1]
    gradient, piece = np.empty(width, np.float32), np.empty(width, np.float32)
    for touched in range(first, last):
        _row_gradient(offsets[touched], offsets[touched + 1], tokens, weights, grad_output, piece, gradient)
        row = dense[rows[touched]]
        for column in range(width):
            row[column] = narrow(gradient[column], row[column])


@kernel
def sum_squares(rows, offsets, tokens, weights, grad_output, squares, first, last):  # type: ignore[no-untyped-def]
    """Writes squares[first:last]."""
    width = grad_output.shape[1]
    gradient, piece = np.empty(width, np.float32), np.empty(width, np.float32)
    for touched in range(first, last):
        _row_gradient(offsets[touched], offsets[touched + 1], tokens, weights, grad_output, piece, gradient)
        total = 0.0
        for column in range(width):
            total += np.float64(gradient[column]) * np.float64(gradient[column])
        squares[touched] = total


@inlined
def _ask_for(row, values, moments1, moments2):  # type: ignore[no-untyped-def]
    """Asks for a row's first lines while the one before is updated. In a loop of its own: the update's stays vectors."""
    prefetch_row(values, row, _ASKED_BYTES)
    prefetch_row(moments2, row, _ASKED_BYTES)
    if moments1 is not None:
        prefetch_row(moments1, row, _ASKED_BYTES)


@kernel
def bound_squares(offsets, tokens, weights, norms, bounds, first, last):  # type: ignore[no-untyped-def]
    """Writes bounds[first:last]: of a row's n reads, n times the sum of their squares."""
    for touched in range(first, last):
        total = 0.0
        for read in range(offsets[touched], offsets[touched + 1]):
            length = weights[read] * norms[tokens[read]]
            total += length * length
        bounds[touched] = total * (offsets[touched + 1] - offsets[touched])


@kernel
def adam(rows, offsets, tokens, weights, grad_output, values, moments1, moments2, factors, key, first, last):  # type: ignore[no-untyped-def]
    """Updates the rows rows[first:last] of values and moments."""
    width = grad_output.shape[1]
    gradient, piece = np.empty(width, np.float32), np.empty(width, np.float32)
    scale, rate1, beta2, rate2, correction2, eps, step_size = factors
    for touched in range(first, last):
        _ask_for(rows[min(touched + 1, last - 1)], values, moments1, moments2)
        _row_gradient(offsets[touched], offsets[touched + 1], tokens, weights, grad_output, piece, gradient)
        row = rows[touched]
        row_key = mixed(mixed(mixed(mixed(key[0]) ^ key[1]) ^ key[2]) ^ np.uint32(row))
        value, moment2 = values[row], moments2[row]
        if moments1 is not None:
            moment1 = moments1[row]
        for column in range(width):
            slope = gradient[column] * scale
            random = mixed(row_key ^ np.uint32(column + key[3]))
            new1 = slope
            if moments1 is not None:
                new1 = widen(moment1[column])
                new1 += rate1 * (slope - new1)
            new2 = beta2 * widen(moment2[column]) + rate2 * (slope * slope)
            change = step_size * new1 / (np.sqrt(new2 * correction2) + eps)
            value[column] = narrow_at_random(widen(value[column]) - change, value[column], random)
            if moments1 is not None:
                moment1[column] = narrow_at_random(new1, moment1[column], random >> np.uint32(16))
            moment2[column] = narrow_at_random(new2, moment2[column], random >> np.uint32(16))


@kernel
def adam_by_row(  # type: ignore[no-untyped-def]
    rows, offsets, tokens, weights, grad_output, values, moments1, moments2, factors, key, mean_squares, first, last
):
    """The same where a row has one second moment; without `mean_squares`, of the columns that are here."""
    width = grad_output.shape[1]
    gradient, piece = np.empty(width, np.float32), np.empty(width, np.float32)
    scale, rate1, beta2, rate2, correction2, eps, step_size = factors
    for touched in range(first, last):
        _ask_for(rows[min(touched + 1, last - 1)], values, moments1, moments2)
        _row_gradient(offsets[touched], offsets[touched + 1], tokens, weights, grad_output, piece, gradient)
        row = rows[touched]
        row_key = mixed(mixed(mixed(mixed(key[0]) ^ key[1]) ^ key[2]) ^ np.uint32(row))
        if mean_squares is None:
            square = 0.0
            for column in range(width):
                square += np.float64(gradient[column]) * np.float64(gradient[column])
            square /= width
        else:
            square = mean_squares[touched]
        new2 = np.float32(beta2 * np.float64(moments2[row]) + rate2 * (np.float64(scale) * scale * square))
        moments2[row] = new2
        rate = step_size / (np.sqrt(new2 * correction2) + eps)
        value = values[row]
        if moments1 is not None:
            moment1 = moments1[row]
        for column in range(width):
            random = mixed(row_key ^ np.uint32(column + key[3]))
            new1 = gradient[column] * scale
            if moments1 is not None:
                old1 = widen(moment1[column])
                new1 = old1 + rate1 * (new1 - old1)
            value[column] = narrow_at_random(widen(value[column]) - rate * new1, value[column], random)
            if moments1 is not None:
                moment1[column] = narrow_at_random(new1, moment1[column], random >> np.uint32(16))
