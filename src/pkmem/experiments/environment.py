"""Where a figure was measured: machine, versions, commit, command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "transformers", "numba", "triton", "numpy")


def environment() -> dict[str, Any]:
    """Processor, its vector instructions, cores, threads, GPU, system, versions, pkmem's commit and the command."""
    return {
        "processor": _processor(),
        "vectors": torch.backends.cpu.get_cpu_capability(),  # hosted machines of one processor name differ in these
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": {name: version for name in ("pkmem", *_PACKAGES) if (version := _version(name))},
        "commit": _commit(),
        "command": " ".join([Path(sys.argv[0]).name.replace("__main__.py", "pkmem"), *sys.argv[1:]]),
    }


def machine_of(environment: dict[str, Any]) -> str:
    """Where a figure was measured, in a few words; seconds are compared among figures of the same words only.

    Results from before the vector instructions were named look alike where the processor's name is the same.

    Args:
        environment: as `environment` gave it, or an older one that lacks some.
    """
    processor = " ".join(str(environment[key]) for key in ("processor", "vectors") if key in environment)
    cores = f"{environment.get('cores')} cores of {processor} ({environment.get('torch_threads')} used)"
    return f"{environment.get('gpu') or cores}, torch {environment.get('versions', {}).get('torch')}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Of the source tree this package runs from; None for an installed wheel."""
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder)]
    try:
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, check=True
        )
        subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()
