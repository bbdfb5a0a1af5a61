"""The best slots of each query in one pass per token and head (Lample et al. 2019, section 3.1).

A score and its index are packed into one integer, score first and the index upside down, so that integers in
falling order are scores in falling order with ties by lower index, whatever a kernel does. NaN is a number
like any other then: above infinity, or below minus infinity if its sign is set.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pkmem.ops import reference
from pkmem.ops.cpu.threads import run_over
from pkmem.ops.cpu.vectors import array, count_above, kernel, lowest_bit, part_of_kernel, rank_all, which_at_least

_SCORES_AT_ONCE = 2 << 20  # few enough for the cache, enough for the matrix product
_INDEX = np.int64(0xFFFFFFFF)
_LOWEST = np.int32(-(1 << 31))


def product_key_topk(query: Tensor, sub_keys: Tensor, knn: int) -> tuple[Tensor, Tensor]:
    """The `knn` best pairs of sub-keys, see `pkmem.ops.product_key_topk`."""
    num_tokens, heads, _ = query.shape
    num_sub_keys = sub_keys.shape[2]
    if query.dtype == torch.float64 or num_sub_keys**2 > 1 << 32:
        return reference.product_key_topk(query, sub_keys, knn)
    scores = query.new_empty((num_tokens, heads, knn), dtype=torch.float32)
    slots = query.new_empty((num_tokens, heads, knn), dtype=torch.int64)
    queries = query_halves(query.detach()).transpose(0, 1)  # (2h, n, q / 2)
    keys = sub_keys.detach().to(torch.float32).flatten(0, 1).mT  # (2h, q / 2, s)
    token_scores = 2 * heads * num_sub_keys
    block = max(1, min(num_tokens, max(64, _SCORES_AT_ONCE // token_scores)))
    memory = scores.new_empty(block * token_scores)
    for first in range(0, num_tokens, block):
        part = slice(first, min(first + block, num_tokens))
        size = part.stop - first
        half_scores = memory[: size * token_scores].view(2 * heads, size, num_sub_keys)
        torch.bmm(queries[:, part], keys, out=half_scores)  # autocast leaves `out=` alone
        run_over(select, (array(half_scores), knn, array(scores[part]), array(slots[part])), size, 1 + 64 // heads)
    return scores, slots


def query_halves(query: Tensor) -> Tensor:
    """Queries (n, h, q) as their halves (n, 2h, q / 2), fp32."""
    return query.to(torch.float32).reshape(query.shape[0], 2 * query.shape[1], query.shape[2] // 2)


@kernel
def select(half_scores, knn, scores, slots, first, last):  # type: ignore[no-untyped-def]
    """Writes scores[first:last] and slots[first:last], (n, h, knn), from half_scores (2h, n, s)."""
    num_sub_keys = half_scores.shape[2]
    row_lengths, row_ends = np.empty(knn, np.int64), np.empty(knn, np.int64)
    num_pairs = 0
    for i in range(knn):  # the pairs of ranks (i, j) that can win have (i + 1)(j + 1) <= knn
        row_lengths[i] = knn // (i + 1)
        row_ends[i] = (knn - 1) // (i + 1)
        num_pairs += row_lengths[i]
    capacity = _up_to_64(max(2 * knn + 64, num_pairs))
    ordered, maxima = np.empty(_up_to_64(num_sub_keys), np.int32), np.empty(_up_to_64(2 * knn), np.int32)
    candidates = np.empty(capacity, np.int32), np.empty(capacity, np.int64), np.empty(capacity, np.int32)
    best = np.empty(knn + 1, np.int64)
    scores1, scores2 = np.empty(knn, np.float32), np.empty(knn, np.float32)
    indices1, indices2 = np.empty(knn, np.int64), np.empty(knn, np.int64)
    for token in range(first, last):
        for head in range(half_scores.shape[0] // 2):
            _best_of_row(half_scores[2 * head, token], knn, ordered, maxima, candidates, best)
            _unpack(best, scores1, indices1)
            _best_of_row(half_scores[2 * head + 1, token], knn, ordered, maxima, candidates, best)
            _unpack(best, scores2, indices2)
            bound = _bound_of_pairs(scores1, scores2, row_ends)
            count = 0
            for i in range(knn):
                score1, first_slot = scores1[i], indices1[i] * num_sub_keys
                for j in range(row_lengths[i]):
                    number = _as_integer(score1 + scores2[j])
                    candidates[0][count] = number
                    candidates[1][count] = _packed(number, first_slot + indices2[j])
                    count += number >= bound
            _keep_best(candidates, count, knn, best)
            _unpack(best, scores[token, head], slots[token, head])


@part_of_kernel
def _best_of_row(row, knn, ordered, maxima, candidates, best):  # type: ignore[no-untyped-def]
    """Packs the knn best of a row of scores into `best`; the other arrays are scratch."""
    size, groups = len(row), len(maxima)
    numbers, keys, _ = candidates
    for index in range(size):
        ordered[index] = _as_integer(row[index])
    for index in range(size, len(ordered)):
        ordered[index] = _LOWEST
    bound = _LOWEST
    if size >= 2 * groups:
        bound = _bound_of_row(ordered, knn, maxima)
    count = 0
    for start in range(0, len(ordered), 64):
        if count + 64 > len(keys):
            _keep_best(candidates, count, knn, best)
            count = knn
            for rank in range(knn):
                keys[rank] = best[rank]
                numbers[rank] = best[rank] >> 32
            bound = numbers[knn - 1]
        found = which_at_least(ordered, start, bound)
        if start + 64 > size:
            found &= (np.uint64(1) << np.uint64(size - start)) - np.uint64(1)
        while found:
            index = start + lowest_bit(found)
            found &= found - np.uint64(1)
            numbers[count] = ordered[index]
            keys[count] = _packed(ordered[index], index)
            count += 1
    _keep_best(candidates, count, knn, best)


@part_of_kernel
def _bound_of_row(ordered, knn, maxima):  # type: ignore[no-untyped-def]
    """A number that at least knn elements reach, and not many more: knn groups have a maximum that does."""
    groups = len(maxima)
    for group in range(groups):
        maxima[group] = ordered[group]
    for start in range(groups, len(ordered) - groups + 1, groups):
        part = ordered[start : start + groups]
        for group in range(groups):
            maxima[group] = max(maxima[group], part[group])
    low, high = np.int64(maxima[0]), np.int64(maxima[0])
    for group in range(groups):
        low, high = min(low, np.int64(maxima[group])), max(high, np.int64(maxima[group]))
    while low < high:  # at least knn maxima reach `low`
        middle = (low + high + 1) >> 1
        count = 0
        for start in range(0, groups, 16):
            count += count_above(maxima, start, np.int32(middle - 1))
        if count < knn:
            high = middle - 1
        else:
            low = middle
            if count <= knn + knn // 8:
                break
    return np.int32(low)


@part_of_kernel
def _bound_of_pairs(scores1, scores2, row_ends):  # type: ignore[no-untyped-def]
    """A number that knn pairs reach: all up to the pair of ranks (i, j), if (i + 1)(j + 1) >= knn."""
    ends = abs(scores1[0]) + abs(scores1[-1]) + abs(scores2[0]) + abs(scores2[-1])
    if not ends < np.float32(np.inf):  # a sum may be NaN, and the order of the pairs lost
        return _LOWEST
    bound = np.float32(-np.inf)
    for i in range(len(scores1)):
        bound = max(bound, scores1[i] + scores2[row_ends[i]])
    return _as_integer(bound)


@part_of_kernel
def _keep_best(candidates, count, knn, best):  # type: ignore[no-untyped-def]
    """Sorts the knn highest of the first `count` keys into best[:knn]: a rank is the number of keys above.

    Args:
        candidates: scores as numbers, keys (the same, packed with an index) and scratch, 16 more than count.
        count: at least knn.
        best: (knn + 1,) keys; the last takes what is left over.
    """
    numbers, keys, ranks = candidates
    rank_all(numbers, count, ranks)
    total = 0
    for place in range(count):
        total += ranks[place]
    if total != count * (count - 1) // 2:  # some numbers are equal, keys never
        rank_all(keys, count, ranks)
    for place in range(count):
        best[min(ranks[place], knn)] = keys[place]


@part_of_kernel
def _unpack(best, scores, indices):  # type: ignore[no-untyped-def]
    for rank in range(len(scores)):
        bits = np.int32(best[rank] >> 32)
        scores[rank] = np.int32(bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))).view(np.float32)
        indices[rank] = _INDEX - (best[rank] & _INDEX)


@part_of_kernel
def _packed(ordered, index):  # type: ignore[no-untyped-def]
    return (np.int64(ordered) << 32) | (_INDEX - index)


@part_of_kernel
def _as_integer(score):  # type: ignore[no-untyped-def]
    """Integers ordered like the scores: sign and magnitude to two's complement; + 0.0 drops -0.0."""
    bits = np.float32(score + np.float32(0.0)).view(np.int32)
    return np.int32(bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF)))


@part_of_kernel
def _up_to_64(size):  # type: ignore[no-untyped-def]
    return (size + 63) & ~63
