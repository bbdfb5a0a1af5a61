"""The weighted sum of rows, and the inner products with rows that are its gradient in the weights.

Rows of a large table come from memory at random: what bounds the speed is how many are on their way at once,
so both kernels walk along eight rows together.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pkmem.ops import reference
from pkmem.ops.cpu.halves import narrow, widen
from pkmem.ops.cpu.kernels import array, kernel
from pkmem.ops.cpu.threads import run_over

_GRAIN_ELEMENTS = 1 << 18  # read in about 50 us


def weighted_sum(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """See `Backend.weighted_sum`; fp64 goes to the reference."""
    if values.dtype == torch.float64:
        return reference.weighted_sum(values, slots, weights)
    summed = values.new_empty(slots.shape[0], values.shape[1])
    arguments = (array(values), array(slots), array(weights.to(torch.float32)), array(summed))
    run_over(sum_rows, arguments, slots.shape[0], _tokens_per_grain(values, slots))
    return summed


def row_products(table: Tensor, slots: Tensor, x: Tensor) -> Tensor:
    """See `Backend.row_products`; fp64 goes to the reference."""
    if table.dtype == torch.float64:
        return reference.row_products(table, slots, x)
    products = table.new_empty(slots.shape, dtype=torch.float32)
    arguments = (array(table), array(slots), array(x.to(torch.float32)), array(products))
    run_over(dot_rows, arguments, slots.shape[0], _tokens_per_grain(table, slots))
    return products


def _tokens_per_grain(values: Tensor, slots: Tensor) -> int:
    return 1 + _GRAIN_ELEMENTS // (1 + slots.shape[1] * values.shape[1])


@kernel
def sum_rows(values, slots, weights, summed, first, last):  # type: ignore[no-untyped-def]
    """Writes summed[first:last]."""
    reads, width = slots.shape[1], values.shape[1]
    total = np.empty(width, np.float32)
    for token in range(first, last):
        total[:] = 0
        row, weight = slots[token], weights[token]
        together = reads - reads % 8
        for read in range(0, together, 8):
            row0, weight0 = values[row[read]], weight[read]
            row1, weight1 = values[row[read + 1]], weight[read + 1]
            row2, weight2 = values[row[read + 2]], weight[read + 2]
            row3, weight3 = values[row[read + 3]], weight[read + 3]
            row4, weight4 = values[row[read + 4]], weight[read + 4]
            row5, weight5 = values[row[read + 5]], weight[read + 5]
            row6, weight6 = values[row[read + 6]], weight[read + 6]
            row7, weight7 = values[row[read + 7]], weight[read + 7]
            for column in range(width):
                total[column] += (
                    weight0 * widen(row0[column])
                    + weight1 * widen(row1[column])
                    + weight2 * widen(row2[column])
                    + weight3 * widen(row3[column])
                    + weight4 * widen(row4[column])
                    + weight5 * widen(row5[column])
                    + weight6 * widen(row6[column])
                    + weight7 * widen(row7[column])
                )
        for read in range(together, reads):
            row0, weight0 = values[row[read]], weight[read]
            for column in range(width):
                total[column] += weight0 * widen(row0[column])
        for column in range(width):
            summed[token, column] = narrow(total[column], summed[token, column])


@kernel
def dot_rows(table, slots, x, products, first, last):  # type: ignore[no-untyped-def]
    """Writes products[first:last]."""
    reads, width = slots.shape[1], table.shape[1]
    zero = np.float32(0)
    for token in range(first, last):
        row, wanted = slots[token], x[token]
        together = reads - reads % 8
        for read in range(0, together, 8):
            row0, row1 = table[row[read]], table[row[read + 1]]
            row2, row3 = table[row[read + 2]], table[row[read + 3]]
            row4, row5 = table[row[read + 4]], table[row[read + 5]]
            row6, row7 = table[row[read + 6]], table[row[read + 7]]
            dot0 = dot1 = dot2 = dot3 = dot4 = dot5 = dot6 = dot7 = zero
            for column in range(width):
                dot0 += widen(row0[column]) * wanted[column]
                dot1 += widen(row1[column]) * wanted[column]
                dot2 += widen(row2[column]) * wanted[column]
                dot3 += widen(row3[column]) * wanted[column]
                dot4 += widen(row4[column]) * wanted[column]
                dot5 += widen(row5[column]) * wanted[column]
                dot6 += widen(row6[column]) * wanted[column]
                dot7 += widen(row7[column]) * wanted[column]
            products[token, read] = dot0
            products[token, read + 1] = dot1
            products[token, read + 2] = dot2
            products[token, read + 3] = dot3
            products[token, read + 4] = dot4
            products[token, read + 5] = dot5
            products[token, read + 6] = dot6
            products[token, read + 7] = dot7
        for read in range(together, reads):
            row0 = table[row[read]]
            dot0 = zero
            for column in range(width):
                dot0 += widen(row0[column]) * wanted[column]
            products[token, read] = dot0
