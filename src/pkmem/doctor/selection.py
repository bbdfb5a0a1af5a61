"""Checks of the selection: points 1, 2 and 3."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pkmem import ops
from pkmem.doctor import truth
from pkmem.doctor.checks import DTYPES, ROUNDING, Case, DoesNotApply, assert_near, assert_same, assert_within, check
from pkmem.doctor.sizes import Selection


@check(1, "selection of integers, many ties and few")
def integers(case: Case) -> str:
    """All shapes; the first half of each query and its sub-keys are small, so that scores tie, the second are larger."""
    for size in case.sizes.selections:
        _assert_selects(case, size, *_integers(case, size))
    return f"{len(case.sizes.selections)} shapes"


@check(1, "selection of integers in fp64, which no kernel takes", ("",))
def integers_in_fp64(case: Case) -> None:
    """The sizes that are quickly done."""
    for size in case.sizes.selections[1:3]:
        _assert_selects(case, size, *_integers(replace(case, dtype=torch.float64), size))


@check(1, "selection of integers that lie in memory with gaps, misaligned, of two dtypes")
def integers_with_gaps(case: Case) -> None:
    """Numbers are found by their strides alone."""
    size = case.sizes.selections[1]
    distinct, chosen, sub_keys = _integers(case, size)
    apart = torch.full((size.num_tokens, size.heads, 2 * size.half, 2), torch.nan, dtype=case.dtype)
    apart[..., 1] = distinct[chosen]
    shifted = torch.full((sub_keys.numel() + 1,), torch.nan)
    shifted[1:] = sub_keys.flatten()
    query, wide_sub_keys = case.there(apart)[..., 1], case.there(shifted)[1:].view(sub_keys.shape)
    scores, slots = case.module.product_key_topk(query, wide_sub_keys, size.knn)
    expected = truth.product_key_topk(distinct, sub_keys, size.knn)
    assert_same("slots", slots, expected[1][chosen])
    assert_same("scores", scores, expected[0][chosen].float())


@check(1, "selection of integers under autocast, by the registered operator", ("bf16", "fp16"))
def integers_under_autocast(case: Case) -> None:
    """The operator takes what it is given in fp32, or has it cast: integers are the same either way."""
    size = case.sizes.selections[1]
    distinct, chosen, sub_keys = _integers(case, size)
    query = case.there(distinct[chosen].float()).requires_grad_()
    with torch.autocast(case.device.type, dtype=case.dtype):
        scores, slots = ops.product_key_topk(query, case.there(sub_keys.float()), size.knn, backend=case.backend)
    expected = truth.product_key_topk(distinct, sub_keys, size.knn)
    assert_same("slots", slots, expected[1][chosen])
    assert_same("scores", scores.detach(), expected[0][chosen].float())


@check(1, "selection of integers among flat keys")
def integers_of_flat_keys(case: Case) -> None:
    """What product keys are compared with."""
    size = case.sizes.selections[1]
    query, keys = case.integers(size.num_tokens, size.heads, 7), case.integers(size.heads, 3 * size.num_sub_keys, 7)
    slots = case.module.flat_topk(case.there(query), case.there(keys), size.knn)
    assert_same("slots", slots, truth.flat_topk(query, keys, size.knn))


@check(1, "selection of integers on a GPU that is not the current one")
def integers_on_another_gpu(case: Case) -> None:
    """Triton launches on the current GPU, unless told otherwise."""
    if case.device.type == "cpu" or torch.accelerator.device_count() < 2:
        raise DoesNotApply("there is one device of this kind")
    current = torch.accelerator.current_device_index()
    other = next(index for index in range(torch.accelerator.device_count()) if index != current)
    there = replace(case, device=torch.device(case.device.type, other))
    for size in case.sizes.selections[1:6]:
        _assert_selects(there, size, *_integers(there, size))
    assert torch.accelerator.current_device_index() == current, "another GPU is the current one afterwards"


@check(2, "selection of random numbers")
def random_numbers(case: Case) -> str:
    """Valid slots, their scores, and whether others would have been better: by fp64."""
    for size in case.sizes.random_selections:
        distinct, chosen = _distinct(case, size, case.normal(_different(case, size), size.heads, 2 * size.half))
        sub_keys = case.normal(size.heads, 2, size.num_sub_keys, size.half)
        query = distinct[chosen]
        scores, slots = case.module.product_key_topk(case.there(query), case.there(sub_keys), size.knn)
        _assert_valid(size, scores, slots)
        slots = slots.cpu()
        assert (scores.diff(dim=-1) <= 0).all(), f"{size}: scores do not fall"
        scores64, magnitudes = _scores_of(query, sub_keys, slots)
        assert_near(f"scores of {size}", scores, scores64, magnitudes)
        best, best_slots = truth.product_key_topk(distinct, sub_keys, size.knn)
        largest = torch.maximum(magnitudes.amax(-1), _scores_of(distinct, sub_keys, best_slots)[1].amax(-1)[chosen])
        tolerance = 2 * ROUNDING * largest[..., None].expand(scores.shape)
        falling = scores64.sort(-1, descending=True).values
        assert_within(f"fp64 scores of the slots of {size}, as good as the best,", falling, best[chosen], tolerance)
    return _fast_path(case)


def _fast_path(case: Case) -> str:
    """Whether the kernel that sorts only a few sub-keys was launched: the device may have no room for it."""
    if case.backend != "triton" or case.device.type == "cpu":
        return ""
    from pkmem.ops.triton import compiled_kernels

    of_type = f"; *{next(name for name, dtype in DTYPES.items() if dtype == case.dtype)}"
    has_run = any(name.startswith("_candidates (") and of_type in name for name in compiled_kernels())
    return "the fast path ran" if has_run else "the fast path did not run: every sub-key was sorted"


@check(3, "selection where most sub-keys tie, beside NaN and infinity")
def crowds(case: Case) -> None:
    """One token in 16 has more best sub-keys than anybody keeps room for; some are not finite; all others are right."""
    for size in case.sizes.crowded:
        distinct = case.integers(case.sizes.different, size.heads, 2 * size.half)
        sub_keys = case.integers(size.heads, 2, size.num_sub_keys, size.half)
        sub_keys[:, :, : size.num_sub_keys * 3 // 4] = 0  # identical, but for the first number
        sub_keys[:, :, : size.num_sub_keys * 3 // 4, 0] = 2
        distinct[:, :, [0, size.half]] = -2  # ranks them low
        distinct[-2:] = 0  # all tie
        distinct[-1, :, [0, size.half]] = 2  # the identical ones are the best
        token = torch.arange(size.num_tokens)
        chosen = token % (len(distinct) - 2)
        chosen[token % 16 == 3] = len(distinct) - 1
        chosen[token % 32 == 8] = len(distinct) - 2
        query = distinct[chosen]
        query[token % 64 == 5] = torch.nan
        query[token % 64 == 7, :, 0] = torch.inf
        query[token % 64 == 11, :, -1] = -torch.inf
        is_finite = query.isfinite().all(-1).all(-1)
        scores, slots = case.module.product_key_topk(case.there(query), case.there(sub_keys), size.knn)
        _assert_valid(size, scores, slots)
        expected = truth.product_key_topk(distinct, sub_keys, size.knn)
        assert_same(f"slots of finite tokens of {size}", slots.cpu()[is_finite], expected[1][chosen[is_finite]])
        assert_same(f"their scores, of {size}", scores.cpu()[is_finite], expected[0][chosen[is_finite]].float())


@check(3, "selection by zeros of either sign")
def zeros(case: Case) -> None:
    """-0.0 is 0.0: lower slots come first; alone, and with many more sub-keys, below zero."""
    signs = torch.tensor([-0.0, 0.0, -0.0, 0.0, -0.0]).reshape(1, 1, 5, 1).expand(1, 2, 5, 1)
    below = torch.full((1, 2, 300, 1), 2.0) * torch.tensor([1, -1])[:, None, None]
    below[:, :, 290:295] = signs
    both = torch.tensor([[[-1.0, 1.0]], [[1.0, -1.0]]])
    many = both[:1].repeat(case.sizes.crowded[-1].num_tokens, 1, 1)
    for query, sub_keys, first in ((both, signs, 0), (many, below, 290 * 301)):
        there = [case.there(tensor.to(case.dtype)) for tensor in (query, sub_keys)]
        scores, slots = case.module.product_key_topk(there[0], there[1], 5)
        assert_same("slots", slots, (first + torch.arange(5)).expand(slots.shape))
        assert_same("scores", scores, torch.zeros(scores.shape))


def _integers(case: Case, size: Selection) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct queries, which one each token has, and sub-keys: of small numbers in the first half, larger in the other."""
    largest = (2, 30)
    halves = [case.integers(_different(case, size), size.heads, size.half, largest=most) for most in largest]
    sets = [case.integers(size.heads, size.num_sub_keys, size.half, largest=most) for most in largest]
    return *_distinct(case, size, torch.cat(halves, -1)), torch.stack(sets, 1)


