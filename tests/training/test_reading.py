"""The one reader of recipes: documents, overrides and what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pkmem.training.reading import read_recipe, read_yaml, recorded_recipe
from pkmem.training.recipe import Recipe
from tiny import tiny


def test_a_recipe_is_read_as_it_was_written(tmp_path: Path) -> None:
    recipe = tiny(tmp_path, tmp_path / "run")
    assert read_recipe(recipe.to_dict()) == recipe
    assert read_recipe({}) == Recipe()


def test_what_is_left_out_has_its_default_and_overrides_win() -> None:
    recipe = read_recipe({"model": {"num_layers": 3}}, {"model.num_layers": 5, "memory.knn": 7, "data": "text.txt"})
    assert (recipe.model.num_layers, recipe.memory.knn, recipe.data) == (5, 7, "text.txt")
    assert recipe.training == Recipe().training
    nested = read_recipe({"model": {"num_layers": 3}}, {"model": {"width": 32}})
    assert (nested.model.num_layers, nested.model.width) == (3, 32)


def test_numbers_are_read_as_the_command_line_reads_them(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "training: {lr: 4e-4, num_tokens: 1_000_000}\nmodel: {memory_layers: [1, 2]}\n"
    )
    recipe = read_recipe(read_yaml(tmp_path / "recipe.yaml"), {"training.value_lr": "1e-3"})
    assert (recipe.training.lr, recipe.training.value_lr, recipe.training.num_tokens) == (4e-4, 1e-3, 1_000_000)
    assert recipe.model.memory_layers == [1, 2]


@pytest.mark.parametrize(
    ("document", "overrides", "message"),
    [
        ({"modle": {}}, {}, "unknown option 'modle': did you mean 'model'"),
        ({"model": {"num_layer": 3}}, {}, "unknown option 'model.num_layer': did you mean 'model.num_layers'"),
        ({"model": 3}, {}, "model is 3 but must be a mapping of options"),
        ({}, {"memry.knn": 3}, "unknown option 'memry.knn': did you mean 'memory.knn'"),
        ({}, {"memory.knn": 1.5}, "memory.knn is 1.5 but must be of type int"),
        ({}, {"memory.knn": True}, "memory.knn is True but must be of type int"),
        ({}, {"memory.knn": 0}, "knn is 0 but must be an integer >= 1"),
        ({}, {"training.schedule": "steep"}, "training.schedule is steep but must be one of 'cosine', 'linear'"),
        ({}, {"memory.query_hidden_dim": "x"}, "memory.query_hidden_dim is x but must be of type int or null"),
        ({"data": 3}, {}, "data is 3 but must be of type str"),
        ({"zzz": 3}, {}, "unknown option 'zzz'; `pkmem train --help` lists them"),
        ({}, {"model": {"wdth": 64}}, "unknown option 'model.wdth': did you mean 'model.width'"),
        ({"training": {"lr": None}}, {}, "training.lr is None but must be of type float"),
        ([1], {}, r"a recipe is \[1\] but must be a mapping of options"),
    ],
)
def test_a_mistake_is_one_line_that_names_what_is_right(document: Any, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message) as caught:
        read_recipe(document, overrides)
    assert "\n" not in str(caught.value)


def test_a_resumed_run_is_the_recorded_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.yaml to resume from: start the run without --resume"):
        recorded_recipe(tmp_path, {})
    (tmp_path / "config.yaml").write_text("memory: {knn: 7}\nout: somewhere/else\n")
    recipe = recorded_recipe(tmp_path, {"memory.knn": 7})
    assert (recipe.memory.knn, recipe.out) == (7, tmp_path)
    with pytest.raises(ValueError, match=r"memory\.knn is 7 in .* and cannot become 8: leave it out, or start"):
        recorded_recipe(tmp_path, {"memory.knn": 8})
