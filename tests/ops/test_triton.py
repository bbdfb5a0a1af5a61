"""The inside of the Triton backend without a GPU: ways of its kernels that sizes alone seldom take, interpreted.

What every backend has to give is checked by pkmem.doctor, in the interpreter too: tests/doctor/test_examination.py.

The interpreter is switched on for a whole process, before Triton is imported. The checks below run in one such
process, `python tests/ops/test_triton.py`, which prints a JSON object of what failed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from interpreter import assert_none, failures_in, failures_of
from pkmem.ops import reference
from pkmem.ops.arguments import AdamStep

CHECKS: dict[str, Callable[[Any], None]] = {}


def check(function: Callable[[Any], None]) -> Callable[[Any], None]:
    """A check of the backend; takes the backend's module."""
    CHECKS[function.__name__] = function
    return function


# --- selection --------------------------------------------------------------------------------------------


def integers(*shape: int) -> Tensor:
    return torch.randint(-2, 3, shape).float()


@check
def parts_of_the_sub_keys_agree_with_the_whole(backend: Any) -> None:
    from pkmem.ops.triton import launch

    query, sub_keys = integers(2, 1, 4), integers(1, 2, 200, 2)
    enough, launch._ENOUGH_PROGRAMS = launch._ENOUGH_PROGRAMS, 1
    whole = backend.product_key_topk(query, sub_keys, 3)
    launch._ENOUGH_PROGRAMS = enough
    parted = backend.product_key_topk(query, sub_keys, 3)
    assert all(torch.equal(*pair) for pair in zip(whole, parted, strict=True))


def bounding_always() -> Any:
    """Few sub-keys are sorted whatever the number of tokens, of which a program has 16."""
    from pkmem.ops.triton import selection

    return mock.patch.multiple(selection, _FEWEST_PROGRAMS=1, _TOKENS=16)


@check
def few_sub_keys_reach_the_bound_and_the_best_are_among_them(backend: Any) -> None:
    with bounding_always():
        for n, h, half, s, knn in ((3, 2, 2, 300, 3), (17, 1, 2, 260, 9), (1, 1, 2, 257, 32)):
            query, sub_keys = torch.randn(n, h, 2 * half).bfloat16(), torch.randn(h, 2, s, half).bfloat16()
            scores, slots = backend.product_key_topk(query, sub_keys, knn)
            # Two products of bf16 numbers and their sum are rounded once, whoever makes them.
            true_scores, true_slots = reference.product_key_topk(query.float(), sub_keys.float(), knn)
            assert torch.equal(slots, true_slots), (n, h, half, s, knn)
            assert torch.equal(scores, true_scores), (n, h, half, s, knn)


@check
def where_many_sub_keys_reach_the_bound_every_block_is_sorted(backend: Any) -> None:
    query, sub_keys = integers(9, 1, 40).to(torch.float16), integers(1, 2, 270, 20).to(torch.float16)
    sub_keys[:, :, :200, 1:] = 0  # their scores tie
    query[3] = 0
    query[5], query[7, 0, 0] = torch.nan, torch.inf
    healthy = [number for number in range(9) if number not in (5, 7)]
    with bounding_always():
        scores, slots = backend.product_key_topk(query, sub_keys, 5)
    true_scores, true_slots = reference.product_key_topk(query[healthy].float(), sub_keys.float(), 5)
    assert ((slots >= 0) & (slots < 270**2)).all()
    assert torch.equal(slots[healthy], true_slots)
    assert torch.equal(scores[healthy], true_scores)


@check
def zeros_of_either_sign_reach_the_bound_alike(backend: Any) -> None:
    sub_keys = torch.full((1, 2, 300, 1), 2.0) * torch.tensor([1, -1])[:, None, None]  # of both halves below zero
    sub_keys[:, :, 290:295, 0] = torch.tensor([-0.0, 0.0, -0.0, 0.0, -0.0])
    with bounding_always():
        _, slots = backend.product_key_topk(torch.tensor([[[-1.0, 1.0]]]).bfloat16(), sub_keys.bfloat16(), 5)
    assert slots.tolist() == [[[290 * 301 + rank for rank in range(5)]]]


@check
def gradients_of_many_tokens_are_summed_in_parts(backend: Any) -> None:
    query, sub_keys, grad_scores = integers(70, 1, 4), integers(1, 2, 9, 2), integers(70, 1, 3)
    slots = torch.randint(81, (70, 1, 3))
    ours = backend.product_key_topk_backward(grad_scores, query, sub_keys, slots)
    theirs = reference.product_key_topk_backward(grad_scores, query, sub_keys, slots)
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


@check
def what_the_kernels_do_not_cover_goes_to_the_reference(backend: Any) -> None:
    for query, sub_keys, knn in (
        (torch.randn(1, 1, 2), torch.randn(1, 2, 70, 1), 65),
        (torch.randn(1, 1, 2).double(), torch.randn(1, 2, 7, 1).double(), 3),
    ):
        ours, theirs = (side.product_key_topk(query, sub_keys, knn) for side in (backend, reference))
        assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


