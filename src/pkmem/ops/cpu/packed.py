"""The weighted sum of rows that are packed in few bits.

Rows come from memory at random, and unpacking keeps a core as busy as waiting for them. So while eight rows are unpacked
and added, those that will be read sixteen reads later are asked for: with eight rows alone, or without asking ahead, it
takes up to twice as long.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pkmem.ops.cpu.kernels import array, kernel
from pkmem.ops.cpu.threads import run_over
from pkmem.ops.cpu.vectors import add_int4_rows, add_int8_rows, float_at
from pkmem.ops.packing import code_bytes

_GRAIN_ELEMENTS = 1 << 18
_AHEAD = 24  # reads


def packed_sum(rows: Tensor, slots: Tensor, weights: Tensor, width: int, bits: int) -> Tensor:
    """See `Backend.packed_sum`."""
    summed = torch.empty(slots.shape[0], width, dtype=torch.float32)
    arguments = (
        array(rows),
        code_bytes(width, bits),
        bits,
        array(slots),
        array(weights.to(torch.float32)),
        array(summed),
    )
    run_over(sum_packed_rows, arguments, slots.shape[0], 1 + _GRAIN_ELEMENTS // (1 + slots.shape[1] * width))
    return summed


@kernel
def sum_packed_rows(rows, num_codes, bits, slots, weights, summed, first, last):  # type: ignore[no-untyped-def]
    """Writes summed[first:last]."""
    row_bytes, reads, width = rows.shape[1], slots.shape[1], summed.shape[1]
    order, total = slots.ravel(), np.empty(num_codes * 8 // bits, np.float32)
    starts, later, factors = np.empty(8, np.int64), np.empty(8, np.int64), np.empty(8, np.float32)
    for token in range(first, last):
        total[:] = 0
        for read in range(0, reads, 8):
            place = token * reads + read
            for row in range(8):
                if read + row < reads:
                    starts[row] = order[place + row] * row_bytes
                    factors[row] = weights[token, read + row] * float_at(rows, starts[row] + num_codes)
                else:
                    starts[row], factors[row] = starts[0], np.float32(0)
            for row in range(8):
                later[row] = order[min(place + row + _AHEAD, last * reads - 1)] * row_bytes
            if bits == 8:
                add_int8_rows(rows, starts, later, factors, total, num_codes)
            else:
                add_int4_rows(rows, starts, later, factors, total, num_codes)
        for column in range(width):
            summed[token, column] = total[column]
