"""What a user installs: the wheel with its extras, in an environment of its own, far from the repository."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY = (
    "model.num_layers=2 model.width=32 model.num_heads=2 model.context_tokens=32 model.vocab_size=300 "
    "model.memory_layers=[0] memory.num_sub_keys=8 memory.knn=4 memory.query_dim=16 "
    "training.num_tokens=1280 training.batch_tokens=128"
)


@pytest.mark.slow  # it installs torch, from a package index
def test_the_wheel_trains_where_there_is_no_checkout(tmp_path: Path) -> None:
    empty, wheels, environment = tmp_path / "empty", tmp_path / "wheels", tmp_path / "environment"
    empty.mkdir()
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    outside["PKMEM_CACHE"] = str(tmp_path / "cache")

    def call(*command: str | Path) -> str:
        done = subprocess.run([*map(str, command)], cwd=empty, env=outside, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    call(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", wheels, ROOT)
    (wheel,) = wheels.iterdir()
    shipped = set(zipfile.ZipFile(wheel).namelist())
    files = [file for kind in ("py", "html", "css", "js") for file in (ROOT / "src" / "pkmem").rglob(f"*.{kind}")]
    source = {f"pkmem/{file.relative_to(ROOT / 'src' / 'pkmem')}" for file in files}
    assert source | {"pkmem/py.typed", "pkmem/configs/laptop.yaml"} <= shipped

    call(sys.executable, "-m", "venv", environment)
    install = (environment / "bin" / "pip", "install", "--constraint", ROOT / "constraints.txt")
    call(*install, "torch")
    call(*install, f"{wheel}[lm,cpu]")
    place = call(environment / "bin" / "python", "-c", "import pkmem; print(pkmem.__file__)")
    assert Path(place.strip()).is_relative_to(environment)

    pkmem = environment / "bin" / "pkmem"
    assert "--overwrite" in call(pkmem, "demo", "--help")
    assert "4_layers" in call(pkmem, "experiment", "table1", "--dry_run")
    (empty / "text.txt").write_text("\n".join(map(str, range(20_000))))
    call(pkmem, "train", "--data", "text.txt", "--out", "run", *TINY.split())
    call(pkmem, "inspect", "run", "--data", "text.txt", "--page", "memory.html")
    assert "Map of the slots" in (empty / "memory.html").read_text()
    assert "memory_0 at" in call(pkmem, "inspect", "run")
