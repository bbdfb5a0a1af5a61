"""Asks the system for the pages of a mapped table before they are read, so that many are on their way from the disk at once."""

from __future__ import annotations

from mmap import MADV_WILLNEED

import numpy as np
from numba import types
from torch import Tensor

from pkmem.ops.cpu.kernels import array, kernel
from pkmem.ops.cpu.threads import run_over

_GRAIN = 256  # rows
_madvise = types.ExternalFunction("madvise", types.int32(types.uintp, types.uintp, types.int32))


def ask_for_rows(rows: Tensor, slots: Tensor, asked: Tensor, page_bytes: int) -> None:
    """See `pkmem.ops.mapped_rows.MappedRows`: asks for the pages of rows `slots` (r,) that were not asked for yet."""
    run_over(_ask, (array(rows).view(np.uint8), array(slots), array(asked), page_bytes), len(slots), _GRAIN)


@kernel
def _ask(rows, slots, asked, page_bytes, first, last):  # type: ignore[no-untyped-def]
    """Asks for the pages of slots[first:last]. Two threads may ask for the same page: that is no harm."""
    row_bytes, begin = rows.shape[1], rows.ctypes.data
    for read in range(first, last):
        start = begin + slots[read] * row_bytes
        page, end = start // page_bytes, (start + row_bytes - 1) // page_bytes
        wanted = False
        for one in range(page, end + 1):
            if asked[one - begin // page_bytes] == 0:
                asked[one - begin // page_bytes] = 1
                wanted = True
        if wanted:
            _madvise(np.uintp(page * page_bytes), np.uintp((end - page + 1) * page_bytes), np.int32(MADV_WILLNEED))
