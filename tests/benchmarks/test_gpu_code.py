"""What the Triton kernels compile to for GPUs that are not there."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.version import Version

TRITON_3_7 = find_spec("triton") and Version(version("triton")) >= Version("3.7")
FILE = Path(__file__).parents[2] / "benchmarks" / "gpu_code.py"


@pytest.mark.slow  # most of a minute: tests/ops/test_triton_compiled.py compiles the kernels, too
@pytest.mark.skipif(not TRITON_3_7, reason="needs Triton 3.7: compilers before it spill 8 bytes of one kernel")
def test_nothing_is_spilled_and_bounding_beats_sorting(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(FILE), "--out", str(tmp_path), "--gpus", "sm_86", "sm_90"]
    environ |= {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    finished = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == (tmp_path / "gpu_code.md").read_text().strip()
    kernels = json.loads((tmp_path / "gpu_code.json").read_text())["kernels"]
    assert len(kernels) > 20
    for kernel in kernels:
        assert kernel["spills"] == 0, kernel
    hopper = [kernel for kernel in kernels if kernel["gpu"] == "sm_90"]
    assert all(kernel["resident_warps"] >= kernel["warps"] for kernel in hopper)
    bounding = next(kernel for kernel in hopper if kernel["kernel"].startswith("_candidates"))
    sorting = next(kernel for kernel in hopper if "REDO False" in kernel["kernel"])
    # Loops per warp and round of 64 sub-keys; a warp has as many queries in both.
    assert bounding["warps"] / 128 == sorting["warps"] / 64
    assert 2 * sum(bounding["loops"]) < max(sorting["loops"])
    of_ampere = next(kernel for kernel in kernels if kernel["kernel"].startswith("_candidates"))
    assert of_ampere["gpu"] == "sm_86"
    assert of_ampere["shared_bytes"] < bounding["shared_bytes"]
