"""Checks that nothing but the input decides the bits: points 4 and 5."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pkmem.doctor.checks import Case, assert_same, check
from pkmem.doctor.step import Step


@check(4, "every result of a training step, repeated")
def repeats(case: Case) -> str:
    """With other work beside it, where the device has streams."""
    step = Step(case, case.sizes.step, case.sizes.step_width)
    expected = step.results()
    for _ in range(case.sizes.repeats):
        with _other_work(case.device):
            found = step.results()
        _assert_all_same("", found, expected)
    beside = ", beside matrix products on another stream" if case.device.type == "cuda" else ""
    return f"{case.sizes.repeats} repeats{beside}"


@check(5, "every result of a training step, whatever torch's setting for matrix products")
def settings(case: Case) -> None:
    """`torch.set_float32_matmul_precision` is for the user's products, not for the selection's."""
    before = torch.get_float32_matmul_precision()
    step = Step(case, case.sizes.step, case.sizes.step_width)
    try:
        torch.set_float32_matmul_precision("highest")
        expected = step.results()
        for precision in ("high", "medium"):
            torch.set_float32_matmul_precision(precision)
            _assert_all_same(f" with precision {precision!r}", step.results(), expected)
    finally:
        torch.set_float32_matmul_precision(before)


def _assert_all_same(when: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, result in found.items():
        assert_same(f"{name}{when}", result, expected[name])


@contextmanager
def _other_work(device: torch.device) -> Iterator[None]:
    """Matrix products on a second stream of a GPU."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        factor = torch.ones(4096, 4096, device=device, dtype=torch.bfloat16)
        for _ in range(20):
            factor @ factor
    yield
    stream.synchronize()


CHECKS = (repeats, settings)
