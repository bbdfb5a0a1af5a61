"""The most memory that a process takes in training, against what `pkmem plan` says of it: the second half of trial 3."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.plain_loop import PlainLoop
from benchmarks.reliability.outcome import Outcome
from benchmarks.reliability.workers import results
from pkmem import MemoryConfig
from pkmem.lm.config import ModelConfig
from pkmem.planning.devices import read_devices
from pkmem.planning.plan import layout_of, make_plan, trace_of
from pkmem.training.recipe import Recipe, TrainingConfig
from pkmem.training.together import Together

_RECIPE = Recipe(
    model=ModelConfig("llama", 2, 256, 4, context_tokens=128, vocab_size=4096, memory_layers=[1]),
    memory=MemoryConfig(num_sub_keys=256, heads=2, knn=16, query_dim=64),
    training=TrainingConfig(batch_tokens=4096),
)
_CASES: tuple[tuple[int, dict[str, Any]], ...] = (
    (1, {}),
    (1, {"value_grad": "dense", "micro_batches": 2}),
    (2, {"parallel": "ddp"}),
    (2, {"parallel": "fsdp"}),
    (4, {"parallel": "ddp"}),
    (4, {"parallel": "fsdp"}),
    (4, {"parallel": "ddp", "columns": 2, "micro_batches": 2}),
)
_M_MMAP_THRESHOLD = -3  # of malloc.h
_THRESHOLD_BYTES = 65_536


def peaks_are_planned(short: bool) -> Iterator[Outcome]:
    """Trial 3: the resident memory that three updates take at most, in each process."""
    for processes, changes in [(2, {"parallel": "fsdp"})] if short else _CASES:
        recipe = replace(_RECIPE, training=replace(_RECIPE.training, **changes))
        layout = layout_of(recipe, processes, processes)
        # The bytes are the same on any device.
        planned = make_plan(recipe, layout, read_devices()["H200"], trace_of(recipe, processes)).memory_bytes
        taken = results(processes, peak_bytes_of_training, recipe)
        settings = ", ".join(f"{name} {value}" for name, value in changes.items())
        yield Outcome(
            3,
            f"peak memory of a process of {processes}" + (f", {settings}" if settings else ""),
            "the resident bytes of each process within 10 % of the plan's, where malloc gives back all that is freed "
            f"(its mmap threshold {_THRESHOLD_BYTES >> 10} KiB)",
            f"{_range([each / 1e6 for each in taken], '.1f')} MB of {planned / 1e6:.1f} MB planned, "
            f"{_range([each / planned for each in taken], '.3f')} of it",
            all(abs(each / planned - 1) <= 0.1 for each in taken),
        )


def peak_bytes_of_training(together: Together, recipe: Recipe) -> int:
    """The memory that three updates take at most, beside what libraries, kernels and connections took before."""
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES)  # its own holes are not in a plan
    few = replace(recipe, memory=replace(recipe.memory, num_sub_keys=recipe.memory.knn))
    PlainLoop(few, together.size)()
    gc.collect()
    libc.malloc_trim(0)
    before = _resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the most is from now on
    step = PlainLoop(recipe, together.size)
    for _ in range(3):
        step()
    return _resident_bytes("VmHWM") - before


def _resident_bytes(name: str) -> int:
    """A line of the kernel's status of this process: VmRSS now, VmHWM at most."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split(f"{name}:")[1].split()[0]) << 10


def _range(numbers: list[float], form: str) -> str:
    low, high = f"{min(numbers):{form}}", f"{max(numbers):{form}}"
    return low if low == high else f"{low} to {high}"
