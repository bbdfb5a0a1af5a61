"""16-bit floats in kernels: bf16 comes as uint16, fp16 as int16, which numba knows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from pkmem.ops.cpu.kernels import part_of_kernel


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


@part_of_kernel
def mixed(bits: Any) -> Any:
    """A uint32 scrambled: every bit depends on every bit (lowbias32 of C. Wellons)."""
    bits = np.uint32((bits ^ (bits >> np.uint32(16))) * np.uint32(0x7FEB352D))
    bits = np.uint32((bits ^ (bits >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(bits ^ (bits >> np.uint32(16)))


@part_of_kernel
def _to_bf16_at_random(number: Any, random: Any) -> Any:
    bits = np.float32(number).view(np.uint32)
    if (bits & np.uint32(0x7FFFFFFF)) >= np.uint32(0x7F800000):
        return _to_bf16(number)
    return np.uint16((bits + (random & np.uint32(0xFFFF))) >> np.uint32(16))


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


@part_of_kernel
def _to_bf16(number: Any) -> Any:
    bits = np.float32(number).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
        rounded = np.uint32(0x7FC0)
    return np.uint16(rounded)
