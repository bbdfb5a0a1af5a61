"""The runs of the experiment: sweeps first, two at a time or one of two threads alone, kept and skipped, failures named."""

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future

import pytest

from pkmem.experiments.learning import grid
from pkmem.experiments.learning.cells import CELLS, Setting
from pkmem.experiments.learning.grid import describe, experiment_learn, planned, setting_of, wanted_cells
from pkmem.experiments.learning.results import Run, load_found


def made(run: Run) -> dict:
    """A result as if the run had been made: the rate in the middle of each sweep is the best."""
    loss = abs(run.rate - {"memory": 0.05, "full": 3e-5, "lora": 3e-4}[run.method]) + 1e-3
    epoch = {"seconds": 3.0, "recall": 1.0, "held_out": 0.5, "near_miss_kl": 1.0, "background_kl": loss}
    figures = {"recall": {"person": 1.0, "code": 0.5}, "held_out_bits_per_byte": loss, "questions": 0.75}
    return (
        {"seconds": 4.0, "epochs": [epoch], "figures": figures}
        if "text" not in run.cell
        else {"seconds": 5.0, "figures": figures}
    )


class Pool:
    """Does what it is given at once, and hands it out in turn; remembers what was running together."""

    together: list[list[str]]
    fails: str | None

    def __init__(self, *_: object, **__: object) -> None:
        self.running: dict[Future, Run] = {}

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, perform, run: Run, scale: object, setting: Setting) -> Future:
        future: Future = Future()
        self.running[future] = run
        Pool.calls.append((run, setting.seconds))
        if run.method == Pool.fails:
            future.set_exception(ValueError("it broke"))
        else:
            future.set_result(made(run))
        return future


