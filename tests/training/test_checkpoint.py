"""Checkpoints: complete and verified or not there; what is broken, half-written or unsafe is refused."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pkmem.files.documents import CheckpointError, load_json, save_json
from pkmem.files.durable import move
from pkmem.training import checkpoint
from pkmem.training.checkpoint import latest_checkpoint, save_checkpoint, verify_checkpoint
from pkmem.training.shards import Shard, plan_shard
from pkmem.training.state import save_state
from pkmem.training.together import Together

# Run in a subprocess: writers that get half way, then wait to be killed or meet the limit on file size.
WRITER = """
import resource, sys, time
from pathlib import Path
import torch
from pkmem.training.checkpoint import save_checkpoint
from pkmem.files.documents import CheckpointError
from pkmem.training.shards import plan_shard
from pkmem.training.state import save_state
from pkmem.training.together import Together

def wait(folder):
    save_state(folder / "half.json", {"x": torch.ones(1000)})
    print("half way", flush=True)
    time.sleep(60)

def plain(folder):
    (folder / "big").write_bytes(bytes(1 << 20))

large = plan_shard({"x": torch.ones(1 << 18)}, Together())
if "limit" in sys.argv:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
for write, shard in ((plain, None), (print, large)) if "limit" in sys.argv else ((wait, large),):
    try:
        save_checkpoint(Path(sys.argv[1]), 3, write, shard)
    except CheckpointError as error:
        print(error)
