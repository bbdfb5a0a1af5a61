"""How tables are drawn: each number from a seed and its place alone, so that any part can be drawn anywhere."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

_CHUNK = 1 << 16  # numbers drawn at once: they stay in a cache
_undrawn: ContextVar[bool] = ContextVar("undrawn", default=False)


@contextlib.contextmanager
def undrawn_tables() -> Iterator[None]:
    """Inside the block new tables have a shape and a seed but no numbers: for a table that no device could hold whole.

    `pkmem.shard_values` draws each process's part of them, with the numbers that the whole table would have had.

    Example:
        >>> with pkmem.undrawn_tables():
        ...     model = pkmem.add_memory(model, layers=[5], config=config)
        >>> pkmem.shard_values(model, mesh)
    """
    token = _undrawn.set(True)
    try:
        yield
    finally:
        _undrawn.reset(token)


def tables_stay_undrawn() -> bool:
    """Whether this is inside `undrawn_tables()`."""
    return _undrawn.get()


def new_seed() -> Tensor:
    """A seed from torch's generator of the CPU, 0-d int64: the same on every device."""
    return torch.randint(1 << 62, (), device="cpu")


@torch.no_grad()
def draw_normal(weight: Tensor, std: float, seed: Tensor, first_column: int, width: int) -> None:
    """Fills a part (m, v) of a table with normal numbers, which seed, row and column decide, rounded to its dtype.

    Args:
        weight: all rows of some columns.
        std: standard deviation, >= 0.
        seed: 0-d int64.
        first_column: of `weight`, in the whole table.
        width: columns of the whole table.
    """
    if std == 0:
        weight.zero_()
        return
    columns = torch.arange(first_column, first_column + weight.shape[1], device=weight.device)
    size = max(1, _CHUNK // weight.shape[1])
    for first in range(0, len(weight), size):
        part = weight[first : first + size]
        rows = torch.arange(first, first + len(part), device=weight.device).unsqueeze(1)
        bits = _mixed(rows.mul_(width).add(columns), seed)
        # 24 bits, as the middle of their interval: never 0 or 1, whose quantiles are infinite.
        uniform = (bits >> 40).to(torch.float32).add_(0.5).mul_(2.0**-23)
        part.copy_(uniform.erfinv_().mul_(std * math.sqrt(2)))


def _mixed(places: Tensor, seed: Tensor) -> Tensor:
    """int64 numbers scrambled, a bijection of places (splitmix64 of Steele et al. 2014); products wrap."""
    bits = places.mul_(-7046029254386353131).add_(seed)
    bits.bitwise_xor_((bits >> 30).bitwise_and_((1 << 34) - 1)).mul_(-4658895280553007687)
    bits.bitwise_xor_((bits >> 27).bitwise_and_((1 << 37) - 1)).mul_(-7723592293110705685)
    return bits.bitwise_xor_((bits >> 31).bitwise_and_((1 << 33) - 1))
