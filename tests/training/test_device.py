"""Where a run trains: on every accelerator but Apple's, and on the CPU without one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from pkmem.training.device import trains_on_cpu
from tiny import tiny

pytest_plugins = "tiny"

# What torch and accelerate say on an Apple computer; a tensor that goes to MPS in the torch of any other is an error.
_ON_A_MAC = """
import sys, torch, accelerate.state
from pathlib import Path
torch.accelerator.is_available = lambda: True
torch.accelerator.current_accelerator = lambda check_available=False: torch.device("mps")
accelerate.state.is_mps_available = lambda: True
from pkmem.training.reading import read_recipe, read_yaml
from pkmem.training.run import train
print(train(read_recipe(read_yaml(Path(sys.argv[1]))), progress=False)["train_tokens"])
"""


@pytest.mark.parametrize(("kind", "on_cpu"), [(None, True), ("mps", True), ("cuda", False), ("xpu", False)])
def test_all_accelerators_but_apples_are_used(kind: str | None, on_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: kind is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind) if kind else None)
    assert trains_on_cpu() is on_cpu


@pytest.mark.case("Environments", "train where torch sees Apple's GPU (MPS)",
    "works: on the CPU, since MPS computes no float64; simulated, no Mac was to be had", "")  # fmt: skip
def test_a_mac_trains_on_its_cpu(text: Path, tmp_path: Path) -> None:
    recipe = tiny(text, tmp_path / "run")
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.to_dict()))
    ended = subprocess.run([sys.executable, "-c", _ON_A_MAC, str(file)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) > 0