def _different(case: Case, size: Selection) -> int:
    return max(1, min(case.sizes.different, size.num_tokens))


def _distinct(case: Case, size: Selection, distinct: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct queries, and which one each token has: every one somebody's, the rest by chance."""
    chosen = case.below(len(distinct), size.num_tokens)
    few = min(size.num_tokens, len(distinct))
    chosen[:few] = torch.arange(few)
    return distinct, chosen


def _assert_selects(case: Case, size: Selection, distinct: Tensor, chosen: Tensor, sub_keys: Tensor) -> None:
    scores, slots = case.module.product_key_topk(case.there(distinct[chosen]), case.there(sub_keys), size.knn)
    expected = truth.product_key_topk(distinct, sub_keys, size.knn)
    assert_same(f"slots of {size}", slots, expected[1][chosen])
    assert_same(f"scores of {size}", scores, expected[0][chosen].to(torch.promote_types(distinct.dtype, torch.float32)))


def _assert_valid(size: Any, scores: Tensor, slots: Tensor) -> None:
    """Slots are in range and, per token and head, different."""
    shape = size.num_tokens, size.heads, size.knn
    assert (tuple(scores.shape), scores.dtype) == (shape, torch.float32), (
        f"{size}: {scores.dtype} {tuple(scores.shape)}"
    )
    assert (tuple(slots.shape), slots.dtype) == (shape, torch.int64), f"{size}: {slots.dtype} {tuple(slots.shape)}"
    slots = slots.cpu()
    last = size.num_sub_keys**2 - 1
    assert ((slots >= 0) & (slots <= last)).all(), f"{size}: slots reach from {slots.min()} to {slots.max()}"
    assert (slots.sort(-1).values.diff(dim=-1) > 0).all(), f"{size}: a slot is chosen twice"


def _scores_of(query: Tensor, sub_keys: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """The fp64 scores of slots, and the magnitudes of what was summed up."""
    return truth.scores_of(query, sub_keys, slots), truth.scores_of(query.abs(), sub_keys.abs(), slots)


CHECKS = (
    integers, integers_in_fp64, integers_with_gaps, integers_under_autocast, integers_of_flat_keys,
    integers_on_another_gpu, random_numbers, crowds, zeros,
)  # fmt: skip
