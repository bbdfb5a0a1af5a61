"""Training runs in processes of their own, to be disturbed from outside: started, watched, counted and compared."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from pkmem.layer.config import MemoryConfig
from pkmem.lm.config import ModelConfig
from pkmem.training.checkpoint import latest_checkpoint, open_shards
from pkmem.training.journal import read_metrics
from pkmem.training.recipe import Recipe, TrainingConfig

SURROUNDINGS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


class Launch:
    """A command that runs on its own, and all processes that come of it.

    Args:
        command: and its arguments.
        folder: where it runs, and leaves what it says.
        environ: variables beside this process's own.
    """

    def __init__(self, command: Sequence[str], folder: Path, environ: Mapping[str, str] = {}) -> None:
        self._mark = f"PKMEM_TRIAL={uuid.uuid4().hex}"  # in the environment of all that comes of it
        self._said = folder / f"{self._mark[-8:]}.txt"
        name, mark = self._mark.split("=")
        given = os.environ | SURROUNDINGS | {"PKMEM_CACHE": str(folder / "cache"), name: mark} | dict(environ)
        with self._said.open("w", encoding="utf-8") as said:
            self.process = subprocess.Popen(command, cwd=folder, env=given, stdout=said, stderr=subprocess.STDOUT)

    @property
    def said(self) -> str:
        """Everything its processes have printed so far."""
        return self._said.read_text(encoding="utf-8", errors="replace")

    def processes(self) -> list[int]:
        """The ids of those of its processes that live."""
        return [pid for pid in _all_processes() if self._mark in _environment_of(pid)]

    def rank(self, rank: int) -> int:
        """The id of the process that trains with this rank.

        Raises:
            LookupError: there is none now.
        """
        for pid in self.processes():
            if f"RANK={rank}" in _environment_of(pid) and pid != self.process.pid:
                return pid
        raise LookupError(f"no process has rank {rank}: {self.said[-2000:]}")

    def wait(self, timeout_s: float = 300) -> int:
        """Its exit status; one that does not end is killed, and that is an error."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise TimeoutError(f"not over after {timeout_s} s: {self.said[-2000:]}") from None

    def kill(self) -> None:
        """Ends all its processes at once."""
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()


def _all_processes() -> list[int]:
    return [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdecimal()]


def _environment_of(pid: int) -> list[str]:
    """Empty once it has ended."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def torchrun(*options: str, command: Sequence[str]) -> list[str]:
    """What starts several processes with one command."""
    return [sys.executable, "-m", "torch.distributed.run", *options, *command]


def training(recipe: Path, out: str, resume: bool = False) -> list[str]:
    """What trains a recipe into a folder, or goes on with it."""
    return ["-m", "pkmem", "train", "--config", str(recipe), "--out", out, *(["--resume"] if resume else [])]


def free_port() -> int:
    """A port nobody listens to now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def require_success(launches: Sequence[Launch]) -> None:
    """Waits for all of them.

    Raises:
        ChildProcessError: one failed.
    """
    for launch in launches:
        if status := launch.wait():
            raise ChildProcessError(f"exit status {status}: {launch.said[-2000:]}")


def write_recipe(folder: Path, num_steps: int, **changed: Any) -> Path:
    """A small language model with a memory, a text to train it on, and a checkpoint at every fourth step.

    Args:
        folder: where the recipe and the text go.
        num_steps: updates.
        changed: other fields of `TrainingConfig`.
    """
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 7))) for _ in range(200)]
    lines = (" ".join(draw.choices(words, k=10)) + ".\n" for _ in range(2000))
    (folder / "text.txt").write_text("".join(lines), encoding="utf-8")
    fields = {"num_tokens": num_steps * 1024, "batch_tokens": 1024, "log_every_steps": 1, "eval_every_steps": 10**6}
    fields |= {"checkpoint_every_steps": 4, "eval_tokens": 1024}
    recipe = Recipe(
        data=str(folder / "text.txt"),
        model=ModelConfig(num_layers=2, width=32, num_heads=2, context_tokens=64, vocab_size=512, memory_layers=[0]),
        memory=MemoryConfig(num_sub_keys=16, heads=2, knn=8, query_dim=32),
        training=TrainingConfig(**(fields | changed)),
    )
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.to_dict()), encoding="utf-8")
    return file


def await_step(run: Path, step: int, launch: Launch, timeout_s: float = 300) -> None:
    """Returns at once when a run has recorded a step, so that it is in the middle of the next one.

    Raises:
        TimeoutError: it did not get there.
        ChildProcessError: it ended before.
    """
    until = time.monotonic() + timeout_s
    while not _recorded(run, step):
        if launch.process.poll() is not None:
            raise ChildProcessError(f"ended before step {step}: {launch.said[-2000:]}")
        if time.monotonic() > until:
            raise TimeoutError(f"step {step} was not reached in {timeout_s} s: {launch.said[-2000:]}")
        time.sleep(0.002)


def _recorded(run: Path, step: int) -> bool:
    try:
        return any(record["step"] >= step for record in read_metrics(run))
    except FileNotFoundError:
        return False


def seconds_until(holds: Callable[[], bool], timeout_s: float) -> float:
    """Seconds until something holds; infinite if it does not in time."""
    begin = time.monotonic()
    while not holds():
        if time.monotonic() - begin > timeout_s:
            return float("inf")
        time.sleep(0.05)
    return time.monotonic() - begin


class Held(NamedTuple):
    """What a process holds: bytes of memory, open files, threads."""

    resident_bytes: int
    files: int
    threads: int


def held_by(pid: int) -> Held:
    """What a process holds now; of its open files those that stay open, not the one it writes a line to."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    status = {name: value.split() for name, value in (line.split(":", 1) for line in lines)}
    files = []
    for _ in range(5):
        files.append(len(list(Path(f"/proc/{pid}/fd").iterdir())))
        time.sleep(0.003)
    return Held(int(status["VmRSS"][0]) << 10, min(files), int(status["Threads"][0]))


def differences(left: Path, right: Path) -> list[str]:
    """In what two finished runs differ in one bit or more: losses, and the last checkpoint's tensors and random states."""
    differing = [] if _losses(left) == _losses(right) else ["losses"]
    ours, theirs = (_tensors(run) for run in (left, right))
    differing += sorted(ours.keys() ^ theirs.keys())
    return differing + [name for name in ours.keys() & theirs.keys() if not torch.equal(ours[name], theirs[name])]


def _losses(run: Path) -> list[tuple[Any, ...]]:
    return [(record["kind"], record["step"], record["loss"]) for record in read_metrics(run)]


def _tensors(run: Path) -> dict[str, torch.Tensor]:
    """Weights and moments of the last checkpoint, whole, and the random states of all processes as they were written."""
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    shards = open_shards(checkpoint)
    tensors = {name: torch.empty(shape, dtype=shards.dtype(name)) for name, shape in shards.shapes.items()}
    shards.read_into(tensors)
    states = sorted(checkpoint.glob("random-*.json"))
    assert states
    return tensors | {file.name: torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8) for file in states}
