"""What is special to the CPU backend: threads, 16-bit floats, random rounding, the sort, compiled kernels."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

import pkmem
from pkmem.ops import reference
from pkmem.ops.arguments import AdamStep

pytest.importorskip("numba")

from pkmem.ops import cpu
from pkmem.ops.cpu import selection, threads
from pkmem.ops.cpu.halves import narrow, widen
from pkmem.ops.cpu.kernels import array, kernel
from pkmem.ops.cpu.threads import run_over

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def training_step(dtype: torch.dtype) -> list[Tensor]:
    """Everything the backend computes in a step that is large enough to be shared between threads."""
    random = torch.Generator().manual_seed(0)
    query, sub_keys, values, grad_output = (
        torch.randn(shape, generator=random).to(dtype)
        for shape in ((700, 4, 64), (4, 2, 96, 32), (96**2, 130), (700, 130))
    )
    scores, slots = cpu.product_key_topk(query, sub_keys, 32)
    weights, flat = scores.softmax(-1).flatten(1), slots.flatten(1)
    grad_weights = cpu.row_products(values, flat, grad_output)
    reads = cpu.sort_reads([flat], [weights], [grad_output], len(values))
    moments = torch.zeros(2, *values.shape)
    results = [
        scores, slots, cpu.flat_topk(query, sub_keys[:, 0].repeat(1, 30, 2), 32),
        cpu.weighted_sum(values, flat, weights), grad_weights,
        *cpu.product_key_topk_backward(grad_weights.view_as(scores), query, sub_keys, slots),
        cpu.weighted_sum_grad_values(reads, len(values)), cpu.row_gradient_norm(reads),
    ]  # fmt: skip
    cpu.adam_rows(values, *moments, reads, AdamStep(lr=0.01, betas=(0.9, 0.99), eps=1e-8, step=3, scale=0.5, seed=7))
    return [*results, values, moments]


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    results = []
    for number in (1, 2, 4, 1):
        torch.set_num_threads(number)
        results.append(training_step(dtype))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.case(
    "Environments", "read and train from several Python threads, each with its own `torch.set_num_threads`", "works", ""
)
def test_callers_in_several_threads_do_not_disturb_each_other() -> None:
    torch.set_num_threads(2)
    expected = training_step(torch.float32)

    def on_threads(number: int) -> list[Tensor]:
        torch.set_num_threads(number)
        return training_step(torch.float32)

    with ThreadPoolExecutor(3) as pool:
        for result in pool.map(on_threads, [2, 1, 3, 4, 2, 1]):
            assert all(torch.equal(a, b) for a, b in zip(expected, result, strict=True))


def test_ranges_cover_every_item_once_and_errors_come_back() -> None:
    torch.set_num_threads(4)
    for size in (0, 1, 7, 1000):
        visits = np.zeros(size, np.int64)

        def visit(first: int, last: int, visits: np.ndarray = visits) -> None:
            visits[first:last] += 1

        run_over(visit, (), size, 1)
        assert (visits == 1).all()

    def fail(first: int, last: int) -> None:
        raise ZeroDivisionError(first, last)

    with pytest.raises(ZeroDivisionError):
        run_over(fail, (), 100, 1)


@kernel
def widen_all(stored, numbers):  # type: ignore[no-untyped-def]
    for i in range(len(stored)):
        numbers[i] = widen(stored[i])


@kernel
def narrow_all(numbers, stored):  # type: ignore[no-untyped-def]
    for i in range(len(stored)):
        stored[i] = narrow(numbers[i], stored[i])


@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_float_is_read_and_written_as_torch_does(dtype: torch.dtype) -> None:
    stored = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = torch.empty(len(stored))
    widen_all(array(stored), array(numbers))
    torch.testing.assert_close(numbers, stored.float(), rtol=0, atol=0, equal_nan=True)

    bits = torch.randint(-(1 << 31), 1 << 31, (1 << 18,), generator=torch.Generator().manual_seed(0))
    between = (numbers + numbers.roll(1)) / 2  # ties between neighbours
    numbers = torch.cat((bits.to(torch.int32).view(torch.float32), numbers, between, numbers * (1 + 1e-6)))
    stored = torch.empty(len(numbers), dtype=dtype)
    narrow_all(array(numbers), array(stored))
    torch.testing.assert_close(stored, numbers.to(dtype), rtol=0, atol=0, equal_nan=True)


def updated(seed: int, step_number: int, rows: Tensor, num_rows: int = 40, width: int = 512, first: int = 0) -> Tensor:
    """A bf16 table of ones after one step of 1e-4: far below the spacing of bf16 at 1, 2 ** -8."""
    values = torch.ones(num_rows, width, dtype=torch.bfloat16)
    grad_output = torch.ones(len(rows), width, dtype=torch.bfloat16)
    reads = cpu.sort_reads([rows[:, None]], [torch.ones(len(rows), 1)], [grad_output], num_rows)
    moments = torch.zeros(2, num_rows, width)
    step = AdamStep(lr=1e-4, betas=(0.0, 0.0), eps=0.0, step=step_number, scale=1.0, seed=seed, first_column=first)
    cpu.adam_rows(values, *moments, reads, step)
    return values


def test_bf16_is_rounded_at_random_without_bias() -> None:
    values = updated(0, 1, torch.arange(40))
    assert set(values.unique().tolist()) == {1.0, 1.0 - 2.0**-8}
    chance = 1e-4 * 2**8
    deviation = (chance * (1 - chance) / values.numel()) ** 0.5
    assert abs((values < 1).double().mean() - chance) < 4 * deviation


def test_random_rounding_depends_on_seed_step_row_and_column_alone() -> None:
    values = updated(0, 1, torch.arange(40))
    few = updated(0, 1, torch.tensor([7, 3]), width=100)
    assert torch.equal(few[[3, 7]], values[[3, 7], :100])
    assert (few[[0, 39]] == 1).all()
    assert torch.equal(updated(0, 1, torch.arange(40), width=70, first=300), values[:, 300:370])
    for other in (
        updated(1, 1, torch.arange(40)),
        updated(1 << 32, 1, torch.arange(40)),
        updated(0, 2, torch.arange(40)),
    ):
        assert not torch.equal(other, values)
    assert not torch.equal(values[0], values[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_rows", [1, 5, 3000, 1 << 22, 1 << 40])
def test_sort_reads_equals_the_reference(num_rows: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    shapes = ((5, 3), (0, 3), (400, 7))
    slots = [torch.randint(num_rows, shape, generator=random) for shape in shapes]
    weights = [torch.rand(shape, generator=random, dtype=dtype) for shape in shapes]
    grad_outputs = [torch.rand(shape[0], 2, generator=random) for shape in shapes]
    ours = cpu.sort_reads(slots, weights, grad_outputs, num_rows)
    expected = reference.sort_reads(slots, weights, grad_outputs, num_rows)
    for name in ("rows", "offsets", "tokens", "weights", "grad_output"):
        assert torch.equal(getattr(ours, name), getattr(expected, name)), name


def test_warmup_compiles_everything_once() -> None:
    count = cpu.warmup()
    assert cpu.warmup() == count >= 18


@pytest.mark.parametrize("fill", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_not_finite_scores_select_valid_slots(fill: float) -> None:
    query = torch.randn(50, 2, 8, generator=torch.Generator().manual_seed(0))
    query[torch.rand(query.shape, generator=torch.Generator().manual_seed(1)) < 0.1] = fill
    sub_keys = torch.randn(2, 2, 300, 4, generator=torch.Generator().manual_seed(2))
    scores, slots = cpu.product_key_topk(query, sub_keys, 16)
    assert slots.min() >= 0
    assert slots.max() < 300**2
    finite = query.isfinite().all(-1)
    assert scores[finite].isfinite().all()


def rows_in_unfavourable_order(size: int) -> dict[str, Tensor]:
    rising = torch.arange(size, dtype=torch.float32)
    return {
        "rising": rising,
        "falling": -rising,
        "equal": torch.zeros(size),
        "best together": torch.where(rising % 64 == 0, rising, -1.0),  # all in one group
        "signed zeros": torch.where(rising % 2 == 0, 0.0, -0.0),
    }


@pytest.mark.parametrize("name", rows_in_unfavourable_order(1))
@pytest.mark.parametrize(("size", "knn"), [(1, 1), (63, 63), (64, 5), (65, 32), (127, 40), (2000, 32), (700, 300)])
def test_any_order_of_scores_gives_the_reference_selection(name: str, size: int, knn: int) -> None:
    sub_keys = rows_in_unfavourable_order(size)[name].view(1, 1, size, 1).expand(1, 2, size, 1)
    query = torch.tensor([[[1.0, 1.0]], [[1.0, -2.0]]])
    ours, expected = (module.product_key_topk(query, sub_keys, knn) for module in (cpu, reference))
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[1], expected[1])


@pytest.mark.parametrize(
    ("size", "knn"), [(7, 7), (64, 32), (96, 32), (130, 32), (300, 33), (512, 32), (1000, 64), (1025, 200)]
)
@pytest.mark.parametrize("largest", [3, 1000], ids=["many ties", "few ties"])
def test_integers_give_the_reference_selection_for_few_and_for_many_tokens(size: int, knn: int, largest: int) -> None:
    random = torch.Generator().manual_seed(size)
    query, sub_keys = (
        torch.randint(-largest, largest + 1, shape, generator=random).float() for shape in ((21, 2, 6), (2, 2, size, 3))
    )
    scores, slots = reference.product_key_topk(query, sub_keys, knn)
    for first, last in ((0, 21), (0, 1), (3, 5), (17, 21), (4, 4)):
        ours = cpu.product_key_topk(query[first:last], sub_keys, knn)
        assert torch.equal(ours[0], scores[first:last])
        assert torch.equal(ours[1], slots[first:last])


def test_a_score_of_every_bit_pattern_selects_by_its_place_in_the_order() -> None:
    bits = torch.randint(-(1 << 31), 1 << 31, (1, 1000), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    bits[0, :3] = torch.tensor([-1, -(1 << 31), 0])  # the lowest of all: what the kernel pads with; -0.0 and 0.0
    half_scores = torch.stack((bits.view(torch.float32), torch.zeros(1, 1000)))
    scores, slots = torch.empty(1, 1, 1), torch.empty(1, 1, 1, dtype=torch.int64)
    selection.select(array(half_scores), 1, array(scores), array(slots), 0, 1)
    magnitude, sign = bits.long() & 0x7FFFFFFF, bits < 0
    assert slots[0, 0, 0] == 1000 * torch.where(sign, -magnitude, magnitude).argmax()


@pytest.mark.case("Environments", "call an operator in a process that was forked after threads had run", "works",
    "https://github.com/pytorch/pytorch/issues/75147")  # fmt: skip
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_does_not_wait_for_its_parents_threads() -> None:
    torch.set_num_threads(2)
    values, slots = torch.randn(64, 512), torch.randint(64, (512, 64))
    weights = torch.rand(slots.shape)
    expected = cpu.weighted_sum(values, slots, weights)  # starts threads
    child = multiprocessing.get_context("fork").Process(target=_sum_again, args=(values, slots, weights, expected))
    child.start()
    child.join(60)
    code = child.exitcode
    child.kill()
    assert code == 0


def _sum_again(values: Tensor, slots: Tensor, weights: Tensor, expected: Tensor) -> None:
    # Compared by numpy, and fresh memory not filled: torch's own parallel operators do wait after a fork.
    torch.use_deterministic_algorithms(False)
    assert np.array_equal(cpu.weighted_sum(values, slots, weights).numpy(), expected.numpy())


@pytest.mark.parametrize("openmp", [True, False])
def test_an_error_in_any_thread_reaches_the_caller(openmp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not openmp:
        monkeypatch.setattr(threads, "_openmp", lambda: None)
    torch.set_num_threads(4)

    def fails(first: int, last: int) -> None:
        if last == 64:
            raise ArithmeticError(f"{first} to {last}")

    with pytest.raises(ArithmeticError, match="to 64"):
        run_over(fails, (), 64, 1)


def test_every_item_is_computed_once_by_both_kinds_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(4)
    for kind in (threads._openmp, lambda: None):
        monkeypatch.setattr(threads, "_openmp", kind)
        counts = np.zeros(1001, np.int64)

        def count(first: int, last: int) -> None:
            counts[first:last] += 1  # noqa: B023

        run_over(count, (), 1001, 3)
        assert (counts == 1).all()


@pytest.mark.case("Environments", "a memory in the workers of a `DataLoader`, forked or spawned", "works",
    "https://github.com/pytorch/pytorch/issues/75147")  # fmt: skip
@pytest.mark.parametrize("way", multiprocessing.get_all_start_methods())
def test_workers_of_a_data_loader_read_from_a_memory(way: str) -> None:
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(2)
    config = pkmem.MemoryConfig(dim=32, num_sub_keys=16, knn=8, query_dim=16, heads=2)
    memory, hidden = pkmem.ProductKeyMemory(config).eval().requires_grad_(False), torch.randn(2, 300, 32)
    expected = [memory(tokens) for tokens in hidden]  # starts threads
    loader = torch.utils.data.DataLoader(
        list(hidden), None, num_workers=1, collate_fn=memory, multiprocessing_context=way, timeout=100
    )
    for read, wanted in zip(loader, expected, strict=True):
        torch.testing.assert_close(read, wanted)


def test_torchs_own_threads_are_found() -> None:
    """And a library that is not torch's is not taken for it."""
    if sys.platform == "linux":
        assert ("OpenMP" in torch.__config__.parallel_info()) == (threads._openmp() is not None)
    number = torch.get_num_threads()
    for heard in (False, True):  # whether this library hears what torch is told, which it is not told by itself
        foreign = SimpleNamespace(
            omp_get_max_threads=torch.get_num_threads if heard else lambda: 5, omp_set_num_threads=lambda number: None
        )
        assert not threads._is_torchs(foreign)
    assert torch.get_num_threads() == number


