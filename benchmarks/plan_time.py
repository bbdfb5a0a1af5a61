"""How long does `pkmem plan` say that a training step takes on this machine, beside how long it takes?

    python benchmarks/plan_time.py

In each turn the machine is measured as `pkmem plan --device this` does, and updates are timed by the clock on the wall, in
the same process; the median of a turn's updates counts. The updates are those of a plain loop, and once of `pkmem train`.
All of it runs with malloc as it comes, since that is what a user has. Run it with nothing else on the machine: threads that
wait for each other's cores make both times meaningless. Five minutes, 4 GB.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.multiprocessing import start_processes

import harness
from harness import TUNED_MALLOC, Report, Timings
from pkmem.files.documents import load_json

SECONDS_PER_TURN = 2.0  # of updates


@dataclass(frozen=True)
class Case:
    """Changes to configs/laptop.yaml, and who trains it."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    processes: int = 1
    trains: bool = False  # by `pkmem train`


MEMORY = {"model.memory_layers": [0]}
WIDE = {"model.width": 256, "model.num_heads": 4}
GPT2 = {"model.family": "gpt2", "model.memory_layers": [2]}
CASES = (
    Case("4 layers of width 64"),
    Case("with a memory", MEMORY),
    Case("with a memory, pkmem train", MEMORY, trains=True),
    Case("with a memory, width 256", MEMORY | WIDE),
    Case("with a memory, width 256, 4 micro-batches", MEMORY | WIDE | {"training.micro_batches": 4}),
    Case("with a memory, GPT-2", GPT2),
    Case("with a memory, 2 processes", MEMORY, processes=2),
)
SMALL = {"model.num_layers": 1, "model.width": 16, "model.context_tokens": 32, "model.vocab_size": 300}
SMALL |= {"memory.num_sub_keys": 16, "memory.knn": 8, "training.batch_tokens": 64}
SMOKE = (Case("with a memory, width 16", MEMORY | SMALL),)


def main() -> None:
    """Measures every case and writes plan_time.json and plan_time.md."""
    options = harness.start(__doc__, repeats=5)
    report = Report("plan_time", options)
    for case in SMOKE if options.smoke else CASES:
        threads = max(1, options.threads // case.processes)
        turns = in_processes(case, threads, options.repeats, 0.0 if options.smoke else SECONDS_PER_TURN)
        timings = Timings(turns)
        report.keep(case.name, timings)
        report.add(f"{case.name}: planned / measured", timings.ratio("planned", "measured"))
    report.note("one model: configs/laptop.yaml, 1,024 tokens an update; random tokens but in pkmem train")
    report.note("all cases ran with malloc as it comes, unlike the other benchmarks")
    report.write()


def in_processes(case: Case, threads: int, turns: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of an update, planned and measured, turn by turn."""
    with tempfile.TemporaryDirectory() as folder, _malloc_as_it_comes():
        given = (case.changes, case.processes, case.trains, threads, turns, seconds, Path(folder))
        start_processes(_take_turns, given, nprocs=case.processes, start_method="spawn")
        return load_json(Path(folder) / "seconds.json")


@contextlib.contextmanager
def _malloc_as_it_comes() -> Iterator[None]:
    """For the processes that are started meanwhile."""
    settings = {name: os.environ.pop(name) for name in TUNED_MALLOC}
    yield
    os.environ |= settings


def _take_turns(rank: int, *given: Any) -> None:
    from plan_turns import take_turns  # seconds of imports, which this process needs none of

    take_turns(rank, *given)


if __name__ == "__main__":
    main()
