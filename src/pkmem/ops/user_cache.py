"""The user's cache folder: where what was found out once about this machine is kept for the next process."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path


def user_cache(name: str) -> Path | None:
    """The folder `name` of pkmem in the user's cache folder, which need not be there yet; None where there is no home.

    That is XDG_CACHE_HOME if it names a folder from the root, else ~/.cache.
    """
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        cache = named if named.is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        return None
    return cache / "pkmem" / name


def write_whole(file: Path, content: bytes) -> None:
    """Writes a file, with its folder, so that whoever reads it at any time finds the old or the new one, whole.

    Raises:
        OSError: it could not be written; nothing is left behind.
    """
    temporary = file.with_name(f"{uuid.uuid4().hex}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
