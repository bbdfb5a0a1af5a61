"""A few instructions that numba does not write by itself: for kernels that choose and rank, and that read packed rows."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pkmem.ops.cpu.kernels import inlined

# Sixteen lanes to pack, a single instruction with AVX-512; eight to count, since there a comparison gives integers
# at once where a wider one gives a mask. LLVM takes apart what a processor does not have.

_I1, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_I32x16, _I32x8, _F32x16 = ir.VectorType(_I32, 16), ir.VectorType(_I32, 8), ir.VectorType(ir.FloatType(), 16)
_I8x16 = ir.VectorType(_I8, 16)


def _constant(vector: Any, number: float) -> Any:
    return ir.Constant(vector, [number] * vector.count)


def _spread(builder: Any, number: Any, lanes: int = 16) -> Any:
    """A number in every lane."""
    empty = ir.Constant(ir.VectorType(number.type, lanes), ir.Undefined)
    first = builder.insert_element(empty, number, _I32(0))
    return builder.shuffle_vector(first, empty, _constant(ir.VectorType(_I32, lanes), 0))


def _data(context: Any, builder: Any, array_type: Any, values: Any) -> Any:
    return context.make_array(array_type)(context, builder, values).data


def _load(builder: Any, vector: Any, data: Any, start: Any) -> Any:
    elements = builder.load(builder.bitcast(builder.gep(data, [start]), vector.as_pointer()))
    elements.align = 4
    return elements


def _store(builder: Any, elements: Any, data: Any, start: Any) -> None:
    builder.store(elements, builder.bitcast(builder.gep(data, [start]), elements.type.as_pointer())).align = 4


def _call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """An intrinsic function of LLVM."""
    signature = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, f"llvm.{name}"), arguments)


def _maximum(builder: Any, first: Any, second: Any) -> Any:
    return builder.select(builder.icmp_signed(">", first, second), first, second)


def _ordered(builder: Any, scores: Any) -> Any:
    """Integers ordered like the scores: sign and magnitude to two's complement; + 0.0 drops -0.0."""
    bits = builder.bitcast(builder.fadd(scores, _constant(_F32x16, 0.0)), _I32x16)
    sign = builder.ashr(bits, _constant(_I32x16, 31))
    return builder.xor(bits, builder.and_(sign, _constant(_I32x16, 0x7FFFFFFF)))


def _append(context: Any, builder: Any, chosen: Any, columns: Any, count: Any) -> Any:
    """Appends the chosen lanes of some vectors to arrays, and returns the new count.

    Args:
        chosen: masks of sixteen lanes, four at most.
        columns: for each array its vectors, as many as masks, and its data.
        count: how many elements the arrays hold; anything may be written to as many as there are lanes behind.
    """
    masks = [builder.zext(builder.bitcast(mask, _I16), _I64) for mask in chosen]
    if "+avx512f" not in context.codegen().magic_tuple()[2]:
        return _append_one_by_one(builder, masks, columns, count)
    for number, mask in enumerate(masks):
        for vectors, data in columns:
            operands = vectors[number], chosen[number], ir.Constant(_I32x16, ir.Undefined)
            _store(builder, _call(builder, "experimental.vector.compress.v16i32", _I32x16, *operands), data, count)
        count = builder.add(count, builder.ctpop(mask))
    return count


def _append_one_by_one(builder: Any, masks: Any, columns: Any, count: Any) -> Any:
    """The same without an instruction that packs: by way of memory, from one bit of the masks to the next."""
    copies = []
    for vectors, _ in columns:
        copies.append(cgutils.alloca_once(builder, ir.ArrayType(_I32, 64)))
        for number, vector in enumerate(vectors):
            _store(builder, vector, builder.bitcast(copies[-1], _I32.as_pointer()), _I64(16 * number))
    bits = _I64(0)
    for number, mask in enumerate(masks):
        bits = builder.or_(bits, builder.shl(mask, _I64(16 * number)))
    left = cgutils.alloca_once(builder, _I64)
    builder.store(bits, left)
    found = builder.ctpop(bits)
    with cgutils.for_range(builder, found) as loop:
        lane = builder.cttz(builder.load(left), _I1(1))
        builder.store(builder.and_(builder.load(left), builder.sub(builder.load(left), _I64(1))), left)
        for copy, (_, data) in zip(copies, columns, strict=True):
            element = builder.load(builder.gep(copy, [_I64(0), lane]))
            builder.store(element, builder.gep(data, [builder.add(count, loop.index)]))
    return builder.add(count, found)


