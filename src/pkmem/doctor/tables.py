"""Checks of sums over a table's rows and of all gradients: point 6, what of 3 concerns them, and point 8."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from pkmem.doctor import truth
from pkmem.doctor.checks import Case, NotChecked, assert_near, assert_same, check
from pkmem.doctor.sizes import Reading
from pkmem.ops import packing
from pkmem.ops.arguments import AdamStep, SortedReads

_SLOPES = 2.0**-16  # the matrix units may take the slopes of 16-bit queries with 16 bits


@check(6, "weighted sums and inner products of rows")
def sums(case: Case) -> str:
    """All widths."""
    for size in case.sizes.readings:
        values, slots, weights, x = _reading(case, size)
        _assert_sums(case, size, case.there(values), values, slots, weights, x)
    return f"widths {', '.join(str(size.width) for size in case.sizes.readings)}"


@check(6, "sums of rows that are packed in 8 and in 4 bits", ("fp32",))
def sums_of_packed_rows(case: Case) -> None:
    """All widths, of tables that no training made: every code, and scales of every size."""
    for size in case.sizes.readings:
        _, slots, weights, _ = _reading(case, size)
        for bits in packing.BITS:
            rows = case.below(256, size.num_rows, packing.row_bytes(size.width, bits)).to(torch.uint8)
            scales = case.normal(size.num_rows, 1) * 10.0 ** case.below(9, size.num_rows, 1).sub(4)
            rows[:, packing.code_bytes(size.width, bits) :] = scales.view(torch.uint8)
            given = case.there(rows), case.there(slots), case.there(weights)
            found = case.module.packed_sum(*given, size.width, bits)
            assert found.dtype == torch.float32, f"sums are {found.dtype}"
            values = packing.unpack_rows(rows, size.width, bits)
            magnitudes = truth.weighted_sum(values.abs(), slots, weights.abs())
            assert_near(f"sums of {size} in {bits} bits", found, truth.weighted_sum(values, slots, weights), magnitudes)


@check(6, "sums over a table that lies in memory with gaps, transposed, misaligned")
def sums_with_gaps(case: Case) -> None:
    """Rows are found by their strides alone."""
    size = Reading(19, 21, 7, 5)
    values, slots, weights, x = _reading(case, size)
    wider = torch.full((19, 23), torch.nan, dtype=case.dtype)
    wider[:, 1:22] = values
    shifted = torch.full((19 * 21 + 1,), torch.nan, dtype=case.dtype)
    shifted[1:] = values.flatten()
    for table in (
        case.there(wider)[:, 1:22],
        case.there(values.mT.contiguous()).mT,
        case.there(shifted)[1:].view(19, 21),
        case.there(wider.repeat(1, 2))[:, 1:22],
    ):
        _assert_sums(case, f"{size}, strides {table.stride()}", table, values, slots, weights, x)


@check(6, "gradient of a table, its norm, whether it is finite")
def gradients_of_a_table(case: Case) -> None:
    """Of one pass and of several, with a row that has very many reads."""
    for size in case.sizes.readings:
        _, slots, weights, grad_output = _reading(case, size)
        _assert_gradients(case, size, [(slots, weights, grad_output)], size.num_rows)
    passes = many_passes(case, 37)
    _assert_gradients(case, "two passes", passes, 40)


@check(6, "gradients of queries and sub-keys")
def gradients_of_the_selection(case: Case) -> None:
    """All shapes; slots drawn at random, each several times."""
    for size in (*case.sizes.selections[:6], *case.sizes.random_selections):
        query = case.normal(size.num_tokens, size.heads, 2 * size.half)
        sub_keys = case.normal(size.heads, 2, size.num_sub_keys, size.half)
        slots = case.below(size.num_sub_keys**2, size.num_tokens, size.heads, size.knn)
        grad_scores = replace(case, dtype=torch.float32).normal(*slots.shape)
        there = (case.there(tensor) for tensor in (grad_scores, query, sub_keys, slots))
        found = case.module.product_key_topk_backward(*there)
        expected = truth.product_key_topk_gradients(grad_scores, query, sub_keys, slots)
        magnitudes = truth.product_key_topk_gradients(grad_scores.abs(), query.abs(), sub_keys.abs(), slots)
        coarse = 0.0 if case.dtype == torch.float32 else _SLOPES
        for what, trio in zip(("queries", "sub-keys"), zip(found, expected, magnitudes, strict=True), strict=True):
            assert trio[0].dtype == case.dtype, f"gradient of {what} is {trio[0].dtype}"
            assert_near(f"gradient of {what} of {size}", *trio, coarse)


@check(6, "sums and gradients in fp64, which no kernel takes", ("",))
def sums_in_fp64(case: Case) -> None:
    """One width."""
    wide, size = replace(case, dtype=torch.float64), case.sizes.readings[0]
    values, slots, weights, x = _reading(wide, size)
    _assert_sums(wide, size, case.there(values), values, slots, weights, x)
    _assert_gradients(wide, size, [(slots, weights, x)], size.num_rows)


@check(3, "sums beside rows and tokens that are not finite")
def sums_beside_nan(case: Case) -> None:
    """NaN and infinity stay with the tokens that read them, and with the rows that these read."""
    size = case.sizes.readings[0]
    values, slots, weights, x = _reading(case, size)
    for bad in (torch.nan, torch.inf):
        hurt, hurt_x = values.clone(), x.clone()
        hurt[slots[0, 0]], hurt_x[1] = bad, bad
        reads_it = (slots == slots[0, 0]).any(1)
        for what, function, healthy, pair in (
            ("sums", case.module.weighted_sum, ~reads_it, ((values, slots, weights), (hurt, slots, weights))),
            (
                "inner products",
                case.module.row_products,
                torch.arange(len(x)) != 1,
                ((values, slots, x), (values, slots, hurt_x)),
            ),
        ):
            plain, beside = (function(*map(case.there, given)).cpu() for given in pair)
            assert_same(f"{what} beside {bad}", beside[healthy], plain[healthy])
            assert not beside[~healthy].isfinite().all(), f"{what}: a row of {bad} is lost"
        plain, beside = (
            case.module.weighted_sum_grad_values(
                sorted_reads(case, [(slots, weights, back)], size.num_rows), size.num_rows
            ).cpu()
            for back in (x, hurt_x)
        )
        is_healthy = torch.ones(size.num_rows, dtype=torch.bool)
        is_healthy[slots[1]] = False
        assert_same(f"gradients beside {bad}", beside[is_healthy], plain[is_healthy])
        reads = sorted_reads(case, [(slots, weights, hurt_x)], size.num_rows)
        assert not case.module.row_gradient_norm(reads).isfinite(), f"the norm of a gradient with {bad} is finite"
        assert not math.isfinite(case.module.row_gradient_norm_bound(reads)), f"a gradient with {bad} has a bound"
        assert not case.module.gradient_is_finite(reads), f"a gradient with {bad} is called finite"


@check(6, "gradients near the end of fp32 are called finite or not", ("fp32",))
def finite_or_not(case: Case) -> None:
    """By a bound that sums nothing where it can; where it cannot, by the sums."""
    one, column = torch.tensor([[1]]), torch.zeros(64, 1, dtype=torch.int64)
    many = torch.full((64, 1), 1e30), torch.full((64, 3), 1e7)
    examples = [((one, torch.full((1, 1), 1e30), torch.full((1, 3), back)), is_finite) for back, is_finite in (
        (1.0, True), (1e8, True), (1e9, False), (torch.nan, False)
    )]  # fmt: skip
    examples += [((column, *many), False), ((torch.arange(64)[:, None], *many), True)]
    for given, is_finite in examples:
        found = case.module.gradient_is_finite(sorted_reads(case, [given], 64))
        assert (found.shape, found.dtype) == ((), torch.bool)
        assert found.item() == is_finite, (
            f"{given[2][0, 0]} times 1e30, {len(given[0])} reads: finite is {found.item()}"
        )


@check(8, "sums, inner products and an update", shapes="huge")
def huge_table(case: Case) -> None:
    """A row that begins past 2 ** 31 elements gives and becomes what the same row near the beginning does."""
    width = 1024
    far = (1 << 31) // width + 3
    _require_memory(case, 3 * case.dtype.itemsize * (far + 1) * width)
    with _untouched_memory():
        tables = [torch.empty(far + 1, width, dtype=case.dtype, device=case.device) for _ in range(3)]
    near = [case.there(case.normal(2, width).abs() + 0.5) for _ in range(3)]
    for table, small in zip(tables, near, strict=True):
        table[0], table[far] = small[0], small[1]
    slots, weights, grad_output = torch.tensor([[0, far], [far, far]]), torch.rand(2, 2), torch.ones(2, width)
    there = [case.there(tensor) for tensor in (slots, weights, grad_output)]
    small_slots = there[0].clamp(max=1)
    for what, function, given in (
        ("sums", case.module.weighted_sum, there[1]),
        ("products", case.module.row_products, there[2]),
    ):
        assert_same(what, function(tables[0], there[0], given), function(near[0], small_slots, given).cpu())
    update = AdamStep(lr=0.1, betas=(0.9, 0.98), eps=1e-8, step=1, scale=1.0)
    for group, rows in ((tables, there[0]), (near, small_slots)):
        reads = case.module.sort_reads([rows], [there[1]], [there[2]], far + 1)
        case.module.adam_rows(group[0], group[1], group[2], reads, update)
    for table, small in zip(tables, near, strict=True):
        assert_same("row 0 after an update", table[0], small[0].cpu())
        # The rounding is keyed by the row, so that the two may be neighbours.
        wrong = (table[far].float() - small[1].float()).abs() > 2**-6 * small[1].float().abs()
        assert not wrong.any(), f"row {far:,} after an update: {int(wrong.sum())} of {width} numbers are wrong"


def _reading(case: Case, size: Reading) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values, slots, weights, and what is multiplied with the rows or comes back to the tokens."""
    values, slots = case.normal(size.num_rows, size.width), case.below(size.num_rows, size.num_tokens, size.reads)
    return values, slots, case.normal(size.num_tokens, size.reads), case.normal(size.num_tokens, size.width)


