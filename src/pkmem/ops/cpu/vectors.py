"""What the CPU kernels are made of: the compiler's settings, a few vector instructions, 16-bit floats.

numba looks for changes only in the file of the kernel it compiled: after a change here delete the
`__pycache__` of this folder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from torch import Tensor

_HALF_VIEWS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}  # numba knows neither half float


# Sums may be reordered into vectors, the same way in every run; NaN and infinities keep their meaning.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "reassoc"}}
part_of_kernel = njit(**_OPTIONS)


def kernel(function: Callable[..., Any]) -> Any:
    """Compiles a function on its first call and keeps the code on disk."""
    try:
        return njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # no folder to write to
        return njit(**_OPTIONS)(function)


def array(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as numpy sees it: bf16 as uint16 and fp16 as int16, which kernels tell apart by type."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype in _HALF_VIEWS:
        tensor = tensor.view(_HALF_VIEWS[tensor.dtype])
    return tensor.numpy()


# --- vector instructions --------------------------------------------------------------------------------


def _pointer(context: Any, builder: Any, array_type: Any, values: Any, start: Any, lanes: int) -> Any:
    """Where the vector values[start : start + lanes] is."""
    data = context.make_array(array_type)(context, builder, values).data
    vector = ir.VectorType(context.get_data_type(array_type.dtype), lanes)
    return builder.bitcast(builder.gep(data, [start]), vector.as_pointer())


def _load(context: Any, builder: Any, array_type: Any, values: Any, start: Any, lanes: int) -> Any:
    elements = builder.load(_pointer(context, builder, array_type, values, start, lanes))
    elements.align = array_type.dtype.bitwidth // 8
    return elements


def _spread(builder: Any, number: Any, lanes: int) -> Any:
    """A number in every lane."""
    index = ir.IntType(32)
    empty = ir.Constant(ir.VectorType(number.type, lanes), ir.Undefined)
    first = builder.insert_element(empty, number, index(0))
    return builder.shuffle_vector(first, empty, ir.Constant(ir.VectorType(index, lanes), [0] * lanes))


@intrinsic
def which_at_least(_: Any, values: Any, start: Any, bound: Any) -> Any:
    """Which of the 64 integers values[start : start + 64] are >= bound, as the bits of a uint64."""

    def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        elements = _load(context, builder, values, arguments[0], arguments[1], 64)
        found = builder.icmp_signed(">=", elements, _spread(builder, arguments[2], 64))
        return builder.bitcast(found, ir.IntType(64))

    return types.uint64(values, types.intp, values.dtype), codegen


@intrinsic
def lowest_bit(_: Any, bits: Any) -> Any:
    """The position of the lowest bit set in a uint64 that is not zero."""

    def codegen(_context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.IntType(1)(1))

    return types.int64(types.uint64), codegen


@intrinsic
def count_above(_: Any, values: Any, start: Any, bound: Any) -> Any:
    """How many of the 16 integers values[start : start + 16] are > bound."""

    def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        elements = _load(context, builder, values, arguments[0], arguments[1], 16)
        found = builder.icmp_signed(">", elements, _spread(builder, arguments[2], 16))
        return builder.zext(builder.ctpop(builder.bitcast(found, ir.IntType(16))), ir.IntType(64))

    return types.int64(values, types.intp, values.dtype), codegen


@intrinsic
def _rank_16(_: Any, values: Any, count: Any, start: Any, ranks: Any) -> Any:
    """Writes ranks[start : start + 16]: how many of the integers values[:count] are above values[start], ..."""

    def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        data = context.make_array(values)(context, builder, arguments[0]).data
        elements = _load(context, builder, values, arguments[0], arguments[2], 16)
        above = cgutils.alloca_once_value(builder, ir.Constant(elements.type, None))
        with cgutils.for_range(builder, arguments[1]) as loop:
            other = _spread(builder, builder.load(builder.gep(data, [loop.index])), 16)
            higher = builder.zext(builder.icmp_signed(">", other, elements), elements.type)
            builder.store(builder.add(builder.load(above), higher), above)
        result = builder.load(above)
        if values.dtype.bitwidth > 32:
            result = builder.trunc(result, ir.VectorType(ir.IntType(32), 16))
        builder.store(result, _pointer(context, builder, ranks, arguments[3], arguments[2], 16)).align = 4
        return context.get_dummy_value()

    return types.void(values, types.intp, types.intp, ranks), codegen


@part_of_kernel
def rank_all(values: Any, count: Any, ranks: Any) -> None:
    """Writes the ranks (int32) of the integers values[:count], the highest 0; uses 15 more of both arrays."""
    for start in range(0, count, 16):
        _rank_16(values, count, start, ranks)


# --- 16-bit floats: bf16 comes as uint16, fp16 as int16 -------------------------------------------------


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
