"""The Triton backend without a GPU: its kernels interpreted on the CPU.

The interpreter is switched on for a whole process, before Triton is imported. The checks below run in one such
process, `python tests/ops/test_triton.py`, which prints a JSON object of what failed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import oracle
from pkmem.ops import reference
from pkmem.ops.arguments import AdamStep

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHECKS: dict[str, Callable[[Any], None]] = {}


def check(function: Callable[[Any], None]) -> Callable[[Any], None]:
    """A check of the backend; takes the backend's module."""
    CHECKS[function.__name__] = function
    return function


def error(computed: Tensor, truth: np.ndarray) -> float:
    """The largest error: absolute up to magnitude 1, relative to the largest entry above."""
    difference = np.abs(oracle.fp64(computed) - truth)
    return float(difference.max(initial=0) / np.abs(truth).max(initial=1))


def assert_at_most_twice_as_wrong(computed: Tensor, by_reference: Tensor, truth: np.ndarray) -> None:
    assert computed.dtype == by_reference.dtype
    assert tuple(computed.shape) == truth.shape
    ours, theirs = error(computed, truth), error(by_reference, truth)
    assert ours <= 2 * theirs + 1e-6, (ours, theirs)


# --- selection --------------------------------------------------------------------------------------------


def integers(*shape: int) -> Tensor:
    return torch.randint(-2, 3, shape).float()


@check
def slots_equal_the_reference_on_integers_with_ties(backend: Any) -> None:
    for n, h, half, s, knn in (
        (3, 2, 3, 7, 3),
        (2, 1, 5, 130, 5),
        (17, 1, 1, 6, 1),
        (2, 1, 70, 5, 5),
        (2, 1, 1, 1, 1),
        (1, 1, 1, 30, 20),
    ):
        query, sub_keys = integers(n, h, 2 * half), integers(h, 2, s, half)
        scores, slots = backend.product_key_topk(query, sub_keys, knn)
        true_scores, true_slots = reference.product_key_topk(query, sub_keys, knn)
        assert torch.equal(slots, true_slots), (n, h, half, s, knn)
        assert torch.equal(scores, true_scores), (n, h, half, s, knn)


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
def zeros_of_either_sign_go_by_lower_slot(backend: Any) -> None:
    sub_keys = torch.tensor([-0.0, 0.0, -0.0, 0.0, -0.0]).reshape(1, 1, 5, 1).expand(1, 2, 5, 1)
    query = torch.tensor([[[-1.0, 1.0]]])
    _, slots = backend.product_key_topk(query, sub_keys, 5)
    assert slots.tolist() == [[[0, 1, 2, 3, 4]]]
    below = torch.full((1, 2, 300, 1), 2.0) * torch.tensor([1, -1])[:, None, None]  # of both halves below zero
    below[:, :, 290:295] = sub_keys
    with bounding_always():
        _, slots = backend.product_key_topk(query.bfloat16(), below.bfloat16(), 5)
    assert slots.tolist() == [[[290 * 301 + rank for rank in range(5)]]]


@check
def a_query_that_is_not_finite_disturbs_no_other(backend: Any) -> None:
    query, sub_keys = torch.randn(4, 1, 4), torch.randn(1, 2, 5, 2)
    query[1], query[2, 0, 0] = torch.nan, torch.inf
    scores, slots = backend.product_key_topk(query, sub_keys, 3)
    assert ((slots >= 0) & (slots < 25)).all()
    healthy = [0, 3]
    assert torch.equal(slots[healthy], reference.product_key_topk(query[healthy], sub_keys, 3)[1])
    assert scores[healthy].isfinite().all()


@check
def scores_and_gradients_are_as_exact_as_the_reference(backend: Any) -> None:
    for dtype in DTYPES:
        query, sub_keys = torch.randn(5, 2, 14).to(dtype), torch.randn(2, 2, 19, 7).to(dtype)
        scores, slots = backend.product_key_topk(query, sub_keys, 4)
        truth = oracle.all_scores(query, sub_keys)
        best = oracle.best_first(truth, 4)[0]
        assert_at_most_twice_as_wrong(scores, reference.product_key_topk(query, sub_keys, 4)[0], best)
        assert error(torch.from_numpy(truth).gather(-1, slots.cpu()), best) < 1e-6
        grad_scores = 0.01 * torch.randn(scores.shape)
        truths = oracle.product_key_topk_gradients(grad_scores, query, sub_keys, slots)
        grads = [side.product_key_topk_backward(grad_scores, query, sub_keys, slots) for side in (backend, reference)]
        for ours, theirs, true_grad in zip(*grads, truths, strict=True):
            assert_at_most_twice_as_wrong(ours, theirs, true_grad)


