"""The meaning of the operators in plain torch (Lample et al. 2019, section 3.1, eq. 1-4).

Every other backend computes the same and is tested against this one. Two calculations are worth knowing:

- exactness: with both halves sorted, the pair of ranks (i, j), counted from 0, is preceded by
  (i + 1)(j + 1) - 1 pairs that are at least as good, so only pairs with (i + 1)(j + 1) <= knn can win;
- ties: a score and a slot are packed into one integer, so that equal scores go by lower slot on every
  device, which `torch.topk` alone does not promise.

It works in chunks: on a CPU of what its cache holds, on a GPU of what its memory has room for, since there every
operator costs a launch. Sums run in a fixed order on both: no atomics. Only sorted reads make the host wait for a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pkmem.ops.arguments import AdamStep, LayerWeights, SortedReads, surely_finite
from pkmem.ops.packing import unpack_rows
from pkmem.ops.precision import full_precision
from pkmem.ops.rounding import random_bits, random_keys, rounded_at_random

_SCORES_BYTES = 64 << 20  # of the scores of a chunk on a CPU: enough for its matrix products
_ROWS_BYTES = 6 << 20  # of a chunk of rows on a CPU, with all that is computed from them: they stay in its cache
_BYTES_OF_ADAM = 24  # that adam_rows holds of each element of a chunk
GPU_BYTES = 768 << 20  # of a chunk on a GPU: few launches


def chunk_size(item_bytes: int, device: torch.device, cpu_bytes: int) -> int:
    """How many items make a chunk, if each takes so many bytes; on a GPU at most a 32nd of its memory."""
    room = cpu_bytes
    if device.type == "cuda":
        room = min(GPU_BYTES, torch.cuda.get_device_properties(device).total_memory // 32)
    elif device.type != "cpu":
        room = GPU_BYTES // 4
    return max(1, room // max(1, item_bytes))


def product_key_topk(query: Tensor, sub_keys: Tensor, knn: int) -> tuple[Tensor, Tensor]:
    """See `Backend.product_key_topk`."""
    heads, _, num_sub_keys, _ = sub_keys.shape
    first, second = _pairs_that_can_win(knn, query.device)
    indices = torch.arange(num_sub_keys, device=query.device)
    sets = sub_keys.flatten(0, 1)
    scores, slots = [], []
    for halves in _halves(query).split(_scores_chunk(sets, query.device)):
        half_scores = inner_products(halves, sets)  # (c, 2h, s)
        half_scores, ranks = best_first(half_scores, indices.expand_as(half_scores), knn, num_sub_keys)
        score1, score2 = half_scores.unflatten(1, (heads, 2)).unbind(2)
        rank1, rank2 = ranks.unflatten(1, (heads, 2)).unbind(2)
        of_pairs = score1.index_select(-1, first) + score2.index_select(-1, second)
        pairs = rank1.index_select(-1, first) * num_sub_keys + rank2.index_select(-1, second)
        best_scores, best_slots = best_first(of_pairs, pairs, knn, num_sub_keys**2)
        scores.append(best_scores)
        slots.append(best_slots)
    return torch.cat(scores), torch.cat(slots)


def _halves(query: Tensor) -> Tensor:
    """Queries (n, h, q) as their halves (n, 2h, q / 2)."""
    return query.unflatten(2, (2, query.shape[2] // 2)).flatten(1, 2)


def _scores_chunk(keys: Tensor, device: torch.device) -> int:
    """Tokens of a chunk whose scores with keys (h, s, q) are held at once: in four forms of their width."""
    return chunk_size(16 * keys.shape[0] * keys.shape[1], device, _SCORES_BYTES)


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
    num_sub_keys, dtype = sub_keys.shape[2], grad_scores.dtype
    sets = sub_keys.flatten(0, 1).to(dtype)  # (2h, s, q / 2)
    chosen = torch.stack((slots // num_sub_keys, slots % num_sub_keys), 2).flatten(1, 2)  # (n, 2h, knn)
    slopes = grad_scores.repeat_interleave(2, 1)
    grad_halves, grad_sets = [], torch.zeros_like(sets)
    size = _scores_chunk(sets, query.device)
    for halves, keys, slope in zip(_halves(query).split(size), chosen.split(size), slopes.split(size), strict=True):
        dense = slope.new_zeros(*slope.shape[:2], num_sub_keys)
        # A neighbour at a time: no two of its additions meet, so that a GPU, too, adds in a fixed order.
        for key, part in zip(keys.split(1, -1), slope.split(1, -1), strict=True):
            dense.scatter_add_(-1, key, part)
        dense = dense.transpose(0, 1)
        with full_precision(query.device):
            grad_halves.append(torch.bmm(dense, sets).transpose(0, 1))
            grad_sets.baddbmm_(dense.mT, halves.to(dtype).transpose(0, 1))
    grad_query = torch.cat(grad_halves).reshape(query.shape)
    return grad_query.to(query.dtype), grad_sets.view(sub_keys.shape).to(sub_keys.dtype)


def flat_topk(query: Tensor, keys: Tensor, knn: int) -> Tensor:
    """See `Backend.flat_topk`."""
    num_slots = keys.shape[1]
    indices = torch.arange(num_slots, device=query.device)
    slots = []
    for part in query.split(_scores_chunk(keys, query.device)):
        scores = inner_products(part, keys)  # (c, h, m)
        slots.append(best_first(scores, indices.expand_as(scores), knn, num_slots)[1])
    return torch.cat(slots)


def inner_products(query: Tensor, keys: Tensor) -> Tensor:
    """Scores (n, h, s) of queries (n, h, q) with keys (h, s, q), in fp32 (fp64 for fp64 input)."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    with full_precision(query.device):
        return torch.bmm(query.to(dtype).transpose(0, 1), keys.to(dtype).mT).transpose(0, 1)


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
    packed = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits).to(torch.int64)
    packed = packed.bitwise_left_shift_(32).sub_(slots).topk(knn, dim=-1).values
    slots = -packed & 0xFFFFFFFF
    ordered = ((packed + slots) >> 32).to(torch.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32), slots


