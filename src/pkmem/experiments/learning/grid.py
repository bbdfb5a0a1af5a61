"""Runs what is missing: each run in a process of its own, on two cores, every finished one a file of its own."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from pkmem.experiments.environment import environment
from pkmem.experiments.learning.cells import CELLS, Scale, Setting, perform
from pkmem.experiments.learning.results import (
    FIRST_RATES,
    OWN_RATES,
    Run,
    best_rate,
    load_found,
    rates_to_try,
    save_found,
)
from pkmem.experiments.learning.unfinished import Unfinished
from pkmem.training.reading import check_known

NUM_CORES = 2


def experiment_learn(out: Path, seeds: int = 3, cells: list[str] | None = None, scale: Scale | None = None) -> None:
    """Teaches models facts and text, by memories, full fine-tuning and LoRA; a file per run in `out`.

    Two runs are made at a time, each on one core, or one of two threads alone. Finished runs are kept and skipped; the
    edits of a run that is stopped lie in `out/unfinished`, and the same code goes on from them.

    Args:
        out: the folder of the results.
        seeds: seeds 0 .. seeds - 1 of the comparison, >= 1.
        cells: some of `CELLS`; the sweeps that they need come first. None runs all.
        scale: how much is taught; None for what the documentation reports.

    Raises:
        ValueError: there is no such cell, `seeds` is below 1, or a run failed.
    """
    if seeds < 1:
        raise ValueError(f"seeds is {seeds} but must be >= 1")
    wanted = wanted_cells(cells)
    out.mkdir(parents=True, exist_ok=True)
    failed: dict[Run, str] = {}
    running: dict[Future[dict[str, Any]], Run] = {}
    settings: dict[Run, Setting] = {}
    spawn = multiprocessing.get_context("spawn")  # nothing of this process's memory is counted there
    with ProcessPoolExecutor(NUM_CORES, spawn, _end_with_parent, max_tasks_per_child=1) as pool:
        while True:
            found = load_found(out)
            for run in planned(found, seeds, wanted):
                if run in failed or run in running.values():
                    continue
                if CELLS[run.cell].threads > NUM_CORES - sum(CELLS[other.cell].threads for other in running.values()):
                    continue
                print(f"{time.strftime('%H:%M:%S')} {run.name}", file=sys.stderr, flush=True)
                settings[run] = setting_of(run, found, out)
                running[pool.submit(perform, run, scale or Scale(), settings[run])] = run
            if not running:
                break
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(done)
                error = done.exception()
                if error is None:
                    save_found(out, run, done.result())
                    Unfinished(settings[run].unfinished).forget()
                    print(line_of(run, done.result()), flush=True)
                else:
                    failed[run] = str(error) or type(error).__name__
                    print(f"{run.name}: {failed[run]}", file=sys.stderr, flush=True)
    if failed:
        run, why = next(iter(failed.items()))
        raise ValueError(f"{len(failed)} runs have no result; run this again for {run.name}: {why}")


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone, even if that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait_and_end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_and_end, daemon=True).start()


def wanted_cells(names: list[str] | None) -> list[str]:
    """The cells asked for, in the order of `CELLS`; None asks for all.

    Raises:
        ValueError: there is no such cell; the message lists those there are.
    """
    for name in names or ():
        check_known(name, list(CELLS), "cell of learn")
    return [name for name in CELLS if name in (names or CELLS)]


def planned(found: dict[Run, dict[str, Any]], seeds: int, cells: list[str]) -> Iterator[Run]:
    """The runs that have no result and can be made now: a sweep comes before what takes its best rates."""
    for name, cell in CELLS.items():
        for seed in range(seeds if name in cells and cell.every_seed else 1):
            for method in methods_of(name, cells):
                if cell.sweep is None and seed == 0:
                    rates: list[float] = rates_to_try(found, name, method)
                else:
                    best = best_rate(found, cell.sweep or name, method)
                    rates = [] if best is None else [best]
                for rate in rates:
                    run = Run(name, method, rate, seed)
                    if run not in found and not (needs_seconds(run) and seconds_for(run, found) is None):
                        yield run


def methods_of(name: str, cells: list[str]) -> tuple[str, ...]:
    """What a cell teaches: if it is not asked for, what those that are take its rates for."""
    if name in cells:
        return CELLS[name].methods
    taken = {method for other in cells if CELLS[other].sweep == name for method in CELLS[other].methods}
    return tuple(method for method in CELLS[name].methods if method in taken and (name, method) not in OWN_RATES)


def needs_seconds(run: Run) -> bool:
    """Whether it is trained for as long as another run took."""
    return (run.cell, run.method) == ("text", "lora")


def seconds_for(run: Run, found: dict[Run, dict[str, Any]]) -> float | None:
    """How long it may train; None where updates are counted, or the other run is not known yet."""
    if not needs_seconds(run):
        return None
    others = [document for other, document in found.items() if (other.cell, other.method) == (run.cell, "memory")]
    return others[0]["seconds"] if others else None


def setting_of(run: Run, found: dict[Run, dict[str, Any]], out: Path) -> Setting:
    """What a run may use. It keeps something only where the code is known, for edits of another code are others."""
    known = environment()
    source = known["commit"] or known["versions"].get("pkmem")
    is_known = source is not None and not source.endswith("-dirty")
    return Setting(seconds_for(run, found), out / "unfinished" / f"{run.name}-{source}" if is_known else None)


def line_of(run: Run, found: dict[str, Any]) -> str:
    """A finished run in a line."""
    figures = found["figures"]
    shown = [
        f"{name} {figure:.4g}" if isinstance(figure, float) else f"{name} {sum(figure.values()) / len(figure):.1%}"
        for name, figure in figures.items()
        if isinstance(figure, float) or name in ("recall", "held_out", "reversed", "chat")
    ]
    return f"{run.name}: {found['seconds']:.0f} s, {', '.join(shown)}"


def describe(seeds: int = 3, cells: list[str] | None = None) -> str:
    """What would be run; nothing is.

    Raises:
        ValueError: as `experiment_learn`.
    """
    lines = []
    wanted = wanted_cells(cells)
    for name, cell in CELLS.items():
        methods = methods_of(name, wanted)
        num_seeds = seeds if cell.every_seed and name in wanted else 1
        at_first = sum(len(FIRST_RATES[name][method]) if cell.sweep is None else 1 for method in methods)
        num = at_first + (num_seeds - 1) * len(methods)
        if num:
            lines.append(f"{name:16} {num:3} run{'s' * (num > 1)}: {cell.about}")
    return "\n".join(lines)
