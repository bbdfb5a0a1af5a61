"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pkmem.text.durable import replacing


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
    with replacing(path) as file:
        file.write(text.encode())


def empty(folder: Path) -> None:
    """Removes all that is in a folder. The folder stays: it may be a link, or where a disk is mounted."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


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
