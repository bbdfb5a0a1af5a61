"""`pkmem experiment learn` on the command line; the paper's families are in tests/test_cli.py."""

import pytest

from pkmem import cli
from pkmem.experiments.learning import grid


def test_a_dry_run_says_what_would_be_run(capsys) -> None:
    cli.main(["experiment", "learn", "--dry_run", "--seeds", "3", "--cells", "compare"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["compare", "15"]]


def test_results_go_to_a_folder_of_their_own(tmp_path, monkeypatch, capsys) -> None:
    asked = []
    monkeypatch.setattr(grid, "experiment_learn", lambda *arguments: asked.append(arguments))
    cli.main(["experiment", "learn", "--out", str(tmp_path), "--cells", "text", "thousand"])
    assert asked == [(tmp_path / "learn", 1, ["text", "thousand"])]
    assert str(tmp_path / "learn") in capsys.readouterr().out


def test_a_cell_that_is_not_there_is_named(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["experiment", "learn", "--dry_run", "--cells", "compar"])
    assert stop.value.code == 2
    assert "compare" in capsys.readouterr().err
