"""Arrays inside an HTML page: in the smallest integers that hold them, deflated, in base64."""

from __future__ import annotations

import base64
import zlib
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_UNSIGNED = (np.uint8, np.uint16, np.uint32)


class Block(NamedTuple):
    """An array as a page has it.

    Args:
        dtype: "uint8", "uint16", "uint32", "bfloat16" or "json".
        shape: of the array; empty for JSON.
        text: the base64 of its deflated bytes: all first bytes of the numbers, then all second ones, so that those that
            hardly differ stand together.
    """

    dtype: str
    shape: list[int]
    text: str


def pack_counts(numbers: Tensor) -> Block:
    """An array of integers >= 0, in as few bytes each as hold the largest."""
    array = numbers.numpy()
    most = int(array.max()) if array.size else 0
    kind = next(kind for kind in _UNSIGNED if most <= np.iinfo(kind).max)
    return _packed(array.astype(kind), np.dtype(kind).name)


def pack_weights(numbers: Tensor) -> Block:
    """An array of floats, rounded to bfloat16: to two or three digits."""
    return _packed(numbers.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16), "bfloat16")


def pack_json(document: bytes) -> Block:
    """A JSON document."""
    return Block("json", [], _text(document))


def _packed(array: np.ndarray[Any, Any], dtype: str) -> Block:
    planes = np.ascontiguousarray(array).reshape(-1, 1).view(np.uint8).T  # little-endian on every system of torch's
    return Block(dtype, list(array.shape), _text(planes.tobytes()))


def _text(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content, 9)).decode()
