"""The grid: a process and a file per run; what is done stays done, what is killed costs itself alone."""

import errno
import fcntl
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from made_results import all_families
from pkmem import cli
from pkmem.experiments import grid as module
from pkmem.experiments.costs import costs
from pkmem.experiments.family import Family, Run, load_family, read_family
from pkmem.experiments.grid import describe, experiment, num_runs, train_command
from pkmem.experiments.results import best_of_sweep, find_results, load_result, standing
from tiny import tiny

pytest_plugins = "tiny"

NOTHING_LEFT: dict[str, list[str]] = {"failed": [], "elsewhere": [], "waiting": [], "unused": []}


def write_family(folder: Path, text: Path, **scale: object) -> Path:
    """A family of ten-update models: one with a sweep, one with a memory."""
    recipe = tiny(text, folder, model={"memory_layers": [], "dropout": 0.0}).to_dict()
    del recipe["out"]
    (folder / "base.yaml").write_text(yaml.safe_dump(recipe))
    cells = {
        "dense": {"label": "dense", "rates": [{"training.lr": 0.001}, {"training.lr": 0.004}]},
        "memory": {"label": "memory", "model.memory_layers": [1]},
    }
    chosen = {
        "about": "seconds",
        "base": "base.yaml",
        "machine": {"name": "core", "peak_tflops": 0.1, "utilisation": 0.5},
        "cells": cells,
        **scale,
    }
    file = folder / "little.yaml"
    file.write_text(yaml.safe_dump({"title": "Little", "paper": "none", "scales": {"laptop": chosen}}, sort_keys=False))
    return file


def start_here(family: Family, run: Run, out: Path, resume: bool, lock: int) -> None:
    """In place of a process of its own, whose start takes seconds."""
    cli.main(train_command(family, run, family.base, out))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Trains in this process; names what was started."""
    started = []

    def start(family: Family, run: Run, *rest: object) -> None:
        started.append(run.name)
        start_here(family, run, *rest)

    monkeypatch.setattr(module, "_start", start)
    return started


@pytest.fixture(scope="module")
def file(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the little family."""
    return write_family(tmp_path_factory.mktemp("family"), text)


