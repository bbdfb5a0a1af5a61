"""Processes and hosts that fail, numbers that are none, and long runs: trials 6, 10 and 11."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from benchmarks.reliability.hosts import Host, cut, join, two_hosts, why_no_hosts
from benchmarks.reliability.launching import (
    Held,
    Launch,
    await_step,
    differences,
    free_port,
    held_by,
    require_success,
    seconds_until,
    torchrun,
    training,
    write_recipe,
)
from benchmarks.reliability.outcome import Outcome, Trial
from benchmarks.reliability.poison import STEP, poisoned_runs
from benchmarks.reliability.workers import results
from pkmem.training.reading import read_recipe, read_yaml
from pkmem.training.run import train
from pkmem.training.together import Together

ROOT = Path(__file__).parents[2]
LONGEST_S = 60.0  # until the last process of a run has ended
SAME_BITS = "the run goes on; weights, moments, random states and losses are those of an undisturbed run, bit for bit"


# --- 6: a process or a host fails -----------------------------------------------------------------------


def processes_and_hosts_fail(short: bool) -> Iterator[Outcome]:
    """A rank killed, with restarts and without, and a host cut off."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        if short:
            yield _killed_and_restarted(folder, write_recipe(folder, num_steps=8), [(6, 0)], ranks=1)
            return
        recipe = write_recipe(folder, num_steps=60)
        yield _killed_and_restarted(folder, recipe, [(2, 1), (10, 0), (31, 1)], ranks=2)
        yield _killed_under_torchrun(folder, recipe)
        yield _killed_without_torchrun(folder, recipe)
        if reason := why_no_hosts():
            yield Outcome(6, "two hosts, the cable between them taken away", "both end", f"not tried: {reason}", None)
            return
        with two_hosts() as hosts:
            yield from _cut_off(folder, recipe, hosts)


def _killed_and_restarted(folder: Path, recipe: Path, kills: list[tuple[int, int]], ranks: int) -> Outcome:
    """Kills a rank right after a step was recorded, in the middle of the next; torchrun starts all of them again."""
    options = [f"--nproc-per-node={ranks}", f"--max-restarts={len(kills)}"]
    if ranks == 1:
        results(1, train_undisturbed, str(recipe), str(folder / "undisturbed"))
    else:
        with Launch(torchrun(*options, command=training(recipe, "undisturbed", resume=True)), folder) as launch:
            require_success([launch])
    with Launch(torchrun(*options, command=training(recipe, "killed", resume=True)), folder) as launch:
        for step, rank in kills:
            await_step(folder / "killed", step, launch)
            os.kill(launch.rank(rank), signal.SIGKILL)
        require_success([launch])
    differing = differences(folder / "undisturbed", folder / "killed")
    what = f"`kill -9` of {'the only process' if ranks == 1 else f'one of {ranks} processes'} in the middle of a step"
    return Outcome(
        6,
        f"{what}, {'once' if len(kills) == 1 else f'{len(kills)} times'} in a run under `torchrun --max-restarts`",
        SAME_BITS,
        _in_words(differing),
        not differing,
    )


def train_undisturbed(together: Together, recipe: str, out: str) -> None:
    """The same run by itself, in a process that has imported everything already."""
    train(read_recipe(read_yaml(Path(recipe)), {"out": out}), progress=False)


def _killed_under_torchrun(folder: Path, recipe: Path) -> Outcome:
    with Launch(torchrun("--nproc-per-node=2", command=training(recipe, "ended")), folder) as launch:
        await_step(folder / "ended", 10, launch)
        os.kill(launch.rank(1), signal.SIGKILL)
        return _ending("`kill -9` of one of 2 processes under `torchrun` without restarts", [launch])


def _killed_without_torchrun(folder: Path, recipe: Path) -> Outcome:
    """Each process is on its own, as under srun or mpirun: nobody ends it when another one dies."""
    with ExitStack() as stack:
        command = [sys.executable, *training(recipe, "alone")]
        launches = [stack.enter_context(Launch(command, folder, environ)) for environ in _of_ranks(4)]
        await_step(folder / "alone", 10, launches[0])
        launches[2].process.kill()
        return _ending("`kill -9` of one of 4 processes that nobody else watches", launches[:2] + launches[3:])


def _cut_off(folder: Path, recipe: Path, hosts: tuple[Host, Host]) -> Iterator[Outcome]:
    with ExitStack() as stack:
        require_success(_on_hosts(hosts, training(recipe, "two"), folder, stack))
    with ExitStack() as stack:
        launches = _on_hosts(hosts, training(recipe, "cut"), folder, stack)
        await_step(folder / "cut", 30, launches[0])
        cut(hosts[0])
        yield _ending("two hosts with a `torchrun` each, the cable between them taken away", launches)
    join(hosts[0])
    with ExitStack() as stack:
        require_success(_on_hosts(hosts, training(recipe, "cut", resume=True), folder, stack))
    differing = differences(folder / "two", folder / "cut")
    yield Outcome(
        6, "the same two hosts, started again with `--resume`", SAME_BITS, _in_words(differing), not differing
    )


def _on_hosts(hosts: tuple[Host, Host], command: list[str], folder: Path, stack: ExitStack) -> list[Launch]:
    """Starts a run on two hosts, one process on each."""
    options = ["--nnodes=2", "--nproc-per-node=1", f"--master-addr={hosts[0].address}", "--master-port=29500"]
    commands = [host.command(torchrun(*options, f"--node-rank={i}", command=command)) for i, host in enumerate(hosts)]
    return [
        stack.enter_context(Launch(command, folder, {"GLOO_SOCKET_IFNAME": host.interface}))
        for host, command in zip(hosts, commands, strict=True)
    ]


