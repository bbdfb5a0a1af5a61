"""What does a sum of rows in 8 or 4 bits cost, next to the sum of the same rows in fp32 and to a pure read of each?

    python benchmarks/packed_rows.py          # 2,048 tokens, 128 reads, width 512; 262 thousand and 4 million slots, 12 GB

Slots are drawn evenly, so nearly every row comes from memory. The rows of all three forms are read by their own operator;
a pure read loads the same bytes, row by row, and computes next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

import harness
from floor import GRAIN_ELEMENTS, kernel, readers
from harness import Options, Report, check_same, interleave
from pkmem import ops
from pkmem.layer.huge_pages import prefer_huge_pages
from pkmem.ops.cpu.threads import run_over
from pkmem.ops.packing import BITS, pack_rows, row_bytes

WIDTH, TOKENS, READS = 512, 2048, 128
SLOTS = (1 << 18, 1 << 22)


@kernel
def read_8_words(table, slots, sums, first, last):
    """Mixes the words of rows[first:last], eight rows at a time."""
    width = table.shape[1]
    for token in range(first, last):
        row = slots[token]
        total = np.int32(0)
        for read in range(0, len(row) - 7, 8):
            row0, row1, row2, row3 = table[row[read]], table[row[read + 1]], table[row[read + 2]], table[row[read + 3]]
            row4, row5 = table[row[read + 4]], table[row[read + 5]]
            row6, row7 = table[row[read + 6]], table[row[read + 7]]
            for column in range(width):
                total ^= ((row0[column] ^ row1[column]) ^ (row2[column] ^ row3[column])) ^ (
                    (row4[column] ^ row5[column]) ^ (row6[column] ^ row7[column])
                )
        for read in range(len(row) - len(row) % 8, len(row)):
            for column in range(width):
                total ^= table[row[read], column]
        sums[token] = total


@kernel
def read_16_words(table, slots, sums, first, last):
    """The same, sixteen rows at a time."""
    width = table.shape[1]
    for token in range(first, last):
        row = slots[token]
        total = np.int32(0)
        for read in range(0, len(row) - 15, 16):
            row0, row1, row2, row3 = table[row[read]], table[row[read + 1]], table[row[read + 2]], table[row[read + 3]]
            row4, row5 = table[row[read + 4]], table[row[read + 5]]
            row6, row7 = table[row[read + 6]], table[row[read + 7]]
            row8, row9 = table[row[read + 8]], table[row[read + 9]]
            row10, row11 = table[row[read + 10]], table[row[read + 11]]
            row12, row13 = table[row[read + 12]], table[row[read + 13]]
            row14, row15 = table[row[read + 14]], table[row[read + 15]]
            for column in range(width):
                total ^= ((row0[column] ^ row1[column]) ^ (row2[column] ^ row3[column])) ^ (
                    (row4[column] ^ row5[column]) ^ (row6[column] ^ row7[column])
                )
                total ^= ((row8[column] ^ row9[column]) ^ (row10[column] ^ row11[column])) ^ (
                    (row12[column] ^ row13[column]) ^ (row14[column] ^ row15[column])
                )
        for read in range(len(row) - len(row) % 16, len(row)):
            for column in range(width):
                total ^= table[row[read], column]
        sums[token] = total


def main() -> None:
    """Measures both sizes and writes packed_rows.json and packed_rows.md."""
    options = harness.start(__doc__, repeats=21)
    report = Report("packed_rows", options)
    for num_slots in (64,) if options.smoke else SLOTS:
        sums(report, options, num_slots, *((16, 8, 24) if options.smoke else (TOKENS, READS, WIDTH)))
    report.note("pure read: the fastest of several loops that load the same rows and compute next to nothing")
    report.write()


def sums(report: Report, options: Options, num_slots: int, tokens: int, reads: int, width: int) -> None:
    """The three forms of a table of one size, in turns."""
    values = prefer_huge_pages(torch.empty(num_slots, width)).normal_()
    packed = {
        bits: prefer_huge_pages(torch.empty(num_slots, row_bytes(width, bits), dtype=torch.uint8)) for bits in BITS
    }
    for bits, rows in packed.items():
        for some, target in zip(values.split(1 << 16), rows.split(1 << 16), strict=True):
            target.copy_(pack_rows(some, bits))
    slots, weights = torch.randint(num_slots, (tokens, reads)), torch.rand(tokens, reads)
    contenders: dict[str, Callable[[], object]] = {"fp32": partial(ops.weighted_sum, values, slots, weights)}
    floors = {"fp32": readers(values, slots)}
    for bits, rows in packed.items():
        run = partial(ops.packed_sum, rows, slots, weights, width, bits)
        check_same(f"int{bits}", run(), ops.packed_sum(rows, slots, weights, width, bits, backend="reference"))
        contenders[f"int{bits}"], floors[f"int{bits}"] = run, word_readers(rows, slots, width)
    contenders |= {f"{form}, {name}": read for form, group in floors.items() for name, read in group.items()}
    with torch.no_grad():
        timings = interleave(contenders, options.repeats)
    case = f"{num_slots:,} slots x {width}"
    report.keep(case, timings)
    for form in floors:
        if form != "fp32":
            report.add(f"{case}: fp32 / {form}", timings.ratio("fp32", form))
    for form, group in floors.items():
        fastest = timings.fastest(f"{form}, {name}" for name in group)
        report.add(f"{case}: {form} / pure read of the same rows", timings.ratio(form, fastest))


def word_readers(rows: Tensor, slots: Tensor, width: int) -> dict[str, Callable[[], None]]:
    """Every pure read of packed rows."""
    found = np.empty(len(slots), np.int32)
    arrays = (rows.view(torch.int32).numpy(), slots.numpy(), found)
    grain = 1 + GRAIN_ELEMENTS // (1 + slots.shape[1] * width)
    loops = {"8 rows at once": read_8_words, "16 rows at once": read_16_words}
    return {name: partial(run_over, loop, arrays, len(slots), grain) for name, loop in loops.items()}


if __name__ == "__main__":
    main()