@pytest.fixture(scope="module")
def finished(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of the little family with two seeds; not to be changed."""
    out = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_start", start_here)
        left = experiment(read_family(file, "laptop"), out, seeds=2)
    assert left == NOTHING_LEFT
    return out


def names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "little" / "laptop").glob("*.json"))


def test_a_result_has_all_that_a_report_needs(finished: Path, file: Path) -> None:
    family = read_family(file, "laptop")
    results, speeds, damaged = find_results(finished)
    assert damaged == speeds == []
    best = best_of_sweep(family, family.cells["dense"], results)
    assert names(finished) == sorted(
        [
            "dense__lr0.001__seed0.json",
            "dense__lr0.004__seed0.json",
            f"dense__{best.rate}__seed1.json",
            "memory__lr0.002_value_lr0.002__seed0.json",
            "memory__lr0.002_value_lr0.002__seed1.json",
        ]
    )
    assert num_runs(family, 2) == len(results)
    assert best.summary["bits_per_byte"] == min(
        r.summary["bits_per_byte"] for r in results if r.cell == "dense" and r.seed == 0
    )
    memory = next(r for r in results if r.cell == "memory" and r.seed == 1)
    assert memory.recipe.model.memory_layers == [1]
    assert memory.recipe.training.seed == 1
    assert memory.summary["memory_0/usage"] > 0
    assert [record["tokens"] for record in memory.held_out] == [640, 1280]
    assert memory.held_out[-1]["seconds"] <= memory.summary["train_seconds"]
    assert memory.environment["versions"]["torch"]
    assert memory.environment["command"].startswith("pkmem train --config")
    assert list((finished / "little" / "laptop" / "runs").iterdir()) == []


def test_the_command_of_a_result_gives_the_same_model(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = next(r for r in find_results(finished)[0] if r.cell == "memory" and r.seed == 1)
    monkeypatch.chdir(tmp_path)
    cli.main(shlex.split(result.environment["command"])[1:])
    (summary,) = tmp_path.rglob("summary.json")
    assert json.loads(summary.read_text())["bits_per_byte"] == result.summary["bits_per_byte"]


def test_done_runs_are_skipped_and_copied_ones_count(
    finished: Path, file: Path, tmp_path: Path, here: list[str]
) -> None:
    family = read_family(file, "laptop")
    shutil.copytree(finished, tmp_path / "all")
    assert experiment(family, tmp_path / "all", seeds=2)["failed"] == []
    assert here == []
    some = tmp_path / "some" / "little" / "laptop"
    some.mkdir(parents=True)
    for path in (finished / "little" / "laptop").glob("dense*.json"):
        shutil.copy(path, some)
    assert experiment(family, tmp_path / "some", seeds=2) == NOTHING_LEFT
    assert here == [f"memory__lr0.002_value_lr0.002__seed{seed}" for seed in (0, 1)]
    assert names(tmp_path / "some") == names(finished)


def test_a_failed_run_costs_itself_alone(finished: Path, file: Path, tmp_path: Path, here: list[str]) -> None:
    family, start = read_family(file, "laptop"), module._start
    out = shutil.copytree(finished, tmp_path / "out")
    best = best_of_sweep(family, family.cells["dense"], find_results(out)[0]).rate
    for path in (out / "little" / "laptop").glob("*.json"):
        if not path.name.startswith("memory") or "seed1" in path.name:
            path.unlink()

    def start_or_fail(family: Family, run: Run, *rest: object) -> None:
        if run.rate == "lr0.001":
            raise module.RunFailedError("out of memory")
        start(family, run, *rest)

    module._start, kept = start_or_fail, module._start
    try:
        left = experiment(family, out, seeds=2)
    finally:
        module._start = kept
    assert left["failed"] == ["dense__lr0.001__seed0: out of memory"]
    assert left["waiting"] == ["dense, seed 1: dense has no result at seed 0 for lr0.001"]
    assert here == ["dense__lr0.004__seed0", "memory__lr0.002_value_lr0.002__seed1"]
    assert experiment(family, out, seeds=2) == NOTHING_LEFT
    assert here[2:] == ["dense__lr0.001__seed0", f"dense__{best}__seed1"]


def test_a_result_of_another_recipe_is_named_and_kept(finished: Path, text: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    folder = tmp_path / "family"
    folder.mkdir()
    other = read_family(write_family(folder, text, overrides={"training.beta2": 0.9}), "laptop")
    before = {path.name: path.read_bytes() for path in (out / "little" / "laptop").glob("*.json")}
    left = experiment(other, out, seeds=1)
    assert len(left["unused"]) == 3
    assert "training.beta2 0.98 -> 0.9): move it away, or choose another --out" in left["unused"][0]
    assert {path.name: path.read_bytes() for path in (out / "little" / "laptop").glob("*.json")} == before


def test_a_damaged_result_is_not_overwritten(finished: Path, file: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    broken = out / "little" / "laptop" / "dense__lr0.001__seed0.json"
    broken.write_text(broken.read_text()[:100])
    left = experiment(read_family(file, "laptop"), out, seeds=1)
    assert left["failed"] == [f"dense__lr0.001__seed0: {broken} is there but damaged: move it away"]
    assert len(broken.read_text()) == 100


def test_a_cell_at_equal_seconds_trains_as_many_tokens_as_fit(
    finished: Path, text: Path, tmp_path: Path, here: list[str]
) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    folder = tmp_path / "family"
    folder.mkdir()
    cells = yaml.safe_load(write_family(folder, text).read_text())["scales"]["laptop"]["cells"]
    cells["short"] = {"label": "short", "like": "dense", "match_seconds_of": "memory"}
    family = read_family(write_family(folder, text, cells=cells), "laptop")
    for path in (out / "little" / "laptop").glob("*.json"):
        document = json.loads(path.read_text())
        dense = document["cell"] == "dense"
        document["summary"] |= {"train_tokens_per_s": 100.0, "train_seconds": 1e9} if dense else {"train_seconds": 6.5}
        path.write_text(json.dumps(document))
    assert experiment(family, out, seeds=2)["failed"] == []
    rate = best_of_sweep(family, family.cells["short"], find_results(out)[0]).rate
    assert sorted(here) == sorted(["short__lr0.001__seed0", "short__lr0.004__seed0", f"short__{rate}__seed1"])
    short = load_result(out / "little" / "laptop" / "short__lr0.001__seed0.json")
    assert short.recipe.training.num_tokens == 640  # 650 fit, an update is 128
    assert short.held_out[-1]["tokens"] == 640
    assert standing(family, find_results(out)[0], 2).missing == []


def test_what_a_process_finished_alone_is_collected(file: Path, tmp_path: Path, here: list[str]) -> None:
    family = read_family(file, "laptop")
    run = family.run(family.cells["memory"], {})
    start_here(family, run, tmp_path / "little" / "laptop" / "runs" / run.name, False, 0)
    assert experiment(family, tmp_path)["failed"] == []
    assert here == ["dense__lr0.001__seed0", "dense__lr0.004__seed0"]
    assert len(names(tmp_path)) == 3


def test_a_model_with_a_hashed_table_is_trained_by_a_program_of_its_own(text: Path, tmp_path: Path) -> None:
    cells = {
        "hashed": {"label": "hashed", "model.memory_layers": [1], "hashed": {1: "instead"}},
        "longer": {"label": "longer", "like": "hashed", "match_seconds_of": "hashed"},
    }
    family = read_family(write_family(tmp_path, text, cells=cells), "laptop")
    assert family.cells["longer"].hashed == {"1": "instead"}
    assert 'python -m pkmem.experiments.hashed_run --hashed \'{"1": "instead"}\' --config' in describe(family)
    only = family.only(["hashed"])
    assert experiment(only, tmp_path / "out") == NOTHING_LEFT
    (result,), _, _ = find_results(tmp_path / "out")
    assert result.hashed == {"1": "instead"}
    assert result.environment["command"].startswith("python -m pkmem.experiments.hashed_run --hashed")
    assert result.summary["memory_params"] == 8**2 * 32
    del cells["longer"], cells["hashed"]["hashed"]  # type: ignore[arg-type]
    (tmp_path / "again").mkdir()
    left = experiment(read_family(write_family(tmp_path / "again", text, cells=cells), "laptop"), tmp_path / "out")
    assert "has hashed tables {'1': 'instead'}, not {}" in left["unused"][0]


def test_zero_seeds_are_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seeds is 0 but must be >= 1"):
        experiment(read_family(file, "laptop"), tmp_path, seeds=0)


# Processes --------------------------------------------------------------------------------------------------


LONG = {"training.num_tokens": 25_600, "training.eval_every_steps": 100, "training.checkpoint_every_steps": 20}


@pytest.fixture
def long_run(text: Path, tmp_path: Path) -> Path:
    """The file of a family of one run that lasts until it is stopped, and checkpoints early."""
    cells = {"memory": {"label": "memory", "model.memory_layers": [1]}}
    return write_family(tmp_path, text, cells=cells, overrides=LONG)


def test_a_run_survives_its_parent_and_resumes_after_its_own_kill(
    long_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "out"
    folder, family = out / "little" / "laptop", read_family(long_run, "laptop")
    parent = multiprocessing.get_context("fork").Process(target=experiment, args=(family, out))  # starts at once
    parent.start()
    wait_for(lambda: list(folder.glob("runs/*/checkpoints/step-*/manifest.json")))
    parent.kill()
    parent.join()
    (lock,) = folder.glob("runs/*.lock")
    assert experiment(family, out) == NOTHING_LEFT | {"elsewhere": [lock.stem]}
    (child,) = processes_of(lock.stem)
    os.kill(child, signal.SIGKILL)
    wait_for(lambda: is_free(lock))
    popen, commands = subprocess.Popen, []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **how: commands.append(command) or popen(command, **how))
    assert experiment(family, out, resume=True)["failed"] == []
    assert [command[-1] for command in commands if "pkmem" in command] == ["--resume"]
    (result,) = find_results(out)[0]
    assert [record["tokens"] for record in result.held_out] == [12_800, 25_600]
    assert list((folder / "runs").iterdir()) == []


def test_a_process_that_fails_is_quoted(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "train_command", lambda *_: ["train", "memory.kn=3"])
    family = read_family(file, "laptop")
    run = family.run(family.cells["memory"], {})
    (tmp_path / "runs").mkdir()
    with pytest.raises(module.RunFailedError, match=r"unknown option 'memory.kn': did you mean 'memory.knn'\?"):
        module._train(family, run, tmp_path, resume=False)


def test_ctrl_c_is_passed_on_and_waited_for(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told, signals = [], []

    class Child:
        def __init__(self, *_: object, **__: object) -> None: ...

        def wait(self) -> int:
            told.append("waited")
            if len(told) == 1:
                signal.raise_signal(signals[-1])
            return 130

        def send_signal(self, number: int) -> None:
            told.append(number)

    monkeypatch.setattr(subprocess, "Popen", Child)
    family = read_family(file, "laptop")
    run = family.run(family.cells["memory"], {})
    for number in (signal.SIGINT, signal.SIGTERM):
        signals.append(number)
        told.clear()
        with pytest.raises(KeyboardInterrupt, match=f"stopped in {run.name}; continue with --resume"):
            module._start(family, run, tmp_path / run.name, False, 0)
        assert told == ["waited", signal.SIGINT, "waited"]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def wait_for(what, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def processes_of(name: str) -> list[int]:
    """Processes that train a run, by its name in their command."""
    commands = {int(folder.name): command_of(folder) for folder in Path("/proc").glob("[0-9]*")}
    return [number for number, command in commands.items() if f"/{name}".encode() in command and b"pkmem" in command]


def command_of(folder: Path) -> bytes:
    try:
        return (folder / "cmdline").read_bytes()
    except OSError:
        return b""


def is_free(lock: Path) -> bool:
    with lock.open() as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


# Speed and dry run ------------------------------------------------------------------------------------------


def test_speed_is_measured_without_training(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = read_family(write_family(tmp_path, text, trains=False, measures_speed=True), "laptop")

    class Pool:  # in this process: another takes seconds to start
        def __init__(self, *_: object) -> None: ...
        def __enter__(self) -> "Pool":
            return self

        def __exit__(self, *_: object) -> None: ...
        def submit(self, *call: object) -> "Pool":
            self.call = call
            return self

        def result(self) -> object:
            return self.call[0](*self.call[1:])

    monkeypatch.setattr(module, "ProcessPoolExecutor", Pool)
    experiment(family, tmp_path, seeds=2)
    assert names(tmp_path) == ["speed__0.json", "speed__1.json"]
    before = (tmp_path / "little/laptop/speed__0.json").read_bytes()
    experiment(family, tmp_path, seeds=2)
    assert (tmp_path / "little/laptop/speed__0.json").read_bytes() == before
    speeds = load_result(tmp_path / "little" / "laptop" / "speed__1.json")
    assert speeds.models.keys() == speeds.recipes.keys() == {"dense", "memory"}
    for figures in speeds.models.values():
        words_per_token = figures["prefill_words_per_s"] / figures["prefill_tokens_per_s"]
        assert 0.1 < words_per_token < 1
        assert figures["decode_tokens_per_s"] > 0
    assert speeds.recipes["memory"].model.memory_layers == [1]


@pytest.mark.parametrize(("name", "scale"), all_families())
def test_the_dry_run_of_every_family_tells_costs_and_commands(name: str, scale: str) -> None:
    family = load_family(name, scale)
    lines = describe(family, seeds=2).splitlines()
    for cell in family.cells.values():
        (line,) = [line for line in lines if line.startswith(f"{cell.name} ")]
        cost = costs(family.run(cell, cell.rates[0]).recipe, cell.hashed)
        assert line.split()[3] == f"{cost.training_flops:.1e}"
        assert int(line.split()[-1]) == (len(cell.rates) + 1) * family.trains
        if cell.like is None:
            (command,) = [line for line in lines if f"runs/{cell.name}__" in line]
            assert f"--config configs/{scale}.yaml" in command
            alone = "python -m pkmem.experiments.hashed_run " if cell.hashed else "pkmem train "
            assert command.startswith("torchrun " if family.processes > 1 else alone)
    assert next(line for line in lines if line.startswith("in all")).split()[-1] == str(
        num_runs(family, 2) * family.trains
    )


@pytest.mark.case("Environments", "`pkmem experiment` on Windows", "refused: ValueError, use Linux, macOS or WSL", "")
def test_where_runs_cannot_be_locked_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    with pytest.raises(ValueError, match="use Linux, macOS or WSL"), module._locked(tmp_path / "run.lock"):
        pytest.fail("locked")


@pytest.mark.case("Environments", "`pkmem experiment` on a network disk that locks no files",
    "refused: ValueError, choose another --out", "")  # fmt: skip
def test_a_disk_that_locks_no_files_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_implemented(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", not_implemented)
    with pytest.raises(ValueError, match=r"locks no files \(Function not implemented\): choose another --out"):
        module._locked(tmp_path / "run.lock").__enter__()
