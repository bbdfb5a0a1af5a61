"""packing.py and packed_sum: rows in few bits, on every backend, against loops over single bytes."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import oracle
from pkmem.ops import packed_sum
from pkmem.ops.packing import BITS, code_bytes, pack_rows, row_bytes, unpack_rows

SIZES = {  # rows, width, tokens, reads
    "round": (64, 64, 48, 16),
    "ragged": (53, 37, 29, 5),
    "duplicates": (3, 17, 29, 40),
    "wide": (50, 1100, 150, 9),
    "one-column": (11, 1, 9, 3),
    "no-tokens": (11, 3, 0, 4),
    "no-reads": (11, 3, 6, 0),
}
by_bits = pytest.mark.parametrize("bits", BITS)


def looped(row: bytes, width: int, bits: int) -> list[float]:
    """A row's numbers, byte by byte."""
    *codes, scale = struct.unpack(f"<{len(row) - 4}bf", row)
    if bits == 4:
        halves = [[code & 15 for code in codes], [(code >> 4) & 15 for code in codes]]
        codes = [half - 16 if half > 7 else half for part in halves for half in part]
    return [code * scale for code in codes[:width]]


def numbers_of(rows: Tensor, width: int, bits: int) -> np.ndarray:
    """All numbers (m, v), fp64."""
    return np.array([looped(row.numpy().tobytes(), width, bits) for row in rows]).reshape(len(rows), width)


