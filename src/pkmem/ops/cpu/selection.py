"""The best slots of each query in one pass per token and head (Lample et al. 2019, section 3.1).

Scores become integers of the same order, so that NaN is a number like any other: above infinity, or below minus
infinity if its sign is set. A half has four steps: a bound that at least knn scores reach and not many more, the
candidates that reach it, the rank of each (how many are above it), and each is written where its rank says. The
pairs of the two halves go the same way. Nothing branches on a score, and all but the last step is vectors.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pkmem.ops import reference
from pkmem.ops.cpu.kernels import array, inlined, kernel, part_of_kernel
from pkmem.ops.cpu.threads import run_over
from pkmem.ops.cpu.vectors import append_at_least, append_sums_at_least, order_with_maxima, rank_all, reached_by
from pkmem.ops.precision import no_rounding_of_factors

_FEW_TOKENS = 2  # for which reading the keys once, in their own layout, is all that counts
_SCORES_AT_ONCE = 2 << 20  # few enough for the cache, enough for the matrix product
_GRAIN = 1 << 19  # elements of sub-keys that one thread reads in some 40 us
_ROWS_AT_ONCE = 16  # halves before their pairs: the processor overlaps what it does for one row and the next
_LOWEST = np.int32(-(1 << 31))


def product_key_topk(query: Tensor, sub_keys: Tensor, knn: int) -> tuple[Tensor, Tensor]:
    """See `Backend.product_key_topk`; fp64, and more than 2 ** 16 sub-keys, go to the reference."""
    num_tokens, heads, _ = query.shape
    num_sub_keys = sub_keys.shape[2]
    if query.dtype == torch.float64 or num_sub_keys**2 > 1 << 32:
        return reference.product_key_topk(query, sub_keys, knn)
    scores = query.new_empty((num_tokens, heads, knn), dtype=torch.float32)
    slots = query.new_empty((num_tokens, heads, knn), dtype=torch.int64)
    queries = query_halves(query.detach())
    keys = sub_keys.detach().to(torch.float32).flatten(0, 1)
    grain = 1 + 64 // heads
    token_scores = 2 * heads * num_sub_keys
    if num_tokens <= _FEW_TOKENS:
        half_scores = np.empty((2 * heads, num_tokens, num_sub_keys), np.float32)
        grain = 1 + _GRAIN // (1 + keys.shape[1] * keys.shape[2])
        run_over(multiply, (array(queries), array(keys), half_scores), 2 * heads, grain)
        select(half_scores, knn, array(scores), array(slots), 0, num_tokens)
        return scores, slots
    block = max(1, min(num_tokens, max(64, _SCORES_AT_ONCE // token_scores)))
    memory = scores.new_empty(block * token_scores)
    for first in range(0, num_tokens, block):
        part = slice(first, min(first + block, num_tokens))
        size = part.stop - first
        products = memory[: size * token_scores].view(2 * heads, size, num_sub_keys)
        with no_rounding_of_factors(query.device):
            torch.bmm(queries[part].transpose(0, 1), keys.mT, out=products)  # autocast leaves `out=` alone
        run_over(select, (array(products), knn, array(scores[part]), array(slots[part])), size, grain)
    return scores, slots


def flat_topk(query: Tensor, keys: Tensor, knn: int) -> Tensor:
    """See `Backend.flat_topk`; some scores at a time."""
    num_tokens, heads, _ = query.shape
    num_slots = keys.shape[1]
    if query.dtype == torch.float64 or num_slots > 1 << 32:
        return reference.flat_topk(query, keys, knn)
    slots = query.new_empty((num_tokens, heads, knn), dtype=torch.int64)
    queries, columns = query.detach().to(torch.float32), keys.detach().to(torch.float32).mT
    block = max(64, _SCORES_AT_ONCE // (heads * num_slots))
    for first in range(0, num_tokens, block):
        part = queries[first : first + block].transpose(0, 1)
        scores = queries.new_empty((heads, part.shape[1], num_slots))
        with no_rounding_of_factors(query.device):
            torch.bmm(part, columns, out=scores)  # autocast leaves `out=` alone
        run_over(select_flat, (array(scores), knn, array(slots[first : first + block])), part.shape[1], 1)
    return slots


def query_halves(query: Tensor) -> Tensor:
    """Queries (n, h, q) as their halves (n, 2h, q / 2), fp32."""
    return query.to(torch.float32).reshape(query.shape[0], 2 * query.shape[1], query.shape[2] // 2)


@kernel
def multiply(queries, keys, half_scores, first, last):  # type: ignore[no-untyped-def]
    """Writes half_scores[first:last], (2h, n, s), from queries (n, 2h, q / 2) and keys (2h, s, q / 2)."""
    query = np.empty((queries.shape[0], queries.shape[2]), np.float32)
    for half in range(first, last):
        query[:] = queries[:, half]
        products(keys[half], query, half_scores[half])


@part_of_kernel
def products(rows, x, dots):  # type: ignore[no-untyped-def]
    """Writes dots (n, r), inner products of x (n, d) with rows (r, d), each of which is read from memory once."""
    for number in range(len(rows)):
        row = rows[number]
        for token in range(len(x)):
            dot, point = np.float32(0), x[token]
            for column in range(len(row)):
                dot += row[column] * point[column]
            dots[token, number] = dot


@kernel
def select(half_scores, knn, scores, slots, first, last):  # type: ignore[no-untyped-def]
    """Writes scores[first:last] and slots[first:last], (n, h, knn), from half_scores (2h, n, s)."""
    _, num_tokens, size = half_scores.shape
    flat = half_scores.reshape(-1)
    row_lengths, corners = _winning_pairs(knn)
    ordered, maxima, candidates, best = _scratch(size, knn, row_lengths.sum())
    best_numbers, best_indices = best
    half_best, parts = np.empty((_ROWS_AT_ONCE, knn + 16), np.float32), np.empty((_ROWS_AT_ONCE, knn + 16), np.int32)
    for head in range(half_scores.shape[0] // 2):
        for start in range(first, last, _ROWS_AT_ONCE // 2):
            rows = 2 * min(_ROWS_AT_ONCE // 2, last - start)
            for row in range(rows):
                place = ((2 * head + row % 2) * num_tokens + start + row // 2) * size
                _best_of_row(flat, place, size, knn, ordered, maxima, candidates, best)
                factor = np.int32(1 if row % 2 else size)
                for rank in range(knn):
                    half_best[row, rank] = _as_score(best_numbers[rank])
                    parts[row, rank] = best_indices[rank] * factor  # a slot is the sum of its parts, as a uint32
            for row in range(0, rows, 2):
                _best_pairs(half_best, parts, row, knn, row_lengths, corners, candidates, best)
                token = start + row // 2
                for rank in range(knn):
                    scores[token, head, rank] = _as_score(best_numbers[rank])
                    slots[token, head, rank] = np.uint32(best_indices[rank])


@kernel
def select_flat(scores, knn, slots, first, last):  # type: ignore[no-untyped-def]
    """Writes slots[first:last], (n, h, knn), from all scores (h, n, m)."""
    heads, num_tokens, size = scores.shape
    flat = scores.reshape(-1)
    ordered, maxima, candidates, best = _scratch(size, knn, 0)
    for head in range(heads):
        for token in range(first, last):
            _best_of_row(flat, (head * num_tokens + token) * size, size, knn, ordered, maxima, candidates, best)
            for rank in range(knn):
                slots[token, head, rank] = np.uint32(best[1][rank])


@part_of_kernel
def _scratch(size, knn, num_pairs):  # type: ignore[no-untyped-def]
    """What `_best_of_row` works in for rows of `size` scores, and `_best_pairs` for as many pairs."""
    groups = _up_to(2 * knn, 64)
    ordered, maxima = np.empty(_up_to(size, groups), np.int32), np.empty(groups, np.int32)
    ordered[size:] = _LOWEST
    capacity = max(groups + 128, num_pairs + 64)
    candidates = np.empty(capacity, np.int32), np.empty(capacity, np.int32), np.empty(capacity, np.int32)
    best = np.empty(capacity, np.int32), np.empty(capacity, np.int32)
    return ordered, maxima, candidates, best


@part_of_kernel
def _winning_pairs(knn):  # type: ignore[no-untyped-def]
    """The pairs of ranks (i, j) that can win: those with (i + 1)(j + 1) <= knn, as the number of j per i; and the
    corners of those with (i + 1)(j + 1) >= knn: every corner has knn pairs that are no worse."""
    row_lengths, corners = np.empty(knn + 1, np.int64), np.empty((2, knn), np.int64)
    count, last = 0, knn
    for i in range(knn):
        row_lengths[i] = knn // (i + 1)
        end = (knn - 1) // (i + 1)
        if end < last:
            corners[0, count], corners[1, count] = i, end
            count, last = count + 1, end
    row_lengths[knn] = 0
    return row_lengths, corners[:, :count].copy()


@inlined
def _best_of_row(flat, place, size, knn, ordered, maxima, candidates, best):  # type: ignore[no-untyped-def]
    """Sorts the knn best of the `size` scores that begin at `place` into `best`; the other arrays are scratch."""
    numbers, indices, _ = candidates
    groups = len(maxima)
    bound = _LOWEST
    if size >= groups:
        whole = size - size % groups
        for column in range(0, groups, 64):
            order_with_maxima(flat, place, whole, groups, column, ordered, maxima)
        for index in range(whole, size):
            ordered[index] = _as_integer(flat[place + index])
            maxima[index - whole] = max(maxima[index - whole], ordered[index])
        bound = reached_by(maxima, groups, knn)
    else:
        for index in range(size):
            ordered[index] = _as_integer(flat[place + index])
    count = 0
    for start in range(0, size, 64):
        if count + 128 > len(numbers):
            _make_room(candidates, count, knn, best)
            count, bound = knn, numbers[knn - 1]
        count = append_at_least(ordered, start, bound, numbers, indices, count)
    _sort_best(candidates, count, best)


@part_of_kernel
def _make_room(candidates, count, knn, best):  # type: ignore[no-untyped-def]
    """Leaves the knn best as the first candidates: few scores stood out, as when all are equal."""
    _sort_best(candidates, count, best)
    for rank in range(knn):
        candidates[0][rank], candidates[1][rank] = best[0][rank], best[1][rank]


@inlined
def _best_pairs(half_best, parts, row, knn, row_lengths, corners, candidates, best):  # type: ignore[no-untyped-def]
    """Sorts the knn best pairs of the halves in rows `row` and `row + 1` into `best`: sums as numbers, and slots."""
    numbers, indices, _ = candidates
    count = 0
    ends = (
        abs(half_best[row, 0])
        + abs(half_best[row, knn - 1])
        + abs(half_best[row + 1, 0])
        + abs(half_best[row + 1, knn - 1])
    )
    if ends < np.float32(np.inf):
        bound = _LOWEST
        for corner in range(corners.shape[1]):
            bound = max(bound, _as_integer(half_best[row, corners[0, corner]] + half_best[row + 1, corners[1, corner]]))
        i = 0
        while row_lengths[i] > i:  # the pairs (i, j >= i), then (j > i, i)
            for side in range(2):
                for j in range(i + side, row_lengths[i], 16):
                    count = append_sums_at_least(
                        half_best, parts, (row + 1 - side) * half_best.shape[1] + j, row_lengths[i] - j,
                        half_best[row + side, i], parts[row + side, i], bound, numbers, indices, count,
                    )  # fmt: skip
            i += 1
    else:  # a sum may be NaN, and the order of the pairs lost
        for i in range(knn):
            for j in range(row_lengths[i]):
                numbers[count] = _as_integer(half_best[row, i] + half_best[row + 1, j])
                indices[count] = parts[row, i] + parts[row + 1, j]
                count += 1
    _sort_best(candidates, count, best)


@inlined
def _sort_best(candidates, count, best):  # type: ignore[no-untyped-def]
    """Sorts the first `count` candidates, and a few of the lowest numbers behind them, into `best`.

    Args:
        candidates: scores as numbers, their indices, read as uint32, and scratch; 64 more than count.
        best: numbers and indices, falling, of equal numbers the lower index first.
    """
    numbers, indices, ranks = candidates
    for lane in range(16):
        numbers[count + lane], indices[count + lane] = _LOWEST, np.int32(-1)
    padded = _up_to(count, 16)
    if (
        rank_all(numbers, padded, ranks) != count * (count - 1) // 2 + (padded - count) * count
    ):  # some numbers are equal
        _settle_ties(numbers, indices, ranks, padded)
    for place in range(padded):
        rank = np.uint32(ranks[place])
        best[0][rank], best[1][rank] = numbers[place], indices[place]


@part_of_kernel
def _settle_ties(numbers, indices, ranks, count):  # type: ignore[no-untyped-def]
    """Adds to each rank the number of equal candidates with a lower index."""
    for place in range(count):
        number, index = numbers[place], np.uint32(indices[place])
        earlier = np.int32(0)
        for other in range(count):
            earlier += np.int32((numbers[other] == number) & (np.uint32(indices[other]) < index))
        ranks[place] += earlier


@part_of_kernel
def _as_integer(score):  # type: ignore[no-untyped-def]
    """Integers ordered like the scores: sign and magnitude to two's complement; + 0.0 drops -0.0."""
    bits = np.float32(score + np.float32(0.0)).view(np.int32)
    return np.int32(bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF)))


@part_of_kernel
def _as_score(number):  # type: ignore[no-untyped-def]
    return np.int32(number ^ ((number >> 31) & np.int32(0x7FFFFFFF))).view(np.float32)


@part_of_kernel
def _up_to(size, step):  # type: ignore[no-untyped-def]
    return -(-size // step) * step
