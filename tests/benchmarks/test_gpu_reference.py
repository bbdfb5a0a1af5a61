"""What the reference asks of a GPU, counted without one: the limits that the page `gpu.md` rests on."""

import json
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_it_counts_and_leaves_its_figures(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "gpu_reference.py"), "--smoke", "--out", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == (tmp_path / "gpu_reference.md").read_text().strip()
    document = json.loads((tmp_path / "gpu_reference.json").read_text())
    assert document["smoke"] is True
    assert set(document["figures"]) == {"float32", "bfloat16"}


def test_the_figures_of_the_full_size_are_within_their_limits() -> None:
    document = json.loads((FOLDER / "results" / "gpu_reference.json").read_text())
    assert (document["tokens"], document["smoke"]) == (16384, False)
    for parts in document["figures"].values():
        for part, most in (("forward", 300), ("backward", 500), ("RowAdam step", 2000)):
            assert parts[part]["operators"] < most
            assert parts[part]["peak_bytes"] < 1 << 30
