"""Checkpoints against kills, full disks, damage and hostile files: trials 4, 5, 7, 8, 9 and 13."""

from __future__ import annotations

import hashlib
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Split

from benchmarks.reliability.damage import damaged_checkpoints
from benchmarks.reliability.hostile import hostile_directories
from benchmarks.reliability.kills import killed_while_saving
from benchmarks.reliability.other_sizes import other_numbers_of_processes
from benchmarks.reliability.outcome import Outcome, Trial
from benchmarks.reliability.states import state_of, steps_in
from benchmarks.reliability.workers import results
from pkmem.files.documents import CheckpointError, load_json
from pkmem.training import checkpoint
from pkmem.training.checkpoint import save_checkpoint
from pkmem.training.saver import CheckpointSaver
from pkmem.training.shards import Shard, plan_shard
from pkmem.training.together import Together

# 8: a full disk ---------------------------------------------------------------------------------------------


@contextmanager
def small_disk(num_bytes: int) -> Iterator[Path]:
    """A file system in memory.

    Raises:
        PermissionError: this machine does not let us mount one.
    """
    with tempfile.TemporaryDirectory() as place:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", place]
        try:
            done = subprocess.run(mount, capture_output=True, text=True, check=False)
        except OSError as error:
            raise PermissionError(f"no mount here: {error}") from error
        if done.returncode:
            raise PermissionError(done.stderr.strip())
        try:
            yield Path(place)
        finally:
            subprocess.run(["umount", "-l", place], check=True)


def save_on_a_full_disk(together: Together, place: str, in_background: bool) -> list[str]:
    """Saves what fits; then a process saves more than is left, while the other's share fits; then again what fits."""
    run, said = Path(place) / "run", []
    saver = CheckpointSaver(run, in_background)
    with saver:
        saver.save(1, state_of(1, together.size), lambda folder: None)
    large = together.size - 1
    try:
        with saver:
            mesh = DeviceMesh("cpu", torch.arange(together.size))
            # One row more than there are processes before the last: it is the first process's or the last one's alone.
            rows = torch.ones(1 if together.rank == 0 else 0, 4 << 20)
            table = DTensor.from_local(rows, mesh, [Split(0)], run_check=False, shape=(1, 4 << 20), stride=(4 << 20, 1))
            tensors = state_of(2, together.size) | {"large": table if large else torch.ones(4 << 20)}
            saver.save(2, tensors, lambda folder: None)
    except CheckpointError as error:
        said.append(str(error))
    with saver:
        saver.save(3, state_of(3, together.size), lambda folder: None)
    return said


def full_disk(short: bool) -> Iterator[Outcome]:
    """Fills a disk of 10 MB by one of two processes, while training waits or goes on."""
    for in_background in (False, True):
        what = (
            f"the disk is full for one of 2 processes that save {'in the background' if in_background else ''}".strip()
        )
        required = "the same error in both, the checkpoint before is whole, and saving goes on once there is room"
        try:
            with small_disk(10 << 20) as place:
                errors = results(2, save_on_a_full_disk, str(place), in_background)
                left = sorted(path.name for path in (place / "run" / "checkpoints").iterdir())
                valid = steps_in(place / "run" / "checkpoints" / "step-1") == {1.0}
        except PermissionError as error:
            yield Outcome(8, what, required, f"no file system could be mounted: {error}", None)
            continue
        same = len({tuple(error) for error in errors}) == 1 and len(errors[0]) == 1
        clear = same and "no space left in process 0" in errors[0][0] and "step-1 is intact" in errors[0][0]
        found = f"{sum(map(len, errors))} of 2 processes ended with the error; {', '.join(left)} are there"
        yield Outcome(8, what, required, found, clear and valid and left == ["step-1", "step-3"])


# 13: the cost of certainty ----------------------------------------------------------------------------------


def cost_of_hashing(short: bool) -> Iterator[Outcome]:
    """What a save reads and hashes; and the same save with and without hashes and manifest, in turns."""
    num_rows = (1 << 16) if short else (2 << 20)
    table = torch.randn(num_rows, 64)
    shard = plan_shard({"table": table, "exp_avg": table + 1}, Together())
    megabytes = 2 * table.nbytes / 1e6
    with tempfile.TemporaryDirectory() as place:
        yield _bytes_read_and_hashed(Path(place), shard, megabytes)
        if not short:
            yield _time_with_and_without(Path(place), shard, megabytes)


def _bytes_read_and_hashed(run: Path, shard: Shard, megabytes: float) -> Outcome:
    hashed, sha256 = 0, hashlib.sha256

    class Counting:
        def __init__(self, data: bytes = b"") -> None:
            self.of = sha256()
            self.update(data)

        def update(self, data: Any) -> None:
            nonlocal hashed
            hashed += memoryview(data).nbytes
            self.of.update(data)

        def hexdigest(self) -> str:
            return self.of.hexdigest()

    with mock.patch.object(hashlib, "sha256", Counting):
        before = _bytes_read()
        path = save_checkpoint(run, 0, lambda folder: None, shard)
        read = _bytes_read() - before
    file = path / shard.file
    said = load_json(path / "manifest.json")["files"][file.name]["sha256"]
    right, rest = said == sha256(file.read_bytes()).hexdigest(), hashed - file.stat().st_size
    return Outcome(
        13,
        f"what saving {megabytes:,.0f} MB reads from files and hashes",
        "every byte is hashed once on its way to the disk, none is read again (10 kB are left to the manifest)",
        f"the hash is {'right' if right else 'WRONG'}, {rest:,} bytes more than the file has were hashed, {read:,} read",
        right and 0 <= rest < 10_000 and read < 10_000,
    )


def _bytes_read() -> int:
    """Bytes that this process has read from files so far (Linux)."""
    return int(Path("/proc/self/io").read_text().split()[1])


def _time_with_and_without(run: Path, shard: Shard, megabytes: float) -> Outcome:
    class NoHash:
        def update(self, data: Any) -> None:
            pass

        def hexdigest(self) -> str:
            return ""

    def seconds(hashed: bool, step: int) -> float:
        start = time.perf_counter()
        if hashed:
            save_checkpoint(run, step, lambda folder: None, shard, keep=1)
        else:
            with (
                mock.patch.object(hashlib, "sha256", NoHash),
                mock.patch.object(checkpoint, "_seal", lambda *arguments: (arguments[0] / "manifest.json").touch()),
            ):
                save_checkpoint(run, step, lambda folder: None, shard, keep=1)
        return time.perf_counter() - start

    seconds(True, 1)
    pairs = [(seconds(True, 2 * i), seconds(False, 2 * i + 1)) for i in range(1, 16)]
    shares = sorted(1 - without / with_all for with_all, without in pairs)
    share, spread = statistics.median(shares), f"{shares[len(shares) // 4]:.0%} to {shares[-1 - len(shares) // 4]:.0%}"
    return Outcome(
        13,
        f"the share of hashes and manifest in saving {megabytes:,.0f} MB, {len(pairs)} times with and without in turns",
        "at most 15 % of the time",
        f"{share:.0%} (middle half {spread}) of {statistics.median(pair[0] for pair in pairs):.2f} s",
        share <= 0.15,
    )


TRIALS: dict[int, Trial] = {
    4: other_numbers_of_processes,
    5: killed_while_saving,
    7: damaged_checkpoints,
    8: full_disk,
    9: hostile_directories,
    13: cost_of_hashing,
}
