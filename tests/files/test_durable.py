"""Files that are whole or not there: while they are written, where a system renames and syncs as others do not."""

import errno
import os
import sys
from pathlib import Path

import pytest

from pkmem.files import durable
from pkmem.files.durable import move, replacing, sync


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    return path


def test_a_file_is_replaced_once_it_is_whole(file: Path) -> None:
    with replacing(file) as stream:
        stream.write(b"new")
        assert file.read_bytes() == b"old"
    assert file.read_bytes() == b"new"
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_file_that_was_not_written_to_its_end_leaves_the_old_one(file: Path, error: BaseException) -> None:
    def interrupted() -> None:
        with replacing(file) as stream:
            stream.write(b"new")
            raise error

    with pytest.raises(type(error)):
        interrupted()
    assert file.read_bytes() == b"old"
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.case("Environments", "a file that a reader or a virus scanner has open when it is to be replaced (Windows)",
    "works: it is tried again for a second", "https://github.com/tensorflow/tensorflow/issues/41380")  # fmt: skip
@pytest.mark.parametrize(
    ("system", "times", "moved"), [("win32", 1, True), ("win32", 3, True), ("win32", 4, False), ("linux", 1, False)]
)
def test_a_file_that_someone_holds_is_moved_later(
    system: str, times: int, moved: bool, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, tries, waited = Path.replace, [], []

    def held(source: Path, target: Path) -> None:
        tries.append(target)
        if len(tries) <= times:
            raise PermissionError(errno.EACCES, "Access is denied", str(source), 5, str(target))
        replace(source, target)

    monkeypatch.setattr(Path, "replace", held)
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setattr(sys, "platform", system)
    target = file.with_name("target")
    if moved:
        move(file, target)
        assert target.read_bytes() == b"old"
    else:
        with pytest.raises(PermissionError, match="Access is denied"):
            move(file, target)
        assert file.read_bytes() == b"old"
    assert waited == list(durable._WAITS_SECONDS[:times] if system == "win32" else ())


def test_a_file_that_must_not_be_written_is_synced(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opening, synced = os.open, []

    def as_user(path: Path, flags: int) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opening(path, flags)

    monkeypatch.setattr("os.open", as_user)
    monkeypatch.setattr("os.fsync", synced.append)
    sync(file)
    assert len(synced) == 1


def test_what_is_not_there_cannot_be_synced(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "absent")
