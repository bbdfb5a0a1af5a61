"""A verdict: for what the Triton kernels were found right on one kind of GPU, kept for the next process.

`pkmem doctor` stores it and `choose_backend` reads it. It holds for the very GPU, driver, versions and sources that it
was found with: with any other one the kernels count as unchecked again. The file is data and executes nothing; one that
is not whole, or not as it was written here, is as good as none.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from pkmem.ops.user_cache import user_cache, write_whole

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
SHAPES = ("usual", "huge")
HUGE_ELEMENTS = 2**31  # of a table: where it has more, int32 does not hold the offsets
LEAST_CAPABILITY = (8, 0)  # of an NVIDIA GPU that the kernels run on
_MOST_BYTES = 1 << 20
_OPS = Path(__file__).parent
_DRIVERS = ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version")

Passed = frozenset[tuple[str, str]]


def subject_of(device: torch.device) -> dict[str, str]:
    """What a verdict on a CUDA or ROCm device depends on, each in words; no other process is asked."""
    properties = torch.cuda.get_device_properties(device)
    capability = f"{properties.major}.{properties.minor}"
    return {
        "gpu": properties.name,
        "capability": getattr(properties, "gcnArchName", capability) if torch.version.hip else capability,
        "driver": _driver(),
        "torch": torch.__version__,
        "triton": _version_of("triton", "pytorch-triton-rocm", "triton-rocm", "triton-windows"),
        "pkmem": _version_of("pkmem"),
        "sources": _digest_of_sources(),
    }


def passed_on(device: torch.device) -> Passed | None:
    """The pairs of a dtype and a class of shapes that the kernels are right for by the stored verdict; None without one.

    Args:
        device: of the kind "cuda". Each is asked once per process: a verdict counts from the next process on.
    """
    return _passed_on(device.index or 0)


@functools.cache
def _passed_on(index: int) -> Passed | None:
    return stored(subject_of(torch.device("cuda", index)))


def stored(subject: dict[str, str]) -> Passed | None:
    """What passed by the stored verdict on a subject; None if there is none, whatever else lies in its place."""
    file = _file_of(subject)
    try:
        verdict = json.loads(_read(file)) if file else None
    except (OSError, ValueError, RecursionError):
        return None
    match verdict:
        case {"subject": of, "passed": list(pairs)} if of == subject and all(map(_is_pair, pairs)):
            return frozenset((dtype, shapes) for dtype, shapes in pairs)
    return None


def keep(subject: dict[str, str], passed: Iterable[tuple[str, str]], about: dict[str, Any]) -> Path:
    """Stores a verdict in place of the last one on its subject.

    Args:
        subject: as `subject_of` describes it.
        passed: a dtype, "fp32", "bf16" or "fp16", and a class of shapes, "usual" or "huge", each.
        about: what a reader of the file may want to know; it does not count.

    Returns:
        Its file.

    Raises:
        OSError: it cannot be kept.
    """
    file = _file_of(subject)
    if file is None:
        raise FileNotFoundError("there is no home folder: set XDG_CACHE_HOME to a folder that can be written")
    content = json.dumps({"subject": subject, "passed": sorted(passed), **about}, indent=1).encode()
    if len(content) > _MOST_BYTES:
        content = json.dumps({"subject": subject, "passed": sorted(passed)}, indent=1).encode()
    write_whole(file, content)
    return file


def _file_of(subject: dict[str, str]) -> Path | None:
    folder = user_cache("verdicts")
    name = hashlib.sha256(json.dumps(subject, sort_keys=True).encode()).hexdigest()[:24]
    return None if folder is None else folder / f"{name}.json"


def _read(file: Path) -> bytes:
    """What a file holds. A link, a pipe or a device is not ours, and might not end."""
    with open(file, "rb", opener=_open_nothing_but_files) as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_BYTES:
            raise ValueError("it was not written here")
        return stream.read(_MOST_BYTES)


def _open_nothing_but_files(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def _is_pair(pair: Any) -> bool:
    match pair:
        case [str(dtype), str(shapes)]:
            return dtype in DTYPES.values() and shapes in SHAPES
    return False


def _driver() -> str:
    for file in _DRIVERS:
        try:
            first, *_ = Path(file).read_text(encoding="utf-8", errors="replace").splitlines()
        except (OSError, ValueError):  # not on Linux, built into the kernel, or empty
            continue
        return " ".join(first.split())
    return "unknown"


def _version_of(*names: str) -> str:
    """Of the first of some packages that is installed, without importing it."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "none"


@functools.cache
def _digest_of_sources() -> str:
    """Of all operators: an installation in place keeps its version when they are edited."""
    digest = hashlib.sha256()
    for source in sorted([*_OPS.glob("*.py"), *_OPS.glob("reference/*.py"), *_OPS.glob("triton/*.py")]):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]
