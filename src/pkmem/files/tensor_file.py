"""One safetensors file: its header is checked before a number is read, and its numbers are written as they come.

The library reads and writes whole files; a table larger than the memory of one device needs windows and streams.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pkmem.files.documents import LARGEST_DOCUMENT, CheckpointError, parse_json
from pkmem.files.durable import sync

_NAMES = {  # in the order of the library, which puts the last first in a file
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_ORDER = list(_NAMES)
_CHUNK_BYTES = 8 << 20
_MOST_BEHIND = 8  # chunks that wait to be hashed
_SYNCED_BYTES = _MOST_BEHIND * _CHUNK_BYTES  # at a time
_LENGTH_BYTES = 8


class Stored(NamedTuple):
    """A tensor of a file: what it is, and where its bytes are."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class Digest(NamedTuple):
    """What a manifest knows of a file."""

    size: int
    sha256: str


class TensorFile:
    """The tensors of a safetensors file, none read before it is asked for.

    Args:
        path: the file.

    Attributes:
        stored: name -> dtype, shape and place of each tensor.
        notes: the header's own text by name, `__metadata__`.

    Raises:
        CheckpointError: the file is no safetensors, its header is larger than `LARGEST_DOCUMENT`, tensors overlap or
            leave bytes over, or a dtype is not torch's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stored, self.notes = _read_header(path)
        self._mapped: mmap.mmap | None = None
        self._opened: _Opened | None = None

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of a name, mapped: what is copied out of it is read from the disk, nothing else."""
        dtype, shape, start, stop = self.stored[name]
        if start == stop:
            return torch.empty(shape, dtype=dtype, device="cpu")
        if self._mapped is None:
            self._opened = _Opened(self.path)  # private, so that torch takes it for writable memory
            self._mapped = mmap.mmap(self._opened.descriptor, 0, access=mmap.ACCESS_COPY)
            if len(self._mapped) != max(entry.stop for entry in self.stored.values()):
                raise CheckpointError(f"{self.path} was changed while it was opened: try again")
        count = math.prod(shape)
        return torch.frombuffer(self._mapped, dtype=dtype, count=count, offset=start).view(shape)

    def read_at_random(self) -> None:
        """Lets the system read of what is mapped what is asked for, and nothing around it, where it can."""
        if self._mapped is not None and hasattr(mmap, "MADV_RANDOM"):
            self._mapped.madvise(mmap.MADV_RANDOM)

    def require_unchanged(self) -> None:
        """Looks whether the file is still what was mapped; one that was replaced by another of its name is.

        Raises:
            CheckpointError: it was cut or written to since: reading on would give other numbers, or end the process.
        """
        if self._opened is not None and self._opened.is_changed():
            raise CheckpointError(f"{self.path} was cut or written to since it was opened: load the model again")


