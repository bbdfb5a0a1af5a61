"""Trial 5: kill -9 in every phase of a save."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from benchmarks.reliability.outcome import Outcome
from benchmarks.reliability.states import state_of, steps_in
from benchmarks.reliability.workers import join, started
from pkmem.files.documents import CheckpointError
from pkmem.files.tensor_file import TensorFile
from pkmem.training.checkpoint import newest_valid_checkpoint, save_checkpoint
from pkmem.training.shards import plan_shard
from pkmem.training.together import Together

ROWS = 1 << 15  # three tensors of 8 MB
BETWEEN, WRITING, SEALING, RENAMING, DROPPING = (
    "between two saves",
    "while a shard was written",
    "between the shards and the manifest",
    "between the manifest and the rename",
    "after the rename, while the older one was dropped",
)


def save_for_ever(together: Together, run: str, first: int, told: str) -> None:
    """Saves step after step, and appends to a file which it has begun and which are there."""

    def tell(word: str, step: int) -> None:
        if together.rank == 0:
            with Path(told).open("a") as file:
                print(f"{word} {step}", file=file)

    for step in range(first, first + 10_000):
        tell("begun", step)
        try:
            save_checkpoint(
                Path(run),
                step,
                lambda folder: (folder / "loss.json").write_text("1.5"),
                plan_shard(state_of(step, together.size, ROWS), together),
                together=together,
            )
        except RuntimeError as error:
            if "by peer" not in str(error):
                raise
            raise SystemExit(1) from error  # the other process was killed
        tell("there", step)


def killed_while_saving(short: bool) -> Iterator[Outcome]:
    """Kills the processes of a run, or one of them: at a random moment, and just after each phase of a save begins."""
    for world in (1, 2):
        yield _killed(world, 2 if short else 30, short)


def _killed(world: int, trials: int, short: bool) -> Outcome:
    draw, phases = random.Random(0), Counter[str]()
    bad: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        run, told, first = Path(place) / "run", Path(place) / "told", 1
        for trial in range(trials):
            told.write_text("")
            with started(world, save_for_ever, str(run), first, str(told)) as (processes, _):
                awaited = [None, WRITING, SEALING, RENAMING, None, DROPPING][trial % 6]
                phases[_kill(processes, run, told, awaited, world, draw)] += 1
                join(processes, 60)  # the others notice
                bad += [f"trial {trial}: a process was left" for process in processes if process.is_alive()]
            there = max((step for word, step in _told(told) if word == "there"), default=first - 1)
            newest = newest_valid_checkpoint(run, bad.append)
            if newest is None and there > 0:
                bad.append(f"trial {trial}: no checkpoint")
            if newest is not None:
                step = int(newest.name.split("-")[1].removesuffix(".old"))
                bad += [f"trial {trial}: mixed {steps_in(newest)}"] * (steps_in(newest) != {float(step)})
                bad += [f"trial {trial}: step {step} after {there}"] * (step < there)
                first = step + 1
    missed = [] if short else [phase for phase in (WRITING, SEALING, RENAMING) if not phases[phase]]
    found = ", ".join(f"{phases[phase]} {phase}" for phase in (BETWEEN, WRITING, SEALING, RENAMING, DROPPING))
    return Outcome(
        5,
        f"{trials} times kill -9 while {'one process' if world == 1 else f'{world} processes'} saved",
        "every newest checkpoint loads, is of one step, and loses at most the save that was going on"
        + ("" if short else "; kills fall into each phase before the rename"),
        f"{len(bad)} failures; of the kills came {found}" + "".join(f"; {line}" for line in bad[:3]),
        not bad and not missed,
    )


def _kill(
    processes: Sequence[BaseProcess], run: Path, told: Path, awaited: str | None, world: int, draw: random.Random
) -> str:
    """Kills all or one of the processes once a save is in this phase, or at any moment; returns the phase it was.

    All are stopped before, so that the phase is that of the kill.
    """
    while not any(word == "there" for word, _ in _told(told)):
        time.sleep(0.001)
    if awaited is None:
        time.sleep(draw.uniform(0, 0.2))
    else:
        patience = time.monotonic() + 20
        while _phase(run, told, world) != awaited and time.monotonic() < patience:
            pass
    for process in processes:
        os.kill(process.pid or 0, signal.SIGSTOP)
    phase = _phase(run, told, world)
    for process in processes if draw.random() < 0.5 else [draw.choice(processes)]:
        process.kill()
    for process in processes:
        os.kill(process.pid or 0, signal.SIGCONT)
    return phase


def _phase(run: Path, told: Path, world: int) -> str:
    """How far a save is, from what is in the directory."""
    word, step = (_told(told) or [("there", 0)])[-1]
    final = run / "checkpoints" / f"step-{step}"
    tmp = final.with_suffix(".tmp")
    if word == "there":
        return BETWEEN
    if final.exists():
        return DROPPING
    if (tmp / "manifest.json").exists():
        return RENAMING
    if not tmp.exists():
        return BETWEEN
    try:
        whole = [TensorFile(shard) for shard in tmp.glob("shard-*")]
    except (CheckpointError, OSError):  # of half a file; or all is renamed by now, where nobody is stopped
        return WRITING
    return SEALING if len(whole) == world else WRITING


def _told(told: Path) -> list[tuple[str, int]]:
    lines = (line.split() for line in told.read_text().splitlines())
    return [(words[0], int(words[1])) for words in lines if len(words) == 2]