@pytest.fixture
def pool(monkeypatch):
    Pool.calls, Pool.fails, Pool.together = [], None, []

    def wait(running, return_when):
        Pool.together.append([run.cell for run in running.values()])
        first = next(iter(running))
        return type("Done", (), {"done": {first}})

    monkeypatch.setattr(grid, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(grid, "wait", wait)
    return Pool


def test_all_is_run_once_and_nothing_again(pool, tmp_path, capsys) -> None:
    experiment_learn(tmp_path, seeds=2)
    names = [run.name for run, _ in pool.calls]
    assert len(set(names)) == len(names)
    found = load_found(tmp_path)
    assert {run.cell for run in found} == set(CELLS)
    assert sum(run.cell == "compare" for run in found) == 12  # three rates of three methods, and the best at seed 1
    assert "compare-full-lr3e-05-seed1" in names
    assert {len(cells) for cells in pool.together} == {1, 2}
    assert [cells for cells in pool.together if "sequence" in cells] == [["sequence"]]
    assert "recall 75.0%" in capsys.readouterr().out
    pool.calls.clear()
    experiment_learn(tmp_path, seeds=2)
    assert pool.calls == []
    experiment_learn(tmp_path, seeds=3)
    assert [run.name for run, _ in pool.calls] == [
        "compare-memory-lr0.05-seed2", "compare-full-lr3e-05-seed2", "compare-lora-lr0.0003-seed2",
        "kept-full-lr3e-05-seed2",
    ]  # fmt: skip


def test_what_a_run_keeps_is_gone_when_it_is_finished(pool, tmp_path, monkeypatch) -> None:
    kept, submit_as_before = [], Pool.submit

    def submit(self, perform, run, scale, setting):
        setting.unfinished.mkdir(parents=True)
        kept.append(setting.unfinished)
        return submit_as_before(self, perform, run, scale, setting)

    monkeypatch.setattr(grid, "environment", lambda: {"commit": "abc", "versions": {}})
    monkeypatch.setattr(pool, "submit", submit)
    experiment_learn(tmp_path, cells=["sequence"])
    assert kept == [tmp_path / "unfinished" / "sequence-memory-lr0.05-seed0-abc"]
    assert not kept[0].exists()


@pytest.mark.parametrize(
    ("commit", "version", "source"),
    [("abc", "1", "abc"), (None, "1", "1"), ("abc-dirty", "1", None), (None, None, None)],
)
def test_edits_are_kept_by_the_code_that_learned_them(monkeypatch, tmp_path, commit, version, source) -> None:
    versions = {} if version is None else {"pkmem": version}
    monkeypatch.setattr(grid, "environment", lambda: {"commit": commit, "versions": versions})
    run = Run("sequence", "memory", 0.05)
    folder = setting_of(run, {}, tmp_path).unfinished
    assert folder == (None if source is None else tmp_path / "unfinished" / f"{run.name}-{source}")


def test_lora_trains_on_text_for_the_seconds_of_the_memory(pool, tmp_path) -> None:
    experiment_learn(tmp_path, cells=["text"])
    assert {run.cell for run, _ in pool.calls} == {"text_sweep", "text"}
    assert {run.method: seconds for run, seconds in pool.calls if run.cell == "text"} == {"memory": None, "lora": 5.0}


def test_a_run_that_fails_costs_itself_and_what_needs_it(pool, tmp_path, capsys) -> None:
    pool.fails = "lora"
    with pytest.raises(
        ValueError, match=r"3 runs have no result; run this again for compare-lora-lr0.0001-seed0: it broke"
    ):
        experiment_learn(tmp_path, cells=["compare"])
    found = load_found(tmp_path)
    assert {run.method for run in found if run.cell == "compare"} == {"memory", "full"}
    assert "compare-lora-lr0.0001-seed0: it broke" in capsys.readouterr().err
    pool.fails = None
    experiment_learn(tmp_path, cells=["compare"], seeds=1)
    assert {run.method for run in load_found(tmp_path) if run.cell == "compare"} == {"memory", "full", "lora"}


def test_cells_that_there_are_not_and_no_seeds_are_refused() -> None:
    assert wanted_cells(["text", "hundred_code"]) == ["hundred_code", "text"]
    assert wanted_cells(None) == list(CELLS)
    with pytest.raises(ValueError, match="hundred_cod"):
        wanted_cells(["hundred_cod"])
    with pytest.raises(ValueError, match="seeds is 0"):
        experiment_learn(None, seeds=0)


def test_a_cell_that_is_not_asked_for_tries_rates_for_those_that_are() -> None:
    assert {(run.cell, run.method, run.seed) for run in planned({}, 3, ["kept"])} == {("compare", "full", 0)}
    assert {(run.cell, run.method) for run in planned({}, 3, ["text"])} == {
        ("text_sweep", "memory"), ("text_sweep", "lora")
    }  # fmt: skip


def test_what_a_memory_is_taught_at_the_rate_of_learn_waits_for_no_sweep() -> None:
    (run,) = planned({}, 3, ["thousand"])
    assert run == Run("thousand", "memory", 0.05, 0)


def test_a_dry_run_names_every_cell_and_its_runs() -> None:
    lines = describe(3).splitlines()
    assert [line.split()[0] for line in lines] == list(CELLS)
    assert lines[0].startswith("compare           15 runs: 24 facts")
    assert [line.split()[:2] for line in describe(3, ["kept"]).splitlines()] == [
        ["compare", "3"],
        ["kept", "3"],
    ]


STARTER = """
import multiprocessing, time
from pkmem.experiments.learning.grid import _end_with_parent

def work():
    _end_with_parent()
    time.sleep(600)

child = multiprocessing.get_context("fork").Process(target=work)
child.start()
print(child.pid, flush=True)
child.join()
"""


@pytest.mark.skipif(not hasattr(os, "fork") or shutil.which("ps") is None, reason="forks, and asks ps")
def test_a_run_ends_with_the_process_that_started_it() -> None:
    with subprocess.Popen([sys.executable, "-c", STARTER], stdout=subprocess.PIPE, text=True) as starter:
        child = int(starter.stdout.readline())
        starter.send_signal(signal.SIGKILL)
    for _ in range(600):
        if not is_running(child):
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the run went on without the process that started it")


def is_running(process: int) -> bool:
    """One that has ended but that nobody asked about is not running."""
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True)
    return found.stdout.strip()[:1] not in ("", "Z")
