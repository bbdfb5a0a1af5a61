"""Checks of the selection: points 1, 2 and 3."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pkmem.doctor import truth
from pkmem.doctor.checks import Case, assert_same, check
from pkmem.doctor.sizes import Selection


def _queries(case: Case, size: Selection, distinct: Tensor) -> tuple[Tensor, Tensor]:
    """So many tokens' queries out of the distinct ones, and which one each is."""
    chosen = case.below(len(distinct), size.num_tokens)
    few = min(size.num_tokens, len(distinct))
    chosen[:few] = torch.arange(few)  # each at least once, where there is room
    return distinct[chosen], chosen


def _different(case: Case, size: Selection) -> int:
    return max(1, min(case.sizes.different, size.num_tokens))


def _assert_selects(
    case: Case, what: object, query: Tensor, sub_keys: Tensor, knn: int, expected: tuple[Tensor, Tensor]
) -> None:
    scores, slots = case.module.product_key_topk(*case.there(query, sub_keys), knn)
    assert_same(f"slots of {what}", slots, expected[1])
    assert_same(f"scores of {what}", scores, expected[0].to(_dtype_of_scores(case)))


def _dtype_of_scores(case: Case) -> torch.dtype:
    return torch.promote_types(case.dtype, torch.float32)


@check(1, "integers: many ties, few ties")
def integers(case: Case) -> str:
    """Slots and scores of all shapes."""
    for size in case.sizes.selections:
        for largest in (2, 30):
            distinct = case.integers(_different(case, size), size.heads, 2 * size.half, largest=largest)
            sub_keys = case.integers(size.heads, 2, size.num_sub_keys, size.half, largest=largest)
            query, chosen = _queries(case, size, distinct)
            scores, slots = truth.product_key_topk(distinct, sub_keys, size.knn)
            _assert_selects(case, size, query, sub_keys, size.knn, (scores[chosen], slots[chosen]))
    return f"{len(case.sizes.selections)} shapes"


@check(1, "fp64 queries", ("",))
def integers_in_fp64(case: Case) -> None:
    """Two shapes."""
    integers.examine(
        replace(case, dtype=torch.float64, sizes=replace(case.sizes, selections=case.sizes.selections[1:4]))
    )
