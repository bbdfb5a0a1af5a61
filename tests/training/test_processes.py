"""The processes of a run end together, each with an error that says why; a run that torchrun restarts goes on."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from pkmem.cli import main
from pkmem.training.checkpoint import latest_checkpoint
from pkmem.training.processes import ending_together, group_after_restart, restarts_by_itself
from pkmem.training.run import train
from runs import assert_same_run, before_update
from tiny import tiny

pytest_plugins = "tiny"

START = """
import os, socket, sys, time
import torch, torch.distributed as dist
from pkmem.training.processes import LostProcessError, ending_together

rank = int(sys.argv[1])
torch.set_num_threads(1)
os.environ["MASTER_ADDR"] = "127.0.0.1"
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
"""


@contextmanager
def two_processes(folder: Path, body: str) -> Iterator[list[subprocess.Popen]]:
    """Two ranks that run `body` after they have met; each prints a line when it is inside."""
    command = [sys.executable, "-c", START + body]
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [*command, str(rank), str(folder / "meeting")],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for rank in range(2)
        ]
        for process in processes:
            stack.callback(process.kill)
        yield processes


WORK = """
with ending_together():
    print("inside", flush=True)
    {}
"""


def test_it_ends_while_it_waits_for_no_one(tmp_path: Path) -> None:
    with two_processes(tmp_path, WORK.format("time.sleep(1000)")) as (first, second):
        assert (first.stdout.readline(), second.stdout.readline()) == ("inside\n", "inside\n")
        first.kill()
        _, said = second.communicate()
        assert second.returncode == 1
        assert "process 1 of 2 lost another one, which ended or whose host is out of reach (process 0: " in said


def test_it_ends_while_it_waits_for_the_other(tmp_path: Path) -> None:
    work = "[dist.all_reduce(torch.ones(1)) for _ in range(2 if rank else 1)]; time.sleep(1000)"
    with two_processes(tmp_path, WORK.format(work)) as (first, second):
        assert (first.stdout.readline(), second.stdout.readline()) == ("inside\n", "inside\n")
        time.sleep(1)
        first.kill()
        _, said = second.communicate()
        assert second.returncode == 1
        assert "pkmem.training.processes.LostProcessError: process 1 of 2 lost another one" in said
        assert "start all processes again with --resume" in said


def test_who_is_done_first_is_not_lost_and_a_stranger_is_not_let_in(tmp_path: Path) -> None:
    body = """
connect = socket.create_connection

def strangers_first(*address, **options):
    with connect(*address, **options) as stranger:
        stranger.sendall(b"x" * 20)
    connect(*address, **options).close()
    return connect(*address, **options)

socket.create_connection = strangers_first
with ending_together():
    time.sleep(2 * rank)
time.sleep(2 * (1 - rank))
"""
    with two_processes(tmp_path, body) as processes:
        said = [process.communicate()[1] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], said


def test_an_error_of_its_own_stays_its_own(tmp_path: Path) -> None:
    work = 'time.sleep(1000 * rank); raise RuntimeError("a shape is wrong")'
    with two_processes(tmp_path, WORK.format(work)) as processes:
        first, second = (process.communicate()[1] for process in processes)
        assert "RuntimeError: a shape is wrong" in first
        assert "LostProcessError" not in first
        assert "process 1 of 2 lost another one" in second


def test_one_process_alone_has_no_lines() -> None:
    with pytest.raises(RuntimeError, match="mine"), ending_together():
        raise RuntimeError("mine")


def test_a_stopped_process_is_not_lost(tmp_path: Path) -> None:
    """Slow is not gone: the kernel answers for it."""
    patch = "import pkmem.training.processes as p; p._IDLE_S = 1\n"
    with two_processes(tmp_path, patch + WORK.format("dist.all_reduce(torch.ones(1)); dist.barrier()")) as processes:
        first, _ = processes
        assert first.stdout.readline() == "inside\n"
        os.kill(first.pid, signal.SIGSTOP)
        time.sleep(7)
        os.kill(first.pid, signal.SIGCONT)
        said = [process.communicate()[1] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], said


@pytest.fixture
def restarting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")


def test_torchrun_without_restarts_restarts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not restarts_by_itself()
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert not restarts_by_itself()


def test_the_first_start_uses_torchs_own_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, setting in {"TORCHELASTIC_RESTART_COUNT": "0", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, setting)
    assert group_after_restart(None) == {}


def test_under_restarts_one_command_starts_a_run_and_goes_on_with_it(
    restarting: None, run: Path, text: Path, tmp_path: Path
) -> None:
    def fail(_model: object) -> None:
        raise ArithmeticError

    recipe = tiny(text, tmp_path / "run")
    for step in (2, 6):  # before the first checkpoint, and after it
        with pytest.raises(ArithmeticError), before_update(step, fail):
            train(recipe, resume=True, progress=False)
    assert latest_checkpoint(recipe.out).name == "step-3"
    train(recipe, resume=True, progress=False)
    assert_same_run(recipe.out, run)


def test_under_restarts_the_command_line_reads_the_recipe_at_the_first_start(
    restarting: None, config: Path, tmp_path: Path
) -> None:
    arguments = ["train", "--config", str(config), "--out", str(tmp_path / "run"), "--resume"]
    main([*arguments, "training.num_tokens=512"])
    assert latest_checkpoint(tmp_path / "run").name == "step-4"
    with pytest.raises(SystemExit):
        main([*arguments, "training.num_tokens=1024"])


def test_under_restarts_nothing_is_overwritten(restarting: None, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="would run --overwrite again after a failure"):
        train(tiny(text, tmp_path / "run"), overwrite=True, progress=False)


def test_without_restarts_there_has_to_be_something_to_resume(text: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        train(tiny(text, tmp_path / "run"), resume=True, progress=False)
