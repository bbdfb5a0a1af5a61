"""Rounding to bf16 at random, with the chances that keep the mean: to nearest, small updates would be lost."""

from __future__ import annotations

import torch
from torch import Tensor


def rounded_at_random(numbers: Tensor, random: Tensor, shift: int) -> Tensor:
    """Numbers that bf16 can hold, fp32: up or down, by 16 of 32 random bits (int32), from bit `shift` on."""
    numbers = numbers.to(torch.float32)
    bits = numbers.view(torch.int32)
    is_finite = (bits & 0x7FFFFFFF) < 0x7F800000
    rounded = (random >> shift).bitwise_and_(0xFFFF).add_(bits).bitwise_and_(-0x10000)
    return torch.where(is_finite, rounded.view(torch.float32), numbers)


def random_keys(seed: int, step: Tensor, rows: Tensor) -> Tensor:
    """What the random bits of some rows (u,) depend on beside the column: seed, step and row; int32."""
    key = _word(seed, rows.device)
    for word in (_word(seed >> 32, rows.device), step.to(torch.int64).to(torch.int32), rows.to(torch.int32)):
        key = _mixed(key) ^ word
    return _mixed(key)


def random_bits(keys: Tensor, first_column: int, width: int) -> Tensor:
    """32 random bits (c, v) for v columns from the first on, of rows with these keys (c,), int32."""
    columns = torch.arange(first_column, first_column + width, dtype=torch.int32, device=keys.device)
    return _mixed(keys.unsqueeze(1) ^ columns)


def _word(number: int, device: torch.device) -> Tensor:
    """The lower 32 bits of a number."""
    signed = ((number & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000
    return torch.full((), signed, dtype=torch.int32, device=device)


def _mixed(bits: Tensor) -> Tensor:
    """int32 numbers scrambled (lowbias32 of C. Wellons); products wrap."""
    bits = (((bits >> 16) & 0xFFFF) ^ bits) * 0x7FEB352D
    bits = (((bits >> 15) & 0x1FFFF) ^ bits) * (0x846CA68B - (1 << 32))
    return ((bits >> 16) & 0xFFFF) ^ bits
