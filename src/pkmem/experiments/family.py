"""An experiment family: the models of one table or figure of the paper, as a file of configs/experiments says.

docs/experiments.md shows such a file, key by key.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pkmem.training.reading import check_known, read_recipe, read_yaml
from pkmem.training.recipe import Recipe

_RATES = ("training.lr", "training.value_lr")


@dataclass(frozen=True)
class Machine:
    """What the hours of a dry run are reckoned with.

    Args:
        name: of one processor or GPU.
        peak_tflops: its peak in the precision trained in, > 0.
        utilisation: share of the peak that training is expected to reach, in (0, 1].
    """

    name: str
    peak_tflops: float
    utilisation: float

    def __post_init__(self) -> None:
        if self.peak_tflops <= 0 or not 0 < self.utilisation <= 1:
            raise ValueError(
                f"machine has peak_tflops {self.peak_tflops} and utilisation {self.utilisation} "
                "but they must be > 0 and in (0, 1]"
            )


@dataclass(frozen=True)
class Metric:
    """What the models of a family are compared by, and their learning rates chosen.

    Args:
        name: of a figure in the summary of a trained model.
        greater_is_better: False for one that is best when low.
    """

    name: str = "bits_per_byte"
    greater_is_better: bool = False

    @property
    def title(self) -> str:
        """In words."""
        return self.name.replace("_", " ")

    def loss(self, summary: dict[str, Any]) -> float:
        """The figure of a trained model, with its sign turned if greater is better: the best model has the lowest."""
        figure: float = summary[self.name]
        return -figure if self.greater_is_better else figure


@dataclass(frozen=True)
class Cell:
    """One model of a family.

    Args:
        name: fit for a file name.
        label: as the report calls it.
        overrides: fields of the recipe by dotted name.
        rates: the learning rates to try, as overrides; with several the best of seed 0 is kept.
        like: the cell it has its overrides and rates from.
        match_seconds_of: train as many tokens as `like` manages in the training seconds of this cell.
        hashed: blocks whose memory is a table read by a hash of the last tokens, see `hashed_table.put_hashed_tables`.
    """

    name: str
    label: str
    overrides: dict[str, Any] = field(default_factory=dict)
    rates: tuple[dict[str, float], ...] = ({},)
    like: str | None = None
    match_seconds_of: str | None = None
    hashed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One model to train.

    Args:
        name: of its files, CELL__RATE__seedN.
        cell: the cell's name.
        rate: the learning rates as a short text.
        seed: >= 0.
        settings: what differs from the family's base recipe, by dotted name.
        recipe: the whole of it; `out` is not set.
        hashed: the cell's.
    """

    name: str
    cell: str
    rate: str
    seed: int
    settings: dict[str, Any]
    recipe: Recipe
    hashed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """The models of one table or figure at one scale.

    Args:
        name: of the file.
        scale: "laptop", "gpu" or "paper".
        title: one line.
        paper: the table or figure it answers.
        about: what the scale takes, and whether it was ever run.
        base: the file of the recipe that the cells override.
        base_recipe: the content of that file, overridden by the scale.
        overrides: those overrides by dotted name.
        cells: by name, in order.
        machine: for the hours of a dry run.
        trains: False where the speed alone is measured.
        measures_speed: measure prefill and decode of all cells, interleaved.
        processes: of a training run, >= 1.
        plot: fields of the recipe for the x axis and the series of a plot; may be empty.
        pairs: names of cells that the report compares, a model and its rival each.
        metric: what they are compared by.
        cells_of: the family that trains these models, where this one does not.
    """

    name: str
    scale: str
    title: str
    paper: str
    about: str
    base: Path
    base_recipe: dict[str, Any]
    overrides: dict[str, Any]
    cells: dict[str, Cell]
    machine: Machine
    trains: bool = True
    measures_speed: bool = False
    processes: int = 1
    plot: dict[str, str] = field(default_factory=dict)
    pairs: tuple[tuple[str, str], ...] = ()
    metric: Metric = Metric()
    cells_of: str | None = None

    def only(self, names: Iterable[str]) -> Family:
        """The family of some of its cells, and of those they need for equal seconds; their speed is not measured.

        Raises:
            ValueError: there is no such cell; the message lists those there are. Or the family measures speeds alone.
        """
        if not self.trains:  # a measurement counts for the whole family, its models in turns
            raise ValueError(f"{self.name} measures all its models in turns: leave --cells out")
        wanted = list(names)
        for name in wanted:
            check_known(name, list(self.cells), f"cell of {self.name}")
            wanted += [needed for needed in (self.cells[name].like, self.cells[name].match_seconds_of) if needed]
        cells = {name: cell for name, cell in self.cells.items() if name in wanted}
        return replace(self, cells=cells, measures_speed=False)

    def run(self, cell: Cell, rate: dict[str, float], seed: int = 0, data: str | None = None, **more: Any) -> Run:
        """The run of a cell with one of its rates.

        Args:
            cell: of this family.
            rate: learning rates, as overrides.
            seed: of weights and data order.
            data: what to learn instead of the base recipe's.
            more: further fields of `training`.
        """
        settings = self.overrides | cell.overrides | rate | {"training.seed": seed}
        settings |= {f"training.{name}": setting for name, setting in more.items()}
        settings |= {} if data is None else {"data": data}
        recipe = read_recipe(self.base_recipe, settings)
        rate_name = _rate_name(recipe)
        return Run(f"{cell.name}__{rate_name}__seed{seed}", cell.name, rate_name, seed, settings, recipe, cell.hashed)


