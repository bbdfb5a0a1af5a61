"""The files of a text: where they are, and how they are opened."""

from __future__ import annotations

import bz2
import gzip
import importlib.util
import io
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

try:
    from compression import zstd  # Python 3.14
except ImportError:
    try:
        from backports import zstd
    except ImportError:
        zstd = None

TEXT_ENDINGS = (".txt", ".md", ".py")
JSON_LINES = ".jsonl"
COMPRESSED_ENDINGS = (".gz", ".bz2", ".zst")
# What a file raises that is damaged, or no text.
UNREADABLE = (OSError, EOFError, UnicodeDecodeError, zlib.error, *((zstd.ZstdError,) if zstd else ()))
ENDINGS_READ = f"{' '.join(TEXT_ENDINGS)} {JSON_LINES}, each also with {' '.join(COMPRESSED_ENDINGS)}"

CORPUS_PACKAGES = ("torch", "sympy", "numpy", "networkx")
LEFT_OUT = frozenset({"test", "tests", "idlelib", "idle_test", "site-packages", "dist-packages"})


@dataclass(frozen=True)
class TextFile:
    """A file to read.

    Args:
        path: where it is.
        name: its path relative to what was asked for: the same on every machine.
    """

    path: Path
    name: str

    @property
    def is_json_lines(self) -> bool:
        """Whether it holds a document per line, or is one."""
        return _text_ending(self.path) == JSON_LINES


def _text_ending(path: Path) -> str:
    """The ending of a file's name under its compression's."""
    inner = Path(path.stem) if path.suffix.lower() in COMPRESSED_ENDINGS else path
    return inner.suffix.lower()


def _is_read(path: Path) -> bool:
    return _text_ending(path) in (*TEXT_ENDINGS, JSON_LINES)


def find_files(data: str) -> list[TextFile]:
    """The files of a text, sorted by name within each root.

    Args:
        data: "python", "python+", a file, a directory or a glob, as in `read_documents`.

    Returns:
        the files, at least one; none has been opened.

    Raises:
        ValueError: nothing there to read, an ending that is not read, or a package that is missing.
    """
    if data == "python":
        return _standard_library()
    if data == "python+":
        return _standard_library() + [file for name in CORPUS_PACKAGES for file in _package(name)]
    path = _expanded(data)
    if path.is_file() and not _is_read(path):
        raise ValueError(f"{data}: cannot read a {path.suffix or path.name!r} file as text; read are {ENDINGS_READ}")
    if path.is_file():
        return [TextFile(path, path.name)]
    if data and path.is_dir():
        files = _named(_walk(path), path)
    elif any(char in data for char in "*?["):
        files = _glob(path)
    else:
        raise ValueError(
            f"{data!r}: no such file or directory; give one, a glob, 'python', 'python+', "
            "'hf:NAME' or 'synthetic:facts:NUM'"
        )
    if not files:
        raise ValueError(f"{data}: no file to read there; read are {ENDINGS_READ}")
    return files


def _expanded(data: str) -> Path:
    try:
        return Path(data).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{data}: there is no such home folder; give the whole path") from error


def _standard_library() -> list[TextFile]:
    root = Path(sysconfig.get_path("stdlib"))
    files = _sources(root, root)
    if not files:
        raise ValueError(f"python: this Python has no .py files in {root}; give a file or a directory of text")
    return files


def _package(name: str) -> list[TextFile]:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f'python+: {name} is not installed; run: pip install "pkmem[corpus]"')
    folder = Path(next(iter(spec.submodule_search_locations)))
    return _sources(folder, folder.parent)


def _sources(folder: Path, root: Path) -> list[TextFile]:
    return [file for file in _named(_walk(folder, LEFT_OUT), root) if file.path.suffix == ".py"]


def _walk(root: Path, left_out: frozenset[str] = frozenset()) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in left_out and not name.startswith(".")]
        yield from (Path(folder, name) for name in names)


def _glob(pattern: Path) -> list[TextFile]:
    parts = pattern.parts
    first = next(place for place, part in enumerate(parts) if any(char in part for char in "*?["))
    root = Path(*parts[:first])
    return _named(root.glob(str(Path(*parts[first:]))), root)


def _named(paths: Iterable[Path], root: Path) -> list[TextFile]:
    """The files to read among paths, hidden ones left out, named relative to the root and sorted by name."""
    chosen = (path for path in paths if _is_read(path) and not path.name.startswith(".") and path.is_file())
    return sorted((TextFile(path, path.relative_to(root).as_posix()) for path in chosen), key=lambda file: file.name)


def open_text(path: Path) -> IO[str]:
    """A text file, decompressed and decoded, without a byte-order mark."""
    # newline="\n": nothing is translated, and lines end at "\n" alone.
    return io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline="\n")


def open_bytes(path: Path) -> io.BufferedReader:
    """A file, decompressed as its ending says."""
    match path.suffix.lower():
        case ".gz":
            return io.BufferedReader(gzip.open(path))
        case ".bz2":
            return io.BufferedReader(bz2.open(path))
        case ".zst":
            if zstd is None:
                raise ValueError(f'{path}: backports.zstd is not installed; run: pip install "pkmem[lm]"')
            return io.BufferedReader(zstd.open(path))
    return path.open("rb")