def made(size: tuple[int, ...], bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of any bytes and scales of any size, slots, and weights."""
    num_rows, width, num_tokens, num_reads = size
    random = torch.Generator().manual_seed(0)
    rows = torch.randint(256, (num_rows, row_bytes(width, bits)), generator=random).to(torch.uint8)
    scales = torch.randn(num_rows, 1, generator=random) * 0.01
    rows[:, code_bytes(width, bits) :] = scales.view(torch.uint8)
    slots = torch.randint(num_rows, (num_tokens, num_reads), generator=random)
    return rows, slots, torch.randn(num_tokens, num_reads, generator=random)


def errors(backend: str, rows: Tensor, slots: Tensor, weights: Tensor, width: int, bits: int) -> list[float]:
    """Errors to fp64 truth of the sums and of d(weights)."""
    weights = weights.clone().requires_grad_()
    summed = packed_sum(rows, slots, weights, width, bits, backend=backend)
    grad_output = torch.randn(summed.shape, generator=torch.Generator().manual_seed(1))
    (grad,) = torch.autograd.grad(summed, weights, grad_output)
    assert (summed.dtype, grad.dtype) == (torch.float32, weights.dtype)
    values = torch.from_numpy(numbers_of(rows, width, bits))
    truth = oracle.weighted_sum(values, slots, weights), oracle.weighted_sum_gradients(
        values, slots, weights, grad_output
    )[1]  # fmt: skip
    return [
        float(np.abs(oracle.fp64(ours) - theirs).max(initial=0) / np.abs(theirs).max(initial=1))
        for ours, theirs in zip((summed, grad), truth, strict=True)
    ]


# --- the format -------------------------------------------------------------------------------------------


@by_bits
@pytest.mark.parametrize("width", [1, 15, 16, 17, 32, 33, 576])
def test_rows_are_unpacked_as_their_bytes_say(width: int, bits: int) -> None:
    rows, _, _ = made((40, width, 0, 0), bits)
    assert np.array_equal(oracle.fp64(unpack_rows(rows, width, bits)), np.float32(numbers_of(rows, width, bits)))


def test_a_row_is_its_codes_and_their_scale() -> None:
    assert [code_bytes(width, 8) for width in (1, 16, 17, 576)] == [16, 16, 32, 576]
    assert [code_bytes(width, 4) for width in (1, 32, 33, 576)] == [16, 16, 32, 288]
    assert (row_bytes(576, 8), row_bytes(576, 4)) == (580, 292)


@by_bits
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_packing_rounds_to_the_nearest_code(bits: int, dtype: torch.dtype) -> None:
    values = torch.randn(300, 45, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[7] = 0
    packed = pack_rows(values, bits)
    assert (packed.dtype, packed.shape) == (torch.uint8, (300, row_bytes(45, bits)))
    scale = packed[:, code_bytes(45, bits) :].contiguous().view(torch.float32)
    off = (unpack_rows(packed, 45, bits) - values.float()).abs()
    within = values.float().abs() <= (127 if bits == 8 else 7) * scale  # none is cut off with 8 bits
    assert (off <= 0.5001 * scale)[within].all()
    assert within.all() if bits == 8 else within.float().mean() > 0.95
    assert (unpack_rows(packed, 45, bits)[7] == 0).all()


def test_four_bits_err_less_than_with_the_largest_number_as_the_last_code() -> None:
    values = torch.randn(200, 512, generator=torch.Generator().manual_seed(0))
    largest = values.abs().amax(1, keepdim=True) / 7
    plain = ((values / largest).round() * largest - values).square().mean()
    ours = (unpack_rows(pack_rows(values, 4), 512, 4) - values).square().mean()
    assert ours < 0.7 * plain


@by_bits
def test_packing_what_was_packed_changes_nothing(bits: int) -> None:
    once = unpack_rows(pack_rows(torch.randn(50, 40), bits), 40, bits)
    again = unpack_rows(pack_rows(once, bits), 40, bits)
    assert torch.allclose(once, again, rtol=1e-6)


@by_bits
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_has_no_code(bits: int, bad: float) -> None:
    values = torch.zeros(3, 4)
    values[1, 2] = bad
    with pytest.raises(ValueError, match="not finite"):
        pack_rows(values, bits)


# --- the sum ----------------------------------------------------------------------------------------------


@by_bits
@pytest.mark.parametrize("name", SIZES)
def test_a_sum_is_at_most_twice_as_wrong_as_the_reference(backend: str, name: str, bits: int) -> None:
    given = made(SIZES[name], bits)
    of_reference = errors("reference", *given, SIZES[name][1], bits)
    assert max(of_reference) < 1e-6
    for ours, theirs in zip(errors(backend, *given, SIZES[name][1], bits), of_reference, strict=True):
        assert ours <= 2 * theirs + 1e-6


@by_bits
def test_the_sum_computes_the_line_of_its_docstring(backend: str, bits: int) -> None:
    rows, slots, weights = made(SIZES["ragged"], bits)
    expected = (unpack_rows(rows, 37, bits)[slots] * weights[..., None]).sum(1)
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        found = packed_sum(rows, slots, weights.to(dtype), 37, bits, backend=backend)
        assert torch.allclose(found, expected, rtol=tolerance, atol=tolerance)


@by_bits
def test_rows_and_slots_may_lie_in_memory_with_gaps(backend: str, bits: int) -> None:
    rows, slots, weights = made(SIZES["ragged"], bits)
    apart = [torch.stack([part, part + 1], -1)[..., 0] for part in (rows, slots, weights)]
    assert not any(part.is_contiguous() for part in apart)
    ours, theirs = (packed_sum(*given, 37, bits, backend=backend) for given in (apart, (rows, slots, weights)))
    assert torch.equal(ours, theirs)


@by_bits
def test_what_is_not_finite_stays_with_the_tokens_that_read_it(backend: str, bits: int) -> None:
    rows, slots, weights = made((64, 40, 30, 11), bits)
    hurt, reads_it = rows.clone(), (slots == slots[0, 0]).any(1)
    hurt[slots[0, 0], code_bytes(40, bits) :] = torch.tensor([torch.nan]).view(torch.uint8)
    plain, beside = (packed_sum(table, slots, weights, 40, bits, backend=backend) for table in (rows, hurt))
    assert beside[reads_it].isnan().all()
    assert torch.equal(beside[~reads_it], plain[~reads_it])


@by_bits
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck reads it
@pytest.mark.parametrize("num_tokens", [0, 5])
def test_opcheck(backend: str, bits: int, num_tokens: int) -> None:
    rows, slots, weights = made((11, 3, num_tokens, 4), bits)
    weights.requires_grad_()
    torch.library.opcheck(torch.ops.pkmem.packed_sum.default, (rows, slots, weights, 3, bits, backend))
    x = torch.randn(num_tokens, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.pkmem.packed_products.default, (rows, slots, x, 3, bits))


@by_bits
def test_torch_func_sees_it(backend: str, bits: int) -> None:
    rows, slots, weights = made((11, 20, 5, 4), bits)
    run: Callable[[Tensor], Tensor] = lambda w: packed_sum(rows, slots, w, 20, bits, backend=backend)  # noqa: E731
    (jacobian,) = torch.autograd.functional.jacobian(run, (weights,))
    assert torch.allclose(torch.func.jacrev(run)(weights), jacobian, atol=1e-6)
    batch = torch.stack((weights, 2 * weights))
    assert torch.allclose(torch.vmap(run)(batch), torch.stack([run(part) for part in batch]), atol=1e-6)


def test_compile_gives_the_same_for_every_length(backend: str) -> None:
    compiled = torch.compile(packed_sum, fullgraph=True, backend="aot_eager")
    for num_tokens in (5, 7, 1, 0):
        given = *made((11, 20, num_tokens, 4), 8), 20, 8
        assert torch.equal(compiled(*given, backend=backend), packed_sum(*given, backend=backend))


def test_a_product_of_the_width_is_counted_for_each_read() -> None:
    rows, slots, weights = made((11, 20, 5, 4), 4)
    with FlopCounterMode(display=False) as counter:
        packed_sum(rows, slots, weights.requires_grad_(), 20, 4, backend="reference").sum().backward()
    counted = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    assert counted["pkmem.packed_sum"] == counted["pkmem.packed_products"] == 2 * 5 * 4 * 20


# --- what a caller can get wrong --------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 16, "8", None])
def test_other_bits_are_named(bits: object) -> None:
    rows, slots, weights = made((11, 20, 5, 4), 8)
    for run in (lambda: pack_rows(torch.ones(2, 3), bits), lambda: packed_sum(rows, slots, weights, 20, bits)):
        with pytest.raises(ValueError, match=f"bits is {bits!r} but must be one of 8, 4"):
            run()


def test_rows_of_another_width_or_form_are_named() -> None:
    rows, slots, weights = made((11, 20, 5, 4), 8)
    for wrong, width, bits in ((rows, 33, 8), (rows, 20, 4), (rows.float(), 20, 8), (rows[0], 20, 8)):
        with pytest.raises(ValueError, match=rf"rows of width {width} in {bits} bits are \(m, \d+\) torch.uint8, not"):
            packed_sum(wrong, slots, weights, width, bits)
    with pytest.raises(ValueError, match=r"slots and weights must be \(n, b\)"):
        packed_sum(rows, slots[:2], weights, 20, 8)
    with pytest.raises(ValueError, match=r"use slots.long\(\)"):
        packed_sum(rows, slots.int(), weights, 20, 8)


@pytest.mark.parametrize("slot", [-1, 11])
@pytest.mark.parametrize("watched", [False, True])
def test_a_slot_outside_the_table_is_named(backend: str, slot: int, watched: bool) -> None:
    rows, slots, weights = made((11, 20, 5, 4), 8)
    slots[2, 3] = slot
    with torch.set_grad_enabled(watched), pytest.raises(ValueError, match="outside"):
        packed_sum(rows, slots, weights.requires_grad_(), 20, 8, backend=backend)
