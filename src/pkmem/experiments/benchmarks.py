"""The benchmarks of a checkout, run one after another."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pkmem.training.reading import check_known

BENCHMARKS = (
    "operators", "layer_forward", "training_step", "growth", "peak_memory", "billion", "demo_backends", "plan_time",
    "packed_rows", "mapped_tables", "decode", "halves", "model_step",
)  # fmt: skip


def run_benchmarks(names: Sequence[str], smoke: bool) -> None:
    """Runs some of `BENCHMARKS`, or all, each in a process of its own; `smoke` at tiny sizes, to see that it runs.

    Raises:
        ValueError: a name is not there, a benchmark failed, or pkmem does not run from a checkout.
    """
    folder = Path(__file__).parents[3] / "benchmarks"
    if not folder.is_dir():
        raise ValueError("the benchmarks are in pkmem's source tree, not in its wheel: run this from a checkout")
    for name in names:
        check_known(name, BENCHMARKS, "benchmark")
    for name in names or BENCHMARKS:
        command = [sys.executable, str(folder / f"{name}.py"), *(["--smoke"] if smoke else [])]
        if subprocess.run(command).returncode:
            raise ValueError(f"benchmark {name} failed: its output above says why")
