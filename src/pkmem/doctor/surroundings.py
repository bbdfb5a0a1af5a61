"""What a report of a problem has to name: versions, devices, threads, memory, folders, and who serves which device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from pkmem.experiments.environment import environment
from pkmem.ops import verdict
from pkmem.ops.backends import why_not, why_unfit
from pkmem.ops.user_cache import user_cache

_GIB = 1 << 30
_LIBRARIES_OF_OPENMP = ("libgomp", "libomp", "libiomp")


def devices() -> list[torch.device]:
    """The CPU, then every CUDA or ROCm device that torch sees."""
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]


def describe() -> Iterator[str]:
    """Lines of plain text, without the user's name."""
    here = environment()
    yield "Versions"
    for name, version in here["versions"].items():
        commit = f" (commit {here['commit']})" if name == "pkmem" and here["commit"] else ""
        yield _line(name, f"{version}{commit}")
    yield _line("Python", f"{here['python']} on {here['system']}")
    yield "Devices"
    yield _line("cpu", f"{here['processor']}, {here['cores']} cores; {_free_memory()}")
    yield _line("threads", f"{here['torch_threads']} of torch; {_threads_of_kernels()}; loaded: {_openmp_libraries()}")
    for device in devices()[1:]:
        yield _line(str(device), _gpu(device))
    yield "Folders"
    yield from (_line(name, folder) for name, folder in _folders())
    yield "Backends"
    yield _line("cpu", _server_of_the_cpu())
    for device in devices()[1:]:
        yield _line(str(device), server_of(device))
    if other := _other_accelerator():
        yield _line(other, '"reference": the Triton kernels are a default on CUDA and ROCm alone; not checked here')


def why_no_kernels_of_triton(device: torch.device) -> str | None:
    """Why the Triton kernels can neither be checked nor be the default on a CUDA or ROCm device; None where they can."""
    return why_unfit(device) or why_not("triton", device)


def server_of(device: torch.device) -> str:
    """Which backend serves a CUDA or ROCm device, and why."""
    if why := why_no_kernels_of_triton(device):
        return f'"reference": the Triton kernels cannot run: {why}'
    passed = verdict.stored(verdict.subject_of(device))
    if passed is None:
        return '"reference": no verdict on the Triton kernels is stored for this device and these versions'
    if not passed:
        return '"reference": by the stored verdict the Triton kernels are right for nothing here'
    return f'"triton" for {in_words(passed)}, else "reference": by the stored verdict'


def in_words(passed: verdict.Passed) -> str:
    """Dtypes, with those in brackets whose tables may have more than 2^31 elements as well."""
    usual = ", ".join(sorted(dtype for dtype, shapes in passed if shapes == "usual"))
    huge = ", ".join(sorted(dtype for dtype, shapes in passed if shapes == "huge"))
    return f"{usual} (past 2^31 elements: {huge or 'none'})"


def short(path: Path) -> str:
    """A path that does not name the user."""
    try:
        return f"~/{path.relative_to(Path.home()).as_posix()}"
    except (RuntimeError, ValueError):
        return str(path)


def _line(name: str, text: str) -> str:
    return f"  {name:<13} {text}"


def _gpu(device: torch.device) -> str:
    subject = verdict.subject_of(device)
    free, total = torch.cuda.mem_get_info(device)
    return (
        f"{subject['gpu']}, capability {subject['capability']}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB free, "
        f"driver {subject['driver']}"
    )


def _server_of_the_cpu() -> str:
    if why := why_not("cpu", torch.device("cpu")):
        return f'"reference", which is slow: {why}'
    return '"cpu", kernels that numba compiles'


def _threads_of_kernels() -> str:
    if why_not("cpu", torch.device("cpu")):
        return "no kernels"
    from pkmem.ops.cpu.threads import shares_torchs_threads

    if shares_torchs_threads():
        return "kernels run on the same, by torch's OpenMP"
    return "kernels run on threads of Python, which is slower: torch's OpenMP was not found"


def _openmp_libraries() -> str:
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return "not known on this system"
    paths = {Path(line.split(maxsplit=5)[-1]) for line in maps.splitlines() if "/" in line}
    found = sorted(f"{path.parent.name}/{path.name}" for path in paths if path.name.startswith(_LIBRARIES_OF_OPENMP))
    return ", ".join(found) or "no OpenMP library"


def _free_memory() -> str:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        kibibytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
        free, total = (kibibytes[name] / (1 << 20) for name in ("MemAvailable", "MemTotal"))
    except (OSError, KeyError):  # not Linux
        return "free memory not known on this system"
    return f"{free:.1f} of {total:.1f} GiB of memory free"


def _folders() -> Iterator[tuple[str, str]]:
    if why_not("cpu", torch.device("cpu")) is None:
        from pkmem.ops.cpu.cache import folders

        yield from (("kernels", _writability(folder)) for folder in folders())
    verdicts = user_cache("verdicts")
    yield "verdicts", _writability(verdicts) if verdicts else "nowhere: there is no home folder; set XDG_CACHE_HOME"


def _writability(folder: Path) -> str:
    there = next(place for place in (folder, *folder.parents) if place.exists())
    can = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    return f"{short(folder)}: {'can' if can else 'CANNOT'} be written"


def _other_accelerator() -> str | None:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if found is None or found.type == "cuda" else found.type