@intrinsic
def order_with_maxima(
    _: Any, scores: Any, first: Any, size: Any, stride: Any, column: Any, numbers: Any, maxima: Any
) -> Any:
    """Orders 64 columns of the `size` scores from `first` on, seen as rows of `stride`, and takes their maxima.

    Writes numbers[row * stride + column : ... + 64] for every row, integers ordered like the scores, and
    maxima[column : column + 64].
    """

    def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        _, first, size, stride, column, *_ = arguments
        arrays = ((scores, 0), (numbers, 5), (maxima, 6))
        source, target, tops = (_data(context, builder, kind, arguments[i]) for kind, i in arrays)
        highest = [cgutils.alloca_once(builder, _I32x16) for _ in range(4)]
        for top in highest:
            builder.store(_constant(_I32x16, -(1 << 31)), top)
        with cgutils.for_range_slice(builder, column, size, stride, intp=_I64) as (row, _):
            for lane, top in zip(range(0, 64, 16), highest, strict=True):
                place = builder.add(row, _I64(lane))
                ordered = _ordered(builder, _load(builder, _F32x16, source, builder.add(first, place)))
                _store(builder, ordered, target, place)
                builder.store(_maximum(builder, ordered, builder.load(top)), top)
        for lane, top in zip(range(0, 64, 16), highest, strict=True):
            _store(builder, builder.load(top), tops, builder.add(column, _I64(lane)))
        return context.get_dummy_value()

    return types.void(scores, types.intp, types.intp, types.intp, types.intp, numbers, maxima), codegen


def _counted(builder: Any, vectors: Any, data: Any, count: Any, comparison: str) -> Any:
    """How many of data[:count] compare so with each lane of some vectors, which stay in registers."""
    totals = [cgutils.alloca_once(builder, _I32x8) for _ in vectors]
    for total in totals:
        builder.store(_constant(_I32x8, 0), total)
    with cgutils.for_range(builder, count) as loop:
        other = _spread(builder, builder.load(builder.gep(data, [loop.index])), 8)
        for elements, total in zip(vectors, totals, strict=True):
            found = builder.zext(builder.icmp_signed(comparison, other, elements), _I32x8)
            builder.store(builder.add(builder.load(total), found), total)
    return [builder.load(total) for total in totals]


@intrinsic
def reached_by(_: Any, values: Any, size: Any, least: Any) -> Any:
    """The highest of a sample, values[:16], that at least `least` of values[:size] reach; else the lowest integer."""

    def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        data = _data(context, builder, values, arguments[0])
        sample = [_load(builder, _I32x8, data, _I64(lane)) for lane in range(0, 16, 8)]
        least = _spread(builder, builder.trunc(arguments[2], _I32), 8)
        highest = lowest = _constant(_I32x8, -(1 << 31))
        for elements, count in zip(sample, _counted(builder, sample, data, arguments[1], ">="), strict=True):
            reached = builder.select(builder.icmp_signed(">=", count, least), elements, lowest)
            highest = _maximum(builder, reached, highest)
        return _call(builder, "vector.reduce.smax.v8i32", _I32, highest)

    return types.int32(values, types.intp, types.intp), codegen


