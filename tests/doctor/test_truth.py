"""The doctor's truth, which a user's machine has without the tests, is the tests' own."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import oracle
from pkmem.doctor import truth

NEAR = {"rtol": 1e-12, "atol": 1e-12}


def assert_equal(found: Tensor, expected: np.ndarray) -> None:
    torch.testing.assert_close(found, torch.from_numpy(np.asarray(expected)), **NEAR)


@pytest.mark.parametrize("integers", [True, False])
@pytest.mark.parametrize(
    ("n", "h", "s", "half", "knn"), [(0, 2, 3, 2, 1), (5, 2, 7, 3, 4), (3, 1, 9, 1, 9), (2, 3, 1, 4, 1)]
)
def test_selection_and_its_gradients(n, h, s, half, knn, integers) -> None:
    draw = (lambda *shape: torch.randint(-2, 3, shape).float()) if integers else torch.randn
    query, sub_keys, grad_scores = draw(n, h, 2 * half), draw(h, 2, s, half), torch.randn(n, h, knn)
    scores, slots = truth.product_key_topk(query, sub_keys, knn)
    expected = oracle.product_key_topk(query, sub_keys, knn)
    assert_equal(scores, expected[0])
    assert_equal(slots, expected[1])
    assert_equal(truth.scores_of(query, sub_keys, slots), expected[0])
    for found, gradient in zip(
        truth.product_key_topk_gradients(grad_scores, query, sub_keys, slots),
        oracle.product_key_topk_gradients(grad_scores, query, sub_keys, slots),
        strict=True,
    ):
        assert_equal(found, gradient)


def test_the_truth_shares_no_line_with_what_it_judges() -> None:
    assert not re.search(
        r"^\s*(from|import) (pkmem|numpy)", Path(truth.__file__).read_text(encoding="utf-8"), re.MULTILINE
    )


def test_flat_keys() -> None:
    query, keys = torch.randint(-2, 3, (6, 2, 3)), torch.randint(-2, 3, (2, 40, 3))
    scores = np.einsum("nhq,hmq->nhm", query.double().numpy(), keys.double().numpy())
    assert_equal(truth.flat_topk(query, keys, 7), oracle.best_first(scores, 7)[1])
    assert truth.flat_topk(query[:0], keys, 7).shape == (0, 2, 7)


@pytest.mark.parametrize("chunk", [1 << 24, 20], ids=["at once", "in parts"])
@pytest.mark.parametrize(("m", "v", "n", "b"), [(9, 4, 7, 5), (3, 1, 4, 6), (5, 3, 0, 2), (5, 3, 2, 0)])
def test_sums_products_and_gradients(m, v, n, b, chunk, monkeypatch) -> None:
    monkeypatch.setattr(truth, "_CHUNK", chunk)
    values, slots, weights, x = torch.randn(m, v), torch.randint(m, (n, b)), torch.randn(n, b), torch.randn(n, v)
    assert_equal(truth.weighted_sum(values, slots, weights), oracle.weighted_sum(values, slots, weights))
    assert_equal(truth.row_products(values, slots, x), oracle.row_products(values, slots, x))
    grad_values, grad_weights = oracle.weighted_sum_gradients(values, slots, weights, x)
    assert_equal(truth.table_gradient(slots, weights, x, m), grad_values)
    assert_equal(truth.row_products(values, slots, x), grad_weights)


def test_adam_on_some_rows() -> None:
    tables = [torch.randn(6, 3), torch.randn(6, 3), torch.rand(6, 3)]
    slots, weights, back = torch.tensor([[0, 4], [4, 4]]), torch.randn(2, 2), torch.randn(2, 3)
    expected = [oracle.fp64(table) for table in tables]
    adam = {"lr": 0.1, "betas": (0.9, 0.98), "eps": 1e-8, "step": 3}
    oracle.adam(*expected, oracle.row_gradients([(slots, weights, back)]), **adam)
    is_read = torch.zeros(6, dtype=torch.bool)
    is_read[slots] = True
    found = truth.Adam(**adam).after(tables, truth.table_gradient(slots, weights, back, 6), is_read)
    for one, other in zip(found, expected, strict=True):
        assert_equal(one, other)


def scrambled(bits: int) -> int:
    """lowbias32, one number at a time."""
    bits = ((bits ^ (bits >> 16)) * 0x7FEB352D) % 2**32
    bits = ((bits ^ (bits >> 15)) * 0x846CA68B) % 2**32
    return bits ^ (bits >> 16)


@pytest.mark.parametrize("high", [False, True])
def test_rounding_goes_up_where_the_random_bits_reach_what_is_cut_off(high) -> None:
    numbers, rows, seed, step = torch.randn(4, 3).double(), torch.tensor([0, 7, 1 << 20, 3]), (9 << 32) + 5, 11
    found = truth.rounded_by_key(numbers, rows, seed, step, 0, high)
    for place, row in enumerate(rows.tolist()):
        for column in range(3):
            key = scrambled(scrambled(scrambled(scrambled(scrambled(5) ^ 9) ^ step) ^ row) ^ column)
            random = key >> 16 if high else key % 2**16
            number = numbers[place, column].float()
            bits = number.view(torch.int32).item() % 2**32
            rounded = torch.tensor(((bits + random) >> 16) << 16).to(torch.int32).view(torch.float32)
            assert found[place, column] == rounded
            assert abs(rounded - number) < 2**-7 * abs(number)


@pytest.mark.parametrize("high", [False, True])
def test_rounding_keeps_the_mean(high) -> None:
    share = 0.3  # of the way from one bf16 number to the next
    numbers = torch.full((200, 300), 1 + 2**-7 * share, dtype=torch.float64)
    up = (truth.rounded_by_key(numbers, torch.arange(200), 3, 1, 0, high) > 1).double()
    deviation = (share * (1 - share) / up.numel()) ** 0.5
    assert abs(up.mean() - share) < 4 * deviation
    for others in (
        truth.rounded_by_key(numbers, torch.arange(200) + 200, 3, 1, 0, high),
        truth.rounded_by_key(numbers, torch.arange(200), 3 + (1 << 40), 1, 0, high),
        truth.rounded_by_key(numbers, torch.arange(200), 3, 2, 0, high),
    ):
        assert 0.5 < ((others > 1) == up).double().mean() < 0.7
