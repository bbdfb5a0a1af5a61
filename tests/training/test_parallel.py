"""Which processes share the columns of a table, by the recipe."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pkmem.training import parallel
from pkmem.training.recipe import Recipe
from tiny import tiny

CPU = torch.device("cpu")


def recipe(model=(), memory=(), training=()) -> Recipe:
    return tiny(Path("text"), Path("out"), model, memory, training)


@pytest.fixture(autouse=True)
def meshes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mesh is its device, shape and names: there are no processes here."""
    import torch.distributed.device_mesh

    made = lambda device, shape, mesh_dim_names: SimpleNamespace(device=device, shape=shape, names=mesh_dim_names)  # noqa: E731
    monkeypatch.setattr(torch.distributed.device_mesh, "init_device_mesh", made)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


def shape(given: Recipe, processes: int) -> tuple[int, int] | None:
    mesh = parallel.table_mesh(given, processes, CPU)
    if mesh is None:
        return None
    assert (mesh.device, mesh.names) == ("cpu", ("replicate", "columns"))
    return mesh.shape


def test_one_process_and_a_model_without_memories_share_nothing() -> None:
    assert shape(recipe(), 1) is None
    assert shape(recipe(model={"memory_layers": []}), 4) is None


def test_columns_are_shared_by_as_many_of_a_host_as_divide_the_width(monkeypatch) -> None:
    assert shape(recipe(), 4) == (1, 4)  # the tables are 32 wide
    assert shape(recipe(), 6) == (3, 2)
    assert shape(recipe(), 3) == (3, 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert shape(recipe(), 4) == (2, 2)
    assert shape(recipe(training={"columns": 4}), 4) == (1, 4)
    assert shape(recipe(memory={"experts": True, "value_dim": None}), 4) == (2, 2)


@pytest.mark.parametrize("columns", [3, 8])
def test_processes_that_cannot_share_the_columns_are_refused(columns) -> None:
    with pytest.raises(ValueError, match=f"training.columns is {columns} but must divide .* 32 .* 4 processes: try 4"):
        shape(recipe(training={"columns": columns}), 4)


def test_a_dense_gradient_leaves_every_process_the_whole_table() -> None:
    dense = recipe(training={"value_grad": "dense"})
    assert shape(dense, 4) is None
    for change, message in (
        ({"columns": 2}, "training.columns is 2 but must be 1"),
        ({"parallel": "fsdp"}, "must be ddp"),
    ):
        changed = replace(dense, training=replace(dense.training, **change))
        with pytest.raises(ValueError, match=message):
            shape(changed, 4)