# Another OpenMP library is loaded ahead of torch's, for all to see or not.
FOREIGN = """
import ctypes, os, sys, time
foreign = ctypes.CDLL(sys.argv[1], getattr(ctypes, sys.argv[2]))
foreign.omp_set_num_threads(1)
import torch
from pkmem.ops.cpu import threads
torch.set_num_threads(3)
torch.ones(1 << 20).add_(1)
started = len(os.listdir("/proc/self/task"))
threads.run_over(lambda first, last: time.sleep(0.01), (), 64, 1)
print(len(os.listdir("/proc/self/task")) - started, threads._openmp() is not None, torch.get_num_threads())
"""


@pytest.mark.linux
@pytest.mark.case("Environments", "another package's OpenMP library loaded before torch's, as scikit-learn's is, or by `LD_PRELOAD`",
    "works: on the library that torch itself uses", "https://github.com/pytorch/pytorch/issues/98836")  # fmt: skip
@pytest.mark.parametrize("mode", ["RTLD_LOCAL", "RTLD_GLOBAL"])
def test_beside_another_openmp_library_no_second_set_of_threads_starts(mode: str, tmp_path: Path) -> None:
    if threads._openmp() is None:
        pytest.skip("this torch has no OpenMP")
    ours = next(line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/libgomp" in line)
    foreign = tmp_path / "libgomp-foreign.so.1"
    foreign.write_bytes(
        Path(ours).read_bytes().replace(b"libgomp.so.1", b"libgomq.so.1")
    )  # another library, by its name
    command = [sys.executable, "-c", FOREIGN, str(foreign), mode]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["0", "True", "3"]
