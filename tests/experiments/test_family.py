"""Families: every file of the repository makes recipes, and a mistake in one is named with what is right."""

from pathlib import Path

import pytest
import yaml

from made_results import all_families
from pkmem.experiments.family import Metric, config_folder, family_names, load_family, read_family
from pkmem.layer.config import MemoryConfig
from pkmem.lm.config import ModelConfig
from pkmem.training.reading import read_recipe
from pkmem.training.recipe import Recipe, TrainingConfig

PAPERS = {"table1": "table 1", "speed": "figure 4", "size": "table 2", "position": "table 3", "keys": "table 4"}
CHOSEN = {
    "about": "seconds",
    "base": "base.yaml",
    "machine": {"name": "core", "peak_tflops": 0.1, "utilisation": 0.5},
    "rates": [{"training.lr": 0.5}],
    "overrides": {"model.width": 64},
    "cells": {
        "shallow": {"label": "2 layers", "model.num_layers": 2},
        "deep": {"label": "8 layers", "model.num_layers": 8, "rates": [{"training.lr": 0.1}, {"training.lr": 0.2}]},
        "timed": {"label": "8 layers, timed", "like": "deep", "match_seconds_of": "shallow", "training.beta2": 0.9},
    },
}


def write(folder: Path, top: dict | None = None, **changed: object) -> Path:
    (folder / "base.yaml").write_text(yaml.safe_dump({"data": "text", "memory": {"knn": 3}, "training": {"seed": 7}}))
    document = {"title": "T", "paper": "P", "scales": {"laptop": CHOSEN | changed}} | (top or {})
    (folder / "family.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    return folder / "family.yaml"


def test_the_families_of_the_paper_are_there() -> None:
    assert set(family_names()) >= {*PAPERS, "heads", "layers", "scaling", "facts"}
    for name, paper in PAPERS.items():
        assert load_family(name, "laptop").paper == paper


@pytest.mark.parametrize(("name", "scale"), all_families())
def test_every_cell_of_every_family_makes_a_recipe(name: str, scale: str) -> None:
    family = load_family(name, scale)
    runs = [family.run(cell, rate, seed=3, data="d") for cell in family.cells.values() for rate in cell.rates]
    assert len({run.name for run in runs}) == len(runs)
    for run in runs:
        assert run.recipe.training.seed == 3
        assert run.recipe.data == "d"
    models = set()
    for run in runs:
        trained = run.recipe.training.num_tokens, run.recipe.training.value_moments
        if family.cells[run.cell].like is None:
            models.add(repr((run.recipe.model, run.recipe.memory, run.hashed, trained, family.cells[run.cell].rates)))
    assert len(models) == sum(cell.like is None for cell in family.cells.values())
    if scale != "laptop":
        assert "not run yet" in family.about


def test_the_papers_scale_is_the_papers_recipe() -> None:
    paper = read_recipe(yaml.safe_load((config_folder() / "paper.yaml").read_text()))
    family = load_family("table1", "paper")
    cell = family.cells["16_layers_2_memories"]
    assert family.run(cell, cell.rates[0]).recipe == Recipe(
        paper.data, Path(paper.out), None, paper.model, paper.memory, paper.training
    )


def test_overrides_go_from_base_to_scale_to_cell_to_rate(tmp_path: Path) -> None:
    family = read_family(write(tmp_path), "laptop")
    shallow, deep, timed = family.cells.values()
    run = family.run(shallow, shallow.rates[0], seed=2, num_tokens=9)
    assert run.recipe == Recipe(
        "text",
        model=ModelConfig(num_layers=2, width=64),
        memory=MemoryConfig(knn=3),
        training=TrainingConfig(lr=0.5, seed=2, num_tokens=9),
    )
    assert run.name == "shallow__lr0.5__seed2"
    assert [family.run(deep, rate).rate for rate in deep.rates] == ["lr0.1", "lr0.2"]
    assert timed.rates == deep.rates
    assert timed.overrides == deep.overrides | {"training.beta2": 0.9}
    assert (timed.like, timed.match_seconds_of) == ("deep", "shallow")


def test_a_memory_has_both_rates_in_its_name(tmp_path: Path) -> None:
    family = read_family(write(tmp_path, cells={"m": {"label": "m", "model.memory_layers": [1]}}), "laptop")
    rate = {"training.lr": 0.004, "training.value_lr": 0.016}
    assert family.run(family.cells["m"], rate).name == "m__lr0.004_value_lr0.016__seed0"


def test_a_family_may_take_the_cells_of_another(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "fast.yaml").write_text(
        yaml.safe_dump(
            {"title": "F", "paper": "P", "cells_of": "family", "scales": {"laptop": {"trains": False, "about": "a"}}}
        )
    )
    fast = read_family(tmp_path / "fast.yaml", "laptop")
    assert fast.cells == read_family(tmp_path / "family.yaml", "laptop").cells
    assert (fast.trains, fast.about) == (False, "a")


def test_some_cells_bring_those_they_are_timed_by() -> None:
    family = load_family("table1", "laptop")
    assert list(family.only(["8_layers", "2_layers"]).cells) == ["2_layers", "8_layers"]
    part = family.only(["8_layers_equal_seconds"])
    assert list(part.cells) == ["8_layers", "4_layers_1_memory", "8_layers_equal_seconds"]
    assert part.cells["8_layers"] == family.cells["8_layers"]
    assert (family.measures_speed, part.measures_speed) == (True, False)  # or a part would pass for the whole
    with pytest.raises(ValueError, match=r"speed measures all its models in turns: leave --cells out"):
        load_family("speed", "laptop").only(["8_layers"])
    with pytest.raises(
        ValueError, match=r"no cell of table1 '9_layers': did you mean '8_layers'\? they are 2_layers, "
    ):
        family.only(["9_layers"])


def test_an_unknown_family_or_scale_lists_the_right_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no experiment 'tabel1': did you mean 'table1'\? they are .*scaling.*table1"):
        load_family("tabel1", "laptop")
    with pytest.raises(ValueError, match=r"family.yaml, gpu: no scale 'gpu': they are laptop"):
        read_family(write(tmp_path), "gpu")


def test_pairs_and_metric_are_the_files(tmp_path: Path) -> None:
    plain = read_family(write(tmp_path), "laptop")
    assert (plain.pairs, plain.metric, plain.cells_of) == ((), Metric("bits_per_byte"), None)
    top = {"metric": {"name": "recall", "greater_is_better": True}}
    family = read_family(write(tmp_path, top, pairs=[["deep", "shallow"], ["timed", "deep"]]), "laptop")
    assert family.pairs == (("deep", "shallow"), ("timed", "deep"))
    assert family.metric.loss({"recall": 0.75}) < family.metric.loss({"recall": 0.5})
    assert plain.metric.loss({"bits_per_byte": 0.75}) > plain.metric.loss({"bits_per_byte": 0.5})
    assert load_family("speed", "laptop").cells_of == "table1"


def test_all_models_of_facts_learn_one_text() -> None:
    family = load_family("facts", "laptop")
    runs = [family.run(cell, cell.rates[0]) for cell in family.cells.values()]
    assert {(run.recipe.data, run.recipe.tokenizer, run.recipe.model.vocab_size) for run in runs} == {
        ("synthetic:facts:2000", None, 1024)  # so that all have one vocabulary
    }
    assert {run.recipe.training.num_tokens for run in runs} == {6_000_000}
    other = family.run(family.cells["dense"], family.cells["dense"].rates[0], data="synthetic:facts:1000")
    assert other.recipe.data == "synthetic:facts:1000"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cels": {}}, "no key 'cels': did you mean 'cells'? they are about, base, machine, cells"),
        ({"machine": {"name": "x", "peak_tflops": 0, "utilisation": 0.5}}, "must be > 0 and in (0, 1]"),
        ({"machine": {"name": "x", "tflops": 1}}, "unexpected keyword argument 'tflops'"),
        ({"cells": {"a": {"model.num_layers": 1}}}, "label is missing: the keys are label, rates, like"),
        ({"cells": {"a": {"label": "a", "rate": []}}}, "no key 'rate': did you mean 'rates'?"),
        ({"cells": {"a__b": {"label": "a"}}}, "cell 'a__b' must be made of a-z, 0-9 and single _"),
        (
            {"cells": {"a": {"label": "a", "model.layers": 2}}},
            "unknown option 'model.layers': did you mean 'model.num_layers'?",
        ),
        (
            {"cells": {"a": {"label": "a", "modle.width": 2}}},
            "unknown option 'modle.width': did you mean 'model.width'?",
        ),
        ({"cells": {"a": {"label": "a", "model.width": "wide"}}}, "model.width is wide but must be of type int"),
        (
            {"cells": {"a": {"label": "a", "training.lr": "fast"}}, "rates": [{}]},
            "training.lr is fast but must be of type float",
        ),
        ({"cells": {"a": {"label": "a", "memory.knn": 0}}}, "knn is 0 but must be an integer >= 1"),
        ({"cells": {"a": {"label": "a", "rates": [{"training.seed": 1}]}}}, "no key 'training.seed': "),
        (
            {"rates": [{"training.lr": 0.5}, {"training.lr": 0.5}]},
            "cell shallow tries the same rates twice: lr0.5, lr0.5",
        ),
        ({"pairs": [["deep", "shalow"]]}, "no cell 'shalow': did you mean 'shallow'?"),
        ({"pairs": [["deep"]]}, "not enough values to unpack"),
        ({"cells": {"a": {"label": "a", "like": "b"}}}, "cell a must have both like and match_seconds_of, or neither"),
        (
            {"cells": {"a": {"label": "a", "like": "b", "match_seconds_of": "a"}}},
            "no cell before a 'b': they are ",
        ),
        (
            {"cells": {"a": {"label": "a", "hashed": {0: "instead"}}}, "measures_speed": True},
            "measures_speed is true but hashed tables do not decode",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_is_named_with_what_is_right(changed: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^family\.yaml, laptop: ") as caught:
        read_family(write(tmp_path, **changed), "laptop")
    assert message in str(caught.value)


def test_an_unknown_key_at_the_top_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no key 'titel': did you mean 'title'"):
        read_family(write(tmp_path, {"titel": "T"}), "laptop")


def test_a_recipe_survives_its_document() -> None:
    recipe = Recipe("x", Path("o"), "t", ModelConfig(memory_layers=[1]), MemoryConfig(knn=3), TrainingConfig(lr=1.0))
    assert read_recipe(recipe.to_dict()) == recipe
    older = recipe.to_dict()
    del older["training"]["beta2"]
    assert read_recipe(older) == recipe  # written before the option was there, when its default was what it did
    with pytest.raises(ValueError, match=r"unknown option 'training\.momentum'"):
        read_recipe({"training": {"momentum": 0.9}})
