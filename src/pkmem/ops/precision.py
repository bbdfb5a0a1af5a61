"""Matrix products in full precision: the selection is exact only where its scores are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Inside, products of fp32 matrices are fp32 products, whatever autocast and torch's settings allow.

    `torch.set_float32_matmul_precision("high")` lets a GPU cut their factors to TF32, which has 11 bits of 24, and a
    CPU to bf16. What the settings were is restored afterwards.
    """
    settings: Any = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    is_reduced = before not in ("none", "ieee")
    with torch.autocast(device.type, enabled=False):
        if is_reduced:
            settings.fp32_precision = "ieee"
        try:
            yield
        finally:
            if is_reduced:
                settings.fp32_precision = before
