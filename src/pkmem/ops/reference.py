"""The meaning of the operators in plain torch (Lample et al. 2019, section 3.1, eq. 1-4).

Every other backend computes the same and is tested against this one. Two calculations are worth knowing:

- exactness: with both halves sorted, the pair of ranks (i, j), counted from 0, is preceded by
  (i + 1)(j + 1) - 1 pairs that are at least as good, so only pairs with (i + 1)(j + 1) <= knn can win;
- ties: a score and a slot are packed into one integer, so that equal scores go by lower slot on every
  device, which `torch.topk` alone does not promise.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pkmem.ops.arguments import AdamStep, LayerWeights, SortedReads

_WORD = 0xFFFFFFFF
_CHUNK_BYTES = 1 << 20  # what a pass over rows keeps in cache; 5x faster than all rows at once


def product_key_topk(query: Tensor, sub_keys: Tensor, knn: int) -> tuple[Tensor, Tensor]:
    """See `Backend.product_key_topk`."""
    num_sub_keys = sub_keys.shape[2]
    half_scores, half_ranks = [], []
    for half, keys in zip(query.chunk(2, dim=-1), sub_keys.unbind(1), strict=True):
        scores = inner_products(half, keys)  # (n, h, s)
        indices = torch.arange(num_sub_keys, device=query.device).expand_as(scores)
        best_scores, best_indices = best_first(scores, indices, knn, num_sub_keys)
        half_scores.append(best_scores)
        half_ranks.append(best_indices)
    first, second = _pairs_that_can_win(knn, query.device)
    scores = half_scores[0][..., first] + half_scores[1][..., second]
    slots = half_ranks[0][..., first] * num_sub_keys + half_ranks[1][..., second]
    return best_first(scores, slots, knn, num_sub_keys**2)


def scores_of_slots(query: Tensor, sub_keys: Tensor, slots: Tensor) -> Tensor:
    """The scores (n, h, knn) of slots chosen already, by operations that torch differentiates any number of times."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    num_sub_keys = sub_keys.shape[2]
    first_row = torch.arange(len(sub_keys), device=slots.device).unsqueeze(-1) * num_sub_keys  # of each head
    scores = []
    for half, keys, chosen in zip(
        query.to(dtype).chunk(2, dim=-1),
        sub_keys.to(dtype).unbind(1),
        (slots // num_sub_keys, slots % num_sub_keys),
        strict=True,
    ):
        rows = F.embedding(first_row + chosen, keys.flatten(0, 1))
        scores.append((rows * half.unsqueeze(-2)).sum(-1))
    return scores[0] + scores[1]


def product_key_topk_backward(
    grad_scores: Tensor, query: Tensor, sub_keys: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor]:
    """See `Backend.product_key_topk_backward`."""
    num_sub_keys = sub_keys.shape[2]
    grad_query, grad_sub_keys = [], []
    for half, keys, chosen in zip(
        query.chunk(2, dim=-1), sub_keys.unbind(1), (slots // num_sub_keys, slots % num_sub_keys), strict=True
    ):
        grad_half_scores = grad_scores.new_zeros(*slots.shape[:2], num_sub_keys)
        grad_half_scores.scatter_add_(-1, chosen, grad_scores)
        by_head = grad_half_scores.transpose(0, 1)  # (h, n, s)
        with torch.autocast(query.device.type, enabled=False):
            grad_query.append((by_head @ keys.to(by_head.dtype)).transpose(0, 1))
            grad_sub_keys.append(by_head.mT @ half.to(by_head.dtype).transpose(0, 1))
    return torch.cat(grad_query, -1).to(query.dtype), torch.stack(grad_sub_keys, 1).to(sub_keys.dtype)


def flat_topk(query: Tensor, keys: Tensor, knn: int) -> Tensor:
    """See `Backend.flat_topk`; makes all scores at once."""
    num_slots = keys.shape[1]
    scores = inner_products(query, keys)  # (n, h, m)
    slots = torch.arange(num_slots, device=query.device).expand_as(scores)
    return best_first(scores, slots, knn, num_slots)[1]


def inner_products(query: Tensor, keys: Tensor) -> Tensor:
    """Scores (n, h, s) of queries (n, h, q) with keys (h, s, q), in fp32 (fp64 for fp64 input)."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    with torch.autocast(query.device.type, enabled=False):
        return (query.to(dtype).transpose(0, 1) @ keys.to(dtype).mT).transpose(0, 1)


def best_first(scores: Tensor, slots: Tensor, knn: int, num_slots: int) -> tuple[Tensor, Tensor]:
    """The `knn` highest scores of each row and their slots, best first, equal scores by lower slot.

    Args:
        scores: (..., c) of any floating dtype.
        slots: (..., c) int64, in [0, num_slots), no slot twice in a row.
        knn: how many to keep, in [1, c].
        num_slots: bound of the slots.

    Returns:
        scores, slots: (..., knn).
    """
    if scores.dtype != torch.float32 or num_slots > 1 << 32:
        slots, order = slots.sort(dim=-1)
        scores, order = scores.gather(-1, order).sort(dim=-1, descending=True, stable=True)
        return scores[..., :knn], slots.gather(-1, order)[..., :knn]
    # Signed-magnitude to two's complement makes the bits of a float ordered like the float; + 0.0 drops -0.0.
    bits = (scores + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    packed = (ordered.to(torch.int64) << 32) - slots
    packed = packed.topk(knn, dim=-1).values
    slots = -packed & 0xFFFFFFFF
    ordered = ((packed + slots) >> 32).to(torch.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32), slots


def _pairs_that_can_win(knn: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rank = torch.arange(1, knn + 1, device=device)
    first, second = (rank[:, None] * rank[None, :] <= knn).nonzero(as_tuple=True)
    return first, second


def weighted_sum(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """See `Backend.weighted_sum`."""
    if slots.numel() == 0:  # embedding_bag refuses bags of nothing
        return values.new_zeros(slots.shape[0], values.shape[1])
    if values.dtype in (torch.float32, torch.float64):
        return F.embedding_bag(slots, values, mode="sum", per_sample_weights=weights.to(values.dtype))
    summed = values.new_empty(slots.shape[0], values.shape[1])
    for part in _chunks_of_tokens(slots, values):
        rows = values[slots[part]].to(torch.float32)
        summed[part] = (weights[part].to(torch.float32).unsqueeze(1) @ rows).squeeze(1).to(values.dtype)
    return summed


def row_products(table: Tensor, slots: Tensor, x: Tensor) -> Tensor:
    """See `Backend.row_products`."""
    dtype = torch.float64 if table.dtype == torch.float64 else torch.float32
    products = torch.empty(slots.shape, dtype=dtype, device=slots.device)
    for part in _chunks_of_tokens(slots, table):
        rows = table[slots[part]].to(dtype)
        products[part] = (rows @ x[part].to(dtype).unsqueeze(-1)).squeeze(-1)
    return products


def _chunks_of_tokens(slots: Tensor, values: Tensor) -> Iterator[slice]:
    row_bytes = max(1, slots.shape[1] * values.shape[1] * 4)
    size = max(1, 4 * _CHUNK_BYTES // row_bytes)
    return (slice(start, start + size) for start in range(0, slots.shape[0], size))


def sort_reads(slots: list[Tensor], weights: list[Tensor], grad_outputs: list[Tensor], num_rows: int) -> SortedReads:
    """See `Backend.sort_reads`; no segment is empty."""
    first_token = 0
    tokens = []
    for pass_slots in slots:
        last_token = first_token + pass_slots.shape[0]
        reading = torch.arange(first_token, last_token, device=pass_slots.device)
        tokens.append(reading.repeat_interleave(pass_slots.shape[1]))
        first_token = last_token
    ordered, order = torch.cat([part.flatten() for part in slots]).sort(stable=True)
    rows, counts = ordered.unique_consecutive(return_counts=True)
    offsets = torch.zeros(len(rows) + 1, dtype=torch.int64, device=rows.device)
    torch.cumsum(counts, 0, out=offsets[1:])
    return SortedReads(
        rows=rows,
        offsets=offsets,
        tokens=torch.cat(tokens)[order],
        weights=torch.cat([part.flatten() for part in weights])[order],
        grad_output=torch.cat(grad_outputs),
    )


def row_gradients(reads: SortedReads) -> Iterator[tuple[Tensor, Tensor]]:
    """The gradient of each row read, a chunk of rows at a time.

    Args:
        reads: the sorted reading log of a table of width v.

    Yields:
        rows: (c,) rows of the table, ascending.
        gradients: (c, v) fp32 (fp64 for an fp64 table), summed in the order of the reads.
    """
    reads = reads.without_empty()
    num_tokens, width = reads.grad_output.shape
    dtype = torch.promote_types(reads.grad_output.dtype, torch.float32)
    grad_output = reads.grad_output.to(dtype)
    weights = reads.weights.to(dtype)
    size = max(1, _CHUNK_BYTES // (4 * max(width, 1)))
    bounds = reads.offsets[::size].tolist()
    if (len(reads.offsets) - 1) % size:
        bounds.append(len(reads.tokens))
    for chunk, (begin, end) in enumerate(itertools.pairwise(bounds)):
        rows = reads.rows[chunk * size : (chunk + 1) * size]
        offsets = reads.offsets[chunk * size : (chunk + 1) * size + 1] - begin
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch calls its CSR tensors a beta
            summing = torch.sparse_csr_tensor(
                offsets, reads.tokens[begin:end], weights[begin:end], (len(rows), num_tokens), device=weights.device
            )
        yield rows, summing @ grad_output


def weighted_sum_grad_values(reads: SortedReads, num_rows: int) -> Tensor:
    """See `Backend.weighted_sum_grad_values`."""
    dense = reads.grad_output.new_zeros(num_rows, reads.grad_output.shape[1])
    for rows, gradients in row_gradients(reads):
        dense[rows] = gradients.to(dense.dtype)
    return dense


def row_gradient_norm(reads: SortedReads) -> Tensor:
    """See `Backend.row_gradient_norm`."""
    norm = torch.zeros((), dtype=torch.float64, device=reads.grad_output.device)
    for _, gradients in row_gradients(reads):
        norm = torch.hypot(norm, torch.linalg.vector_norm(gradients, dtype=torch.float64))  # squares would overflow
    return norm


def gradient_is_finite(reads: SortedReads) -> Tensor:
    """See `Backend.gradient_is_finite`."""
    return row_gradient_norm(reads).isfinite()


def adam_rows(
    values: Tensor, first_moment: Tensor, second_moment: Tensor, reads: SortedReads, update: AdamStep
) -> None:
    """See `Backend.adam_rows`."""
    lr, step, scale, seed = float(update.lr), int(update.step), float(update.scale), update.seed
    if not math.isfinite(scale):
        return
    beta1, beta2 = update.betas
    step_size = lr / (1 - beta1**step)
    second_correction = 1 - beta2**step
    for rows, gradients in row_gradients(reads):
        gradients = gradients.mul_(scale)
        first = first_moment[rows].to(gradients.dtype).lerp_(gradients, 1 - beta1)
        second = second_moment[rows].to(gradients.dtype).mul_(beta2)
        second.addcmul_(gradients, gradients, value=1 - beta2)
        change = first / (second / second_correction).sqrt_().add_(update.eps)
        value = values[rows].to(gradients.dtype).sub_(change, alpha=step_size)
        _write_rows((values, first_moment, second_moment), rows, (value, first, second), seed, step)


def _write_rows(tables: tuple[Tensor, ...], rows: Tensor, numbers: tuple[Tensor, ...], seed: int, step: int) -> None:
    """Stores rows of values and moments: values are rounded by the low half of the random bits, moments by the high."""
    random = _random_bits(seed, step, rows, tables[0].shape[1]) if torch.bfloat16 in {t.dtype for t in tables} else None
    for table, number, half in zip(tables, numbers, (0, 16, 16), strict=True):
        if table.dtype == torch.bfloat16 and random is not None:
            number = _rounded_at_random(number, (random >> half) & 0xFFFF)
        table[rows] = number.to(table.dtype)


def _rounded_at_random(numbers: Tensor, random: Tensor) -> Tensor:
    """fp32 numbers that bf16 can hold: up or down, by 16 random bits, with the chances that keep the mean."""
    numbers = numbers.to(torch.float32)
    rounded = (numbers.view(torch.int32) + random.to(torch.int32)) & -0x10000
    return torch.where(numbers.isfinite(), rounded.view(torch.float32), numbers)


def _random_bits(seed: int, step: int, rows: Tensor, width: int) -> Tensor:
    """32 random bits (c, v) for every column of some rows (c,), int64, from seed, step, row and column alone."""
    key = 0
    for word in (seed, seed >> 32, step):
        key = _mixed(key ^ (word & _WORD))
    columns = torch.arange(width, device=rows.device)
    return _mixed(_mixed(key ^ (rows & _WORD)).unsqueeze(1) ^ columns)


def _mixed(bits: Any) -> Any:
    """An integer of 32 bits, or int64 tensor of such, scrambled (lowbias32 of C. Wellons); products wrap as they may."""
    bits = ((bits ^ (bits >> 16)) * 0x7FEB352D) & _WORD
    bits = ((bits ^ (bits >> 15)) * 0x846CA68B) & _WORD
    return bits ^ (bits >> 16)


def decode(x: Tensor, layer: LayerWeights) -> None:
    """None, see `Backend.decode`: the parts of the layer are its meaning."""
