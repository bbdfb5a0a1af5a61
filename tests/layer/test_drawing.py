"""Tables drawn from a seed, a row and a column: by another implementation, in any parts, and with the moments of a normal."""

from statistics import NormalDist

import pytest
import torch

import pkmem
from pkmem import MemoryConfig, ProductKeyMemory
from pkmem.layer.drawing import draw_normal, new_seed
from pkmem.layer.values import ValueTable

WORD = (1 << 64) - 1


def drawn(rows: int, first: int, columns: int, width: int, seed: int, std: float = 1.0, dtype=torch.float32):
    weight = torch.empty(rows, columns, dtype=dtype)
    draw_normal(weight, std, torch.tensor(seed), first, width)
    return weight


def expected(place: int, seed: int) -> float:
    """splitmix64 of a place in integers without a width, and the normal quantile of its first 24 bits."""
    bits = (place * 0x9E3779B97F4A7C15 + seed) & WORD
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & WORD
    bits ^= bits >> 31
    centred = ((bits >> 40) + (1 << 23)) % (1 << 24)  # of a signed number, as torch shifts it
    return NormalDist().inv_cdf((centred + 0.5) / (1 << 24))


@pytest.mark.parametrize("seed", [0, 1, (1 << 62) - 1])
def test_numbers_are_normal_quantiles_of_hashed_places(seed) -> None:
    table = drawn(7, 0, 5, 5, seed, std=0.5)
    for row in range(7):
        for column in range(5):
            assert table[row, column].item() == pytest.approx(0.5 * expected(5 * row + column, seed), abs=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_any_columns_are_those_of_the_whole(dtype) -> None:
    whole = drawn(3001, 0, 30, 30, 5, dtype=dtype)  # several chunks, the last one ragged
    for first, count in ((0, 1), (7, 13), (29, 1)):
        assert torch.equal(drawn(3001, first, count, 30, 5, dtype=dtype), whole[:, first : first + count])


def test_moments_tails_and_independence_are_those_of_a_normal() -> None:
    table = drawn(1 << 16, 0, 64, 64, 3).double()
    assert table.isfinite().all()
    assert table.mean().item() == pytest.approx(0, abs=2e-3)
    assert table.std().item() == pytest.approx(1, abs=2e-3)
    assert (table**4).mean().item() == pytest.approx(3, abs=2e-2)
    assert (table.abs() > 3).double().mean().item() == pytest.approx(2 * NormalDist().cdf(-3), rel=0.05)
    correlation = torch.corrcoef(torch.cat((table[:, :32].T, table.roll(1, 0)[:, :32].T)))
    assert (correlation - torch.eye(64)).abs().max() < 0.03
    assert len(table.flatten().unique()) > 0.7 * table.numel() * (1 - table.numel() / (1 << 25))


def test_seeds_give_other_tables_and_come_from_torchs_generator() -> None:
    torch.manual_seed(0)
    first, second = ValueTable(4, 4), ValueTable(4, 4)
    torch.manual_seed(0)
    assert torch.equal(ValueTable(4, 4).weight, first.weight)
    assert not torch.equal(first.weight, second.weight)
    torch.manual_seed(0)
    assert torch.equal(new_seed(), first.seed)


@pytest.mark.case(
    "Several devices",
    "build a model whose tables no device could hold: `pkmem.undrawn_tables()`",
    "works: a table has a shape and a seed until `shard_values` draws each process's columns",
    "",
)
def test_undrawn_tables_take_no_memory_and_leave_everything_else_as_it_is() -> None:
    config = MemoryConfig(dim=8, num_sub_keys=1 << 16, heads=2, knn=2, query_dim=4, experts=True)  # 2 x 137 GB
    with pkmem.undrawn_tables():
        memory = ProductKeyMemory(config)
    assert memory.values.weight.is_meta
    assert memory.neurons is not None
    assert memory.neurons.weight.is_meta
    small = MemoryConfig(dim=8, num_sub_keys=4, heads=2, knn=2, query_dim=4)
    torch.manual_seed(1)
    with pkmem.undrawn_tables():
        undrawn = ProductKeyMemory(small)
    after = torch.rand(3)
    torch.manual_seed(1)
    usual = ProductKeyMemory(small)
    assert torch.equal(torch.rand(3), after)
    assert torch.equal(undrawn.keys.sub_keys, usual.keys.sub_keys)
    assert torch.equal(undrawn.values.seed, usual.values.seed)
    assert not usual.values.weight.is_meta
