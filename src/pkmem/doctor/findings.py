"""What a check of a backend finds, and the eleven points that make a backend fit to be a default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

POINTS = {
    1: "integers with ties: slots and scores are those of brute force, bit for bit",
    2: "random numbers: slots in range, distinct, none worse than the best by more than rounding",
    3: "ties beyond all room, crowded tokens, zeros of either sign, NaN, infinity: neighbours keep their bits",
    4: "ten repeats give the same bits, beside other work too",
    5: "settings that let torch round matrix products (TF32) change no bit",
    6: "sums and gradients against fp64: odd widths, no reads, gaps in memory, a row with very many reads",
    7: "RowAdam against fp64: rounding by key, a scale that is not finite skips, unread rows keep their bits",
    8: "tables past 2^31 elements",
    9: "nothing waits for the device; capture and replay; torch.compile; every read is logged",
    10: "what was compiled: shared memory within the device's, hardly a spilled register, no TF32, no atomics",
    11: "no slower than the reference",
}
Outcome = Literal["passed", "failed", "not checked", "does not apply"]


@dataclass(frozen=True)
class Finding:
    """What one check of a backend found.

    Args:
        point: a key of `POINTS`.
        check: what was checked, in words.
        dtype: "fp32", "bf16" or "fp16"; "" where the check is about none of them.
        shapes: "usual", or "huge" for tables past 2^31 elements.
        outcome: "not checked" leaves the point open; "does not apply" is of no concern on this device.
        note: what is wrong, why it was not checked, or what was seen.
    """

    point: int
    check: str
    dtype: str
    shapes: Literal["usual", "huge"]
    outcome: Outcome
    note: str = ""