@check
def gradients_of_many_tokens_are_summed_in_parts(backend: Any) -> None:
    query, sub_keys, grad_scores = integers(70, 1, 4), integers(1, 2, 9, 2), integers(70, 1, 3)
    slots = torch.randint(81, (70, 1, 3))
    ours = backend.product_key_topk_backward(grad_scores, query, sub_keys, slots)
    theirs = reference.product_key_topk_backward(grad_scores, query, sub_keys, slots)
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


@check
def mixed_dtypes_and_gaps_in_memory_are_taken(backend: Any) -> None:
    query = torch.stack([integers(3, 1, 4), integers(3, 1, 4)], -1)[..., 0].bfloat16()
    sub_keys = torch.stack([integers(1, 2, 6, 2)] * 2, -1)[..., 0]
    assert torch.equal(
        backend.product_key_topk(query, sub_keys, 2)[1], reference.product_key_topk(query, sub_keys, 2)[1]
    )


@check
def no_tokens_give_no_slots_and_no_gradient(backend: Any) -> None:
    query, sub_keys = torch.randn(0, 2, 4), torch.randn(2, 2, 5, 2)
    scores, slots = backend.product_key_topk(query, sub_keys, 3)
    assert scores.shape == slots.shape == (0, 2, 3)
    grads = backend.product_key_topk_backward(scores, query, sub_keys, slots)
    assert torch.equal(grads[1], torch.zeros_like(sub_keys))


@check
def what_the_kernels_do_not_cover_goes_to_the_reference(backend: Any) -> None:
    for query, sub_keys, knn in (
        (torch.randn(1, 1, 2), torch.randn(1, 2, 70, 1), 65),
        (torch.randn(1, 1, 2).double(), torch.randn(1, 2, 7, 1).double(), 3),
    ):
        ours, theirs = (side.product_key_topk(query, sub_keys, knn) for side in (backend, reference))
        assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


# --- weighted sum -----------------------------------------------------------------------------------------

BAG_SIZES = (
    (53, 7, 29, 5),
    (3, 17, 9, 40),
    (20, 1100, 3, 9),
    (20, 768, 2, 3),
    (11, 1, 9, 3),
    (11, 3, 0, 4),
    (11, 3, 6, 0),
)


@check
def sums_and_their_gradients_are_as_exact_as_the_reference(backend: Any) -> None:
    for dtype in DTYPES:
        for m, v, n, b in BAG_SIZES:
            values, slots, weights = torch.randn(m, v).to(dtype), torch.randint(m, (n, b)), torch.randn(n, b).to(dtype)
            grad_output = torch.randn(n, v).to(dtype)
            true_sum = oracle.weighted_sum(values, slots, weights)
            true_grads = oracle.weighted_sum_gradients(values, slots, weights, grad_output)
            sums = [side.weighted_sum(values, slots, weights) for side in (backend, reference)]
            assert_at_most_twice_as_wrong(*sums, true_sum)
            grads = [side.row_products(values, slots, grad_output) for side in (backend, reference)]
            assert_at_most_twice_as_wrong(*grads, true_grads[1])
            reads = reference.sort_reads([slots], [weights], [grad_output], m)
            dense = [side.weighted_sum_grad_values(reads, m) for side in (backend, reference)]
            assert_at_most_twice_as_wrong(*dense, true_grads[0])


@check
def many_tokens_take_the_other_launch_shape(backend: Any) -> None:
    values, slots, weights = integers(31, 5), torch.randint(31, (300, 9)), integers(300, 9)
    assert torch.equal(backend.weighted_sum(values, slots, weights), reference.weighted_sum(values, slots, weights))


@check
def tables_may_have_gaps_between_rows(backend: Any) -> None:
    for values in (integers(9, 12)[:, :5], integers(5, 9).mT):
        slots, weights, grad_output = torch.randint(9, (4, 3)), integers(4, 3), integers(4, 5)
        assert torch.equal(backend.weighted_sum(values, slots, weights), reference.weighted_sum(values, slots, weights))
        ours, theirs = (side.row_products(values, slots, grad_output.expand(4, 5)) for side in (backend, reference))
        assert torch.equal(ours, theirs)