"""


def write_small(folder: Path) -> None:
    (folder / "sub" / "deep").mkdir(parents=True)
    (folder / "sub" / "deep" / "b.bin").write_bytes(bytes(range(256)))
    (folder / "empty").touch()
    save_state(folder / "state.json", {"step": 3, "x": torch.arange(5.0)})


def small_shard() -> Shard:
    return plan_shard({"a": torch.arange(5.0), "b": torch.tensor(3)}, Together())


def large_shard() -> Shard:
    return plan_shard({"x": torch.ones(1 << 20)}, Together())


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- folders ------------------------------------------------------------------------------------------------


def test_save_verify_latest_and_pruning(tmp_path: Path) -> None:
    run = tmp_path / "deep" / "run"
    assert latest_checkpoint(run) is None
    for step in (0, 5, 9, 10, 100):
        path = save_checkpoint(run, step, write_small, small_shard())
        assert path == run / "checkpoints" / f"step-{step}" == latest_checkpoint(run)
        verify_checkpoint(path)
    assert names(run / "checkpoints") == {"step-10", "step-100"}
    manifest = load_json(path / "manifest.json")
    assert set(manifest["files"]) == {"empty", "sub/deep/b.bin", "state.json", "shard-00001-of-00001.safetensors"}
    assert manifest["files"]["sub/deep/b.bin"]["size"] == 256
    assert manifest["tensors"] == {"a": {"dtype": "F32", "shape": [5]}, "b": {"dtype": "I64", "shape": []}}
    save_checkpoint(run, 50, write_small, small_shard(), keep=1)  # after a step back: the later one is not its business
    assert names(run / "checkpoints") == {"step-50", "step-100"}
    for step, keep in ((-1, 1), (1, 0)):
        with pytest.raises(ValueError, match="keep"):
            save_checkpoint(run, step, write_small, small_shard(), keep=keep)


def test_latest_ignores_what_is_not_complete(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 2, write_small, small_shard())
    for name in ("step-9.tmp", "step-8", "step-x", "best"):
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints" / "step-9.tmp" / "manifest.json").touch()
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert latest.name == "step-2"
    save_checkpoint(tmp_path, 3, write_small, small_shard())
    assert names(tmp_path / "checkpoints") == {"step-2", "step-3", "step-8", "step-x", "best"}


def test_a_step_saved_again_is_replaced(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, write_small, small_shard())
    assert save_checkpoint(tmp_path, 1, lambda folder: save_json(folder / "new.json", 2)) == path
    verify_checkpoint(path)
    assert names(path) == {"new.json", "manifest.json"}
    assert names(tmp_path / "checkpoints") == {"step-1"}


@pytest.mark.parametrize("renames", [1, 2])
def test_interrupted_while_replacing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int) -> None:
    path, done = save_checkpoint(tmp_path, 1, write_small, small_shard()), []

    def interrupted(source: Path, target: Path) -> None:
        done.append(source.name)
        if len(done) == renames:
            raise KeyboardInterrupt
        move(source, target)

    monkeypatch.setattr(checkpoint, "move", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 1, lambda folder: save_json(folder / "new.json", 2))
    verify_checkpoint(path)
    assert (path / "empty").exists()
    assert names(tmp_path / "checkpoints") == {"step-1"}


def test_killed_while_replacing(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, write_small, small_shard())
    path = save_checkpoint(tmp_path, 2, write_small, small_shard())
    old = path.rename(path.with_name("step-2.old"))
    shutil.copytree(old, path.with_name("step-2.tmp"))
    assert latest_checkpoint(tmp_path) == old
    verify_checkpoint(old)
    save_checkpoint(tmp_path, 3, write_small, small_shard())
    assert names(tmp_path / "checkpoints") == {"step-2", "step-3"}
    path = path.with_name("step-3")
    shutil.copytree(path, path.with_name("step-3.old"))  # killed one rename later
    assert latest_checkpoint(tmp_path) == path
    save_checkpoint(tmp_path, 4, write_small, small_shard(), keep=3)
    assert names(tmp_path / "checkpoints") == {"step-2", "step-3", "step-4"}


@pytest.mark.case("Environments", "an old checkpoint that another program has open when it is to be deleted (Windows)",
    "works: a later save deletes it", "https://github.com/huggingface/transformers/issues/28904")  # fmt: skip
def test_a_checkpoint_that_someone_reads_is_deleted_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, rename = save_checkpoint(tmp_path, 1, write_small, small_shard()), Path.rename

    def held(self: Path, target: Path) -> Path:
        if self == old:
            raise PermissionError(errno.EACCES, "The process cannot access the file", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", held)
    verify_checkpoint(save_checkpoint(tmp_path, 2, write_small, small_shard(), keep=1))
    assert names(tmp_path / "checkpoints") == {"step-1", "step-2"}
    monkeypatch.undo()
    save_checkpoint(tmp_path, 3, write_small, small_shard(), keep=1)
    assert names(tmp_path / "checkpoints") == {"step-3"}


@pytest.mark.case("Environments", "an output folder that is a link to another disk", "works", "")
def test_a_run_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    path = save_checkpoint(tmp_path / "run", 1, write_small, small_shard())
    assert path == tmp_path / "run" / "checkpoints" / "step-1" == latest_checkpoint(tmp_path / "run")
    verify_checkpoint(tmp_path / "disk" / "checkpoints" / "step-1")


@pytest.mark.case(
    "Environments", "a file system that syncs no folder and no file opened for reading (Windows)", "works", ""
)
@pytest.mark.case(
    "Environments", "a network disk that syncs no folder", "works", "https://github.com/borgbackup/borg/issues/1287"
)
@pytest.mark.case("Environments", "a disk that syncs nothing", "works: without a promise for a loss of power",
    "https://github.com/syncthing/syncthing/issues/5704")  # fmt: skip
@pytest.mark.parametrize("system", ["Windows", "samba", "FUSE"])
def test_checkpoints_are_saved_where_little_can_be_synced(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_file, fsync = os.open, os.fsync
    opened: dict[int, tuple[Path, int]] = {}
    synced = set()

    def opening(path: Path, flags: int, *mode: int, **folder: int) -> int:
        if folder:  # shutil's, which opens what it removes
            return open_file(path, flags, *mode, **folder)
        if system == "Windows" and Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied")
        handle = open_file(path, flags, *mode)
        opened[handle] = (Path(path), flags)
        return handle

    def syncing(handle: int) -> None:
        path, flags = opened.pop(handle)
        if system == "Windows" and not flags & os.O_RDWR:
            raise OSError(errno.EBADF, "Bad file descriptor")
        if system == "samba" and path.is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")
        if system == "FUSE":
            raise OSError(errno.ENOTSUP, "Operation not supported")
        fsync(handle)
        synced.add(path.name)

    monkeypatch.setattr("os.open", opening)
    monkeypatch.setattr("os.fsync", syncing)
    for step in (1, 2, 3):
        verify_checkpoint(save_checkpoint(tmp_path, step, write_small, small_shard()))
    assert names(tmp_path / "checkpoints") == {"step-2", "step-3"}
    files = {"b.bin", "empty", "state.json", "shard-00001-of-00001.safetensors"}
    assert synced >= (set() if system == "FUSE" else files)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fails_to_sync_fails_the_save(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_checkpoint(tmp_path, 1, write_small, small_shard())

    def failing(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as broken:
        broken.setattr("os.fsync", failing)
        with pytest.raises(OSError if number == errno.EIO else CheckpointError):
            save_checkpoint(tmp_path, 2, write_small, small_shard())
    verify_checkpoint(path)
    assert names(tmp_path / "checkpoints") == {"step-1"}


def all_files(path: Path) -> list[Path]:
    return [file for file in sorted(path.rglob("*")) if file.is_file()]


def test_truncation_and_flipped_bits_are_detected(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, write_small, small_shard())
    assert len(all_files(path)) == 5
    for file in all_files(path):
        whole = file.read_bytes()
        lengths = {0, 1, len(whole) // 2, len(whole) - 2}  # -2: the manifest may lose its newline
        for size in (size for size in lengths if 0 <= size < len(whole)):
            file.write_bytes(whole[:size])
            with pytest.raises(CheckpointError, match=file.name) as caught:
                verify_checkpoint(path)
            assert "\n" not in str(caught.value)
        positions = range(len(whole)) if file.name == "manifest.json" else range(0, len(whole), 37)
        for position in positions:
            flipped = bytearray(whole)
            flipped[position] ^= 1 << position % 8
            file.write_bytes(flipped)
            with pytest.raises(CheckpointError, match=re_name(path)):
                verify_checkpoint(path)
        file.write_bytes(whole + b"\0")
        with pytest.raises(CheckpointError):
            verify_checkpoint(path)
        file.write_bytes(whole)
        verify_checkpoint(path)


def re_name(path: Path) -> str:
    return str(path).replace(".", r"\.")


def test_missing_and_extra_files_are_detected(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, write_small, small_shard())
    for file in all_files(path):
        moved = file.rename(tmp_path / "moved")
        with pytest.raises(CheckpointError, match=f"{file.name}: (missing|No such file)"):
            verify_checkpoint(path)
        moved.rename(file)
    for name in ("extra", ".hidden", "sub/extra", "sub/manifest.json"):
        (path / name).touch()
        with pytest.raises(CheckpointError, match=f"{name}: not in the manifest"):
            verify_checkpoint(path)
        (path / name).unlink()
    (path / "sub" / "deep" / "b.bin").rename(tmp_path / "b.bin")
    (path / "sub" / "deep" / "b.bin").symlink_to(tmp_path / "b.bin")
    with pytest.raises(CheckpointError, match=r"b\.bin: a link"):
        verify_checkpoint(path)
    with pytest.raises(CheckpointError, match="manifest"):
        verify_checkpoint(tmp_path / "absent")
    for document in ([], {"empty": 0}, {"../outside": {"size": 0}}):
        save_json(path / "manifest.json", document)
        with pytest.raises(CheckpointError):
            verify_checkpoint(path)


def test_write_must_not_make_a_manifest_or_links(tmp_path: Path) -> None:
    for write in (
        lambda folder: save_json(folder / "manifest.json", {}),
        lambda folder: (folder / "link").symlink_to(tmp_path),
    ):
        with pytest.raises(CheckpointError, match=r"manifest\.json|link"):
            save_checkpoint(tmp_path, 1, write)
        assert not names(tmp_path / "checkpoints")


# --- failures while writing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("boom"), PermissionError(errno.EACCES, "no")])
def test_a_failed_write_leaves_no_trace(tmp_path: Path, error: BaseException) -> None:
    def write(folder: Path) -> None:
        write_small(folder)
        raise error

    path = save_checkpoint(tmp_path, 1, write_small, small_shard())
    for step in (1, 2):
        with pytest.raises(type(error)) as caught:
            save_checkpoint(tmp_path, step, write, keep=1)
        assert caught.value is error
        verify_checkpoint(path)
        assert names(tmp_path / "checkpoints") == {"step-1"}


def test_disk_full(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        write_small(folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match=r"no space left.*no checkpoint exists"):
        save_checkpoint(tmp_path, 1, write)
    path = save_checkpoint(tmp_path, 1, write_small, small_shard())
    with pytest.raises(CheckpointError, match=r"no space left.*the previous checkpoint step-1 is intact") as caught:
        save_checkpoint(tmp_path, 2, write, keep=1)
    assert "\n" not in str(caught.value)
    verify_checkpoint(path)
    assert names(tmp_path / "checkpoints") == {"step-1"}


def test_disk_really_full(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        path = save_checkpoint(tmp_path, 1, write_small, small_shard())
        # Fails while tensors are written, in plain Python, and only when the manifest is written.
        for write, shard in (
            (write_small, large_shard()),
            (lambda folder: (folder / "x").write_bytes(bytes(1 << 22)), small_shard()),
            (fill, small_shard()),
        ):
            with pytest.raises(CheckpointError, match=r"no space left.*the previous checkpoint step-1 is intact"):
                save_checkpoint(tmp_path, 2, write, shard, keep=1)
            verify_checkpoint(path)
            assert names(tmp_path / "checkpoints") == {"step-1"}
        save_checkpoint(tmp_path, 2, write_small, small_shard())
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def fill(folder: Path) -> None:
    """To the last page."""
    with (folder / "x").open("wb", buffering=0) as stream:
        try:
            while stream.write(bytes(4096)):
                pass
        except OSError:
            pass


@pytest.mark.linux
def test_file_size_limit_in_another_process(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, write_small, small_shard())
    command = [sys.executable, "-c", WRITER, str(tmp_path), "limit"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    plain, safetensors = result.stdout.splitlines()
    for line in (plain, safetensors):
        assert "no space left" in line
        assert "the previous checkpoint step-1 is intact" in line
    verify_checkpoint(path)
    assert names(tmp_path / "checkpoints") == {"step-1"}


@pytest.mark.linux
def test_kill_in_the_middle_of_a_write(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, write_small, small_shard())
    command = [sys.executable, "-c", WRITER, str(tmp_path), "kill"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half way\n"
        os.kill(process.pid, signal.SIGKILL)
    assert names(tmp_path / "checkpoints") == {"step-1", "step-3.tmp"}
    assert latest_checkpoint(tmp_path) == path
    verify_checkpoint(path)
    verify_checkpoint(save_checkpoint(tmp_path, 3, write_small, small_shard()))
    assert names(tmp_path / "checkpoints") == {"step-1", "step-3"}
