"""Compiled kernels on disk, for the next process.

numba's own cache stops the program where one of its files is damaged or the disk is full, may mix up the code of two
types where two processes fill it at once, and looks for changes in a kernel's own file alone. Here the code of a kernel
for some types is one file. Its name says what else it depends on, and it begins with a digest of its name, our sources
and the code: a file that is not whole, or of other sources, is as good as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
import stat
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

from pkmem.ops.user_cache import user_cache, write_whole

_HERE = Path(__file__).parent
_DIGEST_BYTES = hashlib.sha256().digest_size
_logger = logging.getLogger(__name__)


class KernelCache(NullCache):
    """The code of one function, for all types it was called with: what numba's dispatcher asks of a cache."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._name = f"{function.__module__}.{function.__qualname__}".replace("<locals>.", "")
        self._source = function.__code__.co_filename

    def load_overload(self, signature: Any, context: Any) -> Any:
        """The compiled code, None where it is not on disk."""
        context.refresh()
        name, sources = self._file_name(signature, context.codegen()), _sources(self._source)
        for folder in folders():
            stored = _read(folder / name)
            if stored and stored[:_DIGEST_BYTES] == _digest(name, sources, stored[_DIGEST_BYTES:]):
                return CompileResult._rebuild(context, *pickle.loads(stored[_DIGEST_BYTES:]))
        _say_that_it_compiles()
        return None

    def save_overload(self, signature: Any, compiled: Any) -> None:
        """Keeps compiled code in the first folder that takes it, if any does."""
        assert not compiled.library.has_dynamic_globals, "it holds addresses of this process: pass large arrays in"
        name, code = self._file_name(signature, compiled.codegen), dumps(compiled._reduce())
        whole = _digest(name, _sources(self._source), code) + code
        if not any(_write(folder / name, whole) for folder in folders()):
            _say_that_nothing_is_kept()

    def _file_name(self, signature: Any, codegen: Any) -> str:
        compiled_for = (signature, codegen.magic_tuple(), sys.version, numba.__version__, llvmlite.__version__)
        where = str(_HERE)  # several installations may share a folder
        return f"{self._name}.{hashlib.sha256(repr((compiled_for, where)).encode()).hexdigest()[:24]}.kernel"


def folders() -> Iterator[Path]:
    """Where kernels may lie, in the order in which they are looked for and kept."""
    if not _HERE.is_dir():  # in an archive: it cannot be seen whether our sources have changed
        return
    if numba.config.CACHE_DIR:
        yield Path(numba.config.CACHE_DIR)
        return
    yield _HERE / "__pycache__"
    if folder := user_cache("kernels"):
        yield folder


@cache
def _sources(file: str) -> bytes:
    """A digest of all that kernels are made of: one is built into another."""
    digest = hashlib.sha256()
    for source in sorted({*_HERE.glob("*.py"), Path(file)}):
        with contextlib.suppress(OSError):
            digest.update(source.read_bytes())
    return digest.digest()


def _digest(name: str, sources: bytes, code: bytes) -> bytes:
    return hashlib.sha256(b"\0".join((name.encode(), sources, code))).digest()


def _read(file: Path) -> bytes:
    """What a file holds; nothing where it is not there, or where another user may have put it: unpickling runs code."""
    try:
        with file.open("rb") as stream:
            status = os.fstat(stream.fileno())
            trusted = {0, _HERE.stat().st_uid, os.geteuid() if hasattr(os, "geteuid") else 0}
            is_ours = status.st_uid in trusted and not (os.name == "posix" and status.st_mode & stat.S_IWOTH)
            return stream.read() if is_ours else b""
    except OSError:
        return b""


def _write(file: Path, content: bytes) -> bool:
    """Whether the file is there now."""
    try:
        write_whole(file, content)
    except OSError:
        return False
    return True


@cache  # once
def _say_that_it_compiles() -> None:
    _logger.warning("pkmem compiles its CPU kernels, once (about 15 s); `pkmem warmup` does it ahead")


@cache  # once
def _say_that_nothing_is_kept() -> None:
    _logger.warning("compiled kernels cannot be kept on disk: set NUMBA_CACHE_DIR to a folder that can be written")
