"""Huge pages for tables: rows are read at random, and each would walk the page tables to be found."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

_HUGE = 2 << 20
_PART = 64 << 20  # bytes converted at once
_MADV_HUGEPAGE = 14  # of Linux's madvise(2)


def prefer_huge_pages(tensor: Tensor) -> Tensor:
    """Asks Linux to back a tensor's memory by pages of 2 MiB, where it would take 4 KiB; returns the tensor.

    A hint, best given before the memory is first written. It changes no number, and does nothing on other systems,
    on other devices and for less than a page.

    Args:
        tensor: contiguous.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu" or type(tensor) is not Tensor:
        return tensor
    begin = tensor.data_ptr()
    first, end = -(-begin // _HUGE) * _HUGE, (begin + tensor.nbytes) // _HUGE * _HUGE
    if first < end:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _MADV_HUGEPAGE)
    return tensor


def converted(convert: Callable[[Tensor], Tensor], table: Tensor) -> Tensor:
    """What `convert` makes of a table; another dtype or one from a GPU goes into huge pages, a few rows at a time.

    Args:
        convert: as `nn.Module._apply` has it, for any number of rows.
        table: (m, v).

    Returns:
        the same numbers as `convert(table)`.
    """
    if table.is_meta or type(table) not in (Tensor, nn.Parameter) or table.dim() != 2 or table.nbytes < _HUGE:
        return convert(table)
    like = convert(table[:0])
    if type(like) is not Tensor or not like.is_cpu or (like.dtype, like.device) == (table.dtype, table.device):
        return convert(table)
    made = prefer_huge_pages(torch.empty(table.shape, dtype=like.dtype, device=like.device))
    rows = max(1, _PART * len(table) // table.nbytes)
    for old, new in zip(table.split(rows), made.split(rows), strict=True):
        new.copy_(convert(old))
    return made