# --- weighted sum -----------------------------------------------------------------------------------------


@check
def many_tokens_take_the_other_launch_shape(backend: Any) -> None:
    values, slots, weights = integers(31, 5), torch.randint(31, (300, 9)), integers(300, 9)
    assert torch.equal(backend.weighted_sum(values, slots, weights), reference.weighted_sum(values, slots, weights))


# --- rows -------------------------------------------------------------------------------------------------

STEP: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.98), "eps": 1e-8, "step": 3, "scale": 0.5}


def passes() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Two backward passes over a table of 40 rows; row 1 has more than two pieces of reads, row 7 one read more."""
    hot = torch.randint(2, 12, (100, 9))
    hot[:, :6] = 1
    hot[hot == 7] = 8
    hot[:3, 8] = 7
    slots = [hot, torch.randint(12, 38, (11, 4))]
    return [(part, torch.randn(part.shape), torch.randn(len(part), 37)) for part in slots]


def sorted_by(sort: Callable[..., Any], all_passes: list[tuple[Tensor, Tensor, Tensor]]) -> Any:
    return sort(*(list(part) for part in zip(*all_passes, strict=True)), 40)


def tables() -> list[Tensor]:
    return [torch.randn(40, 37), torch.randn(40, 37), torch.rand(40, 37)]


@check
def reads_are_sorted_as_by_the_log(backend: Any) -> None:
    for all_passes in (passes(), passes()[1:]):
        truth = sorted_by(reference.sort_reads, all_passes)
        num_rows = len(truth.rows)
        for bound in (40, 1 << 40):
            reads = backend.sort_reads(*(list(part) for part in zip(*all_passes, strict=True)), bound)
            assert torch.equal(reads.rows[:num_rows], truth.rows)
            assert torch.equal(reads.offsets[: num_rows + 1], truth.offsets)
            assert (reads.offsets[num_rows:] == len(truth.tokens)).all()
            assert len(reads.offsets) == len(reads.rows) + 1
            for name in ("tokens", "weights", "grad_output"):
                assert torch.equal(getattr(reads, name), getattr(truth, name))


@check
def either_log_gives_the_same_bits(backend: Any) -> None:
    """With and without segments that are empty."""
    all_passes, before, results = passes(), tables(), []
    for sort in (backend.sort_reads, reference.sort_reads):
        reads, after = sorted_by(sort, all_passes), [table.clone() for table in before]
        backend.adam_rows(*after, reads, AdamStep(**STEP))
        results.append([*after, backend.weighted_sum_grad_values(reads, 40)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@check
def less_state_gives_what_the_reference_gives(backend: Any) -> None:
    """Of rows in one block of columns and in several, from either log, with mean squares of its own and given ones."""
    for width in (37, 1030):
        slots, weights, backs = torch.randint(40, (30, 20)), torch.randn(30, 20), torch.randn(30, width)
        before = [torch.randn(40, width), torch.randn(40, width), torch.rand(40)]
        truth = reference.sort_reads([slots], [weights], [backs], 40)
        for has_first in (True, False):
            theirs = [table.clone() for table in before]
            reference.adam_rows(theirs[0], theirs[1] if has_first else None, theirs[2], truth, AdamStep(**STEP))
            for sort in (backend.sort_reads, reference.sort_reads):
                reads = sort([slots], [weights], [backs], 40)
                for squares in (None, backend.row_mean_squares(reads)):
                    ours = [table.clone() for table in before]
                    backend.adam_rows(
                        ours[0], ours[1] if has_first else None, ours[2], reads, AdamStep(**STEP), squares
                    )
                    for one, other in zip(ours, theirs, strict=True):
                        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@check
def fp64_goes_to_the_reference_from_either_log(backend: Any) -> None:
    all_passes = [tuple(part.double() if part.is_floating_point() else part for part in one) for one in passes()]
    truth, before = sorted_by(reference.sort_reads, all_passes), [table.double() for table in tables()]
    theirs = [table.clone() for table in before]
    reference.adam_rows(*theirs, truth, AdamStep(**STEP))
    for sort in (backend.sort_reads, reference.sort_reads):
        reads, ours = sorted_by(sort, all_passes), [table.clone() for table in before]
        backend.adam_rows(*ours, reads, AdamStep(**STEP))
        assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
        assert torch.equal(backend.row_gradient_norm(reads), reference.row_gradient_norm(truth))
        dense = backend.weighted_sum_grad_values(reads, 40)
        assert torch.equal(dense, reference.weighted_sum_grad_values(truth, 40))


# --- the processes ----------------------------------------------------------------------------------------


needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed")


@needs_triton
def test_interpreted_kernels_pass_every_check(tmp_path: Path) -> None:
    # One test, so that pytest-xdist starts one interpreter.
    assert_none(failures_in(__file__, tmp_path))


if __name__ == "__main__":
    print(json.dumps(failures_of(CHECKS)))
