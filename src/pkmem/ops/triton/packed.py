"""The weighted sum of rows that are packed in few bits, see `pkmem.ops.packing`.

A program unpacks a block of the code bytes of several rows at a time. Their scales are 4 bytes behind the codes, where the
same memory is seen as fp32. A slot outside the table is never read: what it would have been part of is NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pkmem.ops.packing import code_bytes
from pkmem.ops.triton.device import on
from pkmem.ops.triton.launch import column_block, power_of_two, warps_for

_ROWS = 8  # in flight per program
_SCALE_BYTES = 4


def packed_sum(rows: Tensor, slots: Tensor, weights: Tensor, width: int, bits: int) -> Tensor:
    """See `Backend.packed_sum`."""
    num_tokens, num_reads = slots.shape
    summed = torch.empty(num_tokens, width, dtype=torch.float32, device=rows.device)
    if summed.numel() == 0:
        return summed
    rows, num_codes = rows.contiguous(), code_bytes(width, bits)
    block = column_block(num_codes)
    given = (rows.view(torch.int8), rows.view(torch.float32), slots.contiguous(), weights.contiguous(), summed)
    sizes = (rows.shape[1], rows.shape[1] // _SCALE_BYTES, num_codes, width, num_reads, len(rows))
    together = power_of_two(num_reads, 1, _ROWS)
    with on(rows):
        _sum_packed_rows[(num_tokens, triton.cdiv(num_codes, block))](
            *given, *sizes, BITS=bits, BLOCK=block, ROWS=together, num_warps=warps_for(block)
        )
    return summed


@triton.jit(do_not_specialize=["num_rows"])
def _sum_packed_rows(  # type: ignore[no-untyped-def]
    codes, scales, slots, weights, summed, row_bytes, row_floats, num_codes, width, num_reads, num_rows,
    BITS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program (token, block of code bytes) writes the columns of that block of summed[token]."""
    token = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin = token * num_reads
    end = begin + num_reads
    low = tl.zeros((ROWS, BLOCK), tl.float32)  # of all bits, or of the low half
    high = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(begin, end, ROWS):
        reads = first + tl.arange(0, ROWS)
        real = reads < end
        row = tl.load(slots + reads, mask=real, other=0).to(tl.int64)
        is_row = row.to(tl.uint64, bitcast=True) < num_rows  # below 0 is far above
        scale = tl.load(scales + row * row_floats + num_codes // 4, mask=real & is_row, other=0)
        factor = tl.load(weights + reads, mask=real, other=0).to(tl.float32) * scale
        factor = tl.where(real & (is_row == 0), float("nan"), factor)
        offsets = row[:, None] * row_bytes + places[None, :]
        code = tl.load(codes + offsets, mask=(real & is_row)[:, None] & (places < num_codes)[None, :], other=0)
        code = code.to(tl.int32)
        if BITS == 8:
            low += factor[:, None] * code.to(tl.float32)
        else:
            low += factor[:, None] * ((code << 28) >> 28).to(tl.float32)
            high += factor[:, None] * (code >> 4).to(tl.float32)
    out = summed + token * width
    tl.store(out + places, tl.sum(low, 0), mask=(places < num_codes) & (places < width))
    if BITS == 4:
        tl.store(out + num_codes + places, tl.sum(high, 0), mask=(places < num_codes) & (num_codes + places < width))
