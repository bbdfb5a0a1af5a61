"""Arithmetic inside kernels: rounding to bf16, matrix products, random bits.

Triton's interpreter cuts bf16 off where the hardware rounds to nearest, and multiplies its bits as integers: both
are mended here, at compile time, for the tests alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def narrow(number, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """An fp32 number in a floating type, rounded to nearest even."""
    if _INTERPRETED and tl.bfloat16 == TYPE:
        bits = number.to(tl.uint32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        narrowed = tl.where(_is_finite(bits), nearest, number.to(tl.bfloat16))
    else:
        narrowed = number.to(TYPE)
    return narrowed


@triton.jit
def narrow_at_random(number, random, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """An fp32 number in a floating type: bf16 up or down with the chances that keep the mean, others to nearest.

    Infinities and NaN stay what they are; the lower 16 bits of `random` decide.
    """
    if tl.bfloat16 == TYPE:
        bits = number.to(tl.uint32, bitcast=True)
        moved = ((bits + (random & 0xFFFF)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        narrowed = tl.where(_is_finite(bits), moved, number.to(tl.bfloat16))
    else:
        narrowed = narrow(number, TYPE)
    return narrowed


@triton.jit
def _is_finite(bits):  # type: ignore[no-untyped-def]
    return (bits & 0x7FFFFFFF) < 0x7F800000


@triton.jit
def mixed(bits):  # type: ignore[no-untyped-def]
    """A uint32 scrambled (lowbias32 of C. Wellons), as on the CPU: both round alike."""
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit
def add_product(left, right, total):  # type: ignore[no-untyped-def]
    """total + left @ right, every product exact and summed in fp32."""
    if _INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")