@check
def offsets_past_two_to_the_31_are_right(backend: Any) -> None:
    width, far = 1024, (1 << 21) + 3  # row `far` begins past 2 ** 31 elements
    torch.use_deterministic_algorithms(False)  # or the whole tables would be written
    tables = [torch.empty(far + 1, width, dtype=torch.bfloat16) for _ in range(3)]  # memory is used where touched
    near = [torch.empty(2, width, dtype=torch.bfloat16) for _ in range(3)]
    for table, small in zip(tables, near, strict=True):
        small.uniform_(0.5, 1)
        table[0], table[far] = small[0], small[1]
    slots, weights, grad_output = torch.tensor([[0, far], [far, far]]), torch.rand(2, 2), torch.randn(2, width)
    small_slots = slots.clamp(max=1)
    assert torch.equal(
        backend.weighted_sum(tables[0], slots, weights), backend.weighted_sum(near[0], small_slots, weights)
    )
    assert torch.equal(
        backend.row_products(tables[0], slots, grad_output),
        backend.row_products(near[0], small_slots, grad_output),
    )
    step = {"lr": 0.1, "betas": (0.9, 0.98), "eps": 1e-8, "step": 1, "scale": 1.0}
    for group, rows in ((tables, slots), (near, small_slots)):
        backend.adam_rows(*group, backend.sort_reads([rows], [weights], [grad_output], far + 1), AdamStep(**step))
    for table, small in zip(tables, near, strict=True):
        assert torch.equal(table[0], small[0])
        # The rounding of values is keyed by the row; the nearest two bf16 numbers are 2 ** -8 apart.
        assert (table[far].float() - small[1].float()).abs().max() <= 2**-7
    torch.use_deterministic_algorithms(True)


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
def gradients_norm_and_adam_follow_the_oracle_from_either_log(backend: Any) -> None:
    all_passes = passes()
    gradients = oracle.row_gradients(all_passes)
    for sort in (backend.sort_reads, reference.sort_reads):
        reads = sorted_by(sort, all_passes)
        by_reference = sorted_by(reference.sort_reads, all_passes)
        dense = np.zeros((40, 37))
        dense[list(gradients)] = list(gradients.values())
        both = backend.weighted_sum_grad_values(reads, 40), reference.weighted_sum_grad_values(by_reference, 40)
        assert_at_most_twice_as_wrong(*both, dense)
        norm = backend.row_gradient_norm(reads)
        assert norm.dtype == torch.float64
        assert abs(norm.item() / np.linalg.norm(dense) - 1) < 1e-6
        ours = tables()
        theirs, truth = [table.clone() for table in ours], [oracle.fp64(table) for table in ours]
        backend.adam_rows(*ours, reads, AdamStep(**STEP))
        reference.adam_rows(*theirs, by_reference, AdamStep(**STEP))
        halved = {row: 0.5 * gradient for row, gradient in gradients.items()}
        oracle.adam(*truth, halved, lr=0.01, betas=(0.9, 0.98), eps=1e-8, step=3)
        for trio in zip(ours, theirs, truth, strict=True):
            assert_at_most_twice_as_wrong(*trio)


