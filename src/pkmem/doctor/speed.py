"""The race with the reference: point 11."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from pkmem.doctor.checks import Case, DoesNotApply, check
from pkmem.doctor.step import Step

_SECONDS_PER_TURN = 0.1  # a shorter call is repeated within its turn


@check(11, "time of reading and of a training step, in turns with the reference")
def race(case: Case) -> str:
    """The median of the ratios of the turns."""
    if case.backend == "reference":
        raise DoesNotApply("this is the reference")
    if case.device.type == "cpu" and case.backend == "triton":
        raise DoesNotApply("the interpreter is slow, and no measure of a GPU")
    size = case.sizes.race, case.sizes.race_width
    ours, theirs = Step(case, *size), Step(replace(case, backend="reference"), *size)
    slow, notes = [], []
    for what, call, other in (("reading", ours.read, theirs.read), ("a training step", ours.train, theirs.train)):
        ratio = median_ratio(call, other, case.sizes.turns, case.device)
        notes.append(f"{what} takes {ratio:.2f} of the reference's time")
        slow += [what] if ratio > 1 else []
    assert not slow, f"slower than the reference: {', '.join(notes)}"
    return ", ".join(notes)


def median_ratio(call: Callable[[], Any], other: Callable[[], Any], turns: int, device: torch.device) -> float:
    """Time of a call over that of another, the median of so many turns A B, B A, A B; a first call of each is not timed."""
    contenders = (call, other)
    for contender in contenders:
        contender()
    calls = [max(1, round(_SECONDS_PER_TURN / _seconds(contender, 1, device))) for contender in contenders]
    ratios = []
    for turn in range(turns):
        seconds = [0.0, 0.0]
        for number in (0, 1) if turn % 2 == 0 else (1, 0):
            seconds[number] = _seconds(contenders[number], calls[number], device)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


def _seconds(call: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Seconds per call of so many calls."""
    _wait_for(device)
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    _wait_for(device)
    return (time.perf_counter() - begin) / calls


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


CHECKS = (race,)
