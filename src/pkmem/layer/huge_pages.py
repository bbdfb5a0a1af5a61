"""Huge pages for tables: rows are read at random, and each would walk the page tables to be found."""

from __future__ import annotations

import ctypes
import sys

from torch import Tensor

_HUGE = 2 << 20
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
