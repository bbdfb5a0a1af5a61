"""How large the examples of the checks are: each number of interest at least once, not all with all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

_OTHER = 37  # different queries, of which a large example has many copies


class Selection(NamedTuple):
    """The knn best of `num_sub_keys` ** 2 slots for some tokens and heads; a sub-key has `half` numbers."""

    num_tokens: int
    heads: int
    half: int
    num_sub_keys: int
    knn: int


class Reading(NamedTuple):
    """`reads` rows of a table, read by each of some tokens."""

    num_rows: int
    width: int
    num_tokens: int
    reads: int


@dataclass(frozen=True)
class Sizes:
    """The examples of all checks.

    Args:
        selections: for integers, whose results are compared bit for bit.
        random_selections: for numbers with rounding errors.
        crowded: where most sub-keys tie.
        different: queries that differ, of which an example has copies if it has more tokens.
        readings: for sums and their gradients.
        hot_reads: reads of one row.
        step: a training step, for repeats, settings and graphs; its table has a row for each slot.
        step_width: of its table.
        race, race_width: a training step as usual as the device's memory and a minute allow, for the race.
        repeats: how often it is repeated.
        turns: of the race with the reference.
    """

    selections: tuple[Selection, ...]
    random_selections: tuple[Selection, ...]
    crowded: tuple[Selection, ...]
    different: int
    readings: tuple[Reading, ...]
    hot_reads: int
    step: Selection
    step_width: int
    race: Selection
    race_width: int
    repeats: int = 10
    turns: int = 9


def sizes_for(backend: str, device: torch.device) -> Sizes:
    """Those that a backend on a device gets through in a minute or two; a CPU in seconds."""
    if device.type != "cpu":
        return ON_A_GPU
    return INTERPRETED if backend == "triton" else ON_A_CPU


ON_A_GPU = Sizes(
    selections=(
        Selection(0, 2, 64, 200, 5),
        Selection(1, 2, 64, 200, 32),
        Selection(8, 4, 256, 1024, 32),
        Selection(17, 3, 5, 5, 5),
        Selection(17, 1, 300, 1024, 64),
        Selection(128, 2, 200, 200, 1),
        Selection(128, 4, 64, 1024, 5),
        Selection(4099, 1, 64, 1024, 64),
        Selection(4099, 2, 300, 200, 5),
        Selection(4099, 4, 256, 1024, 32),
        Selection(16 << 10, 4, 256, 1024, 32),
        Selection(16 << 10, 2, 128, 512, 32),
        Selection(16 << 10, 1, 200, 1024, 1),
    ),
    random_selections=(
        Selection(8, 2, 64, 1024, 32),
        Selection(128, 2, 256, 200, 5),
        Selection(4099, 4, 256, 1024, 32),
        Selection(4099, 2, 300, 200, 64),
        Selection(16 << 10, 1, 64, 1024, 1),
    ),
    crowded=(Selection(17, 1, 64, 200, 5), Selection(4099, 4, 256, 1024, 32), Selection(4099, 2, 300, 1024, 64)),
    different=_OTHER,
    readings=(
        Reading(53, 1, 17, 5),
        Reading(40_000, 37, 300, 128),
        Reading(40_000, 768, 300, 32),
        Reading(40_000, 1024, 700, 128),
        Reading(1000, 1100, 3, 40),
        Reading(11, 3, 4, 0),
        Reading(11, 768, 0, 4),
    ),
    hot_reads=1300,
    step=Selection(4099, 4, 256, 512, 32),
    step_width=512,
    race=Selection(8192, 4, 256, 512, 32),
    race_width=1024,
)

ON_A_CPU = Sizes(
    selections=(
        Selection(0, 2, 64, 200, 5),
        Selection(1, 2, 64, 200, 32),
        Selection(8, 2, 256, 300, 32),
        Selection(17, 3, 5, 5, 5),
        Selection(17, 1, 300, 200, 64),
        Selection(128, 2, 200, 200, 1),
        Selection(1031, 2, 64, 256, 32),
    ),
    random_selections=(Selection(8, 1, 64, 512, 32), Selection(128, 2, 256, 200, 5), Selection(300, 1, 300, 200, 64)),
    crowded=(Selection(17, 1, 64, 200, 5), Selection(300, 2, 256, 256, 32)),
    different=8,
    readings=(
        Reading(53, 1, 17, 5),
        Reading(400, 37, 100, 128),
        Reading(400, 768, 17, 32),
        Reading(400, 1024, 33, 64),
        Reading(200, 1100, 3, 40),
        Reading(11, 3, 4, 0),
        Reading(11, 768, 0, 4),
    ),
    hot_reads=700,
    step=Selection(300, 2, 64, 64, 32),
    step_width=96,
    race=Selection(256, 2, 64, 128, 32),
    race_width=128,
    turns=5,
)

INTERPRETED = Sizes(
    selections=(
        Selection(0, 2, 3, 7, 3),
        Selection(3, 2, 3, 7, 3),
        Selection(2, 1, 5, 130, 5),
        Selection(17, 1, 1, 6, 1),
        Selection(2, 1, 70, 5, 5),
        Selection(2, 1, 1, 1, 1),
        Selection(1, 1, 1, 30, 20),
    ),
    random_selections=(Selection(5, 2, 7, 19, 4), Selection(2, 1, 70, 70, 9)),
    crowded=(Selection(12, 1, 5, 130, 5),),
    different=9,
    readings=(
        Reading(53, 7, 29, 5),
        Reading(3, 17, 9, 40),
        Reading(20, 1100, 3, 9),
        Reading(20, 768, 2, 3),
        Reading(11, 1, 9, 3),
        Reading(11, 3, 0, 4),
        Reading(11, 3, 6, 0),
    ),
    hot_reads=600,
    step=Selection(7, 1, 5, 19, 4),
    step_width=37,  # as updates have besides: interpreted, another width takes a minute
    race=Selection(7, 1, 5, 19, 4),
    race_width=19,
    repeats=2,
    turns=3,
)
