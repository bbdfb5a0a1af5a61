"""What each process of plan_time.py does: it plans updates and takes them, by turns."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import harness
from pkmem.experiments.family import config_folder
from pkmem.files.documents import save_json
from pkmem.planning.machine import measure
from pkmem.planning.plan import layout_of, make_plan, trace_of
from pkmem.training.journal import read_metrics
from pkmem.training.reading import read_recipe, read_yaml
from pkmem.training.recipe import Recipe
from pkmem.training.run import train
from plain_loop import PlainLoop

PLANNED, MEASURED = "planned", "measured"
TRAINED_STEPS = 40


def take_turns(
    rank: int,
    changes: dict[str, Any],
    processes: int,
    trains: bool,
    threads: int,
    turns: int,
    seconds: float,
    folder: Path,
) -> None:
    """Plans and trains by turns, in each of some processes; the first one plans, and leaves the seconds of both.

    Args:
        rank: of this process.
        changes: of configs/laptop.yaml.
        processes: in all.
        trains: by `pkmem train`, not in a plain loop.
        threads: of each process.
        turns: how many.
        seconds: of the updates of a turn.
        folder: of this run alone.
    """
    torch.set_num_threads(threads)
    if processes > 1:
        meeting = f"file://{folder}/meeting"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)
    recipe = read_recipe(read_yaml(config_folder() / "laptop.yaml"), changes)
    updates = trained(recipe, folder) if trains else looped(recipe, processes, seconds)
    plan = planned(recipe, processes) if rank == 0 else None
    taken: dict[str, list[float]] = {PLANNED: [], MEASURED: []}
    for turn in range(turns):
        for what in (PLANNED, MEASURED) if turn % 2 == 0 else (MEASURED, PLANNED):
            if what == MEASURED:
                taken[MEASURED].append(updates())
            elif plan is not None:
                taken[PLANNED].append(plan())
    if rank == 0:
        save_json(folder / "seconds.json", taken)
    if processes > 1:
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
    """Takes updates in a plain loop for so long and says the median of their seconds."""
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
        return statistics.median(harness.wall_seconds(step, 1) for _ in range(int(count)))

    return updates


def trained(recipe: Recipe, folder: Path) -> Callable[[], float]:
    """Runs `pkmem train` on Python's standard library and says the median seconds of an update, but for the first quarter."""
    training = replace(
        recipe.training,
        num_tokens=TRAINED_STEPS * recipe.training.batch_tokens,
        log_every_steps=1,
        eval_tokens=recipe.model.context_tokens,
    )
    numbers = itertools.count()

    def updates() -> float:
        out = folder / str(next(numbers))
        train(replace(recipe, out=out, training=training), progress=False)
        records = [record for record in read_metrics(out) if record["kind"] == "train"]
        per_update = [training.batch_tokens / record["tokens_per_s"] for record in records[TRAINED_STEPS // 4 :]]
        return statistics.median(per_update)

    return updates
