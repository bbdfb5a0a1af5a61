"""The rows of a table that were read, in plain torch: sorting the reads, their gradient, and Adam on them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pkmem.ops.arguments import AdamStep, SortedReads, surely_finite, token_norms
from pkmem.ops.reference import chunks
from pkmem.ops.rounding import random_bits, random_keys, rounded_at_random

_BYTES_OF_ADAM = 24  # that adam_rows holds of each element of a chunk


def sort_reads(slots: list[Tensor], weights: list[Tensor], grad_outputs: list[Tensor], num_rows: int) -> SortedReads:
    """See `Backend.sort_reads`; no segment is empty on a CPU."""
    reads = sort_without_waiting(slots, weights, grad_outputs, num_rows)
    if not reads.rows.is_cpu:
        return reads
    return replace(reads, rows=reads.rows[: len(reads.host_offsets) - 1], offsets=reads.host_offsets)


def sort_without_waiting(
    slots: list[Tensor], weights: list[Tensor], grad_outputs: list[Tensor], num_rows: int
) -> SortedReads:
    """See `Backend.sort_reads`; the host does not learn how many rows were read: empty segments follow theirs."""
    flat = torch.cat([part.reshape(-1) for part in slots])
    num_reads, device = len(flat), flat.device
    if num_rows <= 1 << 31:
        flat = flat.to(torch.int32)  # halves the sorting
    ordered, order = flat.sort(stable=True)
    is_first = torch.ones(num_reads, dtype=torch.bool, device=device)
    torch.ne(ordered[1:], ordered[:-1], out=is_first[1:])
    # Where each row's reads begin; all reads that begin nothing are dropped at the end.
    place = torch.where(is_first, is_first.cumsum(0) - 1, num_reads + 1)
    offsets = torch.full((num_reads + 2,), num_reads, dtype=torch.int64, device=device)
    offsets.scatter_(0, place, torch.arange(num_reads, device=device))
    offsets = offsets[: min(num_reads, num_rows) + 1]
    return SortedReads(
        rows=ordered.index_select(0, offsets[:-1].clamp(max=max(num_reads - 1, 0))).to(torch.int64),
        offsets=offsets,
        tokens=_tokens(slots).index_select(0, order),
        weights=torch.cat([part.reshape(-1) for part in weights]).index_select(0, order),
        grad_output=grad_outputs[0] if len(grad_outputs) == 1 else torch.cat(grad_outputs),
    )


def _tokens(slots: list[Tensor]) -> Tensor:
    """Row of `grad_output` of each read, in the order of reading."""
    tokens, first = [], 0
    for part in slots:
        reading = torch.arange(first, first + part.shape[0], device=part.device)
        tokens.append(reading[:, None].expand(part.shape).reshape(-1))
        first += part.shape[0]
    return torch.cat(tokens)


def row_gradients(reads: SortedReads) -> Iterator[tuple[slice, Tensor]]:
    """The gradient of each row read, a chunk of rows at a time.

    Args:
        reads: the sorted reading log of a table of width v.

    Yields:
        part: which of `reads.rows` these are.
        gradients: (c, v) fp32 (fp64 for an fp64 table), summed in the order of the reads.
    """
    dtype = torch.promote_types(reads.grad_output.dtype, torch.float32)
    grad_output, weights = reads.grad_output.to(dtype), reads.weights.to(dtype)
    size = chunks.chunk_size(_BYTES_OF_ADAM * grad_output.shape[1], weights.device, chunks.ROWS_BYTES)
    num_rows = len(reads.host_offsets) - 1
    for first in range(0, num_rows, size):
        part = slice(first, min(first + size, num_rows))
        begin, end = reads.host_offsets[[part.start, part.stop]].tolist()
        yield part, F.embedding_bag(
            reads.tokens[begin:end], grad_output, reads.offsets[part.start : part.stop + 1] - begin, mode="sum",
            per_sample_weights=weights[begin:end], include_last_offset=True,
        )  # fmt: skip


def weighted_sum_grad_values(reads: SortedReads, num_rows: int) -> Tensor:
    """See `Backend.weighted_sum_grad_values`."""
    dense = reads.grad_output.new_zeros(num_rows, reads.grad_output.shape[1])
    for part, gradients in row_gradients(reads):
        dense.index_copy_(0, reads.rows[part], gradients.to(dense.dtype))
    return dense


def row_gradient_norm(reads: SortedReads) -> Tensor:
    """See `Backend.row_gradient_norm`."""
    norm = torch.zeros((), dtype=torch.float64, device=reads.grad_output.device)
    for _, gradients in row_gradients(reads):
        norm = torch.hypot(norm, torch.linalg.vector_norm(gradients, dtype=torch.float64))  # squares would overflow
    return norm


def row_gradient_norm_bound(reads: SortedReads) -> float:
    """See `Backend.row_gradient_norm_bound`."""
    if not reads.rows.is_cpu:
        return math.inf
    lengths = token_norms(reads)[reads.tokens] * reads.weights
    counts = reads.offsets.diff()
    return torch.linalg.vector_norm(lengths * counts.double().sqrt().repeat_interleave(counts)).item()


def gradient_is_finite(reads: SortedReads) -> Tensor:
    """See `Backend.gradient_is_finite`; seldom more than a look at the factors."""
    surely = surely_finite(reads)
    return surely if surely else row_gradient_norm(reads).isfinite()


def row_mean_squares(reads: SortedReads) -> Tensor:
    """See `Backend.row_mean_squares`."""
    squares = reads.grad_output.new_zeros(len(reads.rows), dtype=torch.float64)
    for part, gradients in row_gradients(reads):
        squares[part] = gradients.double().square().mean(1)
    return squares


def adam_rows(
    values: Tensor,
    first_moment: Tensor | None,
    second_moment: Tensor,
    reads: SortedReads,
    update: AdamStep,
    mean_squares: Tensor | None = None,
) -> None:
    """See `Backend.adam_rows`."""
    scale, step_size, correction, step = adam_factors(update, values.device)
    is_finite = scale.isfinite()
    beta2, (rate1, rate2) = update.betas[1], update.rates
    tables = (values, second_moment) if first_moment is None else (values, first_moment, second_moment)
    is_rounded = torch.bfloat16 in {table.dtype for table in tables}
    keys = random_keys(update.seed, step, reads.rows) if is_rounded else None

    def step_by(part: slice, gradients: Tensor) -> None:
        rows = reads.rows[part]
        random = None if keys is None else random_bits(keys[part], update.first_column, values.shape[1])
        squares = None
        if second_moment.dim() == 1:
            if mean_squares is None:
                squares = gradients.double().square().mean(1)
            else:
                squares = mean_squares[part] * scale.square()
        first = gradients
        if first_moment is not None:
            old = first_moment.index_select(0, rows)
            first = old.to(gradients.dtype).lerp(gradients, rate1)
            write(first_moment, rows, old, first, random, 16)
        old = second_moment.index_select(0, rows)
        if squares is not None:
            second = old.double() * beta2 + squares * rate2
            write(second_moment, rows, old, second, None, 0)
            second = second.to(gradients.dtype).unsqueeze(1)
        else:
            second = (old.to(gradients.dtype) * beta2).addcmul_(gradients, gradients, value=rate2)
            write(second_moment, rows, old, second, random, 16)
        change = first.div_(second.mul_(correction).sqrt_().add_(update.eps)).mul_(step_size)
        del first, second  # makes room
        old = values.index_select(0, rows)
        write(values, rows, old, old.to(gradients.dtype) - change, random, 0)

    def write(table: Tensor, rows: Tensor, old: Tensor, new: Tensor, random: Tensor | None, shift: int) -> None:
        """Values are rounded by the low half of the random bits, moments by the high."""
        if table.dtype == torch.bfloat16 and random is not None:
            new = rounded_at_random(new, random, shift)
        table.index_copy_(0, rows, torch.where(is_finite, new.to(table.dtype), old))

    for part, gradients in row_gradients(reads):
        step_by(part, gradients.mul_(scale))
        del gradients  # makes room for the next


def adam_factors(update: AdamStep, device: torch.device) -> Tensor:
    """(scale, step size, correction of the second moment, step) on the device, fp64."""
    count = _scalar(update.step, device)
    step_size = _scalar(update.lr, device) / (1 - torch.pow(update.betas[0], count))
    correction = torch.ones_like(count) if update.betas[1] == 1 else 1 / (1 - torch.pow(update.betas[1], count))
    return torch.stack((_scalar(update.scale, device), step_size, correction, count))


def _scalar(number: float | Tensor, device: torch.device) -> Tensor:
    """An fp64 scalar on the device; a number is filled in there, since a copy to a GPU would wait."""
    if isinstance(number, Tensor) and number.device == device:
        return number.to(torch.float64).reshape(())
    return torch.full((), float(number), dtype=torch.float64, device=device)