@check
def two_runs_give_the_same_bits_and_rows_not_read_keep_theirs(backend: Any) -> None:
    all_passes, before = passes(), tables()
    results = []
    for _ in range(2):
        reads = sorted_by(backend.sort_reads, all_passes)
        after = [table.clone() for table in before]
        backend.adam_rows(*after, reads, AdamStep(**STEP))
        results.append([*after, backend.row_gradient_norm(reads), backend.weighted_sum_grad_values(reads, 40)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    untouched = sorted(set(range(40)) - set(oracle.group_reads(all_passes)))
    assert untouched
    for table, old in zip(results[0], before, strict=False):
        assert torch.equal(table[untouched], old[untouched])


@check
def numbers_may_be_tensors_and_a_scale_that_is_not_finite_changes_nothing(backend: Any) -> None:
    reads, before = sorted_by(backend.sort_reads, passes()), tables()
    plain, in_tensors, skipped = ([table.clone() for table in before] for _ in range(3))
    backend.adam_rows(*plain, reads, AdamStep(**STEP))
    numbers = {name: torch.tensor(STEP[name], dtype=torch.float64) for name in ("lr", "step", "scale")}
    backend.adam_rows(*in_tensors, reads, AdamStep(**{**STEP, **numbers}))
    assert all(torch.equal(*pair) for pair in zip(plain, in_tensors, strict=True))
    for scale in (torch.tensor(torch.nan), torch.inf):
        backend.adam_rows(*skipped, reads, AdamStep(**{**STEP, "scale": scale}))
    assert all(torch.equal(*pair) for pair in zip(before, skipped, strict=True))


@check
def a_gradient_that_is_not_finite_shows_in_the_norm(backend: Any) -> None:
    for bad in (torch.nan, torch.inf):
        all_passes = passes()
        all_passes[1][2][5, 36] = bad
        assert not backend.row_gradient_norm(sorted_by(backend.sort_reads, all_passes)).isfinite()


@check
def finite_gradients_are_told_from_others(backend: Any) -> None:
    """By a bound that sums nothing where it can; where it cannot, by the sums."""
    for factor, is_finite in ((1.0, True), (1e8, True), (1e9, False), (torch.nan, False)):
        reads = backend.sort_reads([torch.tensor([[1]])], [torch.full((1, 1), 1e30)], [torch.full((1, 3), factor)], 2)
        found = backend.gradient_is_finite(reads)
        assert (found.shape, found.dtype, found.item()) == ((), torch.bool, is_finite), factor
    many = [torch.zeros(64, 1, dtype=torch.int64)], [torch.full((64, 1), 1e30)], [torch.full((64, 3), 1e7)]
    assert not backend.gradient_is_finite(backend.sort_reads(*many, 1))  # each read is finite, their sum is not
    apart = [torch.arange(64)[:, None]], *many[1:]
    assert backend.gradient_is_finite(backend.sort_reads(*apart, 64))  # the bound cannot tell, the sums can


class NothingWaits(TorchDispatchMode):
    """Fails at an operator that would make the host wait for a GPU."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "item", "equal")
        name = function.overloadpacket.__name__
        assert not any(name.startswith(word) for word in waits), f"{function} waits for the GPU"
        if name in ("index", "index_put_", "repeat_interleave"):
            assert not any(getattr(part, "dtype", None) == torch.bool for part in (args[1] if len(args) > 1 else ()))
        return function(*args, **(kwargs or {}))


@check
def a_layer_makes_nobody_wait(backend: Any) -> None:
    from pkmem import MemoryConfig, ProductKeyMemory

    memory = ProductKeyMemory(MemoryConfig(dim=4, num_sub_keys=5, heads=2, knn=3, query_dim=6))
    x, mask = torch.randn(7, 4, requires_grad=True), torch.arange(7) < 5
    with NothingWaits():  # sees the layer's operators, but not into the memory's own
        memory(x, mask).sum().backward()
        query, sub_keys = torch.randn(7, 2, 6), memory.keys.sub_keys.detach()
        scores, slots = backend.product_key_topk(query, sub_keys, 3)
        backend.product_key_topk_backward(scores, query, sub_keys, slots)
        backend.weighted_sum(memory.values.weight.detach(), slots.flatten(1), scores.flatten(1))
        backend.row_products(memory.values.weight.detach(), slots.flatten(1), torch.randn(7, 4))


@check
def a_step_of_row_adam_makes_nobody_wait(backend: Any) -> None:
    from pkmem import RowAdam
    from pkmem.layer.values import ValueTable

    for max_norm in (None, 1.0):
        table = ValueTable(40, 5)
        table.backend = "triton"
        optimizer, before = RowAdam(table, lr=0.1, max_norm=max_norm), table.weight.detach().clone()
        for number, factor in enumerate((1.0, torch.nan, 1.0)):
            table(torch.randint(30, (6, 1, 4)), torch.rand(6, 1, 4)).backward(factor * torch.ones(6, 5))
            with NothingWaits():
                optimizer.step()
            assert optimizer.num_skipped == (number > 0)
            assert optimizer.state[table.weight]["step"] == (1, 1, 2)[number]
            assert torch.equal(table.weight, before) == (number == 1)
            before = table.weight.detach().clone()
        assert table.weight.isfinite().all()


@check
def a_bf16_table_is_rounded_at_random_without_bias_and_by_key(backend: Any) -> None:
    slots, weights = torch.arange(30)[:, None], torch.ones(30, 1)
    reads = backend.sort_reads([slots], [weights], [torch.ones(30, 300)], 30)
    number = 1 + 2**-7 * 0.3  # from 1 it is three tenths of the way to the next bf16 number

    def rounded(seed: int, step: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        moments = [torch.zeros(30, 300, dtype=torch.float32) for _ in range(2)]
        values = torch.ones(30, 300, dtype=dtype)
        lr = -(number - 1)  # the first step of Adam is lr times the sign of the gradient
        backend.adam_rows(
            values, *moments, reads, AdamStep(lr=lr, betas=(0.0, 0.0), eps=1e-30, step=step, scale=1.0, seed=seed)
        )
        return values

    assert (rounded(0, 1, torch.float32) - number).abs().max() < 1e-6
    values = rounded(3, 1)
    up = (values == 1 + 2**-7).float()
    assert ((values == 1) | (up == 1)).all()
    assert abs(up.mean() - 0.3) < 0.02
    assert (up.mean(1) - 0.3).abs().max() < 0.15
    assert torch.equal(values, rounded(3, 1))
    for other in (rounded(4, 1), rounded(3, 2), rounded(3 + (1 << 40), 1)):
        assert 0.3 < (other == values).float().mean() < 0.7


@check
def rounding_is_keyed_as_on_the_cpu(backend: Any) -> None:
    if not find_spec("numba"):
        return
    from pkmem.ops import cpu

    slots = torch.arange(20)[:, None] + (1 << 20)
    given = [slots], [torch.ones(20, 1)], [torch.randn(20, 33)]
    results = []
    for side, device in ((backend, slots.device), (cpu, torch.device("cpu"))):
        reads = reference.sort_reads(*([part.to(device) for part in parts] for parts in given), (1 << 20) + 20)
        table = torch.ones((1 << 20) + 20, 33, dtype=torch.bfloat16, device=device)
        moments = [torch.zeros(table.shape, device=device) for _ in range(2)]
        side.adam_rows(table, *moments, reads, AdamStep(**{**STEP, "lr": 0.002}, seed=(7 << 32) + 5))
        results.append(table[1 << 20 :].cpu())
    assert (results[0] == results[1]).float().mean() > 0.99  # but for sums rounded otherwise


@check
def bf16_moments_are_rounded_as_by_the_reference(backend: Any) -> None:
    all_passes = passes()
    ours = [table.to(torch.bfloat16) if number else table for number, table in enumerate(tables())]
    theirs = [table.clone() for table in ours]
    backend.adam_rows(*ours, sorted_by(backend.sort_reads, all_passes), AdamStep(**STEP, seed=5))
    reference.adam_rows(*theirs, sorted_by(reference.sort_reads, all_passes), AdamStep(**STEP, seed=5))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=2**-7, atol=1e-5)
        if mine.dtype == torch.bfloat16:
            assert (mine == other).float().mean() > 0.99  # at random, by the same key; but for sums rounded otherwise


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


@check
def no_reads_are_no_work(backend: Any) -> None:
    reads = backend.sort_reads([torch.zeros(0, 3, dtype=torch.int64)], [torch.zeros(0, 3)], [torch.zeros(0, 5)], 4)
    assert backend.row_gradient_norm(reads) == 0
    assert torch.equal(backend.weighted_sum_grad_values(reads, 4), torch.zeros(4, 5))
    values = torch.ones(4, 5)
    backend.adam_rows(values, values.clone(), values.clone(), reads, AdamStep(**STEP))
    assert (values == 1).all()


# --- the processes ----------------------------------------------------------------------------------------


def interpreted() -> dict[str, str]:
    """What failed, by check: its traceback."""
    from pkmem.ops import triton as backend

    failures = {}
    torch.use_deterministic_algorithms(True)  # fresh memory is full of NaN
    for name, function in CHECKS.items():
        torch.manual_seed(0)
        try:
            function(backend)
        except Exception:
            failures[name] = traceback.format_exc()
    return failures


def in_a_process(cache: Path) -> dict[str, str]:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    finished = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stderr
    failures: dict[str, str] = json.loads(finished.stdout.splitlines()[-1])
    return failures


needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="Triton is not installed")


@needs_triton
def test_interpreted_kernels_pass_every_check(tmp_path: Path) -> None:
    # One test, so that pytest-xdist starts one interpreter.
    assert_no_failures(in_a_process(tmp_path))


def assert_no_failures(failures: dict[str, str]) -> None:
    assert not failures, "\n".join(f"{name}\n{trace}" for name, trace in failures.items())


if __name__ == "__main__":
    print(json.dumps(interpreted()))
