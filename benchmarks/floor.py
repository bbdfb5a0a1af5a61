"""The least a memory could cost on this machine: its matrix products and the bytes of its rows, at measured speeds.

Every part is a contender of the same run, so a floor is as fast or slow as the machine is at that moment:

    forward       = query product + score product + read of the rows
    training step = forward + 2 query products + 2 knn / s score products (only chosen sub-keys have a gradient)
                    + read of the rows again, for d(weights)
                    + one read of grad_output per read of the table
                    + update of the touched rows: values and two moments, read and written, rows in ascending order;
                      the values alone, where one second moment a row is all that is kept

Left out: selection, softmax, norm, sorting, clipping, all arithmetic on rows. The products are torch's; reads and updates
are the fastest of the loops below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from harness import Timings, interleave
from pkmem.layer.config import MemoryConfig
from pkmem.layer.memory import ProductKeyMemory
from pkmem.ops.cpu.threads import run_over

QUERY, SCORES, READ, READ_BACK, UPDATE = "query product", "score product", "row read", "grad_output read", "row update"
UPDATE_ALONE = "row update without moments"
GRAIN_ELEMENTS = 1 << 18
kernel = njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract", "reassoc"})


# --- pure reads: everything is loaded, next to nothing computed -----------------------------------------


@kernel
def read_4_rows(table, slots, sums, first, last):
    """Adds up rows[first:last], four at a time."""
    width = table.shape[1]
    for token in range(first, last):
        row = slots[token]
        total = np.float32(0)
        for read in range(0, len(row) - 3, 4):
            row0, row1, row2, row3 = table[row[read]], table[row[read + 1]], table[row[read + 2]], table[row[read + 3]]
            for column in range(width):
                total += (row0[column] + row1[column]) + (row2[column] + row3[column])
        for read in range(len(row) - len(row) % 4, len(row)):
            for column in range(width):
                total += table[row[read], column]
        sums[token] = total


@kernel
def read_8_rows(table, slots, sums, first, last):
    """Adds up rows[first:last], eight at a time."""
    width = table.shape[1]
    for token in range(first, last):
        row = slots[token]
        total = np.float32(0)
        for read in range(0, len(row) - 7, 8):
            row0, row1, row2, row3 = table[row[read]], table[row[read + 1]], table[row[read + 2]], table[row[read + 3]]
            row4, row5 = table[row[read + 4]], table[row[read + 5]]
            row6, row7 = table[row[read + 6]], table[row[read + 7]]
            for column in range(width):
                total += ((row0[column] + row1[column]) + (row2[column] + row3[column])) + (
                    (row4[column] + row5[column]) + (row6[column] + row7[column])
                )
        for read in range(len(row) - len(row) % 8, len(row)):
            for column in range(width):
                total += table[row[read], column]
        sums[token] = total


@kernel
def read_16_rows(table, slots, sums, first, last):
    """Adds up rows[first:last], sixteen at a time."""
    width = table.shape[1]
    for token in range(first, last):
        row = slots[token]
        total = np.float32(0)
        for read in range(0, len(row) - 15, 16):
            row0, row1, row2, row3 = table[row[read]], table[row[read + 1]], table[row[read + 2]], table[row[read + 3]]
            row4, row5 = table[row[read + 4]], table[row[read + 5]]
            row6, row7 = table[row[read + 6]], table[row[read + 7]]
            row8, row9 = table[row[read + 8]], table[row[read + 9]]
            row10, row11 = table[row[read + 10]], table[row[read + 11]]
            row12, row13 = table[row[read + 12]], table[row[read + 13]]
            row14, row15 = table[row[read + 14]], table[row[read + 15]]
            for column in range(width):
                total += ((row0[column] + row1[column]) + (row2[column] + row3[column])) + (
                    (row4[column] + row5[column]) + (row6[column] + row7[column])
                )
                total += ((row8[column] + row9[column]) + (row10[column] + row11[column])) + (
                    (row12[column] + row13[column]) + (row14[column] + row15[column])
                )
        for read in range(len(row) - len(row) % 16, len(row)):
            for column in range(width):
                total += table[row[read], column]
        sums[token] = total


# Tried and slower: software prefetch of the next eight rows, and loading one element of each cache line.
READERS = {"4 rows at once": read_4_rows, "8 rows at once": read_8_rows, "16 rows at once": read_16_rows}


def readers(table: Tensor, slots: Tensor) -> dict[str, Callable[[], None]]:
    """Every pure read of table[slots], slots (n, b)."""
    sums = np.empty(len(slots), np.float32)
    grain = 1 + GRAIN_ELEMENTS // (1 + slots.shape[1] * table.shape[1])
    arrays = (table.detach().numpy(), slots.numpy(), sums)
    return {name: partial(run_over, reader, arrays, len(slots), grain) for name, reader in READERS.items()}


# --- updates: rows of values and two moments, or of values alone, are read and written back as they were ---


@kernel
def update_1_row(values, moments1, moments2, rows, one, first, last):
    """Reads and writes rows[first:last] of three tables, a row at a time."""
    for touched in range(first, last):
        row = rows[touched]
        value, moment1, moment2 = values[row], moments1[row], moments2[row]
        for column in range(len(value)):
            value[column] *= one
            moment1[column] *= one
            moment2[column] *= one


@kernel
def update_2_rows(values, moments1, moments2, rows, one, first, last):
    """The same, two rows at a time."""
    for touched in range(first, last - 1, 2):
        row0, row1 = rows[touched], rows[touched + 1]
        value0, moment10, moment20 = values[row0], moments1[row0], moments2[row0]
        value1, moment11, moment21 = values[row1], moments1[row1], moments2[row1]
        for column in range(len(value0)):
            value0[column] *= one
            value1[column] *= one
            moment10[column] *= one
            moment11[column] *= one
            moment20[column] *= one
            moment21[column] *= one
    if (last - first) % 2:
        update_1_row(values, moments1, moments2, rows, one, last - 1, last)


@kernel
def update_1_row_alone(values, rows, one, first, last):
    """Reads and writes rows[first:last] of one table, a row at a time."""
    for touched in range(first, last):
        value = values[rows[touched]]
        for column in range(len(value)):
            value[column] *= one


@kernel
def update_4_rows_alone(values, rows, one, first, last):
    """The same, four rows at a time."""
    for touched in range(first, last - 3, 4):
        value0, value1 = values[rows[touched]], values[rows[touched + 1]]
        value2, value3 = values[rows[touched + 2]], values[rows[touched + 3]]
        for column in range(len(value0)):
            value0[column] *= one
            value1[column] *= one
            value2[column] *= one
            value3[column] *= one
    update_1_row_alone(values, rows, one, last - (last - first) % 4, last)


UPDATERS = {"1 row at once": update_1_row, "2 rows at once": update_2_rows}
ALONE = {"1 row at once": update_1_row_alone, "4 rows at once": update_4_rows_alone}


def updaters(values: Tensor, moments: dict[str, Tensor], rows: Tensor) -> dict[str, Callable[[], None]]:
    """Every plain update of the rows (u,), which ascend, with the two moments or without any."""
    tables = [tensor.detach().numpy() for tensor in (values, *moments.values())]
    arguments = (*tables, rows.numpy(), np.float32(1))
    grain = 1 + GRAIN_ELEMENTS // values.shape[1]
    kernels = UPDATERS if moments else ALONE
    return {name: partial(run_over, update, arguments, len(rows), grain) for name, update in kernels.items()}


# --- the floor of a layer -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Floor:
    """The parts of a floor, as contenders and as factors.

    Args:
        parts: to be timed with the contenders, `interleave(contenders | floor.parts, ...)`.
        factors: how often a forward or a training step needs each.
        work: per part its floating-point operations, or its bytes.
    """

    parts: dict[str, Callable[[], Any]]
    factors: dict[str, float]
    work: dict[str, float]

    def added_to(self, timings: Timings, name: str = "floor") -> Timings:
        """The timings and this floor as one more contender."""
        return timings.with_sum(name, self.factors)

    def rates(self, timings: Timings) -> dict[str, float]:
        """GFLOP/s of products and GB/s of reads and updates."""
        return {part: work / timings.median(part) / 1e9 for part, work in self.work.items() if part in timings.seconds}


def forward_floor(memory: ProductKeyMemory, x: Tensor) -> Floor:
    """The floor of memory(x)."""
    config, slots = memory.config, slots_read(memory, x)
    table = memory.values.weight
    parts = products(config, x.shape[0]) | {READ: fastest(readers(table, slots))}
    work = _flops(config, x.shape[0]) | {READ: slots.numel() * table.shape[1] * 4}
    return Floor(parts, dict.fromkeys(parts, 1.0), work)


def training_floor(memory: ProductKeyMemory, x: Tensor, grad_output: Tensor, moments: dict[str, Tensor]) -> Floor:
    """The floor of a training step, with the two moments or without any."""
    forward, slots = forward_floor(memory, x), slots_read(memory, x)
    rows = slots.unique()
    tokens = torch.arange(len(x)).repeat_interleave(slots.shape[1])[slots.flatten().argsort()].view_as(slots)
    update = UPDATE if moments else UPDATE_ALONE
    parts = forward.parts | {
        READ_BACK: fastest(readers(grad_output, tokens)),
        update: fastest(updaters(memory.values.weight, moments, rows)),
    }
    chosen = min(1.0, memory.config.knn / memory.config.num_sub_keys)
    factors = {QUERY: 3.0, SCORES: 1 + 2 * chosen, READ: 2.0, READ_BACK: 1.0, update: 1.0}
    width = grad_output.shape[1]
    work = {READ_BACK: slots.numel() * width * 4, update: len(rows) * width * 4 * 2 * (1 + len(moments))}
    return Floor(parts, factors, forward.work | work)


@torch.no_grad()
def slots_read(memory: ProductKeyMemory, x: Tensor) -> Tensor:
    """The rows memory(x) reads, (n, b)."""
    return memory.keys(memory.query(x))[0].flatten(1)


def products(config: MemoryConfig, num_tokens: int) -> dict[str, Callable[[], Any]]:
    """The two matrix products of a forward, at their shapes."""
    half = config.query_dim // 2
    x, weight = (
        torch.randn(num_tokens, config.bound_dim),
        torch.randn(config.bound_dim, config.heads * config.query_dim),
    )
    query, keys = (
        torch.randn(2 * config.heads, num_tokens, half),
        torch.randn(2 * config.heads, half, config.num_sub_keys),
    )
    out_query, out_scores = x @ weight, query @ keys
    return {
        QUERY: lambda: torch.mm(x, weight, out=out_query),
        SCORES: lambda: torch.bmm(query, keys, out=out_scores),
    }


def _flops(config: MemoryConfig, num_tokens: int) -> dict[str, float]:
    width = config.heads * config.query_dim
    return {
        QUERY: 2.0 * num_tokens * config.bound_dim * width,
        SCORES: 2.0 * num_tokens * width * config.num_sub_keys,
    }


def fastest(variants: dict[str, Callable[[], None]]) -> Callable[[], None]:
    """The fastest of several ways, in a short run of its own."""
    return variants[interleave(variants, 3).fastest(variants)]
