import pytest
import torch

from pkmem.editing.rounding import from_bytes, rounded, to_bytes

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_rounded_comes_back_bit_for_bit(dtype):
    values = (torch.randn(50, 12) * 10.0 ** torch.randint(-2, 3, (50, 1))).to(dtype)
    values[0] = 0
    near = rounded(values)
    assert near.dtype == dtype
    whole, exponents = to_bytes(near)
    assert (whole.dtype, exponents.dtype, exponents.shape) == (torch.int8, torch.int8, (50,))
    assert torch.equal(from_bytes(whole, exponents, dtype), near)
    assert torch.equal(rounded(near), near)


def test_the_error_is_at_most_half_a_step_and_one_at_the_largest():
    values = torch.randn(1000, 6, dtype=torch.float64)
    values[0] = torch.tensor([0.999, -0.999, 0.4, 0.0, 1e-9, 0.9999])  # would be 128 steps
    step = 2.0 ** (values.abs().amax(1).log2().floor() - 6)[:, None]
    error = (rounded(values) - values).abs() / step
    assert error.max() <= 1
    assert error[values.abs() < values.abs().amax(1, keepdim=True)].quantile(0.99) <= 0.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_values_do_not_fit(dtype):
    assert to_bytes(torch.tensor([[1.0, 1 / 256]], dtype=dtype)) is None
    assert to_bytes(torch.tensor([[1.0, -0.0]], dtype=dtype)) is None
    assert to_bytes(torch.tensor([[1.0, torch.nan]], dtype=dtype)) is None
    assert to_bytes(torch.tensor([[1.0, torch.inf]], dtype=dtype)) is None
    assert to_bytes(torch.tensor([[1.0, 1 / 64]], dtype=dtype)) is not None


def test_the_smallest_and_no_rows():
    assert torch.equal(rounded(torch.full((1, 3), 1e-45)), torch.zeros(1, 3))
    assert rounded(torch.zeros(0, 3)).shape == (0, 3)
