"""Files that are on the disk whole, or not there at all."""

from __future__ import annotations

import errno
import os
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

# What systems and disks answer that cannot sync a file, or not one opened so. A full or broken disk answers otherwise.
_CANNOT_SYNC = {
    getattr(errno, name)
    for name in ("EACCES", "EBADF", "EINVAL", "EISDIR", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "EPERM", "EROFS")
}
_WAITS_SECONDS = (0.01, 0.1, 1.0)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` once all of it is on the disk, and is removed otherwise.

    Args:
        path: the file; its folder exists. Readers see the old one or the new one.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        sync(temporary)
        move(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def move(source: Path, target: Path) -> None:
    """Renames a file, over another if there is one, or a folder.

    Windows refuses while a reader, or a program that looks for viruses, has it open: that is waited for, a second or so.
    """
    for seconds in _WAITS_SECONDS:
        try:
            source.replace(target)
        except PermissionError:
            if sys.platform != "win32":
                raise
            time.sleep(seconds)
        else:
            return
    source.replace(target)


def sync(path: Path) -> None:
    """Has a file or folder written to the disk before returning, where the system and the disk can do that.

    Windows syncs no folder, and no file that was opened for reading; network disks are often as strict, or sync nothing.

    Raises:
        OSError: the disk is full or broken, or nothing is there.
    """
    for flags in (os.O_RDWR, os.O_RDONLY):  # folders, and files that must not be written, open for reading alone
        try:
            handle = os.open(path, flags)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            if error.errno not in _CANNOT_SYNC:
                raise
        else:
            return