@intrinsic
def append_at_least(_: Any, values: Any, start: Any, bound: Any, numbers: Any, indices: Any, count: Any) -> Any:
    """Appends those of values[start : start + 64] that are >= bound, and their indices; returns the new count.

    Writes anything to the 64 elements from `count` on that it does not need.
    """

    def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        _, start, bound, *_, count = arguments
        arrays = ((values, 0), (numbers, 3), (indices, 4))
        source, target, places = (_data(context, builder, kind, arguments[i]) for kind, i in arrays)
        bound, lanes = _spread(builder, bound), ir.Constant(_I32x16, list(range(16)))
        begins = [builder.add(start, _I64(lane)) for lane in range(0, 64, 16)]
        elements = [_load(builder, _I32x16, source, begin) for begin in begins]
        index = [builder.add(lanes, _spread(builder, builder.trunc(begin, _I32))) for begin in begins]
        chosen = [builder.icmp_signed(">=", part, bound) for part in elements]
        return _append(context, builder, chosen, ((elements, target), (index, places)), count)

    return types.int64(values, types.intp, types.int32, numbers, indices, types.intp), codegen


@intrinsic
def append_sums_at_least(
    _: Any, scores: Any, parts: Any, start: Any, size: Any, score: Any, part: Any, bound: Any,
    numbers: Any, indices: Any, count: Any,
) -> Any:  # fmt: skip
    """Appends those sums scores[start : start + min(size, 16)] + score that are >= bound, as ordered integers, and
    the sums parts[...] + part; returns the new count.

    Reads and writes 16 elements in any case.
    """

    def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        _, _, start, size, score, part, bound, *_, count = arguments
        arrays = ((scores, 0), (parts, 1), (numbers, 7), (indices, 8))
        source, offsets, target, places = (_data(context, builder, kind, arguments[i]) for kind, i in arrays)
        sums = _ordered(builder, builder.fadd(_load(builder, _F32x16, source, start), _spread(builder, score)))
        index = builder.add(_load(builder, _I32x16, offsets, start), _spread(builder, part))
        lanes = ir.Constant(_I32x16, list(range(16)))
        inside = builder.icmp_signed("<", lanes, _spread(builder, builder.trunc(size, _I32)))
        chosen = builder.and_(inside, builder.icmp_signed(">=", sums, _spread(builder, bound)))
        return _append(context, builder, [chosen], (([sums], target), ([index], places)), count)

    numbers_in = (types.intp, types.intp, types.float32, types.int32, types.int32)
    return types.int64(scores, parts, *numbers_in, numbers, indices, types.intp), codegen


def _ranking(lanes: int) -> Any:
    @intrinsic
    def rank(_: Any, values: Any, count: Any, start: Any, ranks: Any) -> Any:
        """Writes ranks[start : start + lanes], how many of values[:count] are above values[start], ...; their sum."""

        def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            data, target = _data(context, builder, values, arguments[0]), _data(context, builder, ranks, arguments[3])
            places = [builder.add(arguments[2], _I64(lane)) for lane in range(0, lanes, 8)]
            vectors = [_load(builder, _I32x8, data, place) for place in places]
            total = _constant(_I32x8, 0)
            for above, place in zip(_counted(builder, vectors, data, arguments[1], ">"), places, strict=True):
                _store(builder, above, target, place)
                total = builder.add(total, above)
            return builder.zext(_call(builder, "vector.reduce.add.v8i32", _I32, total), _I64)

        return types.int64(values, types.intp, types.intp, ranks), codegen

    return rank


_rank_16, _rank_48 = _ranking(16), _ranking(48)


@inlined
def rank_all(values: Any, count: Any, ranks: Any) -> Any:
    """Writes how many of the integers values[:count] are above each, and returns the sum; count is a multiple of 16."""
    start = total = 0
    while count - start >= 48:
        total += _rank_48(values, count, start, ranks)
        start += 48
    while start < count:
        total += _rank_16(values, count, start, ranks)
        start += 16
    return total


@intrinsic
def float_at(_: Any, numbers: Any, place: Any) -> Any:
    """The fp32 number that stands from byte `place` of an array of bytes on."""

    def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        at = builder.gep(_data(context, builder, numbers, arguments[0]), [arguments[1]])
        found = builder.load(builder.bitcast(at, ir.FloatType().as_pointer()))
        found.align = 4
        return found

    return types.float32(numbers, types.intp), codegen