def _pairs_that_can_win(knn: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ranks (p,) and (p,) of the pairs with (i + 1)(j + 1) <= knn, by i, then j."""
    num_pairs = sum(knn // rank for rank in range(1, knn + 1))
    ends = (knn // torch.arange(1, knn + 1, device=device)).cumsum(0)  # of the pairs of each first rank
    pair = torch.arange(num_pairs, device=device)
    first = torch.searchsorted(ends, pair, right=True)
    return first, pair - F.pad(ends, (1, 0)).index_select(0, first)


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
    size = chunk_size(slots.shape[1] * width * 8, slots.device, _ROWS_BYTES)
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
    size = chunk_size(slots.shape[1] * row_bytes, slots.device, _ROWS_BYTES)
    return zip(slots.split(size), given.split(size), strict=True)


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
    size = chunk_size(_BYTES_OF_ADAM * grad_output.shape[1], weights.device, _ROWS_BYTES)
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


def gradient_is_finite(reads: SortedReads) -> Tensor:
    """See `Backend.gradient_is_finite`; seldom more than a look at the factors."""
    surely = surely_finite(reads)
    return surely if surely else row_gradient_norm(reads).isfinite()


def adam_rows(
    values: Tensor, first_moment: Tensor, second_moment: Tensor, reads: SortedReads, update: AdamStep
) -> None:
    """See `Backend.adam_rows`."""
    scale, step_size, correction, step = adam_factors(update, values.device)
    is_finite = scale.isfinite()
    beta1, beta2 = update.betas
    is_rounded = torch.bfloat16 in (values.dtype, first_moment.dtype, second_moment.dtype)
    keys = random_keys(update.seed, step, reads.rows) if is_rounded else None

    def step_by(part: slice, gradients: Tensor) -> None:
        rows = reads.rows[part]
        random = None if keys is None else random_bits(keys[part], update.first_column, values.shape[1])
        old = first_moment.index_select(0, rows)
        first = old.to(gradients.dtype).lerp(gradients, 1 - beta1)
        write(first_moment, rows, old, first, random, 16)
        old = second_moment.index_select(0, rows)
        second = (old.to(gradients.dtype) * beta2).addcmul_(gradients, gradients, value=1 - beta2)
        write(second_moment, rows, old, second, random, 16)
        change = first.div_(second.mul_(correction).sqrt_().add_(update.eps)).mul_(step_size)
        del second  # makes room
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
    correction = 1 / (1 - torch.pow(update.betas[1], count))
    return torch.stack((_scalar(update.scale, device), step_size, correction, count))


def _scalar(number: float | Tensor, device: torch.device) -> Tensor:
    """An fp64 scalar on the device; a number is filled in there, since a copy to a GPU would wait."""
    if isinstance(number, Tensor) and number.device == device:
        return number.to(torch.float64).reshape(())
    return torch.full((), float(number), dtype=torch.float64, device=device)


def decode(x: Tensor, layer: LayerWeights) -> None:
    """None, see `Backend.decode`: the parts of the layer are its meaning."""
