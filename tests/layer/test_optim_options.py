"""RowAdam's options: moments and tables in bf16, and the seed of their rounding."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from pkmem import MemoryConfig, ProductKeyMemory, RowAdam
from pkmem.layer.values import ValueTable
from pkmem.ops import backend_module
from pkmem.ops.arguments import AdamStep
from pkmem.ops.reference import sort_reads
from pkmem.training.state import load_state, save_state

ADAM: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-8}


def table_of(num_slots: int, width: int, dtype: torch.dtype = torch.float32, backend: str | None = None) -> ValueTable:
    table = ValueTable(num_slots, width).to(dtype)
    table.backend = backend
    return table


def read(table: ValueTable, slots: Tensor, seed: int) -> None:
    """A forward and backward pass over slots (n, 1, k)."""
    random = torch.Generator().manual_seed(seed)
    weights, back = torch.rand(slots.shape, generator=random), torch.randn(len(slots), table.weight.shape[1])
    table(slots, weights.to(table.weight.dtype)).backward(back.to(table.weight.dtype))


def tensors_of(optimizer: RowAdam, weight: Tensor) -> list[Tensor]:
    return [weight.detach(), optimizer.state[weight]["exp_avg"], optimizer.state[weight]["exp_avg_sq"]]


def assert_same_bits(one: list[Tensor], other: list[Tensor]) -> None:
    for first, second in zip(one, other, strict=True):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)


# --- bf16 -------------------------------------------------------------------------------------------------


def mean_squared_error(table: ValueTable, target: Tensor) -> float:
    return (table.weight.float() - target).square().mean().item()


def test_a_bf16_table_learns_at_a_rate_that_rounding_to_nearest_would_lose(backend) -> None:
    start = torch.rand(20, 16, generator=torch.Generator().manual_seed(0)) + 1
    target = start + 0.02 * torch.randn(20, 16, generator=torch.Generator().manual_seed(1)).sign()
    errors = {}
    for kind in ("fp32", "random", "nearest"):
        table = table_of(20, 16, torch.bfloat16 if kind == "random" else torch.float32, backend)
        table.weight.data.copy_(start.bfloat16())
        optimizer = RowAdam(table, lr=1e-4, moment_dtype=torch.bfloat16 if kind == "random" else None)
        errors[kind, "before"] = mean_squared_error(table, target)
        slots, weights = torch.arange(20).view(20, 1, 1), torch.ones(20, 1, 1)
        for _ in range(60):
            (table(slots, weights.to(table.weight.dtype)).float() - target).square().sum().backward()
            optimizer.step()
            if kind == "nearest":
                table.weight.data.copy_(table.weight.bfloat16())
        errors[kind, "after"] = mean_squared_error(table, target)
    assert errors["nearest", "after"] == errors["nearest", "before"]
    gained = {kind: errors[kind, "before"] - errors[kind, "after"] for kind in ("fp32", "random")}
    assert gained["fp32"] > 0.4 * errors["fp32", "before"]
    assert gained["random"] > 0.6 * gained["fp32"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_training_resumes_bitwise(backend, dtype) -> None:
    options = {"moment_dtype": torch.bfloat16, "seed": 5}
    table = table_of(30, 8, dtype, backend)
    optimizer = RowAdam(table, **options)
    for seed in range(3):
        read(table, torch.randint(30, (6, 1, 3), generator=torch.Generator().manual_seed(seed)), seed)
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = copy.deepcopy(table)
    other = RowAdam(resumed, **options)
    other.load_state_dict(saved)
    for seed in range(3, 6):
        for part in (table, resumed):
            torch.manual_seed(seed)
            read(part, torch.randint(30, (6, 1, 3), generator=torch.Generator().manual_seed(seed)), seed)
        optimizer.step()
        other.step()
    ours = tensors_of(optimizer, table.weight)
    assert [tensor.dtype for tensor in ours] == [dtype, torch.bfloat16, torch.bfloat16]
    assert_same_bits(ours, tensors_of(other, resumed.weight))


def test_bf16_training_has_the_same_bits_for_any_number_of_threads(backend) -> None:
    before, results = torch.get_num_threads(), []
    slots = torch.randint(2000, (400, 1, 8), generator=torch.Generator().manual_seed(0))
    start = torch.randn(2000, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            table = table_of(2000, 256, torch.bfloat16, backend)
            table.weight.data.copy_(start)
            optimizer = RowAdam(table, moment_dtype=torch.bfloat16, seed=3)
            for seed in range(2):
                torch.manual_seed(seed)
                read(table, slots, seed)
                optimizer.step()
            results.append(tensors_of(optimizer, table.weight))
    finally:
        torch.set_num_threads(before)
    assert_same_bits(*results)


def test_the_seed_chooses_the_bits(backend) -> None:
    results = []
    for seed in (0, 0, 1):
        table = table_of(30, 64, torch.bfloat16, backend)
        table.weight.data.fill_(1)
        optimizer = RowAdam(table, seed=seed)
        table(torch.arange(30).view(30, 1, 1), torch.ones(30, 1, 1).bfloat16()).sum().backward()
        optimizer.step()
        results.append(table.weight.detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def one_exact_step(backend: str, rows: Tensor, seed: int, step: int) -> list[Tensor]:
    """A step whose arithmetic every backend rounds alike: only the random bits can differ."""
    grad_output = torch.randn(500, 96, generator=torch.Generator().manual_seed(0))[rows]
    reads = sort_reads([rows[:, None]], [torch.ones(len(rows), 1)], [grad_output], 500)
    moments = [torch.zeros(500, 96, dtype=torch.bfloat16) for _ in range(2)]
    backend_module(backend).adam_rows(
        torch.zeros(500, 96), *moments, reads, AdamStep(1.0, (0.5, 0.5), 1e-8, step, 1.0, seed)
    )
    values = torch.ones(500, 96, dtype=torch.bfloat16)
    ones = sort_reads([rows[:, None]], [torch.ones(len(rows), 1)], [torch.ones(len(rows), 96)], 500)
    backend_module(backend).adam_rows(
        values, torch.zeros(500, 96), torch.zeros(500, 96), ones, AdamStep(1e-4, (0.0, 0.0), 1e-30, step, 1.0, seed)
    )
    return [values, *moments]


@pytest.mark.parametrize(("seed", "step"), [(0, 1), ((7 << 32) + 5, 3), (1 << 31, (1 << 31) + 9)])
def test_random_rounding_is_the_same_in_every_backend_and_for_whatever_else_was_read(backend, seed, step) -> None:
    everything = one_exact_step("reference", torch.arange(500), seed, step)
    few = torch.tensor([499, 3, 250])
    for ours, theirs in zip(one_exact_step(backend, few, seed, step), everything, strict=True):
        assert torch.equal(ours[few], theirs[few])
    assert_same_bits(one_exact_step(backend, torch.arange(500), seed, step), everything)
    assert 0 < (everything[0] < 1).float().mean() < 0.1


def test_bf16_rounds_at_random_without_bias_and_keeps_what_is_not_finite(backend) -> None:
    values, *moments = one_exact_step(backend, torch.arange(500), 1, 1)
    chance = 1e-4 * 2**8
    assert abs((values < 1).double().mean() - chance) < 4 * (chance / values.numel()) ** 0.5
    exact = 0.5 * torch.randn(500, 96, generator=torch.Generator().manual_seed(0))
    error = (moments[0].float() - exact) / exact
    assert error.abs().max() < 2**-7
    assert abs(error.mean()) < 4 * 2**-7 / error.numel() ** 0.5
    for number in (torch.inf, -torch.inf, torch.nan):
        table = torch.full((1, 3), number, dtype=torch.bfloat16)
        reads = sort_reads([torch.zeros(1, 1).long()], [torch.ones(1, 1)], [torch.ones(1, 3)], 1)
        backend_module(backend).adam_rows(
            table, torch.zeros(1, 3), torch.zeros(1, 3), reads, AdamStep(**ADAM, step=1, scale=1.0)
        )
        assert torch.equal(
            table.float().nan_to_num(7.0, 8.0, 9.0), torch.full((1, 3), number).nan_to_num(7.0, 8.0, 9.0)
        )


def test_bf16_moments_decay_where_rounding_to_nearest_would_keep_them(backend) -> None:
    table = table_of(40, 25, backend=backend)
    optimizer = RowAdam(table, betas=(0.9, 0.999), moment_dtype=torch.bfloat16)
    slots = torch.arange(40).view(40, 1, 1)
    table(slots, torch.ones(40, 1, 1)).sum().backward()
    optimizer.step()
    start = optimizer.state[table.weight]["exp_avg_sq"].float().mean()
    for _ in range(60):
        table(slots, torch.zeros(40, 1, 1)).sum().backward()
        optimizer.step()
    assert optimizer.state[table.weight]["exp_avg_sq"].float().mean() / start == pytest.approx(0.999**60, rel=0.005)


@pytest.mark.parametrize(
    ("saved", "wanted", "dtype"),
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (None, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, None, torch.float32),
    ],
)
def test_loaded_moments_have_the_optimizers_dtype(saved, wanted, dtype) -> None:
    table = table_of(9, 4, torch.float16)
    optimizer = RowAdam(table, moment_dtype=saved)
    read(table, torch.arange(9).view(9, 1, 1), 0)
    optimizer.step()
    other = RowAdam(table, moment_dtype=wanted)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [tensor.dtype for tensor in tensors_of(other, table.weight)[1:]] == [dtype, dtype]
    read(table, torch.arange(9).view(9, 1, 1), 1)
    other.step()
    assert [tensor.dtype for tensor in tensors_of(other, table.weight)[1:]] == [dtype, dtype]


# --- less state -------------------------------------------------------------------------------------------

LEAN = [
    {"second_moment": "row"},
    {"second_moment": "row", "betas": (0.0, 0.98)},
    {"betas": (0.0, 0.98)},
    {"second_moment": "row", "moment_dtype": torch.bfloat16},
    {"second_moment": "row", "betas": (0.0, 1.0)},
]


def lean_bytes(options: dict[str, Any], num_rows: int, width: int) -> int:
    """Of the moments, by the options alone."""
    bits = 2 if options.get("moment_dtype") == torch.bfloat16 else 4
    first = 0 if options.get("betas", (0.9,))[0] == 0 else num_rows * width * bits
    return first + (num_rows * 4 if options.get("second_moment") == "row" else num_rows * width * bits)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        *((options, torch.float32) for options in LEAN),
        (LEAN[1], torch.bfloat16),
        (LEAN[3], torch.bfloat16),
        (LEAN[1], torch.float16),
    ],
    ids=str,
)
def test_the_state_is_as_small_as_it_says_and_training_resumes_bitwise(backend, options, dtype, tmp_path) -> None:
    table = table_of(30, 8, dtype, backend)
    start = table.weight.detach().clone()
    optimizer = RowAdam(table, **options)

    def train(table: ValueTable, optimizer: RowAdam, seeds: range) -> None:
        for seed in seeds:
            torch.manual_seed(seed)
            read(table, torch.randint(15, (6, 1, 3), generator=torch.Generator().manual_seed(seed)), seed)
            optimizer.step()

    train(table, optimizer, range(3))
    moments = {name: part for name, part in optimizer.state[table.weight].items() if name.startswith("exp_avg")}
    assert sum(part.nbytes for part in moments.values()) == lean_bytes(options, 30, 8)
    assert torch.equal(table.weight[15:], start[15:])
    assert not torch.equal(table.weight[:15], start[:15])
    save_state(tmp_path / "optimizer.json", optimizer.state_dict())
    resumed = copy.deepcopy(table)
    fresh = RowAdam(resumed, **options)
    fresh.load_state_dict(load_state(tmp_path / "optimizer.json"))
    pickled, stepping = pickle.loads(pickle.dumps((table, optimizer)))
    for one, its_own in ((table, optimizer), (resumed, fresh), (pickled, stepping)):
        train(one, its_own, range(3, 6))
    for one, its_own in ((resumed, fresh), (pickled, stepping)):
        assert torch.equal(one.weight, table.weight)
        for name, part in its_own.state[one.weight].items():
            assert torch.equal(part, optimizer.state[table.weight][name])
            assert part.dtype == optimizer.state[table.weight][name].dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_full_state_becomes_one_of_rows(backend, dtype) -> None:
    table = table_of(9, 4, dtype, backend)
    full = RowAdam(table, moment_dtype=torch.bfloat16)
    read(table, torch.arange(9).view(9, 1, 1), 0)
    full.step()
    saved = copy.deepcopy(full.state_dict())
    rows = RowAdam(table, second_moment="row")
    rows.load_state_dict(saved)
    state = rows.state[table.weight]
    torch.testing.assert_close(state["exp_avg_sq"], saved["state"][0]["exp_avg_sq"].float().mean(1), rtol=1e-6, atol=0)
    assert torch.equal(state["exp_avg"], saved["state"][0]["exp_avg"].float())
    read(table, torch.arange(9).view(9, 1, 1), 1)
    rows.step()
    assert (state["step"], rows.num_skipped) == (2, 0)
    with pytest.raises(ValueError, match="one second moment a row but this RowAdam keeps one for each number: make it"):
        RowAdam(table).load_state_dict(rows.state_dict())


def test_a_first_moment_comes_and_goes_with_its_beta(backend) -> None:
    table = table_of(9, 4, backend=backend)
    optimizer = RowAdam(table, betas=(0.0, 0.98))
    for beta, has_first in ((0.0, False), (0.9, True), (0.0, False)):
        optimizer.param_groups[0]["betas"] = (beta, 0.98)
        read(table, torch.arange(9).view(9, 1, 1), 0)
        optimizer.step()
        assert ("exp_avg" in optimizer.state[table.weight]) == has_first


def test_without_a_first_moment_a_step_is_adams_with_a_first_beta_of_0(backend) -> None:
    table = table_of(9, 4, torch.float64, backend)
    twin = copy.deepcopy(table)
    ours, theirs = RowAdam(table, betas=(0.0, 0.98)), torch.optim.Adam([twin.weight], 1e-3, betas=(0.0, 0.98))
    for seed in range(3):
        for one, stepping in ((table, ours), (twin, theirs)):
            torch.manual_seed(seed)
            read(one, torch.arange(9).view(9, 1, 1), seed)
            stepping.step()
            stepping.zero_grad()
    torch.testing.assert_close(table.weight, twin.weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_second_beta_of_1_is_the_adagrad_of_torch(backend, dtype) -> None:
    table = table_of(9, 4, dtype, backend)
    twin, start = copy.deepcopy(table), table.weight.detach().clone()
    ours, theirs = RowAdam(table, 0.1, (0.0, 1.0), 1e-10), torch.optim.Adagrad([twin.weight], 0.1, eps=1e-10)
    for seed in range(4):
        for one, stepping in ((table, ours), (twin, theirs)):
            torch.manual_seed(seed)
            read(one, torch.randint(6, (5, 1, 3), generator=torch.Generator().manual_seed(seed)), seed)
            stepping.step()
            stepping.zero_grad()
    torch.testing.assert_close(table.weight, twin.weight, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-6)
    assert torch.equal(table.weight[6:], start[6:])


def test_row_wise_adagrad_divides_a_row_by_the_root_of_its_summed_mean_squares(backend) -> None:
    table = table_of(9, 4, torch.float64, backend)
    twin = copy.deepcopy(table)
    optimizer = RowAdam(table, 0.1, (0.0, 1.0), 1e-10, second_moment="row")
    expected, sums = twin.weight.detach(), torch.zeros(9, dtype=torch.float64)
    for seed in range(4):
        for one in (table, twin):
            torch.manual_seed(seed)
            read(one, torch.randint(6, (5, 1, 3), generator=torch.Generator().manual_seed(seed)), seed)
        gradient, twin.weight.grad = twin.weight.grad, None
        sums += gradient.square().mean(1)
        expected -= 0.1 * gradient / (sums.sqrt() + 1e-10)[:, None]
        optimizer.step()
    torch.testing.assert_close(table.weight, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(optimizer.state[table.weight]["exp_avg_sq"], sums, rtol=1e-12, atol=0)


# --- the rest ---------------------------------------------------------------------------------------------


def test_a_gradient_that_overflows_though_nothing_read_does_changes_nothing(backend) -> None:
    memory = ProductKeyMemory(MemoryConfig(dim=4, num_sub_keys=3, knn=2, query_dim=2, query_norm="none"))
    table = memory.values
    table.backend = backend
    optimizer = RowAdam(memory)
    before = table.weight.detach().clone()
    table(torch.tensor([[[1]]]), torch.full((1, 1, 1), 1e30)).backward(torch.full((1, 4), 1e30))
    optimizer.step()
    assert optimizer.num_skipped == 1
    assert torch.equal(table.weight, before)
    table(torch.tensor([[[1]]]), torch.full((1, 1, 1), 1e30)).backward(torch.full((1, 4), 1e8))  # finite, only just
    optimizer.step()
    assert optimizer.num_skipped == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"moment_dtype": torch.float16}, "moment_dtype is torch.float16 but must be None, torch.float32 or"),
        ({"seed": -1}, "seed is -1 but must be >= 0"),
        ({"second_moment": "column"}, "second_moment is 'column' but must be 'element' or 'row'"),
    ],
)
def test_an_option_outside_its_range_is_named(options, message) -> None:
    table = table_of(9, 4)
    with pytest.raises(ValueError, match=message):
        RowAdam(table, **options)
    assert table.log is None
