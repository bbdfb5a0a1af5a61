"""Rows of numbers in a byte each: every number of a row is a whole one, from -127 to 127, times one power of two."""

from __future__ import annotations

import torch
from torch import Tensor


def rounded(values: Tensor) -> Tensor:
    """The nearest values (n, v) that fit a byte each; exact in fp32, bf16 and fp16, but for the smallest and largest."""
    return from_bytes(*_nearest(values), values.dtype)


def to_bytes(values: Tensor) -> tuple[Tensor, Tensor] | None:
    """Values (n, v) as int8 (n, v) and exponents int8 (n,), from which they come back bit for bit; None if they do not."""
    whole, exponents = _nearest(values)
    back = from_bytes(whole, exponents, values.dtype)
    same = torch.equal(back, values) and torch.equal(back.signbit(), values.signbit())
    return (whole, exponents) if same else None


def from_bytes(whole: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """Values (n, v) of a dtype from int8 (n, v) and exponents (n,)."""
    return torch.ldexp(whole.double(), exponents.double()[:, None]).to(dtype)


def _nearest(values: Tensor) -> tuple[Tensor, Tensor]:
    largest = values.double().abs().amax(1)
    exponents = (torch.frexp(largest).exponent - 7).clamp(-128, 127)
    whole = torch.ldexp(values.double(), -exponents.double()[:, None]).round().clamp(-127, 127)
    return whole.to(torch.int8), exponents.to(torch.int8)
