"""Where files are kept that were made once and serve again."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """The folder for files of a kind, such as "tokens": $PKMEM_CACHE, or ~/.cache/pkmem/KIND; it need not be there.

    Raises:
        ValueError: there is no home folder.
    """
    if named := os.environ.get("PKMEM_CACHE"):
        return Path(named)
    try:
        return Path.home() / ".cache" / "pkmem" / kind
    except RuntimeError as error:
        raise ValueError(f"there is no home folder to keep {kind} in: set PKMEM_CACHE to a folder") from error


def make_cache_folder(folder: Path, kind: str) -> None:
    """Makes a folder for files of a kind.

    Raises:
        ValueError: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        reason = f"{kind} cannot be written to {folder} ({error.strerror})"
        raise ValueError(f"{reason}: set PKMEM_CACHE to a folder where they can") from error
