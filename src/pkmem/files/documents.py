"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pkmem.files.durable import replacing

LARGEST_DOCUMENT = 8 << 20  # bytes of JSON that are read: of 80,000 tensors
_MOST_BRACKETS = 300_000  # in it: millions of empty lists take seconds and hundreds of MB


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
        CheckpointError: the file is missing, a link, not JSON, or larger than `LARGEST_DOCUMENT`.
    """
    try:
        if path.is_symlink():
            raise CheckpointError(f"{path}: a link; put the file itself there")
        if (size := path.stat().st_size) > LARGEST_DOCUMENT:
            raise CheckpointError(f"{path}: {size:,} bytes of JSON are refused; use another checkpoint")
        return parse_json(path.read_bytes(), path)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; check the path or use another checkpoint") from error


def parse_json(text: bytes, path: Path) -> Any:
    """The document in the text of a file; a name that stands twice in an object is refused.

    Raises:
        CheckpointError: the text is not JSON.
    """
    try:
        if text.count(b"[") + text.count(b"{") > _MOST_BRACKETS:
            raise ValueError(f"more than {_MOST_BRACKETS:,} lists and objects")
        return json.loads(text.decode(), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON, truncated? ({error}); use another checkpoint") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name stands twice in an object")
    return made
