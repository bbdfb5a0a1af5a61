"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


class CheckpointError(ValueError):
    """A checkpoint that is missing, broken, truncated or unsafe: one line with the file and the fix."""


def save_json(path: Path, document: Any) -> None:
    """Writes a JSON document atomically: a reader sees the old one or the new one.

    Args:
        path: the file; its folder exists.
        document: what `json` can write; NaN and Infinity stay as those words.

    Raises:
        TypeError: `document` has something JSON cannot hold; the file is untouched.
    """
    save_text(path, json.dumps(document, indent=1) + "\n")


def save_text(path: Path, text: str) -> None:
    """Writes a text file, in a folder that exists, atomically: a reader sees the old one or the new one."""
    tmp = path.with_name(f"{path.name}.tmp")
    try:
        with tmp.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        tmp.replace(path)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def load_json(path: Path) -> Any:
    """Reads a JSON document.

    Raises:
        CheckpointError: the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; check the path or use another checkpoint") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON, truncated? ({error}); use another checkpoint") from error


def fsync(path: Path) -> None:
    """Has a file or folder written to the disk before returning; Windows knows no such thing of a folder."""
    windows = sys.platform == "win32"
    if windows and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
