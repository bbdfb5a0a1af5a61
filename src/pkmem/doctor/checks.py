"""What a check is: a function of a case that raises where a backend is wrong; and how numbers are compared."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from pkmem.doctor.sizes import Sizes
from pkmem.ops.backends import Backend, backend_module

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROUNDING = 2.0**-20  # that an fp32 sum may be off, relative to the sum of the magnitudes of its terms


class NotChecked(Exception):
    """Raised by a check that could not be made here, with the reason."""


class DoesNotApply(Exception):
    """Raised by a check of something that is of no concern here, with the reason."""


@dataclass(frozen=True)
class Case:
    """What a check is given.

    Args:
        backend: one of `pkmem.ops.BACKENDS`.
        device: where its tensors are.
        dtype: of tables, queries and sub-keys.
        sizes: how large its examples are.
    """

    backend: str
    device: torch.device
    dtype: torch.dtype
    sizes: Sizes
    random: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    @property
    def module(self) -> Backend:
        """The backend."""
        return backend_module(self.backend)

    def normal(self, *shape: int) -> Tensor:
        """Random numbers on the CPU, in the case's dtype."""
        return torch.randn(shape, generator=self.random, device="cpu").to(self.dtype)

    def integers(self, *shape: int, largest: int = 2) -> Tensor:
        """Random integers of so small a size that no sum of their products is rounded, on the CPU."""
        drawn = torch.randint(-largest, largest + 1, shape, generator=self.random, device="cpu")
        return drawn.to(self.dtype)

    def below(self, limit: int, *shape: int) -> Tensor:
        """Random int64 in [0, limit), on the CPU."""
        return torch.randint(limit, shape, generator=self.random, device="cpu")

    def there(self, tensor: Tensor) -> Tensor:
        """A copy on the case's device."""
        return tensor.to(self.device, copy=True)


@dataclass(frozen=True)
class Check:
    """A function that raises what is wrong with a backend, or returns a note; and what it is about.

    Args:
        examine: takes the case.
        point: a key of `findings.POINTS`.
        what: what is checked, in words.
        dtypes: keys of `DTYPES` it is made for one after the other; "" if it is about none of them.
        shapes: "huge" for tables past 2 ** 31 elements.
    """

    examine: Callable[[Case], str | None]
    point: int
    what: str
    dtypes: tuple[str, ...]
    shapes: Literal["usual", "huge"] = "usual"


def check(
    point: int, what: str, dtypes: tuple[str, ...] = tuple(DTYPES), shapes: Literal["usual", "huge"] = "usual"
) -> Callable[[Callable[[Case], str | None]], Check]:
    """Makes a `Check` of a function; its case is of fp32 where the check is about no dtype."""
    return functools.partial(Check, point=point, what=what, dtypes=dtypes, shapes=shapes)


def assert_same(what: Any, found: Tensor, expected: Tensor) -> None:
    """Two tensors have the same shape, dtype and bits (0.0 is -0.0)."""
    _assert_alike(what, found, expected)
    if not torch.equal(found, expected.to(found.device)):  # compared on the device: they may be large
        found, expected = found.cpu(), expected.cpu()
        _fail(what, found, expected, found != expected)


def assert_near(what: Any, found: Tensor, truth: Tensor, magnitudes: Tensor, coarse: float = 0.0) -> None:
    """A tensor is the fp64 truth but for what summing in fp32, and rounding to the tensor's dtype, may change.

    Args:
        what: is named where it is not.
        found: in its dtype.
        truth: fp64.
        magnitudes: the sums of the magnitudes of the terms that were summed up.
        coarse: by how much more each term may be off, relative to it.
    """
    limits = torch.finfo(found.dtype)
    wide = found.dtype == torch.float64
    relative = limits.eps / 2 * (1 + 2**-10)
    per_term = (ROUNDING * 2.0**-29 if wide else ROUNDING) + coarse
    assert_within(
        what, found, truth, relative * truth.abs() + per_term * magnitudes + limits.smallest_normal * limits.eps
    )


def assert_within(what: Any, found: Tensor, truth: Tensor, tolerance: Tensor) -> None:
    """Every number is finite and off its truth by its tolerance at most."""
    assert found.shape == truth.shape, f"{what}: shape {tuple(found.shape)}, not {tuple(truth.shape)}"
    found = found.cpu()
    is_wrong = ~((found.double() - truth).abs() <= tolerance)
    if is_wrong.any():
        _fail(what, found, truth, is_wrong)


def _assert_alike(what: Any, found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, not {tuple(expected.shape)}"
    assert found.dtype == expected.dtype, f"{what}: {found.dtype}, not {expected.dtype}"


def _fail(what: Any, found: Tensor, expected: Tensor, is_wrong: Tensor) -> None:
    place = tuple(is_wrong.nonzero()[0].tolist())
    raise AssertionError(
        f"{what}: {int(is_wrong.sum()):,} of {is_wrong.numel():,} numbers are wrong ({found.dtype}, "
        f"shape {tuple(found.shape)}), first at {place}: {found[place].item()!r}, not {expected[place].item()!r}"
    )
