"""Rows of a table in few bits: a row's codes and its scale lie side by side, so that reading a row is one read.

    | codes, padded with zeros to a multiple of 16 bytes, c of them | scale, fp32, 4 bytes |

A number is scale * code. With 8 bits byte j is the code of column j, in [-127, 127]. With 4 bits the low half of byte j
is the code of column j and the high half that of column c + j, both in [-8, 7], as two's complement.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = (8, 4)
_SCALE_BYTES = 4
_PADDED_TO = 16
_CHUNK = 1 << 24  # numbers packed at once
_SHRUNK = [
    1 - step / 32 for step in range(20)
]  # scales tried for four bits, of the one that reaches the largest number


def code_bytes(width: int, bits: int) -> int:
    """Bytes of a row's codes, padding included."""
    return -(-width * bits // (8 * _PADDED_TO)) * _PADDED_TO


def row_bytes(width: int, bits: int) -> int:
    """Bytes of a packed row."""
    return code_bytes(width, bits) + _SCALE_BYTES


def pack_rows(values: Tensor, bits: int) -> Tensor:
    """Packs rows: to 8 bits so that the largest number of a row is met, to 4 with the scale that errs least.

    Args:
        values: (m, v) of any floating dtype, finite.
        bits: of a code, 8 or 4.

    Returns:
        (m, `row_bytes(v, bits)`) uint8, for `pkmem.ops.packed_sum`.

    Raises:
        ValueError: `bits` is neither, or a number is not finite.
    """
    require_bits(bits)
    num_rows, width = values.shape
    packed = torch.zeros(num_rows, row_bytes(width, bits), dtype=torch.uint8, device=values.device)
    num_codes = code_bytes(width, bits)
    size = max(1, _CHUNK // width)
    for rows, target in zip(values.detach().split(size), packed.split(size), strict=True):
        rows = rows.to(torch.float32)
        if not rows.isfinite().all():
            raise ValueError("a row has a number that is not finite, which has no code: pack a table that is whole")
        codes, scale = _whole_codes(rows) if bits == 8 else _half_codes(rows)
        if bits == 4:
            low, high = codes[:, :num_codes], codes[:, num_codes:]
            codes = low & 15
            codes[:, : high.shape[1]] |= high << 4
        target[:, : codes.shape[1]] = codes.view(torch.uint8)
        target[:, num_codes:] = scale.contiguous().view(torch.uint8)
    return packed


def unpack_rows(packed: Tensor, width: int, bits: int) -> Tensor:
    """The numbers that packed rows stand for.

    Args:
        packed: (m, `row_bytes(width, bits)`) uint8.
        width: of a row, v.
        bits: of a code, 8 or 4.

    Returns:
        (m, v) fp32.
    """
    num_codes = code_bytes(width, bits)
    codes, scale = packed[:, :num_codes].view(torch.int8), packed[:, num_codes:].contiguous().view(torch.float32)
    if bits == 4:
        codes = torch.cat((codes << 4 >> 4, codes >> 4), 1)  # the sign is the highest bit of each half
    return codes[:, :width].to(torch.float32) * scale


def require_bits(bits: int) -> None:
    """Refuses what is no number of bits of a code.

    Raises:
        ValueError: `bits` is neither 8 nor 4.
    """
    if bits not in BITS:
        raise ValueError(f"bits is {bits!r} but must be one of {', '.join(map(str, BITS))}")


def _whole_codes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (c, v) int8 and scales (c, 1) in 8 bits."""
    scale = rows.abs().amax(1, keepdim=True) / 127
    return _codes(rows, scale, -127, 127), scale


def _half_codes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (c, v) int8 and scales (c, 1) in 4 bits: of some scales the one with the least sum of squared errors."""
    largest = rows.abs().amax(1, keepdim=True) / 7
    best, least = largest, torch.full_like(largest, torch.inf)
    for share in _SHRUNK:
        scale = largest * share
        error = (_codes(rows, scale, -8, 7) * scale - rows).square().sum(1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return _codes(rows, best, -8, 7), best


def _codes(rows: Tensor, scale: Tensor, lowest: int, highest: int) -> Tensor:
    codes = torch.where(scale > 0, rows / scale, 0).round_().clamp_(lowest, highest)
    return codes.to(torch.int8)
