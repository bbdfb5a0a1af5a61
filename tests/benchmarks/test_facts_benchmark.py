"""benchmarks/facts.py: a cell trains and is asked, the best rate is kept, a finished cell is not run again."""

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest


@pytest.fixture
def sweep(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import facts

    return facts


def test_a_cell_trains_and_is_asked_every_fact(sweep, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PKMEM_CACHE", str(tmp_path))
    monkeypatch.setattr(sweep, "NUMS", (64,))
    cell = {"model": "memory", "width": 16, "num_facts": 64, "num_tokens": 1024, "lr": 1e-3, "value_lr": 1e-3}
    figures = sweep.run_cell(cell)
    assert 0 <= figures["recall"] <= 1
    assert 0 <= figures["bits_per_fact"] <= 6
    assert figures["memory_params"] == 128**2 * 16
    assert 0 < figures["exposures"] < 4  # not yet an epoch


def cell_of(model: str, num_facts: int, lr: float, bits: float) -> dict:
    figures = dict.fromkeys(("recall", "bits_per_param", "bits_per_dense_param", "bits_per_active_param"), 0.1)
    figures |= {"bits_per_fact": bits, "exposures": 9, "dense_params": 1, "memory_params": 0, "train_seconds": 1}
    return {"model": model, "width": 8, "num_facts": num_facts, "lr": lr, "figures": figures}


def test_the_best_rate_of_each_model_is_shown(sweep, tmp_path) -> None:
    cells = [cell_of(m, n, lr, n * lr) for n in (20, 10) for m in ("memory", "dense") for lr in (0.1, 0.3, 0.2)]
    best = sweep.best_cells(cells)
    assert [(cell["num_facts"], cell["model"], cell["lr"]) for cell in best] == [
        (10, "dense", 0.3),
        (10, "memory", 0.3),
        (20, "dense", 0.3),
        (20, "memory", 0.3),
    ]
    rows = sweep.table(best).splitlines()
    assert len({row.count("|") for row in rows}) == 1
    assert len(rows) == 2 + 4
    sweep.plot(best, tmp_path / "facts.png")
    assert (tmp_path / "facts.png").stat().st_size > 0


def test_finished_cells_are_not_run_again(sweep, tmp_path, monkeypatch) -> None:
    ran = []

    def run(command, **_) -> SimpleNamespace:
        ran.append(json.loads(command[-1]))
        return SimpleNamespace(stdout='a warning\n{"recall": 1.0}\n')

    monkeypatch.setattr("sweep.subprocess", SimpleNamespace(run=run, PIPE=None))
    document = {"widths": {}, "cells": [{"model": "dense", "lr": 0.1, "figures": {"recall": 0.5}}]}
    cells = [{"model": "dense", "lr": lr} for lr in (0.1, 0.2)]
    sweep.run_missing("facts.py", tmp_path / "facts.json", document, cells)
    assert ran == [cells[1]]
    saved = json.loads((tmp_path / "facts.json").read_text())
    assert [cell["figures"]["recall"] for cell in saved["cells"]] == [0.5, 1.0]
    sweep.run_missing("facts.py", tmp_path / "facts.json", saved, cells)
    assert len(ran) == 1


def test_widths_of_equal_time_and_size_are_the_nearest(sweep, monkeypatch) -> None:
    monkeypatch.setattr(
        sweep, "step_seconds", lambda cells: [cell["width"] * 10 if i else 497 for i, cell in enumerate(cells)]
    )
    widths = sweep.choose_widths()
    assert widths["dense"] == widths["memory"] == sweep.WIDTH
    assert widths["equal_time"] == 48
    sizes = {width: sweep.num_params({"model": "dense", "width": width}) for width in sweep.LADDER}
    wanted = sweep.num_params({"model": "memory", "width": sweep.WIDTH})
    assert abs(sizes[widths["equal_size"]] - wanted) == min(abs(size - wanted) for size in sizes.values())


def test_steps_are_timed_in_turns(sweep, monkeypatch) -> None:
    import torch

    monkeypatch.setattr(sweep, "TURNS", 2)
    threads = torch.get_num_threads()
    small, large = sweep.step_seconds([{"model": "dense", "width": width} for width in (16, 256)])
    torch.set_num_threads(threads)
    assert 0 < small < large
