"""The choice of slots in plain torch, and its gradient (section 3.1, eq. 1 and 2).

Two calculations are worth knowing:

- exactness: with both halves sorted, the pair of ranks (i, j), counted from 0, is preceded by
  (i + 1)(j + 1) - 1 pairs that are at least as good, so only pairs with (i + 1)(j + 1) <= knn can win;
- ties: a score and a slot are packed into one integer, so that equal scores go by lower slot on every
  device, which `torch.topk` alone does not promise.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pkmem.ops.precision import full_precision
from pkmem.ops.reference import chunks


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
    return chunks.chunk_size(16 * keys.shape[0] * keys.shape[1], device, chunks.SCORES_BYTES)


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