def _rate_name(recipe: Recipe) -> str:
    values = f"_value_lr{recipe.training.value_lr:g}" if recipe.model.memory_layers else ""
    return f"lr{recipe.training.lr:g}{values}"


def config_folder() -> Path:
    """The folder of the recipes: inside an installed package, beside src in a checkout."""
    inside = Path(__file__).parents[1] / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[3] / "configs"


def family_names() -> list[str]:
    """The families there are."""
    return sorted(file.stem for file in (config_folder() / "experiments").glob("*.yaml"))


def load_family(name: str, scale: str) -> Family:
    """A family of configs/experiments at one of its scales.

    Raises:
        ValueError: no such family or scale, or a mistake in its file; the message lists the right ones.
    """
    check_known(name, family_names(), "experiment")
    return read_family(config_folder() / "experiments" / f"{name}.yaml", scale)


def read_family(file: Path, scale: str) -> Family:
    """The family in a file, at one of its scales.

    Raises:
        ValueError: the scale is not there, or there is a mistake in the file; the message lists the right ones.
    """
    document = read_yaml(file)
    try:
        _check_keys(document, ("title", "paper", "scales"), ("plot", "metric", "cells_of"))
        check_known(scale, list(document["scales"]), "scale")
        chosen = document["scales"][scale]
        if "cells_of" in document:  # another family's models, measured otherwise
            chosen = read_yaml(file.parent / f"{document['cells_of']}.yaml")["scales"][scale] | chosen
        return _family(file, scale, document, chosen)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file.name}, {scale}: {error}") from error


def _family(file: Path, scale: str, document: dict[str, Any], chosen: dict[str, Any]) -> Family:
    flags = ("trains", "measures_speed", "processes")
    _check_keys(chosen, ("about", "base", "machine", "cells"), (*flags, "overrides", "rates", "pairs"))
    base = (file.parent / chosen["base"]).resolve()
    overrides = chosen.get("overrides", {})
    family = Family(
        name=file.stem,
        scale=scale,
        title=document["title"],
        paper=document["paper"],
        about=chosen["about"],
        base=base,
        base_recipe=read_yaml(base),
        overrides=overrides,
        cells=_cells(chosen["cells"], tuple(chosen.get("rates", [{}]))),
        machine=Machine(**chosen["machine"]),
        plot=document.get("plot", {}),
        pairs=tuple((model, rival) for model, rival in chosen.get("pairs", [])),
        metric=Metric(**document.get("metric", {})),
        cells_of=document.get("cells_of"),
        **{name: chosen[name] for name in flags if name in chosen},
    )
    if family.measures_speed and any(cell.hashed for cell in family.cells.values()):
        raise ValueError("measures_speed is true but hashed tables do not decode: leave it out")
    for name in itertools.chain(*family.pairs):
        check_known(name, list(family.cells), "cell")
    for cell in family.cells.values():
        rates = [family.run(cell, rate).rate for rate in cell.rates]
        if len(set(rates)) < len(rates):
            raise ValueError(f"cell {cell.name} tries the same rates twice: {', '.join(rates)}")
    return family


def _cells(document: dict[str, dict[str, Any]], rates: tuple[dict[str, float], ...]) -> dict[str, Cell]:
    """The cells in order; a cell may speak of those before it."""
    cells: dict[str, Cell] = {}
    for name, given in document.items():
        if not re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", name):
            raise ValueError(f"cell {name!r} must be made of a-z, 0-9 and single _: it is part of file names")
        _check_keys(
            {key: None for key in given if "." not in key}, ("label",), ("rates", "like", "match_seconds_of", "hashed")
        )
        if ("like" in given) != ("match_seconds_of" in given):
            raise ValueError(f"cell {name} must have both like and match_seconds_of, or neither")
        for key in ("like", "match_seconds_of"):
            if key in given:
                check_known(given[key], list(cells), f"cell before {name}")
        model = cells.get(given.get("like", ""), Cell(name, "", rates=rates))
        cells[name] = Cell(
            name,
            given["label"],
            model.overrides | {key: setting for key, setting in given.items() if "." in key},
            tuple(given.get("rates", model.rates)),
            given.get("like"),
            given.get("match_seconds_of"),
            {str(layer): how for layer, how in given.get("hashed", model.hashed).items()},
        )
        for rate in cells[name].rates:
            _check_keys(rate, (), _RATES)
    return cells


def _check_keys(document: dict[str, Any], required: Iterable[str], optional: Iterable[str]) -> None:
    for key in document:
        check_known(key, [*required, *optional], "key")
    for key in required:
        if key not in document:
            raise ValueError(f"{key} is missing: the keys are {', '.join([*required, *optional])}")
