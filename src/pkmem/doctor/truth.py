"""What the operators have to give, by brute force in fp64 on the CPU; nothing of `pkmem.ops` is imported.

Tensors of any floating dtype come in, fp64 goes out. With the magnitudes of its inputs, each sum is the sum of the
magnitudes of its terms, by which rounding errors are judged.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_CHUNK = 1 << 24  # numbers held at a time
_WORD = 0xFFFFFFFF


def product_key_topk(query: Tensor, sub_keys: Tensor, knn: int) -> tuple[Tensor, Tensor]:
    """Scores and slots (n, h, knn) of the best of all s * s product keys, equal scores by lower slot.

    Args:
        query: (n, h, q) of finite numbers. sub_keys: (h, 2, s, q / 2). knn: in [1, s * s].
    """
    num_tokens, heads, _ = query.shape
    scores = torch.empty(num_tokens, heads, knn, dtype=torch.float64)
    slots = torch.empty(num_tokens, heads, knn, dtype=torch.int64)
    for token in range(num_tokens):
        for head, row in enumerate(all_scores(query[token : token + 1], sub_keys)[0]):
            scores[token, head], slots[token, head] = best_first(row, knn)
    return scores, slots


def all_scores(query: Tensor, sub_keys: Tensor) -> Tensor:
    """The score (n, h, s * s) of every query with every product key."""
    first, second = query.double().chunk(2, -1)
    scores1 = torch.einsum("nhd,hid->nhi", first, sub_keys[:, 0].double())
    scores2 = torch.einsum("nhd,hjd->nhj", second, sub_keys[:, 1].double())
    return (scores1[..., :, None] + scores2[..., None, :]).flatten(-2)


def best_first(scores: Tensor, knn: int) -> tuple[Tensor, Tensor]:
    """The `knn` highest of scores (c,) and their places, equal ones by lower place."""
    places = (scores >= scores.topk(knn).values[-1]).nonzero()[:, 0]
    best, order = scores[places].sort(descending=True, stable=True)
    return best[:knn], places[order[:knn]]


def flat_topk(query: Tensor, keys: Tensor, knn: int) -> Tensor:
    """The slots (n, h, knn) of the best of keys (h, m, q), equal scores by lower slot."""
    scores = torch.einsum("nhq,hmq->nhm", query.double(), keys.double())
    slots = [best_first(row, knn)[1] for row in scores.flatten(0, 1)]
    return torch.stack(slots).view(*query.shape[:2], knn) if slots else torch.empty(*query.shape[:2], knn).long()


def scores_of(query: Tensor, sub_keys: Tensor, slots: Tensor) -> Tensor:
    """The scores (n, h, knn) of slots (n, h, knn)."""
    num_sub_keys = sub_keys.shape[2]
    halves = zip(
        query.double().chunk(2, -1),
        sub_keys.double().unbind(1),
        (slots // num_sub_keys, slots % num_sub_keys),
        strict=True,
    )
    return sum(  # type: ignore[return-value]
        torch.einsum("nhd,hsd->nhs", half, keys).gather(-1, chosen) for half, keys, chosen in halves
    )


def product_key_topk_gradients(
    grad_scores: Tensor, query: Tensor, sub_keys: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of sum(grad_scores * scores of slots) in query and sub_keys."""
    num_sub_keys = sub_keys.shape[2]
    grad_query, grad_sub_keys = [], []
    for half, keys, chosen in zip(
        query.double().chunk(2, -1),
        sub_keys.double().unbind(1),
        (slots // num_sub_keys, slots % num_sub_keys),
        strict=True,
    ):
        slopes = torch.zeros(*slots.shape[:2], num_sub_keys, dtype=torch.float64)
        slopes.scatter_add_(-1, chosen, grad_scores.double())
        grad_query.append(torch.einsum("nhs,hsd->nhd", slopes, keys))
        grad_sub_keys.append(torch.einsum("nhs,nhd->hsd", slopes, half))
    return torch.cat(grad_query, -1), torch.stack(grad_sub_keys, 1)


def weighted_sum(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """Sums (n, v) of weighted rows `slots` (n, b) of values (m, v)."""
    summed = torch.zeros(len(slots), values.shape[1], dtype=torch.float64)
    for part in _parts(slots, values.shape[1]):
        summed[part] = (values[slots[part]].double() * weights[part].double()[..., None]).sum(1)
    return summed


def row_products(table: Tensor, slots: Tensor, x: Tensor) -> Tensor:
    """Inner products (n, b) of x (n, d) with rows `slots` (n, b) of a table (m, d)."""
    products = torch.zeros(slots.shape, dtype=torch.float64)
    for part in _parts(slots, table.shape[1]):
        products[part] = (table[slots[part]].double() * x[part].double()[:, None]).sum(-1)
    return products


def table_gradient(slots: Tensor, weights: Tensor, grad_output: Tensor, num_rows: int) -> Tensor:
    """The gradient (m, v) of sum(grad_output * weighted_sum(...)) in the values."""
    gradient = torch.zeros(num_rows, grad_output.shape[1], dtype=torch.float64)
    for part in _parts(slots, grad_output.shape[1]):
        terms = weights[part].double()[..., None] * grad_output[part].double()[:, None]
        gradient.index_add_(0, slots[part].flatten(), terms.flatten(0, 1))
    return gradient


def _parts(slots: Tensor, width: int) -> Iterator[slice]:
    """Tokens whose rows are held at a time."""
    size = max(1, _CHUNK // max(1, slots.shape[1] * width))
    return (slice(first, first + size) for first in range(0, len(slots), size))


class Adam(NamedTuple):
    """One step of Adam (Kingma & Ba 2015) on some rows of a table; the bias is corrected by the step.

    With a second beta of 1 squares are summed: Adagrad (Duchi et al. 2011), if the first is 0.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    step: int

    def after(self, tables: list[Tensor | None], gradient: Tensor, is_read: Tensor) -> list[Tensor | None]:
        """Values, first and second moment (m, v) after the step; those of rows that were not read are as before.

        Args:
            tables: the three before the step; None where there is no first moment, and (m,) where a row has one second.
            gradient: (m, v).
            is_read: (m,) bool.
        """
        value, first, second = (None if table is None else table.double() for table in tables)
        assert value is not None
        assert second is not None
        by_row = second.dim() == 1
        squares = gradient.square().mean(1) if by_row else gradient.square()
        first_after = gradient if first is None else self.betas[0] * first + (1 - self.betas[0]) * gradient
        if self.betas[1] == 1:
            second_after = unbiased_second = second + squares
        else:
            second_after = self.betas[1] * second + (1 - self.betas[1]) * squares
            unbiased_second = second_after / (1 - self.betas[1] ** self.step)
        unbiased = first_after / (1 - self.betas[0] ** self.step), unbiased_second
        spread = unbiased[1].sqrt() + self.eps
        value_after = value - self.lr * unbiased[0] / (spread[:, None] if by_row else spread)
        pairs = ((value_after, value), (first_after, first), (second_after, second))
        return [
            None if before is None else torch.where(is_read if before.dim() == 1 else is_read[:, None], after, before)
            for after, before in pairs
        ]


def rounded_by_key(numbers: Tensor, rows: Tensor, seed: int, step: int, first_column: int, high: bool) -> Tensor:
    """bf16 of finite numbers (c, v), up or down by 16 random bits that seed, step, row and column alone decide.

    Args:
        numbers: of some rows of a table. rows: (c,) which ones. seed, step: of the update.
        first_column: of these numbers, in a table of which they may be a part.
        high: whether the high half of the random bits decides, as for moments, or the low one, as for values.
    """
    key = 0
    for word in (seed, seed >> 32, step):
        key = int(_scrambled(torch.tensor(key ^ (word & _WORD))))
    columns = torch.arange(first_column, first_column + numbers.shape[1])
    random = _scrambled(_scrambled(key ^ (rows & _WORD))[:, None] ^ columns)
    random = random >> 16 if high else random & 0xFFFF
    bits = numbers.float().view(torch.int32).long() + random
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


def _scrambled(bits: Tensor) -> Tensor:
    """32 bits, as int64, scrambled by the published hash lowbias32."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits = bits ^ (bits >> shift)
        # Of a product of two words the low word, by halves: the whole would pass 2 ** 63.
        bits = (bits * (factor & 0xFFFF) + ((bits * (factor >> 16) & 0xFFFF) << 16)) & _WORD
    return bits ^ (bits >> 16)
