"""Checks of the Triton backend in Triton's interpreter, which is switched on for a whole process, before Triton is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def failures_of(checks: dict[str, Callable[[Any], None]]) -> dict[str, str]:
    """What failed in this process, by check: its traceback."""
    from pkmem.ops import triton as backend

    failures = {}
    torch.use_deterministic_algorithms(True)  # fresh memory is full of NaN
    for name, function in checks.items():
        torch.manual_seed(0)
        try:
            function(backend)
        except Exception:
            failures[name] = traceback.format_exc()
    return failures


def failures_in(file: str, cache: Path) -> dict[str, str]:
    """What fails where `file` runs as a program in the interpreter, and prints what `failures_of` its checks gives."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parent)
    finished = subprocess.run([sys.executable, file], capture_output=True, text=True, env=environment)
    assert finished.returncode == 0, finished.stderr
    failures: dict[str, str] = json.loads(finished.stdout.splitlines()[-1])
    return failures


def assert_none(failures: dict[str, str]) -> None:
    """Fails with the tracebacks."""
    assert not failures, "\n".join(f"{name}\n{trace}" for name, trace in failures.items())
