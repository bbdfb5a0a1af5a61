"""`pkmem train` for a model with hashed tables."""

import json
from pathlib import Path

import pytest
import yaml

from pkmem.experiments.hashed_run import main
from tiny import tiny

pytest_plugins = "tiny"


@pytest.fixture
def base(text: Path, tmp_path: Path) -> Path:
    recipe = tiny(text, tmp_path, model={"dropout": 0.0}, memory={"query_dropout": 0.0}).to_dict()
    del recipe["out"]
    file = tmp_path / "base.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def test_a_run_trains_the_table_and_resumes_to_the_same_figures(base, tmp_path, capsys, monkeypatch) -> None:
    command = ["--hashed", '{"1": "beside"}', "--config", str(base)]
    main([*command, "--out", str(tmp_path / "whole"), "training.value_lr=0.05"])
    whole = json.loads(capsys.readouterr().out)
    assert whole["memory_params"] == 2 * 8**2 * 32
    monkeypatch.setattr("pkmem.training.trainer.MemoryTrainer.training_step", stopping(at=8))
    with pytest.raises(RuntimeError, match="the power is gone"):
        main([*command, "--out", str(tmp_path / "cut"), "training.value_lr=0.05"])
    monkeypatch.undo()
    main(["--hashed", '{"1": "beside"}', "--out", str(tmp_path / "cut"), "--resume"])
    resumed = json.loads(capsys.readouterr().out)
    assert resumed["bits_per_byte"] == whole["bits_per_byte"]


def stopping(at: int):  # type: ignore[no-untyped-def]
    from pkmem.training.trainer import MemoryTrainer

    step, calls = MemoryTrainer.training_step, []

    def stopped(*args: object, **options: object):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) > 2 * at:
            raise RuntimeError("the power is gone")
        return step(*args, **options)  # type: ignore[arg-type]

    return stopped


def test_an_unknown_option_is_named(base, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"unknown option 'memory\.kn'"):
        main(["--hashed", "{}", "--config", str(base), "--out", str(tmp_path / "x"), "memory.kn=2"])
