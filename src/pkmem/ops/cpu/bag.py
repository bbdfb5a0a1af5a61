"""The weighted sum of rows and its gradient in the weights.

Rows of a large table come from memory at random: what bounds the speed is how many are on their way at once,
so both kernels walk along eight rows together.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pkmem.ops import reference
from pkmem.ops.cpu.threads import run_over
from pkmem.ops.cpu.vectors import array, kernel, narrow, widen

_GRAIN_ELEMENTS = 1 << 18  # read in about 50 us


def weighted_sum(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """Sums of weighted rows (eq. 3), see `pkmem.ops.weighted_sum`."""
    if values.dtype == torch.float64:
        return reference.weighted_sum(values, slots, weights)
    summed = values.new_empty(slots.shape[0], values.shape[1])
    arguments = (array(values), array(slots), array(weights.to(torch.float32)), array(summed))
    run_over(sum_rows, arguments, slots.shape[0], _tokens_per_grain(values, slots))
    return summed


def weighted_sum_grad_weights(values: Tensor, slots: Tensor, grad_output: Tensor) -> Tensor:
    """d(weights) (n, b): inner product of each row read with what came back, fp32 (fp64 for fp64)."""
    if values.dtype == torch.float64:
        return reference.weighted_sum_grad_weights(values, slots, grad_output)
    grad_weights = values.new_empty(slots.shape, dtype=torch.float32)
    arguments = (array(values), array(slots), array(grad_output.to(torch.float32)), array(grad_weights))
    run_over(dot_rows, arguments, slots.shape[0], _tokens_per_grain(values, slots))
    return grad_weights


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
def dot_rows(values, slots, grad_output, grad_weights, first, last):  # type: ignore[no-untyped-def]
    """Writes grad_weights[first:last]."""
    reads, width = slots.shape[1], values.shape[1]
    zero = np.float32(0)
    for token in range(first, last):
        row, back = slots[token], grad_output[token]
        together = reads - reads % 8
        for read in range(0, together, 8):
            row0, row1 = values[row[read]], values[row[read + 1]]
            row2, row3 = values[row[read + 2]], values[row[read + 3]]
            row4, row5 = values[row[read + 4]], values[row[read + 5]]
            row6, row7 = values[row[read + 6]], values[row[read + 7]]
            dot0 = dot1 = dot2 = dot3 = dot4 = dot5 = dot6 = dot7 = zero
            for column in range(width):
                dot0 += widen(row0[column]) * back[column]
                dot1 += widen(row1[column]) * back[column]
                dot2 += widen(row2[column]) * back[column]
                dot3 += widen(row3[column]) * back[column]
                dot4 += widen(row4[column]) * back[column]
                dot5 += widen(row5[column]) * back[column]
                dot6 += widen(row6[column]) * back[column]
                dot7 += widen(row7[column]) * back[column]
            grad_weights[token, read] = dot0
            grad_weights[token, read + 1] = dot1
            grad_weights[token, read + 2] = dot2
            grad_weights[token, read + 3] = dot3
            grad_weights[token, read + 4] = dot4
            grad_weights[token, read + 5] = dot5
            grad_weights[token, read + 6] = dot6
            grad_weights[token, read + 7] = dot7
        for read in range(together, reads):
            row0 = values[row[read]]
            dot0 = zero
            for column in range(width):
                dot0 += widen(row0[column]) * back[column]
            grad_weights[token, read] = dot0