def _of_ranks(world: int) -> list[dict[str, str]]:
    """The variables by which processes find each other that torchrun did not start."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    worlds = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    return [address | worlds | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def _ending(what: str, launches: list[Launch]) -> Outcome:
    """How launches end that were just disturbed: all, in time, with an error that says why, and nothing left over."""
    seconds = seconds_until(lambda: not any(launch.processes() for launch in launches), LONGEST_S)
    left = sum(len(launch.processes()) for launch in launches)
    statuses = [None if left else launch.wait() for launch in launches]
    mute = sum("lost another one" not in launch.said for launch in launches)
    ended = f"exit status {', '.join(map(str, statuses))} after {seconds:.0f} s"
    return Outcome(
        6,
        what,
        f"all end within {LONGEST_S:.0f} s, none with status 0, each with an error that says why; no process is left",
        f"{ended}, {mute} without a word, {left} left" if mute or left else f"{ended}, each said why, none left",
        not left and not mute and all(statuses),
    )


def _in_words(differing: list[str]) -> str:
    return f"{len(differing)} differ, such as {differing[0]}" if differing else "the same bits"


# --- 10: a number that is none --------------------------------------------------------------------------


def numbers_that_are_none(short: bool) -> Iterator[Outcome]:
    """NaN in the loss or in a gradient, in the last of several processes alone."""
    world, columns = (2, 2) if short else (4, 2)
    for parallel in ("ddp",) if short else ("ddp", "fsdp"):
        with tempfile.TemporaryDirectory() as folder:
            recipe = write_recipe(Path(folder), num_steps=8, columns=columns)
            seen = results(world, poisoned_runs, str(recipe), folder, parallel)
        for of_all in zip(*seen, strict=True):
            stopped = sum(f"at step {STEP}; nothing was updated" in one["raised"] for one in of_all)
            changed = {name for one in of_all for name in one["changed"]}
            yield Outcome(
                10,
                f"NaN in {of_all[0]['kind']}, in one of {world} processes ({parallel})",
                f"all {world} stop with an error; tables, weights and moments are the bits they were",
                f"{stopped} stop, {len(changed)} of {of_all[0]['tensors']} tensors changed",
                stopped == world and not changed,
            )


# --- 11: a long run -------------------------------------------------------------------------------------


def long_run(short: bool) -> Iterator[Outcome]:
    """What a run's processes hold, from step to step, and how those of many runs end."""
    if not short:
        with tempfile.TemporaryDirectory() as folder:
            yield from _held(Path(folder), num_steps=2000)
    starts = 1 if short else 50
    with tempfile.TemporaryDirectory() as folder:
        bad = [said for _ in range(starts) if (said := _start_and_end(Path(folder)))]
    yield Outcome(
        11,
        f"{'once' if starts == 1 else f'{starts} times'}, 2 processes start, train a sharded memory for three steps and end",
        "each time exit status 0, and not a word, such as a warning that a process group is left",
        "so it was" if not bad else f"not so {len(bad)} times: {' '.join(bad[0].split())[-200:]}",
        not bad,
    )


def _held(folder: Path, num_steps: int) -> Iterator[Outcome]:
    """Looks at both processes in the middle between two saves."""
    saves = num_steps // 20
    recipe = write_recipe(folder, num_steps, checkpoint_every_steps=saves, log_every_steps=10)
    held: dict[int, list[Held]] = {0: [], 1: []}
    with Launch(torchrun("--nproc-per-node=2", command=training(recipe, "long")), folder) as launch:
        for step in range(saves // 2, num_steps, saves):
            await_step(folder / "long", step, launch)
            for rank, seen in held.items():
                seen.append(held_by(launch.rank(rank)))
        require_success([launch])
    settled = {rank: seen[2:] for rank, seen in held.items()}  # from step 200 of 2,000 on
    growth = max(seen[-1].resident_bytes / seen[0].resident_bytes - 1 for seen in settled.values())
    yield Outcome(
        11,
        f"{num_steps:,} steps with 20 saves in 2 processes: resident memory from step {5 * saves // 2} on",
        "grows by less than 1 %",
        f"{growth:+.2%}, of {max(seen[0].resident_bytes for seen in settled.values()) >> 20} MiB",
        growth < 0.01,
    )
    kept = [{(seen.files, seen.threads) for seen in of_rank} for of_rank in settled.values()]
    yield Outcome(
        11,
        "the same: open files and threads of each process",
        "do not change",
        "; ".join(", then ".join(f"{files} and {threads}" for files, threads in sorted(of_rank)) for of_rank in kept),
        all(len(of_rank) == 1 for of_rank in kept),
    )


def _start_and_end(folder: Path) -> str:
    """What was said, or the exit status, where it was not 0; nothing where all is well."""
    command = [sys.executable, "-m", "benchmarks.reliability.start_and_end"]
    with ExitStack() as stack:
        environments = [environ | {"PYTHONPATH": str(ROOT)} for environ in _of_ranks(2)]
        launches = [stack.enter_context(Launch(command, folder, environ)) for environ in environments]
        statuses = [launch.wait() for launch in launches]
        return "".join(launch.said for launch in launches) or (f"exit statuses {statuses}" if any(statuses) else "")


TRIALS: dict[int, Trial] = {6: processes_and_hosts_fail, 10: numbers_that_are_none, 11: long_run}
