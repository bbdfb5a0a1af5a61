"""How long does `pkmem plan` say that a training step takes on this machine, beside how long it takes?

    python benchmarks/plan_time.py

In each turn the machine is measured as `pkmem plan --device this` does, and updates are timed by the clock on the wall, in
the same process: so whatever else slows the machine slows both. The updates are those of a plain loop, and once of
`pkmem train`. All of it runs with malloc as it comes, since that is what a user has. Needs 4 GB.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

import harness
from harness import TUNED_MALLOC, Report, Timings
from pkmem.experiments.family import config_folder
from pkmem.planning.machine import measure
from pkmem.planning.plan import layout_of, make_plan, trace_of
from pkmem.training.files import load_json, save_json
from pkmem.training.journal import read_metrics
from pkmem.training.reading import read_recipe, read_yaml
from pkmem.training.recipe import Recipe
from pkmem.training.run import train
from plain_loop import PlainLoop

PLANNED, MEASURED = "planned", "measured"
SECONDS_PER_TURN = 2.0  # of updates
TRAINED_STEPS = 40


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
        report.add(f"{case.name}: planned / measured", timings.ratio(PLANNED, MEASURED))
    report.note("one model: configs/laptop.yaml, 1,024 tokens an update; random tokens but in pkmem train")
    report.note("all cases ran with malloc as it comes, unlike the other benchmarks")
    report.write()


def in_processes(case: Case, threads: int, turns: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of an update, planned and measured, turn by turn."""
    with tempfile.TemporaryDirectory() as folder, _malloc_as_it_comes():
        given = (case, threads, turns, seconds, Path(folder))
        start_processes(take_turns, given, nprocs=case.processes, start_method="spawn")
        return load_json(Path(folder) / "seconds.json")


@contextlib.contextmanager
def _malloc_as_it_comes() -> Iterator[None]:
    """For the processes that are started meanwhile."""
    settings = {name: os.environ.pop(name) for name in TUNED_MALLOC}
    yield
    os.environ |= settings


def take_turns(rank: int, case: Case, threads: int, turns: int, seconds: float, folder: Path) -> None:
    """Plans and trains by turns; the first process plans."""
    torch.set_num_threads(threads)
    if case.processes > 1:
        meeting = f"file://{folder}/meeting"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=case.processes)
    recipe = read_recipe(read_yaml(config_folder() / "laptop.yaml"), case.changes)
    updates = trained(recipe, folder) if case.trains else looped(recipe, case.processes, seconds)
    plan = planned(recipe, case.processes) if rank == 0 else None
    taken: dict[str, list[float]] = {PLANNED: [], MEASURED: []}
    for turn in range(turns):
        for what in (PLANNED, MEASURED) if turn % 2 == 0 else (MEASURED, PLANNED):
            if what == MEASURED:
                taken[MEASURED].append(updates())
            elif plan is not None:
                taken[PLANNED].append(plan())
    if rank == 0:
        save_json(folder / "seconds.json", taken)
    if case.processes > 1:
        dist.barrier()
        dist.destroy_process_group()


def planned(recipe: Recipe, processes: int) -> Callable[[], float]:
    """Measures the machine anew and says the seconds of an update."""
    layout, trace = layout_of(recipe, processes, processes), trace_of(recipe, processes)

    def plan() -> float:
        machine = measure([*trace.forward, *trace.backward], trace.tables, 1e9, processes > 1)
        return make_plan(recipe, layout, machine, trace).step_seconds

    return plan


def looped(recipe: Recipe, processes: int, seconds: float) -> Callable[[], float]:
    """Takes updates in a plain loop for so long and says the seconds of one."""
    step = PlainLoop(recipe, processes)
    step()
    begin = time.perf_counter()
    step()
    count = torch.tensor(1 + seconds / (time.perf_counter() - begin))
    if processes > 1:
        dist.broadcast(count, 0)

    def updates() -> float:
        if processes > 1:
            dist.barrier()
        return harness.wall_seconds(step, int(count))

    return updates


def trained(recipe: Recipe, folder: Path) -> Callable[[], float]:
    """Runs `pkmem train` on Python's standard library and says the seconds of an update, but for the first quarter."""
    training = replace(
        recipe.training,
        num_tokens=TRAINED_STEPS * recipe.training.batch_tokens,
        log_every_steps=TRAINED_STEPS // 4,
        eval_tokens=recipe.model.context_tokens,
    )
    numbers = itertools.count()

    def updates() -> float:
        out = folder / str(next(numbers))
        train(replace(recipe, out=out, training=training), progress=False)
        records = [record for record in read_metrics(out) if record["kind"] == "train"]
        per_update = [training.batch_tokens / record["tokens_per_s"] for record in records[1:]]
        return sum(per_update) / len(per_update)

    return updates


if __name__ == "__main__":
    main()
