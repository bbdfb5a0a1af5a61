"""The gradients of the selected scores in the queries and the sub-keys.

A score is the sum of two inner products of half a query and a sub-key, and only the few sub-keys that were
chosen have a gradient: that is a sum of a dozen rows, far cheaper than a matrix product over all of them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pkmem.ops import reference
from pkmem.ops.cpu.kernels import array, kernel
from pkmem.ops.cpu.selection import query_halves
from pkmem.ops.cpu.threads import run_over

_TOKENS_PER_SUM = 512  # a sub-key is summed in pieces, which keeps the rounding error of long sums low


def product_key_topk_backward(
    grad_scores: Tensor, query: Tensor, sub_keys: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor]:
    """See `Backend.product_key_topk_backward`; fp64 goes to the reference."""
    if query.dtype == torch.float64:
        return reference.product_key_topk_backward(grad_scores, query, sub_keys, slots)
    num_tokens, heads, knn = slots.shape
    halves = array(query_halves(query))
    keys = array(sub_keys.to(torch.float32).flatten(0, 1))  # (2h, s, q / 2)
    chosen = np.empty((num_tokens, 2 * heads, knn), np.int32)  # the different sub-keys of each half query
    weights = np.empty(chosen.shape, np.float32)
    counts = np.empty(chosen.shape[:2], np.int64)
    grad_halves, grad_keys = np.empty_like(halves), np.empty_like(keys)
    given = (array(grad_scores.to(torch.float32)), array(slots))
    run_over(to_queries, (*given, keys, chosen, weights, counts, grad_halves), num_tokens, 1 + 64 // heads)
    grain = 1 + 5000 // (1 + num_tokens * knn)
    run_over(to_keys, (halves, chosen, weights, counts, grad_keys), 2 * heads, grain)
    grad_query, grad_sub_keys = torch.from_numpy(grad_halves), torch.from_numpy(grad_keys)
    return grad_query.view(query.shape).to(query.dtype), grad_sub_keys.view(sub_keys.shape).to(sub_keys.dtype)


@kernel
def to_queries(grad_scores, slots, keys, chosen, weights, counts, grad_halves, first, last):  # type: ignore[no-untyped-def]
    """Writes [first:last] of the last four: the different sub-keys chosen, their weights, the weighted sum."""
    num_sub_keys, width = keys.shape[1:]
    summed = np.zeros(num_sub_keys, np.float32)
    seen = np.full(num_sub_keys, -1, np.int64)
    total = np.empty(width, np.float32)
    visit = 0
    for token in range(first, last):
        for half in range(keys.shape[0]):
            divisor = 1 if half % 2 else num_sub_keys
            slot, grad = slots[token, half // 2], grad_scores[token, half // 2]
            count = 0
            for place in range(len(slot)):
                index = (slot[place] // divisor) % num_sub_keys
                if seen[index] != visit:
                    seen[index] = visit
                    summed[index] = 0
                    chosen[token, half, count] = index
                    count += 1
                summed[index] += grad[place]
            counts[token, half] = count
            total[:] = 0
            for place in range(count):
                index = chosen[token, half, place]
                weight, key = summed[index], keys[half, index]
                weights[token, half, place] = weight
                for column in range(width):
                    total[column] += weight * key[column]
            grad_halves[token, half] = total
            visit += 1


@kernel
def to_keys(halves, chosen, weights, counts, grad_keys, first, last):  # type: ignore[no-untyped-def]
    """Writes grad_keys[first:last], (2h, s, q / 2)."""
    for half in range(first, last):
        total = grad_keys[half]
        total[:] = 0
        piece = np.empty_like(total)
        for begin in range(0, len(halves), _TOKENS_PER_SUM):
            piece[:] = 0
            for token in range(begin, min(begin + _TOKENS_PER_SUM, len(halves))):
                query = halves[token, half]
                for place in range(counts[token, half]):
                    row, weight = piece[chosen[token, half, place]], weights[token, half, place]
                    for column in range(len(query)):
                        row[column] += weight * query[column]
            total += piece