def _prefetch(builder: Any, data: Any, place: Any) -> None:
    """Asks for the cache line that holds a byte: to read, into the nearest cache."""
    how = (_I32(0), _I32(3), _I32(1))
    _call(builder, "prefetch.p0i8", ir.VoidType(), builder.bitcast(builder.gep(data, [place]), _I8.as_pointer()), *how)


@intrinsic
def prefetch_row(_: Any, table: Any, row: Any, most: Any) -> Any:
    """Asks for the cache lines of table[row], a contiguous array, up to `most` bytes: what follows comes by itself."""

    def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        values, row, most = arguments
        array = context.make_array(table)(context, builder, values)
        row_bytes = builder.extract_value(array.strides, 0)
        begin = builder.mul(row, row_bytes)
        asked = builder.select(builder.icmp_signed("<", row_bytes, most), row_bytes, most)
        end, data = builder.add(begin, asked), builder.bitcast(array.data, _I8.as_pointer())
        with cgutils.for_range_slice(builder, begin, end, _I64(64), intp=_I64) as (place, _):
            _prefetch(builder, data, place)
        _prefetch(builder, data, builder.sub(end, _I64(1)))
        return context.get_dummy_value()

    return types.void(table, types.intp, types.intp), codegen


def _adding(bits: int) -> Any:
    @intrinsic
    def add_rows(_: Any, rows: Any, starts: Any, later: Any, factors: Any, total: Any, size: Any) -> Any:
        """Adds to `total` the codes rows[start : start + size] of eight rows, each times its factor.

        Asks for as many codes of the eight rows that come `later`, and for the four bytes behind.
        """

        def codegen(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            kinds = (rows, starts, later, factors, total)
            data = [_data(context, builder, kind, arguments[i]) for i, kind in enumerate(kinds)]
            eights = [[builder.load(builder.gep(each, [_I64(row)])) for row in range(8)] for each in data[1:4]]
            codes, sums, size = data[0], data[4], arguments[5]
            begins, next_begins, times = eights
            times = [_spread(builder, factor) for factor in times]

            def add_sixteen(place: Any) -> None:
                targets = [place] if bits == 8 else [place, builder.add(size, place)]
                sixteens = [_load(builder, _F32x16, sums, target) for target in targets]
                for begin, factor in zip(begins, times, strict=True):
                    read = _load(builder, _I8x16, codes, builder.add(begin, place))
                    read.align = 1
                    parts = [builder.sext(read, _I32x16)]
                    if bits == 4:
                        low = builder.ashr(builder.shl(parts[0], _constant(_I32x16, 28)), _constant(_I32x16, 28))
                        parts = [low, builder.ashr(parts[0], _constant(_I32x16, 4))]
                    for i, part in enumerate(parts):
                        numbers = builder.sitofp(part, _F32x16)
                        sixteens[i] = _call(builder, "fmuladd.v16f32", _F32x16, factor, numbers, sixteens[i])
                for target, sixteen in zip(targets, sixteens, strict=True):
                    _store(builder, sixteen, sums, target)

            for begin in next_begins:
                _prefetch(builder, codes, builder.add(begin, builder.add(size, _I64(3))))
            lines = builder.and_(size, _I64(-64))
            with cgutils.for_range_slice(builder, _I64(0), lines, _I64(64), intp=_I64) as (line, _):
                for begin in next_begins:
                    _prefetch(builder, codes, builder.add(begin, line))
                for lane in range(0, 64, 16):
                    add_sixteen(builder.add(line, _I64(lane)))
            with cgutils.for_range_slice(builder, lines, size, _I64(16), intp=_I64) as (place, _):
                add_sixteen(place)
            return context.get_dummy_value()

        return types.void(rows, starts, later, factors, total, types.intp), codegen

    return add_rows


add_int8_rows, add_int4_rows = _adding(8), _adding(4)