class _Opened:
    """A file that stays open, and what it was then."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self.descriptor)
        self._was = self._is()

    def is_changed(self) -> bool:
        return self._is() != self._was

    def _is(self) -> tuple[int, int]:
        status = os.fstat(self.descriptor)
        return status.st_size, status.st_mtime_ns


def write_tensor_file(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    pieces: Callable[[str], Iterable[Tensor]],
    notes: Mapping[str, str],
    begins_at: int = _LENGTH_BYTES,
) -> Digest:
    """Writes a safetensors file piece by piece, as the library would write it whole, and has it on the disk.

    Args:
        path: the file, in a folder that exists.
        layout: name -> dtype and shape of each tensor.
        pieces: the numbers of the tensor of a name, row by row, in pieces of any size on any device, which nobody
            changes until this returns.
        notes: text by name for the header.
        begins_at: the first tensor begins at a multiple of so many bytes of the file, itself a multiple of 8.

    Returns:
        size and hash of what was written. Another thread hashes while this one waits for the disk, so the disk gets its
        work as it comes and not all at the end; nothing is read again.

    Raises:
        CheckpointError: safetensors has no name for a dtype.
        OSError: the disk is full or broken.
    """
    names = sorted(layout, key=lambda name: (-_ORDER.index(_known(layout[name][0], name)), name))
    header: dict[str, Any] = {"__metadata__": dict(notes)} if notes else {}
    stop = 0
    for name in names:
        dtype, shape = layout[name]
        start, stop = stop, stop + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % begins_at)
    digest, size = hashlib.sha256(), 0
    behind: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1) as other_thread:
        with path.open("wb") as file:

            def write(data: Any) -> None:
                nonlocal size
                behind.append(other_thread.submit(digest.update, data))
                size, before = size + file.write(data), size
                if size // _SYNCED_BYTES > before // _SYNCED_BYTES:
                    file.flush()
                    sync(path)
                if len(behind) > _MOST_BEHIND:
                    behind.popleft().result()

            write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
            for name in names:
                for piece in pieces(name):
                    for chunk in _chunks(piece):
                        write(chunk.view(torch.uint8).numpy())
        sync(path)
        for hashed in behind:
            hashed.result()
    assert size == _LENGTH_BYTES + len(text) + stop
    return Digest(size, digest.hexdigest())


def name_of(dtype: torch.dtype) -> str:
    """How safetensors calls a dtype."""
    return _NAMES[dtype]


def digest_of(file: Path) -> Digest:
    """Size and hash of a file, read in pieces."""
    with file.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        return Digest(stream.tell(), sha256)


def _known(dtype: torch.dtype, name: str) -> torch.dtype:
    if dtype not in _NAMES:
        raise CheckpointError(f"{name} is {dtype}, which safetensors does not hold: convert it before saving")
    return dtype


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """The numbers of a tensor in order, some at a time, flat and on the CPU; copied only where they are not there."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if not tensor.is_contiguous() and tensor.dim():
        for row in tensor.split(max(1, _CHUNK_BYTES * len(tensor) // max(1, tensor.nbytes))):
            yield row.contiguous().flatten().cpu()
        return
    flat = tensor.contiguous().flatten()
    if flat.stride() != (1,):  # a single number
        flat = flat.clone(memory_format=torch.contiguous_format)
    for chunk in flat.split(_CHUNK_BYTES // tensor.itemsize):
        yield chunk.cpu()


def _read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    def check(holds: bool, what: str) -> None:
        if not holds:
            raise CheckpointError(f"{path}: no safetensors file, {what}; use another checkpoint")

    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            first = int.from_bytes(file.read(_LENGTH_BYTES), "little") + _LENGTH_BYTES
            check(size >= _LENGTH_BYTES, "truncated?")
            check(first <= LARGEST_DOCUMENT, f"a header of {first:,} bytes is refused")
            check(first <= size, "truncated?")
            text = file.read(first - _LENGTH_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; use another checkpoint") from error
    header = parse_json(text, path)
    check(isinstance(header, dict), "its header is no object")
    notes = header.pop("__metadata__", {})
    check(isinstance(notes, dict) and all(isinstance(note, str) for note in notes.values()), "its notes are no text")
    stored = {}
    for name, entry in header.items():
        check(isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}, f"{name!r} has no place")
        dtype, shape, place = _DTYPES.get(str(entry["dtype"])), entry["shape"], entry["data_offsets"]
        check(dtype is not None, f"{name!r} is {entry['dtype']!r}, no dtype of torch")
        assert dtype is not None
        for numbers in (shape, place):
            check(
                isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers), f"{name!r} has no sizes"
            )
        check(len(shape) <= 64 and len(place) == 2, f"{name!r} has no sizes")
        needed = math.prod(shape) * dtype.itemsize
        check(place[1] - place[0] == needed, f"{name!r} needs {needed} bytes and has {place[1] - place[0]}")
        stored[name] = Stored(dtype, tuple(shape), first + place[0], first + place[1])
    end = first
    for name, entry in sorted(stored.items(), key=lambda item: (item[1].start, item[1].stop)):
        check(entry.start == end, f"{name!r} overlaps another tensor, or bytes are left over before it")
        end = entry.stop
    check(end == size, f"it has {size} bytes instead of {end}, truncated?")
    return stored, notes
