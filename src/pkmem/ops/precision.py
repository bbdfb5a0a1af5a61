"""Matrix products in full precision: the selection is exact only where its scores are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Inside, products of fp32 matrices are fp32 products, whatever autocast and torch's settings allow."""
    with torch.autocast(device.type, enabled=False), no_rounding_of_factors(device):
        yield


@contextlib.contextmanager
def no_rounding_of_factors(device: torch.device) -> Iterator[None]:
    """Inside, matrix products take fp32 factors as they are; what torch's settings were is restored afterwards.

    `torch.set_float32_matmul_precision("high")` lets a GPU cut them to TF32, which has 11 bits of 24, and a CPU to bf16.
    """
    settings: Any = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    if before in ("none", "ieee"):
        yield
        return
    settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before
