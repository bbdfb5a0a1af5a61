"""16-bit floats in kernels: bf16 comes as uint16, fp16 as int16, which numba knows.

What every element of a bf16 table goes through is written in LLVM's 32-bit integers, eight to a vector: numba's own
operations on them have 64 bits, four to a vector.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from pkmem.ops.cpu.kernels import part_of_kernel

_I16, _I32 = ir.IntType(16), ir.IntType(32)
_NAN = 0x7FC0  # of bf16


def widen(stored: Any) -> Any:
    """A stored element as fp32 (in kernels)."""
    raise NotImplementedError


def narrow(number: Any, like: Any) -> Any:
    """An fp32 number in the type of the element `like`, rounded to nearest even (in kernels)."""
    raise NotImplementedError


@overload(widen, inline="always")
def _widen(stored: Any) -> Any:
    def fp32(stored: Any) -> Any:
        return stored

    def bf16(stored: Any) -> Any:
        return np.uint32(np.uint32(stored) << np.uint32(16)).view(np.float32)

    def fp16(stored: Any) -> Any:
        return _from_fp16(np.uint32(stored))

    return {types.uint16: bf16, types.int16: fp16}.get(stored, fp32)


@overload(narrow, inline="always")
def _narrow(number: Any, like: Any) -> Any:
    def fp32(number: Any, like: Any) -> Any:
        return number

    def bf16(number: Any, like: Any) -> Any:
        return _to_bf16(number)

    def fp16(number: Any, like: Any) -> Any:
        return _to_fp16(number)

    return {types.uint16: bf16, types.int16: fp16}.get(like, fp32)


def narrow_at_random(number: Any, like: Any, random: Any) -> Any:
    """As `narrow`, but bf16 goes up or down, by 16 random bits, with the chances that keep the mean (in kernels)."""
    raise NotImplementedError


@overload(narrow_at_random, inline="always")
def _narrow_at_random(number: Any, like: Any, random: Any) -> Any:
    def rounded(number: Any, like: Any, random: Any) -> Any:
        return narrow(number, like)

    def bf16(number: Any, like: Any, random: Any) -> Any:
        return _to_bf16_at_random(number, random)

    return bf16 if like == types.uint16 else rounded


@intrinsic
def mixed(_: Any, bits: Any) -> Any:
    """A uint32 scrambled: every bit depends on every bit (lowbias32 of C. Wellons)."""

    def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        (bits,) = arguments
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            bits = builder.mul(builder.xor(bits, builder.lshr(bits, _I32(shift))), _I32(factor))
        return builder.xor(bits, builder.lshr(bits, _I32(16)))

    return types.uint32(types.uint32), codegen


def _rounded(builder: Any, number: Any, bits: Any) -> Any:
    """The upper half of `bits`, which are those of a number and what its lower half makes of them."""
    upper = builder.trunc(builder.lshr(bits, _I32(16)), _I16)
    return builder.select(builder.fcmp_unordered("uno", number, number), _I16(_NAN), upper)


@intrinsic
def _to_bf16_at_random(_: Any, number: Any, random: Any) -> Any:
    """Goes up if the lower half and 16 random bits reach beyond it; an infinity, whose lower half is zero, never does."""

    def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        number, random = arguments
        bits = builder.bitcast(number, _I32)
        return _rounded(builder, number, builder.add(bits, builder.and_(random, _I32(0xFFFF))))

    return types.uint16(types.float32, types.uint32), codegen


@intrinsic
def _to_bf16(_: Any, number: Any) -> Any:
    """Rounds to nearest even."""

    def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        (number,) = arguments
        bits = builder.bitcast(number, _I32)
        last_place = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
        return _rounded(builder, number, builder.add(bits, builder.add(_I32(0x7FFF), last_place)))

    return types.uint16(types.float32), codegen


@part_of_kernel
def _from_fp16(stored: Any) -> Any:
    sign = (stored & np.uint32(0x8000)) << np.uint32(16)
    # Read as fp32 the number is 2 ** 112 too small, subnormals included; infinity and NaN come out >= 2 ** 16.
    magnitude = np.uint32((stored & np.uint32(0x7FFF)) << np.uint32(13)).view(np.float32) * np.float32(2.0**112)
    bits = np.float32(magnitude).view(np.uint32)
    if magnitude >= np.float32(65536.0):
        bits |= np.uint32(0x7F800000)
    return np.uint32(bits | sign).view(np.float32)


@part_of_kernel
def _to_fp16(number: Any) -> Any:
    bits = np.float32(number).view(np.uint32)
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    bits &= np.uint32(0x7FFFFFFF)
    last_place = (bits >> np.uint32(13)) & np.uint32(1)
    normal = (bits - np.uint32(0x38000000) + np.uint32(0xFFF) + last_place) >> np.uint32(13)
    # Added to 0.5, a subnormal is rounded to multiples of its last place by the adder itself.
    sum_bits = np.float32(np.uint32(bits).view(np.float32) + np.float32(0.5)).view(np.uint32)
    small = sum_bits - np.uint32(0x3F000000)
    half = small if bits < np.uint32(0x38800000) else normal
    if bits >= np.uint32(0x477FF000):  # beyond the largest fp16
        half = np.uint32(0x7C00)
    if bits > np.uint32(0x7F800000):
        half = np.uint32(0x7E00)
    return np.int16(np.uint16(half | sign))