def many_passes(case: Case, width: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Two passes over a table of 40 rows: row 1 has very many reads, row 7 one, rows 38 and 39 none."""
    num_tokens = -(-case.sizes.hot_reads // 6)
    hot = 2 + case.below(10, num_tokens, 9)
    hot[:, :6] = 1
    hot[hot == 7] = 8
    hot[:3, 8] = torch.tensor([7, 8, 8])
    slots = [hot, 12 + case.below(26, 11, 4)]
    return [(part, case.normal(*part.shape), case.normal(len(part), width)) for part in slots]


def gradient_of(passes: list[tuple[Tensor, Tensor, Tensor]], num_rows: int) -> tuple[Tensor, Tensor]:
    """The fp64 gradient (m, v) of a table, and the magnitudes of what was summed up."""
    found = torch.stack([truth.table_gradient(*one, num_rows) for one in passes]).sum(0)
    magnitudes = torch.stack([truth.table_gradient(s, w.abs(), back.abs(), num_rows) for s, w, back in passes]).sum(0)
    return found, magnitudes


def sorted_reads(case: Case, passes: list[tuple[Tensor, Tensor, Tensor]], num_rows: int) -> SortedReads:
    """The reads of some passes, as the backend groups them, on the device."""
    slots, weights, backs = ([case.there(tensor) for tensor in part] for part in zip(*passes, strict=True))
    return case.module.sort_reads(slots, weights, backs, num_rows)


def _assert_sums(
    case: Case, what: object, table: Tensor, values: Tensor, slots: Tensor, weights: Tensor, x: Tensor
) -> None:
    found = case.module.weighted_sum(table, case.there(slots), case.there(weights))
    assert found.dtype == case.dtype, f"sums are {found.dtype}"
    magnitudes = truth.weighted_sum(values.abs(), slots, weights.abs())
    assert_near(f"sums of {what}", found, truth.weighted_sum(values, slots, weights), magnitudes)
    found = case.module.row_products(table, case.there(slots), case.there(x))
    assert found.dtype == torch.promote_types(case.dtype, torch.float32), f"inner products are {found.dtype}"
    magnitudes = truth.row_products(values.abs(), slots, x.abs())
    assert_near(f"inner products of {what}", found, truth.row_products(values, slots, x), magnitudes)


def _assert_gradients(case: Case, what: object, passes: list[tuple[Tensor, Tensor, Tensor]], num_rows: int) -> None:
    reads = sorted_reads(case, passes, num_rows)
    expected, magnitudes = gradient_of(passes, num_rows)
    found = case.module.weighted_sum_grad_values(reads, num_rows)
    assert found.dtype == case.dtype, f"the gradient is {found.dtype}"
    assert_near(f"gradient of a table of {what}", found, expected, magnitudes)
    norm, true_norm = case.module.row_gradient_norm(reads), torch.linalg.vector_norm(expected)
    assert (norm.shape, norm.dtype) == ((), torch.float64), f"the norm is {norm.dtype}, shape {tuple(norm.shape)}"
    assert abs(norm.item() - true_norm.item()) <= 1e-6 * true_norm.item(), f"norm {norm.item()}, not {true_norm.item()}"
    bound = case.module.row_gradient_norm_bound(reads)
    counts = reads.host_offsets.diff()
    most = 1.002 * math.sqrt(max(counts.tolist(), default=1)) * _norm_of_single_reads(passes)
    assert bound == math.inf or true_norm <= bound <= most, f"the norm {true_norm.item()} is bounded by {bound}"
    assert case.module.gradient_is_finite(reads), f"the gradient of {what} is called not finite"


def _norm_of_single_reads(passes: list[tuple[Tensor, Tensor, Tensor]]) -> float:
    """Of a gradient whose reads were all of different rows."""
    squares = [(w.double() ** 2 * back.double().square().sum(1, keepdim=True)).sum() for _, w, back in passes]
    return math.sqrt(sum(square.item() for square in squares))


def _require_memory(case: Case, needed: int) -> None:
    """Only a GPU's memory is taken at once: a CPU's is taken where it is touched."""
    if case.device.type != "cuda":
        return
    torch.cuda.empty_cache()  # what the checks before this one left
    free, _ = torch.cuda.mem_get_info(case.device)
    if free < needed:
        raise NotChecked(f"{free / 2**30:.1f} GiB are free on {case.device}, and {needed / 2**30:.1f} GiB are needed")


@contextmanager
def _untouched_memory() -> Iterator[None]:
    """Memory is not filled, as deterministic torch would do."""
    before = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before  # type: ignore[attr-defined]


CHECKS = (
    sums, sums_with_gaps, gradients_of_a_table, gradients_of_the_selection, sums_in_fp64, sums_beside_nan,
    finite_or_not, huge_table,
)  # fmt: skip
